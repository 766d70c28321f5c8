"""Forwards from the statements that they are made of."""


def forward_of(body, space):
    """A function forward(self, x) of these lines, whose globals are `space`."""
    own = {}
    lines = "\n".join(f"    {line}" for line in body.split("\n"))
    exec(f"def forward(self, x):\n{lines}", space, own)
    return own["forward"]

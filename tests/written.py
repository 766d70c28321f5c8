"""Forwards made from source lines."""


def forward_of(body, space):
    """A function forward(self, x) of these lines, with `space` as its globals."""
    own = {}
    lines = "\n".join(f"    {line}" for line in body.split("\n"))
    exec(f"def forward(self, x):\n{lines}", space, own)
    return own["forward"]

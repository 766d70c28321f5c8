"""Lets a module stand in for one of torch's: names that it does not define are torch's."""

import sys


def stand_in(name, original):
    """__getattr__, __dir__ and __all__ for the module `name`, which stands in for the module `original`."""
    public = sorted(n for n in dir(original) if not n.startswith("_"))

    def get(attribute):
        try:
            return getattr(original, attribute)
        except AttributeError:
            raise AttributeError(f"module {name!r} has no attribute {attribute!r}") from None

    return get, lambda: sorted({*vars(sys.modules[name]), *public}), public

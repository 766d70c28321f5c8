"""What all layers have in common: torch.fx traces them as torch's layers, and they follow replacements of those."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch.fx import Proxy
from torch.nn import Identity, Module

from ._plain import is_plain

Forward = TypeVar("Forward", bound=Callable[..., Any])

# Stands for the layers of torch.nn where a tracer is asked about them.
_LAYER = Identity()


def layer(theirs: type[Module] | None = None) -> Callable[[Forward], Forward]:
    """Decorator of the forward of a layer.

    torch.fx's tracers tell torch's layers, which they do not trace through, by the name of their module. Here the layer
    itself puts its call into the graph, where the tracer would do so for one of torch's.

    Args:
        theirs: torch's layer of which this one is a copy, and whose forward it follows where another library replaces
            that; None for a layer that torch does not have.
    """
    original = None if theirs is None else theirs.forward

    def decorate(forward: Any) -> Any:
        @functools.wraps(forward)
        def run(self, input, *rest, **named):
            if isinstance(input, Proxy) and _is_leaf(self, input.tracer):
                path = input.tracer.path_of_module(self)
                return input.tracer.create_proxy("call_module", path, (input, *rest), named)
            if theirs is not None and theirs.forward is not original:
                return theirs.forward(self, input, *rest, **named)
            return forward(self, input, *rest, **named)

        return run

    return decorate


def _is_leaf(module, tracer):
    """Whether a tracer that comes upon this layer would not trace through it if it were torch's."""
    # torch's rule holds for the class itself. Hooks run before and after this call, and are traced.
    if type(module).__module__ != "tritonnet.nn" or not is_plain(module, (type(module),)):
        return False
    return module is not tracer.root and tracer.is_leaf_module(_LAYER, tracer.path_of_module(module))

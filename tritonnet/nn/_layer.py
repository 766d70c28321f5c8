"""What all layers have in common: torch.fx traces them as torch's layers, and they follow replacements of those."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch.fx import Proxy, Tracer
from torch.nn import Module, Sequential

from ._plain import is_plain

Forward = TypeVar("Forward", bound=Callable[..., Any])


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
    # Proxies that are made by hand have tracers that only append to a graph. torch's rule holds for the class itself.
    # Hooks run before and after this call, and are traced.
    cls = type(module)
    if not isinstance(tracer, Tracer) or cls.__module__ != "tritonnet.nn" or not is_plain(module, (cls,)):
        return False
    return module is not tracer.root and _is_leaf_as_torchs(module, cls, tracer)


def _is_leaf_as_torchs(module, cls, tracer):
    path = tracer.path_of_module(module)
    # A tracer may ask for the name of a class, for base classes or for this very layer.
    module.__class__ = next(c for c in cls.__mro__ if c.__module__.startswith("torch.nn") and c is not Sequential)
    try:
        return tracer.is_leaf_module(module, path)
    finally:
        module.__class__ = cls

"""Runs sequences of layers in an existing model as one kernel, such as convolution, batch norm, sum and relu."""

import operator
import sys
import weakref
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch

from .nn._plain import Model, check_model, global_hooks
from .registration import watched

# The code that calls a FusedCall.
_CALL = torch.nn.Module._wrapped_call_impl.__code__


def _methods_of(model):
    """[(function that gets the methods of a class and their code, the class, what it gets)] of all modules."""
    found = []
    for cls in dict.fromkeys(type(module) for module in model.modules()):
        names = {"forward", "__call__"}
        for base in cls.__mro__[: cls.__mro__.index(torch.nn.Module)]:
            kinds = FunctionType, property, staticmethod, classmethod
            own = {name: value for name, value in vars(base).items() if isinstance(value, kinds)}
            # An editor's reload puts new code into the existing function.
            code = (f"{name}.__code__" for name, value in own.items() if isinstance(value, FunctionType))
            names |= {*own, *(code if not base.__module__.startswith("torch.") else ())}
        fetch = operator.attrgetter(*sorted(names))
        found.append((fetch, cls, fetch(cls)))
    return found


def _unchanged(methods):
    try:
        return all([fetch(cls) == before for fetch, cls, before in methods])
    except AttributeError:
        return False


def calling(function):
    """A function that calls `function`, as Dynamo does not capture a function of torch's own that it starts from."""

    def call(*args, **kwargs):
        return function(*args, **kwargs)

    # Dynamo caches graphs for each code object, up to a limit, and skips code that it once found empty.
    call.__code__ = call.__code__.replace()
    return call


class FusedCall:
    """What a fused model does when it is called: Module._call_impl through Dynamo and the backend "tritonnet".

    It is stored where Module.compile stores its result, so that the model's class and state do not change.
    """

    def __init__(self, model, report, options):
        self.model, self.report, self.options = model, report, options
        self._capture()

    def _capture(self):
        # Importing Dynamo takes longer than all other imports.
        from .compiler import Backend, faithful

        self.faithful = faithful
        self._look()
        # A new backend, for which nothing is captured yet. Dynamo keeps every backend for good, so it must not hold a
        # strong reference to the model.
        look = weakref.WeakMethod(self._look)
        self.backend = Backend(type(self.model).__name__, self.report, faithful=True, captured=lambda: look()())
        self.compiled = torch.compile(calling(self.model._call_impl), backend=self.backend, **self.options)

    def _look(self):
        self.methods = _methods_of(self.model)

    def __call__(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            return self.model._call_impl(*args, **kwargs)
        # DataParallel and others create modules from a copy of the model's attributes, including this one.
        frame = sys._getframe(1)
        caller = frame.f_locals["self"] if frame.f_code is _CALL else self.model
        # Tracers see the model as it is written, and Dynamo does not notice global hooks.
        if caller is not self.model or torch.jit.is_tracing() or watched() or global_hooks():
            return caller._call_impl(*args, **kwargs)
        # Dynamo does not notice methods that are replaced on classes either.
        if not _unchanged(self.methods):
            self._capture()
        with self.faithful:
            result = self.compiled(*args, **kwargs)
        if self.backend.failure:
            failure, self.backend.failure = self.backend.failure, None
            raise failure
        return result

    def __deepcopy__(self, memo):
        return None

    def __reduce__(self):
        """Makes this None in copies and pickles of a model whose own __getstate__ includes it."""
        return type(None), ()


def fuse(
    model: Model, report: Callable[[str], object] | None = None, *, fullgraph: bool = False,
    dynamic: bool | None = None, options: dict[str, Any] | None = None,
) -> Model:  # fmt: skip
    """Run sequences of layers as one kernel.

    These are convolution, relu and max-pooling; convolution or linear with batch norm in evaluation, a sum and an
    activation, or some of them; several linears; batch norm or a sum with an activation. What remains alone and has a
    function of ours is computed by it. tritonnet/README.md lists all patterns and their limits.

    The model is compiled in place, as by Module.compile, with the backend "tritonnet": its class, parameters,
    state_dict, hooks and modes stay the same, and so do its results, side effects and errors. Dynamo captures what the
    model computes when it is called, and again when an attribute, a layer, a hook or a method has changed; code that it
    cannot capture runs as Python. Copies and unpickled models are not fused. Calling one of the layers, or `forward`,
    directly runs unfused.

    Args:
        model: torch.nn.Module of torch.nn's layers or tritonnet's, changed in place.
        report: function such as print, called with a line for each captured graph: what was fused, what was not and
            why, and where Python runs between graphs.
        fullgraph, dynamic: as for torch.compile.
        options: {"backend": name} of another backend of torch.compile, which then compiles the whole graph, fused calls
            included, and that backend's own options. With None, the rest of the graph runs as it is.

    Returns:
        model. `tritonnet.revert(model)` undoes it.

    Raises:
        TypeError: model is not a torch.nn.Module.
        ValueError: options do not name a backend.
    """
    check_model(model)
    if options and "backend" not in options:
        raise ValueError(f"options must name a 'backend', got {options}")
    model._compiled_call_impl = FusedCall(model, report, dict(fullgraph=fullgraph, dynamic=dynamic, options=options))
    return model

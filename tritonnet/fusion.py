"""Has rows of layers in an existing model run as one kernel: convolution, rectifier, pooling; linears, rectifiers."""

import operator
import sys
import weakref
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch

from .nn._plain import Model, check_model, global_hooks
from .registration import watched

# What calls a FusedCall.
_CALL = torch.nn.Module._wrapped_call_impl.__code__


def _methods_of(model):
    """[(function that fetches the methods of a class and their code, the class, what it fetches)] of all modules."""
    found = []
    for cls in dict.fromkeys(type(module) for module in model.modules()):
        names = {"forward", "__call__"}
        for base in cls.__mro__[: cls.__mro__.index(torch.nn.Module)]:
            kinds = FunctionType, property, staticmethod, classmethod
            own = {name: value for name, value in vars(base).items() if isinstance(value, kinds)}
            # An editor's reload puts other code into the function that is there.
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
    """A function that calls this one, for Dynamo, which does not look into torch's own where it is told to begin."""

    def call(*args, **kwargs):
        return function(*args, **kwargs)

    # What is captured is kept with the code, a limited number of graphs, and so is that there is nothing to capture.
    call.__code__ = call.__code__.replace()
    return call


class FusedCall:
    """What a fused model does when it is called: Module._call_impl through Dynamo and the backend "tritonnet".

    The model keeps it where Module.compile keeps what it makes, so that neither its class nor its state changes.
    """

    def __init__(self, model, report, options):
        self.model, self.report, self.options = model, report, options
        self._capture()

    def _capture(self):
        # Dynamo takes longer to import than all else.
        from .compiler import Backend, faithful

        self.faithful = faithful
        self._look()
        # A new one, for which nothing is captured yet.
        # Dynamo keeps every backend for good, and would keep the model with it.
        look = weakref.WeakMethod(self._look)
        self.backend = Backend(type(self.model).__name__, self.report, faithful=True, captured=lambda: look()())
        self.compiled = torch.compile(calling(self.model._call_impl), backend=self.backend, **self.options)

    def _look(self):
        self.methods = _methods_of(self.model)

    def __call__(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            return self.model._call_impl(*args, **kwargs)
        # DataParallel and others make modules of a copy of the model's attributes, this one among them.
        frame = sys._getframe(1)
        caller = frame.f_locals["self"] if frame.f_code is _CALL else self.model
        # Whoever traces the model sees it as it is written; and Dynamo does not hear of hooks on all modules.
        if caller is not self.model or torch.jit.is_tracing() or watched() or global_hooks():
            return caller._call_impl(*args, **kwargs)
        # Nor does it hear of methods that are replaced on classes.
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
        """A model whose own __getstate__ hands this on is copied and pickled without it, as others are."""
        return type(None), ()


def fuse(
    model: Model, report: Callable[[str], object] | None = None, *, fullgraph: bool = False,
    dynamic: bool | None = None, options: dict[str, Any] | None = None,
) -> Model:  # fmt: skip
    """Have convolution, rectifier and max-pooling in a row run as one kernel, linear with rectifier, chains of these.

    The model is compiled in place, as by Module.compile, with the backend "tritonnet": its class, parameters,
    state_dict, hooks and modes stay, and so do its numbers, side effects and errors. Dynamo captures what it computes
    when it is called, and anew when an attribute, a layer, a hook or a method has changed since; code that it cannot
    capture runs as Python. Copies and unpickled models are not fused, and neither is a call of one of its layers, or of
    `forward`, by itself.

    Args:
        model: torch.nn.Module of torch.nn's layers or tritonnet's, changed in place.
        report: function that is called with a line for each graph when it is captured, such as print: what was fused,
            what was not and why, and where Python runs between graphs.
        fullgraph, dynamic: as torch.compile takes them.
        options: {"backend": name} of another backend of torch.compile, which compiles what is fused and what is not,
            and options of that one; None runs the rest as it is.

    Returns:
        model. `tritonnet.revert(model)` undoes it.

    Raises:
        TypeError: model is not a torch.nn.Module.
        ValueError: options without a backend that takes them.
    """
    check_model(model)
    if options and "backend" not in options:
        raise ValueError(f"options must name a 'backend', got {options}")
    model._compiled_call_impl = FusedCall(model, report, dict(fullgraph=fullgraph, dynamic=dynamic, options=options))
    return model

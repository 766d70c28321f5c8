"""Registers an operator and its autograd rule with PyTorch.

Private names of PyTorch in this file:

- `_SingleLevelFunction`, `enable_single_level_autograd_function`: when the dispatcher calls an Autograd kernel, it has
  peeled off one functorch level, so the kernel must record on that level alone. The public Function.apply would start
  again from the outermost level. `_are_functorch_transforms_active` tells whether there are levels.
- `_AutoDispatchBelowAutograd`: calls the operator's own body from inside an autograd rule. The public way, a second
  operator without an Autograd kernel, doubles the calls and the names. `_AutoDispatchBelowADInplaceOrView` also skips
  the counting of writes. `_after_autograd_keyset` and `_after_ADInplaceOrView_keyset` hold the dispatch keys that
  follow: a call that goes on with these, by `redispatch`, is the same one to a profiler, which lists it once.
- `_set_fwd_grad_enabled`: apply turns recording off during forward, on every level, but the levels below must go on
  recording, backward (torch.enable_grad) and forward mode (this). Without it a gradient of a gradient is silently zero.
- `OpOverload._schema`: the operator's name and results, and whether it overwrites an argument.
- `forward_ad._current_level`: whether forward mode records. Without it and requires_grad nothing records, and the
  Function, which takes longer than the kernel of a small batch, is skipped.
- `_len_torch_dispatch_stack`: whether a dispatch mode, such as make_fx's, sees the operators that are called.
"""

import functools
import threading

import torch
import torch.autograd.forward_ad as forward_ad
from torch._C import (
    _after_ADInplaceOrView_keyset,
    _after_autograd_keyset,
    _are_functorch_transforms_active,
    _AutoDispatchBelowADInplaceOrView,
    _AutoDispatchBelowAutograd,
    _len_torch_dispatch_stack,
)
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction

_LIBRARY = torch.library.Library("tritonnet", "DEF")


class _Call(threading.local):
    """The dispatch keys of the operator's call whose autograd rule runs in this thread."""

    keys = None


_CALL = _Call()


def register_operator(schema, fake, run):
    """Define the operator `tritonnet::NAME`.

    Args:
        schema: "NAME(arguments) -> results", without default values, as those are not passed to Python kernels.
        fake: function of the arguments that returns uninitialised results, for meta and fake tensors.
        run: function of the arguments that computes the results, on real tensors below autograd.

    Returns:
        The operator, torch.ops.tritonnet.NAME.default.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tritonnet::{name}", fake, lib=_LIBRARY)
    operator = getattr(torch.ops.tritonnet, name).default
    if operator._schema.is_mutable:
        _register_writes(operator)
    return operator


def _register_writes(operator):
    """Register what torch only does by itself for operators that return the argument that they overwrite.

    Args:
        operator: overwrites its first argument, its only tensor, and returns nothing, or overwrites other arguments.
    """
    schema = operator._schema
    name, in_place = schema.name.partition("::")[2], not schema.returns
    written = [i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]

    def count(keys, *args):
        """Counts a write that no autograd rule counts."""
        for t in [args[i] for i in written if args[i] is not None]:
            if not t.is_inference():
                torch.autograd.graph.increment_version(t)
            elif in_place:
                raise RuntimeError(f"{name}: a tensor made in inference mode can be overwritten there only")
        with _AutoDispatchBelowADInplaceOrView():
            return operator.redispatch(keys & _after_ADInplaceOrView_keyset, *args)

    def through_a_copy(*args):
        """Runs on copies of tensors whose memory holds their negated elements, such as z.conj().imag."""
        copies = [a.resolve_neg() if isinstance(a, torch.Tensor) else a for a in args]
        results = operator(*copies)
        for i in written:
            if args[i] is not copies[i]:
                args[i].copy_(copies[i])
        return results

    _LIBRARY.impl(name, count, "ADInplaceOrView", with_keyset=True)
    _LIBRARY.impl(name, through_a_copy, "Negative")


def register_functional(operator, function):
    """Make torch's functionalization, as of exported programs, call function(*args) instead.

    Without a rule the operator would stay in the graph, within one of torch's that has no decomposition.

    Args:
        operator: overwrites arguments.
        function: has the same results and effects by functional operators and by torch's own in-place ones.
    """
    _LIBRARY.impl(operator._schema.name.partition("::")[2], function, "Functionalize")


def in_transforms():
    """Whether torch.func's transforms are active."""
    return _are_functorch_transforms_active()


def watched():
    """Whether torch.func's transforms or dispatch modes are active, so that tensors may not be real ones."""
    return _are_functorch_transforms_active() or _len_torch_dispatch_stack() > 0


def recorded(args):
    """Whether autograd records an operator on these arguments."""
    if _are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any([isinstance(a, torch.Tensor) and a.requires_grad for a in args])


def register_autograd(operator, alone=None, prepare=None, apart=None):
    """Class decorator: makes an autograd.Function with forward(ctx, ...), backward and jvp the operator's rule.

    Args:
        operator: whose rule it is.
        alone: an operator on the same arguments whose result is the first of `operator`. Where autograd records it,
            `operator` takes its place, whose other results the derivatives need.
        prepare: function of the arguments that returns others with the same result, for which the rule is written.
        apart: function of the arguments that calls other operators, for torch.func's transforms and forward mode; the
            rule needs no jvp then.
    """

    def decorate(function):
        rules = {name: vars(function)[name] for name in ("forward", "backward", "jvp") if name in vars(function)}
        single_level = type(function.__name__, (_SingleLevelFunction,), rules)
        # What Function.apply calls after checking for functorch levels, which takes microseconds.
        record = super(torch.autograd.Function, function).apply
        in_place = not operator._schema.returns

        def autograd_kernel(*args):
            if apart is not None and (_are_functorch_transforms_active() or forward_ad._current_level >= 0):
                return apart(*args)
            if _are_functorch_transforms_active():
                args = args if prepare is None else prepare(*args)
                with enable_single_level_autograd_function():
                    result = single_level.apply(*args)
            elif in_place or recorded(args):
                result = record(*(args if prepare is None else prepare(*args)))
            else:
                result = below_autograd(operator, *args)
            return None if in_place else result

        def first_result(*args):
            if recorded(args):
                return autograd_kernel(*args)[0]
            return below_autograd(alone, *args)

        _register_autograd_kernel(operator, autograd_kernel)
        if alone is not None:
            _register_autograd_kernel(alone, first_result)
        return function

    return decorate


def register_decomposition(operator):
    """Decorator: makes function(*args), which calls other operators, take the operator's place where it is recorded.

    The derivatives of any order are then those of the other operators.
    """

    def decorate(function):
        def autograd_kernel(*args):
            if recorded(args):
                return function(*args)
            return below_autograd(operator, *args)

        _register_autograd_kernel(operator, autograd_kernel)
        return function

    return decorate


def register_constant(operator):
    """Make autograd take the operator's results for constants, without a warning."""
    _register_autograd_kernel(operator, functools.partial(below_autograd, operator))


def register_batching(operator):
    """Decorator: makes rule(info, dims, *args) -> (results, their dims) the operator's rule for torch.func.vmap."""

    def decorate(rule):
        torch.library.register_vmap(operator, rule, lib=_LIBRARY)
        return rule

    return decorate


def _register_autograd_kernel(operator, kernel):
    """Register kernel(*args), within which below_autograd goes on with the call."""

    def with_keys(keys, *args):
        _CALL.keys = keys
        return kernel(*args)

    _LIBRARY.impl(operator._schema.name.partition("::")[2], with_keys, "Autograd", with_keyset=True)


def below_autograd(operator, *args, counted=False):
    """Call the operator's own body from inside its autograd rule, as the call that the rule is for.

    Args:
        counted: whether the rule itself counts writes, as ctx.mark_dirty does.
    """
    below = _AutoDispatchBelowADInplaceOrView if counted else _AutoDispatchBelowAutograd
    if _are_functorch_transforms_active():
        with torch.enable_grad(), _set_fwd_grad_enabled(True), below():
            return operator(*args)
    keys = _CALL.keys & (_after_ADInplaceOrView_keyset if counted else _after_autograd_keyset)
    with below():
        return operator.redispatch(keys, *args)


def in_backward(operator, *args):
    """operator(*args) in the backward of a rule, skipping its Autograd kernel if no second derivative is recorded.

    Finding that out in the Autograd kernel takes Python as long as a kernel launch.
    """
    if torch.is_grad_enabled() or forward_ad._current_level >= 0 or _are_functorch_transforms_active():
        return operator(*args)
    # Dynamo, which traces this in compiled autograd, does not support the guard in below_autograd.
    if torch.compiler.is_compiling():
        return operator(*args)
    with _AutoDispatchBelowAutograd():
        return operator(*args)

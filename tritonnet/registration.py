"""Registers an operator and its autograd rule with PyTorch.

Every private name of PyTorch that this package uses stands in this file:

- `_SingleLevelFunction`, `enable_single_level_autograd_function`: the dispatcher has peeled off one functorch level
  when it calls an Autograd kernel, so the kernel must record on that level alone; the public Function.apply would start
  again from the outermost one. `_are_functorch_transforms_active` tells when.
- `_AutoDispatchBelowAutograd`: from inside an autograd rule to the operator's own body. The public way, a second
  operator without an Autograd kernel, doubles the calls and the names. `_AutoDispatchBelowADInplaceOrView` is past the
  counting of writes too, and `_after_ADInplaceOrView_keyset` is where a call goes on from there.
- `_set_fwd_grad_enabled`: apply turns recording off during forward, on every level; the levels below must go on
  recording, backward (torch.enable_grad) and forward mode (this). Without it a gradient of a gradient is silently zero.
- `OpOverload._schema`: the operator's name and results, and whether it overwrites an argument, as they were defined
  here.
- `forward_ad._current_level`: whether forward mode records; without it and requires_grad nothing does, and a Function,
  which takes longer than the kernel of a small batch, is left out.
- `_len_torch_dispatch_stack`: whether a mode, such as make_fx's, wants to see the operators that are called.
"""

import torch
import torch.autograd.forward_ad as forward_ad
from torch._C import (
    _after_ADInplaceOrView_keyset,
    _are_functorch_transforms_active,
    _AutoDispatchBelowADInplaceOrView,
    _AutoDispatchBelowAutograd,
    _len_torch_dispatch_stack,
)
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction

_LIBRARY = torch.library.Library("tritonnet", "DEF")


def register_operator(schema, fake, run):
    """Define the operator `tritonnet::NAME`.

    Args:
        schema: "NAME(arguments) -> results", without default values, which Python kernels would not be passed.
        fake: function of the arguments that returns uninitialised results, for meta and fake tensors.
        run: function of the arguments that does the work, on real tensors below autograd.

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
    """What torch does by itself for operators that return what they overwrite, and for no others.

    Args:
        operator: overwrites its one argument and returns nothing.
    """
    name = operator._schema.name.partition("::")[2]

    def count(keys, x):
        """The write is counted where no autograd rule does it: in inference mode, of a tensor from outside."""
        if x.is_inference():
            raise RuntimeError(f"{name}: a tensor made in inference mode can be overwritten there only")
        torch.autograd.graph.increment_version(x)
        with _AutoDispatchBelowADInplaceOrView():
            operator.redispatch(keys & _after_ADInplaceOrView_keyset, x)

    def through_a_copy(x):
        """Of a tensor whose memory holds the negative of its elements, as that of z.conj().imag does."""
        y = x.resolve_neg()
        operator(y)
        x.copy_(y)

    _LIBRARY.impl(name, count, "ADInplaceOrView", with_keyset=True)
    _LIBRARY.impl(name, through_a_copy, "Negative")


def in_transforms():
    """Whether torch.func's transforms are at work."""
    return _are_functorch_transforms_active()


def watched():
    """Whether torch.func's transforms or dispatch modes stand between the caller and real tensors."""
    return _are_functorch_transforms_active() or _len_torch_dispatch_stack() > 0


def _recorded(args):
    """Whether autograd has anything to record of an operator on these arguments, outside torch.func's transforms."""
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any([isinstance(a, torch.Tensor) and a.requires_grad for a in args])


def register_autograd(operator):
    """Class decorator: make an autograd.Function with forward(ctx, ...), backward and jvp the operator's rule."""

    def decorate(function):
        rules = {name: vars(function)[name] for name in ("forward", "backward", "jvp")}
        single_level = type(function.__name__, (_SingleLevelFunction,), rules)
        # What Function.apply calls once it has looked for levels and found none, which takes microseconds.
        record = super(torch.autograd.Function, function).apply
        returns_nothing, overwrites = not operator._schema.returns, operator._schema.is_mutable

        def autograd_kernel(*args):
            if _are_functorch_transforms_active():
                with enable_single_level_autograd_function():
                    result = single_level.apply(*args)
            elif overwrites or _recorded(args):
                result = record(*args)
            else:
                result = below_autograd(operator, *args)
            return None if returns_nothing else result

        _LIBRARY.impl(operator._schema.name.partition("::")[2], autograd_kernel, "Autograd")
        return function

    return decorate


def register_batching(operator):
    """Decorator: make rule(info, dims, *args) -> (results, their dims) what torch.func.vmap does with the operator."""

    def decorate(rule):
        torch.library.register_vmap(operator, rule, lib=_LIBRARY)
        return rule

    return decorate


def below_autograd(operator, *args, counted=False):
    """Call the operator's own body from inside its autograd rule.

    Args:
        counted: whether the rule counts what is overwritten itself, as ctx.mark_dirty does.
    """
    below = _AutoDispatchBelowADInplaceOrView if counted else _AutoDispatchBelowAutograd
    if _are_functorch_transforms_active():
        with torch.enable_grad(), _set_fwd_grad_enabled(True), below():
            return operator(*args)
    with below():
        return operator(*args)


def in_backward(operator, *args):
    """operator(*args) in the backward of a rule: past its Autograd kernel where nothing records a second derivative.

    Python takes as long to find that out there as the launch of a kernel.
    """
    if torch.is_grad_enabled() or forward_ad._current_level >= 0 or _are_functorch_transforms_active():
        return operator(*args)
    # Dynamo, which comes here in compiled autograd, does not know the guard.
    return operator(*args) if torch.compiler.is_compiling() else below_autograd(operator, *args)

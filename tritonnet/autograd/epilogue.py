"""The derivatives of epilogues, alone and behind a convolution or a product.

The rules are for the form y = act(z * scale + shift + residual): `_folded` brings the others into it, in operators that
autograd records. Where activations.by_result is false, backward computes act's argument again.
"""

import torch

from .. import ops
from ..kernels import activations
from ..registration import below_autograd, recorded, register_autograd, register_decomposition
from ._common import save, total
from .conv2d import conv2d_grads, conv2d_tangent
from .linear import linear_grads, linear_tangent

_NOTHING = (None,) * 3


def _folded(bias, mean, var, scale, shift, residual, eps, activation, slope):
    """The arguments of an epilogue without bias, mean and var, its vectors in the type of its sums."""
    scale, shift, *others = (
        t.float() if t is not None and t.dtype in (torch.float16, torch.bfloat16) else t
        for t in (scale, shift, bias, mean, var)
    )
    bias, mean, var = others
    if var is not None:
        factor = (var + eps).rsqrt()
        scale = factor if scale is None else scale * factor
    before = total(bias, None if mean is None else -mean)
    if before is not None:
        shift = total(before if scale is None else before * scale, shift)
    return None, None, scale, shift, residual, 0.0, activation, slope


def _of_image(x, *arguments):
    return x, *_folded(None, *arguments)


def _of_convolution(x, w, bias, stride, padding, dilation, groups, pad_mode, *arguments):
    return x, w, None, stride, padding, dilation, groups, pad_mode, *_folded(bias, *arguments)


def _of_product(x, w, bias, *arguments):
    return x, w, None, *_folded(bias, *arguments)


def _along(vector, shape):
    """A vector over the channels, in a shape that broadcasts."""
    return vector.view(-1, *(1,) * (len(shape) - 2))


def _scaled(t, scale):
    """t with its channels times scale."""
    return t if scale is None else ops.epilogue(t, None, None, scale, None, None, 0.0, "none", 0.0)


class _Rule(torch.autograd.Function):
    """The rule of an operator whose epilogue has the arguments scale, shift, residual, activation and slope.

    A subclass sets `operator`, how many of its arguments come before the epilogue's, and what z is of these.
    """

    first: int

    @classmethod
    def compute(cls, ctx, *args):
        y = below_autograd(cls.operator, *args)
        ctx.before, (_, _, scale, shift, residual, _, ctx.activation, ctx.slope) = args[: cls.first], args[cls.first :]
        ctx.shape, ctx.dtype, ctx.linear = y.shape, y.dtype, ctx.activation == "none"
        by_result = activations.by_result(ctx.activation, ctx.slope)
        # What is not needed is not kept: it may be overwritten, and takes memory. Torch's sums keep nothing.
        if cls.operator == ops.epilogue and by_result and scale is None:
            ctx.before = (None,)
        ctx.tensors = [isinstance(a, torch.Tensor) for a in ctx.before]
        kept = [a for a in ctx.before if isinstance(a, torch.Tensor)]
        ctx.before = [None if isinstance(a, torch.Tensor) else a for a in ctx.before]
        save(ctx, scale, shift, None if by_result else residual, y if by_result and not ctx.linear else None, *kept)
        return y

    @classmethod
    def saved(cls, ctx, needs_z):
        """(the arguments before the epilogue's, scale, shift, what activation_grad takes, or None; z, or None)."""
        scale, shift, residual, t, *kept = ctx.saved_tensors
        kept = iter(kept)
        before = [next(kept) if is_tensor else a for is_tensor, a in zip(ctx.tensors, ctx.before)]
        z = cls.z(*before) if needs_z else None
        if t is None and not ctx.linear:
            rest = None, None, scale, shift, residual, 0.0, "none", 0.0
            t = ops.epilogue(z, *rest) if needs_z else cls.operator(*before, *rest)
        return before, scale, shift, t, z

    @classmethod
    def gradients(cls, ctx, dy):
        """The gradient of z, and those of the epilogue's arguments."""
        needs_scale, needs_shift, needs_residual = ctx.needs_input_grad[cls.first + 2 : cls.first + 5]
        before, scale, shift, t, z = cls.saved(ctx, needs_scale)
        dz = dy if ctx.linear else ops.activation_grad(dy, t, ctx.activation, ctx.slope)
        pixels = [dim for dim in range(dz.dim()) if dim != 1]
        dscale = (dz.to(scale.dtype) * z).sum(pixels) if needs_scale else None
        dshift = dz.sum(pixels, dtype=shift.dtype) if needs_shift else None
        rest = None, None, dscale, dshift, dz if needs_residual else None, *_NOTHING
        return before, _scaled(dz, scale), rest

    @classmethod
    def tangent(cls, ctx, of_z, tscale, tshift, tresidual):
        """of_z: function of the arguments before the epilogue's that returns the tangent of z."""
        before, scale, _, t, z = cls.saved(ctx, tscale is not None)
        tz = of_z(*before)
        of_scale = None if tscale is None else z * _along(tscale, ctx.shape)
        of_shift = None if tshift is None else _along(tshift, ctx.shape)
        tangent = total(None if tz is None else _scaled(tz, scale), tresidual, of_scale, of_shift)
        tangent = tangent.to(ctx.dtype).expand(ctx.shape)
        # A tangent of its own, as the result may be overwritten.
        return tangent.clone() if ctx.linear else ops.activation_grad(tangent, t, ctx.activation, ctx.slope)


@register_autograd(ops.epilogue, prepare=_of_image)
class Epilogue(_Rule):
    """y = act(x * scale + shift + residual)."""

    operator, first = ops.epilogue, 1

    @staticmethod
    def forward(ctx, *args):
        return Epilogue.compute(ctx, *args)

    @staticmethod
    def z(x):
        return x

    @staticmethod
    def backward(ctx, dy):
        _, dx, rest = Epilogue.gradients(ctx, dy)
        return dx, *rest

    @staticmethod
    def jvp(ctx, tx, _, __, tscale, tshift, tresidual, *___):
        return Epilogue.tangent(ctx, lambda x: tx, tscale, tshift, tresidual)


@register_autograd(ops.linear_epilogue, prepare=_of_product)
class LinearEpilogue(_Rule):
    """y = act(x wT * scale + shift + residual), over matrices."""

    operator, first = ops.linear_epilogue, 3

    @staticmethod
    def forward(ctx, *args):
        return LinearEpilogue.compute(ctx, *args)

    @staticmethod
    def z(x, w, _):
        return ops.linear(x, w, None)

    @staticmethod
    def backward(ctx, dy):
        (x, w, _), dz, rest = LinearEpilogue.gradients(ctx, dy)
        return *linear_grads(ctx, dz, x, w), *rest

    @staticmethod
    def jvp(ctx, tx, tw, _, __, ___, tscale, tshift, tresidual, *____):
        def of_z(x, w, _):
            return linear_tangent(x, w, tx, tw, None)

        return LinearEpilogue.tangent(ctx, of_z, tscale, tshift, tresidual)


@register_autograd(ops.conv2d_epilogue, prepare=_of_convolution)
class Conv2dEpilogue(_Rule):
    """y = act((x * w) * scale + shift + residual)."""

    operator, first = ops.conv2d_epilogue, 8

    @staticmethod
    def forward(ctx, *args):
        return Conv2dEpilogue.compute(ctx, *args)

    @staticmethod
    def z(x, w, _, *geometry):
        return ops.conv2d(x, w, None, *geometry)

    @staticmethod
    def backward(ctx, dy):
        (x, w, _, *geometry), dz, rest = Conv2dEpilogue.gradients(ctx, dy)
        return *conv2d_grads(ctx, dz, x, w, geometry), *rest

    @staticmethod
    def jvp(ctx, tx, tw, *others):
        def of_z(x, w, _, *geometry):
            return conv2d_tangent(x, w, tx, tw, None, None, geometry)

        return Conv2dEpilogue.tangent(ctx, of_z, *others[8:11])


@register_decomposition(ops.activation_grad)
def _activation_grad(dy, t, activation, slope):
    return activations.gradient(dy, t, activation, slope)


def _with_argument(x, activation, slope):
    """The arguments of the rule: where it needs act's argument, a recorded copy of it, for second derivatives."""
    # torch's leaky_relu_ keeps no copy either, and has no gradient for a negative slope.
    copied = not activations.by_result(activation, abs(slope)) and recorded((x,))
    return x, activation, slope, x.clone() if copied else None


@register_autograd(ops.activate_, prepare=_with_argument)
class ActivateInplace(torch.autograd.Function):
    """x = act(x), in place; `before` is a copy of act's argument, or None. The gradient goes through x alone.

    Where x is a view, the engine takes the gradient of its base from that of the first argument.
    """

    @staticmethod
    def forward(ctx, x, activation, slope, before):
        below_autograd(ops.activate_, x, activation, slope, counted=True)
        ctx.mark_dirty(x)
        save(ctx, x if before is None else before)
        ctx.activation, ctx.slope = activation, slope
        return x

    @staticmethod
    def times_slope(ctx, dy):
        if ctx.activation == "leaky_relu" and ctx.slope < 0:
            raise RuntimeError(f"leaky_relu in place has no derivative for a negative slope, got {ctx.slope}")
        return ops.activation_grad(dy, *ctx.saved_tensors, ctx.activation, ctx.slope)

    @staticmethod
    def backward(ctx, dy):
        return ActivateInplace.times_slope(ctx, dy), *_NOTHING

    @staticmethod
    def jvp(ctx, tx, *_):
        # A copy of the tangent, which further derivatives may need and which is overwritten.
        tx.copy_(ActivateInplace.times_slope(ctx, tx.clone()))
        # The engine checks by its version that the tangent was overwritten, and a batched tensor does not count copies.
        torch.autograd.graph.increment_version(tx)
        return tx

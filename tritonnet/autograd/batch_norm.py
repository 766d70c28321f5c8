"""The derivatives of batch norm in training, alone and between two convolutions.

mean and var are constants for autograd, as they are those of x: the rules take the derivative through them.
Derivatives of derivatives are torch's, of the statistics and the formulas below, computed again from x.
"""

import torch

from .. import ops
from ..kernels import activations
from ..registration import below_autograd, in_backward, register_autograd, register_constant, register_decomposition
from ._common import save, total
from .conv2d import grads_of


def _along(vector, x):
    """A vector over the channels, in a shape that broadcasts with x; None stays None."""
    return None if vector is None else vector.to(x.dtype).view(-1, *(1,) * (x.dim() - 2))


def _pixels(x):
    return [dim for dim in range(x.dim()) if dim != 1]


def _normed(x, eps):
    """(x with mean 0 and variance 1, 1 / sqrt(var + eps)), in the type of sums, recorded by autograd."""
    wide = x if x.dtype == torch.float64 else x.float()
    var, mean = torch.var_mean(wide, _pixels(x), correction=0, keepdim=True)
    rstd = (var + eps).rsqrt()
    return (wide - mean) * rstd, rstd


def _affine(xhat, scale, shift):
    u = xhat if scale is None else xhat * _along(scale, xhat)
    return u if shift is None else u + _along(shift, xhat)


@register_autograd(ops.batch_norm)
class BatchNorm(torch.autograd.Function):
    """y = act((x - mean) / sqrt(var + eps) * scale + shift + residual)."""

    @staticmethod
    def forward(ctx, x, mean, var, scale, shift, residual, eps, activation, slope):
        y = below_autograd(ops.batch_norm, x, mean, var, scale, shift, residual, eps, activation, slope)
        by_result = activations.by_result(activation, slope)
        # Without a residual backward computes the activation's argument again.
        added = residual is not None and activation != "none"
        kept = y if added and by_result else None
        # The argument alone depends on the shift: autograd reports writes to what is saved.
        of_argument = None if kept is not None or activation == "none" else shift
        save(ctx, x, mean, var, scale, of_argument, kept, None if by_result else residual)
        ctx.values, ctx.of_shift = (eps, activation, slope), None if shift is None else shift.dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        x, mean, var, scale, shift, y, residual = ctx.saved_tensors
        eps, activation, slope = ctx.values
        dz, with_dz = dy, y is not None and ctx.needs_input_grad[5]
        if residual is not None:
            t = ops.batch_norm(x, mean, var, scale, shift, residual, eps, "none", 0.0)
            dz = dy = ops.activation_grad(dy, t, activation, slope)
            activation = "none"
        arguments = dy, x, y, mean, var, scale, shift, eps, activation, slope, with_dz, False
        dx, dscale, dshift, masked, _ = in_backward(ops.batch_norm_grad, *arguments)
        needs = ctx.needs_input_grad
        return (
            dx if needs[0] else None, None, None, dscale.to(scale.dtype) if needs[3] else None,
            dshift.to(ctx.of_shift) if needs[4] else None, (masked if with_dz else dz) if needs[5] else None,
            None, None, None,
        )  # fmt: skip

    @staticmethod
    def jvp(ctx, tx, _, __, tscale, tshift, tresidual, *___):
        x, mean, var, scale, shift, y, residual = ctx.saved_tensors
        eps, activation, slope = ctx.values
        xhat, rstd = _normed(x, eps)
        tz = []
        if tx is not None:
            wide, dims = tx.to(xhat.dtype), _pixels(x)
            centred = wide - wide.mean(dims, keepdim=True)
            that = (centred - xhat * (xhat * wide).mean(dims, keepdim=True)) * rstd
            tz.append(that if scale is None else that * _along(scale, xhat))
        tz.append(None if tscale is None else xhat * _along(tscale, xhat))
        tz.append(None if tshift is None else _along(tshift, xhat).expand_as(xhat))
        tz.append(None if tresidual is None else tresidual.to(xhat.dtype))
        tangent = total(*tz)
        if activation == "none":
            return tangent.to(x.dtype).clone()
        if y is None:
            u = _affine(xhat, scale, shift)
            u = u if residual is None else u + residual
            y = activations.activated(u, activation, slope) if activations.by_result(activation, slope) else u
        return ops.activation_grad(tangent, y.to(xhat.dtype), activation, slope).to(x.dtype)


@register_decomposition(ops.batch_norm_grad)
def _gradients(dy, x, y, mean, var, scale, shift, eps, activation, slope, with_dz, with_y):
    xhat, rstd = _normed(x, eps)
    dz, result = dy.to(xhat.dtype), None
    if activation != "none" or with_y:
        u = _affine(xhat, scale, shift)
        result = activations.activated(u, activation, slope)
        t = (result if activations.by_result(activation, slope) else u) if y is None else y.to(xhat.dtype)
        dz = ops.activation_grad(dz, t, activation, slope)
    dims = _pixels(x)
    dshift, dscale = dz.sum(dims), (dz * xhat).sum(dims)
    count = x.numel() // x.shape[1]
    dx = (dz - _along(dshift, xhat) / count - xhat * _along(dscale, xhat) / count) * rstd
    dx = dx if scale is None else dx * _along(scale, xhat)
    kept = [t.to(x.dtype) if wanted else x.new_empty(0) for t, wanted in ((dz, with_dz), (result, with_y))]
    return dx.to(x.dtype), dscale, dshift, *kept


register_constant(ops.batch_statistics)
register_constant(ops.tracked_statistics)


def _separately(x, mean, var, scale, shift, eps, activation, slope, w, bias, *geometry_running):
    """norm_conv2d in operators that have derivatives of their own."""
    *geometry, running_mean, running_var, momentum, statistics = geometry_running
    y = x if mean is None else ops.batch_norm(x, mean, var, scale, shift, None, eps, activation, slope)
    if not statistics:
        return ops.conv2d(y, w, bias, *geometry), x.new_empty(0), x.new_empty(0)
    z = ops.conv2d(y, w, None, *geometry)
    if running_mean is None:
        return z, *ops.batch_statistics(z)
    return z, *ops.tracked_statistics(z, bias, running_mean, running_var, momentum)


@register_autograd(ops.norm_conv2d, apart=_separately)
class NormConv2d(torch.autograd.Function):
    """z = act((x - mean) / sqrt(var + eps) * scale + shift) * w, keeping x and not the convolution's image."""

    @staticmethod
    def forward(ctx, x, mean, var, scale, shift, eps, activation, slope, w, bias, *geometry_running):
        arguments = x, mean, var, scale, shift, eps, activation, slope, w, bias, *geometry_running
        z, z_mean, z_var = below_autograd(ops.norm_conv2d, *arguments)
        ctx.mark_non_differentiable(z_mean, z_var)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, mean, var, scale, shift, w)
        ctx.values, ctx.geometry, ctx.statistics = (eps, activation, slope), geometry_running[:5], geometry_running[-1]
        return z, z_mean, z_var

    @staticmethod
    def backward(ctx, dz, *_):
        if dz is None:
            return (None,) * 19
        x, mean, var, scale, shift, w = ctx.saved_tensors
        needs = ctx.needs_input_grad
        of_x, of_w, of_bias = any((needs[0], needs[3], needs[4])), needs[8], needs[9] and not ctx.statistics
        dx = dscale = dshift = None
        if mean is None:
            dx, dw, db = grads_of((of_x, of_w, of_bias), dz, x, w, ctx.geometry)
        else:
            y = None
            if of_x:
                dy = ops.conv2d_input_grad(dz, w, x.shape, *ctx.geometry)
                arguments = dy, x, None, mean, var, scale, shift, *ctx.values, False, of_w
                dx, dscale, dshift, _, y = in_backward(ops.batch_norm_grad, *arguments)
            elif of_w:
                y = ops.batch_norm(x, mean, var, scale, shift, None, *ctx.values)
            _, dw, db = grads_of((False, of_w, of_bias), dz, y, w, ctx.geometry)
        if needs[9] and ctx.statistics:
            # A bias shifts the mean as much as the image, which batch norm takes away again.
            db = w.new_zeros(w.shape[0])
        return (
            dx if needs[0] else None, None, None, dscale.to(scale.dtype) if needs[3] else None,
            dshift.to(shift.dtype) if needs[4] else None, None, None, None, dw, db, *(None,) * 9,
        )  # fmt: skip

"""The derivatives of max-pooling, average pooling and relu.

The code of a max-pooling's window is the position of its maximum, kh * KW + kw, or KH * KW where it points to no pixel.
"""

import torch

from .. import ops
from ..kernels import shapes
from ..registration import below_autograd, in_backward, register_autograd
from ._common import save


@register_autograd(ops.max_pool2d, alone=ops.max_pool2d_values)
class MaxPool2d(torch.autograd.Function):
    """y = the elements of x that the code points to."""

    @staticmethod
    def forward(ctx, x, kernel, stride, padding, dilation, ceil_mode):
        y, code = below_autograd(ops.max_pool2d, x, kernel, stride, padding, dilation, ceil_mode)
        ctx.mark_non_differentiable(code)
        ctx.set_materialize_grads(False)
        save(ctx, code)
        ctx.size, ctx.window = x.shape[2:], (kernel, stride, padding, dilation)
        return y, code

    @staticmethod
    def backward(ctx, dy, _):
        (code,) = ctx.saved_tensors
        dx = None if dy is None else ops.max_pool2d_scatter(dy, code, ctx.size, *ctx.window)
        return dx, None, None, None, None, None

    @staticmethod
    def jvp(ctx, tx, *_):
        (code,) = ctx.saved_tensors
        return ops.max_pool2d_gather(tx, code, *ctx.window), None


@register_autograd(ops.max_pool2d_scatter)
class MaxPool2dScatter(torch.autograd.Function):
    """dx = dy where the code names a pixel; the transpose of the gather."""

    @staticmethod
    def forward(ctx, dy, code, size, *window):
        save(ctx, code)
        ctx.size, ctx.window = size, window
        return below_autograd(ops.max_pool2d_scatter, dy, code, size, *window)

    @staticmethod
    def backward(ctx, ddx):
        (code,) = ctx.saved_tensors
        return ops.max_pool2d_gather(ddx, code, *ctx.window), None, None, None, None, None, None

    @staticmethod
    def jvp(ctx, tdy, *_):
        (code,) = ctx.saved_tensors
        return ops.max_pool2d_scatter(tdy, code, ctx.size, *ctx.window)


@register_autograd(ops.max_pool2d_gather)
class MaxPool2dGather(torch.autograd.Function):
    """t = the elements of x that the code names; the transpose of the scatter."""

    @staticmethod
    def forward(ctx, x, code, *window):
        save(ctx, code)
        ctx.size, ctx.window = x.shape[2:], window
        return below_autograd(ops.max_pool2d_gather, x, code, *window)

    @staticmethod
    def backward(ctx, dt):
        (code,) = ctx.saved_tensors
        return ops.max_pool2d_scatter(dt, code, ctx.size, *ctx.window), None, None, None, None, None

    @staticmethod
    def jvp(ctx, tx, *_):
        (code,) = ctx.saved_tensors
        return ops.max_pool2d_gather(tx, code, *ctx.window)


@register_autograd(ops.avg_pool2d)
class AvgPool2d(torch.autograd.Function):
    """y = the means of windows of x; linear, so that nothing is saved."""

    @staticmethod
    def forward(ctx, x, *window):
        ctx.size, ctx.window, ctx.channels_last = x.shape[2:], window, shapes.is_channels_last(x)
        return below_autograd(ops.avg_pool2d, x, *window)

    @staticmethod
    def backward(ctx, dy):
        return in_backward(ops.avg_pool2d_grad, dy, ctx.size, *ctx.window, ctx.channels_last), *[None] * 6

    @staticmethod
    def jvp(ctx, tx, *_):
        return ops.avg_pool2d(tx, *ctx.window)


@register_autograd(ops.avg_pool2d_grad)
class AvgPool2dGrad(torch.autograd.Function):
    """The transpose of the means of windows."""

    @staticmethod
    def forward(ctx, dy, *arguments):
        ctx.arguments = arguments
        return below_autograd(ops.avg_pool2d_grad, dy, *arguments)

    @staticmethod
    def backward(ctx, ddx):
        return ops.avg_pool2d(ddx, *ctx.arguments[1:-1]), *[None] * 8

    @staticmethod
    def jvp(ctx, tdy, *_):
        return ops.avg_pool2d_grad(tdy, *ctx.arguments)


@register_autograd(ops.adaptive_avg_pool2d)
class AdaptiveAvgPool2d(torch.autograd.Function):
    """y = the means of bins of x; linear, so that nothing is saved."""

    @staticmethod
    def forward(ctx, x, bins):
        ctx.size, ctx.bins, ctx.channels_last = x.shape[2:], bins, shapes.is_channels_last(x)
        return below_autograd(ops.adaptive_avg_pool2d, x, bins)

    @staticmethod
    def backward(ctx, dy):
        return in_backward(ops.adaptive_avg_pool2d_grad, dy, ctx.size, ctx.channels_last), None

    @staticmethod
    def jvp(ctx, tx, _):
        return ops.adaptive_avg_pool2d(tx, ctx.bins)


@register_autograd(ops.adaptive_avg_pool2d_grad)
class AdaptiveAvgPool2dGrad(torch.autograd.Function):
    """The transpose of the means of bins."""

    @staticmethod
    def forward(ctx, dy, *size_channels_last):
        ctx.bins, ctx.arguments = dy.shape[2:], size_channels_last
        return below_autograd(ops.adaptive_avg_pool2d_grad, dy, *size_channels_last)

    @staticmethod
    def backward(ctx, ddx):
        return ops.adaptive_avg_pool2d(ddx, ctx.bins), None, None

    @staticmethod
    def jvp(ctx, tdy, *_):
        return ops.adaptive_avg_pool2d_grad(tdy, *ctx.arguments)


@register_autograd(ops.relu)
class ReLU(torch.autograd.Function):
    """y = max(x, 0); the gradient needs only the result."""

    @staticmethod
    def forward(ctx, x):
        y = below_autograd(ops.relu, x)
        save(ctx, y)
        return y

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        return ops.relu_grad(dy, y)

    @staticmethod
    def jvp(ctx, tx):
        (y,) = ctx.saved_tensors
        return ops.relu_grad(tx, y)


@register_autograd(ops.relu_)
class ReLUInplace(torch.autograd.Function):
    """x = max(x, 0), in place."""

    @staticmethod
    def forward(ctx, x):
        below_autograd(ops.relu_, x, counted=True)
        ctx.mark_dirty(x)
        save(ctx, x)
        return x

    backward = staticmethod(ReLU.backward)

    @staticmethod
    def jvp(ctx, tx):
        tx.copy_(ReLU.jvp(ctx, tx))
        # The engine checks by its version that the tangent was overwritten, and a batched tensor does not count copies.
        torch.autograd.graph.increment_version(tx)
        return tx


@register_autograd(ops.relu_grad)
class ReLUGrad(torch.autograd.Function):
    """dx = dy where y > 0, else 0; linear in dy."""

    @staticmethod
    def forward(ctx, dy, y):
        save(ctx, y)
        return below_autograd(ops.relu_grad, dy, y)

    @staticmethod
    def backward(ctx, ddx):
        (y,) = ctx.saved_tensors
        return ops.relu_grad(ddx, y) if ctx.needs_input_grad[0] else None, None

    @staticmethod
    def jvp(ctx, tdy, _):
        (y,) = ctx.saved_tensors
        return ops.relu_grad(tdy if tdy is not None else torch.zeros_like(y), y)

"""Every operator in plain torch, below autograd: it runs without a GPU, and the kernels are tested against it.

Arguments and results are those of kernels/launchers.py; the functions that it calls document them.
"""

import functools
import sys

import torch
import torch.nn.functional as F
from torch.nn import grad as conv_grad

from .kernels import activations, shapes
from .kernels.activations import SLOPE
from .kernels.cross_entropy import targets
from .kernels.linear_chain import layered


def _pad(x, padding, pad_mode):
    """x padded by (top, bottom, left, right)."""
    top, bottom, left, right = padding
    return F.pad(x, (left, right, top, bottom), mode="constant" if pad_mode == "zeros" else pad_mode)


def _wide(*tensors):
    """The tensors, 16-bit ones cast to float32: torch's CPU gradients in bfloat16 are wrong for some strides."""
    return [t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors]


def _plain(padding, pad_mode):
    """The padding as torch.conv2d takes it, or None if the image has to be padded first."""
    top, bottom, left, right = padding
    return (top, left) if pad_mode == "zeros" and top == bottom and left == right else None


def conv2d(x, w, bias, stride, padding, dilation, groups, pad_mode):
    plain = _plain(padding, pad_mode)
    image = _pad(x, padding, pad_mode) if plain is None else x
    y = torch.conv2d(image, w, bias, stride, plain or 0, dilation, groups)
    return y.contiguous(memory_format=shapes.memory_format(x, w))


def conv2d_relu(*arguments):
    return torch.relu(conv2d(*arguments))


def conv2d_relu_max_pool2d(x, w, bias, stride, padding, dilation, groups, pad_mode, kernel, *pool_ceil_mode):
    z, (*pool, ceil_mode) = conv2d(x, w, bias, stride, padding, dilation, groups, pad_mode), pool_ceil_mode
    y, index = _maxima(z, kernel, *pool, 1, ceil_mode)
    empty_y, empty_code = shapes.conv2d_relu_max_pool2d(x, w, stride, padding, dilation, kernel, *pool, ceil_mode)
    code = _codes(index, z.shape[3], kernel, *pool, (1, 1), empty_code.dtype, nothing=y <= 0)
    return _like(empty_y, torch.relu(y)), _like(empty_code, code)


def conv2d_relu_max_pool2d_input_grad(dy, code, w, size, *geometry):
    (stride, padding, dilation, _, _), pool = geometry[:5], geometry[5:]
    before = shapes.conv2d_size(size[2:], w.shape[2:], stride, padding, dilation)
    return conv2d_input_grad(max_pool2d_scatter(dy, code, before, *pool, (1, 1)), w, size, *geometry[:5])


def conv2d_relu_max_pool2d_weight_grad(dy, code, x, size, *geometry):
    (stride, padding, dilation, _, _), pool, with_bias = geometry[:5], geometry[5:-1], geometry[-1]
    before = shapes.conv2d_size(x.shape[2:], size[2:], stride, padding, dilation)
    dz = max_pool2d_scatter(dy, code, before, *pool, (1, 1))
    return conv2d_weight_grad(dz, x, size, *geometry[:5], with_bias)


def conv2d_relu_max_pool2d_grads(dy, code, x, w, *geometry_with_bias):
    dx = conv2d_relu_max_pool2d_input_grad(dy, code, w, x.shape, *geometry_with_bias[:-1])
    return dx, *conv2d_relu_max_pool2d_weight_grad(dy, code, x, w.shape, *geometry_with_bias)


def conv2d_input_grad(dy, w, size, stride, padding, dilation, groups, pad_mode):
    plain, (top, bottom, left, right) = _plain(padding, pad_mode), padding
    wide_dy, wide_w = _wide(dy, w)
    padded = size if plain else (*size[:2], size[2] + top + bottom, size[3] + left + right)
    dx = conv_grad.conv2d_input(padded, wide_w, wide_dy, stride, plain or 0, dilation, groups)
    if plain is None and pad_mode == "zeros":
        dx = dx[:, :, top : top + size[2], left : left + size[3]]
    elif plain is None:
        dx = _fold(_fold(dx, 2, size[2], (top, bottom), pad_mode), 3, size[3], (left, right), pad_mode)
    return dx.to(dy.dtype).contiguous(memory_format=shapes.memory_format(dy, w))


def _fold(dx, dim, size, pads, pad_mode):
    """Add the padding's gradients to the rows (dim 2) or columns (dim 3) that it was copied from, `size` of them."""
    copied = F.pad(torch.arange(size, dtype=torch.float64, device=dx.device)[None, None], pads, mode=pad_mode)
    shape = list(dx.shape)
    shape[dim] = size
    return dx.new_zeros(shape).index_add_(dim, copied.flatten().long(), dx)


def conv2d_weight_grad(dy, x, size, stride, padding, dilation, groups, pad_mode, with_bias):
    plain = _plain(padding, pad_mode)
    wide_dy, wide_x = _wide(dy, x)
    image = _pad(wide_x, padding, pad_mode) if plain is None else wide_x
    dw = conv_grad.conv2d_weight(image, size, wide_dy, stride, plain or 0, dilation, groups)
    db = wide_dy.sum((0, 2, 3)) if with_bias else wide_dy.new_empty(0)
    return dw.to(dy.dtype).contiguous(memory_format=shapes.memory_format(dy, x)), db.to(dy.dtype)


def conv2d_grads(dy, x, w, *geometry_with_bias):
    dx = conv2d_input_grad(dy, w, x.shape, *geometry_with_bias[:-1])
    return dx, *conv2d_weight_grad(dy, x, w.shape, *geometry_with_bias)


def conv2d_relu_weight_grad(dy, y, x, size, *geometry_with_bias):
    return conv2d_weight_grad(relu_grad(dy, y), x, size, *geometry_with_bias)


def _maxima(x, *window):
    """F.max_pool2d, and the indices."""
    # On channels_last torch's CPU code takes all channels of a pixel at once, which is two to four times as fast.
    if x.device.type == "cpu" and x.shape[1] >= 4:
        x = x.contiguous(memory_format=torch.channels_last)
    return F.max_pool2d(x, *window, return_indices=True)


def max_pool2d(x, kernel, stride, padding, dilation, ceil_mode):
    y, index = _maxima(x, kernel, stride, padding, dilation, ceil_mode)
    empty_y, empty_code = shapes.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode)
    code = _codes(index, x.shape[3], kernel, stride, padding, dilation, empty_code.dtype)
    return _like(empty_y, y), _like(empty_code, code)


def max_pool2d_values(x, *window):
    return _like(shapes.max_pool2d_values(x, *window), _maxima(x, *window)[0])


def _like(empty, values):
    """The values with the dtype and strides of the tensor `empty`."""
    if values.stride() != empty.stride():
        values = values.clone(memory_format=shapes.memory_format(empty))
    return values.to(empty.dtype)


def _starts(size, width, stride, padding, device):
    """(OH, OW): the index in a flattened image of each window's first pixel, which may lie in the padding."""
    oh, ow = (torch.arange(n, device=device) * s - p for n, s, p in zip(size, stride, padding))
    return oh[:, None] * width + ow


def _offsets(width, kernel, dilation, device):
    """(KH * KW,): the offset of each pixel of a window from the window's start in a flattened image."""
    kh, kw = (torch.arange(n, device=device) * d for n, d in zip(kernel, dilation))
    return (kh[:, None] * width + kw).flatten()


def _codes(index, width, kernel, stride, padding, dilation, dtype, nothing=None):
    """The code of each window's maximum, given its index (N, C, OH, OW) in the flattened image.

    Args:
        nothing: bool like the index: the windows whose code is KH * KW.
    """
    taps = kernel[0] * kernel[1]
    if (kernel[1] - 1) * dilation[1] >= width:
        # The window is wider than the image, and two of its pixels may have the same offset.
        oh, ow = (torch.arange(size, device=index.device) for size in index.shape[2:])
        kh = (index // width - (oh * stride[0] - padding[0])[:, None]) // dilation[0]
        kw = (index % width - (ow * stride[1] - padding[1])) // dilation[1]
        code = (kh * kernel[1] + kw).to(dtype)
        return code if nothing is None else code.masked_fill(nothing, taps)
    # Looking the offset up is much faster than dividing.
    end = (kernel[0] - 1) * dilation[0] * width + (kernel[1] - 1) * dilation[1] + 1
    codes = torch.full((end + 1,), 0 if nothing is None else taps, dtype=dtype, device=index.device)
    offsets = _offsets(width, kernel, dilation, index.device)
    codes = codes.index_copy(0, offsets, torch.arange(taps, dtype=dtype, device=index.device))
    offset = index - _starts(index.shape[2:], width, stride, padding, index.device)
    if nothing is not None:
        offset = offset.masked_fill(nothing, end)
    return codes.index_select(0, offset.flatten()).view(offset.shape)


def max_pool2d_indices(code, width, kernel, stride, padding, dilation):
    return _like(shapes.max_pool2d_indices(code), _indices(code, width, kernel, stride, padding, dilation, 0))


def _indices(code, width, kernel, stride, padding, dilation, none):
    """max_pool2d_indices; where the code points to no pixel, `none` after the window's start."""
    offsets = F.pad(_offsets(width, kernel, dilation, code.device), (0, 1), value=none)
    found = offsets.index_select(0, code.flatten().int()).view(code.shape)
    return found + _starts(code.shape[2:], width, stride, padding, code.device)


def max_pool2d_scatter(dy, code, size, kernel, stride, padding, dilation):
    (wide,) = _wide(dy)
    (N, C), (H, W) = dy.shape[:2], size
    end = N * C * H * W
    # Gradients of windows without a pixel are added to an extra element at the end. A window may start before its image
    # by as much as the padding. In one dimension torch's scatter_add_ is deterministic on every device.
    behind = end + padding[0] * W + padding[1]
    index = _indices(code, W, kernel, stride, padding, dilation, behind)
    index += (torch.arange(N * C, device=dy.device) * (H * W)).view(N, C, 1, 1)
    dx = wide.new_zeros(end + 1).scatter_add_(0, index.clamp_(max=end).flatten(), wide.flatten())
    return _like(shapes.max_pool2d_scatter(dy, code, size), dx[:end].view(N, C, H, W))


def max_pool2d_gather(x, code, kernel, stride, padding, dilation):
    W, named = x.shape[3], code.int() < kernel[0] * kernel[1]
    index = torch.where(named, max_pool2d_indices(code, W, kernel, stride, padding, dilation), 0)
    found = x.flatten(2).gather(2, index.flatten(2)).view(code.shape)
    return _like(shapes.max_pool2d_gather(x, code), torch.where(named, found, 0))


def avg_pool2d(x, *window):
    y = shapes.avg_pool2d(x, *window[:4])
    return _like(y, F.avg_pool2d(*_wide(x), *window))


def avg_pool2d_grad(dy, size, *window_channels_last):
    (*window, channels_last), (wide,) = window_channels_last, _wide(dy)
    dx = shapes.avg_pool2d_grad(dy, size, channels_last)
    image = wide.new_empty(1).expand(dx.shape)
    return _like(dx, torch.ops.aten.avg_pool2d_backward(wide, image, *window))


def adaptive_avg_pool2d(x, size):
    return _like(shapes.adaptive_avg_pool2d(x, size), F.adaptive_avg_pool2d(*_wide(x), size))


def _spread(dy, dim, size):
    """The gradient by rows (dim 2) or columns (dim 3), `size` of them, of the means of bins of these."""
    bins = dy.shape[dim]
    dx = dy.new_zeros(*dy.shape[:dim], size, *dy.shape[dim + 1 :])
    for i in range(bins):
        start, end = i * size // bins, -(-(i + 1) * size // bins)
        dx.narrow(dim, start, end - start).add_(dy.narrow(dim, i, 1) / (end - start))
    return dx


def adaptive_avg_pool2d_grad(dy, size, channels_last):
    # torch's own is not deterministic on a GPU.
    dx = _spread(_spread(*_wide(dy), 3, size[1]), 2, size[0])
    return _like(shapes.avg_pool2d_grad(dy, size, channels_last), dx)


def squeeze_excite(x, w1, b1, w2, b2, activation, gate):
    means = adaptive_avg_pool2d(x, (1, 1)).flatten(1)
    hidden = linear_epilogue(means, w1, b1, *[None] * 5, 0.0, activation, SLOPE)
    gates = linear_epilogue(hidden, w2, b2, *[None] * 5, 0.0, gate, SLOPE)
    return _like(shapes.squeeze_excite(x), x * gates[:, :, None, None])


def relu(x):
    return torch.relu(x)


def relu_(x):
    torch.relu_(x)


def relu_grad(dy, y):
    return _like(shapes.relu(y), torch.ops.aten.threshold_backward(dy, y, 0))


def _along(vector, x):
    """A vector over the channels, in x's dtype and a shape that broadcasts with x."""
    return vector.to(x.dtype).view(-1, *(1,) * (x.dim() - 2))


def batch_statistics(x):
    (wide,) = _wide(x)
    if type(wide) is torch.Tensor:
        return torch.ops.aten.batch_norm_update_stats(wide, None, None, 0.0)
    # Tracers do not know this operator, which takes a tenth of the time.
    var, mean = torch.var_mean(wide, [dim for dim in range(x.dim()) if dim != 1], correction=0)
    return mean, var


def tracked_statistics(x, bias, running_mean, running_var, momentum):
    mean, var = batch_statistics(x)
    update_running(running_mean, running_var, mean, var, bias, x.numel() // x.shape[1], momentum)
    return mean, var


def update_running(running_mean, running_var, mean, var, bias, count, momentum):
    """Update running statistics in place by those of a batch of `count` values a channel, to which bias is added."""
    mean = mean if bias is None else mean + bias
    for running, t in ((running_mean, mean), (running_var, var * count / (count - 1))):
        running.copy_(running.to(t.dtype) * (1 - momentum) + t * momentum)


def batch_norm(x, mean, var, scale, shift, residual, eps, activation, slope):
    (wide,) = _wide(x)
    scale, shift = (None if t is None else t.to(wide.dtype) for t in (scale, shift))
    # The mean is subtracted first, as torch's code on the CPU multiplies first, which is inexact for a large mean.
    centred = wide - _along(mean, wide)
    z = torch.batch_norm(centred, scale, shift, torch.zeros_like(mean), var.detach(), False, 0.0, eps, False)
    z = z if residual is None else z + residual
    return _like(shapes.relu(x), activations.activated(z, activation, slope).to(x.dtype))


def batch_norm_grad(dy, x, y, mean, var, scale, shift, eps, activation, slope, with_dz, with_y):
    wide_dy, wide = _wide(dy, x)
    rstd = (var + eps).rsqrt()
    u = result = None
    if y is None and (with_y or activation != "none"):
        u = batch_norm(wide, mean, var, scale, shift, None, eps, "none", 0.0)
        result = activations.activated(u, activation, slope)
    by_result = activations.by_result(activation, slope)
    t = y if y is not None else result if by_result else u
    dz = wide_dy if activation == "none" else activations.gradient(wide_dy, *_wide(t), activation, slope)
    dx, dscale, dshift = torch.ops.aten.native_batch_norm_backward(
        dz, wide, None if scale is None else scale.to(wide.dtype), None, None, mean, rstd, True, eps, [True] * 3
    )
    kept = [
        _like(shapes.relu(x), t.to(x.dtype)) if wanted else x.new_empty(0)
        for t, wanted in ((dz, with_dz), (result, with_y))
    ]
    # An operator's result is a tensor of its own.
    kept[0] = kept[0].clone() if kept[0] is dy else kept[0]
    return _like(shapes.relu(x), dx.to(x.dtype)), dscale, dshift, *kept


def norm_conv2d(x, mean, var, scale, shift, eps, activation, slope, w, bias, *geometry_running):
    *geometry, running_mean, running_var, momentum, statistics = geometry_running
    y = x if mean is None else batch_norm(x, mean, var, scale, shift, None, eps, activation, slope)
    if not statistics:
        return conv2d(y, w, bias, *geometry), *shapes.batch_statistics(x, 0)
    z = conv2d(y, w, None, *geometry)
    if running_mean is None:
        return z, *batch_statistics(z)
    return z, *tracked_statistics(z, bias, running_mean, running_var, momentum)


def epilogue(x, mean, var, scale, shift, residual, eps, activation, slope):
    (z,) = _wide(x)

    def along(t):
        return _along(t, z)

    if mean is not None:
        z = z - along(mean)
    if var is not None:
        z = z * along((var.to(z.dtype) + eps).rsqrt())
    if scale is not None:
        z = z * along(scale)
    if shift is not None:
        z = z + along(shift)
    if residual is not None:
        z = z + residual
    y = _like(shapes.relu(x), activations.activated(z, activation, slope).to(x.dtype))
    # An operator's result is a tensor of its own.
    return y.clone() if y is x else y


def activate_(x, activation, slope):
    x.copy_(activations.activated(*_wide(x), activation, slope))


def activation_grad(dy, t, activation, slope):
    return _like(shapes.relu(t), activations.gradient(dy, t, activation, slope))


def conv2d_epilogue(x, w, bias, stride, padding, dilation, groups, pad_mode, *arguments):
    return epilogue(conv2d(x, w, bias, stride, padding, dilation, groups, pad_mode), *arguments)


def linear_epilogue(x, w, bias, *arguments):
    return epilogue(linear(x, w, bias), *arguments)


def linear(x, w, bias):
    return F.linear(x, w, bias)


def linear_relu(x, w, bias):
    return torch.relu(F.linear(x, w, bias))


def linear_weight_grad(dy, x, with_bias):
    return dy.t() @ x, dy.sum(0) if with_bias else dy.new_empty(0)


_here = sys.modules[__name__]
linear_chain = functools.partial(layered.forward, _here)
linear_chain_input_grad = functools.partial(layered.input_grad, _here)
linear_chain_weight_grad = functools.partial(layered.weight_grad, _here)


def cross_entropy(x, target, weight, reduction, ignore_index, smoothing):
    C, target = x.shape[1], target.long()
    wide, w = _wide(x, x.new_ones(C) if weight is None else weight)
    loss = F.cross_entropy(wide, target, w, None, ignore_index, None, reduction, smoothing)
    kept, _, w_target = targets.weights_of(target, w, C, w.dtype, ignore_index)
    scale = 1 / w_target.sum() if reduction == "mean" else 1
    factor = ((1 - smoothing) * w_target * scale)[:, None]
    # In torch's order of factors, for the same infinities and NaNs, also without smoothing.
    share = w * (smoothing / C * scale) if smoothing else torch.zeros_like(w)
    is_target = torch.arange(C, device=x.device) == target[:, None]
    grad = wide.softmax(1) * (factor + share.sum()) - (torch.where(is_target, factor, 0) + share)
    # Ignored rows are zeros, whatever their logits are, even if a mean over no rows has an infinite scale.
    return loss.to(x.dtype), torch.where(kept[:, None], grad, 0).to(x.dtype)


def cross_entropy_grad(dloss, grad, target, ignore_index):
    dx = dloss.unsqueeze(-1) * grad
    return dx.masked_fill_((target.long() == ignore_index)[:, None], 0).contiguous()

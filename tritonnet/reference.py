"""Every operator in plain torch, below autograd: what runs without a GPU, and what the kernels are compared with.

Arguments and results are those of the launchers in `kernels`, which document them.
"""

import functools
import sys

import torch
import torch.nn.functional as F
from torch.nn import grad as conv_grad

from .kernels import indices, layered, shapes


def _pad(x, padding, pad_mode):
    """x padded by (top, bottom, left, right)."""
    top, bottom, left, right = padding
    return F.pad(x, (left, right, top, bottom), mode="constant" if pad_mode == "zeros" else pad_mode)


def _wide(*tensors):
    """The tensors in float32 if they were narrower: torch's CPU gradients in bfloat16 are wrong for some strides."""
    return [t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors]


def _plain(padding, pad_mode):
    """The padding as torch.conv2d takes it, or None where the image has to be padded first."""
    top, bottom, left, right = padding
    return (top, left) if pad_mode == "zeros" and top == bottom and left == right else None


def conv2d(x, w, bias, stride, padding, dilation, groups, pad_mode):
    plain = _plain(padding, pad_mode)
    image = _pad(x, padding, pad_mode) if plain is None else x
    y = torch.conv2d(image, w, bias, stride, plain or 0, dilation, groups)
    return y.contiguous(memory_format=shapes.memory_format(x, w))


def conv2d_relu(*arguments):
    return conv2d(*arguments).relu_()


def conv2d_relu_max_pool2d(x, w, bias, stride, padding, dilation, groups, pad_mode, kernel, *pool_ceil_mode):
    z, (*pool, ceil_mode) = conv2d(x, w, bias, stride, padding, dilation, groups, pad_mode), pool_ceil_mode
    y, code = max_pool2d(z, kernel, *pool, (1, 1), ceil_mode)
    empty_y, empty_code = shapes.conv2d_relu_max_pool2d(x, w, stride, padding, dilation, kernel, *pool, ceil_mode)
    empty_code.copy_(code)[y <= 0] = kernel[0] * kernel[1]
    return empty_y.copy_(y).relu_(), empty_code


def conv2d_relu_max_pool2d_input_grad(dy, code, w, size, *geometry):
    (stride, padding, dilation, _, _), pool = geometry[:5], geometry[5:]
    before = shapes.conv2d_size(size[2:], w.shape[2:], stride, padding, dilation)
    return conv2d_input_grad(max_pool2d_scatter(dy, code, before, *pool, (1, 1)), w, size, *geometry[:5])


def conv2d_relu_max_pool2d_weight_grad(dy, code, x, size, *geometry):
    (stride, padding, dilation, _, _), pool, with_bias = geometry[:5], geometry[5:-1], geometry[-1]
    before = shapes.conv2d_size(x.shape[2:], size[2:], stride, padding, dilation)
    dz = max_pool2d_scatter(dy, code, before, *pool, (1, 1))
    return conv2d_weight_grad(dz, x, size, *geometry[:5], with_bias)


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
    """Add up what the padding copied from each row (dim 2) or column (dim 3) of an image of `size` of them."""
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


def conv2d_relu_weight_grad(dy, y, x, size, *geometry_with_bias):
    return conv2d_weight_grad(relu_grad(dy, y), x, size, *geometry_with_bias)


def max_pool2d(x, kernel, stride, padding, dilation, ceil_mode):
    y, index = F.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode, return_indices=True)
    oh, ow = (torch.arange(size, device=x.device) for size in y.shape[2:])
    kh = (index // x.shape[3] - (oh * stride[0] - padding[0])[:, None]) // dilation[0]
    kw = (index % x.shape[3] - (ow * stride[1] - padding[1])) // dilation[1]
    empty_y, empty_code = shapes.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode)
    return empty_y.copy_(y), empty_code.copy_(kh * kernel[1] + kw)


def max_pool2d_indices(code, width, kernel, stride, padding, dilation):
    oh, ow = (torch.arange(size, device=code.device) for size in code.shape[2:])
    code = code.long()
    ih = (oh * stride[0] - padding[0])[:, None] + code // kernel[1] * dilation[0]
    iw = ow * stride[1] - padding[1] + code % kernel[1] * dilation[1]
    return ih * width + iw


def _named(code, kernel):
    """Where the code names a pixel."""
    return code.int() < kernel[0] * kernel[1]


def max_pool2d_scatter(dy, code, size, kernel, stride, padding, dilation):
    (wide,) = _wide(dy)
    (N, C), (H, W) = dy.shape[:2], size
    named = _named(code, kernel)
    index = torch.where(named, max_pool2d_indices(code, W, kernel, stride, padding, dilation), 0).flatten(2)
    # In one dimension, where torch has a deterministic scatter_add_ on every device.
    index = index + (torch.arange(N * C, device=dy.device) * (H * W)).view(N, C, 1)
    dx = wide.new_zeros(N * C * H * W).scatter_add_(0, index.flatten(), torch.where(named, wide, 0).flatten())
    return shapes.max_pool2d_scatter(dy, code, size).copy_(dx.view(N, C, H, W))


def max_pool2d_gather(x, code, kernel, stride, padding, dilation):
    named = _named(code, kernel)
    index = torch.where(named, max_pool2d_indices(code, x.shape[3], kernel, stride, padding, dilation), 0)
    found = x.flatten(2).gather(2, index.flatten(2)).view(code.shape)
    return shapes.max_pool2d_gather(x, code).copy_(torch.where(named, found, 0))


def relu(x):
    return torch.relu(x)


def relu_(x):
    torch.relu_(x)


def relu_grad(dy, y):
    return shapes.relu(y).copy_(torch.where(y <= 0, 0, dy))


def linear(x, w, bias):
    return F.linear(x, w, bias)


def linear_relu(x, w, bias):
    return F.linear(x, w, bias).relu_()


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
    kept, _, w_target = indices.weights_of(target, w, C, w.dtype, ignore_index)
    scale = 1 / w_target.sum() if reduction == "mean" else 1
    factor = ((1 - smoothing) * w_target * scale)[:, None]
    # By torch's own order of factors, for the same infinities and NaNs, without smoothing too.
    share = w * (smoothing / C * scale) if smoothing else torch.zeros_like(w)
    is_target = torch.arange(C, device=x.device) == target[:, None]
    grad = wide.softmax(1) * (factor + share.sum()) - (torch.where(is_target, factor, 0) + share)
    # Ignored rows have zeros, whatever their logits are, and where a mean over no rows has a scale of infinity.
    return loss.to(x.dtype), torch.where(kept[:, None], grad, 0).to(x.dtype)


def cross_entropy_grad(dloss, grad, target, ignore_index):
    dx = dloss.unsqueeze(-1) * grad
    return dx.masked_fill_((target.long() == ignore_index)[:, None], 0).contiguous()

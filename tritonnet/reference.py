"""Every operator in plain torch, below autograd: what runs without a GPU, and what the kernels are compared with.

Arguments and results are those of the launchers in `kernels`, which document them.
"""

import torch
import torch.nn.functional as F
from torch.nn import grad as conv_grad

from .kernels import shapes


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


def max_pool2d_scatter(dy, code, size, kernel, stride, padding, dilation):
    (wide,) = _wide(dy)
    (N, C), (H, W) = dy.shape[:2], size
    index = max_pool2d_indices(code, W, kernel, stride, padding, dilation).flatten(2)
    # In one dimension, where torch has a deterministic scatter_add_ on every device.
    index = index + (torch.arange(N * C, device=dy.device) * (H * W)).view(N, C, 1)
    dx = wide.new_zeros(N * C * H * W).scatter_add_(0, index.flatten(), wide.flatten())
    return shapes.max_pool2d_scatter(dy, code, size).copy_(dx.view(N, C, H, W))


def max_pool2d_gather(x, code, kernel, stride, padding, dilation):
    index = max_pool2d_indices(code, x.shape[3], kernel, stride, padding, dilation)
    return shapes.max_pool2d_gather(x, code).copy_(x.flatten(2).gather(2, index.flatten(2)).view(code.shape))


def relu(x):
    return torch.relu(x)


def relu_(x):
    torch.relu_(x)


def relu_grad(dy, y):
    return shapes.relu(y).copy_(torch.where(y <= 0, 0, dy))


def linear(x, w, bias):
    return F.linear(x, w, bias)


def linear_weight_grad(dy, x, with_bias):
    return dy.t() @ x, dy.sum(0) if with_bias else dy.new_empty(0)

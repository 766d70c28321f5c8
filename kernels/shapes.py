"""Sizes and memory layouts of every result, in plain torch: the kernels, the reference and fake tensors all ask here.

Images are (N, C, H, W), filters (OC, C / groups, KH, KW). Pairs are (height, width); `padding` of a convolution is
(top, bottom, left, right). The functions return uninitialised tensors.
"""

import torch


def is_channels_last(t):
    """Whether torch would hand on this 4-D tensor's layout as channels_last (c10's rule, which also takes views)."""
    if t.dim() != 4:
        return False
    size, strides = t.shape, t.stride()
    # What is not at all in that order, as most tensors, is told at once.
    if strides[1] == 0 or strides[1] > strides[3]:
        return False
    least = 0
    for dim in (1, 3, 2, 0):
        if size[dim] == 0 or strides[dim] < least:
            return False
        # One channel and one pixel leave the order open; torch calls such a tensor contiguous.
        if dim == 0 and least == strides[1]:
            return False
        least = strides[dim] * (size[dim] if size[dim] > 1 else 1)
    return True


def memory_format(*tensors):
    """The layout of a result: channels_last as soon as one of the tensors it is made from is."""
    for t in tensors:
        if is_channels_last(t):
            return torch.channels_last
    return torch.contiguous_format


def _empty(like, size, *sources, dtype=None):
    return torch.empty(size, dtype=dtype or like.dtype, device=like.device, memory_format=memory_format(*sources))


def conv2d_size(size, kernel, stride, padding, dilation):
    """(OH, OW) of a convolution over an image of `size` (H, W)."""
    top, bottom, left, right = padding
    return (
        (size[0] + top + bottom - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1,
        (size[1] + left + right - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1,
    )


def conv2d(x, w, stride, padding, dilation):
    size = conv2d_size(x.shape[2:], w.shape[2:], stride, padding, dilation)
    return _empty(x, (x.shape[0], w.shape[0], *size), x, w)


def conv2d_input_grad(dy, w, size):
    return _empty(dy, size, dy, w)


def conv2d_weight_grad(dy, x, size, with_bias):
    """The gradients of weight and bias; the second is empty where it is not asked for."""
    return _empty(dy, size, dy, x), dy.new_empty(size[0] if with_bias else 0)


def max_pool2d_size(size, kernel, stride, padding, dilation, ceil_mode):
    """(OH, OW) of a pooling over an image of `size` (H, W)."""
    return (
        _pooled(size[0], kernel[0], stride[0], padding[0], dilation[0], ceil_mode),
        _pooled(size[1], kernel[1], stride[1], padding[1], dilation[1], ceil_mode),
    )


def _pooled(size, kernel, stride, padding, dilation, ceil_mode):
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    if not ceil_mode:
        return room // stride + 1
    windows = (room + stride - 1) // stride + 1
    # A last window that would start in the padding past the image is dropped.
    return windows - 1 if (windows - 1) * stride >= size + padding else windows


def max_pool2d(x, kernel, stride, padding, dilation, ceil_mode):
    """The values, and the code of each window: the position of its maximum, kh * KW + kw, in the narrowest type."""
    size = (*x.shape[:2], *max_pool2d_size(x.shape[2:], kernel, stride, padding, dilation, ceil_mode))
    return _empty(x, size, x), _empty(x, size, x, dtype=_code_type(kernel[0] * kernel[1] - 1))


def _code_type(largest):
    """The narrowest integer type that holds every code."""
    return torch.uint8 if largest < 2**8 else torch.int16 if largest < 2**15 else torch.int32


def conv2d_relu_max_pool2d(x, w, stride, padding, dilation, pool_kernel, pool_stride, pool_padding, ceil_mode):
    """The values, and the code of each window as in max_pool2d, or KH * KW where the rectifier let nothing through."""
    size = conv2d_size(x.shape[2:], w.shape[2:], stride, padding, dilation)
    size = max_pool2d_size(size, pool_kernel, pool_stride, pool_padding, (1, 1), ceil_mode)
    y = _empty(x, (x.shape[0], w.shape[0], *size), x, w)
    return y, torch.empty_like(y, dtype=_code_type(pool_kernel[0] * pool_kernel[1]))


def conv2d_relu_max_pool2d_input_grad(dy, code, w, size):
    return _empty(dy, size, code, w)


def conv2d_relu_max_pool2d_weight_grad(dy, code, x, size, with_bias):
    """As in conv2d_weight_grad; like the image before pooling, whose layout is the code's, are the gradients."""
    return _empty(dy, size, code, x), dy.new_empty(size[0] if with_bias else 0)


def max_pool2d_scatter(dy, code, size):
    return _empty(dy, (*dy.shape[:2], *size), code)


def max_pool2d_gather(x, code):
    return _empty(x, code.shape, code)


def max_pool2d_indices(code):
    return _empty(code, code.shape, code, dtype=torch.int64)


def relu(x):
    return torch.empty_like(x)


def linear(x, w):
    """x is (M, K), w is (N, K)."""
    return x.new_empty(x.shape[0], w.shape[0])


def linear_weight_grad(dy, x, with_bias):
    """dy is (M, N), x is (M, K)."""
    return dy.new_empty(dy.shape[1], x.shape[1]), dy.new_empty(dy.shape[1] if with_bias else 0)


def cross_entropy(x, reduction):
    """The loss, one or one a row, and its gradient; x is (N, C)."""
    return x.new_empty(x.shape[:1] if reduction == "none" else ()), x.new_empty(x.shape)


def cross_entropy_grad(grad):
    return grad.new_empty(grad.shape)


# What a chain of linears in one launch takes: registers hold a block of rows of two layers at once.
MOST_LAYERS, MOST_WIDTH = 4, 128


def linear_chain_serves(features, widths):
    """Whether layers of these widths, over so many features, run in one launch rather than one after the other."""
    return features > 0 and 2 <= len(widths) <= MOST_LAYERS and all(0 < n <= MOST_WIDTH for n in widths)


def widths(weights):
    """The widths of the layers of a chain, whose weights are (..., N, K), or None for layers that lack."""
    return [w.shape[-2] for w in weights if w is not None]


def linear_chain(x, weights, keep):
    """The result, and what the rectifiers in between give, side by side; x is (M, K)."""
    *hidden, N = widths(weights)
    return x.new_empty(x.shape[0], N), x.new_empty(x.shape[0], sum(hidden) if keep else 0)


def linear_chain_input_grad(dy, hidden, weights, needs_dx):
    """The gradients of x, without columns unless it is asked for, and of what the rectifiers in between are given."""
    return dy.new_empty(dy.shape[0], weights[0].shape[1] if needs_dx else 0), dy.new_empty(hidden.shape)


def linear_chain_weight_grad(dy, x, hidden_widths, with_bias):
    """The gradients of all weights, one after the other, and of all biases, empty where they are not asked for."""
    every = [*hidden_widths, dy.shape[1]]
    numel = sum(n * k for n, k in zip(every, [x.shape[1], *every]))
    return dy.new_empty(numel), dy.new_empty(sum(every) if with_bias else 0)

"""Sizes and memory layouts of every result, in plain torch, for the kernels, the reference and fake tensors.

Images are (N, C, H, W), filters (OC, C / groups, KH, KW). Pairs are (height, width); `padding` of a convolution is
(top, bottom, left, right). The functions named after operators return uninitialised
tensors.
"""

import torch


def is_channels_last(t):
    """Whether torch would propagate this tensor's layout as channels_last (c10's rule, which also accepts views)."""
    if t.dim() != 4:
        return False
    size, strides = t.shape, t.stride()
    # Most tensors are not channels_last and are rejected here.
    if strides[1] == 0 or strides[1] > strides[3]:
        return False
    least = 0
    for dim in (1, 3, 2, 0):
        if size[dim] == 0 or strides[dim] < least:
            return False
        # With one channel and one pixel the order is ambiguous; torch calls such a tensor contiguous.
        if dim == 0 and least == strides[1]:
            return False
        least = strides[dim] * (size[dim] if size[dim] > 1 else 1)
    return True


def memory_format(*tensors):
    """The layout of a result: channels_last if one of its input tensors is."""
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


def input_size(dy, w, size, groups):
    """The size of an image's gradient, of which `size` gives the height and width."""
    return dy.shape[0], w.shape[1] * groups, *size[2:]


def weight_size(dy, x, size, groups):
    """The size of a weight's gradient, of which `size` gives the height and width."""
    return dy.shape[1], x.shape[1] // groups, *size[2:]


def conv2d_input_grad(dy, w, size):
    return _empty(dy, size, dy, w)


def conv2d_weight_grad(dy, x, size, with_bias):
    """The gradients of weight and bias; that of the bias is empty without `with_bias`."""
    return _empty(dy, size, dy, x), dy.new_empty(size[0] if with_bias else 0)


def conv2d_grads(dy, x, w, with_bias):
    """The gradients of image, weight and bias."""
    return conv2d_input_grad(dy, w, x.shape), *conv2d_weight_grad(dy, x, w.shape, with_bias)


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


def max_pool2d_values(x, *window):
    return _empty(x, (*x.shape[:2], *max_pool2d_size(x.shape[2:], *window)), x)


def max_pool2d(x, kernel, *window):
    """The values, and the code of each window: the position kh * KW + kw of its maximum, in the narrowest type."""
    y = max_pool2d_values(x, kernel, *window)
    return y, _empty(x, y.shape, x, dtype=_code_type(kernel[0] * kernel[1] - 1))


def _code_type(largest):
    """The narrowest integer type that holds every code."""
    return torch.uint8 if largest < 2**8 else torch.int16 if largest < 2**15 else torch.int32


def conv2d_relu_max_pool2d(x, w, stride, padding, dilation, pool_kernel, pool_stride, pool_padding, ceil_mode):
    """The values, and the code of each window as in max_pool2d, or the window's size where the maximum is <= 0."""
    size = conv2d_size(x.shape[2:], w.shape[2:], stride, padding, dilation)
    size = max_pool2d_size(size, pool_kernel, pool_stride, pool_padding, (1, 1), ceil_mode)
    y = _empty(x, (x.shape[0], w.shape[0], *size), x, w)
    return y, torch.empty_like(y, dtype=_code_type(pool_kernel[0] * pool_kernel[1]))


def conv2d_relu_max_pool2d_input_grad(dy, code, w, size):
    return _empty(dy, size, code, w)


def conv2d_relu_max_pool2d_weight_grad(dy, code, x, size, with_bias):
    """As in conv2d_weight_grad, with the layout of the code, which is that of the image before pooling."""
    return _empty(dy, size, code, x), dy.new_empty(size[0] if with_bias else 0)


def conv2d_relu_max_pool2d_grads(dy, code, x, w, with_bias):
    """The gradients of image, weight and bias."""
    dx = conv2d_relu_max_pool2d_input_grad(dy, code, w, x.shape)
    return dx, *conv2d_relu_max_pool2d_weight_grad(dy, code, x, w.shape, with_bias)


def max_pool2d_scatter(dy, code, size):
    return _empty(dy, (*dy.shape[:2], *size), code)


def max_pool2d_gather(x, code):
    return _empty(x, code.shape, code)


def max_pool2d_indices(code):
    return _empty(code, code.shape, code, dtype=torch.int64)


def avg_pool2d(x, kernel, stride, padding, ceil_mode):
    return max_pool2d_values(x, kernel, stride, padding, (1, 1), ceil_mode)


def avg_pool2d_grad(dy, size, channels_last):
    """The gradient of an image of `size` (H, W); a result of one pixel does not show the image's layout."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((*dy.shape[:2], *size), dtype=dy.dtype, device=dy.device, memory_format=layout)


def adaptive_avg_pool2d(x, size):
    return _empty(x, (*x.shape[:2], *size), x)


def squeeze_excite(x):
    return _empty(x, x.shape, x)


def relu(x):
    return torch.empty_like(x)


def batch_statistics(x, channels):
    """Mean and variance of so many channels, in the type of sums over x."""
    mean = x.new_empty(channels, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return mean, torch.empty_like(mean)


def batch_norm_grad(x, with_dz, with_y):
    """The gradients of x, scale and shift, then the argument's gradient and act's result, or empty tensors."""
    dx = torch.empty_like(x)
    kept = [torch.empty_like(dx) if wanted else x.new_empty(0) for wanted in (with_dz, with_y)]
    return dx, *batch_statistics(x, x.shape[1]), *kept


def norm_conv2d(x, w, stride, padding, dilation, statistics):
    """The result of the convolution and its statistics, which are empty without `statistics`."""
    z = conv2d(x, w, stride, padding, dilation)
    return z, *batch_statistics(z, z.shape[1] if statistics else 0)


def linear(x, w):
    """x is (M, K), w is (N, K)."""
    return x.new_empty(x.shape[0], w.shape[0])


def linear_weight_grad(dy, x, with_bias):
    """dy is (M, N), x is (M, K)."""
    return dy.new_empty(dy.shape[1], x.shape[1]), dy.new_empty(dy.shape[1] if with_bias else 0)


def cross_entropy(x, reduction):
    """The loss, a scalar or one for each row, and its gradient; x is (N, C)."""
    return x.new_empty(x.shape[:1] if reduction == "none" else ()), x.new_empty(x.shape)


def cross_entropy_grad(grad):
    return grad.new_empty(grad.shape)


# The limits of a chain of linears in one launch, whose registers hold a block of rows of two layers at once.
MOST_LAYERS, MOST_WIDTH = 4, 128


def linear_chain_serves(features, widths):
    """Whether layers of these widths, on inputs of so many features, run in one launch."""
    return features > 0 and 2 <= len(widths) <= MOST_LAYERS and all(0 < n <= MOST_WIDTH for n in widths)


def widths(weights):
    """The widths of a chain's layers, whose weights are (..., N, K); None stands for a missing layer."""
    return [w.shape[-2] for w in weights if w is not None]


def linear_chain(x, weights, keep):
    """The result, and the hidden layers' results concatenated; x is (M, K)."""
    *hidden, N = widths(weights)
    return x.new_empty(x.shape[0], N), x.new_empty(x.shape[0], sum(hidden) if keep else 0)


def linear_chain_input_grad(dy, hidden, weights, needs_dx):
    """The gradients of x, without columns unless `needs_dx`, and of the hidden layers before their relu."""
    return dy.new_empty(dy.shape[0], weights[0].shape[1] if needs_dx else 0), dy.new_empty(hidden.shape)


def linear_chain_weight_grad(dy, x, hidden_widths, with_bias):
    """The gradients of all weights, flat and concatenated, and of all biases, empty without `with_bias`."""
    every = [*hidden_widths, dy.shape[1]]
    numel = sum(n * k for n, k in zip(every, [x.shape[1], *every]))
    return dy.new_empty(numel), dy.new_empty(sum(every) if with_bias else 0)

"""The launchers under the names of the operators; `tritonnet.reference` has the same names in plain torch."""

import functools

from . import conv2d as _conv2d
from . import conv2d_pool as _conv2d_pool
from . import cross_entropy as _cross_entropy
from . import depthwise as _depthwise
from . import lenet_forward as _lenet_forward
from . import lenet_gradient as _lenet_gradient
from . import lenet_update as _lenet_update
from . import linear as _linear
from . import max_pool2d as _max_pool2d
from . import padding as _padding
from . import reduce as _reduce
from . import relu as _relu
from . import shapes


def _family(w_size, groups):
    return _depthwise if _depthwise.serves(w_size, groups) else _conv2d


def conv2d(x, w, bias, stride, padding, dilation, groups, pad_mode):
    return _family(w.shape, groups).forward(x, w, bias, stride, padding, dilation, groups, pad_mode)


def conv2d_relu(x, w, bias, stride, padding, dilation, groups, pad_mode):
    return _family(w.shape, groups).forward(x, w, bias, stride, padding, dilation, groups, pad_mode, relu=True)


conv2d_relu_max_pool2d = _conv2d_pool.forward


def conv2d_input_grad(dy, w, size, stride, padding, dilation, groups, pad_mode):
    input_grad = _family(w.shape, groups).input_grad
    if pad_mode == "zeros":
        return input_grad(dy, w, size, stride, padding, dilation, groups)
    # The gradient of the padded image, as a convolution without padding gives it, folded up where pixels were copied.
    (N, C, H, W), (top, bottom, left, right) = size, padding
    dp = input_grad(dy, w, (N, C, H + top + bottom, W + left + right), stride, (0, 0, 0, 0), dilation, groups)
    return _padding.fold_padding(dp, shapes.conv2d_input_grad(dy, w, size), padding, pad_mode)


def conv2d_weight_grad(dy, x, size, stride, padding, dilation, groups, pad_mode, with_bias):
    return _family(size, groups).weight_grad(dy, x, size, stride, padding, dilation, groups, pad_mode, with_bias)


def conv2d_relu_max_pool2d_input_grad(dy, code, w, size, *geometry):
    (stride, padding, dilation, _, _), pool = geometry[:5], geometry[5:]
    before = shapes.conv2d_size(size[2:], w.shape[2:], stride, padding, dilation)
    return conv2d_input_grad(max_pool2d_scatter(dy, code, before, *pool, (1, 1)), w, size, *geometry[:5])


def conv2d_relu_max_pool2d_weight_grad(dy, code, x, size, *geometry):
    (stride, padding, dilation, _, _), pool, with_bias = geometry[:5], geometry[5:-1], geometry[-1]
    before = shapes.conv2d_size(x.shape[2:], size[2:], stride, padding, dilation)
    dz = max_pool2d_scatter(dy, code, before, *pool, (1, 1))
    return conv2d_weight_grad(dz, x, size, *geometry[:5], with_bias)


cross_entropy = _cross_entropy.forward
max_pool2d = _max_pool2d.forward
max_pool2d_scatter = _max_pool2d.scatter
max_pool2d_gather = _max_pool2d.gather
max_pool2d_indices = _max_pool2d.indices
relu = _relu.forward
relu_ = _relu.forward_
relu_grad = _relu.grad
linear = _linear.forward
linear_relu = functools.partial(_linear.forward, relu=True)
linear_weight_grad = _linear.weight_grad

KERNELS = [
    kernel
    for module in (
        _conv2d, _conv2d_pool, _cross_entropy, _depthwise, _lenet_forward, _lenet_gradient, _lenet_update, _linear,
        _max_pool2d, _padding, _reduce, _relu,
    )
    for name, kernel in vars(module).items()
    if name.endswith("_kernel")
]  # fmt: skip
"""Every kernel that can be launched; the other jit functions are parts of these."""

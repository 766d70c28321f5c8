"""The launchers under the names of the operators; `tritonnet.reference` has the same names in plain torch."""

from . import conv2d as _conv2d
from . import depthwise as _depthwise
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


max_pool2d = _max_pool2d.forward
max_pool2d_scatter = _max_pool2d.scatter
max_pool2d_gather = _max_pool2d.gather
max_pool2d_indices = _max_pool2d.indices
relu = _relu.forward
relu_ = _relu.forward_
relu_grad = _relu.grad
linear = _linear.forward
linear_weight_grad = _linear.weight_grad

KERNELS = [
    kernel
    for module in (_conv2d, _depthwise, _linear, _max_pool2d, _padding, _reduce, _relu)
    for name, kernel in vars(module).items()
    if name.endswith("_kernel")
]
"""Every kernel that can be launched; the other jit functions are parts of these."""

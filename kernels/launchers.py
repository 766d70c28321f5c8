"""The launchers under the names of the operators; `tritonnet.reference` has the same names in plain torch."""

import functools
import importlib
import pkgutil
import sys
from pathlib import Path

from . import epilogue as _epilogue
from . import linear as _linear
from . import relu as _relu
from . import shapes
from . import squeeze_excite as _squeeze_excite
from .avg_pool2d import bins as _avg_bins
from .avg_pool2d import forward as _avg_pool2d
from .avg_pool2d import gradient as _avg_gradient
from .avg_pool2d import whole as _avg_whole
from .batch_norm import gradient as _batch_norm_gradient
from .batch_norm import statistics as _batch_statistics
from .conv2d import depthwise as _depthwise
from .conv2d import forward as _forward
from .conv2d import input_grad as _input_grad
from .conv2d import padding as _padding
from .conv2d import patches as _patches
from .conv2d import weight_grad as _weight_grad
from .conv2d_few import convolve as _few_convolve
from .conv2d_few import cut as _few
from .conv2d_few import weight_grad as _few_weight_grad
from .conv2d_pool import chooser as _pool_chooser
from .conv2d_pool import general as _pool_general
from .conv2d_pool import input_grad as _pool_input_grad
from .conv2d_pool import lanes as _pool_lanes
from .conv2d_pool import patch as _pool_patch
from .conv2d_pool import weight_grad as _pool_weight_grad
from .cross_entropy import forward as _cross_entropy
from .cross_entropy import gradient as _cross_entropy_gradient
from .linear_chain import fused as _linear_chain
from .linear_chain import layered
from .max_pool2d import forward as _max_pool2d
from .max_pool2d import gather as _max_pool2d_gather
from .max_pool2d import scatter as _max_pool2d_scatter


def conv2d(x, w, bias, stride, padding, dilation, groups, pad_mode, epilogue=_epilogue.NONE):
    if _few.serves(x.dtype, w.shape[1], padding, dilation, groups, pad_mode):
        return _few_convolve.forward(x, w, bias, stride, padding, epilogue)
    family = _depthwise if _depthwise.serves(w.shape, groups) else _forward
    return family.forward(x, w, bias, stride, padding, dilation, groups, pad_mode, epilogue)


conv2d_relu = functools.partial(conv2d, epilogue=_epilogue.RELU)


def conv2d_partials(x, w, stride, padding, dilation, groups, pad_mode):
    """The convolution, its partial statistics and the pixels of a part, see tile_statistics.py.

    None and 0 in their place where a kernel's tiles are no such parts.
    """
    geometry = stride, padding, dilation, groups, pad_mode
    few = _few.serves(x.dtype, w.shape[1], padding, dilation, groups, pad_mode)
    if few or _depthwise.serves(w.shape, groups):
        return conv2d(x, w, None, *geometry), None, 0
    return _forward.partials(x, w, *geometry)


def conv2d_epilogue(x, w, bias, stride, padding, dilation, groups, pad_mode, *epilogue):
    return conv2d(x, w, bias, stride, padding, dilation, groups, pad_mode, _epilogue.Epilogue(*epilogue))


def conv2d_relu_max_pool2d(x, w, bias, *geometry):
    form = _pool_chooser.form_for(x.dtype, x.shape, w.shape, *geometry)
    if form is None:
        return _pool_general.forward(x, w, bias, *geometry)
    return (_pool_patch if form.product else _pool_lanes).forward(form, x, w, bias, *geometry)


def _input_grad_of_zeros(dy, w, size, stride, padding, dilation, groups, dx=None):
    """The input gradient for padding with zeros; only the kernel of many channels takes a dx."""
    if _few.serves(dy.dtype, min(w.shape[:2]), padding, dilation, groups, "zeros"):
        return _few_convolve.input_grad(dy, w, size, stride, padding)
    if _depthwise.serves(w.shape, groups):
        return _depthwise.input_grad(dy, w, size, stride, padding, dilation, groups)
    return _input_grad.input_grad(dy, w, size, stride, padding, dilation, groups, dx)


def conv2d_input_grad(dy, w, size, stride, padding, dilation, groups, pad_mode, dx=None):
    if pad_mode == "zeros":
        return _input_grad_of_zeros(dy, w, size, stride, padding, dilation, groups, dx)
    # The gradient of the padded image is that of a convolution without padding; copied pixels add to their source.
    (N, C, H, W), (top, bottom, left, right) = size, padding
    padded = N, C, H + top + bottom, W + left + right
    dp = _input_grad_of_zeros(dy, w, padded, stride, (0, 0, 0, 0), dilation, groups)
    dx = shapes.conv2d_input_grad(dy, w, size) if dx is None else dx
    return _padding.fold_padding(dp, dx, padding, pad_mode)


def conv2d_weight_grad(dy, x, size, stride, padding, dilation, groups, pad_mode, with_bias):
    if _few.serves(x.dtype, size[1], padding, dilation, groups, pad_mode):
        return _few_weight_grad.weight_grad(dy, x, size, stride, padding, with_bias)
    family = _depthwise if _depthwise.serves(size, groups) else _weight_grad
    return family.weight_grad(dy, x, size, stride, padding, dilation, groups, pad_mode, with_bias)


def conv2d_grads(dy, x, w, stride, padding, dilation, groups, pad_mode, with_bias):
    geometry = stride, padding, dilation, groups, pad_mode
    if dy.stride(1) == 1 or min(w.shape[0] // groups, w.shape[1]) < _patches.FLAT_BELOW:
        dx = conv2d_input_grad(dy, w, x.shape, *geometry)
        return dx, *conv2d_weight_grad(dy, x, w.shape, *geometry, with_bias)
    # Both kernels want dy's channels contiguous and share a copy. The layouts of the results are those that dy gives.
    dx, *dw_db = shapes.conv2d_grads(dy, x, w, with_bias)
    dy = _patches.channels_inner(dy)
    dx = conv2d_input_grad(dy, w, x.shape, *geometry, dx)
    return dx, *_weight_grad.weight_grad(dy, x, w.shape, *geometry, with_bias, grads=dw_db)


def conv2d_relu_weight_grad(dy, y, x, size, *geometry_with_bias):
    (stride, padding, dilation, groups, pad_mode), with_bias = geometry_with_bias[:5], geometry_with_bias[5]
    if _few.serves(x.dtype, size[1], padding, dilation, groups, pad_mode):
        return _few_weight_grad.weight_grad(dy, x, size, stride, padding, with_bias, y)
    if not _depthwise.serves(size, groups) and _weight_grad.masks(size):
        return _weight_grad.weight_grad(dy, x, size, *geometry_with_bias, y)
    return conv2d_weight_grad(relu_grad(dy, y), x, size, *geometry_with_bias)


def conv2d_relu_max_pool2d_input_grad(dy, code, w, size, *geometry):
    (stride, padding, dilation, _, _), pool = geometry[:5], geometry[5:]
    if _pool_chooser.gradients_are_fused(dy, w.shape, *geometry):
        return _pool_input_grad.input_grad(dy, code, w, size, stride, padding, dilation, *pool)
    before = shapes.conv2d_size(size[2:], w.shape[2:], stride, padding, dilation)
    return conv2d_input_grad(max_pool2d_scatter(dy, code, before, *pool, (1, 1)), w, size, *geometry[:5])


def conv2d_relu_max_pool2d_weight_grad(dy, code, x, size, *geometry):
    (stride, padding, dilation, _, _), pool, with_bias = geometry[:5], geometry[5:-1], geometry[-1]
    if _pool_chooser.gradients_are_fused(dy, size, *geometry[:-1]):
        return _pool_weight_grad.weight_grad(dy, code, x, size, stride, padding, dilation, *pool, with_bias)
    before = shapes.conv2d_size(x.shape[2:], size[2:], stride, padding, dilation)
    dz = max_pool2d_scatter(dy, code, before, *pool, (1, 1))
    return conv2d_weight_grad(dz, x, size, *geometry[:5], with_bias)


def conv2d_relu_max_pool2d_grads(dy, code, x, w, *geometry_with_bias):
    (*geometry, with_bias), (stride, padding, dilation) = geometry_with_bias, geometry_with_bias[:3]
    if _pool_chooser.gradients_are_fused(dy, w.shape, *geometry):
        dx = conv2d_relu_max_pool2d_input_grad(dy, code, w, x.shape, *geometry)
        return dx, *conv2d_relu_max_pool2d_weight_grad(dy, code, x, w.shape, *geometry_with_bias)
    before = shapes.conv2d_size(x.shape[2:], w.shape[2:], stride, padding, dilation)
    dz = max_pool2d_scatter(dy, code, before, *geometry[5:], (1, 1))
    return conv2d_grads(dz, x, w, *geometry[:5], with_bias)


def avg_pool2d(x, kernel, stride, padding, ceil_mode, include_pad, divisor):
    if _avg_whole.serves(x.shape[2:], kernel, padding):
        return _avg_whole.forward(x, divisor)
    return _avg_pool2d.forward(x, kernel, stride, padding, ceil_mode, include_pad, divisor)


def avg_pool2d_grad(dy, size, kernel, stride, padding, ceil_mode, include_pad, divisor, channels_last):
    if _avg_whole.serves(size, kernel, padding):
        return _avg_whole.gradient(dy, size, divisor, channels_last)
    return _avg_gradient.gradient(dy, size, kernel, stride, padding, include_pad, divisor, channels_last)


def _equal_bins(size, bins):
    """The arguments of avg_pool2d after its tensors if all bins of an image of `size` (H, W) have one size, or None."""
    if size[0] % bins[0] or size[1] % bins[1]:
        return None
    kernel = size[0] // bins[0], size[1] // bins[1]
    return kernel, kernel, (0, 0), False, True, None


def adaptive_avg_pool2d(x, size):
    window = _equal_bins(x.shape[2:], size)
    return _avg_bins.forward(x, size) if window is None else avg_pool2d(x, *window)


def adaptive_avg_pool2d_grad(dy, size, channels_last):
    window = _equal_bins(size, dy.shape[2:])
    if window is None:
        return _avg_bins.gradient(dy, size, channels_last)
    return avg_pool2d_grad(dy, size, *window, channels_last)


cross_entropy = _cross_entropy.forward
cross_entropy_grad = _cross_entropy_gradient.gradient
max_pool2d = _max_pool2d.forward
max_pool2d_values = _max_pool2d.values
max_pool2d_scatter = _max_pool2d_scatter.scatter
max_pool2d_gather = _max_pool2d_gather.gather
max_pool2d_indices = _max_pool2d_gather.indices
squeeze_excite = _squeeze_excite.forward
relu = _relu.forward
relu_ = _relu.forward_
relu_grad = _relu.grad
linear = _linear.forward
linear_relu = functools.partial(_linear.forward, epilogue=_epilogue.RELU)
linear_weight_grad = _linear.weight_grad
epilogue = _epilogue.forward
activate_ = _epilogue.activate_
activation_grad = _epilogue.activation_grad
tracked_statistics = _batch_statistics.forward
batch_norm = _epilogue.forward
batch_norm_grad = _batch_norm_gradient.backward


def batch_statistics(x):
    return tracked_statistics(x, None, None, None, 0.0)


def norm_conv2d(x, mean, var, scale, shift, eps, activation, slope, w, bias, *geometry_running):
    *geometry, running_mean, running_var, momentum, statistics = geometry_running
    if mean is not None:
        x = batch_norm(x, mean, var, scale, shift, None, eps, activation, slope)
    if not statistics:
        return conv2d(x, w, bias, *geometry), *shapes.batch_statistics(x, 0)
    z, partials, rows = conv2d_partials(x, w, *geometry)
    running = bias, running_mean, running_var, momentum
    if partials is None:
        return z, *tracked_statistics(z, *running)
    return z, *_batch_statistics.fold(partials, rows, z.numel() // z.shape[1], *running)


def linear_epilogue(x, w, bias, *epilogue):
    return _linear.forward(x, w, bias, _epilogue.Epilogue(*epilogue))


def _chain(name, features, widths):
    """The function `name` of the chain in one launch, or layer by layer."""
    if shapes.linear_chain_serves(features, widths):
        return getattr(_linear_chain, name)
    return functools.partial(getattr(layered, name), sys.modules[__name__])


def linear_chain(x, *layers_keep):
    return _chain("forward", x.shape[1], shapes.widths(layers_keep[:-1:2]))(x, *layers_keep)


def linear_chain_input_grad(dy, hidden, *weights_needs_dx):
    features, widths = weights_needs_dx[0].shape[1], shapes.widths(weights_needs_dx[:-1])
    return _chain("input_grad", features, widths)(dy, hidden, *weights_needs_dx)


def linear_chain_weight_grad(dy, dz, x, hidden, widths, with_bias):
    grads = _chain("weight_grad", x.shape[1], [*widths, dy.shape[1]])
    return grads(dy, dz, x, hidden, widths, with_bias)


def _modules():
    found = pkgutil.walk_packages([str(Path(__file__).parent)], f"{__package__}.")
    return [importlib.import_module(module.name) for module in found if module.name != __name__]


KERNELS = [kernel for module in _modules() for name, kernel in vars(module).items() if name.endswith("_kernel")]
"""Every kernel that can be launched, of all files here; the other jit functions are inlined into these."""

"""The operators: a schema, the shapes of the results, and the choice of kernels or reference at run time.

A convolution's gradient takes the size of its result, of which only the height and width count: how many images and
channels there are the other tensors say. For DTensor gives each process the size of the whole result, and parts of the
tensors (see sharding.py).
"""

import torch

from .dispatch import implementation, on_device
from .kernels import shapes
from .reference import update_running
from .registration import register_functional, register_operator


def _operator(schema, fake, size=None):
    """The operator of a schema, with the function `fake` for uninitialised results.

    Args:
        size: for a gradient of a convolution, whose arguments are dy, other tensors, a size, stride, padding, dilation,
            groups and more: function of dy, the last tensor, the size and groups that returns the size to be computed.
    """
    name, lists = schema.partition("(")[0], "[]" in schema
    if size is not None:
        at, fake_of_size = schema.partition("] size")[0].count(","), fake

        def sized(args):
            return *args[:at], size(args[0], args[at - 1], args[at], args[at + 4]), *args[at + 1 :]

        def fake(*args):
            return fake_of_size(*sized(args))

    def run(*args):
        device = args[0].device
        if size is not None:
            args = sized(args)
        if lists:
            # The dispatcher turns pairs and sizes into lists, but launch plans are cached by hashable values.
            args = [tuple(a) if isinstance(a, list) else a for a in args]
        function = getattr(implementation(args[0]), name)
        with on_device(device):
            if not torch.is_autocast_enabled(device.type):
                return function(*args)
            # torch's operators in the reference must not cast again: the public functions have done so.
            with torch.autocast(device.type, enabled=False):
                return function(*args)

    return register_operator(schema, fake, run)


_GEOMETRY = "int[] stride, int[] padding, int[] dilation, SymInt groups, str pad_mode"
_POOL = "int[] pool_kernel, int[] pool_stride, int[] pool_padding"
_WINDOW = "int[] kernel, int[] stride, int[] padding, int[] dilation"
_EPILOGUE = (
    "Tensor? mean, Tensor? var, Tensor? scale, Tensor? shift, Tensor? residual, float eps, str activation, float slope"
)
_RUNNING = "Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum"
_NORM = "Tensor mean, Tensor var, Tensor? scale, Tensor? shift"
_MEANS = "int[] kernel, int[] stride, int[] padding, bool ceil_mode, bool include_pad, int? divisor"
_LAYERS = "Tensor w1, Tensor? bias1, Tensor w2, Tensor? bias2, Tensor? w3, Tensor? bias3, Tensor? w4, Tensor? bias4"
_WEIGHTS = "Tensor w1, Tensor w2, Tensor? w3, Tensor? w4"

conv2d = _operator(
    f"conv2d(Tensor x, Tensor w, Tensor? bias, {_GEOMETRY}) -> Tensor",
    lambda x, w, bias, stride, padding, dilation, groups, pad_mode: shapes.conv2d(x, w, stride, padding, dilation),
)
conv2d_input_grad = _operator(
    f"conv2d_input_grad(Tensor dy, Tensor w, SymInt[] size, {_GEOMETRY}) -> Tensor",
    lambda dy, w, size, *geometry: shapes.conv2d_input_grad(dy, w, size),
    shapes.input_size,
)
conv2d_weight_grad = _operator(
    f"conv2d_weight_grad(Tensor dy, Tensor x, SymInt[] size, {_GEOMETRY}, bool with_bias) -> (Tensor, Tensor)",
    lambda dy, x, size, *geometry_with_bias: shapes.conv2d_weight_grad(dy, x, size, geometry_with_bias[-1]),
    shapes.weight_size,
)
conv2d_grads = _operator(
    f"conv2d_grads(Tensor dy, Tensor x, Tensor w, {_GEOMETRY}, bool with_bias) -> (Tensor, Tensor, Tensor)",
    lambda dy, x, w, *geometry_with_bias: shapes.conv2d_grads(dy, x, w, geometry_with_bias[-1]),
)
conv2d_relu = _operator(
    f"conv2d_relu(Tensor x, Tensor w, Tensor? bias, {_GEOMETRY}) -> Tensor",
    lambda x, w, bias, stride, padding, dilation, groups, pad_mode: shapes.conv2d(x, w, stride, padding, dilation),
)
conv2d_epilogue = _operator(
    f"conv2d_epilogue(Tensor x, Tensor w, Tensor? bias, {_GEOMETRY}, {_EPILOGUE}) -> Tensor",
    lambda x, w, bias, stride, padding, dilation, *_: shapes.conv2d(x, w, stride, padding, dilation),
)
conv2d_relu_weight_grad = _operator(
    f"conv2d_relu_weight_grad(Tensor dy, Tensor y, Tensor x, SymInt[] size, {_GEOMETRY}, bool with_bias) "
    "-> (Tensor, Tensor)",
    lambda dy, y, x, size, *geometry_with_bias: shapes.conv2d_weight_grad(y, x, size, geometry_with_bias[-1]),
    shapes.weight_size,
)
conv2d_relu_max_pool2d = _operator(
    f"conv2d_relu_max_pool2d(Tensor x, Tensor w, Tensor? bias, {_GEOMETRY}, {_POOL}, bool ceil_mode) "
    "-> (Tensor, Tensor)",
    lambda x, w, bias, stride, padding, dilation, groups, pad_mode, *pool: shapes.conv2d_relu_max_pool2d(
        x, w, stride, padding, dilation, *pool
    ),
)
conv2d_relu_max_pool2d_input_grad = _operator(
    f"conv2d_relu_max_pool2d_input_grad(Tensor dy, Tensor code, Tensor w, SymInt[] size, {_GEOMETRY}, {_POOL}) "
    "-> Tensor",
    lambda dy, code, w, size, *geometry: shapes.conv2d_relu_max_pool2d_input_grad(dy, code, w, size),
    shapes.input_size,
)
conv2d_relu_max_pool2d_weight_grad = _operator(
    f"conv2d_relu_max_pool2d_weight_grad(Tensor dy, Tensor code, Tensor x, SymInt[] size, {_GEOMETRY}, {_POOL}, "
    "bool with_bias) -> (Tensor, Tensor)",
    lambda dy, code, x, size, *geometry_with_bias: shapes.conv2d_relu_max_pool2d_weight_grad(
        dy, code, x, size, geometry_with_bias[-1]
    ),
    shapes.weight_size,
)
conv2d_relu_max_pool2d_grads = _operator(
    f"conv2d_relu_max_pool2d_grads(Tensor dy, Tensor code, Tensor x, Tensor w, {_GEOMETRY}, {_POOL}, bool with_bias) "
    "-> (Tensor, Tensor, Tensor)",
    lambda dy, code, x, w, *geometry_with_bias: shapes.conv2d_relu_max_pool2d_grads(
        dy, code, x, w, geometry_with_bias[-1]
    ),
)
max_pool2d = _operator(
    f"max_pool2d(Tensor x, {_WINDOW}, bool ceil_mode) -> (Tensor, Tensor)",
    shapes.max_pool2d,
)
max_pool2d_values = _operator(
    f"max_pool2d_values(Tensor x, {_WINDOW}, bool ceil_mode) -> Tensor",
    shapes.max_pool2d_values,
)
max_pool2d_scatter = _operator(
    f"max_pool2d_scatter(Tensor dy, Tensor code, SymInt[] size, {_WINDOW}) -> Tensor",
    lambda dy, code, size, *window: shapes.max_pool2d_scatter(dy, code, size),
)
max_pool2d_gather = _operator(
    f"max_pool2d_gather(Tensor x, Tensor code, {_WINDOW}) -> Tensor",
    lambda x, code, *window: shapes.max_pool2d_gather(x, code),
)
max_pool2d_indices = _operator(
    f"max_pool2d_indices(Tensor code, SymInt width, {_WINDOW}) -> Tensor",
    lambda code, width, *window: shapes.max_pool2d_indices(code),
)
avg_pool2d = _operator(
    f"avg_pool2d(Tensor x, {_MEANS}) -> Tensor",
    lambda x, kernel, stride, padding, ceil_mode, *_: shapes.avg_pool2d(x, kernel, stride, padding, ceil_mode),
)
avg_pool2d_grad = _operator(
    f"avg_pool2d_grad(Tensor dy, SymInt[] size, {_MEANS}, bool channels_last) -> Tensor",
    lambda dy, size, *window_channels_last: shapes.avg_pool2d_grad(dy, size, window_channels_last[-1]),
)
adaptive_avg_pool2d = _operator(
    "adaptive_avg_pool2d(Tensor x, SymInt[] size) -> Tensor",
    shapes.adaptive_avg_pool2d,
)
adaptive_avg_pool2d_grad = _operator(
    "adaptive_avg_pool2d_grad(Tensor dy, SymInt[] size, bool channels_last) -> Tensor",
    shapes.avg_pool2d_grad,
)
squeeze_excite = _operator(
    "squeeze_excite(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str activation, str gate) -> Tensor",
    lambda x, *_: shapes.squeeze_excite(x),
)
relu = _operator("relu(Tensor x) -> Tensor", shapes.relu)
relu_ = _operator("relu_(Tensor(a!) x) -> ()", lambda x: None)


def _in_place(operator, function):
    """Let function(*args), a new tensor, overwrite the first argument where torch functionalizes."""

    def functional(x, *args):
        x.copy_(function(x, *args))

    register_functional(operator, functional)


_in_place(relu_, relu)
relu_grad = _operator("relu_grad(Tensor dy, Tensor y) -> Tensor", lambda dy, y: shapes.relu(y))
epilogue = _operator(f"epilogue(Tensor x, {_EPILOGUE}) -> Tensor", lambda x, *_: shapes.relu(x))
batch_statistics = _operator(
    "batch_statistics(Tensor x) -> (Tensor, Tensor)",
    lambda x: shapes.batch_statistics(x, x.shape[1]),
)
tracked_statistics = _operator(
    f"tracked_statistics(Tensor x, Tensor? bias, {_RUNNING.replace('?', '')}) -> (Tensor, Tensor)",
    lambda x, *_: shapes.batch_statistics(x, x.shape[1]),
)


def _functional_statistics(x, bias, running_mean, running_var, momentum):
    mean, var = batch_statistics(x)
    update_running(running_mean, running_var, mean, var, bias, x.numel() // x.shape[1], momentum)
    return mean, var


register_functional(tracked_statistics, _functional_statistics)
batch_norm = _operator(
    f"batch_norm(Tensor x, {_NORM}, Tensor? residual, float eps, str activation, float slope) -> Tensor",
    lambda x, *_: shapes.relu(x),
)
batch_norm_grad = _operator(
    f"batch_norm_grad(Tensor dy, Tensor x, Tensor? y, {_NORM}, float eps, str activation, float slope, bool with_dz, "
    "bool with_y) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda dy, x, *others: shapes.batch_norm_grad(x, *others[-2:]),
)
norm_conv2d = _operator(
    "norm_conv2d(Tensor x, Tensor? mean, Tensor? var, Tensor? scale, Tensor? shift, float eps, str activation, "
    f"float slope, Tensor w, Tensor? bias, {_GEOMETRY}, {_RUNNING}, bool statistics) -> (Tensor, Tensor, Tensor)",
    lambda x, *others: shapes.norm_conv2d(x, others[7], *others[9:12], others[-1]),
)

activate_ = _operator("activate_(Tensor(a!) x, str activation, float slope) -> ()", lambda x, *_: None)
_in_place(activate_, lambda x, *activation: epilogue(x, *[None] * 5, 0.0, *activation))
activation_grad = _operator(
    "activation_grad(Tensor dy, Tensor t, str activation, float slope) -> Tensor", lambda dy, t, *_: shapes.relu(t)
)
linear = _operator(
    "linear(Tensor x, Tensor w, Tensor? bias) -> Tensor",
    lambda x, w, bias: shapes.linear(x, w),
)
linear_relu = _operator(
    "linear_relu(Tensor x, Tensor w, Tensor? bias) -> Tensor",
    lambda x, w, bias: shapes.linear(x, w),
)
linear_epilogue = _operator(
    f"linear_epilogue(Tensor x, Tensor w, Tensor? bias, {_EPILOGUE}) -> Tensor",
    lambda x, w, *_: shapes.linear(x, w),
)
linear_weight_grad = _operator(
    "linear_weight_grad(Tensor dy, Tensor x, bool with_bias) -> (Tensor, Tensor)",
    shapes.linear_weight_grad,
)
linear_chain = _operator(
    f"linear_chain(Tensor x, {_LAYERS}, bool keep) -> (Tensor, Tensor)",
    lambda x, *layers_keep: shapes.linear_chain(x, layers_keep[:-1:2], layers_keep[-1]),
)
linear_chain_input_grad = _operator(
    f"linear_chain_input_grad(Tensor dy, Tensor hidden, {_WEIGHTS}, bool needs_dx) -> (Tensor, Tensor)",
    lambda dy, hidden, *weights_needs_dx: shapes.linear_chain_input_grad(
        dy, hidden, weights_needs_dx[:-1], weights_needs_dx[-1]
    ),
)
linear_chain_weight_grad = _operator(
    "linear_chain_weight_grad(Tensor dy, Tensor dz, Tensor x, Tensor hidden, SymInt[] widths, bool with_bias) "
    "-> (Tensor, Tensor)",
    lambda dy, dz, x, hidden, widths, with_bias: shapes.linear_chain_weight_grad(dy, x, widths, with_bias),
)
cross_entropy = _operator(
    "cross_entropy(Tensor x, Tensor target, Tensor? weight, str reduction, int ignore_index, float smoothing) "
    "-> (Tensor, Tensor)",
    lambda x, target, weight, reduction, ignore_index, smoothing: shapes.cross_entropy(x, reduction),
)
cross_entropy_grad = _operator(
    "cross_entropy_grad(Tensor dloss, Tensor grad, Tensor target, int ignore_index) -> Tensor",
    lambda dloss, grad, target, ignore_index: shapes.cross_entropy_grad(grad),
)

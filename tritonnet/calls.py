"""What the calls of a captured graph compute: the functions, methods and operators of patterns, torch's and ours."""

import inspect
import operator
from typing import Any

import torch
import torch.nn.functional as torch_functional
from torch.fx.experimental.symbolic_shapes import statically_known_true

from . import ops
from .nn import _norm
from .nn import functional as F
from .serving import OURS

CONV, LINEAR, RELU, POOL = "conv2d", "linear", "relu", "max_pool2d"


def _relu_(x):
    ops.relu_(x)
    return x


def _activate_(x, activation, slope):
    ops.activate_(x, activation, slope)
    return x


def conv2d_relu_max_pool2d(*arguments):
    """The first result of the operator of that name."""
    return ops.conv2d_relu_max_pool2d(*arguments)[0]


# Operators with two results, and what returns only the first.
_FIRST_OF = {ops.max_pool2d: ops.max_pool2d_values, ops.conv2d_relu_max_pool2d: conv2d_relu_max_pool2d}
# Operators that write and return nothing, and what returns the tensor that they overwrite.
_RETURNING = {ops.relu_: _relu_, ops.activate_: _activate_}
# Operators on matrices, and the functions that flatten any input into rows.
_WHOLE = {ops.linear: F.linear, ops.linear_relu: F.linear_relu}
# The steps that a call does.
_STEPS = {
    torch.conv2d: (CONV,), ops.conv2d: (CONV,), ops.conv2d_relu: (CONV, RELU),
    conv2d_relu_max_pool2d: (CONV, RELU, POOL),
    torch_functional.linear: (LINEAR,), ops.linear: (LINEAR,), ops.linear_relu: (LINEAR, RELU),
    F.linear: (LINEAR,), F.linear_relu: (LINEAR, RELU),
    torch.relu: (RELU,), torch.relu_: (RELU,), torch_functional.relu: (RELU,), ops.relu: (RELU,), _relu_: (RELU,),
    "relu": (RELU,), "relu_": (RELU,),
    torch.max_pool2d: (POOL,), torch_functional.max_pool2d: (POOL,), ops.max_pool2d_values: (POOL,),
}  # fmt: skip
_DROPOUTS = (
    torch_functional.dropout, torch_functional.dropout1d, torch_functional.dropout2d, torch_functional.dropout3d,
    torch_functional.alpha_dropout, torch_functional.feature_alpha_dropout,
)  # fmt: skip

_INPLACE = {"inplace": False}
# Targets of calls that are activations, and their arguments behind the input.
_ACTIVATIONS = {
    "relu": ([torch.relu, torch.relu_, torch_functional.relu, ops.relu, _relu_, "relu", "relu_"], _INPLACE),
    "relu6": ([torch_functional.relu6], _INPLACE),
    "hardtanh": (
        [torch_functional.hardtanh, torch_functional.hardtanh_], {"min_val": -1.0, "max_val": 1.0, **_INPLACE}
    ),
    "leaky_relu": ([torch_functional.leaky_relu, torch_functional.leaky_relu_], {"negative_slope": 0.01, **_INPLACE}),
    "silu": ([torch_functional.silu], _INPLACE),
    "hardswish": ([torch_functional.hardswish], _INPLACE),
    "gelu": ([torch_functional.gelu], {"approximate": "none"}),
    "sigmoid": ([torch.sigmoid, torch.sigmoid_, torch_functional.sigmoid, "sigmoid", "sigmoid_"], {}),
    "hardsigmoid": ([torch_functional.hardsigmoid], _INPLACE),
    "ours": ([_activate_], {"activation": None, "slope": 0.01}),
}  # fmt: skip
_ACTIVATION_OF = {target: (name, given) for name, (targets, given) in _ACTIVATIONS.items() for target in targets}
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_", "__iadd__")
_NORMS = {
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training"),
    torch_functional.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training"),
    torch.batch_norm: ("input", "weight", "bias", "running_mean", "running_var", "training"),
}
# What an epilogue does, in this order, and the names of its arguments.
PARTS = ("mean", "var", "scale", "shift", "eps"), ("residual",), ("activation", "slope")
_POOLINGS = (torch_functional.adaptive_avg_pool2d, ops.adaptive_avg_pool2d)
_MEANS = (torch.mean, "mean")
_PRODUCTS = (operator.mul, torch.mul, "mul")


def _pixel_means(x, keepdim):
    y = F.adaptive_avg_pool2d(x, 1)
    return y if keepdim else torch.ops.aten._unsafe_view.default(y, y.shape[:2])


# Our functions for torch's, of which methods are called by name in a graph.
_OURS: dict[Any, Any] = {
    theirs.__name__ if inspect.ismethoddescriptor(theirs) else theirs: ours for theirs, ours in OURS.items()
}
_NUMBERS = int, float, torch.SymInt, torch.SymFloat, torch.SymBool
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Other calls whose results are new tensors and that write to none.
_NEW = {
    F.conv2d_relu, F.conv2d_relu_max_pool2d, F.conv2d_epilogue, F.linear_chain, F.linear_epilogue, F.epilogue,
    F.squeeze_excite, ops.squeeze_excite, _norm.normed,
    ops.epilogue, ops.conv2d_epilogue, ops.linear_epilogue, ops.avg_pool2d, ops.adaptive_avg_pool2d,
    operator.sub, operator.mul, operator.truediv, operator.neg, torch.sub, torch.mul, torch.div, torch.cat,
    torch_functional.avg_pool2d, torch_functional.adaptive_avg_pool2d, torch_functional.softmax, "mean", "sum", "mul",
}  # fmt: skip
# Calls whose results may be views and that write to nothing.
_VIEWS = {
    operator.getitem, torch.flatten, torch.permute, torch.transpose, torch.reshape, "flatten", "permute", "transpose",
    "reshape", "view", "expand", "contiguous", "to", "float", "size", "chunk", "unsqueeze", "squeeze",
}  # fmt: skip


def value_of(node):
    """The tensor that the node gave while it was captured, without elements; None if it gave something else."""
    value = node.meta.get("example_value") if isinstance(node, torch.fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def shape_of(node):
    return tuple(node.meta["example_value"].shape)


def _equal(a, b):
    return len(a) == len(b) and all(statically_known_true(i == j) for i, j in zip(a, b))


def alike(node, other, strides=True):
    """Whether two nodes give tensors of one shape, dtype and device and, with `strides`, layout."""
    a, b = value_of(node), value_of(other)
    if a is None or b is None or (a.dtype, a.device, a.layout) != (b.dtype, b.device, b.layout):
        return False
    if a.layout is not torch.strided or not _equal(a.shape, b.shape):
        return False
    counted = [i for i, size in enumerate(a.shape) if not statically_known_true(size == 1)]
    return not strides or _equal([a.stride(i) for i in counted], [b.stride(i) for i in counted])


def is_laid_out(node):
    """Whether the tensor is contiguous or channels_last, as all results of torch's batch norm are."""
    value = value_of(node)
    return value.is_contiguous() or (value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last))


def arguments_of(node, *names, **defaults):
    """{name: argument} of a call whose arguments have these names, in this order."""
    return {**defaults, **dict(zip((*names, *defaults), node.args)), **node.kwargs}


def window_of(node):
    """(kernel, stride, padding, ceil_mode) of a pooling with constant arguments; None if the fused kernels lack it."""
    given = arguments_of(
        node, "input", "kernel_size", stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
    )
    pairs = [_pair(given[name]) for name in ("kernel_size", "stride", "padding", "dilation")]
    if pairs[0] is None or None in pairs[2:] or pairs[3] != (1, 1) or given["return_indices"]:
        return None
    stride = pairs[0] if given["stride"] in (None, [], ()) else pairs[1]
    return None if stride is None else (pairs[0], stride, pairs[2], given["ceil_mode"])


def _pair(value):
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return (values[0], values[-1]) if len(values) in (1, 2) and all(type(v) is int for v in values) else None


def is_call(node):
    """Whether the node is a call, of those that this file knows: one with `out`, which it writes, is another."""
    return node.op in ("call_function", "call_method") and "out" not in node.kwargs


def steps_of(node):
    """The steps of convolution, linear, relu and max-pooling that the node does; () if it does something else."""
    steps = _STEPS.get(node.target, ()) if is_call(node) else ()
    return () if steps == (POOL,) and window_of(node) is None else steps


def only_user(node):
    """The node that uses this one's result, if there is one only."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def overwritten_by(node):
    """The argument that a call of this file overwrites, or None."""
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = target.rstrip("_") != target and not target.startswith("__") or target in ("iadd", "__iadd__")
    _, names = _ACTIVATION_OF.get(node.target, (None, {}))
    if in_place or arguments_of(node, "input", **names).get("inplace"):
        return node.args[0] if node.args else node.kwargs.get("input")
    return None


def _is_new(node):
    """Whether the node gives a new tensor or the one that it overwrites, and keeps no other name of it."""
    if not is_call(node):
        return False
    known = any(node.target in targets for targets in (_ACTIVATION_OF, _ADDITIONS, _NORMS, _NEW))
    return known or bool(steps_of(node))


def _is_fresh(node):
    """Whether the node's result has no other name in the graph and outside of it."""
    if not isinstance(node, torch.fx.Node) or not _is_new(node):
        return False
    overwritten = overwritten_by(node)
    return overwritten is None or is_own(overwritten)


def is_own(node):
    """Whether nothing but the node's only user can read or write the memory of its result."""
    return _is_fresh(node) and only_user(node) is not None


def _writes_others(node, than):
    """Whether the node only writes to statistics or a counter, and not to what another node gives."""
    written = written_by(node)
    return written is not None and than not in written


def stays(node, row):
    """Whether nothing but the nodes of a row may overwrite the node's result, until a backward pass needs it."""
    users = [user for user in node.users if user not in row]
    return _is_fresh(node) and all(
        (writes_nothing(user) or _writes_others(user, node))
        and user.target not in _VIEWS and overwritten_by(user) is not node
        for user in users
    )  # fmt: skip


def _is_arithmetic(node):
    """Whether the node computes a number, such as a size, from numbers."""
    known = getattr(node.target, "__module__", None) in ("_operator", "math", "torch")
    return known and isinstance(node.meta.get("example_value"), _NUMBERS)


def writes_nothing(node):
    """Whether the node writes to no tensor that others can read."""
    if is_call(node) and (node.target in _VIEWS or _is_arithmetic(node)):
        return True
    return _is_fresh(node) and not is_training_norm(node)


def is_training_norm(node):
    """Whether the node is a batch norm that may write its running statistics."""
    return is_call(node) and node.target in _NORMS and _norm_arguments(node)["training"] is not False


def _is_counter(node):
    value = value_of(node)
    return value is not None and value.dtype == torch.int64


def written_by(node):
    """The nodes whose tensors the node overwrites, if it is a batch norm in training or counts its batches, or None."""
    if is_training_norm(node):
        given = _norm_arguments(node)
        written = [given["running_mean"], given["running_var"]]
    elif is_call(node) and node.target in (_norm.norm_conv2d, _norm.statistics_of):
        written = list((node.args[2] or ()) if node.target is _norm.norm_conv2d else node.args[1:3])
    elif is_call(node) and node.target == "add_" and node.args[1:] == (1,) and _is_counter(node):
        written = [node.args[0]]
    else:
        return None
    return [argument for argument in written if isinstance(argument, torch.fx.Node)]


def _norm_arguments(node):
    absent = {"weight": None, "bias": None, "training": False}
    return {**absent, **arguments_of(node, *_NORMS[node.target], momentum=0.1, eps=1e-5, cudnn_enabled=True)}


def _normed_by(node, training):
    """The arguments of a batch norm of tensors that our functions take, in training or evaluation; None if it is not.

    Args:
        training: whether it normalises by the batch's own statistics.
    """
    if not is_call(node) or node.target not in _NORMS:
        return None
    given = _norm_arguments(node)
    vectors = [given[name] for name in ("running_mean", "running_var", "weight", "bias")]
    x = value_of(given["input"])
    if given["training"] is not training or x is None or x.dim() < 2 or x.dtype not in _FLOATS:
        return None
    if not training and None in vectors[:2]:
        return None
    for vector in filter(None, vectors):
        t = value_of(vector)
        allowed = (x.dtype, torch.float32) if x.dtype in (torch.float16, torch.bfloat16) else (x.dtype,)
        if t is None or t.dtype not in allowed or not _equal(t.shape, x.shape[1:2]):
            return None
    return given if type(given["eps"]) in (int, float) else None


def norm_of(node):
    """(input, the arguments of F.epilogue) of a batch norm in evaluation; None if it is anything else."""
    given = _normed_by(node, training=False)
    names = {"mean": "running_mean", "var": "running_var", "scale": "weight", "shift": "bias", "eps": "eps"}
    return given and (given["input"], {ours: given[theirs] for ours, theirs in names.items()})


def training_norm_of(node):
    """(input, (running_mean, running_var, momentum), (weight, bias, eps)) of a batch norm in training, or None."""
    given = _normed_by(node, training=True)
    if given is None or type(given["momentum"]) not in (int, float):
        return None
    if statically_known_true(value_of(given["input"]).numel() == 0):
        return None
    running = given["running_mean"], given["running_var"], given["momentum"]
    return given["input"], running, (given["weight"], given["bias"], given["eps"])


def sum_of(node):
    """The two operands of a sum of two tensors; None if it is anything else."""
    if node.target not in _ADDITIONS:
        return None
    given = arguments_of(node, "input", "other", alpha=1)
    operands = given["input"], given["other"]
    if set(given) != {"input", "other", "alpha"} or given["alpha"] != 1 or operands[0] is operands[1]:
        return None
    return operands if alike(*operands, strides=False) else None


def activation_of(node):
    """(input, the arguments of F.epilogue) of an activation; None if it is anything else."""
    if node.target not in _ACTIVATION_OF:
        return None
    name, names = _ACTIVATION_OF[node.target]
    given = arguments_of(node, "input", **names)
    if set(given) != {"input", *names}:
        return None
    slope = given.get("slope", given.get("negative_slope", 0.01))
    if type(slope) not in (int, float) or slope < 0:
        return None
    if name == "hardtanh":
        name = "relu6" if (given["min_val"], given["max_val"]) == (0, 6) else None
    elif name == "gelu":
        name = {"none": "gelu", "tanh": "gelu_tanh"}.get(given["approximate"])
    elif name == "ours":
        name = given["activation"]
    return name and (given["input"], dict(activation=name, slope=float(slope)))


def arguments_of_operator(node):
    """The arguments of ops.epilogue that are not without effect."""
    names = "mean", "var", "scale", "shift", "residual", "eps", "activation", "slope"
    given = dict(zip(names, node.args[1:]))
    found = {}
    for part in PARTS:
        if any(given[name] not in (None, "none") for name in part if name not in ("eps", "slope")):
            found |= {name: given[name] for name in part}
    return found


def means_of(node):
    """(x, keepdim) of the means of images x over their pixels; None if it is anything else."""
    if node.target in _POOLINGS:
        given = arguments_of(node, "input", "output_size")
        x, keepdim, whole = given["input"], True, given["output_size"] in (1, (1, 1), [1, 1])
    elif node.target not in _MEANS:
        return None
    else:
        given = arguments_of(node, "input", dim=None, keepdim=False, dtype=None)
        x, keepdim, dims = given["input"], given["keepdim"], given["dim"]
        whole = dims in ((2, 3), [2, 3], (-2, -1), [-2, -1], (-1, -2), [-1, -2]) and given["dtype"] is None
    value, result = value_of(x), value_of(node)
    # Under autocast the means may have another dtype.
    if not whole or value is None or result is None or value.dim() != 4 or value.dtype != result.dtype:
        return None
    return x, keepdim


def pointwise_of(node, x):
    """[weight, bias] of a convolution of x with filters of one pixel; None if it is anything else."""
    if steps_of(node) != (CONV,) or value_of(node) is None or value_of(node).dtype != value_of(x).dtype:
        return None
    given = arguments_of(
        node, "input", "weight", bias=None, stride=1, padding=0, dilation=1, groups=1, pad_mode="zeros"
    )
    unpadded = given["padding"] == 0 or (isinstance(given["padding"], (tuple, list)) and not any(given["padding"]))
    usual = given["input"] is x and shape_of(given["weight"])[2:] == (1, 1) and given["groups"] == 1 and unpadded
    return [given["weight"], given["bias"]] if usual and _pair(given["stride"]) == (1, 1) else None


def ours_of(node):
    """(function, args, kwargs): our function that does what the call of one of torch's does; None if there is none."""
    if not is_call(node):
        return None
    if node.target in _OURS:
        return _OURS[node.target], node.args, node.kwargs
    means = None if node.target in _POOLINGS else means_of(node)
    return means and (_pixel_means, means, {})


def is_attention(node):
    return is_call(node) and node.target is torch_functional.multi_head_attention_forward


def product_of(node):
    """The two operands of a product that is a new tensor; None if it is anything else."""
    return tuple(node.args) if is_call(node) and node.target in _PRODUCTS and not node.kwargs else None


def epilogue_of(node, value):
    """The arguments of F.epilogue(value, ...) for which it does what the node does; None if there are none."""
    if not is_call(node) or value not in node.all_input_nodes or not alike(node, value):
        return None
    if value_of(value).dtype not in _FLOATS:
        return None
    overwritten = overwritten_by(node)
    if overwritten is not None and not is_own(overwritten):
        return None
    if operands := sum_of(node):
        return {"residual": operands[operands[0] is value]}
    if node.target == ops.epilogue:
        x, given = node.args[0], arguments_of_operator(node)
    else:
        x, given = norm_of(node) or activation_of(node) or (None, None)
    return given if x is value and node.all_input_nodes.count(value) == 1 and value not in given.values() else None


def simplify(graph):
    """Remove dropout and casts that do nothing; make operators with two results or none return the one that is used."""
    for node in list(graph.nodes):
        if node.op == "call_method" and node.target == "to" and _is_of_that_dtype(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        if node.op != "call_function":
            continue
        if node.target in _DROPOUTS:
            given = arguments_of(node, "input", p=0.5, training=True)
            if given["training"] is False:
                node.replace_all_uses_with(given["input"])
                graph.erase_node(node)
        elif node.target in _RETURNING:
            x = node.args[0]
            node.target, node.meta = _RETURNING[node.target], dict(x.meta)
            x.replace_all_uses_with(node, delete_user_cb=lambda user, node=node: user > node)
        elif node.target in _WHOLE and (x := _rows_of(node)) is not None:
            (view,) = node.users
            rows, node.args = node.args[0], (x, *node.args[1:])
            node.target, node.meta = _WHOLE[node.target], dict(view.meta)
            view.replace_all_uses_with(node)
            graph.erase_node(view)
            graph.erase_node(rows)
        elif node.target == ops.batch_norm:
            _as_one_call(graph, node)
        elif node.target == ops.epilogue:
            _as_norm(node)
        elif node.target in _FIRST_OF and [user.args[1:] for user in node.users] == [(0,)]:
            (item,) = node.users
            node.target, node.meta = _FIRST_OF[node.target], dict(item.meta)
            item.replace_all_uses_with(node)
            graph.erase_node(item)


def _as_norm(node):
    """Make the operator of our batch norm in evaluation a call of the function again."""
    x, mean, var, scale, shift, residual, eps, activation, _ = before = node.args
    if None in (mean, var) or (residual, activation) != (None, "none") or not is_laid_out(x):
        return
    node.target, node.args = F.batch_norm, (x, mean, var, scale, shift, False, 0.1, eps)
    if norm_of(node) is None:  # F.epilogue takes vectors of more dtypes
        node.target, node.args = ops.epilogue, before


def _as_one_call(graph, norm):
    """Make the two operators of our batch norm in training one call of the function again."""
    x, mean, var, scale, shift, residual, eps, activation, slope = norm.args
    statistics = mean.args[0] if mean.target == operator.getitem else mean
    if statistics.target not in (ops.batch_statistics, ops.tracked_statistics) or statistics.args[0] is not x:
        return
    if len(statistics.users) != 2 or len({*mean.users, *var.users}) != 1:
        return
    # A number that Dynamo takes for an input may be computed later.
    if any(node > statistics for node in norm.all_input_nodes if node not in (mean, var)):
        return
    running_mean, running_var, momentum = statistics.args[2:] or (None, None, 0.0)
    given = x, running_mean, running_var, scale, shift, True, momentum, eps
    epilogue = dict(residual=residual, activation=activation, slope=slope)
    plain = residual is None and activation == "none"
    # It takes the place of the statistics, whose writes stay in order.
    with graph.inserting_before(statistics):
        function = F.batch_norm if plain else F.batch_norm_epilogue
        new = graph.call_function(function, given, {} if plain else epilogue)
    new.meta = dict(norm.meta)
    norm.replace_all_uses_with(new)
    for old in (norm, var, mean, statistics):
        graph.erase_node(old)


def _is_of_that_dtype(node):
    """Whether `to` returns its input unchanged."""
    value = node.args[0].meta.get("example_value")
    return isinstance(value, torch.Tensor) and node.args[1:] == (value.dtype,) and not node.kwargs


def _rows_of(linear):
    """The input of more than two dimensions that our linear's rows were flattened from; None if there is none."""
    rows, user = linear.args[0], next(iter(linear.users), None)
    if (rows.op, rows.target, rows.args[1:], len(rows.users)) != ("call_method", "flatten", (0, -2), 1):
        return None
    if len(linear.users) != 1 or user.target != torch.ops.aten._unsafe_view.default:
        return None
    x = rows.args[0]
    return x if shape_of(user)[:-1] == shape_of(x)[:-1] and user.args[0] is linear else None

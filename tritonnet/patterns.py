"""Finds patterns in a captured graph (convolution, relu and max-pooling; linears and relus) and fuses them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as torch_functional
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import ops
from .kernels import shapes
from .nn import functional as F

CONV, LINEAR, RELU, POOL = "conv2d", "linear", "relu", "max_pool2d"


def _relu_(x):
    ops.relu_(x)
    return x


def _conv2d_relu_max_pool2d(*arguments):
    return ops.conv2d_relu_max_pool2d(*arguments)[0]


# Operators with two results, and what returns only the first.
_FIRST_OF = {ops.max_pool2d: ops.max_pool2d_values, ops.conv2d_relu_max_pool2d: _conv2d_relu_max_pool2d}
# Operators on matrices, and the functions that flatten any input into rows.
_WHOLE = {ops.linear: F.linear, ops.linear_relu: F.linear_relu}
# The steps that a call does.
_STEPS = {
    torch.conv2d: (CONV,), ops.conv2d: (CONV,), ops.conv2d_relu: (CONV, RELU),
    _conv2d_relu_max_pool2d: (CONV, RELU, POOL),
    torch_functional.linear: (LINEAR,), ops.linear: (LINEAR,), ops.linear_relu: (LINEAR, RELU),
    F.linear: (LINEAR,), F.linear_relu: (LINEAR, RELU),
    torch.relu: (RELU,), torch.relu_: (RELU,), torch_functional.relu: (RELU,), ops.relu: (RELU,), _relu_: (RELU,),
    "relu": (RELU,), "relu_": (RELU,),
    torch.max_pool2d: (POOL,), torch_functional.max_pool2d: (POOL,), ops.max_pool2d_values: (POOL,),
}  # fmt: skip
# Relu and max-pooling commute.
_PATTERNS = (CONV, RELU, POOL), (CONV, POOL, RELU), (CONV, RELU)
_DROPOUTS = (
    torch_functional.dropout, torch_functional.dropout1d, torch_functional.dropout2d, torch_functional.dropout3d,
    torch_functional.alpha_dropout, torch_functional.feature_alpha_dropout,
)  # fmt: skip


def _shape(node):
    return tuple(node.meta["example_value"].shape)


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


def steps_of(node):
    """The steps that the node does; () if it cannot be part of a pattern."""
    steps = _STEPS.get(node.target, ()) if node.op in ("call_function", "call_method") else ()
    return () if steps == (POOL,) and window_of(node) is None else steps


def follow(node):
    """[(node, steps)] from this node on, while each result is used only by the next node."""
    found = []
    while node is not None and (steps := steps_of(node)):
        found.append((node, steps))
        node = _behind(node)
    return found


def _behind(node):
    """The next node of a pattern: the only user of this one's result, with no other inputs except weights."""
    user = next(iter(node.users), None)
    if len(node.users) != 1 or not steps_of(user):
        return None
    given = [*user.args, *user.kwargs.values()]
    is_input = user.args[:1] == (node,) or user.kwargs.get("input") is node
    others = 0 if steps_of(user)[0] == LINEAR else len(user.all_input_nodes) - 1
    return user if is_input and not others and sum(argument is node for argument in given) == 1 else None


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
        elif node.target == ops.relu_:
            (x,) = node.args
            node.target, node.meta = _relu_, dict(x.meta)
            x.replace_all_uses_with(node, delete_user_cb=lambda user, node=node: user > node)
        elif node.target in _WHOLE and (x := _rows_of(node)) is not None:
            (view,) = node.users
            rows, node.args = node.args[0], (x, *node.args[1:])
            node.target, node.meta = _WHOLE[node.target], dict(view.meta)
            view.replace_all_uses_with(node)
            graph.erase_node(view)
            graph.erase_node(rows)
        elif node.target in _FIRST_OF and [user.args[1:] for user in node.users] == [(0,)]:
            (item,) = node.users
            node.target, node.meta = _FIRST_OF[node.target], dict(item.meta)
            item.replace_all_uses_with(node)
            graph.erase_node(item)


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
    return x if _shape(user)[:-1] == _shape(x)[:-1] and user.args[0] is linear else None


class Row(NamedTuple):
    """Nodes of a graph and the one call that does what they do.

    Attributes:
        nodes: from first to last.
        function, args, kwargs: the call.
        taken_early: later nodes with weights of their own, which the call reads earlier than these nodes would.
    """

    nodes: list
    function: Callable
    args: tuple
    kwargs: dict
    taken_early: tuple = ()


def _of_convolution(conv):
    """The Rows that start with a convolution, the longest first."""
    parts = follow(conv)[:3]
    steps = [sum((steps for _, steps in parts[: i + 1]), ()) for i in range(len(parts))]
    by_operator = conv.target in (ops.conv2d, ops.conv2d_relu)
    for pattern in _PATTERNS:
        if pattern not in steps[1:]:
            continue
        nodes = [node for node, _ in parts[: steps.index(pattern) + 1]]
        window = next((window_of(node) for node in nodes if steps_of(node) == (POOL,)), None)
        if window is None:
            yield Row(nodes, ops.conv2d_relu if by_operator else F.conv2d_relu, conv.args, conv.kwargs)
        elif by_operator:
            yield Row(nodes, _conv2d_relu_max_pool2d, (*conv.args, *window), {})
        else:
            names = "pool_kernel_size", "pool_stride", "pool_padding", "pool_ceil_mode"
            yield Row(nodes, F.conv2d_relu_max_pool2d, conv.args, {**conv.kwargs, **dict(zip(names, window))})


def _of_linear(linear):
    """The Rows that start with a linear: a chain that one launch computes, then the linear with its relu."""
    nodes, steps = [], ()
    for node, of_node in follow(linear):
        if of_node[0] != (RELU if steps[-1:] == (LINEAR,) else LINEAR):
            break
        nodes, steps = [*nodes, node], steps + of_node
    layers = [node for node in nodes if steps_of(node)[0] == LINEAR]
    given = [arguments_of(node, "input", "weight", bias=None) for node in layers]
    weights, biases = [g["weight"] for g in given], [g["bias"] for g in given]
    sizes = list(map(_shape, weights))
    usual = all(len(size) == 2 and (b is None or _shape(b) == size[:1]) for size, b in zip(sizes, biases))
    # A chain does not end with a linear followed by relu: those two are a pattern of their own.
    if steps[-1] == LINEAR and usual:
        if shapes.linear_chain_serves(sizes[0][1], [size[0] for size in sizes]):
            yield Row(nodes, F.linear_chain, (given[0]["input"], weights, biases), {}, tuple(layers[1:]))
    if steps_of(linear) == (LINEAR,) and len(nodes) > 1:
        function = ops.linear_relu if linear.target == ops.linear else F.linear_relu
        yield Row(nodes[:2], function, linear.args, linear.kwargs)


def _is_value(node):
    """Whether the node only computes tensors or sizes, and does not change how others are computed."""
    value = node.meta.get("example_value")
    values = value if isinstance(value, (tuple, list)) and value else (value,)
    return all(isinstance(v, (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)) for v in values)


def _why_not(match):
    """Why the call cannot replace the pattern at the position of its first node; None if it can."""
    between, node = [], match.nodes[0].next
    while node is not match.nodes[-1]:
        if node not in match.nodes and node.op not in ("placeholder", "get_attr"):
            between.append(node)
        node = node.next
    if not all(map(_is_value, between)):
        return "autograd, autocast or the like changes in between"
    # Nodes in between may compute or write the weights. Casts of weights are allowed, as they can be moved forward.
    others = [node for node in between if not _is_cast(node)]
    if match.taken_early and others:
        return f"{_called(others[0])} comes in between"
    inputs = [i for node in (match.nodes[0], *match.taken_early) for i in node.all_input_nodes]
    if any(is_traceable_wrapper_subclass(i.meta.get("example_value")) for i in inputs):
        return "its tensors are of a class of their own, which may not know the fused operators"
    return None


def _is_cast(node):
    """Whether the node casts an input of the graph."""
    return node.op == "call_method" and node.target == "to" and all(i.op == "placeholder" for i in node.all_input_nodes)


def _alone(node):
    """Why this convolution or linear is not fused with anything."""
    users = list(node.users)
    if len(users) > 1:
        return f"its result is used {len(users)} times"
    return f"{_called(users[0])} comes behind it" if users and users[0].op != "output" else "nothing comes behind it"


def _called(node):
    return getattr(node.target, "__name__", str(node.target)).removesuffix(".default").strip("_")


def _name(node):
    """The name of the layer that a node belongs to, or of the function that it calls."""
    stack = node.meta.get("nn_module_stack")
    path = list(stack.values())[-1][0] if stack else ""
    # "L['self'].conv1" or, of a method, "fn.__self__.conv1".
    return path.rpartition("__self__.")[2].partition("].")[2] or path.rpartition("__self__.")[2] or _called(node)


def fuse_patterns(graph):
    """Replace every pattern of a torch.fx graph by one call, where eager's order, aliases and in-place writes allow it.

    Args:
        graph: torch.fx.Graph whose nodes have their tensors in meta["example_value"], as Dynamo's have.

    Returns:
        ([description of each match], [(name, why)] of the convolutions and linears that are not fused).
    """
    simplify(graph)
    found, left, gone = [], [], set()
    for node in list(graph.nodes):
        if node in gone or (steps := steps_of(node))[:1] not in ((CONV,), (LINEAR,)):
            continue
        matches = [(match, _why_not(match)) for match in (_of_convolution if steps[0] == CONV else _of_linear)(node)]
        match = next((match for match, why in matches if not why), None)
        if match is None and len(steps) > 1:
            continue  # a fused layer
        if match is None:
            left.append((_name(node), matches[0][1] if matches else _alone(node)))
            continue
        found.append(", ".join(_name(n) if steps_of(n)[0] in (CONV, LINEAR) else steps_of(n)[0] for n in match.nodes))
        for early in match.taken_early:
            for cast in filter(_is_cast, early.all_input_nodes):
                node.prepend(cast)
        with graph.inserting_before(node):
            new = graph.call_function(match.function, match.args, match.kwargs)
        new.meta = dict(match.nodes[-1].meta)
        match.nodes[-1].replace_all_uses_with(new)
        for old in reversed(match.nodes):
            graph.erase_node(old)
        gone.update(match.nodes)
    return found, left

"""Finds patterns in a captured graph and replaces each by one call; the backend and fuse use it.

A pattern starts with a convolution, a linear, a batch norm in evaluation or a sum, and ends with what our kernels do in
the same pass: relu and max-pooling, or an epilogue, which is batch norm, a sum and an activation. Squeeze and
excitation is a pattern of its own. calls.py says which calls these are.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import calls, ops
from .calls import CONV, LINEAR, PARTS, POOL, RELU, arguments_of, only_user, steps_of, value_of
from .kernels import activations, shapes
from .nn import functional as F
from .nn._norm import norm_conv2d, normed, statistics_of

# Relu and max-pooling commute.
_PATTERNS = (CONV, RELU, POOL), (CONV, POOL, RELU), (CONV, RELU)


def _follow(node):
    """[(node, steps)] from this node on, while each result is used only by the next node."""
    found = []
    while node is not None and (steps := steps_of(node)):
        found.append((node, steps))
        node = _behind(node)
    return found


def _behind(node):
    """The next node of a pattern: the only user of this one's result, with no other inputs except weights."""
    user = only_user(node)
    if user is None or not steps_of(user):
        return None
    given = [*user.args, *user.kwargs.values()]
    is_input = user.args[:1] == (node,) or user.kwargs.get("input") is node
    others = 0 if steps_of(user)[0] == LINEAR else len(user.all_input_nodes) - 1
    return user if is_input and not others and sum(argument is node for argument in given) == 1 else None


class Row(NamedTuple):
    """Nodes of a graph and the one call that does what they do.

    Attributes:
        nodes: from first to last.
        function, args, kwargs: the call, which takes the place of the first node.
        taken_early: later nodes with inputs of their own, which the call reads earlier than these nodes would.
        residual: an input that may be computed after the first node; the call then takes the place of the last one.
        then: a second call, (function, the arguments behind the first call's result).
    """

    nodes: list
    function: Callable
    args: tuple
    kwargs: dict
    taken_early: tuple = ()
    residual: torch.fx.Node | None = None
    then: tuple | None = None


def _ranks(given):
    return [i for i, part in enumerate(PARTS) if part[0] in given]


def _epilogues(node, given):
    """[(nodes, arguments of F.epilogue)] of the calls behind a node that an epilogue does too, the longest first.

    Args:
        given: the arguments for what the node itself does.
    """
    found, nodes = [], []
    while (user := only_user(node)) is not None:
        part = calls.epilogue_of(user, node)
        if not part or max(_ranks(given), default=-1) >= min(_ranks(part)):
            break
        nodes, given, node = [*nodes, user], {**given, **part}, user
        found.append((nodes, given))
    return found[::-1]


def _is_recordable(nodes, given, operands):
    """Whether backward has all that it needs of an epilogue, which keeps other tensors than eager's calls do.

    Args:
        nodes: what the epilogue replaces.
        operands: the residual, and what else eager's calls do not keep.
    """
    last, activation, slope = nodes[-1], given.get("activation", "none"), given.get("slope", 0.0)
    if not value_of(last).requires_grad or activation in ("none", "relu", "sigmoid"):
        return True
    kept = [last] if activations.by_result(activation, slope) else filter(None, operands)
    return all(calls.stays(node, nodes) for node in kept)


def _with_epilogue(first, operator, function):
    """The Rows of a convolution or linear and an epilogue, the longest first.

    Args:
        operator, function: with the epilogue; the operator takes the place of an operator.
    """
    by_operator = first.target in (ops.conv2d, ops.linear)
    for nodes, given in _epilogues(first, {}):
        normed = "mean" in given
        if normed and value_of(first).dim() != (4 if operator == ops.conv2d_epilogue else 2):
            continue  # its channels are not those of the epilogue
        # Backward would compute the convolution again.
        again = not normed and not activations.by_result(given.get("activation", "none"), given.get("slope", 0.0))
        again = again and value_of(nodes[-1]).requires_grad
        if again or not _is_recordable([first, *nodes], given, [given.get("residual")]):
            continue
        call = function, first.args, {**first.kwargs, **given}
        if by_operator:
            nothing = dict.fromkeys(("mean", "var", "scale", "shift", "residual"))
            values = {**nothing, "eps": 0.0, "activation": "none", "slope": 0.0, **given}
            call = operator, (*first.args, *values.values()), {}
        yield Row([first, *nodes], *call, tuple(nodes), given.get("residual"))


def _with_training_norm(norm, conv=None):
    """The Rows of a batch norm in training and what is behind it, with the convolution before it if that is given."""
    x, running, vectors = calls.training_norm_of(norm)
    before = [norm] if conv is None else [conv, norm]
    if conv is None:
        call = statistics_of, (x, *running), {}
    elif value_of(conv).dim() == 4:
        call = norm_conv2d, (*_as_norm_conv2d(conv, running),), {}
    else:
        return
    for nodes, given in [*_epilogues(norm, {"mean": None}), ([], {})]:
        residual, activation, slope = (given.get(name) for name in ("residual", "activation", "slope"))
        if residual is not None and not _is_recordable([*before, *nodes], given, [residual]):
            continue
        then = normed, (residual, *vectors, activation or "none", slope or 0.0)
        yield Row([*before, *nodes], *call, (norm, *nodes), residual, then)


def _as_norm_conv2d(conv, running):
    """The arguments of norm_conv2d for what a call of a convolution does."""
    names = "input", "weight", "bias", "stride", "padding", "dilation", "groups", "pad_mode"
    given = calls.arguments_of(conv, *names[:2], bias=None, stride=1, padding=0, dilation=1, groups=1, pad_mode=None)
    x, *rest = map(given.get, names)
    return x, None, running, *rest


def _link_norms(graph):
    """Let convolutions whose image is the result of a batch norm, and used by nothing else, normalise it themselves."""
    for norm in list(graph.nodes):
        conv = only_user(norm)
        if not calls.is_call(norm) or norm.target is not normed or norm.args[1] is not None or conv is None:
            continue
        if conv.target is norm_conv2d and conv.args[:2] == (norm, None):
            _, _, *rest = conv.args
        elif steps_of(conv) == (CONV,) and value_of(norm).dim() == 4 and _as_norm_conv2d(conv, None)[0] is norm:
            _, _, *rest = _as_norm_conv2d(conv, None)
        else:
            continue
        if norm in rest or not all(map(_writes_no_vectors, _between(norm, conv))):
            continue
        values, _, *vectors = norm.args
        conv.target, conv.args, conv.kwargs = norm_conv2d, (values, tuple(vectors), *rest), {}
        graph.erase_node(norm)


def _between(first, last):
    """The nodes between two nodes that compute something."""
    found, node = [], first.next
    while node is not last:
        if node.op not in ("placeholder", "get_attr"):
            found.append(node)
        node = node.next
    return found


def _writes_no_vectors(node):
    """Whether the node overwrites no weights: at most statistics."""
    return _is_value(node) and (calls.writes_nothing(node) or calls.written_by(node) is not None)


def _of_convolution(conv):
    """The Rows that start with a convolution, the longest first."""
    norm = only_user(conv)
    if steps_of(conv) == (CONV,) and norm is not None and (found := calls.training_norm_of(norm)):
        if found[0] is conv and norm.all_input_nodes.count(conv) == 1 and calls.alike(conv, norm):
            yield from _with_training_norm(norm, conv)
    parts = _follow(conv)[:3]
    steps = [sum((steps for _, steps in parts[: i + 1]), ()) for i in range(len(parts))]
    by_operator = conv.target in (ops.conv2d, ops.conv2d_relu)
    for pattern in _PATTERNS:
        if pattern not in steps[1:]:
            continue
        nodes = [node for node, _ in parts[: steps.index(pattern) + 1]]
        window = next((calls.window_of(node) for node in nodes if steps_of(node) == (POOL,)), None)
        if window is None:
            yield Row(nodes, ops.conv2d_relu if by_operator else F.conv2d_relu, conv.args, conv.kwargs)
        elif by_operator:
            yield Row(nodes, calls.conv2d_relu_max_pool2d, (*conv.args, *window), {})
        else:
            names = "pool_kernel_size", "pool_stride", "pool_padding", "pool_ceil_mode"
            yield Row(nodes, F.conv2d_relu_max_pool2d, conv.args, {**conv.kwargs, **dict(zip(names, window))})
    if len(parts) == 1 and steps[0] == (CONV,):
        yield from _with_epilogue(conv, ops.conv2d_epilogue, F.conv2d_epilogue)


def _of_linear(linear):
    """The Rows that start with a linear: a chain that one launch computes, then the linear with what is behind it."""
    nodes, steps = [], ()
    for node, of_node in _follow(linear):
        if of_node[0] != (RELU if steps[-1:] == (LINEAR,) else LINEAR):
            break
        nodes, steps = [*nodes, node], steps + of_node
    layers = [node for node in nodes if steps_of(node)[0] == LINEAR]
    given = [arguments_of(node, "input", "weight", bias=None) for node in layers]
    weights, biases = [g["weight"] for g in given], [g["bias"] for g in given]
    sizes = list(map(calls.shape_of, weights))
    usual = all(len(size) == 2 and (b is None or calls.shape_of(b) == size[:1]) for size, b in zip(sizes, biases))
    # A chain does not end with a linear followed by relu: those two are a pattern of their own.
    if steps[-1] == LINEAR and usual:
        if shapes.linear_chain_serves(sizes[0][1], [size[0] for size in sizes]):
            yield Row(nodes, F.linear_chain, (given[0]["input"], weights, biases), {}, tuple(layers[1:]))
    if steps_of(linear) == (LINEAR,) and len(nodes) > 1:
        function = ops.linear_relu if linear.target == ops.linear else F.linear_relu
        yield Row(nodes[:2], function, linear.args, linear.kwargs)
    elif steps_of(linear) == (LINEAR,) and usual:
        yield from _with_epilogue(linear, ops.linear_epilogue, F.linear_epilogue)


def _of_norm(norm):
    """The Rows that start with a batch norm, the longest first."""
    if calls.training_norm_of(norm):
        yield from _with_training_norm(norm)
        return
    x, _ = calls.norm_of(norm)
    given = calls.epilogue_of(norm, x) if calls.is_laid_out(x) else None
    for nodes, arguments in [*_epilogues(norm, given), ([], given)] if given else ():
        residual = arguments.get("residual")
        if _is_recordable([norm, *nodes], arguments, [residual]):
            yield Row([norm, *nodes], F.epilogue, (x,), arguments, (norm, *nodes), residual)


def _of_sum(node):
    """The Row of a sum and an activation."""
    operands = calls.sum_of(node)
    x = next((x for x in operands if calls.epilogue_of(node, x)), None)
    for nodes, arguments in _epilogues(node, calls.epilogue_of(node, x)) if x else ():
        if _is_recordable([node, *nodes], arguments, operands):
            yield Row([node, *nodes], F.epilogue, (x,), arguments)


def _of_squeeze_excite(squeeze):
    """The Row of global average pooling, two 1x1 convolutions with activations, and the product with the images."""
    x, keepdim = calls.means_of(squeeze)
    nodes, arguments, names, value = [squeeze], [x], [], squeeze
    for _ in range(2 * keepdim):
        conv = only_user(value)
        layer = conv and calls.pointwise_of(conv, value)
        activation = only_user(conv) if layer else None
        given = calls.epilogue_of(activation, conv) if activation is not None else None
        if not given or _ranks(given) != [2] or given["activation"] == "leaky_relu":
            return
        nodes += [conv, activation]
        arguments += layer
        names.append(given["activation"])
        value = activation
    product = only_user(value) if keepdim else None
    if product is None or calls.product_of(product) not in ((x, value), (value, x)) or not calls.alike(product, x):
        return
    if value_of(value).shape[1] == value_of(x).shape[1]:
        call = F.squeeze_excite, tuple(arguments), {"activation": names[0], "gate": names[1]}
        yield Row([*nodes, product], *call, (*nodes[1:], product))


def _is_value(node):
    """Whether the node only computes tensors or sizes, and does not change how others are computed."""
    value = node.meta.get("example_value")
    values = value if isinstance(value, (tuple, list)) and value else (value,)
    return all(isinstance(v, (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)) for v in values)


def _place(row):
    """(the node whose place the call can take, None), or (None, why there is none)."""
    first, last = row.nodes[0], row.nodes[-1]
    between = [node for node in _between(first, last) if node not in row.nodes] if len(row.nodes) > 1 else []
    if not all(map(_is_value, between)):
        return None, "autograd, autocast or the like changes in between"
    needed = [i for node in row.taken_early for i in node.all_input_nodes if i not in row.nodes]
    # Casts of weights can be moved forward.
    late = [i for i in needed if i > first and not _is_cast(i)]
    written = {node for norm in row.nodes for node in calls.written_by(norm) or ()}
    others = [
        node for node in between
        if (node in late and node is not row.residual) or not _is_harmless(node, {*first.all_input_nodes, *needed})
        or not written.isdisjoint(node.all_input_nodes)
    ]  # fmt: skip
    if needed and others:
        return None, f"{_called(others[0])} comes in between"
    if any(map(_is_of_own_class, [*first.all_input_nodes, *needed])):
        return None, "its tensors are of a class of their own, which may not know the fused operators"
    # A batch norm in training counts the batch before it: a checkpoint ends when it has computed again what is kept.
    return last if late or row.then else first, None


def _is_harmless(node, inputs):
    """Whether the node writes to no tensor of inputs."""
    written = calls.written_by(node)
    return calls.writes_nothing(node) if written is None else inputs.isdisjoint(written)


def _is_of_own_class(node):
    return is_traceable_wrapper_subclass(node.meta.get("example_value"))


def _is_cast(node):
    """Whether the node casts an input of the graph."""
    return node.op == "call_method" and node.target == "to" and all(i.op == "placeholder" for i in node.all_input_nodes)


def _alone(node):
    """Why this convolution or linear is not fused with anything."""
    users = list(node.users)
    if len(users) > 1:
        return f"its result is used {len(users)} times"
    if not users or users[0].op == "output":
        return "nothing comes behind it"
    return f"{_called(users[0])}{' in training' * calls.is_training_norm(users[0])} comes behind it"


def _called(node):
    if calls.is_call(node) and calls.sum_of(node):
        return "add"
    return getattr(node.target, "__name__", str(node.target)).removesuffix(".default").strip("_")


def _name(node):
    """The name of the layer that a node belongs to, or of the function that it calls."""
    stack = node.meta.get("nn_module_stack")
    path = list(stack.values())[-1][0] if stack else ""
    # "L['self'].conv1" or, of a method, "fn.__self__.conv1".
    return path.rpartition("__self__.")[2].partition("].")[2] or path.rpartition("__self__.")[2] or _called(node)


def _label(node):
    """What a report calls the node."""
    if steps := steps_of(node):
        return _name(node) if steps[0] in (CONV, LINEAR) else steps[0]
    if node.target == ops.epilogue:
        given = calls.arguments_of_operator(node)
        words = "batch_norm" * ("mean" in given), "add" * ("residual" in given), given.get("activation", "")
        return ", ".join(filter(None, words))
    activation = calls.activation_of(node)
    return activation[1]["activation"] if activation else _called(node)


def _kind(node):
    """What finds the Rows that start with the node, or None."""
    steps = steps_of(node)
    if steps[:1] in ((CONV,), (LINEAR,)):
        return _of_convolution if steps[0] == CONV else _of_linear
    if calls.is_call(node) and (calls.norm_of(node) or calls.training_norm_of(node)):
        return _of_norm
    if calls.is_call(node) and calls.sum_of(node):
        return _of_sum
    return _of_squeeze_excite if calls.is_call(node) and calls.means_of(node) else None


def _replace(graph, row, place):
    """Put the call of a Row in the place of its nodes."""
    for cast in (i for early in row.taken_early for i in early.all_input_nodes if _is_cast(i) and i > place):
        place.prepend(cast)
    with graph.inserting_before(place):
        new = graph.call_function(row.function, row.args, row.kwargs)
        if row.then is not None:
            function, arguments = row.then
            new = graph.call_function(function, (new, *arguments))
    new.meta = dict(row.nodes[-1].meta)
    row.nodes[-1].replace_all_uses_with(new)
    for old in reversed(row.nodes):
        graph.erase_node(old)


# A linear comes before those that it is chained with, and of two convolutions that are added the later one is fused
# with the sum, as then the other one's result exists already. What starts with a batch norm or a sum is left over.
_ORDER = {_of_squeeze_excite: 1, _of_linear: 1, _of_convolution: -1, _of_norm: 1, _of_sum: 1}


def fuse_patterns(graph, elementwise=True):
    """Replace every pattern of a torch.fx graph by one call, where eager's order, aliases and in-place writes allow it.

    Args:
        graph: torch.fx.Graph whose nodes have their tensors in meta["example_value"], as Dynamo's have.
        elementwise: whether to replace patterns without a convolution or linear, those with batch norm in training, and
            single calls, too. A compiler that fuses elementwise operators does better without.

    Returns:
        ([description of each match], [(name, why)] of the convolutions and linears that are not fused).
    """
    calls.simplify(graph)
    found, left, gone = {}, {}, set()
    nodes = list(graph.nodes)
    kinds = {node: _kind(node) for node in nodes}
    alone = {node: _alone(node) for node in nodes if kinds[node] in (_of_linear, _of_convolution)}
    for kind, direction in _ORDER.items():
        if kind in (_of_norm, _of_sum) and not elementwise:
            continue
        for i, node in list(enumerate(nodes))[::direction]:
            if kinds[node] is not kind or node in gone:
                continue
            rows = [(row, *_place(row)) for row in kind(node) if elementwise or row.then is None]
            row, place, _ = next((r for r in rows if r[1] is not None), (None, None, None))
            if row is None:
                # A fused layer is not left.
                if node in alone and len(steps_of(node)) == 1:
                    left[i] = _name(node), rows[0][2] if rows else alone[node]
                continue
            if len(row.nodes) > 1:
                found[i] = ", ".join([_name(node) if kind is _of_norm else _label(node), *map(_label, row.nodes[1:])])
            gone.update(row.nodes)
            _replace(graph, row, place)
    if elementwise:
        _link_norms(graph)
        _serve_alone(graph)
    return [found[i] for i in sorted(found)], [left[i] for i in sorted(left)]


def _is_exact(node):
    """Whether our function of the same name does exactly what the call of torch's does."""
    inputs = list(map(value_of, node.all_input_nodes))
    if any(value is None or is_traceable_wrapper_subclass(value) for value in inputs):
        return False
    if calls.is_attention(node):  # it has two results, and only its products are ours
        return True
    values = value_of(node), *inputs
    if values[0] is None or is_traceable_wrapper_subclass(values[0]):
        return False
    # Autocast may cast what torch's function takes.
    if values[0].dtype != values[1].dtype and steps_of(node) not in ((CONV,), (LINEAR,)):
        return False
    overwritten, activation = calls.overwritten_by(node), calls.activation_of(node)
    if overwritten is not None and not calls.is_own(overwritten):
        return False
    return activation is None or _is_recordable([node], activation[1], [])


def _serve_alone(graph):
    """Let our functions do what is left of the calls of torch's that we have functions for."""
    for node in graph.nodes:
        ours = calls.ours_of(node)
        if ours is not None and _is_exact(node):
            node.op, (node.target, node.args, node.kwargs) = "call_function", ours

"""Finds a LeNet in a model written as in any tutorial, and proves that its forward does nothing else."""

import contextlib
import functools
from typing import NamedTuple

import torch

from ..calls import CONV, LINEAR, POOL, RELU, arguments_of, simplify, steps_of, window_of
from ..fusion import FusedCall, calling
from ..nn._plain import _HOOKS, global_hooks
from .served import NotServed, side_of

FLATTEN = "flatten"
_FLATTENING = (torch.flatten, torch.reshape, "flatten", "view", "reshape")
# Batch sizes for which to evaluate what a forward asserts about the number of images.
_NUMBERS = [*range(1, 300), *(2**i for i in range(9, 32))]
_STEPS = [CONV, RELU, POOL, CONV, RELU, POOL, FLATTEN, LINEAR, RELU, LINEAR, RELU, LINEAR]
# What a module's call runs before its forward, and the types that _compiled_call_impl may have.
_CALLED, _COMPILED = ("__call__", "_wrapped_call_impl", "_call_impl"), (FusedCall, type(None))


class _Found(NamedTuple):
    """The result of a captured forward, in place of logits."""

    layers: list
    images: torch.Tensor


def _steps(node):
    """The steps that a call does; NotServed for a call that no LeNet makes."""
    steps = list(steps_of(node))
    if node.target in _FLATTENING:
        before, after = node.args[0].meta["example_value"], node.meta["example_value"]
        # Any arguments that make one row of each image.
        steps = [FLATTEN] if before.dim() == 4 and after.dim() == 2 and before.shape[0] == after.shape[0] else []
    if not steps:
        raise NotServed(
            f"its forward calls {getattr(node.target, '__name__', node.target)} in a way that no LeNet does"
        )
    if POOL in steps:
        window = window_of(node) if steps == [POOL] else node.args[8:]
        if window[:3] != ((2, 2), (2, 2), (0, 0)):
            raise NotServed(f"its pooling has windows of {window[0]} every {window[1]} pixels")
    return steps


def _is_of_sizes(node):
    """Whether a call only computes with the batch size; NotServed if it asserts what does not hold for every size."""
    inputs = [i.meta.get("example_value") for i in node.all_input_nodes]
    if not inputs or not all(isinstance(value, torch.SymInt | torch.SymBool) for value in inputs):
        return False
    if not node.users:
        # Dynamo itself asserts facts that always hold, such as that a view has as many elements.
        expression = inputs[0].node.expr
        for symbol in expression.free_symbols:
            if not all(expression.subs(symbol, number) == True for number in _NUMBERS):  # noqa: E712  (sympy's own)
                raise NotServed("its forward depends on how many images there are")
    return True


def _chain(graph):
    """[(step, node)] of a graph that passes images from call to call; NotServed for any other graph."""
    chain = []
    for node in graph.nodes:
        if node.op in ("placeholder", "output") or _is_of_sizes(node):
            continue
        steps = _steps(node)
        if len(node.users) != 1 or (chain and node.args[:1] != (chain[-1][1],)):
            raise NotServed("its forward is not a chain of layers")
        chain += [(step, node) for step in steps]
    kinds = [step for step, _ in chain]
    for first in (0, 3):
        # Max-pooling and relu commute.
        if kinds[first : first + 3] == [CONV, POOL, RELU]:
            kinds[first : first + 3] = _STEPS[:3]
    if kinds != _STEPS:
        raise NotServed(f"its layers are {', '.join(kinds)}")
    return chain


def _layers_of(graph):
    """A function that builds a LeNet's five layers from the graph's inputs; NotServed for any other graph."""
    simplify(graph)
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    makers, chain = [], _chain(graph)
    for step, node in chain:
        if step not in (CONV, LINEAR):
            continue
        given = arguments_of(
            node, "input", "weight", bias=None, stride=1, padding=0, dilation=1, groups=1, pad_mode="zeros"
        )
        if any(given[name] is not None and given[name] not in inputs for name in ("weight", "bias")):
            raise NotServed("its weights are computed")
        sizes = list(given["weight"].meta["example_value"].shape)
        if step == LINEAR:
            make = functools.partial(torch.nn.Linear, sizes[1], sizes[0])
        else:
            padding = given["padding"]
            if isinstance(padding, (tuple, list)) and len(padding) == 4:  # our operator's: top, bottom, left, right
                if padding[0::2] != padding[1::2]:
                    raise NotServed(f"it pads by {padding}")
                padding = padding[0::2]
            make = functools.partial(
                torch.nn.Conv2d, sizes[1] * given["groups"], sizes[0], tuple(sizes[2:]), given["stride"], padding,
                given["dilation"], given["groups"], padding_mode=given["pad_mode"],
            )  # fmt: skip
        makers.append((make, *(inputs.index(given[name]) if given[name] else None for name in ("weight", "bias"))))

    first = inputs.index(chain[0][1].args[0])

    def layers(*arguments):
        made = []
        for make, weight, bias in makers:
            layer = make(bias=bias is not None, device="meta")
            layer.weight = arguments[weight]
            if bias is not None:
                layer.bias = arguments[bias]
            made.append(layer)
        return _Found(made, arguments[first])

    return layers


def _backend(graph_module, example_inputs):
    """A backend of torch.compile whose graphs return the five layers."""
    from ..compiler import asks_if_compiled, only_computes

    if asks_if_compiled() or not only_computes():
        raise NotServed("its forward does more than compute its result")
    layers = _layers_of(graph_module.graph)
    return lambda *arguments: (layers(*arguments),)


@contextlib.contextmanager
def _modes(model, training):
    """Puts all modules into training or evaluation mode, without calling their methods."""
    before = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in before:
            module.training = training
        yield
    finally:
        for module, mode in before:
            module.training = mode


def _captured(model, channels, side):
    """The five layers of a model for images of `side` x `side` pixels; NotServed if its forward is not a LeNet's."""
    p = next(model.parameters())
    images = torch.zeros(2, channels, side, side, dtype=p.dtype, device=p.device)
    # The batch size is unbacked: a forward that branches on it cannot be captured.
    torch._dynamo.decorators.mark_unbacked(images, 0)
    torch._dynamo.mark_static(images, [1, 2, 3])
    try:
        result = torch.compile(calling(model.forward), backend=_backend, fullgraph=True)(images)
    except Exception as e:
        reason = getattr(e, "inner_exception", e)
        if isinstance(reason, NotServed):
            raise reason from None
        raise NotServed(f"it cannot be captured: {str(reason).strip().partition(chr(10))[0]}") from None
    if not isinstance(result, _Found) or result.images is not images:
        raise NotServed("its forward does not give logits of its images alone")
    return result.layers


def find_layers(model):
    """conv1, conv2, fc1, fc2 and fc3 that compute what a model does, with its parameters; NotServed if there are none.

    Dynamo captures the forward, in training and in evaluation, for any number of images. It is not run.
    """
    if global_hooks() or any(getattr(model, name) for name in _HOOKS):
        raise NotServed("the model has hooks")
    called = [getattr(type(model), name) is getattr(torch.nn.Module, name) for name in _CALLED]
    if not all(called) or set(_CALLED) & set(vars(model)) or not isinstance(model._compiled_call_impl, _COMPILED):
        raise NotServed("its __call__ is not torch.nn.Module's")
    sizes = [tuple(p.shape) for p in model.parameters()]
    channels = next((size[1] for size in sizes if len(size) == 4), 1)
    features = next((size[1] for size in sizes if len(size) == 2), 0)
    padding = next((layer.padding for layer in model.modules() if isinstance(layer, torch.nn.Conv2d)), 0)
    found = []
    for training in (True, False):
        with _modes(model, training):
            found.append(_captured(model, channels, side_of(padding, features)))
    if [repr(layer) for layer in found[0]] != [repr(layer) for layer in found[1]]:
        raise NotServed("its forward differs in evaluation")
    return found[0]

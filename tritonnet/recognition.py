"""Finds the five layers of a LeNet in a model that is written as in any tutorial, and proves that it is one."""

import inspect

import torch

from . import fusion, nn
from .fusion import _CONV, _LINEAR, _POOL, _RELU, NotFused
from .lenet_weights import NotServed
from .nn._plain import _HOOKS, is_plain

_CONVOLVED = ["convolution", "relu", "pool"]
_FLATTENED = (torch.flatten, torch.Tensor.flatten)


def _window(pool):
    """Whether the arguments or the layer of a pooling make windows of 2 x 2 side by side."""
    kernel, stride, padding = fusion._window(pool) or (None, None, None)
    pairs = [(value, value) if isinstance(value, int) else value for value in (kernel, stride, padding)]
    return pairs[0] == (2, 2) and pairs[1] in (None, (2, 2)) and pairs[2] == (0, 0)


def _parts(name, module):
    """[(kind, layer)] of what calling a module does; NotServed if it is nothing of a LeNet."""
    if is_plain(module, (torch.nn.Sequential,)):
        return [part for child, inner in module.named_children() for part in _parts(f"{name}.{child}", inner)]
    if is_plain(module, (nn.Conv2dReLUMaxPool2d,)):
        pool = module.pool_kernel_size, module.pool_stride, module.pool_padding, 1, False, False
        if _window(pool):
            return list(zip(_CONVOLVED, (module, None, None)))
    if is_plain(module, (nn.Conv2dReLU,)):
        return [("convolution", module), ("relu", None)]
    if is_plain(module, (nn.LinearReLU,)):
        return [("linear", module), ("relu", None)]
    for kind, classes in (("convolution", _CONV), ("linear", _LINEAR), ("relu", _RELU)):
        if is_plain(module, classes):
            return [(kind, None if kind == "relu" else module)]
    if is_plain(module, _POOL) and _window(module):
        return [("pool", None)]
    if is_plain(module, (torch.nn.Flatten,)) and (module.start_dim, module.end_dim) == (1, -1):
        return [("flatten", None)]
    raise NotServed(f"{name} is a {type(module).__name__} that no LeNet has, or has hooks")


def _node_parts(node, model):
    """[(kind, layer)] of a node of the traced forward."""
    if node.op == "call_module" and not node.kwargs and len(node.args) == 1:
        return _parts(node.target, model.get_submodule(node.target))
    if fusion._as_relu(node, model)[0]:
        return [("relu", None)]
    pool = fusion._as_pool(node, model)
    if pool is not None and _window(pool):
        return [("pool", None)]
    rest = node.args[1:]
    flattens = node.op == "call_function" and node.target in _FLATTENED or node.target == "flatten"
    # view(-1, features) of what has `features` an image is a flattening: geometry_of compares the number.
    reshapes = node.op == "call_method" and node.target in ("view", "reshape") and len(rest) == 2 and rest[0] == -1
    if not node.kwargs and (flattens and rest == (1,) or reshapes and isinstance(rest[1], int)):
        return [("flatten", rest[1] if reshapes else None)]
    raise NotServed(f"its forward calls {node.target}, which no LeNet does")


def _chain(model, graph):
    """[(kind, layer)] of a forward that hands one tensor from call to call."""
    node, parts = next(iter(graph.nodes)), []
    while True:
        node = fusion._only_user(node)
        if node is None:
            raise NotServed("its forward is no chain of layers")
        if node.op == "output":
            return parts
        parts += _node_parts(node, model)


def find_layers(model):
    """conv1, conv2, fc1, fc2 and fc3 of a model that computes what a LeNet of them does; NotServed if it may not."""
    cls = type(model)
    # tritonnet.fuse puts a class with another forward in front.
    original = vars(cls).get("_original", cls)
    if "forward" in vars(model) or any(getattr(model, name) for name in _HOOKS):
        raise NotServed("the model has hooks, or its forward was replaced")
    if len(inspect.signature(original.forward).parameters) != 2:
        raise NotServed("its forward takes more than images")
    chains, training = [], model.training
    try:
        model.__class__ = original
        if not isinstance(model, torch.nn.Sequential):
            fusion._check_code(original.forward, original, set())
        for mode in (True, False):
            model.training = mode  # of this module alone: those in it stay calls
            chains.append(_chain(model, fusion._trace(model)[0]))
    except NotFused as e:
        raise NotServed(str(e)) from None
    finally:
        model.__class__, model.training = cls, training
    if chains[0] != chains[1]:
        raise NotServed("its forward is another in evaluation")
    kinds = [kind for kind, _ in chains[0]]
    # The largest pixel is the same before and after a rectifier.
    pooled_first = ["convolution", "pool", "relu"]
    kinds[:6] = [
        kind for i in (0, 3) for kind in (_CONVOLVED if kinds[i : i + 3] == pooled_first else kinds[i : i + 3])
    ]
    if kinds != [*_CONVOLVED, *_CONVOLVED, "flatten", "linear", "relu", "linear", "relu", "linear"]:
        raise NotServed(f"its layers are {', '.join(kinds)}")
    layers = [layer for kind, layer in chains[0] if kind in ("convolution", "linear")]
    if chains[0][6][1] not in (None, layers[2].in_features):
        raise NotServed(f"it takes {chains[0][6][1]} features for an image's")
    return layers

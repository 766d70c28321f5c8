"""Has rows of layers in an existing model run as one kernel: convolution, rectifier, pooling; linears, rectifiers."""

import builtins
import dis
import functools
import inspect
import math
import types
from collections.abc import Callable

import torch
import torch.nn.functional as torch_functional
from torch import fx

from . import nn
from .conversion import Model, _check
from .kernels import shapes
from .nn import functional as F
from .nn._plain import is_plain

_CONV, _LINEAR = (torch.nn.Conv2d, nn.Conv2d), (torch.nn.Linear, nn.Linear)
_RELU, _POOL = (torch.nn.ReLU, nn.ReLU), (torch.nn.MaxPool2d, nn.MaxPool2d)
_RELU_FUNCTIONS = (torch.relu, torch.relu_, torch_functional.relu, torch_functional.relu_, F.relu, F.relu_)
_POOL_FUNCTIONS = (torch.max_pool2d, torch_functional.max_pool2d, F.max_pool2d)


def _window(pool):
    """(kernel, stride, padding) of a pooling layer or of the arguments of a call, or None where it is not served."""
    if isinstance(pool, torch.nn.Module):
        pool = (pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode, pool.return_indices)
    kernel, stride, padding, dilation, ceil_mode, return_indices = pool
    served = dilation in (1, (1, 1), [1, 1]) and not ceil_mode and not return_indices
    return (kernel, stride, padding) if served else None


def _row(layer, relu, pool, input):
    """The layers of a row, fused if nobody has put anything between them since the model was traced."""
    conv, relu_is_plain = is_plain(layer, _CONV), relu is None or is_plain(relu, _RELU)
    if pool is not None:
        window = _window(pool) if not isinstance(pool, torch.nn.Module) or is_plain(pool, _POOL) else None
        if conv and relu_is_plain and window:
            return F._conv2d_relu_max_pool2d(input, *_arguments(layer), *window)
        x = _row(layer, relu, None, input)
        return pool(x) if isinstance(pool, torch.nn.Module) else F.max_pool2d(x, *pool)
    if conv and relu_is_plain:
        return F._conv2d_relu(input, *_arguments(layer))
    if relu_is_plain and is_plain(layer, _LINEAR):
        return F.linear_relu(input, layer.weight, layer.bias)
    return F.relu(layer(input)) if relu is None else relu(layer(input))


def _chain(layers, input):
    """Linears with rectifiers (or None for the function) between them, fused as in `_row`."""
    linears, relus = layers[0::2], layers[1::2]
    if all(is_plain(m, _LINEAR) for m in linears) and all(m is None or is_plain(m, _RELU) for m in relus):
        return F.linear_chain(input, [m.weight for m in linears], [m.bias for m in linears])
    for linear, relu in zip(linears, relus):
        input = _row(linear, relu, None, input)
    return linears[-1](input)


def _arguments(conv):
    return conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode


class NotFused(Exception):
    """Why a forward is left alone."""


# What a forward may call besides methods, torch and this package: functions of their arguments alone.
_BUILTINS = {abs, dict, enumerate, float, int, len, list, max, min, range, sum, super, tuple, zip}
_STATE = {"no_grad", "enable_grad", "set_grad_enabled", "inference_mode", "is_grad_enabled", "autocast", "is_tensor"}


def _check_code(function, cls, seen):
    """Raise NotFused unless all that a traced run of the function leaves out has no effect and no say."""
    function = getattr(function, "__func__", function)
    if not isinstance(function, types.FunctionType):
        raise NotFused("forward is not a plain function")
    if function in seen:
        return
    seen.add(function)
    if set(function.__code__.co_freevars) - {"__class__"}:
        raise NotFused(f"{function.__name__} uses variables of the function around it")
    for instruction in dis.get_instructions(function):
        op, name = instruction.opname, instruction.argval
        if op in ("STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "STORE_SUBSCR", "IMPORT_NAME", "LOAD_SPECIAL"):
            raise NotFused(f"{function.__name__} changes or imports something ({op})")
        if "WITH" in op or "YIELD" in op or "RAISE" in op:
            raise NotFused(f"{function.__name__} has a with, yield, raise or assert")
        if op == "IS_OP" or "NONE" in op.rpartition("IF_")[2] or op == "CONTAINS_OP":
            raise NotFused(f"{function.__name__} asks what its arguments are")
        if name in _STATE:
            raise NotFused(f"{function.__name__} uses {name}")
        if op == "LOAD_GLOBAL":
            value = function.__globals__.get(name, getattr(builtins, name, None))
            home = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None) or ""
            known = home.partition(".")[0] in ("torch", "tritonnet", "math") and not isinstance(value, torch.Tensor)
            if not (known or value is math or (callable(value) and value in _BUILTINS)):
                raise NotFused(f"{function.__name__} uses the global name {name}")
        if isinstance(name, types.CodeType):
            raise NotFused(f"{function.__name__} has a function inside")
        if op in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
            for base in cls.__mro__:
                member = vars(base).get(name)
                if member is not None and not base.__module__.startswith("torch.") and base is not object:
                    _check_code(getattr(member, "fget", member), cls, seen)  # a property by what it calls


class _Tracer(fx.Tracer):
    """Traces the forward of one module; the modules in it stay calls."""

    def is_leaf_module(self, module, name):
        return True


def _trace(model):
    """(graph, {attribute: value} of all plain attributes that were read) of a module's forward."""
    read, cls = set(), type(model)

    def recorded(self, name):
        if name in object.__getattribute__(self, "__dict__"):
            read.add(name)
        return object.__getattribute__(self, name)

    tracer, before = _Tracer(), dict(vars(model))
    model.__class__ = type(cls.__name__, (cls,), {"__getattribute__": recorded, "__module__": cls.__module__})
    try:
        graph = tracer.trace(model)
    except Exception as e:
        raise NotFused(f"torch.fx cannot trace it: {str(e).splitlines()[0] if str(e) else type(e).__name__}") from None
    finally:
        model.__class__ = cls
    constants = set(vars(model)) - set(before)
    for name in constants:
        delattr(model, name)
    if constants:
        raise NotFused("it makes tensors of its own")
    internal = set(vars(torch.nn.Module()))
    guards = {name: before[name] for name in read - internal}
    for name, value in guards.items():
        if not _is_constant(value):
            raise NotFused(f"it reads self.{name}, a {type(value).__name__}")
    return graph, guards


def _is_constant(value):
    return isinstance(value, (int, float, str, bool, type(None))) or (
        isinstance(value, tuple) and all(map(_is_constant, value))
    )


def _module_at(node, model, classes):
    """The module that a node calls, if it is plainly one of the classes."""
    if node.op == "call_module" and not node.kwargs and len(node.args) == 1:
        module = model.get_submodule(node.target)
        if is_plain(module, classes):
            return module
    return None


def _only_user(node):
    """The one node that uses this one's result as its first argument and nothing else."""
    users = list(node.users)
    one = len(users) == 1 and users[0].args[:1] == (node,) and users[0].all_input_nodes == [node]
    return users[0] if one else None


def _as_relu(node, model):
    """(whether the node is a rectifier, its module or None)."""
    if node is None:
        return False, None
    if node.op == "call_function" and node.target in _RELU_FUNCTIONS:
        return True, None
    if node.op == "call_method" and node.target in ("relu", "relu_") and len(node.args) == 1:
        return True, None
    return _module_at(node, model, _RELU) is not None, node.target


def _as_pool(node, model):
    """What `_row` takes for a pooling: the target of its module or its arguments; None for anything else."""
    if node is None:
        return None
    if node.op == "call_function" and node.target in _POOL_FUNCTIONS:
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
        arguments = {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False}
        arguments |= {**dict(zip(names, node.args[1:])), **node.kwargs}
        pool = tuple(arguments.get(name) for name in names)
        plain = set(arguments) == set(names) and all(_is_constant(v) for v in pool)
        return pool if plain and _window(pool) else None
    module = _module_at(node, model, _POOL)
    return node.target if module is not None and _window(module) else None


def _as_chain(node, model):
    """The nodes of a chain of linears that one launch takes, from this one to the last, or None where there is none.

    A linear behind which a rectifier comes is none's last: those two are a row of their own.
    """
    nodes, widths, features = [], [], None
    while (linear := _module_at(node, model, _LINEAR)) is not None:
        nodes, widths, features = [*nodes, node], [*widths, linear.out_features], features or linear.in_features
        relu = _only_user(node)
        if not _as_relu(relu, model)[0]:
            return nodes if shapes.linear_chain_serves(features, widths) else None
        nodes.append(relu)
        if (node := _only_user(relu)) is None:
            break
    return None


def _fuse_chain(graph, nodes, model):
    """Replace the nodes by one call; return their name."""
    with graph.inserting_before(nodes[-1]):
        names = [_as_relu(node, model)[1] if i % 2 else node.target for i, node in enumerate(nodes)]
        modules = [graph.get_attr(name) if name is not None else None for name in names]
        nodes[-1].replace_all_uses_with(graph.call_function(_chain, (modules, nodes[0].args[0])))
    for node in reversed(nodes):
        graph.erase_node(node)
    return ", ".join("relu" if i % 2 else node.target for i, node in enumerate(nodes))


def _fuse_graph(graph, model):
    """Replace every row of layers in the graph by one call; return the names of what was fused."""
    found, done = [], set()
    for node in list(graph.nodes):
        if node in done or (layer := _module_at(node, model, _CONV + _LINEAR)) is None:
            continue
        if (chain := _as_chain(node, model)) is not None:
            done.update(chain)
            found.append(_fuse_chain(graph, chain, model))
            continue
        is_relu, relu_name = _as_relu(relu := _only_user(node), model)
        if not is_relu:
            continue
        pool = _as_pool(pool_node := _only_user(relu), model) if isinstance(layer, torch.nn.Conv2d) else None
        last = relu if pool is None else pool_node
        with graph.inserting_before(last):
            modules = [
                graph.get_attr(name) if isinstance(name, str) else name for name in (node.target, relu_name, pool)
            ]
            last.replace_all_uses_with(graph.call_function(_row, (*modules, node.args[0])))
        for old in (pool_node if pool is not None else None, relu, node):
            if old is not None:
                graph.erase_node(old)
        found.append(f"{node.target}, relu" + (", max_pool2d" if pool is not None else ""))
    return found


def _compile(graph):
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(code.src, namespace)
    return namespace["forward"]


def _rebuild(original):
    return object.__new__(_fused(original))


def _reduce_ex(module, protocol):
    """Pickle and copy as the class that has a name; the copy is traced anew."""
    state = {name: value for name, value in vars(module).items() if name != "_fusion"}
    return _rebuild, (type(module)._original,), state


@functools.cache
def _fused(cls):
    """The subclass whose forward is the one that `_fuse_module` made."""

    def forward(self, *args, **kwargs):
        forwards, guards = self._fusion
        for name, value in guards.items():
            if getattr(self, name) != value:
                return cls.forward(self, *args, **kwargs)
        return forwards[self.training](self, *args, **kwargs)

    def setstate(self, state):
        self.__class__ = cls
        self.__setstate__(state)
        _fuse_module(self)

    members = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    members |= {"_original": cls, "forward": forward, "__reduce_ex__": _reduce_ex, "__setstate__": setstate}
    return type(cls.__name__, (cls,), members)


def _fuse_module(model):
    """Fuse what stands in the forward of this module itself; return what, or raise NotFused."""
    cls = type(model)
    if "forward" in vars(model):
        raise NotFused("its forward was replaced")
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    if any(p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) or p.default is not p.empty for p in parameters):
        raise NotFused("its forward has optional arguments")
    if not isinstance(model, torch.nn.Sequential):
        _check_code(cls.forward, cls, set())
    forwards, guards, found, training = {}, {}, [], model.training
    try:
        for mode in (True, False):
            model.training = mode  # of this module alone: those in it stay calls
            graph, read = _trace(model)
            found = _fuse_graph(graph, model)
            if not found:
                return found
            graph.lint()
            forwards[mode] = _compile(graph)
            guards.update(read)
    finally:
        model.training = training
    model.__class__ = _fused(cls)
    model._fusion = forwards, guards
    return found


def fuse(model: Model, report: Callable[[str], object] | None = None) -> Model:
    """Have convolution, rectifier and max-pooling in a row run as one kernel, linear with rectifier, chains of these.

    Looks at the forward of every module in `model`: the order of an nn.Sequential, and whatever torch.fx can follow of
    a forward written with F.relu and F.max_pool2d. What is not certain to compute the same is left alone: a forward
    that changes attributes, asks for types or None, has optional arguments, reads objects that can change, or layers
    with hooks. A module stays the same object, an instance of its class, with the same parameters and state_dict, in
    training and evaluation; an attribute that changes later, or a hook, brings the original forward back.

    Args:
        model: torch.nn.Module of torch.nn's layers or tritonnet's, changed in place.
        report: function that is called with a line for each module, such as print.

    Returns:
        model. `tritonnet.revert(model)` undoes it.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    _check(model)
    layers = _CONV + _LINEAR
    for name, module in model.named_modules():
        has_layers = any(isinstance(child, layers) for child in module.modules() if child is not module)
        if not has_layers or hasattr(type(module), "_original"):
            continue
        try:
            found = _fuse_module(module)
            line = f"fused: {'; '.join(found)}" if found else "nothing to fuse"
        except NotFused as e:
            line = f"left alone: {e}"
        if report:
            report(f"{name or 'the model'} ({type(module).__name__}): {line}")
    return model

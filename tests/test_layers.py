"""The layers and modules replace torch's: names, constructors, parameters, state, errors, hooks."""

import copy
import inspect
import io
import pickle
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch

import tritonnet
import tritonnet.nn as nn
import tritonnet.nn.functional as F

# name, arguments, size of the input
LAYERS = [
    ("Conv2d", dict(in_channels=4, out_channels=6, kernel_size=3), (2, 4, 7, 7)),
    ("Conv2d", dict(in_channels=4, out_channels=6, kernel_size=(3, 2), stride=(1, 2), dilation=2), (4, 7, 7)),
    ("Conv2d", dict(in_channels=4, out_channels=6, kernel_size=3, groups=2, bias=False), (2, 4, 7, 7)),
    ("Conv2d", dict(in_channels=4, out_channels=4, kernel_size=3, padding="same", groups=4), (2, 4, 7, 7)),
    ("Conv2d", dict(in_channels=4, out_channels=6, kernel_size=3, padding="valid"), (2, 4, 7, 7)),
    ("Conv2d", dict(in_channels=4, out_channels=6, kernel_size=3, padding=2, padding_mode="reflect"), (2, 4, 7, 7)),
    ("Conv2d", dict(in_channels=4, out_channels=6, kernel_size=3, padding=(1, 2), padding_mode="replicate"), (4, 7, 7)),
    ("Conv2d", dict(in_channels=4, out_channels=6, kernel_size=4, padding="same", padding_mode="circular"), (4, 7, 7)),
    ("MaxPool2d", dict(kernel_size=2), (2, 4, 7, 7)),
    ("MaxPool2d", dict(kernel_size=3, stride=1, padding=1, dilation=1, ceil_mode=True), (2, 4, 7, 7)),
    ("AvgPool2d", dict(kernel_size=2), (2, 4, 7, 7)),
    ("AvgPool2d", dict(kernel_size=3, stride=2, padding=1, ceil_mode=True, count_include_pad=False), (4, 8, 8)),
    ("AvgPool2d", dict(kernel_size=(2, 3), divisor_override=4), (2, 4, 7, 7)),
    ("AdaptiveAvgPool2d", dict(output_size=1), (2, 4, 7, 7)),
    ("AdaptiveAvgPool2d", dict(output_size=(None, 3)), (4, 7, 7)),
    ("ReLU", dict(), (2, 4, 7)),
    ("ReLU", dict(inplace=True), (2, 4, 7)),
    ("ReLU6", dict(), (2, 4, 7)),
    ("LeakyReLU", dict(negative_slope=0.2, inplace=True), (2, 4, 7)),
    ("SiLU", dict(inplace=True), (2, 4, 7)),
    ("Hardswish", dict(), (2, 4, 7)),
    ("GELU", dict(approximate="tanh"), (2, 4, 7)),
    ("Sigmoid", dict(), (2, 4, 7)),
    ("Hardsigmoid", dict(), (2, 4, 7)),
    ("BatchNorm1d", dict(num_features=4), (3, 4)),
    ("BatchNorm1d", dict(num_features=4, momentum=None), (3, 4, 7)),
    ("BatchNorm2d", dict(num_features=4, eps=0.1, momentum=0.3), (2, 4, 3, 5)),
    ("BatchNorm2d", dict(num_features=4, affine=False, track_running_stats=False), (2, 4, 3, 5)),
    ("BatchNorm3d", dict(num_features=4), (2, 4, 3, 2, 1)),
    ("Linear", dict(in_features=7, out_features=5), (2, 4, 7)),
    ("Linear", dict(in_features=7, out_features=5, bias=False), (7,)),
]  # fmt: skip


def pair(name, arguments):
    """Our layer and torch's, from the same seed."""
    made = []
    for module in (nn, torch.nn):
        torch.manual_seed(3)
        made.append(getattr(module, name)(**arguments))
    return made


@pytest.mark.parametrize("name, arguments, size", LAYERS, ids=lambda v: str(v) if isinstance(v, str) else None)
def test_layer_stands_in(name, arguments, size, backend, device, full_precision):
    ours, theirs = pair(name, arguments)
    assert isinstance(ours, type(theirs)) and repr(ours) == repr(theirs)
    assert inspect.signature(type(ours)) == inspect.signature(type(theirs))
    assert set(vars(type(ours))) <= {
        "forward",
        "_conv_forward",
        "__doc__",
        "__module__",
        "__annotations__",
        "__firstlineno__",
        "__static_attributes__",
    }
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()):
        assert torch.equal(a, b)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(size)
    torch.testing.assert_close(ours.to(device)(x.clone().to(device)).cpu(), theirs(x.clone()), rtol=1e-4, atol=1e-4)


def test_constructors_check_as_torch_does():
    for bad in (dict(groups=3), dict(padding="some"), dict(padding="same", stride=2), dict(padding_mode="mirror")):
        messages = []
        for module in (nn, torch.nn):
            with pytest.raises(ValueError) as e:
                module.Conv2d(4, 6, 3, **bad)
            messages.append(str(e.value))
        assert messages[0] == messages[1]
    with pytest.raises(TypeError):
        nn.Linear(3)


def test_other_names_fall_through():
    assert nn.GroupNorm is torch.nn.GroupNorm and nn.Module is torch.nn.Module and nn.init is torch.nn.init
    assert F.softmax is torch.nn.functional.softmax and nn.functional is F
    assert set(dir(torch.nn)) - set(dir(nn)) == {n for n in dir(torch.nn) if n.startswith("_")} - set(dir(nn))
    assert {"conv2d", "softmax", "relu_"} <= set(dir(F)) and {"Conv2d", "LSTM"} <= set(dir(nn))
    for module in (nn, F):
        with pytest.raises(AttributeError, match="no_such_name"):
            module.no_such_name
        assert not hasattr(module, "no_such_name")
    space = {}
    exec("from tritonnet.nn import *\nfrom tritonnet.nn.functional import *\nfrom tritonnet.nn import init", space)
    assert space["LinearReLU"] is nn.LinearReLU and space["linear_relu"] is F.linear_relu
    assert space["Conv2d"] is nn.Conv2d and space["LSTM"] is torch.nn.LSTM and space["conv2d"] is F.conv2d


def test_signatures_are_torchs():
    for name in ("relu", "max_pool2d_with_indices", "adaptive_avg_pool2d"):
        ours, theirs = (inspect.signature(getattr(f, name)).parameters for f in (F, torch.nn.functional))
        assert list(ours) == list(theirs) and [p.default for p in ours.values()] == [p.default for p in theirs.values()]
    parameters = inspect.signature(F.avg_pool2d).parameters
    assert list(parameters)[1:4] == ["kernel_size", "stride", "padding"]
    assert list(parameters)[4:] == ["ceil_mode", "count_include_pad", "divisor_override"]
    assert [p.default for p in parameters.values()][2:] == [None, 0, False, True, None]
    parameters = inspect.signature(F.conv2d).parameters
    assert list(parameters) == ["input", "weight", "bias", "stride", "padding", "dilation", "groups"]
    assert [p.default for p in parameters.values()][2:] == [None, 1, 0, 1, 1]
    assert list(inspect.signature(F.linear).parameters) == ["input", "weight", "bias"]


def test_hooks_copies_and_pickles(device):
    layer = nn.Conv2d(2, 3, 3).to(device)
    seen = []
    layer.register_forward_pre_hook(lambda m, args: seen.append("pre"))
    layer.register_forward_hook(lambda m, args, y: seen.append("forward"))
    layer.register_full_backward_hook(lambda m, dx, dy: seen.append("backward"))
    layer.weight.register_hook(lambda g: seen.append("weight"))
    layer(torch.randn(1, 2, 5, 5, device=device, requires_grad=True)).sum().backward()
    assert sorted(seen) == ["backward", "forward", "pre", "weight"]
    layer = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3, 2))
    x = torch.randn(1, 2, 4, 4)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin[0]) is nn.Conv2d and torch.equal(twin(x), layer(x))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    layer.load_state_dict(torch.load(file, weights_only=True))


def test_frozen_and_half_models(device):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)).to(device)
    model[0].weight.requires_grad_(False)
    model(torch.randn(2, 2, 4, 4, device=device)).sum().backward()
    assert model[0].weight.grad is None and model[0].bias.grad is not None
    model.half()(torch.randn(2, 2, 4, 4, device=device).half()).float().sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, backend, device):
    """bf16 autocast gives bf16, fp16 gives fp16, gradients have the parameters' dtype; float64 is left alone."""
    conv, fc = nn.Conv2d(2, 3, 3).to(device), nn.Linear(4, 2).to(device)
    x = torch.randn(1, 2, 4, 4, device=device)
    with torch.autocast(device.type, dtype):
        y = conv(x)
        z = fc(x)
        assert y.dtype == z.dtype == dtype and F.relu(y).dtype == dtype and F.max_pool2d(y, 2).dtype == dtype
        assert F.conv2d(x.double(), conv.weight.double()).dtype == torch.float64
        loss = y.float().sum() + z.float().sum()
    loss.backward()
    assert conv.weight.grad.dtype == fc.weight.grad.dtype == torch.float32


def test_tensor_subclasses_keep_their_class(device):
    class Marked(torch.Tensor):
        pass

    x = torch.randn(1, 2, 4, 4, device=device).as_subclass(Marked)
    for y in (F.relu(x), F.max_pool2d(x, 2), F.conv2d(x, torch.randn(3, 2, 3, 3, device=device)), F.linear(x, x[0, 0])):
        assert type(y) is Marked


def test_fx_traces_the_functions():
    graph = torch.fx.symbolic_trace(lambda x, w: F.max_pool2d(F.relu(F.conv2d(x, w, padding=1)), 2))
    assert [n.target for n in graph.graph.nodes if n.op == "call_function"] == [F.conv2d, F.relu, F.max_pool2d]


def test_version():
    try:
        installed = version("tritonnet")
    except PackageNotFoundError:
        pytest.skip("the package is not installed: the tests run in its sources")
    assert tritonnet.__version__ == installed

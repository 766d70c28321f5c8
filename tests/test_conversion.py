"""convert and revert on other people's models."""

import copy
import pickle

import pytest
import torch
from conftest import DEVICE

import tritonnet
import tritonnet.nn as nn


class Block(torch.nn.Module):
    """A residual block with a strided, a grouped and a 1 x 1 convolution, as in ResNeXt."""

    def __init__(self, C, OC, stride, groups):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(C, OC, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(OC)
        self.conv2 = torch.nn.Conv2d(OC, OC, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(OC)
        self.down = torch.nn.Conv2d(C, OC, 1, stride) if stride > 1 or C != OC else torch.nn.Identity()
        self.relu = torch.nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.down(x))


class Residual(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 7, 2, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        self.pool = torch.nn.MaxPool2d(3, 2, 1)
        self.blocks = torch.nn.ModuleList([Block(8, 8, 1, 2), Block(8, 16, 2, 16)])
        self.fc = torch.nn.Linear(16, 5)

    def forward(self, x):
        x = self.pool(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((2, 3)))


def test_residual_network_gives_torchs_numbers(backend, device):
    theirs = Residual().double()
    ours = tritonnet.convert(copy.deepcopy(theirs).to(device))
    for training in (True, False):
        x = torch.randn(2, 3, 21, 19).double()
        results = []
        for model, where in ((ours.train(training), device), (theirs.train(training), "cpu")):
            model.zero_grad()
            y = model(x.to(where))
            y.pow(2).sum().backward()
            results.append([t.cpu() for t in (y, *(p.grad for p in model.parameters()), *model.buffers())])
        torch.testing.assert_close(*results)


def test_everything_stays(device):
    model = Residual()
    model.blocks[0].eval()
    model.fc.weight.requires_grad_(False)
    calls = []
    handle = model.fc.register_forward_hook(lambda *_: calls.append("fc"))
    held, parameters, state = model.blocks[1].conv2, list(model.parameters()), model.state_dict()
    modes = [m.training for m in model.modules()]
    text = repr(model)
    assert tritonnet.convert(model) is model
    kinds = (nn.Conv2d, nn.MaxPool2d, nn.ReLU, nn.Linear)
    assert not [
        m for m in model.modules() if isinstance(m, tuple(k.__base__ for k in kinds)) and not isinstance(m, kinds)
    ]
    assert type(held) is nn.Conv2d and model.blocks[1].conv2 is held
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == list(state) and modes == [m.training for m in model.modules()]
    assert repr(model) == text and model.fc.weight.requires_grad is False
    with tritonnet.count_launches() as launches:
        model.to(device)(torch.randn(2, 3, 16, 16, device=device))
    assert calls == ["fc"] and launches["depthwise_forward_kernel"] == 1
    assert launches["conv2d_forward_kernel"] + launches["few_channels_product_kernel"] == 5
    assert tritonnet.convert(model) is model  # converting twice changes nothing
    assert tritonnet.revert(model) is model and type(held) is torch.nn.Conv2d
    assert not [m for m in model.modules() if isinstance(m, kinds)]
    with tritonnet.count_launches() as launches:
        model(torch.randn(2, 3, 16, 16, device=device))
    assert not launches
    handle.remove()


class Plain3x3(torch.nn.Conv2d):
    def __init__(self, C, OC):
        super().__init__(C, OC, 3, padding=1)

    def area(self):
        return self.kernel_size[0] * self.kernel_size[1]


class Doubled(torch.nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Standardized(torch.nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


def test_subclasses():
    model = torch.nn.ModuleList([Plain3x3(2, 3), Doubled(2, 3, 3), Standardized(2, 3, 3), torch.nn.LazyLinear(3)])
    tritonnet.convert(model)
    assert isinstance(model[0], Plain3x3) and isinstance(model[0], nn.Conv2d) and model[0].area() == 9
    assert [type(m) for m in model[1:]] == [Doubled, Standardized, torch.nn.LazyLinear]
    x = torch.randn(1, 2, 5, 5)
    for twin in (copy.deepcopy(model[0]), pickle.loads(pickle.dumps(model[0]))):
        assert isinstance(twin, nn.Conv2d) and isinstance(twin, Plain3x3)
        assert torch.equal(twin.to(DEVICE)(x.to(DEVICE)), model[0].to(DEVICE)(x.to(DEVICE)))
    with tritonnet.count_launches() as launches:
        model[0](x.to(DEVICE))
    assert launches == {"place_few_filters_kernel": 1, "few_channels_product_kernel": 1}
    tritonnet.revert(model)
    assert type(model[0]) is Plain3x3 and not isinstance(model[0], nn.Conv2d)


def test_parametrized_layers():
    from torch.nn.utils.parametrizations import weight_norm
    from torch.nn.utils.parametrize import remove_parametrizations

    before = weight_norm(torch.nn.Linear(3, 2))
    assert tritonnet.convert(before) is before and not isinstance(before, nn.Linear)
    after = weight_norm(tritonnet.convert(torch.nn.Linear(3, 2))).to(DEVICE)
    with tritonnet.count_launches() as launches:
        after(torch.randn(4, 3, device=DEVICE)).sum().backward()
    assert launches["linear_weight_grad_kernel"] == 1 and after.parametrizations.weight.original0.grad is not None
    assert type(remove_parametrizations(after, "weight")) is nn.Linear


def test_one_layer_and_shared_layers():
    layer = torch.nn.Linear(2, 2)
    assert tritonnet.convert(layer) is layer and type(layer) is nn.Linear
    relu = torch.nn.ReLU()
    model = tritonnet.convert(torch.nn.Sequential(relu, torch.nn.Sequential(relu)))
    assert model[0] is model[1][0] and type(relu) is nn.ReLU


def test_what_is_no_module_is_refused():
    for function in (tritonnet.convert, tritonnet.revert):
        with pytest.raises(TypeError, match="got int"):
            function(3)


def test_converted_model_compiles(device):
    model = tritonnet.convert(Residual().double()).to(device).eval()
    x = torch.randn(2, 3, 16, 16, device=device).double()
    with tritonnet.backend("reference"):
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))

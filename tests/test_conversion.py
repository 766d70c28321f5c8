"""convert and revert on other people's models."""

import copy
import io
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
        self.mean, self.fc = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Linear(16, 5)

    def forward(self, x):
        x = self.pool(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.fc(self.mean(x).flatten(1))


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
    kinds = (nn.Conv2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.ReLU, nn.Linear)
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


class Wide(torch.nn.Module):
    """A stem of few channels, a strided, a 1 x 1 and a depthwise convolution, and relu and pooling between them."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.strided = torch.nn.Conv2d(16, 18, 3, 2, 1)
        self.pointwise = torch.nn.Conv2d(18, 20, 1)
        self.depthwise = torch.nn.Conv2d(20, 20, 3, padding=1, groups=20)
        self.pool = torch.nn.MaxPool2d(2)
        self.relu = torch.nn.ReLU()
        self.fc = torch.nn.Linear(20 * 4, 5)

    def forward(self, x):
        x = self.relu(self.strided(self.relu(self.stem(x))))
        return self.fc(self.pool(self.depthwise(self.relu(self.pointwise(x)))).flatten(1))

    def convolutions(self):
        return self.stem, self.strided, self.pointwise, self.depthwise


def is_channels_last(t):
    """Whether the strides are those of channels_last; is_contiguous does not look at dimensions of size 1."""
    return t.stride() == torch.empty(t.shape).to(memory_format=torch.channels_last).stride()


def step(model, optimizer, x):
    """The result of the model, and what its convolutions gave."""
    results = []
    handles = [conv.register_forward_hook(lambda module, args, y: results.append(y)) for conv in model.convolutions()]
    y = model(x)
    optimizer.zero_grad()
    y.pow(2).sum().backward()
    optimizer.step()
    for handle in handles:
        handle.remove()
    return y, results


def test_channels_last_trains_as_torch(backend, device):
    """Three steps on contiguous images: results, gradients, parameters and moments; layouts of all that has one."""
    theirs = Wide().double()
    ours = copy.deepcopy(theirs).to(device)
    optimizers = [torch.optim.Adam(model.parameters()) for model in (ours, theirs)]
    parameters, addresses = list(ours.parameters()), {name: p.data_ptr() for name, p in ours.named_parameters()}
    assert tritonnet.convert(ours, channels_last=True) is ours
    assert all(p is q for p, q in zip(ours.parameters(), parameters, strict=True))
    moved = {name for name, p in ours.named_parameters() if p.data_ptr() != addresses[name]}
    assert moved <= {"stem.weight", "strided.weight", "pointwise.weight", "depthwise.weight"}
    for _ in range(3):
        x = torch.randn(2, 3, 8, 7).double()
        y, results = step(ours, optimizers[0], x.to(device))
        true_y, _ = step(theirs, optimizers[1], x)
        torch.testing.assert_close(y.cpu(), true_y)
        assert len(results) == 4 and all(map(is_channels_last, results))
    for conv in ours.convolutions():
        moments = optimizers[0].state[conv.weight]
        for t in (conv.weight, conv.weight.grad, moments["exp_avg"], moments["exp_avg_sq"]):
            assert is_channels_last(t), conv
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.cpu(), q)
        torch.testing.assert_close(p.grad.cpu(), q.grad)
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(optimizers[0].state[p][name].cpu(), optimizers[1].state[q][name])


def test_channels_last_makes_the_layouts_that_torch_makes():
    """Those of Module.to, of gradients that exist too, for layers that are ours already; and no others' are changed."""
    theirs = Wide()
    ours = tritonnet.convert(copy.deepcopy(theirs))
    ours.own = Doubled(3, 4, 3)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    tritonnet.convert(ours)
    assert [p.stride() for p in ours.parameters()][:-2] == [p.stride() for p in theirs.parameters()]
    tritonnet.convert(ours, channels_last=True)
    assert ours.own.weight.is_contiguous()
    theirs.to(memory_format=torch.channels_last)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        assert p.stride() == q.stride() and p.grad.stride() == q.grad.stride()
        assert torch.equal(p, q) and torch.equal(p.grad, q.grad)


def test_channels_last_stays(device):
    """In copies, pickles, checkpoints both ways, and after revert."""
    theirs = Wide()
    ours = tritonnet.convert(copy.deepcopy(theirs), channels_last=True)
    theirs.load_state_dict(ours.state_dict())
    assert all(conv.weight.is_contiguous() for conv in theirs.convolutions())
    ours.load_state_dict({name: t + 1 for name, t in theirs.state_dict().items()})
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    for model in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), tritonnet.revert(copy.deepcopy(ours))):
        model.load_state_dict(torch.load(file, weights_only=True))
        file.seek(0)
        assert all(is_channels_last(conv.weight) for conv in model.convolutions())
        for p, q in zip(model.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(p, q + 1)
    back = tritonnet.revert(ours).to(memory_format=torch.contiguous_format)
    assert all(conv.weight.is_contiguous() for conv in back.convolutions())


def test_channels_last_of_fused_layers_and_of_views(device):
    """As in torch, `view` raises on a result whose dimensions are not in the order of memory, and reshape copies."""
    model = tritonnet.convert(torch.nn.Sequential(nn.Conv2dReLUMaxPool2d(3, 16, 3)), channels_last=True).to(device)
    y = model(torch.randn(2, 3, 8, 8, device=device))
    assert is_channels_last(y)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        y.view(2, -1)
    assert y.reshape(2, -1).shape == (2, 144)

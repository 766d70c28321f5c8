"""The backend "tritonnet" of torch.compile and tritonnet.fuse: the patterns that they find in common networks."""

import copy
import importlib.metadata
import threading

import pytest
import torch
import torch.nn as tnn
import torch.nn.functional as TF
from conftest import by_turns, pairs, thorough_if
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from written import forward_of

import tritonnet
import tritonnet.nn as nn
import tritonnet.nn.functional as F
from tritonnet import compiler
from tritonnet.compiler import compile_graph


class Tutorial(tnn.Module):
    """As PyTorch's tutorial has it, with one linear less and fewer features."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = tnn.Conv2d(1, 6, 5), tnn.Conv2d(6, 16, 5)
        self.fc1, self.fc2 = tnn.Linear(16 * 4 * 4, 12), tnn.Linear(12, 10)

    def forward(self, input):
        s2 = TF.max_pool2d(TF.relu(self.conv1(input)), (2, 2))
        s4 = TF.max_pool2d(TF.relu(self.conv2(s2)), 2)
        return self.fc2(TF.relu(self.fc1(torch.flatten(s4, 1))))


class WithModules(Tutorial):
    """A pooling shared by two patterns, dropout by mode, tritonnet's functions."""

    def __init__(self):
        super().__init__()
        self.pool, self.drop = tnn.MaxPool2d(2, 2), tnn.Dropout(0.5)
        self.slope = 0.5

    def forward(self, x):
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(self.conv2(x).relu())
        x = TF.dropout(x.flatten(1), 0.5, training=self.training) * self.slope
        return self.fc2(self.drop(torch.relu(self.fc1(x))))


class Residual(tnn.Module):
    """A result that is used twice is not part of a pattern."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.relu = tnn.Conv2d(1, 4, 3, padding=1), tnn.Conv2d(4, 4, 3, padding=1), tnn.ReLU()
        self.head = tnn.Sequential(tnn.Flatten(), tnn.Linear(4 * 28 * 28, 3), tnn.ReLU(inplace=True))

    def forward(self, x):
        y = self.relu(self.conv1(x))
        z = self.conv2(y)
        return self.head(self.relu(z) + y + z)


def sequential():
    return tnn.Sequential(
        tnn.Conv2d(1, 4, 5, padding=2, padding_mode="circular"), tnn.ReLU(inplace=True), tnn.MaxPool2d(3, 2, 1),
        tnn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU()), tnn.Conv2d(6, 6, 3, groups=6), tnn.ReLU(),
        tnn.MaxPool2d(2, ceil_mode=True), tnn.Flatten(), tnn.Linear(150, 5), tnn.ReLU(), tnn.Linear(5, 3),
    )  # fmt: skip


def mixed_widths():
    """Chains of four and of two layers; one that is too wide at the front, and one that ends in relu."""
    chain = [tnn.Linear(28, 9), tnn.ReLU(), tnn.Linear(9, 5), tnn.ReLU(inplace=True), nn.Linear(5, 4, False), nn.ReLU()]
    return tnn.Sequential(
        tnn.Sequential(*chain, tnn.Linear(4, 28)), tnn.Sequential(*chain),
        tnn.Sequential(tnn.Linear(4, 129), tnn.ReLU(), tnn.Linear(129, 7), tnn.ReLU(), tnn.Linear(7, 3)),
        tnn.Sequential(tnn.Linear(3, 2), tnn.Linear(2, 2)),
    )  # fmt: skip


MODELS = {
    "tutorial": (Tutorial, ["conv1, relu, max_pool2d; conv2, relu, max_pool2d; fc1, relu, fc2"] * 2),
    "with modules": (
        WithModules,
        [
            "conv1, relu, max_pool2d; conv2, relu, max_pool2d; fc1, relu. not fc2: nothing comes behind it",
            "conv1, relu, max_pool2d; conv2, relu, max_pool2d; fc1, relu, fc2",
        ],
    ),
    "residual": (Residual, ["conv1, relu; head.1, relu. not conv2: its result is used 2 times"] * 2),
    "sequential": (sequential, ["0, relu, max_pool2d; 3.0, relu; 4, relu, max_pool2d; 8, relu, 10"] * 2),
    "mixed widths": (
        mixed_widths,
        [
            "0.0, relu, 0.2, relu, 0.4, relu, 0.6; 1.0, relu; 1.2, relu; 1.4, relu; 2.0, relu; 2.2, relu, 2.4. "
            "not 3.0: linear comes behind it. not 3.1: nothing comes behind it"
        ] * 2,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_captured():
    torch.compiler.reset()


def report_of(model, *inputs):
    """The report when the model is called in training and in evaluation."""
    lines = []
    assert tritonnet.fuse(model, lines.append) is model
    for training in (True, False):
        with tritonnet.backend("reference"):
            model.train(training)(*inputs)
    return lines


def step(model, x, training):
    torch.manual_seed(1)
    model.train(training)
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return [y, *(p.grad for p in model.parameters())]


def pair(name, device, converted=False):
    """The model as it was, and fused."""
    torch.manual_seed(0)
    model = MODELS[name][0]().double().to(device)
    before = copy.deepcopy(model)
    return before, tritonnet.fuse(tritonnet.convert(model) if converted else model)


def images(device):
    return torch.rand(3, 1, 28, 28, dtype=torch.float64, device=device)


@pytest.mark.parametrize("name, converted, backend", pairs(MODELS, (False, True), ("triton", "reference")), ids=str)
@pytest.mark.sampled(3)
def test_numbers_and_gradients(name, converted, backend, device):
    before, after = pair(name, device, converted)
    x = images(device)
    with tritonnet.backend(backend):
        for training in (True, False):
            torch.testing.assert_close(step(after, x, training), step(before, x, training), rtol=1e-9, atol=1e-9)
    assert type(after) is type(before) and repr(after) == repr(before)
    assert list(after.state_dict()) == list(before.state_dict())
    assert [n for n, _ in after.named_modules()] == [n for n, _ in before.named_modules()]


@pytest.mark.parametrize("name, converted", by_turns(MODELS, (False, True)), ids=str)
def test_what_it_reports(name, converted):
    make, found = MODELS[name]
    model = make().double()
    lines = report_of(tritonnet.convert(model) if converted else model, images("cpu"))
    # One graph serves both modes where they agree.
    assert lines == [
        f"{type(model).__name__}, graph {i + 1}: fused: {words}" for i, words in enumerate(found[: len(lines)])
    ]
    assert len(lines) == len(set(found))


def test_breaks_are_reported():
    class Printing(Tutorial):
        def forward(self, x):
            x = TF.max_pool2d(TF.relu(self.conv1(x)), 2)
            print("half of it")
            return TF.relu(self.conv2(x))

    class Asking(Tutorial):
        def forward(self, x):
            return super().forward(x) if torch.compiler.is_compiling() else super().forward(x)

    lines = report_of(Printing().double(), images("cpu"))
    assert any("graph break: Failed to trace builtin operator" in line for line in lines)
    assert sum("fused: conv1, relu, max_pool2d" in line or "fused: conv2, relu" in line for line in lines) == 2
    assert "Asking, left to Python: it asks whether it is compiled" in report_of(Asking().double(), images("cpu"))


def test_launches(device):
    _, model = pair("tutorial", device)
    with tritonnet.backend("triton"), tritonnet.count_launches() as launches, torch.no_grad():
        model(images(device))
    assert launches == {"conv2d_relu_max_pool2d_forward_kernel": 2, "linear_chain_forward_kernel": 1}


@pytest.mark.parametrize(
    "body, fused",
    [
        ("y = self.conv1(x)\nreturn TF.relu(y) + y[:1]", None),
        ("return TF.max_pool2d(TF.relu(self.conv1(x)), 2, return_indices=True)[1]", "conv1, relu"),
        ("return TF.max_pool2d(TF.leaky_relu(self.conv1(x)), 2)", "conv1, leaky_relu"),
        ("return TF.max_pool2d(TF.elu(self.conv1(x)), 2)", None),
        ("return TF.max_pool2d(TF.relu(self.conv1(x)), 3, dilation=2)", "conv1, relu"),
        ("return TF.relu(TF.max_pool2d(self.conv1(x), 2))", "conv1, max_pool2d, relu"),
        ("return TF.max_pool2d(input=TF.relu(input=self.conv1(x)), kernel_size=(3, 2), stride=[2])",
         "conv1, relu, max_pool2d"),
        ("return torch.max_pool2d(torch.conv2d(x, self.conv1.weight, padding='same').relu(), 3, ceil_mode=True)",
         "conv2d, relu, max_pool2d"),
        ("y = self.conv1(x)\nwith torch.no_grad(): return TF.relu(y)", None),
        ("y = self.conv1(x)\nwith torch.autocast('cpu', torch.bfloat16): y = TF.relu(y)\nreturn y", None),
        ("y = TF.relu(self.fc1(x.flatten(1)[:, :256]))\nself.fc2.weight.data.mul_(1)\nreturn self.fc2(y)", "fc1, relu"),
        ("return self.fc2(TF.relu(self.fc1(x.flatten(1)[:, :256])) + self.fc1.bias)", "fc1, relu"),
        ("return TF.linear(TF.relu(self.fc1(x.flatten(1)[:, :256])), self.fc2.weight * 2, self.fc2.bias)",
         "fc1, relu"),
        ("return self.fc2(x.flatten(1)[:, :12]).relu_()", "fc2, relu"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("converted", [False, True], ids=["torch's layers", "converted"])
def test_rows(body, fused, converted):
    """What is fused and what is not; values are the same."""
    own = {"forward": forward_of(body, globals())}
    torch.manual_seed(0)
    model = type("Model", (Tutorial,), own)().double()
    x = images("cpu")
    with tritonnet.backend("reference"):
        expected = model(x)
        lines = report_of(tritonnet.convert(model) if converted else model, x)
        torch.testing.assert_close(model(x), expected)
    words = lines[0].partition("graph 1: ")[2].partition(". not")[0]
    assert words == (f"fused: {fused}" if fused else "nothing to fuse"), lines


def vgg():
    layers, C = [], 3
    for width in (8, 8, "pool", 16, "pool", 16, 24, "pool"):
        layers += [tnn.MaxPool2d(2)] if width == "pool" else [tnn.Conv2d(C, width, 3, padding=1), tnn.ReLU(True)]
        C = C if width == "pool" else width
    head = [tnn.Linear(C * 16, 32), tnn.ReLU(True), tnn.Dropout(), tnn.Linear(32, 32), tnn.ReLU(True), tnn.Dropout()]
    return tnn.Sequential(*layers, tnn.AdaptiveAvgPool2d(4), tnn.Flatten(), *head, tnn.Linear(32, 10))


def alexnet():
    return tnn.Sequential(
        tnn.Conv2d(3, 8, 11, 4, 2), tnn.ReLU(True), tnn.MaxPool2d(3, 2),
        tnn.Conv2d(8, 12, 5, padding=2), tnn.ReLU(True), tnn.MaxPool2d(3, 2),
        tnn.Conv2d(12, 16, 3, padding=1), tnn.ReLU(True), tnn.Conv2d(16, 12, 3, padding=1),
        tnn.ReLU(True), tnn.Conv2d(12, 12, 3, padding=1), tnn.ReLU(True), tnn.MaxPool2d(3, 2), tnn.AdaptiveAvgPool2d(2),
        tnn.Flatten(), tnn.Dropout(), tnn.Linear(48, 40), tnn.ReLU(True), tnn.Dropout(), tnn.Linear(40, 200),
        tnn.ReLU(True), tnn.Linear(200, 10),
    )  # fmt: skip


class Fire(tnn.Module):
    def __init__(self, C, squeezed, expanded):
        super().__init__()
        self.squeeze, self.squeeze_activation = tnn.Conv2d(C, squeezed, 1), tnn.ReLU(inplace=True)
        self.expand1x1, self.expand1x1_activation = tnn.Conv2d(squeezed, expanded, 1), tnn.ReLU(inplace=True)
        self.expand3x3, self.expand3x3_activation = tnn.Conv2d(squeezed, expanded, 3, padding=1), tnn.ReLU(inplace=True)

    def forward(self, x):
        x = self.squeeze_activation(self.squeeze(x))
        return torch.cat(
            [self.expand1x1_activation(self.expand1x1(x)), self.expand3x3_activation(self.expand3x3(x))], 1
        )


class SqueezeNet(tnn.Module):
    def __init__(self):
        super().__init__()
        self.features = tnn.Sequential(
            tnn.Conv2d(3, 8, 3, stride=2), tnn.ReLU(inplace=True), tnn.MaxPool2d(3, 2, ceil_mode=True),
            Fire(8, 4, 8), Fire(16, 4, 8), tnn.MaxPool2d(3, 2, ceil_mode=True), Fire(16, 4, 12),
        )  # fmt: skip
        self.classifier = tnn.Sequential(
            tnn.Dropout(0.5), tnn.Conv2d(24, 10, 1), tnn.ReLU(inplace=True), tnn.AdaptiveAvgPool2d((1, 1))
        )
        for module in self.modules():
            if isinstance(module, tnn.Conv2d):
                tnn.init.kaiming_uniform_(module.weight)

    def forward(self, x):
        return torch.flatten(self.classifier(self.features(x)), 1)


class BasicConv(tnn.Module):
    def __init__(self, *arguments, **options):
        super().__init__()
        self.conv = tnn.Conv2d(*arguments, bias=True, **options)
        self.bn = tnn.Identity()

    def forward(self, x):
        return TF.relu(self.bn(self.conv(x)), inplace=True)


class Inception(tnn.Module):
    def __init__(self, C, n):
        super().__init__()
        self.branch1 = BasicConv(C, n, kernel_size=1)
        self.branch2 = tnn.Sequential(BasicConv(C, n, kernel_size=1), BasicConv(n, n, kernel_size=3, padding=1))
        self.branch4 = tnn.Sequential(
            tnn.MaxPool2d(kernel_size=3, stride=1, padding=1, ceil_mode=True), BasicConv(C, n, kernel_size=1)
        )

    def _forward(self, x):
        return [self.branch1(x), self.branch2(x), self.branch4(x)]

    def forward(self, x):
        return torch.cat(self._forward(x), 1)


class GoogLeNet(tnn.Module):
    def __init__(self, aux_logits=True):
        super().__init__()
        self.conv1 = BasicConv(3, 8, kernel_size=7, stride=2, padding=3)
        self.maxpool1 = tnn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.inception3a, self.inception3b = Inception(8, 4), Inception(12, 4)
        self.aux1 = tnn.Linear(12, 10) if aux_logits else None
        self.avgpool, self.dropout, self.fc = tnn.AdaptiveAvgPool2d((1, 1)), tnn.Dropout(0.2), tnn.Linear(12, 10)
        self.transform_input = True

    def _transform_input(self, x):
        if self.transform_input:
            x = torch.cat([torch.unsqueeze(x[:, c], 1) * (0.229 / 0.5) + 0.1 for c in range(3)], 1)
        return x

    def forward(self, x):
        x = self.maxpool1(self.conv1(self._transform_input(x)))
        x = self.inception3b(self.inception3a(x))
        aux = self.aux1(x.mean((2, 3))) if self.aux1 is not None and self.training else None
        x = self.fc(self.dropout(torch.flatten(self.avgpool(x), 1)))
        return x if aux is None else x + 0.3 * aux


class Bottleneck(tnn.Module):
    """As in torchvision, with and without batch norm."""

    def __init__(self, C, width, stride=1, downsample=None, norm=tnn.Identity):
        super().__init__()
        self.conv1, self.bn1 = tnn.Conv2d(C, width, 1), norm(width)
        self.conv2, self.bn2 = tnn.Conv2d(width, width, 3, stride, 1), norm(width)
        self.conv3, self.bn3 = tnn.Conv2d(width, 2 * width, 1), norm(2 * width)
        self.relu, self.downsample, self.stride = tnn.ReLU(inplace=True), downsample, stride

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(tnn.Module):
    def __init__(self, norm=tnn.Identity):
        super().__init__()
        self.conv1, self.bn1, self.relu = tnn.Conv2d(3, 8, 7, 2, 3), norm(8), tnn.ReLU(inplace=True)
        self.maxpool = tnn.MaxPool2d(3, 2, 1)
        self.layer1 = tnn.Sequential(
            Bottleneck(8, 8, downsample=tnn.Conv2d(8, 16, 1), norm=norm), Bottleneck(16, 8, norm=norm)
        )
        self.layer2 = Bottleneck(16, 8, 2, tnn.Sequential(tnn.Conv2d(16, 16, 1, 2), norm(16)), norm)
        self.fc = tnn.Linear(16, 10)

    def _forward_impl(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(TF.adaptive_avg_pool2d(self.layer2(self.layer1(x)), 1), 1))

    def forward(self, x):
        return self._forward_impl(x)


# Rows in training and in evaluation: convolutions with relu and pooling, with relu, linears with relu, chains,
# convolutions and linears with batch norm or a sum, sums with relu.
NETWORKS = {
    "VGG": (vgg, (3, 2, 2, 0, 0, 0), (3, 2, 0, 1, 0, 0)),
    "AlexNet": (alexnet, (3, 2, 2, 0, 0, 0), (3, 2, 2, 0, 0, 0)),
    "SqueezeNet": (SqueezeNet, (1, 10, 0, 0, 0, 0), (1, 10, 0, 0, 0, 0)),
    "GoogLeNet": (GoogLeNet, (1, 8, 0, 0, 1, 0), (1, 8, 0, 0, 0, 0)),
    "ResNet without batch norm": (ResNet, (1, 6, 0, 0, 3, 0), (1, 6, 0, 0, 3, 0)),
    "ResNet": (lambda: ResNet(tnn.BatchNorm2d), (0, 0, 0, 0, 12, 0), (0, 0, 0, 0, 12, 0)),
}


def patterns_in(line):
    kinds = [0] * 6
    for row in line.partition("fused: ")[2].partition(". not")[0].split("; ") if "fused: " in line else ():
        if row.startswith("add"):
            kinds[5] += 1
        elif "batch_norm" in row or "add" in row:
            kinds[4] += 1
        elif "max_pool2d" in row:
            kinds[0] += 1
        elif row.count(",") > 1:
            kinds[3] += 1
        else:
            kinds[2 if row.split(",")[0] in LINEARS else 1] += 1
    return tuple(kinds)


LINEARS = ("fc", "aux1", *map(str, range(15, 30)))


@pytest.mark.parametrize("name, converted", by_turns(NETWORKS, (False, True)), ids=str)
@pytest.mark.sampled(3)
def test_networks(name, converted):
    """Every pattern that they have, and one graph for each mode; values and gradients are eager's."""
    make, *rows = NETWORKS[name]
    torch.manual_seed(0)
    model = make().double()
    fused, lines = copy.deepcopy(model), []
    tritonnet.fuse(tritonnet.convert(fused) if converted else fused, lines.append, fullgraph=True)
    x = torch.rand(2, 3, 63, 65, dtype=torch.float64)
    with tritonnet.backend("reference"):
        for training in (True, False):
            torch.testing.assert_close(step(fused, x, training), step(model, x, training), rtol=1e-8, atol=1e-8)
    assert [patterns_in(line) for line in lines] == rows[: len(lines)], lines


def compiled(model, **options):
    # By its function: in a clone that is not installed, the backend's name is not registered.
    known = any(e.name == "tritonnet" for e in importlib.metadata.entry_points(group="torch_dynamo_backends"))
    return torch.compile(model, backend="tritonnet" if known else compile_graph, **options)


@pytest.mark.parametrize("options", [{}, {"fullgraph": True}, {"dynamic": True}, {"options": {"backend": "aot_eager"}}])
def test_the_backend(options, device):
    """torch.compile(model, backend="tritonnet"), for several batch sizes."""
    torch.manual_seed(0)
    model = Tutorial().double().to(device)
    ours = compiled(copy.deepcopy(model), **options)
    with tritonnet.backend("reference"):
        for N in (3, 2, 5):
            x = images(device)[:1].repeat(N, 1, 1, 1)
            torch.testing.assert_close(step(ours, x, True), step(model, x, True), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("how", thorough_if(lambda how: how == "the backend", ["the backend", "fuse"]))
def test_inductor_compiles_what_is_left(how):
    torch.manual_seed(0)
    model = WithModules().eval()
    x, lines = images("cpu").float(), []
    options = {"backend": "inductor"}
    with tritonnet.backend("reference"), torch.no_grad():
        expected = model(x)
        if how == "fuse":
            ours = tritonnet.fuse(copy.deepcopy(model), lines.append, options=options)
        else:
            ours = compiled(copy.deepcopy(model), options=options)
        torch.testing.assert_close(ours(x), expected)
    assert how == "the backend" or "fc1, relu, fc2" in lines[0]


def test_what_is_wrong_with_the_options():
    with pytest.raises(ValueError, match="options must name a 'backend', got {'epilogue_fusion': True}"):
        tritonnet.fuse(Tutorial(), options={"epilogue_fusion": True})
    with pytest.raises(Exception, match="options must be 'backend' or those of that backend, got"):
        compiled(Tutorial(), options={"epilogue_fusion": True})(torch.rand(1, 1, 28, 28))
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got int"):
        tritonnet.fuse(3)
    fused = tritonnet.fuse(Tutorial(), options={"backend": "no such"})
    with pytest.raises(Exception, match="no such"):
        fused(torch.rand(1, 1, 28, 28))


def test_fullgraph_is_passed_on():
    class Printing(Tutorial):
        def forward(self, x):
            print("no graph of this")
            return super().forward(x)

    fused = tritonnet.fuse(Printing(), fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="print"):
        fused(torch.rand(1, 1, 28, 28))


def test_whoever_traces_sees_the_model_as_it_is_written(device):
    before, model = pair("tutorial", device)
    x = images(device)
    with tritonnet.backend("reference"):
        model(x)
        whole = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(whole(x), before(x))
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), before(x))
        graph = make_fx(model)(x)
        torch.testing.assert_close(graph(x), before(x))
        assert torch.fx.symbolic_trace(model)(x).shape == (3, 10)
        outer = tritonnet.fuse(tnn.Sequential(model, tnn.Softmax(1)))
        torch.testing.assert_close(outer(x), before(x).softmax(1))
        parameters = dict(model.named_parameters())

        def loss(p, image):
            return torch.func.functional_call(model, p, (image[None],)).square().sum()

        gradients = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
        true = torch.autograd.grad(before(x).square().sum(), before.fc2.weight)[0]
        torch.testing.assert_close(gradients["fc2.weight"].sum(0), true)


@pytest.mark.thorough
def test_many_models_and_sizes():
    """The limit of graphs for one piece of code does not add up over models."""
    with tritonnet.backend("reference"):
        for _ in range(9):
            model = tnn.Sequential(tnn.Conv2d(1, 2, 3), tnn.ReLU())
            lines = []
            tritonnet.fuse(model, lines.append)
            for N in (1, 2, 3, 4):
                model(torch.rand(N, 1, 6, 6))
            assert lines[0].endswith("fused: 0, relu") and len(lines) <= 3
            model(torch.rand(1, 6, 6))


def test_a_failure_of_ours_is_none_of_python(monkeypatch):
    monkeypatch.setattr(compiler, "fuse_patterns", lambda graph, elementwise: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tritonnet.fuse(Tutorial())(torch.rand(1, 1, 28, 28))


def test_tensors_of_another_class_are_left_alone():
    """A class that knows torch's operators may not know the fused ones."""
    tensor = TwoTensor(torch.rand(2, 1, 28, 28), torch.rand(2, 1, 28, 28))
    model = tnn.Sequential(tnn.Conv2d(1, 2, 3), tnn.ReLU())
    for p in list(model.parameters()):
        p.requires_grad_(False)
    model[0].weight = tnn.Parameter(TwoTensor(model[0].weight.data, model[0].weight.data * 2), requires_grad=False)
    model[0].bias = tnn.Parameter(TwoTensor(model[0].bias.data, model[0].bias.data * 2), requires_grad=False)
    expected, lines = model(tensor), []
    result = tritonnet.fuse(model, lines.append)(tensor)
    torch.testing.assert_close((result.a, result.b), (expected.a, expected.b))
    assert "of a class of their own" in lines[0]


def test_revert_leaves_other_compilations_alone():
    model = Tutorial()
    model.compile(backend="eager")
    theirs = model._compiled_call_impl
    assert tritonnet.revert(model)._compiled_call_impl is theirs
    assert tritonnet.revert(tritonnet.fuse(model))._compiled_call_impl is None


@pytest.mark.skipif(
    torch.__version__ < "2.12", reason="torch 2.11 ends the process where one thread captures and another runs Python's"
)
def test_a_thread_of_its_own():
    torch.manual_seed(0)
    model = Tutorial()
    x = torch.rand(2, 1, 28, 28)
    with tritonnet.backend("reference"):
        expected = model(x)
    fused, results = tritonnet.fuse(model), []

    threads = [threading.Thread(target=lambda: results.append(fused(x))) for _ in range(3)]
    # The backend is set for the process: threads that each set and restored it would leave another one behind.
    with tritonnet.backend("reference"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    torch.testing.assert_close(results, [expected] * 3)
    assert not torch._dynamo.config.suppress_errors and torch._dynamo.config.skip_nnmodule_hook_guards

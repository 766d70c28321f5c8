"""tritonnet.fuse: what it finds, what it leaves alone, and that nobody can tell by numbers, names or behaviour."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn as tnn
import torch.nn.functional as TF

import tritonnet
import tritonnet.nn as nn
import tritonnet.nn.functional as F


class Tutorial(tnn.Module):
    """As in PyTorch's tutorials."""

    def __init__(self):
        super().__init__()
        self.conv1 = tnn.Conv2d(1, 6, 5)
        self.conv2 = tnn.Conv2d(6, 16, 5)
        self.fc1 = tnn.Linear(16 * 4 * 4, 12)
        self.fc2 = tnn.Linear(12, 10)

    def forward(self, input):
        c1 = TF.relu(self.conv1(input))
        s2 = TF.max_pool2d(c1, (2, 2))
        c3 = TF.relu(self.conv2(s2))
        s4 = TF.max_pool2d(c3, 2)
        s4 = torch.flatten(s4, 1)
        return self.fc2(TF.relu(self.fc1(s4)))


class WithModules(Tutorial):
    """A pooling shared by two rows, dropout by mode, the functions of tritonnet."""

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
    """A result that is used twice is no row."""

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
    """Chains of four layers and of two; one that is too wide in front, one that ends in a rectifier."""
    chain = [tnn.Linear(28, 9), tnn.ReLU(), tnn.Linear(9, 5), tnn.ReLU(inplace=True), nn.Linear(5, 4, False), nn.ReLU()]
    return tnn.Sequential(
        tnn.Sequential(*chain, tnn.Linear(4, 28)), tnn.Sequential(*chain),
        tnn.Sequential(tnn.Linear(4, 129), tnn.ReLU(), tnn.Linear(129, 7), tnn.ReLU(), tnn.Linear(7, 3)),
        tnn.Sequential(tnn.Linear(3, 2), tnn.Linear(2, 2)),
    )  # fmt: skip


MODELS = {
    "tutorial": (Tutorial, ["conv1, relu, max_pool2d; conv2, relu, max_pool2d; fc1, relu, fc2"]),
    "with modules": (WithModules, ["conv1, relu, max_pool2d; conv2, relu, max_pool2d; fc1, relu"]),
    "residual": (Residual, ["conv1, relu", "1, relu"]),
    "sequential": (sequential, ["0, relu, max_pool2d; 4, relu; 8, relu, 10", "0, relu"]),
    "mixed widths": (
        mixed_widths,
        ["0, relu, 2, relu, 4, relu, 6", "0, relu; 2, relu; 4, relu", "0, relu; 2, relu, 4"],
    ),
    "LeNet": (lambda: tritonnet.LeNet(), None),
}


def report_of(model):
    lines = []
    assert tritonnet.fuse(model, lines.append) is model
    return lines


def step(model, x, training):
    torch.manual_seed(1)
    model.train(training)
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return [y, *(p.grad for p in model.parameters())]


def pair(name, device):
    """The model as it was, and fused."""
    torch.manual_seed(0)
    model = MODELS[name][0]().double().to(device)
    return copy.deepcopy(model), tritonnet.fuse(model)


def images(device):
    return torch.rand(3, 1, 28, 28, dtype=torch.float64, device=device)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "LeNet"])
def test_numbers_and_gradients(name, training, backend, device):
    before, after = pair(name, device)
    x = images(device)
    torch.testing.assert_close(step(after, x, training), step(before, x, training), rtol=1e-9, atol=1e-9)
    assert type(after).__name__ == type(before).__name__ and isinstance(after, type(before))
    assert list(after.state_dict()) == list(before.state_dict())
    assert [n for n, _ in after.named_modules()] == [n for n, _ in before.named_modules()]
    assert repr(after) == repr(before)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "LeNet"])
def test_what_it_reports(name):
    model, found = MODELS[name]
    lines = report_of(model())
    assert [line.partition("fused: ")[2] for line in lines if "fused: " in line] == found, lines
    assert not any("left alone" in line for line in lines)


def test_launches(device):
    _, model = pair("tutorial", device)
    with tritonnet.backend("triton"), tritonnet.count_launches() as launches, torch.no_grad():
        model(images(device))
    assert launches == {"conv2d_relu_max_pool2d_forward_kernel": 2, "linear_chain_forward_kernel": 1}
    with tritonnet.backend("triton"), tritonnet.count_launches() as launches, torch.no_grad():
        tritonnet.LeNet().to(device)(torch.rand(2, 1, 32, 32, device=device))
    assert launches == {
        "conv2d_relu_max_pool2d_product_kernel": 2, "place_filters_kernel": 2, "linear_chain_forward_kernel": 1
    }  # fmt: skip


def forward_of(source):
    """A Tutorial whose forward has this body; `x` and `self` are there."""
    space = {"torch": torch, "TF": TF, "Tutorial": Tutorial, "LIMIT": 2, "seen": []}
    body = "\n".join(f"        {line}" for line in source.splitlines())
    exec(f"class Model(Tutorial):\n    def forward(self, x):\n{body}", space)
    return space["Model"]()


ROW = "TF.max_pool2d(TF.relu(self.conv1(x)), 2)"
LEFT_ALONE = {
    "counts its calls": (f"self.calls = 1\nreturn {ROW}", "changes or imports something"),
    "prints": (f"print('here')\nreturn {ROW}", "uses the global name print"),
    "remembers": (f"seen.append(1)\nreturn {ROW}", "uses the global name seen"),
    "a global number": (f"return {ROW} * LIMIT", "uses the global name LIMIT"),
    "no_grad": (f"with torch.no_grad():\n    x = {ROW}\nreturn x", "forward"),
    "by value": (f"if x.sum() > 0:\n    x = -x\nreturn {ROW}", "torch.fx cannot trace it"),
    "by kind": (f"if x is None:\n    return None\nreturn {ROW}", "asks what its arguments are"),
    "random": (f"return {ROW} + torch.rand(1)", "tensors of its own"),
    "a list": (f"return {ROW} * self.sizes[0]", "reads self.sizes, a list"),
    "a comprehension's function": (f"f = lambda t: t\nreturn f({ROW})", "has a function inside"),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_alone(name, device):
    source, reason = LEFT_ALONE[name]
    model = forward_of(source)
    model.sizes = [2]
    cls = type(model)
    (line,) = report_of(model)
    assert "left alone" in line and reason in line, line
    assert type(model) is cls


def test_optional_arguments_and_replaced_forwards_are_left_alone():
    class Optional(Tutorial):
        def forward(self, x, mask=None):
            return super().forward(x)

    model = Tutorial()
    model.forward = lambda x: x
    assert "optional arguments" in report_of(Optional())[0] and "was replaced" in report_of(model)[0]


@pytest.mark.parametrize(
    "body",
    [
        "y = self.conv1(x)\nreturn TF.relu(y) + y[:1]",  # used twice
        "return TF.max_pool2d(TF.relu(self.conv1(x)), 2, return_indices=True)[1]",
        "return TF.max_pool2d(TF.leaky_relu(self.conv1(x)), 2)",
        "return TF.relu(TF.max_pool2d(self.conv1(x), 2))",
    ],
)
def test_no_row(body, device):
    model, x = forward_of(body), images("cpu").float()
    expected = model(x)
    lines = report_of(model)
    assert not any("max_pool2d" in line for line in lines)
    torch.testing.assert_close(model(x), expected)


def test_hooks_and_later_changes_bring_the_layers_back(device):
    before, model = pair("tutorial", device)
    x, seen = images(device), []
    for layer in (model.conv1, model.fc1, model.fc2):
        layer.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    torch.testing.assert_close(model(x), before(x))
    assert seen == [(3, 6, 24, 24), (3, 12), (3, 10)]
    _, model = pair("with modules", device)
    model.eval()
    first = model(x)
    model.slope = 2.0  # read when the model was traced
    with torch.no_grad():
        fresh = WithModules().double().to(device).eval()
        fresh.load_state_dict(model.state_dict())
        fresh.slope = 2.0
        torch.testing.assert_close(model(x), fresh(x))
    assert not torch.equal(first, model(x))
    model.pool = tnn.AvgPool2d(2)
    fresh.pool = tnn.AvgPool2d(2)
    torch.testing.assert_close(model(x), fresh(x))
    model.conv1 = tnn.Conv2d(1, 6, 5, bias=False).double().to(device)
    assert model(x).shape == (3, 10)


def test_hooks_before_are_left_alone():
    model = Tutorial()
    model.conv1.register_forward_hook(lambda *args: None)
    assert "fused: conv2, relu, max_pool2d; fc1, relu, fc2" in report_of(model)[0]


def test_copies_files_and_revert(device):
    before, model = pair("with modules", device)
    x = images(device)
    model.eval(), before.eval()
    expected = before(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert isinstance(twin, WithModules) and type(twin) is type(model)
        torch.testing.assert_close(twin(x), expected)
    assert "_fusion" not in vars(tritonnet.revert(model)) and type(model) is WithModules
    torch.testing.assert_close(model(x), expected)
    assert tritonnet.fuse(tritonnet.fuse(model)) is model and type(model) is not WithModules


def test_compiles_and_exports(device):
    torch._dynamo.reset()
    before, model = pair("tutorial", device)
    x = images(device)
    with tritonnet.backend("reference"):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), before(x))
        program = torch.export.export(model, (x,))
        assert any("conv2d_relu_max_pool2d" in str(node.target) for node in program.graph.nodes)
        torch.testing.assert_close(program.module()(x), before(x))


def test_converted_or_not(device):
    _, model = pair("tutorial", device)
    x = images(device)
    expected = model(x)
    torch.testing.assert_close(tritonnet.convert(model)(x), expected)
    assert type(model.fc2) is nn.Linear
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got int"):
        tritonnet.fuse(3)

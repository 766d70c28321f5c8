"""fuse and batch norm in evaluation, sums and activations: what is fused, what is not, and that values stay eager's."""

import copy

import pytest
import torch
import torch.nn as tnn
import torch.nn.functional as TF  # noqa: F401  (forwards use it)
from conftest import by_turns
from test_fusion import compiled, nothing_captured  # noqa: F401  (a fixture)
from torch.testing._internal.two_tensor import TwoTensor
from written import forward_of

import tritonnet
import tritonnet.nn.functional as F  # noqa: F401  (forwards use it)


def drawn(norm):
    """The batch norm with statistics and parameters that are not the initial ones."""
    for t, low in ((norm.running_mean, -1), (norm.running_var, 0.5), (norm.weight, -1), (norm.bias, -1)):
        if t is not None:
            t.data.uniform_(low, 2)
    return norm


class Net(tnn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.other = tnn.Conv2d(4, 4, 3, padding=1), tnn.Conv2d(4, 4, 1, bias=False)
        self.bn, self.bn2 = drawn(tnn.BatchNorm2d(4)), drawn(tnn.BatchNorm2d(4, affine=False, momentum=None))
        self.fc, self.bn1d, self.unknown = tnn.Linear(6, 6), drawn(tnn.BatchNorm1d(6)), tnn.BatchNorm2d(4)
        self.untracked = tnn.BatchNorm2d(4, track_running_stats=False)
        self.relu, self.relu6, self.leaky = tnn.ReLU(True), tnn.ReLU6(True), tnn.LeakyReLU(0.1, True)
        self.silu, self.hardswish, self.gelu, self.hardsigmoid = (
            tnn.SiLU(True),
            tnn.Hardswish(True),
            tnn.GELU(),
            tnn.Hardsigmoid(True),
        )


def net(body, kind=Net):
    torch.manual_seed(0)
    return type("Drawn", (kind,), {"forward": forward_of(body, globals())})().double().eval()


def images():
    torch.manual_seed(1)
    return torch.randn(2, 4, 6, 6, dtype=torch.float64)


def results(model, x, backward):
    """Value and gradients, or the value without gradients."""
    model.zero_grad()
    given = x.clone().requires_grad_()
    with torch.set_grad_enabled(backward):
        y = model(given * 1)
    if backward:
        y.square().sum().backward()
    return [y, given.grad, *(p.grad for p in model.parameters())]


def layout(t):
    return [stride for size, stride in zip(t.shape, t.stride()) if size > 1]


def assert_same(found, expected, tolerance):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert layout(found[0]) == layout(expected[0])


def check(model, fused, x, converted=False, tolerance=1e-9):
    """Values and gradients of the fused model, and what is fused; after "|", without gradients."""
    ours, lines = copy.deepcopy(model), []
    tritonnet.fuse(tritonnet.convert(ours) if converted else ours, lines.append, fullgraph=True)
    expected = fused.split(" | ")
    for backward in (True, False)[: len(expected)]:
        try:
            eager = results(model, x, backward)
        except RuntimeError as e:  # eager has no gradient where an operand has been overwritten
            assert "modified by an inplace operation" in str(e)
            backward = False
            eager = results(model, x, backward)
        with tritonnet.backend("reference"):
            assert_same(results(ours, x, backward), eager, tolerance)
    words = [line.partition(": ")[2].removeprefix("fused: ").partition(". not")[0] for line in lines]
    assert words == expected, lines


# The activations, in torch's words; y is what they are applied to.
ACTIVATIONS = {
    "relu": ["TF.relu(y)", "torch.relu(y)", "y.relu()", "self.relu(y)", "F.relu(y)"],
    "relu6": ["TF.relu6(y, inplace=True)", "TF.hardtanh(y, 0, 6)", "TF.hardtanh_(y, 0.0, 6.0)", "self.relu6(y)"],
    "leaky_relu": ["TF.leaky_relu(y, 0.2)", "TF.leaky_relu_(y)", "self.leaky(y)"],
    "silu": ["TF.silu(y)", "self.silu(y)", "F.epilogue(y, activation='silu')"],
    "hardswish": ["TF.hardswish(y)", "self.hardswish(y)"],
    "gelu": ["TF.gelu(y)", "self.gelu(y)"],
    "gelu_tanh": ["TF.gelu(y, approximate='tanh')"],
    "sigmoid": ["torch.sigmoid(y)", "TF.sigmoid(y)", "y.sigmoid_()", "torch.sigmoid_(y)"],
    "hardsigmoid": ["TF.hardsigmoid(y)", "self.hardsigmoid(y)"],
}


def tolerance_of(activation):
    """torch's derivative of hardsigmoid has 1 / 6 in float32."""
    return 1e-7 if activation == "hardsigmoid" else 1e-9


@pytest.mark.parametrize("name, converted", by_turns(ACTIVATIONS, (False, True)), ids=str)
def test_activations(name, converted):
    """All of its forms in one forward, each behind a convolution, batch norm and a sum."""
    forms = ACTIVATIONS[name]
    body = [f"y = self.bn(self.conv(x)) + x; x = {form}" for form in forms]
    fused = [f"conv, batch_norm, add, {name}"] * len(forms)
    model = net("\n".join(["x = x * 1", *body, "return x * 1"]))
    check(model, "; ".join(fused), images(), converted, tolerance_of(name))


NOT_FUSED = {
    "another range": "TF.hardtanh(y, 0, 5)", "a negative slope": "TF.leaky_relu(y, -0.1)", "elu": "TF.elu(y)",
    "prelu": "TF.prelu(y, self.bn.weight)", "softmax": "TF.softmax(y, 1)",
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_FUSED)
def test_other_activations(name):
    check(net(f"y = self.bn(self.conv(x)) + x; return {NOT_FUSED[name]}"), "conv, batch_norm, add", images())


# Bodies of forward, and what is fused; after "|", without gradients if that is something else.
NORM = "y = self.bn(self.conv(x)); "
FORWARDS = {
    # The parts of an epilogue.
    "norm": (NORM + "return y", "conv, batch_norm"),
    "norm, relu, pooling": (NORM + "return TF.max_pool2d(TF.relu_(y), 2)", "conv, batch_norm, relu"),
    "sum": ("return self.conv(x) + x", "conv, add"),
    "sum, relu": ("y = self.conv(x); y += x; return TF.relu_(y)", "conv, add, relu"),
    "silu": ("return TF.silu(self.conv(x))", "nothing to fuse | conv, silu"),
    "sum, silu": ("return TF.silu(self.conv(x) + x)", "conv, add | conv, add, silu"),
    "sigmoid": ("return torch.sigmoid(self.other(x))", "other, sigmoid"),
    "all of ours": ("return F.epilogue(F.conv2d(x, self.other.weight), residual=x, activation='relu')",
                    "conv2d, add, relu"),
    "norm twice": (NORM + "return self.bn2(y)", "conv, batch_norm"),
    "one layer twice": (NORM + "return self.bn(self.conv(y))", "conv, batch_norm; conv, batch_norm"),
    "relu before the norm": ("return self.bn(TF.relu(self.conv(x)))", "conv, relu"),
    "norm after the sum": ("return self.bn(self.conv(x) + x)", "conv, add"),
    "torch.batch_norm": (
        "n = self.bn; y = self.conv(x)\n"
        "return torch.batch_norm(y, n.weight, None, n.running_mean, n.running_var, False, 0.1, 1e-3, True)",
        "conv, batch_norm",
    ),
    "by keywords": (
        "n = self.bn2; y = self.other(input=x)\n"
        "return TF.batch_norm(running_mean=n.running_mean, input=y, running_var=n.running_var)", "other, batch_norm",
    ),
    "by keywords, all of it": (
        "return torch.add(input=torch.conv2d(input=x, weight=self.other.weight, stride=1), other=x)", "conv2d, add",
    ),
    # Sums.
    "sum on the right": (NORM + "return x + y", "conv, batch_norm, add"),
    "torch.add": (NORM + "return torch.add(y, x)", "conv, batch_norm, add"),
    "torch.add, alpha of 1": (NORM + "return torch.add(x, y, alpha=1)", "conv, batch_norm, add"),
    "torch.add, alpha of 2": (NORM + "return torch.add(y, x, alpha=2)", "conv, batch_norm"),
    "add": (NORM + "return y.add(x)", "conv, batch_norm, add"),
    "add_": (NORM + "return y.add_(x).relu_()", "conv, batch_norm, add, relu"),
    "out=": (NORM + "return torch.add(y.detach(), x.detach(), out=torch.empty_like(x)) + y", "conv, batch_norm"),
    "of a number": (NORM + "return y + 1", "conv, batch_norm"),
    "of one pixel": (NORM + "return y + x[:, :, :1, :1]", "conv, batch_norm"),
    "of a larger one": (NORM + "return y[:1] + x", "conv, batch_norm"),
    "of itself": (NORM + "return y + y", "conv, batch_norm"),
    "of the convolution": ("y = self.conv(x); return self.bn(y) + y", "bn, add"),
    "of two dtypes": (NORM + "return y + x.float()", "conv, batch_norm"),
    "of a wider dtype": ("return TF.relu(self.conv(x).float() + x)", "nothing to fuse"),
    "expanded": (NORM + "return y + x[:, :1].expand(-1, 4, -1, -1)", "conv, batch_norm, add"),
    "in another layout": (NORM + "return TF.relu(x.to(memory_format=torch.channels_last) + y)",
                          "conv, batch_norm; add, relu"),
    "of a parameter": ("return self.conv(x[:, :, :1, :1]) + self.conv.weight.sum((2, 3), True)[:1]", "nothing to fuse"),
    # Residuals that are computed later.
    "of two convolutions": (NORM + "z = self.bn2(self.other(x)); y += z; return TF.relu(y)",
                            "conv, batch_norm; other, batch_norm, add, relu"),
    "of a pooling": (NORM + "return TF.relu(y + TF.avg_pool2d(x, 3, 1, 1))", "conv, batch_norm, add, relu"),
    "of a channel shuffle": (NORM + "z = torch.cat([x[:, 2:], x[:, :2]], 1); return y + z", "conv, batch_norm, add"),
    "of an unknown function": (NORM + "return TF.relu(y + torch.cumsum(x, 1))", "conv, batch_norm; add, relu"),
    "in place on its own": (NORM + "z = self.other(x).relu_(); return TF.relu(y + z)",
                            "conv, batch_norm, add, relu; other, relu"),
    # What backward needs and eager's calls do not keep.
    "relu6 that is overwritten": (NORM + "y = TF.relu6(y); y += 1; return y",
                                  "conv, batch_norm | conv, batch_norm, relu6"),
    "relu6 with a view": (NORM + "y = TF.relu6(y); y[0].mul_(2); return y",
                          "conv, batch_norm | conv, batch_norm, relu6"),
    "relu6 that stays": (NORM + "return self.other(TF.relu6(y))", "conv, batch_norm, relu6"),
    "a residual that is overwritten": ("z = x * 1; y = TF.silu(self.bn(self.conv(x)) + z); z.mul_(2); return y + z",
                                       "conv, batch_norm, add | conv, batch_norm, add, silu"),
    "a residual that stays": ("z = x * 1; y = TF.silu(self.bn(self.conv(x)) + z); return y + z",
                              "conv, batch_norm, add, silu"),
    "a sum that is overwritten": (NORM + "y = y + x; y += 1; return y", "conv, batch_norm, add"),
    "operands that are overwritten": ("y, z = x * 2, x * 3; s = TF.relu(y + z); y += 1; z += 1; return s + y + z",
                                      "add, relu"),
    # Writes.
    "to the residual": (NORM + "z = x * 1; z += y; return TF.relu(z)", "conv, batch_norm, add, relu"),
    "to the residual, seen": (NORM + "z = x * 1; v = z[0]; z += y; return TF.relu(z) + v", "conv, batch_norm"),
    "to the caller's tensor": (NORM + "x += y; return TF.relu(x) + x", "conv, batch_norm"),
    "to the images in between": (NORM + "x.mul_(2); return y + TF.avg_pool2d(x, 3, 1, 1)", "conv, batch_norm"),
    "to the residual in between": (NORM + "x.mul_(2); return y + x", "conv, batch_norm"),
    "to a view in between": ("v = x[:, :1]; y = self.conv(x); v.zero_(); y = self.bn(y); return y + x",
                             "bn, add"),
    "to the statistics in between": ("y = self.conv(x); self.bn.running_mean.add_(1); return self.bn(y)",
                                     "nothing to fuse"),
    "to the result": (NORM + "z = y; y += x; return TF.relu(z) + y", "conv, batch_norm"),
    "to a view of the norm": (NORM + "v = y[0]; y += x; return TF.relu(y) + v", "conv, batch_norm"),
    "to the result by a slice": (NORM + "y[:, 0] = 7; return TF.relu(y)", "conv, batch_norm"),
    "norm in training in between": (NORM + "z = TF.batch_norm(x, None, None, None, None, True); return y + z",
                                    "conv, batch_norm, add"),
    # Norms that are torch's.
    "other norms": ("return TF.group_norm(TF.instance_norm(self.conv(x)), 2)", "nothing to fuse"),
    "weights that are computed": (
        "n = self.bn; y = self.conv(x)\n"
        "return TF.batch_norm(y, n.running_mean, n.running_var, n.weight * 2, n.bias)", "nothing to fuse",
    ),
    # Without a batch.
    "one image": ("return torch.stack([TF.relu(torch.conv2d(x[0], self.other.weight) + x[0])])", "conv2d, add, relu"),
    "channels of one image": ("n = self.bn; y = self.conv(x[0, :, :4])\n"
                              "return TF.batch_norm(y, n.running_mean, n.running_var)", "nothing to fuse"),
    # Nothing foldable in front.
    "norm of a sum": ("return TF.relu(self.bn(x * 2))", "bn, relu"),
    "norm, sum": ("x = x * 2; return TF.silu(self.bn(x) + x)", "bn, add, silu"),
    "norm, sum with the caller's tensor": ("return TF.silu(self.bn(x * 2) + x)", "bn, add | bn, add, silu"),
    "sum of two": ("return TF.relu(x + x * 2)", "add, relu"),
    "sum of two, in place": ("x = x * 2; y = x * 2; y += x; return TF.silu(y)", "add, silu"),
    "sum to the caller's tensor": ("x += x * 2; return TF.relu(x)", "nothing to fuse"),
    "sum of integers": ("return TF.relu(x.long() + x.int().long()) + x", "nothing to fuse"),
    "sum alone": ("return x + x * 2", "nothing to fuse"),
    "dense": ("y = torch.cat([x, self.conv(x)], 1)[:, :4]; return self.other(TF.relu(self.bn(y.contiguous())))",
              "bn, relu"),
    "of other strides": ("return TF.relu(self.bn(x.mT))", "nothing to fuse"),
    # Linears.
    "linear, sum": ("return TF.gelu(self.fc(x) + x)", "fc, add | fc, add, gelu"),
    "linear, gelu": ("return TF.gelu(self.fc(x))", "nothing to fuse | fc, gelu"),
    "linear, norm": ("y = x[:, 0, 0]; return TF.relu(self.bn1d(self.fc(y)) + y)", "fc, batch_norm, add, relu"),
    "linear, norm of positions": ("return TF.relu(self.bn1d(self.fc(x[:, 0])))", "bn1d, relu"),
    # Modes.
    "no_grad in between": ("y = self.conv(x)\nwith torch.no_grad(): z = self.bn(y)\nreturn z + x * 1",
                           "nothing to fuse | conv, batch_norm, add"),
    "autocast in between": (
        "y = self.bn(self.conv(x))\nwith torch.autocast('cpu', torch.bfloat16): return y + x", "conv, batch_norm",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORWARDS)
@pytest.mark.sampled(3)
def test_forwards(name):
    body, fused = FORWARDS[name]
    check(net(body), fused, images())


@pytest.mark.parametrize(
    "name", ["norm, relu, pooling", "sum, silu", "of two convolutions", "of a pooling", "to the residual in between",
             "norm, sum", "sum of two", "linear, sum", "linear, norm"]
)  # fmt: skip
def test_converted(name):
    """Our operators in the places of torch's functions."""
    body, fused = FORWARDS[name]
    check(net(body), fused, images(), converted=True)


def a_hook(model):
    model.bn.register_forward_hook(lambda module, args, y: y * 2)


CHANGES = {
    "statistics": lambda m: (m.bn.running_mean.add_(1), m.bn.running_var.mul_(2)),
    "other statistics": lambda m: setattr(m.bn, "running_mean", torch.ones(4).double()),
    "weights": lambda m: m.bn.weight.data.mul_(2),
    "a state": lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}),
    "training, and back": lambda m: (m.train(), m(images()), m.eval()),
    "training": lambda m: m.train(),
    "training of the norm": lambda m: m.bn.train(),
    "no statistics": lambda m: [setattr(m.bn, n, None) for n in ("running_mean", "running_var")],
    "eps": lambda m: setattr(m.bn, "eps", 0.1),
    "no norm": lambda m: setattr(m, "bn", tnn.Identity()),
    "frozen": lambda m: m.requires_grad_(False),
    "a hook": a_hook,
    "a shared weight": lambda m: setattr(m.bn, "bias", m.bn.weight),
    "synchronised": lambda m: setattr(m, "bn", tnn.SyncBatchNorm.convert_sync_batchnorm(m.bn)),
    "channels_last": lambda m: m.to(memory_format=torch.channels_last),
}  # fmt: skip
BLOCK = "y = self.bn(self.conv(x)); y += x; y = TF.relu(y); return TF.silu(self.bn(y * 2))"


@pytest.mark.parametrize("name", CHANGES)
def test_later_changes(name):
    model = net(BLOCK)
    fused, x = copy.deepcopy(model), images()
    tritonnet.fuse(fused)
    with tritonnet.backend("reference"):
        assert_same(results(fused, x, True), results(model, x, True), 1e-9)
        for m in (model, fused):
            CHANGES[name](m)
        for _ in range(2):
            assert_same(results(fused, x, True), results(model, x, True), 1e-9)
    torch.testing.assert_close(fused.state_dict(), model.state_dict())


def in_autocast(model):
    def call(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    return call


FORMATS = {
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16, lambda m: m),
    "bfloat16, norms in float32": (lambda m: (m.bfloat16(), m.bn.float()), torch.bfloat16, lambda m: m),
    "autocast": (lambda m: m.float(), torch.float32, in_autocast),
}


@pytest.mark.parametrize("name, converted", by_turns(FORMATS, (False, True)), ids=str)
def test_formats(name, converted):
    """The dtype is eager's; rounding once, the fused model is nearer to float64 than eager."""
    change, dtype, wrapped = FORMATS[name]
    body = "y = self.conv(x); z = self.bn(self.other(y)); return TF.relu(z + y)"
    exact, x = net(body), images()
    model, lines = copy.deepcopy(exact), []
    change(model)
    ours = copy.deepcopy(model)
    tritonnet.fuse(tritonnet.convert(ours) if converted else ours, lines.append, fullgraph=True)
    with torch.no_grad(), tritonnet.backend("reference"):
        expected, eager, found = exact(x), wrapped(model)(x.to(dtype)), wrapped(ours)(x.to(dtype))
    assert found.dtype == eager.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-2)
    assert (found - expected).abs().mean() <= (eager - expected).abs().mean() * 1.1
    assert lines == ["Drawn, graph 1: fused: other, batch_norm, add, relu. not conv: its result is used 2 times"]


def test_another_eps():
    """A number that has changed stays a constant of the graph, so that the pattern is still found."""
    model, x, lines = net("return self.bn(self.conv(x))"), images(), []
    ours = tritonnet.fuse(copy.deepcopy(model), lines.append)
    with torch.no_grad(), tritonnet.backend("reference"):
        for eps in (1e-5, 1e-3, 0.1):
            model.bn.eps = ours.bn.eps = eps
            torch.testing.assert_close(ours(x), model(x))
    assert len(lines) == 3 and all("fused: conv, batch_norm" in line for line in lines), lines


def test_a_residual_of_another_dtype_under_autocast():
    model, x = net("return TF.relu(self.bn(self.conv(x)) + x)").float(), images().float()
    fused, lines = copy.deepcopy(model), []
    tritonnet.fuse(fused, lines.append)
    with torch.no_grad(), tritonnet.backend("reference"):
        expected, found = in_autocast(model)(x), in_autocast(fused)(x)
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    assert lines == ["Drawn, graph 1: fused: conv, batch_norm"]


@pytest.mark.parametrize(
    "options", [{"dynamic": True}, {"options": {"backend": "inductor"}}], ids=["dynamic", "inductor"]
)
def test_the_backend(options):
    model = net("y = self.bn(self.conv(x)); y += x; return TF.relu(y)").float()
    ours = compiled(copy.deepcopy(model), fullgraph=True, **options)
    with torch.no_grad(), tritonnet.backend("reference"):
        for N in (2, 3, 5):
            x = images()[:1].float().repeat(N, 1, 1, 1)
            torch.testing.assert_close(ours(x), model(x))


def test_elementwise_calls_are_left_to_a_compiler():
    model, lines = net(BLOCK).float(), []
    tritonnet.fuse(model, lines.append, options={"backend": "aot_eager"})
    model(images().float())
    assert lines == ["Drawn, graph 1: fused: conv, batch_norm, add, relu"]


def test_tensors_of_another_class():
    """A class that knows torch's operators may not know the fused ones."""
    model, lines = tnn.Sequential(tnn.Conv2d(4, 4, 1), tnn.BatchNorm2d(4), tnn.ReLU()).eval().requires_grad_(False), []
    model[1].running_mean = TwoTensor(torch.rand(4), torch.rand(4))
    model[1].running_var = TwoTensor(torch.ones(4), torch.ones(4))
    x = images().float()
    expected, result = model(x), tritonnet.fuse(model, lines.append)(x)
    torch.testing.assert_close((result.a, result.b), (expected.a, expected.b))
    assert "not 0: its tensors are of a class of their own" in lines[0]


class Scaling(tnn.BatchNorm2d):
    """A subclass with a forward of its own."""

    def forward(self, x):
        return super().forward(x) * 2


def test_subclasses_of_batch_norm():
    model = net("return TF.relu(self.bn(self.conv(x)))")
    model.bn = drawn(Scaling(4)).double().eval()
    check(model, "conv, batch_norm", images())


# Squeeze and excitation as torchvision and timm write it; s is the squeezed images.
SQUEEZED = "{} s = TF.{}(self.fc1(s)); s = TF.{}(self.fc2(s)); return {}"
EXCITED = {
    "torchvision": ("x = x * 2; s = self.pool(x);", "relu", "sigmoid", "s * x"),
    "timm": ("x = x * 2; s = x.mean((2, 3), keepdim=True);", "silu", "sigmoid", "x * s"),
    "MobileNet": ("x = TF.relu(x); s = torch.mean(x, [-1, -2], True);", "relu", "hardsigmoid", "torch.mul(x, s)"),
}
NOT_EXCITED = {
    "another size": ("s = TF.adaptive_avg_pool2d(x, 2);", "relu", "sigmoid", "x * s.mean()"),
    "another dimension": ("s = x.mean((1, 2), keepdim=True).expand(-1, 4, 1, -1);", "relu", "sigmoid", "x * s.sum()"),
    "other images": ("s = x.mean((2, 3), keepdim=True);", "relu", "sigmoid", "(x + 1) * s"),
    "a squeeze that is used": ("s = r = x.mean((2, 3), True);", "relu", "sigmoid", "x * s + r"),
    "a gate that is used": ("s = x.mean((2, 3), True);", "relu", "sigmoid", "x * s + s"),
    "in place": ("x = x * 2; s = x.mean((2, 3), True);", "relu", "sigmoid", "x.mul_(s)"),
    "one gate for all": ("s = x.mean((2, 3), True);", "relu", "sigmoid", "x * s"),
    "no gate of an epilogue": ("s = x.mean((2, 3), True);", "relu", "softplus", "x * s"),
}


class Excited(tnn.Module):
    def __init__(self):
        super().__init__()
        self.pool, self.fc1, self.fc2 = tnn.AdaptiveAvgPool2d(1), tnn.Conv2d(4, 2, 1), tnn.Conv2d(2, 4, 1)


@pytest.mark.parametrize(
    "name, converted", [*((name, False) for name in [*EXCITED, *NOT_EXCITED]), ("torchvision", True)]
)
def test_squeeze_and_excitation(name, converted):
    parts = {**EXCITED, **NOT_EXCITED}[name]
    model, x = net(SQUEEZED.format(*parts), Excited), images()
    if name == "one gate for all":
        model.fc2 = tnn.Conv2d(2, 1, 1).double()
    fused, lines = copy.deepcopy(model), []
    tritonnet.fuse(tritonnet.convert(fused) if converted else fused, lines.append, fullgraph=True)
    with tritonnet.backend("reference"):
        backward = name != "in place"  # eager has no gradient of it
        assert_same(results(fused, x, backward), results(model, x, backward), tolerance_of(parts[2]))
    word = "adaptive_avg_pool2d" if "pool" in parts[0] else "mean"
    row = f"{word}, fc1, {parts[1]}, fc2, {parts[2]}, mul"
    assert (row in lines[0]) == (name in EXCITED), lines


# Calls that nothing is fused with, and the launches of our functions that do the same.
ALONE = {
    "relu": "TF.relu(x)", "relu, its method": "x.relu()", "relu6": "TF.relu6(x)", "silu": "TF.silu(x * 1)",
    "in place": "TF.relu_(x * 1)", "pooling": "TF.max_pool2d(x, 2)", "means": "TF.avg_pool2d(x, 2)",
    "mean": "x.mean((2, 3))", "mean, keepdim": "x.mean([2, 3], keepdim=True)", "convolution": "self.conv(x)",
    "linear": "self.fc(x)", "norm": "self.bn(x)",
}  # fmt: skip
LEFT = {
    "in place on the caller's tensor": "TF.relu_(x)", "in place on a view": "TF.relu_((x * 1)[0])",
    "indices": "TF.max_pool2d(x, 2, return_indices=True)[0]", "mean of channels": "x.mean((1, 2))",
    "integers": "TF.relu(x.long())", "mean of all": "x.mean()",
}  # fmt: skip


@pytest.mark.parametrize("name", [*ALONE, *LEFT])
def test_calls_alone(name):
    body = {**ALONE, **LEFT}[name]
    model, x, lines = net(f"return {body}"), images(), []
    fused = tritonnet.fuse(copy.deepcopy(model), lines.append, fullgraph=True)
    with tritonnet.backend("triton"), tritonnet.count_launches() as launches, torch.no_grad():
        y = fused(x.clone())
    expected = model(x.clone())
    torch.testing.assert_close(y, expected)
    assert layout(y) == layout(expected)
    assert sum(launches.values()) == (name in ALONE), launches
    assert "fused: " not in lines[0]

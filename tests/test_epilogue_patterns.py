"""fuse and batch norm in evaluation, sums and activations: what is fused, what is not, and that values stay eager's."""

import copy

import pytest
import torch
import torch.nn as tnn
import torch.nn.functional as TF
from test_fusion import compiled, nothing_captured  # noqa: F401  (a fixture)
from torch.testing._internal.two_tensor import TwoTensor
from written import forward_of

import tritonnet
import tritonnet.nn.functional as F


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


def results(model, x, backward=True):
    """Value and gradients, and the value without gradients."""
    model.zero_grad()
    given = x.clone().requires_grad_()
    y = model(given * 1)
    if backward:
        y.square().sum().backward()
    with torch.no_grad():
        plain = model(x.clone())
    return [y, given.grad, *(p.grad for p in model.parameters()), plain]


def layout(t):
    return [stride for size, stride in zip(t.shape, t.stride()) if size > 1]


def assert_same(found, expected, tolerance):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert layout(found[0]) == layout(expected[0])


def check(model, fused, x, converted=False, tolerance=1e-9):
    """Values and gradients of the fused model; what is fused with gradients and, after "|", without them."""
    ours, lines = copy.deepcopy(model), []
    tritonnet.fuse(tritonnet.convert(ours) if converted else ours, lines.append, fullgraph=True)
    with tritonnet.backend("reference"):
        try:
            expected, backward = results(model, x), True
        except RuntimeError as e:  # eager has no gradient where an operand has been overwritten
            assert "modified by an inplace operation" in str(e)
            expected, backward = results(model, x, backward=False), False
        assert_same(results(ours, x, backward), expected, tolerance)
    words = [line.partition(": ")[2].removeprefix("fused: ").partition(". not")[0] for line in lines]
    expected = fused.split(" | ")
    assert words == [expected[0], expected[-1]], lines


both = pytest.mark.parametrize("converted", [False, True], ids=["torch's layers", "converted"])

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


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    """All of its forms in one forward, each behind a convolution, batch norm and a sum."""
    forms = ACTIVATIONS[name]
    body = [f"y = self.bn(self.conv(x)) + x; x = {form}" for form in forms]
    fused = [f"conv, batch_norm, add, {'epilogue' if 'epilogue' in form else name}" for form in forms]
    # torch's derivative of hardsigmoid has 1 / 6 in float32.
    tolerance = 1e-7 if name == "hardsigmoid" else 1e-9
    check(net("\n".join(["x = x * 1", *body, "return x * 1"])), "; ".join(fused), images(), tolerance=tolerance)


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
                    "conv2d, epilogue"),
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
    "relu6 that is overwritten": (NORM + "y = TF.relu6(y); y += 1; return y", "conv, batch_norm | conv, batch_norm, relu6"),
    "relu6 with a view": (NORM + "y = TF.relu6(y); y[0].mul_(2); return y", "conv, batch_norm | conv, batch_norm, relu6"),
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
                                    "conv, batch_norm"),
    # Norms that are torch's.
    "batch statistics": ("return self.untracked(self.conv(x))", "nothing to fuse"),
    "training": ("n = self.bn; y = self.conv(x)\n"
                 "return TF.batch_norm(y, n.running_mean, n.running_var, training=True) + x", "nothing to fuse"),
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


@both
@pytest.mark.parametrize("name", FORWARDS)
def test_forwards(name, converted):
    body, fused = FORWARDS[name]
    check(net(body), fused, images(), converted)

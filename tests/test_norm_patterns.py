"""fuse and batch norm in training: what is fused, that values, gradients and buffers stay eager's, what is kept."""

import copy

import pytest
import torch
import torch.nn as tnn
import torch.nn.functional as TF  # noqa: F401  (forwards use it)
from conftest import by_turns
from test_epilogue_patterns import ACTIVATIONS, assert_same, images, net, tolerance_of
from test_fusion import nothing_captured  # noqa: F401  (a fixture)

import tritonnet
import tritonnet.nn.functional as F  # noqa: F401  (forwards use it)


def step(model, x):
    """The value, all gradients and all buffers of one step."""
    model.zero_grad()
    given = x.clone().requires_grad_()
    y = model(given * 1)
    (y.square() * torch.arange(y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    return [y, given.grad, *(p.grad for p in model.parameters()), *model.buffers()]


def check(model, fused, x, converted=False, tolerance=1e-9, fullgraph=True):
    """Two steps of the fused model, and what is fused."""
    ours, lines = copy.deepcopy(model.train()), []
    tritonnet.fuse(tritonnet.convert(ours) if converted else ours, lines.append, fullgraph=fullgraph)
    with tritonnet.backend("reference"):
        for _ in range(2):
            assert_same(step(ours, x), step(model, x), tolerance)
    words = [line.partition(": ")[2].removeprefix("fused: ").partition(". not")[0] for line in lines]
    assert words == [fused], lines
    return ours


NORM = "y = self.bn(self.conv(x)); "
FORWARDS = {
    "plain": (NORM + "return y", "conv, batch_norm"),
    "sum": (NORM + "return y + x", "conv, batch_norm, add"),
    "sum and relu, in place": (NORM + "y += x; return self.relu(y)", "conv, batch_norm, add, relu"),
    "no convolution": ("x = x * 1; y = self.bn(x) + x; return TF.silu(y)", "bn, add, silu"),
    "neither": ("return self.bn(x) * 2", "nothing to fuse"),
    "batch statistics": ("return torch.relu(self.untracked(self.conv(x)))", "conv, batch_norm, relu"),
    "no layer": ("return TF.batch_norm(self.conv(x), None, None, training=True) + x", "conv, batch_norm, add"),
    "matrices": ("return torch.relu(self.bn1d(self.fc(x[:, 0]))) * x.mean()", "bn1d, relu"),
    "no bias": ("return torch.relu(self.bn(self.other(x)))", "other, batch_norm, relu"),
    "twice": (NORM + "return torch.relu(self.unknown(self.conv(y))) + y.exp()",
              "conv, batch_norm; conv, batch_norm, relu"),
    "one norm twice": (NORM + "return self.bn(torch.relu(y))", "conv, batch_norm, relu"),
    "a chain": ("for _ in range(3): x = torch.relu(self.bn(self.conv(x)))\nreturn self.conv(x)",
                "; ".join(["conv, batch_norm, relu"] * 3)),
    "before pooling": (NORM + "return TF.max_pool2d(torch.relu(y), 2)", "conv, batch_norm, relu"),
    "a block": ("y = torch.relu(self.bn(self.conv(x)))\ny = self.unknown(self.other(y)) + x\nreturn torch.relu(y)",
                "conv, batch_norm, relu; other, batch_norm, add, relu"),
    "two branches": ("y = self.bn(self.conv(x))\nreturn torch.relu(self.unknown(self.other(x)) + y)",
                     "conv, batch_norm; other, batch_norm, add, relu"),
    "a constant momentum": (NORM.replace("bn", "fast") + "return torch.relu(y)", "conv, batch_norm, relu"),
    "its mean in between": ("y = self.conv(x); m = self.bn.running_mean.sum(); return torch.relu(self.bn(y)) + m",
                            "bn, relu"),
    "its mean written in between": ("y = self.conv(x); self.bn.running_mean.add_(1); return self.bn(y) + x", "bn, add"),
    "its weight written in between": ("y = self.conv(x); self.counter.add_(1); return self.bn(y) + x",
                                      "conv, batch_norm, add"),
    "weights written before the next": (NORM + "self.unknown.running_var.mul_(2); return self.conv(torch.relu(y))",
                                        "conv, batch_norm"),
    "the result overwritten": ("y = self.conv(x); z = self.bn(y); y.mul_(2); return z", "RuntimeError"),
    "used by a view": ("y = self.conv(x); v = y[0]; return torch.relu(self.bn(y)) + v.exp()", "bn, relu"),
    "padding of a mode": ("return torch.relu(self.bn(self.reflect(torch.relu(self.unknown(self.conv(x))))))",
                          "conv, batch_norm, relu; reflect, batch_norm, relu"),
    "checkpointed": ("def f(t): return torch.relu(self.bn(self.conv(t)))\n"
                     "return torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False)", "conv, batch_norm, relu"),
}  # fmt: skip


class Net(tnn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.other = tnn.Conv2d(4, 4, 3, padding=1), tnn.Conv2d(4, 4, 1, bias=False)
        self.reflect = tnn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.bn, self.unknown, self.fast = tnn.BatchNorm2d(4), tnn.BatchNorm2d(4), tnn.BatchNorm2d(4, momentum=0.5)
        self.untracked, self.bn1d = tnn.BatchNorm2d(4, track_running_stats=False), tnn.BatchNorm1d(6)
        self.fc, self.relu = tnn.Linear(6, 6), tnn.ReLU(True)
        self.register_buffer("counter", torch.tensor(0))
        for norm in (self.bn, self.unknown, self.fast, self.untracked, self.bn1d):
            torch.nn.init.uniform_(norm.weight, -1, 2)
            torch.nn.init.uniform_(norm.bias, -1, 2)


@pytest.mark.parametrize("name, converted", by_turns(FORWARDS, (False, True)), ids=str)
def test_forwards(name, converted):
    body, fused = FORWARDS[name]
    model = net(body, Net)
    if fused == "RuntimeError":
        for m in (model, tritonnet.fuse(copy.deepcopy(model))):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                step(m.train(), images())
        return
    x = images()[:, :, :, :6]
    check(model, fused, x[:, :1].expand(2, 4, 6, 6).contiguous() if name == "matrices" else x, converted)


@pytest.mark.parametrize("name, converted", by_turns(ACTIVATIONS, (True, False)), ids=str)
def test_activations(name, converted):
    """One of its forms with a sum before it and one without."""
    form = ACTIVATIONS[name][0]
    body = f"x = x * 1; y = self.bn(self.conv(x)) + x; y = {form}; y = self.unknown(self.other(y)); return {form}"
    fused = f"conv, batch_norm, add, {name}; other, batch_norm, {name}"
    check(net(body, Net), fused, images(), converted, tolerance_of(name))

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


def check(model, fused, x, converted=False, tolerance=1e-9, backend="reference"):
    """Two steps of the fused model, and what is fused."""
    ours, lines = copy.deepcopy(model.train()), []
    tritonnet.fuse(tritonnet.convert(ours) if converted else ours, lines.append, fullgraph=True)
    with tritonnet.backend(backend):
        for _ in range(2):
            assert_same(step(ours, x), step(model, x), tolerance)
    words = [line.partition(": ")[2].removeprefix("fused: ").partition(". not")[0] for line in lines]
    assert words == [fused], lines


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


class Wide(Net):
    """Of 16 channels."""

    def __init__(self):
        super().__init__()
        for name in ("conv", "other"):
            old = getattr(self, name)
            bias = old.bias is not None
            setattr(self, name, tnn.Conv2d(16, 16, old.kernel_size, padding=old.padding, bias=bias))
        self.bn, self.unknown = tnn.BatchNorm2d(16), tnn.BatchNorm2d(16)


@pytest.mark.parametrize("name, converted", by_turns(FORWARDS, (False, True)), ids=str)
@pytest.mark.sampled(2)
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


@pytest.mark.parametrize("name", ["sum and relu, in place", "no convolution", "a chain", "before pooling", "a block"])
def test_on_the_kernels(name):
    """With 16 channels, so that a convolution's own kernel computes the statistics."""
    body, fused = FORWARDS[name]
    with tritonnet.count_launches() as launches:
        check(net(body, Wide), fused, torch.randn(2, 16, 6, 6, dtype=torch.float64), True, backend="triton")
    assert {"batch_norm_sums_kernel", "batch_norm_grad_kernel", "fold_statistics_kernel"} <= set(launches)
    # Nothing but a norm without a convolution needs a pass for its statistics.
    assert ("batch_statistics_kernel" in launches) == (name == "no convolution")


def test_vmap_over_the_operator():
    """Its rule: a batch of each argument, against one by one."""

    def t(*size):
        return torch.randn(3, *size, dtype=torch.float64)

    w, x, vectors = t(6, 2, 3, 3), t(2, 4, 5, 5), [t(4), t(4).exp(), t(4), t(4)]
    running, bias = [t(6), t(6).exp()], t(6)
    geometry = [1, 1], [1, 1, 1, 1], [1, 1], 2, "zeros"

    def call(x, mean, var, scale, shift, w, bias, running_mean, running_var):
        norm = mean, var, scale, shift, 0.1, "silu", 0.0
        return torch.ops.tritonnet.norm_conv2d(x, *norm, w, bias, *geometry, running_mean, running_var, 0.3, True)

    with tritonnet.backend("reference"):
        given = [x, *vectors, w, bias, *(r.clone() for r in running)]
        found = [*torch.func.vmap(call)(*given), *given[-2:]]
        one_by_one = [x, *vectors, w, bias, *(r.clone() for r in running)]
        expected = [torch.stack(r) for r in zip(*(call(*(t[i] for t in one_by_one)) for i in range(3)))]
        torch.testing.assert_close(found, [*expected, *one_by_one[-2:]])
        with pytest.raises(RuntimeError, match="running_mean and running_var are updated in place and must be batched"):
            torch.func.vmap(lambda x: F.batch_norm(x, running[0][0, :4], running[1][0, :4], training=True))(x)


def test_sizes_that_vary():
    """The numbers that Dynamo computes from them between two calls keep nothing from being fused."""
    model = net("y = torch.relu(self.bn(self.down(x)))\nreturn torch.relu(self.unknown(self.conv(y)))", Net)
    model.down = tnn.Conv2d(4, 4, 3, stride=2, padding=1)
    ours, lines = copy.deepcopy(model.double()), []
    tritonnet.fuse(tritonnet.convert(ours), lines.append, fullgraph=True)
    with tritonnet.backend("reference"):
        for size in (8, 12, 10):
            x = torch.randn(2, 4, size, size, dtype=torch.float64)
            assert_same(step(ours, x), step(model, x), 1e-9)
    assert len(lines) == 2, lines
    assert all(line.endswith("fused: down, batch_norm, relu; conv, batch_norm, relu") for line in lines), lines

"""torch's activations on our kernels against torch: values, gradients, in place, errors, and what others replace."""

import inspect

import pytest
import torch
import torch.nn.functional as TF
from exact import DTYPES, ROUNDOFF, SUM

import tritonnet
import tritonnet.nn as nn
import tritonnet.nn.functional as F

# name: a function of a module of functionals, the input and inplace
FUNCTIONS = {
    "relu6": lambda f, x, inplace: f.relu6(x, inplace),
    "hardtanh": lambda f, x, inplace: f.hardtanh(x, 0, 6.0, inplace),
    "leaky_relu": lambda f, x, inplace: f.leaky_relu(x, 0.1, inplace),
    "silu": lambda f, x, inplace: f.silu(x, inplace=inplace),
    "hardswish": lambda f, x, inplace: f.hardswish(x, inplace),
    "hardsigmoid": lambda f, x, inplace: f.hardsigmoid(x, inplace),
    "sigmoid": lambda f, x, inplace: f.sigmoid(x),
    "gelu": lambda f, x, inplace: f.gelu(x),
    "gelu, tanh": lambda f, x, inplace: f.gelu(x, approximate="tanh"),
}
IN_PLACE = {"relu6", "hardtanh", "leaky_relu", "silu", "hardswish", "hardsigmoid"}
LAYERS = [nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.Hardswish, nn.GELU, nn.Sigmoid, nn.Hardsigmoid]
SPECIAL = float("nan"), float("inf"), float("-inf"), 0.0, -0.0, -3.0, 3.0, 6.0, -6.0, 100.0, -100.0
# gelu and silu are products with a function that is off by its argument's rounding: exp by the argument's multiple.
STEPS = 24


def sample(dtype):
    """(4, 3, 5, 7): random values up to about 10, and special ones."""
    x = torch.randn(4, 3, 5, 7) * 3
    x.view(-1)[: len(SPECIAL)] = torch.tensor(SPECIAL)
    return x.to(dtype)


def outcome(call, x, dy):
    leaf = x.detach().requires_grad_()
    y = call(leaf * 1)
    return y.detach(), torch.autograd.grad(y, leaf, dy)[0]


LAYOUTS = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "gaps": lambda t: t[:, ::2, 1:],
    "expanded": lambda t: t[:1].expand(3, -1, -1, -1),
    "transposed": lambda t: t.permute(3, 1, 0, 2),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_against_torch(name, dtype, backend, device):
    """In one layout for each dtype, and in place where torch has that; test_special_values has what is not finite."""
    function, layout = FUNCTIONS[name], LAYOUTS[list(LAYOUTS)[DTYPES.index(dtype)]]
    x = layout(sample(dtype)).detach()
    dy = torch.randn(x.shape).to(dtype)
    # torch's derivative of hardsigmoid has 1 / 6 in float32.
    exact = (lambda t: TF.relu6(t + 3) / 6) if name == "hardsigmoid" else lambda t: function(TF, t, False)
    truth = outcome(exact, x.double(), dy.double())
    their = function(TF, x, False)
    for inplace in (False, True)[: 1 + (name in IN_PLACE)]:
        with tritonnet.count_launches() as launches:
            found = outcome(lambda t, inplace=inplace: function(F, t, inplace), x.to(device), dy.to(device))
        assert bool(launches) == (backend == "triton")
        assert found[0].stride() == their.stride()
        for ours, true in zip(found, truth):
            assert ours.dtype == dtype
            # A derivative that is computed from the rounded result is off by less than a rounding of dy.
            bound = ROUNDOFF[dtype] * (true.abs() + dy.double().abs()) + SUM[dtype] * STEPS * (x.double().abs() + 6)
            excess = ((ours.cpu().double() - true).abs() - bound)[x.isfinite()]
            assert (excess <= 0).all(), f"over the bound by {excess.max():.3g}"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_special_values(name, backend, device):
    """Also the sign of zeros, in float32, where torch gives the same in its scalar and its vector code."""
    x = torch.tensor(SPECIAL).repeat_interleave(64)
    found, theirs = (
        outcome(lambda t, f=f: FUNCTIONS[name](f, t, False), t, torch.ones_like(t))
        for f, t in ((F, x.to(device)), (TF, x))
    )
    for ours, their in zip(found, theirs):
        ours = ours.cpu()
        if name in ("relu6", "hardtanh"):  # at NaN torch has a gradient of 0 in vectors of a CPU, and of dy elsewhere
            ours, their = ours[64:], their[64:]
        torch.testing.assert_close(ours, their, rtol=1e-5, atol=1e-6, equal_nan=True)
        if name != "gelu":  # torch's vectors lose the sign
            zeros = their == 0
            assert torch.equal(torch.signbit(ours)[zeros & (ours == 0)], torch.signbit(their)[zeros & (ours == 0)])


def test_in_place_overwrites(device):
    x = torch.randn(64, 64, device=device)
    address, before = x.data_ptr(), x.clone()
    with tritonnet.backend("triton"), tritonnet.count_launches() as launches:
        assert F.leaky_relu_(x, negative_slope=0.5) is x
        assert F.hardtanh_(x, 0, 6) is x
    assert x.data_ptr() == address and torch.equal(x, before.clamp(0, 6)) and launches == {"epilogue_kernel": 2}


def mistakes(f, device):
    """Calls that torch refuses."""

    def leaf():
        return torch.randn(3, device=device, requires_grad=True)

    def in_backward():
        x = leaf() * 1
        f.leaky_relu_(x, -0.1).sum().backward()

    def overwritten():
        x = leaf() * 2
        y = x.square()
        f.silu(x, inplace=True)
        y.sum().backward()

    yield from (in_backward, overwritten)
    yield lambda: f.hardswish(leaf(), inplace=True)
    yield lambda: f.relu6(torch.randn(1, 3, device=device).expand(2, 3), inplace=True)
    yield lambda: f.hardtanh(leaf(), 6, 0)
    yield lambda: f.gelu(leaf(), approximate="sigmoid")
    yield lambda: f.leaky_relu(leaf(), "a")
    yield lambda: f.silu(torch.tensor([1, 2]))
    yield lambda: f.silu("a")


def test_mistakes(backend, device):
    for ours, theirs in zip(mistakes(F, device), mistakes(TF, device), strict=True):
        with pytest.raises(Exception) as expected:
            theirs()
        with pytest.raises(expected.type):
            ours()


def test_a_negative_slope(backend, device):
    """Out of place it has a derivative, from the argument; in place torch refuses it in backward only."""
    x = torch.randn(50, dtype=torch.float64)
    dy = torch.randn(50, dtype=torch.float64)
    ours = outcome(lambda t: F.leaky_relu(t, -0.5), x.to(device), dy.to(device))
    for a, b in zip(ours, outcome(lambda t: TF.leaky_relu(t, -0.5), x, dy)):
        torch.testing.assert_close(a.cpu(), b)
    assert torch.equal(F.leaky_relu_(x.to(device), -0.5).cpu(), TF.leaky_relu(x, -0.5))


def test_what_is_torchs(backend):
    """Other dtypes and other limits."""
    x = torch.tensor([-7, 0, 9])
    assert torch.equal(F.relu6(x), torch.tensor([0, 0, 6])) and F.sigmoid(x).dtype == torch.float32
    z = torch.randn(9)
    with tritonnet.count_launches() as launches:
        assert torch.equal(F.hardtanh(z), TF.hardtanh(z)) and torch.equal(
            F.leaky_relu(z, torch.tensor(0.1)), TF.leaky_relu(z, 0.1)
        )
    assert not launches
    assert F.silu(torch.empty(0, 3)).shape == (0, 3) and F.silu(torch.tensor(2.0)).shape == ()


def test_signatures_are_torchs():
    for name in ("relu6", "hardtanh", "leaky_relu", "silu", "hardswish", "hardsigmoid", "sigmoid"):
        ours, theirs = (inspect.signature(getattr(f, name)).parameters for f in (F, TF))
        assert [(p.name, p.default, p.kind) for p in ours.values()] == [
            (p.name, p.default, p.kind) for p in theirs.values()
        ]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)
def test_layers_follow_a_replaced_forward(layer, monkeypatch, device):
    """Converted and reverted; and where another library has replaced torch's forward, ours is that."""
    theirs = layer.__base__()
    model = torch.nn.Sequential(theirs)
    x = torch.randn(5)
    y = theirs(x)
    assert type(tritonnet.convert(model)[0]) is layer
    with tritonnet.backend("triton"), tritonnet.count_launches() as launches:
        torch.testing.assert_close(model(x.to(device)).cpu(), y)
    assert launches == {"epilogue_kernel": 1}
    monkeypatch.setattr(layer.__base__, "forward", lambda self, x: x + 1)
    assert torch.equal(model(x), x + 1)
    assert type(tritonnet.revert(model)[0]) is layer.__base__

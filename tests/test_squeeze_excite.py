"""Squeeze and excitation against float64: values, gradients, layouts, how it is shared out, and errors."""

from typing import NamedTuple

import pytest
import torch
from exact import ROUNDOFF, SUM

import tritonnet
import tritonnet.nn.functional as F
from bench import unfused
from tritonnet.kernels import squeeze_excite

NCHW, LAST = torch.contiguous_format, torch.channels_last
# No activation's first derivative exceeds 1.13 (gelu's).
STEEPEST = 1.13


class Case(NamedTuple):
    size: tuple
    R: int
    dtype: torch.dtype
    layout: torch.memory_format
    activation: str = "relu"
    gate: str = "sigmoid"
    biases: tuple = (True, True)


CASES = {
    "7x7": Case((2, 40, 7, 7), 10, torch.float32, NCHW, "silu"),
    "channels_last": Case((2, 72, 9, 8), 24, torch.bfloat16, LAST, "relu", "hardsigmoid"),
    "one unit": Case((3, 17, 5, 6), 1, torch.float64, LAST, biases=(False, True)),
    "many units": Case((1, 530, 2, 3), 300, torch.float16, NCHW, "hardswish", biases=(True, False)),
    "shared by pixels": Case((1, 8, 64, 130), 2, torch.bfloat16, NCHW, "leaky_relu"),
    "shared by pixels, channels_last": Case((1, 12, 64, 65), 3, torch.float32, LAST, "gelu"),
    "shared by channels": Case((1, 260, 12, 13), 18, torch.float32, LAST, "relu6", "sigmoid", (False, False)),
}


def tensors(case):
    """x, w1, b1, w2, b2 in float64, with values of the case's dtype."""
    C, R = case.size[1], case.R
    made = torch.randn(case.size) + 1, torch.randn(R, C) / C**0.5, torch.randn(R), torch.randn(C, R), torch.randn(C)
    made = [t.to(case.dtype).double() for t in made]
    for i, there in zip((2, 4), case.biases):
        made[i] = made[i] if there else None
    return made


def laid_out(t, case, device):
    if t is None:
        return None
    t = t.to(device, case.dtype)
    return t.contiguous(memory_format=case.layout) if t.dim() == 4 else t


def product_and_error(a, a_error, w, b, u, v_of_sums):
    """a wT + b, and how far it may be off where a is off by a_error."""
    z, size = a @ w.t(), a.abs() @ w.abs().t()
    if b is not None:
        z, size = z + b, size + b.abs()
    return z, a_error @ w.abs().t() + (u * (w.shape[1] + 8) + v_of_sums) * size


@pytest.mark.parametrize("name", CASES)
def test_against_float64(name, backend, device):
    """Within the roundings of mean, hidden, gate and result, as they go on through the products."""
    case = CASES[name]
    x, w1, b1, w2, b2 = made = tensors(case)
    ours = [laid_out(t, case, device) for t in made]
    with tritonnet.count_launches() as launches:
        y = F.squeeze_excite(*ours, case.activation, case.gate)
    assert launches == ({"whole_avg_pool2d_kernel": 1, "squeeze_excite_kernel": 1} if backend == "triton" else {})
    assert y.stride() == ours[0].stride() and y.dtype == case.dtype
    u, v = SUM[case.dtype], ROUNDOFF[case.dtype]
    # The reference rounds sums before their activation, too.
    v_of_sums = v if backend == "reference" else 0
    mean, error = x.mean((2, 3)), v * x.mean((2, 3)).abs() + u * (x[0, 0].numel() + 4) * x.abs().mean((2, 3))
    z, error = product_and_error(mean, error, w1, b1, u, v_of_sums)
    hidden = unfused.epilogue(z, activation=case.activation)
    error = STEEPEST * error + v * hidden.abs() + 8 * u * (z.abs() + 1)
    z, error = product_and_error(hidden, error, w2, b2, u, v_of_sums)
    gate = unfused.epilogue(z, activation=case.gate)
    error = STEEPEST * error + v * gate.abs() + 8 * u * (z.abs() + 1)
    truth = unfused.squeeze_excite(*made, case.activation, case.gate)
    # A product of two rounded numbers, rounded once more.
    bound = (x.abs() * error[:, :, None, None]) * (1 + v) + v * truth.abs()
    excess = (y.cpu().double() - truth).abs() - bound
    assert (excess <= 0).all(), f"over the bound by {excess.max():.3g}"


@pytest.mark.parametrize("name", ["7x7", "one unit"])
def test_gradients(name, backend, device):
    case = CASES[name]._replace(dtype=torch.float64)
    found = []
    for function, where in ((F.squeeze_excite, device), (unfused.squeeze_excite, "cpu")):
        torch.manual_seed(1)
        leaves = [None if t is None else laid_out(t, case, where).requires_grad_() for t in tensors(case)]
        y = function(*leaves, case.activation, case.gate)
        dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=where).view(y.shape)
        found.append([y, *torch.autograd.grad(y, [t for t in leaves if t is not None], dy)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs)


def test_weights_of_convolutions_and_other_strides(backend, device):
    """As MobileNet and EfficientNet keep them; images that are slices, without a batch, and none."""
    x, w1, b1, w2, b2 = (laid_out(t, CASES["7x7"], device) for t in tensors(CASES["7x7"]))
    expected = F.squeeze_excite(x, w1, b1, w2, b2)
    last = w1[..., None, None].contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(F.squeeze_excite(x, last, b1, w2[..., None, None], b2), expected)
    wide = torch.stack([x, x], -1)[..., 0]
    strided = F.squeeze_excite(wide, w1.t().contiguous().t(), b1, torch.stack([w2, w2], 2)[..., 0], b2)
    torch.testing.assert_close(strided, expected)
    torch.testing.assert_close(F.squeeze_excite(x[1], w1, b1, w2, b2), expected[1])
    assert F.squeeze_excite(x[:0], w1, b1, w2, b2).shape == (0, 40, 7, 7)


def test_what_is_not_finite_stays_in_its_image(backend, device):
    x, *weights = (laid_out(t, CASES["7x7"], device) for t in tensors(CASES["7x7"]))
    clean = F.squeeze_excite(x, *weights)
    x[1, 3, 2, 2] = float("nan")
    y = F.squeeze_excite(x, *weights)
    assert torch.equal(y[0], clean[0]) and y[1].isnan().all()


def test_every_element_is_in_one_part():
    """Programs do not overlap, leave nothing out, and take shares that are about as large as w1."""
    for N, C, R, P in ((64, 1152, 48, 49), (1, 32, 8, 12544), (1, 2048, 128, 49), (256, 16, 1, 3136), (3, 17, 700, 1)):
        blocks, pixels, parts_c, parts_p = squeeze_excite.parts(N, C, R, P, 16, 64)
        assert (parts_c - 1) * blocks * 16 < C <= parts_c * blocks * 16
        assert pixels % 64 == 0 and (parts_p - 1) * pixels < P <= parts_p * pixels


def test_mistakes():
    x, w1, b1, w2, b2 = torch.zeros(2, 4, 3, 3), torch.zeros(3, 4), torch.zeros(3), torch.zeros(4, 3), torch.zeros(4)
    for arguments, error, message in (
        ((x[0, 0], w1, b1, w2, b2), RuntimeError, "input must be"),
        ((x, w1[:, :3], b1, w2, b2), RuntimeError, r"weight1 must have size \[3, 4\], got \[3, 3\]"),
        ((x, w1, b1, w2[:, :2], b2), RuntimeError, r"weight2 must have size \[4, 3\], got \[4, 2\]"),
        ((x, w1, b2, w2, b2), RuntimeError, r"bias1 must have size \[3\], got \[4\]"),
        ((x, w1, b1, w2, b1), RuntimeError, r"bias2 must have size \[4\], got \[3\]"),
        ((x, w1, b1, w2.double(), b2), RuntimeError, "weight2 must have the same dtype"),
        ((x, w1[:0], b1[:0], w2[:, :0], b2), RuntimeError, r"weight1 \[0, 4\]"),
        ((x, w1, 1, w2, b2), TypeError, "bias1 must be a Tensor, got int"),
        ((x, None, b1, w2, b2), TypeError, "weight1 must be a Tensor, got NoneType"),
        ((x, w1, b1, w2, b2, "relu", "softmax"), ValueError, "got 'softmax'"),
    ):
        with pytest.raises(error, match=message):
            F.squeeze_excite(*arguments)

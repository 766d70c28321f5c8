"""The kernels of batch norm in training against float64: statistics, running statistics, result and gradients."""

from typing import Any, NamedTuple

import pytest
import torch
from exact import DTYPES, ROUNDOFF, SUM

import tritonnet
import tritonnet.nn.functional as F
from tritonnet.kernels import activations, launchers

SLOPE, EPS = 0.3, 1e-3
# Operations on each value, beside sums.
STEPS = 24
KINKS = {"relu": (0,), "leaky_relu": (0,), "relu6": (0, 6), "hardswish": (-3, 3), "hardsigmoid": (-3, 3)}


def channels_inner(t):
    """The channels contiguous, in any number of dimensions."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def channels_outer(t):
    return t.transpose(0, 1).contiguous().transpose(0, 1)


def gaps(t):
    """Every second element of a larger tensor."""
    wide = t.new_zeros([2 * n for n in t.shape])
    view = wide[tuple(slice(None, None, 2) for _ in t.shape)]
    return view.copy_(t)


# name: size, layout
LAYOUTS = {
    "channels_last": ((5, 16, 9, 11), channels_inner),
    "channels_last, odd channels": ((3, 21, 7, 6), channels_inner),
    "channels_last, several programs": ((5, 72, 21, 23), channels_inner),
    "NCHW": ((3, 6, 8, 10), torch.Tensor.contiguous),
    "NCHW, odd pixels": ((4, 5, 9, 7), torch.Tensor.contiguous),
    "NCHW, several programs": ((5, 2, 40, 44), torch.Tensor.contiguous),
    "channels outermost": ((4, 3, 6, 8), channels_outer),
    "strided": ((4, 6, 5, 3), gaps),
    "(N, C)": ((70, 33), torch.Tensor.contiguous),
    "(N, C, L)": ((6, 7, 12), torch.Tensor.contiguous),
    "(N, C, D, H, W)": ((2, 5, 3, 4, 6), channels_inner),
    "one channel": ((4, 1, 5, 8), channels_inner),
}


def along(vector, t):
    return vector.view(-1, *(1,) * (t.dim() - 2))


def values(dtype, size, mean=0.0):
    """Random numbers of each channel around `mean`, in units of their deviation, which are exact in dtype."""
    deviation = torch.rand(size[1]).double() + 0.5
    x = torch.randn(size).double() + mean
    return (x * along(deviation, x)).to(dtype)


def true_statistics(x):
    """(mean, variance) in float64."""
    wide, dims = x.double(), [dim for dim in range(x.dim()) if dim != 1]
    mean = wide.mean(dims)
    return mean, (wide - along(mean, wide)).square().mean(dims)


def assert_within(name, actual, truth, bound):
    excess = (actual.detach().cpu().double() - truth).abs() - bound
    assert excess.isfinite().all() and (excess <= 0).all(), f"{name}: over the bound by {excess.max():.3g}"


def check_statistics(x, device):
    """Within what two passes in the type of sums are bound to: Chan, Golub and LeVeque 1983, for sums in any order."""
    with tritonnet.count_launches() as launches:
        mean, var = launchers.batch_statistics(x.to(device))
    assert set(launches) == {"batch_statistics_kernel", "fold_statistics_kernel"}
    assert mean.dtype == var.dtype == torch.promote_types(x.dtype, torch.float32)
    true_mean, true_var = true_statistics(x)
    u, count = SUM[x.dtype], x.numel() // x.shape[1]
    sums = u * (count + STEPS)
    assert_within("mean", mean, true_mean, 2 * u * true_mean.abs() + sums * true_var.sqrt())
    # The truth is itself a sum in float64.
    of_truth = 2 * count * (ROUNDOFF[torch.float64] * true_mean).square()
    assert_within("var", var, true_var, sums * true_var + of_truth)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mean", [0.5, 2e4])
def test_statistics(layout, mean, device):
    size, laid_out = LAYOUTS[layout]
    check_statistics(laid_out(values(torch.float32, size, mean)), device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_of_every_format(dtype, device):
    for layout in ("channels_last", "NCHW, odd pixels"):
        size, laid_out = LAYOUTS[layout]
        check_statistics(laid_out(values(dtype, size, 3.0)), device)
    check_statistics(values(torch.float64, (40, 5), 1e8), device)


@pytest.mark.parametrize("layout", ["channels_last, several programs", "NCHW, several programs"])
def test_an_unusual_beginning(layout, device):
    """The shift of a program is the mean of its first block."""
    size, laid_out = LAYOUTS[layout]
    x = values(torch.float32, size)
    x[0, :, 0, 0] = 1e4
    check_statistics(laid_out(x), device)
    x = values(torch.float32, size) * 1e-3 + 1
    x[:2] = 0
    check_statistics(laid_out(x), device)


def test_one_value_a_channel(device):
    x = values(torch.float32, (1, 5, 1, 1), 7.0)
    mean, var = launchers.batch_statistics(x.to(device))
    assert torch.equal(mean.cpu(), x.flatten()) and not var.any()


def test_no_values(device):
    x, vector = torch.empty(0, 3, 4, 4, device=device), torch.ones(3, device=device)
    assert torch.stack(launchers.batch_statistics(x)).isnan().all()
    dx, dscale, dshift, dz, y = launchers.batch_norm_grad(
        x, x, None, vector, vector, None, None, EPS, "relu", 0.0, True, True
    )
    assert dx.shape == dz.shape == y.shape == x.shape
    assert torch.equal(dscale, vector * 0) and torch.equal(dshift, vector * 0)


@pytest.mark.parametrize(
    "dtype, of_running, momentum, bias",
    [
        (torch.float32, torch.float32, 0.1, False), (torch.bfloat16, torch.float32, 1 / 3, True),
        (torch.float16, torch.float16, 0.1, True), (torch.float64, torch.float64, 0.1, True),
        (torch.float32, torch.float64, 1.0, False),
    ],
    ids=str,
)  # fmt: skip
def test_running_statistics(dtype, of_running, momentum, bias, device):
    x = values(dtype, (7, 10, 5, 3), 2.0)
    running = [gaps(torch.rand(10).to(of_running)) for _ in range(2)]
    added = torch.randn(10).to(dtype) if bias else None
    mean, var = true_statistics(x)
    unbiased = var * 105 / 104
    targets = mean if added is None else mean + added.double(), unbiased
    truth = [r.double() * (1 - momentum) + target * momentum for r, target in zip(running, targets)]

    ours = [gaps(r.to(device)) for r in running]
    launchers.tracked_statistics(x.to(device), None if added is None else added.to(device), *ours, momentum)
    # Rounded to the running statistics' type in the end, and on the way to that of sums.
    u, v = SUM[dtype], ROUNDOFF[of_running]
    for name, actual, true, target in zip(("mean", "var"), ours, truth, targets):
        assert_within(name, actual, true, v * true.abs() + u * (105 + STEPS) * (target.abs() + var + 1))


def test_partial_statistics_are_folded(device):
    """Parts of which the last is shorter: of a running mean that bias moves, and with means in two numbers."""
    x = values(torch.float64, (1000, 3), 1e4)
    parts = x.split(300)
    means = torch.stack([part.mean(0) for part in parts])
    squares = torch.stack([(part - part.mean(0)).square().sum(0) for part in parts])
    true_mean, true_var = true_statistics(x)
    rounded = means.float()
    for partials in ([means, squares], [rounded, squares, means - rounded.double()]):
        dtype = torch.float64 if len(partials) == 2 else torch.float32
        partials = torch.stack([t.to(dtype) for t in partials]).to(device)
        mean, var = launchers._batch_statistics.fold(partials, 300, 1000, None, None, None, 0.0)
        assert_within("mean", mean, true_mean, 4 * SUM[dtype] * true_mean.abs())
        # Deviations from a rounded mean do not add up to zero.
        rounding = true_mean.abs() * true_var.sqrt() if len(partials) == 2 else 0
        assert_within("var", var, true_var, SUM[dtype] * (STEPS * true_var + rounding))


class Case(NamedTuple):
    """A gradient: the layouts of x and dy, the formats of images and vectors, what there is."""

    layout: str
    activation: str
    dtypes: tuple = (torch.float32, torch.float32)
    layout_of_dy: Any = None
    residual: bool = False
    scale: bool = True
    shift: bool = True
    with_dz: bool = False
    with_y: bool = False
    mean: float = 0.5


HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64
CASES = {
    "none": Case("channels_last", "none"),
    "relu": Case("channels_last, several programs", "relu", (HALF, SINGLE), with_y=True),
    "relu, residual": Case("channels_last", "relu", (HALF, HALF), residual=True, with_dz=True),
    "relu, odd channels": Case("channels_last, odd channels", "relu", with_y=True),
    "relu, NCHW": Case("NCHW, several programs", "relu", (HALF, SINGLE)),
    "relu6, residual": Case("NCHW", "relu6", layout_of_dy=channels_inner, residual=True, with_dz=True),
    "leaky_relu": Case("NCHW, odd pixels", "leaky_relu", scale=False, with_dz=True, with_y=True),
    "silu": Case("(N, C)", "silu", (DOUBLE, DOUBLE), with_y=True),
    "hardswish": Case("strided", "hardswish", shift=False, layout_of_dy=gaps),
    "gelu": Case("channels outermost", "gelu", (torch.float16, SINGLE), with_y=True),
    "gelu_tanh": Case("(N, C, L)", "gelu_tanh", scale=False, shift=False),
    "sigmoid, residual": Case("(N, C, D, H, W)", "sigmoid", residual=True),
    "hardsigmoid": Case("one channel", "hardsigmoid", with_dz=True),
    "far from zero": Case("channels_last, several programs", "relu", mean=1e4),
}


def test_every_activation_is_here():
    assert {case.activation for case in CASES.values()} == set(activations.NAMES)


def inputs(case, device):
    """(x, scale, shift, residual, dy), where dy is 0 wherever rounding might decide an activation's derivative."""
    size, laid_out = LAYOUTS[case.layout]
    dtype, of_vectors = case.dtypes
    x = values(dtype, size, case.mean)
    scale, shift = (torch.randn(size[1]).to(of_vectors) if there else None for there in (case.scale, case.shift))
    residual = torch.randn(size).to(dtype) if case.residual else None
    dy = torch.randn(size)
    u = true_argument(x, scale, shift, residual)
    # The mean, too, is rounded.
    near = 8 * ROUNDOFF[dtype] * (8 if case.residual else 1) + 8 * case.mean * SUM[dtype] + 1e-4
    for kink in KINKS.get(case.activation, ()):
        dy[(u.detach() - kink).abs() < near * (1 + abs(kink))] = 0
    dy = (case.layout_of_dy or laid_out)(dy.to(dtype))
    tensors = laid_out(x), scale, shift, None if residual is None else laid_out(residual), dy
    return tuple(None if t is None else t.to(device) for t in tensors)


def true_argument(x, scale, shift, residual):
    """The activation's argument in float64."""
    wide = [None if t is None else t.double() for t in (scale, shift, residual)]
    u = torch.nn.functional.batch_norm(x.double(), None, None, *wide[:2], training=True, eps=EPS)
    return u if residual is None else u + wide[2]


@pytest.mark.parametrize("name", CASES)
def test_gradients(name, device):
    """Each within the rounding of sums, of results and, where they are stored, of dz or y."""
    case = CASES[name]
    x, scale, shift, residual, dy = inputs(case, device)
    mean, var = launchers.batch_statistics(x)
    vectors, values = (mean, var, scale, shift), (EPS, case.activation, SLOPE)
    y = launchers.batch_norm(x, *vectors, residual, *values)
    arguments = dy, x, y if case.residual else None, *vectors, *values, case.with_dz, case.with_y
    with tritonnet.count_launches() as launches:
        results = launchers.batch_norm_grad(*arguments)
    assert launches == dict.fromkeys(("batch_norm_sums_kernel", "fold_sums_kernel", "batch_norm_grad_kernel"), 1)
    assert all(map(torch.equal, results, launchers.batch_norm_grad(*arguments)))
    dx, dscale, dshift, dz, again = results
    assert dx.dtype == x.dtype and dx.stride() == torch.empty_like(x).stride()
    # The activation's argument has the bits of the forward pass.
    assert torch.equal(again, y) if case.with_y else again.numel() == 0

    leaves = [None if t is None else t.cpu().double().requires_grad_() for t in (x, scale, shift, residual)]
    ones, zeros = (torch.full((x.shape[1],), n, dtype=DOUBLE, requires_grad=True) for n in (1.0, 0.0))
    leaves = leaves[0], ones if scale is None else leaves[1], zeros if shift is None else leaves[2], leaves[3]
    u = true_argument(*leaves)
    truth = activations.activated(u, case.activation, SLOPE)
    true_dz, *gradients = torch.autograd.grad(truth, (u, *leaves[:3]), dy.cpu().double())

    dtype, dims = x.dtype, [dim for dim in range(x.dim()) if dim != 1]
    u_sum, v = SUM[dtype], ROUNDOFF[dtype]
    wide, true_mean, true_var = leaves[0].detach(), *true_statistics(x.cpu())
    rstd = (true_var + EPS).rsqrt()
    xhat = ((wide - along(true_mean, wide)) * along(rstd, wide)).abs() + along(u_sum * true_mean.abs() * rstd, wide)
    count = x.numel() // x.shape[1]
    # The argument is off by its own rounding and by that of the mean. The derivatives' derivatives are below 2.
    factor = leaves[1].detach().abs()
    off = STEPS * u_sum * (u.detach().abs() + along(factor, wide) * (xhat + along(true_mean.abs() * rstd, wide)) + 1)
    of_dz = dy.cpu().double().abs() * (2 * off + (2 * v if case.residual else 0)) + 1e-30
    if case.with_dz:
        assert_within("dz", dz, true_dz, of_dz + v * true_dz.abs())
        of_dz = of_dz + v * true_dz.abs()
    else:
        assert dz.numel() == 0
    of_dz = of_dz + u_sum * (count + STEPS + along(true_mean.abs() * rstd, wide)) * true_dz.abs()
    bounds = of_dz.sum(dims), (of_dz * xhat).sum(dims)
    assert_within("dshift", dshift, gradients[2], bounds[0] + u_sum * gradients[2].abs())
    assert_within("dscale", dscale, gradients[1], bounds[1] + STEPS * u_sum * gradients[1].abs() + u_sum * count)
    of_dx = of_dz + along(bounds[0] / count, wide) + xhat * along(bounds[1] / count, wide)
    size = true_dz.abs() + along(true_dz.abs().mean(dims), wide) + xhat * along((true_dz.abs() * xhat).mean(dims), wide)
    of_dx = (of_dx + STEPS * u_sum * size) * along(factor * rstd, wide)
    assert_within("dx", dx, gradients[0], v * gradients[0].abs() + of_dx)


@pytest.mark.parametrize("mean", [1e4, -3e6])
def test_far_from_zero(mean, device):
    """The mean is subtracted before anything is rounded."""
    for layout in ("channels_last", "NCHW", "NCHW, odd pixels"):
        size, laid_out = LAYOUTS[layout]
        x = laid_out(values(SINGLE, size, mean)).to(device)
        statistics = launchers.batch_statistics(x)
        scale, shift = torch.randn(size[1]).to(device), torch.randn(size[1]).to(device)
        y = launchers.batch_norm(x, *statistics, scale, shift, None, EPS, "none", 0.0)
        wide, mu, var, factor, summand = (t.cpu().double() for t in (x, *statistics, scale, shift))
        normed = (wide - along(mu, wide)) * along((var + EPS).rsqrt() * factor, wide)
        assert_within(
            "y", y, normed + along(summand, wide), 8 * SUM[SINGLE] * (normed.abs() + along(summand.abs(), wide))
        )


@pytest.mark.parametrize("residual, activation", [(False, "none"), (True, "none"), (True, "relu")], ids=str)
def test_the_bias_may_be_overwritten_before_backward(residual, activation, device):
    """As with torch's batch norm: only an activation's argument that is computed again depends on it."""
    found = []
    for overwritten in (False, True):
        torch.manual_seed(0)
        x, added = (torch.randn(3, 4, 5, 5, device=device, requires_grad=True) for _ in range(2))
        scale, shift = (torch.rand(4, device=device, requires_grad=True) for _ in range(2))
        y = F.batch_norm_epilogue(
            x, None, None, scale, shift, True, residual=added if residual else None, activation=activation
        )
        if overwritten:
            with torch.no_grad():
                shift.add_(1)
        inputs = [x, scale, shift, *([added] if residual else [])]
        found.append(torch.autograd.grad(y.sin().sum(), inputs))
    assert all(map(torch.equal, *found))


def test_a_decomposed_program_has_the_gradient_of_the_statistics():
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    layer = tritonnet.nn.BatchNorm2d(3, dtype=torch.float64)
    program = torch.export.export(layer, (x.detach(),)).run_decompositions(tritonnet.decompositions())
    ours, theirs = program.module()(x), torch.nn.functional.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(y.pow(3).sum(), x)[0] for y in (ours, theirs)))

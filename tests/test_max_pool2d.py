"""max_pool2d against torch's eager CPU operator, bit for bit: values and indices; gradients against float64."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as TF
from exact import DTYPES, assert_exact
from torch.utils._python_dispatch import TorchDispatchMode

import tritonnet
import tritonnet.nn.functional as F
from tritonnet import ops
from tritonnet.kernels.max_pool2d import forward, scatter

# name: (N, C, H, W), arguments
CASES = {
    "2x2": ((2, 3, 8, 6), dict(kernel_size=2)),
    "3x3 stride 2": ((2, 3, 9, 11), dict(kernel_size=3, stride=2, padding=1)),
    "stride 1": ((2, 3, 7, 8), dict(kernel_size=3, stride=1, padding=1)),
    "pairs": ((2, 3, 9, 8), dict(kernel_size=(3, 2), stride=(1, 2), padding=(1, 0))),
    "asymmetric dilation": ((2, 3, 12, 11), dict(kernel_size=(2, 3), stride=2, dilation=(3, 2))),
    "dilation shares a factor with stride": ((2, 3, 15, 14), dict(kernel_size=3, stride=(4, 2), padding=1, dilation=2)),
    "dilation prime to stride": ((2, 3, 15, 16), dict(kernel_size=3, stride=(3, 2), padding=1, dilation=(2, 3))),
    "stride over kernel": ((2, 3, 11, 12), dict(kernel_size=2, stride=(3, 5))),
    "ceil_mode": ((2, 3, 8, 9), dict(kernel_size=3, stride=2, ceil_mode=True)),
    "ceil_mode drops a window of padding": ((2, 3, 5, 6), dict(kernel_size=2, stride=3, padding=1, ceil_mode=True)),
    "ceil_mode, k=1 s=2": ((1, 2, 4, 5), dict(kernel_size=1, stride=2, ceil_mode=True)),
    "15x15 window": ((1, 2, 20, 19), dict(kernel_size=15, stride=2, padding=7)),
    "17x17 window: codes past a byte": ((1, 2, 21, 20), dict(kernel_size=17, stride=3, padding=8)),
    "k not a power of two": ((2, 5, 10, 10), dict(kernel_size=5)),
    "odd channels": ((2, 7, 6, 6), dict(kernel_size=2)),
    "one pixel": ((2, 1, 1, 1), dict(kernel_size=1)),
    "empty stride": ((2, 3, 6, 6), dict(kernel_size=2, stride=[])),
    "empty batch": ((0, 3, 6, 6), dict(kernel_size=2)),
    "unbatched": ((3, 6, 6), dict(kernel_size=2)),
}


def same(a, b):
    """Bit for bit, but any NaN equals any other."""
    a, b = a.detach().cpu(), b.detach().cpu()
    alike = a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride()
    return alike and torch.equal(a.isnan(), b.isnan()) and torch.equal(a[~a.isnan()], b[~b.isnan()])


def check(x, arguments, device, layout=lambda t: t):
    leaf = layout(x.clone().to(device)).requires_grad_()
    truth = layout(x.clone()).requires_grad_()
    y, indices = F.max_pool2d(leaf, **arguments, return_indices=True)
    true_y, true_indices = TF.max_pool2d(truth, **arguments, return_indices=True)
    assert same(y, true_y) and same(indices, true_indices)
    assert same(F.max_pool2d(leaf, **arguments), true_y)
    # The gradient's truth: float64 sums over torch's own indices.
    dy = torch.randn(true_y.shape).to(x.dtype)
    (dx,) = torch.autograd.grad(y, leaf, dy.to(device))
    flat = torch.zeros(*x.shape[:-2], x.shape[-1] * x.shape[-2], dtype=torch.float64)
    true_dx, size = (
        flat.scatter_add(-1, true_indices.flatten(-2), g.double().flatten(-2)).view(x.shape) for g in (dy, dy.abs())
    )
    assert_exact("dx", dx, true_dx, size, true_y[..., 0, 0].numel() and 15 * 15)
    return y, dx


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.sampled(2)
def test_case(case, dtype, backend, device):
    size, arguments = CASES[case]
    check(torch.randn(size).to(dtype), arguments, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.sampled(2)
def test_ties_nan_and_infinities(dtype, backend, device):
    """Of equal values the first wins, of several NaN the last; a window of -inf gives its first pixel."""
    x = torch.randint(0, 3, (4, 3, 12, 11)).to(dtype)
    x[torch.rand(x.shape) < 0.2] = float("nan")
    x[torch.rand(x.shape) < 0.2] = float("-inf")
    x[torch.rand(x.shape) < 0.05] = float("inf")
    x[0, 0] = float("-inf")
    x[1, 1] = float("nan")
    x[2, 2] = -0.0
    x[2, 2, ::2] = 0.0
    for case in ("2x2", "3x3 stride 2", "stride 1", "dilation prime to stride", "ceil_mode", "15x15 window"):
        check(
            x,
            {"kernel_size": 2, **CASES[case][1]} if case != "15x15 window" else dict(kernel_size=11, padding=5),
            device,
        )


@pytest.mark.parametrize("size", [(2, 3, 8, 7), (1, 1, 5, 5), (3, 1, 4, 6), (2, 5, 1, 9)], ids=str)
def test_channels_last(size, backend, device):
    arguments = dict(kernel_size=(1, 3) if size[2] == 1 else 3, stride=(1, 2), padding=(0, 1))
    y, dx = check(
        torch.randn(size), arguments, device, lambda t: t.contiguous(memory_format=torch.channels_last).detach()
    )
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert dx.is_contiguous(memory_format=torch.channels_last)


def test_strided_input_and_expanded_gradient(backend, device):
    x = torch.randn(6, 10, 3, 8, device=device).double().permute(3, 2, 1, 0)[::2, :, 1:9].requires_grad_()
    y = F.max_pool2d(x, 3, 2, 1)
    (dx,) = torch.autograd.grad(y.sum(), x)
    truth = x.detach().cpu().requires_grad_()
    true_y = TF.max_pool2d(truth, 3, 2, 1)
    torch.testing.assert_close(y.cpu(), true_y, rtol=0, atol=0)
    torch.testing.assert_close(dx.cpu(), torch.autograd.grad(true_y.sum(), truth)[0], rtol=0, atol=0)


PAIRS = dict(PAIRED=True), dict(JOINED=True)
SINGLES = dict(PAIRED=False), dict(JOINED=False)
# name: (N, C, H, W), window, and what the plans of forward and scatter say of contiguous images; a scatter that is None
# goes pixel by pixel. In channels_last nothing is paired or joined.
FORMS = {
    "pairs of columns": ((2, 3, 6, 16), (2, 2, 0, 1), *PAIRS),
    "pairs, padded": ((2, 3, 8, 12), (3, 2, 1, 1), *PAIRS),
    "pairs, one column after the last pair": ((2, 3, 8, 12), (3, 2, 0, 1), *PAIRS),
    "pairs, strips that end in idle columns": ((1, 3, 9, 14), (4, 2, 1, 1), *PAIRS),
    "odd rows": ((2, 3, 8, 11), (3, 2, 1, 1), *SINGLES),
    "stride 1": ((2, 8, 7, 8), (3, 1, 1, 1), *SINGLES),
    "one pixel of each block": ((2, 8, 7, 8), (1, 2, 0, 1), dict(PAIRED=False), dict(JOINED=True)),
    "no block": ((2, 4, 13, 12), (2, 5, 0, 1), dict(PAIRED=False), None),
    "dilated": ((2, 4, 13, 12), (3, 2, 1, 2), dict(PAIRED=False, UNROLLED=True), None),
    "large windows": ((2, 4, 13, 12), (6, 2, 3, 1), dict(UNROLLED=False), None),
}


def plan(launch, *args):
    """The constants of a launch."""
    return launch.__wrapped__(*args)[2]


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", FORMS)
@pytest.mark.sampled(2)
def test_every_form(case, dtype, last, backend, device):
    size, numbers, of_forward, of_scatter = FORMS[case]
    window = [(n, n) for n in numbers]
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.randint(-3, 4, size).to(dtype)
    x[torch.rand(size) < 0.1] = float("nan")
    x[torch.rand(size) < 0.3] = float("-inf")
    y, dx = check(
        x, dict(zip(("kernel_size", "stride", "padding", "dilation"), window)), device,
        lambda t: t.contiguous(memory_format=layout).detach(),
    )  # fmt: skip
    if last:
        of_forward = {**of_forward, "PAIRED": False}
        of_scatter = of_scatter and dict(JOINED=False)
    assert plan(forward._forward, dx, y, None, *window).items() >= of_forward.items()
    assert scatter.in_blocks(window[0], window[1], window[3]) == (of_scatter is not None)
    if of_scatter is not None:
        code = torch.empty_like(y, dtype=torch.uint8)
        assert plan(scatter._scatter_blocks, y, code, dx, *window).items() >= of_scatter.items()


def test_image_sizes_compile_nothing_anew():
    """Sizes that the same numbers divide have the same constants."""
    plans = []
    for h, w in ((20, 24), (28, 40)):
        x, window = torch.empty(2, 3, h, w), ((3, 3), (2, 2), (1, 1), (1, 1))
        y, code = forward.forward(x, *window, False)
        plans.append((plan(forward._forward, x, y, code, *window), plan(scatter._scatter_blocks, y, code, x, *window)))
    for constants in (c for both in plans for c in both):
        del constants["BLOCK_R"]
    assert plans[0] == plans[1]


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_that_are_not_aligned(dtype, last, backend, device):
    """Slices that start in the middle of 16 bytes, and whose rows do."""
    whole = torch.randn(3, 10, 11, 20).to(dtype)
    whole = whole.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    for cut in ((slice(1, 9), slice(3, 19)), (slice(0, 8), slice(0, 13)), (slice(2, 8), slice(None, None, 2))):
        x = whole[:, cut[0], 1:, cut[1]]
        y, indices = F.max_pool2d(x.to(device), 3, 2, 1, return_indices=True)
        true_y, true_indices = TF.max_pool2d(x, 3, 2, 1, return_indices=True)
        assert torch.equal(y.cpu(), true_y) and torch.equal(indices.cpu(), true_indices)
        assert torch.equal(F.max_pool2d(x.to(device), 3, 2, 1).cpu(), true_y)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("window", [(3, 2, 1, 1), (3, 1, 1, 1), (4, 2, 1, 1), (3, 1, 2, 2)], ids=str)
def test_a_pixel_adds_its_windows_in_the_order_of_its_taps(window, last, device):
    """A pixel's gradients are added to 0 from the last window to the first, bit for bit."""
    (K, S, P, D), size = window, (2, 8, 10, 12)
    pairs = [(n, n) for n in window]
    with tritonnet.backend("triton"):
        y, code = ops.max_pool2d(torch.randint(0, 2, size, device=device).float(), *pairs, False)
        dy = torch.randn_like(y) * torch.logspace(-3, 3, y.shape[3], device=device)
        dy[torch.rand_like(dy) < 0.2] = -0.0
        layout = torch.channels_last if last else torch.contiguous_format
        dx = ops.max_pool2d_scatter(dy, code.contiguous(memory_format=layout), size[2:], *pairs)
    true, (OH, OW) = torch.zeros(2, 8, 10 + 2 * P, 12 + 2 * P), y.shape[2:]
    dy, code = dy.cpu(), code.cpu()
    for kh in range(K):
        for kw in range(K):
            reached = true[:, :, kh * D :: S, kw * D :: S][:, :, :OH, :OW]
            reached += torch.where(code == kh * K + kw, dy, 0)
    true = true[:, :, P : P + 10, P : P + 12]
    assert torch.equal(dx.cpu().contiguous().view(torch.int32), true.contiguous().view(torch.int32))


def test_signed_zeros(backend, device):
    """They are equal, so that the first wins, with its sign."""
    x = torch.where(torch.rand(2, 8, 9, 12) < 0.5, 0.0, -0.0)
    for dtype in DTYPES:
        y, indices = F.max_pool2d(x.to(dtype).to(device), 3, 2, 1, return_indices=True)
        first = x.to(dtype).flatten(2).gather(2, indices.flatten(2).cpu()).view_as(y)
        assert torch.equal(indices.cpu(), TF.max_pool2d(x.abs(), 3, 2, 1, return_indices=True)[1])
        for result in (y, F.max_pool2d(x.to(dtype).to(device), 3, 2, 1)):
            assert torch.equal(result.cpu().signbit(), first.signbit())


class Called(TorchDispatchMode):
    """The names of the operators that are called below autograd."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names += [function._schema.name.partition("::")[2]] * (function.namespace == "tritonnet")
        return function(*args, **(kwargs or {}))


def test_codes_only_where_a_derivative_or_the_indices_need_them(backend, device):
    x = torch.randn(1, 2, 4, 4, device=device)
    leaf = x.clone().requires_grad_()

    def names(call):
        with Called() as called:
            call()
        return called.names

    def inferred():
        with torch.inference_mode():
            F.max_pool2d(leaf, 2)

    def forward_mode():
        with forward_ad.dual_level():
            F.max_pool2d(forward_ad.make_dual(x, x), 2)

    values, codes = ["max_pool2d_values"], ["max_pool2d"]
    assert names(lambda: F.max_pool2d(x, 2)) == values
    assert names(lambda: torch.no_grad()(F.max_pool2d)(leaf, 2)) == values
    assert names(inferred) == values
    assert names(lambda: torch.func.vmap(lambda t: F.max_pool2d(t, 2))(x[None])) == values
    assert names(lambda: F.max_pool2d(leaf, 2)) == codes
    assert names(lambda: F.max_pool2d(x, 2, return_indices=True)) == [*codes, "max_pool2d_indices"]
    assert names(forward_mode) == [*codes, "max_pool2d_gather"]
    gradient = torch.func.grad(lambda t: F.max_pool2d(t, 2).sum())
    assert names(lambda: gradient(x)) == [*codes, "max_pool2d_scatter"]
    assert names(lambda: torch.func.vmap(gradient)(x[None])) == [*codes, "max_pool2d_scatter"]


def test_code_is_narrow_and_indices_are_written_on_demand(device):
    from tritonnet.kernels import shapes

    for k, dtype in ((2, torch.uint8), (16, torch.uint8), (17, torch.int16), (181, torch.int16), (182, torch.int32)):
        _, code = shapes.max_pool2d(torch.empty(1, 1, 182, 182), (k, k), (k, k), (0, 0), (1, 1), False)
        assert code.dtype == dtype
    with tritonnet.count_launches() as launches:
        F.max_pool2d(torch.randn(1, 1, 4, 4, device=device), 2)
    assert launches == {"max_pool2d_forward_kernel": 1}


def test_names_of_torch(backend, device):
    x = torch.randn(2, 3, 6, 6, device=device)
    y, indices = F.max_pool2d_with_indices(x, 2)
    assert torch.equal(y, F.max_pool2d(x, 2)) and torch.equal(indices, F.max_pool2d(x, 2, return_indices=True)[1])
    assert torch.equal(x.flatten(2).gather(2, indices.flatten(2)).view_as(y), y)


def test_integers_are_torchs(backend):
    x = torch.randint(-9, 9, (2, 3, 6, 6))
    assert torch.equal(F.max_pool2d(x, 2), TF.max_pool2d(x, 2))

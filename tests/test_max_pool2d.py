"""max_pool2d against torch's eager CPU operator, bit for bit: values and indices; gradients against float64."""

import pytest
import torch
import torch.nn.functional as TF
from exact import DTYPES, assert_exact

import tritonnet.nn.functional as F

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
def test_case(case, dtype, backend, device):
    size, arguments = CASES[case]
    check(torch.randn(size).to(dtype), arguments, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
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


def test_code_is_narrow_and_indices_are_written_on_demand(device):
    import tritonnet
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

"""relu and relu_ against torch, bit for bit, in every dtype and layout."""

import pytest
import torch
import torch.nn.functional as TF
from exact import DTYPES

import tritonnet
import tritonnet.nn.functional as F

LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.permute(3, 1, 0, 2),
    "gaps": lambda t: t[:, ::2, 1:],
    "expanded": lambda t: t[:, :1].expand(-1, 4, -1, -1),
    "scalar": lambda t: t[0, 0, 0, 0],
    "empty": lambda t: t[:0],
}


def special(dtype, device):
    x = torch.randn(2, 4, 5, 6).to(dtype)
    for i, value in enumerate((0.0, -0.0, float("nan"), float("inf"), float("-inf"))):
        x[:, :, i % 5, i] = value
    return x.to(device)


def sign(t):
    """Distinguishes -0.0 from 0.0; the sign of a NaN means nothing."""
    return torch.signbit(t.detach()) & ~t.detach().isnan()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_relu(dtype, layout, backend, device):
    x = LAYOUTS[layout](special(dtype, device)).detach().requires_grad_()
    truth = x.detach().cpu().requires_grad_()
    y, true_y = F.relu(x), TF.relu(truth)
    assert y.stride() == true_y.stride()
    torch.testing.assert_close(y.cpu(), true_y, rtol=0, atol=0, equal_nan=True)
    # On a GPU torch turns -0.0 into 0.0, unlike on the CPU.
    if backend == "triton" or device.type == "cpu":
        assert torch.equal(sign(y).cpu(), sign(true_y))
    for dy in (torch.randn(true_y.shape).to(dtype), torch.ones((), dtype=dtype).expand(true_y.shape)):
        (dx,) = torch.autograd.grad(y, x, dy.to(device), retain_graph=True)
        (true_dx,) = torch.autograd.grad(true_y, truth, dy, retain_graph=True)
        torch.testing.assert_close(dx.cpu(), true_dx, rtol=0, atol=0)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "expanded"])
@pytest.mark.parametrize("call", [F.relu_, lambda x: F.relu(x, inplace=True)], ids=["relu_", "inplace=True"])
def test_in_place(layout, call, backend, device):
    base, true_base = (special(torch.float64, d).requires_grad_() for d in (device, "cpu"))
    true_base.data.copy_(base.data)
    x, true_x = (LAYOUTS[layout](t * 2) for t in (base, true_base))
    assert call(x) is x
    TF.relu_(true_x)
    torch.testing.assert_close(x.cpu(), true_x, rtol=0, atol=0, equal_nan=True)
    grads = [torch.autograd.grad((t * t).nansum(), b)[0] for t, b in ((x, base), (true_x, true_base))]
    torch.testing.assert_close(grads[0].cpu(), grads[1], equal_nan=True)


def test_in_place_overwrites_without_a_second_buffer(device):
    x = torch.randn(64, 64, device=device)
    address = x.data_ptr()
    with tritonnet.count_launches() as launches:
        F.relu_(x)
    assert x.data_ptr() == address and (x >= 0).all() and launches == {"relu_kernel": 1}


def test_in_place_is_refused_where_torch_refuses(backend, device):
    with pytest.raises(RuntimeError, match="leaf"):
        F.relu_(torch.randn(3, device=device, requires_grad=True))
    with pytest.raises(RuntimeError, match="single memory location"):
        F.relu_(torch.randn(1, 3, device=device).expand(2, 3))
    x = torch.randn(3, device=device, requires_grad=True)
    saved = x * 2
    y = saved.square()
    F.relu_(saved)
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()


def test_integers_are_torchs(backend):
    x = torch.tensor([-2, 0, 3])
    assert torch.equal(F.relu(x), TF.relu(x))
    assert torch.equal(F.relu_(x), torch.tensor([0, 0, 3])) and x[0] == 0

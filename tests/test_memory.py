"""No kernel leaves its tensors, no two programs meet in one address, and offsets pass 2^31 elements."""

import pytest
import torch

import tritonnet
import tritonnet.nn as nn
import tritonnet.nn.functional as F

# Backward passes with gradients for all inputs, in layouts with gaps where the name says so.
CALLS = {
    "conv2d flat": lambda t: F.conv2d(t(2, 3, 9, 8), t(5, 3, 3, 3), t(5), 2, 1),
    "conv2d by taps": lambda t: F.conv2d(t(2, 18, 7, 6), t(17, 18, 3, 2), t(17), 1, (1, 2), (1, 2)),
    "conv2d grouped": lambda t: F.conv2d(t(2, 6, 7, 6), t(4, 3, 3, 3), t(4), (1, 2), groups=2),
    "conv2d many tiles": lambda t: F.conv2d(t(3, 20, 12, 11), t(40, 20, 3, 3), t(40)),
    "conv2d depthwise": lambda t: F.conv2d(t(2, 10, 7, 6), t(20, 1, 3, 2), t(20), 2, 1, groups=10),
    "conv2d reflect": lambda t: F._conv2d(t(2, 4, 5, 6), t(3, 4, 3, 3), t(3), 2, (2, 1), 1, 1, "reflect"),
    "conv2d circular depthwise": lambda t: F._conv2d(t(2, 4, 5, 6), t(4, 1, 3, 3), t(4), 1, (5, 6), 1, 4, "circular"),
    "max_pool2d": lambda t: F.max_pool2d(t(2, 5, 11, 9), 3, 2, 1, ceil_mode=True),
    "max_pool2d dilated": lambda t: F.max_pool2d(t(2, 5, 11, 9), (2, 3), (3, 1), 1, 2, return_indices=True)[0],
    "relu": lambda t: F.relu(t(31, 33)),
    "relu in place": lambda t: F.relu_(t(31, 33) * 1),
    "linear": lambda t: F.linear(t(70, 40), t(33, 40), t(33)),
    "linear, zero features": lambda t: F.linear(t(70, 0), t(33, 0), t(33)),
}


def contiguous(*size):
    return torch.randn(size, requires_grad=True)


def channels_last(*size):
    t = torch.randn(size)
    return (t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t).requires_grad_()


def gaps(*size):
    """Every second element of a larger tensor."""
    return torch.randn([2 * n + 1 for n in size])[tuple(slice(1, None, 2) for _ in size)].requires_grad_()


@pytest.mark.parametrize("make", [contiguous, channels_last, gaps], ids=lambda f: f.__name__)
@pytest.mark.parametrize("call", CALLS)
def test_no_stray_access_and_no_race(call, make):
    """The watch that every test runs under is all that is asserted, on layouts that other tests have less of."""
    with tritonnet.count_launches() as launches:
        y = CALLS[call](make)
        y.backward(gaps(*y.shape).detach())
    assert launches


def far_apart(size, device, dtype=torch.float16):
    """An (2, C, H, W) tensor whose second image starts past 2^31 elements; untouched pages take no memory."""
    inner = size[1] * size[2] * size[3]
    gap = 2**31 + 64
    storage = torch.empty(gap + inner, dtype=dtype, device=device)
    return storage.as_strided(size, (gap, size[2] * size[3], size[3], 1)).copy_(torch.randn(size))


def test_offsets_past_32_bits(device, unpoisoned):
    x = far_apart((2, 4, 6, 6), device).requires_grad_()
    near = x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    w = torch.randn(4, 4, 3, 3, device=device).half()
    depthwise = torch.randn(4, 1, 3, 3, device=device).half()
    for call in (
        lambda t: F.conv2d(t, w, padding=1),
        lambda t: F.conv2d(t, depthwise, groups=4),
        lambda t: F.max_pool2d(t, 2),
        lambda t: F.relu(t),
        lambda t: F.linear(t, w[:, 0, 0].repeat(1, 2)),
    ):
        results = []
        for t in (x, near):
            y = call(t)
            results.append((y, *torch.autograd.grad(y, t, torch.ones_like(y))))
        torch.testing.assert_close(*results, rtol=0, atol=0)
    # Weight gradients and results that lie far apart.
    dy = far_apart((2, 4, 6, 6), device)
    for groups, weight in ((1, w), (4, depthwise)):
        grads = []
        for t, g in ((x, dy), (near, dy.clone(memory_format=torch.contiguous_format))):
            v = weight.clone().requires_grad_()
            F.conv2d(t.detach(), v, padding=1, groups=groups).backward(g)
            grads.append(v.grad)
        torch.testing.assert_close(*grads, rtol=0, atol=0)
    with torch.no_grad():
        assert torch.equal(F.relu_(x.detach()), torch.relu(near))


def test_strides_of_32_bits_whose_multiples_are_longer(device, unpoisoned):
    """Channels 2^30 elements apart: each factor of an offset fits 32 bits, the offset of the third channel does not."""
    size = (2, 3, 6, 6)
    storage = torch.empty(2**31 + 72, dtype=torch.float16, device=device)
    x = storage.as_strided(size, (36, 2**30, 6, 1)).copy_(torch.randn(size))
    near = x.clone(memory_format=torch.contiguous_format)
    w = torch.randn(4, 3, 3, 3, device=device).half()
    pixels = torch.randn(size, device=device).half().requires_grad_()
    for call in (
        lambda t: F.conv2d(t, w, padding=1),
        lambda t: F.conv2d(t, w[:3, :1], groups=3),
        lambda t: F.max_pool2d(t, 2),
        lambda t: torch.autograd.grad(F.conv2d(pixels, w[:3], padding=1), pixels, t)[0],
    ):
        torch.testing.assert_close(call(x), call(near), rtol=0, atol=0)


def test_index_type():
    import triton.language as tl

    from tritonnet.kernels._common import index_type

    small, huge = torch.empty(10, device="meta"), torch.empty(2**31, device="meta", dtype=torch.uint8)
    assert index_type(small) is tl.int32 and index_type(small, huge) is tl.int64
    assert index_type(huge[:4]) is tl.int64 and index_type(small[:1].expand(2**31)) is tl.int64


def test_same_bits_every_time(device):
    """Split sums are added in a fixed order; the memory in between starts out as NaN."""
    model = nn.Sequential(
        nn.Conv2d(3, 20, 3), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(20, 4, 3), nn.Flatten(), nn.Linear(100, 5)
    ).to(device)  # fmt: skip
    x = torch.randn(5, 3, 17, 17, device=device)
    runs = []
    for _ in range(3):
        model.zero_grad()
        y = model(x)
        y.square().sum().backward()
        runs.append([y, *(p.grad.clone() for p in model.parameters())])
    for run in runs[1:]:
        assert all(map(torch.equal, run, runs[0]))

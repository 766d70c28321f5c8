"""No kernel accesses memory outside its tensors, and no two programs race."""

import pytest
import torch
from conftest import DEVICE

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
    "conv2d_relu": lambda t: F.conv2d_relu(t(2, 18, 7, 6), t(17, 18, 3, 2), t(17)),
    "conv2d_relu of images": lambda t: F.conv2d_relu(t(3, 3, 9, 8).detach(), t(35, 3, 3, 3), t(35), (1, 2), 1),
    "conv2d_relu_max_pool2d flat": lambda t: F.conv2d_relu_max_pool2d(t(3, 3, 13, 12), t(5, 3, 3, 3), t(5), padding=1),
    "conv2d_relu_max_pool2d by taps": lambda t: F.conv2d_relu_max_pool2d(
        t(2, 20, 9, 9), t(40, 20, 3, 3), t(40), pool_kernel_size=3, pool_stride=2, pool_padding=1
    ),
    "conv2d_relu_max_pool2d ceil_mode": lambda t: F.conv2d_relu_max_pool2d(
        t(2, 3, 9, 8), t(5, 3, 3, 3), t(5), pool_kernel_size=3, pool_stride=2, pool_ceil_mode=True
    ),
    "conv2d_relu_max_pool2d grouped": lambda t: F.conv2d_relu_max_pool2d(t(2, 6, 9, 6), t(4, 3, 3, 3), groups=2),
    "cross_entropy": lambda t: F.cross_entropy(t(70, 90), torch.arange(70, device=DEVICE), t(90).detach().abs()),
    "cross_entropy of each row": lambda t: F.cross_entropy(
        t(70, 90), torch.arange(70, device=DEVICE), reduction="none", label_smoothing=0.1
    ),
    "linear_relu": lambda t: F.linear_relu(t(70, 40), t(33, 40), t(33)),
    "linear_chain": lambda t: F.linear_chain(t(70, 90), [t(33, 90), t(20, 33), t(65, 20)], [t(33), None, t(65)]),
    "conv2d reflect": lambda t: F._conv2d(t(2, 4, 5, 6), t(3, 4, 3, 3), t(3), 2, (2, 1), 1, 1, "reflect"),
    "conv2d circular depthwise": lambda t: F._conv2d(t(2, 4, 5, 6), t(4, 1, 3, 3), t(4), 1, (5, 6), 1, 4, "circular"),
    "max_pool2d": lambda t: F.max_pool2d(t(2, 5, 11, 9), 3, 2, 1, ceil_mode=True),
    "max_pool2d, pairs of columns": lambda t: F.max_pool2d(t(2, 3, 9, 28), 3, 2, 1),
    "max_pool2d dilated": lambda t: F.max_pool2d(t(2, 5, 11, 9), (2, 3), (3, 1), 1, 2, return_indices=True)[0],
    "avg_pool2d": lambda t: F.avg_pool2d(t(2, 5, 11, 9), 3, 2, 1, True, False),
    "avg_pool2d, pairs of columns": lambda t: F.avg_pool2d(t(2, 3, 9, 28), 3, 2, 1),
    "avg_pool2d, large": lambda t: F.avg_pool2d(t(2, 5, 11, 9), (6, 5), 3, 2, True),
    "adaptive_avg_pool2d": lambda t: F.adaptive_avg_pool2d(t(2, 5, 11, 9), (4, 10)),
    "adaptive_avg_pool2d, whole images": lambda t: F.adaptive_avg_pool2d(t(3, 70, 7, 7), 1),
    "relu": lambda t: F.relu(t(31, 33)),
    "relu in place": lambda t: F.relu_(t(31, 33) * 1),
    "conv2d_epilogue": lambda t: F.conv2d_epilogue(
        t(2, 18, 7, 6), t(17, 18, 3, 2), t(17), scale=t(17), residual=t(2, 17, 5, 5), activation="silu"
    ),
    "conv2d_epilogue of images": lambda t: F.conv2d_epilogue(
        t(3, 3, 9, 8), t(35, 3, 3, 3), None, (1, 2), 1, shift=t(35), residual=t(3, 35, 9, 4), activation="relu6"
    ),
    "conv2d_epilogue depthwise": lambda t: F.conv2d_epilogue(
        t(2, 10, 7, 6), t(10, 1, 3, 3), t(10), 1, 1, groups=10, mean=t(10), residual=t(2, 10, 7, 6)
    ),
    "linear_epilogue": lambda t: F.linear_epilogue(
        t(70, 40), t(33, 40), t(33), mean=t(33), shift=t(33), residual=t(70, 33), activation="gelu"
    ),
    "epilogue": lambda t: F.epilogue(
        t(2, 33, 3, 7), mean=t(33), scale=t(33), shift=t(33), residual=t(2, 33, 3, 7), activation="hardswish"
    ),
    "batch_norm": lambda t: F.batch_norm_epilogue(
        t(3, 35, 7, 5), *t(2, 35).detach().abs(), t(35), t(35), True, activation="relu"
    ),
    "batch_norm, residual": lambda t: F.batch_norm_epilogue(
        t(2, 8, 9, 4), None, None, t(8), None, True, residual=t(2, 8, 9, 4), activation="relu6"
    ),
    "batch_norm of rows": lambda t: F.batch_norm(t(70, 33), None, None, t(33), t(33), True),
    "leaky_relu in place": lambda t: F.leaky_relu_(t(31, 33) * 1, 0.1),
    "squeeze_excite": lambda t: F.squeeze_excite(t(3, 35, 7, 5), t(9, 35), t(9), t(35, 9), t(35)),
    "linear": lambda t: F.linear(t(70, 40), t(33, 40), t(33)),
    "linear, zero features": lambda t: F.linear(t(70, 0), t(33, 0), t(33)),
}


def contiguous(*size):
    return torch.randn(size, device=DEVICE, requires_grad=True)


def channels_last(*size):
    t = torch.randn(size, device=DEVICE)
    return (t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t).requires_grad_()


def gaps(*size):
    """Every second element of a larger tensor."""
    wide = torch.randn([2 * n + 1 for n in size], device=DEVICE)
    return wide[tuple(slice(1, None, 2) for _ in size)].requires_grad_()


@pytest.mark.parametrize("make", [contiguous, channels_last, gaps], ids=lambda f: f.__name__)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.sampled(3)
def test_no_stray_access_and_no_race(call, make):
    """Asserts nothing beyond the watch of every test, on layouts that other tests have less of."""
    with tritonnet.count_launches() as launches:
        y = CALLS[call](make)
        y.backward(gaps(*y.shape).detach())
    assert launches


def test_index_type():
    import triton.language as tl

    from tritonnet.kernels._common import index_type

    small, huge = torch.empty(10, device="meta"), torch.empty(2**31, device="meta", dtype=torch.uint8)
    assert index_type(small) is tl.int32 and index_type(small, huge) is tl.int64
    assert index_type(huge[:4]) is tl.int32 and index_type(huge[:: 2**31 - 1]) is tl.int64
    assert index_type(small[:1].expand(2**31)) is tl.int64


def test_same_bits_every_time(device):
    """Split sums are added in a fixed order; new memory starts out as NaN."""
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

"""Any geometry that torch takes gives torch's results, and any that it refuses is refused."""

import pytest
import torch
from conftest import DEVICE

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tritonnet.nn.functional as F
from bench import unfused as TF

settings.register_profile(
    "tritonnet", max_examples=60, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
settings.load_profile("tritonnet")

sizes = st.integers(1, 9)


def pairs(least, most):
    return st.tuples(st.integers(least, most), st.integers(least, most))


layouts = st.sampled_from(["contiguous", "channels_last", "transposed", "sliced"])


def lay_out(t, layout):
    if layout == "channels_last":
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return t.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "sliced":
        return torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0]
    return t


def compare(call, inputs):
    """Compares torch with ours: the same values and gradients, or the same type of exception."""
    outcomes = []
    for f, device in ((F, DEVICE), (TF, "cpu")):
        leaves = [t.to(device).detach().requires_grad_() for t in inputs]
        try:
            y = call(f, *leaves)
        except RuntimeError as e:
            outcomes.append(type(e))
            continue
        dy = torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=device).view(y.shape)
        outcomes.append([t.cpu() for t in (y.detach(), *torch.autograd.grad(y, leaves, dy))])
    if isinstance(outcomes[1], list):
        assert isinstance(outcomes[0], list), "we raise where torch does not"
        torch.testing.assert_close(*outcomes)
    else:
        assert outcomes[0] is outcomes[1]


@given(
    batch=st.integers(1, 3), groups=st.integers(1, 3), C=st.integers(1, 4), OC=st.integers(1, 3),
    size=st.tuples(sizes, sizes), kernel=pairs(1, 4), stride=pairs(1, 4), padding=pairs(0, 4), dilation=pairs(1, 3),
    layout=layouts, w_layout=layouts,
)  # fmt: skip
def test_conv2d(batch, groups, C, OC, size, kernel, stride, padding, dilation, layout, w_layout):
    x = lay_out(torch.randn(batch, C * groups, *size).double(), layout)
    w = lay_out(torch.randn(OC * groups, C, *kernel).double(), w_layout)
    compare(lambda f, x, w: f.conv2d(x, w, None, stride, padding, dilation, groups), (x, w))


@given(
    batch=st.integers(1, 3), C=st.integers(1, 4), size=st.tuples(sizes, sizes), kernel=pairs(1, 4), stride=pairs(1, 4),
    padding=pairs(0, 2), dilation=pairs(1, 3), ceil_mode=st.booleans(), layout=layouts,
)  # fmt: skip
def test_max_pool2d(batch, C, size, kernel, stride, padding, dilation, ceil_mode, layout):
    # Few distinct values, so that ties are common.
    x = lay_out(torch.randint(0, 4, (batch, C, *size)).double(), layout)
    compare(lambda f, x: f.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode), (x,))


@given(
    C=st.integers(1, 3), size=pairs(3, 9), kernel=pairs(1, 3), stride=pairs(1, 2), padding=pairs(0, 1),
    pool_kernel=pairs(1, 3), pool_stride=pairs(1, 4), pool_padding=st.sampled_from([(0, 0), (0, 0), (1, 1), (0, 1)]),
    ceil_mode=st.sampled_from([True, True, False]), layout=layouts,
)  # fmt: skip
def test_conv2d_relu_max_pool2d(
    C, size, kernel, stride, padding, pool_kernel, pool_stride, pool_padding, ceil_mode, layout
):
    """Sums of integers are exact, and ties are common."""
    x, w, b = (torch.randint(-2, 3, s).double() for s in ((2, C, *size), (3, C, *kernel), (3,)))
    pool = dict(zip(("pool_kernel_size", "pool_stride", "pool_padding"), (pool_kernel, pool_stride, pool_padding)))
    compare(
        lambda f, *t: f.conv2d_relu_max_pool2d(*t, stride=stride, padding=padding, **pool, pool_ceil_mode=ceil_mode),
        (lay_out(x, layout), w, b),
    )


@given(leading=st.lists(st.integers(0, 4), max_size=3), K=st.integers(0, 40), N=st.integers(0, 40), bias=st.booleans())
def test_linear(leading, K, N, bias):
    inputs = [
        torch.randn(*leading, K).double(),
        torch.randn(N, K).double(),
        *([torch.randn(N).double()] if bias else []),
    ]
    compare(lambda f, *inputs: f.linear(*inputs), inputs)


@given(size=st.lists(st.integers(0, 6), max_size=5))
def test_relu(size):
    compare(lambda f, x: f.relu(x), (torch.randn(size).double(),))

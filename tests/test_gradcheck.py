"""gradcheck and gradgradcheck in float64 through the kernels, with forward-mode derivatives."""

import pytest
import torch
from conftest import THOROUGH
from torch.autograd import gradcheck, gradgradcheck

import tritonnet
import tritonnet.nn.functional as F
from tritonnet import ops


def draw(*size):
    return torch.randn(size, dtype=torch.float64)


def distinct(*size):
    """Values far enough apart that no step of a numeric derivative changes which one is the largest."""
    n = torch.Size(size).numel()
    return torch.randperm(n).double().view(size) / n


def images(like):
    """Images that need no gradient."""
    return (torch.arange(24, device=like.device).to(like) % 5 - 2).view(1, 2, 4, 3)


def norm_conv2d(x, scale, shift, w, b):
    norm, geometry = (scale, shift, 0.1, "silu", 0.0), ((1, 1), (1, 0, 0, 1), (1, 1), 1, "zeros")
    return ops.norm_conv2d(x, *ops.batch_statistics(x), *norm, w, b, *geometry, None, None, 0.0, False)[0]


# name: function, its inputs
CASES = {
    "conv2d": (lambda x, w, b: F.conv2d(x, w, b, padding=1), (draw, (1, 2, 4, 3), (2, 2, 3, 2), (2,))),
    "conv2d strided, dilated, grouped": (
        lambda x, w, b: F.conv2d(x, w, b, (2, 1), (1, 2), (1, 2), 2), (draw, (1, 4, 5, 4), (2, 2, 2, 2), (2,)),
    ),
    "conv2d without bias": (lambda x, w: F.conv2d(x, w, stride=2), (draw, (1, 1, 5, 4), (2, 1, 2, 2))),
    "conv2d depthwise": (
        lambda x, w, b: F.conv2d(x, w, b, 2, 1, groups=2), (draw, (1, 2, 4, 5), (4, 1, 3, 2), (4,)),
    ),
    "batch_norm": (lambda x, w, b: F.batch_norm(x, None, None, w, b, True), (draw, (3, 2, 2), (2,), (2,))),
    "batch_norm_epilogue": (
        lambda x, b, r: F.batch_norm_epilogue(x, None, None, None, b, True, residual=r, activation="sigmoid"),
        (draw, (2, 2, 1, 2), (2,), (2, 2, 1, 2)),
    ),
    "norm_conv2d": (lambda *tensors: norm_conv2d(*tensors), (draw, (2, 2, 3, 2), (2,), (2,), (3, 2, 2, 1), (3,))),
    "conv2d circular": (
        lambda x, w, b: F._conv2d(x, w, b, 1, (1, 2), 1, 1, "circular"), (draw, (1, 2, 3, 4), (2, 2, 3, 2), (2,)),
    ),
    "max_pool2d": (lambda x: F.max_pool2d(x, 3, 2, 1), (distinct, (1, 2, 5, 4))),
    "max_pool2d dilated, ceil_mode": (
        lambda x: F.max_pool2d(x, 2, (1, 2), 1, (2, 1), True), (distinct, (1, 2, 5, 4)),
    ),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 3, 2, 1, True, False), (draw, (1, 1, 4, 5))),
    "avg_pool2d of a large window": (lambda x: F.avg_pool2d(x, (4, 5), 3, 2), (draw, (1, 1, 3, 4))),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, (3, 2)), (draw, (1, 1, 5, 3))),
    "adaptive_avg_pool2d, whole images": (lambda x: F.adaptive_avg_pool2d(x, 1), (draw, (2, 2, 2, 2))),
    "conv2d_relu": (lambda x, w, b: F.conv2d_relu(x, w, b, padding=1), (draw, (1, 2, 3, 3), (2, 2, 3, 2), (2,))),
    "conv2d_relu of images": (lambda w, b: F.conv2d_relu(images(w), w, b, padding=1), (draw, (2, 2, 3, 2), (2,))),
    "conv2d_relu_weight_grad": (
        lambda dy, x: ops.conv2d_relu_weight_grad(
            dy, images(dy), x, (2, 2, 2, 2), (1, 1), (0,) * 4, (1, 1), 1, "zeros", True
        ),
        (draw, (1, 2, 4, 3), (1, 2, 5, 4)),
    ),
    "conv2d_relu_max_pool2d": (
        lambda x, w, b: F.conv2d_relu_max_pool2d(x, w, b, padding=1), (draw, (1, 2, 5, 4), (2, 2, 3, 2), (2,)),
    ),
    "conv2d_relu_max_pool2d, overlapping": (
        lambda x, w, b: F.conv2d_relu_max_pool2d(
            x, w, b, 1, 1, 2, 2, pool_kernel_size=3, pool_stride=2, pool_padding=1
        ),
        (draw, (1, 2, 3, 3), (2, 1, 2, 2), (2,)),
    ),
    "conv2d_relu_max_pool2d, ceil_mode": (
        lambda x, w, b: F.conv2d_relu_max_pool2d(x, w, b, pool_kernel_size=3, pool_stride=2, pool_ceil_mode=True),
        (draw, (1, 1, 5, 4), (2, 1, 2, 2), (2,)),
    ),
    "cross_entropy": (
        lambda x: F.cross_entropy(x, torch.tensor([1, 3, 0], device=x.device), label_smoothing=0.2), (draw, (3, 4)),
    ),
    "cross_entropy of each row": (
        lambda x: F.cross_entropy(x, torch.tensor([1, 3, -100], device=x.device), reduction="none"), (draw, (3, 4)),
    ),
    "cross_entropy_grad": (
        lambda dloss, grad: ops.cross_entropy_grad(dloss, grad, torch.tensor([1, 3, -100], device=grad.device), -100),
        (draw, (), (3, 4)),
    ),
    "cross_entropy_grad of each row": (
        lambda dloss, grad: ops.cross_entropy_grad(dloss, grad, torch.tensor([1, 3, -100], device=grad.device), -100),
        (draw, (3,), (3, 4)),
    ),
    "linear_relu": (F.linear_relu, (draw, (2, 3, 4), (3, 4), (3,))),
    "linear_chain": (
        lambda x, w1, b1, w2, w3, b3: F.linear_chain(x, (w1, w2, w3), (b1, None, b3)),
        (draw, (1, 3), (2, 3), (2,), (2, 2), (1, 2), (1,)),
    ),
    "conv2d_epilogue": (
        lambda x, w, b, scale, shift, residual: F.conv2d_epilogue(
            x, w, b, padding=1, scale=scale, shift=shift, residual=residual, activation="silu"
        ),
        (draw, (1, 2, 3, 3), (2, 2, 3, 2), (2,), (2,), (2,), (1, 2, 3, 4)),
    ),
    "linear_epilogue": (
        lambda x, w, mean, scale, residual: F.linear_epilogue(
            x, w, mean=mean, var=torch.arange(1.0, 4.0).to(x), scale=scale, residual=residual, activation="sigmoid"
        ),
        (draw, (2, 4), (3, 4), (3,), (3,), (2, 3)),
    ),
    "epilogue": (
        lambda x, mean, var, scale, shift: F.epilogue(
            x, mean=mean, var=var, scale=scale, shift=shift, eps=1.1, activation="gelu"
        ),
        (distinct, (2, 3, 2, 2), (3,), (3,), (3,), (3,)),
    ),
    "squeeze_excite": (
        lambda x, w1, b1, w2: F.squeeze_excite(x, w1, b1, w2, None, "silu"),
        (draw, (2, 3, 2, 2), (2, 3), (2,), (3, 2)),
    ),
    "relu": (F.relu, (draw, (3, 4))),
    "relu6": (lambda x: F.relu6(9 * x - 1.3), (distinct, (3, 4))),
    "leaky_relu, negative": (lambda x: F.leaky_relu(x, -0.5), (draw, (3, 4))),
    "silu in place": (lambda x: F.silu(x * 1, inplace=True), (draw, (3, 4))),
    "leaky_relu in place": (lambda x: F.leaky_relu_(x * 1), (draw, (3, 4))),
    "hardswish": (lambda x: F.hardswish(3 * x), (draw, (3, 4))),
    "gelu, tanh": (lambda x: F.gelu(x, approximate="tanh"), (draw, (3, 4))),
    "hardsigmoid": (lambda x: F.hardsigmoid(3 * x), (draw, (3, 4))),
    "relu in place": (lambda x: F.relu_(x * 1), (draw, (3, 4))),
    "linear": (F.linear, (draw, (2, 3, 4), (3, 4), (3,))),
    "linear of a vector": (F.linear, (draw, (4,), (3, 4))),
}  # fmt: skip


# Every element of a Jacobian takes a launch or more. An element that is wrong is found in random directions, too.
ELEMENTS = [case for case in CASES if not case.endswith(("epilogue", "squeeze_excite"))]
ELEMENTS = ELEMENTS if THOROUGH else ["conv2d without bias", "cross_entropy", "relu", "linear"]


def leaves(case, device):
    function, (values, *sizes) = CASES[case]
    return function, [values(*size).to(device).requires_grad_() for size in sizes]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.sampled(3)
def test_gradcheck(case, device):
    """Jacobians backward and forward: every element of those in ELEMENTS, random directions of the others."""
    function, inputs = leaves(case, device)
    with tritonnet.count_launches() as launches:
        assert gradcheck(function, inputs, check_forward_ad=True, fast_mode=case not in ELEMENTS)
    assert launches


@pytest.mark.parametrize("case", CASES)
def test_gradgradcheck(case, device):
    """Second derivatives, backward over backward, in random directions.

    They are operators' results again; on the kernels test_citizenship.py compares them with torch's.
    """
    function, inputs = leaves(case, device)
    with tritonnet.backend("triton" if THOROUGH else "reference"):
        assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("case", ["conv2d strided, dilated, grouped", "max_pool2d", "relu", "linear", "linear_chain"])
def test_every_element_of_second_derivatives(case, device):
    with tritonnet.backend("reference"):
        function, inputs = leaves(case, device)
        assert gradgradcheck(function, inputs, check_fwd_over_rev=True)


def test_third_derivatives(device):
    x, w = draw(1, 1, 4, 4).to(device).requires_grad_(), draw(2, 1, 2, 2).to(device).requires_grad_()
    y = F.conv2d(x, w).pow(4).sum()
    true_y = torch.nn.functional.conv2d(x, w).pow(4).sum()
    for _ in range(3):
        y, true_y = (torch.autograd.grad(t, w, create_graph=True)[0].pow(2).sum() for t in (y, true_y))
    torch.testing.assert_close(y, true_y)


def test_forward_mode_tangents_of_a_bias_alone(device):
    """A tangent of the bias alone must not be dropped as zero."""
    import torch.autograd.forward_ad as fwAD

    x, w, b = draw(1, 2, 3, 3).to(device), draw(4, 2, 2, 2).to(device), draw(4).to(device)
    with fwAD.dual_level():
        y = F.conv2d(x, w, fwAD.make_dual(b, torch.ones_like(b)))
        assert (fwAD.unpack_dual(y).tangent == 1).all()
        y = F.linear(x[0, 0], w[:, 0, 0, :1].expand(4, 3), fwAD.make_dual(b, torch.ones_like(b)))
        assert (fwAD.unpack_dual(y).tangent == 1).all()

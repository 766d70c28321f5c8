"""Epilogues of convolutions and products, and alone, against float64: values and the gradient of every tensor."""

import math
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from exact import ROUNDOFF, SUM

import tritonnet
import tritonnet.nn.functional as F
from bench import unfused
from tritonnet.kernels import activations, product

HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64
NCHW, LAST = torch.contiguous_format, torch.channels_last
VECTORS = "mean", "var", "scale", "shift"
PARTS = *VECTORS, "residual"
SLOPE = 0.3
# No activation's first derivative exceeds 1.13 (gelu's), and no second one 0.8 (gelu's) where it exists.
STEEPEST, MOST_CURVED = 1.13, 0.8
# Where first derivatives jump.
KINKS = {"relu": (0,), "leaky_relu": (0,), "relu6": (0, 6), "hardswish": (-3, 3), "hardsigmoid": (-3, 3)}
# In units of the sums' roundoff, what an epilogue and an activation add: a quotient, a root, products, sums, a power.
STEPS = 24


class Case(NamedTuple):
    """A call: the kernel that serves it, its sizes and activation, the layouts of input and residual, the dtypes."""

    function: str
    kernel: str
    sizes: tuple
    activation: str
    layouts: tuple = (NCHW, NCHW)
    dtypes: tuple = (SINGLE, SINGLE)
    """Of the input, and of the vectors over the channels."""
    arguments: Any = {}
    parts: tuple = ("bias", *PARTS)


CASES = {
    "conv2d": Case(
        "conv2d_epilogue", "conv2d_forward", ((2, 18, 7, 6), (20, 18, 3, 3)), "silu", (NCHW, LAST),
        arguments={"stride": 2, "padding": 1},
    ),
    "conv2d, channels_last": Case(
        "conv2d_epilogue", "conv2d_forward", ((2, 18, 7, 6), (20, 18, 3, 2)), "relu6", (LAST, NCHW), (HALF, SINGLE),
    ),
    "conv2d, grouped, unbatched": Case(
        "conv2d_epilogue", "conv2d_forward", ((4, 7, 6), (6, 2, 3, 3)), "gelu", dtypes=(DOUBLE, SINGLE),
        arguments={"groups": 2}, parts=("scale", "shift"),
    ),
    "conv2d, few channels": Case(
        "conv2d_epilogue", "few_channels_product", ((2, 3, 9, 11), (20, 3, 3, 3)), "leaky_relu", (LAST, NCHW),
        (HALF, SINGLE), {"padding": 1},
    ),
    "conv2d, few channels in float32": Case(
        "conv2d_epilogue", "few_channels_lanes", ((2, 3, 9, 11), (5, 3, 3, 3)), "gelu", (NCHW, LAST),
        arguments={"stride": (1, 2)},
    ),
    "conv2d, depthwise": Case(
        "conv2d_epilogue", "depthwise_forward", ((2, 8, 9, 7), (8, 1, 3, 3)), "hardswish", (LAST, NCHW), (HALF, HALF),
        {"padding": 1, "groups": 8},
    ),
    "conv2d, depthwise, NCHW": Case(
        "conv2d_epilogue", "depthwise_forward", ((2, 3, 6, 12), (6, 1, 3, 3)), "relu", (NCHW, LAST),
        arguments={"padding": 1, "groups": 3},
    ),
    "conv2d, descriptors": Case(
        "conv2d_epilogue", "product", ((2, 24, 5, 7), (40, 24, 1, 1)), "gelu_tanh", (LAST, NCHW), (HALF, SINGLE),
    ),
    "conv2d, descriptors, NCHW": Case(
        "conv2d_epilogue", "product", ((2, 24, 4, 8), (40, 24, 1, 1)), "sigmoid", (NCHW, LAST), (HALF, HALF),
        parts=("mean", "var", "residual"),
    ),
    "linear": Case("linear_epilogue", "linear_forward", ((7, 10, 19), (33, 19)), "sigmoid"),
    "linear, descriptors": Case(
        "linear_epilogue", "product", ((37, 24), (40, 24)), "hardsigmoid", dtypes=(HALF, SINGLE),
    ),
    "alone": Case("epilogue", "epilogue", ((3, 7, 5, 4),), "hardsigmoid", (NCHW, LAST), parts=PARTS),
    "alone, channels_last": Case(
        "epilogue", "epilogue", ((3, 7, 5, 4),), "silu", (LAST, NCHW), (HALF, SINGLE), parts=PARTS,
    ),
    "alone, rows": Case("epilogue", "epilogue", ((9, 70),), "none", parts=PARTS),
}  # fmt: skip
# Each part alone, and all but one.
for part, activation in zip(PARTS, ("gelu_tanh", "relu6", "hardswish", "silu", "none")):
    CASES[f"alone, {part}"] = Case("epilogue", "epilogue", ((2, 3, 4, 5),), "leaky_relu", parts=(part,))
    others = tuple(p for p in PARTS if p != part)
    CASES[f"alone, no {part}"] = Case("epilogue", "epilogue", ((2, 3, 4, 5),), activation, parts=others)


def test_every_activation_is_here():
    assert {case.activation for case in CASES.values()} == set(activations.NAMES)


def gaps(t):
    """The same values as every second element of a longer vector."""
    return torch.stack([t, t], 1)[:, 0]


def inputs(case):
    """{name: (tensor in float64 that holds values of its dtype, function that lays it out)}, and dy."""
    (dtype, of_vectors), (layout, of_residual) = case.dtypes, case.layouts
    size, *weight = case.sizes
    found = {"input": torch.randn(size) * 2}
    if weight:
        found["weight"] = torch.randn(weight[0]) * (4 / math.prod(weight[0][1:])) ** 0.5
    y = getattr(unfused, case.function)(*found.values(), **case.arguments)
    channels = weight[0][:1] if weight else size[1:2]
    if weight and "bias" in case.parts:
        found["bias"] = torch.randn(channels)
    made = {
        "mean": torch.randn(channels), "var": torch.rand(channels) + 0.5, "scale": torch.randn(channels),
        "shift": torch.randn(channels), "residual": torch.randn(y.shape) * 2,
    }  # fmt: skip
    found |= {name: made[name] for name in PARTS if name in case.parts}

    def laid_out(name, t):
        if name in VECTORS:
            return gaps(t.to(of_vectors))
        t = t.to(dtype)
        return t.contiguous(memory_format=of_residual if name == "residual" else layout) if t.dim() == 4 else t

    dtypes = {name: of_vectors if name in VECTORS else dtype for name in found}
    return {name: t.to(dtypes[name]).double() for name, t in found.items()}, laid_out, torch.randn(y.shape)


def differentiated(function, tensors, dy):
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    y = function(**leaves)
    return y.detach(), dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy)))


def assert_within(name, actual, truth, bound):
    excess = (actual.detach().cpu().double() - truth).abs() - bound
    assert excess.isfinite().all() and (excess <= 0).all(), f"{name}: over the bound by {excess.max():.3g}"


@pytest.mark.parametrize("name", CASES)
def test_against_float64(name, backend, device, full_precision):
    """Each result within what rounding explains.

    The derivative's argument is off by the rounding of sums and, where backward reads it from memory, of the format.
    Where that may cross a kink of the activation, its derivative may be off by as much as it jumps.
    """
    case = CASES[name]
    tensors, laid_out, dy = inputs(case)
    dtype, dtypes = case.dtypes[0], {part: case.dtypes[part in VECTORS] for part in tensors}
    dy = dy.to(dtype).double()
    options = {"activation": case.activation, "slope": SLOPE, "eps": 0.01, **case.arguments}
    with mock.patch.object(product, "LARGE", 1 if case.kernel == "product" else product.LARGE):
        with tritonnet.count_launches() as launches:
            ours = {part: laid_out(part, t).to(device) for part, t in tensors.items()}
            y, gradients = differentiated(
                lambda **t: getattr(F, case.function)(**t, **options), ours, dy.to(device, dtype)
            )
    assert (f"{case.kernel}_kernel" in launches) == (backend == "triton")

    call = getattr(unfused, case.function)
    truth, true_gradients = differentiated(lambda **t: call(**t, **options), tensors, dy)
    options["activation"] = "none"
    z = call(**tensors, **options).requires_grad_()
    (dz,) = torch.autograd.grad(unfused.epilogue(z, activation=case.activation, slope=SLOPE), z, dy)
    sizes = {part: -t.abs() if part == "mean" else t.abs() for part, t in tensors.items()}
    size = call(**sizes, **options)
    weight = tensors.get("weight", torch.ones(1, 1))
    channels = len(weight) if case.sizes[1:] else y.shape[1]
    # The reference rounds the sums before the epilogue.
    u, v = SUM[dtype], ROUNDOFF[dtype]
    off = u * (weight[0].numel() + STEPS) + (v if backend == "reference" else 0)
    assert y.dtype == dtype
    assert_within("y", y, truth, v * truth.abs() + STEEPEST * off * (size + 1))

    slack = (off + v) * (size + 6)
    kinked = sum(((z - kink).abs() <= slack).double() for kink in KINKS.get(case.activation, ()))
    of_derivative = dy.abs() * (MOST_CURVED * slack + STEEPEST * kinked)
    terms = max(weight.numel() // weight.shape[1], y.numel() // channels)
    for part, gradient in gradients.items():
        assert gradient.dtype == dtypes[part]
        # Up to four values are rounded on the way: act's derivative, its product with the scale, and the sum.
        rounded = (4 * v + max(u, SUM[dtypes[part]]) * (terms + STEPS)) * dz.abs()
        _, bounds = differentiated(lambda **t: call(**t, **options), sizes, (of_derivative + rounded).detach())
        true = true_gradients[part]
        assert_within(part, gradient, true, ROUNDOFF[dtypes[part]] * true.abs() + bounds[part].abs())


def test_it_is_rounded_once(device):
    """bfloat16 images whose sums and vectors have more digits: what float32 gives, rounded."""
    x = torch.randn(2, 8, 5, 4).bfloat16().to(device)
    mean, scale = (torch.randn(8).to(device) for _ in range(2))
    with tritonnet.backend("triton"):
        y = F.epilogue(x, mean=mean, scale=scale, activation="silu")
        assert torch.equal(y, F.epilogue(x.float(), mean=mean, scale=scale, activation="silu").bfloat16())


def test_batch_norm_in_evaluation(backend, device, full_precision):
    """What a BatchNorm2d, a shortcut and an activation are behind a convolution, by the parameters as they are."""
    conv, norm = torch.nn.Conv2d(4, 6, 3, padding=1), torch.nn.BatchNorm2d(6)
    model = torch.nn.Sequential(conv, norm).double()
    x, shortcut = torch.randn(2, 4, 5, 6).double(), torch.randn(2, 6, 5, 6).double()
    for _ in range(3):
        model(x)
    truth = torch.nn.functional.relu6(model.eval()(x) + shortcut)
    model.to(device)
    y = F.conv2d_epilogue(
        x.to(device), conv.weight, conv.bias, padding=1, mean=norm.running_mean, var=norm.running_var,
        scale=norm.weight, shift=norm.bias, eps=norm.eps, residual=shortcut.to(device), activation="relu6",
    )  # fmt: skip
    torch.testing.assert_close(y.cpu(), truth)


def test_what_the_kernels_do_not_serve_is_torchs(backend):
    x, w = torch.randint(-3, 4, (2, 3, 5, 4)), torch.randint(-3, 4, (4, 3, 2, 2))
    shift = torch.randn(4)
    with pytest.raises(RuntimeError, match=r"scale must have size \[4\], got \[3\]"):
        F.conv2d_epilogue(x.float(), w.float(), scale=shift[:3])
    with pytest.raises(RuntimeError, match="residual must be torch.float32"):
        F.epilogue(x.float(), residual=x.double())
    with pytest.raises(ValueError, match="activation must be one of .*got 'tanh'"):
        F.epilogue(x.float(), activation="tanh")
    with pytest.raises(TypeError, match="slope must be a float, got '1'"):
        F.linear_epilogue(shift[None], shift[None], slope="1")
    with pytest.raises(RuntimeError, match="weight must be"):
        F.linear_epilogue(shift[None], shift)
    y = F.conv2d_epilogue(x, w, shift=torch.arange(4.0), activation="relu")
    z = torch.nn.functional.conv2d(x.float(), w.float()) + torch.arange(4.0).view(4, 1, 1)
    assert torch.equal(y, z.relu().to(y.dtype))

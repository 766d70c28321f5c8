"""Convolutions of few channels against float64: every kernel, in every format, by blocks and patches."""

import itertools
import random

import pytest
import torch
import torch.nn.functional as TF
from exact import assert_exact
from test_conv2d_pool_patch import FORMATS
from test_fused import integers

import tritonnet
import tritonnet.nn.functional as F
from tritonnet import ops
from tritonnet.kernels.conv2d_few import cut, product

# name: size of x, size of w, stride, padding
CASES = {
    "LeNet conv1": ((3, 1, 28, 28), (6, 1, 5, 5), (1, 1), (2,) * 4),
    "LeNet conv2": ((5, 6, 14, 14), (16, 6, 5, 5), (1, 1), (0,) * 4),
    "ResNet's first": ((2, 3, 16, 24), (20, 3, 7, 7), (2, 2), (3,) * 4),
    "odd sizes": ((2, 3, 13, 11), (17, 3, 3, 3), (1, 1), (1,) * 4),
    "patches beside each other": ((1, 3, 32, 32), (24, 3, 8, 8), (8, 8), (0,) * 4),
    "strides and padding of their own": ((2, 2, 19, 16), (7, 2, 3, 5), (3, 1), (0, 2, 5, 1)),
    "pixels between windows": ((2, 5, 12, 12), (9, 5, 2, 1), (3, 4), (0,) * 4),
    "stride over height": ((2, 3, 4, 11), (20, 3, 2, 3), (7, 2), (1, 1, 2, 2)),
    "stride over image": ((2, 3, 5, 4), (20, 3, 3, 2), (20, 9), (3, 1, 2, 2)),
    "few output channels": ((2, 20, 9, 12), (3, 20, 3, 3), (1, 1), (1,) * 4),
    "few output channels, strided": ((2, 33, 10, 8), (1, 33, 4, 4), (2, 2), (1,) * 4),
    "more filters than columns": ((1, 1, 9, 8), (40, 1, 3, 3), (1, 1), (1,) * 4),
    "1x1": ((2, 3, 6, 7), (20, 3, 1, 1), (1, 1), (0,) * 4),
    "one pixel": ((2, 15, 1, 1), (1, 15, 1, 1), (1, 1), (0,) * 4),
    "a window larger than the image": ((2, 3, 4, 5), (4, 3, 7, 8), (1, 1), (2, 3, 4, 2)),
}
LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "every other column": lambda t: t.repeat_interleave(2, 3)[..., ::2],
    "part of wider rows": lambda t: TF.pad(t, (3, 2, 1, 0), value=float("nan"))[:, :, 1:, 3:-2],
    "part of more channels": lambda t: TF.pad(t, (0, 0, 0, 0, 1, 2), value=float("nan")).contiguous(
        memory_format=torch.channels_last
    )[:, 1:-2],
}
BY_PRODUCT = {"place_few_filters_kernel", "few_channels_product_kernel"}
BY_LANES = {"few_channels_lanes_kernel"}
WEIGHTS = {"few_channels_weight_grad_kernel", "fold_few_weight_grad_kernel"}


@pytest.fixture(params=FORMATS)
def format(request):
    """The name of a number format, with products taken in that format."""
    previous = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = FORMATS[request.param][1]
    yield request.param
    torch.backends.cudnn.conv.fp32_precision = previous


def truth(x, w, b, dy, stride, padding):
    """{name: (result, magnitude of its terms)} in float64."""
    found = []
    for prepare in (torch.Tensor.double, lambda t: t.double().abs()):
        leaves = [prepare(t.cpu()).requires_grad_() for t in (x, w, b)]
        top, bottom, left, right = padding
        y = TF.conv2d(TF.pad(leaves[0], (left, right, top, bottom)), *leaves[1:], stride=stride)
        found.append((y.detach(), *torch.autograd.grad(y, leaves, prepare(dy.cpu()))))
    return dict(zip(("y", "dx", "dw", "db"), zip(*found)))


def check(x, w, b, dy, stride, padding, tf32):
    """The operators' results against float64; returns the kernels launched for y, dx and dw."""
    geometry = stride, padding, (1, 1), 1, "zeros"
    true, launched = truth(x, w, b, dy, stride, padding), []
    calls = {
        "y": lambda: {"y": ops.conv2d(x, w, b, *geometry)},
        "dx": lambda: {"dx": ops.conv2d_input_grad(dy, w, list(x.shape), *geometry)},
        "dw": lambda: dict(zip(("dw", "db"), ops.conv2d_weight_grad(dy, x, list(w.shape), *geometry, True))),
    }
    terms = {"y": w[0].numel() + 1, "dx": w[:, 0].numel(), "dw": dy[:, 0].numel(), "db": dy[:, 0].numel()}
    for call in calls.values():
        with tritonnet.backend("triton"), tritonnet.count_launches() as launches:
            results = call()
        launched.append(set(launches))
        for name, result in results.items():
            assert result.dtype == x.dtype
            assert_exact(name, result, *true[name], terms[name], tf32)
    return launched


def make(x_size, w_size, stride, padding, device, dtype):
    x, w, b = (torch.randn(size).to(device, dtype) for size in (x_size, w_size, w_size[:1]))
    size = [
        (n + sum(padding[2 * i : 2 * i + 2]) - k) // stride[i] + 1
        for i, (n, k) in enumerate(zip(x_size[2:], w_size[2:]))
    ]
    return x, w, b, torch.randn(x_size[0], w_size[0], *size).to(device, dtype)


# Layouts matter to the choice of a cut and to what is copied; any case shows them.
BY_LAYOUT = [(case, layout) for case in CASES for layout in list(LAYOUTS)[: 5 if case == "odd sizes" else 2]]


@pytest.mark.parametrize("case, layout", BY_LAYOUT)
@pytest.mark.sampled(3)
def test_values(case, layout, format, device):
    """Result and gradients, by the kernels that are meant to compute them."""
    x_size, w_size, stride, padding = CASES[case]
    x, w, b, dy = make(*CASES[case], device, FORMATS[format][0])
    x, dy = LAYOUTS[layout](x), LAYOUTS[layout](dy)
    forward, gradient, weights = check(x, w, b, dy, stride, padding, format == "tf32")
    if layout == "contiguous" and case in ("LeNet conv1", "LeNet conv2"):
        kernels = BY_LANES if format == "float32" else BY_PRODUCT
        assert (forward, gradient) == (kernels, kernels)
    few = x_size[1] < cut.FLAT_BELOW
    assert not few or forward in (BY_PRODUCT, BY_LANES) and weights == WEIGHTS
    assert gradient in (BY_PRODUCT, BY_LANES)


@pytest.mark.sampled(2)
def test_random_geometries(format, device):
    """Sizes, strides, paddings and layouts of each its own."""
    draw = random.Random(format)
    # The interpreter takes its time for every product of the kernel in full float32.
    for _ in range(8 if format == "float32" else 20):
        few, many = draw.randint(1, 15), draw.choice((1, 2, 3, 6, 16, 20, 40))
        C, OC = draw.choice(((few, many), (many, few)))
        kernel, stride = [draw.randint(1, 7) for _ in "hw"], [draw.randint(1, 3) for _ in "hw"]
        padding = [draw.randint(0, 4) for _ in range(4)]
        size = draw.randint(7, 20), draw.choice((8, 12, 16, draw.randint(7, 20)))
        x, w, b, dy = make(
            (draw.randint(1, 3), C, *size), (OC, C, *kernel), stride, padding, device, FORMATS[format][0]
        )
        x, dy = (LAYOUTS[draw.choice(list(LAYOUTS))](t) for t in (x, dy))
        check(x, w, b, dy, tuple(stride), tuple(padding), format == "tf32")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_integers_are_exact(layout, format, device):
    """With relu in the forward and its mask in the weight gradient."""
    dtype = FORMATS[format][0]
    x, w, b = (integers(s, 2).to(device, dtype) for s in ((3, 3, 12, 12), (20, 3, 3, 3), (20,)))
    x, found = LAYOUTS[layout](x), []
    for backend in ("triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in (w, b)]
        with tritonnet.backend(backend), tritonnet.count_launches() as launches:
            y = F.conv2d_relu(x, *leaves, stride=2, padding=1)
            found.append((y, *torch.autograd.grad(y, leaves, torch.ones_like(y))))
        assert "relu_grad_kernel" not in launches
    assert all(a.stride() == b.stride() and torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_how_far_what_is_not_finite_spreads(value, layout, format, device):
    """To the blocks of pixels whose patches hold it, as it does in Winograd's convolution, and no further."""
    x, w, b, _ = make(*CASES["LeNet conv1"], device, FORMATS[format][0])
    x = LAYOUTS[layout](x)
    clean = F.conv2d(x, w, b, padding=2)
    x[1, 0, 14, 13] = value
    y = F.conv2d(x, w, b, padding=2)
    spoilt = ~y.isfinite().all(1)
    assert spoilt[1, 12:17, 11:16].all()
    far = torch.ones_like(spoilt)
    far[1, 12 - 7 : 17 + 7, 11 - 7 : 16 + 7] = False
    assert not spoilt[far].any() and torch.equal(y[far[:, None].expand_as(y)], clean[far[:, None].expand_as(y)])


def test_blocks_cover_every_product():
    """The places of a filter in a patch, for all windows of one dimension: each product of the convolution once."""
    for block, K, S, P in itertools.product((1, 2, 3, 4, 8), (1, 2, 3, 5, 7), (1, 2, 3), (0, 1, 3, 6)):
        for gradient in (False, True):
            size = block * S if gradient else block
            reach = (cut.Reach.of_gradient if gradient else cut.Reach.of_pixels)(size, K, S, P)
            made = cut.Cut.of((size, size), reach, reach, 1, False, 1)
            taps = cut.Taps.of(made, gradient, (S, S), (P,) * 4, 1)
            for number, pixel in itertools.product(range(3), range(size)):
                at = number * size + pixel
                found = {}
                for place in range(made.PATCH_H):
                    k = pixel * taps.OF_BLOCK_H + place * taps.OF_PATCH_H + taps.FIRST_H
                    if 0 <= k < K:
                        found[number * made.STEP_H - made.TOP + place] = k
                if gradient:
                    expected = {(at + P - k) // S: k for k in range(K) if (at + P - k) % S == 0}
                else:
                    expected = {at * S - P + k: k for k in range(K)}
                assert found == expected, (block, K, S, P, gradient)


def test_sizes_are_no_constants():
    """A kernel that is compiled for one size of images serves others."""
    found, none, values = [], [None] * 5, (0.0, "relu", 0.0)
    for height, width in ((40, 32), (72, 64), (96, 128)):
        x, w, b, dy = make((2, 3, height, width), (32, 3, 3, 3), (1, 1), (1,) * 4, "cpu", torch.bfloat16)
        form = product.form_for("half", 2, False, 3, 32, (height, width), (3, 3), (1, 1), (1,) * 4, False, False, 8)
        _, _, constants = product.convolve.__wrapped__(x, w, b, dy, *none, form, False, False, values, "ieee")
        found.append({name: value for name, value in constants.items() if name != "BLOCK_M"})
    assert found[0] == found[1] == found[2]

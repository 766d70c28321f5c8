"""The forms of conv2d_relu_max_pool2d for few channels: bit for bit the reference, and against float64."""

import pytest
import torch
import torch.nn.functional as TF
from exact import assert_exact
from test_fused import integers

import tritonnet
import tritonnet.nn.functional as F
from tritonnet import ops

FORMATS = {
    "tf32": (torch.float32, "tf32"),
    "float16": (torch.float16, "tf32"),
    "bfloat16": (torch.bfloat16, "tf32"),
    "float32": (torch.float32, "ieee"),
}
# name: size of input, size of weight, the convolution's arguments and the pooling's stride
CASES = {
    "LeNet conv1": ((9, 1, 32, 32), (6, 1, 5, 5), {}),
    "LeNet conv2": ((5, 6, 14, 14), (16, 6, 5, 5), {}),
    "cut off on both sides": ((2, 1, 12, 14), (3, 1, 4, 4), {}),
    "padded, filters left over": ((2, 3, 17, 15), (10, 3, 3, 3), {"padding": 1}),
    "strided, dilated": ((2, 2, 17, 19), (5, 2, 3, 2), {"stride": (1, 2), "dilation": (2, 1), "pool_stride": (3, 1)}),
    "more filters than columns": ((1, 1, 9, 9), (40, 1, 3, 3), {}),
}
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(params=FORMATS)
def dtype(request):
    """The dtype of a number format, with products taken in that format."""
    dtype, precision = FORMATS[request.param]
    previous = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = precision
    yield dtype
    torch.backends.cudnn.conv.fp32_precision = previous


def few_channels(launches):
    product = "place_filters_kernel", "conv2d_relu_max_pool2d_product_kernel"
    return launches == dict.fromkeys(product, 1) or launches == {"conv2d_relu_max_pool2d_lanes_kernel": 1}


def arguments(case):
    """The operator's arguments, as pairs."""
    options = {"stride": 1, "dilation": 1, "padding": 0, "pool_stride": 2, **CASES[case][2]}
    stride, dilation, padding, pool_stride = (
        (v, v) if isinstance(v := options[name], int) else v
        for name in ("stride", "dilation", "padding", "pool_stride")
    )
    return stride, (*padding[:1] * 2, *padding[1:] * 2), dilation, 1, "zeros", (2, 2), pool_stride, (0, 0), False


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.sampled(2)
def test_values_and_codes_of_integers(case, layout, dtype, device):
    """Exact in every format, with many ties: torch's eager operators decide which pixel wins."""
    size, filters, _ = CASES[case]
    x, w = integers(size, 2).to(device, dtype).contiguous(memory_format=layout), integers(filters, 2).to(device, dtype)
    for bias in (integers(filters[:1], 9).to(device, dtype), None):
        with tritonnet.backend("triton"), tritonnet.count_launches() as launches:
            ours = ops.conv2d_relu_max_pool2d(x, w, bias, *arguments(case))
        with tritonnet.backend("reference"):
            theirs = ops.conv2d_relu_max_pool2d(x, w, bias, *arguments(case))
        assert few_channels(launches)
        assert all(a.stride() == b.stride() and torch.equal(a, b) for a, b in zip(ours, theirs))


@pytest.mark.parametrize("case", CASES)
def test_values_against_float64(case, dtype, device):
    size, filters, options = CASES[case]
    x, w, b = (torch.randn(s).to(dtype) for s in (size, filters, filters[:1]))
    with tritonnet.backend("triton"):
        y = F.conv2d_relu_max_pool2d(x.to(device), w.to(device), b.to(device), **options)
    conv = {name: value for name, value in options.items() if name != "pool_stride"}
    pool = 2, options.get("pool_stride")
    x, w, b = x.double(), w.double(), b.double()
    truth = TF.max_pool2d(TF.relu(TF.conv2d(x, w, b, **conv)), *pool)
    magnitude = TF.max_pool2d(TF.conv2d(x.abs(), w.abs(), b.abs(), **conv), *pool)
    tf32 = torch.backends.cudnn.conv.fp32_precision == "tf32"
    assert_exact("y", y, truth, magnitude, w[0].numel() + 1, tf32)


def test_what_is_not_finite(dtype, device):
    """Lanes do as torch does; the product spreads it to neighbouring windows, never loses it, and names a pixel."""
    x = torch.randn(2, 1, 12, 12)
    x[0, 0, 3, 4], x[0, 0, 3, 5], x[1, 0, 7, 2], x[1, 0, 0, 0] = (float(v) for v in ("nan", "nan", "inf", "-inf"))
    w = torch.randn(3, 1, 3, 3)
    with tritonnet.backend("triton"):
        y, code = ops.conv2d_relu_max_pool2d(x.to(device, dtype), w.to(device, dtype), None, *arguments("LeNet conv1"))
    with tritonnet.backend("reference"):
        true_y, true_code = ops.conv2d_relu_max_pool2d(x, w, None, *arguments("LeNet conv1"))
    y, code = y.cpu(), code.cpu()
    if torch.backends.cudnn.conv.fp32_precision == "ieee":
        torch.testing.assert_close(y, true_y, equal_nan=True)
        assert torch.equal(code, true_code)
    else:
        assert not y[~true_y.isfinite()].isfinite().any() and (code <= 4).all()
        assert y[:, :, 3:, 3:].isfinite().all() == true_y[:, :, 3:, 3:].isfinite().all()


def test_a_bias_with_gaps_and_no_images(dtype, device):
    x, w, b = (integers(s, 2).to(device, dtype) for s in ((3, 2, 8, 8), (4, 2, 3, 3), (8,)))
    with tritonnet.backend("triton"):
        spread = F.conv2d_relu_max_pool2d(x.transpose(2, 3), w.transpose(2, 3), b[::2])
        dense = F.conv2d_relu_max_pool2d(*(t.transpose(2, 3).contiguous() for t in (x, w)), b[::2].contiguous())
        assert torch.equal(spread, dense)
        assert F.conv2d_relu_max_pool2d(x[:0], w).shape == (0, 4, 3, 3)


# Cases where ceil_mode adds a window on one or both sides take the general form; the others are not affected.
PARTIAL = "cut off on both sides", "padded, filters left over", "strided, dilated", "more filters than columns"


@pytest.mark.parametrize("case", CASES)
def test_ceil_mode(case, dtype, device):
    size, filters, _ = CASES[case]
    x, w, b = (integers(s, 2).to(device, dtype) for s in (size, filters, filters[:1]))
    *geometry, _ = arguments(case)
    with tritonnet.backend("triton"), tritonnet.count_launches() as launches:
        ours = ops.conv2d_relu_max_pool2d(x, w, b, *geometry, True)
    with tritonnet.backend("reference"):
        theirs = ops.conv2d_relu_max_pool2d(x, w, b, *geometry, True)
        whole = ops.conv2d_relu_max_pool2d(x, w, b, *geometry, False)
    assert (theirs[0].shape != whole[0].shape) == (case in PARTIAL)
    assert few_channels(launches) if case not in PARTIAL else launches == {"conv2d_relu_max_pool2d_forward_kernel": 1}
    assert all(map(torch.equal, ours, theirs))

"""Every kernel's compiled code, run without a GPU in every format that the kernel serves, against float64.

    TRITONNET_TEST_DEVICE=sm_90 python -m pytest tests/compiled.py

runs them on the PTX machine (package `ptx`); sm_80 and sm_100 are the other architectures. The float64 truth and each
format's tolerance are those of the benchmark (bench/exactness.py). Sizes are odd, so that tiles are partly empty at the
edges, and sums are long enough to fill a pipeline.
"""

from unittest import mock

import ptx
import pytest
import torch
from conftest import EMULATED, thorough_if
from test_machine_code import every_kernel

import tritonnet
import tritonnet.nn.functional as F
from bench import FORMATS, operators
from bench.case import BOTH, CHANNELS_LAST, CONTIGUOUS, INFERENCE, TRAINING
from bench.lenet import Network
from bench.libraries import WHOLE_STEPS, installed
from bench.measure import Host, precision
from tritonnet.kernels import activations, product, tiles
from tritonnet.nn import _norm

if EMULATED is None:
    raise pytest.UsageError("TRITONNET_TEST_DEVICE has to be sm_80, sm_90 or sm_100")
LIBRARIES = installed()


def operator(call, result, *sizes):
    """An Operator from a call and the sizes of its result and its inputs."""
    return operators.Operator("", sizes[0][0], call, sizes, result, {})


def chain(f, x, w1, w2, b1, b2):
    return f.linear_chain(x, (w1, w2), (b1, b2))


def reflected(f, x, w):
    """A convolution whose padding is read in place, and one of a padded image."""
    if f is F:
        return f._conv2d(x, w, None, 2, (2, 2), 1, 1, "reflect")
    return f.conv2d(f.pad(x, (2,) * 4, "reflect"), w, stride=2)


def gradient_of_pooling(f, x):
    (dx,) = torch.autograd.grad(f.max_pool2d(x, 2).square().sum(), x, create_graph=True)
    return dx


def pooling(*window):
    return lambda f, x: f.max_pool2d(x, *window)


def first_layer(f, w, b):
    """For images that need no gradient and have the same values in every format."""
    images = (torch.arange(2 * 3 * 9 * 11, device=w.device) % 7 - 3).to(w.dtype).view(2, 3, 9, 11)
    return f.conv2d_relu(images.contiguous(memory_format=torch.channels_last), w, b, padding=1)


def dilated_first_layer(f, w, b):
    """The same with a dilation, which the kernels for few channels do not serve."""
    images = (torch.arange(2 * 3 * 9 * 11, device=w.device) % 7 - 3).to(w.dtype).view(2, 3, 9, 11)
    return f.conv2d_relu(images, w, b, padding=2, dilation=2)


def gated(f, x):
    """Without gradients, which other operators compute; the weights have the same values in every format."""
    C, R = x.shape[1], 6
    w1, b1, w2, b2 = (
        ((torch.arange(torch.Size(size).numel(), device=x.device) % 7 - 3) / 8).to(x.dtype).view(size)
        for size in ((R, C), (R,), (C, R), (C,))
    )
    with torch.no_grad():
        y = f.squeeze_excite(x, w1, b1, w2, b2, "silu")
    return x * y


def strided(f, x, w, b):
    return f.conv2d(x, w, b, stride=2, padding=2)


def dilated(f, x, w, b):
    return f.conv2d(x, w, b, padding=2, dilation=2)


def normed(function, activation, **geometry):
    """function(x, w, b) with all parts of an epilogue; its activation is smooth, so that rounding decides nothing."""

    def call(f, x, w, b, mean, var, scale, shift, residual):
        return getattr(f, function)(
            x, w, b, **geometry, mean=mean, var=var.square() + 0.5, scale=scale, shift=shift, residual=residual,
            activation=activation,
        )  # fmt: skip

    return call


def fused(activation, size, filters, result, **geometry):
    """A convolution with all parts of an epilogue."""
    OC = filters[:1]
    call = normed("conv2d_epilogue", activation, **geometry)
    return operator(call, result, size, filters, OC, OC, OC, OC, OC, result)


def every_activation(f, x, mean, var, scale, shift, residual):
    """Of numbers that no rounding brings to the other side of a kink, and of normed ones."""
    terms = [f.epilogue(x, activation=name) for name in activations.NAMES]
    normed = f.epilogue(
        x, mean=mean, var=var.square() + 0.5, scale=scale, shift=shift, residual=residual, activation="silu"
    )
    return torch.cat([*terms, normed], dim=1)


def batch_norm(activation):
    """In training; with a residual, an activation whose derivative is a function of the result."""

    def call(f, x, scale, shift, residual=None):
        return f.batch_norm_epilogue(x, None, None, scale, shift, True, residual=residual, activation=activation)

    return call


def normed_conv2d(**geometry):
    """A convolution and batch norm in training, by the statistics that the convolution's kernel computes."""

    def call(f, x, w, scale, shift):
        if f is F:
            values = _norm.norm_conv2d(x, None, (None, None, 0.0), w, **geometry)
            return _norm.normed(values, None, scale, shift, 1e-5, "silu", 0.0)
        return f.silu(f.batch_norm(f.conv2d(x, w, **geometry), None, None, scale, shift, True))

    return call


def means(*window):
    return lambda f, x: f.avg_pool2d(x, *window)


IMAGES, CHAIN = (2, 4, 9, 11), ((70, 10), (70, 200), (84, 200), (10, 84), (84,), (10,))
# name: subject, layout
CASES = {
    "relu": (operators.relu("", 3, 5, 7, 9), CONTIGUOUS),
    "max_pool2d": (operators.max_pool2d("", (2, 5, 11, 9), 3, 2, 1), CHANNELS_LAST),
    "max_pool2d, NCHW": (operators.max_pool2d("", (2, 5, 10, 28), 3, 2, 1), CONTIGUOUS),
    "max_pool2d, odd rows": (operators.max_pool2d("", (2, 5, 9, 11), 2, 2), CONTIGUOUS),
    "max_pool2d, dilated": (operator(pooling(3, 2, 1, 2), (2, 5, 5, 5), (2, 5, 11, 12)), CONTIGUOUS),
    "max_pool2d, large": (operator(pooling(6, 2, 3), (2, 16, 6, 5), (2, 16, 10, 9)), CHANNELS_LAST),
    "max_pool2d twice": (operator(gradient_of_pooling, IMAGES, IMAGES), CONTIGUOUS),
    "avg_pool2d": (operator(means(3, 2, 1, True, False), (2, 5, 6, 5), (2, 5, 11, 9)), CHANNELS_LAST),
    "avg_pool2d, NCHW": (operators.avg_pool2d("", (2, 5, 10, 28), 3, 2, 1), CONTIGUOUS),
    "avg_pool2d, large": (operator(means(6, 3, 3, True), (2, 16, 5, 4), (2, 16, 11, 9)), CHANNELS_LAST),
    "avg_pool2d, bins": (operators.adaptive_avg_pool2d("", (2, 12, 9, 7), (4, 3)), CHANNELS_LAST),
    "avg_pool2d, images": (operators.adaptive_avg_pool2d("", (3, 72, 9, 10), (1, 1)), CHANNELS_LAST),
    "avg_pool2d, images, NCHW": (operators.adaptive_avg_pool2d("", (3, 40, 7, 7), (1, 1)), CONTIGUOUS),
    "squeeze_excite": (operator(gated, (2, 72, 9, 7), (2, 72, 9, 7)), CHANNELS_LAST),
    "squeeze_excite, NCHW": (operator(gated, (2, 24, 10, 12), (2, 24, 10, 12)), CONTIGUOUS),
    "cross_entropy": (operators.cross_entropy(37, 50), CONTIGUOUS),
    "cross_entropy, programs": (operators.cross_entropy(41, 600), CONTIGUOUS),
    "linear": (operators.linear("", 70, 200, 40, relu=True), CONTIGUOUS),
    "linear, split": (operators.linear("", 4100, 24, 24), CONTIGUOUS),
    "linear, descriptors": (operators.linear("", 140, 200, 136, relu=True), CONTIGUOUS),
    "chain": (operator(chain, *CHAIN), CONTIGUOUS),
    "conv2d": (operators.conv2d("", (2, 40, 9, 11), (24, 3), padding=1, relu=True), CHANNELS_LAST),
    "conv2d, first layer": (
        operators.Operator("", 2, first_layer, ((40, 3, 3, 3), (40,)), (2, 40, 9, 11), {}, decisions=2 * 40 * 99),
        CHANNELS_LAST,
    ),
    "conv2d, dilated first layer": (
        operators.Operator(
            "", 2, dilated_first_layer, ((40, 3, 3, 3), (40,)), (2, 40, 9, 11), {}, decisions=2 * 40 * 99
        ),
        CONTIGUOUS,
    ),
    "conv2d, reflected": (operator(reflected, (2, 20, 10, 9), (2, 17, 19, 17), (20, 17, 5, 5)), CONTIGUOUS),
    "conv2d, dilated": (operator(dilated, (2, 20, 9, 11), (2, 3, 9, 11), (20, 3, 3, 3), (20,)), CONTIGUOUS),
    "conv2d, few channels": (operator(strided, (2, 20, 10, 9), (2, 3, 19, 17), (20, 3, 5, 5), (20,)), CONTIGUOUS),
    "conv2d, few channels innermost": (
        operator(strided, (2, 36, 8, 16), (2, 3, 15, 32), (36, 3, 5, 5), (36,)),
        CHANNELS_LAST,
    ),
    "conv2d, LeNet": (operators.conv2d("", (5, 6, 14, 14), (16, 5)), CONTIGUOUS),
    "conv2d, wide": (operators.conv2d("", (3, 72, 12, 10), (136, 3), padding=1), CONTIGUOUS),
    "conv2d, strided": (operators.conv2d("", (2, 72, 12, 10), (136, 3), stride=2, padding=1), CHANNELS_LAST),
    "conv2d, descriptors": (operators.conv2d("", (2, 72, 9, 11), (136, 1)), CHANNELS_LAST),
    "conv2d, descriptors, NCHW": (operators.conv2d("", (3, 72, 12, 10), (136, 1)), CONTIGUOUS),
    "depthwise": (operators.conv2d("", (2, 12, 9, 11), (12, 3), padding=1, groups=12), CHANNELS_LAST),
    "depthwise, strided": (
        operators.conv2d("", (2, 16, 17, 15), (32, 5), stride=2, padding=2, groups=16),
        CHANNELS_LAST,
    ),
    "depthwise, pixels": (operators.conv2d("", (2, 3, 9, 24), (3, 5), padding=2, groups=3), CONTIGUOUS),
    "depthwise, pixels strided": (
        operators.conv2d("", (2, 3, 9, 24), (3, 3), stride=2, padding=1, groups=3),
        CONTIGUOUS,
    ),
    "depthwise, large": (operators.conv2d("", (2, 4, 19, 20), (4, 7), stride=9, padding=3, groups=4), CHANNELS_LAST),
    "epilogue": (
        operator(every_activation, (2, 44, 9, 11), IMAGES, (4,), (4,), (4,), (4,), IMAGES),
        CHANNELS_LAST,
    ),
    "batch_norm": (operator(batch_norm("silu"), (3, 21, 9, 11), (3, 21, 9, 11), (21,), (21,)), CHANNELS_LAST),
    "batch_norm, residual": (
        operator(batch_norm("sigmoid"), (3, 72, 9, 11), (3, 72, 9, 11), (72,), (72,), (3, 72, 9, 11)),
        CHANNELS_LAST,
    ),
    "batch_norm, NCHW": (operator(batch_norm("gelu"), (5, 2, 32, 28), (5, 2, 32, 28), (2,), (2,)), CONTIGUOUS),
    "conv2d, epilogue": (
        fused("silu", (2, 40, 9, 11), (72, 40, 3, 3), (2, 72, 9, 11), padding=1),
        CHANNELS_LAST,
    ),
    "conv2d, epilogue, NCHW": (
        fused("sigmoid", (2, 40, 8, 8), (24, 40, 3, 3), (2, 24, 8, 8), padding=1),
        CONTIGUOUS,
    ),
    "conv2d, epilogue, descriptors": (
        fused("gelu_tanh", (2, 72, 9, 11), (136, 72, 1, 1), (2, 136, 9, 11)),
        CHANNELS_LAST,
    ),
    "conv2d, epilogue, few channels": (
        fused("gelu", (2, 3, 19, 17), (20, 3, 5, 5), (2, 20, 10, 9), stride=2, padding=2),
        CONTIGUOUS,
    ),
    "conv2d, statistics": (
        operator(normed_conv2d(padding=1), (2, 72, 9, 11), (2, 40, 9, 11), (72, 40, 3, 3), (72,), (72,)),
        CHANNELS_LAST,
    ),
    "conv2d, statistics, descriptors": (
        operator(normed_conv2d(), (3, 136, 12, 10), (3, 72, 12, 10), (136, 72, 1, 1), (136,), (136,)),
        CONTIGUOUS,
    ),
    "depthwise, epilogue": (
        fused("silu", (2, 12, 9, 11), (12, 1, 3, 3), (2, 12, 9, 11), padding=1, groups=12),
        CHANNELS_LAST,
    ),
    "linear, epilogue": (
        operator(
            normed("linear_epilogue", "gelu"),
            (70, 40),
            (70, 200),
            (40, 200),
            (40,),
            (40,),
            (40,),
            (40,),
            (40,),
            (70, 40),
        ),
        CONTIGUOUS,
    ),
    "pooled": (operators.conv2d("", (2, 20, 9, 11), (24, 3), padding=1, pool=(3, 2, 1)), CHANNELS_LAST),
    "pooled, few channels": (operators.conv2d("", (5, 6, 14, 14), (16, 5), pool=(2, 2, 0)), CONTIGUOUS),
    "pooled, one channel": (operators.conv2d("", (3, 1, 20, 20), (6, 5), pool=(2, 2, 0)), CONTIGUOUS),
    "LeNet": (Network(False, 3), CONTIGUOUS),
    "LeNet step": (Network(True, 3), CONTIGUOUS),
}

# What batch norm in training adds to a convolution with statistics.
NORM = "fold_statistics", "epilogue", "batch_norm_sums", "fold_sums", "batch_norm_grad"
CONV = "conv2d_forward", "conv2d_input_grad", "conv2d_weight_grad"
FEW_WEIGHTS = "few_channels_weight_grad", "fold_few_weight_grad"
FEW_PRODUCTS = "place_few_filters", "few_channels_product", *FEW_WEIGHTS
FEW = {
    **dict.fromkeys(("bfloat16", "float16", "tf32"), FEW_PRODUCTS),
    "float32": ("few_channels_lanes", *FEW_WEIGHTS),
    "float64": CONV,
}
BATCH_NORM = (
    "batch_statistics", "fold_statistics", "epilogue", "batch_norm_sums", "fold_sums", "batch_norm_grad"
)  # fmt: skip
POOLED = "conv2d_relu_max_pool2d_forward", "max_pool2d_scatter_blocks", *CONV[1:]
DEPTHWISE = "depthwise_forward", "depthwise_input_grad", "depthwise_weight_grad"
BY_PRODUCT = (
    "place_filters", "conv2d_relu_max_pool2d_product", "filters_for_blocks",
    "conv2d_relu_max_pool2d_input_grad", "conv2d_relu_max_pool2d_weight_grad",
)  # fmt: skip
# The kernels for images of few channels: in the formats of matrix units, and in the others.
FEW_CHANNELS = {
    **dict.fromkeys(("bfloat16", "float16", "tf32"), BY_PRODUCT),
    "float32": ("conv2d_relu_max_pool2d_lanes", "max_pool2d_scatter_blocks", *FEW["float32"]),
    "float64": POOLED,
}
WHOLE = "lenet_pack", "lenet_forward"
# Products large enough that tensor descriptors read their operands. On sm_80 none is, and in tf32 no weight gradient.
BY_DESCRIPTORS = EMULATED != "sm_80"
WHOLE_PRODUCTS = dict.fromkeys(("bfloat16", "float16"), ("product",))


def large(forward, weight_grad):
    """The kernels of large products by format, where `forward` and `weight_grad` are those by pointers."""
    if not BY_DESCRIPTORS:
        return dict.fromkeys(("bfloat16", "float16", "tf32"), (*forward, weight_grad))
    return {**WHOLE_PRODUCTS, "tf32": ("product", weight_grad)}


# The kernels that each case launches, in all formats or by format.
LAUNCHED = {
    "relu": ("relu", "relu_grad"),
    **dict.fromkeys(
        ("max_pool2d", "max_pool2d, NCHW", "max_pool2d, odd rows"), ("max_pool2d_forward", "max_pool2d_scatter_blocks")
    ),
    **dict.fromkeys(("max_pool2d, dilated", "max_pool2d, large"), ("max_pool2d_forward", "max_pool2d_scatter")),
    "max_pool2d twice": ("max_pool2d_forward", "max_pool2d_scatter_blocks", "max_pool2d_gather"),
    "avg_pool2d": ("avg_pool2d_forward", "avg_pool2d_grad_blocks"),
    "avg_pool2d, NCHW": dict.fromkeys(("bfloat16", "float32"), ("avg_pool2d_forward", "avg_pool2d_grad_blocks")),
    "avg_pool2d, large": ("avg_pool2d_forward", "avg_pool2d_grad"),
    "avg_pool2d, bins": ("adaptive_avg_pool2d",),
    "avg_pool2d, images": ("whole_avg_pool2d", "whole_avg_pool2d_grad"),
    "avg_pool2d, images, NCHW": dict.fromkeys(("bfloat16", "float32"), ("whole_avg_pool2d", "whole_avg_pool2d_grad")),
    "squeeze_excite": ("whole_avg_pool2d", "squeeze_excite"),
    "squeeze_excite, NCHW": dict.fromkeys(("bfloat16", "float32"), ("whole_avg_pool2d", "squeeze_excite")),
    "cross_entropy": ("cross_entropy", "cross_entropy_grad"),
    "cross_entropy, programs": ("cross_entropy", "sum_losses", "cross_entropy_grad"),
    "linear": ("linear_forward", "linear_weight_grad", "relu_grad"),
    "linear, split": ("linear_forward", "linear_weight_grad", "sum_partials"),
    "linear, descriptors": {
        format: (*names, "relu_grad") for format, names in large(("linear_forward",), "linear_weight_grad").items()
    },
    "chain": ("linear_chain_forward", "linear_chain_input_grad", "linear_chain_weight_grad"),
    "conv2d": (*CONV, "relu_grad"),
    "conv2d, first layer": {
        **dict.fromkeys(FORMATS, FEW_PRODUCTS),
        "float64": ("conv2d_forward", "conv2d_weight_grad"),
    },
    "conv2d, dilated first layer": ("conv2d_forward", "conv2d_weight_grad"),
    "conv2d, reflected": (*CONV, "fold_padding"),
    "conv2d, dilated": CONV,
    "conv2d, few channels": FEW,
    "conv2d, few channels innermost": {**dict.fromkeys(FORMATS, FEW_PRODUCTS), "float64": CONV},
    "conv2d, LeNet": FEW,
    "conv2d, wide": CONV,
    "conv2d, strided": CONV,
    **dict.fromkeys(("conv2d, descriptors", "conv2d, descriptors, NCHW"), large(CONV[:2], CONV[2])),
    "depthwise": DEPTHWISE,
    "depthwise, strided": dict.fromkeys(("bfloat16", "float32"), DEPTHWISE),
    "depthwise, pixels": dict.fromkeys(("bfloat16", "float32"), DEPTHWISE),
    "depthwise, pixels strided": dict.fromkeys(("bfloat16", "float32"), DEPTHWISE),
    "depthwise, large": dict.fromkeys(("bfloat16", "float32"), DEPTHWISE),
    "epilogue": ("epilogue", "activation_grad"),
    "batch_norm": BATCH_NORM,
    "batch_norm, residual": dict.fromkeys(("bfloat16", "float32"), BATCH_NORM),
    "batch_norm, NCHW": dict.fromkeys(("bfloat16", "float64"), BATCH_NORM),
    "conv2d, epilogue": dict.fromkeys(("bfloat16", "tf32"), (*CONV, "epilogue", "activation_grad")),
    "conv2d, epilogue, NCHW": {"bfloat16": (*CONV, "epilogue", "activation_grad")},
    "conv2d, epilogue, descriptors": {
        format: (*names, "epilogue", "activation_grad")
        for format, names in large(CONV[:2], CONV[2]).items()
        if format == "bfloat16"
    },
    "conv2d, epilogue, few channels": {
        format: (*FEW[format], "epilogue", "activation_grad") for format in ("bfloat16", "float32")
    },
    "conv2d, statistics": dict.fromkeys(FORMATS, (*CONV, *NORM)),
    "conv2d, statistics, descriptors": {format: (*names, *NORM) for format, names in large(CONV[:2], CONV[2]).items()},
    "depthwise, epilogue": {"bfloat16": (*DEPTHWISE, "epilogue", "activation_grad")},
    "linear, epilogue": dict.fromkeys(
        ("bfloat16", "float64"), ("linear_forward", "linear_weight_grad", "epilogue", "activation_grad")
    ),
    "pooled": POOLED,
    "pooled, few channels": FEW_CHANNELS,
    "pooled, one channel": {format: FEW_CHANNELS[format] for format in ("bfloat16", "tf32", "float32")},
    "LeNet": dict.fromkeys(WHOLE_STEPS, WHOLE),
    "LeNet step": dict.fromkeys(WHOLE_STEPS, (*WHOLE, "lenet_gradient", "lenet_update")),
}
# Kernels that do not serve a format; FEW_CHANNELS and LAUNCHED have those that take their place.
UNSERVED = set() if BY_DESCRIPTORS else {"product"}
LANES, LENET = {"conv2d_relu_max_pool2d_lanes", "few_channels_lanes"}, {*WHOLE, "lenet_gradient", "lenet_update"}
OTHERS = {
    "bfloat16": LANES | UNSERVED,
    "tf32": LANES | UNSERVED,
    "float16": LANES | LENET | UNSERVED,
    "float32": {*BY_PRODUCT, "product"},
    "float64": LANES | LENET | {*BY_PRODUCT, *FEW_PRODUCTS, "product"},
}


def kernels(case, format):
    """The names of the kernels that a case launches in a format; empty if the format is not served."""
    names = LAUNCHED[case]
    return {f"{name}_kernel" for name in (names.get(format, ()) if isinstance(names, dict) else names)}


@pytest.mark.parametrize("format", FORMATS)
def test_every_kernel_is_here(format):
    here = set().union(*(kernels(case, format) for case in CASES))
    assert every_kernel() - here == {f"{name}_kernel" for name in OTHERS[format]}


def check(case, format):
    """Launches a case and checks its results with the gate."""
    subject, layout = CASES[case]
    library = LIBRARIES["TrainStep" if case == "LeNet step" else "tritonnet"]
    large = 0 if "descriptors" in case else product.LARGE
    with precision(format), mock.patch.object(product, "LARGE", large):
        gate = subject.gate(format, "cpu")
        with tritonnet.backend("triton"), tritonnet.count_launches() as launches:
            contestant = subject.contestant(library, layout, format, Host())
            task = next(task for task in (BOTH, TRAINING, INFERENCE) if task in contestant.steps)
            results = contestant.first(task)
    assert kernels(case, format) <= set(launches) <= kernels(case, format) | {"sum_partials_kernel"}
    complaint = gate.complaint(results, contestant.dtype or FORMATS[format][0])
    assert complaint is None, complaint
    if format == "float64":  # the gate's allowance for float32 sums would hide errors here
        torch.testing.assert_close(results[:2], gate.truth[:2], rtol=1e-11, atol=1e-11)


SERVED = [(case, format) for format in FORMATS for case in CASES if kernels(case, format)]
# Every case runs in bfloat16, and of the other formats those that have other kernels, products or roundings; a thorough
# run has all. LeNet's launches in tf32 are in planted.py too.
SAMPLE = {
    "bfloat16": set(CASES),
    "float16": {"conv2d", "linear, descriptors"},
    "tf32": {"linear, descriptors", "chain", "conv2d", "conv2d, few channels", "pooled, one channel"},
    "float32": {"linear", "conv2d, few channels", "pooled, one channel"},
    "float64": {"linear, epilogue", "conv2d", "max_pool2d", "chain"},
}


@pytest.mark.parametrize("case, format", thorough_if(lambda case, format: case not in SAMPLE[format], SERVED))
def test_against_float64(case, format):
    check(case, format)


def shipped():
    """(family, tile) of the tables of 16-bit formats for this architecture."""
    with ptx.emulate(EMULATED):
        return [
            (family, tile)
            for family in ("patches", "gradient", "products")
            for tile in tiles.table(family, "half")
            if BY_DESCRIPTORS or family != "products"
        ]


def in_between(family, tile):
    """Not the first or the last tile of its family."""
    tiles_of_it = [each for name, each in shipped() if name == family]
    return tile not in (tiles_of_it[0], tiles_of_it[-1])


@pytest.mark.parametrize("family, tile", thorough_if(in_between, shipped()), ids=str)
def test_every_tile(family, tile):
    """Forward and gradients of a convolution by one tile, which its sizes do not fill."""
    size, filters, padding = ((2, 72, 9, 11), (136, 1), 0) if family == "products" else ((2, 40, 9, 11), (24, 3), 1)
    subject = operators.conv2d("", size, filters, padding=padding)
    gate = subject.gate("bfloat16", "cpu")
    large = 0 if family == "products" else product.LARGE
    with (
        tiles.only(family, tile), mock.patch.object(product, "LARGE", large), precision("bfloat16"),
        tritonnet.backend("triton"), tritonnet.count_launches() as launches,
    ):  # fmt: skip
        results = subject.contestant(LIBRARIES["tritonnet"], CHANNELS_LAST, "bfloat16", Host()).first(BOTH)
    assert "product_kernel" in launches if family == "products" else "conv2d_weight_grad_kernel" in launches
    assert (complaint := gate.complaint(results, torch.bfloat16)) is None, complaint


def test_float64_under_tf32():
    """torch's flag for float32 does not affect other formats."""
    x, w = torch.randn(2, 40, 9, 11).double(), torch.randn(40, 40, 1, 1).double()
    with precision("tf32"), tritonnet.backend("triton"):
        torch.testing.assert_close(F.conv2d(x, w), torch.nn.functional.conv2d(x, w), rtol=1e-11, atol=1e-11)
        rows, other = x.flatten(1), torch.randn(70, 40 * 99).double()
        torch.testing.assert_close(F.linear(rows, other), rows @ other.t(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("case", thorough_if(lambda case: case == "LeNet step", ["cross_entropy", "LeNet step"]))
def test_approximations_at_their_worst(case, memory_is_watched):
    """Powers and quotients with the largest errors that the ISA allows a GPU."""
    machine = memory_is_watched
    machine.worst = True
    check(case, "float32")
    assert any(opcode.startswith(("ex2.approx", "div.full")) for opcode in machine.seen)


def test_each_architecture_has_its_own_code():
    """Also where one process compiles for all of them."""
    x, seen = torch.randn(64, 64, dtype=torch.bfloat16), {}
    for arch in (*ptx.ARCHITECTURES, *ptx.ARCHITECTURES):
        with ptx.emulate(arch) as machine, tritonnet.backend("triton"):
            with tiles.only("matrices", tiles.Tile(64, 64, 64, num_warps=4, num_stages=3)):
                F.linear(x, x)
        products = {opcode.split(".")[0] for opcode in machine.seen if "mma" in opcode}
        assert seen.setdefault(arch, products) == products
    assert seen == {"sm_80": {"mma"}, "sm_90": {"wgmma"}, "sm_100": {"tcgen05"}}

"""Offsets of every kernel past 2^31 elements, in tensors of which only a few pages are touched."""

from unittest import mock

import pytest
import torch
from conftest import DEVICE, thorough_if
from filelock import FileLock
from memory import CHUNK, GUARDED, watched

import tritonnet
from tritonnet.kernels import launchers as L
from tritonnet.kernels import product
from tritonnet.kernels.conv2d import padding

BIG = 2**17
ROWS = 2**24 + 16
WINDOW = (2, 2), (1, 1), (0, 0), (1, 1)
HALVES = (3, 3), (2, 2), (1, 1), (1, 1)
COUNTED = False, True, None  # of avg_pool2d, after the window
DILATED = (2, 2), (1, 1), (0, 0), (2, 2)


def plain(groups=1, stride=1, mode="zeros", dilation=1):
    """A convolution's arguments without padding, after its tensors."""
    return (stride, stride), (0,) * 4, (dilation, dilation), groups, mode


def empty(*size, last=False, dtype=torch.float16):
    """Zeros, or arbitrary values where a tensor is huge: untouched pages take no memory."""
    layout = torch.channels_last if last else torch.contiguous_format
    t = torch.empty(size, dtype=dtype, memory_format=layout)
    return t.zero_() if t.numel() < 2**20 else t


def weight_grad(*arguments, with_bias=True):
    """Both results of a weight gradient in one tensor."""
    launcher = L.conv2d_weight_grad if len(arguments) > 2 else L.linear_weight_grad
    return torch.cat([g.flatten() for g in launcher(*arguments, with_bias)])


def many(*size, last=True, dtype=torch.float16):
    """BIG images in one image's memory."""
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.zeros(1, *size, dtype=dtype).contiguous(memory_format=layout).expand(BIG, *size)


def pooled(x, w, b=None):
    """The values of a form for few channels."""
    return L.conv2d_relu_max_pool2d(x, w, b, *plain(), (2, 2), (1, 1), (0, 0), False)[0]


def gated(x, w1, w2):
    return L.squeeze_excite(x, w1, None, w2, None, "relu", "relu")


def batch_norm_grad(x):
    """With all of its results."""
    mean, var = torch.zeros(x.shape[1]), torch.ones(x.shape[1])
    return L.batch_norm_grad(x, x, None, mean, var, None, None, 1e-5, "relu", 0.0, True, True)


def rows(width):
    """Many rows in one row's memory."""
    return torch.zeros(1, width, dtype=torch.float16).expand(ROWS, width)


def chain_forward(x, w1, b1, w2, b2):
    """Both results of a chain of two layers."""
    return L.linear_chain(x, w1, b1, w2, b2, None, None, None, None, True)


def chain_input_grad(dy, hidden, w1, w2):
    return L.linear_chain_input_grad(dy, hidden, w1, w2, None, None, True)


# By kernel: calls whose result has more than 2^31 elements.
RESULTS = {
    "conv2d_forward_kernel": [
        lambda: L.conv2d(empty(1, 1, 2**13, 2**14), empty(17, 1, 1, 1), None, *plain(dilation=2)),
        lambda: L.conv2d(many(16, 8, 8), empty(257, 16, 1, 1), empty(257), *plain()),
        lambda: L.conv2d_partials(many(16, 8, 8), empty(257, 16, 1, 1), *plain()),
    ],
    "conv2d_input_grad_kernel": [
        lambda: L.conv2d_input_grad(
            empty(1, 1, 2**13, 2**14), empty(1, 17, 1, 1), (1, 17, 2**13, 2**14), *plain(dilation=2)
        ),
        lambda: L.conv2d_input_grad(many(16, 8, 8), empty(16, 257, 1, 1), (BIG, 257, 8, 8), *plain()),
        lambda: L.conv2d_input_grad(many(16, 8, 8), empty(16, 66, 2, 2), (BIG, 66, 16, 16), *plain(stride=2)),
    ],
    "conv2d_weight_grad_kernel": [
        lambda: L.conv2d_weight_grad(
            empty(1, 2**20, 1, 1), empty(1, 15, 23, 23), (2**20, 15, 12, 12), *plain(dilation=2), True
        ),
        lambda: L.conv2d_weight_grad(
            empty(1, 2**16, 1, 1), empty(1, 2**16 + 1, 1, 1), (2**16, 2**16 + 1, 1, 1), *plain(), True
        ),
        lambda: L.conv2d_weight_grad(  # all taps in one program
            empty(1, 2**14 + 16, 3, 3), empty(1, 2**14, 3, 3), (2**14 + 16, 2**14, 3, 3), *PADDED, 1, "zeros", True
        ),
        lambda: L.conv2d_weight_grad(  # three taps
            empty(1, 2**15, 1, 6), empty(1, 2**15, 1, 8), (2**15, 2**15, 1, 3), *plain(), True
        ),
    ],
    "few_channels_product_kernel": [
        lambda: L.conv2d(empty(1, 1, 2**13, 2**14), empty(17, 1, 1, 1), None, *plain()),
        lambda: L.conv2d(many(15, 8, 8), empty(257, 15, 1, 1), empty(257), *plain()),
        lambda: L.conv2d_input_grad(many(3, 8, 8), empty(3, 66, 2, 2), (BIG, 66, 16, 16), *plain(stride=2)),
    ],
    "place_few_filters_kernel": [
        lambda: L.conv2d_input_grad(empty(0, 2**23 + 8, 2, 2), empty(2**23 + 8, 15, 4, 4), (1, 15, 5, 5), *plain())
    ],
    "few_channels_lanes_kernel": [
        lambda: L.conv2d(
            empty(1, 1, 2**13, 2**14, dtype=torch.float32), empty(17, 1, 1, 1, dtype=torch.float32), None, *plain()
        ),
        lambda: L.conv2d_input_grad(
            many(1, 8, 8, last=False, dtype=torch.float32), empty(1, 66, 2, 2, dtype=torch.float32), (BIG, 66, 16, 16),
            *plain(stride=2),
        ),
    ],
    "few_channels_weight_grad_kernel": [
        lambda: L.conv2d_weight_grad(empty(1, 2**20, 1, 1), empty(1, 15, 12, 12), (2**20, 15, 12, 12), *plain(), True),
    ],
    "fold_few_weight_grad_kernel": [
        lambda: L.conv2d_weight_grad(empty(1, 2**20, 1, 1), empty(1, 15, 12, 12), (2**20, 15, 12, 12), *plain(), True),
    ],
    "conv2d_relu_max_pool2d_forward_kernel": [
        lambda: L.conv2d_relu_max_pool2d(
            empty(1, 1, 2**13, 2**14), empty(17, 1, 1, 1), None, *plain(), (2, 2), (1, 1), (1, 1), False
        ),
        lambda: L.conv2d_relu_max_pool2d(
            many(16, 8, 8), empty(257, 16, 1, 1), empty(257), *plain(), (2, 2), (1, 1), (1, 1), False
        ),
    ],
    "conv2d_relu_max_pool2d_product_kernel": [
        lambda: pooled(many(3, 8, 8), empty(336, 3, 1, 1)),
        lambda: pooled(many(3, 8, 8), empty(336, 3, 1, 1, last=True), empty(336)),
        lambda: pooled(empty(1, 1, 2**15 + 1, 2**14 + 1), empty(4, 1, 1, 1)),
    ],
    "conv2d_relu_max_pool2d_lanes_kernel": [
        lambda: pooled(
            empty(1, 1, 2**15 + 1, 2**14 + 1, dtype=torch.float32), empty(4, 1, 1, 1, dtype=torch.float32)
        ),
    ],
    "place_filters_kernel": [lambda: L.conv2d_relu_max_pool2d(
        empty(1, 15, 3, 4), empty(2**23 + 8, 15, 1, 1), None, *plain(), (2, 2), (8, 8), (0, 0), False
    )],
    "conv2d_relu_max_pool2d_input_grad_kernel": [
        lambda: L.conv2d_relu_max_pool2d_input_grad(
            many(1, 32, 32), many(1, 32, 32, dtype=torch.uint8), empty(1, 15, 2, 2), (BIG, 15, 34, 34),
            *plain(), *WINDOW[:3],
        ),
    ],
    "conv2d_relu_max_pool2d_weight_grad_kernel": [
        lambda: L.conv2d_relu_max_pool2d_weight_grad(
            empty(1, 2**23 + 8, 1, 1), torch.zeros(1, 2**23 + 8, 1, 1, dtype=torch.uint8),
            empty(1, 1, 16, 16), (2**23 + 8, 1, 16, 16), *plain(), (1, 1), (1, 1), (0, 0), True,
        ),
    ],
    "filters_for_blocks_kernel": [  # a test has no time to sum over more filters
        lambda: L.conv2d_relu_max_pool2d_input_grad(
            empty(1, 2**19 + 16, 0, 0), empty(1, 2**19 + 16, 0, 0), empty(2**19 + 16, 15, 2, 2), (1, 15, 2, 2),
            *plain(), *WINDOW[:3],
        ),
    ],
    "depthwise_forward_kernel": [
        lambda: L.conv2d(many(8, 16, 16), empty(72, 1, 1, 1), None, *plain(8)),
        lambda: L.conv2d(many(8, 16, 16, last=False), empty(72, 1, 1, 1), None, *plain(8)),
    ],
    "depthwise_input_grad_kernel": [
        lambda: L.conv2d_input_grad(many(16, 30, 30), empty(16, 1, 4, 4), (BIG, 16, 33, 33), *plain(16)),
        lambda: L.conv2d_input_grad(many(16, 30, 30, last=False), empty(16, 1, 4, 4), (BIG, 16, 33, 33), *plain(16)),
    ],
    "depthwise_weight_grad_kernel": [
        lambda: L.conv2d_weight_grad(
            empty(1, 2**27, 1, 1), empty(1, 2**27, 1, 1), (2**27, 1, 17, 1),
            (1, 1), (8, 8, 0, 0), (1, 1), 2**27, "zeros", True,
        ),
    ],
    "cross_entropy_kernel": [
        lambda: L.cross_entropy(
            empty(2**21, 1088), torch.zeros(1, dtype=torch.int64).expand(2**21), None, "sum", 0, 0.0
        ),
    ],
    "cross_entropy_grad_kernel": [
        lambda: L.cross_entropy_grad(
            empty(1).expand(2**24), empty(2**24, 136), torch.zeros(1, dtype=torch.int64).expand(2**24), 0
        ),
        lambda: L.cross_entropy_grad(  # only the result is huge
            empty(1)[0], rows(136), torch.zeros(1, dtype=torch.int64).expand(ROWS), 0
        ),
    ],
    "fold_padding_kernel": [
        lambda: padding.fold_padding(many(16, 35, 35), empty(BIG, 16, 33, 33), (1, 1, 1, 1), "reflect"),
        lambda: padding.fold_padding(many(16, 35, 35), empty(BIG, 16, 33, 33, last=True), (1, 1, 1, 1), "circular"),
    ],
    "max_pool2d_forward_kernel": [
        lambda: L.max_pool2d(many(20, 28, 28), (2, 2), (1, 1), (1, 1), (1, 1), False),  # only the result is huge
        lambda: L.max_pool2d(many(16, 34, 34, last=False), *WINDOW, False),
    ],
    "max_pool2d_scatter_blocks_kernel": [
        lambda: L.max_pool2d_scatter(
            many(16, 30, 30), many(16, 30, 30, dtype=torch.uint8), (33, 33), (4, 4), *WINDOW[1:]
        ),
        lambda: L.max_pool2d_scatter(
            many(16, 17, 17, last=False), many(16, 17, 17, dtype=torch.uint8, last=False), (33, 33), *HALVES
        ),
    ],
    "max_pool2d_scatter_kernel": [
        lambda: L.max_pool2d_scatter(
            many(16, 30, 30), many(16, 30, 30, dtype=torch.uint8), (36, 36), (4, 4), *WINDOW[1:3], (2, 2)
        ),
    ],
    "max_pool2d_gather_kernel": [
        lambda: L.max_pool2d_gather(many(16, 34, 34), many(16, 33, 33, dtype=torch.uint8), *WINDOW),
        lambda: L.max_pool2d_indices(many(16, 33, 33, dtype=torch.uint8), 34, *WINDOW),
    ],
    "avg_pool2d_forward_kernel": [
        lambda: L.avg_pool2d(many(20, 28, 28), (2, 2), (1, 1), (1, 1), *COUNTED),  # only the result is huge
        lambda: L.avg_pool2d(many(16, 34, 34, last=False), *WINDOW[:3], *COUNTED),
    ],
    "avg_pool2d_grad_blocks_kernel": [
        lambda: L.avg_pool2d_grad(many(16, 30, 30), (33, 33), (4, 4), *WINDOW[1:3], *COUNTED, True),
        lambda: L.avg_pool2d_grad(many(16, 17, 17, last=False), (33, 33), *HALVES[:3], *COUNTED, False),
    ],
    "avg_pool2d_grad_kernel": [
        lambda: L.avg_pool2d_grad(many(16, 8, 8), (33, 33), (5, 5), (4, 4), (0, 0), *COUNTED, True),
    ],
    "adaptive_avg_pool2d_kernel": [
        lambda: L.adaptive_avg_pool2d(many(16, 20, 20), (33, 33)),
        lambda: L.adaptive_avg_pool2d_grad(many(16, 20, 20), (33, 33), False),
    ],
    "whole_avg_pool2d_kernel": [
        lambda: L.adaptive_avg_pool2d(many(2**14 + 16, 1, 2), (1, 1)),
        lambda: L.adaptive_avg_pool2d(many(2**14 + 16, 1, 2, last=False), (1, 1)),
    ],
    "whole_avg_pool2d_grad_kernel": [
        lambda: L.adaptive_avg_pool2d_grad(many(16, 1, 1), (33, 33), True),
        lambda: L.adaptive_avg_pool2d_grad(many(16, 1, 1), (33, 33), False),
    ],
    "relu_kernel": [lambda: L.relu(empty(2**31 + 8)), lambda: L.relu_(empty(2**31 + 8))],
    "relu_grad_kernel": [lambda: L.relu_grad(empty(2**31 + 8), empty(2**31 + 8))],
    "epilogue_kernel": [
        lambda: L.epilogue(empty(2**31 + 8), *[None] * 5, 0.0, "silu", 0.0),
        lambda: L.activate_(empty(2**31 + 8), "silu", 0.0),
        lambda: L.epilogue(
            empty(2, 5, 2**28), None, None, empty(5), None, empty(2, 5, 2**28), 0.0, "none", 0.0
        ),
    ],
    **dict.fromkeys(
        ("batch_norm_sums_kernel", "batch_norm_grad_kernel"),
        [lambda: batch_norm_grad(empty(2**11 + 2, 2**20)), lambda: batch_norm_grad(empty(2, 2**20, 2**10 + 1))],
    ),
    # Many channels, so that a program's share of them is small.
    "batch_statistics_kernel": [
        lambda: L.batch_statistics(empty(2**11 + 2, 2**20)),
        lambda: L.batch_statistics(empty(2, 2**20, 2**10 + 1)),
    ],
    "activation_grad_kernel": [lambda: L.activation_grad(empty(2**31 + 8), empty(2**31 + 8), "silu", 0.0)],
    "squeeze_excite_kernel": [
        lambda: gated(empty(BIG, 257, 8, 8, last=True), empty(3, 257), empty(257, 3)),
        lambda: gated(empty(BIG, 257, 8, 8), empty(3, 257), empty(257, 3)),
    ],
    # Rows of 14 bytes, and of an odd number of elements, are not for descriptors.
    "linear_forward_kernel": [lambda: L.linear(empty(2**24, 7), empty(136, 7), empty(136))],
    "linear_weight_grad_kernel": [lambda: L.linear_weight_grad(empty(1, 2**16), empty(1, 2**15 + 17), True)],
    "product_kernel": [
        lambda: L.linear(empty(2**24, 8), empty(136, 8), empty(136)),
        lambda: L.linear_weight_grad(empty(1, 2**16), empty(1, 2**15 + 16), True),
        lambda: L.conv2d(empty(1, 16, 2**9, 2**10), empty(4104, 16, 1, 1), empty(4104), *plain()),
        lambda: L.conv2d(empty(BIG, 16, 8, 8, last=True), empty(264, 16, 1, 1), None, *plain()),
        lambda: L.conv2d_partials(empty(BIG, 16, 8, 8, last=True), empty(264, 16, 1, 1), *plain()),
        lambda: L.conv2d_input_grad(empty(BIG, 16, 8, 8, last=True), empty(16, 264, 1, 1), (BIG, 264, 8, 8), *plain()),
        lambda: L.conv2d_weight_grad(
            empty(1, 2**16, 1, 1), empty(1, 2**15 + 16, 1, 1), (2**16, 2**15 + 16, 1, 1), *plain(), True
        ),
    ],
    "linear_chain_forward_kernel": [
        lambda: chain_forward(rows(8), empty(128, 8), empty(128), empty(128, 128), empty(128)),
        lambda: chain_forward(rows(8), empty(128, 8), None, empty(1, 128), None),  # only the hidden layer is huge
    ],
    "linear_chain_input_grad_kernel": [
        lambda: chain_input_grad(empty(ROWS, 8), empty(ROWS, 128), empty(128, 8), empty(8, 128)),
        # Only the input's gradient is huge.
        lambda: chain_input_grad(empty(ROWS, 8), empty(ROWS, 4), empty(4, 128), empty(8, 4)),
    ],
    "linear_chain_weight_grad_kernel": [
        lambda: L.linear_chain_weight_grad(
            empty(1, 8), empty(1, 128), empty(1, 2**24 + 16), empty(1, 128), [128], True
        ),
    ],
}  # fmt: skip


def whole(*size, dtype=torch.float16):
    """Small integers, whose sums are exact in any order."""
    return torch.randint(-3, 4, size).to(DEVICE, dtype)


def last(*size):
    return whole(*size).contiguous(memory_format=torch.channels_last)


def code(*size):
    return torch.randint(4, size, dtype=torch.uint8, device=DEVICE)


IMAGES = (3, 3, 6, 6)
PADDED = (1, 1), (1,) * 4, (1, 1)
SPREAD = (1, 1), (2,) * 4, (2, 2)


POOLED = (3, 3, 4, 5)
POOL = (2, 2), (2, 1), (1, 0)


def fused(x, w, b):
    return L.conv2d_relu_max_pool2d(x, w, b, *PADDED, 1, "zeros", *POOL, False)[0]


def input_grad(dy, code, w):
    return L.conv2d_relu_max_pool2d_input_grad(dy, code, w, IMAGES, *PADDED, 1, "zeros", *POOL)


def pooled_weight_grad(dy, code, x):
    gradients = L.conv2d_relu_max_pool2d_weight_grad(dy, code, x, (3, 3, 3, 3), *PADDED, 1, "zeros", *POOL, True)
    return torch.cat([g.flatten() for g in gradients])


def by_descriptors(function):
    """The function, with descriptors for small products too."""

    def call(*tensors):
        with mock.patch.object(product, "LARGE", 1):
            return function(*tensors)

    return call


# By kernel: calls and their tensors; each tensor is tried with each of its strides too long for 32 bits.
INPUTS = {
    "conv2d_forward_kernel": [
        (lambda x, w, b: L.conv2d(x, w, b, *SPREAD, 1, "zeros"), whole(*IMAGES), whole(3, 3, 3, 3), whole(3)),
        (lambda x, w: L.conv2d(x, w, None, *PADDED, 1, "zeros"), last(3, 16, 5, 4), last(3, 16, 3, 3)),
    ],
    "conv2d_input_grad_kernel": [
        (lambda dy, w: L.conv2d_input_grad(dy, w, IMAGES, *SPREAD, 1, "zeros"), whole(*IMAGES), whole(3, 3, 3, 3)),
        (
            lambda dy, w: L.conv2d_input_grad(dy, w, (3, 17, 6, 6), *PADDED, 1, "zeros"),
            last(3, 16, 6, 6), last(16, 17, 3, 3),
        ),
    ],
    "conv2d_weight_grad_kernel": [
        (lambda dy, x: weight_grad(dy, x, (3, 3, 3, 3), *SPREAD, 1, "zeros"), whole(*IMAGES), whole(*IMAGES)),
        (lambda dy, x: weight_grad(dy, x, (3, 16, 3, 3), *PADDED, 1, "zeros"), last(*IMAGES), last(3, 16, 6, 6)),
        # All taps in one program, and three of them: of one row of pixels, which follow each other at any distance.
        (lambda dy, x: weight_grad(dy, x, (3, 16, 3, 3), *PADDED, 1, "zeros"), last(1, 3, 1, 6), last(1, 16, 1, 6)),
        (
            lambda dy, x: weight_grad(dy, x, (3, 16, 1, 3), (1, 1), (0, 0, 1, 1), (1, 1), 1, "zeros"),
            last(1, 3, 1, 6), last(1, 16, 1, 6),
        ),
    ],
    "few_channels_product_kernel": [
        (lambda x, w, b: L.conv2d(x, w, b, *PADDED, 1, "zeros"), whole(*IMAGES), whole(3, 3, 3, 3), whole(3)),
        (lambda x, w, b: L.conv2d(x, w, b, *PADDED, 1, "zeros"), last(*IMAGES), last(3, 3, 3, 3), whole(3)),
        (lambda dy, w: L.conv2d_input_grad(dy, w, IMAGES, *PADDED, 1, "zeros"), last(3, 16, 6, 6), last(16, 3, 3, 3)),
    ],
    "place_few_filters_kernel": [
        (lambda w: L.conv2d(torch.ones_like(w), w, None, *PADDED, 1, "zeros"), whole(*IMAGES)),
    ],
    "few_channels_lanes_kernel": [
        (
            lambda x, w, b: L.conv2d(x, w, b, *PADDED, 1, "zeros"),
            *(whole(*size, dtype=torch.float32) for size in (IMAGES, (3, 3, 3, 3), (3,))),
        ),
    ],
    "few_channels_weight_grad_kernel": [
        (lambda dy, x: weight_grad(dy, x, (3, 3, 3, 3), *PADDED, 1, "zeros"), whole(*IMAGES), whole(*IMAGES)),
        (lambda dy, x: weight_grad(dy, x, (3, 3, 3, 3), *PADDED, 1, "zeros"), last(*IMAGES), last(*IMAGES)),
    ],
    "conv2d_relu_max_pool2d_forward_kernel": [
        (fused, whole(*IMAGES), whole(3, 3, 3, 3), whole(3)),
        (fused, last(3, 16, 5, 4), last(3, 16, 3, 3), whole(3)),
    ],
    "conv2d_relu_max_pool2d_product_kernel": [
        (pooled, whole(*IMAGES), whole(5, 3, 3, 3), whole(5)),
        (pooled, last(3, 5, 5, 4), last(6, 5, 2, 2), whole(6)),
    ],
    "conv2d_relu_max_pool2d_lanes_kernel": [
        (pooled, *(whole(*size, dtype=torch.float32) for size in ((2, 2, 5, 6), (3, 2, 2, 2), (3,)))),
    ],
    "place_filters_kernel": [(pooled, whole(*IMAGES), whole(5, 3, 3, 3))],
    "conv2d_relu_max_pool2d_input_grad_kernel": [
        (input_grad, whole(*POOLED), code(*POOLED), whole(3, 3, 3, 3)),
        (input_grad, last(*POOLED), code(*POOLED).contiguous(memory_format=torch.channels_last), whole(3, 3, 3, 3)),
    ],
    "conv2d_relu_max_pool2d_weight_grad_kernel": [
        (pooled_weight_grad, whole(*POOLED), code(*POOLED), whole(*IMAGES)),
    ],
    "filters_for_blocks_kernel": [
        (lambda w: input_grad(torch.ones_like(w), torch.zeros_like(w, dtype=torch.uint8), w), whole(3, 3, 3, 3)),
    ],
    "depthwise_forward_kernel": [
        (lambda x, w, b: L.conv2d(x, w, b, *PADDED, 3, "zeros"), whole(*IMAGES), whole(6, 1, 3, 3), whole(6)),
    ],
    "depthwise_input_grad_kernel": [
        (lambda dy, w: L.conv2d_input_grad(dy, w, IMAGES, *PADDED, 3, "zeros"), whole(3, 6, 6, 6), whole(6, 1, 3, 3)),
    ],
    "depthwise_weight_grad_kernel": [
        (lambda dy, x: weight_grad(dy, x, (6, 1, 3, 3), *PADDED, 3, "zeros"), whole(3, 6, 6, 6), whole(*IMAGES)),
    ],
    "cross_entropy_kernel": [
        (
            lambda x, t, w: L.cross_entropy(x, t, w, "mean", -100, 0.1)[1],
            whole(3, 4), torch.tensor([1, 0, 3], device=DEVICE), whole(4) + 4,  # no mean over a weight of 0
        ),
    ],
    "cross_entropy_grad_kernel": [
        (
            lambda d, g, t: L.cross_entropy_grad(d, g, t, 1),
            whole(3), whole(3, 4), torch.tensor([1, 0, 3], device=DEVICE),
        ),
    ],
    "fold_padding_kernel": [
        (lambda dp: padding.fold_padding(dp, dp.new_empty(3, 3, 4, 4), (1,) * 4, "circular"), whole(*IMAGES)),
    ],
    "max_pool2d_forward_kernel": [
        (lambda x: L.max_pool2d(x, *WINDOW, False)[0], whole(*IMAGES)),
        (lambda x: L.max_pool2d(x, *HALVES, False)[1], whole(*IMAGES)),
        (lambda x: L.max_pool2d_values(x, (6, 6), (2, 2), (3, 3), (1, 1), False), last(*IMAGES)),
    ],
    "max_pool2d_scatter_blocks_kernel": [
        (lambda dy, c: L.max_pool2d_scatter(dy, c, (7, 7), *WINDOW), whole(*IMAGES), code(*IMAGES)),
        (lambda dy, c: L.max_pool2d_scatter(dy, c, (12, 12), *HALVES), whole(*IMAGES), code(*IMAGES)),
    ],
    "max_pool2d_scatter_kernel": [
        (lambda dy, c: L.max_pool2d_scatter(dy, c, (8, 8), *DILATED), whole(*IMAGES), code(*IMAGES)),
    ],
    "max_pool2d_gather_kernel": [
        (lambda x, c: L.max_pool2d_gather(x, c, *WINDOW), whole(3, 3, 7, 7), code(*IMAGES)),
        (lambda c: L.max_pool2d_indices(c, 7, *WINDOW), code(*IMAGES)),
    ],
    "avg_pool2d_forward_kernel": [
        (lambda x: L.avg_pool2d(x, *WINDOW[:3], *COUNTED), whole(*IMAGES)),
        (lambda x: L.avg_pool2d(x, *HALVES[:3], True, False, None), whole(*IMAGES)),
        (lambda x: L.avg_pool2d(x, (5, 5), (2, 2), (2, 2), *COUNTED), last(*IMAGES)),
    ],
    "avg_pool2d_grad_blocks_kernel": [
        (lambda dy: L.avg_pool2d_grad(dy, (7, 7), *WINDOW[:3], *COUNTED, False), whole(*IMAGES)),
        (lambda dy: L.avg_pool2d_grad(dy, (12, 12), *HALVES[:3], *COUNTED, False), whole(*IMAGES)),
    ],
    "avg_pool2d_grad_kernel": [
        (lambda dy: L.avg_pool2d_grad(dy, (25, 25), (5, 5), (4, 4), (0, 0), *COUNTED, False), whole(*IMAGES)),
    ],
    "adaptive_avg_pool2d_kernel": [
        (lambda x: L.adaptive_avg_pool2d(x, (4, 5)), whole(*IMAGES)),
        (lambda dy: L.adaptive_avg_pool2d_grad(dy, (7, 9), True), last(*IMAGES)),
    ],
    "whole_avg_pool2d_kernel": [
        (lambda x: L.adaptive_avg_pool2d(x, (1, 1)), whole(*IMAGES)),
        (lambda x: L.adaptive_avg_pool2d(x, (1, 1)), last(*IMAGES)),
    ],
    "whole_avg_pool2d_grad_kernel": [
        (lambda dy: L.adaptive_avg_pool2d_grad(dy, (6, 6), False), whole(3, 3, 1, 1)),
        (lambda dy: L.adaptive_avg_pool2d_grad(dy, (6, 6), True), whole(3, 3, 1, 1)),
    ],
    "linear_forward_kernel": [(lambda x, w, b: L.linear(x, w, b), whole(3, 5), whole(4, 5), whole(4))],
    "linear_weight_grad_kernel": [
        (weight_grad, whole(3, 5), whole(3, 4)),
    ],
    "product_kernel": [
        (by_descriptors(L.linear), whole(5, 16), whole(9, 16), whole(9)),
        (by_descriptors(weight_grad), whole(5, 16), whole(5, 24)),
    ],
    "linear_chain_forward_kernel": [
        (lambda *t: torch.cat(chain_forward(*t), 1), whole(3, 5), whole(4, 5), whole(4), whole(2, 4), whole(2)),
    ],
    "linear_chain_input_grad_kernel": [
        (lambda *t: torch.cat(chain_input_grad(*t), 1), whole(3, 2), whole(3, 4), whole(4, 5), whole(2, 4)),
    ],
    "linear_chain_weight_grad_kernel": [
        (
            lambda *t: torch.cat(L.linear_chain_weight_grad(*t, [4], True)),
            whole(3, 2), whole(3, 4), whole(3, 5), whole(3, 4),
        ),
    ],
}  # fmt: skip
# These kernels take only dense tensors, which are as long as the result.
DENSE = {
    "relu_kernel", "relu_grad_kernel", "epilogue_kernel", "activation_grad_kernel", "squeeze_excite_kernel",
    "fold_few_weight_grad_kernel", "batch_statistics_kernel", "batch_norm_sums_kernel", "batch_norm_grad_kernel",
}  # fmt: skip
# These kernels take a program's sums, each of thousands of elements, or a net's weights.
SMALL = {
    "sum_partials_kernel", "sum_losses_kernel", "fold_statistics_kernel", "fold_sums_kernel", "lenet_pack_kernel",
    "lenet_update_kernel",
}  # fmt: skip
# (kernel, tensor, dimension): in a tensor that is far along its contiguous dimension another kernel takes its place.
ELSEWHERE = {("few_channels_lanes_kernel", 0, 3), ("product_kernel", 0, 1), ("product_kernel", 1, 1)}
# Not tried: one program of a batch of a million images takes the interpreter minutes.
UNTRIED = {"lenet_forward_kernel", "lenet_gradient_kernel"}


def test_every_kernel_is_here():
    kernels = {kernel.fn.__name__ for kernel in L.KERNELS} - SMALL - UNTRIED
    assert set(RESULTS) == kernels and set(INPUTS) == kernels - DENSE


@pytest.fixture
def one_at_a_time(tmp_path_factory):
    """Processes that share a GPU take turns at filling its memory, and release it afterwards."""
    if DEVICE == "cpu":
        yield
    else:
        with FileLock(tmp_path_factory.getbasetemp().parent / "huge.lock"):
            yield
            torch.cuda.empty_cache()


# They take as long as all others.
SLOW = "cross_entropy_kernel", "conv2d_input_grad_kernel"


def require(needed):
    """Skips the test if the GPU has less free memory; on the CPU untouched pages take none."""
    if DEVICE != "cpu":
        torch.cuda.empty_cache()
        left, _ = torch.cuda.mem_get_info()
        if left < needed:
            pytest.skip(f"needs {needed / 2**30:.0f} GiB of the GPU's memory, {left / 2**30:.0f} GiB are left")


@pytest.mark.skipif(DEVICE != "cpu", reason="only the interpreter can run a few programs of a launch")
@pytest.mark.parametrize("kernel", thorough_if(lambda kernel: kernel in SLOW, RESULTS))
@pytest.mark.sampled(3)
def test_huge_results(kernel, unpoisoned, full_precision):
    """The first programs, the last, and some in between stay inside their tensors."""
    for call in RESULTS[kernel]:
        with watched(sample=5) as violations, tritonnet.count_launches() as launches:
            call()
        assert kernel in launches
        assert not violations, "\n".join(violations)


# The number of elements in a storage for `far`.
FAR = 2**31 + 2**16


def far(t, dim):
    """t with elements so far apart along one dimension that each stride fits 32 bits but offsets do not."""
    stride = list(t.stride())
    stride[dim] = (2**31 + 64) // (t.size(dim) - 1)
    storage = torch.empty(FAR, dtype=t.dtype, device=t.device)
    return storage.as_strided(t.shape, stride).copy_(t)


def needed(kernel):
    """Bytes of GPU memory for one call at a time, with the guard bands, and for everything small."""
    widest = max(t.element_size() for _, *tensors in INPUTS[kernel] for t in tensors)
    return GUARDED * widest * FAR + 4 * CHUNK


def test_what_is_needed_is_said(monkeypatch):
    """No kernel asks for more than a card of 80 GB has; where less is free, the skip's reason says what it takes."""
    assert max(map(needed, INPUTS)) == needed("cross_entropy_kernel") < 40 * 2**30
    monkeypatch.setitem(globals(), "DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (20 * 2**30, 80 * 2**30))
    require(needed("linear_forward_kernel"))
    with pytest.raises(pytest.skip.Exception, match="needs 33 GiB of the GPU's memory, 20 GiB are left"):
        require(needed("cross_entropy_kernel"))


@pytest.mark.parametrize("kernel", INPUTS)
@pytest.mark.sampled(3)
def test_far_inputs(kernel, unpoisoned, full_precision, one_at_a_time):
    if kernel == "product_kernel" and not product.described():
        pytest.skip("there are no tensor descriptors before sm_90")
    require(needed(kernel))
    for call, *tensors in INPUTS[kernel]:
        with tritonnet.count_launches() as launches:
            expected = call(*tensors)
        assert kernel in launches
        for i, t in enumerate(tensors):
            for dim in range(t.dim()):
                if t.size(dim) > 1:
                    # The huge tensor gets no name, which would keep it while the next one is made.
                    with tritonnet.count_launches() as launches:
                        result = call(*(far(t, dim) if j == i else other for j, other in enumerate(tensors)))
                    assert (kernel in launches) != ((kernel, i, dim) in ELSEWHERE), f"tensor {i}, dimension {dim}"
                    torch.testing.assert_close(result, expected, rtol=0, atol=0, msg=f"tensor {i}, dimension {dim}")

"""How a convolution with few channels is cut: blocks of pixels, and the patch of the image that each depends on.

In the forward the image is x and the blocks are pixels of y; in the input gradient the image is dy and the blocks are
pixels of dx; in the weight gradient the image is x and the blocks are pixels of dy.

A patch is read in runs of adjacent elements: a row's pixels with all channels in channels_last, otherwise a row's
pixels of one channel after another. A run starts at a multiple of UNIT elements, so that UNIT elements are read at
once; for this it may begin before and end after what the block depends on, where the filters are zeros.
"""

import itertools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import shapes
from .._common import cdiv, strides
from ..conv2d.patches import FLAT_BELOW

# A coordinate that is in no image, and which no sum with a coordinate brings back.
FAR = tl.constexpr(2**30)


@triton.jit
def in_index(steps, UNIT: tl.constexpr, INDEX: tl.constexpr):
    """Three strides in elements from strides in units, which may fit 32 bits where they do not."""
    return tl.cast(steps[0], INDEX) * UNIT, tl.cast(steps[1], INDEX) * UNIT, tl.cast(steps[2], INDEX) * UNIT


class Reach(NamedTuple):
    """Along one dimension: the first pixel that a block depends on, how many, and how far on the next block's are."""

    first: int
    count: int
    step: int

    @classmethod
    def of_pixels(cls, block, K, S, P):
        """For a block of the convolution's result."""
        return cls(-P, (block - 1) * S + K, block * S)

    @classmethod
    def of_gradient(cls, block, K, S, P):
        """For a block of the input's gradient; the stride divides its size, or it is the only one."""
        first = -((K - 1 - P) // S)
        return cls(first, (block - 1 + P) // S - first + 1, block // S)


class Cut(NamedTuple):
    """Sizes in pixels, those along a row in elements. The names are those of the kernels' constants."""

    BH: int
    BW: int
    STEP_H: int
    STEP_E: int
    TOP: int
    LEFT: int
    PATCH_H: int
    RUN: int
    PLANES: int
    SKIP: int
    UNIT: int

    @classmethod
    def of(cls, block, reach_h, reach_w, channels, pixels, unit):
        """`pixels`: whether channels are innermost."""
        inner = channels if pixels else 1
        start = reach_w.first * inner // unit * unit
        skip = reach_w.first * inner - start
        run = cdiv(skip + reach_w.count * inner, unit) * unit
        planes = 1 if pixels else channels
        step = reach_w.step * inner
        return cls(*block, reach_h.step, step, -reach_h.first, -start, reach_h.count, run, planes, skip, unit)

    @property
    def length(self):
        """Elements of a patch."""
        return self.PLANES * self.PATCH_H * self.RUN

    def blocks(self, size):
        """(rows, columns) of blocks in `size` (H, W) pixels."""
        return cdiv(size[0], self.BH), cdiv(size[1], self.BW)

    def constants(self, size, *others):
        """Those of a kernel that reads patches, for blocks in `size` (H, W) pixels; also the fields `others`."""
        names = ("BH", "BW", "STEP_H", "STEP_E", "TOP", "LEFT", "PATCH_H", "RUN", "UNIT", *others)
        edges = {"EDGE_H": size[0] % self.BH != 0, "EDGE_W": size[1] % self.BW != 0}
        return {name: getattr(self, name) for name in names} | edges


def least_block(gradient, size, stride):
    """(rows, columns) of the smallest block: in the input gradient of as many as the stride, if there are so many."""
    return (min(stride[0], size[0]), min(stride[1], size[1])) if gradient else (1, 1)


def candidates(sides, gradient, channels, size, kernel, stride, padding, pixels, unit):
    """The Cuts of an image with `channels`, whose blocks are `sides` times the least one for `size` (H, W) pixels."""
    (least_h, least_w), reach = least_block(gradient, size, stride), Reach.of_gradient if gradient else Reach.of_pixels
    for side_h, side_w in itertools.product(sides, sides):
        block = side_h * least_h, side_w * least_w
        reaches = [reach(block[i], kernel[i], stride[i], padding[2 * i]) for i in range(2)]
        for u in (unit >> i for i in range(unit.bit_length())):
            if reaches[1].step * (channels if pixels else 1) % u == 0:
                yield Cut.of(block, *reaches, channels, pixels, u)


class Taps(NamedTuple):
    """Which tap of a filter meets which pixels: kh = bh * OF_BLOCK_H + ph * OF_PATCH_H + FIRST_H, and kw likewise.

    With it pixel (ph, pw) of a patch contributes to pixel (bh, bw) of the block, if there is such a tap.
    """

    OF_BLOCK_H: int
    OF_PATCH_H: int
    FIRST_H: int
    OF_BLOCK_W: int
    OF_PATCH_W: int
    FIRST_W: int

    @classmethod
    def of(cls, cut, gradient, stride, padding, inner):
        """`inner` is the number of a run's elements in a pixel."""
        if not gradient:
            # A patch begins where the first window of its block does.
            return cls(-stride[0], 1, 0, -stride[1], 1, 0)
        # kh = bh + PH - oh * SH, where oh counts from the first row of the patch
        first_w = (cut.SKIP - cut.LEFT) // inner
        return cls(
            1, -stride[0], padding[0] + cut.TOP * stride[0], 1, -stride[1], padding[2] - first_w * stride[1]
        )  # fmt: skip


def in_planes(image):
    """Whether the pixels of a row of one channel are adjacent."""
    return image.shape[3] == 1 or image.stride(3) == 1


def _in_pixels(image):
    """Whether the channels of a row's pixels are adjacent, pixel by pixel."""
    C, W = image.shape[1], image.shape[3]
    return C > 1 and image.stride(1) == 1 and (W == 1 or image.stride(3) == C)


def unit_of(image, pixels):
    """The elements of a row that can be read at once."""
    (_, C, _, W), (stride_n, stride_c, stride_h, _) = image.shape, strides(image)
    return math.gcd(16 // image.itemsize, stride_n, stride_h, *((W * C,) if pixels else (W, stride_c)))


def readable(image, innermost):
    """(image, whether its rows are pixels with all their channels, elements of a row that can be read at once).

    The image is copied if its rows are not contiguous, or if it has many channels that are not innermost and
    `innermost` says that these have to be: the short rows of many channels would be read a few bytes at a time.
    """
    innermost = innermost and image.shape[1] >= FLAT_BELOW
    pixels = _in_pixels(image)
    if not pixels and (innermost or not in_planes(image)):
        layout = torch.channels_last if innermost else shapes.memory_format(image)
        image = image.contiguous(memory_format=layout)
        pixels = _in_pixels(image)
    return image, pixels, unit_of(image, pixels)


def serves(dtype, channels, padding, dilation, groups, pad_mode):
    """Whether product.py and weight_grad.py serve a convolution one of whose numbers of channels is `channels`."""
    return (
        0 < channels < FLAT_BELOW
        and groups == 1
        and dtype != torch.float64
        and tuple(dilation) == (1, 1)
        and (pad_mode == "zeros" or not any(padding))
    )

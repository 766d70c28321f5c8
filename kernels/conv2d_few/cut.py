"""How a convolution with few channels is cut: blocks of pixels, and the patch of the image that each depends on.

In the forward the image is x and the blocks are pixels of y; in the input gradient the image is dy and the blocks are
pixels of dx; in the weight gradient the image is x and the blocks are pixels of dy.

A patch is read in runs of adjacent elements: a row's pixels with all channels in channels_last, otherwise a row's
pixels of one channel after another. A run starts at a multiple of UNIT elements, so that UNIT elements are read at
once; for this it may begin before and end after what the block depends on, where the filters are zeros.
"""

from typing import NamedTuple

import torch

from .. import shapes
from .._common import cdiv, strides
from ..conv2d.patches import FLAT_BELOW


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
        """For a block of the input's gradient; the stride divides its size."""
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


def readable(image):
    """(image, whether its rows are pixels with all channels, elements of a row that can be read at once).

    The image is copied if its rows are not contiguous. Many channels have to be innermost: there one row of a patch is
    long, whereas the short rows of many channels are read a few bytes at a time.
    """
    _, C, _, W = image.shape
    stride_n, stride_c, stride_h, stride_w = strides(image)
    pixels = C > 1 and stride_c == 1 and stride_w in (C, 0)
    if not pixels and (C >= FLAT_BELOW or W > 1 and stride_w != 1):
        layout = torch.channels_last if C >= FLAT_BELOW else shapes.memory_format(image)
        return readable(image.contiguous(memory_format=layout))
    unit = 16 // image.itemsize
    while any(n % unit for n in (stride_n, stride_h, W * C if pixels else W, 0 if pixels else stride_c)):
        unit //= 2
    return image, pixels, unit


def serves(dtype, channels, padding, dilation, groups, pad_mode):
    """Whether product.py and weight_grad.py serve a convolution one of whose numbers of channels is `channels`."""
    return (
        0 < channels < FLAT_BELOW
        and groups == 1
        and dtype != torch.float64
        and tuple(dilation) == (1, 1)
        and (pad_mode == "zeros" or not any(padding))
    )

"""Which elements a program of a pooling kernel computes, of max_pool2d and avg_pool2d: strips of neighbours in memory.

The results, or blocks of their pixels, are cut into strips along the dimension that is contiguous: the channels in
channels_last, and otherwise the columns. A tile is (BLOCK_R, BLOCK_V): each row is a strip, of which a thread loads and
stores up to 16 bytes at once, and for which it computes once where it is.
"""

import math

import triton
import triton.language as tl

from ._common import OPTIONS, cdiv, divide, power_of_2, reciprocal, strides
from .tiles import flat_block


@triton.jit
def places(
    rows, inner, strips, middle, outer, inverse_strips, inverse_middle, inverse_outer,
    INNER_UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """(mask, n, c, h, w) of a tile; of those, one is (BLOCK_R, BLOCK_V) and the others are (BLOCK_R, 1)."""
    row = tl.program_id(0).to(INDEX) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    pixel = divide(row, strips, inverse_strips)
    along = (row - pixel * strips) * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    above = divide(pixel, middle, inverse_middle)
    n = divide(above, outer, inverse_outer)

    mask = row < rows
    if INNER_UNIT < BLOCK_V:
        mask = mask & (along < inner * INNER_UNIT)
    if CHANNELS_LAST:
        return mask, n, along, above - n * outer, pixel - above * middle
    else:
        return mask, n, above - n * outer, pixel - above * middle, along


@triton.jit
def offset(
    n, c, h, w, stride_n, stride_c, stride_h, stride_w,
    UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """The offsets of elements in a tensor, whose strides come from `laid_out`."""
    if CHANNELS_LAST:
        return (n * stride_n + h * stride_h + w * stride_w) * UNIT + c * stride_c
    else:
        return (n * stride_n + c * stride_c + h * stride_h) * UNIT + w * stride_w


@triton.jit
def step(h, w, stride_h, stride_w, UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr):
    """The offset between pixels that are h rows and w columns apart."""
    h, w = tl.full((1, 1), h, INDEX), tl.full((1, 1), w, INDEX)
    if CHANNELS_LAST:
        return (h * stride_h + w * stride_w) * UNIT
    else:
        return h * stride_h * UNIT + w * stride_w


@triton.jit
def within(i, size, LEAST: tl.constexpr):
    """Whether 0 <= i < size, where i >= LEAST."""
    return i < size if LEAST >= 0 else (i >= 0) & (i < size)


@triton.jit
def tap_inside(start, size, K: tl.constexpr, P: tl.constexpr, D: tl.constexpr):
    """Whether tap K of windows that begin at `start` is inside the image; each begins before the image's end."""
    if K == 0 and P > 0:
        return start >= 0
    else:
        return within(start + K * D, size, K * D - P)


def laid_out(t, channels_last):
    """(strides of t, their unit): all strides but that along strips are in units, of at most 16 bytes.

    Triton loads several elements at once if it can see that all rows are aligned for it.
    """
    along, found = 1 if channels_last else 3, strides(t)
    unit = math.gcd(16 // t.element_size(), *(stride for dim, stride in enumerate(found) if dim != along))
    return [stride if dim == along else stride // unit for dim, stride in enumerate(found)], unit


def strip_length(inner, most):
    """The length of strips: the longest up to `most`, a power of two, of which at most a quarter is idle."""
    length = min(most, power_of_2(inner))
    while cdiv(inner, length) * length * 3 > inner * 4:
        length //= 2
    return length


def over(size, channels_last, most):
    """The plan of a launch over `size` (N, C, H, W) elements or blocks in strips of up to `most`.

    Returns:
        Its grid, the first arguments of `places`, and the other constants.
    """
    N, C, H, W = size
    inner, middle, outer = (C, W, H) if channels_last else (W, H, C)
    length = strip_length(inner, most)
    strips, unit = cdiv(inner, length), math.gcd(inner, length)
    rows = N * outer * middle * strips
    block = max(1, flat_block(rows * length, 128 * length) // length)
    return (
        (cdiv(rows, block),),
        (rows, inner // unit, strips, middle, outer, *map(reciprocal, (strips, middle, outer))),
        dict(
            INNER_UNIT=unit, CHANNELS_LAST=channels_last, BLOCK_R=block, BLOCK_V=length, num_warps=4, **OPTIONS,
        ),
    )  # fmt: skip


def window_constants(kernel, stride, padding, dilation=None):
    """The constants of a window, of which those of the dilation are left out where there is none."""
    dilated = {} if dilation is None else dict(DH=dilation[0], DW=dilation[1])
    return dict(KH=kernel[0], KW=kernel[1], SH=stride[0], SW=stride[1], PH=padding[0], PW=padding[1], **dilated)


# Windows of at most so many pixels are unrolled, so that what is known of each pixel costs nothing. Loads of 25 pixels
# at once would spill registers.
UNROLLED = 16

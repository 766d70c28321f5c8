"""What the depthwise kernels share: lines of pixels, how many a thread computes, and their order in a launch.

A thread computes a line of LINE pixels, whose neighbours share the pixels that their windows load: along the width in
channels_last, for a vector of channels, and along the height in NCHW, where adjacent threads read adjacent columns. The
kernels know the first form alone: for NCHW the launchers swap height and width, of the window too.
"""

import torch
import triton
import triton.language as tl

from .. import shapes
from .._common import INTERPRETED, cdiv, divide, in_units, power_of_2, reciprocal, strides
from ..tiles import flat_block
from .padding import source

# Small windows are unrolled, and their weight gradient has all sums in registers.
MOST_UNROLLED = 25
# The most taps of a row that are unrolled.
MOST_TAPS = 16
# The most sums of a thread in a weight gradient.
MOST_SUMS = 100
# The lengths of lines. Widths of images are often 32 or 224 divided by a power of two.
LINES = 8, 7


def taps_of(KW):
    """How many of KW taps of a row are unrolled; their number divides KW."""
    return KW if KW <= MOST_TAPS else next(n for n in range(8, 0, -1) if KW % n == 0)


def line_for(size):
    """The length of lines of a row of `size` pixels, with the fewest pixels past its end."""
    return min(LINES, key=lambda line: -size % line)


def channels_first(*tensors):
    """Whether a launch over these tensors swaps height and width."""
    return shapes.memory_format(*tensors) is not torch.channels_last


def swapped(swap, *pairs):
    """(height, width) of each pair, swapped if asked for."""
    return [tuple(pair)[::-1] if swap else tuple(pair) for pair in pairs]


def steps_of(swap, *images):
    """The strides (n, c, height, width) of each image in units and the units (see in_units), swapped if asked for."""
    steps = []
    for t in images:
        n, c, h, w = strides(t)
        steps += [n, c, w, h] if swap else [n, c, h, w]
    return in_units(images[0].itemsize, *steps)


def blocks(units, channels, itemsize, swap, most=16):
    """(BLOCK_P lines, BLOCK_C channels) of a program whose threads load vectors of `most` bytes along the channels."""
    if INTERPRETED:
        return flat_block(units // 2, 0), 8
    if swap:
        return 128, 1
    narrow = min(16, power_of_2(channels))
    block_c = next((n for n in (64, 32) if channels % n == 0), narrow)
    return max(1, 128 * most // itemsize // block_c), block_c


def vector_of(taps, itemsize):
    """The bytes of a thread's vectors in a weight gradient, so that its sums of (rows, columns) of taps fit registers."""
    return 16 if taps[0] * taps[1] * 16 // itemsize <= MOST_SUMS else 8


def order_of(swap, rows, lines):
    """The sizes by which a unit's index is divided, and their reciprocals; see place."""
    inner, outer = (rows, lines) if swap else (lines, rows)
    return inner, outer, reciprocal(inner), reciprocal(outer)


@triton.jit
def place(p, inner, outer, inverse_inner, inverse_outer, SWAP: tl.constexpr):
    """(image, row, line) of unit p. Adjacent units are adjacent lines of a row, or if SWAP adjacent rows of a line."""
    rest = divide(p, inner, inverse_inner)
    n = divide(rest, outer, inverse_outer)
    fast, slow = p - rest * inner, rest - n * outer
    if SWAP:
        return n, fast, slow
    else:
        return n, slow, fast


@triton.constexpr_function
def columns(STEP, TAP, TAPS, LINE):
    """How many columns a line may read, from the first to the last."""
    return (LINE - 1) * STEP + (TAPS - 1) * abs(TAP) + 1


@triton.constexpr_function
def column(k, STEP, TAP, LINE):
    """Column number k of those that a line may read, counted from its first pixel, in the order of the taps."""
    return k if TAP > 0 else (LINE - 1) * STEP - k


@triton.constexpr_function
def pixel(i, t, STEP, TAP, LINE):
    """The pixel j of a line whose tap t reads column i = j * STEP + t * TAP, or -1."""
    j, rest = divmod(i - t * TAP, STEP)
    return j if rest == 0 and 0 <= j < LINE else -1


@triton.constexpr_function
def is_read(i, STEP, TAP, TAPS, LINE):
    """Whether a pixel of the line reads column i."""
    return any(0 <= i - t * TAP < LINE * STEP and (i - t * TAP) % STEP == 0 for t in range(TAPS))


@triton.jit
def replaced(values, i: tl.constexpr, value):
    """A tuple of tensors with another one at i."""
    return values[:i] + (value,) + values[i + 1 :]


@triton.jit
def zeros(COUNT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr):
    """A tuple of COUNT tensors (BLOCK_P, BLOCK_C)."""
    tensors = ()
    for _ in tl.static_range(COUNT):
        tensors = tensors + (tl.zeros((BLOCK_P, BLOCK_C), ACC),)
    return tensors


@triton.jit
def load_taps(w_ptrs, stride, mask, last_tap, TAPS: tl.constexpr, ALL: tl.constexpr, ACC: tl.constexpr):
    """A row of TAPS taps, as a tuple. Unless ALL, the last one exists only where `last_tap` is true."""
    taps = ()
    for t in tl.static_range(TAPS):
        exists = mask
        if t == TAPS - 1 and not ALL:
            exists = exists & last_tap
        taps = taps + (tl.load(w_ptrs + t * stride, mask=exists, other=0.0).to(ACC),)
    return taps


@triton.jit
def load_column(x_ptr, x_offs, iw, stride, mask, W, last, PAD_MODE: tl.constexpr, ACC: tl.constexpr):
    """Column iw of a row at x_offs; in padding that copies pixels, of no column past the last that a pixel reads."""
    iw_source, inside = source(iw, W, PAD_MODE)
    if PAD_MODE != 0:
        inside = inside & (iw <= last)
    return tl.load(x_ptr + (x_offs + iw_source * stride), mask=mask & inside, other=0.0).to(ACC)


@triton.jit
def add_row(
    acc, taps, x_ptr, x_offs, iw0, stride, mask, W, last, last_tap,
    STEP: tl.constexpr, TAP: tl.constexpr, TAPS: tl.constexpr, LINE: tl.constexpr, ALL: tl.constexpr,
    PAD_MODE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """acc, a tensor for each pixel j of a line, plus the products of a row of taps: x[iw0 + j * STEP + t * TAP] * w[t].

    Each sum takes the taps in their order. Unless ALL, the last tap counts only where `last_tap` is true.
    """
    for k in tl.static_range(columns(STEP, TAP, TAPS, LINE)):
        if is_read(column(k, STEP, TAP, LINE), STEP, TAP, TAPS, LINE):
            iw = iw0 + column(k, STEP, TAP, LINE)
            x = load_column(x_ptr, x_offs, iw, stride, mask, W, last, PAD_MODE, ACC)
            for t in tl.static_range(TAPS):
                if pixel(column(k, STEP, TAP, LINE), t, STEP, TAP, LINE) >= 0:
                    old = acc[pixel(column(k, STEP, TAP, LINE), t, STEP, TAP, LINE)]
                    new = old + x * taps[t]
                    if t == TAPS - 1 and not ALL:
                        new = tl.where(last_tap, new, old)
                    acc = replaced(acc, pixel(column(k, STEP, TAP, LINE), t, STEP, TAP, LINE), new)
    return acc


@triton.jit
def add_products(
    acc, dy, x_ptr, x_offs, iw0, stride, mask, W, last, pixels,
    FIRST: tl.constexpr, STEP: tl.constexpr, TAP: tl.constexpr, TAPS: tl.constexpr, LINE: tl.constexpr,
    WHOLE: tl.constexpr, PAD_MODE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """acc, a tensor for each tap t from FIRST on, plus the products of a line: dy[j] * x[iw0 + j * STEP + t * TAP].

    Unless all lines are WHOLE, only the first `pixels` of a line count.
    """
    for i in tl.static_range(columns(STEP, TAP, TAPS, LINE)):
        if is_read(i, STEP, TAP, TAPS, LINE):
            x = load_column(x_ptr, x_offs, iw0 + i, stride, mask, W, last, PAD_MODE, ACC)
            for t in tl.static_range(TAPS):
                if pixel(i, t, STEP, TAP, LINE) >= 0:
                    old = acc[FIRST + t]
                    new = old + dy[pixel(i, t, STEP, TAP, LINE)] * x
                    if not WHOLE:
                        new = tl.where(pixel(i, t, STEP, TAP, LINE) < pixels, new, old)
                    acc = replaced(acc, FIRST + t, new)
    return acc

"""What the depthwise kernels share: lines of pixels, how many a thread computes, and how their taps find their pixels.

A thread computes a line of LINE adjacent pixels of a row, whose windows share the pixels that it loads. It loads a
vector at a time, of up to 16 bytes: of channels in channels_last, and of VECTOR adjacent pixels in NCHW.

Pixel j of a line and tap t of a row meet at column i of the other image, counted from a `base` that depends on the line
alone, where i * A = j * B + t * T + F. A kernel's constant MEET = (A, B, T, F, TAPS, LINE, VECTOR), so that the
registers of each product are known when it is compiled.
"""

import math

import torch
import triton
import triton.language as tl

from .. import shapes
from .._common import INTERPRETED, in_units, power_of_2, round_to, strides
from ..tiles import flat_block
from .padding import source

# A window with at most so many taps has all of its sums in registers in a weight gradient.
MOST_IN_PROGRAM = 25
# The rows of a window with at most so many taps are unrolled; with vectors of channels more would spill registers.
MOST_UNROLLED = {True: 9, False: 25}
# The most taps of a row that are unrolled.
MOST_TAPS = 16
# The most sums of a thread in a weight gradient.
MOST_SUMS = 100
# The lengths of lines. Widths of images are often 32 or 224 divided by a power of two.
LINES = 8, 7
# The length where longer lines would spill registers.
SHORT = 4


def taps_of(KW):
    """How many of KW taps of a row are unrolled; their number divides KW."""
    return KW if KW <= MOST_TAPS else next(n for n in range(8, 0, -1) if KW % n == 0)


def unrolled(rows, taps, inner):
    """How many of the rows of a window are unrolled: all if it is small."""
    return rows if rows * taps <= MOST_UNROLLED[inner] else 1


def lengths(itemsize):
    """The lengths of lines, longest first; shorter where gradcheck runs, for the interpreter's time grows with them."""
    return (4, 3) if INTERPRETED and itemsize == 8 else LINES


def line_for(itemsize, width, inner, stride=1):
    """The length of lines of a row of `width` pixels: with the fewest past its end, or for vectors of pixels.

    With vectors of channels and a stride, neighbours share little, and long lines have many loads in flight.
    """
    long = lengths(itemsize)
    if inner and stride > 1:
        return max(1, long[0] // stride)
    return long[0] if not inner and width % 2 == 0 else min(long, key=lambda line: -width % line)


def channels_inner(*tensors):
    """Whether vectors are of channels in a launch over these tensors, and not of pixels."""
    return shapes.memory_format(*tensors) is torch.channels_last


def vector_for(itemsize, *sizes, most=16):
    """The elements of the widest vector, of at most 16 and `most` bytes, that divides all sizes.

    The interpreter takes single elements of float64, because a program with vectors of pixels has one channel only.
    """
    if INTERPRETED and itemsize == 8:
        return 1
    size = math.gcd(*sizes)
    return min(size & -size, min(most, 16) // itemsize)


def channels_for(itemsize, channels, mult, most=16):
    """The channels of a thread. With several filters for each channel it loads single elements, so these are few."""
    return vector_for(itemsize, channels, most=most if mult == 1 else max(4, itemsize))


def steps_of(*images_vectors):
    """The strides (n, c, h, w) of each image in units and the units (see in_units), for loads of its vectors."""
    steps, units = [], ()
    for t, vector in images_vectors:
        more = in_units(16 // vector, *strides(t))
        steps, units = steps + more[0], units + more[1]
    return steps, units


def blocks(itemsize, units, channels, vector):
    """(BLOCK_P lines, BLOCK_C channels) of a program of 128 threads; `vector` channels a thread, 0 for one channel."""
    if INTERPRETED:
        return flat_block(units // 2, 0), 8 if vector or itemsize == 8 else 1
    if not vector:
        return 128, 1
    block_c = next((n for n in (64, 32) if channels % n == 0), min(16, power_of_2(channels)))
    return 128 * vector // block_c, block_c


@triton.constexpr_function
def pixel(i, t, MEET):
    """The pixel j of a line whose tap t is at column i, or -1."""
    A, B, T, F, _, LINE, _ = MEET
    j, rest = divmod(i * A - t * T - F, B)
    return j if rest == 0 and 0 <= j < LINE else -1


@triton.constexpr_function
def vectors(MEET):
    """How many vectors there are from the first column of a line to the last."""
    A, B, T, F, TAPS, LINE, VECTOR = MEET
    reach = (TAPS - 1) * T
    return ((LINE - 1) * B + max(0, reach) + F) // (A * VECTOR) - (min(0, reach) + F) // (A * VECTOR) + 1


@triton.constexpr_function
def column(k, e, MEET):
    """The column of element e of vector k, both counted in the order in which a pixel takes its taps."""
    A, B, T, F, _, LINE, VECTOR = MEET
    if T > 0:
        return F // (A * VECTOR) * VECTOR + k * VECTOR + e
    return (((LINE - 1) * B + F) // (A * VECTOR) - k + 1) * VECTOR - 1 - e


@triton.constexpr_function
def first_column(k, MEET):
    """The first column of vector k."""
    return min(column(k, 0, MEET), column(k, MEET[-1] - 1, MEET))


@triton.constexpr_function
def is_read(k, MEET):
    """Whether a tap is at a column of vector k."""
    TAPS, _, VECTOR = MEET[-3:]
    return any(pixel(column(k, e, MEET), t, MEET) >= 0 for e in range(VECTOR) for t in range(TAPS))


@triton.constexpr_function
def after_splits(i, COUNT):
    """Where element i of COUNT is after their vector has been split into even and odd elements again and again."""
    return sum((i >> bit & 1) * (COUNT >> (bit + 1)) for bit in range(COUNT.bit_length() - 1))


@triton.jit
def zeros(COUNT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr):
    """A tuple of COUNT tensors (BLOCK_P, BLOCK_C)."""
    tensors = ()
    for _ in tl.static_range(COUNT):
        tensors = tensors + (tl.zeros((BLOCK_P, BLOCK_C), ACC),)
    return tensors


@triton.jit
def load_vector(x_ptrs, offs, stride, mask, VECTOR: tl.constexpr, ACC: tl.constexpr):
    """The elements of vectors that begin at x_ptrs + offs, as a tuple of VECTOR tensors in the shape of x_ptrs."""
    if VECTOR == 1:
        return (tl.load(x_ptrs + offs, mask=mask, other=0.0).to(ACC),)
    else:
        pieces = (tl.load(x_ptrs + (offs + tl.arange(0, VECTOR)[None, :] * stride), mask=mask, other=0.0),)
        for level in tl.static_range(VECTOR.bit_length() - 1):
            split = ()
            for i in tl.static_range(1 << level):
                pairs = tl.reshape(pieces[i], (x_ptrs.shape[0], VECTOR >> (level + 1), 2))
                split = split + tl.split(pairs)
            pieces = split
        ordered = ()
        for i in tl.static_range(VECTOR):
            ordered = ordered + (tl.reshape(pieces[after_splits(i, VECTOR)], x_ptrs.shape).to(ACC),)
        return ordered


@triton.jit
def load_line(
    x_ptrs, stride, mask, left, LINE: tl.constexpr, VECTOR: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """The pixels of a line as a tuple; unless all lines are WHOLE, those past the `left` first are 0."""
    line = ()
    stride = tl.cast(stride, left.dtype)
    for first in tl.static_range(0, LINE, VECTOR):
        inside = mask if WHOLE else mask & (first < left)
        line = line + load_vector(x_ptrs, first * stride, stride, inside, VECTOR, ACC)
    return line


@triton.jit
def store_line(y_ptr, y_offs, stride, line, mask, left, LINE: tl.constexpr, VECTOR: tl.constexpr):
    """Stores the pixels of a line, a tuple, of which `left` are in the image, a vector at a time."""
    stride = tl.cast(stride, y_offs.dtype)
    for first in tl.static_range(0, LINE, VECTOR):
        if VECTOR == 1:
            y = round_to(line[first], y_ptr.dtype.element_ty)
            tl.store(y_ptr + (y_offs + first * stride), y, mask=mask & (first < left))
        else:
            values = line[first : first + VECTOR]
            for level in tl.static_range(VECTOR.bit_length() - 1):
                joined = ()
                for i in tl.static_range(VECTOR >> (level + 1)):
                    joined = joined + (tl.join(values[i], values[i + (VECTOR >> (level + 1))]),)
                values = joined
            y = round_to(tl.reshape(values[0], (y_offs.shape[0], VECTOR)), y_ptr.dtype.element_ty)
            offs = y_offs + (first + tl.arange(0, VECTOR)[None, :]) * stride
            tl.store(y_ptr + offs, y, mask=mask & (first < left))


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
def load_columns(
    x_ptrs, iw, stride, mask, W, last, VECTOR: tl.constexpr, PAD_MODE: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """The vector of columns from iw on; in padding that copies pixels, of no column past the last that is needed."""
    if PAD_MODE == 0:
        iw_source, inside = iw, (iw >= 0) & (iw < W)
    else:
        iw_source, inside = source(iw, W, PAD_MODE)
        inside = inside & (iw <= last)
    stride = tl.cast(stride, iw.dtype)
    if VECTOR == 1:
        return (tl.load(x_ptrs + iw_source * stride, mask=mask & inside, other=0.0).to(ACC),)
    else:
        return load_vector(x_ptrs, iw_source * stride, stride, mask & inside, VECTOR, ACC)


@triton.jit
def add_row(
    acc, taps, x_ptrs, base, stride, mask, W, last, last_tap,
    MEET: tl.constexpr, ALL: tl.constexpr, PAD_MODE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """acc, a tensor for each pixel of a line, plus the products of a row of taps; each sum takes them in their order.

    Unless ALL, the last tap counts only where `last_tap` is true.
    """
    TAPS: tl.constexpr = MEET[4]
    VECTOR: tl.constexpr = MEET[6]
    for k in tl.static_range(vectors(MEET)):
        if is_read(k, MEET):
            x = load_columns(x_ptrs, base + first_column(k, MEET), stride, mask, W, last, VECTOR, PAD_MODE, ACC)
            for e in tl.static_range(VECTOR):
                for t in tl.static_range(TAPS):
                    if pixel(column(k, e, MEET), t, MEET) >= 0:
                        old = acc[pixel(column(k, e, MEET), t, MEET)]
                        new = old + x[column(k, e, MEET) - first_column(k, MEET)] * taps[t]
                        if t == TAPS - 1 and not ALL:
                            new = tl.where(last_tap, new, old)
                        # No helper for this, nor for single columns above: a call takes the interpreter milliseconds.
                        acc = (
                            acc[: pixel(column(k, e, MEET), t, MEET)]
                            + (new,)
                            + acc[pixel(column(k, e, MEET), t, MEET) + 1 :]
                        )
    return acc


@triton.jit
def add_products(
    acc, dy, x_ptrs, base, stride, mask, W, last, left,
    FIRST: tl.constexpr, MEET: tl.constexpr, WHOLE: tl.constexpr, PAD_MODE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """acc, a tensor for each tap t of a row from FIRST on, plus the products of a line's dy and the columns of x.

    Unless all lines are WHOLE, only the first `left` pixels of a line count: 0 times infinity would be NaN.
    """
    TAPS: tl.constexpr = MEET[4]
    VECTOR: tl.constexpr = MEET[6]
    for k in tl.static_range(vectors(MEET)):
        if is_read(k, MEET):
            x = load_columns(x_ptrs, base + first_column(k, MEET), stride, mask, W, last, VECTOR, PAD_MODE, ACC)
            for e in tl.static_range(VECTOR):
                for t in tl.static_range(TAPS):
                    if pixel(column(k, e, MEET), t, MEET) >= 0:
                        old = acc[FIRST + t]
                        new = old + dy[pixel(column(k, e, MEET), t, MEET)] * x[e]
                        if not WHOLE:
                            new = tl.where(pixel(column(k, e, MEET), t, MEET) < left, new, old)
                        acc = acc[: FIRST + t] + (new,) + acc[FIRST + t + 1 :]
    return acc

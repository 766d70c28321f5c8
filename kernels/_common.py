"""What the kernel files share: number formats, index types, and which taps of a window reach a pixel."""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime.driver import driver

from .launching import remembered

INTERPRETED = tl.constexpr(knobs.runtime.interpret)

OPTIONS = {
    # Triton 3.10 turns fused multiply-add off by default; the kernels want it.
    "enable_fp_fusion": True,
    # Outside debug mode the overflow checks have no effect, and they take a third of the time to build a kernel's IR.
    "sanitize_overflow": knobs.runtime.debug,
}

_TRITON = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


@functools.cache
def _capability(device):
    """The major compute capability of the current device, whose number is `device`; 0 if it is not NVIDIA's."""
    target = driver.active.get_current_target()
    return target.arch // 10 if target.backend == "cuda" else 0


def compute_capability():
    """The major compute capability of the NVIDIA GPU that kernels are compiled for, 0 for any other target.

    It is that of the current device, because a machine may have cards of two kinds.
    """
    return 0 if INTERPRETED else _capability(driver.active.get_current_device())


def cached_for_architecture(function):
    """Decorator: `remembered` for a function that also depends on the compute capability."""
    cached = remembered(lambda _, *args: function(*args))
    return functools.wraps(function)(lambda *args: cached(compute_capability(), *args))


def acc_type(dtype):
    """The type of the accumulators."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def element_type(dtype):
    """Triton's name of a dtype."""
    return _TRITON[dtype]


def operand_type(dtype):
    """The type of a product's operands: the tensor's own, except for bfloat16 in the interpreter.

    Triton's interpreter multiplies the raw bits of bfloat16 values, so there operands are cast to float32 first.
    """
    return tl.float32 if INTERPRETED and dtype == torch.bfloat16 else _TRITON[dtype]


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """value as dtype, rounded to nearest even. The interpreter's own cast to bfloat16 truncates."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet_nan = (bits >> 16) | 0x40
        return tl.where(value == value, nearest, quiet_nan).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(dtype)


def cdiv(a, b):
    """a / b rounded up. Triton's own cdiv is made for kernels and takes microseconds on the host."""
    return -(-a // b)


def power_of_2(n):
    """The power of two at or above n > 0."""
    return 1 << (n - 1).bit_length() if n > 0 else 0


def extent(t, rows, columns):
    """The largest offset of an image in t (N, C, H, W) if taps reach so many rows and columns, also outside."""
    steps = t.stride()
    return sum((n - 1) * abs(step) for n, step in zip((*t.shape[:2], rows + 1, columns + 1), steps))


def index_type(*tensors, reach=0):
    """int64 if an offset into one of the tensors (or None), or `reach`, may not fit int32, else the faster int32."""
    # Masked elements past the end have offsets too, so the limit leaves room for a tile.
    limit = 2**31 - 2**20
    if reach > limit:
        return tl.int64
    for t in tensors:
        if t is not None and max(t.numel(), sum((n - 1) * s for n, s in zip(t.shape, t.stride()))) > limit:
            return tl.int64
    return tl.int32


def strides(t):
    """The strides of t in elements, 0 for a dimension of one element.

    torch gives such a dimension an arbitrary stride, for example 1 for the height and width of a 1x1 filter. Triton
    loads 16 bytes at once only if it can see that 16 divides every stride except that of contiguous elements.
    """
    return [stride if size > 1 else 0 for size, stride in zip(t.shape, t.stride())]


def named_strides(letter, strides, dims="nchw"):
    """{"stride_xn": ..., ...}: the strides as constants of a kernel, for the tensor `letter` with these dimensions."""
    return {f"stride_{letter}{dim}": stride for dim, stride in zip(dims, strides)}


def pixel_step(t):
    """The elements from a pixel of a dense image to the next, row after row."""
    return t.stride(3) if t.shape[3] > 1 else t.stride(2) if t.shape[2] > 1 else 0


def in_units(itemsize, *numbers):
    """(each number divided by its unit, the units); the kernel multiplies them again.

    Triton specialises an argument on divisibility by 16 and otherwise assumes nothing: of 1000 features, or of rows of
    1000, it would load single elements. The unit of a number that 16 does not divide is the number of elements in 16
    bytes, if that divides it; all other units are 1. So is that of a number past 32 bits, which its quotient might not
    be, and the kernel would multiply in 32 bits.
    """
    vector = max(1, 16 // itemsize)
    units = tuple(vector if n % 16 and n % vector == 0 and n < 2**31 else 1 for n in numbers)
    return [n // unit for n, unit in zip(numbers, units)], units


def dense_steps(t):
    """([pixels of an image, strides of images, of channels and of pixels], units) of a dense t (N, C, H, W).

    See in_units. Where t stores pixels side by side, the compiler joins as many stores as divide the pixels of an image
    and all other strides.
    """
    steps = [t.shape[2] * t.shape[3], *t.stride()[:2], pixel_step(t)]
    if steps[3] == 1:
        unit = math.gcd(16 // t.itemsize, *steps[:3])
        units = (unit, unit, unit, 1) if steps[0] % 16 else (1,) * 4
        return [n // u for n, u in zip(steps, units)], units
    return in_units(t.itemsize, *steps)


def number_format(dtype, precision):
    """The row of a table of tiles; `precision`, "tf32" or "ieee", matters for float32 only."""
    return "fp64" if dtype == torch.float64 else precision if dtype == torch.float32 else "half"


def input_precision(dtype, precision):
    """tl.dot's argument: `precision` for float32, and otherwise "ieee".

    In other formats it should have no effect, but Triton 3.7.1 sends float64 products marked tf32 to the matrix units
    of sm_100, which have no float64, and fails to compile them.
    """
    return precision if dtype == torch.float32 else "ieee"


def product_types(dtype, precision):
    """The constants of a kernel with products: operand type, accumulator type and precision."""
    return dict(OPERAND=operand_type(dtype), ACC=acc_type(dtype), PRECISION=input_precision(dtype, precision))


def reciprocal(d):
    """The argument of `divide` that divides by d, where 0 < d < 2^31.

    Bit 62 is set so that Triton types it int64 for every d and compiles one kernel.

    Source: Granlund and Montgomery 1994, https://doi.org/10.1145/178243.178249.
    """
    shift = (d - 1).bit_length()
    multiplier = ((1 << 32) * ((1 << shift) - d)) // d + 1
    return 1 << 62 | multiplier << 8 | shift


@triton.jit
def divide(n, d, inverse):
    """n // d for n >= 0, where `inverse` is reciprocal(d): three instructions in place of twenty if n is int32."""
    if n.dtype == tl.int64:
        return n // d
    else:
        unsigned = n.to(tl.uint32)
        multiplier, shift = (inverse >> 8).to(tl.uint32), (inverse & 255).to(tl.uint32)
        return ((tl.umulhi(unsigned, multiplier) + unsigned) >> shift).to(tl.int32)


@triton.jit
def place(p, columns, rows, inverse_columns, inverse_rows):
    """(image, row, column) of the p-th of rows x columns parts of images; the inverses are their reciprocals."""
    row = divide(p, columns, inverse_columns)
    n = divide(row, rows, inverse_rows)
    return n, row - n * rows, p - row * columns


@triton.jit
def first_column(sums):
    """The first of 16 equal columns: the row sums that a product with ones gives."""
    return tl.sum(tl.where(tl.arange(0, 16)[None, :] == 0, sums, 0.0), axis=1)


class Window(NamedTuple):
    """Which taps k of a window reach a pixel i: k * dilation = i + pad - o * stride for some output position o.

    The solutions k of that congruence modulo the stride are first, first + step, ..., where
    first = (i + pad) / divisor * inverse modulo step. There are none unless divisor divides i + pad.
    """

    divisor: int
    step: int
    inverse: int

    @classmethod
    def of(cls, stride, dilation):
        divisor = math.gcd(stride, dilation)
        step = stride // divisor
        return cls(divisor, step, pow(dilation // divisor, -1, step))


@triton.jit
def first_tap(shifted, DIVISOR: tl.constexpr, STEP: tl.constexpr, INVERSE: tl.constexpr, K: tl.constexpr):
    """The first of K taps that reaches the pixel at `shifted` = i + pad, or K if none does (see Window)."""
    tap = (shifted // DIVISOR) % STEP * INVERSE % STEP
    return tl.where((shifted % DIVISOR == 0) & (tap < K), tap, K)


@triton.jit
def next_block(c, kh, kw, C, KW, BLOCK: tl.constexpr):
    """Advance by one block of channels, then to the next tap; counters avoid divisions in the inner loop."""
    c += BLOCK
    wrap = c >= C
    c = tl.where(wrap, 0, c)
    kw += tl.where(wrap, 1, 0)
    wrap = kw >= KW
    kw = tl.where(wrap, 0, kw)
    kh += tl.where(wrap, 1, 0)
    return c, kh, kw

"""Number formats that numpy lacks, and the functions that a GPU only approximates.

Sources: PTX ISA 9.0, sections "Alternate Floating-Point Data Formats", "Data Movement and Conversion Instructions: cvt"
and "Floating Point Instructions" (ex2, lg2, rcp, rsqrt, sqrt, div, fma).
"""

import numpy as np

U1, U2, U4, U8 = np.uint8, np.uint16, np.uint32, np.uint64
F2, F4, F8 = np.float16, np.float32, np.float64
EXPONENT, UPPER, TF32 = U4(0x7F800000), U4(0xFFFF0000), U4(0xFFFFE000)
# The largest error of each function: relative, as a multiple of float32's 2^-23 where the ISA gives it in units of the
# last place. lg2's is absolute between 0.5 and 2.
ULP = 2.0**-23
ERRORS = {"ex2": 2 * ULP, "rcp": ULP, "div": 2 * ULP, "sqrt": 2.0**-23, "rsqrt": 2.0**-22.9, "lg2": 2.0**-22}


def widen_bf16(bits):
    """bfloat16 as float32, whose upper half it is."""
    return (bits.astype(U4) << U4(16)).view(F4)


def rounded_bf16(values):
    """The bits of float32, the upper half rounded to bfloat16 (nearest, ties to even), the lower half arbitrary."""
    bits = np.asarray(values).view(U4)
    rounded = bits + (((bits >> U4(16)) & U4(1)) + U4(0x7FFF))
    nan = np.isnan(values)
    return np.where(nan, U4(0x7FFF0000), rounded) if nan.any() else rounded


def to_bf16(values):
    return (rounded_bf16(values) >> U4(16)).astype(U2)


def pack_bf16(upper, lower):
    """Two float32 as two bfloat16 in 32 bits."""
    return (rounded_bf16(upper) & UPPER) | (rounded_bf16(lower) >> U4(16))


def pack_f16(upper, lower):
    return (upper.astype(F2).view(U2).astype(U4) << U4(16)) | lower.astype(F2).view(U2)


def halves(bits):
    """The lower and the upper half of each element."""
    half = U2 if bits.dtype.itemsize == 4 else U4
    if not bits.flags.c_contiguous:
        bits = bits.copy()
    both = bits.view(half).reshape(*bits.shape, 2)
    return both[..., 0], both[..., 1]


def both_halves(convert):
    """Makes a function of packed operands: convert(lower halves) and convert(upper halves), 16 bits each."""
    return lambda bits: tuple(convert(half) for half in halves(bits))


bf16_pair = both_halves(widen_bf16)
f16_pair = both_halves(lambda bits: bits.view(F2))


def f32_pair(bits):
    """Each 64-bit element as two float32 along a new last axis, the lower half first."""
    bits = np.ascontiguousarray(bits)
    return bits.view(F4).reshape(*bits.shape, 2)


def joined_f32(pairs):
    """The 64 bits of pairs of float32."""
    return np.ascontiguousarray(pairs).view(U8)[..., 0]


def cut_tf32(bits):
    """What a product sees of a float32 operand in tf32: the lower 13 bits are cut off."""
    return (bits.view(U4) & TF32).view(F4)


def to_tf32(values):
    """float32 rounded to tf32: to nearest, ties away from zero."""
    bits = values.view(U4)
    special = (bits & EXPONENT) == EXPONENT
    return np.where(special, bits, bits + U4(0x1000)) & TF32


def flush(values):
    """.ftz: subnormal numbers become zeros of their sign."""
    return np.where(np.abs(values) < F4(2.0**-126), np.copysign(F4(0), values), values)


def fma32(a, b, c):
    """a * b + c of float64 copies of float32, rounded to float32.

    The product is exact and the sum is rounded twice: the error exceeds that of correct rounding by at most 2^-29 of a
    unit in the last place.
    """
    return (a * b + c).astype(F4)


def fma_odd(a, b, c):
    """a * b + c of 16-bit numbers, as a float32 that rounds to the correct 16-bit result.

    The sum is computed in float64 and cut off to float32, with the last bit set if anything was cut off.
    """
    exact = a.astype(F8) * b + c
    near = exact.astype(F4)
    bits = near.view(U4)
    cut = bits - (np.abs(near) > np.abs(exact)).astype(U4)
    return np.where((near == exact) | ~np.isfinite(near), bits, cut | U4(1)).view(F4)


def two_sum(a, b):
    """a + b and its rounding error (Knuth)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def fma64(a, b, c):
    """a * b + c of float64 with one rounding, but for a few cases in 2^50 that are one unit off.

    The product's rounding error comes from splitting its factors (Dekker), which overflows above 2^996: there, and for
    infinities and NaN, the product is rounded first.
    """

    def parts(x):
        t = x * 134217729.0
        upper = t - (t - x)
        return upper, x - upper

    p = a * b
    (a1, a2), (b1, b2) = parts(a), parts(b)
    error = ((a1 * b1 - p) + a1 * b2 + a2 * b1) + a2 * b2
    s, rest = two_sum(p, c)
    result = s + (rest + error)
    return np.where(np.isfinite(result), result, p + c)


class Approximate:
    """The functions that a GPU approximates: to nearest, or with the largest error that the ISA allows (worst).

    In the worst case the sign of the error is a hash of the result's bits and of the seed.
    """

    def __init__(self, worst=False, seed=0):
        self.worst, self.seed = worst, seed

    def off(self, name, exact):
        """float32 of the exact result (float64), with the error that the function may have."""
        if not self.worst:
            return exact.astype(F4)
        bits = exact.astype(F4).view(U4)
        sign = ((bits * U4(2654435761) + U4(self.seed)) >> U4(16)) & U4(1)
        error = ERRORS[name] * (1 - 2.0 * sign)
        by = np.where((exact > -1) & (exact < 1), error, error * exact) if name == "lg2" else error * exact
        return (exact + by).astype(F4)

    def ex2(self, a):
        return self.off("ex2", np.exp2(a.astype(F8)))

    def lg2(self, a):
        return self.off("lg2", np.log2(a.astype(F8)))

    def rcp(self, a):
        return self.off("rcp", 1 / a.astype(F8))

    def sqrt(self, a):
        return self.off("sqrt", np.sqrt(a.astype(F8)))

    def rsqrt(self, a):
        return self.off("rsqrt", 1 / np.sqrt(a.astype(F8)))

    def div(self, a, b):
        return self.off("div", a.astype(F8) / b)

    @staticmethod
    def rcp64(a):
        """The upper half of a float64 reciprocal, from its operand's upper half; subnormal numbers become zeros."""
        upper = (a.view(U8) & U8(0xFFFFFFFF00000000)).view(F8)
        upper = np.where(np.abs(upper) < 2.0**-1022, np.copysign(0.0, upper), upper)
        result = ((1 / upper).view(U8) & U8(0xFFFFFFFF00000000)).view(F8)
        return np.where(np.abs(result) < 2.0**-1022, np.copysign(0.0, result), result)

"""The epilogue of a convolution or a product, which its sums go through before they are stored; and alone, elementwise.

    y = act((z + bias - mean) * scale / sqrt(var + eps) + shift + residual)

bias, mean, var, scale and shift are vectors over the channels, and residual has y's size; each of them may be missing.
With the running statistics of a batch normalisation as mean and var, its weight as scale and its bias as shift, this is
what it computes in evaluation. The activations are torch's; `slope` is that of leaky_relu.

    dz = dy * act'(z)

Sums, vectors and activation are in the accumulators' type, so that the result is rounded once.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import shapes
from ._common import OPTIONS, acc_type, cdiv, divide, index_type, reciprocal, round_to
from .launching import planned
from .relu import flat_plan, is_dense, laid_out_as
from .tiles import flat_block


class Epilogue(NamedTuple):
    """The arguments of an epilogue; the tensors of a launch come from `of`."""

    mean: torch.Tensor | None = None
    var: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    eps: float = 0.0
    activation: str = "none"
    slope: float = 0.0

    def of(self, y):
        """(the tensors for a launch that stores y, the other arguments): a residual has the strides of y."""
        if self is NONE or self is RELU:
            return (None,) * 5, self[5:]
        vectors = [t if t is None else t.contiguous() for t in self[:4]]
        residual = None if self.residual is None else laid_out_as(y, self.residual)
        return (*vectors, residual), self[5:]


# What is where in a kernel's constant EPILOGUE.
BIAS, MEAN, VAR, SCALE, SHIFT, RESIDUAL, EPS, ACT, SLOPE, STATISTICS = (tl.constexpr(i) for i in range(10))
NONE, RELU = Epilogue(), Epilogue(activation="relu")


def constant(bias, mean, var, scale, shift, residual, eps, activation, slope, statistics=False):
    """A kernel's constant EPILOGUE: which tensors there are, and the values; only what matters, for fewer kernels.

    statistics: a kernel stores those of its results in the launch's mean and var, see tile_statistics.py.
    """
    mean, var = (None, None) if statistics else (mean, var)
    there = tuple(t is not None for t in (bias, mean, var, scale, shift, residual))
    values = eps if var is not None else 0.0, activation, slope if activation == "leaky_relu" else 0.0
    return *there, *values, statistics


def parts_for(tile, epilogue):
    """The number of parts in which a tile is stored: of at most 32 results a thread if EPILOGUE has a residual."""
    if not epilogue[RESIDUAL.value]:
        return 1
    return max(1, min(tile.M * tile.N // (32 * tile.num_warps) // 32, tile.N // 32))


@triton.jit
def once(t):
    """t, which the compiler computes once for each channel: it does not repeat sums.

    Otherwise it would load all vectors in the layout of the tile's sums, up to 64 channels a thread.
    """
    return tl.sum(tl.join(t, tl.zeros(t.shape, t.dtype)), axis=1)


@triton.jit
def inverse_root(var, EPS: tl.constexpr):
    """1 / sqrt(var + eps)."""
    return 1.0 / tl.sqrt(var + EPS) if var.dtype == tl.float64 else tl.rsqrt(var + EPS)


@triton.jit
def of_channels(vectors, stride_b, channel, mask, EPILOGUE: tl.constexpr, ACC: tl.constexpr):
    """(factor, summand) of each channel, from pointers to the vectors (bias, mean, var, scale, shift)."""
    b_ptr, mean_ptr, var_ptr, scale_ptr, shift_ptr = vectors
    factor, summand = tl.full(channel.shape, 1.0, ACC), tl.zeros(channel.shape, ACC)
    if EPILOGUE[VAR]:
        factor = inverse_root(tl.load(var_ptr + channel, mask=mask, other=1.0).to(ACC), EPILOGUE[EPS])
    if EPILOGUE[SCALE]:
        factor *= tl.load(scale_ptr + channel, mask=mask, other=0.0).to(ACC)
    if EPILOGUE[BIAS]:
        summand += tl.load(b_ptr + channel * stride_b, mask=mask, other=0.0).to(ACC)
    if EPILOGUE[MEAN]:
        summand -= tl.load(mean_ptr + channel, mask=mask, other=0.0).to(ACC)
    if (EPILOGUE[BIAS] or EPILOGUE[MEAN]) and (EPILOGUE[VAR] or EPILOGUE[SCALE]):
        summand *= factor
    if EPILOGUE[SHIFT]:
        summand += tl.load(shift_ptr + channel, mask=mask, other=0.0).to(ACC)
    return factor, summand


@triton.jit
def scaled(z, factor, summand, EPILOGUE: tl.constexpr):
    """z * factor + summand, in one rounding, so that every kernel computes the same bits."""
    SCALED: tl.constexpr = EPILOGUE[VAR] or EPILOGUE[SCALE]
    SHIFTED: tl.constexpr = EPILOGUE[BIAS] or EPILOGUE[MEAN] or EPILOGUE[SHIFT]
    if SCALED and SHIFTED:
        return tl.fma(z, factor, summand)
    elif SCALED:
        return z * factor
    elif SHIFTED:
        return z + summand
    else:
        return z


@triton.jit
def finished(z, factor, summand, r_ptrs, mask, EPILOGUE: tl.constexpr):
    """The results of the sums z; factor and summand are those of `of_channels`, in shapes that broadcast with z."""
    z = scaled(z, factor, summand, EPILOGUE)
    if EPILOGUE[RESIDUAL]:
        z += tl.load(r_ptrs, mask=mask, other=0.0).to(z.dtype)
    # triton 3.6.0 passes a string on only as a constant of its own.
    ACTIVATION: tl.constexpr = EPILOGUE[ACT]
    return activated(z, ACTIVATION, EPILOGUE[SLOPE])


@triton.jit
def halves_of(sums):
    """The left and the right half of the columns."""
    return tl.split(tl.permute(tl.reshape(sums, (sums.shape[0], 2, sums.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def in_parts(sums, PARTS: tl.constexpr):
    """The columns of sums as a tuple of PARTS blocks, a power of two."""
    parts = (sums,)
    for _ in tl.static_range(PARTS.bit_length() - 1):
        halves = ()
        for i in tl.static_range(len(parts)):
            halves = halves + halves_of(parts[i])
        parts = halves
    return parts


@triton.jit
def store_finished(
    y_ptr, r_ptr, sums, rows, mask_m, n0, N, channel0, stride_n,
    vectors, stride_b, EPILOGUE: tl.constexpr, PARTS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Store the results of a tile of sums, whose columns are the channels n0, n0 + 1, ... of N.

    rows: the offsets of its rows in y and in the residual. channel0: of the first of the N channels in y. All that is
    computed for a column exists for one part of the columns at a time, so that a residual needs fewer registers.
    """
    parts = in_parts(sums, PARTS)
    columns: tl.constexpr = sums.shape[1] // PARTS
    for part in tl.static_range(PARTS):
        offs_n = n0 + part * columns + tl.arange(0, columns)
        mask_n = offs_n < N
        factor, summand = of_channels(vectors, stride_b, channel0 + offs_n, mask_n, EPILOGUE, ACC)
        if EPILOGUE[VAR]:
            factor, summand = once(factor), once(summand)
        offs = rows[:, None] + ((channel0 + offs_n) * stride_n)[None, :]
        mask = mask_m[:, None] & mask_n[None, :]
        y = finished(parts[part], factor[None, :], summand[None, :], r_ptr + offs, mask, EPILOGUE)
        tl.store(y_ptr + offs, round_to(y, y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def clamped(z, MOST: tl.constexpr):
    """z between 0 and MOST; NaN stays NaN."""
    return tl.where(z < 0, 0.0, tl.minimum(z, MOST, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def gelu_argument(z):
    """Half the argument of the sigmoid that gelu's approximation by tanh is: (1 + tanh(u)) / 2 = sigmoid(2 u)."""
    # sqrt(2 / pi)
    return 0.7978845608028654 * (z + 0.044715 * z * z * z)


@triton.jit
def activated(z, ACT: tl.constexpr, SLOPE: tl.constexpr):
    """act(z)."""
    if ACT == "relu":
        return tl.where(z < 0, 0.0, z)
    elif ACT == "relu6":
        return clamped(z, 6.0)
    elif ACT == "leaky_relu":
        return tl.where(z > 0, z, z * SLOPE)
    elif ACT == "silu":
        return z * sigmoid(z)
    elif ACT == "hardswish":
        return z * clamped(z + 3.0, 6.0) / 6.0
    elif ACT == "gelu":
        # sqrt(1 / 2)
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        return z * sigmoid(2.0 * gelu_argument(z))
    elif ACT == "sigmoid":
        return sigmoid(z)
    elif ACT == "hardsigmoid":
        return clamped(z + 3.0, 6.0) / 6.0
    else:
        return z


@triton.jit
def with_slope(dy, t, ACT: tl.constexpr, SLOPE: tl.constexpr):
    """dy * act'(z), where t is y = act(z) or, if not activations.by_result, z."""
    if ACT == "relu":
        return tl.where(t <= 0, 0.0, dy)
    elif ACT == "relu6":
        return tl.where((t <= 0) | (t >= 6), 0.0, dy)
    elif ACT == "leaky_relu":
        return tl.where(t > 0, dy, dy * SLOPE)
    elif ACT == "silu":
        s = sigmoid(t)
        return dy * s * (1.0 + t * (1.0 - s))
    elif ACT == "hardswish":
        return tl.where(t <= -3, 0.0, tl.where(t >= 3, dy, dy * (t / 3.0 + 0.5)))
    elif ACT == "gelu":
        # sqrt(1 / 2), and 1 / sqrt(2 pi)
        below = 0.5 * (1.0 + tl.erf(t * 0.7071067811865476))
        return dy * (below + t * 0.3989422804014327 * tl.exp(-0.5 * t * t))
    elif ACT == "gelu_tanh":
        s = sigmoid(2.0 * gelu_argument(t))
        return dy * (s + 2.0 * t * s * (1.0 - s) * 0.7978845608028654 * (1.0 + 0.134145 * t * t))
    elif ACT == "sigmoid":
        return dy * t * (1.0 - t)
    elif ACT == "hardsigmoid":
        return tl.where((t > 0) & (t < 1), dy / 6.0, 0.0)
    else:
        return dy


@triton.jit
def epilogue_kernel(
    x_ptr, y_ptr, mean_ptr, var_ptr, scale_ptr, shift_ptr, r_ptr,
    numel, inner, inverse_inner, inverse_channels,
    C: tl.constexpr, ALONG: tl.constexpr, HAS_MEAN: tl.constexpr, EPILOGUE: tl.constexpr,
    INDEX: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    # Rows of neighbours that a thread loads at once: of channels, of pixels of one channel, or of either.
    first = (tl.program_id(0).to(INDEX) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]) * BLOCK_V
    neighbours = tl.arange(0, BLOCK_V)[None, :]
    offs = first + neighbours
    mask = offs < numel

    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(ACC)
    outer = divide(offs if ALONG == "either" else first, inner, inverse_inner)
    channel = outer - divide(outer, C, inverse_channels) * C
    if ALONG == "channels":
        channel = tl.multiple_of(channel, (BLOCK_V, BLOCK_V)) + neighbours
    vectors = (x_ptr, mean_ptr, var_ptr, scale_ptr, shift_ptr)
    mask_c = (channel < C) & (first < numel)
    if HAS_MEAN:
        # First, and not as a part of the summand: x may be near a mean that is many standard deviations.
        x -= tl.load(mean_ptr + channel, mask=mask_c, other=0.0).to(ACC)
    factor, summand = of_channels(vectors, 0, channel, mask_c, EPILOGUE, ACC)
    y = finished(x, factor, summand, r_ptr + offs, mask, EPILOGUE)

    tl.store(y_ptr + offs, round_to(y, y_ptr.dtype.element_ty), mask=mask)


@planned(epilogue_kernel)
def _epilogue(x, y, mean, var, scale, shift, residual, eps, activation, slope):
    # In any order of its dimensions a dense tensor's channels follow each other at one distance.
    C, inner = (y.shape[1], y.stride(1)) if y.dim() > 1 and y.shape[1] > 1 else (1, 1)
    vector, block = 16 // y.itemsize, flat_block(y.numel(), 1024)
    along = "channels" if inner == 1 and C % vector == 0 else "pixels" if inner % vector == 0 else "either"
    return (cdiv(y.numel(), block),), (y.numel(), inner, reciprocal(inner), reciprocal(C)), dict(
        C=C, ALONG=along, HAS_MEAN=mean is not None,
        EPILOGUE=constant(None, None, var, scale, shift, residual, eps, activation, slope),
        INDEX=index_type(y), ACC=acc_type(y.dtype), BLOCK_R=block // vector, BLOCK_V=vector, num_warps=4, **OPTIONS,
    )  # fmt: skip


def forward(x, *arguments):
    """x (N, C, *), or any shape without vectors -> y, with x's shape and, if x is dense, its strides.

    The other arguments are those of Epilogue.
    """
    y = shapes.relu(x)
    if y.numel() > 0:
        tensors, values = Epilogue(*arguments).of(y)
        _epilogue((laid_out_as(y, x), y, *tensors), *values)
    return y


def activate_(x, activation, slope):
    """Overwrite x with act(x)."""
    values = 0.0, activation, slope
    if not is_dense(x):
        x.copy_(forward(x, *[None] * 5, *values))
    elif x.numel() > 0:
        _epilogue((x, x, *[None] * 5), *values)


@triton.jit
def activation_grad_kernel(
    dy_ptr, t_ptr, dz_ptr,
    numel,
    ACT: tl.constexpr, SLOPE: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel

    dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(ACC)
    t = tl.load(t_ptr + offs, mask=mask, other=0.0).to(ACC)
    dz = with_slope(dy, t, ACT, SLOPE)

    tl.store(dz_ptr + offs, round_to(dz, dz_ptr.dtype.element_ty), mask=mask)


@planned(activation_grad_kernel)
def _activation_grad(dy, t, dz, activation, slope):
    grid, numel, constants = flat_plan(dy, t, dz)
    return grid, numel, {"ACT": activation, "SLOPE": slope if activation == "leaky_relu" else 0.0, **constants}


def activation_grad(dy, t, activation, slope):
    """dy, and the result y or the argument z of the activation (see activations.by_result) -> dz, laid out as t."""
    dz = shapes.relu(t)
    if dz.numel() > 0:
        _activation_grad((laid_out_as(dz, dy), laid_out_as(dz, t), dz), activation, slope)
    return dz

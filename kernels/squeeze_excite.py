"""Squeeze and excitation: each channel of an image times a gate that two small products compute from all its means.

    mean[c]   = sum over h, w of x[c, h, w] / (H W)
    hidden[r] = act(sum over c of w1[r, c] mean[c] + b1[r])
    gate[c]   = gate(sum over r of w2[c, r] hidden[r] + b2[c])
    y[c, h, w] = x[c, h, w] * gate[c]

Two launches: the means, by avg_pool2d/whole.py, and everything else. Sums are kept in float32 or wider and added in a
fixed order; mean, hidden and gate are rounded to x's type, as separate operators would round them.

Source: Hu et al., Squeeze-and-Excitation Networks, https://arxiv.org/abs/1709.01507
"""

import math

import triton
import triton.language as tl

from . import shapes
from ._common import OPTIONS, acc_type, cdiv, divide, index_type, power_of_2, reciprocal, round_to
from .avg_pool2d import whole
from .epilogue import activated
from .launching import planned

# The elements of a tile of images or weights, the fewest of an image that a program is started for, and the programs
# that a card runs at once.
TILE, LEAST, AT_ONCE = 4096, 8192, 128


@triton.jit
def hidden_units(
    mean_ptr, w1_ptr, b1_ptr, C, R, inner, ACT: tl.constexpr, HAS_BIAS: tl.constexpr, UNIT: tl.constexpr,
    ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """hidden (BLOCK_R) of the image whose means are at mean_ptr; C is inner * UNIT."""
    offs_r = tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_R, BLOCK_K), ACC)
    for c0 in range(0, C, BLOCK_K):
        offs_c = c0 + tl.arange(0, BLOCK_K)
        mask_c = offs_c < inner * UNIT
        mean = tl.load(mean_ptr + offs_c, mask=mask_c, other=0.0).to(ACC)
        offs = offs_r[:, None] * inner * UNIT + offs_c[None, :]
        w1 = tl.load(w1_ptr + offs, mask=(offs_r[:, None] < R) & mask_c[None, :], other=0.0).to(ACC)
        acc = tl.fma(w1, mean[None, :], acc)
    hidden = tl.sum(acc, axis=1)
    if HAS_BIAS:
        hidden += tl.load(b1_ptr + offs_r, mask=offs_r < R, other=0.0).to(ACC)
    return round_to(activated(hidden, ACT, 0.01), w1_ptr.dtype.element_ty).to(ACC)


@triton.jit
def gates(
    hidden, w2_ptr, b2_ptr, offs_c, mask_c, inner_r, GATE: tl.constexpr, HAS_BIAS: tl.constexpr, UNIT: tl.constexpr,
    ACC: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The gates of the channels offs_c; R is inner_r * UNIT."""
    offs_r = tl.arange(0, BLOCK_R)
    offs = offs_c[:, None] * inner_r * UNIT + offs_r[None, :]
    mask = mask_c[:, None] & (offs_r[None, :] < inner_r * UNIT)
    w2 = tl.load(w2_ptr + offs, mask=mask, other=0.0).to(ACC)
    gate = tl.sum(w2 * hidden[None, :], axis=1)
    if HAS_BIAS:
        gate += tl.load(b2_ptr + offs_c, mask=mask_c, other=0.0).to(ACC)
    return round_to(activated(gate, GATE, 0.01), w2_ptr.dtype.element_ty).to(ACC)


@triton.jit
def squeeze_excite_kernel(
    x_ptr, mean_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, y_ptr,
    C, R, P, inner, inner_r, inner_p, parts_c, parts_p, inverse_c, inverse_p, blocks, pixels,
    ACT: tl.constexpr, GATE: tl.constexpr, HAS_BIAS1: tl.constexpr, HAS_BIAS2: tl.constexpr,
    C_UNIT: tl.constexpr, R_UNIT: tl.constexpr, P_UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    INDEX: tl.constexpr, ACC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    # A program computes `pixels` pixels of `blocks` blocks of channels. C is inner * C_UNIT, and so are R and P.
    pid = tl.program_id(0)
    image_part = divide(pid, parts_p, inverse_p)
    p_begin = (pid - image_part * parts_p) * pixels
    n = divide(image_part, parts_c, inverse_c)
    c_begin = (image_part - n * parts_c) * blocks * BLOCK_C
    start = n.to(INDEX) * P * inner * C_UNIT
    hidden = hidden_units(
        mean_ptr + n.to(INDEX) * inner * C_UNIT, w1_ptr, b1_ptr, C, R, inner,
        ACT, HAS_BIAS1, C_UNIT, ACC, BLOCK_R, BLOCK_K,
    )  # fmt: skip

    for block in range(blocks):
        offs_c = c_begin + block * BLOCK_C + tl.arange(0, BLOCK_C)
        mask_c = offs_c < inner * C_UNIT
        gate = gates(hidden, w2_ptr, b2_ptr, offs_c, mask_c, inner_r, GATE, HAS_BIAS2, R_UNIT, ACC, BLOCK_R)
        for p0 in range(p_begin, min(p_begin + pixels, P), BLOCK_P):
            offs_p = p0 + tl.arange(0, BLOCK_P)
            mask_p = offs_p < inner_p * P_UNIT
            if CHANNELS_LAST:
                offs = start + offs_p.to(INDEX)[:, None] * inner * C_UNIT + offs_c[None, :]
                mask = mask_p[:, None] & mask_c[None, :]
                factor = gate[None, :]
            else:
                offs = start + offs_c.to(INDEX)[:, None] * inner_p * P_UNIT + offs_p[None, :]
                mask = mask_c[:, None] & mask_p[None, :]
                factor = gate[:, None]
            x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(ACC)
            tl.store(y_ptr + offs, round_to(x * factor, y_ptr.dtype.element_ty), mask=mask)


def parts(N, C, R, P, block_c, block_p):
    """(blocks of channels, pixels) of a program, and how many programs an image has of each.

    A program reads all C * R elements of w1, from the cache, and its channels' rows of w2, before it reads and writes
    its share of the image. So an image is shared by as many programs as make these shares about as large as w1, which
    at most doubles what is read, or by as many as run at once anyway. Channels are shared first, as programs of other
    channels read other rows of w2.
    """
    wanted = max(1, min(max(1 + 2 * P // R, AT_ONCE // N), C * P // LEAST))
    blocks = cdiv(cdiv(C, block_c), min(wanted, cdiv(C, block_c)))
    parts_c = cdiv(cdiv(C, block_c), blocks)
    pixels = cdiv(cdiv(P, max(1, wanted // parts_c)), block_p) * block_p
    return blocks, pixels, parts_c, cdiv(P, pixels)


@planned(squeeze_excite_kernel)
def _plan(x, mean, w1, b1, w2, b2, y, activation, gate):
    channels_last, vector = shapes.is_channels_last(y), 16 // x.element_size()
    (N, C, H, W), R = x.shape, w1.shape[0]
    P, block_r = H * W, power_of_2(R)
    # 128 bytes of a pixel's channels or up to 512 of a channel's pixels, and fewer channels for wide rows of w2.
    block_c = min(power_of_2(C), 8 * vector if channels_last else max(TILE // power_of_2(P), 16))
    block_c = min(block_c, max(2 * TILE // block_r, 16))
    block_p = min(power_of_2(P), TILE // block_c if channels_last else 256)
    blocks, pixels, parts_c, parts_p = parts(N, C, R, P, block_c, block_p)
    c_unit, r_unit, p_unit = (math.gcd(vector, size) for size in (C, R, P))
    numbers = C, R, P, C // c_unit, R // r_unit, P // p_unit, parts_c, parts_p, reciprocal(parts_c), reciprocal(parts_p)
    return (N * parts_c * parts_p,), (*numbers, blocks, pixels), dict(
        ACT=activation, GATE=gate, HAS_BIAS1=b1 is not None, HAS_BIAS2=b2 is not None,
        C_UNIT=c_unit, R_UNIT=r_unit, P_UNIT=p_unit, CHANNELS_LAST=channels_last,
        INDEX=index_type(x), ACC=acc_type(x.dtype),
        BLOCK_R=block_r, BLOCK_K=min(power_of_2(C), max(TILE // block_r, vector)), BLOCK_C=block_c, BLOCK_P=block_p,
        num_warps=8,
        # A gate is a sum over threads. If each added its own product to another's in one rounding, as fusion does, they
        # would have different bits of the same gate, and any of them might be stored.
        **OPTIONS | {"enable_fp_fusion": False},
    )  # fmt: skip


def forward(x, w1, b1, w2, b2, activation, gate):
    """x (N, C, H, W), w1 (R, C), b1 (R) or None, w2 (C, R), b2 (C) or None -> y, channels_last if x is."""
    y = shapes.squeeze_excite(x)
    if y.numel() > 0:
        x = x.contiguous(memory_format=shapes.memory_format(x))
        w1, b1, w2, b2 = (None if t is None else t.contiguous() for t in (w1, b1, w2, b2))
        _plan((x, whole.forward(x), w1, b1, w2, b2, y), activation, gate)
    return y

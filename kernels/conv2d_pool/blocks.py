"""Blocks of pooled pixels that share a patch of the image, for the two forwards for few channels; see patch.py."""

import triton
import triton.language as tl

from .._common import cdiv, named_strides

# Programs that keep a large GPU busy.
PROGRAMS = 4 * 132


def cut(form, x, w_size, bias, y, stride, padding, pool_stride):
    """(number of blocks of pooled pixels, constants of both kernels)."""
    (N, C, H, W), (OC, _, KH, KW), (QH, QW) = x.shape, w_size, y.shape[2:]
    blocks = cdiv(QH, form.side), cdiv(QW, form.side)
    steps = [form.side * pool_stride[i] * stride[i] for i in range(2)]
    inside = not any(padding) and all(
        (blocks[i] - 1) * steps[i] + form.patch[i] <= size for i, size in enumerate((H, W))
    )
    constants = dict(
        H=H, W=W, QH=QH, QW=QW, C=C, OC=OC, KH=KH, KW=KW, STEP_H=steps[0], STEP_W=steps[1],
        PH=padding[0], PW=padding[2], PATCH_H=form.patch[0], PATCH_W=form.patch[1],
        SIDE=form.side, BLOCKS_H=blocks[0], BLOCKS_W=blocks[1],
        HAS_BIAS=bias is not None, INSIDE=inside, BLOCK_OC=form.channels,
    )  # fmt: skip
    # With constant strides the compiler knows how wide loads and stores can be.
    constants |= named_strides("x", x.stride()) | named_strides("y", y.stride())
    return N * blocks[0] * blocks[1], constants


@triton.jit
def largest_of_window(z, BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr):
    """(BLOCK_M, 4 * COLUMNS), a 2x2 window's positions outermost -> the largest of each four, and the first such."""
    left, right = tl.split(tl.permute(tl.reshape(z, (BLOCK_M, 2, 2, COLUMNS)), (0, 3, 1, 2)))
    z0, z2 = tl.split(left)
    z1, z3 = tl.split(right)
    upper = tl.maximum(z0, z1, propagate_nan=tl.PropagateNan.ALL)
    lower = tl.maximum(z2, z3, propagate_nan=tl.PropagateNan.ALL)
    largest = tl.maximum(upper, lower, propagate_nan=tl.PropagateNan.ALL)
    return largest, tl.where(z0 == largest, 0, tl.where(z1 == largest, 1, tl.where(z2 == largest, 2, 3)))


@triton.jit
def block_of(offs_m, BLOCKS_H: tl.constexpr, BLOCKS_W: tl.constexpr, INDEX: tl.constexpr):
    """(n, row, column) of the blocks of pooled pixels offs_m. Unsigned division takes half the instructions."""
    if INDEX == tl.int64:
        m = offs_m.to(tl.uint64)
    else:
        m = offs_m.to(tl.uint32)
    return (
        (m // (BLOCKS_H * BLOCKS_W)).to(INDEX),
        (m // BLOCKS_W % BLOCKS_H).to(INDEX),
        (m % BLOCKS_W).to(INDEX),
    )


@triton.jit
def locate(
    offs_m,
    stride_xn: tl.constexpr, stride_xh: tl.constexpr, stride_xw: tl.constexpr,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    BLOCKS_H: tl.constexpr, BLOCKS_W: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Of the blocks offs_m: n, row and column, the first pixel (ih0, iw0) of their patches, and its offset in x."""
    n, row, col = block_of(offs_m, BLOCKS_H, BLOCKS_W, INDEX)
    ih0, iw0 = row * STEP_H - PH, col * STEP_W - PW
    return n, row, col, ih0, iw0, n * stride_xn + ih0 * stride_xh + iw0 * stride_xw

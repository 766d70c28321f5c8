"""Blocks of pooled pixels that share a patch of the image: what the two forwards for few channels have in common."""

import triton
import triton.language as tl

from .._common import cdiv

# Programs that keep a large GPU busy.
PROGRAMS = 4 * 132


def cut(form, x, w_size, bias, y, stride, padding, pool_stride):
    """(blocks of pooled pixels, the constants that both forms' kernels take)."""
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
    # Constant strides tell the compiler how wide loads and stores can be.
    for t, name in ((x, "x"), (y, "y")):
        constants |= {f"stride_{name}{dim}": stride for dim, stride in zip("nchw", t.stride())}
    return N * blocks[0] * blocks[1], constants


@triton.jit
def block_of(offs_m, BLOCKS_H: tl.constexpr, BLOCKS_W: tl.constexpr, INDEX: tl.constexpr):
    """(n, row, column) of the blocks of pooled pixels offs_m; unsigned division takes half the instructions."""
    if INDEX == tl.int64:
        m = offs_m.to(tl.uint64)
    else:
        m = offs_m.to(tl.uint32)
    return (
        (m // (BLOCKS_H * BLOCKS_W)).to(INDEX),
        (m // BLOCKS_W % BLOCKS_H).to(INDEX),
        (m % BLOCKS_W).to(INDEX),
    )

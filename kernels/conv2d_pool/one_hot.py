"""The gradients of conv2d_pool's kernel for few channels, straight from the pooled gradient and the code.

    dz[n, oc, oh, ow] = dy[n, oc, qh, qw] where the code names the pixel (oh, ow), else 0; it is never written to memory
    dw[oc, c, kh, kw] = sum over n, oh, ow of dz[n, oc, oh, ow] * x[n, c, ih, iw],    db[oc] = sum of dz
    dx[n, c, ih, iw]  = sum over oc, kh, kw, oh, ow that reach (ih, iw) of dz[n, oc, oh, ow] * w[oc, c, kh, kw]

    with ih, iw as in conv2d, and oh = qh * TH - UH + position / WW, ow = qw * TW - UW + position % WW

Both products take dz as a one-hot row for each pooled pixel, dy at the position of its window that the code names, made
in registers. A row of the products is an image and all its rows see the same pixels, so that addresses are one number a
row and one a column. Geometry and strides are part of the program: what is left of the addresses is worked out once.
"""

import triton
import triton.language as tl


def strides_of(letter, t):
    return {f"stride_{letter}{dim}": t.stride(i) for i, dim in enumerate("nchw")}


@triton.jit
def one_hot(dy, code, COUNT: tl.constexpr, POSITIONS: tl.constexpr):
    """(M, N) -> (M, N * POSITIONS): each element of dy at that of COUNT positions that the code names, among zeros."""
    columns: tl.constexpr = dy.shape[1] * POSITIONS
    if POSITIONS > 1:
        dy, code = tl.join(dy, dy), tl.join(code, code)
    if POSITIONS > 2:
        dy, code = tl.join(dy, dy), tl.join(code, code)
    dy, code = tl.reshape(dy, (dy.shape[0], columns)), tl.reshape(code, (dy.shape[0], columns))
    position = tl.arange(0, columns) % POSITIONS
    if COUNT < POSITIONS:
        position = tl.where(position < COUNT, position, -1)
    return tl.where(code.to(tl.int32) == position[None, :], dy, 0.0)


@triton.jit
def pixel(j, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """(c, h, w) of the elements j of H x W pixels, counted in memory order."""
    if CHANNELS_LAST:
        return j % C, j // C // W, j // C % W
    else:
        return j // W // H, j // W % H, j % W

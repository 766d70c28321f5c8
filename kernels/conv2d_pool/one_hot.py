"""The gradients of the fused kernel for few channels, directly from the pooled gradient and the code.

    dz[n, oc, oh, ow] = dy[n, oc, qh, qw] where the code points to (oh, ow), else 0; it is never written to memory
    dw[oc, c, kh, kw] = sum over n, oh, ow of dz[n, oc, oh, ow] * x[n, c, ih, iw],    db[oc] = sum of dz
    dx[n, c, ih, iw]  = sum over oc, kh, kw, oh, ow that reach (ih, iw) of dz[n, oc, oh, ow] * w[oc, c, kh, kw]

    with ih, iw as in conv2d/forward.py, and oh = qh * TH - UH + position / WW, ow = qw * TW - UW + position % WW

Both matrix products read dz as one-hot groups made in registers: for each pooled pixel one column for each position of
its window, with dy at the position of the code. A row of dz is an image, and all rows have the same pixels, so that an
address is the sum of one number a row and one number a column. Geometry and strides are constants of the kernel, so
that addresses cost little.
"""

import triton
import triton.language as tl


@triton.jit
def one_hot(dy, code, COUNT: tl.constexpr, POSITIONS: tl.constexpr):
    """(M, N) -> (M, N * POSITIONS): each element of dy at the one of COUNT positions that its code names, else 0."""
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
    """(c, h, w) of the elements j of H x W pixels in memory order."""
    if CHANNELS_LAST:
        return j % C, j // C // W, j // C % W
    else:
        return j // W // H, j // W % H, j % W

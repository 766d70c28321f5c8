"""What the codes point to: the elements of a tensor like the input, and torch's indices."""

import triton
import triton.language as tl

from .. import shapes
from .._common import index_type
from ..launching import planned
from ..strips import laid_out, offset, over, places, window_constants


@triton.jit
def max_pool2d_gather_kernel(
    x_ptr, code_ptr, t_ptr,
    rows, inner, strips, middle, outer, inverse_strips, inverse_middle, inverse_outer, H, W,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_cn, stride_cc, stride_ch, stride_cw,
    stride_tn, stride_tc, stride_th, stride_tw,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    X_UNIT: tl.constexpr, C_UNIT: tl.constexpr, T_UNIT: tl.constexpr, INDICES: tl.constexpr,
    INNER_UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    mask, n, c, oh, ow = places(
        rows, inner, strips, middle, outer, inverse_strips, inverse_middle, inverse_outer,
        INNER_UNIT, CHANNELS_LAST, INDEX, BLOCK_R, BLOCK_V,
    )  # fmt: skip
    c_offs = offset(n, c, oh, ow, stride_cn, stride_cc, stride_ch, stride_cw, C_UNIT, CHANNELS_LAST)
    t_offs = offset(n, c, oh, ow, stride_tn, stride_tc, stride_th, stride_tw, T_UNIT, CHANNELS_LAST)

    code = tl.load(code_ptr + c_offs, mask=mask, other=0).to(INDEX)
    ih = oh * SH - PH + code // KW * DH
    iw = ow * SW - PW + code % KW * DW
    if INDICES:
        tl.store(t_ptr + t_offs, ih.to(tl.int64) * W + iw, mask=mask)
    else:
        x_offs = offset(n, c, ih, iw, stride_xn, stride_xc, stride_xh, stride_xw, X_UNIT, CHANNELS_LAST)
        # The code of a dilated window without a pixel inside may point past the image.
        inside = (code < KH * KW) & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
        x = tl.load(x_ptr + x_offs, mask=mask & inside, other=0.0)
        tl.store(t_ptr + t_offs, x, mask=mask)


@planned(max_pool2d_gather_kernel)
def _gather(x, code, t, height, width, indices, *window):
    channels_last = shapes.is_channels_last(t)
    grid, numbers, constants = over(t.shape, channels_last, 16 // t.element_size())
    (x_strides, x_unit), (c_strides, c_unit), (t_strides, t_unit) = (laid_out(u, channels_last) for u in (x, code, t))
    constants |= dict(
        X_UNIT=x_unit, C_UNIT=c_unit, T_UNIT=t_unit, INDICES=indices, INDEX=index_type(x, code, t),
        **window_constants(*window),
    )  # fmt: skip
    return grid, (*numbers, height, width, *x_strides, *c_strides, *t_strides), constants


def gather(x, code, kernel, stride, padding, dilation):
    """x (N, C, H, W), code (N, C, OH, OW) -> the elements of x that the code points to, (N, C, OH, OW)."""
    t = shapes.max_pool2d_gather(x, code)
    if t.numel() > 0:
        _gather((x, code, t), *x.shape[2:], False, kernel, stride, padding, dilation)
    return t


def indices(code, width, kernel, stride, padding, dilation):
    """code (N, C, OH, OW) of an image `width` wide -> int64 (N, C, OH, OW), ih * W + iw."""
    t = shapes.max_pool2d_indices(code)
    if t.numel() > 0:
        _gather((t, code, t), 0, width, True, kernel, stride, padding, dilation)
    return t

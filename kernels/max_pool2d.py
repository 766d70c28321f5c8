"""Max-pooling that stores each maximum's position as a small code, so that the backward needs no atomics.

    y[n, c, oh, ow]    = max over kh, kw of x[n, c, ih, iw],    code[n, c, oh, ow] = kh * KW + kw of that maximum
    scatter: dx[n, c, ih, iw] = sum over windows (oh, ow) whose code points to (ih, iw) of dy[n, c, oh, ow]
    gather:  t[n, c, oh, ow]  = x[n, c, ih, iw] at the pixel that the code points to
    indices: the code as torch's flat index ih * W + iw

    with ih = oh * SH - PH + kh * DH and iw = ow * SW - PW + kw * DW

The maximum follows torch's rules: a NaN wins, the last of several; the first of equal values wins; the code of a window
of -inf is its first pixel inside the image. Scatter and gather are each other's transpose, so each is the other's
gradient. A code of KH * KW points to no pixel, and gathers 0.
"""

import triton
import triton.language as tl

from . import shapes
from ._common import OPTIONS, Window, acc_type, cdiv, first_tap, index_type, round_to
from .launching import planned
from .tiles import flat_block


@triton.jit
def position(offs, C, H, W, CHANNELS_LAST: tl.constexpr):
    """(n, c, h, w) of the elements at `offs` in memory order."""
    if CHANNELS_LAST:
        return offs // C // W // H, offs % C, offs // C // W % H, offs // C % W
    else:
        return offs // W // H // C, offs // W // H % C, offs // W % H, offs % W


@triton.jit
def first_inside(start, D: tl.constexpr):
    """The first tap k with start + k * D >= 0."""
    return tl.where(start < 0, (D - 1 - start) // D, 0)


def _over(out, *numbers, **constants):
    """The plan of a launch over every element of the dense tensor `out`, in memory order."""
    block = flat_block(out.numel(), 512)
    return (
        (cdiv(out.numel(), block),),
        (out.numel(), *numbers),
        dict(CHANNELS_LAST=shapes.is_channels_last(out), BLOCK=block, num_warps=4, **constants, **OPTIONS),
    )


@triton.jit
def max_pool2d_forward_kernel(
    x_ptr, y_ptr, code_ptr,
    numel, C, H, W, OH, OW,
    stride_xn, stride_xc, stride_xh, stride_xw,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    n, c, oh, ow = position(offs, C, OH, OW, CHANNELS_LAST)
    ih0, iw0 = oh * SH - PH, ow * SW - PW
    x_ptrs = x_ptr + n * stride_xn + c * stride_xc

    best = tl.full((BLOCK,), float("-inf"), ACC)
    code = (first_inside(ih0, DH) * KW + first_inside(iw0, DW)).to(tl.int32)
    for kh in range(0, KH):
        ih = ih0 + kh * DH
        for kw in range(0, KW):
            iw = iw0 + kw * DW
            inside = (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
            x = tl.load(x_ptrs + ih * stride_xh + iw * stride_xw, mask=mask & inside, other=float("-inf")).to(ACC)
            better = (x > best) | (x != x)
            best = tl.where(better, x, best)
            code = tl.where(better, kh * KW + kw, code)

    tl.store(y_ptr + offs, best.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(code_ptr + offs, code.to(code_ptr.dtype.element_ty), mask=mask)


def _window(kernel, stride, padding, dilation):
    """The constants of a window."""
    return dict(
        KH=kernel[0], KW=kernel[1], SH=stride[0], SW=stride[1],
        PH=padding[0], PW=padding[1], DH=dilation[0], DW=dilation[1],
    )  # fmt: skip


@planned(max_pool2d_forward_kernel)
def _forward(x, y, code, *window):
    numbers = *x.shape[1:], *y.shape[2:], *x.stride()
    return _over(y, *numbers, INDEX=index_type(x, y), ACC=acc_type(x.dtype), **_window(*window))


def forward(x, kernel, stride, padding, dilation, ceil_mode):
    """x (N, C, H, W) -> y and code (N, C, OH, OW), the code in the narrowest integer type that holds KH * KW - 1."""
    y, code = shapes.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode)
    if y.numel() > 0:
        _forward((x, y, code), kernel, stride, padding, dilation)
    return y, code


@triton.jit
def max_pool2d_scatter_kernel(
    dy_ptr, code_ptr, dx_ptr,
    numel, C, H, W, OH, OW,
    stride_yn, stride_yc, stride_yh, stride_yw,
    stride_cn, stride_cc, stride_ch, stride_cw,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    DIVISOR_H: tl.constexpr, STEP_H: tl.constexpr, INVERSE_H: tl.constexpr,
    DIVISOR_W: tl.constexpr, STEP_W: tl.constexpr, INVERSE_W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    n, c, ih, iw = position(offs, C, H, W, CHANNELS_LAST)
    dy_ptrs = dy_ptr + n * stride_yn + c * stride_yc
    code_ptrs = code_ptr + n * stride_cn + c * stride_cc

    # One window for every STEP-th tap covers a pixel, which adds the gradients of those whose code points to it.
    kh0 = first_tap(ih + PH, DIVISOR_H, STEP_H, INVERSE_H, KH)
    kw0 = first_tap(iw + PW, DIVISOR_W, STEP_W, INVERSE_W, KW)
    acc = tl.zeros((BLOCK,), ACC)
    for th in range(0, (KH + STEP_H - 1) // STEP_H):
        kh = kh0 + th * STEP_H
        oh = (ih + PH - kh * DH) // SH
        in_h = (kh < KH) & (ih + PH >= kh * DH) & (oh < OH)
        for tw in range(0, (KW + STEP_W - 1) // STEP_W):
            kw = kw0 + tw * STEP_W
            ow = (iw + PW - kw * DW) // SW
            covers = mask & in_h & (kw < KW) & (iw + PW >= kw * DW) & (ow < OW)
            code = tl.load(code_ptrs + oh * stride_ch + ow * stride_cw, mask=covers, other=0)
            named = covers & (code.to(tl.int32) == kh * KW + kw)
            acc += tl.load(dy_ptrs + oh * stride_yh + ow * stride_yw, mask=named, other=0.0).to(ACC)

    tl.store(dx_ptr + offs, round_to(acc, dx_ptr.dtype.element_ty), mask=mask)


@planned(max_pool2d_scatter_kernel)
def _scatter(dy, code, dx, kernel, stride, padding, dilation):
    window_h, window_w = Window.of(stride[0], dilation[0]), Window.of(stride[1], dilation[1])
    numbers = *dx.shape[1:], *dy.shape[2:], *dy.stride(), *code.stride()
    return _over(
        dx, *numbers, **_window(kernel, stride, padding, dilation),
        DIVISOR_H=window_h.divisor, STEP_H=window_h.step, INVERSE_H=window_h.inverse,
        DIVISOR_W=window_w.divisor, STEP_W=window_w.step, INVERSE_W=window_w.inverse,
        INDEX=index_type(dy, code, dx), ACC=acc_type(dy.dtype),
    )  # fmt: skip


def scatter(dy, code, size, kernel, stride, padding, dilation):
    """dy and code (N, C, OH, OW) -> dx (N, C, H, W), where `size` is (H, W)."""
    dx = shapes.max_pool2d_scatter(dy, code, size)
    if dx.numel() > 0:
        _scatter((dy, code, dx), kernel, stride, padding, dilation)
    return dx


@triton.jit
def max_pool2d_gather_kernel(
    x_ptr, code_ptr, t_ptr,
    numel, C, W, OH, OW,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_cn, stride_cc, stride_ch, stride_cw,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    INDICES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    n, c, oh, ow = position(offs, C, OH, OW, CHANNELS_LAST)

    c_offs = n * stride_cn + c * stride_cc + oh * stride_ch + ow * stride_cw
    code = tl.load(code_ptr + c_offs, mask=mask, other=0).to(INDEX)
    ih = oh * SH - PH + code // KW * DH
    iw = ow * SW - PW + code % KW * DW
    if INDICES:
        tl.store(t_ptr + offs, ih.to(tl.int64) * W + iw, mask=mask)
    else:
        x_offs = n * stride_xn + c * stride_xc + ih * stride_xh + iw * stride_xw
        x = tl.load(x_ptr + x_offs, mask=mask & (code < KH * KW), other=0.0)
        tl.store(t_ptr + offs, x, mask=mask)


@planned(max_pool2d_gather_kernel)
def _launch_gather(x, code, t, width, indices, *window):
    numbers = t.shape[1], width, *t.shape[2:], *x.stride(), *code.stride()
    return _over(t, *numbers, INDICES=indices, INDEX=index_type(x, code, t), **_window(*window))


def gather(x, code, kernel, stride, padding, dilation):
    """x (N, C, H, W), code (N, C, OH, OW) -> the elements of x that the code points to, (N, C, OH, OW)."""
    t = shapes.max_pool2d_gather(x, code)
    if t.numel() > 0:
        _launch_gather((x, code, t), x.shape[3], False, kernel, stride, padding, dilation)
    return t


def indices(code, width, kernel, stride, padding, dilation):
    """code (N, C, OH, OW) of an image `width` wide -> int64 (N, C, OH, OW), ih * W + iw."""
    t = shapes.max_pool2d_indices(code)
    if t.numel() > 0:
        _launch_gather((t, code, t), width, True, kernel, stride, padding, dilation)
    return t

"""The sums of a convolution's weight gradient for several taps of the filter at once, which share operands.

    acc[kh, kw] = sum over n, oh, ow of dy[n, oc, oh, ow] * x[n, c, ih, iw]

    with ih = oh * SH - PH + kh * DH and iw = ow * SW - PW + kw * DW

A product of 64 x 64 reads as many bytes as it takes the matrix units to multiply: what is loaded for one tap only would
leave them idle. See weight_grad.py, whose kernel these are part of.
"""

import triton
import triton.language as tl


@triton.jit
def advance(n, h, w, step_n, step_h, step_w, end_h, end_w, stride_h: tl.constexpr):
    """The position (n, h, w) a block of pixels further; h and w are multiples of the strides and below their ends."""
    w += step_w
    carry = w >= end_w
    w = tl.where(carry, w - end_w, w)
    h += tl.where(carry, step_h + stride_h, step_h)
    carry = h >= end_h
    h = tl.where(carry, h - end_h, h)
    return n + tl.where(carry, step_n + 1, step_n), h, w


@triton.jit
def within(i, size, mask):
    """mask and 0 <= i < size: an unsigned comparison finds both ends at once."""
    return mask & (i.to(tl.uint32) < tl.cast(size, tl.uint32))


@triton.jit
def some_taps(
    dy_ptr, x_ptr, tap, first, last, H, W, OH, OW,
    stride_yp, stride_xn, stride_xh, stride_xw,
    KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    SUM: tl.constexpr, TAPS: tl.constexpr,
    INDEX: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The products of dy and x over the pixels `first` to `last`, one for each of TAPS taps from `tap` on.

    dy_ptr and x_ptr point at the first pixel, for each row and column of the product. A block of dy is loaded once for
    all taps. The position of a pixel is counted up from one block to the next, because divisions would take longer than
    the products. With SUM the last result is the sum of dy, in each of 16 columns, from one more product, with ones: an
    operand in shared memory must have no use but in products, see bench/machine_code/ttgir.py.
    """
    offs_k = first + tl.arange(0, BLOCK_K).to(INDEX)
    n = offs_k // OW // OH
    ih = (offs_k // OW % OH).to(tl.int32) * SH
    iw = (offs_k % OW).to(tl.int32) * SW
    step_n, step_h, step_w = BLOCK_K // OW // OH, BLOCK_K // OW % OH * SH, BLOCK_K % OW * SW
    y_ptrs = dy_ptr + (offs_k * stride_yp)[None, :]

    accs = ()
    for _ in tl.static_range(TAPS):
        accs += (tl.zeros((BLOCK_M, BLOCK_N), ACC),)
    acc_b, ones = tl.zeros((BLOCK_M, 16), ACC), tl.full((BLOCK_K, 16), 1.0, OPERAND)
    # Otherwise triton 3.6.0 waits for each product before the next; no share of a split product is empty.
    tl.assume(first < last)
    for _ in range(first, last, BLOCK_K):
        mask = offs_k < last
        x_rows = (n * stride_xn + ih.to(INDEX) * stride_xh + iw.to(INDEX) * stride_xw)[:, None]
        dy = tl.load(y_ptrs, mask=mask[None, :], other=0.0).to(OPERAND)
        sums = ()
        for t in tl.static_range(TAPS):
            dh, dw = (tap + t) // KW * DH - PH, (tap + t) % KW * DW - PW
            inside = within(iw + dw, W, within(ih + dh, H, mask & (tap + t < KH * KW)))
            x_ptrs = x_ptr + (dh.to(INDEX) * stride_xh + dw.to(INDEX) * stride_xw) + x_rows
            x = tl.load(x_ptrs, mask=inside[:, None], other=0.0).to(OPERAND)
            sums += (tl.dot(dy, x, accs[t], input_precision=PRECISION, out_dtype=ACC),)
        accs = sums
        if SUM:
            acc_b = tl.dot(dy, ones, acc_b, input_precision=PRECISION, out_dtype=ACC)
        offs_k += BLOCK_K
        y_ptrs += BLOCK_K * stride_yp
        n, ih, iw = advance(n, ih, iw, step_n, step_h, step_w, OH * SH, OW * SW, SH)
    return accs, acc_b


@triton.jit
def all_taps(
    dy_ptr, x_ptr, first, last, H, W, OH, OW,
    stride_yn, stride_yh, stride_yw, stride_xn, stride_xh, stride_xw,
    KH: tl.constexpr, KW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    SUM: tl.constexpr,
    INDEX: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As some_taps, for all taps of a filter with stride 1, whose KH * KW products need KH + KW blocks of operands.

    The sum is over the rows of the padded image: of row i, tap (kh, kw) multiplies row i - kh * DH of dy and pixels of
    row i - PH of x, shifted by kw. Each block of dy serves KW products, and each block of x serves KH.
    """
    rows = OH + (KH - 1) * DH
    offs_k = first + tl.arange(0, BLOCK_K).to(INDEX)
    n = offs_k // OW // rows
    i = (offs_k // OW % rows).to(tl.int32)
    ow = (offs_k % OW).to(tl.int32)
    step_n, step_h, step_w = BLOCK_K // OW // rows, BLOCK_K // OW % rows, BLOCK_K % OW

    accs = ()
    for _ in tl.static_range(KH * KW):
        accs += (tl.zeros((BLOCK_M, BLOCK_N), ACC),)
    acc_b, ones = tl.zeros((BLOCK_M, 16), ACC), tl.full((BLOCK_K, 16), 1.0, OPERAND)
    tl.assume(first < last)
    for _ in range(first, last, BLOCK_K):
        mask = offs_k < last
        y_offs = n * stride_yn + i.to(INDEX) * stride_yh + ow.to(INDEX) * stride_yw
        x_offs = n * stride_xn + (i - PH).to(INDEX) * stride_xh + (ow - PW).to(INDEX) * stride_xw
        in_x = within(i - PH, H, mask)
        xs, sums = (), ()
        for kw in tl.static_range(KW):
            x_ptrs = x_ptr + tl.cast(stride_xw, INDEX) * (kw * DW) + x_offs[:, None]
            x = tl.load(x_ptrs, mask=within(ow + (kw * DW - PW), W, in_x)[:, None], other=0.0)
            xs += (x.to(OPERAND),)
        for kh in tl.static_range(KH):
            y_ptrs = dy_ptr - tl.cast(stride_yh, INDEX) * (kh * DH) + y_offs[None, :]
            dy = tl.load(y_ptrs, mask=within(i - kh * DH, OH, mask)[None, :], other=0.0).to(OPERAND)
            for kw in tl.static_range(KW):
                acc = accs[kh * KW + kw]
                sums += (tl.dot(dy, xs[kw], acc, input_precision=PRECISION, out_dtype=ACC),)
            if SUM and kh == 0:
                acc_b = tl.dot(dy, ones, acc_b, input_precision=PRECISION, out_dtype=ACC)
        accs = sums
        offs_k += BLOCK_K
        n, i, ow = advance(n, i, ow, step_n, step_h, step_w, rows, OW, 1)
    return accs, acc_b

"""Convolution as an implicit matrix product: patches are gathered into tiles as the product needs them.

    y[n, oc, oh, ow] = bias[oc] + sum over c, kh, kw of x[n, c, ih, iw] * w[oc, c, kh, kw]

    with ih = oh * SH - PH + kh * DH and iw = ow * SW - PW + kw * DW

C and OC count the channels of one group. Tensors may have any strides. The gradients are in input_grad.py and
weight_grad.py; patches.py has the loop over the summed index.

Source: the implicit GEMM of cuDNN (Chetlur et al. 2014, https://arxiv.org/abs/1410.0759).
"""

import triton
import triton.language as tl

from .. import shapes
from .._common import cdiv, in_units, index_type, product_types, round_to, strides
from ..launching import planned
from ..tiles import TALL
from .padding import PAD_MODES
from .patches import FLAT_BELOW, SHORT_K, add_patches, channels_inner, in_elements, precision, tile_for, tile_of


@triton.jit(do_not_specialize=["M"])
def conv2d_forward_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr,
    M, H, W, OH, OW,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_wo, stride_wc, stride_wh, stride_ww,
    stride_b,
    stride_yn, stride_yc, stride_yh, stride_yw,
    C: tl.constexpr, OC: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    PAD_MODE: tl.constexpr, HAS_BIAS: tl.constexpr, RELU: tl.constexpr, FLAT: tl.constexpr, UNITS: tl.constexpr,
    INDEX: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    stride_xn, stride_xc, stride_xh, stride_xw = in_elements((stride_xn, stride_xc, stride_xh, stride_xw), UNITS, 0)
    stride_wo, stride_wc, stride_wh, stride_ww = in_elements((stride_wo, stride_wc, stride_wh, stride_ww), UNITS, 4)
    stride_yn, stride_yc, stride_yh, stride_yw = in_elements((stride_yn, stride_yc, stride_yh, stride_yw), UNITS, 8)

    # GEMM: M = N * OH * OW, N = OC, K = C * KH * KW
    offs_m, offs_n, group = tile_of(tl.program_id(0).to(INDEX), M, OC, BLOCK_M, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < OC
    ow = offs_m % OW
    oh = offs_m // OW % OH
    n = offs_m // OW // OH
    ih0, iw0 = oh * SH - PH, ow * SW - PW

    x_ptr += group * C * stride_xc
    w_ptr += group * OC * stride_wo
    x_rows = n * stride_xn
    w_cols = offs_n * stride_wo

    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    acc = add_patches(
        acc, x_ptr, w_ptr, x_rows, w_cols, ih0, iw0, mask_m, mask_n, H, W,
        stride_xc, stride_xh, stride_xw, stride_wc, stride_wh, stride_ww,
        C, KH, KW, DH, DW, PAD_MODE, FLAT, INDEX, OPERAND, ACC, PRECISION, BLOCK_K,
    )  # fmt: skip

    if HAS_BIAS:
        acc += tl.load(b_ptr + (group * OC + offs_n) * stride_b, mask=mask_n, other=0.0).to(ACC)[None, :]
    if RELU:
        acc = tl.where(acc < 0, 0.0, acc)
    y_rows = n * stride_yn + oh * stride_yh + ow * stride_yw
    y_offs = y_rows[:, None] + (group * OC + offs_n)[None, :] * stride_yc
    tl.store(y_ptr + y_offs, round_to(acc, y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@planned(conv2d_forward_kernel)
def _forward(x, w, bias, y, stride, padding, dilation, groups, pad_mode, relu, precision):
    (N, _, H, W), (OC, C, KH, KW), (OH, OW) = x.shape, w.shape, y.shape[2:]
    M, OC, flat = N * OH * OW, OC // groups, C < FLAT_BELOW
    index = index_type(x, w, bias, y)
    K, inner = C * KH * KW if flat else C, y.stride(1) == 1
    # If each result has an address of its own, four warps on 64 rows spill registers.
    tile = tile_for(TALL, M, OC, K, x.dtype, precision, index, C <= SHORT_K, flat, halve=inner)
    steps, units = in_units(x.itemsize, *strides(x), *strides(w), *strides(y))
    numbers = M, H, W, OH, OW, *steps[:8], 0 if bias is None else bias.stride(0), *steps[8:]
    return (cdiv(M, tile.M) * cdiv(OC, tile.N) * groups,), numbers, dict(
        C=C, OC=OC, KH=KH, KW=KW,
        SH=stride[0], SW=stride[1], PH=padding[0], PW=padding[2], DH=dilation[0], DW=dilation[1],
        PAD_MODE=PAD_MODES[pad_mode], HAS_BIAS=bias is not None, RELU=relu, FLAT=flat, UNITS=units,
        INDEX=index, **product_types(x.dtype, precision),
        **tile.blocks, **tile.options,
    )  # fmt: skip


def forward(x, w, bias, stride, padding, dilation, groups, pad_mode, relu=False):
    """x (N, C, H, W), w (OC, C / groups, KH, KW), bias (OC) or None -> y (N, OC, OH, OW), all of one floating dtype.

    `relu` clamps y at 0.
    """
    y = shapes.conv2d(x, w, stride, padding, dilation)
    if y.numel() == 0:
        return y
    if w.shape[1] >= FLAT_BELOW:
        x, w = channels_inner(x), channels_inner(w)
    _forward((x, w, bias, y), stride, padding, dilation, groups, pad_mode, relu, precision())
    return y

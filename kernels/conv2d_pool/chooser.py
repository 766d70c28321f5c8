"""Which kernel serves a convolution with relu and max-pooling, and which serves its gradients."""

from typing import NamedTuple

from .. import shapes
from .._common import cdiv, number_format, power_of_2
from ..conv2d.patches import FLAT_BELOW, precision
from ..launching import remembered


class Form(NamedTuple):
    """How a fused convolution with few channels is divided into blocks of pooled pixels and of filters."""

    product: bool  # on matrix units (patch.py), or by FMA in registers (lanes.py)
    side: int  # of a block of pooled pixels
    patch: tuple  # (height, width) in pixels
    channels: int  # of the result, at a time
    block_k: int  # of the product


# Limits of the product's right operand, which stays in shared memory: elements and columns.
OPERAND_SIZE, COLUMNS = 2**14, 128
# Limits of what a thread keeps in registers: the pixels of a patch, and sums.
PIXELS, SUMS = 64, 32


def form_for(dtype, size, w_size, *geometry_ceil_mode):
    """The Form that serves these arguments of the fused operator, or None if general.py does.

    `size` is that of x. These kernels compare all four pixels of a window, so no window may reach past the
    convolution's result.
    """
    *geometry, ceil_mode = geometry_ceil_mode
    if ceil_mode and _partial(size[2:], w_size[2:], *geometry[:3], *geometry[5:]):
        return None
    return _form(number_format(dtype, precision()), w_size, *geometry)


@remembered
def _partial(size, kernel, stride, padding, dilation, *window):
    """Whether ceil_mode adds windows that reach past the convolution's result."""
    before = shapes.conv2d_size(size, kernel, stride, padding, dilation)
    whole, every = (shapes.max_pool2d_size(before, *window, (1, 1), ceil_mode) for ceil_mode in (False, True))
    return whole != every


@remembered
def _form(format, w_size, stride, padding, dilation, groups, pad_mode, pool_kernel, pool_stride, pool_padding):
    OC, C, KH, KW = w_size
    plain = groups == 1 and pad_mode == "zeros" and tuple(pool_kernel) == (2, 2) and not any(pool_padding)
    if not plain or C >= FLAT_BELOW or format == "fp64":
        return None
    for side in (2, 1):
        patch = tuple(
            patch_size(side, k, stride[i], dilation[i], pool_kernel[i], pool_stride[i]) for i, k in enumerate((KH, KW))
        )
        pixels, sums = patch[0] * patch[1], 4 * side**2
        if format == "ieee":
            # Four windows a patch pay off if the patch is read once for all filters.
            if pixels <= PIXELS and (side == 1 or C == 1):
                return Form(False, side, patch, min(SUMS // sums, power_of_2(OC)), 1)
        else:
            block_k = 64 if 32 < C * pixels <= 64 else 32
            length = cdiv(C * pixels, block_k) * block_k
            channels = min(COLUMNS // sums, max(4, power_of_2(OC)))
            # Four windows a patch pay off if one block of K and one of filters cover everything.
            if length * sums * channels <= OPERAND_SIZE and (side == 1 or (length <= 64 and OC <= channels)):
                return Form(True, side, patch, channels, block_k)
    return None


# Limits of the fused gradients: pixels of a window, pixels times channels under one window, and of one block of dx.
MOST_POSITIONS, MOST_PATCH, MOST_BLOCK = 4, 256, 64
# A row of dz is an image: smaller batches leave most rows empty, which costs little for small images only.
MANY_IMAGES, FEW_WINDOWS = 32, 1024


def gradients_are_fused(dy, w_size, *geometry):
    """Whether input_grad.py and weight_grad.py serve the gradients of such a convolution; w_size is (OC, C, KH, KW).

    Full float32 is excluded: for sm_100 triton 3.7.1 computes a product in tf32, whatever its precision, if an operand
    depends on values loaded as bytes, as the code is.
    """
    return _gradients_are_fused(number_format(dy.dtype, precision()), dy.shape, tuple(w_size), *geometry)


@remembered
def _gradients_are_fused(
    format, size, w_size, stride, padding, dilation, groups, pad_mode, pool_kernel, pool_stride, pool_padding
):
    (_, C, KH, KW), (N, _, QH, QW) = w_size, size
    block = C * pool_stride[0] * stride[0] * pool_stride[1] * stride[1]
    patch = C * patch_size(1, KH, stride[0], dilation[0], pool_kernel[0], pool_stride[0])
    patch *= patch_size(1, KW, stride[1], dilation[1], pool_kernel[1], pool_stride[1])
    return (
        groups == 1
        and pad_mode == "zeros"
        and format in ("half", "tf32")
        and C < FLAT_BELOW
        and pool_kernel[0] * pool_kernel[1] <= MOST_POSITIONS
        and patch <= MOST_PATCH
        and block <= MOST_BLOCK
        and (N >= MANY_IMAGES or QH * QW <= FEW_WINDOWS)
    )


def patch_size(R, K, S, D, W, T):
    """How many pixels, along one dimension, R adjacent pooled pixels depend on."""
    return ((R - 1) * T + W - 1) * S + (K - 1) * D + 1

"""The gradients of batch normalisation in training, through an activation behind it.

Let rstd = 1 / sqrt(var + eps), xhat = (x - mean) * rstd, u = xhat * scale + shift, and y = act(u) or act(u + residual).
As mean and var are functions of x:

    dz = dy * act'                       from y, or without a residual from u, which is computed as in forward
    dshift = sum of dz,    dscale = sum of dz * xhat            over the M elements of a channel
    dx = scale * rstd * (dz - dshift / M - xhat * dscale / M)

dz is the residual's gradient too. Three launches: partial sums, for which each tensor is read once; their sums in a
fixed order; and dx, for which each tensor is read once more.

Source: Ioffe and Szegedy, Batch Normalization, https://arxiv.org/abs/1502.03167
"""

import triton
import triton.language as tl

from .. import shapes
from .._common import OPTIONS, acc_type, cdiv, round_to
from ..activations import by_result
from ..epilogue import ACT, EPS, SLOPE, activated, constant, inverse_root, of_channels, scaled, with_slope
from ..launching import planned
from ..relu import laid_out_as
from .elements import Division, block_at, channels_of, share_of, sum_of
from .statistics import fold_blocks


@triton.jit
def loaded(x_ptr, dy_ptr, y_ptr, offs, mask, HAS_Y: tl.constexpr):
    """The elements of x, dy and y, or in place of y again those of dy."""
    x, dy = tl.load(x_ptr + offs, mask=mask, other=0.0), tl.load(dy_ptr + offs, mask=mask, other=0.0)
    return x, dy, tl.load(y_ptr + offs, mask=mask, other=0.0) if HAS_Y else dy


@triton.jit
def through_activation(
    dy, y, centred, factor, summand, EPILOGUE: tl.constexpr, HAS_Y: tl.constexpr, BY_RESULT: tl.constexpr
):
    """(dz, act(u)) of elements x, which are given as x - mean; the second is y if there is one."""
    ACTIVATION: tl.constexpr = EPILOGUE[ACT]
    u = scaled(centred, factor, summand, EPILOGUE)
    result = y if HAS_Y else activated(u, ACTIVATION, EPILOGUE[SLOPE])
    return with_slope(dy, result if BY_RESULT else u, ACTIVATION, EPILOGUE[SLOPE]), result


@triton.jit(do_not_specialize=["count"])
def batch_norm_sums_kernel(
    x_ptr, dy_ptr, y_ptr, mean_ptr, var_ptr, scale_ptr, shift_ptr, partial_ptr, dz_ptr, act_ptr,
    count, rows, C, inner, inverse_inner,
    HAS_Y: tl.constexpr, BY_RESULT: tl.constexpr, EPILOGUE: tl.constexpr, WITH_DZ: tl.constexpr, WITH_Y: tl.constexpr,
    C_UNIT: tl.constexpr, INNER_UNIT: tl.constexpr, CHANNELS: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    # The elements of a channel in a block.
    BLOCK: tl.constexpr = BLOCK_M if CHANNELS else BLOCK_M * BLOCK_N
    C *= C_UNIT
    sizes = (C, inner * INNER_UNIT, inverse_inner)
    channel = channels_of(CHANNELS, BLOCK_N)
    mask_c = channel < C
    first, last = share_of(count, rows, INDEX)
    mean = tl.load(mean_ptr + channel, mask=mask_c, other=0.0).to(ACC)
    vectors = (x_ptr, mean_ptr, var_ptr, scale_ptr, shift_ptr)
    factor, summand = of_channels(vectors, 0, channel, mask_c, EPILOGUE, ACC)

    sums, products = tl.zeros((BLOCK_M, BLOCK_N), ACC), tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for m0 in range(first, last, BLOCK * UNROLL):
        blocks = ()
        for i in tl.static_range(UNROLL):
            offs, inside = block_at(m0 + i * BLOCK, last, channel, sizes, CHANNELS, INDEX, BLOCK_M, BLOCK_N)
            mask = mask_c & inside
            blocks = blocks + ((offs, mask) + loaded(x_ptr, dy_ptr, y_ptr, offs, mask, HAS_Y),)
        for i in tl.static_range(UNROLL):
            offs, mask, x, dy, y = blocks[i]
            centred = x.to(ACC) - mean
            dz, result = through_activation(dy.to(ACC), y.to(ACC), centred, factor, summand, EPILOGUE, HAS_Y, BY_RESULT)
            sums += dz
            products = tl.fma(dz, centred, products)
            if WITH_DZ:
                tl.store(dz_ptr + offs, round_to(dz, dz_ptr.dtype.element_ty), mask=mask)
            if WITH_Y:
                tl.store(act_ptr + offs, round_to(result, act_ptr.dtype.element_ty), mask=mask)

    ptrs = partial_ptr + tl.program_id(1) * C + channel
    tl.store(ptrs, sum_of(sums, CHANNELS), mask=mask_c)
    tl.store(ptrs + tl.num_programs(1) * C, sum_of(products, CHANNELS), mask=mask_c)


def _constants(y, var, scale, shift, eps, activation, slope):
    """The constants by which the kernels compute dz."""
    return dict(
        HAS_Y=y is not None, BY_RESULT=by_result(activation, slope),
        EPILOGUE=constant(None, None, var, scale, shift, None, eps, activation, slope),
    )  # fmt: skip


@planned(batch_norm_sums_kernel)
def _partial_sums(x, dy, y, mean, var, scale, shift, partials, dz, act, loaded, eps, activation, slope):
    grid, numbers, constants = Division.of(x, loaded).launch(x)
    constants |= _constants(y, var, scale, shift, eps, activation, slope)
    return grid, numbers, {**constants, "WITH_DZ": dz is not None, "WITH_Y": act is not None, **OPTIONS}


@triton.jit(do_not_specialize=["P"])
def fold_sums_kernel(
    partial_ptr, var_ptr, dscale_ptr, dshift_ptr,
    C, P,
    EPSILON: tl.constexpr, ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mask_c = channel < C
    offs_p = tl.arange(0, BLOCK_P)[:, None]
    products_ptr = partial_ptr + P * C

    sums, products = tl.zeros((BLOCK_P, BLOCK_C), ACC), tl.zeros((BLOCK_P, BLOCK_C), ACC)
    for p0 in range(0, P, BLOCK_P):
        offs, mask = (p0 + offs_p) * C + channel, mask_c & (p0 + offs_p < P)
        sums += tl.load(partial_ptr + offs, mask=mask, other=0.0)
        products += tl.load(products_ptr + offs, mask=mask, other=0.0)
    rstd = inverse_root(tl.load(var_ptr + channel, mask=mask_c, other=1.0).to(ACC), EPSILON)

    tl.store(dshift_ptr + channel, tl.sum(sums, axis=0, keep_dims=True), mask=mask_c)
    tl.store(dscale_ptr + channel, tl.sum(products, axis=0, keep_dims=True) * rstd, mask=mask_c)


@planned(fold_sums_kernel)
def _fold_sums(partials, var, dscale, dshift, eps):
    _, P, C = partials.shape
    block_p, block_c, num_warps = fold_blocks(P, C)
    return (cdiv(C, block_c),), (C, P), dict(
        EPSILON=eps, ACC=acc_type(partials.dtype), BLOCK_P=block_p, BLOCK_C=block_c, num_warps=num_warps, **OPTIONS
    )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def batch_norm_grad_kernel(
    x_ptr, dy_ptr, y_ptr, mean_ptr, var_ptr, scale_ptr, shift_ptr, dscale_ptr, dshift_ptr, dx_ptr,
    count, rows, C, inner, inverse_inner,
    HAS_Y: tl.constexpr, BY_RESULT: tl.constexpr, EPILOGUE: tl.constexpr,
    C_UNIT: tl.constexpr, INNER_UNIT: tl.constexpr, CHANNELS: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    # The elements of a channel in a block.
    BLOCK: tl.constexpr = BLOCK_M if CHANNELS else BLOCK_M * BLOCK_N
    C *= C_UNIT
    sizes = (C, inner * INNER_UNIT, inverse_inner)
    channel = channels_of(CHANNELS, BLOCK_N)
    mask_c = channel < C
    first, last = share_of(count, rows, INDEX)
    mean = tl.load(mean_ptr + channel, mask=mask_c, other=0.0).to(ACC)
    vectors = (x_ptr, mean_ptr, var_ptr, scale_ptr, shift_ptr)
    factor, summand = of_channels(vectors, 0, channel, mask_c, EPILOGUE, ACC)

    # dx = factor * (dz - of_mean - (x - mean) * of_var)
    total = tl.full((1, 1), count, ACC)
    rstd = inverse_root(tl.load(var_ptr + channel, mask=mask_c, other=1.0).to(ACC), EPILOGUE[EPS])
    of_mean = tl.load(dshift_ptr + channel, mask=mask_c, other=0.0) / total
    of_var = tl.load(dscale_ptr + channel, mask=mask_c, other=0.0) / total * rstd
    for m0 in range(first, last, BLOCK * UNROLL):
        blocks = ()
        for i in tl.static_range(UNROLL):
            offs, inside = block_at(m0 + i * BLOCK, last, channel, sizes, CHANNELS, INDEX, BLOCK_M, BLOCK_N)
            mask = mask_c & inside
            blocks = blocks + ((offs, mask) + loaded(x_ptr, dy_ptr, y_ptr, offs, mask, HAS_Y),)
        for i in tl.static_range(UNROLL):
            offs, mask, x, dy, y = blocks[i]
            centred = x.to(ACC) - mean
            dz, _ = through_activation(dy.to(ACC), y.to(ACC), centred, factor, summand, EPILOGUE, HAS_Y, BY_RESULT)
            dx = tl.fma(-centred, of_var, dz - of_mean) * factor
            tl.store(dx_ptr + offs, round_to(dx, dx_ptr.dtype.element_ty), mask=mask)


@planned(batch_norm_grad_kernel)
def _grad(x, dy, y, mean, var, scale, shift, dscale, dshift, dx, loaded, eps, activation, slope):
    grid, numbers, constants = Division.of(x, loaded).launch(x)
    return grid, numbers, {**constants, **_constants(y, var, scale, shift, eps, activation, slope), **OPTIONS}


def backward(dy, x, y, mean, var, scale, shift, eps, activation, slope, with_dz, with_y):
    """dy, x (N, C, *), y like x or None; mean, var, scale, shift (C), the latter two or None.

    Where there was a residual, y has to be given, and the activation's derivative a function of it.

    Returns:
        dx, with x's strides if x is dense; dscale and dshift (C); dz and act(u), laid out as dx, or empty without
        with_dz and with_y.
    """
    results = shapes.batch_norm_grad(x, with_dz, with_y)
    dx, dscale, dshift = results[:3]
    dz, act = (t if wanted else None for t, wanted in zip(results[3:], (with_dz, with_y)))
    if x.numel() == 0:
        dscale.zero_(), dshift.zero_()
    else:
        x, dy, y = (None if t is None else laid_out_as(dx, t) for t in (x, dy, y))
        vectors = [None if t is None else t.contiguous() for t in (mean, var, scale, shift)]
        loaded, values = 2 + (y is not None), (eps, activation, slope)
        partials = Division.of(x, loaded).partials(x, 2)
        _partial_sums((x, dy, y, *vectors, partials, dz, act), loaded, *values)
        _fold_sums((partials, vectors[1], dscale, dshift), eps)
        if dz is None:
            _grad((x, dy, y, *vectors, dscale, dshift, dx), loaded, *values)
        else:
            _grad((x, dz, None, *vectors[:3], None, dscale, dshift, dx), 2, eps, "none", 0.0)
    return results

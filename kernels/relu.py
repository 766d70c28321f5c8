"""Relu.

y  = 0 where x < 0, else x          (so NaN stays NaN and -0.0 stays -0.0, as in torch)
dx = 0 where y <= 0, else dy
"""

import torch
import triton
import triton.language as tl

from . import shapes
from ._common import OPTIONS, acc_type, cdiv, index_type
from .launching import planned
from .tiles import flat_block


def flat_plan(*tensors):
    """The plan of a launch over the elements of dense tensors with the same strides."""
    out = tensors[-1]
    block = flat_block(out.numel(), 1024)
    constants = {"INDEX": index_type(out), "ACC": acc_type(out.dtype), "BLOCK": block, "num_warps": 4, **OPTIONS}
    return (cdiv(out.numel(), block),), (out.numel(),), constants


def _launched(launch, *tensors):
    """The last of the tensors, after the launch has filled it."""
    if tensors[-1].numel() > 0:
        launch(tensors)
    return tensors[-1]


def is_dense(t):
    """Whether t has no gaps and no elements that share memory: empty_like keeps the strides of such tensors only."""
    return torch.empty_like(t, device="meta").stride() == t.stride()


def laid_out_as(out, t):
    """t if it has the strides of the dense tensor `out`, else a copy that has them."""
    return t if t.stride() == out.stride() else torch.empty_like(out).copy_(t)


@triton.jit
def relu_kernel(x_ptr, y_ptr, numel, INDEX: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel

    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(ACC)
    y = tl.where(x < 0, 0.0, x)

    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


_relu = planned(relu_kernel)(flat_plan)


def forward(x):
    """x -> y, with x's shape and, if x is dense, its strides."""
    y = shapes.relu(x)
    return _launched(_relu, x if x.stride() == y.stride() else y.copy_(x), y)


def forward_(x):
    """Overwrite x with y."""
    if is_dense(x):
        _launched(_relu, x, x)
    else:
        x.copy_(forward(x))


@triton.jit
def relu_grad_kernel(dy_ptr, y_ptr, dx_ptr, numel, INDEX: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel

    dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(ACC)
    y = tl.load(y_ptr + offs, mask=mask, other=0.0).to(ACC)
    dx = tl.where(y <= 0, 0.0, dy)

    tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


_relu_grad = planned(relu_grad_kernel)(flat_plan)


def grad(dy, y):
    """dy, y -> dx, with y's shape and strides."""
    dx = shapes.relu(y)
    return _launched(_relu_grad, laid_out_as(dx, dy), laid_out_as(dx, y), dx)

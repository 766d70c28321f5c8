"""LeNet's forward in one launch; in training its loss too, and the gradients down to the second convolution's result.

    p1 = pool(relu(conv1(x))), p2 = pool(relu(conv2(p1))), h1 = relu(fc1(p2)), h2 = relu(fc2(h1)), y = fc3(h2)
    loss = sum over the images with a target of lse(y) - y[target],   dy = exp(y - lse) - [class = target]
    dh2 = fc3^T(dy) where h2 > 0,  dh1 = fc2^T(dh2) where h1 > 0,  dz = fc1^T(dh1) at the pixel of p2's code

A program takes BLOCK_I images through all layers, BLOCK_S at a time through the convolutions. Each layer stores its
result, and the next one reads it after a barrier, from the caches. Operands are permuted as lane_order.py explains, so
that images, activations and results need no shared memory. Gradients are those of the sum of the losses; the last
launch divides by the number of targets, which is known only then. layout.py has the layouts. Of equal pixels the first
one wins, and NaN wins over all.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .._common import (
    INTERPRETED,
    OPTIONS,
    cached_for_architecture,
    cdiv,
    index_type,
    operand_type,
)
from ..launching import planned
from . import tiles
from .lane_order import columns_of_lanes, from_result, rows_of_lanes, vectors
from .lanes import first_convolution_of_lanes, second_convolution_of_lanes
from .linears import add_product, features_gradient, hidden_gradient, hidden_layer, loss_and_gradient
from .products import first_convolution, keep_filters, second_convolution


@triton.jit(do_not_specialize=["N", "ignore_index"])
def lenet_forward_kernel(
    x_ptr, target_ptr, plain_ptr, packed_ptr,
    p1_ptr, code1_ptr, acts_ptr, code2_ptr, logits_ptr, grads_ptr, dz_ptr, dz_columns_ptr, code2_columns_ptr, loss_ptr,
    N, ignore_index,
    B1: tl.constexpr, B2: tl.constexpr, B3: tl.constexpr, B4: tl.constexpr, B5: tl.constexpr,
    CONV2: tl.constexpr, W2: tl.constexpr, W3: tl.constexpr, W4: tl.constexpr, W5: tl.constexpr,
    LANES: tl.constexpr, TRAIN: tl.constexpr, KEPT: tl.constexpr,
    C: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr, Q1: tl.constexpr, Q2: tl.constexpr,
    F: tl.constexpr, CLASSES: tl.constexpr, CP: tl.constexpr,
    FRAME: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
    INDEX: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_M1: tl.constexpr, BLOCK_K1: tl.constexpr, BLOCK_M2: tl.constexpr, BLOCK_K2: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(INDEX)
    WIDE: tl.constexpr = 128 // p1_ptr.dtype.element_ty.primitive_bitwidth
    first, second = (), ()
    if KEPT > 0:
        first = keep_filters(packed_ptr, columns_of_lanes(128, WIDE, 2), 128, C * 64, BLOCK_K1, 4, OPERAND)
    if KEPT > 1:
        second = keep_filters(packed_ptr + W2, columns_of_lanes(64, 4, 2), 64, 288, BLOCK_K2, WIDE, OPERAND)
    # In training every image has its own activations; otherwise a program reuses one buffer.
    for group in range(pid, pid + 1 if TRAIN else tl.cdiv(N, BLOCK_I), 1 if TRAIN else tl.num_programs(0)):
        i0, s0 = group * BLOCK_I, (group if TRAIN else pid) * BLOCK_I
        # Convolve BLOCK_S images at a time, so that the first result stays in the caches for the second convolution.
        for j0 in range(0, BLOCK_I, BLOCK_S):
            p0 = i0 + j0 if TRAIN else pid * BLOCK_S
            if LANES:
                first_convolution_of_lanes(
                    x_ptr, plain_ptr, plain_ptr + B1, p1_ptr, code1_ptr, i0 + j0, p0, N,
                    TRAIN, C, SIZE, PAD, Q1, FRAME, SCALE, SHIFT, BLOCK_S, BLOCK_M1,
                )  # fmt: skip
            else:
                first_convolution(
                    x_ptr, packed_ptr, first, plain_ptr + B1, p1_ptr, code1_ptr, i0 + j0, p0, N,
                    TRAIN, KEPT > 0, C, SIZE, PAD, Q1, FRAME, SCALE, SHIFT,
                    OPERAND, PRECISION, BLOCK_S, BLOCK_M1, BLOCK_K1,
                )  # fmt: skip
            tl.debug_barrier()
            if LANES:
                second_convolution_of_lanes(
                    p1_ptr, plain_ptr + CONV2, plain_ptr + B2, acts_ptr, code2_ptr, i0 + j0, p0, s0 + j0, N,
                    TRAIN, Q1, Q2, F, BLOCK_S, BLOCK_M2,
                )  # fmt: skip
            else:
                second_convolution(
                    p1_ptr, packed_ptr + W2, second, plain_ptr + B2, acts_ptr, code2_ptr, i0 + j0, p0, s0 + j0, N,
                    TRAIN, KEPT > 1, Q1, Q2, F, OPERAND, PRECISION, BLOCK_S, BLOCK_M2, BLOCK_K2,
                )  # fmt: skip
            tl.debug_barrier()

        rows = rows_of_lanes(BLOCK_R)[None, :, None, None]
        acts_rows, grads_rows = (s0 + rows) * (F + 256), (i0 + rows) * (256 + CP)
        mask = (rows < BLOCK_I) & (i0 + rows < N)
        hidden_layer(
            acts_ptr, acts_rows, mask, packed_ptr + W3, plain_ptr + B3, F, 120,
            OPERAND, PRECISION, BLOCK_R, BLOCK_K,
        )  # fmt: skip
        tl.debug_barrier()
        hidden_layer(
            acts_ptr + F, acts_rows, mask, packed_ptr + W4, plain_ptr + B4, 128, 84,
            OPERAND, PRECISION, BLOCK_R, BLOCK_K,
        )  # fmt: skip
        tl.debug_barrier()

        for c0 in range(0, CP, BLOCK_C):
            offs_c = c0 + tl.arange(0, BLOCK_C)
            y = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
            y = add_product(
                y, acts_ptr + F + 128, acts_rows, mask, packed_ptr + W5, offs_c, 128, CP,
                OPERAND, PRECISION, BLOCK_K,
            )  # fmt: skip
            y += tl.load(plain_ptr + B5 + offs_c, mask=offs_c < CLASSES, other=0.0)[None, :]
            c = c0 + vectors(BLOCK_C, 2)
            y = from_result(y.to(logits_ptr.dtype.element_ty), 2)
            tl.store(logits_ptr + (i0 + rows) * CLASSES + c, y, mask=mask & (c < CLASSES))
        tl.debug_barrier()

        if TRAIN:
            lanes = tl.arange(0, BLOCK_R)
            n = i0 + lanes
            loss, kept = loss_and_gradient(
                logits_ptr, target_ptr, grads_ptr, n * (256 + CP), n, (lanes < BLOCK_I) & (n < N), ignore_index,
                CLASSES, CP, BLOCK_R, BLOCK_C,
            )  # fmt: skip
            tl.store(loss_ptr + 2 * group + tl.arange(0, 2), tl.sum(tl.join(loss, kept.to(tl.float32)), axis=0))
            tl.debug_barrier()
            hidden_gradient(
                acts_ptr, acts_rows, grads_ptr, grads_rows, mask, packed_ptr + W5, 256, 128, CP, F + 128,
                OPERAND, PRECISION, BLOCK_R, BLOCK_K if BLOCK_K < BLOCK_C else BLOCK_C,
            )  # fmt: skip
            tl.debug_barrier()
            hidden_gradient(
                acts_ptr, acts_rows, grads_ptr, grads_rows, mask, packed_ptr + W4, 128, 0, 128, F,
                OPERAND, PRECISION, BLOCK_R, BLOCK_K,
            )  # fmt: skip
            tl.debug_barrier()
            features_gradient(
                grads_ptr, grads_rows, code2_ptr, dz_ptr, dz_columns_ptr, code2_columns_ptr, i0 + rows, mask,
                packed_ptr + W3, F, LANES, OPERAND, PRECISION, BLOCK_R, BLOCK_K, BLOCK_F,
            )  # fmt: skip


class Pixels(NamedTuple):
    """How images are read: a byte p becomes p * scale + shift, and `frame` black pixels surround the image."""

    frame: int = 0
    scale: float = 1.0
    shift: float = 0.0


def _pooled_size(form, geometry):
    """The shape of an image after the first pooling, as the kernels store it."""
    Q1, _ = geometry.pooled
    return (6, Q1, Q1) if form == "lanes" else (Q1, Q1, 8)


@cached_for_architecture
def _inference_sizes(N, geometry, form, device):
    """(name, size) of the tensors of a launch for inference, whose programs reuse them."""
    block, tile = tiles.forward_tile(form, N, geometry, False)
    programs = inference_programs(N, block, tile, torch.device(device))
    # The last program may have fewer images than the others.
    block_s, last = min(block, tile.S), N - (programs - 1) * block
    p1 = (programs - 1) * block_s + min(block_s, last), *_pooled_size(form, geometry)
    return ("p1", p1), ("acts", (min(N, programs * block), geometry.features + 256))


def activations(N, geometry, format, device, train):
    """The tensors that one launch passes to the next, for N images; for inference p1 and acts alone. See layout.py."""
    form, dtype = tiles.form(format), torch.bfloat16 if format == "bfloat16" else torch.float32
    if not train:
        sizes = _inference_sizes(N, geometry, form, device)
        return {name: torch.empty(size, dtype=dtype, device=device) for name, size in sizes}
    F = geometry.features
    block, _ = tiles.forward_tile(form, N, geometry, train)

    def new(*size, dtype=dtype):
        return torch.empty(size, dtype=dtype, device=device)

    pixels = _pooled_size(form, geometry)
    tensors = {
        "p1": new(N, *pixels), "code1": new(N, *pixels, dtype=torch.uint8),
        "acts": new(N, F + 256), "code2": new(N, F, dtype=torch.uint8),
        "logits": new(N, geometry.classes, dtype=torch.float32),
        "grads": new(N, 256 + geometry.padded_classes), "dz": new(N, F) if form == "lanes" else new(N, F // 16, 4, 16),
        "loss": new(cdiv(N, block), 2, dtype=torch.float32),
    }  # fmt: skip
    if form == "lanes":
        tensors["dz_columns"], tensors["dp1"] = new(cdiv(N, 32), F, 32), new(N, *pixels)
        tensors["code2_columns"] = new(cdiv(N, 32), F, 32, dtype=torch.uint8)
    return tensors


def inference_programs(N, block, tile, device):
    """The number of programs that run at once, so that the activations that they reuse stay in the caches."""
    groups = cdiv(N, block)
    return min(groups, 3) if INTERPRETED else min(groups, multiprocessors(device) * 8 // tile.num_warps)


@functools.cache
def multiprocessors(device):
    """The multiprocessors of a GPU, each with registers for eight warps; an H200's number for any other device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@planned(lenet_forward_kernel)
def _forward(
    x, target, plain, packed, p1, code1, acts, code2, logits, grads, dz, dz_columns, code2_columns, loss,
    geometry, format, pixels, ignore_index,
):  # fmt: skip
    N, train = x.shape[0], target is not None
    form = tiles.form(format)
    block, tile = tiles.forward_tile(form, N, geometry, train)
    programs = cdiv(N, block) if train else inference_programs(N, block, tile, x.device)
    (_, W2, _, W3, W4, W5, _), (_, B1, CONV2, B2, B3, B4, B5, _) = geometry.packed, geometry.plain
    # Matrix units need at least sixteen rows, and an FMA tile at least eight.
    block_r = max(8 if form == "lanes" else 16, block)
    return (programs,), (N, ignore_index), dict(
        B1=B1, B2=B2, B3=B3, B4=B4, B5=B5, CONV2=CONV2, W2=W2, W3=W3, W4=W4, W5=W5,
        LANES=form == "lanes", TRAIN=train, KEPT=tile.kept, **geometry.constants,
        FRAME=pixels.frame, SCALE=pixels.scale, SHIFT=pixels.shift,
        INDEX=index_type(x, p1, code1, acts, code2, logits, grads, dz, dz_columns, code2_columns, loss),
        OPERAND=operand_type(packed.dtype),
        PRECISION="ieee" if format == "ieee" else "tf32",
        BLOCK_I=block, BLOCK_S=min(block, tile.S), BLOCK_R=block_r,
        BLOCK_C=min(32 if form == "lanes" else 128, geometry.block_classes),
        BLOCK_M1=tile.M1, BLOCK_K1=tile.K1, BLOCK_M2=tile.M2, BLOCK_K2=tile.K2, BLOCK_K=tile.K, BLOCK_F=tile.F,
        num_warps=tile.num_warps, num_stages=1, **OPTIONS,
    )  # fmt: skip


def forward(x, target, plain, packed, geometry, format, pixels, memory, logits, ignore_index=-100):
    """x (N, C, H, W) contiguous, target (N) or None -> logits (N, classes). With a target it fills `memory`.

    x is float32, float16 or bfloat16, or uint8 without the frame of `pixels`. dp1 stays free for the third launch.
    """
    p1, acts = memory["p1"], memory["acts"]
    # Inference does not have these tensors, and never dereferences their pointers.
    names = "code2", "grads", "dz", "dz_columns", "code2_columns", "loss"
    code2, grads, dz, dz_columns, code2_columns, loss = map(memory.get, names)
    tensors = x, target, plain, packed, p1, memory.get("code1"), acts, code2, logits, grads, dz, dz_columns
    _forward((*tensors, code2_columns, loss), geometry, format, pixels, ignore_index)
    return logits

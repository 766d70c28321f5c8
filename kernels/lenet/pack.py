"""The first launch of each LeNet forward: it packs the current weights into the layouts that the products read.

It runs every time, because changes cannot be detected: writes through `.data`, numpy or another process leave no trace.
The kernel reads the parameters in place, at any strides, through the table of addresses. layout.py has the layouts.
Each program writes a block of one of them, with 0 where there is no weight. In training the last
program also copies what the last launch of the step both reads and changes.
"""

import itertools

import triton
import triton.language as tl

from .._common import INTERPRETED, OPTIONS, cdiv, element_type, round_to
from ..launching import planned
from . import tiles
from .layout import PLACES, STEP, STRIDES

# Elements that a program writes; the interpreter's time grows with the number of programs.
BLOCK = 65536 if INTERPRETED else 1024


@triton.jit
def load_filters(
    places_ptr, oc, c, kh, kw, mask,
    PARAMETER: tl.constexpr, WEIGHT: tl.constexpr, PLACES: tl.constexpr, STRIDES: tl.constexpr,
):  # fmt: skip
    """The weights [oc, c, kh, kw] of a 5 x 5 convolution, 0 outside the filter and where the mask is false."""
    mask = mask & (kh >= 0) & (kh < 5) & (kw >= 0) & (kw < 5)
    place_ptr = places_ptr + PARAMETER * PLACES
    offs = oc * tl.load(place_ptr + STRIDES) + c * tl.load(place_ptr + STRIDES + 1)
    offs += kh * tl.load(place_ptr + STRIDES + 2) + kw * tl.load(place_ptr + STRIDES + 3)
    return tl.load(tl.load(place_ptr).to(tl.pointer_type(WEIGHT)) + offs, mask=mask, other=0.0)


@triton.jit
def load_linear(
    places_ptr, n, k, mask,
    PARAMETER: tl.constexpr, WEIGHT: tl.constexpr, PLACES: tl.constexpr, STRIDES: tl.constexpr,
):  # fmt: skip
    """The weights [n, k] of a linear layer, 0 where the mask is false."""
    place_ptr = places_ptr + PARAMETER * PLACES
    offs = n * tl.load(place_ptr + STRIDES) + k * tl.load(place_ptr + STRIDES + 1)
    return tl.load(tl.load(place_ptr).to(tl.pointer_type(WEIGHT)) + offs, mask=mask, other=0.0)


@triton.jit
def copy_bias(
    places_ptr, plain_ptr, COUNT: tl.constexpr,
    PARAMETER: tl.constexpr, WEIGHT: tl.constexpr, PLACES: tl.constexpr, STRIDES: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, triton.next_power_of_2(COUNT))
    place_ptr = places_ptr + PARAMETER * PLACES
    bias_ptr = tl.load(place_ptr).to(tl.pointer_type(WEIGHT))
    bias = tl.load(bias_ptr + i * tl.load(place_ptr + STRIDES), mask=i < COUNT, other=0.0)
    tl.store(plain_ptr + i, bias.to(tl.float32), mask=i < COUNT)


@triton.jit
def lenet_pack_kernel(
    places_ptr, plain_ptr, packed_ptr, steps_ptr, trouble_ptr,
    TRAIN: tl.constexpr, FIRST: tl.constexpr,
    C: tl.constexpr, Q2: tl.constexpr, F: tl.constexpr, CLASSES: tl.constexpr, CP: tl.constexpr,
    P2: tl.constexpr, PD: tl.constexpr, P3: tl.constexpr, P4: tl.constexpr, P5: tl.constexpr, PF: tl.constexpr,
    PB: tl.constexpr,
    W2: tl.constexpr, WD: tl.constexpr, W3: tl.constexpr, W4: tl.constexpr, W5: tl.constexpr, SIZE: tl.constexpr,
    B1: tl.constexpr, CONV2: tl.constexpr, B2: tl.constexpr, B3: tl.constexpr, B4: tl.constexpr, B5: tl.constexpr,
    WEIGHT: tl.constexpr, PLACES: tl.constexpr, STRIDES: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Programs from P2 on pack W2, and so on; from PF on they copy unpacked filters, and the last one copies biases.
    pid, i = tl.program_id(0), tl.arange(0, BLOCK)
    if pid < P2:
        e = pid * BLOCK + i
        k, q, r, oc = e // 128, e // 32 % 4, e // 8 % 4, e % 8
        kh, kw = k // 8 % 8 - r // 2 * 2 - q // 2, k % 8 - r % 2 * 2 - q % 2
        w = load_filters(places_ptr, oc, k // 64, kh, kw, (oc < 6) & (e < W2), 0, WEIGHT, PLACES, STRIDES)
        tl.store(packed_ptr + e, round_to(w, packed_ptr.dtype.element_ty), mask=e < W2)
    elif pid < PD:
        e = (pid - P2) * BLOCK + i
        k, q, oc = e // 64, e // 16 % 4, e % 16
        kh, kw, c = k // 48 - q // 2, k // 8 % 6 - q % 2, k % 8
        w = load_filters(places_ptr, oc, c, kh, kw, (c < 6) & (e < WD - W2), 2, WEIGHT, PLACES, STRIDES)
        tl.store(packed_ptr + W2 + e, round_to(w, packed_ptr.dtype.element_ty), mask=e < WD - W2)
    elif pid < P3:
        e = (pid - PD) * BLOCK + i
        j, r, s, c, q, oc = e // 4096, e // 1024 % 4, e // 512 % 2, e // 64 % 8, e // 16 % 4, e % 16
        kh, kw = j // 4 * 2 + r // 2 - q // 2, (j % 4 + s - 1) * 2 + r % 2 - q % 2
        w = load_filters(places_ptr, oc, c, kh, kw, (c < 6) & (e < W3 - WD), 2, WEIGHT, PLACES, STRIDES)
        tl.store(packed_ptr + WD + e, round_to(w, packed_ptr.dtype.element_ty), mask=e < W3 - WD)
    elif pid < P4:
        e = (pid - P3) * BLOCK + i
        k, n = e // 128, e % 128
        w = load_linear(
            places_ptr, n, k % 16 * (Q2 * Q2) + k // 16, (n < 120) & (k < F), 4, WEIGHT, PLACES, STRIDES
        )  # fmt: skip
        tl.store(packed_ptr + W3 + e, round_to(w, packed_ptr.dtype.element_ty), mask=e < W4 - W3)
    elif pid < P5:
        e = (pid - P4) * BLOCK + i
        k, n = e // 128, e % 128
        w = load_linear(places_ptr, n, k, (n < 84) & (k < 120), 6, WEIGHT, PLACES, STRIDES)
        tl.store(packed_ptr + W4 + e, round_to(w, packed_ptr.dtype.element_ty), mask=e < W5 - W4)
    elif pid < PF:
        e = (pid - P5) * BLOCK + i
        k, n = e // CP, e % CP
        w = load_linear(places_ptr, n, k, (n < CLASSES) & (k < 84), 8, WEIGHT, PLACES, STRIDES)
        tl.store(packed_ptr + W5 + e, round_to(w, packed_ptr.dtype.element_ty), mask=e < SIZE - W5)
    elif pid < PB - 1:
        e = (pid - PF) * BLOCK + i
        w = load_filters(places_ptr, e // 150, e // 25 % 6, e // 5 % 5, e % 5, e < 2400, 2, WEIGHT, PLACES, STRIDES)
        tl.store(plain_ptr + CONV2 + e, w.to(tl.float32), mask=e < 2400)
    elif pid < PB:
        e = tl.arange(0, 512)
        w = load_filters(
            places_ptr, e // (25 * C), e // 25 % C, e // 5 % 5, e % 5, e < 150 * C, 0, WEIGHT, PLACES, STRIDES
        )  # fmt: skip
        tl.store(plain_ptr + e, w.to(tl.float32), mask=e < 150 * C)
    else:
        copy_bias(places_ptr, plain_ptr + B1, 6, 1, WEIGHT, PLACES, STRIDES)
        copy_bias(places_ptr, plain_ptr + B2, 16, 3, WEIGHT, PLACES, STRIDES)
        copy_bias(places_ptr, plain_ptr + B3, 120, 5, WEIGHT, PLACES, STRIDES)
        copy_bias(places_ptr, plain_ptr + B4, 84, 7, WEIGHT, PLACES, STRIDES)
        copy_bias(places_ptr, plain_ptr + B5, CLASSES, 9, WEIGHT, PLACES, STRIDES)
        if TRAIN:
            for p in tl.static_range(10):
                step_ptr = tl.load(places_ptr + p * PLACES + STEP).to(tl.pointer_type(tl.float32))
                tl.store(steps_ptr + p, tl.load(step_ptr).to(tl.int32))
            # Whether the loss of an earlier call of the accumulation group was not finite.
            tl.store(trouble_ptr + 3, 0 if FIRST else tl.load(trouble_ptr + 2))


@planned(lenet_pack_kernel)
def _pack(places, plain, packed, steps, trouble, geometry, format, weight, first):
    train, lanes, sizes = steps is not None, tiles.form(format) == "lanes", geometry.packed
    # lanes.py and lanes_gradient.py read packed filters only for the input gradient of the second convolution.
    used = not lanes, not lanes or train, not lanes and train, True, True, True
    # Unpacked filters take cdiv(2400, BLOCK) programs for the second convolution, and one for the first.
    programs = [cdiv(end - start, BLOCK) * use for start, end, use in zip(sizes, sizes[1:], used)]
    P2, PD, P3, P4, P5, PF, PB = itertools.accumulate([*programs, cdiv(2400, BLOCK) + 1])
    _, W2, WD, W3, W4, W5, size = sizes
    _, B1, CONV2, B2, B3, B4, B5, _ = geometry.plain
    constants = {name: geometry.constants[name] for name in ("C", "Q2", "F", "CLASSES", "CP")}
    return (PB + 1,), (), dict(
        TRAIN=train, FIRST=first, **constants, P2=P2, PD=PD, P3=P3, P4=P4, P5=P5, PF=PF, PB=PB,
        W2=W2, WD=WD, W3=W3, W4=W4, W5=W5, SIZE=size, B1=B1, CONV2=CONV2, B2=B2, B3=B3, B4=B4, B5=B5,
        WEIGHT=element_type(weight), PLACES=PLACES, STRIDES=STRIDES, STEP=STEP, BLOCK=BLOCK, num_warps=4, **OPTIONS,
    )  # fmt: skip


def pack(places, weight, plain, packed, geometry, format, steps=None, trouble=None, first=True):
    """Write the weights that `places` points to into `plain` and `packed`, as far as the format's launches read them.

    Args:
        places: (10, PLACES) int64, see layout.py; gradients and moments may be missing.
        weight: dtype of the parameters.
        plain: (geometry.plain[-1]) float32.
        packed: (geometry.packed[-1]) float32, or bfloat16 for that format.
        steps: (10) int32, receives the update count of each parameter; None outside of training.
        trouble: (4) int32, see update.py; element 3 receives element 2, or 0 if `first`.
        first: whether the call is the first of an accumulation group.
    """
    _pack((places, plain, packed, steps, trouble), geometry, format, weight, first)

"""The last launch of LeNet's step: sums in a fixed order, the optimiser, and the packed copies of the new weights.

    g = sum over the splits of partial / number of targets, added to what earlier calls of a group have left
    SGD (Sutskever et al. 2013), with g + weight_decay * w for g:
        b = momentum * b + (1 - dampening) * g,   w -= lr * b, and by Nesterov lr * (g + momentum * b)
    Adam (Kingma and Ba 2015) likewise, AdamW (Loshchilov and Hutter 2019) with w *= 1 - lr * weight_decay instead:
        m += (1 - beta1) * (g - m),   v = beta2 * v + (1 - beta2) * g^2
        w -= lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps), by AMSGrad of the largest v so far

Rates and moments come from a small tensor, a row for each parameter, so that a captured launch follows schedules. What
a replay has to find anew each time it keeps for itself: every program counts the updates that it has made, in a place
that no other program reads, and the first writes each loss to the next of a row of places.
"""

import triton
import triton.language as tl

from ._common import INTERPRETED, OPTIONS, round_to
from .launching import launch
from .lenet import BITS, BLOCK, COLUMNS, NUMBERS

# The columns of the optimiser's numbers. For SGD the first moment is the buffer. The last two are where 1 - beta^(2^k)
# of either moment begin, for BITS values of k.
LR, WEIGHT_DECAY, SIGN, KEEP1, ADD1, KEEP2, ADD2, EPS, POWERS1, POWERS2 = *range(9), 8 + BITS
RULES = {"none": 0, "SGD": 1, "Adam": 2}
# Partial sums that a program adds at a time.
BLOCK_S = 8 if INTERPRETED else 16
BLOCK_L = 256


@triton.jit
def mean_factor(losses_ptr, PARTS, BLOCK_L: tl.constexpr):
    """(sum of the losses, number of targets) over what the first launch's programs have left."""
    lanes = tl.arange(0, BLOCK_L)
    loss, count = tl.zeros((BLOCK_L,), tl.float32), tl.zeros((BLOCK_L,), tl.float32)
    for i0 in range(0, PARTS, BLOCK_L):
        i = i0 + lanes
        loss += tl.load(losses_ptr + 2 * i, mask=i < PARTS, other=0.0)
        count += tl.load(losses_ptr + 2 * i + 1, mask=i < PARTS, other=0.0)
    return tl.sum(loss, axis=0), tl.sum(count, axis=0)


@triton.jit
def either(a, b):
    """1 - (1 - a) * (1 - b), with the digits of small a and b that a difference from 1 would lose."""
    return a + b * (1 - a)


@triton.jit
def correction(powers_ptr, step, BITS: tl.constexpr):
    """1 - beta^step from the 1 - beta^(2^k), to two roundings of float32."""
    k = tl.arange(0, BITS)
    return tl.reduce(tl.where((step >> k) & 1 != 0, tl.load(powers_ptr + k), 0.0), 0, either)


@triton.jit
def updated(
    w, g, first, second, third, offs, first_ptr, second_ptr, third_ptr, numbers_ptr, step,
    RULE: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, DECOUPLED: tl.constexpr, AMSGRAD: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """The new weights after update number `step`; the moments, which were `first` to `third`, are stored at offs."""
    lr, decay = tl.load(numbers_ptr), tl.load(numbers_ptr + 1)
    keep1, add1 = tl.load(numbers_ptr + 3), tl.load(numbers_ptr + 4)
    keep2, add2 = tl.load(numbers_ptr + 5), tl.load(numbers_ptr + 6)
    g *= tl.load(numbers_ptr + 2)
    if DECOUPLED:
        w *= 1 - lr * decay
    else:
        g += decay * w
    if RULE == 1:
        if MOMENTUM:
            # The first buffer is the gradient itself.
            buffer = tl.where(step == 1, g, keep1 * first + add1 * g)
            tl.store(first_ptr + offs, buffer)
            g = g + keep1 * buffer if NESTEROV else buffer
        return w - lr * g
    else:
        m = first + add1 * (g - first)
        v = keep2 * second + add2 * g * g
        tl.store(first_ptr + offs, m)
        tl.store(second_ptr + offs, v)
        if AMSGRAD:
            v = tl.maximum(v, third, propagate_nan=tl.PropagateNan.ALL)
            tl.store(third_ptr + offs, v)
        correction1 = correction(numbers_ptr + 8, step, BITS)
        correction2 = tl.sqrt_rn(correction(numbers_ptr + 8 + BITS, step, BITS))
        eps = tl.load(numbers_ptr + 7)
        return w - tl.div_rn(lr, correction1) * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), correction2) + eps)


@triton.jit
def pack(w, packed_ptr, row_ptr, row, a, b, c, d, mask, WD: tl.constexpr):
    """Stores the weights of the row's parameter at each place of the packed buffer that holds one of them."""
    copy = tl.arange(0, 16)
    starts = tl.load(row_ptr + 12) + copy // 8 * tl.load(row_ptr + 18) + copy // 4 % 2 * tl.load(row_ptr + 19)
    starts += copy // 2 % 2 * tl.load(row_ptr + 20) + copy % 2 * tl.load(row_ptr + 21)
    offs = a * tl.load(row_ptr + 14) + b * tl.load(row_ptr + 15)
    offs += c * tl.load(row_ptr + 16) + d * tl.load(row_ptr + 17)
    value = round_to(w, packed_ptr.dtype.element_ty)[None, :]
    exists = (copy < tl.load(row_ptr + 13))[:, None] & mask[None, :]
    tl.store(packed_ptr + starts[:, None] + offs[None, :], value, mask=exists)
    if row == 2:
        # WD: of the 16 pairs of a pixel q in its window and a pixel r in its square, those that meet in this weight.
        qy, qx, ry, rx = copy // 8, copy // 4 % 2, copy // 2 % 2, copy % 2
        y, x = (qy - ry)[:, None] + c[None, :], (qx - rx)[:, None] + d[None, :]
        meet = mask[None, :] & (y >= 0) & (y % 2 == 0) & (x >= 0) & (x % 2 == 0)
        places = (y // 2 * 4 + x // 2) * (64 * 64) + (b * 64 + a)[None, :]
        places += ((ry * 2 + rx) * (16 * 64) + (qy * 2 + qx) * 16)[:, None]
        for s in tl.static_range(2):
            tl.store(packed_ptr + WD + places + ((1 - s) * (64 * 64) + s * (8 * 64)), value, mask=meet)


@triton.jit(do_not_specialize=["PARTS"])
def lenet_update_kernel(
    flat_ptr, grad_ptr, first_ptr, second_ptr, third_ptr, packed_ptr,
    partial_ptr, losses_ptr, table_ptr, numbers_ptr, counts_ptr, steps_ptr, place_ptr, trouble_ptr,
    PARTS,
    SCALE: tl.constexpr, GRADIENT: tl.constexpr, ADD: tl.constexpr, KEEP: tl.constexpr,
    RULE: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, DECOUPLED: tl.constexpr, AMSGRAD: tl.constexpr,
    WD: tl.constexpr, COLUMNS: tl.constexpr, NUMBERS: tl.constexpr, BITS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row = tl.sum((tl.load(table_ptr + tl.arange(0, 16) * COLUMNS) <= pid).to(tl.int32), axis=0) - 1
    row_ptr = table_ptr + row * COLUMNS
    offs = pid * BLOCK + tl.arange(0, BLOCK)
    i = offs - tl.load(row_ptr) * BLOCK
    mask = i < tl.load(row_ptr + 1)
    d_radix, c_radix, b_radix = tl.load(row_ptr + 4), tl.load(row_ptr + 3), tl.load(row_ptr + 2)
    d, c, b = i % d_radix, i // d_radix % c_radix, i // d_radix // c_radix % b_radix
    a = i // d_radix // c_radix // b_radix

    w = tl.load(flat_ptr + offs)
    if GRADIENT:
        elements = tl.load(row_ptr + 5) + a * tl.load(row_ptr + 8) + b * tl.load(row_ptr + 9)
        elements += c * tl.load(row_ptr + 10) + d * tl.load(row_ptr + 11)
        split_step, terms = tl.load(row_ptr + 6), tl.load(row_ptr + 22)
        step0, step1, count_s = tl.load(row_ptr + 23), tl.load(row_ptr + 24), tl.load(row_ptr + 7) * terms
        acc = tl.zeros((BLOCK_S, BLOCK), tl.float32)
        for s0 in range(0, count_s, BLOCK_S):
            s = s0 + tl.arange(0, BLOCK_S)
            starts = s // terms * split_step + s % terms // 2 * step0 + s % 2 * step1
            here = (s < count_s)[:, None] & mask[None, :]
            acc += tl.load(partial_ptr + starts[:, None] + elements[None, :], mask=here, other=0.0)
        loss, count = mean_factor(losses_ptr, PARTS, BLOCK_L)
        g = tl.sum(acc, axis=0) * (SCALE / count)
        if ADD:
            g += tl.load(grad_ptr + offs)
        step, first, second, third = 0, w, w, w
        if RULE > 0:
            step = tl.load(counts_ptr + pid) + 1
            if RULE == 2 or MOMENTUM:
                first = tl.load(first_ptr + offs)
            if RULE == 2:
                second = tl.load(second_ptr + offs)
            if AMSGRAD:
                third = tl.load(third_ptr + offs)
        place = tl.load(place_ptr, mask=pid == 0, other=0)
        first_bad = tl.load(trouble_ptr, mask=pid == 0, other=0)
        call = tl.load(trouble_ptr + 1, mask=pid == 0, other=0) + 1
        # What is loaded above is stored below, in the same places. Several warps load an element and one of them stores
        # it, so all have to be here first.
        tl.debug_barrier()
        if KEEP:
            tl.store(grad_ptr + offs, g)
        if pid == 0:
            loss = loss / count
            tl.store(place.to(tl.pointer_type(tl.float32)), loss)
            tl.store(place_ptr, place + 4)
            # Of the calls so far the first whose loss was no finite number, and how many there were.
            bad = (first_bad == 0) & ((tl.abs(loss) < float("inf")) == 0)
            tl.store(trouble_ptr, tl.where(bad, call, first_bad))
            tl.store(trouble_ptr + 1, call)
        if RULE > 0:
            tl.store(counts_ptr + pid, step)
            if tl.load(row_ptr) == pid:
                tl.store(steps_ptr + row, step.to(tl.float32))
            w = updated(
                w, g, first, second, third, offs, first_ptr, second_ptr, third_ptr, numbers_ptr + row * NUMBERS, step,
                RULE, MOMENTUM, NESTEROV, DECOUPLED, AMSGRAD, BITS,
            )  # fmt: skip
            tl.store(flat_ptr + offs, w)
    if RULE > 0 or not GRADIENT:
        pack(w, packed_ptr, row_ptr, row, a, b, c, d, mask, WD)


def update(
    flat, packed, geometry, table, numbers=None, counts=None, steps=None, partial=None, losses=None, place=None,
    trouble=None, grad=None, moments=(), scale=1.0, add=False,
    rule="none", momentum=False, nesterov=False, decoupled=False,
):  # fmt: skip
    """Packs the weights of `flat`; with partial sums it adds those up first, and with a rule it applies them.

    Args:
        flat, grad, moments: (geometry.flat[-1]) float32, elements of the parameters, of gradients and of the
            optimiser's state; grad takes the gradients, on top of what is there if `add`.
        numbers: (10, NUMBERS) float32, the optimiser's numbers for each parameter.
        counts: (geometry.flat[-1] / BLOCK) int32, for each program how many updates there were, to which it adds one.
        steps: (10) float32, takes how many updates of each parameter there are then.
        losses: (programs, 2), sums of losses and numbers of targets.
        place: (1) int64, the address that takes their quotient, a float32; becomes that of the float32 behind it.
        trouble: (2) int32, the number of the first call whose loss was not finite, 0 while there is none, and how many
            calls there were.
        scale: factor of the gradients.
    """
    gradient = partial is not None
    first, second, third = (*moments, flat, flat, flat)[:3]
    # Pointers that a launch without gradients never follows.
    partial, losses, numbers, counts, steps, place, trouble, grad_or_flat = (
        flat if t is None else t for t in (partial, losses, numbers, counts, steps, place, trouble, grad)
    )
    launch(
        lenet_update_kernel, (flat.numel() // BLOCK,),
        flat, grad_or_flat, first, second, third, packed,
        partial, losses, table, numbers, counts, steps, place, trouble,
        losses.shape[0] if gradient else 0,
        SCALE=scale, GRADIENT=gradient, ADD=add, KEEP=grad is not None,
        RULE=RULES[rule], MOMENTUM=momentum, NESTEROV=nesterov, DECOUPLED=decoupled, AMSGRAD=len(moments) == 3,
        WD=geometry.packed[2], COLUMNS=COLUMNS, NUMBERS=NUMBERS, BITS=BITS,
        BLOCK=BLOCK, BLOCK_S=BLOCK_S, BLOCK_L=BLOCK_L, num_warps=4, **OPTIONS,
    )  # fmt: skip

"""The last launch of LeNet's step: it adds the partial sums in a fixed order, and updates the parameters.

    g = scale * sum over the splits of partial / number of targets, plus g of earlier calls of an accumulation group
    SGD (Sutskever et al. 2013), with g + weight_decay * w for g:
        b = momentum * b + (1 - dampening) * g,   w -= lr * b, and by Nesterov lr * (g + momentum * b)
    Adam (Kingma and Ba 2015) likewise, AdamW (Loshchilov and Hutter 2019) with w *= 1 - lr * weight_decay instead:
        m += (1 - beta1) * (g - m),   v = beta2 * v + (1 - beta2) * g^2
        w -= lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps), by AMSGrad of the largest v so far

If a loss of the group is not finite there is no update: weights, moments and counts stay as they are. Without any
target the loss is 0 / 0 and the gradients are zeros, as in torch, and there is an update.

Hyperparameters come from a small tensor with a row for each parameter, so that a captured launch follows schedules.
State that changes with every replay is kept on the device: update counts, and the address for the next loss, which the
first program advances. No program may read what another one writes, so update counts and flags are read from the copies
that the first launch has made.
"""

import triton
import triton.language as tl

from .._common import INTERPRETED, OPTIONS
from ..launching import launch
from .layout import BITS, BLOCK, COLUMNS, GRADIENT, MOMENTS, NUMBERS, PLACES, STEP

# The columns of the hyperparameters. For SGD the first moment is the momentum buffer. POWERS1 and POWERS2 are the first
# of BITS columns with 1 - beta^(2^k) of either moment.
LR, WEIGHT_DECAY, SIGN, KEEP1, ADD1, KEEP2, ADD2, EPS, POWERS1, POWERS2 = *range(9), 8 + BITS
RULES = {"none": 0, "SGD": 1, "Adam": 2}
# Partial sums that a program adds at a time.
BLOCK_S = 8 if INTERPRETED else 16
BLOCK_L = 256


@triton.jit
def mean_factor(losses_ptr, PARTS, BLOCK_L: tl.constexpr):
    """(sum of the losses, number of targets) over the results of the forward launch's programs."""
    lanes = tl.arange(0, BLOCK_L)
    loss, count = tl.zeros((BLOCK_L,), tl.float32), tl.zeros((BLOCK_L,), tl.float32)
    for i0 in range(0, PARTS, BLOCK_L):
        i = i0 + lanes
        loss += tl.load(losses_ptr + 2 * i, mask=i < PARTS, other=0.0)
        count += tl.load(losses_ptr + 2 * i + 1, mask=i < PARTS, other=0.0)
    return tl.sum(loss, axis=0), tl.sum(count, axis=0)


@triton.jit
def either(a, b):
    """1 - (1 - a) * (1 - b), without the cancellation for small a and b."""
    return a + b * (1 - a)


@triton.jit
def correction(powers_ptr, step, BITS: tl.constexpr):
    """1 - beta^step from the 1 - beta^(2^k), accurate to two roundings of float32."""
    k = tl.arange(0, BITS)
    return tl.reduce(tl.where((step >> k) & 1 != 0, tl.load(powers_ptr + k), 0.0), 0, either)


@triton.jit
def updated(
    w, g, first, second, third, offs, mask, first_ptr, second_ptr, third_ptr, numbers_ptr, step,
    RULE: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, DECOUPLED: tl.constexpr, AMSGRAD: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """The weights after update number `step`; stores the new moments, which were `first` to `third`, at offs."""
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
            # The first update's buffer is the gradient itself.
            buffer = tl.where(step == 1, g, keep1 * first + add1 * g)
            tl.store(first_ptr + offs, buffer, mask=mask)
            g = g + keep1 * buffer if NESTEROV else buffer
        return w - lr * g
    else:
        m = first + add1 * (g - first)
        v = keep2 * second + add2 * g * g
        tl.store(first_ptr + offs, m, mask=mask)
        tl.store(second_ptr + offs, v, mask=mask)
        if AMSGRAD:
            v = tl.maximum(v, third, propagate_nan=tl.PropagateNan.ALL)
            tl.store(third_ptr + offs, v, mask=mask)
        correction1 = correction(numbers_ptr + 8, step, BITS)
        correction2 = tl.sqrt_rn(correction(numbers_ptr + 8 + BITS, step, BITS))
        eps = tl.load(numbers_ptr + 7)
        return w - tl.div_rn(lr, correction1) * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), correction2) + eps)


@triton.jit
def float_ptr(places_ptr, COLUMN: tl.constexpr):
    """A pointer to the float32 values whose address is in this column of a parameter's row."""
    return tl.load(places_ptr + COLUMN).to(tl.pointer_type(tl.float32))


@triton.jit(do_not_specialize=["PARTS"])
def lenet_update_kernel(
    places_ptr, partial_ptr, losses_ptr, table_ptr, numbers_ptr, steps_ptr, place_ptr, trouble_ptr,
    PARTS,
    SCALE: tl.constexpr, ADD: tl.constexpr, KEEP: tl.constexpr,
    RULE: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, DECOUPLED: tl.constexpr, AMSGRAD: tl.constexpr,
    PLACES: tl.constexpr, GRADIENT: tl.constexpr, MOMENTS: tl.constexpr, STEP: tl.constexpr,
    COLUMNS: tl.constexpr, NUMBERS: tl.constexpr, BITS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row = tl.sum((tl.load(table_ptr + tl.arange(0, 16) * COLUMNS) <= pid).to(tl.int32), axis=0) - 1
    places_ptr += row * PLACES
    row_ptr = table_ptr + row * COLUMNS
    first_program = tl.load(row_ptr)
    offs = (pid - first_program) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < tl.load(row_ptr + 1)
    d_radix, c_radix, b_radix = tl.load(row_ptr + 4), tl.load(row_ptr + 3), tl.load(row_ptr + 2)
    d, c, b = offs % d_radix, offs // d_radix % c_radix, offs // d_radix // c_radix % b_radix
    a = offs // d_radix // c_radix // b_radix

    elements = tl.load(row_ptr + 5) + a * tl.load(row_ptr + 8) + b * tl.load(row_ptr + 9)
    elements += c * tl.load(row_ptr + 10) + d * tl.load(row_ptr + 11)
    split_step, terms = tl.load(row_ptr + 6), tl.load(row_ptr + 12)
    step0, step1, count_s = tl.load(row_ptr + 13), tl.load(row_ptr + 14), tl.load(row_ptr + 7) * terms
    acc = tl.zeros((BLOCK_S, BLOCK), tl.float32)
    for s0 in range(0, count_s, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        starts = s // terms * split_step + s % terms // 2 * step0 + s % 2 * step1
        here = (s < count_s)[:, None] & mask[None, :]
        acc += tl.load(partial_ptr + starts[:, None] + elements[None, :], mask=here, other=0.0)
    loss, count = mean_factor(losses_ptr, PARTS, BLOCK_L)
    # Without any target the gradients are 0, even if the images are not finite.
    g = tl.where(count > 0, tl.sum(acc, axis=0) * (SCALE / tl.maximum(count, 1.0)), 0.0)
    sound = tl.abs(loss) < float("inf")
    if ADD:
        g += tl.load(float_ptr(places_ptr, GRADIENT) + offs, mask=mask, other=0.0)
        sound = sound & (tl.load(trouble_ptr + 3) == 0)
    w_ptr = float_ptr(places_ptr, 0)
    w = tl.load(w_ptr + offs, mask=mask, other=0.0)
    first_ptr, second_ptr, third_ptr, step, first, second, third = w_ptr, w_ptr, w_ptr, 0, w, w, w
    if RULE > 0:
        step = tl.load(steps_ptr + row) + 1
        if RULE == 2 or MOMENTUM:
            first_ptr = float_ptr(places_ptr, MOMENTS)
            first = tl.load(first_ptr + offs, mask=mask, other=0.0)
        if RULE == 2:
            second_ptr = float_ptr(places_ptr, MOMENTS + 1)
            second = tl.load(second_ptr + offs, mask=mask, other=0.0)
        if AMSGRAD:
            third_ptr = float_ptr(places_ptr, MOMENTS + 2)
            third = tl.load(third_ptr + offs, mask=mask, other=0.0)
    place = tl.load(place_ptr, mask=pid == 0, other=0)
    first_bad = tl.load(trouble_ptr, mask=pid == 0, other=0)
    call = tl.load(trouble_ptr + 1, mask=pid == 0, other=0) + 1
    # The values loaded above are stored below at the same addresses. Several warps load an element and one of them
    # stores it, so all of them have to have loaded it first.
    tl.debug_barrier()
    if KEEP:
        tl.store(float_ptr(places_ptr, GRADIENT) + offs, g, mask=mask)
    if pid == 0:
        tl.store(place.to(tl.pointer_type(tl.float32)), loss / count)
        tl.store(place_ptr, place + 4)
        # The number of the first call with a loss that is not finite (negative if it had no target), the number of
        # calls, and whether a loss of this accumulation group was not finite.
        bad = tl.where(count > 0, tl.where(tl.abs(loss) < float("inf"), 0, call), -call)
        tl.store(trouble_ptr, tl.where(first_bad == 0, bad, first_bad))
        tl.store(trouble_ptr + 1, call)
        tl.store(trouble_ptr + 2, tl.where(sound, 0, 1))
    if RULE > 0:
        if sound:
            if first_program == pid:
                tl.store(float_ptr(places_ptr, STEP), step.to(tl.float32))
            w = updated(
                w, g, first, second, third, offs, mask, first_ptr, second_ptr, third_ptr,
                numbers_ptr + row * NUMBERS, step, RULE, MOMENTUM, NESTEROV, DECOUPLED, AMSGRAD, BITS,
            )  # fmt: skip
            tl.store(w_ptr + offs, w, mask=mask)


def update(
    places, geometry, table, numbers, steps, partial, losses, place, trouble,
    moments=0, keep=False, add=False, scale=1.0, rule="none", momentum=False, nesterov=False, decoupled=False,
):  # fmt: skip
    """Add the partial sums of the gradients up, and update the parameters if there is a rule.

    Args:
        places: (10, PLACES) int64, see layout.py: addresses of the parameters, contiguous float32; of their gradients
            if `keep` or `add`; with a rule also of `moments` moments and of the step count.
        geometry: layout.Geometry.
        table: (16, COLUMNS) int32, see layout.table.
        numbers: (10, NUMBERS) float32, the hyperparameters for each parameter.
        steps: (10) int32, the number of earlier updates of each parameter.
        partial: float32, the partial sums of the gradient launch.
        losses: (programs, 2), sums of losses and numbers of targets.
        place: (1) int64, the address for their quotient, a float32; it is advanced to the next float32.
        trouble: (4) int32: the number of the first call with a loss that is not finite, 0 if there is none, negative if
            it had no target; the number of calls; whether a loss of this accumulation group was not finite; and whether
            that of an earlier call of the group was not.
        keep: whether the gradients are stored.
        add: whether they are added to the stored ones.
        scale: factor of the gradients.
        rule: "none", "SGD" or "Adam", with the flags of torch's optimisers; 3 moments are AMSGrad, `decoupled` AdamW.
    """
    launch(
        lenet_update_kernel, (geometry.blocks[-1],),
        places, partial, losses, table, numbers, steps, place, trouble, losses.shape[0],
        SCALE=scale, ADD=add, KEEP=keep,
        RULE=RULES[rule], MOMENTUM=momentum, NESTEROV=nesterov, DECOUPLED=decoupled, AMSGRAD=moments == 3,
        PLACES=PLACES, GRADIENT=GRADIENT, MOMENTS=MOMENTS, STEP=STEP, COLUMNS=COLUMNS, NUMBERS=NUMBERS, BITS=BITS,
        BLOCK=BLOCK, BLOCK_S=BLOCK_S, BLOCK_L=BLOCK_L, num_warps=4, **OPTIONS,
    )  # fmt: skip

"""tcgen05.mma and tcgen05.commit: products of shared memory, or of tensor and shared memory, into tensor memory.

With 128 rows, each has a lane. With 64 rows, 16 are in each quarter of the lanes: in its lower or its upper half. If A
is in tensor memory, it is in the same lanes as the sums, with 32 bits of a row in each column.

Source: PTX ISA 9.0, section "TensorCore 5th Generation Family Instructions": "Matrix Shape", "Instruction Descriptor",
"Data Path Layout Organization", "tcgen05.mma" and "tcgen05.commit".
"""

import functools
from dataclasses import dataclass

import numpy as np

from .flight import Product, Region
from .formats import F4, U2, U4
from .mbarrier import compact, log, single
from .memory import READ, WRITE
from .operands import Form, from_chunks, numbers, tensor_chunks
from .products import judge_stores
from .shared import Address
from .tensor import COLUMNS, LANES

FORMATS = {("f16", 0): "f16", ("f16", 1): "bf16", ("tf32", 2): "tf32"}


@dataclass(frozen=True)
class TensorForm(Form):
    m: int


@functools.lru_cache
def form_of(descriptor, kind):
    """The TensorForm of an instruction descriptor; None if it asks for anything that is not implemented here."""
    a, b = descriptor >> 7 & 7, descriptor >> 10 & 7
    transposed = bool(descriptor >> 15 & 1), bool(descriptor >> 16 & 1)
    n, m = (descriptor >> 17 & 63) << 3, (descriptor >> 24 & 31) << 4
    dense_f32 = descriptor & 0x7F == 1 << 4
    plain = not descriptor >> 13 & 3 and not descriptor >> 23 & 1 and not descriptor >> 29
    known = dense_f32 and plain and a == b and (kind, a) in FORMATS and not (kind == "tf32" and any(transposed))
    if not known or m not in (64, 128) or not 8 <= n <= 256 or n % (m // 8):
        return None
    return TensorForm(n, 8 if kind == "tf32" else 16, FORMATS[kind, a], *transposed, m)


def rows_in(form, lane):
    """(lanes of the rows, their bit mask) of products whose address has this lane; or None."""
    if lane not in ((0,) if form.m == 128 else (0, 16)):
        return None
    lanes = np.arange(form.m) if form.m == 128 else lane + np.arange(64) // 16 * 32 + np.arange(64) % 16
    return lanes, sum(1 << int(k) for k in lanes)


def tensor_product(b, kind, d, a, in_tensor, right, descriptor, keep, mask, here):
    """tcgen05.mma. a: a descriptor of shared memory, or an address in tensor memory."""
    part = single(b, mask, "tcgen05.mma", here)
    if part is None:
        return
    d, a, right, descriptor = (part.of(x).astype(np.uint64) for x in (d, a, right, descriptor))
    for x in (d, descriptor, a) if in_tensor else (d, descriptor):
        if (x != x[0]).any():
            b.fault("instruction", "tcgen05.mma of other forms or places in other programs", here)
    d, form = int(d[0]), form_of(int(descriptor[0]), kind)
    found = form and rows_in(form, d >> 16)
    if not found or in_tensor and (form.a_transposed or int(a[0]) >> 16 != d >> 16):
        detail = f"tcgen05.mma of {int(descriptor[0]):#x} at {d:#x}"
        b.fault("instruction", f"{detail} and {int(a[0]):#x}" if in_tensor else detail, here)
    lanes, bits = found
    if in_tensor:
        left = Region(bits, int(a[0]) & 0xFFFF, (int(a[0]) & 0xFFFF) + 8)
    else:
        left = tensor_chunks(part, a, form.m, form, form.a_transposed, here)
    right = tensor_chunks(part, right, form.n, form, form.b_transposed, here)
    sums = Region(bits, d & 0xFFFF, (d & 0xFFFF) + form.n)
    keep = compact(part.of(keep))
    this = Product(b.batch, form, part.numbers, part.tid, lanes, sums, left, right, keep, here)
    judge(part, this)
    b.batch.tensor.flight.issue(this)


def judge(part, this):
    """Faults if a product may not read its operands or write its sums."""
    tensor, rows, here = part.batch.tensor, part.batch.tensor.flags(part.numbers), this.here
    for kind, region in ((WRITE, this.d), (READ, this.a)):
        if isinstance(region, Region):
            tensor.allocated(rows, region, here)
            tensor.landed(rows, region, here)
            tensor.alone(kind, rows, part.warp, region, here)
    for address in this.addresses():
        part.batch.shared.checked(part, address, 0, 16, None, here)
        judge_stores(part, address, f"the product {READ}", here)
        part.batch.shared.judge_race(part, READ, address, "the product", here)
    tensor.flight.judge_product(this)


def tensor_commit(b, address, offset, mask, here):
    """tcgen05.commit."""
    part = single(b, mask, "tcgen05.commit", here)
    if part is None:
        return
    place = part.of(address.value) + offset
    b.batch.tensor.barriers.of(part, place, "tcgen05.commit", here)
    log(part, READ, Address(compact(place)), here)
    b.batch.tensor.flight.commit(part, part.tid, place, here)


def compute(products):
    """Computes products in order; those that add to the same sums are computed together."""
    chain = []
    for this in products:
        same = chain and (this.d, this.form) == (chain[0].d, chain[0].form)
        if chain and not (same and this.keep.all() and np.array_equal(this.numbers, chain[0].numbers)):
            compute_chain(chain)
            chain = []
        chain.append(this)
    if chain:
        compute_chain(chain)


def compute_chain(chain):
    first = chain[0]
    data = first.batch.tensor.storage().reshape(-1, LANES, COLUMNS).view(F4)
    columns = slice(first.d.first, first.d.last)
    where = (slice(None), first.lanes, columns) if first.rows is None else (first.row, first.lanes, columns)
    sums = np.concatenate([left(this) for this in chain], axis=2) @ np.concatenate([right(this) for this in chain], 1)
    if first.keep.any():
        start = data[where]
        sums = sums + (start if first.keep.all() else np.where(first.keep[:, :, None], start, F4(0)))
    data[where] = sums


def left(this):
    """A as (program, row, K)."""
    form = this.form
    if isinstance(this.a, Address):
        return from_chunks(this, this.a, form.m, form, form.a_transposed, form.a_transposed, 1)[:, 0]
    data = this.batch.tensor.storage().reshape(-1, LANES, COLUMNS)
    columns = slice(this.a.first, this.a.last)
    bits = data[:, this.lanes, columns] if this.rows is None else data[this.row, this.lanes, columns]
    return numbers(np.ascontiguousarray(bits).view(U4 if form.format == "tf32" else U2), form)


def right(this):
    """B as (program, K, column)."""
    form = this.form
    return from_chunks(this, this.b, form.n, form, form.b_transposed, not form.b_transposed, 1)[:, 0]


NAMES = {f.__name__: f for f in (tensor_product, tensor_commit)}

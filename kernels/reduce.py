"""Add the partial sums of a split product in a fixed order, so that every run gives the same bits.

dw[i] = sum over s of partial[s, i],    db[j] = sum over s of partial[s, numel(dw) + j]
"""

import torch
import triton
import triton.language as tl

from ._common import OPTIONS, cdiv, index_type, round_to
from .launching import planned
from .tiles import flat_block


@triton.jit(do_not_specialize=["SPLITS"])
def sum_partials_kernel(
    partial_ptr, dw_ptr, db_ptr,
    SPLITS, numel_w, numel_b,
    ACC: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    row = numel_w + numel_b
    mask = offs < row

    acc = tl.zeros((BLOCK,), ACC)
    ptrs = partial_ptr + offs
    for _ in range(0, SPLITS):
        acc += tl.load(ptrs, mask=mask, other=0.0)
        ptrs += row

    is_weight = offs < numel_w
    tl.store(dw_ptr + offs, round_to(acc, dw_ptr.dtype.element_ty), mask=is_weight)
    tl.store(db_ptr + offs - numel_w, round_to(acc, db_ptr.dtype.element_ty), mask=mask & ~is_weight)


@planned(sum_partials_kernel)
def _add_up(partial, dw, db, splits):
    block = flat_block(dw.numel() + db.numel(), 256)
    constants = {
        "ACC": tl.float64 if partial.dtype == torch.float64 else tl.float32,
        "INDEX": index_type(partial), "BLOCK": block, "num_warps": 4, **OPTIONS,
    }  # fmt: skip
    return (cdiv(dw.numel() + db.numel(), block),), (splits, dw.numel(), db.numel()), constants


class Partials:
    """Where the programs of a split product write: a buffer, or the results themselves if there is only one split."""

    def __init__(self, splits, dw, db):
        self.dw, self.db, self.splits = dw, db, splits
        self.row = dw.numel() + db.numel()
        acc_dtype = torch.promote_types(dw.dtype, torch.float32)
        self.buffer = dw.new_empty(splits * self.row, dtype=acc_dtype) if splits > 1 else None

    @property
    def pointers(self):
        """(weight, bias, elements from one split to the next); a split holds dw in its memory order, then db."""
        if self.buffer is None:
            return self.dw, self.db, 0
        return self.buffer, self.buffer[self.dw.numel() :], self.row

    def add_up(self):
        """The complete dw and db."""
        if self.buffer is not None and self.row > 0:
            _add_up((self.buffer, self.dw, self.db), self.splits)
        return self.dw, self.db

"""Which targets of a cross-entropy count and the weights of their classes, in plain torch, for code without kernels.

Targets are compared as int64: comparing a uint8 tensor with ignore_index, torch would take that modulo 256.
"""

import torch


def check(target, C, ignore_index):
    """Raise IndexError, as torch does on the CPU, if a target is neither one of C classes nor ignore_index."""
    target = target.long()
    wrong = target[(target != ignore_index) & ((target < 0) | (target >= C))]
    if wrong.numel():
        raise IndexError(f"Target {wrong[0].item()} is out of bounds.")


def weights_of(target, weight, C, dtype, ignore_index):
    """The rows that are not ignored, those whose target is a class, and the weight of each target, 0 for other rows.

    Args:
        target: (...) of integers.
        weight: (C), or None for ones.

    Returns:
        kept, valid, w_target: (...) each, bool, bool and `dtype`.
    """
    target = target.long()
    kept, valid = target != ignore_index, (target >= 0) & (target < C)
    counts = kept & valid
    if weight is None:
        return kept, valid, counts.to(dtype)
    # An index outside the weights would abort the process on a GPU.
    return kept, valid, torch.where(counts, weight[torch.where(counts, target, 0)].to(dtype), 0)

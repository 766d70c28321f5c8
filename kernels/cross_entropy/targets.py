"""Which targets of a cross-entropy count and what their classes weigh, in plain torch, for all who have no kernel.

Targets are compared as int64: torch takes ignore_index modulo 256 for targets of uint8, where it compares tensors.
"""

import torch


def check(target, C, ignore_index):
    """Raises IndexError, as torch does on the CPU, where a target is neither one of C classes nor ignore_index."""
    target = target.long()
    wrong = target[(target != ignore_index) & ((target < 0) | (target >= C))]
    if wrong.numel():
        raise IndexError(f"Target {wrong[0].item()} is out of bounds.")


def weights_of(target, weight, C, dtype, ignore_index):
    """The rows that are not ignored, those whose target is a class, and the weight of each target, 0 without one.

    Args:
        target: (...) of integers.
        weight: (C) or None, which stands for ones.

    Returns:
        kept, valid, w_target: (...) each, bool, bool and `dtype`.
    """
    target = target.long()
    kept, valid = target != ignore_index, (target >= 0) & (target < C)
    counts = kept & valid
    if weight is None:
        return kept, valid, counts.to(dtype)
    # Never an index outside the weights, which ends a process on a GPU.
    return kept, valid, torch.where(counts, weight[torch.where(counts, target, 0)].to(dtype), 0)

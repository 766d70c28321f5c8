"""Instructions between the threads of a warp.

Source: PTX ISA 9.0, sections "Data Movement and Conversion Instructions: shfl.sync", "Parallel Synchronization and
Communication Instructions: redux.sync" and "bar.warp.sync".
"""

import numpy as np

U4 = np.uint32


def whole(b, here):
    """Faults unless all threads of the warps are active."""
    if not b.whole:
        b.fault("divergence", "threads that have diverged from others of their warp", here)


def members(b, mask, here):
    """Faults unless an instruction's mask names the whole warp, and the whole warp is active."""
    whole(b, here)
    if (mask != U4(0xFFFFFFFF)).any():
        b.fault("divergence", f"a mask of some threads, {int(mask.flat[0]):#x}", here)


def shuffle(b, mode, value, by, clamp, mask, here):
    """(the value of another thread, whether that thread is in range; otherwise the thread's own value)."""
    members(b, mask, here)
    lane = b.lane.astype(np.int64)
    by, clamp = by.astype(np.int64) & 31, clamp.astype(np.int64)
    segment, last = clamp >> 8 & 31, clamp & 31
    lowest = lane & segment
    highest = lowest | last & ~segment
    if mode == "up":
        source = lane - by
        valid = source >= highest
    else:
        source = {"down": lane + by, "bfly": lane ^ by, "idx": lowest | by & ~segment}[mode]
        valid = source <= highest
    source = np.where(valid, source, lane)
    if value.shape[1] == 1:
        return value, valid
    source = source + (np.arange(b.threads) & ~31)
    if len(source) == 1:
        return value.take(source[0], axis=1), valid
    return np.take_along_axis(np.broadcast_to(value, source.shape), source, 1), valid


def reduce(b, name, value, mask, here):
    """redux: numpy's function of that name over the warp. Sums are modulo 2^32; fmax is NaN if all values are."""
    members(b, mask, here)
    value = np.broadcast_to(value, (len(value), b.threads)).reshape(len(value), -1, 32)
    return np.repeat(getattr(np, name).reduce(value, axis=2, dtype=value.dtype), 32, axis=1)


def warp_barrier(b, mask, here):
    members(b, mask, here)


def trap(b, here):
    b.fault("trap", "the kernel has stopped itself", here)


NAMES = {f.__name__: f for f in (shuffle, reduce, warp_barrier, trap)}

"""Watches what kernels touch while they run in Triton's interpreter: every address, every program.

A GPU runs programs in any order and does not stop at the end of a tensor, so three things must never happen that the
interpreter alone would let pass: a load or store outside the tensors of the launch, two stores to one address, and a
load of what another program stores.
"""

import contextlib

import numpy as np
from triton.runtime import interpreter


def addresses(t):
    """The address of every element of a tensor."""
    found = np.array([t.data_ptr()], dtype=np.int64)
    for size, stride in zip(t.shape, t.stride()):
        found = (found[:, None] + np.arange(size, dtype=np.int64) * stride * t.element_size()).ravel()
    return found


@contextlib.contextmanager
def watched():
    """Yields a list that fills with (kernel, what, program, lanes) for each violation in the block."""
    real, grid_executor = interpreter._interpreter, interpreter.GridExecutor
    violations, state = [], {}

    def report(what, lanes):
        violations.append((state["kernel"], what, tuple(interpreter.interpreter_builder.grid_idx), lanes))

    def touched(what, ptrs, mask):
        found = ptrs.astype(np.int64).ravel()[np.broadcast_to(np.asarray(mask, bool), ptrs.shape).ravel()]
        outside = ~np.isin(found, state["allowed"])
        if outside.any():
            report(f"{what} outside the tensors", int(outside.sum()))
        return found

    class Watch:
        def __getattr__(self, name):
            return getattr(real, name)

        def load(self, ptrs, mask, other, dtype):
            found = np.unique(touched("load", ptrs, mask))
            me = tuple(interpreter.interpreter_builder.grid_idx)
            state["loads"].append((me, found))
            return real.load(ptrs, mask, other, dtype)

        def store(self, ptrs, value, mask):
            found = touched("store", ptrs, mask)
            if len(np.unique(found)) != len(found):
                report("two lanes store to one address", len(found) - len(np.unique(found)))
            state["stores"].append((tuple(interpreter.interpreter_builder.grid_idx), np.unique(found)))
            return real.store(ptrs, value, mask)

    class Executor(grid_executor):
        def __call__(self, *args, **kwargs):
            tensors = [t for t in (*args, *kwargs.values()) if hasattr(t, "data_ptr")]
            state.update(kernel=self.fn.__name__, loads=[], stores=[])
            state["allowed"] = np.unique(np.concatenate([addresses(t) for t in tensors]))
            super().__call__(*args, **kwargs)
            self.compare_programs()

        def compare_programs(self):
            owner = {}
            for program, found in state["stores"]:
                for address in found.tolist():
                    if owner.setdefault(address, program) != program:
                        report(f"stored to by program {owner[address]} too", 1)
            for program, found in state["loads"]:
                foreign = [a for a in found.tolist() if owner.get(a, program) != program]
                if foreign:
                    report("load of what another program stores", len(foreign))

    interpreter._interpreter, interpreter.GridExecutor = Watch(), Executor
    try:
        yield violations
    finally:
        interpreter._interpreter, interpreter.GridExecutor = real, grid_executor

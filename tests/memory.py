"""Watches every access that kernels make to memory.

A GPU runs the programs of a launch in any order, does not stop at the end of a tensor, and hands out memory with its
old contents. So a kernel that passes in Triton's interpreter, where programs run one after the other over large
buffers, may still be wrong. There are two watches, and a test fails if either reports anything:

- in the interpreter `Watch`, of every load and store: each tensor of a launch gets an address range of its own, far
  from the others, so that an access is checked against the argument that its pointer came from. Pointers that a kernel
  finds in memory are real addresses, and have to lie in a tensor that the watch `knows`;
- on a GPU `guard_bands`, of stores only: the tensors of a launch lie between bands whose bytes must stay as they were.
  A CUDA graph's replay cannot be intercepted; the launches before its capture, the same kernels on the same tensors,
  are checked instead.

Both leave results as they are. A third defence is PyTorch's own and is on in all tests (`conftest.fresh_start`):
unwritten memory holds NaN.
"""

import contextlib
import math
import mmap
import os
import sys
import weakref

import fast_interpreter
import numpy as np
import torch
import triton
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

# Each tensor of a launch gets a range of 2^48 bytes and lies in its middle.
RANGE = 48
# Program indices of an element that several programs have loaded, and of one that none has loaded.
SEVERAL, NONE = -1, 0
NOBODY = np.zeros(0, bool)
# Outputs that a launch writes only in part.
PARTLY = {
    # Layouts that the launches for its format do not read.
    ("lenet_pack_kernel", "packed_ptr"),
    # Each filter and bias is padded to a multiple of 128, which is not written.
    ("lenet_pack_kernel", "plain_ptr"),
    # Positions of images past the last one, up to a whole block, which are never read.
    ("lenet_forward_kernel", "dz_columns_ptr"),
    ("lenet_forward_kernel", "code2_columns_ptr"),
    # One loss of many.
    ("lenet_update_kernel", "a block of losses"),
    # State of a group of accumulating calls.
    ("lenet_pack_kernel", "trouble_ptr"),
    ("lenet_update_kernel", "trouble_ptr"),
}


def _zeros(count, dtype):
    """Zeros, which take no memory until they are touched, and then no more than a 4 kB page.

    For a large array numpy asks for 2 MB pages: a few rows of a huge matrix would take gigabytes.
    """
    if count < 2**22:
        return np.zeros(count, dtype)
    return np.frombuffer(mmap.mmap(-1, count * dtype().itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype)


class Tensor:
    """A tensor argument of a launch: which of its bytes are elements, and which program has loaded or stored each."""

    def __init__(self, number, name, tensor, histories):
        self.name, self.tensor, self.itemsize = name, tensor, tensor.element_size()
        self.virtual = (number + 1 << RANGE) + (1 << RANGE - 1)
        steps = [(n, s) for n, s in zip(tensor.shape, tensor.stride()) if s]  # an expanded dimension adds no element
        count = math.prod(n for n, _ in steps) if tensor.numel() else 0
        extent = sum((n - 1) * s for n, s in steps) + 1 if count else 0
        self.bytes = extent * self.itemsize
        self.elements = None  # None: the whole extent
        if extent != count:
            at = np.zeros(1, np.int64)
            for size, stride in steps:
                at = (at[:, None] + np.arange(size) * stride).ravel()
            self.elements = _zeros(extent, np.bool_)
            self.elements[at] = True
        # Tensors that share their storage share its history.
        storage = tensor.untyped_storage()
        key = storage.data_ptr(), self.itemsize
        if key not in histories:
            whole = storage.nbytes() // self.itemsize
            histories[key] = _zeros(whole, np.int32), _zeros(whole, np.int32)
        first = tensor.storage_offset()
        self.loaded_by, self.stored_by = (history[first : first + extent] for history in histories[key])
        self.is_output = False

    def unwritten(self):
        """How many elements no program has stored."""
        untouched = self.stored_by == NONE
        return int((untouched if self.elements is None else untouched & self.elements).sum())


class Watch:
    """Stands between the interpreter and memory while a launch runs.

    A violation is a line with the kernel, the line of its source, the program, the argument, and one of these:

    - "loads outside" and "stores outside" the elements of the tensor that the pointer points into;
    - "two lanes store" to one element;
    - "stores what another program stores" or "stores what another program loads", "loads what another program stores";
    - "stores twice" and "loads back": in one program with no barrier in between, where another thread may hold the
      element;
    - "never stores": elements of an output left as they were;
    - "atomic": the sums would depend on the order of programs.
    """

    def __init__(self):
        self.violations = []
        self.sample = None  # programs of each launch to run; None for all
        self.off = False
        self.known = []  # weak references to tensors, and their names
        self.real = interpreter._interpreter

    def __getattr__(self, name):
        return getattr(self.real, name)

    def knows(self, tensor, name):
        """Allows kernels to access this tensor by an address that they find in memory."""
        if not any(known() is tensor for known, _ in self.known):
            self.known = [(weakref.ref(tensor), name), *(known for known in self.known if known[0]() is not None)]

    def install(self):
        """Watches every launch in the interpreter from now on."""
        fast_interpreter.install()
        watch, builder = self, interpreter.interpreter_builder
        to_pointer, barrier = interpreter._implicit_cvt, builder.create_barrier

        def implicit_cvt(arg):
            value = to_pointer(arg)
            if hasattr(arg, "data_ptr"):
                value.handle.data = np.array([watch.enter(arg)], dtype=np.uint64)
            return value

        def create_barrier():
            watch.next_phase()
            return barrier()

        def set_grid_dim(*size):
            builder.grid_dim = watch.grid if watch.chosen is not None else size

        def set_grid_idx(*position):
            if watch.chosen is not None:
                position = np.unravel_index(watch.chosen[position[0]], watch.grid)
            builder.grid_idx = tuple(int(i) for i in position)
            watch.next_program()

        class Executor(interpreter.GridExecutor):
            def __call__(self, *args, **kwargs):
                values = {**dict(zip(self.arg_names, args)), **kwargs}
                names = [name for name in self.arg_names if _is_memory(values.get(name))]
                self.grid = watch.begin(self.fn.__name__, names, self.grid, kwargs)
                super().__call__(*args, **kwargs)
                watch.end()

        builder.create_barrier, builder.set_grid_dim, builder.set_grid_idx = create_barrier, set_grid_dim, set_grid_idx
        interpreter._implicit_cvt = implicit_cvt
        interpreter.GridExecutor = Executor
        interpreter._interpreter = self

    def begin(self, kernel, names, grid, arguments):
        self.kernel, self.names, self.tensors, self.histories = kernel, names, [], {}
        self.programs, self.phases, self.stored = 0, [], False
        grid = tuple(grid(arguments) if callable(grid) else grid)
        self.grid, self.chosen = (*grid, 1, 1)[:3], None
        total = int(np.prod(self.grid))
        if self.sample and total > self.sample:
            self.chosen = np.unique(np.linspace(0, total - 1, self.sample).astype(np.int64))
            return (len(self.chosen),)
        return grid

    def enter(self, tensor):
        """The address that the kernel sees instead of the tensor's own."""
        if self.off:
            return tensor.data_ptr()
        number = len(self.tensors)
        self.tensors.append(Tensor(number, self.names[number], tensor, self.histories))
        return self.tensors[-1].virtual

    def next_program(self):
        self.programs += 1
        self.next_phase()

    def next_phase(self):
        """Starts a phase, which ends at the next barrier: `now` is its index, `phases` holds the program of each."""
        self.phases.append(self.programs)
        self.now = len(self.phases)

    def end(self):
        if self.chosen is None:
            for tensor in self.tensors:
                partly = (self.kernel, tensor.name) in PARTLY
                if tensor.is_output and not partly and (count := tensor.unwritten()):
                    self.report(f"never stores {count} elements of", tensor)

    def report(self, what, tensor, at=None, lanes=None):
        program = interpreter.interpreter_builder.grid_idx
        where = f" in {lanes} lanes, the first" if lanes else ""
        element = "" if at is None else f",{where} at element {at} from its first"
        shape = f"{tuple(tensor.tensor.shape)} with strides {tensor.tensor.stride()}"
        self.violations.append(f"{self.kernel} ({_line()}): program {program} {what} {tensor.name} {shape}{element}")

    def resolve(self, what, ptrs, mask):
        """(tensor, indices of accessed elements, real addresses, mask), without the lanes at stray addresses."""
        addresses = ptrs.ravel()
        # Masks computed from other masks may be integers.
        on = np.broadcast_to(mask, ptrs.shape).ravel().astype(bool, copy=False)
        first = int(addresses[0])
        if first >> RANGE == 0 and on.any():
            first = int(addresses[on.argmax()])
        tensor = self.owner(first)
        offsets = addresses - np.uint64(tensor.virtual)  # before the tensor they wrap around, and are past its end
        real = offsets + np.uint64(tensor.tensor.data_ptr())
        if not on.all():
            offsets = offsets[on]
        at = offsets.view(np.int64) // tensor.itemsize
        if offsets.size and (offsets.max() >= tensor.bytes or tensor.elements is not None):
            inside = (offsets < tensor.bytes) & (offsets % tensor.itemsize == 0)
            if tensor.elements is not None:
                inside[inside] = tensor.elements[at[inside]]
            if not inside.all():
                self.report(f"{what} outside", tensor, at[~inside][0], int((~inside).sum()))
                on = on.copy()
                on[on] = inside
                at = at[inside]
        return tensor, at, real.reshape(ptrs.shape), on.reshape(ptrs.shape)

    def owner(self, address):
        """The tensor that an access is checked against."""
        number = address >> RANGE
        if number == 0:
            for tensor in self.tensors[len(self.names) :]:
                if 0 <= address - tensor.virtual < tensor.bytes:
                    return tensor
            for known, name in ((known(), name) for known, name in self.known):
                if known is not None and 0 <= address - known.data_ptr() < known.nbytes:
                    tensor = Tensor(len(self.tensors), name, known, self.histories)
                    tensor.virtual = known.data_ptr()
                    self.tensors.append(tensor)
                    return tensor
        return self.tensors[min(max(number, 1), len(self.tensors)) - 1]

    def others(self, numbers):
        """Which of these phase indices belong to another program, and which to the current phase."""
        foreign = (numbers != NONE) & (numbers != self.now)
        if len(self.phases) > self.programs and foreign.any():
            phases = np.array([self.programs, *self.phases, 0])  # by phase; SEVERAL takes the last entry
            foreign &= phases[numbers] != self.programs
        return foreign, numbers == self.now

    def load(self, ptrs, mask, other, dtype):
        if self.off:
            return self.real.load(ptrs, mask, other, dtype)
        tensor, at, real, on = self.resolve("loads", ptrs, mask)
        foreign, own = self.others(tensor.stored_by[at]) if self.stored else (NOBODY, NOBODY)
        if foreign.any():
            self.report("loads what another program stores in", tensor, at[foreign][0], int(foreign.sum()))
        if own.any():
            self.report("loads back, with no barrier, what it stored in", tensor, at[own][0], int(own.sum()))
        foreign, _ = self.others(tensor.loaded_by[at])
        tensor.loaded_by[at] = np.where(foreign, SEVERAL, self.now) if foreign.any() else self.now
        return self.real.load(real, on, other, dtype)

    def store(self, ptrs, value, mask):
        if self.off:
            return self.real.store(ptrs, value, mask)
        tensor, at, real, on = self.resolve("stores", ptrs, mask)
        tensor.is_output = self.stored = True
        foreign, own = self.others(tensor.stored_by[at])
        if foreign.any():
            self.report("stores what another program stores in", tensor, at[foreign][0], int(foreign.sum()))
        if own.any():
            self.report("stores twice, with no barrier, to", tensor, at[own][0], int(own.sum()))
        foreign, _ = self.others(tensor.loaded_by[at])
        if foreign.any():
            self.report("stores what another program loads from", tensor, at[foreign][0], int(foreign.sum()))
        # Of lanes that store to one element the last one's index stays; the others find another index than their own.
        lanes = np.arange(at.size, dtype=np.int32)
        tensor.stored_by[at] = lanes
        lost = tensor.stored_by[at] != lanes
        if lost.any():
            self.report("has two lanes store to one element of", tensor, at[lost][0], int(lost.sum()))
        tensor.stored_by[at] = self.now
        return self.real.store(real, value, on)

    def atomic_rmw(self, op, ptrs, value, mask, *rest):
        tensor, _, real, on = self.resolve("stores", ptrs, mask)
        self.report("makes an atomic update of", tensor)
        return self.real.atomic_rmw(op, real, value, on, *rest)

    def atomic_cas(self, ptrs, compare, value, *rest):
        tensor, _, real, _ = self.resolve("stores", ptrs, np.ones(ptrs.shape, bool))
        self.report("makes an atomic update of", tensor)
        return self.real.atomic_cas(real, compare, value, *rest)


def _is_memory(argument):
    """Whether the kernel reaches a tensor by this argument."""
    return hasattr(argument, "data_ptr") or isinstance(argument, TensorDescriptor)


def _line():
    """file:line of the kernel's current statement, or the kernel's end."""
    frame, outside = sys._getframe(1), (os.path.dirname(triton.__file__), fast_interpreter.__file__, __file__)
    while frame and frame.f_code.co_filename.startswith(outside):
        if frame.f_code.co_name == "end":
            return "at its end"
        frame = frame.f_back
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"


watch = Watch()


@contextlib.contextmanager
def watched(sample=None):
    """Yields a list that gets a line for each violation inside the block; no enclosing watch sees these.

    With `sample`, at most that many programs of each launch run, spread from the first to the last: enough to check
    that a huge launch keeps inside its tensors.
    """
    previous = watch.violations, watch.sample
    watch.violations, watch.sample = [], sample
    try:
        yield watch.violations
    finally:
        watch.violations, watch.sample = previous


@contextlib.contextmanager
def unwatched():
    """Lets every load and store inside the block through to memory."""
    watch.off = True
    try:
        yield
    finally:
        watch.off = False


# A multiple of every alignment that a kernel may have been compiled for.
BAND = 4096
# Bytes compared at once: a comparison takes as much memory again.
CHUNK = 2**28
# With bands, a launch's tensors take this many times their storages' memory, plus some chunks.
GUARDED = 2


class Banded:
    """A copy of a storage between bytes 0xFF (NaN in every floating format), and the tensors that lie in it."""

    def __init__(self, storage, device):
        size = storage.nbytes()
        self.contents = torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, (size,), (1,))
        self.buffer = torch.full((size + 2 * BAND,), 0xFF, dtype=torch.uint8, device=device)
        self.inside = self.buffer[BAND : BAND + size]
        self.inside.copy_(self.contents)
        self.pairs = []  # views of the same elements, in the storage and in the copy

    def moved(self, tensor):
        """The tensor's counterpart in the copy."""
        offset, strides = tensor.storage_offset(), tensor.stride()
        # Not views of the tensor itself: autograd would see the writes through them.
        real, twin = (
            tensor.new_empty(0).set_(t.untyped_storage(), offset + more, tensor.shape, strides)
            for t, more in ((self.contents, 0), (self.buffer, BAND // tensor.element_size()))
        )
        # torch refuses to write to elements that an expanded dimension repeats.
        once = tuple(slice(None) if step else slice(1) for step in strides)
        self.pairs.append((real[once], twin[once]))
        return twin

    def strayed(self):
        """Copies the elements back to the storage; returns how many other bytes have changed."""
        found = [copy.clone() for _, copy in self.pairs]
        for real, copy in self.pairs:
            copy.copy_(real)
        count = sum(int((band != 0xFF).sum()) for band in (self.buffer[:BAND], self.buffer[-BAND:]))
        for old, new in zip(self.contents.split(CHUNK), self.inside.split(CHUNK)):
            count += int((old != new).sum())
        for (real, _), values in zip(self.pairs, found):
            real.copy_(values)
        return count


def _in_capture():
    """Whether launches go into a CUDA graph now, during which the GPU cannot be synchronised."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def guard_bands():
    """Yields a list that gets a line for each store outside the tensors of a launch, on any device.

    The kernel runs on copies of the storages between bands; afterwards every byte outside its tensors' elements must be
    unchanged. Of nested blocks only the innermost checks, so that a test may plant a bug.

    A launch that is captured in a CUDA graph is left alone: its bytes could not be checked before the graph runs, and
    the graph would keep writing to the copies. The launches before it, which compile the kernels, run between bands.
    """
    violations, kernel_type = [], interpreter.InterpretedFunction if triton.knobs.runtime.interpret else JITFunction
    outer = kernel_type.run
    run = getattr(outer, "without_bands", outer)

    def guarded_run(self, *args, grid, warmup, **kwargs):
        if _in_capture():
            return run(self, *args, grid=grid, warmup=warmup, **kwargs)
        copies = {}

        def moved(arg):
            if not isinstance(arg, torch.Tensor):
                return arg
            storage = arg.untyped_storage()
            if storage.data_ptr() not in copies:
                copies[storage.data_ptr()] = Banded(storage, arg.device)
            return copies[storage.data_ptr()].moved(arg)

        result = run(self, *map(moved, args), grid=grid, warmup=warmup, **{k: moved(v) for k, v in kwargs.items()})
        for copy in copies.values():
            if strayed := copy.strayed():
                violations.append(f"{self.fn.__name__} stores {strayed} bytes outside its tensors")
        return result

    guarded_run.without_bands = run
    kernel_type.run = guarded_run
    try:
        yield violations
    finally:
        kernel_type.run = outer

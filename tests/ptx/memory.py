"""Global memory: the storages of the tensors that a launch is given.

Each storage has an address range of its own, far from the others, so that an access past its end is stray even where
another tensor follows in the process's memory. Tensors whose pointers kernels find in memory lie at their real
addresses, see `Memory.keep`.
"""

import ctypes

import numpy as np

U8, I8 = np.uint64, np.int64
# numpy's unsigned type of each size, for copying bits.
BY_SIZE = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}
SHIFT = {1: 0, 2: 1, 4: 2, 8: 3, 16: 4}
READ, WRITE = "reads", "writes"
RANGE = 40
# The first address of tensor maps, below all storages.
MAPS = 1 << RANGE - 1
# Allocations on a GPU start at multiples of this.
ALIGNED = 512


class Segment:
    """Memory of this process that kernels see at an address. `owner` keeps it alive."""

    def __init__(self, start, real, size, owner):
        if real % 16:
            raise ValueError(f"a storage at {real:#x}, which is not aligned to 16 bytes")
        self.start, self.size, self.owner = start, size, owner
        data = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(real))
        self.views = {n: data[: size // n * n].view(kind) for n, kind in BY_SIZE.items()}

    def shift(self, offset):
        """What to add to an address to get its offset in the segment, modulo 2^64."""
        return np.array([[(offset - self.start) & (1 << 64) - 1]], U8)


class Memory:
    """The segments that kernels may touch."""

    def __init__(self):
        self.arguments, self.kept, self.shifts, self.maps = {}, {}, {}, {}

    def argument(self, storage):
        """The address at which a launch's kernel sees a storage."""
        real, size = storage.data_ptr(), storage.nbytes()
        if not size:
            return real
        if real not in self.arguments:
            start = (len(self.arguments) + 1 << RANGE) + real % ALIGNED
            self.arguments[real] = Segment(start, real, size, storage)
        return self.arguments[real].start

    def address(self, tensor):
        """The address at which a launch's kernel sees a tensor."""
        storage = tensor.untyped_storage()
        return self.argument(storage) + tensor.data_ptr() - storage.data_ptr()

    def place_map(self, tensor_map):
        """The address at which a launch's kernel sees a tensor map, which it can only copy from."""
        address = MAPS + len(self.maps) * 128
        self.maps[address] = tensor_map
        return address

    def keep(self, tensor):
        """Lets kernels access a tensor by its real address while this memory lives; returns the tensor."""
        storage = tensor.untyped_storage()
        self.kept[storage.data_ptr()] = Segment(storage.data_ptr(), storage.data_ptr(), storage.nbytes(), storage)

    def forget_arguments(self):
        self.arguments, self.shifts, self.maps = {}, {}, {}

    def segments(self):
        return [*self.arguments.values(), *self.kept.values()]

    def find(self, address):
        """The segment that contains an address, or None."""
        return next((s for s in self.segments() if s.start <= address < s.start + s.size), None)

    def place(self, b, address, offset, size, mask, here):
        """(segment, index of each element of that size in it), if all active threads are in one segment; or None."""
        cached = self.shifts.get((here, offset))
        if cached is None:
            first = address[0, 0] if mask is None else first_active(address, mask)
            segment = self.find(int(first) + offset & (1 << 64) - 1)
            if segment is None:
                return None
            cached = self.shifts[here, offset] = segment, segment.shift(offset)
        segment, shift = cached
        inside = address + shift
        if mask is not None:
            inside = np.where(mask, inside, U8(0))
        if int(inside.max()) > segment.size - size:
            del self.shifts[here, offset]
            return None
        if int(np.bitwise_or.reduce(inside, axis=None)) & (size - 1):
            misaligned(b, inside, size, True if mask is None else mask, here)
        return segment, (inside >> U8(SHIFT[size])).view(I8)

    def places(self, b, address, size, mask, here):
        """(segment, which threads are in it, index of each element) for each segment with any."""
        left = mask.copy()
        misaligned(b, address, size, left, here)
        for segment in self.segments():
            inside = address - U8(segment.start)
            chosen = left & (inside < segment.size) & (inside + U8(size) <= segment.size)
            if chosen.any():
                left &= ~chosen
                yield segment, chosen, np.where(chosen, inside >> U8(SHIFT[size]), U8(0)).view(I8)
        if left.any():
            b.fault("stray", f"{size} bytes at {int(address[left][0]):#x}, which is in no tensor", here, left)

    def load(self, b, address, offset, size, mask, here):
        """The bits at each address, as numpy's type of that size; arbitrary where the mask does not hold."""
        found = self.place(b, address, offset, size, mask, here)
        if found:
            segment, index = found
            note(b, READ, segment, index, size, mask, here)
            return segment.views[size].take(index)
        address, mask = spread(address, offset, mask)
        result = np.zeros(mask.shape, BY_SIZE[size])
        for segment, chosen, index in self.places(b, address, size, mask, here):
            note(b, READ, segment, index, size, chosen, here)
            result[chosen] = segment.views[size].take(index[chosen])
        return result

    def store(self, b, address, offset, size, data, mask, here):
        found = self.place(b, address, offset, size, mask, here)
        if found:
            segment, index = found
            note(b, WRITE, segment, index, size, mask, here, data)
            index, data, mask = np.broadcast_arrays(index, data, True if mask is None else mask)
            segment.views[size][index[mask]] = data[mask]
            return
        address, mask = spread(address, offset, mask, data)
        data = np.broadcast_to(data, mask.shape)
        for segment, chosen, index in self.places(b, address, size, mask, here):
            note(b, WRITE, segment, index, size, chosen, here, data)
            segment.views[size][index[chosen]] = data[chosen]


def note(b, kind, segment, index, size, mask, here, data=None):
    """Reports an access to the race check between the warps of a program, if it has several."""
    if b.batch.traffic:
        b.batch.traffic.note(b, kind, segment, index, size, mask, here, data)


def first_active(address, mask):
    address, mask = np.broadcast_arrays(address, mask)
    return address[mask][0]


def spread(address, offset, mask, data=None):
    """Every thread's address, and whether it is active."""
    shapes = [array.shape for array in (address, mask, data) if array is not None]
    shape = np.broadcast_shapes(*shapes)
    active = np.ones(shape, bool) if mask is None else np.broadcast_to(mask, shape)
    return np.broadcast_to(address + U8(offset & (1 << 64) - 1), shape), active


def misaligned(b, address, size, mask, here):
    """Faults if an active thread's address is not a multiple of the size."""
    wrong = (address & U8(size - 1) != 0) & mask
    if wrong.any():
        address = np.broadcast_to(address, wrong.shape)
        b.fault("misaligned", f"{size} bytes at ...{int(address[wrong][0]) & 0xFFFF:04x}", here, wrong)


def kept_rows(array, kept):
    """The kept rows of an array; an array with one row has it for all programs."""
    return array if array is None or len(array) == 1 else array[kept]


def active(mask):
    """(mask or None if all threads are active, whether any is)."""
    if mask is None or mask.all():
        return None, True
    return mask, bool(mask.any())


def elements(raw, count, form, mask, old):
    """The elements of vectors of bits, with the old values where the mask does not hold."""
    values = raw.view(form)
    values = (values,) if count == 1 else vector(values, count)
    if mask is None:
        return values
    return tuple(np.where(mask, value, before) for value, before in zip(values, old))


def vector(values, count):
    values = values.reshape(*values.shape[:-1], -1, count)
    return tuple(values[..., k] for k in range(count))


def joined(values, size):
    """Elements joined to vectors of bits."""
    count = len(values)
    bits = BY_SIZE[size]
    if count == 1:
        return values[0].view(bits)
    shape = np.broadcast_shapes(*(value.shape for value in values))
    raw = np.empty((*shape, count), bits)
    for k, value in enumerate(values):
        raw[..., k] = value.view(bits)
    return raw.view(BY_SIZE[size * count])[..., 0]


def global_load(b, address, offset, size, count, form, mask, old, here):
    mask, some = active(mask)
    if not some:
        return old
    raw = b.batch.memory.load(b, address, offset, size * count, mask, here)
    return elements(raw, count, form, mask, old)


def global_store(b, address, offset, size, values, mask, here):
    mask, some = active(mask)
    if some:
        b.batch.memory.store(b, address, offset, size * len(values), joined(values, size), mask, here)


NAMES = {"global_load": global_load, "global_store": global_store}

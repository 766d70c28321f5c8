"""Tensor descriptors of the host: what a launch passes for them, and where the elements of their boxes are.

For sm_90 and sm_100 Triton makes a tensor map (CUtensorMap) of each descriptor; for sm_80 it passes the tensor, the
sizes and the strides. Here a tensor map is an object that a kernel knows by the address of its parameter.

Sources: CUDA Driver API, "Tensor Map Object Management: cuTensorMapEncodeTiled"; PTX ISA 9.0, section "Tensors".
"""

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
from triton.backends.nvidia.driver import make_tensordesc_arg

# By CUtensorMapDataType: bytes of an element. The types that change what they copy, such as to tf32, are not here.
SIZES = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 8: 8, 9: 2}
# By CUtensorMapSwizzle: bytes of a row.
SPANS = {0: None, 1: 32, 2: 64, 3: 128}
RANK, BOX, SIZE, STRIDE = 5, 256, 1 << 32, 1 << 40


@dataclass(frozen=True)
class TensorMap:
    """A tensor in global memory and the box that is copied of it; dimensions are given from the innermost on.

    base: the tensor, or its address. kind: a CUtensorMapDataType. size: bytes of an element. strides: in bytes, without
    the innermost dimension's. swizzle: a CUtensorMapSwizzle. nan: whether elements outside the tensor are NaN; else 0.
    """

    base: object
    kind: int
    size: int
    sizes: tuple
    strides: tuple
    box: tuple
    swizzle: int
    nan: bool

    @property
    def bytes(self):
        return math.prod(self.box) * self.size

    def complaint(self):
        """(kind of fault, detail) if the map is not allowed, or not known here; or None."""
        row, span = self.box[0] * self.size, SPANS.get(self.swizzle)
        if self.kind not in SIZES or self.swizzle not in SPANS or span and row < span:
            return "instruction", f"a tensor map of type {self.kind} with rows of {row} bytes, swizzle {self.swizzle}"
        rules = {
            "elements of another size than their type's": self.size != SIZES[self.kind],
            "another number of dimensions than of the box": not 1 <= len(self.sizes) == len(self.box) <= RANK,
            "a base that is not aligned to 16 bytes": self.base.data_ptr() % 16,
            "a size that is 0 or above 2^32": not all(0 < n <= SIZE for n in self.sizes),
            "a stride that is no multiple of 16 bytes below 2^40": any(n % 16 or n >= STRIDE for n in self.strides),
            "a box of more than 256 elements along a dimension": not all(0 < n <= BOX for n in self.box),
            "a box whose rows are no multiple of 16 bytes": row % 16,
            "a box whose rows are longer than its swizzle": span and row > span,
        }
        found = next((rule for rule, broken in rules.items() if broken), None)
        return found and ("descriptor", f"a tensor map with {found}")

    def elements(self, first):
        """Where the boxes from some coordinates on lie: (bytes of a unit, its offset from the base, whether inside).

        first: (boxes, dimensions). A unit is 16 bytes if none of them is partly outside, or else an element.
        """
        whole = not (first[:, 0] * self.size % 16).any() and not self.sizes[0] * self.size % 16
        unit = 16 if whole else self.size
        offset, inside = np.zeros((len(first), 1), np.int64), np.ones((len(first), 1), bool)
        steps = (unit // self.size, *[1] * len(self.strides))
        for k, (step, stride) in enumerate(zip(steps, (self.size, *self.strides))):
            index = first[:, k, None] + np.arange(0, self.box[k], step)
            offset = (index * stride)[:, :, None] + offset[:, None, :]
            inside = ((index >= 0) & (index < self.sizes[k]))[:, :, None] & inside[:, None, :]
            offset, inside = offset.reshape(len(first), -1), inside.reshape(len(first), -1)
        return unit, offset, inside

    def chunks(self, to):
        """The shared addresses of a box's 16-byte chunks, (boxes, chunks), from the box's addresses (boxes, 1)."""
        place = to + np.arange(0, self.bytes, 16)
        bits = (SPANS[self.swizzle] or 16) // 16 - 1
        return place ^ (place >> 7 & bits) << 4


def tiled(base, swizzle, size, kind, box, sizes, strides, padding):
    """What Triton calls to make a tensor map; the outermost dimension is first, and strides are in elements."""
    strides = tuple(int(n) * size for n in strides[-2::-1])
    return TensorMap(base, kind, size, tuple(sizes[::-1]), strides, tuple(box[::-1]), swizzle, padding == 1)


# What Triton's expansion of descriptors needs of a driver.
UTILS = SimpleNamespace(fill_tma_descriptor_tiled=tiled)


def expanded(arguments, kinds, metadata):
    """A launch's arguments, with those of Triton's types tensordesc<...> replaced by what it passes for them.

    metadata: of the kernel, with that of its descriptors unless they are rewritten to pointers.
    """
    result, left = [], iter(getattr(metadata, "tensordesc_meta", None) or ())
    for argument, kind in zip(arguments, kinds, strict=True):
        if not kind.startswith("tensordesc"):
            result.append(argument)
            continue
        first, *rest = make_tensordesc_arg(argument, next(left, None))
        if isinstance(first, TensorMap):
            first = replace(first, base=argument.base)
        result += [first, *rest]
    return result

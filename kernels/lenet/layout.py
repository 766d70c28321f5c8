"""The memory layout of LeNet's launches: parameters, packed weights, activations and partial sums.

Parameters, and in training their gradients and the optimiser's state, stay in torch's own tensors; the kernels find
them through a table of addresses. Each forward packs all weights first, so that it sees every change made to them.
With C channels, S = SIZE + 2 * PAD pixels, Q1 = (S - 4) / 2, Q2 = (Q1 - 4) / 2 and F = 16 * Q2 * Q2 features:

    places   (10, PLACES) int64, a row for each parameter: its address and strides, and the addresses of its gradient,
             of the optimiser's moments and of its update count
    plain    the filters of both convolutions and all biases in float32
    packed   the weights in the layout and the number format of the products:
      W1[c * 64 + dy * 8 + dx, q * 32 + r * 8 + oc] = conv1[oc, c, dy - 2 * ry - qy, dx - 2 * rx - qx]
      W2[dy * 48 + dx * 8 + c, q * 16 + oc]         = conv2[oc, c, dy - qy, dx - qx]
      WD[j * 64 + r * 16 + s * 8 + c, q * 16 + oc]  = conv2[oc, c, 2 * jy + ry - qy, 2 * (jx + s - 1) + rx - qx]
      W3[p * 16 + oc, n] = fc1[n, oc * Q2 * Q2 + p],  W4[k, n] = fc2[n, k],  W5[k, n] = fc3[n, k]

The four pixels q = 2 * qy + qx of a pooling window are columns of one product, so that they share one patch of pixels;
in the first convolution so do the four windows r = 2 * ry + rx of a square. Entries without a weight are 0. WD is for
the gradient of the second convolution's input, computed for pairs of adjacent squares s, each of 2 x 2 pixels r;
j = 4 * jy + jx counts the windows that reach a pair, from the last to the first.

    p1   (N, Q1, Q1, 8)         pooled result of the first convolution, two channels of padding
    acts (N, F + 256)           p2, channels innermost; the results of fc1 and fc2, padded to 128 each
    dz   (N, Q2, Q2, 4, 16)     the gradient of the second convolution's result: that of p2 at the pixel of its code
    grads (N, 256 + CP)         gradients of the results of fc1, fc2 and fc3, the classes padded to CP
    code1, code2                which pixel of its window was the largest, and 4 where it was <= 0

In full float32 on NVIDIA's cards (see lanes.py) they are instead

    p1, code1, dp1 (N, 6, Q1, Q1)   dp1 is p1's gradient, workspace of the third launch
    dz   (N, F)                     the gradient of p2; code2 has the pixel
    dz_columns, code2_columns (ceil(N / 32), F, 32)   copies of both with images innermost
"""

import functools
import math
from typing import NamedTuple

import torch

from .._common import INTERPRETED, cdiv, power_of_2

# Elements of a parameter that one program updates; the interpreter's time grows with the number of programs.
BLOCK = 16384 if INTERPRETED else 128
# Columns of the table of which programs update a parameter, and where the partial sums of its gradient are.
COLUMNS = 16
# Columns of the table of addresses: of the parameter, its four strides, of its gradient, three moments and step count.
WEIGHT, STRIDES, GRADIENT, MOMENTS, STEP = 0, 1, 5, 6, 9
PLACES = 10
# Bits of an update count, and columns of the optimiser's hyperparameters for each parameter.
BITS = 32
NUMBERS = 8 + 2 * BITS


def _remembered(method):
    """A property that is computed once for equal owners."""
    return property(functools.cache(method))


class Geometry(NamedTuple):
    """A LeNet for (channels, size, size) images whose first convolution pads by `padding`."""

    channels: int
    size: int
    padding: int
    classes: int

    @_remembered
    def pooled(self):
        """(Q1, Q2): pixels a side after each pooling."""
        first = (self.size + 2 * self.padding - 4) // 2
        return first, (first - 4) // 2

    @_remembered
    def features(self):
        return 16 * self.pooled[1] ** 2

    @_remembered
    def block_classes(self):
        return min(128, max(16, power_of_2(self.classes)))

    @_remembered
    def padded_classes(self):
        return cdiv(self.classes, self.block_classes) * self.block_classes

    @_remembered
    def shapes(self):
        """The shapes of the parameters, in the module's order."""
        C, F = self.channels, self.features
        weights = (6, C, 5, 5), (16, 6, 5, 5), (120, F), (84, 120), (self.classes, 84)
        return [shape for weight in weights for shape in (weight, weight[:1])]

    @_remembered
    def blocks(self):
        """The first program that updates each parameter, and how many programs there are."""
        return _starts([cdiv(math.prod(shape), BLOCK) for shape in self.shapes])

    @_remembered
    def plain(self):
        """Where conv1's filters and bias, conv2's, and the linears' biases begin in the plain buffer, and its size."""
        sizes = 150 * self.channels, 6, 2400, 16, 120, 84, self.classes
        return _starts([cdiv(size, 128) * 128 for size in sizes])

    @_remembered
    def packed(self):
        """Where W1, W2, WD, W3, W4 and W5 begin in the packed buffer, and the buffer's size."""
        # Features are padded to whole blocks with weight 0.
        features = cdiv(self.features, 128) * 128
        rows = (64 * self.channels, 128), (288, 64), (768, 64), (features, 128), (128, 128), (128, self.padded_classes)
        return _starts([math.prod(shape) for shape in rows])

    @_remembered
    def row(self):
        """Where fc1's, fc2's and fc3's weights and all of their biases begin in a partial sum, and its size."""
        return _starts([128 * self.features, 128 * 128, self.padded_classes * 128, 256 + self.padded_classes])

    @_remembered
    def constants(self):
        """The constants of the kernels."""
        Q1, Q2 = self.pooled
        return {
            "C": self.channels, "SIZE": self.size, "PAD": self.padding, "Q1": Q1, "Q2": Q2, "F": self.features,
            "CLASSES": self.classes, "CP": self.padded_classes,
        }  # fmt: skip


def _starts(sizes):
    return [sum(sizes[:i]) for i in range(len(sizes) + 1)]


class Splits(NamedTuple):
    """How many programs share the gradients of the first convolution, of the second, and of each tile of the linears.

    It depends on the shapes and the architecture alone, so that sums have the same bits on every card of a kind.
    """

    conv1: int
    conv2: int
    linear: int
    # Whether lanes_gradient.py computes them, which adds the pixels of a window at once.
    lanes: bool = False

    def partials(self, geometry):
        """The offsets of the partial sums of each, and the total size."""
        rows = 150 * geometry.channels + 6, 16 * 150 + 16 if self.lanes else 64 * 288 + 64, geometry.row[-1]
        return _starts([splits * row for splits, row in zip(self, rows)])


@functools.cache
def _rows(geometry, splits):
    C, (_, Q2), F = geometry.channels, geometry.pooled, geometry.features
    conv1, conv2, linear, _ = splits.partials(geometry)
    fc1, fc2, fc3, biases, row = geometry.row
    one = 1, 0, 0
    if splits.lanes:
        second = 16 * 150 + 16, conv2, conv2 + 16 * 150, (6, 5, 5), (150, 25, 5, 1)
        terms = one, one
    else:
        second = 64 * 288 + 64, conv2, conv2 + 64 * 288, (6, 5, 5), (288, 1, 48, 8)
        terms = (4, 2 * 16 * 288 + 48, 16 * 288 + 8), (4, 32, 16)

    def biased(splits, row, weight, bias, radices, steps, terms=one, bias_terms=one):
        """The rows of a weight and of its bias, whose sums start at `weight` and `bias` and repeat every `row`."""
        yield *radices, weight, row, splits, *steps, *terms
        yield 1, 1, 1, bias, row, splits, 1, 0, 0, 0, *bias_terms

    rows = [
        *biased(splits.conv1, 150 * C + 6, conv1, conv1 + 150 * C, (C, 5, 5), (25 * C, 25, 5, 1)),
        *biased(splits.conv2, *second, *terms),
        *biased(splits.linear, row, linear + fc1, linear + biases, (16, 1, Q2 * Q2), (F, 1, 0, 16)),
        *biased(splits.linear, row, linear + fc2, linear + biases + 128, (1, 1, 120), (128, 0, 0, 1)),
        *biased(splits.linear, row, linear + fc3, linear + biases + 256, (1, 1, 84), (128, 0, 0, 1)),
    ]
    counts = map(math.prod, geometry.shapes)
    return [(first, count, *row) for first, count, row in zip(geometry.blocks, counts, rows)]


def table(geometry, splits, device):
    """int32 (16, COLUMNS), a row for each parameter: which programs update it, and where its gradient's sums are.

    An element of a parameter has the indices (a, b, c, d) in the mixed radices (-, D1, D2, D3). Columns: first program,
    elements, D1, D2, D3; the partial sums' start, stride between splits and number of splits; their strides along a, b,
    c, d; the number of terms that a split holds for an element, and their strides for the two bits of a term's index.
    """
    # The rows after the parameters start after every program.
    rows = [*_rows(geometry, splits), *[(2**30,)] * 6]
    rows = [[*row, *[0] * (COLUMNS - len(row))] for row in rows]
    return torch.tensor(rows, dtype=torch.int32, device=device)


def address(tensor):
    """A tensor's address as an int64: addresses are unsigned, and on some GPUs at or above 2^63."""
    number = tensor.data_ptr()
    return number - (number >> 63 << 64)


def place(parameter, gradient=None, moments=(), step=None):
    """A row of the table of addresses; what a launch does not use may be omitted."""
    strides = parameter.stride()
    others = [gradient, *moments, *[None] * (3 - len(moments)), step]
    addresses = [0 if tensor is None else address(tensor) for tensor in others]
    return [address(parameter), *strides, *[0] * (4 - len(strides)), *addresses]

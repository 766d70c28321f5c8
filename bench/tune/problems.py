"""The products on which tiles are measured: some layers of ResNet-50, VGG-16, U-Net and LeNet.

For each family they span few and many programs, and few and many steps. Strided convolutions, whose programs differ in
their steps, are left out, and in tf32 what copies an operand first. The other families of tiles.py, whose kernels also
pool, chain layers or walk over taps and channels as one, keep their computed numbers.

Sources: He et al. 2015, https://arxiv.org/abs/1512.03385; Simonyan and Zisserman 2014,
https://arxiv.org/abs/1409.1556; Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597, here padded; LeCun et al.
1998, http://yann.lecun.com/exdb/publis/pdf/lecun-98.pdf.
"""

import functools
import itertools
from types import SimpleNamespace
from typing import NamedTuple

import torch

from tritonnet.kernels import tiles

from .. import FORMATS
from ..case import CHANNELS_LAST, CONTIGUOUS, FORWARD, INPUT_GRAD, WEIGHT_GRAD
from ..libraries import installed
from ..measure import precision
from ..passes import Passes, convolution, linear
from ..resnet import Layer

# The row of the tables of tiles that a format uses; float16 has that of bfloat16.
ROWS = {"bfloat16": "half", "tf32": "tf32"}
# (network, N, C, H, OC) of convolutions of 3 x 3.
THREES = (
    ("ResNet-50", 32, 64, 56, 64), ("ResNet-50", 128, 256, 14, 256), ("ResNet-50", 32, 512, 7, 512),
    ("VGG-16", 16, 128, 112, 128), ("VGG-16", 32, 256, 28, 512), ("ResNet-50", 128, 128, 28, 128),
    ("U-Net", 2, 64, 256, 64), ("U-Net", 2, 512, 32, 256), ("VGG-16", 16, 512, 14, 512),
)  # fmt: skip
# The same of convolutions of 1 x 1.
ONES = (
    ("ResNet-50", 32, 256, 56, 64), ("ResNet-50", 128, 512, 7, 2048), ("ResNet-50", 128, 1024, 14, 256),
    ("ResNet-50", 128, 64, 56, 256),
)  # fmt: skip
# (M, K, N) of linear: large ones, two of them of VGG-16; then those of LeNet, ResNet-50 and VGG-16 with few rows.
LARGE = (1024, 4096, 1024), (4096, 4096, 4096), (8192, 1024, 1000), (128, 25088, 4096), (128, 4096, 4096)
SMALL = (1024, 400, 120), (128, 2048, 1000), (8, 4096, 4096), (1024, 120, 84), (64, 400, 120)


class Problem(NamedTuple):
    """One pass of an operator, which a family of tiles computes."""

    family: str
    subject: Passes
    task: str
    format: str

    @property
    def name(self):
        return f"{self.subject.name}, batch {self.subject.batch}, {self.task}, {self.format}"

    @property
    def row(self):
        return ROWS[self.format]

    @property
    def candidates(self):
        """The tiles that may compute it, for the architecture of the current device."""
        # Only a convolution has taps, and programs with several of them are for its weight gradient.
        several = self.task == WEIGHT_GRAD and len(self.subject.sizes[1]) == 4
        return [tile for tile in tiles.table(self.family, self.row) if several or tile.taps == 1]

    def contestant(self, device):
        """Ours, on one set of inputs on a torch device."""
        layout = CHANNELS_LAST if len(self.subject.result) == 4 else CONTIGUOUS
        one_set = SimpleNamespace(torch_device=torch.device(device), l2_bytes=0)
        return self.subject.contestant(installed()["tritonnet"], layout, self.format, one_set)

    def complaint(self, gate, results):
        """What is wrong with results, or None."""
        return gate.complaint(results, FORMATS[self.format][0])


def _subjects():
    def layers(sizes, K):
        return [convolution(Layer(0, N, C, H, OC, K, 1), network) for network, N, C, H, OC in sizes]

    return layers(THREES, 3), layers(ONES, 1), [linear(*size) for size in LARGE], [linear(*size) for size in SMALL]


def problems():
    """Every Problem, in turn of each family and format, so that a run that is ended early has some of all."""
    threes, ones, large, small = _subjects()
    half, tf32 = ROWS

    def of(family, subjects, tasks, format):
        return [Problem(family, subject, task, format) for subject in subjects for task in tasks]

    mixed = [subject for pair in itertools.zip_longest(ones, large) for subject in pair if subject]
    groups = [
        of("patches", threes, (FORWARD,), half) + of("patches", threes[::2], (INPUT_GRAD,), half),
        of("gradient", threes, (WEIGHT_GRAD,), half) + of("gradient", small[:3], (WEIGHT_GRAD,), half),
        of("products", mixed, (FORWARD, WEIGHT_GRAD), half) + of("products", mixed[:4], (INPUT_GRAD,), half),
        of("matrices", small, (FORWARD,), half),
        of("patches", threes[::2], (FORWARD,), tf32),
        of("gradient", threes[::2], (WEIGHT_GRAD,), tf32) + of("gradient", large[:2], (WEIGHT_GRAD,), tf32),
        of("products", mixed, (FORWARD,), tf32),
        of("matrices", small, (FORWARD,), tf32),
    ]
    return [problem for turn in itertools.zip_longest(*groups) for problem in turn if problem]


def jobs():
    """{name: call} that launch every candidate on every problem once, for bench.warm, which compiles instead."""

    def launch(problem, tile):
        with precision(problem.format), tiles.only(problem.family, tile):
            problem.contestant("cpu").steps[problem.task][0]()

    return {
        f"{problem.name}, {tuple(tile)}": functools.partial(launch, problem, tile)
        for problem in problems()
        for tile in problem.candidates
    }

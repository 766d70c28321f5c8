"""Triton kernels for convolutional networks, behind the layers and functions of torch.nn."""

from importlib.util import find_spec as _find_spec
from pathlib import Path as _Path

# An installation puts the folder kernels/ into this package (see setup.py); in a bare clone it stays beside it.
if _find_spec(f"{__name__}.kernels") is None:
    __path__.append(str(_Path(__file__).parents[1]))

from . import flops, nn, sharding
from .conversion import convert, revert
from .decompositions import decompositions
from .dispatch import backend, count_launches
from .fusion import fuse
from .imports import when_imported
from .lenet import LeNet
from .serving import serve
from .train_step import TrainStep

when_imported("torch.utils.flop_counter", flops.register)
when_imported("torch.distributed.tensor", sharding.register)

__version__ = "0.1.0"
__all__ = [
    "LeNet",
    "TrainStep",
    "__version__",
    "backend",
    "convert",
    "count_launches",
    "decompositions",
    "fuse",
    "nn",
    "revert",
    "serve",
]

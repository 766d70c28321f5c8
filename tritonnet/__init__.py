"""Triton kernels for convolutional networks, behind the layers and functions of torch.nn."""

from . import nn
from .conversion import convert, revert
from .dispatch import backend, count_launches
from .fusion import fuse
from .lenet import LeNet
from .train_step import TrainStep

__version__ = "0.1.0"
__all__ = ["LeNet", "TrainStep", "__version__", "backend", "convert", "count_launches", "fuse", "nn", "revert"]

"""Triton kernels for convolutional networks, behind the layers and functions of torch.nn."""

from . import nn
from .conversion import convert, revert
from .dispatch import backend, count_launches
from .fusion import fuse
from .lenet import LeNet

__version__ = "0.1.0"
__all__ = ["LeNet", "__version__", "backend", "convert", "count_launches", "fuse", "nn", "revert"]

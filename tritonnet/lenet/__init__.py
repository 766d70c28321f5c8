"""LeNet."""

from .model import LeNet

__all__ = ["LeNet"]

"""LeNet-5, its layers fused."""

import torch

from . import nn
from .nn import functional as F
from .nn._plain import is_plain


class LeNet(nn.Module):
    """LeNet-5 for images (N, 1, 32, 32), with logits (N, classes).

    Numbers, gradients and state_dict are those of the LeNet of PyTorch's tutorials, which calls relu and max_pool2d in
    its forward; here they belong to the layers.

    Source: LeCun et al. 1998, Gradient-based learning applied to document recognition, with max-pooling and relu.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2dReLUMaxPool2d(1, 6, 5)
        self.conv2 = nn.Conv2dReLUMaxPool2d(6, 16, 5)
        self.fc1 = nn.LinearReLU(16 * 5 * 5, 120)
        self.fc2 = nn.LinearReLU(120, 84)
        self.fc3 = nn.Linear(84, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv2(self.conv1(x)).flatten(1)
        head = self.fc1, self.fc2, self.fc3
        if all(is_plain(fc, (cls,)) for fc, cls in zip(head, (nn.LinearReLU, nn.LinearReLU, nn.Linear))):
            return F.linear_chain(x, [fc.weight for fc in head], [fc.bias for fc in head])
        return self.fc3(self.fc2(self.fc1(x)))  # with whatever has been attached to them

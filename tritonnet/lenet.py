"""LeNet-5 in the form that PyTorch tutorials write it."""

from . import nn
from .nn import functional as F


class LeNet(nn.Module):
    """LeNet-5 for images (N, 1, 32, 32), with logits (N, classes).

    Source: LeCun et al. 1998, Gradient-based learning applied to document recognition, with max-pooling and relu.
    """

    def __init__(self, classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, classes)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.flatten(1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)

"""torch.nn with Conv2d, MaxPool2d, ReLU and Linear on tritonnet's kernels; every other name is torch's.

import tritonnet.nn as nn
import tritonnet.nn.functional as F
"""

import torch.nn as _torch

from . import functional
from ._stand_in import stand_in

__getattr__, __dir__, __all__ = stand_in(__name__, _torch)


class Conv2d(_torch.Conv2d):
    """torch.nn.Conv2d on tritonnet's kernels: the same arguments, parameters and state_dict.

    Padding of any mode is read in place; the input (N, C, H, W) or (C, H, W) is never copied to be padded.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Conv2d.html
    """

    def forward(self, input):
        return functional._conv2d(
            input, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups, self.padding_mode
        )


class MaxPool2d(_torch.MaxPool2d):
    """torch.nn.MaxPool2d on tritonnet's kernels: the same arguments.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.MaxPool2d.html
    """

    def forward(self, input):
        return functional.max_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )


class ReLU(_torch.ReLU):
    """torch.nn.ReLU on tritonnet's kernels: the same arguments.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.ReLU.html
    """

    def forward(self, input):
        return functional.relu(input, self.inplace)


class Linear(_torch.Linear):
    """torch.nn.Linear on tritonnet's kernels: the same arguments, parameters and state_dict.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Linear.html
    """

    def forward(self, input):
        return functional.linear(input, self.weight, self.bias)

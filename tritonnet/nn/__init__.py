"""torch.nn with Conv2d, BatchNorm, pooling, Linear, CrossEntropyLoss and activations on our kernels, and fused layers.

Every other name is torch's.

import tritonnet.nn as nn
import tritonnet.nn.functional as F
"""

from typing import TYPE_CHECKING, Any

import torch.nn as _torch
from torch import Tensor
from torch.fx import Proxy

from . import functional
from ._layer import layer
from ._norm import normalise
from ._plain import is_plain
from ._stand_in import stand_in

__getattr__, __dir__, __all__ = stand_in(__name__, _torch)
__all__ += ["Conv2dReLU", "Conv2dReLUMaxPool2d", "LinearChain", "LinearReLU"]


# torch's own forwards of convolutions and products: layers that torch does not have follow their replacements, too.
_CONVOLVE, _CONV2D, _LINEAR = _torch.Conv2d._conv_forward, _torch.Conv2d.forward, _torch.Linear.forward


def _is_replaced(conv):
    """Whether the computation of convolutions has been replaced, on this layer or on torch's class."""
    by_all = _torch.Conv2d._conv_forward is not _CONVOLVE or _torch.Conv2d.forward is not _CONV2D
    return by_all or "_conv_forward" in vars(conv)


def _convolve(conv, function, padding, input, weight, bias, *rest):
    """A convolution by a function of functional that pads with zeros or, in another mode, by one that pads in that.

    torch.fx puts public functions alone into its graphs.
    """
    arguments = conv.stride, conv.padding, conv.dilation, conv.groups
    if conv.padding_mode == "zeros":
        return function(input, weight, bias, *arguments, *rest)
    if isinstance(input, Proxy):
        input = _torch.functional.pad(input, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
        return function(input, weight, bias, conv.stride, 0, *arguments[2:], *rest)
    return padding(input, weight, bias, *arguments, conv.padding_mode, *rest)


class Conv2d(_torch.Conv2d):
    """torch.nn.Conv2d on tritonnet's kernels: the same arguments, parameters and state_dict.

    The input (N, C, H, W) or (C, H, W) is never copied to be padded, in any padding mode.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Conv2d.html
    """

    @layer(_torch.Conv2d)
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight, self.bias)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if _torch.Conv2d._conv_forward is not _CONVOLVE:
            return super()._conv_forward(input, weight, bias)
        return _convolve(self, functional.conv2d, functional._conv2d, input, weight, bias)


class MaxPool2d(_torch.MaxPool2d):
    """torch.nn.MaxPool2d on tritonnet's kernels: the same arguments.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.MaxPool2d.html
    """

    @layer(_torch.MaxPool2d)
    def forward(self, input: Tensor) -> Any:
        return functional.max_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )


class AvgPool2d(_torch.AvgPool2d):
    """torch.nn.AvgPool2d on tritonnet's kernels: the same arguments.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.AvgPool2d.html
    """

    @layer(_torch.AvgPool2d)
    def forward(self, input: Tensor) -> Tensor:
        return functional.avg_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad,
            self.divisor_override,
        )  # fmt: skip


class AdaptiveAvgPool2d(_torch.AdaptiveAvgPool2d):
    """torch.nn.AdaptiveAvgPool2d on tritonnet's kernels: the same arguments.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.AdaptiveAvgPool2d.html
    """

    @layer(_torch.AdaptiveAvgPool2d)
    def forward(self, input: Tensor) -> Tensor:
        return functional.adaptive_avg_pool2d(input, self.output_size)


class ReLU(_torch.ReLU):
    """torch.nn.ReLU on tritonnet's kernels: the same arguments.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.ReLU.html
    """

    @layer(_torch.ReLU)
    def forward(self, input: Tensor) -> Tensor:
        return functional.relu(input, self.inplace)


class ReLU6(_torch.ReLU6):
    """torch.nn.ReLU6 on tritonnet's kernels: the same arguments.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.ReLU6.html
    """

    @layer(_torch.ReLU6)
    def forward(self, input: Tensor) -> Tensor:
        return functional.hardtanh(input, self.min_val, self.max_val, self.inplace)


class LeakyReLU(_torch.LeakyReLU):
    """torch.nn.LeakyReLU on tritonnet's kernels: the same arguments.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LeakyReLU.html
    """

    @layer(_torch.LeakyReLU)
    def forward(self, input: Tensor) -> Tensor:
        return functional.leaky_relu(input, self.negative_slope, self.inplace)


class SiLU(_torch.SiLU):
    """torch.nn.SiLU on tritonnet's kernels: the same arguments.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.SiLU.html
    """

    @layer(_torch.SiLU)
    def forward(self, input: Tensor) -> Tensor:
        return functional.silu(input, self.inplace)


class Hardswish(_torch.Hardswish):
    """torch.nn.Hardswish on tritonnet's kernels: the same arguments.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Hardswish.html
    """

    @layer(_torch.Hardswish)
    def forward(self, input: Tensor) -> Tensor:
        return functional.hardswish(input, self.inplace)


class GELU(_torch.GELU):
    """torch.nn.GELU on tritonnet's kernels: the same arguments.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.GELU.html
    """

    @layer(_torch.GELU)
    def forward(self, input: Tensor) -> Tensor:
        return functional.gelu(input, approximate=self.approximate)


class Sigmoid(_torch.Sigmoid):
    """torch.nn.Sigmoid on tritonnet's kernels: no arguments.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Sigmoid.html
    """

    @layer(_torch.Sigmoid)
    def forward(self, input: Tensor) -> Tensor:
        return functional.sigmoid(input)


class Hardsigmoid(_torch.Hardsigmoid):
    """torch.nn.Hardsigmoid on tritonnet's kernels: the same arguments.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Hardsigmoid.html
    """

    @layer(_torch.Hardsigmoid)
    def forward(self, input: Tensor) -> Tensor:
        return functional.hardsigmoid(input, self.inplace)


class BatchNorm1d(_torch.BatchNorm1d):
    """torch.nn.BatchNorm1d on tritonnet's kernels: the same arguments, parameters, buffers and state_dict.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm1d.html
    """

    @layer(_torch.BatchNorm1d)
    def forward(self, input: Tensor) -> Tensor:
        return normalise(self, input)


class BatchNorm2d(_torch.BatchNorm2d):
    """torch.nn.BatchNorm2d on tritonnet's kernels: the same arguments, parameters, buffers and state_dict.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html
    """

    @layer(_torch.BatchNorm2d)
    def forward(self, input: Tensor) -> Tensor:
        return normalise(self, input)


class BatchNorm3d(_torch.BatchNorm3d):
    """torch.nn.BatchNorm3d on tritonnet's kernels: the same arguments, parameters, buffers and state_dict.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm3d.html
    """

    @layer(_torch.BatchNorm3d)
    def forward(self, input: Tensor) -> Tensor:
        return normalise(self, input)


class Linear(_torch.Linear):
    """torch.nn.Linear on tritonnet's kernels: the same arguments, parameters and state_dict.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Linear.html
    """

    @layer(_torch.Linear)
    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight, self.bias)


class Conv2dReLU(Conv2d):
    """Conv2d followed by ReLU, in one kernel: the arguments, parameters and state_dict of Conv2d."""

    @layer()
    def forward(self, input: Tensor) -> Tensor:
        if _is_replaced(self):
            return functional.relu(super().forward(input))
        return _convolve(self, functional.conv2d_relu, functional._conv2d_relu, input, self.weight, self.bias)


class Conv2dReLUMaxPool2d(Conv2d):
    """Conv2d followed by ReLU and MaxPool2d, in one kernel: the parameters and state_dict of Conv2d.

    Args:
        in_channels ... padding_mode, device, dtype: as for Conv2d.
        pool_kernel_size: pixels, an integer or a pair (height, width).
        pool_stride: the same; None for pool_kernel_size.
        pool_padding: pixels on every side, up to half of pool_kernel_size.
        pool_ceil_mode: include a last window that overlaps the edge.
    """

    def __init__(
        self, *args: Any, pool_kernel_size: functional.Pixels = 2, pool_stride: functional.Pixels | None = None,
        pool_padding: functional.Pixels = 0, pool_ceil_mode: bool = False, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, **kwargs)
        self.pool_kernel_size = pool_kernel_size
        self.pool_stride = pool_stride if pool_stride is not None else pool_kernel_size
        self.pool_padding = pool_padding
        self.pool_ceil_mode = pool_ceil_mode

    def extra_repr(self) -> str:
        names = ["pool_kernel_size", "pool_stride", "pool_padding"]
        if self.pool_ceil_mode:
            names.append("pool_ceil_mode")
        return ", ".join([super().extra_repr(), *(f"{name}={getattr(self, name)}" for name in names)])

    @layer()
    def forward(self, input: Tensor) -> Tensor:
        window = self.pool_kernel_size, self.pool_stride, self.pool_padding
        if _is_replaced(self):
            y = functional.relu(super().forward(input))
            return functional.max_pool2d(y, *window, ceil_mode=self.pool_ceil_mode)
        return _convolve(
            self, functional.conv2d_relu_max_pool2d, functional._conv2d_relu_max_pool2d, input, self.weight, self.bias,
            *window, self.pool_ceil_mode,
        )  # fmt: skip


class LinearReLU(Linear):
    """Linear followed by ReLU, in one kernel: the arguments, parameters and state_dict of Linear."""

    @layer()
    def forward(self, input: Tensor) -> Tensor:
        if _torch.Linear.forward is not _LINEAR:
            return functional.relu(super().forward(input))
        return functional.linear_relu(input, self.weight, self.bias)


class LinearChain(_torch.Sequential):
    """Linear layers with ReLU between them, in one kernel: the modules, parameters and state_dict of a Sequential.

    LinearChain(400, 120, 84, 10) is Sequential(Linear(400, 120), ReLU(), Linear(120, 84), ReLU(), Linear(84, 10)).
    Once modules of other classes or hooks are added, all modules run one after the other, as in any Sequential.

    Args:
        widths: features of the input and of each layer, at least two integers.
        bias, device, dtype: as for Linear.

    Raises:
        ValueError: fewer than two widths.
    """

    def __init__(self, *widths, bias=True, device=None, dtype=None):
        if len(widths) < 2:
            raise ValueError(f"LinearChain needs the widths of its input and of at least one layer, got {widths}")
        layers = []
        for features, width in zip(widths, widths[1:]):
            layers += [Linear(features, width, bias, device, dtype), ReLU()]
        super().__init__(*layers[:-1])

    def __getitem__(self, index):
        # Sequential.__getitem__ would make a slice a LinearChain, calling it with modules for widths.
        return _torch.Sequential(*self)[index]

    @layer()
    def forward(self, input):
        modules = list(self)
        linears, relus = modules[0::2], modules[1::2]
        plain = all(is_plain(m, (Linear,)) for m in linears) and all(is_plain(m, (ReLU,)) for m in relus)
        if not plain or len(linears) != len(relus) + 1:
            return super().forward(input)
        return functional.linear_chain(input, [m.weight for m in linears], [m.bias for m in linears])


class CrossEntropyLoss(_torch.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss on tritonnet's kernel: the same arguments.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html
    """

    @layer(_torch.CrossEntropyLoss)
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(
            input, target, self.weight,
            ignore_index=self.ignore_index, reduction=self.reduction, label_smoothing=self.label_smoothing,
        )  # fmt: skip


if TYPE_CHECKING:  # what stand_in does, for type checkers and editors; the names above take precedence
    from torch.nn import *  # type: ignore[assignment, no-redef]  # noqa: F403

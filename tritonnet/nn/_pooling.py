"""The pooling functions of torch.nn.functional on tritonnet's kernels."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as _torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .. import ops
from . import _checks
from ._checks import Pixels


def max_pool2d(
    input: Tensor, kernel_size: Pixels, stride: Pixels | None = None, padding: Pixels = 0, dilation: Pixels = 1,
    ceil_mode: bool = False, return_indices: bool = False,
) -> Any:  # fmt: skip
    """torch.nn.functional.max_pool2d on tritonnet's kernels.

    Args:
        input: (N, C, H, W) or (C, H, W); float64, float32, float16 or bfloat16, any strides. Other dtypes go to torch.
        kernel_size, dilation: pixels, an integer or a pair (height, width).
        stride: the same; None or an empty sequence for kernel_size.
        padding: pixels of -inf on every side, up to half the kernel.
        ceil_mode: include a last window that overlaps the edge.
        return_indices: also return the index of every maximum.

    Returns:
        (N, C, OH, OW) or (C, OH, OW), of input's dtype and memory format; with return_indices also the int64 indices
        ih * W + iw, of the same shape. NaN is the maximum, the last of several; of equal values the first is taken.

    Raises:
        TypeError: an argument is not of a type above.
        RuntimeError: sizes or values do not fit together, as in torch.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.max_pool2d.html
    """
    arguments: Any = (kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    if has_torch_function((input,)):
        return handle_torch_function(max_pool2d, (input,), input, *arguments)
    name = "max_pool2d"
    _checks.check_tensors(name, input=input)
    if not _checks.is_served(input):
        return _torch.max_pool2d(input, *arguments)
    x, unbatched = _checks.as_batch(name, input)
    window = _checks.check_pool2d(name, "", x.shape, kernel_size, stride, padding, dilation, ceil_mode)
    results: tuple[Tensor, ...]
    if return_indices:
        y, code = ops.max_pool2d(x, *window, ceil_mode)
        results = y, ops.max_pool2d_indices(code, x.shape[3], *window)
    else:
        results = (ops.max_pool2d_values(x, *window, ceil_mode),)
    if unbatched:
        results = tuple(_checks.sized(t, t.shape[1:]) for t in results)
    return results if return_indices else results[0]


def max_pool2d_with_indices(
    input: Tensor, kernel_size: Pixels, stride: Pixels | None = None, padding: Pixels = 0, dilation: Pixels = 1,
    ceil_mode: bool = False, return_indices: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """max_pool2d with return_indices=True; the argument of that name is ignored, as in torch."""
    return max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, True)


def avg_pool2d(
    input: Tensor, kernel_size: Pixels, stride: Pixels | None = None, padding: Pixels = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Tensor:  # fmt: skip
    """torch.nn.functional.avg_pool2d on tritonnet's kernels.

    Args:
        input: (N, C, H, W) or (C, H, W); float64, float32, float16 or bfloat16, any strides. Other dtypes go to torch.
        kernel_size: pixels, an integer or a pair (height, width).
        stride: the same; None or an empty sequence for kernel_size.
        padding: pixels of zeros on every side, up to half the kernel.
        ceil_mode: include a last window that overlaps the edge; what lies past the padding does not count.
        count_include_pad: count pixels of padding in the divisor of a window's sum.
        divisor_override: the divisor of every window's sum, or None for the number of its pixels.

    Returns:
        (N, C, OH, OW) or (C, OH, OW), of input's dtype and memory format.

    Raises:
        TypeError: an argument is not of a type above.
        RuntimeError: sizes or values do not fit together, as in torch.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.avg_pool2d.html
    """
    arguments: Any = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    if has_torch_function((input,)):
        return handle_torch_function(avg_pool2d, (input,), input, *arguments)
    name = "avg_pool2d"
    _checks.check_tensors(name, input=input)
    if not _checks.is_served(input):
        return _torch.avg_pool2d(input, *arguments)
    x, unbatched = _checks.as_batch(name, input)
    kernel, strides, pads, _ = _checks.check_pool2d(name, "", x.shape, kernel_size, stride, padding, 1, ceil_mode)
    if not isinstance(count_include_pad, bool):
        raise TypeError(f"{name}: count_include_pad must be a bool, got {count_include_pad!r}")
    divisor = None if divisor_override is None else _checks.divisor(name, divisor_override)
    y = ops.avg_pool2d(x, kernel, strides, pads, ceil_mode, count_include_pad, divisor)
    return _checks.sized(y, y.shape[1:]) if unbatched else y


def adaptive_avg_pool2d(input: Tensor, output_size: int | None | Sequence[int | None]) -> Tensor:
    """torch.nn.functional.adaptive_avg_pool2d on tritonnet's kernels.

    Args:
        input: (N, C, H, W) or (C, H, W); float64, float32, float16 or bfloat16, any strides. Other dtypes go to torch.
        output_size: (OH, OW), or an integer for both; None keeps the size of input. Sizes of 0 go to torch.

    Returns:
        (N, C, OH, OW) or (C, OH, OW), of input's dtype and memory format: the means of the rows floor(oh * H / OH) to
        ceil((oh + 1) * H / OH) and of such columns.

    Raises:
        TypeError: an argument is not of a type above.
        RuntimeError: sizes do not fit together, as in torch.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.adaptive_avg_pool2d.html
    """
    if has_torch_function((input,)):
        return handle_torch_function(adaptive_avg_pool2d, (input,), input, output_size)
    name = "adaptive_avg_pool2d"
    _checks.check_tensors(name, input=input)
    if not _checks.is_served(input):
        return _torch.adaptive_avg_pool2d(input, output_size)  # type: ignore[arg-type]
    x, unbatched = _checks.as_batch(name, input)
    size = _checks.adaptive_size(name, x.shape, output_size)
    if 0 in size:
        return _torch.adaptive_avg_pool2d(input, size)
    y = ops.adaptive_avg_pool2d(x, size)
    return _checks.sized(y, y.shape[1:]) if unbatched else y

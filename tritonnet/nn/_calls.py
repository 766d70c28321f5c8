"""What functions of several files here need: casts and checks of their arguments, and the call of a convolution."""

import torch
import torch.nn.functional as _torch

from . import _checks


def autocast(*tensors):
    """The tensors, cast to autocast's dtype if it is on, as torch does before its own conv2d and linear."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # a meta tensor cannot be asked
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return [t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors]


def as_autocast(t, like):
    """t, cast like the other operands if autocast is on; `like` is one of them."""
    device = like.device.type
    return t if t is None or device == "meta" or not torch.is_autocast_enabled(device) else t.to(like.dtype)


def convolve(name, operator, rest, input, weight, bias, stride, padding, dilation, groups, pad_mode):
    """operator(x, weight, bias, *geometry) of checked arguments, or `rest` of torch's convolution if not served."""
    _checks.check_tensors(name, input=input, weight=weight, **({} if bias is None else {"bias": bias}))
    input, weight, bias = autocast(input, weight, bias)
    if not _checks.is_served(input, weight, bias) or input.shape[-3:-2] == (0,):
        return rest(_torch_conv2d(input, weight, bias, stride, padding, dilation, groups, pad_mode))
    _checks.check_alike(name, input=input, weight=weight, bias=bias)
    if weight.dim() != 4:
        raise RuntimeError(f"{name}: weight must be (OC, C / groups, KH, KW), got size {list(weight.shape)}")
    x, unbatched = _checks.as_batch(name, input)
    stride = _checks.positive(name, "stride", _checks.as_pair(name, "stride", stride))
    dilation = _checks.positive(name, "dilation", _checks.as_pair(name, "dilation", dilation))
    (groups,) = _checks.positive(name, "groups", _checks.as_pair(name, "groups", groups)[:1])
    padding = _checks.conv2d_padding(name, padding, weight.shape[2:], stride, dilation)
    _checks.check_conv2d(name, x, weight, bias, padding, dilation, groups, pad_mode)
    y = operator(x, weight, bias, stride, padding, dilation, groups, pad_mode)
    return _checks.sized(y, y.shape[1:]) if unbatched else y


def _torch_conv2d(input, weight, bias, stride, padding, dilation, groups, pad_mode):
    if pad_mode != "zeros":
        top, bottom, left, right = _checks.conv2d_padding(
            "conv2d", padding, weight.shape[2:], (1, 1), _checks.as_pair("conv2d", "dilation", dilation)
        )
        input, padding = _torch.pad(input, (left, right, top, bottom), mode=pad_mode), 0
    return _torch.conv2d(input, weight, bias, stride, padding, dilation, groups)

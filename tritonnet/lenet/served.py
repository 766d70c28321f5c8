"""Which LeNets, losses and batches the fused launches take: every check, and the reason where they do not."""

from itertools import pairwise

import torch

from .. import nn
from ..dispatch import launchers
from ..nn import functional as F
from ..nn._plain import is_plain

if launchers is not None:
    from ..kernels.conv2d.patches import precision as conv_precision
    from ..kernels.lenet import layout
    from ..kernels.linear import precision as linear_precision

FORMATS = ("ieee", "tf32", "bfloat16")
# (padding of the first convolution, input features of the first linear): height and width of the images.
_SIZES = {(0, 256): 28, (2, 400): 28, (0, 400): 32, (2, 576): 32}
_PADDINGS = {"valid": (0, 0), "same": (2, 2)}
_CONVOLUTIONS = torch.nn.Conv2d, nn.Conv2d, nn.Conv2dReLUMaxPool2d, nn.Conv2dReLU
_LINEARS = torch.nn.Linear, nn.Linear, nn.LinearReLU


class NotServed(Exception):
    """The fused launches do not support a net, a loss or an optimiser; the message says why."""


def default_format(device):
    """The format of products where none is given.

    That is bfloat16 under autocast to it, tf32 if torch's flags allow it for both convolutions and linears, and float32
    ("ieee") otherwise.
    """
    if torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.bfloat16:
        return "bfloat16"
    return "tf32" if conv_precision() == linear_precision() == "tf32" else "ieee"


def side_of(padding, features):
    """Height and width of a LeNet's images, from the padding of its first convolution and the features of fc1.

    Raises:
        NotServed: no LeNet has these.
    """
    pixels = _PADDINGS.get(padding, padding) if isinstance(padding, str) else padding
    pixels = pixels[0] if isinstance(pixels, tuple) else pixels
    if (pixels, features) not in _SIZES:
        raise NotServed(f"no image of 28 or 32 pixels has {features} features after padding by {padding}")
    return _SIZES[pixels, features]


def _check_convolution(name, layer, filters, paddings):
    """The padding in pixels; NotServed unless the layer is a plain 5 x 5 convolution with `filters` filters."""
    if not is_plain(layer, _CONVOLUTIONS):
        raise NotServed(f"{name} is a {type(layer).__name__} or has hooks")
    padding = _PADDINGS.get(layer.padding, layer.padding)
    plain = layer.kernel_size == (5, 5) and layer.stride == layer.dilation == (1, 1) and layer.groups == 1
    if not plain or layer.padding_mode != "zeros" or layer.bias is None or layer.out_channels != filters:
        raise NotServed(f"{name} is not a 5 x 5 convolution with bias to {filters} filters: {layer}")
    if padding[0] != padding[1] or padding[0] not in paddings:
        raise NotServed(f"{name} has padding {layer.padding}")
    return padding[0]


def _check_linear(name, layer, inputs, outputs):
    if not is_plain(layer, _LINEARS):
        raise NotServed(f"{name} is a {type(layer).__name__} or has hooks")
    if layer.bias is None or (layer.in_features, layer.out_features) != (inputs, outputs):
        raise NotServed(f"{name} is not a linear layer with bias from {inputs} to {outputs}: {layer}")


def geometry_of(layers):
    """The kernels' Geometry for conv1, conv2, fc1, fc2 and fc3; NotServed if they are not a LeNet's."""
    conv1, conv2, fc1, fc2, fc3 = layers
    padding = _check_convolution("the first convolution", conv1, 6, (0, 2))
    _check_convolution("the second convolution", conv2, 16, (0,))
    if conv1.in_channels not in (1, 3) or conv2.in_channels != 6:
        raise NotServed(f"the convolutions take {conv1.in_channels} and {conv2.in_channels} channels, not 1 or 3 and 6")
    features = getattr(fc1, "in_features", None)
    size = side_of(padding, features)
    _check_linear("the first linear", fc1, features, 120)
    _check_linear("the second linear", fc2, 120, 84)
    _check_linear("the last linear", fc3, 84, classes := getattr(fc3, "out_features", 0))
    if classes > 1024:
        raise NotServed(f"{classes} classes are more than 1024")
    return layout.Geometry(conv1.in_channels, size, padding, classes)


def parameters_of(layers, geometry, dtypes=(torch.float32,), strided=False):
    """Weights and biases in the kernels' order; NotServed unless they are contiguous, disjoint and of one of `dtypes`.

    With `strided` they may have any strides, such as channels_last, and share memory.
    """
    parameters = [p for layer in layers for p in (layer.weight, layer.bias)]
    dtype, device = parameters[0].dtype, parameters[0].device
    if len(set(map(id, parameters))) < 10:
        raise NotServed("layers share parameters")
    for p, shape in zip(parameters, geometry.shapes):
        ordinary = type(p) is torch.nn.Parameter and p.layout == torch.strided and not (p.is_inference() or p.is_neg())
        if not ordinary or not (strided or p.is_contiguous()):
            raise NotServed("a parameter is not an ordinary one")
        if p.shape != shape:
            raise NotServed(f"a parameter has shape {list(p.shape)}, but its layer says {list(shape)}")
        if p.dtype != dtype or p.device != device or dtype not in dtypes:
            raise NotServed(f"parameters of {p.dtype} on {p.device}")
    places = sorted((p.data_ptr(), p.data_ptr() + p.nbytes) for p in parameters)
    if not strided and any(end > start for (_, end), (start, _) in pairwise(places)):
        raise NotServed("parameters share their memory")
    return parameters


def ignored_target(loss):
    """The ignore_index of a plain mean cross-entropy; NotServed for any other loss."""
    if loss in (F.cross_entropy, torch.nn.functional.cross_entropy):
        return -100
    is_module = isinstance(loss, torch.nn.Module)
    if not is_module or not is_plain(loss, (torch.nn.CrossEntropyLoss, nn.CrossEntropyLoss)):
        raise NotServed(f"the loss is a {getattr(loss, '__name__', type(loss).__name__)} or has hooks")
    if loss.weight is not None or loss.reduction != "mean" or loss.label_smoothing:
        raise NotServed("the loss has class weights, label smoothing or no mean")
    return loss.ignore_index


def check_batch(images, labels, geometry, pixels):
    """Raises TypeError or ValueError for a batch that the launches do not take; `pixels` as in FusedLaunches."""
    C, size = geometry.channels, geometry.size
    raw = images.dtype == torch.uint8
    if raw and pixels is None:
        raise TypeError("images of dtype uint8 need a tritonnet.LeNet, which knows their mean and deviation")
    if not raw and images.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"images must be float32, float16, bfloat16 or uint8, got {images.dtype}")
    some = images.dim() == 4 and len(images) > 0
    side = size - 2 * pixels(images).frame if raw and some else size
    if not some or tuple(images.shape[1:]) != (C, side, side):
        raise ValueError(f"images must be (N, {C}, {side}, {side}) with N > 0, got {list(images.shape)}")
    if labels.shape != images.shape[:1] or labels.dtype not in (torch.int64, torch.uint8):
        raise ValueError(
            f"labels must be ({len(images)}) of int64 or uint8, got {list(labels.shape)} of {labels.dtype}"
        )

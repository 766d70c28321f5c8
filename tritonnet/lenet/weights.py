"""Which LeNets have launches of their own, where those find their weights, and the whole forward in two launches."""

import weakref
from itertools import pairwise, repeat
from operator import attrgetter, is_, itemgetter

import torch

from .. import nn
from ..dispatch import implementation, launchers, on_device
from ..nn._plain import _HOOKS, global_hooks, is_plain
from ..registration import watched

if launchers is not None:
    from ..kernels.conv2d.patches import precision as conv_precision
    from ..kernels.lenet import forward as lenet_forward
    from ..kernels.lenet import layout
    from ..kernels.lenet import pack as lenet_pack
    from ..kernels.linear import precision as linear_precision

_ADDRESS, _STRIDE = torch.Tensor.data_ptr, torch.Tensor.stride
_REFERRED = weakref.ref.__call__

FORMATS = ("ieee", "tf32", "bfloat16")
# Pixels a side by what the first convolution pads with and the features of the first linear.
_SIZES = {(0, 256): 28, (2, 400): 28, (0, 400): 32, (2, 576): 32}


_PADDINGS = {"valid": (0, 0), "same": (2, 2)}
_CONVOLUTIONS = torch.nn.Conv2d, nn.Conv2d, nn.Conv2dReLUMaxPool2d, nn.Conv2dReLU
_LINEARS = torch.nn.Linear, nn.Linear, nn.LinearReLU


class NotServed(Exception):
    """Why a net, a loss or an optimiser has no launches of its own."""


def default_format(device):
    """What products are taken in unless told: bfloat16 under autocast to it, tf32 where torch's flags allow it to both
    convolutions and linears, full float32 otherwise."""
    if torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.bfloat16:
        return "bfloat16"
    return "tf32" if conv_precision() == linear_precision() == "tf32" else "ieee"


def side_of(padding, features):
    """Pixels a side of a LeNet's images, by the padding of its first convolution and the features of its first linear.

    Raises:
        NotServed: no LeNet has these.
    """
    pixels = _PADDINGS.get(padding, padding) if isinstance(padding, str) else padding
    pixels = pixels[0] if isinstance(pixels, tuple) else pixels
    if (pixels, features) not in _SIZES:
        raise NotServed(f"{features} features after padding by {padding} are those of no image of 28 or 32 pixels")
    return _SIZES[pixels, features]


def _check_convolution(name, layer, filters, paddings):
    """The padding in pixels; NotServed unless it is a plain 5 x 5 convolution to so many filters."""
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
    """The kernels' Geometry of conv1, conv2, fc1, fc2 and fc3; NotServed if they are not a LeNet's."""
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
    """Weights and biases in the kernels' order; NotServed if they are not of one of the dtypes, apart and dense.

    With `strided` they may have other strides, as weights in channels_last have, and lie in the same place.
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
            raise NotServed(f"a parameter of shape {list(p.shape)} is not of {list(shape)}, which its layer says")
        if p.dtype != dtype or p.device != device or dtype not in dtypes:
            raise NotServed(f"parameters of {p.dtype} on {p.device}")
    places = sorted((p.data_ptr(), p.data_ptr() + p.nbytes) for p in parameters)
    if not strided and any(end > start for (_, end), (start, _) in pairwise(places)):
        raise NotServed("parameters share their memory")
    return parameters


def buffers(geometry, format, device):
    """(plain, packed): what a forward reads its weights from, see kernels/lenet/layout.py."""
    plain = torch.empty(geometry.plain[-1], dtype=torch.float32, device=device)
    dtype = torch.bfloat16 if format == "bfloat16" else torch.float32
    return plain, torch.empty(geometry.packed[-1], dtype=dtype, device=device)


class _Seen:
    """Layers that were found to be a LeNet's, where their parameters lie, and all that this was told by.

    To look whether any of it has changed takes a third of the time that it takes to be told again. The values of the
    parameters are no part of it: each forward reads them anew.
    """

    convolution = itemgetter(
        *_HOOKS, "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "in_channels", "out_channels"
    )  # fmt: skip
    linear = itemgetter(*_HOOKS, "in_features", "out_features")
    # With their strides another number of bytes is another shape; on another device they lie elsewhere.
    kind = attrgetter("dtype", "nbytes")

    def __init__(self, layers, places):
        self.geometry = geometry_of(layers)
        parameters = parameters_of(layers, self.geometry, (torch.float32, torch.bfloat16), strided=True)
        self.dtype, self.device = parameters[0].dtype, parameters[0].device
        # A hook on a parameter may have the model: held here, it would never go.
        self.parameters = list(map(weakref.ref, parameters))
        rows = torch.tensor(list(map(layout.place, parameters)), dtype=torch.int64, device="cpu")
        # The same table for as long as it can be: a CUDA graph that somebody has captured reads it at every replay.
        self.places = places
        if places is None or places.device != self.device:
            with torch.inference_mode(False):
                self.places = torch.empty(rows.shape, dtype=rows.dtype, device=self.device)
        self.places.copy_(rows)
        # Hooks are added to dicts that stay the same: none of them is kept.
        self.attributes = [tuple({} if isinstance(a, dict) else a for a in part) for part in self._attributes(layers)]
        self.before = self._others(layers, parameters)

    def _attributes(self, layers):
        conv1, conv2, *linears = map(vars, layers)
        return [self.convolution(conv1), self.convolution(conv2), *map(self.linear, linears)]

    def _others(self, layers, parameters):
        types = [
            (id(layer), type(layer), "forward" in (own := vars(layer)), "_conv_forward" in own) for layer in layers
        ]
        where = list(map(_ADDRESS, parameters)), list(map(_STRIDE, parameters))
        return types, list(map(self.kind, parameters)), where

    def still(self, layers):
        """Whether it would be found to be the same again."""
        parameters = [layer._parameters.get(name) for layer in layers for name in ("weight", "bias")]
        if any(map(is_, parameters, repeat(None))) or not all(map(is_, parameters, map(_REFERRED, self.parameters))):
            return False
        same = self._others(layers, parameters) == self.before
        return same and self._attributes(layers) == self.attributes and not global_hooks()


# By net; they go when it goes, and are no part of its state.
_SEEN: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _seen(model, layers):
    """The _Seen of a model; NotServed if its layers are not a LeNet's."""
    seen = _SEEN.get(model)
    if seen is None or not seen.still(layers):
        seen = _SEEN[model] = _Seen(layers, seen and seen.places)
    return seen


def predict(model, layers, images, pixels):
    """The logits of a LeNet in two launches, or None where its layers have to compute them.

    The first packs the weights, at every call: nothing tells whether anybody has written to them since the last.

    Args:
        layers: conv1, conv2, fc1, fc2 and fc3 of the model.
        images: (N, channels, size, size) of the parameters' dtype, float32 or bfloat16, or what `pixels` takes.
        pixels: function of uint8 images that gives how the kernel reads them.
    """
    if type(images) is not torch.Tensor or images.dim() != 4 or torch.compiler.is_compiling():
        return None
    if launchers is None or watched() or implementation(images) is not launchers:
        return None
    try:
        seen = _seen(model, layers)
    except NotServed:
        return None
    geometry, dtype, device = seen.geometry, seen.dtype, seen.device
    raw, (N, C, H, W) = images.dtype == torch.uint8, images.shape
    if torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) != torch.bfloat16:
        return None
    if images.device != device or C != geometry.channels or N == 0:
        return None
    if not raw and (images.dtype != dtype or H != geometry.size or W != geometry.size):
        return None
    read = pixels(images) if raw else lenet_forward.Pixels()
    if raw and H + 2 * read.frame != geometry.size:
        return None
    format = "bfloat16" if dtype == torch.bfloat16 else default_format(device)
    logits = images.new_empty(N, geometry.classes, dtype=torch.bfloat16 if format == "bfloat16" else dtype)
    with on_device(device):
        plain, packed = buffers(geometry, format, device)
        lenet_pack.pack(seen.places, dtype, plain, packed, geometry, format)
        lenet_forward.forward(
            images.resolve_neg().contiguous(), None, plain, packed, geometry, format,
            read, lenet_forward.activations(N, geometry, format, device, train=False), logits,
        )  # fmt: skip
    return logits

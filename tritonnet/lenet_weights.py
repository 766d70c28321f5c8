"""Which LeNets have launches of their own, their weights as those read them, and the whole forward in one launch."""

import math
import weakref
from operator import attrgetter, itemgetter

import torch

from . import nn
from .dispatch import implementation, launchers, on_device
from .nn._plain import _HOOKS, global_hooks, is_plain
from .registration import watched

if launchers is not None:
    from .kernels import lenet, lenet_forward, lenet_update
    from .kernels.conv2d import precision as conv_precision
    from .kernels.linear import precision as linear_precision

_ADDRESS, _VERSION = torch.Tensor.data_ptr, attrgetter("_version")

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
    return lenet.Geometry(conv1.in_channels, size, padding, classes)


def parameters_of(layers, dtypes=(torch.float32,), strided=False):
    """Weights and biases in the kernels' order; NotServed if they are not of one of the dtypes, apart and dense.

    With `strided` they may have other strides, as weights in channels_last have.
    """
    parameters = [p for layer in layers for p in (layer.weight, layer.bias)]
    dtype, device = parameters[0].dtype, parameters[0].device
    if len(set(map(id, parameters))) < 10:
        raise NotServed("layers share parameters")
    for p in parameters:
        if type(p) is not torch.nn.Parameter or p.is_inference() or not (strided or p.is_contiguous()):
            raise NotServed("a parameter is not an ordinary one")
        if p.dtype != dtype or p.device != device or dtype not in dtypes:
            raise NotServed(f"parameters of {p.dtype} on {p.device}")
    return parameters


class Weights:
    """A net's parameters in one buffer, and copies of its weights packed for the products of each format."""

    def __init__(self, parameters, geometry):
        self.parameters, self.geometry = parameters, geometry
        self.device = parameters[0].device
        self.flat = torch.zeros(geometry.flat[-1], device=self.device)
        self.views = self.split(self.flat)
        self._places = [view.data_ptr() for view in self.views]
        # Which partial sums are added up makes no difference to how weights are packed.
        self._table = lenet.table(geometry, lenet.Splits(1, 1, 1), self.device)
        self._packed, self._own_versions = {}, False

    def split(self, buffer):
        """The part of each parameter in a buffer like `flat`, in the parameter's shape."""
        shapes = self.geometry.shapes
        return [buffer[i : i + math.prod(shape)].view(shape) for i, shape in zip(self.geometry.flat, shapes)]

    def adopt(self):
        """Make the parameters views of the buffer; they keep their values, and stay the same objects."""
        with torch.no_grad():
            for p, view in zip(self.parameters, self.views):
                if p.device != self.device or p.dtype != torch.float32:
                    raise NotServed(f"parameters have been moved from float32 on {self.device}")
                if p.data_ptr() != view.data_ptr():
                    view.copy_(p)
                    p.data = view

    def _seen(self):
        return list(map(_ADDRESS, self.parameters)), list(map(_VERSION, self.parameters))

    def mark(self, format):
        """Note that parameters and the format's packed copies were written together, as one launch does."""
        torch.autograd.graph.increment_version(self.parameters)
        packed, (addresses, versions) = self._packed[format]
        versions = [version + 1 for version in versions]
        if not self._own_versions:
            # Parameters made of one tensor count together.
            now = list(map(_VERSION, self.parameters))
            self._own_versions, versions = now == versions, now
        self._packed[format] = packed, (addresses, versions)

    def packed(self, format, adopt=False):
        """The packed copies, made anew if anybody has changed the parameters, which may be made views first."""
        packed, seen = self._packed.get(format, (None, None))
        now = self._seen()
        if adopt and now[0] != self._places:
            self.adopt()
            now = self._seen()
        if seen == now:
            return packed
        if packed is None:
            dtype = torch.bfloat16 if format == "bfloat16" else torch.float32
            packed = torch.zeros(self.geometry.packed[-1], dtype=dtype, device=self.device)
        with torch.no_grad():
            for p, view in zip(self.parameters, self.views):
                if p.data_ptr() != view.data_ptr():
                    view.copy_(p)
        lenet_update.update(self.flat, packed, self.geometry, self._table)
        self._packed[format] = packed, now
        return packed


# By net; they go when it goes, and are no part of its state.
_WEIGHTS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def weights_of(model, parameters, geometry):
    """The Weights of a model."""
    weights = _WEIGHTS.get(model)
    same = weights is not None and weights.geometry == geometry and weights.device == parameters[0].device
    if not same or any(map(lambda p, q: p is not q, weights.parameters, parameters)):
        weights = _WEIGHTS[model] = Weights(parameters, geometry)
    return weights


class _Seen:
    """Layers that were found to be a LeNet's, their geometry and parameters, and all that this was told by.

    To look whether any of it has changed takes a third of the time that it takes to be told again.
    """

    convolution = itemgetter(
        *_HOOKS, "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "in_channels", "out_channels"
    )  # fmt: skip
    linear = itemgetter(*_HOOKS, "in_features", "out_features")
    kind = attrgetter("dtype", "device")

    def __init__(self, layers):
        self.geometry = geometry_of(layers)
        # Their values are copied and packed when they have changed, from whatever order they lie in.
        self.parameters = parameters_of(layers, (torch.float32, torch.bfloat16), strided=True)
        self.dtype, self.device = self.kind(self.parameters[0])
        # Hooks are added to dicts that stay the same: none of them is kept.
        self.attributes = [tuple({} if isinstance(a, dict) else a for a in part) for part in self._attributes(layers)]
        self.before = self._others(layers)

    def _attributes(self, layers):
        conv1, conv2, *linears = map(vars, layers)
        return [self.convolution(conv1), self.convolution(conv2), *map(self.linear, linears)]

    def _others(self, layers):
        ids = [id(layer._parameters.get(name)) for layer in layers for name in ("weight", "bias")]
        types = [(id(layer), type(layer), "forward" in vars(layer)) for layer in layers]
        return ids, types, list(map(self.kind, self.parameters))

    def still(self, layers):
        """Whether it would be found to be the same again."""
        same = self._others(layers) == self.before and self._attributes(layers) == self.attributes
        return same and not global_hooks()


_SEEN: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _seen(model, layers):
    """The _Seen of a model; NotServed if its layers are not a LeNet's."""
    seen = _SEEN.get(model)
    if seen is None or not seen.still(layers):
        _SEEN.pop(model, None)
        seen = _SEEN[model] = _Seen(layers)
    return seen


def predict(model, layers, images, pixels):
    """The logits of a LeNet in one launch, or None where its layers have to compute them.

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
    if images.device != device or C != geometry.channels or N == 0:
        return None
    if not raw and (images.dtype != dtype or H != geometry.size or W != geometry.size):
        return None
    format = "bfloat16" if dtype == torch.bfloat16 else default_format(device)
    weights = weights_of(model, seen.parameters, geometry)
    logits = images.new_empty(N, geometry.classes, dtype=torch.bfloat16 if format == "bfloat16" else dtype)
    with on_device(device):
        lenet_forward.forward(
            images.contiguous(), None, weights.flat, weights.packed(format), geometry, format,
            pixels(images) if raw else lenet_forward.Pixels(),
            lenet_forward.activations(N, geometry, format, device, train=False), logits,
        )  # fmt: skip
    return logits

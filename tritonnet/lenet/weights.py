"""A LeNet's evaluation in two launches: buffers for the packed weights, and a cache of the checks of its layers."""

import weakref
from itertools import repeat
from operator import attrgetter, is_, itemgetter

import torch

from ..dispatch import implementation, launchers, on_device
from ..nn._plain import _HOOKS, global_hooks
from ..registration import watched
from .served import NotServed, default_format, geometry_of, parameters_of

if launchers is not None:
    from ..kernels.lenet import forward as lenet_forward
    from ..kernels.lenet import layout
    from ..kernels.lenet import pack as lenet_pack

_ADDRESS, _STRIDE = torch.Tensor.data_ptr, torch.Tensor.stride
_REFERRED = weakref.ref.__call__


def buffers(geometry, format, device):
    """(plain, packed): the buffers that a forward reads its weights from, see kernels/lenet/layout.py."""
    plain = torch.empty(geometry.plain[-1], dtype=torch.float32, device=device)
    dtype = torch.bfloat16 if format == "bfloat16" else torch.float32
    return plain, torch.empty(geometry.packed[-1], dtype=dtype, device=device)


class _Seen:
    """Layers that passed the checks for a LeNet, the addresses of their parameters, and all that was checked.

    Checking for changes takes a third of the time of a full check. The parameters' values are not part of it: each
    forward reads them anew.
    """

    convolution = itemgetter(
        *_HOOKS, "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "in_channels", "out_channels"
    )  # fmt: skip
    linear = itemgetter(*_HOOKS, "in_features", "out_features")
    # A change of shape shows in the strides or in the size in bytes, and a change of device in the address.
    kind = attrgetter("dtype", "nbytes")

    def __init__(self, layers, places):
        self.geometry = geometry_of(layers)
        parameters = parameters_of(layers, self.geometry, (torch.float32, torch.bfloat16), strided=True)
        self.dtype, self.device = parameters[0].dtype, parameters[0].device
        # Weak references: a hook on a parameter may refer to the model, which would then never be freed.
        self.parameters = list(map(weakref.ref, parameters))
        rows = torch.tensor(list(map(layout.place, parameters)), dtype=torch.int64, device="cpu")
        # The table is reused if possible: a CUDA graph that a user has captured reads it at every replay.
        self.places = places
        if places is None or places.device != self.device:
            with torch.inference_mode(False):
                self.places = torch.empty(rows.shape, dtype=rows.dtype, device=self.device)
        self.places.copy_(rows)
        # Hooks are added to the same dicts in place, so each dict is later compared with an empty one.
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
        """Whether a full check would give the same result."""
        parameters = [layer._parameters.get(name) for layer in layers for name in ("weight", "bias")]
        if any(map(is_, parameters, repeat(None))) or not all(map(is_, parameters, map(_REFERRED, self.parameters))):
            return False
        same = self._others(layers, parameters) == self.before
        return same and self._attributes(layers) == self.attributes and not global_hooks()


# The _Seen of each model, freed with the model and not part of its state.
_SEEN: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _seen(model, layers):
    """The current _Seen of a model; NotServed if its layers are not a LeNet's."""
    seen = _SEEN.get(model)
    if seen is None or not seen.still(layers):
        seen = _SEEN[model] = _Seen(layers, seen and seen.places)
    return seen


def predict(model, layers, images, pixels):
    """The logits of a LeNet in two launches, or None where its layers have to compute them.

    The first launch packs the weights at every call, as they may have been written to since the last one.

    Args:
        layers: conv1, conv2, fc1, fc2 and fc3 of the model.
        images: (N, channels, size, size) of the parameters' dtype, float32 or bfloat16, or uint8.
        pixels: function of uint8 images that returns how the kernel reads them.
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

"""Forward and input gradient of convolutions with few channels: the choice between product.py and lanes.py."""

from .. import shapes
from .._common import INTERPRETED, compute_capability, number_format
from ..conv2d.patches import precision
from ..epilogue import NONE
from . import lanes, product
from .cut import Taps, in_planes, readable, unit_of


def _lanes_form(image, out, *sizes):
    """The Form of lanes.py where it takes fewer cycles than a product, or None.

    AMD's matrix units have a format for full float32, so that a product is faster there.
    """
    if not in_planes(image) or shapes.is_channels_last(out) or not (INTERPRETED or compute_capability()):
        return None
    unit = unit_of(image, False)
    form = lanes.form_for(*sizes, unit)
    return form if form and form.cycles < product.form_for("ieee", 4, *sizes, False, False, unit).cycles else None


def _launch(image, w, bias, out, gradient, stride, padding, epilogue=NONE):
    if out.numel() == 0:
        return out
    products, (tensors, values) = precision(), epilogue.of(out)
    format = number_format(image.dtype, products)
    sizes = gradient, image.shape[1], out.shape[1], tuple(out.shape[2:]), tuple(w.shape[2:]), stride, padding
    form = _lanes_form(image, out, *sizes) if format == "ieee" else None
    if form:
        taps = Taps.of(form.cut, gradient, stride, padding, 1)
        lanes.convolve((image, w, bias, out, *tensors), form, gradient, taps, values)
        return out

    image, pixels, unit = readable(image, innermost=True)
    pixels_out = shapes.is_channels_last(out)
    form = product.form_for(format, image.itemsize, *sizes, pixels, pixels_out, unit)
    taps = Taps.of(form.cut, gradient, stride, padding, image.shape[1] if pixels else 1)
    placed = w.new_empty(form.columns, form.length)
    product.place_filters((w, placed), form, gradient, pixels, pixels_out, taps)
    product.convolve((image, placed, bias, out, *tensors), form, pixels, pixels_out, values, products)
    return out


def forward(x, w, bias, stride, padding, epilogue=NONE):
    """x (N, C, H, W), w (OC, C, KH, KW), bias (OC) or None -> y (N, OC, OH, OW), for padding with zeros."""
    return _launch(x, w, bias, shapes.conv2d(x, w, stride, padding, (1, 1)), False, stride, padding, epilogue)


def input_grad(dy, w, size, stride, padding):
    """dy (N, OC, OH, OW), w (OC, C, KH, KW) -> dx of `size` (N, C, H, W)."""
    return _launch(dy, w, None, shapes.conv2d_input_grad(dy, w, size), True, stride, padding)

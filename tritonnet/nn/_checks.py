"""Checks of the functions' arguments, with torch's exception types."""

import operator
from collections.abc import Sequence

import torch

from ..kernels import activations, shapes

Pixels = int | Sequence[int]

# The dtypes of the kernels; torch serves the others.
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_tensors(function, **tensors):
    for name, t in tensors.items():
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{function}: {name} must be a Tensor, got {type(t).__name__}")


def check_alike(function, **tensors):
    """Raises unless all are of one dtype and on one device, as torch does."""
    (first_name, first), *rest = ((name, t) for name, t in tensors.items() if t is not None)
    for name, t in rest:
        if t.dtype != first.dtype:
            raise RuntimeError(
                f"{function}: {first_name} and {name} must have the same dtype, got {first.dtype} and {t.dtype}"
            )
        if t.device != first.device:
            raise RuntimeError(
                f"{function}: {first_name} and {name} must be on the same device, got {first.device} and {t.device}"
            )


def is_served(*tensors):
    """Whether the kernels or their reference take these tensors; otherwise torch's own operators do."""
    for t in tensors:
        if t is not None and (t.dtype not in _DTYPES or t.layout is not torch.strided or t.is_nested):
            return False
    return not _in_onnx_export()


def _in_onnx_export():
    """Whether torch.onnx is exporting, which has translations of torch's own operators alone."""
    # The first two take less time than the third, which is true in them alone. The first is what
    # torch.compiler.is_exporting() returns: by a call of that, Dynamo tells code that behaves otherwise when compiled,
    # which a fused model leaves to Python (compiler.py).
    return (torch.compiler._is_exporting_flag or torch.jit.is_tracing()) and torch.onnx.is_in_onnx_export()


def as_pair(function, name, value):
    """value, an integer or a sequence of one or two integers, as a pair."""
    values = value if isinstance(value, (tuple, list)) else (value,)
    if len(values) not in (1, 2):
        raise RuntimeError(f"{function}: {name} must be an integer or a pair of them, got {value}")
    if any(isinstance(v, (bool, float)) for v in values):
        raise TypeError(f"{function}: {name} must be made of integers, got {value}")
    try:
        values = [v if isinstance(v, (int, torch.SymInt)) else operator.index(v) for v in values]
    except TypeError:
        raise TypeError(f"{function}: {name} must be made of integers, got {value!r}") from None
    return (values[0], values[-1])


def positive(function, name, pair, least=1):
    if any(v < least for v in pair):
        raise RuntimeError(f"{function}: {name} must be {'positive' if least else 'non-negative'}, got {pair}")
    return pair


def as_batch(function, input):
    """input as (N, C, H, W), and whether it was unbatched."""
    if input.dim() not in (3, 4):
        raise RuntimeError(
            f"{function}: input must be (N, C, H, W) or, unbatched, (C, H, W), got size {list(input.shape)}"
        )
    return (input.unsqueeze(0), True) if input.dim() == 3 else (input, False)


def sized(t, size):
    """t in another size, but not as a view: in-place operations on a result depend on whether it is one."""
    if torch.jit.is_tracing():
        return t.view(size)  # of the functions only this one records sizes that depend on the input
    return torch.ops.aten._unsafe_view.default(t, size)


def conv2d_padding(name, padding, kernel, stride, dilation):
    """(top, bottom, left, right)."""
    if padding == "valid":
        return (0, 0, 0, 0)
    if padding == "same":
        if any(s != 1 for s in stride):
            raise RuntimeError(f"{name}: padding='same' needs stride 1, got stride {stride}")
        # An odd pixel goes to the bottom or to the right.
        (top, bottom), (left, right) = ((d * (k - 1) // 2, (d * (k - 1) + 1) // 2) for k, d in zip(kernel, dilation))
        return (top, bottom, left, right)
    if isinstance(padding, str):
        raise RuntimeError(f"{name}: padding must be 'same', 'valid' or integers, got {padding!r}")
    h, w = positive(name, "padding", as_pair(name, "padding", padding), least=0)
    return (h, h, w, w)


def check_conv2d(name, x, weight, bias, padding, dilation, groups, pad_mode):
    (OC, C, KH, KW), (H, W) = weight.shape, x.shape[2:]
    if x.shape[1] != C * groups:
        raise RuntimeError(
            f"{name}: input must have {C * groups} channels for weight {list(weight.shape)} and groups={groups}, "
            f"got {x.shape[1]} in size {list(x.shape)}"
        )
    if OC < 1 or OC % groups != 0:
        raise RuntimeError(f"{name}: weight must have a multiple of groups={groups} filters, got {OC}")
    if bias is not None and tuple(bias.shape) != (OC,):
        raise RuntimeError(f"{name}: bias must have size [{OC}], one for each filter, got {list(bias.shape)}")
    if KH < 1 or KW < 1 or H < 1 or W < 1:
        raise RuntimeError(
            f"{name}: only batch and channels may be empty, got input {list(x.shape)} and weight {list(weight.shape)}"
        )
    top, bottom, left, right = padding
    extent = (dilation[0] * (KH - 1) + 1, dilation[1] * (KW - 1) + 1)
    if H + top + bottom < extent[0] or W + left + right < extent[1]:
        raise RuntimeError(
            f"{name}: the dilated kernel must fit the padded input, got kernel {extent} over "
            f"({H + top + bottom}, {W + left + right})"
        )
    # Padding is read from the image: a reflection leaves out the edge pixel, a circular copy may take all of it.
    most = {"reflect": (H - 1, W - 1), "circular": (H, W)}.get(pad_mode)
    if most and (max(top, bottom) > most[0] or max(left, right) > most[1]):
        raise RuntimeError(f"{name}: padding_mode={pad_mode!r} takes padding up to {most}, got {padding}")


def check_pool2d(name, prefix, images, kernel, stride, padding, dilation, ceil_mode):
    """The four pairs of a window over images of size `images`; names in messages start with `prefix`."""
    if not isinstance(ceil_mode, bool):
        raise TypeError(f"{name}: {prefix}ceil_mode must be a bool, got {ceil_mode!r}")
    if any(size == 0 for size in images[1:]):
        raise RuntimeError(f"{name}: only the batch of input may be empty, got size {list(images)}")

    def pair(argument, value, least=1):
        return positive(name, prefix + argument, as_pair(name, prefix + argument, value), least)

    kernel = pair("kernel_size", kernel)
    no_stride = stride is None or (isinstance(stride, (tuple, list)) and not stride)
    stride = kernel if no_stride else pair("stride", stride)
    padding, dilation = pair("padding", padding, least=0), pair("dilation", dilation)
    if any(p > k // 2 for p, k in zip(padding, kernel)):
        raise RuntimeError(
            f"{name}: {prefix}padding must be at most half of {prefix}kernel_size {kernel}, got {padding}"
        )
    size = shapes.max_pool2d_size(images[2:], kernel, stride, padding, dilation, ceil_mode)
    if size[0] < 1 or size[1] < 1:
        raise RuntimeError(
            f"{name}: {prefix}kernel_size {kernel} is too large for images of size {list(images)}, "
            f"the output would be {size}"
        )
    return kernel, stride, padding, dilation


def divisor(name, value):
    """divisor_override as an integer."""
    value, _ = as_pair(name, "divisor_override", (value,))
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: divisor_override must fit 64 bits, got {value}")
    if value == 0:
        raise RuntimeError(f"{name}: divisor_override must not be zero, got {value}")
    return value


def adaptive_size(name, images, size):
    """The rows and columns of bins that cut images of size `images`, with the images' own for None."""
    if isinstance(size, (tuple, list)):
        if len(size) != 2:
            raise RuntimeError(f"{name}: output_size must be an integer or a pair of them, got {size}")
        pair = [images[i + 2] if n is None else n for i, n in enumerate(size)]
    elif size is None:
        raise TypeError(f"{name}: output_size must be an integer or a pair of integers or None, got {size}")
    else:
        pair = [size]
    if images[2] == 0 or images[3] == 0:
        raise RuntimeError(f"{name}: only batch and channels of input may be empty, got size {list(images)}")
    return positive(name, "output_size", as_pair(name, "output_size", pair), least=0)


def check_linear(name, input, weight, bias):
    if input.dim() < 1 or weight.dim() not in (1, 2) or (weight.dim() == 1 and bias is not None):
        raise RuntimeError(
            f"{name}: input must be (..., K) and weight (N, K), or (K) without bias, "
            f"got input {list(input.shape)}, weight {list(weight.shape)} and {'a' if bias is not None else 'no'} bias"
        )
    if input.shape[-1] != weight.shape[-1]:
        raise RuntimeError(
            f"{name}: the last sizes of input and weight must agree, got {list(input.shape)} and {list(weight.shape)}"
        )


def check_linear_chain(name, input, weights, biases):
    if input.dim() < 1:
        raise RuntimeError(f"{name}: input must be (..., K), got size {list(input.shape)}")
    features = input.shape[-1]
    for i, (w, b) in enumerate(zip(weights, biases)):
        if w.dim() != 2 or w.shape[1] != features:
            raise RuntimeError(
                f"{name}: weights[{i}] must be (N, {features}) for the {features} features before it, "
                f"got size {list(w.shape)}"
            )
        features = w.shape[0]
        if b is not None and tuple(b.shape) != (features,):
            raise RuntimeError(f"{name}: biases[{i}] must have size [{features}], got {list(b.shape)}")


def check_activation(name, eps, activation, slope):
    for argument, value in (("eps", eps), ("slope", slope)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: {argument} must be a float, got {value!r}")
    if not isinstance(activation, str):
        raise TypeError(f"{name}: activation must be a str, got {activation!r}")
    if activation not in activations.NAMES:
        raise ValueError(f"{name}: activation must be one of {activations.NAMES}, got {activation!r}")


def check_epilogue(name, x, size, mean, var, scale, shift, residual):
    """The tensors of an epilogue whose result has x's dtype and this size, with channels in its second dimension.

    For one of matrices with more leading dimensions these are the last.
    """
    vectors = {"mean": mean, "var": var, "scale": scale, "shift": shift}
    added = {argument: t for argument, t in {**vectors, "residual": residual}.items() if t is not None}
    check_tensors(name, **added)
    for argument, t in added.items():
        if argument != "residual":
            channels = size[-1] if name == "linear_epilogue" else size[1] if len(size) > 1 else 0
            if tuple(t.shape) != (channels,):
                raise RuntimeError(f"{name}: {argument} must have size [{channels}], got {list(t.shape)}")
            if not t.is_floating_point():
                raise RuntimeError(f"{name}: {argument} must be of a floating dtype, got {t.dtype}")
        elif tuple(t.shape) != tuple(size) or t.dtype != x.dtype:
            raise RuntimeError(
                f"{name}: residual must be {x.dtype} of size {list(size)} like the result, "
                f"got {t.dtype} of size {list(t.shape)}"
            )
        if t.device != x.device:
            raise RuntimeError(f"{name}: {argument} must be on input's device {x.device}, got {t.device}")


def check_squeeze_excite(name, input, weight1, bias1, weight2, bias2):
    C, R = input.shape[1], weight1.shape[0] if weight1.dim() else 0
    if C < 1 or R < 1 or 0 in input.shape[2:]:
        raise RuntimeError(
            f"{name}: only the batch of input may be empty, got input {list(input.shape)} and weight1 "
            f"{list(weight1.shape)}"
        )
    for argument, t, size in (
        ("weight1", weight1, [R, C]), ("bias1", bias1, [R]), ("weight2", weight2, [C, R]), ("bias2", bias2, [C]),
    ):  # fmt: skip
        pixel = [1, 1] if t is not None and t.dim() == 4 and len(size) == 2 else []
        if t is not None and list(t.shape) != size + pixel:
            raise RuntimeError(f"{name}: {argument} must have size {size}, got {list(t.shape)}")

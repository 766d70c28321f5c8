"""The batching rules for torch.func.vmap: a batch becomes more images if the filters are shared, and groups if not.

A rule takes an object with the batch size, the batch dimension of each argument (None for one without) and the
arguments, and returns the results and their batch dimensions. All rules call the same operators.
"""

import math

import torch

from . import ops
from .kernels.activations import SLOPE
from .kernels.cross_entropy import targets
from .kernels.linear_chain import layered
from .reference import update_running
from .registration import register_batching


def _front(info, t, dim):
    """t with the batch dimension first, expanded if it has none."""
    return t.movedim(dim, 0) if dim is not None else t.expand(info.batch_size, *t.shape)


def _as_images(t):
    """(B, N, ...) -> (B * N, ...)."""
    return t.flatten(0, 1)


def _as_channels(t):
    """(B, N, C, ...) -> (N, B * C, ...)."""
    return t.transpose(0, 1).flatten(1, 2)


@register_batching(ops.conv2d)
def _conv2d(info, dims, x, w, bias, stride, padding, dilation, groups, pad_mode):
    B, (x_dim, w_dim, bias_dim) = info.batch_size, dims[:3]
    x = _front(info, x, x_dim)
    if w_dim is not None:
        w, bias = _as_images(_front(info, w, w_dim)), None if bias is None else _as_images(_front(info, bias, bias_dim))
        y = ops.conv2d(_as_channels(x), w, bias, stride, padding, dilation, B * groups, pad_mode)
        return y.unflatten(1, (B, -1)), 1
    fused, rest = (bias, None) if bias_dim is None else (None, _front(info, bias, bias_dim))
    y = ops.conv2d(_as_images(x), w, fused, stride, padding, dilation, groups, pad_mode).unflatten(0, (B, x.shape[1]))
    return (y if rest is None else y + rest[:, None, :, None, None]), 0


@register_batching(ops.conv2d_epilogue)
def _conv2d_epilogue(info, dims, x, w, bias, *geometry_epilogue):
    B, geometry, epilogue = info.batch_size, geometry_epilogue[:5], geometry_epilogue[5:]
    if all(dim is None for dim in (dims[1], dims[2], *dims[8:12])):
        x, residual = _front(info, x, dims[0]), epilogue[4]
        if residual is not None:
            residual = _as_images(_front(info, residual, dims[12]))
        y = ops.conv2d_epilogue(_as_images(x), w, bias, *geometry, *epilogue[:4], residual, *epilogue[5:])
        return y.unflatten(0, (B, x.shape[1])), 0
    z, z_dim = _conv2d(info, dims, x, w, bias, *geometry)
    return _epilogue(info, (z_dim, *dims[8:]), z, *epilogue)


@register_batching(ops.epilogue)
def _epilogue(info, dims, x, mean, var, scale, shift, residual, *rest):
    x, residual = _front(info, x, dims[0]), None if residual is None else _front(info, residual, dims[5])
    vectors, of_vectors = (mean, var, scale, shift), dims[1:5]
    if all(t is None for t in vectors):
        return ops.epilogue(x, *vectors, residual, *rest), 0
    if all(dim is None for dim in of_vectors):
        y = ops.epilogue(_as_images(x), *vectors, None if residual is None else _as_images(residual), *rest)
        return y.unflatten(0, x.shape[:2]), 0
    vectors = [None if t is None else _as_images(_front(info, t, dim)) for t, dim in zip(vectors, of_vectors)]
    y = ops.epilogue(_as_channels(x), *vectors, None if residual is None else _as_channels(residual), *rest)
    return y.unflatten(1, (info.batch_size, x.shape[2])), 1


def _vectors_of_all(info, vectors, dims):
    """Vectors over the channels of each image of a batch, one behind the other; None stays None."""
    return [None if t is None else _as_images(_front(info, t, dim)) for t, dim in zip(vectors, dims)]


def _images_of_all(info, images, dims):
    """Images whose channels are those of a batch, one behind the other; None stays None."""
    return [None if t is None else _as_channels(_front(info, t, dim)) for t, dim in zip(images, dims)]


@register_batching(ops.batch_statistics)
def _batch_statistics(info, dims, x):
    x = _front(info, x, dims[0])
    mean, var = ops.batch_statistics(_as_channels(x))
    return (mean.unflatten(0, (info.batch_size, -1)), var.unflatten(0, (info.batch_size, -1))), (0, 0)


@register_batching(ops.tracked_statistics)
def _tracked_statistics(info, dims, x, bias, running_mean, running_var, momentum):
    if None in dims[2:4]:
        raise RuntimeError(
            "batch_norm: running_mean and running_var are updated in place and must be batched by vmap as input is; "
            "see torch.func.replace_all_batch_norm_modules_"
        )
    x = _front(info, x, dims[0])
    (mean, var), batched = _batch_statistics(info, (0,), x)
    bias = None if bias is None else _front(info, bias, dims[1])
    running = running_mean.movedim(dims[2], 0), running_var.movedim(dims[3], 0)
    update_running(*running, mean, var, bias, x.numel() // mean.numel(), momentum)
    return (mean, var), batched


@register_batching(ops.batch_norm)
def _batch_norm(info, dims, x, mean, var, scale, shift, residual, *rest):
    x, residual = _images_of_all(info, (x, residual), (dims[0], dims[5]))
    y = ops.batch_norm(x, *_vectors_of_all(info, (mean, var, scale, shift), dims[1:5]), residual, *rest)
    return y.unflatten(1, (info.batch_size, -1)), 1


@register_batching(ops.batch_norm_grad)
def _batch_norm_grad(info, dims, dy, x, y, mean, var, scale, shift, *rest):
    images = _images_of_all(info, (dy, x, y), dims[:3])
    vectors = _vectors_of_all(info, (mean, var, scale, shift), dims[3:7])
    dx, dscale, dshift, *kept = ops.batch_norm_grad(*images, *vectors, *rest)
    B = info.batch_size
    kept = [t.unflatten(1, (B, -1)) if t.numel() else t for t in kept]
    results = dx.unflatten(1, (B, -1)), dscale.unflatten(0, (B, -1)), dshift.unflatten(0, (B, -1)), *kept
    return results, (1, 0, 0, *(1 if t.numel() else None for t in kept))


@register_batching(ops.norm_conv2d)
def _norm_conv2d(info, dims, x, mean, var, scale, shift, eps, activation, slope, w, bias, *geometry_running):
    *geometry, running_mean, running_var, momentum, statistics = geometry_running
    y, of_y = x, dims[0]
    if mean is not None:
        y, of_y = _batch_norm(info, (*dims[:5], None), x, mean, var, scale, shift, None, eps, activation, slope)
    fused, of_fused = (None, None) if statistics else (bias, dims[9])
    z, of_z = _conv2d(info, (of_y, dims[8], of_fused), y, w, fused, *geometry)
    if not statistics:
        return (z, x.new_empty(0), x.new_empty(0)), (of_z, None, None)
    if running_mean is None:
        results, of_results = _batch_statistics(info, (of_z,), z)
    else:
        of_running = of_z, dims[9], *dims[15:17]
        results, of_results = _tracked_statistics(info, of_running, z, bias, running_mean, running_var, momentum)
    return (z, *results), (of_z, *of_results)


@register_batching(ops.activate_)
def _activate_(info, dims, x, *arguments):
    return ops.activate_(x, *arguments), None


@register_batching(ops.activation_grad)
def _activation_grad(info, dims, dy, t, *arguments):
    return ops.activation_grad(*(_front(info, a, dim) for a, dim in zip((dy, t), dims)), *arguments), 0


@register_batching(ops.conv2d_relu)
def _conv2d_relu(info, dims, *arguments):
    y, dim = _conv2d(info, dims, *arguments)
    return ops.relu(y), dim


@register_batching(ops.conv2d_relu_max_pool2d)
def _conv2d_relu_max_pool2d(info, dims, x, w, bias, stride, padding, dilation, groups, *rest):
    B, (x_dim, w_dim, bias_dim) = info.batch_size, dims[:3]
    x = _front(info, x, x_dim)
    if w_dim is None and bias_dim is None:
        results = ops.conv2d_relu_max_pool2d(_as_images(x), w, bias, stride, padding, dilation, groups, *rest)
        return tuple(t.unflatten(0, (B, x.shape[1])) for t in results), (0, 0)
    w, bias = _as_images(_front(info, w, w_dim)), None if bias is None else _as_images(_front(info, bias, bias_dim))
    results = ops.conv2d_relu_max_pool2d(_as_channels(x), w, bias, stride, padding, dilation, B * groups, *rest)
    return tuple(t.unflatten(1, (B, -1)) for t in results), (1, 1)


@register_batching(ops.conv2d_relu_max_pool2d_input_grad)
def _conv2d_relu_max_pool2d_input_grad(info, dims, dy, code, w, size, stride, padding, dilation, groups, *rest):
    B, (dy_dim, code_dim, w_dim), (N, C, H, W) = info.batch_size, dims[:3], size
    dy, code = _front(info, dy, dy_dim), _front(info, code, code_dim)
    if w_dim is None:
        tensors, size = (_as_images(dy), _as_images(code), w), (B * N, C, H, W)
        dx = ops.conv2d_relu_max_pool2d_input_grad(*tensors, size, stride, padding, dilation, groups, *rest)
        return dx.unflatten(0, (B, N)), 0
    tensors, size = (_as_channels(dy), _as_channels(code), _as_images(_front(info, w, w_dim))), (N, B * C, H, W)
    dx = ops.conv2d_relu_max_pool2d_input_grad(*tensors, size, stride, padding, dilation, B * groups, *rest)
    return dx.unflatten(1, (B, C)), 1


@register_batching(ops.conv2d_relu_max_pool2d_weight_grad)
def _conv2d_relu_max_pool2d_weight_grad(info, dims, dy, code, x, size, stride, padding, dilation, groups, *rest):
    B, with_bias = info.batch_size, rest[-1]
    tensors = [_as_channels(_front(info, t, dim)) for t, dim in zip((dy, code, x), dims)]
    size = (B * size[0], *size[1:])
    dw, db = ops.conv2d_relu_max_pool2d_weight_grad(*tensors, size, stride, padding, dilation, B * groups, *rest)
    dw = dw.unflatten(0, (B, -1))
    return (dw, db.unflatten(0, (B, -1)) if with_bias else db), (0, 0 if with_bias else None)


@register_batching(ops.conv2d_input_grad)
def _conv2d_input_grad(info, dims, dy, w, size, stride, padding, dilation, groups, pad_mode):
    B, (dy_dim, w_dim), (N, C, H, W) = info.batch_size, dims[:2], size
    dy = _front(info, dy, dy_dim)
    if w_dim is None:
        size = (B * N, C, H, W)
        dx = ops.conv2d_input_grad(_as_images(dy), w, size, stride, padding, dilation, groups, pad_mode)
        return dx.unflatten(0, (B, N)), 0
    w, size = _as_images(_front(info, w, w_dim)), (N, B * C, H, W)
    dx = ops.conv2d_input_grad(_as_channels(dy), w, size, stride, padding, dilation, B * groups, pad_mode)
    return dx.unflatten(1, (B, C)), 1


@register_batching(ops.conv2d_weight_grad)
def _conv2d_weight_grad(info, dims, dy, x, size, stride, padding, dilation, groups, pad_mode, with_bias):
    B = info.batch_size
    dy, x = (_as_channels(_front(info, t, dim)) for t, dim in zip((dy, x), dims))
    dw, db = ops.conv2d_weight_grad(
        dy, x, (B * size[0], *size[1:]), stride, padding, dilation, B * groups, pad_mode, with_bias
    )
    return (dw.unflatten(0, (B, size[0])), db.unflatten(0, (B, -1)) if with_bias else db), (0, 0 if with_bias else None)


def _size(t, dim):
    """The size of one element of the batch."""
    return t.shape if dim is None else t.select(dim, 0).shape


@register_batching(ops.conv2d_grads)
def _conv2d_grads(info, dims, dy, x, w, *geometry_with_bias):
    (dy_dim, x_dim, w_dim), geometry = dims[:3], geometry_with_bias[:-1]
    dx, dx_dim = _conv2d_input_grad(info, (dy_dim, w_dim), dy, w, _size(x, x_dim), *geometry)
    dw_db, dw_db_dims = _conv2d_weight_grad(info, (dy_dim, x_dim), dy, x, _size(w, w_dim), *geometry_with_bias)
    return (dx, *dw_db), (dx_dim, *dw_db_dims)


@register_batching(ops.conv2d_relu_max_pool2d_grads)
def _conv2d_relu_max_pool2d_grads(info, dims, dy, code, x, w, *geometry_with_bias):
    (dy_dim, code_dim, x_dim, w_dim), geometry = dims[:4], geometry_with_bias[:-1]
    dx, dx_dim = _conv2d_relu_max_pool2d_input_grad(
        info, (dy_dim, code_dim, w_dim), dy, code, w, _size(x, x_dim), *geometry
    )
    dw_db, dw_db_dims = _conv2d_relu_max_pool2d_weight_grad(
        info, (dy_dim, code_dim, x_dim), dy, code, x, _size(w, w_dim), *geometry_with_bias
    )
    return (dx, *dw_db), (dx_dim, *dw_db_dims)


@register_batching(ops.conv2d_relu_weight_grad)
def _conv2d_relu_weight_grad(info, dims, dy, y, x, *size_and_rest):
    dy, dim = _relu_grad(info, dims[:2], dy, y)
    return _conv2d_weight_grad(info, (dim, dims[2]), dy, x, *size_and_rest)


@register_batching(ops.max_pool2d)
def _max_pool2d(info, dims, x, *arguments):
    x = x.movedim(dims[0], 0)
    results = ops.max_pool2d(_as_images(x), *arguments)
    return tuple(t.unflatten(0, x.shape[:2]) for t in results), (0, 0)


def _over_images(operator):
    """The rule of an operator on images alone."""

    def rule(info, dims, t, *arguments):
        t = t.movedim(dims[0], 0)
        return operator(_as_images(t), *arguments).unflatten(0, t.shape[:2]), 0

    return rule


for _operator in (
    ops.max_pool2d_values, ops.avg_pool2d, ops.avg_pool2d_grad, ops.adaptive_avg_pool2d, ops.adaptive_avg_pool2d_grad,
):  # fmt: skip
    register_batching(_operator)(_over_images(_operator))


def _over_code(operator):
    """The rule of an operator on a tensor and a code, or on a code alone."""

    def rule(info, dims, *args):
        tensors = [_front(info, t, dim) for t, dim in zip(args, dims) if hasattr(t, "movedim")]
        result = operator(*map(_as_images, tensors), *args[len(tensors) :])
        return result.unflatten(0, tensors[0].shape[:2]), 0

    return rule


for _operator in (ops.max_pool2d_scatter, ops.max_pool2d_gather, ops.max_pool2d_indices):
    register_batching(_operator)(_over_code(_operator))


@register_batching(ops.relu)
def _relu(info, dims, x):
    return ops.relu(x), dims[0]


@register_batching(ops.relu_)
def _relu_(info, dims, x):
    return ops.relu_(x), None


@register_batching(ops.relu_grad)
def _relu_grad(info, dims, dy, y):
    return ops.relu_grad(*(_front(info, t, dim) for t, dim in zip((dy, y), dims))), 0


# A batch of matrix products is a convolution of 1 x 1 pixels, with a group for each element of the batch.
_PIXEL = ((1, 1), (0, 0, 0, 0), (1, 1))


@register_batching(ops.linear)
def _linear(info, dims, x, w, bias):
    B, (x_dim, w_dim, bias_dim) = info.batch_size, dims
    x = _front(info, x, x_dim)
    if w_dim is not None:
        w, bias = _as_images(_front(info, w, w_dim)), None if bias is None else _as_images(_front(info, bias, bias_dim))
        y = ops.conv2d(_as_channels(x)[..., None, None], w[..., None, None], bias, *_PIXEL, B, "zeros")
        return y.flatten(1).unflatten(1, (B, -1)), 1
    fused, rest = (bias, None) if bias_dim is None else (None, _front(info, bias, bias_dim))
    y = ops.linear(_as_images(x), w, fused).unflatten(0, x.shape[:2])
    return (y if rest is None else y + rest[:, None]), 0


@register_batching(ops.linear_epilogue)
def _linear_epilogue(info, dims, x, w, bias, mean, var, scale, shift, residual, *rest):
    if all(dim is None for dim in dims[1:7]):
        x = _front(info, x, dims[0])
        residual = None if residual is None else _as_images(_front(info, residual, dims[7]))
        y = ops.linear_epilogue(_as_images(x), w, bias, mean, var, scale, shift, residual, *rest)
        return y.unflatten(0, x.shape[:2]), 0
    z, z_dim = _linear(info, dims[:3], x, w, bias)
    return _epilogue(info, (z_dim, *dims[3:]), z, mean, var, scale, shift, residual, *rest)


@register_batching(ops.squeeze_excite)
def _squeeze_excite(info, dims, x, w1, b1, w2, b2, activation, gate):
    x = _front(info, x, dims[0])
    if all(dim is None for dim in dims[1:5]):
        return ops.squeeze_excite(_as_images(x), w1, b1, w2, b2, activation, gate).unflatten(0, x.shape[:2]), 0
    gates, dim = ops.adaptive_avg_pool2d(_as_images(x), (1, 1)).view(x.shape[:3]), 0
    for w, b, act, w_dim, b_dim in ((w1, b1, activation, *dims[1:3]), (w2, b2, gate, *dims[3:5])):
        arguments = gates, w, b, *[None] * 5, 0.0, act, SLOPE
        gates, dim = _linear_epilogue(info, (dim, w_dim, b_dim, *[None] * 8), *arguments)
    return x * gates.movedim(dim, 0)[..., None, None], 0


@register_batching(ops.linear_relu)
def _linear_relu(info, dims, *arguments):
    y, dim = _linear(info, dims, *arguments)
    return ops.relu(y), dim


@register_batching(ops.linear_weight_grad)
def _linear_weight_grad(info, dims, dy, x, with_bias):
    B = info.batch_size
    dy, x = (_front(info, t, dim) for t, dim in zip((dy, x), dims))
    N, K = dy.shape[2], x.shape[2]
    dy, x = (_as_channels(t)[..., None, None] for t in (dy, x))
    dw, db = ops.conv2d_weight_grad(dy, x, (B * N, K, 1, 1), *_PIXEL, B, "zeros", with_bias)
    return (dw.view(B, N, K), db.unflatten(0, (B, N)) if with_bias else db), (0, 0 if with_bias else None)


class _Layers:
    """The operators of single layers, for tensors whose first dimension is the batch."""

    relu_grad = staticmethod(ops.relu_grad)

    def __init__(self, info):
        self.info = info

    def linear(self, x, w, bias):
        y, dim = _linear(self.info, (0, 0, None if bias is None else 0), x, w, bias)
        return y.movedim(dim, 0)

    def linear_relu(self, x, w, bias):
        return ops.relu(self.linear(x, w, bias))

    def linear_weight_grad(self, dy, x, with_bias):
        return _linear_weight_grad(self.info, (0, 0), dy, x, with_bias)[0]


def _over_layers(operator, of_layers, batched):
    """The rule of a chain: the batch becomes rows of the first `batched` tensors; layer by layer if others have one."""

    def rule(info, dims, *args):
        front = [_front(info, t, dim) for t, dim in zip(args[:batched], dims)]
        *rest, flag = args[batched:]
        if all(dim is None for dim in dims[batched:]):
            results = operator(*map(_as_images, front), *rest, flag)
            return tuple(t.unflatten(0, front[0].shape[:2]) for t in results), (0, 0)
        rest = [None if t is None else _front(info, t, dim) for t, dim in zip(rest, dims[batched:])]
        return of_layers(_Layers(info), *front, *rest, flag), (0, 0)

    return rule


register_batching(ops.linear_chain)(_over_layers(ops.linear_chain, layered.forward, 1))
register_batching(ops.linear_chain_input_grad)(_over_layers(ops.linear_chain_input_grad, layered.input_grad, 2))


@register_batching(ops.linear_chain_weight_grad)
def _linear_chain_weight_grad(info, dims, dy, dz, x, hidden, widths, with_bias):
    tensors = (_front(info, t, dim) for t, dim in zip((dy, dz, x, hidden), dims))
    return layered.weight_grad(_Layers(info), *tensors, widths, with_bias), (0, 0 if with_bias else None)


@register_batching(ops.cross_entropy)
def _cross_entropy(info, dims, x, target, weight, reduction, ignore_index, smoothing):
    x, target = (_front(info, t, dim) for t, dim in zip((x, target), dims))
    rest = ignore_index, smoothing
    if dims[2] is not None:
        each = [ops.cross_entropy(*t, reduction, *rest) for t in zip(x, target, weight.movedim(dims[2], 0))]
        return tuple(map(torch.stack, zip(*each))), (0, 0)
    loss, grad = ops.cross_entropy(_as_images(x), _as_images(target), weight, "none", *rest)
    loss, grad = loss.view(target.shape), grad.view(x.shape)
    if reduction == "mean":
        # Sums over rows may exceed the range of 16-bit formats.
        wide = torch.promote_types(x.dtype, torch.float32)
        kept, _, w_target = targets.weights_of(target, weight, x.shape[2], wide, ignore_index)
        total = w_target.sum(1, keepdim=True)
        # If the targets' weights sum to 0, the result is NaN like the kernel's 0 / 0, even if smoothing adds to a row.
        total = torch.where(total == 0, math.nan, total)
        loss, grad = (loss / total).to(x.dtype), torch.where(kept[..., None], grad / total[..., None], 0).to(x.dtype)
    return (loss if reduction == "none" else loss.sum(1), grad), (0, 0)


@register_batching(ops.cross_entropy_grad)
def _cross_entropy_grad(info, dims, dloss, grad, target, ignore_index):
    dloss, grad, target = (_front(info, t, dim) for t, dim in zip((dloss, grad, target), dims))
    # Rows of different batch elements do not share a loss.
    dloss = dloss.view(info.batch_size, -1).expand(target.shape)
    dx = ops.cross_entropy_grad(*map(_as_images, (dloss, grad, target)), ignore_index)
    return dx.unflatten(0, target.shape), 0

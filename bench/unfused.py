"""torch.nn.functional, with tritonnet's fused functions under their names, composed of torch's own."""

import torch.nn.functional as F


def __getattr__(name):
    return getattr(F, name)


def conv2d_relu(*args, **kwargs):
    return F.relu(F.conv2d(*args, **kwargs))


def conv2d_relu_max_pool2d(*args, pool_kernel_size=2, pool_stride=None, pool_padding=0, pool_ceil_mode=False, **kwargs):
    z = conv2d_relu(*args, **kwargs)
    return F.max_pool2d(z, pool_kernel_size, pool_stride, pool_padding, ceil_mode=pool_ceil_mode)


def linear_relu(*args):
    return F.relu(F.linear(*args))


def linear_chain(input, weights, biases):
    for weight, bias in zip(weights[:-1], biases):
        input = F.relu(F.linear(input, weight, bias))
    return F.linear(input, weights[-1], biases[-1])

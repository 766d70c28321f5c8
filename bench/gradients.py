"""Each gradient of a convolution or of linear alone, by the operator that its backward pass calls.

All functions take dy, x and w, as some need the other operand's size or layout.
"""

import torch

from tritonnet import ops


class OfTorch:
    """torch's gradients, which cuDNN and cuBLAS compute on a GPU."""

    @staticmethod
    def conv2d_input_grad(dy, x, w, stride, padding):
        return _convolution_backward(dy, x, w, stride, padding, 0)

    @staticmethod
    def conv2d_weight_grad(dy, x, w, stride, padding):
        return _convolution_backward(dy, x, w, stride, padding, 1)

    @staticmethod
    def linear_input_grad(dy, x, w):
        return dy @ w

    @staticmethod
    def linear_weight_grad(dy, x, w):
        return dy.T @ x


def _convolution_backward(dy, x, w, stride, padding, which):
    asked_for = [operand == which for operand in range(3)]
    geometry = [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1
    return torch.ops.aten.convolution_backward(dy, x, w, None, *geometry, asked_for)[which]


class Ours:
    """The gradients of tritonnet.ops."""

    @staticmethod
    def conv2d_input_grad(dy, x, w, stride, padding):
        return ops.conv2d_input_grad(dy, w, x.shape, *_geometry(stride, padding))

    @staticmethod
    def conv2d_weight_grad(dy, x, w, stride, padding):
        return ops.conv2d_weight_grad(dy, x, w.shape, *_geometry(stride, padding), False)[0]

    @staticmethod
    def linear_input_grad(dy, x, w):
        return ops.linear(dy, w.T, None)

    @staticmethod
    def linear_weight_grad(dy, x, w):
        return ops.linear_weight_grad(dy, x, False)[0]


def _geometry(stride, padding):
    return (stride,) * 2, (padding,) * 4, (1, 1), 1, "zeros"

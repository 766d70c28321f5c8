"""A mistake raises torch's type of exception, with the argument's name and the value it got."""

import numpy as np
import pytest
import torch
import torch.nn.functional as TF

import tritonnet.nn.functional as F

X, W, B = torch.zeros(2, 4, 8, 8), torch.zeros(6, 4, 3, 3), torch.zeros(6)

# function, positional arguments, keyword arguments, what the message must contain
CONV2D = [
    ((X[None], W), {}, ["input", "[1, 2, 4, 8, 8]"]),
    ((X[0, 0], W), {}, ["input", "[8, 8]"]),
    ((X, W[0]), {}, ["weight", "[4, 3, 3]"]),
    ((X[:, :3], W), {}, ["input", "4 channels", "3", "[2, 3, 8, 8]"]),
    ((X, W[:5, :2]), dict(groups=2), ["weight", "groups=2", "5"]),
    ((X, W[:0]), {}, ["weight", "0"]),
    ((X, W, B[:5]), {}, ["bias", "[6]", "[5]"]),
    ((X, W, B[:, None]), {}, ["bias", "[6, 1]"]),
    ((X, W, torch.tensor(1.0)), {}, ["bias", "[]"]),
    ((X, W.double()), {}, ["weight", "torch.float64"]),
    ((X, W, B.double()), {}, ["bias", "torch.float64"]),
    ((X, W), dict(groups=0), ["groups", "0"]),
    ((X, W), dict(stride=0), ["stride", "(0, 0)"]),
    ((X, W), dict(stride=(1, -1)), ["stride", "(1, -1)"]),
    ((X, W), dict(padding=-1), ["padding", "(-1, -1)"]),
    ((X, W), dict(dilation=0), ["dilation", "(0, 0)"]),
    ((X, W), dict(stride=(1, 2, 3)), ["stride", "(1, 2, 3)"]),
    ((X, W), dict(stride=()), ["stride", "()"]),
    ((X, W), dict(padding=()), ["padding", "()"]),
    ((X, W), dict(padding="some"), ["padding", "'some'"]),
    ((X, W), dict(padding="same", stride=2), ["padding", "stride", "(2, 2)"]),
    ((X, W), dict(dilation=4), ["kernel", "(9, 9)", "(8, 8)"]),
    ((X[:, :, :0], W), dict(padding=2), ["input", "[2, 4, 0, 8]"]),
    ((X, W[:, :, :0]), {}, ["weight", "[6, 4, 0, 3]"]),
    ((X, W), dict(stride=1.5), ["stride", "1.5"]),
    ((X, W), dict(stride=True), ["stride", "True"]),
    ((X, W), dict(padding=(1, 0.5)), ["padding", "0.5"]),
    ((X, W), dict(groups="a"), ["groups", "'a'"]),
    ((X.numpy(), W), {}, ["input", "ndarray"]),
    ((X, None), {}, ["weight", "NoneType"]),
    ((X, W, 1.0), {}, ["bias", "float"]),
]
MAX_POOL2D = [
    ((X[None], 2), {}, ["input", "[1, 2, 4, 8, 8]"]),
    ((X[0, 0], 2), {}, ["input", "[8, 8]"]),
    ((X[:, :0], 2), {}, ["input", "[2, 0, 8, 8]"]),
    ((X[:, :, :0], 2), {}, ["input", "[2, 4, 0, 8]"]),
    ((X, 0), {}, ["kernel_size", "(0, 0)"]),
    ((X, (1, 2, 3)), {}, ["kernel_size", "(1, 2, 3)"]),
    ((X, 2, 0), {}, ["stride", "(0, 0)"]),
    ((X, 2, (1, 2, 3)), {}, ["stride", "(1, 2, 3)"]),
    ((X, 2), dict(padding=2), ["padding", "(2, 2)"]),
    ((X, 3), dict(padding=2, dilation=2), ["padding", "(2, 2)"]),
    ((X, 2), dict(padding=-1), ["padding", "(-1, -1)"]),
    ((X, 2), dict(dilation=0), ["dilation", "(0, 0)"]),
    ((X, 9), {}, ["kernel_size", "(9, 9)", "[2, 4, 8, 8]"]),
    ((X, 1.5), {}, ["kernel_size", "1.5"]),
    ((X, 2), dict(ceil_mode=1), ["ceil_mode", "1"]),
    ((X.numpy(), 2), {}, ["input", "ndarray"]),
]
AVG_POOL2D = [
    *(row for row in MAX_POOL2D if "dilation" not in row[1] and row[2] != ["input", "[8, 8]"]),
    ((X, 2), dict(count_include_pad=1), ["count_include_pad", "1"]),
    ((X, 2), dict(divisor_override=0), ["divisor_override", "0"]),
    ((X, 2), dict(divisor_override=1.5), ["divisor_override", "1.5"]),
    ((X, 2), dict(divisor_override=True), ["divisor_override", "True"]),
    ((X, 2), dict(divisor_override=2**63), ["divisor_override", str(2**63)]),
]
ADAPTIVE_AVG_POOL2D = [
    ((X[None], 2), {}, ["input", "[1, 2, 4, 8, 8]"]),
    ((X[0, 0], 2), {}, ["input", "[8, 8]"]),
    ((X[:, :, :0], 2), {}, ["input", "[2, 4, 0, 8]"]),
    ((X, -1), {}, ["output_size", "(-1, -1)"]),
    ((X, (None, -2)), {}, ["output_size", "(8, -2)"]),
    ((X, (1, 2, 3)), {}, ["output_size", "(1, 2, 3)"]),
    ((X, (2,)), {}, ["output_size", "(2,)"]),
    ((X, 1.5), {}, ["output_size", "1.5"]),
    ((X, (1, 1.5)), {}, ["output_size", "1.5"]),
    ((X, True), {}, ["output_size", "True"]),
    ((X, None), {}, ["output_size", "None"]),
]
RELU = [((np.zeros(2),), {}, ["input", "ndarray"]), ((None,), {}, ["input", "NoneType"])]
A, C = torch.zeros(2, 3), torch.zeros(4, 3)
LINEAR = [
    ((A, C[:, :2]), {}, ["[2, 3]", "[4, 2]"]),
    ((torch.tensor(1.0), C), {}, ["input", "[]"]),
    ((A, torch.tensor(1.0)), {}, ["weight", "[]"]),
    ((A, C[None]), {}, ["weight", "[1, 4, 3]"]),
    ((A, C[0], torch.tensor(1.0)), {}, ["bias"]),
    ((A, C, torch.zeros(5)), {}, ["bias", "[2, 4]", "[5]"]),
    ((A, C.double()), {}, ["weight", "torch.float64"]),
    ((A, C, torch.zeros(4).double()), {}, ["bias", "torch.float64"]),
    ((A.numpy(), C), {}, ["input", "ndarray"]),
    ((A, None), {}, ["weight", "NoneType"]),
]
M, V = torch.zeros(4), torch.ones(4)
BATCH_NORM = [
    ((X, None, None), {}, ["running_mean", "None"]),
    ((X, M, None), {}, ["running_var", "None"]),
    ((X, M, None), dict(training=True), ["running_mean", "running_var"]),
    ((X, M[:3], V[:3]), {}, ["running_mean", "[4]", "[3]"]),
    ((X, M, V[:3]), dict(training=True), ["running_var", "[4]", "[3]"]),
    ((X, M, V, V[:3]), {}, ["weight", "[4]", "[3]"]),
    ((X, M, V, None, V[:3]), dict(training=True), ["bias", "[4]", "[3]"]),
    ((X[0, 0, 0], M, V), {}, ["input", "[8]"]),
    ((X[:1, :, :1, :1], M, V), dict(training=True), ["input", "[1, 4, 1, 1]"]),
    ((X, M, V), dict(training=True, eps=0.0), ["eps", "0.0"]),
    ((X, M, V), dict(eps=-1.0), ["eps", "-1.0"]),
    ((X, M, V), dict(training=1), ["training", "1"]),
    ((X, M, V), dict(training=True, momentum=None), ["momentum", "None"]),
    ((X, M.double(), V.double()), dict(training=True), ["running_mean", "torch.float64"]),
    ((X, M, V, V.double()), {}, ["weight", "torch.float64"]),
    ((X.half(), M, V, V.bfloat16()), dict(training=True), ["weight", "torch.bfloat16"]),
    ((X, M.clone().requires_grad_(), V), dict(training=True), ["running_mean", "gradient"]),
    ((X, M, V), dict(eps="a"), ["eps", "'a'"]),
    ((X, M, V), dict(training=True, momentum=V), ["momentum", "tensor"]),
    ((X, M, V), dict(training=True, momentum=V[0].clone().requires_grad_()), ["momentum", "requires_grad"]),
    ((X.numpy(), M, V), dict(training=True), ["input", "ndarray"]),
    ((X, 1.0, V), {}, ["running_mean", "float"]),
    ((X, M, V, None, 1.0), dict(training=True), ["bias", "float"]),
]
ALL = [
    (name, *row)
    for name, rows in dict(
        conv2d=CONV2D, max_pool2d=MAX_POOL2D, avg_pool2d=AVG_POOL2D, adaptive_avg_pool2d=ADAPTIVE_AVG_POOL2D,
        relu=RELU, linear=LINEAR, batch_norm=BATCH_NORM,
    ).items()
    for row in rows
]  # fmt: skip


@pytest.mark.parametrize("name, args, kwargs, parts", ALL, ids=[f"{row[0]}-{row[3]}" for row in ALL])
def test_error(name, args, kwargs, parts):
    with pytest.raises(Exception) as theirs:
        getattr(TF, name)(*args, **kwargs)
    with pytest.raises(Exception) as ours:
        getattr(F, name)(*args, **kwargs)
    assert ours.type is theirs.type, f"torch raises {theirs.type.__name__}, we {ours.type.__name__}: {ours.value}"
    assert str(ours.value).startswith(name) and all(part in str(ours.value) for part in parts), str(ours.value)


@pytest.mark.parametrize("padding, mode", [(8, "reflect"), (9, "circular")])
def test_padding_modes_that_do_not_fit(padding, mode):
    import tritonnet.nn as nn

    for module in (torch.nn, nn):
        with pytest.raises(RuntimeError) as e:
            module.Conv2d(4, 6, 3, padding=padding, padding_mode=mode)(X)
    assert mode in str(e.value) and str(padding) in str(e.value)


def test_devices_must_agree():
    with pytest.raises(RuntimeError, match="weight must be on the same device, got cpu and meta"):
        F.conv2d(X, W.to("meta"))
    with pytest.raises(RuntimeError, match="bias must be on the same device, got cpu and meta"):
        F.linear(A, C, torch.zeros(4, device="meta"))


def test_arguments_that_are_integers_after_all():
    for stride in (torch.tensor(2), np.int64(2), [2], (2,), [2, 2]):
        assert torch.equal(F.conv2d(X, W, stride=stride), TF.conv2d(X, W, stride=stride))
    assert F.max_pool2d(X, [2], (2,), np.int64(1)).shape == TF.max_pool2d(X, 2, 2, 1).shape


@pytest.mark.parametrize("number", [1, True, np.float32(0.25), np.int64(1), torch.tensor(0.25), torch.tensor(1)])
def test_arguments_that_are_floats_after_all(number):
    x, results = torch.arange(24.0).view(2, 4, 3), []
    for f in (TF, F):
        running = M.clone(), V.clone()
        results.append((f.batch_norm(x, *running, training=True, momentum=number, eps=number), *running))
    torch.testing.assert_close(*results)


def test_running_statistics_with_gradients_are_updated_where_none_is_recorded():
    x, results = torch.arange(24.0).view(2, 4, 3), []
    for f in (TF, F):
        running = M.clone().requires_grad_(), V.clone().requires_grad_()
        with torch.no_grad():
            results.append((f.batch_norm(x, *running, training=True), *running))
    torch.testing.assert_close(*results)

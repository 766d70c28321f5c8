"""Results have the same bits whatever default device and dtype a program has set in torch.

Libraries that load large models set the device "meta", on which tensors have no values; others set a dtype.
"""

import contextlib

import pytest
import torch
import torch.func as tf
from conftest import ROOT, write_mnist
from test_citizenship import OPERATORS
from torch.utils import _pytree as pytree

import tritonnet
import tritonnet.nn as nn
import tritonnet.nn.functional as F
from bench.libraries import TutorialLeNet
from tritonnet import cli, ops
from tritonnet.data import load_digits
from tritonnet.lenet.recognition import find_layers


@contextlib.contextmanager
def other_defaults():
    """Both at once: a tensor made without a device has no values, and one made without a dtype is float64."""
    dtype = torch.get_default_dtype()
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.MonkeyPatch.context() as patch:
            # torch suspends a default device while it calls an operator; ours must not depend on that.
            patch.setattr(ops, "on_device", lambda device: torch.device("meta"))
            yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(dtype)


PHOTO = str(ROOT / ".github" / "photo.jpg")
TARGET = torch.tensor([1, -100, 4, 0])


def cross_entropy(reduction):
    return lambda f, x: f.cross_entropy(
        x, TARGET.to(x.device), x.detach()[0].abs(), reduction=reduction, label_smoothing=0.1
    )


def layer(cls, *args, **kwargs):
    """A layer as a function of its inputs and its parameters."""
    module = cls(*args, **kwargs)
    names = [name for name, _ in module.named_parameters()]
    return lambda f, x, *tensors: tf.functional_call(module, dict(zip(names, tensors)), (x,))


# As in OPERATORS; our layers take no module of functionals.
CASES = {
    **OPERATORS,
    "cross_entropy, mean": (cross_entropy("mean"), (4, 5)),
    "cross_entropy, sum": (cross_entropy("sum"), (4, 5)),
    "cross_entropy, none": (cross_entropy("none"), (4, 5)),
    "max_pool2d with indices": (lambda f, x: f.max_pool2d(x, 2, return_indices=True), (2, 2, 5, 4)),
    "few channels, bfloat16": (
        lambda f, *tensors: f.conv2d_relu_max_pool2d(*(t.bfloat16() for t in tensors)),
        (2, 1, 8, 8), (3, 1, 3, 3), (3,),
    ),
    "few channels": (lambda f, *tensors: f.conv2d_relu_max_pool2d(*tensors), (2, 1, 8, 8), (3, 1, 3, 3), (3,)),
    **{
        f"Conv2d, {mode}": (
            layer(nn.Conv2d, 2, 3, 3, padding=(1, 2), padding_mode=mode), (2, 2, 5, 4), (3, 2, 3, 3), (3,),
        )
        for mode in ("reflect", "replicate", "circular")
    },
    "Conv2dReLU": (layer(nn.Conv2dReLU, 2, 3, 3, padding=1), (2, 2, 5, 4), (3, 2, 3, 3), (3,)),
    "LinearReLU": (layer(nn.LinearReLU, 5, 6), (4, 5), (6, 5), (6,)),
    "LinearChain": (layer(nn.LinearChain, 5, 6, 3), (4, 5), (6, 5), (6,), (3, 6), (3,)),
}  # fmt: skip


def everything(function, inputs):
    """Results, first and second gradients, computed by a path of torch that keeps the defaults in force."""
    inputs = [t.clone().requires_grad_() for t in inputs]
    results = function(F, *inputs)
    y = results[0] if isinstance(results, tuple) else results
    torch.autograd.backward(y.float().pow(2).sum(), create_graph=True, inputs=inputs)
    first = [t.grad for t in inputs]
    for t in inputs:
        t.grad = None
    torch.autograd.backward(sum(g.float().pow(2).sum() for g in first), inputs=inputs)
    return pytree.tree_map(torch.Tensor.detach, [results, first, [t.grad for t in inputs]])


def assert_same_bits(ours, expected):
    for p, q in zip(pytree.tree_leaves(ours), pytree.tree_leaves(expected), strict=True):
        assert (p.dtype, p.device) == (q.dtype, q.device)
        torch.testing.assert_close(p, q, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.sampled(2)
def test_results_and_gradients(case, backend, device):
    function, *sizes = CASES[case]
    inputs = [torch.randn(size).to(device) for size in sizes]
    expected = everything(function, inputs)
    with other_defaults():
        ours = everything(function, inputs)
    assert_same_bits(ours, expected)


@pytest.mark.parametrize("case", CASES)
def test_batched(case, device):
    """The rules for vmap, which both backends share."""
    function, *sizes = CASES[case]
    batches = [torch.randn(2, *size).to(device) for size in sizes]
    batched = tf.vmap(lambda *tensors: function(F, *tensors))
    with tritonnet.backend("reference"):
        expected = batched(*batches)
        with other_defaults():
            ours = batched(*batches)
    assert_same_bits(ours, expected)


def test_a_fused_model(device):
    """It is converted, captured, called, and recognised as a LeNet."""
    model, x, said = TutorialLeNet().to(device), torch.randn(2, 1, 32, 32, device=device), []

    def run():
        model.zero_grad()
        y = model(x)
        torch.autograd.backward(y.pow(2).sum())
        return y.detach(), [p.grad for p in model.parameters()]

    with tritonnet.backend("reference"):
        expected = run()
        with other_defaults():
            layers = find_layers(model)
            tritonnet.fuse(tritonnet.convert(model), report=said.append)
            ours = run()
        assert_same_bits(run(), ours)
    assert [layer.weight for layer in layers] == list(model.parameters())[::2]
    assert said[0].endswith("fused: conv1, relu, max_pool2d; conv2, relu, max_pool2d; fc1, relu, fc2, relu, fc3")
    torch.testing.assert_close(ours, expected)


def test_digits():
    expected = load_digits()
    with other_defaults():
        ours = load_digits()
    assert_same_bits(ours, expected)


def test_the_command_line(tmp_path, monkeypatch, capfd):
    """It trains, and reads a picture with the result; the caller's defaults are restored."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # no pictures, which take seconds
    images, labels = torch.randint(256, (40, 28, 28), dtype=torch.uint8), torch.arange(40, dtype=torch.uint8) % 10
    write_mnist(tmp_path, images, labels, images[:10], labels[:10])
    options = "--epochs=1", "--batch-size=20", "--device=cpu", "--backend=reference"

    def run(out):
        before = torch.get_default_device(), torch.get_default_dtype()
        assert cli.main(["train", "--data", str(tmp_path), "--out", str(out), *options]) == 0
        capfd.readouterr()
        assert cli.main(["predict", "--weights", str(out / "model.pt"), "--device=cpu", "--json", PHOTO]) == 0
        assert (torch.get_default_device(), torch.get_default_dtype()) == before
        return out / "model.pt", capfd.readouterr().out

    weights, read = run(tmp_path / "usual")
    with other_defaults():
        our_weights, our_read = run(tmp_path / "other")
    assert_same_bits(torch.load(our_weights), torch.load(weights))
    assert our_read == read

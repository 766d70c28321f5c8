"""LeNet's full-float32 kernels for NVIDIA's cards; by itself the interpreter takes the products."""

import copy

import pytest
import torch
import torch.nn as nn
from exact import ROUNDOFF

import tritonnet
from tritonnet.kernels.lenet import forward as lenet_forward
from tritonnet.kernels.lenet import layout as lenet
from tritonnet.kernels.lenet import tiles
from tritonnet.lenet import served


@pytest.fixture
def in_lanes(monkeypatch):
    monkeypatch.setattr(tiles, "form", lambda format: "lanes")


def small(channels):
    """A LeNet for images of 20 pixels: in lanes every product is a step of the interpreter."""
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.thorough
def test_gradients_in_lanes(channels, in_lanes, device, monkeypatch):
    """As test_gradients in test_train_step.py, with its bounds."""
    monkeypatch.setitem(served._SIZES, (0, 64), 20)
    net = small(channels).to(device)
    images, labels = torch.randn(5, channels, 20, 20, device=device), torch.randint(10, (5,), device=device)
    truth = copy.deepcopy(net).double()
    before = [p.detach().clone() for p in net.parameters()]
    step = tritonnet.TrainStep(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), lr=1.0), "ieee")
    assert step.path == "fused launches"
    loss = step(images, labels)
    true_loss = nn.functional.cross_entropy(truth(images.double()), labels)
    true_loss.backward()
    u = ROUNDOFF[torch.float32]
    assert abs(loss.double() - true_loss) <= 16 * u * true_loss.abs() + 4 * u
    for (parameter, p), q, old in zip(net.named_parameters(), truth.parameters(), before):
        error, hidden = (old.double() - p.double() - q.grad).norm(), 2 * u * old.double().norm()
        assert error <= 50 * u * q.grad.norm() + hidden, f"{parameter}: off by {error:.3g} of {q.grad.norm():.3g}"


@pytest.mark.parametrize("train", [True, False])
def test_buffers_follow_the_form(train, monkeypatch):
    """Also after the other form was asked for with the same net."""
    for form, size in (("ieee", (2, 14, 14, 8)), ("lanes", (2, 6, 14, 14)), ("ieee", (2, 14, 14, 8))):
        monkeypatch.setattr(tiles, "form", lambda format, form=form: form)
        p1 = lenet_forward.activations(2, lenet.Geometry(1, 32, 0, 7), "ieee", "cpu", train)["p1"]
        assert p1.shape == size


def test_bytes_in_lanes(in_lanes, device, full_precision):
    """Patches that reach into the border."""
    net = tritonnet.LeNet(7, mean=0.2, std=0.4).to(device).eval()
    images = torch.randint(256, (2, 1, 28, 28), dtype=torch.uint8, device=device)
    with torch.no_grad():
        with tritonnet.count_launches() as launches:
            y = net(images)
        with tritonnet.backend("reference"):
            truth = net(images)
    assert launches["lenet_forward_kernel"] == 1
    torch.testing.assert_close(y, truth, rtol=1e-4, atol=1e-5)

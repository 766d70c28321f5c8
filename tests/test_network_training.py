"""Whole networks in training, by TrainStep, against torch's own steps in float64.

They are the small networks of test_networks.py. Weights are in channels_last, as there.
"""

import copy

import pytest
import torch
from conftest import thorough_if
from test_networks import IMAGE, SIZES, nothing_captured  # noqa: F401  (a fixture)
from torch import nn

import tritonnet
from bench.networks import NETWORKS

BATCH, STEPS = 4, 20
# The rest are trained in a thorough run.
SOME = ("resnet18",)


def network(name, dtype):
    torch.manual_seed(0)
    return NETWORKS[name](**SIZES[name]).to(dtype, memory_format=torch.channels_last).train()


def batches(count, dtype):
    # With this seed no argument lies so near a kink of an activation that rounding moves it across: of the seeds 1, 5
    # and 9, mobilenet_v2 has one with 1 in our float32, and with 5 in torch's as well.
    generator = torch.Generator().manual_seed(9)
    for _ in range(count):
        images = torch.randn(BATCH, *IMAGE, generator=generator)
        yield images.to(dtype, memory_format=torch.channels_last), torch.randint(100, (BATCH,), generator=generator)


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-3)


def eager_step(model):
    optimizer, loss = optimizer_of(model), nn.CrossEntropyLoss()

    def step(images, labels):
        optimizer.zero_grad()
        value = loss(model(images), labels)
        value.backward()
        optimizer.step()
        return value.detach()

    return step


def trained(name, dtype, ours, steps=STEPS):
    """The losses, and all of the model's tensors after the steps."""
    model = network(name, dtype)
    step = tritonnet.TrainStep(model, nn.CrossEntropyLoss(), optimizer_of(model)) if ours else eager_step(model)
    losses = []
    for images, labels in batches(steps, dtype):
        torch.manual_seed(2)  # of dropout and stochastic depth
        losses.append(step(images, labels).double())
    return torch.stack(losses), [t.double() for t in copy.deepcopy(model).state_dict().values()]


def apart(found, truth):
    """How far losses and tensors are from the truth, relative to its size, as one number each."""
    tensors = [torch.cat([t.flatten() for t in ts]) for ts in (found[1], truth[1])]
    return [((a - b).norm() / b.norm()).item() for a, b in ((found[0], truth[0]), tensors)]


@pytest.mark.parametrize("name", thorough_if(lambda name: name not in SOME, NETWORKS))
def test_twenty_steps(name):
    """In float64 the numbers are torch's; in float32 they are as near to them as torch's own; two runs are equal."""
    with tritonnet.backend("reference"):
        truth = trained(name, torch.float64, ours=False)
        assert max(apart(trained(name, torch.float64, ours=True), truth)) < 1e-9
        ours, again = (trained(name, torch.float32, ours=True) for _ in range(2))
    assert all(map(torch.equal, (ours[0], *ours[1]), (again[0], *again[1])))
    theirs = trained(name, torch.float32, ours=False)
    for own, torchs in zip(apart(ours, truth), apart(theirs, truth)):
        assert own < 3 * torchs, (apart(ours, truth), apart(theirs, truth))

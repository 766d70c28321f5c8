"""tritonnet.TrainStep's updates and optimiser state against torch's own optimisers."""

import copy

import pytest
import torch
import torch.nn as theirs
from test_train_step import batch, by_torch, small

import tritonnet

# On a GPU torch's own side of a comparison would take its convolutions in tf32.
pytestmark = pytest.mark.usefixtures("full_precision")

OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {"lr": 0.1}),
    "SGD momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    "SGD nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
    "Adam": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-3}),
    "Adam amsgrad": (torch.optim.Adam, {"lr": torch.tensor(0.01), "amsgrad": True, "eps": 1e-3}),
    "Adam fused": (torch.optim.Adam, {"lr": 0.01, "fused": True, "eps": 1e-3}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1, "maximize": True, "eps": 1e-3}),
}


def groups_of(net, options):
    """Two groups that differ in rate and decay."""
    weights = [p for p in net.parameters() if p.dim() > 1]
    biases = [p for p in net.parameters() if p.dim() == 1]
    return [{"params": biases, "lr": options["lr"] / 2, "weight_decay": 0.0}, {"params": weights}]


def assert_same_state(ours, theirs_, tolerance=1e-4):
    for group, true_group in zip(ours["param_groups"], theirs_["param_groups"]):
        assert group == true_group
    assert ours["state"].keys() == theirs_["state"].keys()
    for i, state in ours["state"].items():
        true_state = theirs_["state"][i]
        assert state.keys() == true_state.keys()
        for name, value in state.items():
            assert (value.shape, value.dtype, value.device) == tuple(
                getattr(true_state[name], attribute) for attribute in ("shape", "dtype", "device")
            )
            torch.testing.assert_close(value, true_state[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.sampled(4)
def test_optimizers(name, device):
    """Two steps: parameters and the whole state_dict are those of torch's own optimiser."""
    make, options = OPTIMIZERS[name]
    net = small().to(device)
    twin = copy.deepcopy(net)
    optimizer, true = (make(groups_of(n, options), **options) for n in (net, twin))
    step = tritonnet.TrainStep(net, theirs.CrossEntropyLoss(), optimizer, "ieee")
    for i in range(2):
        images, labels = batch(net, (2, 1, 28, 28), device, i)
        step(images, labels)
        by_torch(twin, true, images, labels)
    for p, q in zip(net.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert_same_state(optimizer.state_dict(), true.state_dict())


def test_scheduler(device, recwarn):
    net = small().to(device)
    twin = copy.deepcopy(net)
    optimizers = [torch.optim.SGD(n.parameters(), lr=0.5) for n in (net, twin)]
    schedules = [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1) for optimizer in optimizers]
    step = tritonnet.TrainStep(net, theirs.CrossEntropyLoss(), optimizers[0], "ieee")
    for i in range(2):
        images, labels = batch(net, (2, 1, 28, 28), device, i)
        step(images, labels)
        by_torch(twin, optimizers[1], images, labels)
        for schedule in schedules:
            schedule.step()
    assert optimizers[0].param_groups[0]["lr"] == pytest.approx(0.005)
    for p, q in zip(net.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


def test_accumulation(device):
    """Two calls of three images are one of six."""
    net = small().to(device)
    twin = copy.deepcopy(net)
    optimizers = [torch.optim.SGD(n.parameters(), lr=0.1, momentum=0.9) for n in (net, twin)]
    step = tritonnet.TrainStep(net, theirs.CrossEntropyLoss(), optimizers[0], "ieee", accumulate=2)
    for i in range(2):
        images, labels = batch(net, (6, 1, 28, 28), device, i)
        before = [p.detach().clone() for p in net.parameters()]
        step(images[:3], labels[:3])
        assert all(map(torch.equal, net.parameters(), before))
        step(images[3:], labels[3:])
        by_torch(twin, optimizers[1], images, labels)
        for p, q in zip(net.parameters(), twin.parameters()):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["SGD momentum", "Adam amsgrad"])
@pytest.mark.sampled(2)
def test_saved_and_resumed(name, device, tmp_path):
    """A run that is saved, loaded elsewhere and continued ends with the bits of the uninterrupted one."""
    make, options = OPTIMIZERS[name]

    def new():
        torch.manual_seed(0)
        net = small().to(device)
        optimizer = make(net.parameters(), **options)
        return net, optimizer, tritonnet.TrainStep(net, theirs.CrossEntropyLoss(), optimizer)

    net, optimizer, step = new()
    for i in range(3):
        if i == 2:
            torch.save([net.state_dict(), optimizer.state_dict()], tmp_path / "run.pt")
        step(*batch(net, (3, 1, 28, 28), device, i))
    again, its_optimizer, its_step = new()
    its_step(*batch(net, (3, 1, 28, 28), device, 9))  # what is loaded replaces this state
    for part, state in zip((again, its_optimizer), torch.load(tmp_path / "run.pt", weights_only=True)):
        part.load_state_dict(state)
    its_step(*batch(net, (3, 1, 28, 28), device, 2))
    assert all(map(torch.equal, net.parameters(), again.parameters()))
    assert_same_state(its_optimizer.state_dict(), optimizer.state_dict(), 0)


def test_torch_goes_on_where_the_step_ends(device):
    """The optimiser's own step takes over the state, and the other way round."""
    net = small().to(device)
    twin = copy.deepcopy(net)
    optimizers = [torch.optim.Adam(n.parameters(), lr=0.01, eps=1e-3) for n in (net, twin)]
    step = tritonnet.TrainStep(net, theirs.CrossEntropyLoss(), optimizers[0], "ieee")
    for i in range(3):
        images, labels = batch(net, (2, 1, 28, 28), device, i)
        by_torch(twin, optimizers[1], images, labels)
        if i == 1:
            by_torch(net, optimizers[0], images, labels)
        else:
            step(images, labels)
    for p, q in zip(net.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def double_the_rate(net, optimizer):
    optimizer.param_groups[0]["lr"] *= 2  # in place where it is a tensor


def forget(net, optimizer):
    del optimizer.state[net.fc1.weight]


def replace(net, optimizer):
    state = optimizer.state[net.conv2.weight]
    name = next(name for name in state if name != "step")
    state[name] = state[name] * 3


def count_on(net, optimizer):
    for state in optimizer.state.values():
        state["step"].fill_(40)


def count_on_unseen(net, optimizer):
    for state in optimizer.state.values():
        state["step"].data.fill_(40)


def count_apart(net, optimizer):
    optimizer.state[net.fc1.weight]["step"] += 7


def share(net, optimizer):
    for state in optimizer.state.values():
        state["step"].share_memory_()


def two_groups(net, optimizer):
    (group,) = optimizer.param_groups
    optimizer.add_param_group({**group, "params": [group["params"].pop()], "lr": 0.5})


@pytest.mark.parametrize(
    "options, change",
    [
        ({"lr": torch.tensor(0.05)}, double_the_rate),
        ({"lr": 0.05, "momentum": 0.9, "dampening": 0.5}, forget),
        ({"lr": 0.05, "momentum": 0.9}, replace),
        ({"lr": 0.05, "momentum": 0.9}, two_groups),
        ({"betas": (0.9, 0.99), "eps": 1e-3}, count_on),
        ({"betas": (0.9, 0.99), "eps": 1e-3}, count_on_unseen),
        ({"betas": (0.9, 0.99), "eps": 1e-3}, count_apart),
        ({"betas": (0.9, 0.99), "eps": 1e-3}, share),
        ({"betas": (0.9, 0.99), "eps": 1e-3, "fused": True}, count_on),
    ],
    ids=[
        "rate",
        "state forgotten",
        "state replaced",
        "another group",
        "count",
        "count.data",
        "a count",
        "shared",
        "fused count",
    ],
)
@pytest.mark.sampled(3)
def test_what_changes_in_the_optimizer(options, change, device):
    """Between two calls; torch's optimiser, changed likewise, gives the expected results."""
    net = small().to(device)
    twin = copy.deepcopy(net)
    kind = torch.optim.Adam if "betas" in options else torch.optim.SGD
    optimizers = [kind(n.parameters(), **copy.deepcopy(options)) for n in (net, twin)]
    step = tritonnet.TrainStep(net, theirs.CrossEntropyLoss(), optimizers[0], "ieee")
    for i in range(2):
        images, labels = batch(net, (2, 1, 28, 28), device, i)
        step(images, labels)
        by_torch(twin, optimizers[1], images, labels)
        if i == 0:
            for n, optimizer in zip((net, twin), optimizers):
                change(n, optimizer)
    assert step.path == "fused launches"
    for p, q in zip(net.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert_same_state(optimizers[0].state_dict(), optimizers[1].state_dict(), 1e-3)

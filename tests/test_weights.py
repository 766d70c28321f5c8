"""Weights are never stale and never spoilt: the next evaluation and step use whatever was written to them.

Writes go to a LeNet's parameters and the optimiser's state; batches with a loss that is not finite change neither.
torch's own net and optimiser, treated likewise, are the truth.
"""

import contextlib
import copy
import gc
import io
import math
import multiprocessing
import os
import pickle
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from conftest import DEVICE
from exact import ROUNDOFF
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_train_step import INFERENCE, batch, by_torch, small
from test_train_step_optimizers import assert_same_state
from torch.optim.optimizer import register_optimizer_step_pre_hook

import tritonnet
from tritonnet import train_step
from tritonnet.lenet import step as lenet_step

pytestmark = pytest.mark.usefixtures("full_precision")

SIZE = (2, 1, 28, 28)
# Drawn interleavings, of which a thorough run makes one, and steps with a write between each two.
EXAMPLES = int(os.environ.get("TRITONNET_TEST_INTERLEAVINGS", 1))
STEPS = 50 if EXAMPLES > 50 else 8


@pytest.fixture(autouse=True)
def plain_operators(monkeypatch):
    """Models on the operators are not fused, and run on the reference: both take seconds and are tested elsewhere."""
    step = train_step.Operators.__call__

    def on_the_reference(self, *batch):
        with tritonnet.backend("reference"):
            return step(self, *batch)

    monkeypatch.setattr(train_step, "fuse", lambda model, report: model)
    monkeypatch.setattr(train_step.Operators, "__call__", on_the_reference)


def assert_same_weights(net, twin, tolerance=1e-4):
    for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance / 10, msg=f"{name} differs")


def by_numpy(p):
    if p.device.type == "cpu":
        p.detach().view(torch.int16 if p.dtype == torch.bfloat16 else torch.int32).numpy()[...] += 64
    else:
        p.data.mul_(1.01)


def average(p):
    """As an exponential moving average is swapped in."""
    p.data = 0.9 * p.data + 0.01


def in_another_order(p):
    strides = range(p.dim(), 0, -1)
    p.data = p.data.permute(*(i - 1 for i in strides)).contiguous().permute(*(i - 1 for i in strides))


def in_a_larger_one(p):
    """A view of other memory, at an offset that is not divisible by 16 bytes."""
    whole = torch.zeros(p.numel() + 3, dtype=p.dtype, device=p.device)
    whole[1:-2] = p.detach().flatten() * 1.1
    p.data = whole[1:-2].view(p.shape)


def in_shared_memory(p):
    p.data.mul_(0.7)
    p.share_memory_()


@torch.no_grad()
def without_gradients(p):
    p.add_(0.01)


# Writes that torch's version counter does not see, and writes that it does.
WRITES = {
    # Not the first filter: a convolution of constant images gives pixels that differ only by roundoff, and torch and
    # the kernels would send their gradients to different ones.
    "data.zero_": lambda p: p.data[1:].zero_(),
    "data.copy_": lambda p: p.data.copy_(torch.linspace(-0.2, 0.3, p.numel(), device=p.device).view(p.shape)),
    "data.clamp_": lambda p: p.data.clamp_(-0.05, 0.05),
    "data.mul_": lambda p: p.data.mul_(1.5),
    "data[...]": lambda p: p.data.__setitem__(0, 0.1),
    "detach().data": lambda p: p.detach().data.add_(0.02),
    "init": lambda p: torch.nn.init.constant_(p.data, 0.02),
    "numpy": by_numpy,
    "average": average,
    "another order": in_another_order,
    "larger": in_a_larger_one,
    "shared": in_shared_memory,
    "no_grad": without_gradients,
    "set_": torch.no_grad()(lambda p: p.set_(p.detach() * 1.2)),
    "foreach": lambda p: torch._foreach_mul_([p.data], 0.9),
}


def assert_evaluates(net, images, launched=INFERENCE):
    """Checks the logits against torch's layers with the current weights."""
    with torch.no_grad(), tritonnet.count_launches() as launches:
        found = net(images)
    assert launched is None or launches == launched
    with torch.no_grad(), tritonnet.backend("reference"):
        torch.testing.assert_close(found, net(images), rtol=1e-4, atol=1e-5)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.sampled(2)
def test_an_evaluation_sees_every_write(dtype, device):
    """To each parameter in turn; the net is also evaluated before, so that its kernels' weights could be stale."""
    net = tritonnet.LeNet(size=28).to(device, dtype).eval()
    images = batch(net, SIZE, device)[0].to(dtype)
    state = copy.deepcopy(net.state_dict())

    def evaluated():
        with torch.no_grad(), tritonnet.count_launches() as launches:
            found = net(images)
        assert launches == INFERENCE
        with torch.no_grad(), tritonnet.backend("reference"):
            truth = copy.deepcopy(net).double()(images.double())
        # Sixteen roundings, as in test_inference.
        assert (found.double() - truth).norm() < 16 * ROUNDOFF[dtype] * truth.norm()
        return found

    for i, (name, write) in enumerate(WRITES.items()):
        if dtype == torch.bfloat16 and i % 3:
            continue
        net.load_state_dict(state)
        before = evaluated()
        write(list(net.parameters())[i % 10])
        write(list(net.parameters())[(3 * i + 4) % 10])
        assert torch.equal(evaluated(), before) == (name == "another order"), name


def test_an_evaluation_sees_what_is_loaded_and_moved(device):
    torch.manual_seed(1)
    net, other = (tritonnet.LeNet(size=28).to(device).eval() for _ in range(2))
    images, _ = batch(net, SIZE, device)
    first = assert_evaluates(net, images)
    net.load_state_dict(other.state_dict())
    assert not torch.equal(assert_evaluates(net, images), first)
    net.load_state_dict({name: value * 0.5 for name, value in other.state_dict().items()}, assign=True)
    assert_evaluates(net, images)
    net.double().float().to(memory_format=torch.channels_last)
    assert_evaluates(net, images)
    parameters = list(net.parameters())
    vector = torch.linspace(-0.1, 0.1, sum(p.numel() for p in parameters), device=device)
    torch.nn.utils.vector_to_parameters(vector, parameters)
    assert_evaluates(net, images)
    # A size other than its layer's attribute says: torch's layers go by the parameter.
    net.fc3.weight, net.fc3.bias = (torch.nn.Parameter(torch.ones(size, device=device)) for size in ((12, 84), (12,)))
    assert assert_evaluates(net, images, None).shape == (2, 12)


def written(net, twin, name, i):
    """Writes to parameter i of both nets in the same way."""
    for n in (net, twin):
        WRITES[name](list(n.parameters())[i])


def test_steps_see_every_write(device, monkeypatch):
    """Weights clipped, averaged, moved or loaded between calls; a replayed graph uses their current addresses."""
    if device.type == "cpu":
        monkeypatch.setattr(lenet_step.FusedLaunches, "graphs_on", ("cpu",))
        monkeypatch.setattr(lenet_step, "capture", lambda launch, restore, device: [launch(), restore(), launch][2])
    net = small().to(device)
    twin = copy.deepcopy(net)
    optimizers = [torch.optim.SGD(n.parameters(), lr=0.02, momentum=0.9) for n in (net, twin)]
    step = tritonnet.TrainStep(net, TF.cross_entropy, optimizers[0], "ieee")
    # The kernels do not update parameters in other layouts than torch's.
    names = [name for name in WRITES if name != "another order"]
    for i in range(STEPS):
        name = names[i % len(names)]
        images, labels = batch(net, SIZE, device, i)
        torch.testing.assert_close(
            step(images, labels), by_torch(twin, optimizers[1], images, labels), rtol=1e-4, atol=1e-5
        )
        written(net, twin, name, (i + 8) % 10)
        assert_same_weights(net, twin)
    assert step.path == "fused launches"


OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, dampening=0.5, weight_decay=0.01),
    "Adam": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1, eps=1e-3),
    "fused Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, eps=1e-3, amsgrad=True, fused=True),
}
# Batches whose loss is not finite, by the change that makes them so; two for each optimizer.
SPOILT = {
    "an image": lambda images, labels: images[0, 0, 3].fill_(math.nan),
    "an infinite image": lambda images, labels: images[1].fill_(math.inf),
    "a label": lambda images, labels: labels[1].fill_(10),
    "a negative label": lambda images, labels: labels[0].fill_(-1),
}


def pair(make, device, **options):
    """A net with its step, and a twin with its optimizer."""
    net = small().to(device)
    twin = copy.deepcopy(net)
    optimizer, true = (OPTIMIZERS[make](n.parameters()) for n in (net, twin))
    return net, tritonnet.TrainStep(net, torch.nn.CrossEntropyLoss(), optimizer, "ieee", **options), twin, true


def steps_alike(net, step, twin, true, device, seeds):
    for seed in seeds:
        images, labels = batch(net, SIZE, device, seed)
        torch.testing.assert_close(step(images, labels), by_torch(twin, true, images, labels), rtol=1e-4, atol=1e-5)
    assert_same_weights(net, twin)
    assert_same_state(step.optimizer.state_dict(), true.state_dict())


@pytest.mark.parametrize("path", ["fused launches", "operators"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.sampled(3)
def test_no_update_from_a_loss_that_is_not_finite(name, path, device):
    """The twin never sees the spoilt batches, not even the first of all."""
    with tritonnet.backend("reference" if path == "operators" else "triton"):
        net, step, twin, true = pair(name, device)
        for i, spoilt in enumerate(list(SPOILT)[name == "Adam" :: 2]):
            if path == "operators" and "label" in spoilt:
                continue  # torch raises IndexError itself, or ends the GPU's context
            images, labels = batch(net, SIZE, device, 9)
            SPOILT[spoilt](images, labels)
            with pytest.raises(FloatingPointError, match="was not a finite number, and it made no update"):
                step(images, labels)
                step.check()
            assert_same_weights(net, twin, 1e-4 if i else 0)
            steps_alike(net, step, twin, true, device, [i])
        assert step.path == path


@pytest.mark.parametrize("path", ["fused launches", "operators"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.sampled(3)
def test_a_batch_in_which_every_label_is_ignored(name, path, device):
    """As in torch, the loss is NaN and the gradients zeros: momentum and decay go on. It is reported, too."""
    with tritonnet.backend("reference" if path == "operators" else "triton"):
        net, step, twin, true = pair(name, device)
        steps_alike(net, step, twin, true, device, [0])
        images, labels = batch(net, SIZE, device, 1)[0], torch.full(SIZE[:1], -100, device=device)
        with pytest.raises(FloatingPointError, match="gradients of zero, as torch makes it: every label was ignored"):
            step(images, labels)
            step.check()
        assert by_torch(twin, true, images, labels).isnan()
        steps_alike(net, step, twin, true, device, [2])
        if name == "Adam":
            # In torch, zeros times images that are not finite are NaN.
            with pytest.raises(FloatingPointError):
                step(torch.full_like(images, math.inf), labels)
                step.check()
            assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("path", ["fused launches", "operators"])
def test_a_group_of_calls_with_one_that_is_not_finite(path, device):
    """Its gradients are in the sum: the group makes no update, and the next begins anew."""
    with tritonnet.backend("reference" if path == "operators" else "triton"):
        net, step, twin, true = pair("Adam", device, accumulate=2)
        good, (bad, labels) = batch(net, SIZE, device, 1), batch(net, SIZE, device, 2)
        bad[0] = math.nan
        for first, second in ((good, (bad, labels)), ((bad, labels), good)):
            for images, targets in (first, second):
                with contextlib.suppress(FloatingPointError):
                    step(images, targets)
            with contextlib.suppress(FloatingPointError):
                step.check()
            assert_same_weights(net, twin, 0)
        step(*good), step(*good)
        by_torch(twin, true, *good)
        assert_same_weights(net, twin)
        assert_same_state(step.optimizer.state_dict(), true.state_dict())


def test_running_statistics_are_not_spoilt():
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.Flatten(), torch.nn.Linear(8, 3)
    )
    step = tritonnet.TrainStep(net, torch.nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), lr=0.1))
    step(torch.randn(3, 1, 4, 4), torch.tensor([0, 1, 2]))
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(FloatingPointError, match="call 2 was not"):
        step(torch.full((3, 1, 4, 4), math.nan), torch.tensor([0, 1, 2]))
    assert all(map(torch.equal, net.state_dict().values(), before.values()))


def test_gradients_of_a_group_that_somebody_changes(device):
    """Clipped, replaced and dropped in the middle of a group, by turns, as with autograd."""
    net, step, twin, true = pair("SGD", device, accumulate=2)
    changes = (
        lambda p: p.grad.mul_(0.5),
        lambda p: setattr(p, "grad", p.grad * 3),
        lambda p: setattr(p, "grad", None),
        lambda p: p.grad.data.clamp_(-1e-3, 1e-3),
    )
    for turn in range(2):
        images, labels = batch(net, SIZE, device, turn)
        step(images, labels)
        with tritonnet.backend("reference"):
            (TF.cross_entropy(twin(images), labels) / 2).backward()
        if turn == 0:
            for i, parameters in enumerate(zip(net.parameters(), twin.parameters())):
                for p in parameters:
                    changes[i % 4](p)
    true.step()
    assert_same_weights(net, twin)


def test_parameters_that_are_replaced(device):
    """As load_state_dict(assign=True) does: the optimizer keeps the old ones, in torch and in the step."""
    net, step, twin, true = pair("Adam", device)
    steps_alike(net, step, twin, true, device, [0])
    for n in (net, twin):
        n.load_state_dict({name: value * 0.5 for name, value in n.state_dict().items()}, assign=True)
    images, labels = batch(net, SIZE, device, 1)
    torch.testing.assert_close(step(images, labels), by_torch(twin, true, images, labels), rtol=1e-4, atol=1e-5)
    assert step.path == "operators" and step.reason == "parameters have been replaced"
    assert_same_weights(net, twin)


@pytest.mark.parametrize("change, reason", [("double", "dtype"), ("channels_last", "order"), ("tied", "share")])
@pytest.mark.sampled(3)
def test_parameters_that_the_kernels_cannot_update(change, reason, device):
    net, step, twin, true = pair("SGD", device)
    steps_alike(net, step, twin, true, device, [0])
    for n in (net, twin):
        if change == "tied":
            n.fc1.bias.data = n.fc2.weight.data[0, :].view(-1)
            n.fc2.weight.data = n.fc2.weight.data
        elif change == "double":
            n.double()
        else:
            n.to(memory_format=torch.channels_last)
    images, labels = batch(net, SIZE, device, 1)
    images = images.double() if change == "double" else images
    try:
        found = step(images, labels)
    except Exception as e:
        with pytest.raises(type(e)):
            by_torch(twin, true, images, labels)
        return
    torch.testing.assert_close(found, by_torch(twin, true, images, labels), rtol=1e-4, atol=1e-5)
    assert step.path == "operators" and reason in step.reason


def test_files_hold_what_they_should(device):
    """Every tensor of the model and of the optimizer's state has memory of its own."""
    net, step, *_ = pair("Adam", device, accumulate=2)
    images, labels = batch(net, SIZE, device)
    for _ in range(2):
        step(images, labels)
    states = [list(state.values()) for state in step.optimizer.state.values()]
    tensors = [*net.parameters(), *(p.grad for p in net.parameters()), *(t for state in states for t in state)]
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors)
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors) == 10 * (2 + 3)
    file = io.BytesIO()
    torch.save(net.fc3.bias, file)
    assert len(file.getvalue()) < 3000
    safetensors = pytest.importorskip("safetensors.torch")
    assert safetensors.load(safetensors.save(net.state_dict())).keys() == net.state_dict().keys()


@pytest.mark.skipif(DEVICE != "cpu" or not hasattr(os, "fork"), reason="needs the interpreter, and fork")
def test_updates_reach_other_processes():
    """With parameters in shared memory."""
    with tritonnet.backend("triton"):
        net = small()
        net.share_memory()
        step = tritonnet.TrainStep(net, TF.cross_entropy, torch.optim.SGD(net.parameters(), lr=0.1), "ieee")
        context = multiprocessing.get_context("fork")
        (ours, its), go = context.Pipe(), context.Event()

        def look():
            go.wait(60)
            its.send(np.asarray(net.fc3.bias.detach()).tolist())

        process = context.Process(target=look)
        process.start()
        step(*batch(net, SIZE, "cpu"))
        go.set()
        assert ours.poll(60) and ours.recv() == net.fc3.bias.tolist()
        process.join(60)
    assert all(p.is_shared() for p in net.parameters())


@pytest.mark.thorough
def test_defaults_of_torch(device):
    """A default device of "meta", which transformers sets while it loads a model, and a default dtype of float64."""
    results = []
    for changed in (False, True):
        torch.manual_seed(0)
        net, model = small().to(device), tritonnet.LeNet(size=28).to(device).eval()
        images, labels = batch(net, SIZE, device)
        with contextlib.ExitStack() as stack:
            if changed:
                stack.callback(torch.set_default_dtype, torch.get_default_dtype())
                stack.enter_context(torch.device("meta"))
                torch.set_default_dtype(torch.float64)
            step = tritonnet.TrainStep(net, torch.nn.CrossEntropyLoss(), OPTIMIZERS["Adam"](net.parameters()), "ieee")
            losses = [step(images, labels) for _ in range(2)]
            with torch.no_grad():
                results.append([*losses, model(images), *(p.detach() for p in net.parameters())])
        assert step.path == "fused launches"
    assert all(map(torch.equal, *results))


def test_images_and_modes_of_torch(device, no_graphs):
    """Images that are negative views, and tensors made in inference mode."""
    net = small().to(device)
    twin, model = copy.deepcopy(net), tritonnet.LeNet(size=28).to(device).eval()
    images, labels = batch(net, SIZE, device)
    negative = torch._neg_view(-images)
    with torch.inference_mode():
        step = tritonnet.TrainStep(net, TF.cross_entropy, torch.optim.Adam(net.parameters()), "ieee")
        first = model(images)
        with pytest.raises(RuntimeError, match="inference mode"):
            step(images, labels)
    true_step = tritonnet.TrainStep(twin, TF.cross_entropy, torch.optim.Adam(twin.parameters()), "ieee")
    assert step(negative, labels) == true_step(images, labels)
    assert all(map(torch.equal, net.parameters(), twin.parameters()))
    model.fc1.bias.data.mul_(1.0)
    with torch.no_grad():
        assert torch.equal(model(negative), first)


def assert_as_one_update(net, twin, true, batches):
    """One update of the twin, by the gradients of a group of calls, gives the same weights."""
    true.zero_grad()
    with tritonnet.backend("reference"):
        for images, labels in batches:
            (TF.cross_entropy(twin(images), labels) / len(batches)).backward()
    true.step()
    assert_same_weights(net, twin)


def test_a_group_that_goes_on_with_the_operators(device):
    """One of its calls was not finite before the step left the launches: its gradients are in the sum."""
    net, step, twin, true = pair("Adam", device, accumulate=2)
    good, (bad, labels) = batch(net, SIZE, device, 1), batch(net, SIZE, device, 2)
    bad[0] = math.nan
    with contextlib.suppress(FloatingPointError):
        step(bad, labels)
    hook = net.fc3.weight.register_hook(lambda g: g)
    with contextlib.suppress(FloatingPointError):
        step(*good)
    hook.remove()
    assert step.path == "operators" and not step.optimizer.state
    assert_same_weights(net, twin, 0)
    step(*good), step(*good)
    assert_as_one_update(net, twin, true, [good, good])


@pytest.mark.parametrize("change", ["resumed", "set back"])
@pytest.mark.sampled(2)
def test_a_state_that_others_brought_outlives_a_bad_batch(change, device):
    """A count of 0 does not mean an empty state: a group's first call has not read it, and counts may be set back."""
    net, step, twin, true = pair("Adam", device)
    steps_alike(net, step, twin, true, device, [0])
    if change == "resumed":
        step = tritonnet.TrainStep(net, TF.cross_entropy, step.optimizer, "ieee", accumulate=2)
    else:
        for optimizer in (step.optimizer, true):
            for state in optimizer.state.values():
                state["step"].zero_()
    images, labels = batch(net, SIZE, device, 1)
    images[0] = math.nan
    with pytest.raises(FloatingPointError):
        step(images, labels)
        step.check()
    assert_same_state(step.optimizer.state_dict(), true.state_dict())


def test_the_operators_find_no_state_that_the_launches_made(device):
    """torch's first momentum buffer is the gradient, without dampening."""
    net, step, twin, true = pair("SGD", device)
    for n in (net, twin):
        # Within the other's memory, at another address.
        n.fc1.bias.data = n.fc2.weight.data[1]
    steps_alike(net, step, twin, true, device, [0])
    assert step.path == "operators" and "share" in step.reason


@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.sampled(2)
def test_a_call_that_was_interrupted(turn, device, no_graphs, monkeypatch):
    """It is made once more: the earlier part of its group is not in the sum."""
    net, step, twin, true = pair("SGD", device, accumulate=2)
    batches = [batch(net, SIZE, device, i) for i in range(4)]

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    for i, (images, labels) in enumerate(batches):
        if i == 2 + turn:
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(lenet_step.lenet_forward, "forward", interrupted)
                step(images, labels)
        step(images, labels)
        if i % 2:
            assert_as_one_update(net, twin, true, batches[i - 1 : i + 1])


def test_operators_keep_no_model_and_a_copy_of_them_is_fused(monkeypatch):
    monkeypatch.setattr(train_step, "fuse", tritonnet.fuse)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3), torch.nn.ReLU())
    step = tritonnet.TrainStep(net, TF.cross_entropy, torch.optim.SGD(net.parameters(), lr=0.5))
    lines = []
    step._report = lines.append
    other = copy.deepcopy(step)
    for one in (step, other):
        one(torch.randn(2, 1, 2, 2), torch.tensor([0, 1]))
    assert lines and other.model._compiled_call_impl
    gone = [weakref.ref(whose) for one in (step, other) for whose in (one, one.model, one.optimizer)]
    del net, step, other, one
    gc.collect()
    assert not any(reference() for reference in gone)


def test_a_call_without_a_loss_is_none_of_its_group():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    twin = copy.deepcopy(net)
    optimizers = [torch.optim.SGD(n.parameters(), lr=0.5) for n in (net, twin)]
    step = tritonnet.TrainStep(net, TF.cross_entropy, optimizers[0], accumulate=2)
    images, labels = torch.randn(4, 1, 2, 2), torch.tensor([0, 1, 2, 0])
    with pytest.raises(RuntimeError):
        step(torch.randn(2, 1, 3, 2), labels[:2])
    step(images[:2], labels[:2]), step(images[2:], labels[2:])
    by_torch(twin, optimizers[1], images, labels)
    assert_same_weights(net, twin)


class Replacing(torch.nn.Module):
    """Its forward replaces its buffers by other tensors."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("latest", None)

    def forward(self, x):
        self.latest = x.detach().mean()
        self.mean = 0.9 * self.mean + 0.1 * self.latest
        return self.linear(x.flatten(1) - self.mean)


def test_buffers_that_are_replaced_are_not_spoilt():
    net, labels = Replacing(), torch.tensor([0, 1, 2])
    step = tritonnet.TrainStep(net, TF.cross_entropy, torch.optim.SGD(net.parameters(), lr=0.1))
    for _ in range(2):
        before = net.mean, net.latest
        with pytest.raises(FloatingPointError):
            step(torch.full((3, 1, 2, 2), math.nan), labels)
        assert net.mean is before[0] and net.latest is before[1]
        step(torch.randn(3, 1, 2, 2), labels)
        assert net.latest is not before[1]


@pytest.mark.parametrize("how, graphs", [("pickle", False), ("deepcopy", True)])
@pytest.mark.thorough
def test_copies_of_a_step(how, graphs, device, monkeypatch):
    """They continue from the step's state, and share neither its model nor its losses, in either direction."""
    if graphs and device.type == "cpu":
        monkeypatch.setattr(lenet_step.FusedLaunches, "graphs_on", ("cpu",))
        monkeypatch.setattr(lenet_step, "capture", lambda launch, restore, device: [launch(), restore(), launch][2])
    net = tritonnet.LeNet(size=28).to(device)
    step = tritonnet.TrainStep(net, TF.cross_entropy, OPTIMIZERS["Adam"](net.parameters()), "ieee")
    images, labels = batch(net, SIZE, device)
    first = step(images, labels)
    found, stayed = float(first), copy.deepcopy(net)
    other = copy.deepcopy(step) if how == "deepcopy" else pickle.loads(pickle.dumps(step))
    losses = [other(images, labels)]
    assert_same_weights(net, stayed, 0)
    losses.append(step(images, labels))
    assert torch.equal(*losses) and losses[0] != first == found
    assert_same_weights(net, other.model, 0)
    assert_same_state(step.optimizer.state_dict(), other.optimizer.state_dict(), 0)
    images[0] = math.nan
    with pytest.raises(FloatingPointError, match="call 3 "):
        other(images, labels)
        other.check()
    step.check()
    assert_same_weights(net, other.model, 0)


@pytest.mark.parametrize("change", [lambda g: g.double(), lambda g: g.t().contiguous().t()], ids=["dtype", "order"])
@pytest.mark.sampled(2)
def test_gradients_of_a_group_that_lie_otherwise(change, device):
    net, step, twin, true = pair("SGD", device, accumulate=2)
    batches = [batch(net, SIZE, device, i) for i in range(2)]
    step(*batches[0])
    net.fc2.weight.grad.data = change(net.fc2.weight.grad)
    step(*batches[1])
    assert step.path == "fused launches"
    assert_as_one_update(net, twin, true, batches)


def test_what_would_not_be_called_or_computed_takes_the_operators(device):
    """Hooks on every optimizer's steps, and gradients of images. An interruption on the way changes nothing."""
    seen = []

    def interrupted(line):
        if "operators" in line:
            raise KeyboardInterrupt

    net, step, *_ = pair("SGD", device)
    images, labels = batch(net, SIZE, device)
    hook = register_optimizer_step_pre_hook(lambda *_: seen.append(1))
    try:
        step(images, labels)
    finally:
        hook.remove()
    assert seen == [1] and step.reason == "the optimizer has hooks"
    net, step, *_ = pair("SGD", device, report=interrupted)
    images.requires_grad_()
    with pytest.raises(KeyboardInterrupt):
        step(images, labels)
    step(images, labels)
    assert images.grad.any() and step.reason == "images take gradients, too"


def test_a_scheduler_that_is_made_later(device, recwarn):
    _, step, *_ = pair("SGD", device)
    images, labels = batch(step.model, SIZE, device)
    step(images, labels)
    schedule = torch.optim.lr_scheduler.StepLR(step.optimizer, 1)
    step(images, labels)
    schedule.step()
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


@pytest.mark.thorough
def test_an_evaluation_keeps_no_model(device):
    """A parameter's hook may refer to the model, and a parameter that was replaced may be freed, too."""
    net = tritonnet.LeNet(size=28).to(device).eval()
    net.fc1.weight.register_hook(lambda g, net=net: g)
    images, _ = batch(net, SIZE, device)
    assert_evaluates(net, images)
    model, parameter = weakref.ref(net), weakref.ref(net.fc3.bias)
    net.fc3.bias = None
    gc.collect()
    assert parameter() is None
    assert_evaluates(net, images, None)
    del net
    gc.collect()
    assert model() is None


def test_an_evaluation_that_is_the_layers(device):
    """Under autocast to float16, with a method set on a layer, and for bytes of another size than the layers take."""
    net = tritonnet.LeNet().to(device).eval()
    images, _ = batch(net, (2, 1, 32, 32), device)
    assert_evaluates(net, images)
    with torch.no_grad(), torch.autocast(device.type, torch.float16), tritonnet.count_launches() as launches:
        assert net(images).dtype == torch.float16
    assert "lenet_forward_kernel" not in launches
    convolve = net.conv1._conv_forward
    net.conv1._conv_forward = lambda *arguments: 2 * convolve(*arguments)
    assert_evaluates(net, images, None)
    net = tritonnet.LeNet().to(device).eval()
    net.conv1 = tritonnet.nn.Conv2dReLUMaxPool2d(1, 6, 5, padding=2).to(device)
    with torch.no_grad(), pytest.raises(RuntimeError):
        net(torch.zeros(2, 1, 28, 28, dtype=torch.uint8, device=device))
    step = tritonnet.TrainStep(net, TF.cross_entropy, torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="images must be"):
        step(torch.zeros(2, 1, 28, 28, dtype=torch.uint8, device=device), torch.zeros(2, dtype=torch.int64))


# What a test draws between a step or an evaluation and the next: writes, loads, moves, and edits of the optimizer.
EDITS = {
    "rate": lambda net, optimizer: optimizer.param_groups[0].update(lr=optimizer.param_groups[0]["lr"] * 0.7),
    "forget": lambda net, optimizer: optimizer.state.pop(net.fc2.weight, None),
    "moments": lambda net, optimizer: [
        t.data.mul_(0.5) for state in optimizer.state.values() for name, t in state.items() if name != "step"
    ],
    "counts": lambda net, optimizer: [
        state["step"].data.fill_(5) for state in optimizer.state.values() if "step" in state
    ],
    "a moment": lambda net, optimizer: [
        state.update({name: t.clone() * 2}) for state in optimizer.state.values() for name, t in [*state.items()][-1:]
    ],
    "load": lambda net, optimizer: net.load_state_dict({k: v * 0.9 for k, v in net.state_dict().items()}),
    "load optimizer": lambda net, optimizer: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
    "move": lambda net, optimizer: net.double().float(),
    "share": lambda net, optimizer: net.share_memory() and None,
}
DRAWN = st.one_of(
    st.just(("step",)),
    st.just(("evaluate",)),
    st.just(("ignored",)),
    st.just(("spoilt",)),
    st.tuples(
        st.just("write"), st.sampled_from([name for name in WRITES if name != "another order"]), st.integers(0, 9)
    ),
    st.tuples(st.just("edit"), st.sampled_from(list(EDITS))),
)


@pytest.mark.thorough
@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(st.sampled_from(list(OPTIMIZERS)), st.lists(DRAWN, min_size=4, max_size=8))
def test_drawn_interleavings(name, drawn):
    """TRITONNET_TEST_INTERLEAVINGS asks for more than the one that a thorough run makes."""
    torch.manual_seed(0)
    with tritonnet.backend("triton"):
        net = tritonnet.LeNet(size=28).to(DEVICE)
        twin = copy.deepcopy(net)
        optimizers = [OPTIMIZERS[name](n.parameters()) for n in (net, twin)]
        step = tritonnet.TrainStep(net, torch.nn.CrossEntropyLoss(), optimizers[0], "ieee")
        for i, (what, *how) in enumerate([*drawn, ("step",), ("evaluate",)]):
            images, labels = batch(net, SIZE, DEVICE, i)
            if what == "write":
                written(net, twin, *how)
            elif what == "edit":
                for n, optimizer in zip((net, twin), optimizers):
                    EDITS[how[0]](n, optimizer)
            elif what == "evaluate":
                assert_evaluates(net.eval(), images)
                net.train()
            elif what == "spoilt":
                images[0] = math.nan
                with pytest.raises(FloatingPointError):
                    step(images, labels)
            elif what == "ignored":
                labels.fill_(-100)
                with pytest.raises(FloatingPointError):
                    step(images, labels)
                by_torch(twin, optimizers[1], images, labels)
            else:
                found = step(images, labels)
                torch.testing.assert_close(found, by_torch(twin, optimizers[1], images, labels), rtol=1e-3, atol=1e-4)
        assert step.path == "fused launches"
        assert_same_weights(net, twin, 1e-3)

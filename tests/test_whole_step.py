"""tritonnet.TrainStep of any model: the update by torch's fused implementation, and the whole step as a CUDA graph.

Without a GPU a stand-in captures: it records torch's operators with the tensors and numbers that they are given, as a
graph has them, and undoes what they have written. A wait of the host for a number raises, as it does in a capture.
"""

import copy
import math
import pickle
import random
import re

import pytest
import torch
import torch.nn.functional as TF
from conftest import DEVICE
from test_step_on_host import Far
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tritonnet
from tritonnet import train_step
from tritonnet.lenet import losses
from tritonnet.lenet.graph import NotCaptured
from tritonnet.whole_step import WholeStep, replay
from tritonnet.whole_step.replay import Buffers
from tritonnet.whole_step.update import Update

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="stands in for a GPU's graphs")

WAITS = "aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero"
OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "SGD momentum": lambda parameters: torch.optim.SGD(
        parameters, lr=0.1, momentum=0.9, dampening=0.2, weight_decay=1e-2, maximize=True
    ),
    "SGD nesterov": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, amsgrad=True, weight_decay=0.1),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "AdamW fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    "groups": lambda parameters: torch.optim.AdamW(
        [{"params": [p], "lr": 0.01 * (i + 1), "amsgrad": i % 2 == 1} for i, p in enumerate(parameters)]
    ),
    "rate in a tensor": lambda parameters: torch.optim.Adam(parameters, lr=torch.tensor(0.01, dtype=torch.float64)),
}


def tensors_of(tree):
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


class Recording(TorchDispatchMode):
    """The stand-in for a graph: what was called, to be called again on the same tensors."""

    def __init__(self):
        super().__init__()
        self.calls, self.before, self.seen, self.replays = [], [], [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function._schema.name in WAITS:
            raise RuntimeError(f"{function} is not permitted when stream is capturing")
        # Not only what a schema marks as written: batch norm's statistics are not marked.
        self.before += [(t, t.clone()) for t in tensors_of((args, kwargs)) if not any(t is seen for seen in self.seen)]
        result = function(*args, **kwargs)
        self.seen += tensors_of((args, kwargs, result))
        self.calls.append((function, args, kwargs, tensors_of(result)))
        return result

    @torch.no_grad()
    def undo(self):
        for t, before in reversed(self.before):
            t.copy_(before)

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for function, args, kwargs, results in self.calls:
            for t, value in zip(results, tensors_of(function(*args, **kwargs))):
                if t.data_ptr() != value.data_ptr():
                    t.copy_(value)


@pytest.fixture(autouse=True)
def unfused(monkeypatch):
    """In plain torch, without Dynamo, whose captures take seconds."""
    monkeypatch.setattr(train_step, "fuse", lambda model, report: model)
    with tritonnet.backend("reference"):
        yield


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that have been captured."""
    captured = []

    def record(launch, stream, pool):
        recording = Recording()
        try:
            with recording:
                launch()
        except Exception as e:
            raise NotCaptured(str(e)) from e
        finally:
            recording.undo()
        captured.append(recording)
        return recording.replay

    monkeypatch.setattr(replay, "record", record)
    monkeypatch.setattr(WholeStep, "graphs_on", ("cpu",))
    return captured


def make_net():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 3, 3, bias=False), torch.nn.BatchNorm2d(3), torch.nn.ReLU(), torch.nn.Flatten(),
        torch.nn.Linear(12, 4),
    ).double()  # fmt: skip


def batch(n=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 1, 4, 4, generator=generator, dtype=torch.float64)
    return images, torch.randint(4, (n,), generator=generator)


def test_a_capture_that_is_interrupted(graphs):
    """Nothing has run, and the next call is captured."""
    step = step_of(make_net(), "SGD")
    step(*batch())
    before = everything(step.model, step.optimizer), [p.grad for p in step.model.parameters()]
    handle = step._step.operators.loss
    step._step.operators.loss = lambda y, labels: interrupt()
    with pytest.raises(KeyboardInterrupt):
        step(*batch())
    assert_same((everything(step.model, step.optimizer), [p.grad for p in step.model.parameters()]), before)
    step._step.operators.loss = handle
    for _ in range(2):
        step(*batch())
    assert [graph.replays for graph in graphs] == [1]


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_failed_capture_is_a_warning_where_nothing_is_reported(graphs):
    step = step_of(Waiting(make_net()), "SGD")
    step(*batch())
    with pytest.warns(RuntimeWarning, match="Waiting: without a CUDA graph, because capturing it failed") as caught:
        step(*batch())
    assert caught[0].filename == __file__


def step_of(net, name="SGD momentum", loss=TF.cross_entropy, **options):
    make = OPTIMIZERS[name] if isinstance(name, str) else name
    return tritonnet.TrainStep(net, loss, make(list(net.parameters())), **options)


def by_torch(net, optimizer, images, labels, loss=TF.cross_entropy):
    optimizer.zero_grad()
    value = loss(net(images), labels)
    value.backward()
    optimizer.step()
    return value.detach()


def everything(net, optimizer):
    """Parameters, buffers, and the optimizer's state in torch's own layout."""
    return copy.deepcopy([net.state_dict(), optimizer.state_dict()["state"]])


def assert_same(found, true, tolerance=0.0):
    assert str(torch.utils._pytree.tree_structure(found)) == str(torch.utils._pytree.tree_structure(true))
    for t, value in zip(tensors_of(found), tensors_of(true), strict=True):
        torch.testing.assert_close(t, value, rtol=tolerance, atol=tolerance, equal_nan=True)


def without_graphs(monkeypatch, run):
    with monkeypatch.context() as patch:
        patch.setattr(WholeStep, "graphs_on", ())
        return run()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_same_bits_and_torch_s_training(name, graphs, monkeypatch):
    """Two sizes of batches and a rate that changes at each call: two captures, and the rest are replays."""
    sizes = 3, 3, 3, 2, 3, 2, 2, 3

    def train(by_the_step=True):
        net = make_net()
        step = step_of(net, name)
        optimizer = step.optimizer
        groups = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
        if name != "rate in a tensor":
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            groups = None
        values = []
        for i, size in enumerate(sizes):
            values.append(step(*batch(size, i)) if by_the_step else by_torch(net, optimizer, *batch(size, i)))
            schedule.step() if groups is None else optimizer.param_groups[0]["lr"].mul_(0.9)
        return values, everything(net, optimizer), step.reason

    found = train()
    # The first call makes the optimizer's state, if there is any, and the second leaves everything as it was.
    assert [graph.replays for graph in graphs] == [4 if name == "SGD" else 3, 2]
    assert "CUDA graph" not in found[2]
    assert_same(found[:2], without_graphs(monkeypatch, train)[:2])
    assert len(graphs) == 2
    assert_same(found[:2], train(by_the_step=False)[:2], 1e-12)


def test_a_float32_net_of_our_kernels(graphs):
    """In the interpreter, whose kernels are among what is recorded."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    twin = copy.deepcopy(net)
    optimizers = [torch.optim.Adam(n.parameters(), lr=0.1) for n in (net, twin)]
    with tritonnet.backend("triton"):
        step = tritonnet.TrainStep(net, TF.cross_entropy, optimizers[0], "ieee")
        for _ in range(4):
            images, labels = torch.randn(4, 6), torch.randint(3, (4,))
            loss = step(images, labels)
            torch.testing.assert_close(loss, by_torch(twin, optimizers[1], images, labels), rtol=1e-5, atol=1e-6)
    assert graphs[0].replays == 2
    for p, q in zip(net.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["SGD momentum", "AdamW", "AdamW fused"])
def test_a_loss_that_is_not_finite_makes_no_update(name, graphs):
    net = make_net()
    step, twin = step_of(net, name), make_net()
    true = step_of(twin, name)
    for i in range(6):
        images, labels = batch(seed=i)
        if i in (1, 4):
            before = everything(net, step.optimizer)
            with pytest.raises(
                FloatingPointError, match=f"call {i + 1} was not a finite number, and it made no update"
            ):
                step(images * math.nan, labels)
            assert_same(everything(net, step.optimizer), before)
            assert all(p.grad.isnan().any() for p in net.parameters())
        else:
            assert torch.equal(step(images, labels), true(images, labels))
    assert graphs[0].replays == 3
    assert_same(everything(net, step.optimizer), everything(twin, true.optimizer))


@pytest.mark.parametrize("spoilt", [False, True])
def test_labels_that_are_all_ignored(spoilt, graphs, monkeypatch):
    """The gradients are zeros and make an update, unless the images are not finite."""

    def train():
        net = make_net()
        step = step_of(net, "AdamW", torch.nn.CrossEntropyLoss(ignore_index=3))
        for i in range(5):
            images, labels = batch(seed=i)
            if i == 3:
                what = "no update" if spoilt else "every label was ignored"
                with pytest.raises(FloatingPointError, match=what):
                    step(images * (math.nan if spoilt else 1), torch.full_like(labels, 3))
            else:
                step(images, labels)
        assert step.optimizer.state[net[0].weight]["step"] == (4 if spoilt else 5)
        return everything(net, step.optimizer)

    found = train()
    assert graphs[0].replays == 3
    assert_same(found, without_graphs(monkeypatch, train))


@pytest.mark.parametrize("name", ["SGD nesterov", "Adam"])
def test_losses_that_are_reported_later(name, graphs, monkeypatch):
    """As on a GPU that lags behind: the host has counted updates that were not made, until it hears of the loss."""
    monkeypatch.setattr(replay, "FirstBad", Far)
    monkeypatch.setattr(losses, "LOOK_EVERY", 8)
    net, twin = make_net(), make_net()
    step, optimizer = step_of(net, name), OPTIMIZERS[name](list(twin.parameters()))
    reported = []
    for i in range(24):
        images, labels = batch(seed=i)
        spoilt = i in (5, 6, 12)
        try:
            step(images * (math.nan if spoilt else 1), labels)
        except FloatingPointError as e:
            reported.append((i, str(e)))
        if not spoilt:
            by_torch(twin, optimizer, images, labels)
    assert len(reported) == 1 and reported[0][0] == 15 and "call 6 was" in reported[0][1]
    step.check()
    assert_same(everything(net, step.optimizer), everything(twin, optimizer), 1e-10)
    assert len(graphs) == 1


CHANGES = {
    # (what happens between two calls, captures after it)
    "load the model": (lambda net, o: net.load_state_dict({k: v * 2 for k, v in net.state_dict().items()}), 0),
    "write a weight": (lambda net, o: net[0].weight.data.mul_(2), 0),
    "write momentum": (lambda net, o: o.state[net[0].weight]["exp_avg"].mul_(2), 0),
    "write a count": (lambda net, o: o.state[net[0].weight]["step"].fill_(7), 0),
    "load the optimizer": (lambda net, o: o.load_state_dict(copy.deepcopy(o.state_dict())), 1),
    "forget state": (lambda net, o: o.state.pop(net[0].weight), 1),
    "betas": (lambda net, o: o.param_groups[0].update(betas=(0.5, 0.9)), 1),
    "memory": (lambda net, o: setattr(net[0].weight, "data", net[0].weight.data * 2), 1),
    "parameter": (lambda net, o: net[4].bias.requires_grad_(False), 1),
    "evaluation": (lambda net, o: net[1].eval(), 1),
    "attribute": (lambda net, o: setattr(net[1], "eps", 0.1), 1),
    "buffer": (lambda net, o: setattr(net[1], "running_mean", torch.ones(3, dtype=torch.float64)), 1),
    "layer": (lambda net, o: net.insert(3, torch.nn.Tanh()), 1),
    "group": (lambda net, o: o.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]}), 1),
    "gradients": (lambda net, o: o.zero_grad(), 0),
    "hook": (lambda net, o: net[4].register_forward_hook(lambda m, x, y: y * 2) and None, 0),
    "gradient hook": (lambda net, o: net[4].bias.register_hook(lambda g: g * 2) and None, 0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_between_calls(name, graphs):
    """The next call goes by what is there now, and later ones are captured anew only where a graph would not."""
    change, captures = CHANGES[name]
    net, twin = make_net(), make_net()
    step, optimizer = step_of(net, "AdamW"), OPTIMIZERS["AdamW"](list(twin.parameters()))
    for i in range(8):
        loss = step(*batch(seed=i))
        torch.testing.assert_close(loss, by_torch(twin, optimizer, *batch(seed=i)), rtol=1e-12, atol=1e-12)
        if i == 3:
            for n, o in ((net, step.optimizer), (twin, optimizer)):
                change(n, o)
    assert len(graphs) == 1 + captures
    assert ("hooks" in step.reason) == ("hook" in name)
    assert_same(everything(net, step.optimizer)[1], everything(twin, optimizer)[1], 1e-10)


class Product(torch.nn.Module):
    """A product of torch's own, for which autocast keeps a copy of the weight."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(16, 4))

    def forward(self, x):
        return torch.mm(x.flatten(1), self.weight)


def test_an_autocast_around_several_calls(graphs):
    """Each call takes the weights of the update before, as if autocast were entered for it alone."""
    steps = [step_of(Product(), "SGD") for _ in range(2)]
    steps[1].model.load_state_dict(steps[0].model.state_dict())
    batches = [(images.float(), labels) for images, labels in (batch(seed=i) for i in range(5))]
    for images, labels in batches:
        steps[0](images, labels)
        steps[1](images, labels)
    with torch.autocast("cpu", torch.bfloat16):
        found = [steps[0](images, labels) for images, labels in batches]
    for loss, (images, labels) in zip(found, batches):
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(loss, steps[1](images, labels))
    assert [graph.replays for graph in graphs] == [4] * 4
    assert_same(everything(steps[0].model, steps[0].optimizer), everything(steps[1].model, steps[1].optimizer))


def test_what_follows_every_call_is_called(graphs):
    seen = []

    class Following(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    step = step_of(make_net(), "SGD")
    for _ in range(3):
        step(*batch())
    with Following():
        step(*batch())
    images, labels = batch()
    step(images.requires_grad_(), labels)
    assert seen and images.grad.any() and graphs[0].replays == 2
    step(*batch())
    assert graphs[0].replays == 3


class Waiting(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.calls = net, 0

    def forward(self, x):
        y = self.net(x)
        return y * 2 if y.sum() > 0 else y


class Counting(Waiting):
    def forward(self, x):
        self.calls += 1
        return self.net(x) * self.calls


class Random(Waiting):
    def forward(self, x):
        return self.net(x) * random.random()


class RandomOfTorch(Waiting):
    def forward(self, x):
        return self.net(x) * torch.rand(1, dtype=torch.float64)


def cumulative():
    net = make_net()
    net[1].momentum = None
    return net


def with_another_parameter():
    net = make_net()
    net.register_parameter("other", torch.nn.Parameter(torch.ones(2)))
    return net


def all_but_the_last(parameters):
    return torch.optim.SGD(parameters[:-1], lr=0.1)


OBSTACLES = {
    "another optimizer": (make_net, lambda p: torch.optim.RMSprop(p, lr=0.01), {}, "the optimizer is a RMSprop"),
    "accumulated": (make_net, "SGD", {"accumulate": 2}, "are accumulated"),
    "cumulative averages": (cumulative, "SGD", {}, "without momentum"),
    "some parameters": (make_net, all_but_the_last, {}, "does not have all"),
    "a wait": (lambda: Waiting(make_net()), "Adam", {}, "capturing it failed: .* not permitted"),
    "an attribute": (lambda: Counting(make_net()), "SGD", {}, "changes attributes"),
    "random numbers": (lambda: Random(make_net()), "SGD", {}, "random numbers on the host"),
    "random numbers of torch": (lambda: RandomOfTorch(make_net()), "SGD", {}, "random numbers on the host"),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_what_cannot_be_captured_takes_the_operators(name, graphs, monkeypatch):
    """It trains to the bits of a step without graphs, and says why once, also after a capture that fails."""
    make, optimizer, options, reason = OBSTACLES[name]

    def train():
        net, lines = make(), []
        step = step_of(net, optimizer, report=lines.append, **options)
        torch.manual_seed(1)
        random.seed(1)
        values = [step(*batch(seed=i)) for i in range(5)]
        grads = [p.grad for p in net.parameters()]
        return (values, grads, everything(net, step.optimizer)), lines, step.reason

    found, lines, why = train()
    assert not graphs and len(lines) == 2
    assert lines[1].partition(": ")[2] in why
    assert re.search(f"without a CUDA graph, because .*{reason}", lines[1])
    assert_same(found, without_graphs(monkeypatch, train)[0])


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda step: pickle.loads(pickle.dumps(step))], ids=["deepcopy", "pickle"]
)
def test_copies_of_a_step(how, graphs):
    """They go on from its state with graphs of their own."""
    step = step_of(make_net(), "AdamW")
    for i in range(3):
        step(*batch(seed=i))
    other = copy.deepcopy(step) if how == "deepcopy" else pickle.loads(pickle.dumps(step))
    for i in range(3, 7):
        assert torch.equal(step(*batch(seed=i)), other(*batch(seed=i)))
    assert_same(everything(step.model, step.optimizer), everything(other.model, other.optimizer))
    assert [graph.replays for graph in graphs] == [5, 3]
    with pytest.raises(FloatingPointError, match="call 8 "):
        other(batch()[0] * math.inf, batch()[1])
    step.check()


def test_gradients_and_losses_after_a_call(graphs):
    """p.grad is the gradient of the latest call, in memory that the next replay writes to; a loss is never changed."""
    net, twin = make_net(), make_net()
    step, optimizer = step_of(net, "SGD"), OPTIMIZERS["SGD"](list(twin.parameters()))
    kept_losses, values = [], []
    for i in range(6):
        kept_losses.append(step(*batch(seed=i)))
        values.append(kept_losses[-1].item())
        by_torch(twin, optimizer, *batch(seed=i))
        for p, q in zip(net.parameters(), twin.parameters()):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)
        if i == 3:
            kept = net[0].weight.grad
        if i == 4:
            assert net[0].weight.grad is kept
            net.zero_grad()
    assert graphs[0].replays == 5 and [loss.item() for loss in kept_losses] == values


def test_autograd_notices_a_replay(graphs):
    step = step_of(make_net(), "SGD")
    for i in range(2):
        step(*batch(seed=i))
    weight = step.model[4].weight
    y = (weight * weight).sum()
    step(*batch())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_the_kinds_used_last_are_kept(graphs, monkeypatch):
    monkeypatch.setattr(replay, "MOST_BATCHES", 2)
    step = step_of(make_net(), "SGD")
    for size in (2, 2, 3, 3, 2, 4, 4, 2, 3, 3):
        step(*batch(size))
    # The second batch of 4 puts out that of 3, which is captured once more.
    assert [graph.replays for graph in graphs] == [3, 1, 1, 1]


@pytest.mark.parametrize("ran", [False, True])
def test_a_replay_that_is_interrupted(ran, graphs, monkeypatch):
    """Whether it has made its update is not known; it is not counted, on the host or on the device."""
    step = step_of(make_net(), "Adam")
    for i in range(6):
        if i == 4:
            kind = next(iter(step._step._kinds.values()))
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(kind, "replay", lambda replay=kind.replay: [replay() if ran else None, interrupt()])
                step(*batch(seed=i))
        step(*batch(seed=i))
    assert len(graphs) == 1
    assert {state["step"].item() for state in step.optimizer.state.values()} == {6}
    assert set(step._step.update._counts.tolist()) == {6}


def test_a_fused_model(graphs, monkeypatch):
    monkeypatch.setattr(train_step, "fuse", tritonnet.fuse)
    net, twin = make_net(), make_net()
    step, optimizer = step_of(net), OPTIMIZERS["SGD momentum"](list(twin.parameters()))
    for i in range(4):
        step(*batch(seed=i))
        by_torch(twin, optimizer, *batch(seed=i))
    assert graphs[0].replays == 2
    assert_same(everything(net, step.optimizer), everything(twin, optimizer), 1e-10)


@pytest.mark.parametrize("back", [False, True])
def test_buffers_are_put_back(back):
    """Of several types, with and without elements, in any order of memory, and expanded ones, which nothing writes."""
    buffers = [
        torch.randn(3), torch.tensor(5), torch.randn(4, 2).t(), torch.empty(0), torch.ones(1).expand(3),
        torch.tensor([True, False]), torch.randn(2, 2), torch.randn(6)[::2],
    ]  # fmt: skip
    copies, before = Buffers(buffers), [b.clone() for b in buffers]
    for b in buffers[:4] + buffers[5:]:
        b.copy_(torch.full_like(b, math.nan if b.is_floating_point() else 0))
    copies.put_back(torch.tensor(back))
    for b, value in zip(buffers, before):
        assert torch.equal(b, value) == (back or not b.numel() or b.stride() == (0,))


def pairs_of(name, count=2):
    """Parameters in several orders of memory, and their optimizers."""
    found = []
    for _ in range(count):
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((8, 1, 3, 3), (5,), (), (0,), (4, 3, 2, 2))]
        for p in (parameters[0], parameters[4]):
            p.data = p.data.to(memory_format=torch.channels_last)
        found.append((parameters, OPTIMIZERS[name](parameters)))
    return found


def draw_gradients(parameters, seed, count):
    torch.manual_seed(seed)
    for p in parameters[:count]:
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape))
    parameters[0].grad = parameters[0].grad.contiguous().view(8, 1, 3, 3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_update_is_torch_s_fused_one_to_the_bit(name):
    (parameters, optimizer), (twins, fused) = pairs_of(name)
    for group in fused.param_groups:
        group.update(fused=True, foreach=False)
    update = Update(optimizer)
    for i in range(3):
        draw_gradients(parameters, i, 5), draw_gradients(twins, i, 5)
        update()
        fused.step()
    assert update.refusal() is None and all(map(torch.equal, parameters, twins))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_update_leaves_groups_and_layout_as_they_are(name):
    """Also for gradients that come later. Checkpoints load both ways."""
    (parameters, optimizer), (twins, true) = pairs_of(name)
    groups = [{**group, "params": None} for group in optimizer.param_groups]
    update = Update(optimizer)
    for i in range(6):
        draw_gradients(parameters, i, 2 if i < 2 else 5), draw_gradients(twins, i, 2 if i < 2 else 5)
        update()
        true.step()
        if i == 4:
            states = optimizer.state_dict(), true.state_dict()
            assert_same(states[0]["state"], states[1]["state"], 1e-5)
            optimizer.load_state_dict(copy.deepcopy(states[1])), true.load_state_dict(copy.deepcopy(states[0]))
            groups = [{**group, "params": None} for group in optimizer.param_groups]
    assert update.refusal() is None and groups == [{**group, "params": None} for group in optimizer.param_groups]
    for p, q in zip(parameters, twins):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        for state, its in ((optimizer.state[p], true.state[q]),) if optimizer.state else ():
            assert {k: (t.dtype, t.shape) for k, t in state.items()} == {k: (t.dtype, t.shape) for k, t in its.items()}


def test_state_that_lies_otherwise_is_converted():
    """As of a checkpoint in NCHW for weights in channels_last."""
    (parameters, optimizer), (twins, true) = pairs_of("AdamW")
    for p, o, update in ((parameters, optimizer, Update(optimizer)), (twins, true, true.step)):
        for i in range(3):
            draw_gradients(p, i, 5)
            update()
            for state in o.state.values():
                state["exp_avg"] = state["exp_avg"].contiguous()
    for p, q in zip(parameters, twins):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


class Stepped(torch.optim.SGD):
    """Another rule under the name of step."""

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.data -= 1


def replace_step(optimizer):
    before = optimizer.step
    optimizer.step = lambda: [before(), before()]


REFUSALS = {
    "a subclass": (lambda ps: Stepped(ps, lr=0.1), lambda o: None, "is a Stepped"),
    "a hook": (OPTIMIZERS["SGD"], lambda o: o.register_step_post_hook(lambda *_: ps_of(o)[0].data.zero_()), "hooks"),
    "another step": (OPTIMIZERS["SGD"], replace_step, "replaced"),
    "tensors": (
        lambda ps: torch.optim.Adam(ps, betas=(torch.tensor(0.9), torch.tensor(0.9)), foreach=False), lambda o: None,
        "are tensors",
    ),
    "gradients in another order": (
        OPTIMIZERS["SGD"], lambda o: setattr(ps_of(o)[4], "grad", ps_of(o)[4].grad.contiguous()), "do not lie",
    ),
    "sparse gradients": (
        lambda ps: torch.optim.SGD(ps, lr=0.1, foreach=False),
        lambda o: setattr(ps_of(o)[1], "grad", ps_of(o)[1].grad.to_sparse()), "do not lie",
    ),
}  # fmt: skip


def ps_of(optimizer):
    return optimizer.param_groups[0]["params"]


@pytest.mark.parametrize("name", REFUSALS)
def test_what_the_fused_update_does_not_serve_is_the_optimizer_s_own(name, monkeypatch):
    make, change, reason = REFUSALS[name]
    monkeypatch.setitem(OPTIMIZERS, "this", make)
    found = pairs_of("this")
    for parameters, optimizer in found:
        draw_gradients(parameters, 0, 5)
        change(optimizer)
    update = Update(found[0][1])
    assert reason in update.refusal()
    update()
    found[1][1].step()
    assert all(map(torch.equal, found[0][0], found[1][0]))


def test_schedulers_hear_of_an_update(recwarn):
    (parameters, optimizer), *_ = pairs_of("AdamW")
    update = Update(optimizer)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    draw_gradients(parameters, 0, 5)
    update()
    schedule.step()
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]

"""A training step apart from its launches: devices, streams and captures, losses, and no repeated work."""

import contextlib
import copy
import itertools
import types
import warnings

import pytest
import torch
import torch.nn.functional as TF
import triton
import triton.language as tl
from conftest import DEVICE
from test_train_step import small
from torch.utils._python_dispatch import TorchDispatchMode

import tritonnet
from bench import cpu, measure, report
from bench.record import Record
from tritonnet import ops
from tritonnet.kernels import _common, launchers, launching
from tritonnet.kernels.lenet import forward as lenet_forward
from tritonnet.kernels.lenet import layout as lenet
from tritonnet.kernels.lenet import update as lenet_update
from tritonnet.lenet import losses
from tritonnet.lenet import step as lenet_step
from tritonnet.lenet import weights as lenet_weights
from tritonnet.lenet.optimizer import _powers

on_the_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="stands in for a GPU")


def adam(net):
    return torch.optim.Adam(net.parameters(), lr=0.01, eps=1e-3)


def make_step(net, **options):
    return tritonnet.TrainStep(net, torch.nn.CrossEntropyLoss(), adam(net), "ieee", **options)


def batch(n, device="cpu", seed=0, side=28):
    torch.manual_seed(seed)
    return torch.randn(n, 1, side, side, device=device), torch.randint(10, (n,), device=device)


@contextlib.contextmanager
def hooked(hook):
    """Calls hook(kernel's name, its arguments by name) before every launch."""
    hooks = []
    for kernel in launchers.KERNELS:

        def before(*args, kernel=kernel, **kwargs):
            hook(kernel.fn.__name__, {**dict(zip(kernel.arg_names, args)), **kwargs})

        kernel.add_pre_run_hook(before)
        hooks.append((kernel, before))
    try:
        yield
    finally:
        for kernel, before in hooks:
            kernel.pre_run_hooks.remove(before)


def test_every_launch_is_on_the_device_of_its_tensors(device, monkeypatch):
    """Triton launches on the current device: a step, an inference and an operator all set it to their tensors'."""
    current, seen = [], []

    @contextlib.contextmanager
    def on_device(device):
        current.append(device)
        yield
        current.pop()

    def hook(name, arguments):
        devices = {value.device for value in arguments.values() if isinstance(value, torch.Tensor)}
        assert current and devices == {current[-1]}, f"{name} on {devices} while the device is {current}"
        seen.append(name)

    for module in (ops, lenet_step, lenet_weights):
        monkeypatch.setattr(module, "on_device", on_device)
    net = tritonnet.LeNet().to(device)
    images, labels = batch(2, device, side=32)
    with hooked(hook):
        make_step(net)(images, labels)
        with torch.no_grad():
            net.eval().fc3.bias += 1
            net(images)
        TF.cross_entropy(net.train()(images), labels).backward()
    assert {f"lenet_{name}_kernel" for name in ("pack", "forward", "gradient", "update")} < set(seen) and not current


def test_tiles_and_architectures_of_two_cards(monkeypatch):
    active = types.SimpleNamespace(get_current_device=lambda: number, get_current_target=lambda: targets[number])
    targets = [types.SimpleNamespace(backend="cuda", arch=arch) for arch in (80, 90)]
    monkeypatch.setattr(_common, "INTERPRETED", False)
    monkeypatch.setattr(_common, "driver", types.SimpleNamespace(active=active))
    _common._capability.cache_clear()
    tile_for = _common.cached_for_architecture(lambda images: (images, _common.compute_capability()))
    try:
        for number in (0, 1, 0):  # noqa: B007  (read by get_current_device)
            assert _common.compute_capability() == (8, 9)[number]
            assert tile_for(3) == (3, (8, 9)[number]) and tile_for(3) is tile_for(3)
    finally:
        _common._capability.cache_clear()


class Streams:
    """As much of torch.cuda as a capture uses; if it fails it raises at its end and keeps its stream, as in 2.11."""

    def __init__(self, monkeypatch, fails=False):
        self.current, self.options, self.replays, self.fails = "the caller's", None, 0, fails
        for name, stand_in in (
            ("Stream", lambda device=None: types.SimpleNamespace(device=device, wait_stream=lambda other: None)),
            (
                "current_stream",
                lambda device=None: types.SimpleNamespace(name=self.current, wait_stream=lambda other: None),
            ),
            ("set_stream", lambda stream: setattr(self, "current", stream.name)),
            ("stream", self.on_stream),
            ("CUDAGraph", lambda: types.SimpleNamespace(replay=self.replay)),
            ("graph", self.capture),
        ):
            monkeypatch.setattr(torch.cuda, name, stand_in)

    @contextlib.contextmanager
    def on_stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def capture(self, graph, **options):
        before, self.current, self.options = self.current, options.get("stream", "torch's own"), options
        yield
        if self.fails:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.current = before

    def replay(self):
        self.replays += 1


def test_a_capture_is_of_this_thread_and_on_a_stream_of_the_device(monkeypatch):
    streams, device, calls = Streams(monkeypatch), torch.device("cuda", 1), []
    replay = lenet_step.capture(lambda: calls.append("launch"), lambda: calls.append("restore"), device)
    replay()
    assert calls == ["launch", "restore", "launch"] and streams.replays == 1
    assert streams.options["stream"].device == device and streams.options["capture_error_mode"] == "thread_local"
    assert streams.current == "the caller's"


def test_a_capture_that_fails_leaves_the_stream_as_it_was(monkeypatch):
    streams, calls = Streams(monkeypatch, fails=True), []
    with pytest.raises(lenet_step.NotCaptured, match="operation failed"):
        lenet_step.capture(lambda: calls.append("launch"), lambda: calls.append("restore"), torch.device("cuda", 0))
    assert calls == ["launch", "restore", "launch"] and streams.current == "the caller's"


def test_a_capture_of_the_bench_that_fails_does_too(monkeypatch):
    streams = Streams(monkeypatch, fails=True)
    with pytest.raises(RuntimeError, match="operation failed"):
        measure.Cuda.capture(None, [lambda: None])
    assert streams.current == "the caller's"


def test_a_kernel_that_fails_before_its_capture_is_not_hidden(monkeypatch):
    streams = Streams(monkeypatch)

    def launch():
        raise ZeroDivisionError("a kernel failed")

    with pytest.raises(ZeroDivisionError, match="a kernel failed"):
        lenet_step.capture(launch, lambda: None, torch.device("cuda", 0))
    assert streams.current == "the caller's"


@on_the_cpu
@pytest.mark.parametrize("reported", [False, True], ids=["warned", "reported"])
@pytest.mark.sampled(2)
def test_without_a_capture_the_step_goes_on_and_says_so_once(reported, monkeypatch):
    def capture(launch, restore, device):
        launch()
        restore()
        raise lenet_step.NotCaptured("somebody pinned memory")

    monkeypatch.setattr(lenet_step, "capture", capture)
    net = small()
    twin, lines = copy.deepcopy(net), []
    true_step = make_step(twin)
    true_losses = [true_step(*batch(n, seed=n)) for n in (2, 1)]
    monkeypatch.setattr(lenet_step.FusedLaunches, "graphs_on", ("cpu",))
    step = make_step(net, report=lines.append if reported else None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [step(*batch(n, seed=n)) for n in (2, 1)]
    said = [*(line for line in lines if "graph" in line), *(str(w.message) for w in caught)]
    assert said == ["batches of 2 take four launches without a CUDA graph: somebody pinned memory"]
    assert reported or caught[0].filename == __file__
    assert found == true_losses and all(map(torch.equal, net.parameters(), twin.parameters()))
    assert step._step.latest_replay() is None


@on_the_cpu
def test_after_a_launch_that_fails_losses_and_counts_are_right(monkeypatch):
    net = small()
    twin = copy.deepcopy(net)
    step, true_step = make_step(net), make_step(twin)
    for i in range(3):
        if i:
            with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
                patch.setattr(lenet_step.lenet_gradient, "gradients", lambda *args: 1 // 0)
                step(*batch(2, seed=9))
        assert step(*batch(2, seed=i)) == true_step(*batch(2, seed=i))
    assert [state["step"] for state in step.optimizer.state.values()] == [3] * 10
    assert all(map(torch.equal, net.parameters(), twin.parameters()))


@pytest.mark.parametrize("graphs", [False, pytest.param(True, marks=on_the_cpu)], ids=["launched", "replayed"])
@pytest.mark.sampled(2)
def test_a_loss_never_changes(graphs, device, monkeypatch):
    """Over several blocks of losses, and with a graph that was captured on the first."""
    monkeypatch.setattr(losses, "BLOCK", 2)
    if graphs:
        monkeypatch.setattr(lenet_step.FusedLaunches, "graphs_on", ("cpu",))
        monkeypatch.setattr(lenet_step, "capture", lambda launch, restore, device: [launch(), restore(), launch][2])
    step = make_step(small().to(device))
    kept, values = [], []
    for i in range(5):
        kept.append(step(*batch(1 + i % 2, device, i)))
        values.append(float(kept[-1]))
    assert [float(loss) for loss in kept] == values and len(set(values)) == 5


@on_the_cpu
@pytest.mark.thorough
def test_what_replays_the_graph_alone_stays_in_its_blocks(monkeypatch):
    """However often: each replay writes a loss after the one before."""
    monkeypatch.setattr(losses, "BLOCK", 2)
    monkeypatch.setattr(lenet_step.FusedLaunches, "graphs_on", ("cpu",))
    monkeypatch.setattr(lenet_step, "capture", lambda launch, restore, device: [launch(), restore(), launch][2])
    net = small()
    twin = make_step(copy.deepcopy(net))
    step = make_step(net)
    step(*batch(2))
    replay = step._step.latest_replay()
    for _ in range(2):
        replay()
        place, block = int(step._step.losses.place), step._step.losses._block
        assert block.data_ptr() < place <= block.data_ptr() + block.nbytes
    for _ in range(3):
        twin(*batch(2))
    assert step(*batch(2)) == twin(*batch(2))


def test_the_corrections_of_adam(device):
    """1 - beta^step to two roundings of float32, where 1 - beta itself has lost a third of its digits."""

    @triton.jit
    def kernel(powers_ptr, steps_ptr, out_ptr, BITS: tl.constexpr):
        pid = tl.program_id(0)
        tl.store(out_ptr + pid, lenet_update.correction(powers_ptr, tl.load(steps_ptr + pid), BITS))

    counts = [1, 2, 3, 7, 10, 99, 1000, 1023, 12345, 65535, 10**6, 2**31 - 1]
    for beta in (0.0, 0.8, 0.9, 0.999, 0.99999):
        found = torch.empty(len(counts), device=device)
        powers = torch.tensor(_powers(beta), device=device)
        kernel[(len(counts),)](powers, torch.tensor(counts, dtype=torch.int32, device=device), found, lenet.BITS)
        truth = torch.tensor([1 - beta**count for count in counts], dtype=torch.float64)
        torch.testing.assert_close(found.double().cpu(), truth, rtol=2 * 2**-23, atol=0)


class Called(TorchDispatchMode):
    """Records every call of torch's operators."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", cpu.OPTIMIZERS)
def test_nothing_is_done_twice(name):
    """Where nothing has changed, a call copies images and labels and makes no other call of torch's operators."""
    with cpu.without_gpu():
        net = tritonnet.LeNet()
        step = tritonnet.TrainStep(net, TF.cross_entropy, cpu.OPTIMIZERS[name](net.parameters()))
        images, labels = batch(2, side=32)
        step(images, labels)
        with Called() as called:
            for _ in range(losses.BLOCK - 1):
                step(images, labels)
        assert called.names == ["aten.copy_.default"] * 2 * (losses.BLOCK - 1)
        with Called() as called:
            step(images, labels)
        assert sorted(called.names) == sorted(
            [*["aten.copy_.default"] * 2, "aten.empty.memory_format", "aten.fill_.Scalar", "aten.unbind.int"]
        )


def test_the_time_of_a_call_is_reported():
    found = cpu.step_overhead(0.001)
    assert [row["optimizer"] for row in found] == list(cpu.OPTIMIZERS) and all(row["us"] > 0 for row in found)
    text = report.page(Record({"device": "none", "torch": "0", "tritonnet": "0", "date": "today"}, steps=found))
    assert "A call of TrainStep on the host" in text and "SGD with momentum" in text


def test_the_time_of_a_launch_is_reported():
    """Interpreted kernels are not timed; see test_launching.py for what keeps them fast."""
    rows = [{"operator": "LeNet", "task": "forward", "torch_us": None, "tritonnet_us": 5.0}]
    text = report.page(Record({"device": "none", "torch": "0", "tritonnet": "0", "date": "today"}, launches=rows))
    assert "without their launches" in text and "LeNet" in text


class Far(losses.FirstBad):
    """As on a GPU that lags as far behind as possible: what is sent arrives when it is waited for."""

    def __init__(self, device):
        super().__init__(device)
        self._far = True

    def _send(self):
        there, now = torch.zeros(4, dtype=torch.int32), self.numbers.clone()
        return there, types.SimpleNamespace(synchronize=lambda: there.copy_(now))


@pytest.mark.parametrize("bad", [1, 31, 32, 33, 64])
def test_a_loss_that_is_not_finite_is_reported_within_64_calls(bad):
    """Without waiting: the stand-in sends only what is known at the time."""
    numbers = Far(torch.device("cpu"))
    with pytest.raises(FloatingPointError, match=f"the loss of call {bad} was not"):
        for call in itertools.count(1):
            numbers.numbers[1] = call
            if call == bad:
                numbers.numbers[0] = call
            numbers.look(call)
    assert bad <= call <= bad + 64


def test_offsets_into_every_tensor_of_the_forward_fit(monkeypatch):
    """The gradients of 1.7 million images of 1,000 classes are the first to exceed 32 bits."""
    indices = []
    monkeypatch.setattr(launching, "launch", lambda *args, INDEX, **kwargs: indices.append(INDEX))
    geometry = lenet.Geometry(1, 28, 0, 1000)
    for n in (10**6, 1_680_000):
        memory = lenet_forward.activations(n, geometry, "bfloat16", "meta", train=True)
        images = torch.empty(n, 1, 28, 28, dtype=torch.uint8, device="meta")
        labels, packed = torch.empty(n, device="meta"), torch.empty(geometry.packed[-1], device="meta")
        pixels = lenet_forward.Pixels()
        lenet_forward.forward(images, labels, packed, packed, geometry, "bfloat16", pixels, memory, memory["logits"])
    others = [t.numel() for name, t in memory.items() if name != "grads"]
    assert max(others) < 2**31 - 2**20 and indices == [tl.int32, tl.int64]

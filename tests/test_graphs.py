"""TrainStep with CUDA graphs and without: the same bits, wherever the batches come from.

Only a GPU can capture. A stand-in shows that guard bands let a capture pass; all else is skipped without a GPU.
"""

import memory
import pytest
import torch
from conftest import DEVICE
from memory import Banded, guard_bands, unwatched

import tritonnet
from tritonnet.lenet import step as lenet_step
from tritonnet.whole_step import WholeStep

on_a_gpu = pytest.mark.skipif(torch.device(DEVICE).type != "cuda", reason="CUDA graphs need a GPU")

PRECISIONS = "bfloat16", "tf32", "ieee"
OPTIMIZERS = {
    "SGD momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
}
# A size that is captured, and a shorter last batch.
FULL_BATCHES, REST = 3, 3


def data(size):
    """Made-up digits: three full batches and a third of one."""
    count = FULL_BATCHES * size + size // REST
    seed = torch.Generator().manual_seed(1)
    images = torch.randn(count, 1, 32, 32, generator=seed)
    return torch.utils.data.TensorDataset(images, torch.randint(10, (count,), generator=seed))


def on_the_device(size):
    """Batches that are on the device already."""
    images, labels = (t.to(DEVICE) for t in data(size).tensors)
    return list(zip(images.split(size), labels.split(size)))


def from_workers(size):
    """Batches from two processes, through pinned memory, which a thread allocates while the step captures."""
    return torch.utils.data.DataLoader(data(size), size, pin_memory=True, num_workers=2)


def train(batches, precision, optimizer, accumulate=1):
    """Two epochs: every loss, the parameters, and the optimiser's state."""
    torch.manual_seed(0)
    net = tritonnet.LeNet().to(DEVICE)
    optimizer = OPTIMIZERS[optimizer](net.parameters())
    step = tritonnet.TrainStep(net, torch.nn.CrossEntropyLoss(), optimizer, precision, accumulate)
    losses = [step(images, labels) for _ in range(2) for images, labels in batches]
    step.check()
    assert step.path == "fused launches", step.reason
    state = [value for of in optimizer.state.values() for value in of.values()]
    return torch.stack(losses), *(p.detach() for p in net.parameters()), *state


@pytest.fixture
def replays(monkeypatch):
    """The replayed graphs, one entry for each replay."""
    seen, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: seen.append(graph) or replay(graph))
    return seen


def check(make_batches, size, precision, optimizer, replays, monkeypatch, accumulate=1):
    """With graphs and without, each twice."""
    runs = []
    for graphs in (True, False) * 2:
        monkeypatch.setattr(lenet_step.FusedLaunches, "graphs_on", ("cuda",) if graphs else ())
        replays.clear()
        runs.append(train(make_batches(size), precision, optimizer, accumulate))
        assert len(replays) == (len(runs[-1][0]) if graphs else 0)
        # One for each batch size, and for each position in a group of accumulating calls.
        assert not graphs or 2 <= len(set(map(id, replays))) <= 2 * accumulate
    assert len(runs[0][0]) == 2 * (FULL_BATCHES + 1) and runs[0][0].isfinite().all()
    for run in runs[1:]:
        assert all(map(torch.equal, run, runs[0]))


@on_a_gpu
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("size", [64, 1000])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_same_bits(precision, size, optimizer, replays, monkeypatch):
    check(on_the_device, size, precision, optimizer, replays, monkeypatch)


@on_a_gpu
@pytest.mark.parametrize("size", [64, 1000])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_same_bits_from_a_data_loader(precision, size, replays, monkeypatch):
    check(from_workers, size, precision, "Adam", replays, monkeypatch)


@on_a_gpu
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_same_bits_accumulated(precision, optimizer, replays, monkeypatch):
    check(on_the_device, 64, precision, optimizer, replays, monkeypatch, accumulate=2)


ANY_OPTIMIZER = {
    # Rates that float32 has exactly, as a graph reads them.
    "SGD momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.125, momentum=0.9, weight_decay=1e-4),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=2**-10),
}


@on_a_gpu
@pytest.mark.parametrize("optimizer", ANY_OPTIMIZER)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_any_model_s_whole_step(precision, optimizer, replays, monkeypatch):
    """With graphs and without, and a batch that is not finite among them: the same bits, buffers and counts too."""
    runs, batches = [], on_the_device(16)
    for graphs in (True, False):
        monkeypatch.setattr(WholeStep, "graphs_on", ("cuda",) if graphs else ())
        replays.clear()
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            torch.nn.Conv2d(1, 16, 3, stride=2), torch.nn.BatchNorm2d(16), torch.nn.ReLU(), torch.nn.MaxPool2d(3),
            torch.nn.Conv2d(16, 32, 3), torch.nn.BatchNorm2d(32), torch.nn.ReLU(), torch.nn.Flatten(),
            torch.nn.Linear(288, 10),
        ).to(DEVICE)  # fmt: skip
        optim = ANY_OPTIMIZER[optimizer](net.parameters())
        step = tritonnet.TrainStep(net, torch.nn.CrossEntropyLoss(), optim, precision)
        losses, reported = [], 0
        for epoch in range(6):
            for i, (images, labels) in enumerate(batches):
                spoilt = epoch == 3 and i == 1
                try:
                    loss = step(images * float("nan") if spoilt else images, labels)
                    step.check()
                    losses.append(loss)
                except FloatingPointError:
                    reported += 1
        assert reported == 1 and "CUDA graph" not in step.reason, step.reason
        state = [value.cpu() for of in optim.state.values() for value in of.values()]
        runs.append([*losses, *net.state_dict().values(), *state])
        # The first size begins with two calls, the second with one.
        assert len(replays) == (6 * len(batches) - 3 if graphs else 0)
    assert all(map(torch.equal, *runs))


@pytest.mark.skipif(DEVICE != "cpu", reason="stands in for a GPU's graphs")
@pytest.mark.thorough
def test_a_capture_passes_the_guard_bands(monkeypatch):
    """Launches before a capture run between bands; those in it and its replays run on the tensors themselves."""
    capturing, banded = [False], []

    def capture(launch, restore, *_):
        def recorded():
            capturing[0] = True
            launch()
            capturing[0] = False

        launch()
        restore()
        recorded()
        restore()  # on a GPU nothing has run
        return recorded

    class Counted(Banded):
        def __init__(self, *arguments):
            banded.append(capturing[0])
            super().__init__(*arguments)

    monkeypatch.setattr(lenet_step, "capture", capture)
    monkeypatch.setattr(lenet_step.FusedLaunches, "graphs_on", ("cpu",))
    monkeypatch.setattr(memory, "_in_capture", lambda: capturing[0])
    monkeypatch.setattr(memory, "Banded", Counted)
    net = tritonnet.LeNet()
    images, labels = (t[:2] for t in data(2).tensors)
    with unwatched(), guard_bands() as violations, tritonnet.count_launches() as launches:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        tritonnet.TrainStep(net, torch.nn.CrossEntropyLoss(), optimizer, "ieee")(images, labels)
    assert not violations and banded and not any(banded)
    # Before the capture, in it, and in the stand-in's replay.
    assert launches["lenet_forward_kernel"] == launches["lenet_gradient_kernel"] == 3

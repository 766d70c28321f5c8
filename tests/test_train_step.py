"""tritonnet.TrainStep against autograd: gradients, launches, changes between calls, and its reports."""

import copy
import math

import pytest
import torch
import torch.nn as theirs
import torch.nn.functional as TF
from conftest import DEVICE
from exact import ROUNDOFF
from torch.fx.experimental.proxy_tensor import make_fx

import tritonnet
from bench.libraries import TutorialLeNet
from tritonnet.lenet import step as lenet_step

# On a GPU torch's own side of a comparison would take its convolutions in tf32.
pytestmark = pytest.mark.usefixtures("full_precision")

INFERENCE = {"lenet_pack_kernel": 1, "lenet_forward_kernel": 1}
STEP = {f"lenet_{name}_kernel": 1 for name in ("pack", "forward", "gradient", "update")}


def sequential():
    """Pooled before relu, at 28 pixels without padding, nested."""
    features = theirs.Sequential(
        theirs.Conv2d(1, 6, 5), theirs.MaxPool2d(2), theirs.ReLU(),
        theirs.Conv2d(6, 16, 5), theirs.ReLU(), theirs.MaxPool2d((2, 2), stride=2),
    )  # fmt: skip
    linears = theirs.Linear(256, 120), theirs.ReLU(), theirs.Linear(120, 84), theirs.ReLU(), theirs.Linear(84, 10)
    return theirs.Sequential(features, theirs.Flatten(), *linears)


def small():
    """28 pixels without padding, the least work for a step: for tests of optimisers and of the host."""
    net = TutorialLeNet()
    net.fc1 = theirs.Linear(256, 120)
    return net


def padded():
    """32 pixels padded by two."""
    net = TutorialLeNet()
    net.conv1, net.fc1 = theirs.Conv2d(1, 6, 5, padding="same"), theirs.Linear(576, 120)
    return net


NETS = {
    "LeNet": (tritonnet.LeNet, (6, 1, 32, 32)),
    "colours, 28 pixels, 100 classes": (lambda: tritonnet.LeNet(100, channels=3, size=28), (5, 3, 28, 28)),
    "1000 classes": (lambda: tritonnet.LeNet(1000), (3, 1, 32, 32)),
    "1 class": (lambda: tritonnet.LeNet(1), (2, 1, 32, 32)),
    "tutorial, one image": (TutorialLeNet, (1, 1, 32, 32)),
    "sequential": (sequential, (4, 1, 28, 28)),
    "padded": (padded, (2, 1, 32, 32)),
}


def classes_of(net):
    return [p for p in net.parameters()][-1].numel()


def batch(net, size, device, seed=0):
    torch.manual_seed(seed)
    # Drawn on the CPU, and so the same on every device.
    return torch.randn(size).to(device), torch.randint(classes_of(net), size[:1]).to(device)


def by_torch(net, optimizer, images, labels):
    """A step as torch does it; returns the loss."""
    with tritonnet.backend("reference"):
        optimizer.zero_grad()
        loss = TF.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
    return loss.detach()


@pytest.mark.parametrize(
    "name, precision",
    [
        *((name, "ieee") for name in NETS),
        ("LeNet", "tf32"),
        ("LeNet", "bfloat16"),
        ("colours, 28 pixels, 100 classes", "bfloat16"),
    ],
)
@pytest.mark.sampled(3)
def test_gradients(name, precision, device):
    """One step of SGD at rate 1 shows the gradient, which is compared with float64 autograd's.

    Errors of sums are relative to the sizes of their terms, which a gradient's own size approximates: 2,500 roundings
    of half an eps, as many as the longest path through the net adds up, independent of each other. In bfloat16 a
    pixel's rounding moves some gradients to another pixel of a window, so that only the whole is compared.
    """
    make, size = NETS[name]
    net = make().to(device)
    images, labels = batch(net, size, device)
    truth = copy.deepcopy(net).double()
    before = [p.detach().clone() for p in net.parameters()]
    step = tritonnet.TrainStep(net, theirs.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), lr=1.0), precision)
    assert step.path == "fused launches"
    loss = step(images, labels)
    with tritonnet.backend("reference"):
        true_loss = TF.cross_entropy(truth(images.double()), labels)
        true_loss.backward()
    u = ROUNDOFF[torch.float32 if precision == "ieee" else torch.bfloat16]
    assert abs(loss.double() - true_loss) <= 16 * u * true_loss.abs() + 4 * u
    for (parameter, p), q, old in zip(net.named_parameters(), truth.parameters(), before):
        error = (old.double() - p.double() - q.grad).norm()
        # The part of the gradient that the weight's own rounding hides.
        hidden = ROUNDOFF[torch.float32] * old.double().norm() * 2
        bound = (50 * u if precision == "ieee" else 0.25) * q.grad.norm() + hidden
        assert error <= bound, f"{parameter}: off by {error:.3g} of {q.grad.norm():.3g}"


def test_ten_steps_are_torch_s_and_the_first_three_repeat_to_the_bit(device):
    """The smallest net learns one batch and then another: half a second a step."""
    runs = []
    for steps in (10, 3):
        torch.manual_seed(0)
        net = sequential().to(device)
        twin = copy.deepcopy(net)
        optimizers = [torch.optim.SGD(n.parameters(), lr=0.05, momentum=0.9) for n in (net, twin)]
        step = tritonnet.TrainStep(net, TF.cross_entropy, optimizers[0], "ieee")
        losses = []
        for i in range(steps):
            images, labels = batch(net, (4, 1, 28, 28), device, min(i, 1))
            losses.append(step(images, labels))
            if steps == 10:
                true_loss = by_torch(twin, optimizers[1], images, labels)
                torch.testing.assert_close(losses[-1], true_loss, rtol=1e-3, atol=1e-4)
            if i == 2:
                runs.append([*losses, *(p.detach().clone() for p in net.parameters())])
        if steps == 10:
            assert losses[-1] < 0.75 * losses[1]
            for p, q in zip(net.parameters(), twin.parameters()):
                torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
    assert all(map(torch.equal, *runs))


def test_four_launches_a_step_and_two_of_inference(device, no_graphs):
    net = tritonnet.LeNet().to(device)
    step = tritonnet.TrainStep(net, theirs.CrossEntropyLoss(), torch.optim.Adam(net.parameters()))
    images, labels = batch(net, (3, 1, 32, 32), device)
    step(images, labels)
    with tritonnet.count_launches() as launches:
        for _ in range(2):
            step(images, labels)
    assert launches == {kernel: 2 * count for kernel, count in STEP.items()}
    net.eval()
    with tritonnet.count_launches() as launches, torch.no_grad():
        net(images)
    assert launches == INFERENCE


def test_the_model_stays_an_ordinary_module(device, tmp_path):
    net = small().to(device)
    names, objects = list(net.state_dict()), list(net.parameters())
    step = tritonnet.TrainStep(net, theirs.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), lr=0.1))
    step(*batch(net, (2, 1, 28, 28), device))
    assert list(net.state_dict()) == names and all(p is q for p, q in zip(net.parameters(), objects))
    torch.save(net, tmp_path / "net.pt")
    copies = torch.load(tmp_path / "net.pt", weights_only=False), copy.deepcopy(net)
    images, _ = batch(net, (2, 1, 28, 28), device)
    with tritonnet.backend("reference"):
        y = net(images)
        assert all(torch.equal(other(images), y) for other in copies)
    step(*batch(net, (2, 1, 28, 28), device))
    with tritonnet.backend("reference"):
        assert not torch.equal(net(images), y) and all(torch.equal(other(images), y) for other in copies)


def test_other_batches_and_ignored_labels(device, monkeypatch):
    """Batches of two sizes by turns, of which one is cached; labels of one byte, and ignored labels."""
    monkeypatch.setattr(lenet_step, "MOST_BATCHES", 1)
    net = small().to(device)
    twin = copy.deepcopy(net)
    optimizers = [torch.optim.SGD(n.parameters(), lr=0.1) for n in (net, twin)]
    step = tritonnet.TrainStep(net, theirs.CrossEntropyLoss(ignore_index=3), optimizers[0], "ieee")
    four, two = torch.tensor([3, 1, 9, 3]), torch.tensor([0, 5])
    for size, labels in ((4, four), (2, two), (2, two), (4, four)):
        images, _ = batch(net, (size, 1, 28, 28), device, size)
        loss = step(images, labels.to(device, torch.uint8))
        with tritonnet.backend("reference"):
            optimizers[1].zero_grad()
            true_loss = TF.cross_entropy(twin(images), labels.to(device), ignore_index=3)
            true_loss.backward()
            optimizers[1].step()
        torch.testing.assert_close(loss, true_loss.detach(), rtol=1e-5, atol=1e-6)
        assert [key[0][0] for key in step._step._batches] == [size]
    for p, q in zip(net.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", [28, 32])
@pytest.mark.sampled(2)
def test_images_of_bytes(side, device):
    """Raw digits go in and logits come out, in two launches; the layers see them normalised and padded."""
    net = tritonnet.LeNet(7, mean=0.2, std=0.4).to(device)
    images = torch.randint(256, (5, 1, side, side), dtype=torch.uint8, device=device)
    net.eval()
    with torch.no_grad():
        net(images)
        with tritonnet.count_launches() as launches:
            y = net(images)
        with tritonnet.backend("reference"):
            truth = net(images)
            frame = (32 - side) // 2
            as_floats = net(TF.pad((images / 255 - 0.2) / 0.4, (frame,) * 4, value=-0.2 / 0.4))
    assert launches == INFERENCE
    torch.testing.assert_close(y, truth, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(truth, as_floats, rtol=1e-5, atol=1e-6)
    twin = copy.deepcopy(net)
    optimizers = [torch.optim.SGD(n.parameters(), lr=0.1) for n in (net, twin)]
    labels = torch.randint(7, (5,), device=device)
    tritonnet.TrainStep(net, theirs.CrossEntropyLoss(), optimizers[0], "ieee")(images, labels)
    by_torch(twin, optimizers[1], images, labels)
    for p, q in zip(net.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inference(dtype, device):
    """Many more images than programs; with hooks, gradients or training the layers run again."""
    net = tritonnet.LeNet().to(device, dtype).eval()
    images = torch.randn(9, 1, 32, 32, device=device).to(dtype)
    with torch.inference_mode():
        y = net(images)
        with tritonnet.backend("reference"):
            truth = copy.deepcopy(net).double()(images.double())
    assert y.dtype == dtype
    error, u = (y.double() - truth).norm() / truth.norm(), ROUNDOFF[dtype]
    assert error < 16 * u
    seen = []
    net.conv2.register_forward_hook(lambda *_: seen.append(1))
    with tritonnet.count_launches() as launches, torch.no_grad():
        net(images)
    assert seen and "lenet_forward_kernel" not in launches


def test_inference_that_somebody_watches(device):
    """Transforms, tracers and compilers, which watch a forward's operators, see them."""
    net, images = tritonnet.LeNet().to(device).eval(), torch.randn(2, 1, 32, 32, device=device)
    with torch.no_grad():
        y = net(images)
        with tritonnet.count_launches() as launches:
            seen = [
                torch.func.vmap(lambda x: net(x[None])[0])(images),
                make_fx(net)(images)(images),
                torch.compile(net, fullgraph=True, backend="eager")(images),
                torch.export.export(net, (images,)).module()(images),
            ]
    assert "lenet_forward_kernel" not in launches and launches
    for other in seen:
        torch.testing.assert_close(other, y, rtol=1e-4, atol=1e-5)


def test_what_changes_between_calls(device):
    """Frozen parameters, another rule, another dtype: the next call goes by the current ones."""
    net = small().to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    step = tritonnet.TrainStep(net, theirs.CrossEntropyLoss(), optimizer)
    images, labels = batch(net, (2, 1, 28, 28), device)
    step(images, labels)
    optimizer.param_groups[0]["momentum"] = 0.9
    step(images, labels)
    assert step.path == "fused launches" and "momentum_buffer" in optimizer.state[net.fc1.bias]
    net.fc3.requires_grad_(False)
    before = net.fc3.weight.detach().clone(), net.fc2.weight.detach().clone()
    with tritonnet.backend("auto" if device.type != "cpu" else "triton"):
        step(images, labels)
    assert step.path == "operators" and "frozen" in step.reason
    assert torch.equal(net.fc3.weight, before[0]) and not torch.equal(net.fc2.weight, before[1])


class Branching(TutorialLeNet):
    def forward(self, x):
        return super().forward(x) if x.mean() > 0 else super().forward(-x)


class Twice(TutorialLeNet):
    def forward(self, x):
        return super().forward(x) * 2


def hooked():
    net = TutorialLeNet()
    net.fc2.register_forward_hook(lambda *_: None)
    return net


def frozen():
    net = TutorialLeNet()
    net.fc3.bias.requires_grad_(False)
    return net


def sgd(net, **options):
    return torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1, **options)


OTHERS = {
    "another net": (lambda: theirs.Sequential(theirs.Flatten(), theirs.Linear(1024, 10)), sgd, None, "features"),
    "a branch": (Branching, sgd, None, "cannot be captured"),
    "more than layers": (Twice, sgd, None, "its forward calls mul"),
    "a hook": (hooked, sgd, None, "does more than compute"),
    "frozen": (frozen, sgd, None, "frozen"),
    "ceil_mode": (
        lambda: theirs.Sequential(
            tritonnet.nn.Conv2dReLUMaxPool2d(1, 6, 5, pool_ceil_mode=True), theirs.Flatten(), theirs.Linear(1176, 10)
        ),
        sgd, None, "1176 features",
    ),
    "other widths": (lambda: wider(), sgd, None, "800 features"),
    "another optimizer": (TutorialLeNet, lambda net: torch.optim.RMSprop(net.parameters()), None, "RMSprop"),
    "groups of two rules": (
        TutorialLeNet, lambda net: torch.optim.SGD([{"params": p, "momentum": p.dim() % 2} for p in net.parameters()]),
        None, "differ",
    ),
    "some parameters": (
        TutorialLeNet, lambda net: torch.optim.SGD(net.fc1.parameters()), None, "not have exactly",
    ),
    "another loss": (TutorialLeNet, sgd, theirs.CrossEntropyLoss(label_smoothing=0.1), "label smoothing"),
}  # fmt: skip


def wider():
    net = TutorialLeNet()
    net.conv2, net.fc1 = theirs.Conv2d(6, 32, 5), theirs.Linear(800, 120)
    return net


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.sampled(3)
def test_other_models_take_the_operators(name, device):
    """What is not proved for the launches does not take them; it still trains, and the step reports why."""
    make, optimizer, loss, reason = OTHERS[name]
    net = make().to(device)
    twin = copy.deepcopy(net)
    loss = loss or theirs.CrossEntropyLoss()
    lines = []
    with tritonnet.backend("triton"):
        step = tritonnet.TrainStep(net, loss, optimizer(net), report=lines.append)
    assert step.path == "operators" and reason in step.reason
    assert lines[0] == f"{type(twin).__name__}: operators, because {step.reason}"
    images, labels = torch.randn(2, 1, 32, 32, device=device), torch.randint(10, (2,), device=device)
    true = optimizer(twin)
    with tritonnet.backend("reference"):
        for _ in range(2):
            value = step(images, labels)
            true.zero_grad()
            true_value = loss(twin(images), labels)
            true_value.backward()
            true.step()
    torch.testing.assert_close(value, true_value.detach(), rtol=1e-4, atol=1e-5)
    for p, q in zip(net.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.sampled(2)
def test_hooks_on_gradients_are_called(later, device):
    """Hooks of parameters, added before the step is made or between two calls: the launches could not call them."""
    torch.manual_seed(0)
    net, twin = small().to(device), small().to(device)
    twin.load_state_dict(net.state_dict())

    def twice(p):
        p.grad *= 2

    def hook():
        for n in (net, twin):
            n.fc3.weight.register_hook(lambda g: g * 0)
            n.conv1.bias.register_post_accumulate_grad_hook(twice)

    if not later:
        hook()
    step = tritonnet.TrainStep(net, TF.cross_entropy, sgd(net), "ieee")
    true = sgd(twin)
    assert step.path == ("fused launches" if later else "operators")
    for i in range(2):
        images, labels = batch(net, (2, 1, 28, 28), device, i)
        step(images, labels)
        by_torch(twin, true, images, labels)
        if later and i == 0:
            hook()
    assert step.path == "operators" and "hooks" in step.reason
    for p, q in zip(net.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_the_operators_accumulate_and_report_too():
    net = theirs.Sequential(theirs.Flatten(), theirs.Linear(4, 3))
    twin = copy.deepcopy(net)
    images, labels = torch.randn(4, 1, 2, 2), torch.tensor([0, 1, 2, 0])
    step = tritonnet.TrainStep(net, TF.cross_entropy, sgd(net), accumulate=2)
    with tritonnet.backend("reference"):
        step(images[:2], labels[:2])
        assert all(map(torch.equal, net.parameters(), twin.parameters()))
        step(images[2:], labels[2:])
        by_torch(twin, sgd(twin), images, labels)
        for p, q in zip(net.parameters(), twin.parameters()):
            torch.testing.assert_close(p, q)
        with pytest.raises(FloatingPointError, match="call 3"):
            step(images * math.inf, labels)
            step.check()


def test_without_the_kernels_a_lenet_takes_the_operators():
    """The reference serves a machine without triton; and a step may change its path between calls."""
    torch.manual_seed(0)
    net, other = (small() for _ in range(2))
    other.load_state_dict(net.state_dict())
    with tritonnet.backend("reference"):
        step = tritonnet.TrainStep(net, theirs.CrossEntropyLoss(), torch.optim.Adam(net.parameters()))
    assert step.path == "operators" and step.reason == "the backend is the reference"
    its_step = tritonnet.TrainStep(other, theirs.CrossEntropyLoss(), torch.optim.Adam(other.parameters()), "ieee")
    for i in range(2):
        images, labels = batch(net, (2, 1, 28, 28), "cpu", i)
        with tritonnet.backend("reference"):
            step(images, labels)
        if i == 0:
            its_step(images, labels)
            assert its_step.path == ("fused launches" if DEVICE.startswith("cpu") else "operators")
        else:
            with tritonnet.backend("reference"):
                its_step(images, labels)
    assert its_step.path == "operators"
    for p, q in zip(net.parameters(), other.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(DEVICE != "cpu", reason="stands in for a GPU's graphs")
def test_graphs(monkeypatch):
    """A step is captured once for each batch size and each part of a group of calls, and replayed from then on.

    The first run's changes have to be undone, and a replay's inputs have to stay at their addresses: here a graph is
    the function that launches, with the pointers that it captured.
    """
    captured = []

    def capture(launch, restore, device):
        launch()
        restore()
        captured.append(launch)
        return launch

    monkeypatch.setattr(lenet_step, "capture", capture)
    monkeypatch.setattr(lenet_step.FusedLaunches, "graphs_on", ("cpu",))
    results = []
    for graphs in (True, False):
        if not graphs:
            monkeypatch.setattr(lenet_step.FusedLaunches, "graphs_on", ())
        torch.manual_seed(0)
        net = small()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        step = tritonnet.TrainStep(net, theirs.CrossEntropyLoss(), optimizer, accumulate=2)
        losses = []
        for i, size in enumerate((3, 3, 3, 2)):
            optimizer.param_groups[0]["lr"] = 0.1 / (i + 1)
            losses.append(step(*batch(net, (size, 1, 28, 28), "cpu", i)))
        results.append((losses, [p.detach().clone() for p in net.parameters()]))
    assert len(captured) == 2 + 1
    assert all(map(torch.equal, *(losses for losses, _ in results)))
    assert all(map(torch.equal, *(parameters for _, parameters in results)))
    assert results[0][0][0] != results[0][0][1]  # a loss that was handed out is not written to again


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"model": 3}, TypeError, "model must be a torch.nn.Module, got int"),
        ({"optimizer": None}, TypeError, "optimizer must be a torch.optim.Optimizer, got NoneType"),
        ({"precision": "fp8"}, ValueError, "precision must be one of .* or None, got 'fp8'"),
        ({"accumulate": 0}, ValueError, "accumulate must be a positive integer, got 0"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_errors(arguments, error, message):
    net = tritonnet.LeNet()
    arguments = {"model": net, "loss": TF.cross_entropy, "optimizer": sgd(net), **arguments}
    with pytest.raises(error, match=message):
        tritonnet.TrainStep(**arguments)


def test_errors_of_batches(device):
    net = tritonnet.LeNet().to(device)
    step = tritonnet.TrainStep(net, TF.cross_entropy, sgd(net))
    images, labels = batch(net, (2, 1, 32, 32), device)
    for bad_images, bad_labels, error, message in (
        (images[:, :, 2:], labels, ValueError, r"images must be \(N, 1, 32, 32\) with N > 0, got \[2, 1, 30, 32\]"),
        (images[:0], labels[:0], ValueError, r"got \[0, 1, 32, 32\]"),
        (images.double(), labels, TypeError, "images must be float32, float16, bfloat16 or uint8, got torch.float64"),
        (images, labels[:1], ValueError, r"labels must be \(2\) of int64 or uint8, got \[1\]"),
        (images, labels.float(), ValueError, "of torch.float32"),
        (torch.zeros(2, 1, 31, 31, dtype=torch.uint8), labels, ValueError, r"uint8 images must be squares of 32"),
    ):
        with pytest.raises(error, match=message):
            step(bad_images, bad_labels)
    with pytest.raises(ValueError, match="size must be 28 or 32, got 30"):
        tritonnet.LeNet(size=30)
    other = TutorialLeNet().to(device)
    with pytest.raises(TypeError, match="images of dtype uint8 need a tritonnet.LeNet"):
        tritonnet.TrainStep(other, TF.cross_entropy, sgd(other))(images.to(torch.uint8), labels)

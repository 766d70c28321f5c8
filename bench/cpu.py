"""What can be compared without a GPU: the cost of a call in Python, and the reference against torch's own operators."""

import contextlib
import functools
from types import SimpleNamespace
from unittest import mock

import torch
from torch.utils.benchmark import Timer

import tritonnet
import tritonnet.nn.functional as F
from tritonnet import train_step
from tritonnet.lenet import losses
from tritonnet.lenet import step as lenet_step
from tritonnet.lenet import weights as lenet_weights

from . import operators, unfused
from .case import BOTH, FORWARD, Case
from .lenet import Network, TutorialLeNet
from .libraries import installed
from .measure import Host
from .progress import progress
from .run import Budget, run

FORMAT = "float32"
# Seconds for the cases.
FULL, QUICK = 120, 15


def tiny():
    """Each operator on inputs so small that only the call itself takes time."""
    return [
        operators.relu("tiny", 2, 4),
        operators.max_pool2d("tiny", (1, 2, 4, 4), 2, 2),
        operators.linear("tiny", 2, 4, 4),
        operators.linear("tiny", 2, 4, 4, relu=True),
        operators.conv2d("tiny", (1, 2, 4, 4), (2, 3)),
        operators.conv2d("tiny", (1, 2, 4, 4), (2, 3), relu=True),
        operators.conv2d("tiny", (1, 2, 4, 4), (2, 3), relu=True, pool=(2, 2, 0)),
        operators.cross_entropy(2, 4),
    ]


def small():
    """Networks and operators that a CPU runs in milliseconds."""
    return [
        Network(True, 16),
        Network(False, 16),
        operators.conv2d("LeNet conv1", (16, 1, 32, 32), (6, 5), relu=True, pool=(2, 2, 0)),
        operators.conv2d("LeNet conv2", (16, 6, 14, 14), (16, 5), relu=True, pool=(2, 2, 0)),
        operators.conv2d("ResNet 3x3, 64", (2, 64, 28, 28), (64, 3), padding=1),
        operators.conv2d("depthwise 3x3, 32", (2, 32, 28, 28), (32, 3), padding=1, groups=32),
        operators.relu("LeNet", 64, 6, 28, 28),
        operators.max_pool2d("LeNet 2x2", (64, 6, 28, 28), 2, 2),
        operators.linear("LeNet fc1", 64, 400, 120),
        operators.linear("LeNet fc1", 64, 400, 120, relu=True),
        operators.cross_entropy(1024, 10),
    ]


def _microseconds(statement, seconds, **variables):
    """The median time of a statement, measured for about so many seconds."""
    return Timer(statement, globals=variables).blocked_autorange(min_run_time=seconds).median * 1e6


def launch_overhead(seconds):
    """As overhead(), with the kernels' launchers instead of the reference, on a stub GPU that runs nothing.

    Empty if kernels are interpreted or triton is missing. torch's times include its work on the CPU.
    """
    if lenet_step.launchers is None or lenet_step.INTERPRETED:
        return []
    from .no_launch import gpu_that_does_nothing  # which needs triton

    with gpu_that_does_nothing():
        found = overhead(seconds)
        nets = {
            "LeNet": tritonnet.LeNet(),
            "LeNet of a tutorial, converted": tritonnet.convert(TutorialLeNet()),
            "the same, fused": tritonnet.fuse(tritonnet.convert(TutorialLeNet())),
        }
        space = {"images": torch.zeros(2, 1, 32, 32), "labels": torch.tensor([1, 2]), "F": F, "torch": torch}
        inference, training = "with torch.no_grad(): net(images)", "F.cross_entropy(net(images), labels).backward()"
        for name, net in nets.items():
            for task, statement in ((BOTH, training), (FORWARD, inference)):
                net.train(task == BOTH)
                us = _microseconds(statement, seconds, net=net, **space)
                found.append({"operator": name, "task": task, "torch_us": None, "tritonnet_us": us})
        with packed_before():
            us = _microseconds(inference, seconds, net=nets["LeNet"], **space)
        found.append({"operator": "LeNet, packed before", "task": FORWARD, "torch_us": None, "tritonnet_us": us})
    return found


@contextlib.contextmanager
def packed_before():
    """Inside, LeNet's inference allocates no buffers for packed weights and does not launch the kernel that packs them.

    The rest of a call's work on the host stays, so that the difference in time is the host's cost of packing.
    """
    with (
        mock.patch.object(lenet_weights, "buffers", functools.cache(lenet_weights.buffers)),
        mock.patch.object(lenet_weights.lenet_pack, "pack", lambda *args: None),
    ):
        yield


def overhead(seconds):
    """Microseconds of a call of torch and of ours on tiny tensors, a dict for each operator and task.

    Args:
        seconds: how long to measure each.
    """
    found = []
    for operator in tiny():
        tensors, dy = operator.inputs(FORMAT, torch.device("cpu"), 0)
        leaves = [t.requires_grad_() if t.is_floating_point() else t for t in tensors]
        inputs = [t for t in leaves if t.requires_grad]
        for task, statement in (
            (FORWARD, "call(f, *tensors)"),
            (BOTH, "torch.autograd.grad(call(f, *leaves), inputs, dy)"),
        ):
            times = {}
            for name, f in (("torch_us", unfused), ("tritonnet_us", F)):
                space = {"f": f, "call": operator.call, "dy": dy, "leaves": leaves, "inputs": inputs, "torch": torch}
                space["tensors"] = [t.detach() for t in leaves]
                times[name] = _microseconds(statement, seconds, **space)
            found.append({"operator": operator.name.removesuffix(" tiny"), "task": task, **times})
    return found


OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "Adam": torch.optim.Adam,
}


def _buffers(images, labels, *_):
    return SimpleNamespace(images=images.clone(), labels=labels.clone(), replays={})


@contextlib.contextmanager
def without_gpu():
    """Inside, tritonnet.TrainStep behaves as on a GPU, except that launches and replays do nothing.

    Copies are made on the CPU. Losses are not checked for being finite.
    """
    with contextlib.ExitStack() as stack:
        for target, name, stand_in in (
            (train_step, "implementation", lambda tensor: train_step.launchers),
            (lenet_step, "implementation", lambda tensor: lenet_step.launchers),
            (lenet_step, "capture", lambda launch, restore, device: lambda: None),
            (lenet_step, "Batch", _buffers),
            (lenet_step.FusedLaunches, "_launch", lambda *args: None),
            (lenet_step.FusedLaunches, "graphs_on", ("cpu",)),
            (losses.FirstBad, "look", lambda bad, calls: None),
        ):
            stack.enter_context(mock.patch.object(target, name, stand_in))
        yield


def step_overhead(seconds):
    """Microseconds that a call of tritonnet.TrainStep on a LeNet takes on the host, a dict for each optimizer.

    Args:
        seconds: how long to measure each.
    """
    if lenet_step.launchers is None:
        return []
    found, images, labels = [], torch.zeros(2, 1, 28, 28, dtype=torch.uint8), torch.tensor([1, 2])
    for name, make in OPTIMIZERS.items():
        with without_gpu():
            model = tritonnet.LeNet()
            step = tritonnet.TrainStep(model, torch.nn.CrossEntropyLoss(), make(model.parameters()), "ieee")
            us = _microseconds("step(images, labels)", seconds, step=step, images=images, labels=labels)
        found.append({"optimizer": name, "us": us})
    return found


def compare(record, seconds=None):
    """Fills the Record of a run on the CPU; to be called inside tritonnet.backend("reference").

    Args:
        record: a Record.
        seconds: time for the cases, None for QUICK or FULL.
    """
    quick = record.quick
    record.overhead = overhead(0.02 if quick else 0.2)
    record.launches = launch_overhead(0.02 if quick else 0.2)
    record.steps = step_overhead(0.02 if quick else 0.5)
    cases = [Case(subject, FORMAT) for subject in small()]
    libraries = {name: library for name, library in installed().items() if not library.compiled}
    budget = Budget(seconds or (QUICK if quick else FULL))
    budget.expected["case"] = 1.0
    run(record, progress(cases), libraries, Host(), budget, seconds=0.02 if quick else 0.2)

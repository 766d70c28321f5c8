"""The contestants: this library, torch eager and compiled, and FlagGems where it is installed."""

import contextlib
import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as TF
from torch import nn

import tritonnet
import tritonnet.nn.functional as F
from tritonnet import dispatch
from tritonnet.lenet import weights as lenet_weights
from tritonnet.whole_step.operators import products_in

from . import gradients, unfused

if dispatch.launchers is not None:
    from tritonnet.kernels.lenet import forward as lenet_forward
    from tritonnet.kernels.lenet import layout as lenet
    from tritonnet.kernels.lenet import pack as lenet_pack

# Modes of torch.compile: the full search, the same without its own CUDA graphs, and the one that compiles fastest.
COMPILE, COMPILE_NO_GRAPHS, COMPILE_QUICKLY = "max-autotune", "max-autotune-no-cudagraphs", "default"


class TutorialLeNet(nn.Module):
    """tritonnet.LeNet as PyTorch's tutorials write it.

    tritonnet.examples.tutorial_lenet has it once more, as a program to be read.
    """

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x):
        x = TF.max_pool2d(TF.relu(self.conv1(x)), 2)
        x = TF.max_pool2d(TF.relu(self.conv2(x)), 2)
        x = TF.relu(self.fc1(torch.flatten(x, 1)))
        return self.fc3(TF.relu(self.fc2(x)))


def load_compiler():
    """Imports in advance what torch.compile imports lazily: an import that a time limit ends cannot be repeated."""
    for name in ("compile_fx", "lowering", "cudagraph_trees"):
        importlib.import_module(f"torch._inductor.{name}")


def compiled(function, mode):
    """`function` under torch.compile, or as it is if mode is None."""
    if mode is None:
        return function
    torch.compiler.reset()
    run = torch.compile(function, mode=mode, dynamic=False)

    def call(*args):
        torch.compiler.cudagraph_mark_step_begin()  # what the last call returned may be overwritten
        return run(*args)

    return call


def eager_step(model, loss, optimizer, format, mode=None):
    """The usual training step, with model and loss under torch.compile in `mode` unless that is None."""
    forward = compiled(lambda images, labels: loss(model(images), labels), mode)

    def step(images, labels):
        value = forward(images, labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        return value.detach()

    step.forward = forward
    return step


# The formats that tritonnet.TrainStep takes, and its names for them.
WHOLE_STEPS = {"bfloat16": "bfloat16", "tf32": "tf32", "float32": "ieee"}


class WholeStep:
    """A whole call of tritonnet.TrainStep, and what the step reports."""

    def __init__(self, model, loss, optimizer, format, mode=None):
        self.said = []
        self.step = tritonnet.TrainStep(model, loss, optimizer, WHOLE_STEPS[format], report=self.said.append)

    def __call__(self, images, labels):
        return self.step(images, labels)

    def forward(self, images, labels):
        """The loss, recorded by autograd, of a model that goes through it."""
        with products_in(self.step.precision, images.device):
            return self.step.loss(self.step.model(images), labels)

    def note(self):
        """The path it takes, and everything that it reported after the first choice, but for what was fused."""
        return "; ".join([self.step.path, *(line for line in self.said[1:] if ": fused: " not in line)])

    def replay(self):
        """A function that replays the last step's CUDA graph alone, or None."""
        return self.step._step.latest_replay() if self.step.path == "fused launches" else None


def packed_before(model, format):
    """The forward launch of a tritonnet.LeNet alone, on its weights as they are now, which this call packs.

    Returns:
        A function of images that returns logits, or None where there is no such launch.
    """
    weight = model.conv1.weight
    served = dispatch.launchers is not None and dispatch.implementation(weight) is dispatch.launchers
    if not served or format not in WHOLE_STEPS:
        return None
    precision, dtype, device = WHOLE_STEPS[format], weight.dtype, weight.device
    geometry = lenet_weights.geometry_of(model.layers)
    parameters = lenet_weights.parameters_of(model.layers, geometry, (dtype,))
    places = torch.tensor(list(map(lenet.place, parameters)), dtype=torch.int64, device=device)
    plain, packed = lenet_weights.buffers(geometry, precision, device)
    lenet_pack.pack(places, dtype, plain, packed, geometry, precision)

    def forward(images):
        # As in a whole call, each call allocates its results and its work buffers.
        logits = images.new_empty(len(images), geometry.classes)
        memory = lenet_forward.activations(len(images), geometry, precision, device, train=False)
        return lenet_forward.forward(
            images, None, plain, packed, geometry, precision, lenet_forward.Pixels(), memory, logits
        )

    return forward


def _fused(model):
    return tritonnet.fuse(tritonnet.convert(model))


class Library(NamedTuple):
    """How a library does the work that is timed.

    Attributes:
        functional: the module of its functions.
        lenet: its LeNet.
        compiled: whether it runs under torch.compile.
        whole: whether it takes part in training steps alone: in the first of their layouts, in the formats of
            WHOLE_STEPS, with float32 weights and CUDA graphs of its own.
        training_step: function of model, loss, optimizer, format and mode; its result takes images and labels and
            returns the loss.
        packed: function of a LeNet and a format that packs the weights and returns the forward alone, a function of
            images, or None where there is none; None for a library without such a forward.
        context: function that returns the context manager in which it has to run.
        gradients: the class of gradients.py that has its gradients.
        network: function of a model of torch.nn that returns this library's, a function of images.
    """

    functional: ModuleType
    lenet: type
    compiled: bool = False
    whole: bool = False
    training_step: Callable = eager_step
    packed: Callable | None = None
    context: Callable = contextlib.nullcontext
    gradients: type = gradients.OfTorch
    network: Callable = lambda model: model


def installed():
    """{name: Library} of the contestants that are installed."""
    found = {"tritonnet": Library(F, tritonnet.LeNet, packed=packed_before, gradients=gradients.Ours, network=_fused)}
    if hasattr(tritonnet, "TrainStep"):
        found["TrainStep"] = Library(F, tritonnet.LeNet, whole=True, training_step=WholeStep)
    found["torch"] = Library(unfused, TutorialLeNet)
    found["torch.compile"] = Library(unfused, TutorialLeNet, compiled=True)
    if importlib.util.find_spec("flag_gems"):
        import flag_gems

        found["FlagGems"] = Library(unfused, TutorialLeNet, context=flag_gems.use_gems)
    return found

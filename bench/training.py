"""A training step of whole networks: ResNet-50 and MobileNetV2 on images of 224 x 224.

    python -m bench --training           # in bfloat16, then in tf32
    python -m bench --training bfloat16  # in one format, for a GPU that is there for a few minutes

Ours is tritonnet.TrainStep, and torch's network after tritonnet.convert and tritonnet.fuse in the usual step. They run
against the network as it is and under torch.compile, all in channels_last, with fused SGD, and also in CUDA graphs.
Weights are float32, as they are in training, and in bfloat16 all run under autocast.

Loss and gradients are compared with float64 before anything is timed. Two things make that possible for whole networks:

- A batch repeats a few images. Its statistics, its mean loss and its gradients are those of the few, so that float64
  needs memory for these alone.
- Batch norms shift nearly all arguments of activations to where their slope is 1. With arguments around 0, as a fresh
  network has them, signs that rounding changes add up over the layers: in bfloat16 the gradients of ResNet-50 then have
  nothing to do with those of float64, and in float32 they are off by a hundredth (eight images of 64 x 64, on a CPU).
"""

import copy
import functools
import math

import torch
import torch.nn.functional as TF
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from . import FORMATS, traffic
from .case import CHANNELS_LAST, HOST, TRAINING, Case, Contestant, Work, lay_out
from .exactness import OF_NETWORKS, Gate, Results, Rounding
from .inference import OfNetwork
from .lenet import LR_OF_THE_GATE, sgd
from .networks import NETWORKS
from .record import OK
from .saved import saved_bytes

FORMATS_TIMED = "bfloat16", "tf32"
BATCHES = 64, 256  # the most informative first
TITLES = {"resnet50": "ResNet-50", "mobilenet_v2": "MobileNetV2"}
SUMMARY = "Training of whole networks, each library in its fastest form"
# How many images of a batch differ, and classes.
DIFFERENT, CLASSES = 8, 1000
# The ranges of the scales and shifts of batch norms: relu6 passes on 0 to 6.
SCALES, SHIFTS = (0.5, 1.0), (2.0, 3.0)


@functools.cache
def initial(network, sizes):
    """The network in float32 on the CPU, the same for everything that is compared, without dropout's random numbers."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = NETWORKS[network](**dict(sizes)).train()
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            elif isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(*SCALES)
                module.bias.uniform_(*SHIFTS)
            elif isinstance(module, nn.Dropout):
                module.eval()
    return model


@functools.cache
def _traffic(network, image, sizes):
    """(FLOPs of an image, traffic.CapturedStep) of a step."""
    model, images = traffic.on_meta(network, DIFFERENT, "bfloat16", image=image, **dict(sizes))
    labels = traffic.labels_on_meta(DIFFERENT)
    with FlopCounterMode(display=False) as counter:
        traffic.loss_of(model.train())(images, labels).backward()
    return counter.get_total_flops() // DIFFERENT, traffic.CapturedStep(model, images, labels)


@functools.cache
def work(network, batch, image, sizes):
    """The Work of a step without the optimizer's update: its products, and what the fused step moves (traffic.py).

    Counted in bfloat16, as for inference.
    """
    flops, step = _traffic(network, image, sizes)
    images = torch.empty(batch, *image, dtype=torch.bfloat16, device="meta")
    moved = step.moved(lay_out(images, CHANNELS_LAST), traffic.labels_on_meta(batch))
    return Work(flops * batch, moved.bytes // torch.bfloat16.itemsize)


def in_format(function, format, device):
    """`function` under autocast to a format of 16 bits, as CUDA graphs want it; as it is for a format of float32."""
    dtype = FORMATS[format][0]
    if dtype == torch.float32:
        return function

    def call(*args):
        with torch.autocast(device.type, dtype, cache_enabled=False):
            return function(*args)

    return call


def of_kinds(model, tensors):
    """Tensors like the model's parameters, those with one dimension joined to one tensor for each name.

    A shift in front of a convolution with batch norm has no gradient but roundoff, which cannot be compared alone.
    """
    matrices, vectors = [], {}
    for (name, p), t in zip(model.named_parameters(), tensors):
        if p.dim() == 1:
            vectors.setdefault(name.rpartition(".")[2], []).append(t)
        else:
            matrices.append(t)
    return matrices + [torch.cat(of_name) for of_name in vectors.values()]


class TrainingStep(OfNetwork):
    """A training step of a network."""

    layouts = (CHANNELS_LAST,)

    @property
    def name(self):
        return f"{TITLES[self.network]} training step"

    @property
    def works(self):
        return {TRAINING: work(self.network, self.batch, self.image, self.sizes)}

    @property
    def different(self):
        """How many images of the batch differ."""
        return math.gcd(self.batch, DIFFERENT)

    def model(self, device, dtype=torch.float32):
        return copy.deepcopy(initial(self.network, self.sizes)).to(device, dtype)

    def inputs(self, format, device):
        """(images, labels) that differ, the same at every call."""
        generator = torch.Generator(device).manual_seed(0)
        images = torch.randn(self.different, *self.image, device=device, generator=generator)
        classes = dict(self.sizes).get("classes", CLASSES)
        labels = torch.randint(classes, (self.different,), device=device, generator=generator)
        return images.to(FORMATS[format][0]), labels

    def gate(self, format, device):
        """The Gate for the loss and the change of every parameter."""
        model, (images, labels) = self.model(device, torch.float64), self.inputs(format, device)
        images, parameters = images.double(), list(model.parameters())

        def results():
            loss = TF.cross_entropy(model(images), labels)
            changes = [-LR_OF_THE_GATE * g for g in torch.autograd.grad(loss, parameters)]
            return self._results(loss.detach(), of_kinds(model, changes))

        truth = results()
        with Rounding(format, OF_NETWORKS):
            return Gate(truth, results(), format)

    def _results(self, loss, changes):
        # Activations decide about at least as many elements as the images have.
        return Results([loss], changes, self.different * math.prod(self.image))

    def contestant(self, library, layout, format, device, mode=None):
        """The Contestant of a libraries.Library, under torch.compile in `mode` unless that is None.

        There is one set of images: a network reads its weights and results of layers, which are the same at every call.
        After the gate the learning rate is 0, so that every step has the loss that the gate knows.
        """
        model, loss = self.model(device.torch_device), nn.CrossEntropyLoss()
        if layout == CHANNELS_LAST:
            model = model.to(memory_format=torch.channels_last)
        repeats = self.batch // self.different
        images, labels = (t.repeat(repeats, *(1,) * (t.dim() - 1)) for t in self.inputs(format, device.torch_device))
        images, optimizer = lay_out(images, layout), sgd(model, LR_OF_THE_GATE)
        pieces = library.network(model), loss
        if not library.whole:
            pieces = [in_format(function, format, device.torch_device) for function in pieces]
        step = library.training_step(*pieces, optimizer, format, mode)

        def first(task):
            start = [p.detach().double() for p in model.parameters()]
            value = step(images, labels)
            optimizer.param_groups[0]["lr"] = 0.0
            changes = [p.detach().double() - q for p, q in zip(model.parameters(), start)]
            with torch.no_grad():
                for p, q in zip(model.parameters(), start):
                    p.copy_(q)
            return self._results(value, of_kinds(model, changes))

        return Contestant(
            {TRAINING: [lambda: step(images, labels)]}, first, lambda task, returned: Results([returned], None),
            torch.float32, note=getattr(step, "note", str), replay=getattr(step, "replay", None),
            input_bytes=images.nbytes + labels.nbytes,
            saved=lambda: saved_bytes(lambda: step.forward(images, labels), model),
        )  # fmt: skip


def plan(formats=FORMATS_TIMED):
    """The cases of `python -m bench --training`."""
    return [Case(TrainingStep(network, batch), format) for format in formats for batch in BATCHES for network in TITLES]


def summary(record):
    """(header, rows): for each network and library the images a second in its fastest form, and its memory."""
    of_library = {}
    for row in record.rows:
        if row.task == TRAINING and row.status == OK and row.form != HOST and row.ms:
            of_library.setdefault((row.subject, row.batch, row.format, row.library), []).append(row)
    lines = []
    for case, rows in of_library.items():
        best = min(rows, key=lambda row: row.ms)
        held = [max(getattr(row, name) or 0 for row in rows) for name in ("peak_bytes", "saved_bytes")]
        lines.append((
            *case, f"{best.images_per_s:.4g}", best.form, *(f"{count / 1e6:.4g}" if count else "-" for count in held)
        ))  # fmt: skip
    return ("", "batch", "format", "library", "images/s", "as", "peak MB", "saved for backward MB"), lines

"""LeNet as a whole: inference, and a training step with loss, gradients and optimizer."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as TF

from . import FORMATS
from .case import CHANNELS_LAST, CONTIGUOUS, INFERENCE, PACKED, TRAINING, Contestant, Work, lay_out
from .exactness import Gate, Results, Rounding
from .libraries import TutorialLeNet, compiled
from .measure import copies

IMAGE, CLASSES = (1, 32, 32), 10
# The learning rate of the gate, so large that a step changes the parameters by more than their roundoff; and one that
# trains.
LR_OF_THE_GATE, LR = 100.0, 0.01


def sgd(model, lr):
    """The optimizer of every contestant, fused on a GPU; torch's fused one for the CPU is wrong in 16 bits."""
    parameters = list(model.parameters())
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, fused=parameters[0].is_cuda)


def initial(device, dtype, lenet=TutorialLeNet):
    """A LeNet with the same initial parameters at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = TutorialLeNet().state_dict()
    model = lenet()
    model.load_state_dict(state)
    return model.to(device, dtype)


# Of each convolution: products for one result, and results of one image before pooling. Then products of the linears.
_CONVS = ((25, 6 * 28 * 28), (150, 16 * 10 * 10))
_FULL = 400 * 120 + 120 * 84 + 84 * 10
_PARAMETERS = 6 * 26 + 16 * 151 + 400 * 120 + 120 + 120 * 84 + 84 + 84 * 10 + 10


def work(training, batch):
    """The Work of the whole network as one operation, counted as for the operators.

    Nothing has to be stored between layers. A training step reads and writes every parameter and its momentum. It
    computes no gradient of the images, nor of pixels that were not a maximum.
    """
    forward = sum(products * results for products, results in _CONVS) + _FULL
    pixels = batch * math.prod(IMAGE)
    if not training:
        return Work(2 * forward * batch, pixels + _PARAMETERS + batch * CLASSES)
    (k1, r1), (k2, r2) = _CONVS
    backward = k1 * r1 // 4 + 2 * k2 * r2 // 4 + 2 * _FULL
    return Work(2 * (forward + backward) * batch, pixels + 4 * _PARAMETERS + 1, 8 * batch)


@dataclass(frozen=True)
class Network:
    """LeNet at a batch size, in inference or in training."""

    training: bool
    batch: int

    layouts = CONTIGUOUS, CHANNELS_LAST

    @property
    def name(self):
        return f"LeNet {next(iter(self.works))}"

    @property
    def works(self):
        tasks = (TRAINING,) if self.training else (INFERENCE, PACKED)
        return dict.fromkeys(tasks, work(self.training, self.batch))

    @property
    def small(self):
        return self.batch <= 1024

    @property
    def decisions(self):
        return self.batch * (6 * 14 * 14 + 16 * 5 * 5)

    def inputs(self, format, device, number):
        """(images, labels) of set `number`, the same at every call."""
        generator = torch.Generator(device).manual_seed(number)
        images = torch.randn(self.batch, *IMAGE, device=device, generator=generator).to(FORMATS[format][0])
        return images, torch.randint(CLASSES, (self.batch,), device=device, generator=generator)

    def gate(self, format, device):
        """The Gate for the results on set 0: logits, or loss and the change of every parameter."""
        dtype = FORMATS[format][0]
        images, labels = self.inputs(format, device, 0)
        images = images.double()
        model = initial(device, dtype).double()  # the parameters, rounded to the format
        parameters = list(model.parameters())

        def results(stored):
            if not self.training:
                with torch.no_grad():
                    return Results([model(images)], [])
            loss = TF.cross_entropy(model(images), labels)
            changes = [
                (p - LR_OF_THE_GATE * g).to(stored).double() - p
                for p, g in zip(parameters, torch.autograd.grad(loss, parameters))
            ]
            return Results([loss.detach()], [c.detach() for c in changes], self.decisions)

        truth = results(torch.float64)
        with Rounding(format):
            return Gate(truth, results(dtype), format)

    def contestant(self, library, layout, format, device, mode=None):
        """The Contestant of a libraries.Library, under torch.compile in `mode` unless that is None."""
        model = initial(device.torch_device, FORMATS[format][0], library.lenet)
        model = model.float() if library.whole else model
        if layout == CHANNELS_LAST:
            model = model.to(memory_format=torch.channels_last)
        sets = [self._laid_out(0, layout, format, device)]
        size = sets[0][0].nbytes
        sets += [self._laid_out(number, layout, format, device) for number in range(1, copies(size, device))]
        input_bytes = sum(t.nbytes for tensors in sets for t in tensors)
        if self.training:
            return self._trained(model, library, sets, format, mode)._replace(input_bytes=input_bytes)
        run = compiled(model.eval(), mode)

        def infer(images):
            with torch.no_grad():
                return [run(images)]

        steps = {INFERENCE: [lambda images=images: infer(images) for images, _ in sets]}
        # Packed weights do not depend on the layout: one is enough.
        forward = library.packed(model, format) if library.packed and layout == CONTIGUOUS else None
        if forward:
            steps[PACKED] = [lambda images=images: [forward(images)] for images, _ in sets]

        def results(task, returned):
            return Results(returned, [])

        return Contestant(steps, lambda task: results(task, steps[task][0]()), results)

    def _laid_out(self, number, layout, format, device):
        images, labels = self.inputs(format, device.torch_device, number)
        return lay_out(images, layout), labels

    def _trained(self, model, library, sets, format, mode):
        start = [p.detach().double() for p in model.parameters()]
        optimizer = sgd(model, LR_OF_THE_GATE)
        step = library.training_step(model, torch.nn.CrossEntropyLoss(), optimizer, format, mode)

        def first(task):
            loss = step(*sets[0])
            optimizer.param_groups[0]["lr"] = LR
            changes = [p.detach().double() - q for p, q in zip(model.parameters(), start)]
            with torch.no_grad():
                for p, q in zip(model.parameters(), start):
                    p.copy_(q)
            return Results([loss], changes, self.decisions)

        steps = [lambda images=images, labels=labels: step(images, labels) for images, labels in sets]
        dtype = torch.float32 if library.whole else None
        return Contestant(
            {TRAINING: steps}, first, lambda task, returned: None, dtype,
            note=getattr(step, "note", str), replay=getattr(step, "replay", None),
        )  # fmt: skip

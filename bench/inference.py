"""Inference of whole networks: ResNet-50, MobileNetV2 and EfficientNet-B0 on images of 224 x 224.

    python -m bench --inference           # in bfloat16, then in float16 and tf32
    python -m bench --inference bfloat16  # in one format, for a GPU that is there for a few minutes

Ours is torch's network after tritonnet.convert and tritonnet.fuse. It runs against the network as it is, in both
layouts, and under torch.compile in its modes with the full search; all of them also in CUDA graphs.
"""

import copy
import functools
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from . import FORMATS, traffic
from .case import CHANNELS_LAST, CONTIGUOUS, INFERENCE, Case, Contestant, Work, lay_out
from .exactness import OF_NETWORKS, Gate, Results, Rounding
from .libraries import compiled
from .networks import NETWORKS, settle

FORMATS_TIMED = "bfloat16", "float16", "tf32"
BATCHES = 32, 1, 256  # the most informative first
TITLES = {"resnet50": "ResNet-50", "mobilenet_v2": "MobileNetV2", "efficientnet_b0": "EfficientNet-B0"}
# torch.compile searches for longer than that at large batches.
SMALL = 32
# Images whose statistics the batch norms get, and their least size: statistics of single pixels are not a network's.
SETTLING = 8, 64


@functools.cache
def settled(network, image, sizes):
    """The network in float32 on the CPU, the same for everything that is compared."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        count, least = SETTLING
        images = torch.randn(count, image[0], *(min(size, least) for size in image[1:]))
        return settle(NETWORKS[network](**dict(sizes)), images)


@functools.cache
def _traffic(network, image, sizes):
    """(FLOPs of an image, function of images: what the fused network moves)."""
    model, images = traffic.on_meta(network, 1, "bfloat16", image=image, **dict(sizes))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    return counter.get_total_flops(), traffic.captured(model, images)


@functools.cache
def work(network, batch, image, sizes):
    """The Work of a network: its products, and what moves between the operators of the fused network (traffic.py).

    Counted in bfloat16: the tensors that a fused network moves have the format of the case, but for the statistics that
    torch's batch norm writes in float32.
    """
    flops, moved = _traffic(network, image, sizes)
    images = torch.empty(batch, *image, dtype=torch.bfloat16, device="meta")
    return Work(flops * batch, moved(lay_out(images, CHANNELS_LAST)).bytes // torch.bfloat16.itemsize)


@dataclass(frozen=True)
class OfNetwork:
    """A network of networks.NETWORKS at a batch size.

    Attributes:
        network: its name there.
        batch: images.
        image: size of one.
        sizes: the network's arguments, as pairs.
    """

    network: str
    batch: int
    image: tuple = traffic.IMAGE
    sizes: tuple = ()


class Evaluation(OfNetwork):
    """A network in evaluation."""

    layouts = CONTIGUOUS, CHANNELS_LAST

    @property
    def name(self):
        return f"{TITLES[self.network]} inference"

    @property
    def works(self):
        return {INFERENCE: work(self.network, self.batch, self.image, self.sizes)}

    @property
    def small(self):
        return self.batch <= SMALL

    def model(self, format, device):
        model = copy.deepcopy(settled(self.network, self.image, self.sizes))
        return model.to(device, FORMATS[format][0]).requires_grad_(False)

    def inputs(self, format, device):
        """The images, the same at every call."""
        generator = torch.Generator(device).manual_seed(0)
        images = torch.randn(self.batch, *self.image, device=device, generator=generator)
        return images.to(FORMATS[format][0])

    def gate(self, format, device):
        """The Gate for the logits."""
        model, images = self.model(format, device).double(), self.inputs(format, device).double()
        with torch.no_grad():
            truth = Results([model(images)], [])
            with Rounding(format, OF_NETWORKS):
                return Gate(truth, Results([model(images)], []), format)

    def contestant(self, library, layout, format, device, mode=None):
        """The Contestant of a libraries.Library, under torch.compile in `mode` unless that is None.

        There is one set of images: a network reads its weights and results of layers, which are the same at every call.
        """
        model, images = self.model(format, device.torch_device), self.inputs(format, device.torch_device)
        if layout == CHANNELS_LAST:
            model = model.to(memory_format=torch.channels_last)
        images = lay_out(images, layout)
        run = compiled(library.network(model), mode)

        def infer():
            with torch.no_grad():
                return [run(images)]

        def results(task, returned):
            return Results(returned, [])

        return Contestant({INFERENCE: [infer]}, lambda task: results(task, infer()), results, input_bytes=images.nbytes)


def plan(formats=FORMATS_TIMED):
    """The cases of `python -m bench --inference`."""
    return [Case(Evaluation(network, batch), format) for format in formats for batch in BATCHES for network in TITLES]

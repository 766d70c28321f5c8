"""Every operator over the shapes of LeNet and of ResNet-50, with the least work that it needs.

Bytes are compulsory traffic: forward reads the inputs and writes the result, each once; backward reads dy and what the
gradients need, and writes the gradients. relu reads its signs from y, max-pooling keeps one byte a window. A product
counts 2 FLOPs, a comparison 1. What a fused operator need not store, such as the convolution before a max-pooling, does
not count, nor does the gradient of a pixel that was not a maximum.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tritonnet.kernels import shapes

from . import FORMATS, unfused
from .case import BOTH, CHANNELS_LAST, CONTIGUOUS, FORWARD, Contestant, Work, lay_out
from .exactness import Deciding, Gate, Results, Rounding
from .libraries import compiled
from .measure import copies


@dataclass(frozen=True)
class Operator:
    """A function of a functional module and random inputs.

    Attributes:
        name: operator and shape.
        batch: images, or rows.
        call: function of a functional module and the inputs.
        sizes: of its inputs; the second input is the weights.
        result: size of what it returns.
        works: the Work of each task.
        classes: if not 0, one more input has class indices below this, one for each row of the first.
        decisions: how many signs and maxima of computed values direct the gradients.
        rectified: whether the result is that of a relu, and so shows which elements passed it.
    """

    name: str
    batch: int
    call: Callable
    sizes: tuple
    result: tuple
    works: dict
    classes: int = 0
    decisions: int = 0
    rectified: bool = False

    @property
    def layouts(self):
        return (CONTIGUOUS, CHANNELS_LAST) if len(self.sizes[0]) == 4 else (CONTIGUOUS,)

    def inputs(self, format, device, number):
        """(inputs, dy) of set `number`, the same at every call; weights are scaled to keep the variance near 1."""
        generator = torch.Generator(device).manual_seed(number)
        tensors = []
        for size in (*self.sizes, self.result):
            t = torch.randn(size, device=device, generator=generator)
            weights = len(tensors) == 1 and len(self.sizes) > 1
            tensors.append((t / math.prod(size[1:]) ** 0.5 if weights else t).to(FORMATS[format][0]))
        *tensors, dy = tensors
        if self.classes:
            rows = self.sizes[0][:1]
            tensors.append(torch.randint(self.classes, rows, device=device, generator=generator))
        return tensors, dy

    def gate(self, format, device):
        """The Gate for the results of set 0."""
        tensors, dy = self.inputs(format, device, 0)
        leaves = [_leaf(t.double() if t.is_floating_point() else t) for t in tensors]

        def results():
            return self._results(BOTH, _both(lambda *inputs: self.call(unfused, *inputs), leaves, dy.double()))

        def decided(passed):
            with Deciding(passed) as deciding:
                return results().gradients, deciding.given

        truth = results()
        with Rounding(format):
            return Gate(truth, results(), format, decided if self.rectified else None)

    def sets(self, layout, format, device):
        """[(inputs, dy)] in a layout: as many as overflow the device's L2 cache."""

        def laid_out(number):
            tensors, dy = self.inputs(format, device.torch_device, number)
            return [lay_out(t, layout) for t in tensors], lay_out(dy, layout)

        first = laid_out(0)
        return [first, *(laid_out(n) for n in range(1, copies(sum(t.nbytes for t in first[0]), device)))]

    def contestant(self, library, layout, format, device, mode=None):
        """The Contestant of a libraries.Library, under torch.compile in `mode` unless that is None."""
        call = compiled(lambda *inputs: self.call(library.functional, *inputs), mode)

        sets = self.sets(layout, format, device)
        leaves = [[_leaf(t) for t in tensors] for tensors, _ in sets]
        steps = {
            FORWARD: [lambda tensors=tensors: [call(*tensors)] for tensors, _ in sets],
            BOTH: [lambda tensors=tensors, dy=dy: _both(call, tensors, dy) for tensors, (_, dy) in zip(leaves, sets)],
        }
        return Contestant(steps, lambda task: self._results(task, steps[task][0]()), self._results)

    def _results(self, task, returned):
        y, *gradients = returned
        return Results([y], gradients if task == BOTH else None, self.decisions)


def _leaf(t):
    return t.detach().requires_grad_() if t.is_floating_point() else t


def _both(call, leaves, dy):
    """[result, gradient of each leaf]."""
    y = call(*leaves)
    return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t.requires_grad], dy)]


def _works(forward, backward):
    """The works of both tasks, from those of forward alone and of backward alone."""
    return {FORWARD: forward, BOTH: Work(*map(sum, zip(forward, backward)))}


def relu(name, *size):
    count = math.prod(size)
    works = _works(Work(count, 2 * count), Work(count, 3 * count))  # x, y; dy, y, dx
    return Operator(f"relu {name}", size[0], lambda f, x: f.relu(x), (size,), size, works)


def max_pool2d(name, size, kernel, stride, padding=0):
    window = [(value, value) for value in (kernel, stride, padding, 1)]
    result = (*size[:2], *shapes.max_pool2d_size(size[2:], *window, False))
    x, y = math.prod(size), math.prod(result)
    works = _works(Work(y * kernel**2, x + y), Work(0, y + x))
    works[BOTH] = works[BOTH]._replace(other_bytes=2 * y)  # the position of each maximum, written and read
    return Operator(
        f"max_pool2d {name}", size[0], lambda f, x: f.max_pool2d(x, kernel, stride, padding), (size,), result, works,
    )  # fmt: skip


def avg_pool2d(name, size, kernel, stride, padding=0):
    window = [(value, value) for value in (kernel, stride, padding, 1)]
    result = (*size[:2], *shapes.max_pool2d_size(size[2:], *window, False))
    return _average(
        f"avg_pool2d {name}", size, result, lambda f, x: f.avg_pool2d(x, kernel, stride, padding), kernel**2
    )


def adaptive_avg_pool2d(name, size, bins):
    pixels = size[2] * size[3] // math.prod(bins)
    call = lambda f, x: f.adaptive_avg_pool2d(x, bins)  # noqa: E731
    return _average(f"adaptive_avg_pool2d {name}", size, (*size[:2], *bins), call, pixels)


def _average(name, size, result, call, pixels):
    """Means of so many pixels each: an addition for each pixel, forward and backward."""
    x, y = math.prod(size), math.prod(result)
    work = Work(y * pixels, x + y)
    return Operator(name, size[0], call, (size,), result, _works(work, work))


def squeeze_excite(name, size, R):
    """Without gradients one launch for the means and one for the rest, as in inference."""
    N, C, image = *size[:2], math.prod(size)
    weights = 2 * R * C + R + C
    forward = Work(2 * image + 4 * N * R * C, 3 * image + weights)
    # dy and x for the gates' gradient, dy for that of x, and the means' gradient on top of it.
    backward = Work(4 * image + 8 * N * R * C, 3 * image + 2 * weights)
    return Operator(
        f"squeeze_excite {name}", N, lambda f, *tensors: f.squeeze_excite(*tensors, "silu"),
        (size, (R, C), (R,), (C, R), (C,)), size, _works(forward, backward),
    )  # fmt: skip


def linear(name, M, K, N, relu=False):
    sizes, result = ((M, K), (N, K), (N,)), (M, N)
    forward = Work(2 * M * K * N, M * K + N * K + N + M * N)
    # Both gradients are products of dy, which relu masks by y.
    backward = Work(2 * forward.flops, M * N * (2 if relu else 1) + 2 * (M * K + N * K) + N)
    operator = "linear_relu" if relu else "linear"
    return Operator(
        f"{operator} {name}", M, lambda f, *tensors: getattr(f, operator)(*tensors), sizes, result,
        _works(forward, backward), decisions=M * N if relu else 0, rectified=relu,
    )  # fmt: skip


def conv2d(name, size, filters, stride=1, padding=0, groups=1, relu=False, pool=None):
    """pool: None, or (kernel, stride, padding) of the max-pooling after relu."""
    (N, C, H, W), (OC, KH) = size, filters
    weights, products = (OC, C // groups, KH, KH), C // groups * KH**2  # of one pixel
    geometry = [(value, value) for value in (stride, 1)]
    OH, OW = shapes.conv2d_size((H, W), weights[2:], geometry[0], (padding,) * 4, geometry[1])
    pixels = N * OC * OH * OW
    result, kept, operator, arguments = (N, OC, OH, OW), pixels, "conv2d", {}
    if relu:
        operator = "conv2d_relu"
    if pool:
        window = [(value, value) for value in (*pool, 1)]
        result = (N, OC, *shapes.max_pool2d_size((OH, OW), *window, False))
        kept, operator = math.prod(result), "conv2d_relu_max_pool2d"
        arguments = dict(zip(("pool_kernel_size", "pool_stride", "pool_padding"), pool))
    x, w = N * C * H * W, math.prod(weights)
    forward = Work(2 * pixels * products, x + w + OC + kept)
    # Each gradient takes one product for each product of the forward pass whose result is kept. Signs are read from y,
    # or from the window's byte.
    signs = kept if relu and not pool else 0
    backward = Work(4 * kept * products, kept + signs + 2 * (x + w) + OC, 2 * kept if pool else 0)
    return Operator(
        f"{operator} {name}", N,
        lambda f, *tensors: getattr(f, operator)(
            *tensors, stride=stride, padding=padding, groups=groups, **arguments
        ),
        (size, weights, (OC,)), result, _works(forward, backward),
        decisions=kept if relu or pool else 0, rectified=relu and not pool,
    )  # fmt: skip


def cross_entropy(N, C):
    """A maximum, a difference, an exponential and a sum for each logit; one division and one difference backward."""
    indices = 8 * N
    works = {
        FORWARD: Work(4 * N * C, N * C + 1, indices),
        BOTH: Work(6 * N * C, 2 * N * C + 2, indices),  # the logits once: loss and gradient come from one pass
    }
    return Operator(
        f"cross_entropy {C} classes", N, lambda f, x, target: f.cross_entropy(x, target), ((N, C),), (), works,
        classes=C,
    )  # fmt: skip


def catalogue():
    """Every Operator that is timed, the most informative first."""
    return [
        conv2d("LeNet conv1", (1024, 1, 32, 32), (6, 5), relu=True, pool=(2, 2, 0)),
        conv2d("LeNet conv2", (1024, 6, 14, 14), (16, 5), relu=True, pool=(2, 2, 0)),
        conv2d("ResNet 3x3, 64", (64, 64, 56, 56), (64, 3), padding=1),
        conv2d("ResNet 3x3, 64", (64, 64, 56, 56), (64, 3), padding=1, relu=True),
        linear("4096 x 4096 x 4096", 4096, 4096, 4096),
        relu("ResNet", 64, 64, 112, 112),
        max_pool2d("ResNet 3x3 stride 2", (64, 64, 112, 112), 3, 2, 1),
        cross_entropy(8192, 1000),
        conv2d("ResNet stem 7x7 stride 2", (64, 3, 224, 224), (64, 7), stride=2, padding=3),
        conv2d("ResNet stem", (64, 3, 224, 224), (64, 7), stride=2, padding=3, relu=True, pool=(3, 2, 1)),
        conv2d("ResNet 1x1, 256 to 64", (64, 256, 56, 56), (64, 1)),
        conv2d("ResNet 3x3, 256", (64, 256, 14, 14), (256, 3), padding=1),
        linear("LeNet fc1", 1024, 400, 120),
        linear("LeNet fc1", 1024, 400, 120, relu=True),
        cross_entropy(1024, 10),
        conv2d("LeNet conv1", (1024, 1, 32, 32), (6, 5)),
        conv2d("LeNet conv2", (1024, 6, 14, 14), (16, 5)),
        conv2d("ResNet 3x3, 128", (64, 128, 28, 28), (128, 3), padding=1),
        conv2d("ResNet 3x3, 512", (64, 512, 7, 7), (512, 3), padding=1),
        conv2d("ResNet 3x3 stride 2, 128", (64, 128, 56, 56), (128, 3), stride=2, padding=1),
        conv2d("ResNet 1x1, 64 to 256", (64, 64, 56, 56), (256, 1)),
        conv2d("ResNet 1x1 stride 2, 256 to 512", (64, 256, 56, 56), (512, 1), stride=2),
        conv2d("depthwise 3x3, 144", (64, 144, 56, 56), (144, 3), padding=1, groups=144),
        linear("4096 x 4096 x 4096", 4096, 4096, 4096, relu=True),
        relu("LeNet", 1024, 6, 28, 28),
        squeeze_excite("EfficientNet", (64, 1152, 7, 7), 48),
        max_pool2d("LeNet 2x2", (1024, 6, 28, 28), 2, 2),
        adaptive_avg_pool2d("ResNet", (64, 2048, 7, 7), (1, 1)),
        avg_pool2d("DenseNet 2x2", (64, 128, 56, 56), 2, 2),
    ]

"""Small launches of the kernels for planted.py: each returns what `assert_exact` compares, with the float64 truth."""

from typing import NamedTuple

import torch
import torch.nn.functional as TF
from exact import assert_exact
from overwritten_operand import gradient_kernel

from tritonnet.kernels import launchers, tiles
from tritonnet.kernels.lenet import layout as lenet
from tritonnet.kernels.lenet import update as lenet_update
from tritonnet.lenet import losses


class Row(NamedTuple):
    """A result and what bounds its error, see exact.py."""

    name: str
    actual: torch.Tensor
    truth: torch.Tensor
    magnitude: torch.Tensor
    terms: int
    tf32: bool = False

    def check(self):
        assert_exact(*self)


def random(*size, dtype=torch.float32):
    return torch.randn(size).to(dtype)


def linear_of(K, dtype=torch.bfloat16, precision="ieee"):
    """One tile of 64 x 64, with a few rows and columns past the end."""
    torch.backends.cuda.matmul.fp32_precision = precision
    x, w, b = random(60, K, dtype=dtype), random(60, K, dtype=dtype), random(60, dtype=dtype)
    with tiles.only("matrices", tiles.Tile(64, 64, 128 // dtype.itemsize, num_warps=4, num_stages=3)):
        y = launchers.linear(x, w, b)
    x, w, b = x.double(), w.double(), b.double()
    return [Row("y", y, TF.linear(x, w, b), TF.linear(x.abs(), w.abs(), b.abs()), K + 1, precision == "tf32")]


def linear():
    """Four iterations of a pipeline of copies."""
    return linear_of(200)


def linear_by_stores():
    """Rows that cp.async cannot copy, as they are not aligned: operands pass through registers."""
    return linear_of(75)


def linear_in_tf32():
    return linear_of(100, torch.float32, "tf32")


def cross_entropy():
    x, target = random(37, 50), torch.randint(50, (37,))
    loss, grad = launchers.cross_entropy(x, target, None, "mean", -100, 0.0)
    leaf = x.double().requires_grad_()
    truth = TF.cross_entropy(leaf, target)
    truth.backward()
    truth = truth.detach()
    # Each exponential and logarithm may be off by a few units in the last place.
    return [Row("loss", loss, truth, truth + 1, 100), Row("gradient", grad, leaf.grad, leaf.grad.abs() + 1 / 37, 100)]


def pooled_gradient():
    """The gradient of filters before a pooling: one operand of its products is made in registers."""
    geometry, dtype = ((1, 1), (0, 0, 0, 0), (1, 1), 1, "zeros", (2, 2), (2, 2), (0, 0)), torch.bfloat16
    x, dy = random(2, 8, 18, 18, dtype=dtype), random(2, 16, 8, 8, dtype=dtype)
    code = torch.randint(5, dy.shape, dtype=torch.uint8)
    dw, db = launchers.conv2d_relu_max_pool2d_weight_grad(dy, code, x, (16, 8, 3, 3), *geometry, True)
    dz = TF.one_hot(code.long(), 5)[..., :4] * dy.double()[..., None]
    dz = dz.view(2, 16, 8, 8, 2, 2).transpose(3, 4).reshape(2, 16, 16, 16)
    truth, magnitude = (torch.nn.grad.conv2d_weight(f(x.double()), dw.shape, f(dz)) for f in (torch.clone, torch.abs))
    return [Row("dw", dw, truth, magnitude, 128), Row("db", db, dz.sum((0, 2, 3)), dz.abs().sum((0, 2, 3)), 128)]


def gradient(again, dtype):
    """The gradients of a weight and a bias, of three iterations; with `again` the bias's sum loads dy a second time."""
    dy, a, dw, db = random(192, 64, dtype=dtype), random(192, 64, dtype=dtype), torch.empty(64, 64), torch.empty(64)
    tf32 = dtype == torch.float32
    gradient_kernel[(1,)](dy, a, dw, db, 192, AGAIN=again, PRECISION="tf32" if tf32 else "ieee", num_warps=4)
    dy, a = dy.double(), a.double()
    return [
        Row("dw", dw, dy.T @ a, dy.T.abs() @ a.abs(), 192, tf32),
        Row("db", db, dy.sum(0), dy.abs().sum(0), 192),
    ]


def sums_of(partial, table, i):
    """The gradient of parameter i: its partial sums, whose positions the table gives (see lenet.table)."""
    count, D1, D2, D3, start, step, splits, *steps = table[i, 1:12].tolist()
    terms, step0, step1 = table[i, 12:15].tolist()
    n = torch.arange(count)
    digits = n // (D3 * D2 * D1), n // (D3 * D2) % D1, n // D3 % D2, n % D3
    places = start + sum(digit * by for digit, by in zip(digits, steps))
    offsets = [split * step + t // 2 * step0 + t % 2 * step1 for split in range(splits) for t in range(terms)]
    return sum(partial[places + offset] for offset in offsets)


def update():
    """LeNet's last launch, with Adam, on top of an earlier call's gradients: it loads everything that it changes."""
    device, beta1, beta2, rate, eps = torch.device("cpu"), 0.9, 0.99, 0.01, 1e-3
    geometry, splits = lenet.Geometry(1, 32, 0, 10), lenet.Splits(1, 1, 1)
    table = lenet.table(geometry, splits, device)
    parameters = [
        [*(random(*shape) for _ in range(3)), random(*shape).abs(), torch.zeros(1)] for shape in geometry.shapes
    ]
    partial, parts = random(splits.partials(geometry)[-1]), torch.tensor([[3.0, 2.0]])
    numbers = torch.zeros(10, lenet.NUMBERS)
    row = {"LR": rate, "SIGN": 1, "ADD1": 1 - beta1, "KEEP2": beta2, "ADD2": 1 - beta2, "EPS": eps}
    for name, value in row.items():
        numbers[:, getattr(lenet_update, name)] = value
    for beta, start in ((beta1, lenet_update.POWERS1), (beta2, lenet_update.POWERS2)):
        numbers[:, start : start + lenet.BITS] = torch.tensor([1 - beta**2.0**k for k in range(lenet.BITS)])
    block, steps = losses.new_block(device), torch.zeros(10, dtype=torch.int32)
    place, trouble = torch.tensor([lenet.address(block)]), torch.zeros(4, dtype=torch.int32)
    places = torch.tensor([lenet.place(w, g, (m, v), step) for w, g, m, v, step in parameters])

    before = [[t.double() for t in of] for of in parameters]
    others = numbers, steps, partial, parts, place, trouble
    lenet_update.update(places, geometry, table, *others, moments=2, keep=True, add=True, scale=0.5, rule="Adam")
    loss = torch.tensor(1.5, dtype=torch.float64)
    rows = [Row("loss", block[0], loss, loss, 2)]
    for i, ((w, g, m, v, _), (old_w, old_g, old_m, old_v, _)) in enumerate(zip(parameters, before)):
        true_g = old_g + sums_of(partial.double(), table, i).view_as(g) * (0.5 / 2)
        true_m, true_v = old_m + (1 - beta1) * (true_g - old_m), beta2 * old_v + (1 - beta2) * true_g**2
        true_w = old_w - rate / (1 - beta1) * true_m / ((true_v / (1 - beta2)).sqrt() + eps)
        truths = ("w", w, true_w), ("g", g, true_g), ("m", m, true_m), ("v", v, true_v)
        # A gradient's error, relative to terms of about 1, passes through the square and the quotient.
        rows += [Row(f"{name} {i}", actual, true, true.abs() + 10, 30) for name, actual, true in truths]
    return rows

"""Bugs planted in the kernels' compiled code: the PTX machine (tests/ptx) reports each, and nothing else.

Run with TRITONNET_TEST_DEVICE=sm_90 or sm_80: `python -m pytest tests/planted.py`. Its name does not start with test_,
so that it is collected only when it is named.

A plant changes the PTX of a launch. It is caught if every seed ends in the right fault, in the right kernel, at the
right line of Python; the same launch without the change must run without a fault and give the right result.
"""

import inspect
import os
import re
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import ptx
import pytest
import small_launches as launches
import torch
import torch.nn.functional as TF
from conftest import EMULATED, THOROUGH
from small_launches import random
from test_train_step import sequential

import tritonnet
from tritonnet.kernels import epilogue, launchers
from tritonnet.kernels import linear as linear_file
from tritonnet.kernels.conv2d_pool import weight_grad as conv2d_pool_grad
from tritonnet.kernels.cross_entropy import forward as cross_entropy_file
from tritonnet.kernels.lenet import update as lenet_update

if EMULATED is None:
    raise pytest.UsageError("TRITONNET_TEST_DEVICE has to be sm_90 or sm_80")
SM_90 = EMULATED == "sm_90"

KERNELS = {
    launches.linear: linear_file.linear_forward_kernel,
    launches.linear_by_stores: linear_file.linear_forward_kernel,
    launches.linear_in_tf32: linear_file.linear_forward_kernel,
    launches.cross_entropy: cross_entropy_file.cross_entropy_kernel,
    launches.pooled_gradient: conv2d_pool_grad.conv2d_relu_max_pool2d_weight_grad_kernel,
    launches.update: lenet_update.lenet_update_kernel,
}


def edit(pattern, new, which=0):
    """A function of a text that replaces one of the matches, which has to exist, or all of them (None)."""

    def altered(text):
        places = list(re.finditer(pattern, text, re.M))
        assert places, f"nothing matches {pattern}"
        for place in reversed(places if which is None else [places[which]]):
            text = text[: place.start()] + place.expand(new) + text[place.end() :]
        return text

    return altered


def drop(instruction, which=0):
    return edit(rf"^.*{instruction}.*$", "", which)


def unguarded(instruction, which=0):
    return edit(rf"@%p\d+ ({instruction})", r"\1", which)


def go_around(instruction, threads, which=0):
    """The first threads branch around an instruction."""
    declare = edit(r"^\s*\.reg \.pred.*$", r"\g<0> .reg .pred %around<1>; .reg .b32 %number<1>;")
    branch = f"mov.u32 %number0, %tid.x; setp.lt.u32 %around0, %number0, {threads}; @%around0 bra $L__around;"
    jump = edit(rf"^.*{instruction}.*$", rf"{branch}\n\g<0>\n$L__around:", which)
    return lambda text: jump(declare(text))


def touch(registers, instruction):
    """Inserts an instruction after the first commit, on a register that `registers` finds among products' operands."""
    product = rf"wgmma\.mma_async\S* {registers}(?:.|\n)*?wgmma\.commit_group\.sync\.aligned;"
    return edit(product, rf"\g<0>\n{instruction}")


class Plant(NamedTuple):
    """kinds: the fault, or the faults between which the order of warps decides. where: a part of its line of Python."""

    launch: object
    kinds: str
    where: str
    alter: object


linear, by_stores, tf32 = launches.linear, launches.linear_by_stores, launches.linear_in_tf32
X, W, DOT, BIAS, STORE = "x = tl.load(", "w = tl.load(", "acc = tl.dot(", "tl.load(b_ptr", "tl.store(y_ptr"
# The line that reads the operands in shared memory: the matrix unit's on sm_90, otherwise the warps' loads.
READS_X, READS_W = (DOT, DOT) if SM_90 else (X, W)
# Copies land between the loads of a warp that is ahead, or at the same time.
COPIES = "race" if SM_90 else "race undelivered"
BUFFERS = 3 if SM_90 else 2
NEXT_BUFFER, ONE_FEWER = rf"(setp\.gt\.s32\s+%p\d+, %r\d+, ){BUFFERS - 1};", rf"\g<1>{BUFFERS - 2};"
REUSED = "overwritten" if SM_90 else "undelivered"
ONE_MORE = edit(r"(cp\.async\.wait_group\s+)2;", r"\g<1>3;")

PLANTS = {
    "no barrier between stores and loads of the result": Plant(linear, "race", STORE, drop(r"bar\.sync", -1)),
    "no barrier between stores and reads of operands": Plant(by_stores, "race", READS_X, drop(r"bar\.sync", 1)),
    "no barrier between reads and the next stores": Plant(by_stores, "race", READS_X, drop(r"bar\.sync", 0)),
    "no barrier behind the wait for copies": Plant(linear, COPIES, READS_X, drop(r"bar\.sync", 1)),
    "no barrier between reads and the next copies": Plant(linear, COPIES, READS_X, drop(r"bar\.sync", 2)),
    "no barrier between the sums of warps": Plant(launches.cross_entropy, "race", "tl.sum(", drop(r"bar\.sync", -1)),
    # lenet/update.py without its tl.debug_barrier(): on an H200 its bits differed from run to run.
    "no barrier between loads and stores of the state": Plant(
        launches.update, "race", "tl.load(trouble_ptr", drop(r"bar\.sync", -1)
    ),
    "wait leaves one group of copies too many": Plant(linear, "undelivered", READS_W, ONE_MORE),
    "wait leaves one group of copies too many, tf32": Plant(tf32, "undelivered", READS_W, ONE_MORE),
    "no wait for copies": Plant(linear, "undelivered", READS_X, drop(r"cp\.async\.wait_group\s+2;")),
    "no wait for the last copies": Plant(
        linear,
        "pending" if SM_90 else "undelivered",
        "store_finished(" if SM_90 else STORE,
        drop(r"cp\.async\.wait_group\s+0;"),
    ),
    "first copies of w are not committed": Plant(linear, "undelivered", READS_W, drop(r"cp\.async\.commit_group", 1)),
    "copies of a turn are not committed": Plant(linear, "undelivered", READS_W, drop(r"cp\.async\.commit_group", 5)),
    "one buffer fewer": Plant(linear, REUSED, X, edit(NEXT_BUFFER, ONE_FEWER, None)),
    "one buffer fewer is read": Plant(linear, "undelivered", READS_X, edit(NEXT_BUFFER, ONE_FEWER, 0)),
    "one buffer fewer is written": Plant(linear, REUSED, X, edit(NEXT_BUFFER, ONE_FEWER, 1)),
    "load without its mask": Plant(linear, "stray", BIAS, unguarded(r"ld\.global\.b16", -1)),
    "load of an operand without its mask": Plant(
        by_stores, "stray", X, unguarded(r"ld\.global\.b16(?=[^@]*st\.shared)")
    ),
    "copy without its mask": Plant(linear, "stray", X, edit(r"(selp\.b32\s+%r\d+, 16, 0, )%p\d+;", r"\1-1;", 3)),
    "store without its mask": Plant(linear, "stray", STORE, unguarded(r"st\.global\.b16", -1)),
    "store without its mask of columns": Plant(
        linear, "race", STORE, edit(r"(and\.pred\s+%p\d+, %p\d+), %p\d+;", r"\1, -1;")
    ),
    "copy from one element on": Plant(
        linear, "misaligned", X, edit(r"(cp\.async\.cg\S+ \[ %r\d+ \+ 0 \], \[ %rd\d+ \+) 0", r"\1 2")
    ),
    "copy past the last buffer": Plant(
        linear, "outside", X, edit(r"(cp\.async\.cg\S+ \[ %r\d+ \+) 0", rf"\1 {16384 * BUFFERS}", 3)
    ),
    "two warps go around a barrier": Plant(linear, "barrier", STORE, go_around(r"bar\.sync", 64, -1)),
    "half a warp goes around a barrier": Plant(linear, "barrier", STORE, go_around(r"bar\.sync", 16, -1)),
    "half a warp goes around a shuffle": Plant(
        launches.cross_entropy, "divergence", "tl.sum(", go_around(r"shfl\.sync", 16)
    ),
}
NO_WAIT, WAITS_FOR_TWO = drop(r"wgmma\.wait_group"), edit(r"(wgmma\.wait_group\.sync\.aligned) 1;", r"\1 2;")
PLANTS_OF_SM_90 = {
    "no fence.proxy.async between copies and products": Plant(linear, "proxy", DOT, drop(r"fence\.proxy")),
    "no fence.proxy.async between stores and products": Plant(by_stores, "proxy", DOT, drop(r"fence\.proxy")),
    "no wgmma.fence": Plant(linear, "register", DOT, drop(r"wgmma\.fence")),
    "no wait between products and the use of their sums": Plant(
        linear, "register", "return z + summand", drop(r"wgmma\.wait_group", -1)
    ),
    "no wait between products and the next stores of operands": Plant(by_stores, "overwritten", X, NO_WAIT),
    "no wait between products and the next copies": Plant(linear, "overwritten", X, NO_WAIT),
    "wait leaves one group of products too many": Plant(linear, "overwritten", X, WAITS_FOR_TWO),
    "wait leaves one group of products too many, tf32": Plant(tf32, "overwritten", X, WAITS_FOR_TWO),
    "products of a turn are not committed": Plant(linear, "overwritten", X, drop(r"wgmma\.commit_group")),
    "sums are changed beside their product": Plant(tf32, "register", DOT, touch(r"\{(%r\d+),", r"add.f32 \1, \1, \1;")),
    "operand in registers is changed beside its product": Plant(
        launches.pooled_gradient, "register", "tl.dot(", touch(r"\{[^}]*\}, \{(%r\d+),", r"mov.b32 \1, 0;")
    ),
}
if SM_90:
    PLANTS |= PLANTS_OF_SM_90


@pytest.fixture
def machine(memory_is_watched):
    """The Emulator of the test's launches."""
    return memory_is_watched


def run(machine, launch, seed=0, kernel=None, alter=None):
    """Runs a launch, the same each time except for what the seed decides and for the altered kernel."""

    def altered(text):
        return alter(text) if f".entry {kernel.fn.__name__}(" in text else text

    torch.manual_seed(0)
    machine.rng, machine.alter = np.random.default_rng(seed), alter and altered
    return launch()


def check(rows):
    for row in rows:
        row.check()


def lines_of(kernel, source):
    """The lines of a kernel's file and of epilogue.py that a fault names: its own line, and those of its callers."""
    own, found = Path(inspect.getsourcefile(kernel.fn)), []
    for path in (own, Path(inspect.getsourcefile(epilogue))):
        lines = path.read_text(encoding="utf-8").splitlines()
        found += [lines[int(number) - 1] for number in re.findall(rf"{path.name}:(\d+):", source)]
    return found


def assert_caught(machine, launch, seed, kernel, kinds, where, alter=None):
    with pytest.raises(ptx.Fault) as e:
        run(machine, launch, seed, kernel, alter)
    fault = e.value
    assert fault.kind in kinds.split() and fault.kernel == kernel.fn.__name__, str(fault)
    assert fault.line and any(where in line for line in lines_of(kernel, fault.source)), str(fault)


@pytest.mark.parametrize("name", PLANTS)
def test_caught(name, machine):
    launch, kinds, where, alter = PLANTS[name]
    check(run(machine, launch))
    for seed in range(3):
        assert_caught(machine, launch, seed, KERNELS[launch], kinds, where, alter)


SWIZZLE = edit(r"xor\.b32(\s+%r\d+, %r\d+, )%r\d+;(?=\s+mov\.b32\s+%r\d+, global_smem;)", r"or.b32\g<1>0;")
# Bits 62 and 63 of a matrix descriptor: 1 is a swizzle of 128 bytes, 2 one of 64.
OTHER = edit(r"4611686293305294848", str(4611686293305294848 - (1 << 62) + (2 << 62)))
WRONG = {"copies without swizzle": (linear, SWIZZLE), "copies without swizzle, tf32": (tf32, SWIZZLE)}
if SM_90:
    WRONG |= {"descriptor of another swizzle": (linear, OTHER), "descriptor of another swizzle, tf32": (tf32, OTHER)}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_numbers(name, machine):
    """A wrong order of operands in shared memory is no fault: no access is forbidden, and only the result shows it.

    The result is off by half of its value or more, where rounding explains a hundredth.
    """
    launch, alter = WRONG[name]
    (row,) = run(machine, launch)
    row.check()
    for seed in range(3):
        (row,) = run(machine, launch, seed, KERNELS[launch], alter)
        assert (row.actual.double() - row.truth).norm() > 0.5 * row.truth.norm()
        with pytest.raises(AssertionError, match="over the bound"):
            row.check()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_overwritten_operand(dtype, machine):
    """Why the kernels have `load_again`: an operand with a second use gets one buffer for all iterations.

    On sm_90 a product still reads that buffer when the next iteration stores to it.
    """
    for seed in range(3):
        check(run(machine, partial(launches.gradient, True, dtype), seed))
        if SM_90:
            shared = partial(launches.gradient, False, dtype)
            assert_caught(machine, shared, seed, launches.gradient_kernel, "overwritten", "dy = tl.load(")
        else:
            check(run(machine, partial(launches.gradient, False, dtype), seed))


# bfloat16 and tf32 share the seeds, as a training step takes over a second; TRITONNET_TEST_SEEDS=20 runs more of them.
COUNT = int(os.environ.get("TRITONNET_TEST_SEEDS", 6 if THOROUGH else 4))
SEEDS = {"bfloat16": range(0, COUNT, 2), "tf32": range(1, COUNT, 2)}


def assert_one(machine, launch, seeds):
    """No fault and the same bits, for any order of warps and programs, with early or late copies and products."""
    first = run(machine, launch, seeds[0])
    for seed in seeds[1:]:
        assert all(map(torch.equal, first, run(machine, launch, seed))), f"seed {seed} differs from {seeds[0]}"
    return first


def batch():
    """The smallest LeNet, images and labels."""
    return sequential(), random(2, 1, 28, 28), torch.randint(10, (2,))


def step(precision):
    """The loss of a LeNet's training step, and the gradients: what SGD with rate 1 subtracts from the parameters."""
    net, images, labels = batch()
    before = [p.detach().clone() for p in net.parameters()]
    train = tritonnet.TrainStep(net, TF.cross_entropy, torch.optim.SGD(net.parameters(), lr=1.0), precision)
    assert train.path == "fused launches"
    loss = train(images, labels)
    return [loss, *(old - p.detach() for old, p in zip(before, net.parameters(), strict=True))]


@pytest.mark.parametrize("precision", SEEDS)
def test_training_step(precision, machine):
    """Gradients are within a quarter of float64's, the bound of test_train_step.py for bfloat16."""
    loss, *gradients = assert_one(machine, partial(step, precision), SEEDS[precision])
    torch.manual_seed(0)
    net, images, labels = batch()
    truth = TF.cross_entropy(net.double()(images.double()), labels)
    truth.backward()
    torch.testing.assert_close(loss.double(), truth.detach(), rtol=0.05, atol=0)
    for gradient, p in zip(gradients, net.parameters(), strict=True):
        assert (gradient.double() - p.grad).norm() <= 0.25 * p.grad.norm()


def layers(dtype):
    """Results and gradients of a linear and of a convolution."""
    x, w, b, dy = (random(*size, dtype=dtype) for size in ((70, 136), (72, 136), (72,), (70, 72)))
    images, filters, dz = (random(*size, dtype=dtype) for size in ((2, 8, 10, 10), (16, 8, 3, 3), (2, 16, 8, 8)))
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    geometry = (1, 1), (0, 0, 0, 0), (1, 1), 1, "zeros"
    return [
        launchers.linear(x, w, b),
        launchers.linear(dy, w.t(), None),
        *launchers.linear_weight_grad(dy, x, True),
        launchers.conv2d(images, filters, None, *geometry),
        launchers.conv2d_input_grad(dz, filters, images.shape, *geometry),
        *launchers.conv2d_weight_grad(dz, images, filters.shape, *geometry, True),
    ]


@pytest.mark.parametrize("precision", SEEDS)
def test_layers(precision, machine):
    assert_one(machine, partial(layers, torch.float32 if precision == "tf32" else torch.bfloat16), SEEDS[precision])

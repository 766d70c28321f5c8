"""The benchmarks without a GPU: what is counted, what the gate accepts, made-up times, and reports.

A device that calls functions and counts stands in for what only a GPU has, events and CUDA graphs.
"""

import contextlib
import dataclasses
import functools
import gc
import json
import math
import os
import signal
import subprocess
import time
import types

import pytest
import torch
from conftest import ROOT, run_python

import tritonnet
from bench import (
    FORMATS,
    __main__,
    accuracy,
    cpu,
    libraries,
    operators,
    passes,
    plots,
    report,
    resnet,
    results,
    smoke,
    start,
    unfused,
)
from bench import run as run_module
from bench.case import (
    BOTH,
    CALLS,
    CHANNELS_LAST,
    CONTIGUOUS,
    FORWARD,
    GRAPH,
    HOST,
    INFERENCE,
    INPUT_GRAD,
    PACKED,
    TIMED,
    TRAINING,
    WEIGHT_GRAD,
    Case,
)
from bench.lenet import Network
from bench.limit import OutOfTime, limited
from bench.machine_code import every_kernel
from bench.measure import Cuda, Host, ceilings, copies, measure, measure_host, precision
from bench.record import FAILED, OK, WRONG, Record, Row, earlier
from bench.run import Budget, compiled_entries, entries, plan, run


class Clockwork(Host):
    """A device whose time advances by `tick` and between two marks, and whose graphs are lists of steps."""

    l2_bytes = 1000

    def __init__(self, between=1.0):
        self.now, self.between = 0.0, between
        self.captured = 0

    def tick(self, ms):
        self.now += ms

    def mark(self):
        self.tick(self.between)
        return self.now

    def milliseconds(self, start, end):
        return end - start

    def free_bytes(self):
        return 2**12

    def allocated(self):
        return 1000

    def peak_bytes(self, call):
        call()
        return 10**6

    def capture(self, steps):
        self.captured += 1
        return lambda: [step() for step in steps], steps[0]()


def small_operators():
    return [
        operators.conv2d("LeNet small", (2, 2, 6, 6), (3, 3), padding=1),
        operators.conv2d("small", (2, 2, 8, 8), (3, 3), relu=True, pool=(2, 2, 0)),
        operators.cross_entropy(6, 5),
    ]


def library(**replaced):
    """torch's functions with some of them replaced."""
    functions = types.SimpleNamespace(**{name: getattr(unfused, name) for name in ("conv2d", "linear", "relu")})
    return libraries.Library(types.SimpleNamespace(**{**vars(functions), **replaced}), libraries.TutorialLeNet)


def test_every_case_is_named_once_and_quick_is_a_part_of_all():
    everything, quick = plan(quick=False), plan(quick=True)
    names = [case.name for case in everything]
    assert len(set(names)) == len(names) == 4 * (2 * 3 + len(operators.catalogue()))
    assert {case.name for case in quick} < set(names)
    assert {o.name.split()[0] for o in operators.catalogue()} == {
        "relu", "max_pool2d", "linear", "conv2d", "conv2d_relu", "conv2d_relu_max_pool2d", "linear_relu",
        "cross_entropy", "avg_pool2d", "adaptive_avg_pool2d", "squeeze_excite",
    }  # fmt: skip
    for case in everything:
        for task, work in case.subject.works.items():
            assert work.flops > 0 and work.bytes(FORMATS[case.format][0]) > 0, (case.name, task)


@pytest.mark.parametrize(
    "operator, forward, both",
    [
        # 2 images of 3 x 4 x 4, 5 filters of 3 x 3 x 3 without padding, 2 x 2 pixels left: 96, 135, 5 and 40 elements.
        (operators.conv2d("", (2, 3, 4, 4), (5, 3)), (2 * 40 * 27, 276, 0), (6 * 40 * 27, 276 + 40 + 2 * 231 + 5, 0)),
        # Each pooling window covers all four pixels: 10 elements, whose gradients go to one pixel each.
        (
            operators.conv2d("", (2, 3, 4, 4), (5, 3), relu=True, pool=(2, 2, 0)),
            (2 * 40 * 27, 246, 0), (2 * 40 * 27 + 4 * 10 * 27, 246 + 10 + 2 * 231 + 5, 20),
        ),
        (operators.linear("", 3, 4, 5), (120, 12 + 20 + 5 + 15, 0), (360, 52 + 15 + 2 * 32 + 5, 0)),
        (operators.relu("", 10), (10, 20, 0), (20, 50, 0)),
        (operators.max_pool2d("", (1, 1, 4, 4), 2, 2), (16, 20, 0), (16, 40, 8)),
        (operators.avg_pool2d("", (1, 1, 4, 4), 3, 1, 1), (144, 32, 0), (288, 64, 0)),
        (operators.adaptive_avg_pool2d("", (1, 1, 4, 4), (1, 1)), (16, 17, 0), (32, 34, 0)),
        # An image of 8 elements, and 17 weights and biases, of which 12 are multiplied.
        (operators.squeeze_excite("", (1, 2, 2, 2), 3), (40, 24 + 17, 0), (120, 41 + 24 + 2 * 17, 0)),
        (operators.cross_entropy(2, 3), (24, 7, 16), (36, 14, 16)),
        # Products per image: 416,520 forward, 267,240 backward; 61,706 parameters.
        (Network(False, 2), (4 * 416_520, 2 * 1024 + 61_706 + 20, 0), None),
        (Network(True, 2), None, (4 * 683_760, 2 * 1024 + 4 * 61_706 + 1, 16)),
    ],
    ids=lambda value: value.name if hasattr(value, "name") else "",
)  # fmt: skip
def test_work_counted_by_hand(operator, forward, both):
    works = operator.works
    assert works.get(FORWARD, works.get(INFERENCE)) == forward
    assert works.get(BOTH, works.get(TRAINING)) == both


def test_bytes_go_by_the_format():
    work = operators.max_pool2d("", (1, 1, 4, 4), 2, 2).works[BOTH]
    assert (work.bytes(torch.float32), work.bytes(torch.bfloat16)) == (4 * 40 + 8, 2 * 40 + 8)
    assert sum(p.numel() for p in tritonnet.LeNet().parameters()) == 61_706


@pytest.mark.parametrize("format", TIMED)
@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST])
def test_what_is_right_passes_the_gate(format, layout):
    """Ours, fused, and torch's composed functions in every format; the interpreter's sums are float32's."""
    with precision(format):
        training = [Network(True, 3)] if format in libraries.WHOLE_STEPS else []
        for subject in (*small_operators(), Network(True, 3), Network(False, 3)):
            gate = subject.gate(format, "cpu")
            for name, library in libraries.installed().items():
                if library.compiled or (library.whole and (layout != CONTIGUOUS or subject not in training)):
                    continue
                with tritonnet.backend("reference"):
                    contestant = subject.contestant(library, layout, format, Host())
                    for task in contestant.steps:
                        complaint = gate.complaint(contestant.first(task), contestant.dtype or FORMATS[format][0])
                        assert complaint is None, (subject.name, name, task, complaint)


@pytest.mark.parametrize("format", TIMED)
@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST])
def test_a_forward_on_weights_packed_before(format, layout):
    """One launch a step, with a whole call's values, by the gate; in one layout, and only where there are kernels."""
    subject, ours = Network(False, 3), libraries.installed()["tritonnet"]
    models = []

    def packed(model, format):
        models.append(model)
        return libraries.packed_before(model, format)

    with precision(format), tritonnet.backend("triton"):
        gate, dtype = subject.gate(format, "cpu"), FORMATS[format][0]
        contestant = subject.contestant(ours._replace(packed=packed), layout, format, Clockwork())
        if format == "float16" or layout == CHANNELS_LAST:
            assert list(contestant.steps) == [INFERENCE]
            return
        whole, alone = contestant.steps[INFERENCE], contestant.steps[PACKED]
        assert len(alone) == len(whole) == copies(3 * 1024 * dtype.itemsize, Clockwork())
        results = {}
        for task, launched in ((INFERENCE, ["lenet_forward_kernel", "lenet_pack_kernel"]),
                               (PACKED, ["lenet_forward_kernel"])):  # fmt: skip
            with tritonnet.count_launches() as launches:
                results[task] = contestant.first(task)
            assert sorted(launches.elements()) == launched
            assert gate.complaint(results[task], dtype) is None
        torch.testing.assert_close(results[PACKED].values, results[INFERENCE].values, rtol=0, atol=0)
        # A change of weights comes too late for the packed ones, and the gate tells that from right results.
        with torch.no_grad():
            models[0].fc3.weight.neg_()
        assert gate.complaint(contestant.first(PACKED), dtype) is None
        assert gate.complaint(contestant.first(INFERENCE), dtype).startswith("value 0 is off by")


@pytest.mark.parametrize("served", [True, False], ids=["kernels", "reference"])
def test_rows_of_a_forward_on_weights_packed_before(served):
    """Only tritonnet has them; where it has no such launch, and for other libraries, there are no rows."""
    record, there = Record(MACHINE), {name: of for name, of in libraries.installed().items() if not of.compiled}
    if served:
        packed = {"bfloat16": lambda model: lambda images: model(images).detach(), "float16": lambda model: None}
        there["tritonnet"] = there["tritonnet"]._replace(packed=lambda model, format: packed[format](model))
    with tritonnet.backend("reference"):
        for format in ("bfloat16", "float16"):
            run(record, [Case(Network(False, 2), format)], there, Clockwork(), Budget(1e9), seconds=0.001)
    assert {row.status for row in record.rows} == {OK}
    rows = [(row.library, row.format, row.layout, row.form) for row in record.rows if row.task == PACKED]
    assert rows == [("tritonnet", "bfloat16", CONTIGUOUS, form) for form in (CALLS, HOST, GRAPH)] * served
    assert len(record.rows) == len(rows) + 2 * 2 * 2 * 3  # formats, libraries, layouts, forms
    assert ("## LeNet, inference on weights packed before" in report.page(record)) == served


def test_a_forward_on_wrongly_packed_weights_is_not_timed():
    """Its rows say so, and the whole call is timed.

    A library that fails has no rows for forwards and layouts that it does not offer.
    """

    def packed(model, format):
        return lambda images: model(images).detach() * 1.5

    def broken(*args):
        raise RuntimeError("no LeNet, and no graph")

    device, record, there = Clockwork(), Record({}), libraries.installed()
    device.capture = broken
    there = {"tritonnet": there["tritonnet"]._replace(packed=packed), "torch": there["torch"]._replace(lenet=broken)}
    with tritonnet.backend("reference"):
        run(record, [Case(Network(False, 2), "float32")], there, device, Budget(1e9), seconds=0.001)
    ours = [row for row in record.rows if row.library == "tritonnet"]
    assert {(row.status, row.ms, row.layout) for row in ours if row.task == PACKED} == {(WRONG, None, CONTIGUOUS)}
    assert {(row.form, row.status) for row in ours if row.task == INFERENCE} == {
        (CALLS, OK), (HOST, OK), (GRAPH, FAILED)
    }  # fmt: skip
    theirs = [row for row in record.rows if row.library == "torch"]
    assert {(row.task, row.status) for row in theirs} == {(INFERENCE, FAILED)}


def test_what_packing_costs_the_host():
    """The same call without the packing launch, which is restored afterwards."""
    net, images = tritonnet.LeNet().eval(), torch.randn(2, 1, 32, 32)
    launched = []
    with torch.no_grad(), tritonnet.backend("triton"):
        for context in (contextlib.nullcontext, cpu.packed_before, contextlib.nullcontext):
            with context(), tritonnet.count_launches() as launches:
                net(images)
            launched.append(sorted(launches.elements()))
    whole = ["lenet_forward_kernel", "lenet_pack_kernel"]
    assert launched == [whole, whole[:1], whole]


def _in_tf32(x, w, b=None, **geometry):
    cut = [(t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (x.detach(), w.detach())]
    # The values of the cut operands, with the gradients of the whole ones.
    x, w = (t + (c - t).detach() for t, c in zip((x, w), cut))
    return torch.conv2d(x, w, b, **geometry)


WRONG_WAYS = {
    "one element of the edge": lambda x, w, b, **g: torch.conv2d(x, w, b, **g).index_fill(3, torch.tensor([5]), 0.0),
    "no bias": lambda x, w, b, **g: torch.conv2d(x, w, None, **g) + 0 * b.sum(),
    "tf32 for exact": _in_tf32,
    "NaN": lambda x, w, b, **g: torch.conv2d(x, w, b, **g) * math.nan,
    "another dtype": lambda x, w, b, **g: torch.conv2d(x, w, b, **g).double(),
    "half of a gradient": lambda x, w, b, **g: torch.conv2d(x, w.detach() * 0.5 + w * 0.5, b, **g),
}


@pytest.mark.parametrize("way", WRONG_WAYS)
def test_what_is_wrong_is_named_and_not_timed(way):
    device, record = Clockwork(), Record({})
    case = Case(small_operators()[0], "float32")
    taking_part = {"tritonnet": library(conv2d=WRONG_WAYS[way]), "torch": library()}
    run(record, [case], taking_part, device, Budget(1e9), seconds=0.001)
    ours = [row for row in record.rows if row.library == "tritonnet"]
    assert len(ours) == 2 * 2 * 3 and record.faults and not record.done  # tasks, layouts, forms
    assert {(row.status, row.ms) for row in ours if row.task == BOTH} == {(WRONG, None)}
    assert {row.status for row in record.rows if row.library == "torch"} == {OK}


def _rounded_twice(x, w, b, way=None):
    """A product that is rounded before the bias is added; `way` is what is wrong with its gradients."""
    if way == "half of a gradient":
        w = w.detach() * 0.5 + w * 0.5
    z = torch.nn.functional.linear(x, w) + b
    if way == "all that is negative passes":
        return torch.where(z > 0, z, z.abs() * 2.0**-30).detach() + (z - z.detach())
    return z.relu()


def test_signs_that_rounding_twice_changes_are_no_fault():
    """Gradients go by the signs of the result, which may differ from the truth's only near zero."""
    subject = operators.linear("", 4096, 32, 64, relu=True)
    gate = subject.gate("bfloat16", "cpu")

    def complaint(way=None):
        functional = types.SimpleNamespace(linear_relu=functools.partial(_rounded_twice, way=way))
        contestant = subject.contestant(library()._replace(functional=functional), CONTIGUOUS, "bfloat16", Host())
        return gate.complaint(contestant.first(BOTH), torch.bfloat16)

    assert complaint() is None
    assert complaint("half of a gradient").startswith("gradient 1 is off by 0.5")
    assert "from zero the relu has another sign" in complaint("all that is negative passes")
    gate.decided = None
    assert complaint().startswith("gradient 0 is off by 0.0")


def test_the_convolutions_of_resnet_50():
    """53 in all, 23 of them distinct; 4.09 G multiply-adds and 23,454,912 weights, as the table of the paper has it."""
    layers = resnet.layers(128)
    assert len(layers) == len({layer[1:] for layer in layers}) == 23 and sum(layer.count for layer in layers) == 53
    weights = {layer: layer.OC * layer.C * layer.K**2 for layer in layers}
    assert sum(layer.count * number for layer, number in weights.items()) == 23_454_912
    products = sum(layer.count * number * layer.OH**2 for layer, number in weights.items())
    assert products == 4_087_136_256
    # Name, count, C, H, OC, K, stride of the first, of a shortcut that halves the image, and of the last.
    assert layers[0] == (1, 128, 3, 224, 64, 7, 2) and layers[-1] == (2, 128, 512, 7, 512, 3, 1)
    assert (1, 128, 256, 56, 512, 1, 2) in layers and (4, 128, 64, 56, 256, 1, 1) in layers
    assert (1, 128, 128, 56, 128, 3, 2) in layers and (3, 128, 128, 28, 128, 3, 1) in layers


def small_passes():
    """A stem without an input gradient, a 1x1 with a stride, a 3x3 and a linear.

    The size of the second is odd: for even ones with few channels, torch 2.13.0 on one thread of a CPU writes outside
    its memory in the weight gradient.
    """
    layers = [(1, 2, 3, 9, 4, 7, 2), (2, 2, 4, 7, 8, 1, 2), (3, 2, 4, 5, 4, 3, 1)]
    return [*(passes.convolution(resnet.Layer(*layer)) for layer in layers), passes.linear(5, 4, 3)]


def test_the_work_of_a_pass_by_hand():
    stem, strided, whole, linear = small_passes()
    # 2 images, 5 x 5 results of 4 filters with 147 products each; 486 pixels, 588 weights.
    assert stem.works == dict.fromkeys((FORWARD, WEIGHT_GRAD), (2 * 200 * 147, 486 + 588 + 200, 0))
    # Of 7 x 7 pixels 4 x 4 are read, but each has a gradient.
    assert strided.works[FORWARD] == strided.works[WEIGHT_GRAD] == (2 * 256 * 4, 128 + 32 + 256, 0)
    assert strided.works[INPUT_GRAD] == (2 * 256 * 4, 392 + 32 + 256, 0)
    assert whole.works == dict.fromkeys(passes.PASSES, (2 * 200 * 36, 200 + 144 + 200, 0))
    assert linear.works == dict.fromkeys(passes.PASSES, (120, 20 + 12 + 15, 0))


@pytest.mark.parametrize("format", passes.FORMATS)
def test_each_pass_alone(format):
    """Ours and torch's, in graphs where there are any; one that computes another gradient is named."""
    there = {name: of for name, of in libraries.installed().items() if not of.compiled and not of.whole}
    cases, record, device = [Case(subject, format) for subject in small_passes()], Record(MACHINE), Clockwork()
    with tritonnet.backend("reference"):
        run(record, cases, there, device, Budget(1e9), seconds=0.001)
        assert {(row.status, row.form) for row in record.rows} == {(OK, GRAPH)} and len(record.done) == 4
        # Two libraries, and two layouts of the convolutions; 2, 3, 3 and 3 passes.
        assert len(record.rows) == 2 * (2 * (2 + 3 + 3) + 3)

        class Wrong(libraries.gradients.Ours):
            @staticmethod
            def conv2d_weight_grad(dy, x, w, stride, padding):
                return libraries.gradients.Ours.conv2d_weight_grad(dy, x, w, stride, padding) * 1.1

        record = Record(MACHINE)
        wrong = {"tritonnet": there["tritonnet"]._replace(gradients=Wrong)}
        run(record, cases[2:3], wrong, Host(), Budget(1e9), seconds=0.001)
    assert {(row.task, row.status) for row in record.rows} == {
        (FORWARD, OK), (INPUT_GRAD, OK), (WEIGHT_GRAD, WRONG)
    }  # fmt: skip
    assert {row.form for row in record.rows} == {CALLS}
    assert all(row.detail.startswith("gradient 1 is off by 0.1") for row in record.rows if row.status == WRONG)


def timed_passes():
    """A record of all passes in bfloat16: torch takes twice our time, in channels_last half of it in the stem.

    In NCHW the last convolution has no time.
    """
    record = Record(MACHINE, passes=True)
    subjects = [case.subject for case in passes.plan(("bfloat16",))]
    for subject in subjects:
        for task in subject.works:
            for layout in subject.layouts:
                for library in ("tritonnet", "torch"):
                    row = Row(subject.name, subject.batch, "bfloat16", task, layout, GRAPH, library, 1, 1)
                    in_stem = layout == CHANNELS_LAST and subject is subjects[0]
                    row.ms = 1.0 if library == "tritonnet" else 0.5 if in_stem else 2.0
                    record.rows.append(row)
                    if layout == CONTIGUOUS and subject is subjects[22] and library == "torch":
                        row.status, row.ms = FAILED, None
    return record


def test_the_passes_together(tmp_path):
    """Geometric means, the network's time by counts, how many shapes have both times, and which are slower."""
    record = timed_passes()
    (header, rows), faster = passes.summary(record)
    found = {row[:1] + row[1:2] + row[3:4]: dict(zip(header, row)) for row in rows}
    assert len(rows) == len(found) == 3 * 3  # passes; convolutions in two layouts, and linear

    def line(*key):
        return tuple(found[key][name] for name in ("shapes", "geometric mean", "ResNet-50"))

    # 22 shapes at 2x and the stem at 0.5x; 52 convolutions at 2x and the stem.
    mean, network = 2 ** (21 / 23), (52 * 2 + 0.5) / 53
    assert line("conv2d", FORWARD, CHANNELS_LAST) == ("23 of 23", f"{mean:.2f}x", f"{network:.2f}x")
    assert line("conv2d", WEIGHT_GRAD, CONTIGUOUS) == ("22 of 23", "2.00x", "2.00x")
    assert line("conv2d", INPUT_GRAD, CHANNELS_LAST) == ("22 of 22", "2.00x", "2.00x")
    assert line("linear", INPUT_GRAD, CONTIGUOUS) == ("3 of 3", "2.00x", "-")
    assert [words.split(": ")[1] for words in faster] == ["torch takes 0.50x"] * 2
    text = report.page(record)
    assert text.startswith("# Made-up GPU") and "2000-01-01, passes\n" in text
    for part in (
        "## Operators, weight gradient alone",
        "## The passes together",
        f"Below {passes.SLOWER}x:\n\n- conv2d",
    ):
        assert part in text, part
    record.rows = [row for row in record.rows if "stem" not in row.subject and "3 to 64" not in row.subject]
    assert f"No shape is below {passes.SLOWER}x." in report.page(record)
    assert passes.in_words(made_up()) == ""

    # Files of their own, which neither a full nor a quick run goes on with; bench/README.md has the table.
    record = timed_passes()
    record.write(tmp_path / f"{record.name}.json")
    assert record.name == "made-up-gpu-passes" and not results.records(tmp_path)
    made_up().write(tmp_path / "made-up-gpu.json")
    (full,) = results.records(tmp_path)
    assert not full.passes and "| geometric mean |" in results.section([full], tmp_path)
    full.machine = full.machine | {"triton": "4.0"}
    assert "geometric mean" not in results.section([full], tmp_path)


def test_the_plan_of_passes():
    both, one = passes.plan(), passes.plan(("bfloat16",))
    names = [case.name for case in both]
    assert len(set(names)) == len(names) == 2 * 26 and [case.name for case in one] == names[:26]
    there = libraries.installed()
    for case in both:
        of = compiled_entries(case, there, Clockwork(), False)
        assert [entry.mode for entry in of] == [libraries.COMPILE_QUICKLY] * (case.format == "bfloat16")


def test_a_step_that_trains_wrongly_is_named():
    def lazy_step(model, loss, optimizer, format, mode):
        optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][1:]
        return libraries.eager_step(model, loss, optimizer, format)

    record = Record({})
    taking_part = {"TrainStep": library()._replace(training_step=lazy_step, whole=True)}
    run(record, [Case(Network(True, 2), "float32")], taking_part, Clockwork(), Budget(1e9), seconds=0.001)
    assert record.rows and {row.status for row in record.rows} == {WRONG}
    assert record.rows[0].detail.startswith("gradient 0 is off by")


def test_train_step_takes_part_where_it_is_there(monkeypatch):
    """Steps on float32 weights in any product format, with CUDA graphs of their own; rows name the path.

    Their whole calls are timed, and their graphs alone.
    """

    class Step:
        path = "fused launches"

        def __init__(self, model, loss, optimizer, precision, report):
            report("LeNet: three launches, because")
            report("no graph of 3 images")
            taken.append((precision, next(model.parameters()).dtype))
            self.step = libraries.eager_step(model.float(), loss, optimizer, None)
            self._step = types.SimpleNamespace(latest_replay=lambda: replays.append)

        def __call__(self, images, labels):
            device.tick(1.0)
            return self.step(images.float(), labels)

    taken, replays = [], types.SimpleNamespace(append=lambda: device.tick(0.25))
    monkeypatch.setattr(tritonnet, "TrainStep", Step, raising=False)
    there, device, record = {"TrainStep": libraries.installed()["TrainStep"]}, Clockwork(0.0), Record(MACHINE)
    cases = [Case(subject, format) for subject in (Network(True, 2), Network(False, 2), small_operators()[0])
             for format in TIMED]  # fmt: skip
    with tritonnet.backend("reference"):
        run(record, cases, there, device, Budget(1e9), seconds=0.001)
    assert taken == [("bfloat16", torch.float32), ("tf32", torch.float32), ("ieee", torch.float32)]
    assert [(r.task, r.format, r.form, r.status) for r in record.rows] == [
        (TRAINING, format, form, OK) for format in TIMED[:2] + TIMED[3:] for form in (CALLS, HOST, GRAPH)
    ]
    assert not device.captured
    text = report.page(record)
    assert "(contiguous, tf32, batch 2, graph): ok: fused launches; no graph of 3 images" in text
    assert {row.ms for row in record.rows if row.form == CALLS} == {1.0}
    assert {row.ms for row in record.rows if row.form == GRAPH} == {0.25}
    # The step's peak, less what was held before and one set of two images with their labels.
    held = {row.peak_bytes for row in record.rows if row.form == CALLS}
    assert held == {10**6 - 1000 - 2 * (4 * 1024 + 8), 10**6 - 1000 - 2 * (2 * 1024 + 8)}
    assert "## Peak memory of a training step" in text and "0.9908" in text


def test_a_contestant_that_fails_is_a_line_of_the_report():
    def refuse(*args, **kwargs):
        raise RuntimeError("no such kernel\nand more")

    record = Record({})
    case = Case(small_operators()[0], "bfloat16")
    taking_part = {"tritonnet": library(), "FlagGems": library(conv2d=refuse)}
    run(record, [case], taking_part, Clockwork(), Budget(1e9), seconds=0.001)
    assert {(r.library, r.status, r.detail) for r in record.rows} == {
        ("tritonnet", OK, ""), ("FlagGems", FAILED, "RuntimeError: no such kernel")
    }  # fmt: skip
    assert not record.faults


@pytest.mark.thorough
def test_who_was_left_out_is_measured_later():
    """Only in the cases that it would have taken part in; the others are done."""
    record, device = Record(MACHINE), Clockwork()
    cases = [Case(Network(True, 2), "tf32"), Case(Network(False, 2), "tf32")]
    there = {name: of for name, of in libraries.installed().items() if not of.compiled}
    some = {name: of for name, of in there.items() if name != "TrainStep"}
    with tritonnet.backend("reference"):
        for record.without, taking_part in ((["TrainStep"], some), (["TrainStep"], some), ([], there)):
            count = len(record.rows)
            run(record, cases, taking_part, device, Budget(1e9), seconds=0.001)
            assert (len(record.rows) == count) == (count > 0 and taking_part is some)
    names = [case.name for case in cases]
    assert record.done == [f"{names[0]} without TrainStep", names[1], names[0]]
    assert "TrainStep" in {row.library for row in record.rows}


def test_a_device_that_is_lost_is_not_lost_again():
    """The next run starts with the cases after it; earlier results, and who lost the device, are kept."""

    def lose(*args, **kwargs):
        device.synchronize = lambda: 1 // 0
        raise RuntimeError("an illegal memory access")

    cases, kept = [Case(operator, "float32") for operator in small_operators()[::2]], []
    record, device = Record(MACHINE), Clockwork()
    taking_part = {"torch": library(), "FlagGems": library(conv2d=lose), "tritonnet": library()}
    theirs = unfused.cross_entropy
    taking_part = {name: of._replace(functional=types.SimpleNamespace(**vars(of.functional), cross_entropy=theirs))
                   for name, of in taking_part.items()}  # fmt: skip
    with pytest.raises(ZeroDivisionError):
        run(record, cases, taking_part, device, Budget(1e9), seconds=0.001, keep=lambda: kept.append(1))
    assert kept and record.lost == [cases[0].name] and not record.done
    assert {(row.library, row.status, bool(row.ms)) for row in record.rows} == {
        ("torch", OK, True), ("FlagGems", FAILED, False)
    }  # fmt: skip
    assert "the device was lost: ZeroDivisionError" in record.rows[-1].detail
    run(record, cases, taking_part, Clockwork(), Budget(1e9), seconds=0.001)
    assert record.done == [cases[1].name] and record.left_out == [f"{cases[0].name}: the device was lost in it"]


def test_times_are_medians_of_calls_in_turn():
    device, calls = Clockwork(between=0.0), []

    def step(number):
        calls.append(number)
        device.tick(100.0 if len(calls) == 20 else 0.25)  # the device was busy once

    timing = measure([lambda: step(0), lambda: step(1), lambda: step(2)], device, seconds=0.01)
    assert timing == (0.25, 0.25, 0.25)
    assert calls == [number % 3 for number in range(len(calls))]
    # 3 calls to warm up, 3 to see how long one takes, then 20 pairs of events around two calls each.
    assert len(calls) == 3 + 3 + 2 * 20


def test_looking_for_garbage_takes_no_time(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: types.SimpleNamespace(L2_cache_size=1))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 7)
    try:
        device, start = Cuda(), time.perf_counter()
        assert gc.get_freeze_count() > 100_000 and device.allocated() == 7
        assert time.perf_counter() - start < 0.5
    finally:
        gc.unfreeze()


def test_inputs_overflow_the_cache():
    device = Clockwork()
    assert [copies(size, device) for size in (1, 999, 1000, 2000, 10**6)] == [1001, 2, 2, 1, 1]
    contestant = operators.relu("", 25).contestant(library(), CONTIGUOUS, "float32", device)
    assert len(contestant.steps[FORWARD]) == len(contestant.steps[BOTH]) == 11
    assert len({step()[0].sum().item() for step in contestant.steps[FORWARD]}) == 11


def test_ceilings():
    found = ceilings(["float32", "bfloat16"], Clockwork(), size=8)
    # Each pair of events is 1 ms apart; the calls between them are chosen from the time of one of the first five.
    assert found == {
        "bytes_per_s": 2 * 4 * 2**8 * 2e3,
        "flops_per_s": dict.fromkeys(("float32", "bfloat16"), 2**10 * 2e3),
    }


def test_precision_is_set_for_both_and_put_back():
    def flags():
        return torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision

    before = flags()
    with precision("tf32"):
        assert flags() == ("tf32", "tf32")
        with precision("float32"):
            assert "tf32" not in flags()
            torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32  # Inductor reads these flags
    assert flags() == before or before[1] == "none"


def test_time_runs_out_in_words():
    now = [0.0]
    budget = Budget(100, now=lambda: now[0])
    assert budget.fits("case") and budget.fits("compile")
    with budget.spend("case"):
        now[0] += 84
    assert budget.expected["case"] == 44 and budget.left == 16 and not budget.fits("case") and budget.fits("compile")
    record = Record({})
    run(record, [Case(small_operators()[0], "tf32")], {"torch": library()}, Clockwork(), budget)
    assert record.missing == ["conv2d LeNet small, batch 2, tf32: no time"] and not record.rows and not record.done


def test_the_host_is_timed_while_the_device_waits():
    """Spans of ten calls; the waits for the device between them do not count."""
    device, calls = Clockwork(), []
    device.synchronize = lambda: time.sleep(0.02)
    timing = measure_host([lambda: calls.append(0), lambda: calls.append(1)], device, seconds=0.1)
    assert timing.low <= timing.ms <= timing.high < 1.0
    assert len(calls) == 10 * (1 + 5) or 10 * (1 + 3) <= len(calls) < 60
    assert calls == [number % 2 for number in range(len(calls))]


def test_a_limit_of_time():
    with pytest.raises(OutOfTime, match="more than 0 s"), limited(0.05):
        while True:
            with contextlib.suppress(Exception):  # what runs inside does not catch the exception
                time.sleep(5)
    with limited(0.05):
        pass
    time.sleep(0.1)  # no exception comes after the block


def test_torch_compile_is_bounded(monkeypatch):
    """A compilation that takes too long gets a line and is not tried again; without time for it, it is missing."""
    monkeypatch.setattr(torch, "compile", lambda function, mode, dynamic: lambda *args: time.sleep(5))
    monkeypatch.setitem(run_module.MOST_COMPILING, libraries.COMPILE_QUICKLY, 0.5)
    monkeypatch.setitem(run_module.EXPECTED, "compile", 0.1)
    there, case = {"torch.compile": libraries.installed()["torch.compile"]}, Case(Network(False, 64), "bfloat16")
    record = Record(MACHINE, quick=True)
    run(record, [case], there, Host(), Budget(1e9), seconds=0.001)
    assert {(row.status, row.detail) for row in record.rows} == {(FAILED, "default took more than 0 s")}
    assert record.done == ["LeNet inference, batch 64, bfloat16: torch.compile in default, calls and host"]
    assert not record.faults and not record.missing
    record = Record(MACHINE, quick=True)
    run(record, [case], there, Host(), Budget(0.3), seconds=0.001)
    assert record.missing == ["LeNet inference, batch 64, bfloat16: torch.compile in default, calls and host: no time"]
    assert not record.rows and not record.done


def test_a_run_is_gone_on_with(tmp_path, monkeypatch):
    """Earlier results are kept if machine and code are the same; a full run starts from the quick one's rows."""
    cases, kept = [Case(operator, "float32") for operator in small_operators()[::2]], []
    record = earlier(MACHINE, True, tmp_path)
    assert record == Record(MACHINE, True)
    record.sources = "of now"
    monkeypatch.setattr("bench.record.sources", lambda: "of now")
    run(record, cases[:1], {"torch": library()}, Clockwork(), Budget(1e9), seconds=0.001, keep=lambda: kept.append(1))
    assert len(kept) == 3 and record.done == [cases[0].name]  # at the start, with its rows, and at the end
    record.missing = ["something: no time"]
    record.write(tmp_path / f"{record.name}.json")
    assert [p.name for p in tmp_path.iterdir()] == ["made-up-gpu-quick.json"]  # no half-written file beside it

    more = earlier(MACHINE | {"date": "2000-01-02"}, False, tmp_path)
    assert more.rows == record.rows and not more.quick and more.machine["date"] == "2000-01-02" and not more.missing

    def broken(*args, **kwargs):
        raise AssertionError("measured already")

    wrong = {"tritonnet": library(conv2d=broken, cross_entropy=torch.nn.functional.cross_entropy)}
    run(more, cases, wrong, Clockwork(), Budget(1e9), seconds=0.001)
    assert more.done == [case.name for case in cases] and not more.faults

    # A process that was killed may have hung in the case that it had begun.
    record.begun = "what hangs"
    record.write(tmp_path / f"{record.name}.json")
    after = earlier(MACHINE, True, tmp_path)
    assert after.lost == ["what hangs"] and not after.begun and after.done == record.done

    for other in (MACHINE | {"triton": "4.0"}, MACHINE | {"device": "Another GPU"}):
        assert not earlier(other, True, tmp_path).rows
    monkeypatch.setattr("bench.record.sources", lambda: "changed")
    assert not earlier(MACHINE, True, tmp_path).rows
    # Wrong results are measured again, and their rows are not kept twice.
    record = Record(MACHINE)
    run(record, cases[:1], {"tritonnet": library(conv2d=broken)}, Clockwork(), Budget(1e9), seconds=0.001)
    assert not record.done and record.faults
    count = len(record.rows)
    run(record, cases[:1], {"tritonnet": library()}, Clockwork(), Budget(1e9), seconds=0.001)
    assert record.done and not record.faults and len(record.rows) == count


@pytest.mark.parametrize("quick", [True, False], ids=["quick", "all"])
@pytest.mark.sampled(2)
def test_compiled_contestants_and_those_in_graphs(quick, monkeypatch):
    """Which contestants run in which form. torch.compile is stubbed, and comes after all that needs no compilation."""
    modes = []
    monkeypatch.setattr(torch, "compile", lambda function, mode, dynamic: modes.append(mode) or function)
    monkeypatch.setattr(run_module, "COMPILED_QUICKLY", (2,))
    taking_part = libraries.installed()
    case, device, record = Case(Network(True, 2), "bfloat16"), Clockwork(), Record({}, quick)
    plain = entries(case, taking_part, device)
    assert {e.name for e in plain} == set(taking_part) - {"torch.compile"}
    assert {e.layout for e in plain if not e.library.whole} == {CONTIGUOUS, CHANNELS_LAST}
    expected = [((CALLS, HOST, GRAPH), libraries.COMPILE_QUICKLY)]
    if not quick:
        expected = [((GRAPH,), libraries.COMPILE_NO_GRAPHS), ((CALLS, HOST), libraries.COMPILE)]
    assert [(e.forms, e.mode) for e in compiled_entries(case, taking_part, device, quick)] == expected
    with tritonnet.backend("reference"):
        cases = [case, Case(Network(False, 2), "float32")]
        run(record, cases, taking_part, device, Budget(1e9), seconds=0.001)
    assert modes == [mode for _, mode in expected]
    # On the reference TrainStep has no graph to replay.
    assert device.captured == 2 * len([e for e in plain if not e.library.whole]) + 1
    assert {row.status for row in record.rows} == {OK}, [row.detail for row in record.rows]
    # In a quick run torch.compile comes last in each format.
    assert (record.rows[-1].library == "torch.compile") != quick and not record.left_out + record.missing
    in_order = [(row.format, row.library == "torch.compile") for row in record.rows]
    assert (
        in_order == sorted(in_order, key=[("bfloat16", False), ("bfloat16", True), ("float32", False)].index)
        or not quick
    )
    assert {row.detail for row in record.rows if row.library == "torch.compile"} == set(modes)
    # Memory is measured outside torch.compile's own CUDA graphs, which torch does not count.
    held = [(row.form, row.detail) for row in record.rows if row.library == "torch.compile" and row.peak_bytes]
    assert held == [(CALLS if quick else GRAPH, modes[0])]


MACHINE = {
    "device": "Made-up GPU",
    "torch": "2.0",
    "triton": "3.0",
    "CUDA": "12",
    "tritonnet": "0",
    "date": "2000-01-01",
}


def made_up(quick=False):
    """A record with made-up figures."""
    record = Record(MACHINE, quick, {"bytes_per_s": 1e12, "flops_per_s": {"bfloat16": 1e14, "tf32": 5e13}})
    for case in plan(quick=True)[:20]:
        for task, work in case.subject.works.items():
            names = ("tritonnet", "torch", "torch.compile") if task != PACKED else ("tritonnet",)
            for factor, name in enumerate(names, 1):
                for form, share in ((CALLS, 1), (GRAPH, 0.5), (HOST, 0.1)):
                    row = Row(
                        case.subject.name, case.subject.batch, case.format, task, CONTIGUOUS, form, name,
                        work.bytes(FORMATS[case.format][0]), work.flops,
                    )  # fmt: skip
                    ms = share * 2 * factor * row.floor_ms(record.ceilings)
                    row.set_time((ms, ms, ms))
                    record.rows.append(row)
    record.rows[4] = dataclasses.replace(
        record.rows[4], status=WRONG, detail="value 0 is off by 1, 0.1 allowed", ms=None
    )
    record.left_out = ["some case: no time"]
    record.accuracy = [
        {"library": "torch", "format": "tf32", "accuracy": 0.991, "epochs": 3, "seconds": 1.5, "reached": True}
    ]
    return record


def test_floor_rates_and_ratios():
    ceilings = {"bytes_per_s": 1e12, "flops_per_s": {"bfloat16": 1e14}}
    ours = Row("relu", 8, "bfloat16", FORWARD, CONTIGUOUS, CALLS, "tritonnet", 2 * 10**9, 10**6)
    assert ours.floor_ms(ceilings) == 2.0
    assert dataclasses.replace(ours, flops=10**12).floor_ms(ceilings) == 10.0
    ours.set_time((4.0, 3.9, 4.1))
    theirs = dataclasses.replace(ours, library="torch", ms=5.0)
    broken = dataclasses.replace(ours, library="FlagGems", status=WRONG, ms=None)
    record = Record(MACHINE, ceilings=ceilings, rows=[ours, theirs, broken])
    header, (line,) = report.table(record, FORWARD)
    cells = dict(zip(header, line))
    assert cells["tritonnet us"] == "4000" and cells["torch"] == "1.25x" and cells["FlagGems"] == "WRONG"
    assert cells["floor us"] == "2e+03" and cells["of it"] == "50%" and cells["GB/s"] == "500"
    # The others are compared with TrainStep where it is faster.
    record.rows.append(dataclasses.replace(ours, library="TrainStep", ms=2.5))
    assert dict(zip(header, report.table(record, FORWARD)[1][0]))["torch"] != "1.25x"


def test_report_and_record(tmp_path):
    record = made_up()
    text = report.page(record, ["a.png"])
    assert text.startswith("# Made-up GPU, torch 2.0, triton 3.0, CUDA 12, tritonnet 0, 2000-01-01\n")
    headings = [text for task, text in report.TASKS.items() if task not in (INPUT_GRAD, WEIGHT_GRAD)]
    for part in (*headings, "off by 1", "- some case: no time", "![a.png](a.png)", "99", "2.00x", "3.00x"):
        assert part in text, part
    record.write(tmp_path / "r.json")
    assert Record.read(tmp_path / "r.json") == record
    assert not record.faults
    record.rows[0].status = FAILED
    assert record.faults == [record.rows[0]]


def test_pictures_are_written(tmp_path):
    pytest.importorskip("matplotlib")
    assert plots.missing() is None
    names = plots.draw(made_up(), tmp_path)
    assert names == ["made-up-gpu-roofline.png", "made-up-gpu-batch.png"]
    for name in names:
        content = (tmp_path / name).read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 10_000
    assert plots.draw(Record(MACHINE), tmp_path) == []
    without = made_up()
    without.ceilings = {}
    assert plots.draw(without, tmp_path) == names[1:]


def test_without_matplotlib_there_is_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plots, "missing", lambda: "no pictures, because")
    __main__.save(made_up(), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made-up-gpu.json", "made-up-gpu.md"]
    assert capsys.readouterr().out.startswith("no pictures, because\nwritten: ")


README = f"before\n{results.START}\nold\n{results.END}\nafter\n"


def test_results_in_the_readmes(tmp_path):
    folder = tmp_path / "bench" / "results"
    folder.mkdir(parents=True)
    nothing = f"before\n{results.START}\n{results.NOTHING}\n{results.END}\nafter\n"
    for block in (results.section(results.records(folder), folder), results.headlines(results.records(folder))):
        assert results.written(README, block) == nothing
    made_up(quick=True).write(folder / "made-up-gpu-quick.json")
    assert [r.quick for r in results.records(folder)] == [True]
    made_up().write(folder / "made-up-gpu.json")
    assert [r.quick for r in results.records(folder)] == [False]
    other = made_up(quick=True)
    other.machine = MACHINE | {"date": "2000-02-01", "torch": "another"}
    other.write(folder / "made-up-gpu-quick.json")
    assert [r.quick for r in results.records(folder)] == [True]
    made_up(quick=True).write(folder / "made-up-gpu-quick.json")
    for readme in (tmp_path, tmp_path / "bench"):
        (readme / "README.md").write_text(README)
    results.main(tmp_path)
    text = (tmp_path / "bench" / "README.md").read_text()
    assert text.startswith("before\n<!-- results -->\n**Made-up GPU") and text.endswith("<!-- /results -->\nafter\n")
    line = next(line for line in text.splitlines() if "LeNet training step" in line and "65536" in line)
    assert line.split("|")[5].strip() == "2.00x" and line.split("|")[6].strip() == "3.00x"
    assert line.split("|")[7].strip() == "100%"
    assert (
        "Not measured by `python -m bench`: in bfloat16 `conv2d ResNet stem 7x7 stride 2`, " in text
        and "; anything in float32; " in text
    )
    assert text.count("; smoke, tests, memcheck, racecheck by --verify.") == 1
    short = (tmp_path / "README.md").read_text()
    assert short.startswith("before\n<!-- results -->\n**Made-up GPU") and "](bench/README.md)" in short
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in short.splitlines() if "bfloat16" in line]
    assert [(name, int(batch)) for name, batch, *_ in rows] == list(results.HEADLINES)
    assert rows[0][4:] == ["4.00x", "3.00x"]  # torch's graph was wrong
    assert {tuple(row[4:]) for row in rows[1:]} == {("2.00x", "3.00x")}
    results.main(tmp_path)
    assert (tmp_path / "bench" / "README.md").read_text() == text
    assert (tmp_path / "README.md").read_text() == short
    for broken in ("", README + results.START, README.replace(results.END, "")):
        with pytest.raises(ValueError, match="the README needs"):
            results.written(broken, "")


@pytest.mark.parametrize("date, factor", [("2000-01-01", 3), ("2000-02-01", 3), ("1999-12-31", 1)])
def test_a_quick_run_that_is_no_older_counts_in_the_readme(date, factor, tmp_path):
    """Its rows replace the full run's; the other rows stay, and an older quick run changes nothing."""
    made_up().write(tmp_path / "made-up-gpu.json")
    quick = made_up(quick=True)
    quick.machine = MACHINE | {"date": date}
    quick.rows = [row for row in quick.rows if row.batch == 64]
    for row in (row for row in quick.rows if row.ms):
        row.ms *= 3
    quick.write(tmp_path / "made-up-gpu-quick.json")
    (found,) = results.records(tmp_path)
    assert not found.quick
    before, after = ({row.key: row.ms for row in run.rows} for run in (made_up(), found))
    again = {row.key for row in quick.rows}
    assert again < before.keys() == after.keys()
    for key, ms in before.items():
        assert after[key] == (ms and ms * (factor if key in again else 1))
    pages = "/made-up-gpu.md), [the quick run](results/made-up-gpu-quick.md))"
    assert pages in results.section([found], tmp_path)


def test_odd_records_in_the_readme(tmp_path, capsys):
    """Nothing timed, nothing to compare with, half of a file, another card's record, and one batch of two."""
    for number, text in enumerate(('{"machine": {', "", "[1]", '{"a": 1}')):
        (tmp_path / f"odd-{number}.json").write_text(text)
        assert earlier(MACHINE | {"device": f"odd {number}"}, False, tmp_path).rows == []
    (tmp_path / "made-up-gpu-verify.json").write_text("{")
    record = made_up()
    for row in record.rows:
        if (row.batch, row.format, row.subject) == (65536, "tf32", "LeNet inference"):
            row.status, row.ms = FAILED, None
    record.write(tmp_path / "made-up-gpu.json")
    Record(MACHINE | {"device": "Another"}).write(tmp_path / "another.json")
    found = results.records(tmp_path)
    assert [record.machine["device"] for record in found] == ["Another", "Made-up GPU"]
    assert capsys.readouterr().err.count("is ignored: ") >= 8
    text = results.section(found, tmp_path)
    assert "**, no times of ours ([all of it](results/another.md)).\n\nNot measured by" in text
    assert "`python -m bench`: anything in bfloat16;" in text
    assert "; in tf32 `LeNet inference at batch 65536`, `conv2d_relu_max_pool2d LeNet conv1`, " in text
    assert "|  |" not in text
    record.ceilings = {}
    assert {row[-1] for row in results.summary(record)[1]} == {"-"}
    # Outcomes from other sources are not counted.
    kept = {"machine": MACHINE, "sources": "other", "stages": {"memcheck": {"status": "passed"}}}
    (tmp_path / "made-up-gpu-verify.json").write_text(json.dumps(kept))
    assert "memcheck: passed" not in results.section([record], tmp_path)


def test_the_readme_tells_a_call_from_its_graph(tmp_path):
    """For TrainStep the whole call counts; its graph alone is another row, compared with other graphs."""
    record = made_up()
    whole, replay, hosts = (
        dataclasses.replace(row, library="TrainStep", peak_bytes=5_000_000 if row.form == CALLS else None)
        for row in (next(r for r in record.rows if r.form == form) for form in (CALLS, GRAPH, HOST))
    )
    record.rows = [row for row in record.rows if row.batch != 64 or row.library != "tritonnet"]
    for row, share in ((whole, 2), (replay, 1), (hosts, 0.01)):
        row.ms = share * row.floor_ms(record.ceilings)
        record.rows.append(row)
    record.write(tmp_path / "made-up-gpu.json")
    kept = {
        "machine": MACHINE | {"date": "2000-03-01"},
        "sources": "",
        "stages": {"memcheck": {"status": "passed"}},
        "smoke": {"bfloat16, batch 64": "agrees", "tf32, batch 64": "differs"},
        "tests": {"tests/test_relu.py": {"passed": ["a", "b"], "failed": {"c": "because"}, "skipped": []}},
        "start": {"first step, tritonnet, warm": {"there_ms": 1000.0, "ms": 3000.4}},
    }
    (tmp_path / "made-up-gpu-verify.json").write_text(json.dumps(kept))
    text = results.section(results.records(tmp_path), tmp_path)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    lines = {line[0]: line[4:] for line in reversed(lines) if line[1:3] == ["64", "bfloat16"]}
    # In floors: torch takes four (its graph was wrong), torch.compile's graph three, our call two, its graph one.
    assert lines["LeNet training step"] == ["2.00x", "1.50x", "50%"]
    assert lines["LeNet training step, its graph alone"] == ["-", "3.00x", "100%"]
    assert "same bits in 1 of 2 cases; 2 tests passed, 1 failed, 0 skipped; memcheck: passed." in text
    assert "| first step | tritonnet | warm    |" in text and "3000 |" in text
    assert "TrainStep MB" in text and "| 5 " in text
    assert text.endswith("; racecheck by --verify.")


def test_the_readme_says_where_torch_compile_has_no_graph():
    """Where only its calls have a time; not where another form is in a graph, the bench's or its own."""
    record = made_up()
    assert not results.compiled_without_graphs(record) and "outside CUDA graphs" not in results.headlines([record])
    small = [
        row for row in record.rows if row.library == "torch.compile" and row.batch == 64 and row.format == "bfloat16"
    ]
    record.rows = [row for row in record.rows if row not in small or row.form == CALLS]
    for row in small:
        row.detail = "default"
    (line,) = results.compiled_without_graphs(record)
    for name in ("LeNet training step", "LeNet inference"):
        assert line.count(f"`{name}` at batch 64 in bfloat16 (mode default)") == 1 and "1024" not in line
    (line,) = results.compiled_without_graphs(record, results.HEADLINES)
    assert line in results.headlines([record]) and "LeNet training step" in line and "inference" not in line
    for row in small:
        row.detail = "max-autotune"
    assert not results.compiled_without_graphs(record)


def test_the_readme_tells_a_call_from_a_forward_on_weights_packed_before(tmp_path):
    """Its row comes below the whole call's and has no comparisons; older records have none."""
    record = made_up()
    for row in (row for row in record.rows if row.task == PACKED):
        row.ms /= 2
    header, rows = results.summary(record)
    cases = [row[:3] for row in rows]
    for batch in (64, 1024, 65536):
        above, below = (rows[cases.index((name, batch, "bfloat16"))]
                        for name in ("LeNet inference", "LeNet inference, packed before"))  # fmt: skip
        assert rows.index(below) == rows.index(above) + 1
        assert float(below[3]) == pytest.approx(float(above[3]) / 2, rel=1e-3)
        assert below[4:] == ("-", "-", "200%") and above[4:] == ("2.00x", "3.00x", "100%")
    assert f"## {report.TASKS[PACKED]}\n\n| case " in report.page(record)
    record.rows = [row for row in record.rows if row.task != PACKED]
    assert results.summary(record) == (header, [row for row in rows if "packed" not in row[0]])
    assert report.TASKS[PACKED] not in report.page(record)


def test_the_readmes_show_what_is_recorded():
    folder = ROOT / "bench" / "results"
    found = results.records(folder)
    for readme, block in (("bench/README.md", results.section(found, folder)), ("README.md", results.headlines(found))):
        text = (ROOT / readme).read_text(encoding="utf-8")
        assert results.written(text, block) == text, readme


def test_the_readme_picks_no_cases_by_their_times():
    """LeNet's steps, its inference, and the first case of each operator that is not relu or a mean and not fused."""
    first = {}
    for operator in operators.catalogue():
        first.setdefault(operator.name.split()[0], (f"{operator.name}, {BOTH}", operator.batch))
    networks = [("LeNet training step", batch) for batch in (64, 1024, 65536)] + [("LeNet inference", 1024)]
    kinds = "conv2d", "linear", "max_pool2d", "cross_entropy"
    assert list(results.HEADLINES) == networks + [first[kind] for kind in kinds]


@pytest.mark.thorough
def test_time_to_an_accuracy():
    """Every library trains from the same weights in the same order, until it is good enough or its epochs are over."""
    torch.manual_seed(0)
    labels = torch.arange(10).repeat(20)
    images = torch.randn(10, 1, 32, 32)[labels] + 0.1 * torch.randn(200, 1, 32, 32)
    with tritonnet.backend("reference"):
        taken = {
            name: accuracy.train(library, (images, labels, images, labels), "float32", Host(), 0.99, epochs=30)
            for name, library in libraries.installed().items() if not library.compiled
        }  # fmt: skip
    for name, result in taken.items():
        assert result["reached"] and result["accuracy"] >= 0.99 and 1 < result["epochs"] <= 30, (name, result)
        assert result["seconds"] > 0
    too_short = accuracy.train(
        libraries.installed()["torch"], (images, labels, images, labels), "float32", Host(), 1.1, 1
    )
    assert not too_short["reached"] and too_short["epochs"] == 1


def test_a_gpu_that_is_lost_in_the_smoke_test(monkeypatch, tmp_path):
    """A new process takes the untried cases first and the one that lost the GPU last; then no process is started."""
    cases = [("ieee", batch, 1, 0) for batch in (1, 2, 3)]
    kept, tried, started, is_lost = tmp_path / "kept.json", [], [], []

    def verdict(precision, batch, steps, loaded, device):
        tried.append(batch)
        if batch == 2:
            is_lost.append(True)
            raise RuntimeError("an illegal memory access")
        return smoke.AGREES

    def goes_on(command):
        started.append(command)
        is_lost.clear()
        with pytest.raises(SystemExit) as e:
            smoke.main(["--keep", str(kept), "--device", "cpu"])
        return types.SimpleNamespace(returncode=1 if e.value.code else 0)

    monkeypatch.setattr(smoke, "CASES", cases)
    monkeypatch.setattr(smoke, "verdict", verdict)
    monkeypatch.setattr(smoke, "lost", lambda device: bool(is_lost))
    monkeypatch.setattr(smoke.subprocess, "run", goes_on)
    with pytest.raises(SystemExit) as e:
        smoke.main(["--keep", str(kept), "--device", "cpu"])
    assert e.value.code == 1 and tried == [1, 2, 3, 2] and len(started) == 1
    wrong = "RuntimeError: an illegal memory access"
    assert list(json.loads(kept.read_text())["smoke"].values()) == [smoke.AGREES, wrong, smoke.AGREES]


def test_a_wait_that_fails_is_a_line_and_the_others_are_timed(monkeypatch, tmp_path, capsys):
    """tritonnet's first, warm wait fails: the cold one is kept, and torch's are timed."""

    def timed(task, library, device, cache):
        calls.append((task, library))
        if len(calls) == 2:
            raise subprocess.CalledProcessError(-11, "once")
        return {"there_ms": 1.0, "ms": 2.0}

    calls, kept = [], tmp_path / "kept.json"
    monkeypatch.setattr(start, "_timed", timed)
    assert start.main(["--keep", str(kept)]) == "failed: first image, tritonnet"
    assert "first image, tritonnet: its process ended with -11\n" in capsys.readouterr().out
    found = json.loads(kept.read_text())["start"]
    assert [name for name in found if "image" in name] == ["first image, tritonnet, cold", "first image, torch, -"]
    assert len(found) == 5
    assert start.main(["--keep", str(kept)]) is None and calls[6:] == [("first image", "tritonnet")] * 2


def test_every_kernel_is_launched_for_the_sanitizers(monkeypatch, capsys):
    """In the interpreter, and by the plans for a GPU, which split other sums between programs."""
    monkeypatch.setattr(every_kernel, "DTYPES", [torch.float32])
    every_kernel.main()
    on_gpu = """
from bench import no_launch
from bench.machine_code import every_kernel
with no_launch.gpu_that_does_nothing():
    every_kernel.main()
"""
    result = run_python("-c", on_gpu, TRITON_INTERPRET=None)
    assert result.returncode == 0, result.stderr
    assert "conv2d_forward_kernel" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argument", [(), ("--quick",), ("--passes",), ("--verify",)], ids=["all", "quick", "passes", "verify"]
)
def test_without_a_gpu_there_is_one_line(argument, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as e:
        __main__.main([*argument])
    assert "\n" not in e.value.code and e.value.code.startswith("no GPU")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--without", "jax"), "--without jax: it has to be one of tritonnet, "),
        (("--verify", "--minutes", "0"), "got 0"),
        (("--verify", "--minutes", "nan"), "got nan"),
        (("--minutes", "5"), "--minutes goes with --verify"),
        (("--verify", "--cpu"), "--verify has no --cpu"),
        (("--verify", "--without", "torch"), "--verify has no --without"),
        (("--verify", "--passes"), "--verify has no --passes"),
        (("--passes", "--cpu"), "--passes has no --cpu"),
        (("--passes", "bfloat16", "--quick"), "--passes has no --quick"),
        (("--inference", "--quick"), "--inference has no --quick"),
        (("--inference", "--passes"), "--passes has no --inference"),
        (("--verify", "--inference"), "--verify has no --inference"),
        (("--training", "--quick"), "--training has no --quick"),
        (("--training", "--inference"), "--inference has no --training"),
        (("--verify", "--training"), "--verify has no --training"),
        (("--inference", "float32"), "invalid choice: 'float32'"),
        (("--training", "float16"), "invalid choice: 'float16'"),
        (("--passes", "float16"), "invalid choice: 'float16'"),
    ],
)
def test_a_mistake_is_named(arguments, said, capsys):
    with pytest.raises(SystemExit):
        __main__.parse([*arguments])
    assert said in capsys.readouterr().err


class Stopped:
    """A case in the middle of which the process is interrupted."""

    name, format = "stopped", "tf32"

    @property
    def subject(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)


@pytest.mark.parametrize(
    "second, end",
    [(None, SystemExit), (types.SimpleNamespace(name="lost", format="tf32", subject=None), AttributeError),
     (Stopped(), KeyboardInterrupt)],
    ids=["whole", "lost", "stopped"],
)  # fmt: skip
@pytest.mark.thorough
def test_a_whole_run_on_a_made_up_device(second, end, tmp_path, monkeypatch, capsys):
    """Everything but events and graphs; a device that is lost half-way leaves a report of the cases before."""
    device = Clockwork()
    cases = [Case(small_operators()[0], "bfloat16"), Case(small_operators()[2], "float32")]
    if second:
        cases.insert(1, second)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(__main__, "Cuda", lambda: device)
    monkeypatch.setattr(__main__, "machine", lambda kind: MACHINE)
    monkeypatch.setattr(__main__, "ceilings", functools.partial(ceilings, size=8))
    monkeypatch.setattr(__main__, "plan", lambda quick: cases)
    with tritonnet.backend("reference"), pytest.raises(end) as e:
        __main__.main(["--quick", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert "conv2d LeNet small" in out and "| product in tf32, TFLOP/s" in out and "- --quick: float16" in out
    record = Record.read(tmp_path / "made-up-gpu-quick.json")
    assert {row.subject for row in record.rows} == {case.subject.name for case in cases[: 1 if second else 2]}
    assert record.done == [case.name for case in cases[: 1 if second else 2]] and record.sources
    assert (tmp_path / "made-up-gpu-quick.md").read_text().startswith("# Made-up GPU")
    assert second or e.value.code == 0
    # A resumed run measures what is missing, and leaves out the contestants that it is told to.
    monkeypatch.setattr(__main__, "plan", lambda quick: [case for case in cases if case is not second])
    with tritonnet.backend("reference"), pytest.raises(SystemExit):
        __main__.main(["--quick", "--resume", "--without", "torch", "--out", str(tmp_path)])
    more = Record.read(tmp_path / "made-up-gpu-quick.json")
    assert len(more.done) == 2 and more.rows[: len(record.rows)] == record.rows
    assert {row.library for row in more.rows[len(record.rows) :]} == ({"tritonnet"} if second else set())
    assert "torch: by --without" in more.left_out


def test_cpu_quick_prints_a_table():
    result = run_python("-m", "bench", "--cpu", "--quick", "--seconds", "3", TRITON_INTERPRET=None, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    for part in ("## Networks, training step", "| conv2d_relu_max_pool2d ", "more us", "| LeNet, packed before "):
        assert part in result.stdout, part
    assert "WRONG" not in result.stdout and "failed" not in result.stdout

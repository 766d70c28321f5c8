"""The bytes that a training step moves and saves, counted by hand, and the bench of whole networks in training."""

import pytest
import torch
import torch.nn.functional as F
from test_bench import MACHINE, Clockwork, made_up
from torch import nn

import tritonnet
from bench import libraries, measure, report, results, traffic, training
from bench.case import CALLS, CHANNELS_LAST, GRAPH, HOST, TRAINING, Case, Work
from bench.record import OK, WRONG, Record, Row, earlier
from bench.run import MOST_COMPILING, Budget, compiled_entries, entries, most_compiling, run
from bench.saved import saved_bytes
from bench.training import TrainingStep
from tritonnet import ops

SIZES = ("width", 1 / 8), ("depth", 1 / 8), ("stages", 1), ("classes", 50)
GEOMETRY = (1, 1), (0, 0, 0, 0), (1, 1), 1, "zeros"


def small_step(network="resnet50", batch=4):
    return TrainingStep(network, batch, (3, 32, 32), SIZES)


def on_meta(*size):
    return torch.empty(*size, device="meta")


def moved(call):
    """{operator: elements of float32} that call() moves."""
    with traffic.Counting() as counting:
        call()
    return {row.operator: row.bytes / 4 for row in counting.moved.rows}


def test_passes_of_torch_counted_by_hand():
    """Images of 2 x 16 x 4 x 4, or 512 elements, and vectors of 16."""
    x = on_meta(2, 16, 4, 4).requires_grad_()
    running, affine = [on_meta(16) for _ in range(2)], [on_meta(16).requires_grad_() for _ in range(2)]
    y, dy = F.batch_norm(x, *running, *affine, training=True), on_meta(2, 16, 4, 4)
    # x once for the sums and once for the result; running statistics, and those of the batch.
    found = moved(lambda: F.batch_norm(x, *running, *affine, training=True))
    assert found == {"aten::native_batch_norm": 3 * 512 + 6 * 16}
    assert moved(lambda: F.batch_norm(x, *running, *affine)) == {"aten::native_batch_norm": 2 * 512 + 6 * 16}
    # x and dy once for the sums and once for dx; no shift.
    found = moved(lambda: torch.autograd.grad(y, (x, *affine), dy))
    assert found == {"aten::native_batch_norm_backward": 5 * 512 + 7 * 16}
    w, bias = on_meta(16, 16, 1, 1).requires_grad_(), on_meta(16).requires_grad_()
    found = moved(lambda: torch.autograd.grad(F.conv2d(x, w, bias), (x, w, bias), dy))
    assert found.pop("aten::convolution_backward") == 3 * 512 + 512 + 256 + 512 + 256 + 16  # dy for each gradient
    found = moved(lambda: torch.autograd.grad(F.conv2d(x, w), w, dy))
    assert found.pop("aten::convolution_backward") == 512 + 512 + 256 + 256  # the weight is an argument, too


def test_passes_of_ours_counted_by_hand():
    """The same images and vectors."""
    x, dy, y, w = on_meta(2, 16, 4, 4), on_meta(2, 16, 4, 4), on_meta(2, 16, 4, 4), on_meta(16, 16, 1, 1)
    vectors = [on_meta(16) for _ in range(4)]

    def norm_grad(y, with_dz, with_y):
        return moved(lambda: ops.batch_norm_grad(dy, x, y, *vectors, 1e-5, "relu", 0.0, with_dz, with_y))

    gradients = 4 * 16 + 512 + 2 * 16  # the vectors, dx, dscale and dshift
    assert norm_grad(None, False, False) == {"tritonnet::batch_norm_grad": 4 * 512 + gradients}
    assert norm_grad(None, False, True) == {"tritonnet::batch_norm_grad": 5 * 512 + gradients}
    assert norm_grad(y, False, False) == {"tritonnet::batch_norm_grad": 6 * 512 + gradients}
    # Sums of x, dy and y, which store dz; then x and dz.
    assert norm_grad(y, True, False) == {"tritonnet::batch_norm_grad": 6 * 512 + gradients}

    def norm_conv(mean, w, geometry, x=x, statistics=True):
        norm = [v if mean else None for v in vectors]
        given = x, *norm, 1e-5, "relu", 0.0, w, None, *geometry, None, None, 0.1, statistics
        return moved(lambda: ops.norm_conv2d(*given))

    assert norm_conv(False, w, GEOMETRY) == {"tritonnet::norm_conv2d": 2 * 512 + 256 + 2 * 16}
    assert norm_conv(False, w, GEOMETRY, statistics=False) == {"tritonnet::norm_conv2d": 2 * 512 + 256}
    # x, the image twice, and z.
    assert norm_conv(True, w, GEOMETRY) == {"tritonnet::norm_conv2d": 4 * 512 + 4 * 16 + 256 + 2 * 16}
    # z is read for its statistics behind few channels and depthwise convolutions.
    few, depthwise = on_meta(16, 3, 1, 1), on_meta(16, 1, 1, 1)
    found = norm_conv(False, few, GEOMETRY, x=on_meta(2, 3, 4, 4))
    assert found == {"tritonnet::norm_conv2d": 96 + 48 + 2 * 512 + 2 * 16}
    found = norm_conv(True, depthwise, (*GEOMETRY[:3], 16, "zeros"))
    assert found == {"tritonnet::norm_conv2d": 5 * 512 + 4 * 16 + 16 + 2 * 16}
    found = moved(lambda: ops.conv2d_grads(dy, x, w, *GEOMETRY, False))
    assert found == {"tritonnet::conv2d_grads": 3 * 512 + 256 + 512 + 256}


def test_who_stores_statistics_is_as_in_the_kernels():
    """traffic.FEW and the rest of its rule, against the launchers' own choice."""
    from tritonnet.kernels import launchers

    for channels, groups in ((3, 1), (15, 1), (16, 1), (32, 32), (32, 2), (32, 16)):
        x, w = torch.randn(1, channels, 2, 2), torch.randn(32, channels // groups, 1, 1)
        geometry = (*GEOMETRY[:3], groups, "zeros")
        given = dict(x=x, mean=None, w=w, groups=groups, statistics=True)
        apart = traffic.AGAIN["tritonnet::norm_conv2d"](given, ["z"]) == ["z"]
        _, partials, _ = launchers.conv2d_partials(x, w, *geometry)
        assert apart == (partials is None), (channels, groups)


def test_the_eager_step_of_resnet_50_by_hand():
    """At full size; its results before norms as in test_inference.py."""
    model, images = traffic.on_meta("resnet50", 64, "bfloat16")
    eager = traffic.of_eager_step(model.train(), images, traffic.labels_on_meta(64))
    of_norms, channels = 64 * 112**2 * 64, 64
    pixels = [64 * size**2 for size in (56, 28, 14, 7)]
    for i, (blocks, width) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)]):
        of_norms += pixels[i] * width * ((2 * blocks - 1) + 4 * (blocks + 1)) + pixels[max(i - 1, 0)] * width
        channels += width * (2 * blocks + 4 * (blocks + 1))
    by_name = {row.operator: row.bytes for row in eager.rows}
    assert by_name["aten::native_batch_norm"] == pytest.approx(2 * 3 * of_norms, rel=1e-3)
    assert by_name["aten::native_batch_norm_backward"] == pytest.approx(2 * 5 * of_norms, rel=1e-3)
    assert 30e9 < eager.bytes < 31e9


@pytest.mark.parametrize("network, most", [("resnet18", 0.75), ("vgg16_bn", 0.5)])
@pytest.mark.sampled(2)
def test_what_fused_networks_save_and_move(network, most, capsys):
    """At full size, by the command: next to nothing is left of torch, and less is moved and saved for backward."""
    traffic.main([network, "--training", "--batch", "16"])
    said = capsys.readouterr().out
    assert f"# {network} in training, batch 16, bfloat16, channels_last" in said
    moved, saved = (float(said.split(before)[1].partition("%")[0]) for before in ("it moves ", "MB, or "))
    assert moved < 85 and saved <= 100 * most, said
    assert not any(f"| aten::{name}" in line and line.split("|")[4].strip()
                   for name in ("convolution", "native_batch_norm", "relu", "threshold", "max_pool2d")
                   for line in said.splitlines())  # fmt: skip


def test_saved_bytes_counted_by_hand():
    """Memory counts once and whole, without parameters and buffers."""
    linear, x = nn.Linear(8, 4), torch.randn(2, 8)
    assert saved_bytes(lambda: linear(x), linear) == x.nbytes
    assert saved_bytes(lambda: linear(x[:1]), linear) == x.nbytes
    assert saved_bytes(lambda: linear(x).relu() * linear(x).detach(), linear) == x.nbytes + 2 * 4 * 8
    with torch.no_grad():
        assert saved_bytes(lambda: linear(x), linear) == 0


def test_a_batch_of_repeated_images_has_the_gradients_of_the_few():
    step = small_step(batch=16)
    images, labels = step.inputs("float64", torch.device("cpu"))
    model = step.model("cpu", torch.float64)
    assert len(images) == 8 and small_step(batch=2).different == 2
    few, all_of_them = (
        torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        for x, y in ((images, labels), (images.repeat(2, 1, 1, 1), labels.repeat(2)))
    )
    for one, other in zip(training.of_kinds(model, few), training.of_kinds(model, all_of_them)):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


def uncompiled():
    return {name: of for name, of in libraries.installed().items() if not of.compiled}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(measure, "FEWEST", 2)
    monkeypatch.setattr(measure, "MOST_QUEUED", 1)
    # Captures the network once more, see test_the_work_of_a_step.
    monkeypatch.setattr(training, "work", lambda *_: Work(10**9, 10**6))
    with tritonnet.backend("reference"):
        yield


@pytest.mark.parametrize("network, format", zip(training.TITLES, training.FORMATS_TIMED))
@pytest.mark.sampled(2)
def test_steps_are_checked_and_timed(network, format, quick):
    record, cases = Record(MACHINE, training=True), [Case(small_step(network), format)]
    run(record, cases, uncompiled(), Clockwork(between=50.0), Budget(1e9), seconds=0.001)
    assert {row.status for row in record.rows} == {OK} and record.done == [cases[0].name] and not record.left_out
    # The reference's TrainStep has no graph.
    assert [(row.library, row.form) for row in record.rows] == [
        ("tritonnet", CALLS), ("tritonnet", HOST), ("tritonnet", GRAPH), ("TrainStep", CALLS), ("TrainStep", HOST),
        ("torch", CALLS), ("torch", HOST), ("torch", GRAPH),
    ]  # fmt: skip
    assert all(row.ms and row.layout == CHANNELS_LAST and row.task == TRAINING for row in record.rows)
    held = {row.library: (row.peak_bytes, row.saved_bytes) for row in record.rows if row.form == CALLS}
    assert held["tritonnet"] == held["TrainStep"] and held["TrainStep"][1] < held["torch"][1]
    name = cases[0].subject.name
    (_, rows), text = training.summary(record), report.page(record)
    assert [row[:4] for row in rows] == [(name, 4, format, library) for library in uncompiled()]
    assert {row[4] for row in rows} == {"80"}, "4 images in 50 ms"
    assert "## Images a second, and memory" in text and text.startswith("# Made-up GPU") and ", training\n" in text


@pytest.mark.parametrize("way", ["another epsilon", "a gradient twice", "a tensor that is not trained"])
def test_a_step_that_is_wrong_is_named_and_not_timed(way, quick):
    def wrong(model):
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        if way == "another epsilon":
            norms[1].eps = 0.5
        elif way == "a gradient twice":
            model.conv1.weight.register_hook(lambda g: 2 * g)
        else:
            norms[1].weight.requires_grad_(False)
        return model

    record, there = Record(MACHINE), {"tritonnet": uncompiled()["torch"]._replace(network=wrong)}
    run(record, [Case(small_step(), "tf32")], there, Clockwork(), Budget(1e9), seconds=0.001)
    assert {(row.status, row.ms, row.saved_bytes) for row in record.rows} == {(WRONG, None, None)} and record.faults
    assert record.rows[0].detail.startswith("gradient "), record.rows[0].detail


def test_the_work_of_a_step():
    one, two = (small_step(batch=batch).works[TRAINING] for batch in (8, 16))
    assert two.flops == 2 * one.flops > 0 and one.elements < two.elements < 2 * one.elements
    # Three products of each multiply-add, but for the first convolution, whose images have no gradient.
    model, images = traffic.on_meta("resnet50", 8, "bfloat16", image=(3, 32, 32), **dict(SIZES))
    first = 2 * 16**2 * 8 * 3 * 7**2
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    assert one.flops == 3 * counter.get_total_flops() - 8 * first


def test_the_plan_and_what_is_compiled():
    cases, one = training.plan(), training.plan(("tf32",))
    assert len({case.name for case in cases}) == 8 and [case.format for case in one] == ["tf32"] * 4
    assert [case.subject.batch for case in one] == [64, 64, 256, 256]
    there = libraries.installed()
    for case in cases:
        (entry,) = compiled_entries(case, there, Clockwork(), False)
        assert (entry.mode, entry.forms) == (libraries.COMPILE_QUICKLY, (CALLS, HOST, GRAPH))
        assert most_compiling(case, entry.mode) > MOST_COMPILING[entry.mode]
        of = [(entry.name, entry.layout) for entry in entries(case, there, Clockwork())]
        assert of[:3] == [(name, CHANNELS_LAST) for name in ("tritonnet", "TrainStep", "torch")]


def test_records_of_training(tmp_path):
    """Files of their own, which a full run does not go on with; bench/README.md has the table."""
    record = Record(MACHINE, training=True)
    for library, ms, saved in (("TrainStep", 10.0, 2 * 10**9), ("torch", 20.0, None)):
        row = Row("ResNet-50 training step", 64, "bfloat16", TRAINING, CHANNELS_LAST, CALLS, library, 1, 1)
        row.ms, row.saved_bytes = ms, saved
        record.rows.append(row)
    record.write(tmp_path / f"{record.name}.json")
    assert record.name == "made-up-gpu-training" and record.title.endswith(", training")
    assert not results.records(tmp_path) and not earlier(MACHINE, False, tmp_path, inference=True).rows
    made_up().write(tmp_path / "made-up-gpu.json")
    (full,) = results.records(tmp_path)
    section = results.section([full], tmp_path)
    assert training.SUMMARY in section
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines()
             if line.startswith("| ResNet-50 training step ")]  # fmt: skip
    assert [row[3:] for row in cells] == [["TrainStep", "6400", CALLS, "-", "2000"], ["torch", "3200", CALLS, "-", "-"]]
    full.machine = full.machine | {"triton": "4.0"}
    assert "ResNet-50 training step" not in results.section([full], tmp_path)

"""The bytes that a network moves, counted by hand, and the bench of whole networks on a made-up device."""

import copy

import pytest
import torch
from test_bench import MACHINE, Clockwork, made_up
from torch import nn

import tritonnet
from bench import inference, libraries, measure, report, results, traffic
from bench import run as run_module
from bench.case import CALLS, CHANNELS_LAST, CONTIGUOUS, GRAPH, HOST, INFERENCE, Case
from bench.inference import Evaluation
from bench.networks import NETWORKS
from bench.record import OK, WRONG, Record, Row, earlier
from bench.run import Budget, compiled_entries, entries, run

SIZES = ("width", 1 / 8), ("depth", 1 / 8), ("stages", 2), ("classes", 50)


def small_evaluation(network="resnet50", batch=2):
    return Evaluation(network, batch, (3, 32, 32), SIZES)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(8, 5)

    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))  # 8 x 4 x 4
        y = y + y
        y += y
        y = torch.cat([y, y.expand_as(y)], 3)
        y = self.pool(y[..., :4])  # 8 x 2 x 2
        return self.fc(y.mean((2, 3)))


def test_bytes_counted_by_hand():
    """float32, two images: 3 x 6 x 6, after the convolution 8 x 4 x 4, or 256 elements in all."""
    model, images = Net().eval(), torch.randn(2, 3, 6, 6)
    expected = {
        "aten::convolution": (1, 4 * (216 + 216 + 256)),
        "aten::native_batch_norm": (1, 0),  # of which one device writes more than another
        "aten::relu_": (1, 4 * 2 * 256),
        "aten::add": (1, 4 * 2 * 256),  # both operands are one tensor
        "aten::add_": (1, 4 * 2 * 256),
        "aten::cat": (1, 4 * (256 + 512)),  # of one tensor twice
        "aten::max_pool2d_with_indices": (1, 4 * (256 + 64) + 8 * 64),
        "aten::mean": (1, 4 * (64 + 16)),
        "aten::addmm": (1, 4 * (16 + 40 + 5 + 10)),
    }
    for device, statistics in (("cpu", 0), ("meta", 2 * 8)):
        expected["aten::native_batch_norm"] = (1, 4 * (256 + 4 * 8 + 256 + statistics))
        counted = traffic.of_eager(copy.deepcopy(model).to(device), images.to(device))
        assert {row.operator: (row.calls, row.bytes) for row in counted.rows} == expected
    assert counted.bytes == sum(count for _, count in expected.values())
    assert counted.of_torch == dict.fromkeys(expected, 1) and not counted.of_ours


def test_what_moves_nothing_and_what_is_only_written():
    def moved(function, *given):
        return {row.operator: row.bytes for row in traffic.of_eager(lambda x: function(x), *given).rows}

    x = torch.zeros(4, 6)
    assert moved(lambda x: x.view(24).as_strided_((4,), (1,)).expand(3, 4).detach()[0], x.clone()) == {}
    assert moved(lambda x: torch.empty_like(x), x) == {}
    assert moved(lambda x: x.zero_(), x) == {"aten::zero_": 96}
    assert moved(lambda x: x[:2].copy_(x[2:]), x) == {"aten::copy_": 96}
    assert moved(lambda x: x[:1].expand(4, 6) * 2, x) == {"aten::mul": 24 + 96}  # the row is read once
    assert moved(lambda x: torch.mul(x, 2, out=x), x) == {"aten::mul": 192}


def test_bytes_of_a_fused_network():
    """What fuse fuses moves in one operator, and other batches run through the same graph."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 5)).to("meta")
    moved = traffic.captured(model, torch.empty(2, 3, 6, 6, device="meta"))
    for batch in (2, 7):
        # An image of 108 elements, 32 after the pooling, whose window's positions take a byte each.
        counted = moved(torch.empty(batch, 3, 6, 6, device="meta"))
        of_convolution, linear = (row.bytes for row in counted.rows)
        assert list(counted.of_ours) == ["tritonnet::conv2d_relu_max_pool2d", "tritonnet::linear"]
        assert of_convolution == 4 * (batch * 108 + 224 + batch * 32) + batch * 32
        assert linear == 4 * (batch * 32 + 165 + batch * 5)
    assert not any(type(module) is tritonnet.nn.Conv2d for module in model.modules())

    class Breaks(nn.Module):
        def forward(self, x):
            return x * 2 if x.sum().item() else x

    with pytest.raises(Exception, match="[Gg]raph|meta|item"):
        traffic.of_fused(Breaks(), torch.zeros(2))


@pytest.mark.thorough
def test_resnet_50_at_full_size(capsys):
    """Nothing of its 10.5 GB is allocated. Every convolution and batch norm reads and writes by hand."""
    traffic.main(["resnet50", "--batch", "64"])
    said = capsys.readouterr().out
    assert "# resnet50, batch 64, bfloat16, channels_last" in said and "| aten::convolution " in said
    (total,) = (line for line in said.splitlines() if line.startswith("| all "))
    calls, megabytes = map(float, total.strip("| ").split("|")[-2:])
    assert (calls, said.split("are left: ")[1].strip()) == (56, "none.") and megabytes < 4200, total
    eager = traffic.of_eager(*traffic.on_meta("resnet50", 64, "bfloat16"))
    assert eager.of_torch["aten::convolution"] == eager.of_torch["aten::native_batch_norm"] == 53
    assert eager.of_torch["aten::relu_"] == 49 and eager.of_torch["aten::add_"] == 16
    # The stem, and of each stage: two narrow results a block, a wide one, and the wide one of the shortcut. Before its
    # stride the first narrow result of a stage is that of the stage before.
    pixels = [64 * size**2 for size in (56, 28, 14, 7)]
    results, channels = 64 * 112**2 * 64, 64
    for i, (blocks, width) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)]):
        results += pixels[i] * width * ((2 * blocks - 1) + 4 * (blocks + 1)) + pixels[max(i - 1, 0)] * width
        channels += width * (2 * blocks + 4 * (blocks + 1))
    by_name = {row.operator: row.bytes for row in eager.rows}
    assert by_name["aten::native_batch_norm"] == 2 * (2 * results + 4 * channels) + 4 * 2 * channels


def uncompiled():
    return {name: of for name, of in libraries.installed().items() if not of.compiled}


@pytest.mark.parametrize("network, format", zip(inference.TITLES, inference.FORMATS_TIMED))
@pytest.mark.thorough
def test_networks_are_checked_and_timed(network, format, monkeypatch):
    """Both layouts and all forms; what another library computes with another epsilon is named."""
    monkeypatch.setattr(measure, "FEWEST", 2)
    monkeypatch.setattr(measure, "MOST_QUEUED", 1)
    record, device = Record(MACHINE), Clockwork(between=50.0)
    cases = [Case(small_evaluation(network), format)]
    with tritonnet.backend("reference"):
        run(record, cases, uncompiled(), device, Budget(1e9), seconds=0.001)
        assert {(row.status, row.detail) for row in record.rows} == {(OK, "")} and record.done == [cases[0].name]
        keys = {(row.library, row.layout, row.form) for row in record.rows}
        assert keys == {
            (library, layout, form)
            for library in ("tritonnet", "torch") for layout in (CONTIGUOUS, CHANNELS_LAST)
            for form in (CALLS, HOST, GRAPH)
        }  # fmt: skip
        assert len(record.rows) == len(keys) and all(row.ms for row in record.rows)
        assert f"| {inference.TITLES[network]} inference " in report.page(record)

        def wrong(model):
            norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
            norm.eps = 0.1
            return model

        record, there = Record(MACHINE), {"tritonnet": uncompiled()["tritonnet"]._replace(network=wrong)}
        run(record, cases, there, device, Budget(1e9), seconds=0.001)
    assert {(row.status, row.ms) for row in record.rows} == {(WRONG, None)} and record.faults


@pytest.mark.thorough
def test_the_work_of_a_network():
    one, two = (small_evaluation(batch=batch).works[INFERENCE] for batch in (1, 2))
    assert two.flops == 2 * one.flops > 0 and one.elements < two.elements < 2 * one.elements
    model, images = traffic.on_meta("resnet50", 2, "tf32", image=(3, 32, 32), **dict(SIZES))
    # In another format only the statistics that batch norms write have another size.
    assert two.bytes(torch.float32) == pytest.approx(traffic.of_fused(model, images).bytes, rel=0.01)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 9 and len(NETWORKS) > len(inference.TITLES)
    # 4.09 G multiply-adds of the convolutions, as in test_bench.py, and 2,048,000 of the classifier.
    flops, _ = inference._traffic("resnet50", traffic.IMAGE, ())
    assert flops == 2 * (4_087_136_256 + 2_048_000)


def test_the_plan_and_what_is_compiled():
    cases, one = inference.plan(), inference.plan(("float16",))
    assert len({case.name for case in cases}) == 27 and [case.format for case in one] == ["float16"] * 9
    assert {case.subject.batch for case in cases} == {1, 32, 256}
    there = libraries.installed()
    for case in cases:
        of = compiled_entries(case, there, Clockwork(), False)
        both = [(libraries.COMPILE_NO_GRAPHS, (GRAPH,)), (libraries.COMPILE, (CALLS, HOST))]
        whole = [(libraries.COMPILE_NO_GRAPHS, (CALLS, HOST, GRAPH))]
        assert [(entry.mode, entry.forms) for entry in of] == (both if case.subject.batch <= 32 else whole)
        assert run_module.most_compiling(case, of[0].mode) > run_module.MOST_COMPILING[of[0].mode]
        assert not any(entry.library.whole for entry in entries(case, there, Clockwork()))


def test_records_of_inference(tmp_path):
    """Files of their own, which a full run does not go on with; bench/README.md has the table."""
    record = Record(MACHINE, inference=True)
    for library, ms in (("tritonnet", 1.0), ("torch", 3.0)):
        row = Row("ResNet-50 inference", 32, "bfloat16", INFERENCE, CHANNELS_LAST, GRAPH, library, 1, 1)
        row.ms = ms
        record.rows.append(row)
    record.write(tmp_path / f"{record.name}.json")
    assert record.name == "made-up-gpu-inference" and record.title.endswith(", inference")
    assert not results.records(tmp_path)
    made_up().write(tmp_path / "made-up-gpu.json")
    (full,) = results.records(tmp_path)
    section = results.section([full], tmp_path)
    assert "Inference of whole networks" in section and "| ResNet-50 inference " in section and "3.00x" in section
    full.machine = full.machine | {"triton": "4.0"}
    assert "ResNet-50 inference" not in results.section([full], tmp_path)
    assert not earlier(MACHINE, False, tmp_path, passes=True).rows

"""Every kernel compiles for sm_90, and in a thorough run for each target in every tile and format, within the budgets.

This shows what no interpreter does: shapes that tl.dot refuses, types that change inside a loop, spilled registers,
products that miss the matrix units, loads of single elements, times that cannot be good.
"""

import importlib
import json
import pkgutil
import re
from unittest import mock

import pytest
import triton
from conftest import run_python, thorough_if

import tritonnet.kernels

pytest.importorskip("tqdm")
from bench import FORMATS, TARGETS
from bench.machine_code import budgets, cases, report
from tritonnet.kernels import _common, product, tiles
from tritonnet.kernels.linear_chain import fused as linear_chain


def every_kernel():
    """The names of all kernels in all files of the package, whether a launcher uses them or not."""
    files = pkgutil.walk_packages(tritonnet.kernels.__path__, "tritonnet.kernels.")
    modules = [importlib.import_module(file.name) for file in files]
    return {name for module in modules for name in vars(module) if name.endswith("_kernel")}


# `python -m bench.machine_code` compiles every format for every target. float16 has the tiles of bfloat16, and on AMD's
# card tf32 uses the same kernels as float32. On sm_80 and sm_100 tf32 would take as long again.
SHORT = ("bfloat16", "float32")
BRIEF = {"sm_80": SHORT, "sm_90": (*SHORT, "tf32", "float64"), "sm_100": SHORT, "gfx942": SHORT}
# A layer of each kind.
SAMPLE = "few channels", "linear, norm", "depthwise, norm", "pool", "images' means, NCHW", "loss", "elementwise"


def within_budgets(records):
    assert records and not (found := list(budgets.violations(records))), "\n".join(found)


@pytest.mark.parametrize("target", thorough_if(lambda target: target.startswith("sm"), sorted({*TARGETS} - {"sm_90"})))
def test_a_sample_for_the_others(target):
    within_budgets(report.compile_for(target, ["bfloat16"], "--brief", "--once", "--only", *SAMPLE))


def test_each_kernel_once():
    """For sm_90 in bfloat16, or float32 where only that has the kernel, with all launches of the main shapes."""
    records = report.compile_for("sm_90", ["bfloat16", "float32"], "--brief", "--once")
    within_budgets(records)
    assert {r["kernel"] for r in records} == every_kernel()
    assert {(r["format"], r["case"]) for r in records} >= cases.MAIN


@pytest.mark.thorough
@pytest.mark.parametrize("target", TARGETS)
def test_machine_code(target):
    records = report.compile_all([target], BRIEF[target], "--brief")[target]
    within_budgets(records)
    # AMD's matrix units have full float32.
    absent = {"few_channels_lanes_kernel"} if target == "gfx942" else set()
    capability = {"sm_80": 8, "sm_90": 9, "sm_100": 10}.get(target, 0)
    described = capability in product.DESCRIBED
    absent |= set() if described else {"product_kernel"}
    assert {r["kernel"] for r in records} == every_kernel() - absent
    # Each row of the tables of tiles has been compiled in each format.
    compiled_tiles = {(r["format"], r["tile"], r["num_warps"], r["num_stages"]) for r in records}
    chains = {
        (r["format"], r["tile"], r["num_warps"], r["num_stages"])
        for r in records
        if r["kernel"] == "linear_chain_input_grad_kernel"
    }
    for format in BRIEF[target]:
        if not cases.has_tiles(target, format, brief=True):
            continue
        rows = _common.number_format(*FORMATS[format])
        families = tiles.FAMILIES if described else tiles.TABLES
        with mock.patch.object(tiles, "compute_capability", lambda: capability):
            tables = [tiles.table(family, rows) for family in families]
        for tile in {tile for table in tables for tile in table}:
            row = format, f"{tile.M}x{tile.N}x{tile.K}", tile.num_warps, tile.num_stages
            assert row in compiled_tiles, f"{target}: the row {row} of the tables of tiles has not been compiled"
        for tile in linear_chain.ROWS[rows]:
            row = format, f"{tile.M}x{tile.N}x{tile.K}", tile.num_warps, tile.num_stages
            assert row in chains, f"{target}: the row {row} of the chain's tiles has not been compiled"


@pytest.mark.thorough
def test_a_network_by_the_model():
    """Forward and backward of ResNet-50's convolutions, over the least time that the card allows them."""
    if triton.__version__ != budgets.BUDGETS["triton"]:
        pytest.skip("machine code of another compiler")
    result = run_python("-m", "bench.machine_code.network", TRITON_INTERPRET=None)
    assert result.returncode == 0, result.stdout[-500:] + result.stderr[-2000:]
    assert re.search(r"^all .* 1\.\d+$", result.stdout, re.M), result.stdout


SHAPE = "ResNet 3x3, 256"
RECORD = {
    "arch": "sm_90", "kernel": "conv2d_forward_kernel", "format": "bfloat16", "case": "taps, 128x128",
    "tile": "128x128x64", "num_warps": 8, "spilled": 0, "shared": 98304, "loads": {"16": 4}, "stores": {"16": 4},
    "dot": True, "matrix": {"HGMMA": 4}, "loop": [100, 4], "asynchronous": True, "products": 1, "overwritten": [],
}  # fmt: skip
TIMES = {"issue_us": 1.0, "l1_us": 1e6, "matrix_us": 1.0}
SLOW = {"issue_us": 6.0, "l1_us": 1.0, "matrix_us": 0.0, "arithmetic_us": 5.0, "memory_us": 4.0}


@pytest.mark.parametrize(
    "change, message",
    [
        ({}, None),
        ({"error": "CompilationError: unsupported"}, "does not compile: CompilationError"),
        ({"spilled": 8}, "8 bytes spilled, 0 allowed"),
        ({"shared": 2**18}, "bytes shared"),
        ({"matrix": {}}, "no matrix instructions"),
        ({"overwritten": ["local_store overwrites %a"]}, "local_store overwrites %a"),
        ({"products": 0}, "were not found in Triton's dialect"),
        ({"asynchronous": False}, "no matrix pipeline that goes on"),
        ({"asynchronous": None}, "no matrix pipeline that goes on"),
        ({"loop": [141, 4]}, "141 instructions for 4 products, 35 each allowed"),
        ({"loads": {"2": 64}}, "the widest of its loads has 2 bytes, not 16"),
        ({"loads": {}}, "the widest of its loads has 0 bytes, not 16"),
        ({"stores": {"8": 64}}, "the widest of its stores has 8 bytes, not 16"),
        ({"case": SHAPE, "bounds": TIMES}, "its bound is 1000000.00 us, "),
        ({"case": "taps, new", "bounds": TIMES}, "its bound of 1000000.00 us is not recorded"),
        (
            {"case": "ResNet relu", "kernel": "relu_kernel", "bounds": SLOW},
            "bound is 1.20 times its floor, 1 allowed",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_budgets_are_checked(change, message, monkeypatch):
    monkeypatch.setitem(budgets.BUDGETS, "triton", triton.__version__)
    record = {**RECORD, **change}
    found = list(budgets.violations([record]))
    assert bool(found) == bool(message)
    if message:
        assert len(found) == 1 and message in found[0]
        assert found[0].startswith(f"sm_90: {record['kernel']}, bfloat16, {record['case']}")


def test_another_compiler_is_held_to_less(monkeypatch):
    monkeypatch.setitem(budgets.BUDGETS, "triton", "0.0")
    monkeypatch.setitem(budgets.BUDGETS, "triton_too", [])
    over = {**RECORD, "case": SHAPE, "bounds": TIMES, "spilled": 8, "asynchronous": False, "loads": {"2": 64}}
    assert not list(budgets.violations([over]))
    for wrong in ({"error": "unsupported"}, {"shared": 2**18}, {"matrix": {}}, {"overwritten": ["a copy"]}):
        assert len(list(budgets.violations([{**over, **wrong}]))) == 1


def test_overwritten_operands_are_found():
    """A product's operand with a second use in registers is overwritten on sm_90; with a second load it is not."""
    result = run_python("tests/overwritten_operand.py", TRITON_INTERPRET=None)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    for name, (lines, products) in found.items():
        assert products, f"{name}: no product was seen"
        assert bool(lines) == name.startswith("shared"), f"{name}: {lines}"
    assert len(found) == 4


@pytest.mark.thorough
def test_batches_of_other_sizes_share_kernels():
    """Threads compile them before the first launch; few depend on the batch size."""
    result = run_python("tests/compiled_together.py", TRITON_INTERPRET=None)
    assert result.returncode == 0, result.stderr
    done = json.loads(result.stdout)
    assert done["launches"] == 0 and done["threads"] > 0
    once = {f"lenet_{name}_kernel": 1 for name in ("pack", "forward", "gradient", "update")}
    assert done["compiled"][:4] == [once] * 4
    assert done["compiled"][5] == {**once, "lenet_forward_kernel": 3}
    # In a second round the gradients' compilation has failed, and the error is not cached as a kernel.
    assert done["failed"] == 1 and done["kept"] == [1, 1, 0, 1]


def test_report():
    """The page and the recorded section of the budgets, from records of every kind."""
    bounds = {**TIMES, "arithmetic_us": 5e5, "memory_us": 2.0}
    more = {"num_stages": 3, "registers": 128}
    records = [
        {**RECORD, **more},
        {**RECORD, **more, "case": "taps, 64x64", "asynchronous": False, "registers": 200},
        {**RECORD, **more, "case": SHAPE, "bounds": bounds},
    ]
    page = report.page({"sm_90": records})
    assert "3 compilations of 1 kernels" in page
    row = [cell.strip() for cell in page.splitlines()[-1].strip("| ").split("|")]
    assert row == "conv2d_forward bfloat16 128x128x64 8 3 3 200 0 98304 16 16 HGMMA".split() + ["1 no, 2 yes"]
    assert f"| {SHAPE} | conv2d_forward | bfloat16 | 128x128x64 |" in page and page.count("| 2 |") == 0
    text = report.with_bounds('triton = "0.0"\n\n[spilled_bytes]\nsm_90 = 0\n\n[bounds_us]\nold = 1\n', records)
    again = budgets.tomllib.loads(text)
    assert again["spilled_bytes"] == {"sm_90": 0} and again["triton"] == triton.__version__
    assert again["bounds_us"] == {SHAPE: {RECORD["kernel"]: {"bfloat16": 1e6}}}

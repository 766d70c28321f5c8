"""Every kernel compiles for each GPU that is named, without one, in every tile and format, within bench/budgets.toml.

What no interpreter shows: shapes that tl.dot refuses, types that change inside a loop, spilled registers, products that
miss the matrix units, loads of single elements.
"""

import importlib
import json
import pkgutil
from pathlib import Path

import pytest
from conftest import TARGETS

import tritonnet.kernels
from tritonnet.kernels import _common

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

BUDGETS = tomllib.loads((Path(__file__).parents[1] / "bench/budgets.toml").read_text())
PRODUCTS = "conv2d_", "linear_"
FORMATS = {"bfloat16": "half", "float16": "half", "tf32": "tf32", "float32": "ieee", "float64": "fp64"}


def every_kernel():
    """The names of all kernels in all files of the package, whether or not a launcher knows them."""
    files = pkgutil.iter_modules(tritonnet.kernels.__path__)
    modules = [importlib.import_module(f"tritonnet.kernels.{file.name}") for file in files]
    return {name for module in modules for name in vars(module) if name.endswith("_kernel")}


def violations(records, target):
    """A line for each record that is over a budget, saying which kernel, tile and format it is, and what is wrong."""
    for r in records:
        where = f"{target}: {r['kernel']}, {r['format']}, {r['case']}"
        if "error" in r:
            yield f"{where}: does not compile: {r['error']}"
            continue
        where += f", tile {r['tile']}, {r['num_warps']} warps"
        for what in ("spilled", "shared"):
            most = BUDGETS[f"{what}_bytes"][target]
            if r[what] > most:
                yield f"{where}: {r[what]} bytes {what}, {most} allowed"
        if r["kernel"].startswith(PRODUCTS) and r["format"] in BUDGETS["matrix_units"][target] and not r["matrix"]:
            yield f"{where}: no matrix instructions"
        rule = BUDGETS["pipelined"]
        if (
            target == rule["arch"] and r["format"] in rule["formats"] and r["kernel"] in rule["kernels"]
            and r["case"].startswith(tuple(rule["cases"]))
        ):  # fmt: skip
            if r["asynchronous"] is False:
                yield f"{where}: the matrix pipeline waits for every product"
            widest = max(map(int, r["loads"]))
            if widest < 16 and f"{r['format']} {r['kernel']}" not in rule["narrow"]:
                yield f"{where}: the widest load has {widest} bytes"


@pytest.mark.parametrize("target", TARGETS)
def test_machine_code(target, compiled):
    result = compiled(target)
    assert result.returncode == 0, result.stderr[-3000:]
    records = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert not (found := list(violations(records, target))), "\n".join(found)
    assert {r["kernel"] for r in records} == every_kernel()
    # Each row of the tables of tiles has been compiled in each format.
    compiled_tiles = {(r["format"], r["tile"], r["num_warps"], r["num_stages"]) for r in records}
    for format, rows in FORMATS.items():
        for tile in {*_common.SQUARE[rows], *_common.TALL[rows]}:
            row = format, f"{tile.M}x{tile.N}x{tile.K}", tile.num_warps, tile.num_stages
            assert row in compiled_tiles, f"{target}: the row {row} of the tables of tiles has not been compiled"


RECORD = {
    "kernel": "conv2d_forward_kernel", "format": "bfloat16", "case": "taps, 128x128", "tile": "128x128x64",
    "num_warps": 8, "spilled": 0, "shared": 98304, "loads": {"16": 4}, "matrix": {"HGMMA": 4}, "asynchronous": True,
}  # fmt: skip


@pytest.mark.parametrize(
    "change, message",
    [
        ({}, None),
        ({"error": "CompilationError: unsupported"}, "does not compile: CompilationError"),
        ({"spilled": 64}, "64 bytes spilled, 32 allowed"),
        ({"shared": 2**18}, "bytes shared"),
        ({"matrix": {}}, "no matrix instructions"),
        ({"asynchronous": False}, "waits for every product"),
        ({"loads": {"2": 64}}, "the widest load has 2 bytes"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_budgets_are_checked(change, message):
    found = list(violations([{**RECORD, **change}], "sm_90"))
    assert bool(found) == bool(message)
    if message:
        assert len(found) == 1 and message in found[0]
        assert found[0].startswith("sm_90: conv2d_forward_kernel, bfloat16, taps, 128x128")

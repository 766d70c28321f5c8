"""Compares the records of `bench.machine_code.compile` with budgets.toml."""

import re
from pathlib import Path

import triton

from .. import FORMATS

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

BUDGETS = tomllib.loads((Path(__file__).parent / "budgets.toml").read_text(encoding="utf-8"))
# Room for the rounding of the recorded figures; the same compiler always gives the same code.
SLACK = 1.01
# Times of the machine code itself, as opposed to what arithmetic and memory allow.
BY_CODE = "issue_us", "l1_us", "matrix_us"


def bound(record):
    """The least time in microseconds that a record's machine code can take."""
    return max(record["bounds"][name] for name in BY_CODE)


def floor(record):
    """The least time in microseconds by arithmetic and by device memory alone."""
    return max(record["bounds"]["arithmetic_us"], record["bounds"]["memory_us"])


def recorded(record):
    """The bound that budgets.toml allows for a record, or None."""
    return BUDGETS["bounds_us"].get(record["case"], {}).get(record["kernel"], {}).get(record["format"])


def _plain(case):
    """The name of a case without what follows the product."""
    return re.split(", norm|, statistics", case)[0]


def _over_plain(record, plain):
    """The times of a record with an epilogue in units of that without, where both need as much as their tensors do."""
    return max(bound(record), floor(record)) / max(bound(plain), floor(plain), floor(record))


def _applies(rule, record):
    return (
        record["arch"] == rule["arch"]
        and record["format"] in rule.get("formats", FORMATS)
        and record["kernel"] in rule["kernels"]
        and record["case"].startswith(tuple(rule["cases"]))
    )


def violations(records):
    """A line for each budget that a record exceeds: where (architecture, kernel, format, case, tile) and what is wrong.

    What varies between compilers is compared only where triton is the version that budgets.toml is for; how products
    are pipelined, the width of accesses and the instructions of loops also for the others that it names.
    """
    same_compiler = triton.__version__ == BUDGETS["triton"]
    held = same_compiler or triton.__version__ in BUDGETS["triton_too"]
    records = list(records)
    of_case = {(r["arch"], r["kernel"], r["format"], r["case"]): r for r in records}
    for r in records:
        where = f"{r['arch']}: {r['kernel']}, {r['format']}, {r['case']}"
        if "error" in r:
            yield f"{where}: does not compile: {r['error']}"
            continue
        where += f", tile {r['tile']}, {r['num_warps']} warps"
        for what in ("spilled", "shared") if same_compiler else ("shared",):
            most = BUDGETS[f"{what}_bytes"][r["arch"]]
            if what == "spilled":
                most = max([most, *(rule["bytes"] for rule in BUDGETS["may_spill"] if _applies(rule, r))])
            if r[what] > most:
                yield f"{where}: {r[what]} bytes {what}, {most} allowed"
        if r["dot"] and r["format"] in BUDGETS["matrix_units"][r["arch"]] and not r["matrix"]:
            yield f"{where}: no matrix instructions"
        yield from (f"{where}: {line}" for line in r["overwritten"])
        if r["arch"] == "sm_90" and any(name.startswith("HGMMA") for name in r["matrix"]) and not r["products"]:
            yield f"{where}: its products were not found in Triton's dialect, so that their operands were not checked"
        if not held:
            continue
        for rule in BUDGETS["pipelined"]:
            if _applies(rule, r) and r["asynchronous"] is not True:
                yield f"{where}: no matrix pipeline that goes on while the next operands load"
        for rule in BUDGETS["wide"]:
            for what in ("loads", "stores"):
                if _applies(rule, r) and (widest := max(map(int, r[what]), default=0)) < rule.get(what, 0):
                    yield f"{where}: the widest of its {what} has {widest} bytes, not {rule[what]}"
        for rule in BUDGETS["instructions"]:
            count, products = r["loop"] if _applies(rule, r) else (0, 0)
            if count > rule["a_product"] * products > 0:
                yield f"{where}: {count} instructions for {products} products, {rule['a_product']} each allowed"
        if same_compiler and "bounds" in r:
            most = recorded(r)
            if most is None:
                yield f"{where}: its bound of {bound(r):.2f} us is not recorded"
            elif bound(r) > most * SLACK:
                yield f"{where}: its bound is {bound(r):.2f} us, {most} recorded"
            for rule in BUDGETS["fused"]:
                plain = of_case.get((r["arch"], r["kernel"], r["format"], _plain(r["case"])))
                if _applies(rule, r) and plain and (ratio := _over_plain(r, plain)) > rule["most"]:
                    yield f"{where}: its bound is {ratio:.2f} times that without an epilogue, {rule['most']} allowed"
            for rule in BUDGETS["floors"]:
                # That of a kernel with batch norm or statistics is compared with the plain one's.
                if _applies(rule, r) and r["case"] == _plain(r["case"]) and bound(r) > rule["most"] * floor(r):
                    yield f"{where}: its bound is {bound(r) / floor(r):.2f} times its floor, {rule['most']} allowed"

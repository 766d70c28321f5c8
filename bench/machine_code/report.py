"""Reports what the kernels compile to, on a machine that needs no GPU.

    python -m bench.machine_code                  # for every architecture
    python -m bench.machine_code sm_90 gfx942
    python -m bench.machine_code --record         # and writes the bounds into bench/machine_code/budgets.toml

Prints one table for each architecture and writes them to bench/machine_code/report.md; every single record goes to
machine_code.json. The exit status is 1 if a record exceeds a budget of bench/machine_code/budgets.toml.
"""

import argparse
import concurrent.futures
import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import triton
from tqdm import tqdm

from .. import FORMATS, TARGETS
from ..keep import ROOT
from ..processes import environment
from ..table import markdown
from . import budgets
from .budgets import bound, floor

HERE = Path(__file__).parent


def compile_for(arch, formats, *options):
    """The records of bench.machine_code.compile for one architecture; RuntimeError with its output if it fails."""
    command = [sys.executable, "-m", "bench.machine_code.compile", arch, *formats, *options]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    records = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not records:
        raise RuntimeError(
            f"python -m bench.machine_code.compile {arch} {' '.join(formats)} failed:\n{done.stderr[-2000:]}"
        )
    return records


def compile_all(archs, formats, *options):
    """{architecture: records}, compiled by as many processes at a time as there are cores."""
    # float32 takes up to half as long as the others. The longest jobs start first, so that none runs alone at the end.
    parts = [[f for f in formats if f != "float32"], [f for f in formats if f == "float32"]]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [(arch, pool.submit(compile_for, arch, part, *options)) for part in parts if part for arch in archs]
        for _ in tqdm(concurrent.futures.as_completed([job for _, job in jobs]), total=len(jobs)):
            pass
        return {arch: [r for for_arch, job in jobs if for_arch == arch for r in job.result()] for arch in archs}


def _one_of(values):
    """The value that all share, or each value with its count."""
    counts = Counter(values)
    return next(iter(counts)) if len(counts) == 1 else ", ".join(f"{n} {value}" for value, n in sorted(counts.items()))


def by_tile(records):
    """(header, rows) with one row for each kernel, format and tile: the worst of its cases."""
    groups = defaultdict(list)
    for r in records:
        groups[r["kernel"].removesuffix("_kernel"), r["format"], r["tile"], r["num_warps"], r["num_stages"]].append(r)
    rows = []
    for (kernel, format, tile, num_warps, num_stages), group in sorted(groups.items()):
        rows.append((
            kernel, format, tile, num_warps, num_stages, len(group),
            max(r["registers"] for r in group), max(r["spilled"] for r in group), max(r["shared"] for r in group),
            *(_one_of(str(max(map(int, r[what]), default=0)) for r in group) for what in ("loads", "stores")),
            _one_of(" ".join(sorted({name.split(".")[0] for name in r["matrix"]})) or "-" for r in group),
            _one_of({True: "yes", False: "no", None: "-"}[r["asynchronous"]] for r in group),
        ))  # fmt: skip
    header = "kernel", "format", "tile", "warps", "stages", "cases", "registers", "spilled", "shared", "loads", "stores"
    return (*header, "matrix", "asynchronous"), rows


def by_shape(records):
    """(header, rows) of the bounds on time."""
    header = "shape", "kernel", "format", "tile", "issue", "L1", "matrix", "arithmetic", "memory", "bound / floor"
    rows = []
    for r in records:
        if b := r.get("bounds"):
            times = [b[f"{name}_us"] for name in ("issue", "l1", "matrix", "arithmetic", "memory")]
            kernel = r["kernel"].removesuffix("_kernel")
            rows.append((r["case"], kernel, r["format"], r["tile"], *times, max(1.0, bound(r) / floor(r))))
    return header, rows


PAGE = """\
# What the kernels compile to

Written by `python -m bench.machine_code` with triton {triton}, from {count} compilations of {kernels} kernels for
{targets}. No GPU took part, and nothing here was timed. The tests compare every compilation with
[budgets.toml](budgets.toml), so that it does not get worse.

## Least times on an H200

The least microseconds that this machine code can take: its instructions at four a cycle and multiprocessor, its bytes
through L1 and shared memory at 128 a cycle, its products at the rate of the matrix units; beside them the least by
arithmetic and by device memory alone (sources in [sass.py](sass.py)). Waits, conflicts and misses come on top. LeNet is
at batch 1024 unless another is named, layers of ResNet-50 at batch 64; layouts are channels_last unless NCHW is named.

{shapes}
"""
SECTION = """
## {arch}

One row for each tile, with the worst of its cases. Shared memory and spilled registers in bytes; loads and stores by
the widest instruction, in bytes a thread; asynchronous: the loop's products run while the next operands load.

{table}"""


def page(records):
    """The report in Markdown."""
    text = PAGE.format(
        triton=triton.__version__, count=sum(map(len, records.values())), targets=", ".join(records),
        kernels=len({r["kernel"] for rs in records.values() for r in rs}),
        shapes=markdown(*by_shape(r for rs in records.values() for r in rs)),
    )  # fmt: skip
    return text + "".join(SECTION.format(arch=arch, table=markdown(*by_tile(rs))) for arch, rs in records.items())


def with_bounds(text, records):
    """The text of budgets.toml with the bounds of `records` as its last section."""
    figures = defaultdict(lambda: defaultdict(dict))
    for r in records:
        if "bounds" in r:
            kernel = figures[r["case"]][r["kernel"]]
            kernel[r["format"]] = max(kernel.get(r["format"], 0), bound(r))
    text = re.sub(r'^triton = ".*"$', f'triton = "{triton.__version__}"', text, flags=re.M)
    lines = [text[: text.index("[bounds_us]")] + "[bounds_us]\n"]
    for case, kernels in figures.items():
        lines.append(f'\n[bounds_us."{case}"]\n')
        for kernel, formats in kernels.items():
            lines.append(f"{kernel} = {{ {', '.join(f'{f} = {us:.4g}' for f, us in formats.items())} }}\n")
    return "".join(lines)


def main():
    parser = argparse.ArgumentParser("python -m bench.machine_code", description=__doc__.split("\n")[0])
    parser.add_argument("arch", nargs="*", help=f"of {', '.join(TARGETS)} (default: all)")
    parser.add_argument(
        "--record", action="store_true", help="write the bounds found into bench/machine_code/budgets.toml"
    )
    arguments = parser.parse_args()
    for arch in arguments.arch:
        if arch not in TARGETS:
            parser.error(f"{arch!r} is not one of {', '.join(TARGETS)}")

    records = compile_all(arguments.arch or TARGETS, FORMATS)
    everything = [r for rs in records.values() for r in rs]
    compiled = {arch: [r for r in rs if "error" not in r] for arch, rs in records.items()}
    text = page(compiled)
    print(text)
    Path("machine_code.json").write_text(json.dumps({"triton": triton.__version__, "records": everything}, indent=1))
    if not arguments.arch:
        (HERE / "report.md").write_text(text, encoding="utf-8")
    if arguments.record:
        file = HERE / "budgets.toml"
        file.write_text(with_bounds(file.read_text(encoding="utf-8"), everything), encoding="utf-8")
        return
    if found := list(budgets.violations(everything)):
        sys.exit("over budget:\n" + "\n".join(found))

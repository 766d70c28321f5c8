"""Compiles, without a GPU, the kernels that will be launched on one, and packs them for the machine that has it.

    python -m bench.warm pack --target sm_90      # on any machine: writes warm-sm_90.tar.xz, and checks it
    python -m bench.warm unpack warm-sm_90.tar.xz # on the machine with the GPU, before anything else; takes seconds
    python -m bench.warm check warm-sm_90.tar.xz  # compiles all parts again; every kernel has to be in the archive

`bench/warm.sh` packs in a virtual environment with the Python, torch and Triton of the other machine. Both need the
same minor version of Python, the same build of Triton, and the same sources of this project. Any other archive is
refused, as nothing in it would be used. Several archives may be unpacked, one after the other. The parts are:

    quick, full   our contestants in the cases of `python -m bench --quick`, and of `python -m bench`
    passes        the same of `python -m bench --passes`
    inference     the same of `python -m bench --inference`
    training      the same of `python -m bench --training`
    tune          every candidate that `python -m bench.tune` measures
    smoke         a TrainStep in three precisions, at batches that are captured and at others
    tests         the test files of the kernels, without their comparisons, as far as each test gets
    doctor        what `tritonnet doctor` compares on a GPU
    every_kernel  what `bench.machine_code.every_kernel` launches
    FILE.py       your own: its jobs() returns {name: function without arguments}, which run on tensors on the CPU

An archive has the machine code but no intermediate code: bench.machine_code and tests/ptx, which read that, need a
cache of their own. For CUDA it also has the C libraries that launch the kernels.
"""

import argparse
import hashlib
import importlib.metadata
import io
import json
import lzma
import os
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from triton import knobs
from triton.runtime.cache import triton_key

from .. import TARGETS
from ..keep import sources
from . import work

PARTS = (*work.PARTS, "tests")
DEFAULT = "quick", "smoke", "tests", "doctor", "every_kernel"
MANIFEST = "manifest.json"
# Hashes, whose values would say nothing in a message.
HASHES = "build of triton", "sources"
BINARIES = ".cubin", ".hsaco"
# Begins the name of Triton's file that lists the other files of a kernel and their paths.
GROUP = "__grp__"


def here():
    """What has to be the same on both machines."""
    return {
        "Python": "{}.{}".format(*sys.version_info),
        "triton": importlib.metadata.version("triton"),
        "build of triton": hashlib.sha256(triton_key().encode()).hexdigest()[:16],
        "sources": sources(),
    }


def kernels(cache):
    """{entry: kernel} of the folders of a cache that hold machine code."""
    return {path.parent.name: path.stem for path in sorted(cache.glob("*/*")) if path.suffix in BINARIES}


def libraries(cache):
    """The entries of a cache that hold a library."""
    return {path.parent.name for path in cache.glob("*/*.so")}


def compile_parts(cache, arguments):
    """Compile all that the parts launch into Triton's cache; returns the findings and the seconds."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        jobs = [part for part in arguments.parts if part != "tests"]
        where = Path(folder), cache, arguments.target
        found = work.run_jobs(*where, jobs, arguments.processes) if jobs else []
        if "tests" in arguments.parts:
            found = work.run_tests(*where, arguments.processes)
    return found, time.monotonic() - start


def say(found, known=()):
    """Print each finding once; returns the names of the kernels, or else jobs, that failed and are not in `known`."""
    failed = {}
    for line in found:
        if "left_out" in line:
            print(f"left out: {line['left_out']}")
            continue
        name = line["kernel"] or line["job"]
        if name not in known:
            failed.setdefault((name, line["error"]), line["job"])
    for (name, error), job in failed.items():
        print(f"FAILED {name}, in {job}: {error}")
    return sorted({name for name, _ in failed})


def _files(folder):
    """[(name, bytes)] of the files of a cache entry that are packed; its group file gets bare names for paths."""
    kept = [path for path in folder.iterdir() if path.suffix in (*BINARIES, ".so", ".json")]
    if not any(path.suffix in (*BINARIES, ".so") for path in kept):
        return []
    names = {path.name for path in kept}
    files = []
    for path in sorted(kept):
        content = path.read_bytes()
        if path.name.startswith(GROUP):
            group = {child: child for child in json.loads(content)["child_paths"] if child in names}
            content = json.dumps({"child_paths": group}).encode()
        files.append((path.name, content))
    return files


def write(archive, cache, manifest):
    """Pack a cache; similar kernels are side by side, which compresses better."""
    entries = [(folder.name, _files(folder)) for folder in cache.iterdir() if folder.is_dir()]
    entries.sort(key=lambda entry: ([(name, len(content)) for name, content in entry[1]], entry[0]))
    files = [(f"{entry}/{name}", content) for entry, contents in entries for name, content in contents]
    # A sixth of the time of the usual preset, for a quarter more bytes.
    with tarfile.open(archive, "w:xz", preset=2) as tar:
        for name, content in [(MANIFEST, json.dumps(manifest, indent=2).encode()), *files]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def unpack(archive, cache):
    """Unpack into a folder of Triton's cache; entries that are there already stay as they are.

    Returns:
        The manifest, and how many entries are new there.

    Raises:
        SystemExit: the archive cannot be read, or nothing in it would be used here; in one line.
    """
    try:
        with tarfile.open(archive, "r:xz") as tar:
            manifest = json.load(tar.extractfile(MANIFEST))
            now = here()
            if other := [name for name in now if manifest[name] != now[name]]:
                differences = (
                    f"other {name}" if name in HASHES else f"{name} {manifest[name]} and not {now[name]}"
                    for name in other
                )  # fmt: skip
                sys.exit(
                    f"{archive} does not fit this machine, nothing was unpacked: it is for {', '.join(differences)}"
                )
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix="unpacking-", dir=cache) as folder:
                tar.extractall(folder, filter="data")
                return manifest, sum(_move(entry, cache / entry.name) for entry in Path(folder).iterdir())
    except (OSError, EOFError, KeyError, ValueError, tarfile.TarError, lzma.LZMAError) as error:
        sys.exit(f"{archive} cannot be unpacked: {type(error).__name__}: {error}")


def _move(entry, place):
    """Move an unpacked entry to `place`, unless one is there; returns whether it was moved."""
    if not entry.is_dir():
        return False
    for path in entry.glob(f"{GROUP}*"):
        group = {child: str(place / child) for child in json.loads(path.read_bytes())["child_paths"]}
        path.write_text(json.dumps({"child_paths": group}), encoding="utf-8")
    try:
        entry.rename(place)  # also onto an empty folder, which Triton leaves where it has looked for a kernel
    except OSError:
        if not place.is_dir():
            raise
        return False
    return True


def pack(arguments):
    archive = arguments.out or Path(f"warm-{arguments.target}.tar.xz")
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder, "cache")
        cache.mkdir()
        manifest = here()  # before compiling, during which sources may change
        found, seconds = compile_parts(cache, arguments)
        failed = say(found)
        manifest |= {
            "torch": importlib.metadata.version("torch"), "target": arguments.target, "parts": arguments.parts,
            "kernels": len(kernels(cache)), "libraries": len(libraries(cache)), "seconds": round(seconds, 1),
            "processes": arguments.processes, "failed": failed,
        }  # fmt: skip
        write(archive, cache, manifest)
    print(
        f"{archive}: {manifest['kernels']} kernels for {arguments.target} and {manifest['libraries']} libraries, "
        f"{archive.stat().st_size / 1e6:.1f} MB, {seconds:.0f} s of compiling in {arguments.processes} processes",
        flush=True,
    )
    missing = check(arguments, archive) if arguments.check else 0
    return int(bool(failed or missing))


def check(arguments, archive=None):
    """Compile all parts again with the archive as the cache; returns 1 if a kernel was missing or failed."""
    archive = archive or arguments.archive
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder, "cache")
        manifest, _ = unpack(archive, cache)
        for name in ("target", "parts"):
            if getattr(arguments, name) is None:
                setattr(arguments, name, manifest[name])
        before = kernels(cache)
        found, seconds = compile_parts(cache, arguments)
        new = sorted(name for entry, name in kernels(cache).items() if entry not in before)
    failed = say(found, manifest["failed"])
    print(
        f"checked: {len(before)} kernels were packed, {len(new)} were not{': ' if new else ''}{', '.join(new)}; "
        f"{seconds:.0f} s, packing took {manifest['seconds']:.0f} s"
    )
    return int(bool(new or failed))


def parse(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench.warm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("pack", "check"):
        command = commands.add_parser(name)
        packs = name == "pack"
        command.add_argument("--target", choices=TARGETS, default="sm_90" if packs else None)
        command.add_argument(
            "--parts", nargs="+", default=list(DEFAULT) if packs else None, metavar="PART",
            help=f"of {', '.join(PARTS)} and FILE.py; default: {', '.join(DEFAULT) if packs else 'all of the archive'}",
        )  # fmt: skip
        command.add_argument("--processes", type=int, default=os.cpu_count(), metavar="N")
        if packs:
            command.add_argument("--out", type=Path, metavar="FILE", help="(default: warm-TARGET.tar.xz)")
            command.add_argument("--no-check", dest="check", action="store_false", help="skip `check` afterwards")
        else:
            command.add_argument("archive", type=Path, metavar="FILE")
    command = commands.add_parser("unpack")
    command.add_argument("archive", type=Path, metavar="FILE")
    command.add_argument("--cache", type=Path, default=Path(knobs.cache.dir), help="(default: Triton's own)")
    arguments = parser.parse_args(argv)
    for part in getattr(arguments, "parts", None) or ():
        if part not in PARTS and not Path(part).is_file():
            parser.error(f"{part!r} is neither a part nor a file")
    return arguments


def main(argv=None):
    arguments = parse(argv)
    if arguments.command == "unpack":
        start = time.monotonic()
        manifest, new = unpack(arguments.archive, arguments.cache.absolute())
        total = manifest["kernels"] + manifest["libraries"]
        print(
            f"{new} of {total} entries for {manifest['target']} unpacked into {arguments.cache}, "
            f"the others were there; {time.monotonic() - start:.1f} s"
        )
        return 0
    return {"pack": pack, "check": check}[arguments.command](arguments)

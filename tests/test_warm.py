"""What bench.warm packs: all that its jobs launch, for the same versions; and its report of what is missing.

Two kernels of ours are compiled, and one that cannot be, in processes of their own: here kernels are interpreted.
"""

import io
import json
import tarfile

import pytest

from bench import TARGETS, keep
from bench.run import plan
from bench.warm import archive as warm
from bench.warm import work as warm_work
from bench.warm.launchers import driver

JOBS = """
import torch
import triton
import triton.language as tl

import tritonnet.nn.functional as F


@triton.jit
def broken_kernel(x_ptr):
    tl.store(x_ptr, tl.zeros((4,), tl.float32) + tl.zeros((2,), tl.float32))


def jobs():
    return {
        "relu": lambda: F.relu(torch.randn(64, 32)),
        "linear": lambda: F.linear(torch.randn(64, 32), torch.randn(16, 32)),
        "again": lambda: F.relu(torch.randn(64, 32)),
        "broken": lambda: broken_kernel[(1,)](torch.randn(4)),
    }
"""
LINEAR, RELU = "linear_forward_kernel", "relu_kernel"


def rewritten(archive, to, left_out="", **changed):
    """A copy of an archive without the members named like `left_out`, and with a changed manifest."""
    with tarfile.open(archive) as tar, tarfile.open(to, "w:xz") as copy:
        for member in tar.getmembers():
            content = tar.extractfile(member).read()
            if member.name == warm.MANIFEST:
                content = json.dumps(json.loads(content) | changed).encode()
                member.size = len(content)
            if not left_out or left_out not in member.name:
                copy.addfile(member, io.BytesIO(content))
    return to


@pytest.mark.thorough
def test_what_is_packed_is_what_is_launched_and_what_is_missing_is_named(tmp_path, capsys):
    (tmp_path / "jobs.py").write_text(JOBS, encoding="utf-8")
    archive, cache = tmp_path / "packed.tar.xz", tmp_path / "cache"
    one = "--processes", "1"
    assert warm.main(["pack", "--no-check", *one, "--out", str(archive), "--parts", str(tmp_path / "jobs.py")]) == 1
    printed = capsys.readouterr().out.splitlines()
    (failure,) = (line for line in printed if line.startswith("FAILED"))
    assert failure.startswith("FAILED broken_kernel, in ") and ": broken: CompilationError: " in failure

    manifest, new = warm.unpack(archive, cache)
    assert warm.here().items() <= manifest.items()
    assert manifest["target"] == "sm_90" and manifest["failed"] == ["broken_kernel"] and manifest["kernels"] == 2
    entries = warm.kernels(cache)
    assert sorted(entries.values()) == [LINEAR, RELU]
    for entry, name in entries.items():
        files = {path.name: path for path in (cache / entry).iterdir()}
        group = json.loads(files.pop(f"__grp__{name}.json").read_text("utf-8"))["child_paths"]
        assert set(files) == {f"{name}.cubin", f"{name}.json"}
        assert group == {child: str(path) for child, path in files.items()}
        assert files[f"{name}.cubin"].read_bytes()[:4] == b"\x7fELF"
    # One module for the driver and, in triton 3.6, a function for each kind of arguments; nothing without a compiler.
    left_out = any(line.startswith("left out: the C") for line in printed)
    assert manifest["libraries"] == (0 if left_out else 1 + 2 * hasattr(driver, "make_launcher"))
    assert new == manifest["kernels"] + manifest["libraries"] == len(list(cache.iterdir()))

    (entry,) = (entry for entry, name in entries.items() if name == LINEAR)
    archive = rewritten(archive, tmp_path / "less.tar.xz", left_out=entry)
    assert warm.main(["check", str(archive), *one]) == 1
    assert f"checked: 1 kernels were packed, 1 were not: {LINEAR};" in capsys.readouterr().out


@pytest.fixture
def archive(tmp_path):
    """An archive of a made-up kernel, with its source, from a folder in which something failed."""
    cache = tmp_path / "made up"
    for name in ("K.cubin", "K.json", "K.source"):
        (cache / "ENTRY").mkdir(parents=True, exist_ok=True)
        (cache / "ENTRY" / name).write_text(name, encoding="utf-8")
    group = {name: f"/elsewhere/ENTRY/{name}" for name in ("K.cubin", "K.json", "K.source")}
    (cache / "ENTRY" / "__grp__K.json").write_text(json.dumps({"child_paths": group}), encoding="utf-8")
    (cache / "FAILED").mkdir()
    (cache / "FAILED" / "K.source").touch()
    manifest = {**warm.here(), "kernels": 1, "libraries": 0, "target": "sm_90"}
    warm.write(tmp_path / "made-up.tar.xz", cache, manifest)
    return tmp_path / "made-up.tar.xz"


def test_what_is_in_a_cache_stays_as_it_is(archive, tmp_path, capsys):
    cache = tmp_path / "cache"
    unpack = ["unpack", str(archive), "--cache", str(cache)]
    assert warm.main(unpack) == 0
    assert capsys.readouterr().out.startswith(f"1 of 1 entries for sm_90 unpacked into {cache}, the others were there;")
    assert [entry.name for entry in cache.iterdir()] == ["ENTRY"]
    files = {path.name: path.read_text("utf-8") for path in (cache / "ENTRY").iterdir()}
    group = {name: str(cache / "ENTRY" / name) for name in ("K.cubin", "K.json")}
    assert json.loads(files.pop("__grp__K.json")) == {"child_paths": group}
    assert files == {"K.cubin": "K.cubin", "K.json": "K.json"}
    (cache / "ENTRY" / "K.cubin").write_text("another", encoding="utf-8")
    assert warm.main(unpack) == 0
    assert capsys.readouterr().out.startswith("0 of 1")
    assert (cache / "ENTRY" / "K.cubin").read_text("utf-8") == "another"
    # Triton leaves an empty folder where it has looked for a kernel.
    for path in (cache / "ENTRY").iterdir():
        path.unlink()
    assert warm.main(unpack) == 0
    assert capsys.readouterr().out.startswith("1 of 1")


def test_what_would_not_be_used_is_refused_in_a_line(archive, tmp_path):
    for changed, said in (
        ({"triton": "3.0.0"}, f"triton 3.0.0 and not {warm.here()['triton']}"),
        ({"Python": "3.9"}, f"Python 3.9 and not {warm.here()['Python']}"),
        ({"sources": "0" * 16, "build of triton": "0" * 16}, "other build of triton, other sources"),
    ):
        other = rewritten(archive, tmp_path / "other.tar.xz", **changed)
        with pytest.raises(SystemExit, match=f"does not fit this machine, nothing was unpacked: it is for {said}$"):
            warm.main(["unpack", str(other), "--cache", str(tmp_path / "cache")])
    other.write_text("no archive", encoding="utf-8")
    for name in ("other.tar.xz", "missing.tar.xz"):
        with pytest.raises(SystemExit, match=f"{name} cannot be unpacked: [^\n]*$"):
            warm.unpack(tmp_path / name, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_sources_are_every_file_of_kernels_and_package(monkeypatch, tmp_path):
    monkeypatch.setattr(keep, "ROOT", tmp_path)
    seen = {keep.sources()}
    for name in ("kernels/a.py", "tritonnet/a.py", "tritonnet/nn/a.py", "kernels/b.py", "kernels/a.py", "tests/a.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1\n" * (1 + path.exists()), encoding="utf-8")
        seen.add(keep.sources())
    assert len(seen) == 1 + 5, "the tests do not count"


def test_parts_and_targets_are_looked_at_before_anything_is_compiled(capsys):
    assert warm.parse(["pack"]).target in TARGETS
    with pytest.raises(SystemExit):
        warm.main(["pack", "--parts", "quick", "quik"])
    assert "'quik' is neither a part nor a file" in capsys.readouterr().err


def test_the_tests_that_are_compiled_are_there():
    """And the bench's jobs have distinct names; a quick run's are among those of a full one."""
    assert all((keep.ROOT / "tests" / f"{name}.py").exists() for name in warm_work.TESTS)
    assert [len(warm_work.calls([kind])) for kind in ("passes", "inference", "training")] == [52, 27, 8]
    full = warm_work.calls(["full", "quick", "smoke", "doctor", "every_kernel"])
    names = {part: [name for name in full if name.startswith(f"{part}: ")] for part in ("full", "quick", "smoke")}
    assert len(names["full"]) == len(plan(quick=False)) and not names["quick"] and len(names["smoke"]) == 18

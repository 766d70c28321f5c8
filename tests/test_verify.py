"""bench --verify without a GPU: its stages, one that fails, one that hangs, an interrupt, and resuming after it.

Most stages here are lines of Python; one run has the real ones on a stand-in for a GPU.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import types

import pytest
import torch
from conftest import ROOT, run_python
from test_bench import MACHINE

from bench import outcomes, smoke, stages, verify
from bench.limit import interrupted_by_sigterm
from bench.record import Record
from bench.stages import Stage
from bench.verify import FAILED, LATE, NO_TIME, PASSED, STOPPED


def line(text, *arguments):
    """The command of a stage that is a line of Python."""
    return lambda limit, without: [sys.executable, "-c", text, *arguments, *without]


def read(folder):
    return json.loads((folder / "made-up-gpu-verify.json").read_text())


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs bench --verify with some stages and minutes on a made-up machine; returns the exit status."""
    monkeypatch.setattr(verify, "machine", lambda kind: MACHINE)
    monkeypatch.setattr(verify, "sources", lambda: "of now")
    monkeypatch.setattr(stages, "GRACE", 1)

    def run(*those, minutes=None):
        monkeypatch.setattr(stages, "planned", lambda folder, kept: (list(those), {"tune": "there is none"}))
        return verify.main(tmp_path, minutes)

    return run


def status_of(folder):
    return {name: outcome["status"] for name, outcome in read(folder)["stages"].items()}


HANGS = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('begun', flush=True); time.sleep(99)"
STOPS = "import time\ntry: time.sleep(99)\nexcept KeyboardInterrupt: print('half of it')"


@pytest.mark.thorough
def test_stages_follow_whatever_comes(run, tmp_path, capfd):
    """One fails, one crashes, one stops when it is told to and one does not."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        pytest.skip("this process ignores the signal that stops a stage, as processes started with & in a script do")
    started = time.monotonic()
    status = run(
        Stage("well", line("print('7 of 7')"), 1, 0.1),
        Stage("fails", line("import sys; print('because'); sys.exit(3)"), 1, 0.1),
        Stage("crashes", line("import os; os.abort()"), 1, 0.1),
        Stage("stops", line(STOPS), 0.05, 0.1),
        Stage("hangs", line(HANGS), 0.05, 0.1),
        Stage("last", line("import os; print(os.environ['OF_IT'])"), 1, 0.1, {"OF_IT": "a variable"}),
    )  # fmt: skip
    assert status == 1 and time.monotonic() - started < 15
    assert status_of(tmp_path) == {
        "well": PASSED, "fails": FAILED, "crashes": FAILED, "stops": LATE, "hangs": LATE, "last": PASSED
    }  # fmt: skip
    kept = read(tmp_path)
    assert kept["stages"]["well"]["said"] == "7 of 7" and kept["stages"]["last"]["said"] == "a variable"
    assert kept["stages"]["fails"]["last_lines"] == ["because"] and kept["stages"]["stops"]["said"] == "half of it"
    assert kept["stages"]["crashes"]["said"] == "ended by SIGABRT" and kept["stages"]["hangs"]["said"] == "begun"
    out = capfd.readouterr().out
    for words in ("| fails   | FAILED", "| tune    | left out", "| hangs   | out of time", "some stages are missing"):
        assert words in out, words
    assert [cells[:2] for cells in kept["summary"]][-1] == ["tune", "left out"] and not kept["well"]


def test_nothing_of_a_stage_stays(run, tmp_path):
    """Processes that a stage has started are ended, too."""
    there = tmp_path / "pid"
    child = f"import os, pathlib; pathlib.Path({str(there)!r}).write_text(str(os.getpid())); {HANGS}"
    begins = (
        "import pathlib, subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"while not pathlib.Path({str(there)!r}).exists(): time.sleep(0.05)"
    )
    assert run(Stage("leaves a child", line(begins), 5, 0.1)) == 0
    pid = int(there.read_text())
    with pytest.raises(ProcessLookupError):
        for _ in range(50):
            os.kill(pid, 0)
            time.sleep(0.1)


@pytest.mark.thorough
def test_a_stage_ends_with_what_has_started_it(tmp_path):
    """bench --verify is killed and can tell no process; its own output is closed, and the stage's is still read."""
    there, kept = tmp_path / "pid", tmp_path / "made-up-gpu-verify.json"
    child = (
        "import os, pathlib, time; print('line\\n' * 100_000); "
        f"pathlib.Path({str(there)!r}).write_text(str(os.getpid())); time.sleep(60)"
    )
    begins = (
        "import sys; sys.path[:0] = ['tests', '.']\n"
        "from pathlib import Path\n"
        "from bench import verify\n"
        "from test_bench import MACHINE\n"
        "verify.machine = lambda kind: MACHINE\n"
        f"stage = verify.stages.Stage('stays', lambda limit, without: [sys.executable, '-c', {child!r}], 1, 0.1)\n"
        "verify.stages.planned = lambda folder, kept: ([stage], {})\n"
        f"verify.main(Path({str(tmp_path)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", begins], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline(), process.stdout.readline()  # the name of the stage
    process.stdout.close()
    while not there.exists() or not there.read_text():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.kill()
    process.wait()
    process.stderr.close()
    with pytest.raises(ProcessLookupError):
        for _ in range(50):
            os.kill(int(there.read_text()), 0)
            time.sleep(0.1)
    assert json.loads(kept.read_text())["stages"]["stays"]["status"] == STOPPED


def test_a_process_that_nothing_ends_is_left(monkeypatch):
    def wait(timeout):
        waited.append(timeout)
        raise subprocess.TimeoutExpired("stage", timeout)

    waited, signals = [], []
    monkeypatch.setattr(os, "killpg", lambda *arguments: signals.append(arguments))
    verify._end(types.SimpleNamespace(pid=7, poll=lambda: None, send_signal=signals.append, wait=wait))
    assert signals == [signal.SIGINT, (7, signal.SIGKILL)] and len(waited) == 2


def test_two_calls_at_once(run, tmp_path):
    with verify._alone(tmp_path), pytest.raises(SystemExit, match="runs already, with its files in"):
        run()
    assert run() == 0


def test_what_is_missing_comes_first_and_then_what_failed(run, tmp_path, capfd, monkeypatch):
    ran = tmp_path / "ran"
    tells = f"import sys; open({str(ran)!r}, 'a').write(sys.argv[1] + ' '); sys.exit(int(sys.argv[2]))"

    def three(**fails):
        return [Stage(name, line(tells, name, str(int(name in fails))), 10, 1) for name in ("one", "two", "three")]

    assert run(*three(one=True)[:2]) == 1
    assert run(*three()) == 0 and ran.read_text() == "one two three one "
    assert status_of(tmp_path) == dict.fromkeys(("one", "two", "three"), PASSED) and read(tmp_path)["well"]
    assert run(*three()) == 0 and ran.read_text() == "one two three one "
    assert capfd.readouterr().out.count(": nothing is left to do\n") == 1
    # Other code is another run.
    monkeypatch.setattr(verify, "sources", lambda: "changed")
    assert run(*three(three=True)) == 1 and ran.read_text().endswith(" one two three ")
    monkeypatch.setattr(verify, "machine", lambda kind: MACHINE | {"triton": "4.0"})
    assert run(*three(three=True)) == 1 and ran.read_text().endswith(" one two three one two three ")


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=["Ctrl-C", "SIGTERM", "SIGHUP"])
def test_an_interrupt_and_going_on(by, run, tmp_path, capfd):
    """In the middle of the second of three stages, which is told of it and leaves nothing behind."""
    if signal.getsignal(by) == signal.SIG_IGN:
        pytest.skip("this process ignores the signal, as processes under nohup do")

    def interrupt():
        while "second" not in (read(tmp_path)["stages"] if (tmp_path / "made-up-gpu-verify.json").exists() else ()):
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(os.getpid(), by)

    those = [
        Stage("first", line("print(1)"), 5, 0.1), Stage("second", line(STOPS), 5, 0.1),
        Stage("third", line("print(3)"), 5, 0.1),
    ]  # fmt: skip
    threading.Thread(target=interrupt, daemon=True).start()
    with interrupted_by_sigterm():
        assert run(*those) == 130
    assert status_of(tmp_path) == {"first": PASSED, "second": STOPPED}
    out = capfd.readouterr().out
    assert "half of it" in out and "| third  | no time" in out
    those[1] = Stage("second", line("print(2)"), 5, 0.1)
    assert run(*those) == 0
    assert status_of(tmp_path) == dict.fromkeys(("first", "second", "third"), PASSED)
    assert "first, up to" not in capfd.readouterr().out


def test_minutes_are_shared(run, tmp_path, monkeypatch):
    """Each stage gets its share of the remaining time, and leaves what it does not need to those after it."""
    monkeypatch.setattr(stages, "GRACE", 0.1)
    limits = {}

    def stage(name, seconds, least, sleeps=0.0):
        def command(limit, without):
            limits[name] = limit
            return [sys.executable, "-c", f"import time; time.sleep({sleeps})"]

        return Stage(name, command, seconds, least)

    assert run(stage("a", 1, 0.1), stage("b", 1, 0.1), stage("c", 2, 0.1), stage("d", 1, 99), minutes=0.1) == 1
    assert limits.keys() == {"a", "b", "c"}
    assert 1.0 < limits["a"] <= 1.2 and 1.2 < limits["b"] < 1.5 and 3.0 < limits["c"] < 4.0
    assert read(tmp_path)["summary"][3][:2] == ["d", NO_TIME]
    # Too little for all: the first ones' needs are met first.
    assert run(stage("e", 4, 1), stage("f", 4, 1), minutes=0.1) == 0
    assert limits["e"] == 4 and 4 < limits["f"] < 6


def test_a_step_that_is_wrong_is_not_timed():
    planned = {"stages": {"smoke": {"status": PASSED}}, "smoke": {"a": "agrees", "b": "agrees"}}
    assert verify._not_timed({"stages": {}}) == () and verify._not_timed(planned) == ()
    late = planned | {"stages": {"smoke": {"status": LATE}}}
    assert verify._not_timed(late) == ()
    for wrong in (
        planned | {"smoke": {"a": "agrees", "b": "3 of 9 losses differ"}},
        late | {"smoke": {}},  # it hangs before its first case
        late | {"smoke": {"a": "agrees", "b": smoke.BEGUN}},  # it hangs in a later case
        {"stages": {"smoke": {"status": FAILED}}},
        planned | {"tests": {"tests/test_train_step.py": {"passed": [], "skipped": [], "failed": {"test": "why"}}}},
    ):
        assert verify._not_timed(wrong) == ("TrainStep",)
    other = {"tests/test_relu.py": {"passed": [], "skipped": [], "failed": {"test": "why"}}}
    assert verify._not_timed(planned | {"tests": other}) == ()
    quick = next(s for s in stages.planned(ROOT, ROOT / "kept")[0] if s.name == "quick bench")
    assert quick.command(100, ("TrainStep",))[-2:] == ["--without", "TrainStep"]
    others = [s for s in stages.planned(ROOT, ROOT / "kept")[0] if "--without" not in s.command(100, ("TrainStep",))]
    assert not any(stage.times for stage in others) and len(others) >= 6
    full = stages.planned(ROOT, ROOT / "kept")[0][-1]
    seconds = [stage.command(limit, ())[7] for stage in (quick, full) for limit in (60, 1000)]
    assert full.name == "bench" and seconds == ["40", "75", "40", "980"]


def test_without_what_is_optional_there_is_one_line():
    """Without a GPU, and without any package except torch."""
    without = "sys.modules |= dict.fromkeys(('pytest', 'xdist', 'tqdm', 'matplotlib', 'triton', 'rich', 'PIL'))"
    program = (
        f"import runpy, sys, torch; {without}; sys.argv[1:] = ['--verify']; torch.cuda.is_available = lambda: False"
    )
    result = run_python("-c", f"{program}; runpy.run_module('bench', run_name='__main__')", TRITON_INTERPRET=None)
    # torch for CUDA warns in a line of its own.
    *warnings, last = result.stderr.splitlines()
    assert result.returncode == 1 and last.startswith("no GPU: ") and not result.stdout, result.stderr
    assert not warnings or torch.version.cuda, result.stderr


def test_every_test_has_its_place():
    """In a stage, or among those whose outcome is the same everywhere."""
    placed = [
        *stages.STEP_TESTS, *stages.CONVOLUTION_TESTS, *stages.KERNEL_TESTS, *stages.OTHER_TESTS, *stages.WITHOUT_GPU
    ]  # fmt: skip
    assert len(set(placed)) == len(placed)
    there = {path.stem for path in (ROOT / "tests").glob("test_*.py")}
    assert set(placed) == there


@pytest.mark.thorough
def test_outcomes_are_kept_and_passed_over(tmp_path, pytestconfig):
    """By the plugin, with xdist and without; only failed tests run again."""
    (tmp_path / "test_some.py").write_text(
        "import os, pytest\n"
        "@pytest.mark.parametrize('number', range(5))\n"
        "def test_one(number): assert number != 3 or 'mended' in os.environ, 'it is three'\n"
        "def test_two(): pytest.skip('for no reason')\n"
        "@pytest.fixture\n"
        "def broken():\n"
        "    yield\n"
        "    assert 'mended' in os.environ, 'at its end'\n"
        "def test_three(broken): pass\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    kept = tmp_path / "kept.json"
    kept.write_text('{"smoke": {"a": "agrees"}}')
    (tmp_path / "test_lost.py").write_text(
        "import os, pytest\n"
        "@pytest.mark.parametrize('number', range(12))\n"
        "def test_one(number): number == 4 and os._exit(1)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.outcomes", "-p", "no:cacheprovider"]

    def run(*options, file="test_some.py", kept=kept, **variables):
        return subprocess.run(
            [*command, "--outcomes", str(kept), file, *options], cwd=tmp_path, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        )  # fmt: skip

    assert run("-n", "2").returncode == 1
    found = json.loads(kept.read_text())
    of_file = found["tests"]["test_some.py"]
    assert found["smoke"] == {"a": "agrees"} and verify.counts(found["tests"]) == {
        "passed": 4, "failed": 2, "skipped": 1
    }  # fmt: skip
    assert (
        of_file["failed"].keys() == {"test_one[3]", "test_three"} and "it is three" in of_file["failed"]["test_one[3]"]
    )
    again = run(mended="yes")
    assert again.returncode == 0 and "2 passed" in again.stdout
    assert verify.counts(json.loads(kept.read_text())["tests"]) == {"passed": 6, "failed": 0, "skipped": 1}
    assert len(outcomes.Outcomes(kept).well()) == 7
    # If a worker ends, such as one whose GPU is lost, another runs the remaining tests.
    crashed = run("-n", "1", file="test_lost.py", kept=tmp_path / "lost.json")
    assert "1 failed, 11 passed" in crashed.stdout, crashed.stdout
    of_file = json.loads((tmp_path / "lost.json").read_text())["tests"]["test_lost.py"]
    assert len(of_file["passed"]) == 11 and of_file["failed"].keys() == {"test_one[4]"}


@pytest.mark.thorough
def test_all_stages_on_a_gpu_that_is_stood_in_for(run, tmp_path, monkeypatch, capfd):
    """The real commands, a time for each; a test that fails in the first call and is mended before the second."""
    small = tmp_path / "test_small"
    small.with_suffix(".py").write_text("import os\ndef test_well(): pass\ndef test_later(): os.environ['MENDED']\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    monkeypatch.setattr(stages, "PYTHON", (sys.executable, str(ROOT / "tests" / "stand_in.py")))
    monkeypatch.setattr(stages, "GRACE", 20)
    for group in ("CONVOLUTION_TESTS", "KERNEL_TESTS", "OTHER_TESTS"):
        monkeypatch.setattr(stages, group, ())
    monkeypatch.setattr(stages, "STEP_TESTS", (os.path.relpath(small, ROOT / "tests"),))
    (tmp_path / "tools").mkdir()
    sanitizer = tmp_path / "tools" / "compute-sanitizer"
    sanitizer.write_text("#!/bin/sh\necho $2: ERROR SUMMARY: 0 errors\n")
    sanitizer.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sanitizer.parent}{os.pathsep}{os.environ['PATH']}")
    planned, left_out = stages.planned(tmp_path, tmp_path / "made-up-gpu-verify.json")
    assert not left_out
    names = [stage.name for stage in planned]
    assert names == [
        "doctor", "smoke", "quick bench", "tests of the step", "tests of convolutions", "tests of the other kernels",
        "memcheck", "racecheck", "first step and image", "tune", "all other tests", "inference", "training", "passes",
        "bench",
    ]  # fmt: skip
    # Stages of tests without a file would collect every test.
    planned = [stage for stage in planned if stage.name not in names[4:6] + names[10:11]]

    assert run(*planned, minutes=10) == 1
    out, kept = capfd.readouterr().out, read(tmp_path)
    assert status_of(tmp_path) == {s.name: FAILED if s.name == "tests of the step" else PASSED for s in planned}, out
    assert kept["smoke"] == {"ieee, batch 2, from a DataLoader": "agrees"}
    assert verify.counts(kept["tests"]) == {"passed": 1, "failed": 1, "skipped": 0}
    assert kept["stages"]["memcheck"]["said"] == "memcheck: ERROR SUMMARY: 0 errors"
    assert kept["start"]["first image, torch, -"]["ms"] > 0
    assert "::test_later" in out and "KeyError" in next(iter(kept["tests"].values()))["failed"]["test_later"]
    assert list(kept["tune"]) and "MEASURED: dict = {" in (tmp_path / stages.TILES).read_text()
    full = Record.read(tmp_path / "made-up-gpu.json")
    assert len(full.done) == 3 and full.left_out and not full.missing
    # The tests have found the step wrong: what the quick run did not time is not timed at all.
    assert "TrainStep: by --without" in full.left_out
    assert "TrainStep: by --without" not in Record.read(tmp_path / "made-up-gpu-quick.json").left_out

    monkeypatch.setenv("MENDED", "yes")
    assert run(*planned) == 0
    assert verify.counts(read(tmp_path)["tests"]) == {"passed": 2, "failed": 0, "skipped": 0}
    # The step is right now, and is timed.
    ran = [words.partition(", up to ")[0] for words in capfd.readouterr().out.splitlines() if ", up to " in words]
    assert ran == ["tests of the step", "first step and image", "inference", "training", "passes", "bench"]
    assert "TrainStep: by --without" not in Record.read(tmp_path / "made-up-gpu.json").left_out

"""bench.tune without a GPU, on invented times: what is fitted, chosen, written, kept, and said.

The times follow the model of kernels/tiles.py with numbers that are known. One test asks the real chooser, with a GPU
that does nothing, what each tile has to do on some of the problems.
"""

import ast
import contextlib
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT, run_python
from test_bench import Clockwork

import tritonnet
from bench.libraries import installed
from bench.tune import __main__ as tune
from bench.tune import card, fit, problems
from bench.tune.fit import Sample
from bench.tune.take import Taken, take
from bench.warm import work as warm_work
from tritonnet.kernels import tiles

SMS = 132
NUMBERS = {(128, 128, 64, 8, 3, 1): (0.5, 3.0), (64, 64, 64, 4, 3, 1): (0.2, 1.0), (32, 32, 64, 4, 3, 1): (0.1, 0.5)}
# (programs, steps) of invented problems, from less than a wave to many.
SIZES = (40, 10), (132, 72), (300, 4), (800, 18), (3000, 1), (16, 400)


def sample(tile, size, problem="p", noise=1.0, **more):
    """A Sample whose time is the model's with NUMBERS."""
    made = Sample("patches", "half", tile, problem, *size, **more)
    return made._replace(us=noise * fit.predicted(made, NUMBERS[tile], SMS))


@pytest.mark.parametrize("tile", NUMBERS)
@pytest.mark.parametrize("noise, within", [(0.0, 1e-9), (0.02, 0.06)], ids=["exact", "noisy"])
def test_the_numbers_of_a_tile_are_found(tile, noise, within):
    rng = random.Random(0)
    samples = [sample(tile, size, noise=1 + rng.uniform(-noise, noise)) for size in SIZES * 3]
    found = fit.fit(samples, (1.0, 1.0), SMS)
    assert found == pytest.approx(NUMBERS[tile], rel=within)


def test_what_does_not_depend_on_the_tile_is_taken_off():
    """Time after the programs is subtracted; launches that memory bounds say nothing, unless there are no others."""
    tile = next(iter(NUMBERS))
    adding = [sample(tile, size, added_us=5.0) for size in SIZES]
    bounded = [sample(tile, size, floor_us=1e4) for size in SIZES]
    assert fit.fit(adding + bounded, (1.0, 1.0), SMS) == pytest.approx(NUMBERS[tile])
    step, fixed = fit.fit(bounded, (1.0, 1.0), SMS)
    assert step >= 0 and fixed >= 0 and max(step, fixed) > 100


def test_numbers_are_never_negative():
    tile = next(iter(NUMBERS))
    samples = [Sample("patches", "half", tile, "p", 132, steps, us=us) for steps, us in ((10, 1.0), (100, 20.0))]
    step, fixed = fit.fit(samples, (1.0, 1.0), SMS)
    assert fixed == 0.0 and 0.1 < step < 0.2
    samples = [Sample("patches", "half", tile, "p", 132, steps, us=us) for steps, us in ((10, 20.0), (100, 19.0))]
    step, fixed = fit.fit(samples, (1.0, 1.0), SMS)
    assert step == 0.0 and fixed == pytest.approx(19.5, rel=0.01)


@pytest.mark.parametrize("sizes", [[(132, 10)], [(132, 10), (264, 10), (500, 10)]], ids=["one", "the same steps"])
def test_few_shapes_scale_the_computed_numbers(sizes):
    """A step and what is fixed cannot be told apart; the times are still those that were measured."""
    tile = next(iter(NUMBERS))
    step, fixed = fit.fit([sample(tile, size) for size in sizes], (0.25, 1.5), SMS)
    assert step / fixed == pytest.approx(0.25 / 1.5)
    assert 10 * step + fixed == pytest.approx(10 * NUMBERS[tile][0] + NUMBERS[tile][1])


def invented(noise=0.0):
    """Samples of every tile on problems of which each tile divides the work in its own way."""
    rng, found = random.Random(1), []
    for (m, n), k in itertools.product([(25088, 64), (4096, 4096), (200, 512), (1000, 1000)], (64, 1024)):
        for tile in NUMBERS:
            size = math.ceil(m / tile[0]) * math.ceil(n / tile[1]), math.ceil(k / tile[2])
            found.append(sample(tile, size, f"{m} x {n} x {k}", 1 + rng.uniform(-noise, noise)))
    return found


def test_the_model_chooses_the_fastest_tile():
    samples = invented()
    found = fit.families(samples, lambda *_: (1.0, 1.0), SMS)
    assert {tile: pytest.approx(numbers) for tile, numbers in NUMBERS.items()} == found["patches"]["half"]
    chosen = fit.choices(samples, found, SMS)
    assert len(chosen) == 8 and len({choice.best for choice in chosen}) > 1
    assert all(choice.chosen == choice.best and choice.loss == 0 for choice in chosen)
    noisy = invented(noise=0.03)
    chosen = fit.choices(noisy, fit.families(noisy, lambda *_: (1.0, 1.0), SMS), SMS)
    assert all(0 <= choice.loss < 0.1 for choice in chosen)


def test_a_tile_that_failed_is_kept_as_failed():
    """Also if it has times elsewhere, or had numbers before. Choices are made between the others."""
    bad, *good = NUMBERS
    samples = [*invented(), Sample("patches", "half", bad, "other", error="value 0 is off by 1")]
    found = fit.families(samples, lambda *_: (1.0, 1.0), SMS)
    assert [tile for tile, numbers in found["patches"]["half"].items() if numbers] == good
    assert found["patches"]["half"][bad] is None
    entry = {"card": "a card", "triton": "3.7.1", "families": {"patches": {"half": {bad: (1.0, 1.0)}}}}
    assert fit.merged(entry, {**entry, "families": found})["families"]["patches"]["half"][bad] is None
    assert bad not in {tile for choice in fit.choices(samples, found, SMS) for tile in (choice.chosen, choice.best)}


class Made(types.SimpleNamespace):
    """An invented problem."""

    family, row, task, format = "patches", "half", "forward", "bfloat16"
    candidates = [tiles.Tile(*tile) for tile in NUMBERS]


MADE = [
    Made(name=f"{m} x {n} x {k}", sizes=(m, n, k)) for m, n, k in ((25088, 64, 576), (4096, 4096, 64), (9, 512, 512))
]


def measured(problem, tile):
    m, n, k = problem.sizes
    return sample(tuple(tile), (-(-m // tile.M) * -(-n // tile.N), -(-k // tile.K)), problem.name)


def test_all_is_measured_and_kept(tmp_path):
    kept, changes = tmp_path / "kept.json", []
    kept.write_text('{"smoke": {"a": "agrees"}}')
    taken = Taken(kept, changed=lambda: changes.append(len(taken.samples)))
    assert take(MADE, taken, measured, math.inf) == []
    assert changes == [3, 6, 9] and json.loads(kept.read_text())["smoke"] == {"a": "agrees"}

    def broken(problem, tile):
        raise AssertionError("measured already")

    again = Taken(kept)
    assert again.samples == taken.samples and take(MADE, again, broken, math.inf) == []


def test_a_tile_that_fails_is_tried_once():
    tried = []

    def fails(problem, tile):
        tried.append((problem.name, tile.M))
        if tile.M == 128:
            return Sample(problem.family, problem.row, tuple(tile), problem.name, error="no")
        return None if tile.M == 32 else measured(problem, tile)  # one that is not for these problems

    taken = Taken()
    assert take(MADE, taken, fails, math.inf) == []
    assert [name for name, m in tried if m == 128] == [MADE[0].name]
    assert [s.tile[0] for s in taken.samples] == [128, 64, 64, 64] and len(tried) == 1 + 3 + 3


@pytest.mark.parametrize("how", [KeyboardInterrupt, RuntimeError, None], ids=["interrupted", "lost", "late"])
def test_half_a_run_loses_nothing(how, tmp_path):
    """In the middle of the second problem the run is interrupted, the card is lost, or the time is over."""
    kept, now, done = tmp_path / "kept.json", [0.0], []

    def stops(problem, tile):
        now[0] += 1
        if len(done) == 4 and how:
            raise how("illegal memory access")
        done.append((problem.name, tuple(tile)))
        return measured(problem, tile)

    changes, taken = [], Taken(kept, changed=lambda: changes.append(True))
    with pytest.raises(how) if how else contextlib.nullcontext():
        missed = take(MADE, taken, stops, 4.0 if how is None else math.inf, now=lambda: now[0])
        assert [problem.name for problem in missed] == [problem.name for problem in MADE[1:]]
    assert len([s for s in taken.samples if s.us]) == 4 and len(changes) == 2
    again = Taken(kept)
    assert again.samples == taken.samples
    assert take(MADE, again, measured, math.inf) == []
    # The tile in which the card was lost is not tried again.
    lost = [s for s in again.samples if s.error]
    assert [(s.tile, s.problem) for s in lost] == [(tuple(MADE[0].candidates[1]), MADE[1].name)] * (how is RuntimeError)
    assert len([s for s in again.samples if s.us]) == 9 - 2 * len(lost)


def entry(samples, card="Made-up GPU"):
    return tune.entry_of(samples, lambda *_: (1.0, 1.0), SMS, card)


def test_the_source_is_written_as_the_formatter_has_it(tmp_path):
    text = tune.SOURCE.read_text(encoding="utf-8")
    path = tmp_path / "measured_tiles.py"
    tune.write(path, "sm_90", entry(invented()))
    tune.write(path, "sm_80", entry(invented(0.1), "Another"))
    written = path.read_text()
    assert written.startswith(text.partition("MEASURED")[0])
    command = [sys.executable, "-m", "ruff", "format", "--diff", "--config", str(ROOT / "pyproject.toml"), str(path)]
    ruff = subprocess.run(command, capture_output=True, text=True)
    assert ruff.returncode == 0, ruff.stdout + ruff.stderr
    found = {}
    exec(written, found)
    assert list(found["MEASURED"])[-2:] == ["sm_90", "sm_80"] or "sm_90" in text
    of_90 = found["MEASURED"]["sm_90"]
    assert of_90["card"] == "Made-up GPU" and of_90["families"]["patches"]["half"] == NUMBERS
    # Another call replaces what it has measured; the rest of the same card and Triton stays.
    bad, *good = NUMBERS
    tune.write(
        path, "sm_90", entry([s for s in invented() if s.tile == bad] + [sample(bad, (9, 9))._replace(row="tf32")])
    )
    exec(path.read_text(), found)
    assert found["MEASURED"]["sm_80"]["card"] == "Another"
    assert found["MEASURED"]["sm_90"]["families"]["patches"]["half"] == NUMBERS
    assert list(found["MEASURED"]["sm_90"]["families"]["patches"]["tf32"]) == [bad]
    tune.write(path, "sm_90", entry([s for s in invented() if s.tile == bad], "A newer GPU"))
    exec(path.read_text(), found)
    assert list(found["MEASURED"]["sm_90"]["families"]["patches"]["half"]) == [bad]


@pytest.mark.parametrize("text", ["", "x = 1\n", "MEASURED = {}\nprint(MEASURED)\n", "MEASURED = {**x}\n"])
def test_a_source_that_is_none_is_refused(text):
    with pytest.raises(ValueError):
        fit.source(text, "sm_90", entry([]))


def test_what_is_read_is_what_tiles_looks_up():
    """tiles.numbers takes the written numbers of a tile, by its keys."""
    _, _, literal = fit.source("MEASURED: dict = {}\n", card.architecture(), entry(invented())).partition(" = ")
    measured = ast.literal_eval(literal)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "MEASURED", measured)
        for tile, numbers in NUMBERS.items():
            assert tiles.numbers("patches", "half", tiles.Tile(*tile)) == numbers


def test_the_report():
    samples = invented()
    slow, fast = (next(s for s in samples if s.problem == "200 x 512 x 1024" and s.tile[0] == m) for m in (128, 64))
    samples[samples.index(fast)] = fast._replace(us=0.5 * min(slow.us, fast.us))
    failed = Sample("products", "tf32", (128, 256, 32, 8, 3, 1), "4096^3", error="OutOfResources: shared memory")
    text = tune.report([*samples, failed], entry([*samples, failed]), SMS, MADE[:1])
    assert text.startswith("Tiles on Made-up GPU, ") and text.count("| 4096 x 4096 x 64 ") == 1
    assert "Left out, as they failed:\n\n- products, tf32, 128 x 256 x 32, 8 warps, 3 stages, on 4096^3: OutOf" in text
    assert f"as there was no time:\n\n- {MADE[0].name}\n" in text
    losing = [c for c in fit.choices(samples, entry(samples)["families"], SMS) if c.loss > fit.LOSS]
    assert text.count(" longer than ") == len(losing)
    nothing = tune.report([], entry([]), SMS, [])
    assert nothing.endswith("No tile was measured.\n")
    chosen = tune.report(invented(), entry(invented()), SMS, [])
    assert "0.0%" in chosen and "longer than" not in chosen and "Left out" not in chosen


def on_made_up_card(monkeypatch, measured):
    """Everything of the command but the card."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Made-up GPU")
    monkeypatch.setattr(card, "architecture", lambda: "sm_90")
    monkeypatch.setattr(card, "compile_all", lambda processes, seconds: ["a_kernel, a job: an error"])
    monkeypatch.setattr(card, "Card", lambda: types.SimpleNamespace(measured=measured))
    monkeypatch.setattr(problems, "problems", lambda: MADE)
    monkeypatch.setattr(tiles, "compute_capability", lambda: 9)


def test_the_whole_command(monkeypatch, tmp_path, capsys):
    on_made_up_card(monkeypatch, measured)
    path = tmp_path / "measured_tiles.py"
    assert tune.main(["--out", str(path), "--minutes", "1"]) == 0
    out = capsys.readouterr().out
    assert "not compiled: a_kernel" in out and out.count("| 9 x 512 x 512 ") == 1 and f"written: {path}" in out
    found = {}
    exec(path.read_text(), found)
    assert found["MEASURED"]["sm_90"]["families"]["patches"]["half"] == NUMBERS


def test_a_run_without_time_for_all_says_so(monkeypatch, tmp_path, capsys):
    on_made_up_card(monkeypatch, measured)
    monkeypatch.setattr(tune, "REPORT", 100)
    path = tmp_path / "measured_tiles.py"
    assert tune.main(["--out", str(path), "--minutes", "1"]) == 1 and not path.exists()
    out = capsys.readouterr().out
    assert "No tile was measured." in out and out.count(f"- {MADE[2].name}\n") == 1


def test_sigterm_half_way_writes_what_there_is(monkeypatch, tmp_path, capsys):
    def stopped(problem, tile):
        if problem is MADE[1]:
            os.kill(os.getpid(), signal.SIGTERM)
        return measured(problem, tile)

    on_made_up_card(monkeypatch, stopped)
    path, kept = tmp_path / "measured_tiles.py", tmp_path / "kept.json"
    assert tune.main(["--out", str(path), "--keep", str(kept)]) == 130
    out = capsys.readouterr().out
    assert "interrupted" in out and f"as there was no time:\n\n- {MADE[0].name}" in out
    assert len(Taken(kept).samples) >= 3
    found = {}
    exec(path.read_text(), found)
    assert set(found["MEASURED"]["sm_90"]["families"]["patches"]["half"]) == set(NUMBERS)


def test_without_a_gpu_there_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as e:
        tune.main(["--out", str(tmp_path / "measured_tiles.py")])
    assert e.value.code == "no GPU: python -m bench.tune measures tiles on one" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("minutes", ["0", "nan", "-1"])
def test_a_time_that_is_none_is_refused(minutes, capsys):
    with pytest.raises(SystemExit):
        tune.parse(["--minutes", minutes])
    assert "--minutes has to be more than 0" in capsys.readouterr().err


def test_problems():
    """All have names of their own, and each turn has one of every family and format that has one left."""
    found = problems.problems()
    names = [problem.name for problem in found]
    assert len(set(names)) == len(names)
    kinds = [(problem.family, problem.row) for problem in found]
    assert set(kinds) == set(itertools.product(("patches", "gradient", "products", "matrices"), ("half", "tf32")))
    assert len(set(kinds[:8])) == 8 and all(kinds.count(kind) >= 5 for kind in kinds)
    assert {problem.task for problem in found if problem.format == "tf32"} == {"forward", "weight gradient"}
    networks = {problem.subject.name.split()[1] for problem in found}
    assert {"ResNet-50", "VGG-16", "U-Net"} < networks
    assert len(warm_work.PARTS["tune"]()) == sum(len(problem.candidates) for problem in found)


def made_card(monkeypatch, works, **library):
    """A Card on a device that stands in for one, and a small problem, whose results are those of `library`."""
    ours = installed()["tritonnet"]._replace(**library)
    monkeypatch.setattr(problems, "installed", lambda: {"tritonnet": ours})
    monkeypatch.setattr(card, "FLUSHED", 1)

    @contextlib.contextmanager
    def planned():
        if not works:
            raise card.TooWide
        yield [card.Work("matrices", tuple(tile), *of_tile) for of_tile in works]

    tile = problems.problems()[3].candidates[0]
    monkeypatch.setattr(card, "planned_work", planned)
    return (
        card.Card(Clockwork()),
        problems.Problem("matrices", problems.linear(5, 4, 3), "weight gradient", "tf32"),
        tile,
    )


def test_a_tile_is_compared_and_timed(monkeypatch):
    with tritonnet.backend("reference"):
        made, problem, tile = made_card(monkeypatch, [(7, 3, 2.0, 1.0)])
        found = made.measured(problem, tile)
        assert not found.error and found[:8] == ("matrices", "tf32", tuple(tile), problem.name, 7, 3, 2.0, 1.0)
        assert found.us == card.LEAST_US  # it takes as long as the launch that does nothing
        assert made.gate and made.device.captured == 2
        made, problem, tile = made_card(monkeypatch, [(7, 3, 2.0), (8, 3, 2.0)])
        assert made.measured(problem, tile).error == "2 kinds of launches with this tile, not one"
        made, problem, tile = made_card(monkeypatch, [])
        assert made.measured(problem, tile) is None


def test_a_tile_that_computes_something_else_is_not_timed(monkeypatch):
    class Wrong(installed()["tritonnet"].gradients):
        @staticmethod
        def linear_weight_grad(dy, x, w):
            return 1.5 * dy.T @ x

    with tritonnet.backend("reference"):
        made, problem, tile = made_card(monkeypatch, [(7, 3, 2.0)], gradients=Wrong)
        found = made.measured(problem, tile)
        assert found.error.startswith("gradient 1 is off by 0.5") and found.us is None
        # Shapes after the first are only timed.
        second = problem._replace(subject=problems.linear(6, 4, 3))
        assert made.measured(second, tile).us is not None
        broken = types.SimpleNamespace(linear_weight_grad=lambda *_: 1 // 0)
        made, problem, tile = made_card(monkeypatch, [(7, 3, 2.0)], gradients=broken)
        assert made.measured(problem, tile).error == "ZeroDivisionError: integer division or modulo by zero"


@pytest.mark.thorough
def test_the_chooser_says_what_each_tile_has_to_do():
    """Every candidate of every family, on its first problem and for sm_90: one launch of the family, or too wide."""
    code = """
from bench import no_launch
from bench.measure import precision
from bench.tune import card, problems
from bench.warm.work import nothing_random
from tritonnet.kernels import tiles

with no_launch.gpu_that_does_nothing(90), nothing_random():
    for problem in problems.problems()[:8]:
        step, wide = problem.contestant("cpu").steps[problem.task][0], []
        for tile in problem.candidates:
            try:
                with precision(problem.format), tiles.only(problem.family, tile), card.planned_work() as seen:
                    step()
            except card.TooWide:
                wide.append(tile)
                continue
            (work,) = {work for work in seen if work.family == problem.family}
            assert work.tile == tuple(tile) and work.programs > 0 and work.steps > 0 and work.floor_us > 0, work
            assert (work.added_us > 0) <= (problem.task == "weight gradient"), work
        assert len(wide) < len(problem.candidates), problem.name
        print(problem.family, problem.row, len(problem.candidates), len(wide))
"""
    result = run_python("-c", code, TRITON_INTERPRET=None)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 8


def test_compiling_ends_in_time(monkeypatch):
    """Nothing runs on, and what was not compiled is no failure."""
    monkeypatch.setattr(card, "architecture", lambda: "sm_90")
    started, start = [], warm_work._start
    monkeypatch.setattr(warm_work, "_start", lambda *arguments: started.append(start(*arguments)) or started[-1])
    assert card.compile_all(2, 0.2) == []
    assert len(started) == 2 and all(process.poll() is not None for process in started)
    monkeypatch.setattr(card, "architecture", lambda: "sm_70")
    assert card.compile_all(2, 0.2) == [] and len(started) == 2

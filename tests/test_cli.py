"""The command line as a user sees it: its files, resuming without loss, and its errors."""

import functools
import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("PIL")
pytest.importorskip("rich")
from conftest import ROOT, run_python, write_mnist
from photos import photo
from PIL import Image, ImageOps

import tritonnet
from tritonnet import cli
from tritonnet.cli import bench, checkpoint, doctor, images, machine, pictures, terminal, train
from tritonnet.data import MEAN, STD, load_digits

PICTURES = ["confusion.png", "curves.png", "filters.png", "mistakes.png", "overview.png"]


def pixels(images):
    """load_digits' images as (N, 28, 28) from 0 to 1."""
    return (images[:, 0, 2:-2, 2:-2] * STD + MEAN).clamp(0, 1)


@pytest.fixture
def digits(tmp_path):
    """A folder of 200 digits to train on and 100 to test on."""
    train_x, train_y, test_x, test_y = load_digits()
    train_x, test_x = ((255 * pixels(x)).round().byte() for x in (train_x[:200], test_x[:100]))
    folder = tmp_path / "digits"
    folder.mkdir()
    write_mnist(folder, train_x, train_y[:200], test_x, test_y[:100])
    return folder


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of a command in this process, on the reference."""
    capsys.readouterr()
    chosen = ["--backend", "reference"] if arguments[:1] == ("train",) else []
    try:
        with tritonnet.backend("reference"):
            code = cli.main([str(a) for a in (*arguments, *chosen)])
    except SystemExit as e:
        code = e.code
    return code, *capsys.readouterr()


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing takes longer than training here."""
    monkeypatch.setattr(pictures, "draw", lambda *args: [])


def weights(folder):
    return torch.load(folder / "model.pt", weights_only=True)


def assert_same_run(a, b):
    """Two runs ended with the same bits: weights, every loss, every accuracy."""
    assert all(torch.equal(p, q) for p, q in zip(weights(a).values(), weights(b).values(), strict=True))
    a, b = (json.loads((folder / "metrics.json").read_text()) for folder in (a, b))
    assert a["losses"] == b["losses"] and a["confusion"] == b["confusion"]
    for epoch, twin in zip(a["epochs"], b["epochs"], strict=True):
        measured = {"seconds": 0, "images_per_second": 0}
        assert epoch | measured == twin | measured


# --- train


def test_training_writes_all_of_it(trained):
    folder, output = trained
    assert sorted(p.name for p in folder.iterdir()) == sorted([*PICTURES, "checkpoint.pt", "metrics.json", "model.pt"])
    metrics = json.loads((folder / "metrics.json").read_text())
    assert len(metrics["epochs"]) == 10 and len(metrics["losses"]) == 1250
    assert metrics["environment"]["torch"] == torch.__version__ and metrics["options"]["seed"] == 0
    confusion = torch.tensor(metrics["confusion"])
    assert confusion.sum(1).tolist() == load_digits()[3].bincount().tolist()
    assert confusion.trace() / 2000 == pytest.approx(metrics["test_accuracy"])
    assert f"{metrics['test_accuracy']:.2%}" in output and "images/s" in output and str(folder / "model.pt") in output
    for name in PICTURES:
        with Image.open(folder / name) as picture:
            # Not blank: several colours on white.
            assert min(picture.size) > 200 and len(picture.convert("RGB").getcolors(1 << 20)) > 50


INTERRUPTIONS = {
    "in the first epoch": (1, []),
    "at the end of an epoch": (4, ["--optimizer", "sgd", "--lr", "0.03"]),
    "in the last epoch": (7, ["--optimizer", "adamw", "--precision", "bfloat16", "--seed", "5"]),
}


@pytest.mark.parametrize("at, options", INTERRUPTIONS.values(), ids=INTERRUPTIONS)
def test_ctrl_c_and_resume_change_nothing(at, options, digits, tmp_path, capsys, monkeypatch, no_pictures):
    """Two epochs of 4 batches have the bits of the uninterrupted run."""
    common = ["train", "--data", digits, "--epochs", 2, "--batch-size", 60, "--device", "cpu", *options]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert run(capsys, *common, "--out", whole)[0] == 0

    class Interrupted(tritonnet.TrainStep):
        calls = 0

        def __call__(self, images, labels):
            self.calls += 1
            if self.calls == at:
                os.kill(os.getpid(), signal.SIGINT)
            return super().__call__(images, labels)

    with monkeypatch.context() as patch:
        patch.setattr(train, "TrainStep", Interrupted)
        code, _, error = run(capsys, *common, "--out", halves)
    assert code == 130 and error.splitlines()[-1] == f"tritonnet train --resume {halves}", error
    assert not (halves / "model.pt").exists()
    torch.randn(3)  # random numbers drawn in between change nothing
    assert run(capsys, "train", "--resume", halves, "--device", "cpu")[0] == 0
    assert_same_run(whole, halves)


@pytest.mark.thorough
def test_ctrl_c_from_outside(digits, tmp_path, capsys, no_pictures):
    """A process receives SIGINT while it trains, and another continues."""
    common = ["train", "--data", digits, "--epochs", 12, "--batch-size", 20, "--device", "cpu"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert run(capsys, *common, "--out", whole)[0] == 0
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tritonnet", *map(str, common), "--out", str(halves)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, env=environment, **pipes) as process:
        while not process.stdout.readline().startswith("epoch 2:"):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, error = process.communicate()
    assert process.returncode == 130 and "stopped in epoch" in error, error
    assert run(capsys, "train", "--resume", halves / "checkpoint.pt", "--device", "cpu")[0] == 0
    assert_same_run(whole, halves)


def test_an_unfinished_run_is_not_overwritten(digits, tmp_path, capsys, no_pictures):
    out = tmp_path / "out"
    common = ["train", "--data", digits, "--batch-size", 100, "--device", "cpu"]
    assert run(capsys, *common, "--epochs", 1, "--out", out)[0] == 0
    assert run(capsys, *common, "--epochs", 1, "--out", out)[0] == 0  # a finished run may be overwritten
    state = train.read_checkpoint(out / "checkpoint.pt")
    started = train.Run(state["options"], state["images"], torch.device("cpu"))
    checkpoint.save(out / "checkpoint.pt", started.state())
    code, _, error = run(capsys, *common, "--out", out)
    assert code == 2 and f"--resume {out}" in error
    code, _, error = run(capsys, "train", "--resume", out, "--epochs", 3, "--device", "cpu")
    assert code == 2 and "--epochs 3" in error and "leave --epochs out" in error


MEASURED = [(1, 1), (64, 1), (255, 1), (256, 2), (1024, 8), (10**6, 16)]


@pytest.mark.parametrize("batch, number", MEASURED)
def test_threads_follow_from_the_batch(batch, number, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert machine.threads_for(batch) == number
    for value, found in (("16", 16), ("", number), ("many", number)):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        assert machine.threads_for(batch) == found


def test_a_run_keeps_its_threads(digits, tmp_path, capsys, monkeypatch, no_pictures):
    """While it trains, and when it is resumed on another day; afterwards the process has its own number again."""

    class Watched(tritonnet.TrainStep):
        def __call__(self, images, labels):
            seen.append(torch.get_num_threads())
            if len(seen) == stop:
                os.kill(os.getpid(), signal.SIGINT)
            return super().__call__(images, labels)

    seen, stop, before = [], 2, torch.get_num_threads()
    started = []
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(train, "TrainStep", Watched)
    monkeypatch.setattr(train, "threads_for", lambda images: 2)
    monkeypatch.setattr(train, "wait_asleep", lambda: started.append(len(seen)))
    common = ["train", "--data", digits, "--batch-size", 50, "--epochs", 1, "--device", "cpu"]
    assert run(capsys, *common, "--threads", 3, "--out", tmp_path / "a")[0] == 130 and not started
    assert run(capsys, "train", "--resume", tmp_path / "a", "--device", "cpu")[0] == 0 and started == [2]
    assert seen == [3] * 4 and torch.get_num_threads() == before
    code, output, _ = run(capsys, *common, "--out", tmp_path / "b")
    assert code == 0 and seen[4:] == [2] * 4 and started == [2, 4] and "with 2 threads" in output
    assert json.loads((tmp_path / "b" / "metrics.json").read_text())["options"]["threads"] == 2
    # The process's number in torch, for runs of versions that saved none.
    assert train.settle_threads(None, {"threads": None}, 1) == before
    code, _, error = run(capsys, *common, "--threads", 5, "--out", tmp_path / "c")
    assert code == 2 and "--threads 5: this machine has 4 cores" in error and error.count("\n") == 1


@pytest.mark.parametrize("program", ["/usr/bin/tritonnet", str(ROOT / "tritonnet" / "__main__.py")])
def test_threads_that_wait_asleep_take_a_new_process(program, monkeypatch):
    """Only our commands are restarted, and only once."""
    begun = []
    monkeypatch.setattr(os, "execv", lambda *arguments: begun.append((*arguments, os.environ["OMP_WAIT_POLICY"])))
    monkeypatch.setattr(sys, "orig_argv", ["python", program, "train", "--batch-size", "512"])
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    machine.wait_asleep()
    monkeypatch.delenv("OMP_WAIT_POLICY")
    machine.wait_asleep()
    assert not begun  # the program is pytest
    monkeypatch.setattr(sys, "argv", [program, "train"])
    for _ in range(2):
        machine.wait_asleep()
    command = [sys.executable, program, "train", "--batch-size", "512"]
    assert begun == [(sys.executable, command, "passive")]


# --- predict


def test_photos_are_read_right(trained, tmp_path, capsys):
    """40 pictures of digits that are not in the training set: any colours, half of them light on dark."""
    _, _, test_x, test_y = load_digits()
    for i, digit in enumerate(pixels(test_x[:40])):
        size = [(640, 480), (480, 640), (1200, 900), (200, 200)][i % 4]
        photo(digit, i, size, light_on_dark=i % 2 == 0).save(tmp_path / f"{i:02}.{'png' if i % 3 else 'jpg'}")
    code, output, error = run(capsys, "predict", tmp_path, "--weights", trained[0] / "model.pt", "--json")
    assert code == 0, error
    results = json.loads(output)
    assert [r["file"] for r in results] == [str(p) for p in sorted(tmp_path.iterdir())]
    assert all(sum(r["probabilities"]) == pytest.approx(1) for r in results)
    right = sum(r["digit"] == y for r, y in zip(results, test_y.tolist()))
    assert right >= 38


def as_mode(mode):
    return lambda grey: grey.convert(mode)


def on_transparent(grey, value):
    picture = Image.new("RGBA", grey.size, (value, value, value, 0))
    picture.putalpha(grey)
    return picture


def coloured(grey):
    """Red on an equally light green: no difference in grey."""
    picture = Image.new("RGB", grey.size, (0, 130, 0))
    picture.paste(Image.new("RGB", grey.size, (255, 0, 0)), (0, 0), grey)
    return picture


KINDS = {
    "28 x 28": lambda grey: grey.resize((28, 28)),
    "dark on light": lambda grey: grey.point(lambda v: 255 - v),
    "cropped": lambda grey: grey.crop(grey.getbbox()),
    "palette": as_mode("P"),
    "one bit": as_mode("1"),
    "CMYK": as_mode("CMYK"),
    "16 bits": lambda grey: grey.convert("I").point(lambda v: v * 200).convert("I;16"),
    "black on transparent": lambda grey: on_transparent(grey, 0),
    "white on transparent": lambda grey: on_transparent(grey, 255),
    "red on green": coloured,
    "small in a corner": lambda grey: ImageOps.expand(grey.resize((100, 100)), (860, 580, 40, 20)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image(kind, trained, tmp_path, capsys):
    """A 3 in each form of image file."""
    digit = pixels(load_digits()[2][:1])[0]
    grey = Image.fromarray((255 * digit).byte().numpy()).resize((280, 280), Image.Resampling.BICUBIC)
    picture = KINDS[kind](grey)
    path = tmp_path / "digit.png"
    picture.save(path.with_suffix(".tif") if kind == "CMYK" else path)
    code, output, error = run(capsys, "predict", next(tmp_path.iterdir()), "--weights", trained[0] / "checkpoint.pt")
    assert code == 0, error
    assert load_digits()[3][0] == 3 and output.splitlines()[-2].split("│")[2].strip() == "3", output


def test_reading_leaves_mnist_as_it_is():
    """A digit that is prepared already comes out as MNIST has it: the same size and position."""
    digits = pixels(load_digits()[2][:20])
    read = torch.stack([images.centre(images.find_ink(digit)) for digit in digits])
    # A shift by half a pixel makes 0.07 of it.
    assert (read - digits).abs().mean() < 0.04


def test_exif_orientation(tmp_path):
    picture = Image.new("L", (60, 90), 255)
    picture.paste(0, (10, 10, 20, 80))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    picture.save(tmp_path / "a.jpg")
    picture.save(tmp_path / "b.jpg", exif=exif)
    upright, turned = (images.read_digit(tmp_path / name)[0, 0] for name in ("a.jpg", "b.jpg"))
    assert (upright > 0).any(1).sum() == 20 and (turned > 0).any(0).sum() == 20


def test_images_that_cannot_be_read(trained, tmp_path, capsys):
    weights = ["--weights", trained[0] / "model.pt"]
    Image.new("L", (50, 50), 200).save(tmp_path / "blank.png")
    (tmp_path / "text.png").write_text("no image")
    code, output, error = run(capsys, "predict", tmp_path, *weights)
    assert code == 2 and output == "" and "blank.png has no digit" in error and "text.png cannot be read" in error
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "missing"):
        code, _, error = run(capsys, "predict", path, *weights)
        assert code == 2 and error.count("\n") == 1 and str(path) in error


def test_weights_too_large_for_numbers_are_refused(trained, tmp_path, capsys):
    """Finite weights whose products overflow: no table of nan, and no NaN in the JSON."""
    torch.save({name: t * 1e36 for name, t in weights(trained[0]).items()}, tmp_path / "large.pt")
    picture = ROOT / ".github" / "photo.jpg"
    code, output, error = run(capsys, "predict", picture, "--weights", tmp_path / "large.pt", "--json")
    assert code == 2 and output == "" and error.count("\n") == 1 and "no finite numbers" in error


# --- what a terminal can show, and the wait for kernels

ODD = b"\xff.png", "ü.png".encode(), "😀.png".encode(), b"a\nb.png", b"\x1b[31m.png"


@pytest.mark.parametrize("rich", [True, False], ids=["rich", "plain"])
@pytest.mark.parametrize(
    "encoding, shown",
    [
        ("ascii", ["\\xff.png", "\\xfc.png", "\\U0001f600.png", "a\\nb.png", "\\x1b[31m.png"]),
        ("latin-1", ["\\xff.png", "ü.png", "\\U0001f600.png", "a\\nb.png", "\\x1b[31m.png"]),
        ("utf-8", ["\\xff.png", "ü.png", "😀.png", "a\\nb.png", "\\x1b[31m.png"]),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_terminal_shows_every_name_in_a_line(encoding, shown, rich, monkeypatch):
    monkeypatch.setattr(terminal, "HAS_RICH", rich)
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding=encoding))
    names = [os.fsdecode(name) for name in ODD]
    terminal.table("Files", ("name", "number"), [[name, "1"] for name in names])
    for name in names:
        terminal.say(f"read {name}")
    lines = output.getvalue().decode(encoding).splitlines()
    assert lines[-len(ODD) :] == [f"read {name}" for name in shown]
    rows = [line for line in lines if ".png" in line and not line.startswith("read")]
    assert [any(name in row for row in rows) for name in shown] == [True] * len(ODD) and len(rows) == len(ODD)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names on this system")
def test_a_pipe_in_a_folder_is_not_waited_for(trained, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.png")
    code, output, error = run(capsys, "predict", tmp_path, "--weights", trained[0] / "model.pt")
    assert code == 2 and not output and f"{tmp_path} has no images in it" in error


def test_names_of_any_bytes_are_read_and_printed(trained, tmp_path, capsys):
    grey = Image.fromarray((255 * pixels(load_digits()[2][:1])[0]).byte().numpy()).resize((84, 84))
    for name in ODD:
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as f:
            grey.save(f, "png")
    with open(os.path.join(os.fsencode(tmp_path), b"no image\n\xfe.png"), "wb") as f:
        f.write(b"no image")
    weights = ["--weights", trained[0] / "model.pt"]
    code, output, error = run(capsys, "predict", tmp_path, *weights)
    assert code == 2 and output.count(".png") == len(ODD) and error.count("\n") == 1 and "no image\\n\\xfe" in error
    code, output, _ = run(capsys, "predict", tmp_path, *weights, "--json")
    read = {os.path.basename(os.fsencode(r["file"])): r["digit"] for r in json.loads(output)}
    assert read == dict.fromkeys(ODD, 3)


def test_a_wait_is_said_if_it_is_long(capsys):
    with terminal.patience("compiling", 30):
        pass
    with terminal.patience("compiling", 0.2) as there:
        there()
        time.sleep(0.4)
    assert capsys.readouterr().out == ""
    with terminal.patience("compiling", 0.05):
        time.sleep(0.4)
    assert capsys.readouterr().out == "compiling\n"


def test_the_first_step_on_a_gpu_says_that_it_compiles(digits, tmp_path, capsys, monkeypatch, no_pictures):
    """With the CPU in the place of a GPU, and a slow step."""

    class Slow(tritonnet.TrainStep):
        def __call__(self, images, labels):
            time.sleep(0.3)
            return super().__call__(images, labels)

    def compiling(device, shown=True):
        said.append(device.type)
        return machine.compiling(torch.device("cuda"), shown)

    said = []
    monkeypatch.setattr(machine, "patience", functools.partial(terminal.patience, seconds=0.1))
    monkeypatch.setattr(train, "compiling", compiling)
    monkeypatch.setattr(train, "TrainStep", Slow)
    arguments = ["--data", digits, "--epochs", 1, "--batch-size", 200, "--device", "cpu", "--out", tmp_path]
    code, output, _ = run(capsys, "train", *arguments)
    assert code == 0 and said == ["cpu", "cpu"]
    assert output.index("a step goes by") < output.index("compiling the kernels") < output.index("epoch 1:")
    code, output, _ = run(capsys, "predict", "nowhere", "--weights", tmp_path / "model.pt")
    assert code == 2 and "compiling" not in output


# --- errors, doctor, bench

WRONG = [
    ([], "name a command: train, predict, bench, doctor"),
    (["nonsense"], "nonsense"),
    (["train", "--epochs", "0"], "at least 1, got 0"),
    (["train", "--batch-size", "many"], "whole number, got 'many'"),
    (["train", "--lr", "-1"], "positive, got -1"),
    (["train", "--seed", str(2**64)], "below 2^63"),
    (["train", "--device", "cuda:99"], "--device cuda:99"),
    (["train", "--device", "toaster"], "got 'toaster'"),
    (["train", "--device", "cpu", "--precision", "tf32"], "--precision tf32"),
    (["train", "--optimizer", "magic"], "magic"),
    (["train", "--data", "nowhere"], "--data takes the folder"),
    (["train", "--resume", "nowhere"], "no file nowhere"),
    (["train", "--out", "setup.py/x"], "--out setup.py/x"),
    (["predict"], "IMAGE"),
    (["predict", "README.md", "--weights", "README.md"], "README.md is not a checkpoint"),
]  # fmt: skip


@pytest.mark.parametrize("arguments, says", WRONG, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_errors_are_one_line(arguments, says, capsys):
    code, output, error = run(capsys, *arguments)
    assert code == 2 and output == "" and error.count("\n") == 1 and says in error, error


def test_a_loss_that_explodes_is_said(digits, tmp_path, capsys):
    arguments = ["--data", digits, "--lr", 1e20, "--optimizer", "sgd", "--device", "cpu", "--out", tmp_path / "out"]
    code, _, error = run(capsys, "train", *arguments)
    assert code == 2 and "--lr" in error and error.count("\n") == 1


@pytest.mark.thorough
def test_doctor_on_the_kernels(capsys, device):
    assert cli.main(["doctor"]) == 0
    output = capsys.readouterr().out
    assert "All is well" in output and "WRONG" not in output and "Triton kernels" in output
    rows = [[cell.strip() for cell in line.split("│")] for line in output.splitlines()]
    runs_on = {row[1]: row[2] for row in rows if len(row) > 5}
    assert all(runs_on[name].endswith(" kernels") for name in doctor.LAYERS)
    if device.type == "cpu":
        assert "because: TRITON_INTERPRET=1" in output


def test_doctor_finds_what_is_wrong(capsys, monkeypatch):
    """A layer that is off by one part in a thousand, and one that raises."""

    class Off(tritonnet.nn.Linear):
        def forward(self, input):
            return super().forward(input) * 1.001

    class Broken(tritonnet.nn.ReLU):
        def forward(self, input):
            raise RuntimeError("out of resources")

    torch_linear, size = doctor.LAYERS["Linear"][1:]
    monkeypatch.setitem(doctor.LAYERS, "Linear", (lambda: Off(400, 120), torch_linear, size))
    monkeypatch.setitem(doctor.LAYERS, "ReLU", (Broken, torch.nn.ReLU, (2, 3)))
    code, output, error = run(capsys, "doctor")
    assert code == 1 and "WRONG" in output and "Something is wrong" in output
    assert "Linear in float32" in error and "RuntimeError: out of resources" in error


def test_bench_passes_its_arguments_on(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    assert cli.main(["bench", "--quick"]) == 2
    error = capfd.readouterr().err
    assert "clone of the repository" in error and error.count("\n") == 1
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__main__.py").write_text("import sys; print(sys.argv[1:]); sys.exit(3)")
    assert cli.main(["bench", "--quick", "--help"]) == 3
    assert capfd.readouterr().out == "['--quick', '--help']\n"


WITHOUT_EXTRA = """
import sys
for name in ("rich", "matplotlib", "PIL", "tqdm"):
    sys.modules[name] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if sys.modules.get(name, 0) is None else find(name, *a)
from tritonnet.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_without_the_extra(digits, tmp_path):
    """torch alone: training works and says what it leaves out; predict says what to install."""
    out = tmp_path / "out"
    arguments = ["train", "--data", str(digits), "--epochs", "1", "--device", "cpu", "--out", str(out)]
    result = run_python("-c", WITHOUT_EXTRA, *arguments, TRITON_INTERPRET=None, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].endswith("pip install 'tritonnet[cli]'")
    assert sorted(p.name for p in out.iterdir()) == ["checkpoint.pt", "metrics.json", "model.pt"]
    result = run_python("-c", WITHOUT_EXTRA, "predict", "x.png")
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert "pip install 'tritonnet[cli]'" in result.stderr


def test_progress_bar(capsys, monkeypatch):
    """On a terminal: epoch, loss and images per second."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with terminal.progress("epoch 1/2", 3, 0, shown=True) as update:
        for _ in range(3):
            time.sleep(0.25)
            update(64, lambda: 0.1234)
    error = capsys.readouterr().err
    assert "epoch 1/2" in error and "loss 0.1234" in error and "images/s" in error


def test_closed_and_full_outputs(capsys, monkeypatch):
    """Files closed before the process starts are None in Python; a failure to write is reported once."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        patch.setattr(sys, "stderr", None)
        terminal.table("title", ("", ""), [("a", "b")])
        with terminal.progress("epoch 1/1", 1, 0, shown=True) as update:
            update(64, lambda: 0.5)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train, "train", full)
    assert run(capsys, "train") == (2, "", "tritonnet train: No space left on device\n")

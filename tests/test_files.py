"""Files that the command line reads: intact, damaged, of another kind, or malicious; and what is saved."""

import collections
import contextlib
import copy
import gzip
import io
import os
import pickle
import random
import tarfile
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy
import pytest
import torch
from conftest import write_mnist

pytest.importorskip("hypothesis")
pytest.importorskip("PIL")
import mutations
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import tritonnet
from tritonnet import cli, data
from tritonnet.cli import checkpoint, predict, resume
from tritonnet.cli.terminal import UserError

EVERY = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
READERS = {"predict": predict.load_net, "train": resume.read_checkpoint}


def refusal(read, path, error=UserError):
    """The line that refuses a file."""
    with pytest.raises(error) as caught:
        read(path)
    line = str(caught.value)
    assert path.name in line and line.isprintable(), line
    return line


def saved(path, value):
    torch.save(value, path)
    return path


def of_parts(name):
    """An original of the corpus, in parts that may be changed."""
    return mutations.copied(next(subject.value for subject in mutations.checkpoints() if subject.name == name))


# --- what is saved


@pytest.mark.parametrize("step", ["open", "write", "fsync", "replace"])
def test_a_crash_while_saving_loses_nothing(step, tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"epoch": 1})

    def crash(*args, **options):
        raise OSError(28, "No space left on device")

    class Full(io.BytesIO):
        write = crash

    with monkeypatch.context() as patch:
        if step in ("open", "write"):
            patch.setattr(Path, "open", crash if step == "open" else lambda *args: Full())
        else:
            patch.setattr(os, step, crash)
        with pytest.raises(OSError):
            checkpoint.save(path, {"epoch": 2})
    assert checkpoint.load(path) == {"epoch": 1}
    checkpoint.save(path, {"epoch": 3})
    assert checkpoint.load(path) == {"epoch": 3} and os.listdir(tmp_path) == [path.name]


# --- checkpoints: archives


def test_what_is_no_checkpoint_is_refused(tmp_path, capsys):
    """With exit code 2, one line, and nothing on stdout."""
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "other net")
    torch.save(tritonnet.LeNet(), tmp_path / "whole module")
    torch.save([1, 2], tmp_path / "list")
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").touch()
    Image.new("L", (9, 9)).save(tmp_path / "picture", "png")
    for name in (*(p.name for p in tmp_path.iterdir()), "missing", "."):
        for command in (["predict", "x.png", "--weights"], ["train", "--device", "cpu", "--resume"]):
            assert cli.main([*command, str(tmp_path / name)]) == 2
            output, error = capsys.readouterr()
            assert output == "" and error.count("\n") == 1 and error.startswith(f"tritonnet {command[0]}: "), error


def overlapping(content):
    """A thousand members that share one member's bytes and are together longer than the file."""
    new = io.BytesIO()
    with zipfile.ZipFile(new, "w") as archive:
        archive.writestr("archive/data.pkl", bytes(10**6))
        first = archive.infolist()[0]
        for i in range(1000):
            member = copy.copy(first)
            member.filename = f"archive/{i}"
            archive.filelist.append(member)
            archive.NameToInfo[member.filename] = member
    return new.getvalue()


ARCHIVES = {
    "cut off": (lambda content: content[: len(content) // 2], "is damaged or cut off"),
    "damaged": (
        lambda content: content.replace(b"conv1.weight", b"conv1.weighs"),
        "is damaged (in 'archive/data.pkl')",
    ),
    "deflated": (lambda content: mutations.archive(mutations.members(content), zipfile.ZIP_DEFLATED), "is compressed"),
    "of LZMA": (lambda content: mutations.archive(mutations.members(content), zipfile.ZIP_LZMA), "is compressed"),
    "encrypted": (lambda content: mutations.encrypt(random.Random(0), content, 1), "compressed or encrypted"),
    "overlapping": (overlapping, "compressed or encrypted"),
    "after other bytes": (lambda content: b"GIF89a" + content, "is not a checkpoint"),
    "large": (lambda content: content, "is not a checkpoint of LeNet"),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_archives_of_other_kinds(kind, tmp_path, monkeypatch):
    change, says = ARCHIVES[kind]
    path = tmp_path / "model.pt"
    content = mutations.saved(tritonnet.LeNet().state_dict())
    path.write_bytes(change(content))
    if kind == "large":
        monkeypatch.setattr(checkpoint, "LARGEST", len(content) - 1)
    for read in READERS.values():
        assert says in refusal(read, path)


class Harmful(torch.nn.Module):
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def __setstate__(self, state):
        os.mkdir(state["folder"])


def harmful(folder):
    """Files that make `folder` when all of their instructions are followed, by kind."""
    made = mutations.Made(os.mkdir, (folder,))
    old, tar = io.BytesIO(), io.BytesIO()
    torch.save(made, old, _use_new_zipfile_serialization=False)
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            content = pickle.dumps(made, 2)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    weights = tritonnet.LeNet().state_dict()
    script = [*mutations.members(mutations.saved(made)), ("archive/constants.pkl", pickle.dumps(made, 2))]
    return {
        "a call": mutations.saved(made),
        "eval": mutations.saved(mutations.Made(eval, (f"__import__('os').mkdir({folder!r})",))),
        "a weight": mutations.saved(weights | {"fc1.bias": made}),
        "a name": mutations.saved({**weights, made: 0}),
        "an option": mutations.saved(of_parts("checkpoint.pt") | {"options": made}),
        "a module": mutations.saved(Harmful(folder)),
        "an array": mutations.saved(numpy.array([made], dtype=object)),
        "before 1.6": old.getvalue(),
        "before 1.6, then an archive": old.getvalue() + mutations.saved(weights),
        "before 0.2": tar.getvalue(),
        "a pickle": pickle.dumps(made, 2),
        "TorchScript": mutations.archive(script),
    }


def do_all(path):
    """Reads a file with every reader that follows its instructions."""
    for read in (
        lambda: torch.load(path, weights_only=False),
        lambda: pickle.loads(path.read_bytes()),
        lambda: pickle.loads(dict(mutations.members(path.read_bytes()))["archive/data.pkl"]),
    ):
        with contextlib.suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read()


def test_nothing_that_a_file_asks_for_is_done(tmp_path):
    folder, path = tmp_path / "made", tmp_path / "model.pt"
    for kind, content in harmful(str(folder)).items():
        path.write_bytes(content)
        for read in READERS.values():
            refusal(read, path)
            assert not folder.exists(), kind
        do_all(path)
        assert folder.exists(), kind
        folder.rmdir()


def test_what_a_file_holds_beside_tensors_is_named(tmp_path):
    assert "'tritonnet.lenet.LeNet'" in refusal(predict.load_net, saved(tmp_path / "net.pt", tritonnet.LeNet()))
    # torch searches its message for words in a time that is quadratic in a name's length.
    long = mutations.archive([("archive/data.pkl", b"\x80\2c" + b"x" * 10**6 + b"\nx\n.")])
    (tmp_path / "long.pt").write_bytes(long)
    refusal(predict.load_net, tmp_path / "long.pt")


# --- checkpoints: weights

TENSORS = {
    "none": (lambda t: None, "is None, not a dense tensor"),
    "a list": (lambda t: t.tolist(), "is a list, not a dense tensor"),
    "meta": (lambda t: t.to("meta"), "not a dense tensor"),
    "sparse": (lambda t: t.to_sparse(), "not a dense tensor"),
    "CSR": (lambda t: t.view(12, 10).to_sparse_csr(), "not a dense tensor"),
    "nested": (lambda t: torch.nested.nested_tensor([t, t]), "not a dense tensor"),
    "quantized": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.quint8), "not a dense tensor"),
    "complex": (lambda t: t.to(torch.complex64), "is torch.complex64, not torch.float32"),
    "of 8 bits": (lambda t: t.to(torch.float8_e5m2), "is torch.float8_e5m2, not torch.float32"),
    "whole numbers": (lambda t: t.long(), "is torch.int64, not torch.float32"),
    "of another shape": (lambda t: t[:7], "is of shape [7], not [120]"),
    "wide": (lambda t: t[:1].expand(10**12, 120), "is of shape [1000000000000, 120], not [120]"),
    "NaN": (lambda t: t.index_fill(0, torch.tensor(5), float("nan")), "not finite"),
    "infinite": (lambda t: t.index_fill(0, torch.tensor(5), float("inf")), "not finite"),
    "beyond float32": (lambda t: t.double() + 1e300, "not finite"),
}


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.filterwarnings("ignore")  # torch warns as it makes them
def test_weights_of_other_kinds(kind, tmp_path):
    change, says = TENSORS[kind]
    weights = tritonnet.LeNet().state_dict()
    path = saved(tmp_path / "model.pt", weights | {"fc1.bias": change(weights["fc1.bias"])})
    line = refusal(predict.load_net, path)
    assert "state_dict['fc1.bias'] is" in line or "state_dict['fc1.bias'] has" in line
    assert says in line


EQUAL = {
    "float16": lambda t: t.half(),
    "bfloat16": lambda t: t.bfloat16(),
    "float64": lambda t: t.double(),
    "parameters": torch.nn.Parameter,
    "expanded": lambda t: t.new_ones(()).expand(t.shape),
    "negated": torch._neg_view,
    "in another order": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "with other methods": mutations.odd_tensor,
}


@pytest.mark.parametrize("kind", EQUAL)
def test_weights_in_other_forms(kind, tmp_path):
    weights = tritonnet.LeNet().state_dict()
    given = {name: EQUAL[kind](t) for name, t in weights.items()}
    net = predict.load_net(saved(tmp_path / "model.pt", mutations.odd_dict(given) if "other" in kind else given))
    for name, t in net.state_dict().items():
        expected = weights[name] if kind == "with other methods" else given[name]
        assert t.dtype == torch.float32 and t.is_contiguous() and torch.equal(t, expected.float())


def test_weights_of_nets_in_wrappers(tmp_path):
    """Names as DataParallel, DistributedDataParallel and torch.compile make them, nested in any order."""
    weights, path = tritonnet.LeNet().state_dict(), tmp_path / "model.pt"
    assert list(torch.nn.DataParallel(tritonnet.LeNet()).state_dict()) == ["module." + name for name in weights]
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."):
        found = collections.OrderedDict((prefix + name, t) for name, t in weights.items())
        for value in (found, {"model": found, "epoch": 3}, {"state_dict": found}):
            net = predict.load_net(saved(path, value))
            assert all(torch.equal(t, weights[name]) for name, t in net.state_dict().items())
        some = {(name if name == "fc3.bias" else prefix + name): t for name, t in weights.items()}
        assert "state_dict has no 'conv1.weight'" in refusal(predict.load_net, saved(path, some))


def test_other_nets_are_told_apart(tmp_path):
    def line(net):
        return refusal(predict.load_net, saved(tmp_path / "model.pt", net.state_dict()))

    assert "has 26 classes, not 10" in line(tritonnet.LeNet(26))
    assert "has 26 classes, not 10" in line(torch.nn.DataParallel(tritonnet.LeNet(26)))
    assert "state_dict['conv1.weight'] is of shape [6, 3, 5, 5], not [6, 1, 5, 5]" in line(tritonnet.LeNet(26, 3))
    deeper = tritonnet.LeNet()
    deeper.fc4 = torch.nn.Linear(10, 10)
    assert "state_dict has an unknown 'fc4.weight'" in line(deeper)
    del deeper.fc1, deeper.fc4
    assert "state_dict has no 'fc1.weight'" in line(deeper)


# --- checkpoints: runs

GONE = object()
CHANGES = [
    (("options",), GONE), (("options",), [1]), (("options", "epochs"), 0), (("options", "epochs"), 2.0),
    (("options", "epochs"), True), (("options", "epochs"), 10**30), (("options", "batch_size"), GONE),
    (("options", "optimizer"), "magic"), (("options", "optimizer"), ["adam"]), (("options", "lr"), float("nan")),
    (("options", "lr"), -1.0), (("options", "lr"), "1"), (("options", "precision"), "float8"),
    (("options", "seed"), -1), (("options", "processes"), 0), (("options", "data"), 5),
    (("options", "data"), "two\nlines"), (("images",), 0), (("images",), "12"), (("epoch",), 0), (("epoch",), 1.0),
    (("epoch",), None), (("losses",), (2.0,) * 5), (("losses",), [1.0] * 2), (("losses",), [1.0] * 7),
    (("losses",), [1] * 5), (("losses", 3), float("nan")), (("losses", 3), torch.tensor(1.0)), (("seconds",), -1.0),
    (("seconds",), float("inf")), (("history",), []), (("history", 0), {}), (("history", 0, "epoch"), 2),
    (("history", 0, "test_accuracy"), 1.5), (("history", 0, "seconds"), 0.0), (("history", 0, "test_loss"), None),
    (("random",), GONE), (("random",), torch.zeros(5056)), (("random",), torch.full((5056,), 255, dtype=torch.uint8)),
    (("random",), torch.zeros(16, dtype=torch.uint8)), (("model", "fc1.bias"), torch.zeros(120).half()),
    (("model", "fc1.bias"), torch.full((120,), float("nan"))), (("model", "fc4.bias"), torch.zeros(3)),
    (("optimizer",), [1]), (("optimizer", "state"), GONE), (("optimizer", "state", 3), GONE),
    (("optimizer", "state", 10), {}), (("optimizer", "state", 3, "exp_avg"), GONE),
    (("optimizer", "state", 3, "exp_avg"), torch.zeros(16).double()),
    (("optimizer", "state", 3, "exp_avg_sq"), torch.full((16,), -1.0)),
    (("optimizer", "state", 3, "step"), torch.tensor(4.0)), (("optimizer", "state", 3, "step"), 5.0),
    (("optimizer", "state", 3, "momentum_buffer"), torch.zeros(16)),
]  # fmt: skip


@pytest.mark.parametrize("place, value", CHANGES, ids=lambda v: "-".join(map(str, v)) if isinstance(v, tuple) else "")
def test_runs_that_cannot_be_gone_on_with(place, value, tmp_path):
    state = of_parts("checkpoint.pt")
    *way, last = place
    inside = state
    for key in way:
        inside = inside[key]
    if value is GONE:
        del inside[last]
    else:
        inside[last] = value
    line = refusal(resume.read_checkpoint, saved(tmp_path / "checkpoint.pt", state))
    assert "holds no run to go on with" in line and str(place[0]) in line, line


def loaded(state):
    """A run that continues from a state, after its checks."""
    state = resume.checked_state(state)
    run = resume.Run(state["options"], state["images"], torch.device("cpu"))
    run.load(state)
    return run


@pytest.mark.parametrize("name", ["checkpoint.pt", "finished.pt"])
def test_the_schedule_follows_from_the_steps(name):
    """Whatever a file says about it; older files contain it, too."""
    state = of_parts(name)
    run, odd = loaded(state), copy.deepcopy(state)
    odd["schedule"] = {"last_epoch": 10**9, "step": "odd"}
    odd["optimizer"]["param_groups"] = [{"lr": "odd", "params": [1]}]
    assert loaded(odd).optimizer.param_groups[0]["lr"] == run.optimizer.param_groups[0]["lr"]
    whole = resume.Run(state["options"], state["images"], torch.device("cpu"))
    for steps in range(7):
        jumped = resume.Run(state["options"], state["images"], torch.device("cpu"))
        jumped.schedule = jumped.schedule_after(steps)
        groups = [run.optimizer.state_dict()["param_groups"] for run in (whole, jumped)]
        assert groups[0] == groups[1] and whole.schedule.get_last_lr() == jumped.schedule.get_last_lr()
        if steps < 6:
            mutations.take_step(whole)


def test_what_is_loaded_shares_no_memory():
    """Updates are in place, and a file may have one tensor for two moments."""
    state = of_parts("checkpoint.pt")
    kept = state["optimizer"]["state"][1]
    kept["exp_avg"] = kept["exp_avg_sq"] = torch.ones(()).expand(6)
    run = loaded(state)
    mutations.take_step(run)
    moments = run.optimizer.state_dict()["state"][1]
    assert not torch.equal(moments["exp_avg"], moments["exp_avg_sq"]) and kept["exp_avg"].unique() == 1


def test_a_damaged_checkpoint_in_the_way(tmp_path, capsys):
    (tmp_path / "checkpoint.pt").write_bytes(b"PK\3\4")
    assert cli.main(["train", "--device", "cpu", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "a new run needs another --out" in error


# --- any value at any position

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.binary(max_size=3)
values = st.recursive(
    scalars | st.sampled_from([torch.ones(()), torch.zeros(6)]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalars, inner, max_size=3) | st.tuples(inner),
    max_leaves=5,
)


@EVERY
@given(i=st.integers(0, 10**6), k=st.integers(0, 10**6), value=values)
def test_any_value_in_a_run(i, k, value):
    state = of_parts("checkpoint.pt")
    found = list(mutations.containers(state))
    inside = found[i % len(found)]
    keys = list(inside) if isinstance(inside, dict) else range(len(inside))
    inside[keys[k % len(keys)]] = value
    with contextlib.suppress(checkpoint.Unfit):
        loaded(state)


# --- IDX files


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
ZEROS = gzip.compress(bytes(2**26))


@pytest.fixture
def digits(tmp_path):
    """A folder of 12 digits to train on and to test on."""
    images, labels = torch.randint(256, (12, 28, 28)), torch.arange(12) % 10
    write_mnist(tmp_path, images, labels, images, labels)
    return tmp_path


# What replaces a file's content, and what the message says.
IDX = {
    "nothing": (IMAGES, lambda content: b"", "starts with nothing"),
    "a picture": (IMAGES, lambda content: b"GIF89a", "starts with 47 49 46 38"),
    "floats": (IMAGES, lambda content: content[:2] + b"\x0d" + content[3:], "starts with 00 00 0d 03"),
    "no dimensions": (LABELS, lambda content: b"\0\0\x08\0\5", "one to three dimensions, as MNIST's files have, got 0"),
    "255 dimensions": (IMAGES, lambda content: content[:3] + b"\xff" + content[4:], "got 255"),
    "half a header": (IMAGES, lambda content: content[:10], "ends before the sizes of its 3 dimensions"),
    "no images": (IMAGES, lambda content: mutations.idx(0, 28, 28), "holds nothing: its sizes are [0, 28, 28]"),
    "no pixels": (IMAGES, lambda content: mutations.idx(12, 28, 0), "holds nothing: its sizes are [12, 28, 0]"),
    "a byte too few": (IMAGES, lambda content: content[:-1], "should hold 9408 bytes for [12, 28, 28], got 9407"),
    "a byte too many": (IMAGES, lambda content: content + b"\0", "should hold 9408 bytes for [12, 28, 28], got more"),
    "wide images": (IMAGES, lambda content: mutations.idx(12, 28, 29), "images (N, 28, 28), got (12, 28, 29)"),
    "labels as images": (IMAGES, lambda content: mutations.idx(12), "images (N, 28, 28), got (12,)"),
    "large sizes": (IMAGES, lambda content: content[:4] + b"\xff" * 12 + content[16:], "at most 1 GiB"),
    "no labels": (LABELS, lambda content: mutations.idx(0), "holds nothing: its sizes are [0]"),
    "images as labels": (LABELS, lambda content: mutations.idx(12, 1), "labels (N,), got (12, 1)"),
    "fewer labels": (LABELS, lambda content: mutations.idx(11), "has 12 images, but train-labels-idx1-ubyte has 11"),
    "a label of 10": (LABELS, lambda content: content[:-1] + b"\n", "should hold digits, got the label 10"),
}
GZIP = {
    "no gzip file": (lambda content: content, "is not a gzip file"),
    "nothing": (lambda content: b"", "starts with nothing"),
    "cut off": (lambda content: gzip.compress(content)[:-20], "ended before the end-of-stream marker"),
    "damaged": (lambda content: gzip.compress(content)[:-8] + bytes(8), "CRC check failed"),
    "bits flipped": (lambda content: gzip.compress(content)[:10] + b"\xff" * 30, "while decompressing"),
    "more after it": (lambda content: gzip.compress(content) + b"more", "Not a gzipped file"),
    "a bomb": (lambda content: gzip.compress(content) + ZEROS, "should hold 9408 bytes for [12, 28, 28], got more"),
}


@pytest.mark.parametrize("zipped", [False, True], ids=["", "gz"])
@pytest.mark.parametrize("kind", IDX)
def test_bad_idx_files_are_named(kind, zipped, digits):
    name, change, says = IDX[kind]
    path = digits / name
    content = change(path.read_bytes())
    path.unlink()
    path.with_name(name + ".gz" * zipped).write_bytes(gzip.compress(content) if zipped else content)
    line = refusal(lambda path: data.load_digits(digits), digits, ValueError)
    assert says in line and (name in line or IMAGES in line), line


@pytest.mark.parametrize("kind", GZIP)
def test_bad_gzip_files_are_named(kind, digits):
    """And unpacked no further than their header says."""
    change, says = GZIP[kind]
    path = digits / IMAGES
    path.with_name(IMAGES + ".gz").write_bytes(change(path.read_bytes()))
    path.unlink()
    tracemalloc.start()
    line = refusal(lambda path: data.load_digits(digits), digits, ValueError)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert says in line and IMAGES + ".gz" in line and peak < 2**20, line


def test_idx_files_that_cannot_be_opened(digits, monkeypatch, capsys):
    path = digits / IMAGES

    class Broken(io.BytesIO):
        def read(self, *args):
            raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda *args: Broken())
        assert "cannot be read: Input/output error" in refusal(data.read_idx, path, ValueError)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=IMAGES):
        data.load_digits(digits)
    path.mkdir()
    assert "is not a file, but a folder" in refusal(data.read_idx, path, ValueError)
    assert cli.main(["train", "--device", "cpu", "--data", str(digits), "--out", str(digits / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{path} is not a file" in error


@EVERY
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3), zipped=st.booleans(), data_=st.data())
def test_any_idx_file(sizes, zipped, data_, tmp_path):
    """Read as it was written; a part of it, or more than it, is refused."""
    content = mutations.idx(*sizes)
    path = tmp_path / "any"
    file = tmp_path / ("any" + ".gz" * zipped)
    other = tmp_path / ("any" + ".gz" * (not zipped))
    other.unlink(missing_ok=True)

    def write(content):
        file.write_bytes(gzip.compress(content) if zipped else content)

    write(content)
    assert data.read_idx(path).shape == tuple(sizes) and bytes(data.read_idx(path).flatten().tolist()) in content
    write(content[: data_.draw(st.integers(0, len(content) - 1))])
    refusal(data.read_idx, path, ValueError)
    write(content + data_.draw(st.binary(min_size=1, max_size=9)))
    refusal(data.read_idx, path, ValueError)


# --- mutations of all of these files


@pytest.mark.parametrize("kind", mutations.CORPUS)
def test_a_sample_of_mutations(kind, tmp_path):
    """`python -m tests.mutations` makes any number of them."""
    subjects = mutations.corpus(kind)
    for i, subject in enumerate(subjects):
        (tmp_path / f"whole{i}").mkdir()
        assert mutations.outcome(subject, subject.content, tmp_path / f"whole{i}") == "read"
    for seed in range(150):
        subject, name, result = mutations.trial(subjects, seed, tmp_path)
        assert not isinstance(result, mutations.Fault), f"--seed {seed} --only {kind}: {subject}, {name}: {result}"

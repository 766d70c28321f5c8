"""Damaged files of every kind that the command line reads: each is read as if it were in order, or refused in one line.

    python -m tests.mutations --count 3000 --seed 0 --only checkpoint.pt

Each seed makes one file. Any other outcome is printed and the file is kept, even if the process crashes or hangs on it;
its seed with --count 1 makes it again. The exit code is then 1.
"""

import argparse
import collections
import contextlib
import dataclasses
import faulthandler
import functools
import gzip
import io
import math
import os
import pickletools
import random
import re
import resource
import shutil
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from tritonnet import data
from tritonnet.cli import checkpoint, predict, resume
from tritonnet.cli.terminal import UserError

# Limits of processor time and memory for reading one of these small files, and the time after which a process hangs.
SECONDS, BYTES, HANG = 5, 2**30, 300
SUFFIXES = "png", "jpg", "gif", "bmp", "tif", "webp", "ppm", "tga", "ico", "pcx"


class Fault(Exception):
    """Reading a file did something that it must not do."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A file that is in order.

    Attributes:
        name: of the file.
        content: of it.
        read: reads it, given its path, and raises Fault if what comes out is not sane.
        refusals: exceptions by which it may refuse.
        value: what torch.save has made it of.
        beside: contents of the other files that it needs, by name.
    """

    name: str
    content: bytes
    read: Callable
    refusals: tuple = (UserError,)
    value: object = None
    beside: dict = dataclasses.field(default_factory=dict)


def expect(condition, what):
    if not condition:
        raise Fault(what)


# --- files in order, and how they are read


def read_weights(path):
    net = predict.load_net(path)
    expect(all(p.dtype == torch.float32 and p.isfinite().all() for p in net.parameters()), "weights that are none")


def read_run(path):
    state = resume.read_checkpoint(path)
    run = resume.Run(state["options"], state["images"], torch.device("cpu"))
    run.load(state)
    expect(run.schedule.last_epoch == len(run.losses), "a schedule that is elsewhere")
    resume.checked_state(run.state())  # whatever is loaded can be saved again
    if len(run.losses) < run.options["epochs"] * run.steps:
        take_step(run)


def read_folder(path):
    images, labels, *_ = data.load_digits(path.parent)
    expect(images.shape == (len(labels), 1, 32, 32) and len(labels) and images.isfinite().all(), "images that are none")
    expect(0 <= labels.min() and labels.max() <= 9, "labels that are none")


def read_picture(path):
    from tritonnet.cli.images import read_digit  # needs Pillow

    digit = read_digit(path)
    expect(digit.shape == (1, 1, 32, 32) and digit.dtype == torch.float32 and digit.isfinite().all(), "no digit")


def take_step(run):
    for parameter in run.net.parameters():
        parameter.grad = torch.full_like(parameter, 0.01)
    run.optimizer.step()
    run.schedule.step()


def saved(value):
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def checkpoints():
    """Weights; a run with Adam in its second epoch; and a finished one with SGD."""
    for name, optimizer, steps in (("checkpoint.pt", "adam", 5), ("finished.pt", "sgd", 6)):
        options = {
            "epochs": 2, "batch_size": 4, "optimizer": optimizer, "lr": 1e-3, "precision": "float32", "seed": 0,
            "processes": 1, "data": "digits",
        }  # fmt: skip
        run = resume.Run(options, 12, torch.device("cpu"))
        for _ in range(steps):
            take_step(run)
        run.epoch, run.losses, run.seconds = steps // 3, [2.5 - 0.1 * i for i in range(steps)], 0.5
        measured = {"train_loss": 2.0, "test_loss": 2.1, "test_accuracy": 0.5, "seconds": 1.5, "images_per_second": 8.0}
        run.history = [{"epoch": i + 1, **measured} for i in range(run.epoch)]
        yield Subject(name, saved(run.state()), read_run, value=run.state())
    value = run.net.state_dict()
    yield Subject("model.pt", saved(value), read_weights, value=value)


def idx(*sizes):
    numbers = bytes(7 * i % 10 for i in range(math.prod(sizes)))
    return struct.pack(f">HBB{len(sizes)}I", 0, 8, len(sizes), *sizes) + numbers


def digits():
    """Each kind of MNIST's files, gzipped and not, beside the other three."""
    names = [name for names in data._FILES.values() for name in names]
    folder = {name: idx(12, 28, 28) if "images" in name else idx(12) for name in names}
    for name in data._FILES["train"]:
        beside = {other: content for other, content in folder.items() if other != name}
        for subject, content in ((name, folder[name]), (name + ".gz", gzip.compress(folder[name], mtime=0))):
            yield Subject(subject, content, read_folder, (ValueError, FileNotFoundError), beside=beside)


def pictures():
    """A stroke on paper in each format."""
    from PIL import Image, ImageDraw

    for i, suffix in enumerate(SUFFIXES):
        picture = Image.new(("RGB", "L", "RGB")[i % 3], (48, 40), "white")
        ImageDraw.Draw(picture).line([(24, 8), (22, 31)], "black", 4)
        content = io.BytesIO()
        picture.save(content, Image.registered_extensions()["." + suffix])
        yield Subject("picture." + suffix, content.getvalue(), read_picture)
    for compression in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg"):  # libtiff unpacks these
        content = io.BytesIO()
        picture.save(content, "tiff", compression=compression)
        yield Subject(f"{compression}.tif", content.getvalue(), read_picture)


CORPUS = {"checkpoints": checkpoints, "digits": digits, "pictures": pictures}


# --- mutations of bytes: functions of a random generator and the content


def place(r, content):
    """A position, most often in the first or last bytes, which say what the others mean."""
    near = r.randrange(min(r.choice([20, 600]), len(content)) + 1)
    return r.choice([near, len(content) - near, r.randrange(len(content) + 1)])


def part(r, content):
    start = place(r, content)
    return start, min(len(content), start + r.choice([1, 2, 4, 8, 60, 3000]))


def flip_bits(r, content):
    changed = bytearray(content)
    for _ in range(r.choice([1, 1, 2, 8, 40])):
        if i := place(r, content):
            changed[i - 1] ^= 1 << r.randrange(8)
    return bytes(changed)


def cut_off(r, content):
    return content[: place(r, content)]


def leave_out(r, content):
    start, end = part(r, content)
    return content[:start] + content[end:]


def insert(r, content):
    at, length = place(r, content), r.choice([1, 2, 4, 100, 70_000])
    return content[:at] + r.choice([r.randbytes(length), bytes(length), b"\xff" * length]) + content[at:]


def repeat(r, content):
    start, end = part(r, content)
    return content[:end] + content[start:end] * r.choice([1, 2, 50]) + content[end:]


def swap(r, content):
    (a, b), (c, d) = sorted([part(r, content), part(r, content)])
    return content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]


def overwrite(r, content):
    """An integer of one to eight bytes becomes an extreme value, or one more or less."""
    size, order = r.choice([1, 2, 4, 8]), r.choice(["little", "big"])
    at = min(place(r, content), max(0, len(content) - size))
    most = 256**size
    number = int.from_bytes(content[at : at + size], order)
    number = r.choice([0, 1, most - 1, most // 2, most // 2 - 1, number + 1, number - 1, 2 * number]) % most
    return content[:at] + number.to_bytes(size, order) + content[at + size :]


BYTES_CHANGED = flip_bits, cut_off, leave_out, insert, repeat, swap, overwrite


def some_bytes(r, content):
    for _ in range(r.choice([1, 1, 1, 2, 3])):
        content = r.choice(BYTES_CHANGED)(r, content)
    return content


# --- mutations of archives, with correct checksums, so that torch reads them


def members(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def archive(parts, compression=zipfile.ZIP_STORED):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as new:
        for name, inside in parts:
            new.writestr(name, inside)
    return content.getvalue()


def change_member(r, content):
    """Changes bytes of a member, most often of the pickle."""
    parts = members(content)
    pickles = [i for i, (name, _) in enumerate(parts) if name.endswith("data.pkl")]
    i = r.choice(pickles * 3 + [r.randrange(len(parts))])
    parts[i] = parts[i][0], some_bytes(r, parts[i][1])
    return archive(parts)


def change_instruction(r, content):
    """One to three instructions of the pickle are replaced or dropped."""
    parts = members(content)
    i = next(i for i, (name, _) in enumerate(parts) if name.endswith("data.pkl"))
    changed = bytearray(parts[i][1])
    positions = [at for _, _, at in pickletools.genops(parts[i][1])]
    for at in sorted(r.sample(positions, r.choice([1, 1, 2, 3])), reverse=True):
        changed[at : at + 1] = r.choice([b"", *(op.code.encode("latin-1") for op in pickletools.opcodes)])
    parts[i] = parts[i][0], bytes(changed)
    return archive(parts)


def change_members(r, content):
    """A member is dropped, renamed, replaced or repeated; all may be compressed."""
    parts = members(content)
    i = r.randrange(len(parts))
    name, inside = parts[i]
    other = r.choice(["x", "/etc/x", "../x", "archive/data/0", name.upper(), name + "\n", "archive/constants.pkl"])
    parts[i : i + 1] = r.choice(
        [
            [],
            [(other, inside)],
            [(name, inside), (r.choice(["archive/.format_version", "archive/constants.pkl", "x"]), inside[:8])],
            [(name, b"")],
            [(name, inside + inside)],
            [(name, parts[r.randrange(len(parts))][1])],
        ]
    )
    compression = r.choice([zipfile.ZIP_STORED] * 4 + [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    return archive(parts, compression)


def encrypt(r, content, share=0.7):
    """Sets the flag for encryption in some of the headers."""
    changed = bytearray(content)
    for header in re.finditer(b"PK(\1\2|\3\4)", content):
        if r.random() < share:
            changed[header.start() + (8 if header[1] == b"\1\2" else 6)] |= 1
    return bytes(changed)


# --- mutations of values, saved by torch.save


def odd_tensors(like):
    """Functions without arguments that make tensors of every kind, first those that `like` can be converted to."""
    plain = like.detach().clone()
    number = plain.float()
    return [
        lambda: plain.double(), lambda: plain.half(), lambda: plain.bfloat16(), lambda: plain.long(), lambda: plain > 0,
        lambda: number.to(torch.complex64), lambda: torch.full_like(number, float("nan")),
        lambda: torch.full_like(number, -1.0), lambda: plain.new_zeros(()).expand(plain.shape),
        lambda: plain[..., None], lambda: plain.flatten()[:-1], lambda: plain.new_empty(0), lambda: plain.to("meta"),
        lambda: number.flatten().flip(0).view(plain.shape), lambda: number.to_sparse(),
        lambda: torch.eye(3).to_sparse_csr(), lambda: torch.quantize_per_tensor(number, 0.1, 0, torch.quint8),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), lambda: torch.nn.Parameter(number),
        lambda: torch._neg_view(number), lambda: odd_tensor(number), lambda: plain.new_zeros(()).expand(10**9, 4),
        lambda: number.transpose(0, -1).contiguous().transpose(0, -1) if plain.dim() else number,
        lambda: number.to(torch.float8_e4m3fn), lambda: number.index_fill(0, torch.tensor(0), float("inf"))
        if plain.dim() else torch.tensor(float("inf")),
    ]  # fmt: skip


class Made:
    """An object that a pickle makes by a call, from the parts that __reduce__ returns."""

    def __init__(self, *parts):
        self.parts = parts

    def __reduce__(self):
        return self.parts


# Methods, hidden by these attributes of an object.
HIDDEN = dict.fromkeys(("to", "detach", "clone", "isfinite", "items", "keys", "get", "_metadata"), "odd")


def odd_tensor(value):
    """A tensor whose attributes hide its methods."""
    rebuild, arguments = value.__reduce_ex__(2)
    return Made(torch._tensor._rebuild_from_type_v2, (rebuild, torch.Tensor, arguments, HIDDEN))


def odd_dict(value):
    """A dict whose attributes hide its methods."""
    return Made(collections.OrderedDict, (), HIDDEN, None, iter(value.items()))


def odd_values():
    itself = []
    itself.append(itself)
    return [
        None, True, False, -1, 0, 1, 7, 2**31, 2**63, 10**600, 0.0, -0.5, 1e300, 5e-324, float("nan"), float("inf"), "",
        "adam", "two\nlines", "\0", "\x1b[2J", "x" * 10**5, "\udcff", b"bytes", [], {}, (), set(), [[]], itself, 1j,
        [0.5], [1] * 5, {0: {}}, torch.Size([2]), torch.device("meta"), torch.float32, torch.tensor(1.0),
        collections.OrderedDict(a=1), odd_dict({'a': 1}), collections.Counter("aab"),
        bytearray(3), torch.UntypedStorage(8),
    ]  # fmt: skip


def copied(value):
    """A copy of the dicts and lists of a value."""
    if isinstance(value, dict):
        return {key: copied(entry) for key, entry in value.items()}
    return [copied(entry) for entry in value] if isinstance(value, list) else value


def containers(value):
    """Every dict and list in a value, the value included."""
    if isinstance(value, (dict, list)):
        yield value
        for entry in value.values() if isinstance(value, dict) else value:
            yield from containers(entry)


def change_value(r, value):
    """An entry somewhere in the value is replaced, dropped, renamed or copied."""
    value = copied(value)
    found = list(containers(value))
    for _ in range(r.choice([1, 1, 2])):
        inside = r.choice([container for container in found if container])
        key = r.choice(list(inside)) if isinstance(inside, dict) else r.randrange(len(inside))
        entry = inside[key]
        # Only tensors that no earlier mutation has turned into another kind.
        if checkpoint.shape_of(entry) is not None and entry.dtype in (torch.float32, torch.uint8) and r.random() < 0.7:
            inside[key] = r.choice(odd_tensors(entry))()
        elif r.random() < 0.6:
            inside[key] = r.choice(odd_values())
        elif r.random() < 0.5 or isinstance(inside, list):
            del inside[key]
        else:
            inside[r.choice(["module." + str(key), 3, None, (), "odd", "x\ny", torch.ones(2)])] = entry
            if r.random() < 0.5:
                del inside[key]
    return saved(value)


def wrap_value(r, value):
    """Wraps the whole value, or replaces it."""
    prefix = r.choice(["module.", "_orig_mod.", "module._orig_mod.", "net."])
    prefixed = {prefix + name: entry for name, entry in value.items()}
    others = [[value], (value,), {"model": value}, {"state_dict": value}, {"model": {"model": value}}, prefixed]
    return saved(r.choice([*others, *others, *odd_values(), odd_dict(value)]))


def mutations(subject):
    """The mutations of a subject, by name: functions of a random generator."""
    found = {change.__name__: functools.partial(change, content=subject.content) for change in BYTES_CHANGED}
    if subject.name.endswith(".gz"):
        found |= {
            f"{change.__name__} inside": functools.partial(in_gzip, change, subject.content) for change in BYTES_CHANGED
        }
    if subject.value is not None:
        for change in (change_member, change_instruction, change_members, encrypt):
            found[change.__name__] = functools.partial(change, content=subject.content)
        for change in (change_value, wrap_value):
            found[change.__name__] = functools.partial(change, value=subject.value)
    return found


def in_gzip(change, content, r):
    return gzip.compress(change(r, gzip.decompress(content)))


# --- what happens with a file


@contextlib.contextmanager
def printed():
    """A function that returns what has been printed to stderr, by Python or by a library in C."""
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)

        def said():
            sys.stderr.flush()
            file.seek(0)
            return file.read().decode(errors="replace")

        try:
            yield said
        finally:
            sys.stderr.flush()
            os.dup2(before, 2)
            os.close(before)


def outcome(subject, content, folder):
    """Returns "read" or "refused"; raises Fault if anything else happens.

    Args:
        subject: what the content was made of.
        content: of the file.
        folder: to write it to.
    """
    for name, other in {**subject.beside, subject.name: content}.items():
        (folder / name).write_bytes(other)
    path = folder / subject.name
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = "read"
    with printed() as said, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            subject.read(path)
        except subject.refusals as e:
            result, message = "refused", str(e)
            expect(len(message.splitlines()) == 1 and message.isprintable(), f"a message of several lines: {message!r}")
            # Of two files that do not fit each other, the message names the first.
            expect(str(folder) in message, f"a message that does not name the file: {message}")
            expect(len(message) < 400 + len(str(path)), f"a message of {len(message)} characters: {message}")
        except Fault:
            raise
        except Exception as e:
            raise Fault(f"{type(e).__name__}: {e}") from e
        expect(not said(), f"printed: {said()}")
    expect(not warned, f"warned: {[str(w.message) for w in warned]}")
    expect(time.process_time() - start < SECONDS, f"took {time.process_time() - start:.1f} s")
    more = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    expect(more < BYTES, f"took {more >> 20} MiB")
    return result


def mutate(subjects, seed):
    """(subject, name of a mutation, the file's content) for a seed."""
    r = random.Random(seed)
    subject = r.choice(subjects)
    name, change = r.choice(list(mutations(subject).items()))
    with warnings.catch_warnings():  # torch warns about the tensors that are made
        warnings.simplefilter("ignore")
        return subject, name, change(r)


def trial(subjects, seed, keep):
    """(name of the file, name of the mutation, outcome or Fault) for a seed; `keep`: folder for the files that fail."""
    subject, name, content = mutate(subjects, seed)
    folder = keep / str(seed)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        result = outcome(subject, content, folder)
        shutil.rmtree(folder)
    except Fault as e:
        result = e
    return subject.name, name, result


def corpus(only=""):
    """The subjects whose kind or name contains `only`."""
    torch.manual_seed(0)
    return [subject for kind, make in CORPUS.items() for subject in make() if only in f"{kind} {subject.name}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--only", default="", help="checkpoints, digits, pictures, or the name of a file")
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "mutations", help="for what fails")
    args = parser.parse_args()
    torch.set_num_threads(1)
    # A copy of stderr, which is redirected while a file is read.
    errors = os.dup(2)
    faulthandler.enable(errors)
    subjects, counts = corpus(args.only), collections.defaultdict(collections.Counter)
    for seed in range(args.seed, args.seed + args.count):
        faulthandler.dump_traceback_later(HANG, exit=True, file=errors)
        subject, name, result = trial(subjects, seed, args.keep)
        faulthandler.cancel_dump_traceback_later()
        if isinstance(result, Fault):
            print(
                f"--seed {seed} --only {args.only!r}: {subject}, {name}: {result} (kept in {args.keep / str(seed)})",
                flush=True,
            )
            result = "FAULT"
        counts[subject, name][result] += 1
    for (subject, name), results in sorted(counts.items()):
        print(f"{subject:30} {name:30} " + ", ".join(f"{count} {result}" for result, count in sorted(results.items())))
    total = sum(counts.values(), collections.Counter())
    print(f"{args.count} mutations: " + ", ".join(f"{count} {result}" for result, count in sorted(total.items())))
    return 1 if total["FAULT"] else 0


if __name__ == "__main__":
    sys.exit(main())

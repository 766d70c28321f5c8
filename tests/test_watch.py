"""The watch over memory (memory.py) reports each bug planted here, names it, and passes correct kernels."""

import memory
import pytest
import torch
import triton
import triton.language as tl
from conftest import DEVICE
from memory import BAND, guard_bands, unwatched, watched
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

import tritonnet
import tritonnet.nn.functional as F

interpreted = pytest.mark.skipif(DEVICE != "cpu", reason="rides on the interpreter")


@triton.jit
def copy_kernel(x_ptr, y_ptr, numel, MASK_LOAD: tl.constexpr, MASK_STORE: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=(offs < numel) | (not MASK_LOAD), other=0.0)
    tl.store(y_ptr + offs, x, mask=(offs < numel) | (not MASK_STORE))


def copy(x, y, mask_load=True, mask_store=True, block=16, programs=None):
    copy_kernel[(programs or triton.cdiv(y.numel(), block),)](x, y, y.numel(), mask_load, mask_store, block)


@triton.jit
def discarded_lanes_kernel(x_ptr, y_ptr, numel, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, tl.where(offs < numel, x, 0.0), mask=offs < numel)


@triton.jit
def one_address_kernel(y_ptr, BY_PROGRAM: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    offs = lanes if BY_PROGRAM else lanes // 2
    tl.store(y_ptr + offs, 1.0)


@triton.jit
def neighbour_kernel(x_ptr, y_ptr, STEP: tl.constexpr):
    pid = tl.program_id(0)
    x = tl.load(x_ptr + pid + STEP, mask=(pid + STEP >= 0) & (pid + STEP < tl.num_programs(0)), other=0.0)
    tl.store(y_ptr + pid, x)


@triton.jit
def scratch_kernel(x_ptr, scratch_ptr, y_ptr, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(scratch_ptr + offs, tl.load(x_ptr + offs))
    if BARRIER:
        tl.debug_barrier()
    tl.store(y_ptr + offs, tl.load(scratch_ptr + offs))


@triton.jit
def twice_kernel(y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, 0.0)
    tl.store(y_ptr + BLOCK - 1 - offs, 1.0)


@triton.jit
def skipping_kernel(y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, 1.0, mask=offs != 3)


@triton.jit
def atomic_kernel(y_ptr):
    tl.atomic_add(y_ptr, 1.0)


@triton.jit
def far_kernel(x_ptr, y_ptr, stride, INDEX: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs * stride))


@triton.jit
def described_kernel(x_desc, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs[:, None] * BLOCK + offs[None, :], x_desc.load([0, 0]))


def described(rows):
    """Copies a block of which x has three rows of 8, and its descriptor `rows`."""
    x = torch.zeros(4, 8)
    described_kernel[(1,)](TensorDescriptor(x[:3], [rows, 8], [8, 1], [8, 8]), torch.zeros(8, 8), 8)


def neighbours_in_place(step):
    t = torch.zeros(6)
    neighbour_kernel[(6,)](t, t, step)


def far(index):
    step = 2**28 + 2**26
    x, y = torch.empty(7 * step + 1, dtype=torch.uint8), torch.empty(8, dtype=torch.uint8)
    far_kernel[(4,)](x.as_strided((8,), (step,)), y, step, index, 2)


BUGS = {
    "mask dropped from a load": (
        lambda: copy(torch.zeros(20), torch.zeros(20), mask_load=False),
        "loads outside x_ptr",
    ),
    "mask dropped from a store": (
        lambda: copy(torch.zeros(20), torch.zeros(20), mask_store=False),
        "stores outside y_ptr (20,) with strides (1,), in 12 lanes, the first at element 20",
    ),
    "past a view, inside its storage": (
        lambda: copy(torch.zeros(40)[:20], torch.zeros(20), mask_load=False),
        "loads outside x_ptr",
    ),
    "between the elements of a view": (lambda: copy(torch.zeros(40)[::2], torch.zeros(20)), "loads outside x_ptr"),
    "from one argument into another": (
        lambda: (lambda t: copy(t[:16], t[16:36]))(torch.zeros(36)),
        "loads outside x_ptr (16,)",
    ),
    "lanes that are masked out later": (
        lambda: discarded_lanes_kernel[(1,)](torch.zeros(12), torch.zeros(12), 12, 16),
        "loads outside x_ptr",
    ),
    "two lanes, one address": (
        lambda: one_address_kernel[(1,)](torch.zeros(8), False, 16),
        "has two lanes store to one",
    ),
    "two programs, one address": (
        lambda: one_address_kernel[(2,)](torch.zeros(16), True, 16),
        "program (1, 0, 0) stores what another program stores",
    ),
    "reads what an earlier program stores": (lambda: neighbours_in_place(-1), "loads what another program stores"),
    "reads what a later program stores": (lambda: neighbours_in_place(1), "stores what another program loads"),
    "no barrier before loading back": (
        lambda: scratch_kernel[(2,)](torch.zeros(32), torch.zeros(32), torch.zeros(32), False, 16),
        "loads back, with no barrier",
    ),
    "two stores in no order": (lambda: twice_kernel[(1,)](torch.zeros(16), 16), "stores twice, with no barrier"),
    "an element left out": (lambda: skipping_kernel[(1,)](torch.zeros(16), 16), "never stores 1 elements of y_ptr"),
    "a program left out": (lambda: copy(torch.zeros(40), torch.zeros(40), programs=2), "never stores 8 elements"),
    "an output never reached": (
        lambda: copy_kernel[(1,)](torch.zeros(16), torch.zeros(16), 0, True, True, 16),
        "never stores 16 elements of y_ptr",
    ),
    "an atomic sum": (lambda: atomic_kernel[(3,)](torch.zeros(1)), "makes an atomic update of y_ptr"),
    "a descriptor of too many rows": (lambda: described(4), "loads outside x_desc (3, 8)"),
    "an offset of 32 bits": (lambda: far(tl.int32), "loads outside x_ptr"),
}


@interpreted
@pytest.mark.parametrize("bug", BUGS)
def test_sees(bug, unpoisoned):
    launch, message = BUGS[bug]
    with watched() as violations:
        launch()
    assert message in "\n".join(violations)
    # Reports distinguish the bugs by kernel, line and argument.
    assert all("_kernel (test_watch.py:" in line or "_kernel (at its end)" in line for line in violations)
    assert {other for _, other in BUGS.values() if any(other in line for line in violations)} <= {
        message, "loads outside x_ptr", "stores what another program loads"
    }  # fmt: skip


@interpreted
def test_passes_what_is_right(unpoisoned):
    with watched() as violations:
        copy(torch.zeros(20), torch.zeros(20))
        copy(torch.zeros(40)[:20], torch.zeros(40)[10:30])
        t = torch.zeros(20)
        copy(t, t)
        copy(t[4:], t.new_zeros(16))
        scratch_kernel[(2,)](torch.zeros(32), torch.zeros(32), torch.zeros(32), True, 16)
        neighbour_kernel[(6,)](torch.zeros(6), torch.zeros(6), 1)
        copy(torch.zeros(0), torch.zeros(0), programs=1)
        described(3)
        far(tl.int64)
    assert not violations


@interpreted
def test_results_are_as_without():
    """Lanes at stray addresses read the mask's value and write nothing; all others are untouched."""
    x, storage = torch.randn(20), torch.zeros(40)
    with watched() as violations:
        copy(x, storage[:20], mask_load=False, mask_store=False)
    assert len(violations) == 2
    assert torch.equal(storage, torch.cat([x, torch.zeros(20)]))


@interpreted
def test_a_sample_of_programs_has_the_launch_s_numbers():
    y = torch.zeros(60)
    with watched(sample=3) as violations:
        copy(torch.ones(60), y, block=4)
    assert not violations and y.nonzero().flatten().tolist() == [0, 1, 2, 3, 28, 29, 30, 31, 56, 57, 58, 59]


@pytest.mark.parametrize("size, stray", [(20, 12 * 4), (32, 0)], ids=["past the end", "in bounds"])
def test_guard_bands(size, stray, device):
    y = torch.zeros(size, device=device)
    with unwatched(), guard_bands() as violations:
        copy(torch.ones(32, device=device), y, block=32, mask_store=False)
    assert violations == ([f"copy_kernel stores {stray} bytes outside its tensors"] if stray else [])
    assert (y == 1).all()


def test_guard_bands_inside_a_storage(device):
    storage = torch.ones(40, device=device)
    with unwatched(), guard_bands() as violations:
        copy(torch.ones(32, device=device), storage[:20], block=32, mask_store=False)
        copy(torch.ones(20, device=device), storage[20:])
    assert violations == ["copy_kernel stores 24 bytes outside its tensors"]  # two bytes of a 1.0 are zero


def test_guard_bands_of_what_is_repeated_or_shared(device):
    """An element that an expanded dimension repeats, and two tensors of one storage."""
    storage = torch.arange(40.0, device=device)
    with unwatched(), guard_bands() as violations:
        far_kernel[(1,)](storage[7:8].expand(16), storage[24:], 0, tl.int32, 16)
        copy(storage[20:], storage[20:])
    assert not violations
    assert torch.equal(storage.cpu(), torch.cat([torch.arange(24.0), torch.full((16,), 7.0)]))


def test_guard_bands_let_autograd_be(device):
    """Tensors that autograd has saved and a kernel reads are not written to."""
    x = torch.ones(20, device=device, requires_grad=True)
    y = x.square()
    with unwatched(), guard_bands():
        copy(x, torch.zeros(20, device=device))
    y.sum().backward()
    assert (x.grad == 2).all()


def test_the_innermost_guard_bands_look(device):
    """Otherwise no test could plant a bug under the bands that guard every test on a GPU."""
    with unwatched(), guard_bands() as outer:
        with guard_bands() as inner:
            copy(torch.ones(32, device=device), torch.zeros(20, device=device), block=32, mask_store=False)
        copy(torch.ones(20, device=device), torch.zeros(20, device=device))
    assert inner and not outer


def test_guard_bands_stand_aside_in_a_capture(device, monkeypatch):
    """A graph must replay launches on the tensors themselves, and the GPU cannot be synchronised during a capture."""
    storage = torch.full((40,), 5.0, device=device)
    monkeypatch.setattr(memory, "_in_capture", lambda: True)
    with unwatched(), guard_bands() as violations:
        copy(torch.ones(32, device=device), storage[:20], block=32, mask_store=False)
    assert not violations and (storage[:20] == 1).all()


def test_guard_bands_take_one_copy_and_chunks(device, monkeypatch):
    """A test may need twice a huge storage of GPU memory, not seven times."""
    size = 2**18
    x, y, made = torch.ones(size, device=device), torch.zeros(8, device=device), {}

    class Results(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                storage = result.untyped_storage()
                made[storage.data_ptr()] = storage.nbytes()
            return result

    monkeypatch.setattr(memory, "CHUNK", 2**12)
    with unwatched(), Results(), guard_bands() as violations:
        copy(x.as_strided((8,), (size // 8,)), y, block=8)
    assert not violations and (y == 1).all()
    huge = sorted(n for n in made.values() if n > 4 * size // 8)
    assert huge == [4 * size, 4 * size + 2 * BAND]


@interpreted
def test_what_the_interpreter_remembers_changes_nothing(monkeypatch):
    """The same bits from kernels with helpers, reductions and products, and the same line for a bug."""

    def run():
        torch.manual_seed(0)
        x, w, labels = torch.randn(5, 6, requires_grad=True), torch.randn(7, 6, requires_grad=True), torch.arange(5)
        with watched() as violations, tritonnet.backend("triton"):
            loss = F.cross_entropy(F.linear(x, w), labels)
            loss.backward()
            copy(torch.zeros(20), torch.zeros(20), mask_load=False)
        return loss.detach(), x.grad, w.grad, violations

    *results, violations = run()
    monkeypatch.setattr(interpreter, "_patch_lang", interpreter._patch_lang.patch)
    *as_triton_has_it, true_violations = run()
    assert all(map(torch.equal, results, as_triton_has_it))
    assert violations == true_violations and len(violations) == 1

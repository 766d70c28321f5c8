"""Bugs of other Triton libraries with these operators, one by one, on ours.

The peers are attorch, FlagGems, Inductor's templates, aiter and trident; other bugs are from users' reports to PyTorch
and others, with the report's number.
"""

import pytest
import torch
import torch.nn.functional as TF
from conftest import DEVICE, run_python

import tritonnet
import tritonnet.nn as nn
import tritonnet.nn.functional as F


def check(ours, theirs, *sizes, prepare=lambda t: t, device=DEVICE):
    """Values and every gradient in float64."""
    inputs = [torch.randn(size, dtype=torch.float64) for size in sizes]
    results = []
    for f, where in ((ours, device), (theirs, "cpu")):
        leaves = [prepare(t.to(where)).detach().requires_grad_() for t in inputs]
        y = f(*leaves)
        dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device).view(y.shape)
        results.append([t.cpu() for t in (y.detach(), *torch.autograd.grad(y, leaves, dy))])
    torch.testing.assert_close(*results)


def test_attorch_convolution_is_our_own_forward_and_backward(device):
    """attorch's modules hand out torch's convolution, and its conv backward calls torch's."""
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 2)).to(device)
    x = torch.randn(2, 16, 6, 6, device=device, requires_grad=True)
    with tritonnet.count_launches() as forward:
        y = model(x)
    with tritonnet.count_launches() as backward:
        y.sum().backward()
    assert set(forward) == {
        "conv2d_forward_kernel",
        "relu_kernel",
        "max_pool2d_forward_kernel",
        "linear_forward_kernel",
    }
    assert {
        "conv2d_input_grad_kernel", "conv2d_weight_grad_kernel", "relu_grad_kernel",
        "max_pool2d_scatter_blocks_kernel", "linear_forward_kernel", "linear_weight_grad_kernel",
    } <= set(backward)  # fmt: skip
    with torch.profiler.profile() as profile:
        model(x).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert not {
        n for n in names if "conv" in n and n.startswith(("aten::", "mkldnn")) or n in ("aten::addmm", "aten::relu")
    }


def test_attorch_dilation():
    check(lambda x, w: F.conv2d(x, w, dilation=3), lambda x, w: TF.conv2d(x, w, dilation=3), (1, 2, 9, 9), (3, 2, 3, 3))


def test_attorch_state_dict_of_linear_is_torchs():
    ours, theirs = nn.Linear(5, 3), torch.nn.Linear(5, 3)
    ours.load_state_dict(theirs.state_dict())
    assert ours.weight.shape == (3, 5)


@pytest.mark.thorough
def test_attorch_import_needs_no_device():
    """Importing asks for no driver and no device, and works without Triton."""
    code = """
import sys, importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else find(name, *a)
sys.modules["triton"] = None
import torch, tritonnet
x = torch.randn(2, 1, 32, 32)
tritonnet.LeNet()(x).sum().backward()
with tritonnet.count_launches() as launches: pass
try:
    with tritonnet.backend("triton"): tritonnet.LeNet()(x)
except RuntimeError as e: print(e)
"""
    result = run_python("-c", code, TRITON_INTERPRET=None)
    assert result.returncode == 0, result.stderr
    assert "needs the triton package" in result.stdout
    pytest.importorskip("tqdm")
    code = """
from triton.runtime.driver import driver
class Fail:
    def __getattr__(self, name): raise SystemExit(f"import asked the driver for {name}")
driver.set_active(Fail())
import torch
torch.cuda.init = torch.cuda.current_device = lambda *a: exit("import asked for a device")
import tritonnet, tritonnet.train
"""
    result = run_python("-c", code, TRITON_INTERPRET=None)
    assert result.returncode == 0, result.stderr


def test_attorch_backward_of_strided_and_one_dimensional_linear():
    check(F.linear, TF.linear, (7,), (4, 7), (4,))
    check(F.linear, TF.linear, (6, 7), (7, 4), prepare=lambda t: t.t() if t.shape == (7, 4) else t)


def test_attorch_double_backward_of_linear_and_relu(device):
    x, w = (torch.randn(s, dtype=torch.float64, device=device, requires_grad=True) for s in ((5, 4), (3, 4)))
    (dx,) = torch.autograd.grad(F.relu(F.linear(x, w)).pow(2).sum(), x, create_graph=True)
    (true_dx,) = torch.autograd.grad(TF.relu(TF.linear(x, w)).pow(2).sum(), x, create_graph=True)
    ours, theirs = (torch.autograd.grad(t.pow(2).sum(), (x, w)) for t in (dx, true_dx))
    torch.testing.assert_close(ours, theirs)


def test_attorch_12_autocast_dtype(device):
    with torch.autocast(device.type, torch.bfloat16):
        assert F.linear(torch.randn(2, 3, device=device), torch.randn(4, 3, device=device)).dtype == torch.bfloat16


def test_flaggems_depthwise_is_not_padded_to_sixteen_channels(device):
    with tritonnet.count_launches() as launches:
        F.conv2d(torch.randn(1, 8, 6, 6, device=device), torch.randn(8, 1, 3, 3, device=device), groups=8)
    assert launches == {"depthwise_forward_kernel": 1}


@pytest.mark.parametrize("last", [(True, False), (False, True), (True, True)], ids=str)
def test_flaggems_channels_last_weight(last):
    def prepare(t):
        is_last = last[0] if t.shape[0] == 2 else last[1]
        return t.contiguous(memory_format=torch.channels_last) if is_last else t

    check(F.conv2d, TF.conv2d, (2, 4, 6, 7), (5, 4, 3, 3), prepare=prepare)


def test_flaggems_strided_backward_is_one_launch(device):
    x, w = torch.randn(2, 16, 9, 9, device=device, requires_grad=True), torch.randn(16, 16, 3, 3, device=device)
    y = F.conv2d(x, w, stride=2)
    with tritonnet.count_launches() as launches:
        y.sum().backward()
    assert launches == {"conv2d_input_grad_kernel": 1}  # only the requested gradient


def test_flaggems_same_padding_through_the_layer():
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3, padding="same").double()
    x = torch.randn(1, 2, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(conv.to(DEVICE)(x.to(DEVICE)).cpu(), torch.nn.Conv2d.forward(conv.cpu(), x))


def test_flaggems_unbatched():
    check(F.conv2d, TF.conv2d, (2, 6, 6), (3, 2, 3, 3))
    check(lambda x: F.max_pool2d(x, 2), lambda x: TF.max_pool2d(x, 2), (3, 6, 6))


def test_flaggems_messages_hold_the_value():
    with pytest.raises(RuntimeError, match=r"\[2, 2\]"):
        F.conv2d(torch.zeros(2, 2), torch.zeros(1, 1, 1, 1))


def test_flaggems_pool_drops_nan_and_gives_minus_one(backend, device):
    x = torch.full((1, 1, 4, 4), float("-inf"), device=device)
    x[0, 0, 0, 1] = x[0, 0, 1, 0] = float("nan")
    y, indices = F.max_pool2d(x, 2, return_indices=True)
    assert y[0, 0, 0, 0].isnan() and indices.flatten().tolist() == [4, 2, 8, 10]


def test_flaggems_channels_last_pool_backward():
    check(
        lambda x: F.max_pool2d(x, 3, 2, 1), lambda x: TF.max_pool2d(x, 3, 2, 1), (2, 5, 8, 9),
        prepare=lambda t: t.contiguous(memory_format=torch.channels_last),
    )  # fmt: skip


def test_flaggems_pool_padding_past_half_is_refused():
    with pytest.raises(RuntimeError, match="padding"):
        F.max_pool2d(torch.zeros(1, 1, 8, 8), 3, padding=2)


def test_flaggems_strided_bias():
    check(F.linear, TF.linear, (5, 7), (4, 7), (4,), prepare=lambda t: t.repeat_interleave(3, 0)[::3])
    check(F.conv2d, TF.conv2d, (2, 3, 5, 5), (4, 3, 2, 2), (4,), prepare=lambda t: t.repeat_interleave(3, 0)[::3])


def test_flaggems_transposed_three_dimensional_linear():
    check(F.linear, TF.linear, (3, 4, 6), (5, 6), prepare=lambda t: t.transpose(0, 1) if t.dim() == 3 else t)


def test_inductor_index_of_several_nans(backend, device):
    x = torch.full((1, 1, 2, 2), float("nan"), device=device)
    assert F.max_pool2d(x, 2, return_indices=True)[1].item() == TF.max_pool2d(x.cpu(), 2, return_indices=True)[1].item()


def test_aiter_backward_float32_and_groups():
    check(lambda x, w: F.conv2d(x, w, groups=2), lambda x, w: TF.conv2d(x, w, groups=2), (1, 4, 5, 5), (6, 2, 3, 3))


def test_94775_ceil_mode_with_a_window_of_one():
    check(*(lambda x, f=f: f.max_pool2d(x, 1, 2, 0, 1, True) for f in (F, TF)), (1, 1, 4, 4))
    check(
        lambda *t: F.conv2d_relu_max_pool2d(*t, pool_kernel_size=1, pool_stride=2, pool_ceil_mode=True),
        lambda *t: TF.max_pool2d(TF.relu(TF.conv2d(*t)), 1, 2, 0, 1, True), (1, 1, 5, 5), (1, 1, 2, 2),
    )  # fmt: skip


def test_93384_asymmetric_dilation():
    check(*(lambda x, f=f: f.max_pool2d(x, (2, 3), 1, 0, (3, 1)) for f in (F, TF)), (1, 2, 7, 7))


def test_131659_offsets_in_a_window_past_127():
    check(*(lambda x, f=f: f.max_pool2d(x, 13, 5, 6) for f in (F, TF)), (1, 1, 30, 30))


@pytest.mark.parametrize("k", [4, 5, 7])
def test_310_kernels_of_four_and_more(k):
    check(F.conv2d, TF.conv2d, (1, 3, 9, 9), (2, 3, k, k))


def test_28714_and_34083_channels_last_pool_with_odd_channels_and_tall_images():
    last = lambda t: t.contiguous(memory_format=torch.channels_last)  # noqa: E731
    check(*(lambda x, f=f: f.max_pool2d(x, 2) for f in (F, TF)), (1, 7, 5, 6), prepare=last)
    check(*(lambda x, f=f: f.max_pool2d(x, (3, 1), 2) for f in (F, TF)), (1, 1, 70000, 2), prepare=last)


def test_trident_8_windows_that_are_no_power_of_two():
    check(*(lambda x, f=f: f.max_pool2d(x, (3, 5)) for f in (F, TF)), (1, 2, 11, 12))


def test_liger_1375_more_dimensions_than_were_tested():
    check(F.linear, TF.linear, (2, 3, 2, 3, 4), (5, 4), (5,))
    check(F.relu, TF.relu, (2, 1, 2, 1, 2, 3))


@pytest.mark.thorough
def test_the_batch_size_is_in_no_cache_key():
    """A shorter last batch compiles nothing new, and nothing is tuned; compiled for a GPU without one.

    Only where another tile takes fewer waves is a kernel compiled with that tile, once for all such batches.
    Kernels that walk flat memory have exactly two forms: for sizes divisible by 16, and for others.
    """
    code = """
import torch
from bench.machine_code import compile as c
compiled, tiles = set(), {}

def report(name, launch, kernel):
    if "relu" in name or "pool" in name:
        return
    blocks = tuple(getattr(launch, block, None) for block in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "TAPS"))
    tiles.setdefault((name, blocks), set()).add(kernel.hash)
    compiled.add((name, kernel.hash))

c.compile_instead(c.GPUTarget(*c.TARGETS["sm_90"]), report)
first = {}
from tritonnet.kernels import launchers as L
for batch in (2048, 2000, 1999, 1031):
    for C, groups in ((6, 1), (32, 1), (32, 32)):
        x, w = torch.empty(batch, C, 14, 14), torch.empty(32, C // groups, 5, 5)
        g = ((1, 1), (0,) * 4, (1, 1), groups, "zeros")
        y = L.conv2d(x, w, None, *g)
        L.conv2d_input_grad(y, w, x.shape, *g)
        L.conv2d_weight_grad(y, x, w.shape, *g, True)
    x, w = torch.empty(batch, 400), torch.empty(120, 400)
    y = L.linear(x, w, torch.empty(120))
    L.linear(y, w.t(), None)
    L.linear_weight_grad(y, x, True)
    v = torch.empty(10, 120)
    y, h = L.linear_chain(x, w, None, v, None, None, None, None, None, True)
    y, h = L.linear_chain_input_grad(y, h, w, v, None, None, True)[1], h
    L.linear_chain_weight_grad(torch.empty(batch, 10), y, x, h, [120], True)
    new = len(compiled) - sum(first.values())
    for key, hashes in tiles.items():
        first.setdefault(key, len(hashes))
    # Kernels with a tile that an earlier batch had, and of those with another.
    print(len(compiled) - sum(first.values()), new, flush=True)
    for size in ((batch, 7), (batch, 3, 9, 9)):
        y = L.relu(torch.empty(size))
    L.max_pool2d(y, (2, 2), (2, 2), (0, 0), (1, 1), False)
"""
    result = run_python("-c", code, TRITON_INTERPRET=None)
    assert result.returncode == 0, result.stderr[-2000:]
    counts = [tuple(map(int, line.split())) for line in result.stdout.splitlines()]
    assert len(counts) == 4 and all(again == 0 for again, _ in counts), counts
    assert counts[0][1] > 15 and sum(new for _, new in counts[1:]) <= 2, counts

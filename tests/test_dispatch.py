"""Which implementation is chosen, and how launches are counted."""

import contextlib
import threading

import pytest
import torch
from conftest import DEVICE, INTERPRETER_RUNS, run_python

import tritonnet
import tritonnet.nn.functional as F


def launched(device=DEVICE):
    with tritonnet.count_launches() as launches:
        F.relu(torch.ones(3, device=device))
    return dict(launches)


def test_choice():
    assert launched() == {"relu_kernel": 1}
    with tritonnet.backend("reference"):
        assert launched() == {}
        with tritonnet.backend("triton"):
            assert launched() == {"relu_kernel": 1}
        assert launched() == {}
    assert launched() == {"relu_kernel": 1}


def test_choice_ends_with_an_exception():
    with pytest.raises(KeyError), tritonnet.backend("reference"):
        raise KeyError
    assert launched()


def test_unknown_name():
    with pytest.raises(ValueError, match="'cuda'"), tritonnet.backend("cuda"):
        pass


def test_triton_is_never_replaced_silently():
    code = """
import torch, tritonnet
x = torch.ones(3)
print(tritonnet.nn.functional.relu(x).sum().item())
try:
    with tritonnet.backend("triton"):
        tritonnet.nn.functional.relu(x)
except RuntimeError as e:
    print("cpu" in str(e), "TRITON_INTERPRET" in str(e))
"""
    assert run_python("-c", code, TRITON_INTERPRET=None).stdout.split() == ["3.0", "True", "True"]


def test_other_threads_follow_the_choice():
    """On a GPU autograd runs the backward in threads of its own."""
    x = torch.ones(3, device=DEVICE, requires_grad=True)
    with tritonnet.count_launches() as launches, tritonnet.backend("reference"):
        y = F.relu(x).sum()
        thread = threading.Thread(target=y.backward)
        thread.start()
        thread.join()
    assert launches == {} and x.grad is not None


def test_a_failing_kernel_is_not_hidden(monkeypatch):
    from tritonnet.kernels import launchers

    def fail(x):
        raise ZeroDivisionError("a kernel failed")

    monkeypatch.setattr(launchers, "relu", fail)
    with pytest.raises(ZeroDivisionError, match="a kernel failed"):
        F.relu(torch.ones(3, device=DEVICE))


def test_counting_leaves_no_hook_behind():
    from tritonnet.kernels import launchers

    assert launched() and not any(kernel.pre_run_hooks for kernel in launchers.KERNELS)
    assert len(launchers.KERNELS) == len({k.fn.__name__ for k in launchers.KERNELS}) == 53


def test_operators_run_on_the_device_of_their_tensors(monkeypatch):
    """Triton launches on the current device, which may differ from the tensors' (the test needs no second GPU)."""
    chosen = []
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(
        torch.accelerator, "device_index", lambda index: chosen.append(index) or contextlib.nullcontext()
    )
    for device in ("cpu", "cuda:0", "cuda:1"):
        with tritonnet.dispatch.on_device(torch.device(device)):
            pass
    assert chosen == [1]


def test_meta_tensors_have_shapes_only():
    x = torch.empty(2, 3, 8, 8, device="meta")
    assert F.conv2d(x, torch.empty(4, 3, 3, 3, device="meta")).shape == (2, 4, 6, 6)
    assert F.max_pool2d(x, 2, return_indices=True)[1].dtype == torch.int64
    assert F.linear(F.relu(x), torch.empty(5, 8, device="meta")).device.type == "meta"


@pytest.mark.skipif(DEVICE == "cpu", reason="this run is the interpreter's already")
@pytest.mark.skipif(not INTERPRETER_RUNS, reason="the interpreter of triton 3.6 needs numpy before 2.4")
def test_the_interpreter_too():
    """With a GPU the suite above runs on it; all of it then also runs in the interpreter."""
    result = run_python("-m", "pytest", "-q", "-x", "tests", TRITONNET_TEST_DEVICE="cpu", TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout[-3000:]

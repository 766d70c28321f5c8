"""Cached launch plans: they never launch another kernel than Triton would, and save enough time."""

import json
import pathlib

import pytest
import torch
import triton
import triton.language as tl
from conftest import printed_once

from tritonnet.kernels._common import divide, reciprocal


@triton.jit
def divide_kernel(n_ptr, q_ptr, d, inverse, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(q_ptr + offs, divide(tl.load(n_ptr + offs), d, inverse))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_division_by_a_reciprocal(device, dtype):
    """At the multiples of each divisor, next to them and at the ends of the range."""
    most = 2**31 - 1 if dtype == torch.int32 else 2**40
    for d in (1, 2, 3, 5, 7, 12, 28, 56, 112, 641, 4096, 65537, 2**30 - 1, 2**30, 2**30 + 1, 2**31 - 1):
        multiples = torch.cat([torch.arange(12), torch.randint(most // d + 1, (68,)), torch.tensor([most // d])]) * d
        ends = torch.tensor([0, 1, most - 1, most, *range(7)])
        n = torch.cat([multiples - 1, multiples, multiples + 1, ends]).clamp(0, most).to(dtype)[:256].to(device)
        n = torch.nn.functional.pad(n, (0, 256 - len(n)))
        q = torch.full_like(n, -1)
        divide_kernel[(2,)](n, q, d, reciprocal(d), BLOCK=128)
        assert torch.equal(q, n // d), d


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    _, printed = printed_once(tmp_path_factory, "planned", ["tests/planned_launches.py"], TRITON_INTERPRET=None)
    return json.loads(printed)


@pytest.mark.parametrize("which", ["calls", "tf32", "descriptors", "another device"])
def test_the_same_launches_as_through_triton(planned, which):
    """Kernel, grid, integers and pointers are the same for all shapes, layouts, dtypes, precisions and devices."""
    launches, kernels, wrong, in_full = planned[which]
    assert launches > 1000 and kernels > 400 and not wrong
    assert in_full == 0, "the second time nothing is worked out anew"


def test_whoever_looks_sees_every_launch(planned):
    """Debugging, a hook, and two calls with a tensor on another device, which Triton has to refuse each time."""
    assert planned["in full"] == 4 and planned["debugging"]


def test_little_python_for_a_launch(planned):
    """Through Triton a linear took three times as many calls; a LeNet was recognised anew for each batch."""
    assert planned["python calls"]["linear"] <= 45 and planned["python calls"]["LeNet"] <= 200


def test_inference_with_weights_in_channels_last(planned):
    """Weights are read where they lie, whatever their strides."""
    assert planned["launches of a LeNet in channels_last"] == 2


def test_what_is_kept_is_bounded(planned):
    assert 0 < planned["kept"] <= 8


def test_kernels_are_found_in_triton_s_cache_whatever_was_launched_before(planned):
    first, second = planned["hashes"]
    assert first == second and all(first.values())


def test_every_launch_goes_through_launching():
    """A kernel launched elsewhere would be neither fast nor compiled together with others."""
    for path in (pathlib.Path(__file__).parents[1] / "kernels").glob("*.py"):
        assert path.name == "launching.py" or "_kernel[(" not in path.read_text(encoding="utf-8"), path.name

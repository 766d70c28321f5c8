"""linear against float64, values and every gradient, for every shape that torch takes."""

import itertools

import pytest
import torch
import torch.nn.functional as TF
from exact import DTYPES, check_linear

import tritonnet.nn.functional as F
from tritonnet.kernels import tiles

# name: sizes of input, weight and bias
CASES = {
    "matrix": ((5, 7), (4, 7), (4,)),
    "fc1": ((13, 400), (120, 400), (120,)),
    "many rows": ((300, 9), (5, 9), (5,)),
    "wide": ((40, 70), (150, 70), (150,)),
    "vector": ((7,), (4, 7), (4,)),
    "three leading sizes": ((2, 3, 4, 7), (5, 7), (5,)),
    "no bias": ((5, 7), (4, 7), None),
    "weight of one dimension": ((3, 5, 7), (7,), None),
    "vectors": ((7,), (7,), None),
    "one bias for all": ((5, 7), (4, 7), (1,)),
    "scalar bias": ((5, 7), (4, 7), ()),
    "bias by row": ((5, 7), (4, 7), (5, 4)),
    "bias of more dimensions": ((2, 5, 7), (4, 7), (2, 1, 4)),
    "zero rows": ((0, 7), (4, 7), (4,)),
    "zero features": ((5, 0), (4, 0), (4,)),
    "zero outputs": ((5, 7), (0, 7), (0,)),
    "one": ((1, 1), (1, 1), (1,)),
}


def make(case):
    size_x, size_w, size_b = CASES[case]
    inputs = [None if size is None else torch.randn(size).double() for size in (size_x, size_w, size_b)]
    rows = max(1, inputs[0][..., 0].numel()) if size_x[-1] else size_x[0]
    outputs = size_w[0] if len(size_w) == 2 else 1
    return inputs, [size_x[-1] + 1, outputs, rows, rows * max(outputs, 1)]


@pytest.mark.parametrize("case", CASES)
def test_float64(case, backend, device):
    inputs, terms = make(case)
    check_linear(F.linear, TF.linear, inputs, terms, torch.float64, device)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", ["fc1", "many rows", "three leading sizes"])
def test_narrow_dtypes(case, dtype, backend, device):
    """float32 has no tf32 tolerance: torch's default for matrix products is full precision."""
    inputs, terms = make(case)
    check_linear(F.linear, TF.linear, inputs, terms, dtype, device)


def strided(t):
    """The same values, transposed and with gaps."""
    wide = torch.full([2 * n + 1 for n in reversed(t.shape)], float("nan"), dtype=t.dtype, device=t.device)
    return wide[tuple(slice(1, None, 2) for _ in t.shape)].permute(*reversed(range(t.dim()))).copy_(t)


@pytest.mark.parametrize("case", ["matrix", "fc1", "three leading sizes", "vector"])
def test_strides(case, backend, device):
    inputs, terms = make(case)
    check_linear(F.linear, TF.linear, inputs, terms, torch.float64, device, strided)


def test_expanded_gradient_and_input(backend, device):
    x = torch.randn(1, 7, device=device).double().expand(6, 7).requires_grad_()
    w = torch.randn(4, 7, device=device).double().requires_grad_()
    b = torch.randn(1, device=device).double().expand(4).requires_grad_()
    ours = torch.autograd.grad(F.linear(x, w, b).sum(), (x, w, b))
    torch.testing.assert_close(ours, torch.autograd.grad(TF.linear(x, w, b).sum(), (x, w, b)))


@pytest.mark.parametrize("f", [F.linear, F.linear_relu])
@pytest.mark.parametrize("frozen", ["weight", "input"])
def test_what_no_gradient_needs_may_be_overwritten(f, frozen, backend, device):
    tensors = {"input": torch.rand(6, 7, device=device).double(), "weight": torch.rand(4, 7, device=device).double()}
    leaf = next(t for name, t in tensors.items() if name != frozen).requires_grad_()
    other = leaf * 1
    y = f(**{name: other if t is leaf else t for name, t in tensors.items()})
    expected = TF.linear(**{name: leaf if t is leaf else t for name, t in tensors.items()})
    (expected,) = torch.autograd.grad(expected.sum(), leaf)
    other.detach().zero_()
    torch.testing.assert_close(torch.autograd.grad(y.sum(), leaf)[0], expected)


def test_other_dtypes_are_torchs(backend):
    x, w = torch.randint(-5, 5, (4, 3)), torch.randint(-5, 5, (2, 3))
    assert torch.equal(F.linear(x, w), TF.linear(x, w))
    z = torch.randn(4, 3, dtype=torch.complex64)
    assert torch.equal(F.linear(z, z), TF.linear(z, z))


@pytest.mark.parametrize("interpreted", [False, True])
def test_each_program_has_a_share_of_a_split_product(interpreted, monkeypatch):
    """The kernels tell the compiler that a program's loop is never empty."""
    monkeypatch.setattr(tiles, "INTERPRETED", interpreted)
    for count, K, block_k in itertools.product((1, 3, 40, 1000), (1, 63, 64, 99 * 64, 4097, 123457), (16, 64)):
        splits, per_split = tiles.split_product(count, K, block_k)
        assert per_split % block_k == 0
        assert (splits - 1) * per_split < K <= splits * per_split, (count, K, block_k)

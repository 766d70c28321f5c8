"""linear against float64, values and every gradient, for every shape that torch takes."""

import itertools

import pytest
import torch
import torch.nn.functional as TF
from exact import DTYPES, assert_exact, check_linear

import tritonnet
import tritonnet.nn.functional as F
from tritonnet.kernels import linear, product, tiles

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


def columns(t, width, first=0):
    """The same values, in columns of a wider matrix; vectors as they are."""
    if t.dim() < 2:
        return t
    wide = t.new_full((t.shape[0], width), float("nan"))
    wide[:, first : first + t.shape[1]] = t
    return wide[:, first : first + t.shape[1]]


def shifted(t):
    """The same values, one element past a multiple of 16 bytes."""
    return torch.cat([t.new_full((1,), float("nan")), t.flatten()])[1:].view(t.shape)


# How x, w and dy lie in memory, and whether descriptors can read them so; in tf32 transposed ones are copied.
LAYOUTS = {
    "contiguous": (torch.clone, True),
    "transposed": (lambda t: t.t().contiguous().t() if t.dim() == 2 else t.clone(), True),
    "columns": (lambda t: columns(t, 2 * t.shape[-1] + 8, 8), True),
    "columns of rows of odd length": (lambda t: columns(t, t.shape[-1] + 1), False),
    "columns from an odd one on": (lambda t: columns(t, t.shape[-1] + 8, 1), False),
    "at an odd address": (shifted, False),
}
BY_POINTERS = {"linear_forward_kernel": 2, "linear_weight_grad_kernel": 1}


def launched(launches):
    """What was launched, apart from the sums of what programs have in common."""
    return {name: count for name, count in launches.items() if name != "sum_partials_kernel"}


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float32], ids=["bfloat16", "float16", "tf32"])
def described(request, descriptors, monkeypatch):
    """A format whose products may be read by descriptors, with the copies that tf32 takes on sm_90."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    monkeypatch.setattr(linear, "wants_k_inner", lambda dtype, precision: dtype == torch.float32)
    return request.param


@pytest.mark.parametrize(
    "rows, layout, with_bias",
    [*((104, layout, True) for layout in LAYOUTS), (104, "contiguous", False), (1, "contiguous", True)],
)
def test_descriptors(rows, layout, with_bias, described, device):
    """No tile divides 104, 136 and 72; what descriptors cannot read goes to the kernels by pointers."""
    prepare, served = LAYOUTS[layout]
    inputs = torch.randn(rows, 136).double(), torch.randn(72, 136).double(), torch.randn(72).double()
    if not with_bias:
        inputs = *inputs[:2], None
    with tritonnet.count_launches() as launches:
        check_linear(F.linear, TF.linear, inputs, [137, 72, rows, rows], described, device, prepare, tf32=True)
    if not served:
        assert launched(launches) == BY_POINTERS
    elif described == torch.float32:
        assert launched(launches) == {"product_kernel": 2, "linear_weight_grad_kernel": 1}
    else:
        assert launched(launches) == {"product_kernel": 3}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_descriptors_and_pointers_agree(layout, descriptors, device, monkeypatch):
    """On small integers, whose sums are exact in any order."""
    prepare, served = LAYOUTS[layout]
    values = [torch.randint(-2, 3, size).to(device).half() for size in ((104, 136), (72, 136), (72,), (104, 72))]

    def results():
        x, w, b, dy = map(prepare, values)
        with tritonnet.count_launches() as launches:
            y = F.linear(x.requires_grad_(), w.requires_grad_(), b.requires_grad_())
            found = y, *torch.autograd.grad(y, (x, w, b), dy)
        return found, "product_kernel" in launches

    ours, by_descriptors = results()
    assert by_descriptors == served
    monkeypatch.setattr(product, "LARGE", 2**28)
    others, by_descriptors = results()
    assert not by_descriptors and all(map(torch.equal, ours, others))


def test_descriptors_with_relu(described, device):
    x, w, b = (torch.randn(size).to(device, described) for size in ((100, 136), (72, 136), (72,)))
    with tritonnet.count_launches() as launches:
        y = F.linear_relu(x, w, b)
    assert launches == {"product_kernel": 1}
    x, w, b = (t.cpu().double() for t in (x, w, b))
    truth, magnitude = TF.linear(x, w, b), TF.linear(x.abs(), w.abs(), b.abs())
    assert_exact("y", y, truth.relu(), magnitude, 137, tf32=True)


def test_descriptors_of_repeated_gradients(described, device):
    """The gradient of a sum is one element for all of dy, which descriptors do not read."""
    x, w = (torch.randn(size, device=device).to(described).requires_grad_() for size in ((100, 136), (72, 136)))
    y = F.linear(x, w)
    with tritonnet.count_launches() as launches:
        dx, dw = torch.autograd.grad(y, (x, w), torch.ones((), dtype=described, device=device).expand(100, 72))
    # In tf32 dy is copied for the input gradient, and then a descriptor reads it.
    forward = "product_kernel" if described == torch.float32 else "linear_forward_kernel"
    assert launched(launches) == {forward: 1, "linear_weight_grad_kernel": 1}
    x, w = x.detach().cpu().double(), w.detach().cpu().double()
    assert_exact("dx", dx, w.sum(0).expand(100, 136), w.abs().sum(0).expand(100, 136), 72, tf32=True)
    assert_exact("dw", dw, x.sum(0).expand(72, 136), x.abs().sum(0).expand(72, 136), 100, tf32=True)


def test_descriptors_of_no_rows(described, device):
    x = torch.empty(0, 136, device=device, dtype=described).requires_grad_()
    w = torch.randn(72, 136, device=device).to(described).requires_grad_()
    with tritonnet.count_launches() as launches:
        y = F.linear(x, w)
        dx, dw = torch.autograd.grad(y, (x, w), torch.empty_like(y))
    assert launches == {} and y.shape == (0, 72) and dx.shape == (0, 136) and not dw.any()


def test_limits_of_descriptors(descriptors):
    """Coordinates are int32, also past the end, strides of rows less than 2^40 bytes, and full precision has none."""

    def serves(size, step, dtype=torch.bfloat16, precision="tf32"):
        t = torch.empty(0, dtype=dtype, device="meta").as_strided(size, (step, 1))
        return product.serves(t, torch.empty(8, size[1], dtype=dtype, device="meta"), precision)

    assert serves((8, 64), 64)
    assert serves((2**31 - 2**20, 64), 64) and not serves((2**31 - 2**20 + 8, 64), 64)
    assert serves((8, 2**31 - 2**20), 2**31) and not serves((8, 2**31 - 2**20 + 8), 2**31)
    assert serves((8, 64), 2**39 - 8) and not serves((8, 64), 2**39)
    assert serves((8, 64), 2**38 - 4, torch.float32) and not serves((8, 64), 2**38, torch.float32)
    assert not serves((8, 64), 56)  # rows that overlap
    assert not serves((8, 64), 64, torch.float32, "ieee") and not serves((8, 64), 64, torch.float64)
    assert not serves((0, 64), 64)


@pytest.mark.parametrize("interpreted", [False, True])
def test_each_program_has_a_share_of_a_split_product(interpreted, monkeypatch):
    """The kernels tell the compiler that a program's loop is never empty."""
    monkeypatch.setattr(tiles, "INTERPRETED", interpreted)
    for count, K, block_k in itertools.product((1, 3, 40, 1000), (1, 63, 64, 99 * 64, 4097, 123457), (16, 64)):
        splits, per_split = tiles.split_product(count, K, block_k)
        assert per_split % block_k == 0
        assert (splits - 1) * per_split < K <= splits * per_split, (count, K, block_k)

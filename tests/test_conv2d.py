"""conv2d against float64, value and every gradient, on the kernels and on the reference.

In the interpreter the float64, float32 and float16 cases prove the arithmetic; bfloat16 is emulated there and tf32 is
computed in full float32; these same tests prove their hardware paths on a GPU, or as compiled code.
"""

import itertools
from collections import Counter

import pytest
import torch
import torch.nn.functional as TF
from conftest import DEVICE, run_python
from exact import DTYPES, check_linear

import tritonnet.nn.functional as F

# name: (N, C, H, W), (OC, KH, KW), arguments
CASES = {
    "lenet conv1": ((3, 1, 32, 32), (6, 5, 5), {}),
    "lenet conv2": ((3, 6, 14, 14), (16, 5, 5), {}),
    "three channels, stem": ((2, 3, 23, 21), (8, 7, 7), dict(stride=2, padding=3)),
    "wide, by taps": ((2, 20, 9, 8), (18, 3, 3), dict(padding=1)),
    "wide, 5x5": ((2, 33, 7, 7), (17, 5, 5), dict(padding=2)),
    "1x1": ((2, 24, 6, 5), (40, 1, 1), {}),
    "1x1 strided: some pixels have no tap": ((2, 5, 8, 7), (3, 1, 1), dict(stride=(3, 2))),
    "stride 2": ((2, 16, 11, 10), (16, 3, 3), dict(stride=2, padding=1)),
    "stride over kernel": ((2, 3, 13, 14), (4, 2, 3), dict(stride=(3, 5))),
    "stride pair (1, 3)": ((2, 4, 9, 13), (4, 3, 3), dict(stride=(1, 3), padding=(0, 2))),
    "dilation": ((2, 4, 13, 12), (5, 3, 3), dict(dilation=(2, 3), padding=2)),
    "dilation shares a factor with stride": (
        (2, 17, 14, 15), (16, 3, 4), dict(stride=(4, 2), dilation=(2, 2), padding=3),
    ),
    "dilation prime to stride": ((2, 3, 17, 16), (4, 4, 3), dict(stride=(3, 2), dilation=(2, 3), padding=4)),
    "even kernel": ((2, 3, 8, 9), (4, 4, 2), dict(padding=(1, 0))),
    "padding past kernel": ((1, 3, 4, 5), (4, 3, 2), dict(padding=(5, 4))),
    "same, even kernel: more below and right": ((2, 3, 7, 8), (4, 4, 2), dict(padding="same", dilation=(1, 2))),
    "valid": ((2, 3, 7, 8), (4, 3, 3), dict(padding="valid")),
    "groups": ((2, 6, 8, 9), (4, 3, 3), dict(groups=2, padding=1)),
    "wide groups": ((2, 40, 6, 7), (34, 3, 3), dict(groups=2, stride=2, padding=1)),
    "depthwise": ((2, 9, 12, 13), (9, 3, 3), dict(groups=9, padding=1)),
    "depthwise, strided and dilated, two filters a channel": (
        (2, 5, 13, 14), (10, 3, 2), dict(groups=5, stride=(2, 3), dilation=(3, 2), padding=(2, 1)),
    ),
    "one pixel": ((1, 2, 1, 1), (3, 1, 1), {}),
    "kernel as large as image": ((2, 3, 5, 6), (4, 5, 6), {}),
    "one column": ((2, 3, 9, 1), (4, 3, 1), dict(padding=(1, 0))),
    "15x15 kernel": ((1, 2, 17, 16), (3, 15, 15), dict(padding=7)),
    "128 channels": ((1, 130, 4, 4), (70, 3, 3), dict(padding=1)),
}  # fmt: skip


def make(case, with_bias=True):
    """The float64 inputs, the arguments, and the length of the sums of y and of its gradients."""
    (N, C, H, W), (OC, KH, KW), arguments = CASES[case]
    C_group = C // arguments.get("groups", 1)
    x, w = torch.randn(N, C, H, W).double(), torch.randn(OC, C_group, KH, KW).double()
    bias = torch.randn(OC).double() if with_bias else None
    OH, OW = TF.conv2d(x, w, **arguments).shape[2:]
    pixels = N * OH * OW
    terms = [C_group * KH * KW + 1, OC * KH * KW, pixels, pixels]
    return (x, w, bias), arguments, terms


@pytest.mark.parametrize("case", CASES)
def test_float64(case, backend, device):
    inputs, arguments, terms = make(case)
    check_linear(
        lambda x, w, b: F.conv2d(x, w, b, **arguments),
        lambda x, w, b: TF.conv2d(x, w, b, **arguments),
        inputs, terms, torch.float64, device,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", ["lenet conv2", "wide, by taps", "stride pair (1, 3)", "wide groups", "depthwise"])
def test_narrow_dtypes(case, dtype, backend, device):
    # On a GPU torch rounds a sum before it adds the bias, and again after it.
    rounded_once = backend == "triton" or device.type == "cpu"
    inputs, arguments, terms = make(case, with_bias=case != "wide groups" and rounded_once)
    check_linear(
        lambda x, w, b: F.conv2d(x, w, b, **arguments),
        lambda x, w, b: TF.conv2d(x, w, b, **arguments),
        inputs, terms, dtype, device, tf32=True,
    )  # fmt: skip


def test_full_float32(device, full_precision):
    """With torch's flag at full precision no tf32 tolerance is allowed; the flag is read at each call."""
    inputs, arguments, terms = make("wide, by taps")
    check_linear(
        lambda x, w, b: F.conv2d(x, w, b, **arguments),
        lambda x, w, b: TF.conv2d(x, w, b, **arguments),
        inputs, terms, torch.float32, device,
    )  # fmt: skip


@pytest.mark.parametrize("flag", ["ieee", "tf32"])
def test_precision_follows_torch(flag, full_precision):
    from tritonnet.kernels import linear
    from tritonnet.kernels.conv2d import patches as conv2d

    for module, owner in ((conv2d, torch.backends.cudnn.conv), (linear, torch.backends.cuda.matmul)):
        owner.fp32_precision = flag
        assert module.precision() == flag


def test_precision_follows_the_older_flags():
    """In a process of its own: torch allows only one kind of flags."""
    code = """
import torch
from tritonnet.kernels import linear
from tritonnet.kernels.conv2d import patches as conv2d
print(conv2d.precision(), linear.precision())
torch.backends.cudnn.allow_tf32 = False
torch.set_float32_matmul_precision("high")
print(conv2d.precision(), linear.precision())
"""
    result = run_python("-c", code)
    assert result.stdout.split() == ["tf32", "ieee", "ieee", "tf32"], result.stderr


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize(
    "groups, padding, stride", [(1, (2, 3), 1), (2, 1, 2), (4, (1, 2), (1, 2)), (1, "same", 1)], ids=str
)
def test_padding_modes(mode, groups, padding, stride, backend, device):
    import tritonnet.nn as nn

    arguments = dict(stride=stride, padding=padding, groups=groups, padding_mode=mode, dtype=torch.float64)
    ours, theirs = (module.Conv2d(4, 8, (3, 4), **arguments) for module in (nn, torch.nn))
    x, (OC, C, KH, KW) = torch.randn(2, 4, 6, 7).double(), ours.weight.shape

    def call(layer):
        return lambda x, w, b: torch.func.functional_call(layer, {"weight": w, "bias": b}, (x,))

    pixels = 2 * theirs(x)[0, 0].numel()
    check_linear(
        call(ours), call(theirs), (x, torch.randn(OC, C, KH, KW).double(), torch.randn(OC).double()),
        # Up to nine padded pixels copy one pixel.
        [C * KH * KW + 1, 9 * OC * KH * KW, pixels, pixels], torch.float64, device,
    )  # fmt: skip


def test_every_shipped_tile(device):
    """3x3 and 5x5 by every tile of the tables, walked flat and by taps: sizes that fill no tile evenly."""
    from tritonnet.kernels import tiles

    # In the interpreter tiles differ by their size alone, and none of the tables is used.
    some = device == "cpu" and DEVICE == "cpu"
    for row in ("half", "tf32", "ieee", "fp64"):
        dtype = {"half": torch.float16, "fp64": torch.float64}.get(row, torch.float32)
        pairs = [(family, tile) for family in ("patches", "gradient") for tile in tiles.candidates(family, row)]
        for family, tile in pairs[:1] if some else pairs:
            for C, k in ((3, 3), (40, 3), (40, 5)):
                x, w = torch.randn(2, C, 9, 11).double(), torch.randn(20, C, k, k).double()
                with tiles.only(family, tile):
                    check_linear(
                        lambda x, w: F.conv2d(x, w, padding=1), lambda x, w: TF.conv2d(x, w, padding=1),
                        (x, w), [C * k * k, 20 * k * k, 2 * 9 * 11], dtype, device, tf32=row == "tf32",
                    )  # fmt: skip


def channels_last(t):
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


def strided(t):
    """The same values with gaps between elements, in a permuted order of dimensions."""
    wide = torch.full([2 * n + 1 for n in reversed(t.shape)], float("nan"), dtype=t.dtype, device=t.device)
    view = wide[tuple(slice(1, None, 2) for _ in t.shape)].permute(*reversed(range(t.dim())))
    return view.copy_(t)


@pytest.mark.parametrize("prepare", [channels_last, strided], ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", ["stride 2", "groups", "depthwise", "three channels, stem"])
def test_layouts(case, prepare, backend, device):
    inputs, arguments, terms = make(case)
    y = check_linear(
        lambda x, w, b: F.conv2d(x, w, b, **arguments),
        lambda x, w, b: TF.conv2d(x, w, b, **arguments),
        inputs, terms, torch.float64, device, prepare,
    )  # fmt: skip
    if prepare is channels_last:
        assert y.is_contiguous(memory_format=torch.channels_last)


def test_layout_of_results_is_torchs(backend, device):
    x, w = torch.randn(2, 4, 6, 6, device=device), torch.randn(8, 4, 3, 3, device=device)
    last = dict(memory_format=torch.channels_last)
    for a in (x, x.contiguous(**last), x[:, :, ::2], x.contiguous(**last)[:, 1:3].expand(2, 2, 6, 6), x[:1, :, :1, :1]):
        for b in (w, w.contiguous(**last), w[:, :, :1, :1]):
            b = b[:, : a.shape[1]]
            if all(n <= m for n, m in zip(b.shape[2:], a.shape[2:])):
                assert F.conv2d(a, b).stride() == TF.conv2d(a.cpu(), b.cpu()).stride(), (a.stride(), b.stride())


def test_expanded_gradient(backend, device):
    inputs, arguments, _ = make("stride 2")
    leaves = [t.clone().to(device).requires_grad_() for t in inputs]
    truth = [t.clone().requires_grad_() for t in inputs]
    F.conv2d(*leaves, **arguments).sum().backward()
    TF.conv2d(*truth, **arguments).sum().backward()
    for a, b in zip(leaves, truth):
        torch.testing.assert_close(a.grad.cpu(), b.grad)


@pytest.mark.parametrize("groups", [1, 4])
def test_empty_batch(groups, backend, device):
    x = torch.randn(0, 4, 6, 6, device=device, requires_grad=True)
    w = torch.randn(8, 4 // groups, 3, 3, device=device, requires_grad=True)
    b = torch.randn(8, device=device, requires_grad=True)
    y = F.conv2d(x, w, b, groups=groups)
    assert y.shape == (0, 8, 4, 4)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert (w.grad == 0).all() and (b.grad == 0).all()


def test_unbatched(backend, device):
    x, w = torch.randn(3, 6, 7, device=device).double(), torch.randn(4, 3, 3, 3, device=device).double()
    torch.testing.assert_close(F.conv2d(x, w).cpu(), TF.conv2d(x.cpu(), w.cpu()))


def test_only_the_gradients_asked_for(device):
    import tritonnet

    sizes = ((2, 16, 6, 6), (16, 16, 3, 3), (16,))
    for frozen, absent in ((0, "conv2d_input_grad_kernel"), (1, "conv2d_weight_grad_kernel")):
        leaves = [torch.randn(size, device=device) for size in sizes]
        for i, t in enumerate(leaves):
            t.requires_grad_(i != frozen)
        with tritonnet.count_launches() as launches:
            F.conv2d(*leaves).sum().backward()
        assert launches["conv2d_forward_kernel"] == 1 and absent not in launches
        assert [t.grad is None for t in leaves] == [i == frozen for i in range(3)]
    leaves = [torch.randn(size, device=device) for size in sizes]
    leaves[2].requires_grad_()
    F.conv2d(*leaves).sum().backward()
    torch.testing.assert_close(leaves[2].grad, torch.full((16,), 32.0, device=device))


def test_other_dtypes_are_torchs(backend, device):
    x, w = torch.randint(-5, 5, (2, 3, 6, 6)), torch.randint(-5, 5, (4, 3, 3, 3))
    if device.type == "cpu":
        assert torch.equal(F.conv2d(x, w, padding=1), TF.conv2d(x, w, padding=1))
    z, v = (
        torch.randn(s, dtype=torch.complex64, device=device, requires_grad=True) for s in ((2, 3, 6, 6), (4, 3, 3, 3))
    )
    ours = torch.autograd.grad(F.conv2d(z, v).abs().sum(), (z, v))
    torch.testing.assert_close(ours, torch.autograd.grad(TF.conv2d(z, v).abs().sum(), (z, v)))


GRADS = {
    "many channels": ((2, 18, 5, 3), (17, 18, 3, 2), (1, 0), 1, "zeros"),
    "groups": ((1, 36, 5, 3), (34, 18, 3, 2), (1, 1), 2, "zeros"),
    "circular": ((1, 18, 3, 4), (17, 18, 3, 3), (1, 2), 1, "circular"),
    "few channels": ((2, 3, 5, 3), (17, 3, 3, 2), (1, 1), 1, "zeros"),
    "to few channels": ((2, 18, 5, 3), (3, 18, 3, 2), (1, 1), 1, "zeros"),
    "depthwise": ((2, 18, 5, 3), (18, 1, 3, 3), (1, 1), 18, "zeros"),
}


def grads_case(case, device):
    """dy, x, w and the geometry of conv2d_grads, with a stride of 2 along rows."""
    (N, C, H, W), (OC, _, KH, KW), (PH, PW), groups, mode = GRADS[case]
    OH, OW = (H + 2 * PH - KH) // 2 + 1, W + 2 * PW - KW + 1
    sizes = (N, OC, OH, OW), (N, C, H, W), GRADS[case][1]
    tensors = [torch.randn(size, device=device, dtype=torch.float64) for size in sizes]
    return tensors, ((2, 1), (PH, PH, PW, PW), (1, 1), groups, mode)


@pytest.mark.parametrize("case", GRADS)
def test_both_gradients_at_once(case, backend, device):
    """conv2d_grads gives the values and layouts of the two operators, for any layouts of dy, x and w."""
    from tritonnet import ops

    tensors, geometry = grads_case(case, device)
    for prepared in (*itertools.product((torch.clone, channels_last), repeat=3), [strided] * 3):
        dy, x, w = (prepare(t) for prepare, t in zip(prepared, tensors))
        both = ops.conv2d_grads(dy, x, w, *geometry, True)
        one = ops.conv2d_input_grad(dy, w, x.shape, *geometry)
        for a, b in zip(both, (one, *ops.conv2d_weight_grad(dy, x, w.shape, *geometry, True)), strict=True):
            torch.testing.assert_close(a, b, check_stride=True)


@pytest.mark.parametrize("batched", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("pooled", [False, True], ids=["conv2d_grads", "conv2d_relu_max_pool2d_grads"])
def test_both_gradients_under_vmap(pooled, batched, backend, device):
    from tritonnet import ops

    (dy, *x_w), geometry = grads_case("groups", device)
    operator, code, pool = ops.conv2d_grads, (), ()
    if pooled:
        operator, pool = ops.conv2d_relu_max_pool2d_grads, ((2, 2), (2, 1), (0, 0))
        dy, *code = ops.conv2d_relu_max_pool2d(*x_w, None, *geometry, *pool, False)
    tensors = [dy, *code, *x_w]
    chosen = {id((dy, *x_w)[i]) for i in batched}
    dims = tuple(1 if id(t) in chosen else None for t in tensors)
    tensors = [t if dim is None else torch.stack([t, 2 * t, t.flip(0)], dim) for t, dim in zip(tensors, dims)]

    def grads(*t):
        return operator(*t, *geometry, *pool, True)

    each = [grads(*(t if dim is None else t[:, i] for t, dim in zip(tensors, dims))) for i in range(3)]
    for a, b in zip(torch.func.vmap(grads, dims)(*tensors), map(torch.stack, zip(*each)), strict=True):
        torch.testing.assert_close(a, b)


STEPS = {
    "conv2d": lambda x, w, b: F.conv2d(x, w, b),
    "conv2d_relu": lambda x, w, b: F.conv2d_relu(x, w, b),
    "conv2d_relu_max_pool2d": lambda x, w, b: F.conv2d_relu_max_pool2d(x, w, b),
}


@pytest.mark.parametrize("layer", STEPS)
def test_copies_of_a_training_step(layer, device, monkeypatch):
    """In NCHW the gradients share a copy of dy; in channels_last nothing is copied. Results keep their layouts."""
    copies, contiguous = Counter(), torch.Tensor.contiguous

    def counting(t, **options):
        result = contiguous(t, **options)
        if result.data_ptr() != t.data_ptr():
            copies[names[t.shape]] += 1
        return result

    for prepare, expected in ((torch.clone, {"x": 2, "w": 2, "dy": 1}), (channels_last, {})):
        x, w, b = (torch.randn(size, device=device) for size in ((2, 20, 8, 6), (24, 20, 3, 3), (24,)))
        names = {x.shape: "x", w.shape: "w", (2, 24, 6, 4): "dy"}
        x, w = prepare(x).half().requires_grad_(), prepare(w).half().requires_grad_()
        copies.clear()
        with monkeypatch.context() as patched:
            patched.setattr(torch.Tensor, "contiguous", counting)
            y = STEPS[layer](x, w, b.half().requires_grad_())
            dx, dw = torch.autograd.grad(y, (x, w), prepare(torch.ones_like(y)))
        assert copies == expected
        assert dx.stride() == x.stride() and dw.stride() == w.stride()
        assert y.is_contiguous(memory_format=torch.channels_last if expected == {} else torch.contiguous_format)

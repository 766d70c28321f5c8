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
from exact import DTYPES, assert_exact, check_linear, run

import tritonnet
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
    "stride over height": ((2, 3, 4, 11), (4, 2, 3), dict(stride=(7, 2), padding=(1, 2))),
    "stride over image, dilated groups": (
        (2, 40, 5, 4), (34, 3, 2), dict(stride=(20, 9), dilation=(2, 3), padding=(3, 2), groups=2),
    ),
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
@pytest.mark.sampled(2)
def test_float64(case, backend, device):
    inputs, arguments, terms = make(case)
    check_linear(
        lambda x, w, b: F.conv2d(x, w, b, **arguments),
        lambda x, w, b: TF.conv2d(x, w, b, **arguments),
        inputs, terms, torch.float64, device,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", ["lenet conv2", "wide, by taps", "stride pair (1, 3)", "wide groups", "depthwise"])
@pytest.mark.sampled(2)
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
@pytest.mark.sampled(2)
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


@pytest.mark.thorough
def test_every_shipped_tile(device):
    """3x3 and 5x5 by every tile of the tables, walked flat and by taps: sizes that fill no tile evenly."""
    from tritonnet.kernels import tiles

    # In the interpreter tiles differ by their size alone, and none of the tables is used.
    some = device == "cpu" and DEVICE == "cpu"
    for row in ("half", "tf32", "ieee", "fp64"):
        dtype = {"half": torch.float16, "fp64": torch.float64}.get(row, torch.float32)
        pairs = [(family, tile) for family in ("patches", "gradient") for tile in tiles.table(family, row)]
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


@pytest.mark.parametrize(
    "channels, groups, stride", [(17, 1, 5), (3, 1, 5), (3, 3, 9)], ids=["many channels", "few", "depthwise"]
)
def test_a_stride_over_the_image_has_no_more_programs(channels, groups, stride, device, monkeypatch):
    """No more than the least stride that the kernel treats alike: phases without a pixel are not computed."""
    from tritonnet.kernels import launchers, launching

    grids, launch = [], launching.launch

    def recorded(kernel, grid, *args, **options):
        grids.append(grid)
        return launch(kernel, grid, *args, **options)

    monkeypatch.setattr(launching, "launch", recorded)
    # A launch that is planned already would not be seen.
    launching.forget()
    dy = torch.randn(2, channels, 1, 1, device=device)
    w = torch.randn(channels, channels // groups, 3, 3, device=device)
    for s in (stride, 20):
        launchers.conv2d_input_grad(dy, w, (2, channels, 5, 5), (s, s), (0,) * 4, (1, 1), groups, "zeros")
    assert grids and grids[: len(grids) // 2] == grids[len(grids) // 2 :]


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
@pytest.mark.sampled(3)
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
@pytest.mark.sampled(4)
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


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float32], ids=["bfloat16", "float16", "tf32"])
def described(request, descriptors, monkeypatch):
    """A format whose products may be read by descriptors, with the copies that tf32 takes on sm_90."""
    from tritonnet.kernels.conv2d import input_grad

    monkeypatch.setattr(input_grad, "wants_k_inner", lambda dtype, precision: dtype == torch.float32)
    return request.param


def launched(launches):
    """What was launched, apart from the sums of what programs have in common."""
    return {name: count for name, count in launches.items() if name != "sum_partials_kernel"}


def at_an_odd_address(t):
    """The same values in channels_last, one element past a multiple of 16 bytes."""
    t = channels_last(t)
    return t.new_full((t.numel() + 1,), float("nan"))[1:].as_strided(t.shape, t.stride()).copy_(t)


def every_second(t):
    """The same values as every second image of a tensor in channels_last."""
    wide = channels_last(t.new_full((2 * t.shape[0], *t.shape[1:]), float("nan")))
    return wide[::2].copy_(t)


def some_channels(t):
    """The same values as half of the channels of a tensor in channels_last."""
    if t.dim() < 4:
        return t
    wide = channels_last(t.new_full((t.shape[0], 2 * t.shape[1], *t.shape[2:]), float("nan")))
    return wide[:, : t.shape[1]].copy_(t)


POINTERS = {f"conv2d_{name}_kernel": 1 for name in ("forward", "input_grad", "weight_grad")}
# How x, w and dy lie in memory, and whether descriptors read them; without contiguous channels they are copied.
ONE_BY_ONE = {
    torch.clone: True, channels_last: True, strided: True,
    at_an_odd_address: False, every_second: False, some_channels: False,
}  # fmt: skip


@pytest.mark.parametrize(
    "prepare, with_bias", [*((prepare, True) for prepare in ONE_BY_ONE), (channels_last, False)],
    ids=lambda value: getattr(value, "__name__", f"bias {value}"),
)  # fmt: skip
def test_descriptors(prepare, with_bias, described, device):
    """1x1 convolutions of sizes that no tile divides; what descriptors cannot read goes to the kernels by pointers."""
    N, C, H, W, OC = 2, 72, 5, 9, 136
    inputs = torch.randn(N, C, H, W).double(), torch.randn(OC, C, 1, 1).double(), torch.randn(OC).double()
    if not with_bias:
        inputs = *inputs[:2], None
    with tritonnet.count_launches() as launches:
        y = check_linear(
            F.conv2d, TF.conv2d, inputs, [C + 1, OC, N * H * W, N * H * W], described, device, prepare, tf32=True
        )
    last = prepare not in (torch.clone, strided)
    assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    if not ONE_BY_ONE[prepare]:
        assert launched(launches) == POINTERS
    elif described == torch.float32:
        assert launched(launches) == {"product_kernel": 2, "conv2d_weight_grad_kernel": 1}
    else:
        assert launched(launches) == {"product_kernel": 3}


@pytest.mark.parametrize("prepare", [torch.clone, channels_last])
def test_descriptors_with_relu(prepare, described, device):
    x, w, b = (prepare(torch.randn(size).to(device, described)) for size in ((2, 72, 5, 9), (136, 72, 1, 1), (136,)))
    with tritonnet.count_launches() as launches:
        y = F.conv2d_relu(x, w, b)
    assert launches == {"product_kernel": 1}
    x, w, b = (t.cpu().double() for t in (x, w, b))
    assert_exact("y", y, TF.conv2d(x, w, b).relu(), TF.conv2d(x.abs(), w.abs(), b.abs()), 73, tf32=True)


@pytest.mark.parametrize(
    "size", [(1, 72, 1, 1), (70, 72, 1, 1), (0, 72, 5, 9)], ids=["one pixel", "images of one pixel", "no image"]
)
def test_descriptors_of_few_pixels(size, described, device):
    inputs = torch.randn(size).double(), torch.randn(136, 72, 1, 1).double(), torch.randn(136).double()
    with tritonnet.count_launches() as launches:
        check_linear(F.conv2d, TF.conv2d, inputs, [73, 136, 1, 1], described, device, channels_last, tf32=True)
    assert ("product_kernel" in launches) == (size[0] > 0)


def test_descriptors_of_repeated_gradients(described, device):
    """The gradient of a sum is one element for all of dy: for both gradients it is copied once."""
    inputs = torch.randn(2, 72, 5, 9).double(), torch.randn(136, 72, 1, 1).double()
    x, w = (channels_last(t.to(device, described)).requires_grad_() for t in inputs)
    y = F.conv2d(x, w)
    with tritonnet.count_launches() as launches:
        dx, dw = torch.autograd.grad(y.sum(), (x, w))
    assert launched(launches) == (
        {"product_kernel": 1, "conv2d_weight_grad_kernel": 1} if described == torch.float32 else {"product_kernel": 2}
    )
    x, w = x.detach().cpu().double(), w.detach().cpu().double()
    columns, rows = (t.sum(0).expand(2, 72, 5, 9) for t in (w, w.abs()))
    assert_exact("dx", dx, columns, rows, 136, tf32=True)
    columns, rows = (t.sum((0, 2, 3)).view(1, 72, 1, 1).expand(136, 72, 1, 1) for t in (x, x.abs()))
    assert_exact("dw", dw, columns, rows, 90, tf32=True)


NO_PRODUCTS = {
    "stride": ((72, 72, 1, 1), dict(stride=2)),
    "padding": ((72, 72, 1, 1), dict(padding=1)),
    "groups": ((72, 36, 1, 1), dict(groups=2)),
    "channels of 140 bytes": ((72, 70, 1, 1), {}),
}


@pytest.mark.parametrize("case", NO_PRODUCTS)
def test_what_is_no_product(case, descriptors, device):
    (OC, C, KH, KW), arguments = NO_PRODUCTS[case]
    x = torch.randn(2, C * arguments.get("groups", 1), 5, 9).double()
    inputs, pixels = (x, torch.randn(OC, C, KH, KW).double()), 2 * 7 * 11
    with tritonnet.count_launches() as launches:
        check_linear(
            lambda x, w: F.conv2d(x, w, **arguments), lambda x, w: TF.conv2d(x, w, **arguments),
            inputs, [C * KH * KW, OC * KH * KW, pixels], torch.float16, device, channels_last,
        )  # fmt: skip
    assert launched(launches) == POINTERS


# name: image (N, C, H, W), filters (OC, KH, KW), arguments
TAPS = {
    "3x3": ((2, 17, 7, 9), (20, 3, 3), {}),
    "padding 1": ((3, 24, 6, 5), (36, 3, 3), dict(padding=1)),
    "padding 2": ((1, 18, 4, 9), (17, 3, 3), dict(padding=2)),
    "padding (2, 0)": ((2, 18, 3, 8), (17, 3, 3), dict(padding=(2, 0))),
    "dilation": ((2, 17, 9, 11), (18, 3, 3), dict(dilation=(2, 3), padding=(1, 2))),
    "image within the filter": ((2, 17, 2, 3), (18, 3, 3), dict(dilation=(3, 2), padding=(5, 3))),
    "one pixel": ((1, 17, 1, 1), (18, 3, 3), dict(padding=1)),
    "images of one pixel": ((70, 17, 1, 1), (18, 3, 3), dict(padding=1)),
    "small images": ((7, 17, 2, 3), (18, 3, 3), dict(padding=1)),
    "one row": ((2, 17, 1, 40), (18, 3, 3), dict(padding=1)),
    "one column": ((2, 17, 40, 1), (18, 3, 3), dict(padding=1)),
    "stride 2": ((2, 17, 9, 10), (18, 3, 3), dict(stride=2, padding=1)),
    "stride (1, 2)": ((2, 17, 8, 6), (18, 3, 3), dict(stride=(1, 2), padding=1)),
    "groups": ((2, 34, 5, 7), (36, 3, 3), dict(groups=2, padding=1)),
    "1x3": ((2, 17, 5, 7), (18, 1, 3), dict(padding=(0, 1))),
    "3x1": ((2, 17, 5, 7), (18, 3, 1), dict(padding=(1, 0))),
    "2x2": ((2, 17, 5, 7), (18, 2, 2), dict(padding=1)),
    "5x5": ((1, 17, 6, 7), (18, 5, 5), dict(padding=2)),
}


def taps_of(case):
    """How many taps a program may compute: all of a 3x3 filter too where its stride is 1."""
    return (2, 3, 9) if TAPS[case][1][1:] == (3, 3) and "stride" not in TAPS[case][2] else (2, 3)


@pytest.mark.parametrize(
    "case, taps", [("padding 1", 1), ("5x5", 1), *((case, taps) for case in TAPS for taps in taps_of(case))]
)
def test_taps_of_a_weight_gradient(case, taps, device, monkeypatch):
    """The weight gradient with so many taps of the filter to a program."""
    from tritonnet.kernels import launchers, tiles
    from tritonnet.kernels.conv2d import weight_grad

    size, (OC, KH, KW), arguments = TAPS[case]
    C, groups = size[1], arguments.get("groups", 1)
    stride, padding, dilation = (
        (n, n) if isinstance(n, int) else n
        for n in (arguments.get(name, default) for name, default in (("stride", 1), ("padding", 0), ("dilation", 1)))
    )
    geometry = stride, (padding[0], padding[0], padding[1], padding[1]), dilation, groups, "zeros"
    chosen = []

    def gradient_tile(*sizes, most_taps, padded, **options):
        # In the interpreter the tile takes as many taps as it may; elsewhere there is but one tile.
        some = dict(most_taps=min(most_taps, taps), padded=padded if taps == 9 else None)
        chosen.append(tiles.gradient_tile(*sizes, **some, **options))
        return chosen[-1]

    def grads(x, dy):
        return run(lambda w, b: TF.conv2d(x, w, b, **arguments), (w, b), dy, torch.clone)[1]

    # Blocks of 16 pixels, of which each sum has several.
    tile = tiles.Tile(32, 32, 16, 4, 2, taps)
    monkeypatch.setattr(tiles, "interpreted_tile", lambda *size: tile)
    monkeypatch.setattr(weight_grad, "gradient_tile", gradient_tile)
    w, b = torch.zeros(OC, C // groups, KH, KW).double(), torch.zeros(OC).double()
    with tiles.only("gradient", tile):
        # The sum of dy is a product with ones in 16-bit formats only.
        for dtype in (torch.float16, torch.float64) if case in ("padding 2", "dilation") else (torch.float16,):
            x = torch.randn(size).to(dtype).double()
            dy = torch.randn(TF.conv2d(x, w, **arguments).shape).to(dtype).double()
            dw_db = launchers.conv2d_weight_grad(
                *(channels_last(t.to(device, dtype)) for t in (dy, x)), w.shape, *geometry, True
            )
            for name, ours, true, most in zip(("dw", "db"), dw_db, grads(x, dy), grads(x.abs(), dy.abs())):
                assert_exact(name, ours, true, most, dy[:, 0].numel())
    assert {tile.taps for tile, *_ in chosen} == {taps}

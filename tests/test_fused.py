"""The fused functions against the separate ones: the same bits, forward and backward."""

import copy

import pytest
import torch
import torch.nn.functional as TF
from conftest import pairs
from exact import DTYPES

import tritonnet
import tritonnet.nn as nn
import tritonnet.nn.functional as F

LAYOUTS = torch.contiguous_format, torch.channels_last
# name: sizes of input and weight, the convolution's arguments, the pooling's arguments
CASES = {
    "LeNet conv1": ((3, 1, 16, 16), (6, 1, 5, 5), {}, {}),
    "LeNet conv2": ((2, 6, 14, 14), (16, 6, 5, 5), {}, {}),
    "by taps, 3x3/2": ((2, 18, 11, 10), (20, 18, 3, 3), {"padding": 1}, {"kernel_size": 3, "stride": 2, "padding": 1}),
    "strided, dilated, grouped": (
        (2, 6, 15, 13), (8, 3, 3, 2), {"stride": (1, 2), "dilation": (2, 1), "padding": (2, 1), "groups": 2},
        {"kernel_size": (2, 3), "stride": (3, 1)},
    ),
    "depthwise": ((2, 5, 9, 8), (10, 1, 3, 3), {"groups": 5}, {}),
    "same": ((1, 3, 8, 8), (4, 3, 4, 4), {"padding": "same"}, {"kernel_size": 3}),
    "windows of one pixel": ((2, 3, 6, 6), (4, 3, 3, 3), {}, {"kernel_size": 1, "stride": 2}),
    # Outputs of the convolution: 6 x 7, 8 x 9, 7 x 5, 6 x 5, 5 x 4 and 4 x 5 pixels.
    "ceil_mode, 3x3/2, few channels": (
        (2, 3, 15, 17), (7, 3, 5, 5), {"stride": 2}, {"kernel_size": 3, "stride": 2, "ceil_mode": True},
    ),
    "ceil_mode, 3x3/2, many channels": (
        (2, 18, 8, 9), (20, 18, 3, 3), {"padding": 1}, {"kernel_size": 3, "stride": 2, "ceil_mode": True},
    ),
    "ceil_mode, 2x2": ((2, 1, 8, 6), (5, 1, 2, 2), {}, {"ceil_mode": True}),
    "ceil_mode, padded": (
        (2, 6, 6, 5), (4, 3, 3, 3), {"padding": 1, "groups": 2},
        {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
    ),
    "ceil_mode, a window of padding is dropped": (
        (2, 3, 6, 5), (4, 3, 2, 2), {}, {"kernel_size": 2, "padding": 1, "ceil_mode": True},
    ),
    "ceil_mode, windows of one pixel": (
        (2, 6, 6, 7), (4, 6, 3, 3), {}, {"kernel_size": 1, "stride": 2, "ceil_mode": True},
    ),
}  # fmt: skip


def layers(case):
    """The fused layer and the separate layers, with the same parameters."""
    (_, C, _, _), (OC, _, *kernel), conv, pool = CASES[case]
    pool = {"kernel_size": 2, "stride": None, "padding": 0, "ceil_mode": False, **pool}
    fused = nn.Conv2dReLUMaxPool2d(C, OC, kernel, **conv, **{f"pool_{name}": value for name, value in pool.items()})
    apart = nn.Sequential(nn.Conv2d(C, OC, kernel, **conv), nn.ReLU(), nn.MaxPool2d(**pool))
    apart[0].load_state_dict(fused.state_dict())
    return fused, apart


def results(module, x, dy=None):
    x = x.detach().requires_grad_()
    y = module(x)
    dy = integers(y.shape, 2).to(y) if dy is None else dy
    return y, *torch.autograd.grad(y, [x, *module.parameters()], dy)


def integers(size, most):
    """Sums of products of small integers are exact in every number format and order, and full of ties."""
    return torch.randint(-most, most + 1, size).double()


@pytest.mark.parametrize("case, dtype, layout", pairs(CASES, DTYPES, LAYOUTS), ids=str)
@pytest.mark.sampled(3)
def test_the_same_bits(case, dtype, layout, backend, device):
    """test_conv2d and test_max_pool2d compare the separate layers with float64."""
    modules = [module.to(device, dtype) for module in layers(case)]
    for p in modules[0].parameters():
        p.data.copy_(integers(p.shape, 2))
    modules[1][0].load_state_dict(modules[0].state_dict())
    x = integers(CASES[case][0], 2).to(device, dtype).contiguous(memory_format=layout)
    seed = torch.get_rng_state()
    found = []
    for module in modules:
        torch.set_rng_state(seed)
        found.append(results(module, x))
    for ours, theirs in zip(*found):
        assert ours.stride() == theirs.stride() and torch.equal(ours, theirs)


def test_one_launch(device):
    with tritonnet.backend("triton"), tritonnet.count_launches() as launches, torch.no_grad():
        layers("LeNet conv1")[0].to(device)(torch.randn(2, 1, 16, 16, device=device))
        nn.Conv2dReLU(16, 4, 3).to(device)(torch.randn(2, 16, 5, 5, device=device))
        nn.LinearReLU(3, 4).to(device)(torch.randn(2, 3, device=device))
    pooled = "conv2d_relu_max_pool2d_product_kernel", "place_filters_kernel"
    assert launches == dict.fromkeys((*pooled, "conv2d_forward_kernel", "linear_forward_kernel"), 1)


SPECIAL = {
    "all dead": lambda x: x.abs().neg_().sub_(1),
    "NaN": lambda x: x.masked_fill_(torch.rand(x.shape, device=x.device) < 0.05, float("nan")),
    "inf": lambda x: x.masked_fill_(torch.rand(x.shape, device=x.device) < 0.05, float("inf")),
    "-inf": lambda x: x.masked_fill_(torch.rand(x.shape, device=x.device) < 0.5, float("-inf")),
    "ties": lambda x: x.round_(),
    "zeros": lambda x: x.zero_(),
}


@pytest.mark.parametrize("window", [(3, 2, 1), (3, 2, 0, 1, True), (2, 2, 0, 1, True)], ids=str)
@pytest.mark.parametrize("values", SPECIAL)
def test_special_values(values, window, backend, device):
    """A 1x1 convolution by 1 passes them on unchanged; torch on the CPU is the truth.

    Values of 8 bits, and gradients whose sums have no more, which a tf32 product does not change.
    """
    x = SPECIAL[values](torch.randn(2, 1, 9, 8, device=device).bfloat16().float())
    names = "pool_kernel_size", "pool_stride", "pool_padding", "dilation", "pool_ceil_mode"
    fused = nn.Conv2dReLUMaxPool2d(1, 1, 1, bias=False, **dict(zip(names, window))).to(device)
    torch.nn.init.ones_(fused.weight)
    leaf = x.cpu().requires_grad_()
    true_y = TF.max_pool2d(TF.relu(leaf), *window)
    dy = integers(true_y.shape, 9).float()
    (true_dx,) = torch.autograd.grad(true_y, leaf, dy)
    y, dx, _ = results(fused, x, dy.to(device))
    # The gradient of a product by 0 * inf is not tested here, that of the window is.
    torch.testing.assert_close(y.cpu(), true_y, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(dx.cpu(), true_dx, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_relu_of_conv2d_and_linear(dtype, backend, device):
    x, w = torch.randn(2, 4, 7, 6).to(device, dtype), torch.randn(6, 2, 3, 2).to(device, dtype)
    v, b = torch.randn(6, 6).to(device, dtype), torch.randn(6).to(device, dtype)
    for ours, theirs, tensors in (
        (lambda x, w, b: F.conv2d_relu(x, w, b, 2, 1, 1, 2), lambda *t: F.relu(F.conv2d(*t, 2, 1, 1, 2)), (x, w, b)),
        (F.linear_relu, lambda *t: F.relu(F.linear(*t)), (x, v, b)),
        (F.linear_relu, lambda *t: F.relu(F.linear(*t)), (x, v, b.expand(7, 6))),
        (F.linear_relu, lambda *t: F.relu(F.linear(*t)), (x, b)),
    ):
        found = []
        for function in (ours, theirs):
            leaves = [t.detach().requires_grad_() for t in tensors]
            y = function(*leaves)
            found.append((y, *torch.autograd.grad(y, leaves, torch.ones_like(y))))
        assert all(map(torch.equal, *found))


# As in a first layer, whose images need no gradient. name: images, weights, arguments, whether the product masks dy.
FIRST_LAYERS = {
    "3x3, three channels": ((3, 3, 9, 8), (40, 3, 3, 3), {"padding": 1}, True),
    "5x5, one channel": ((2, 1, 12, 11), (6, 1, 5, 5), {}, True),
    "one filter": ((3, 3, 9, 8), (1, 3, 3, 3), {"stride": 2}, True),
    "reflect, grouped": ((2, 4, 7, 6), (6, 2, 3, 3), {"stride": (2, 1), "padding": 1, "groups": 2}, True),
    "5x5, three channels": ((2, 3, 9, 8), (5, 3, 5, 5), {"padding": 2}, "but in float64"),
    "by taps": ((2, 18, 5, 6), (17, 18, 3, 2), {}, False),
    "depthwise": ((2, 4, 7, 6), (8, 1, 3, 3), {"groups": 4}, False),
}


@pytest.mark.parametrize("case, dtype, layout", pairs(FIRST_LAYERS, DTYPES, LAYOUTS), ids=str)
@pytest.mark.sampled(3)
def test_weight_gradient_alone(case, dtype, layout, device):
    """The same bits as together with the images' gradient, for which a masked dy is written."""
    images, size, arguments, masks = FIRST_LAYERS[case]
    x, w, b = (torch.randn(s).to(device, dtype) for s in (images, size, size[:1]))
    x, found = x.contiguous(memory_format=layout), []
    for needs in (True, False):
        leaves = [t.detach().requires_grad_() for t in (w, b)]
        with tritonnet.backend("triton"), tritonnet.count_launches() as launches:
            y = F.conv2d_relu(x.detach().requires_grad_(needs), *leaves, **arguments)
            found.append(torch.autograd.grad(y, leaves, torch.ones((), device=device, dtype=dtype).expand(y.shape)))
        masks = masks is True or masks == "but in float64" and dtype != torch.float64
        assert ("relu_grad_kernel" not in launches) == (masks and not needs)
    assert all(map(torch.equal, *found)) and [t.stride() for t in found[0]] == [t.stride() for t in found[1]]


@pytest.mark.parametrize("layouts", [(0, 0), (1, 1), (0, 1), (1, 0), (2, 0), (0, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_dy_counts(dtype, layouts, backend, device):
    """It counts where y is NaN, which is not above 0 either, but not where y is a zero; in layouts that differ."""

    def laid_out(t, layout):
        t = t.contiguous(memory_format=[torch.contiguous_format, torch.channels_last, torch.contiguous_format][layout])
        return t.repeat_interleave(2, 3)[..., ::2] if layout == 2 else t

    signs = torch.tensor([float("nan"), float("inf"), 1.0, 0.0, -0.0, -1.0, float("-inf")])
    y, dy, x = signs[torch.randint(7, (2, 40, 5, 6))], integers((2, 40, 5, 6), 2), integers((2, 3, 7, 8), 2)
    rest = (40, 3, 3, 3), (1, 1), (0,) * 4, (1, 1), 1, "zeros", True
    arguments = [laid_out(t.to(device, dtype), layout) for t, layout in zip((dy, y), layouts)]
    found = tritonnet.ops.conv2d_relu_weight_grad(*arguments, x.to(device, dtype), *rest)
    w, b = torch.zeros(rest[0]).double().requires_grad_(), torch.zeros(40).double().requires_grad_()
    true = torch.autograd.grad(TF.conv2d(x, w, b), (w, b), dy.masked_fill(y <= 0, 0))
    for ours, theirs in zip(found, true):
        assert torch.equal(ours.cpu().double(), theirs)
    assert found[0].is_contiguous(memory_format=torch.channels_last) == (layouts[1] == 1)


def test_weight_gradients_of_each_image(backend, device):
    x, dy = torch.randn(3, 2, 5, 4).double().to(device), torch.randn(3, 4, 4, 3).double().to(device)
    w, b = torch.randn(4, 2, 2, 2).double().to(device), torch.randn(4).double().to(device)

    def gradients(x, dy, w, b):
        return torch.func.vjp(lambda w, b: F.conv2d_relu(x, w, b), w, b)[1](dy)

    each = torch.func.vmap(gradients, (0, 0, None, None))(x, dy, w, b)
    several = torch.func.vmap(gradients, (None, None, 0, None))(x[0], dy[0], torch.stack([w, -w]), b)
    for i in range(3):
        torch.testing.assert_close([t[i] for t in each], [*gradients(x[i], dy[i], w, b)])
    for i, weights in enumerate((w, -w)):
        torch.testing.assert_close([t[i] for t in several], [*gradients(x[0], dy[0], weights, b)])


def test_windows_without_a_positive_value(backend, device):
    """Their gradient goes nowhere, even where windows begin further before an image than any image is large."""
    x, w = torch.rand(2, 4, 1, 7, device=device, requires_grad=True), -torch.ones(1, 4, 1, 1, device=device)
    y = F.conv2d_relu_max_pool2d(x, w, pool_kernel_size=5, pool_stride=(2, 3), pool_padding=2)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert not y.any() and not dx.any()


def test_unbatched_other_dtypes_and_autocast(backend, device):
    x, w = torch.randn(2, 7, 7, device=device), torch.randn(3, 2, 2, 2, device=device)
    assert torch.equal(F.conv2d_relu_max_pool2d(x, w), F.conv2d_relu_max_pool2d(x[None], w)[0])
    with torch.autocast(device.type, torch.bfloat16):
        y = F.conv2d_relu_max_pool2d(x, w), F.conv2d_relu(x, w), F.linear_relu(x, torch.randn(3, 7, device=device))
    assert {t.dtype for t in y} == {torch.bfloat16}
    x, w = (torch.randint(-3, 4, size) for size in ((1, 2, 6, 6), (3, 2, 2, 2)))
    for mode in (False, True):
        y = F.conv2d_relu_max_pool2d(x, w, pool_ceil_mode=mode)
        assert torch.equal(y, TF.max_pool2d(TF.relu(TF.conv2d(x, w)), 2, ceil_mode=mode))
    assert torch.equal(
        F.linear_relu(x, w.view(-1, 1).expand(-1, 6)), TF.relu(TF.linear(x, w.view(-1, 1).expand(-1, 6)))
    )


def test_empty_batch(backend, device):
    fused, apart = (module.to(device) for module in layers("LeNet conv1"))
    x = torch.empty(0, 1, 16, 16, device=device)
    for ours, theirs in zip(results(fused, x), results(apart, x)):
        assert ours.shape == theirs.shape and not ours.count_nonzero()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"pool_kernel_size": 0}, "conv2d_relu_max_pool2d: pool_kernel_size must be positive, got (0, 0)"),
        ({"pool_stride": (1, 0)}, "conv2d_relu_max_pool2d: pool_stride must be positive, got (1, 0)"),
        ({"pool_padding": 2}, "pool_padding must be at most half of pool_kernel_size (2, 2), got (2, 2)"),
        ({"pool_kernel_size": 9}, "pool_kernel_size (9, 9) is too large for images of size [1, 3, 4, 4]"),
        ({"groups": 2}, "conv2d_relu_max_pool2d: input must have 4 channels"),
        ({"weight": torch.ones(2, 2)}, "conv2d_relu_max_pool2d: weight must be (OC, C / groups, KH, KW)"),
        ({"bias": torch.ones(4)}, "conv2d_relu_max_pool2d: bias must have size [3]"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_errors(arguments, message, backend):
    arguments = {"input": torch.ones(1, 2, 6, 6), "weight": torch.ones(3, 2, 3, 3), **arguments}
    with pytest.raises(RuntimeError) as e:
        F.conv2d_relu_max_pool2d(**arguments)
    assert message in str(e.value)


def test_errors_of_the_others(backend):
    with pytest.raises(RuntimeError, match="conv2d_relu: padding must be 'same', 'valid' or integers, got 'full'"):
        F.conv2d_relu(torch.ones(1, 2, 6, 6), torch.ones(3, 2, 3, 3), padding="full")
    with pytest.raises(RuntimeError, match="linear_relu: the last sizes of input and weight must agree"):
        F.linear_relu(torch.ones(2, 3), torch.ones(4, 5))
    with pytest.raises(TypeError, match="linear_relu: weight must be a Tensor, got int"):
        F.linear_relu(torch.ones(2, 3), 4)
    with pytest.raises(TypeError, match="conv2d_relu_max_pool2d: pool_ceil_mode must be a bool, got 1"):
        F.conv2d_relu_max_pool2d(torch.ones(1, 2, 6, 6), torch.ones(3, 2, 3, 3), pool_ceil_mode=1)


def test_modules(device, full_precision):
    """Parameters, initial values, state_dict and repr of the layer that they begin with."""
    for cls, base, args, kwargs in (
        (nn.Conv2dReLU, nn.Conv2d, (2, 4, 3), {"padding_mode": "reflect", "padding": 1}),
        (nn.Conv2dReLUMaxPool2d, nn.Conv2d, (2, 4, 3), {"bias": False}),
        (nn.LinearReLU, nn.Linear, (3, 4), {}),
    ):
        torch.manual_seed(3)
        fused = cls(*args, **kwargs)
        torch.manual_seed(3)
        plain = base(*args, **kwargs)
        assert list(fused.state_dict()) == list(plain.state_dict())
        assert all(map(torch.equal, fused.parameters(), plain.parameters()))
        assert isinstance(fused, base) and repr(plain)[len(base.__name__) + 1 : -1] in repr(fused)
        assert repr(copy.deepcopy(fused)) == repr(fused)
    x = torch.randn(1, 2, 8, 8)
    fused = nn.Conv2dReLUMaxPool2d(2, 3, 3, padding=1, padding_mode="circular", pool_kernel_size=(2, 3))
    assert repr(fused).endswith("pool_kernel_size=(2, 3), pool_stride=(2, 3), pool_padding=0)")
    assert repr(nn.Conv2dReLUMaxPool2d(2, 3, 3, pool_ceil_mode=True)).endswith("pool_padding=0, pool_ceil_mode=True)")
    plain = torch.nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")
    plain.load_state_dict(fused.state_dict())
    y = fused.to(device)(x.to(device)).cpu()
    torch.testing.assert_close(y, TF.max_pool2d(TF.relu(plain(x)), (2, 3)))

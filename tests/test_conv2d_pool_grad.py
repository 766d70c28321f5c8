"""The gradients of conv2d_relu_max_pool2d, computed from the pooled gradient and the code, against float64.

In the interpreter float32 is computed in full, where a GPU takes tf32, and bfloat16 is emulated: these same tests prove
their hardware paths on a GPU, or as compiled code.
"""

import pytest
import torch
import torch.nn.functional as TF
from conftest import DEVICE
from exact import assert_exact

import tritonnet
from tritonnet import reference
from tritonnet.kernels import launchers as L
from tritonnet.kernels.conv2d_pool import chooser

# name: (N, C, H, W), (OC, KH, KW), stride, padding, dilation, and the pooling's window, stride, padding and ceil_mode
CASES = {
    "LeNet conv1, smaller": ((3, 1, 16, 16), (6, 5, 5), 1, 0, 1, 2, 2, 0, False),
    "LeNet conv2": ((3, 6, 14, 14), (16, 5, 5), 1, 0, 1, 2, 2, 0, False),
    "two tiles of images": ((66, 2, 6, 6), (3, 3, 3), 1, 0, 1, 2, 2, 0, False),
    "cut off, padded, two blocks of filters": ((2, 4, 9, 7), (17, 3, 3), 1, 1, 1, 2, 2, 0, False),
    "strided, dilated": ((2, 2, 13, 12), (5, 3, 2), (1, 2), (2, 1), (2, 1), 2, 2, 0, False),
    "stride and dilation 2": ((2, 1, 12, 13), (3, 2, 3), 2, 1, 2, 2, 2, 0, False),
    "overlapping windows": ((1, 1, 8, 7), (9, 3, 3), 1, 1, 1, 2, 1, 1, False),
    "windows apart, of three pixels": ((2, 3, 9, 10), (4, 2, 2), 1, 0, 1, (1, 3), (2, 4), (0, 1), False),
    "windows of one pixel": ((2, 2, 6, 5), (4, 1, 3), 1, 0, 1, 1, (2, 1), 0, False),
    # Outputs of the convolution: 7 x 9, 9 x 7, 9 x 10, 6 x 5, 8 x 8, 6 x 5 and 1 x 2 pixels.
    "ceil_mode, one channel": ((3, 1, 8, 10), (6, 2, 2), 1, 0, 1, 2, 2, 0, True),
    "ceil_mode, padded, two blocks of filters": ((2, 4, 9, 7), (17, 3, 3), 1, 1, 1, 2, 2, 0, True),
    "ceil_mode, strided, windows apart": ((2, 1, 17, 19), (5, 3, 3), 2, 1, 1, 2, 3, 0, True),
    "ceil_mode, a window of padding is dropped": ((2, 6, 7, 6), (4, 2, 2), 1, 0, 1, 2, 2, 1, True),
    "ceil_mode, windows of three pixels": ((2, 3, 9, 9), (4, 2, 2), 1, 0, 1, (1, 3), (2, 4), (0, 1), True),
    "ceil_mode, windows of one pixel": ((2, 2, 6, 7), (4, 1, 3), 1, 0, 1, 1, 2, 0, True),
    "ceil_mode, a window larger than the result": ((2, 2, 3, 4), (4, 3, 3), 1, 0, 1, 2, 2, 0, True),
}  # fmt: skip
FORMATS = (torch.float32, torch.bfloat16, torch.float16)
EACH_FORMAT = (
    "LeNet conv1, smaller", "cut off, padded, two blocks of filters", "ceil_mode, padded, two blocks of filters",
    "ceil_mode, a window of padding is dropped",
)  # fmt: skip


def pair(value):
    return value if isinstance(value, tuple) else (value, value)


def geometry(case):
    """The launchers' arguments after the tensors."""
    stride, (ph, pw), dilation, *pool = map(pair, CASES[case][2:-1])
    return stride, (ph, ph, pw, pw), dilation, 1, "zeros", *pool


def tensors(case, dtype):
    """x, w, and a pooled gradient and code of their convolution, in float64 but with dtype's precision."""
    size, (OC, *kernel) = CASES[case][:2]
    x, w, b = (torch.randn(s).to(dtype).double() for s in (size, (OC, size[1], *kernel), (OC,)))
    y, code = reference.conv2d_relu_max_pool2d(x, w, b, *geometry(case), CASES[case][-1])
    return x, w, torch.randn(y.shape).to(dtype).double(), code


def true_gradients(case, x, w, dy, code):
    """dx, dw and db by way of the dense gradient of the convolution."""
    stride, (ph, _, pw, _), dilation, _, _, *pool = geometry(case)
    leaves = x.clone().requires_grad_(), w.clone().requires_grad_(), w.new_zeros(w.shape[0]).requires_grad_()
    z = TF.conv2d(*leaves, stride, (ph, pw), dilation)
    return torch.autograd.grad(z, leaves, reference.max_pool2d_scatter(dy, code, z.shape[2:], *pool, (1, 1)))


def check(case, dtype, x, w, dy, code, prepare=lambda t: t):
    """Our three gradients, of tensors laid out by `prepare`, against the truth."""
    ours = [prepare(t.to(DEVICE, dtype)) for t in (x, w, dy)]
    our_code = prepare(code.to(DEVICE))
    with tritonnet.count_launches() as launches:
        dx = L.conv2d_relu_max_pool2d_input_grad(ours[2], our_code, ours[1], x.shape, *geometry(case))
        dw, db = L.conv2d_relu_max_pool2d_weight_grad(ours[2], our_code, ours[0], w.shape, *geometry(case), True)
        alone = L.conv2d_relu_max_pool2d_weight_grad(ours[2], our_code, ours[0], w.shape, *geometry(case), False)
    assert not launches["max_pool2d_scatter_kernel"] and launches["conv2d_relu_max_pool2d_weight_grad_kernel"] == 2
    assert torch.equal(alone[0], dw) and alone[1].numel() == 0
    truth, size = true_gradients(case, x, w, dy, code), true_gradients(case, x.abs(), w.abs(), dy.abs(), code)
    terms = w[:, 0].numel(), dy[:, 0].numel(), dy[:, 0].numel()
    for name, actual, true, magnitude, count in zip(("dx", "dw", "db"), (dx, dw, db), truth, size, terms):
        assert actual.dtype == dtype
        assert_exact(name, actual, true, magnitude, count, tf32=DEVICE != "cpu")
    return dx


@pytest.mark.parametrize("case", CASES)
@pytest.mark.sampled(2)
def test_against_float64(case):
    check(case, torch.float32, *tensors(case, torch.float32))


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("case", EACH_FORMAT)
@pytest.mark.sampled(2)
def test_channels_last_in_each_format(case, dtype):
    last = dict(memory_format=torch.channels_last)
    dx = check(case, dtype, *tensors(case, dtype), lambda t: t.contiguous(**last))
    assert dx.is_contiguous(**last)


STRIDES = {
    "apart": lambda t: torch.stack((t, t), -1)[..., 0],
    "reversed": lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    # The gradient of a sum.
    "zero": lambda t: t[:1, :1, :1, :1].expand(t.shape) if (t == t[0, 0, 0, 0]).all() else t,
}


@pytest.mark.parametrize("strides", STRIDES)
def test_any_strides(strides):
    case = "windows apart, of three pixels"
    x, w, dy, code = tensors(case, torch.float32)
    check(case, torch.float32, x, w, dy.fill_(1.5) if strides == "zero" else dy, code, STRIDES[strides])


def test_nothing_gets_through():
    """Where relu was 0 everywhere, infinite gradients leave no trace."""
    case = "two tiles of images"
    x, w, dy, code = tensors(case, torch.float32)
    code.fill_(4)
    arguments = dy.fill_(float("inf")).float().to(DEVICE), code.to(DEVICE)
    dx = L.conv2d_relu_max_pool2d_input_grad(*arguments, w.float().to(DEVICE), x.shape, *geometry(case))
    dw, db = L.conv2d_relu_max_pool2d_weight_grad(*arguments, x.float().to(DEVICE), w.shape, *geometry(case), True)
    assert not any(t.count_nonzero() for t in (dx, dw, db))


LENET = (1, 1), (0,) * 4, (1, 1), 1, "zeros", (2, 2), (2, 2), (0, 0)


@pytest.mark.parametrize(
    "dtype, dy, w, change",
    [
        (torch.float64, (8, 16, 5, 5), (16, 6, 5, 5), {}),
        (torch.float16, (8, 16, 5, 5), (16, 3, 5, 5), {3: 2}),  # groups
        (torch.float16, (8, 16, 5, 5), (16, 6, 5, 5), {4: "reflect"}),
        (torch.float16, (8, 16, 5, 5), (16, 6, 5, 5), {5: (3, 3)}),  # window
        (torch.float16, (8, 16, 5, 5), (16, 16, 3, 3), {}),
        (torch.float16, (8, 16, 5, 5), (16, 8, 5, 5), {}),
        (torch.float16, (8, 16, 5, 5), (16, 6, 1, 1), {0: (4, 4)}),  # stride
        (torch.float16, (8, 16, 50, 50), (16, 6, 5, 5), {}),
    ],
    ids=str,
)
def test_other_convolutions_go_by_the_dense_gradient(dtype, dy, w, change):
    def serves(dy, w, geometry):
        return chooser.gradients_are_fused(dy, w, *geometry)

    assert not serves(torch.empty(dy, dtype=dtype), w, [change.get(i, value) for i, value in enumerate(LENET)])
    assert serves(torch.empty(8, 16, 5, 5, dtype=torch.float16), (16, 6, 5, 5), LENET)
    assert serves(torch.empty(32, 16, 50, 50, dtype=torch.float16), (16, 6, 5, 5), LENET)


def test_full_precision_goes_by_the_dense_gradient(full_precision):
    assert not chooser.gradients_are_fused(torch.empty(8, 16, 5, 5), (16, 6, 5, 5), *LENET)

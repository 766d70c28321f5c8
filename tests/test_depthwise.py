"""Depthwise convolution: every form of its kernels, reached and right, against float64; see kernels/conv2d/lines.py."""

import pytest
import torch
import torch.nn.functional as TF
from exact import check_linear
from test_conv2d import channels_last

import tritonnet.nn.functional as F

# The forms of the depthwise kernels: (C, MULT, H, W), (KH, KW), arguments, channels_last, and constants of the launches
# of (forward, input gradient, weight gradient). The last of MEET is the number of pixels in a vector.
FORMS = {
    "vectors of channels": (
        (16, 1, 9, 16), (3, 3), dict(padding=1), True,
        dict(UNROLL=3), dict(ADJACENT=True, UNROLL=3), dict(ROWS=3, WHOLE=True),
    ),
    "lines that are not whole": (
        (12, 2, 6, 9), (3, 3), dict(padding=1, stride=(1, 2)), True,
        {}, dict(ADJACENT=True), dict(WHOLE=False),
    ),
    "a loop over rows": (
        (9, 1, 9, 7), (5, 5), dict(padding=2, stride=2), True,
        dict(UNROLL=1), dict(ADJACENT=True, UNROLL=1), dict(ROWS=5),
    ),
    "rows of taps in programs of their own": (
        (3, 1, 13, 12), (7, 7), dict(padding=(3, 2), dilation=(1, 2)), True,
        dict(UNROLL=1), dict(ADJACENT=True), dict(ROWS=1),
    ),
    "groups of a row's taps": (
        (2, 2, 3, 30), (2, 18), dict(padding=(0, 9)), False,
        dict(UNROLL=1), dict(ADJACENT=False), dict(ROWS=1),
    ),
    "pixels a stride apart": (
        (3, 1, 11, 29), (3, 4), dict(stride=(2, 9), dilation=(1, 3), padding=2), True,
        {}, dict(ADJACENT=False), {},
    ),
    "a stride over the image": (
        (3, 2, 5, 4), (3, 3), dict(stride=(7, 20), dilation=(1, 2), padding=2), True,
        {}, dict(ADJACENT=False, PHASES_H=5, PHASES_W=4), {},
    ),
    "vectors of pixels": (
        (3, 2, 7, 16), (3, 5), dict(padding=(1, 2)), False,
        dict(UNROLL=3, VECTOR=4), dict(ADJACENT=True, VECTOR=4), dict(ROWS=3, VECTOR=4),
    ),
    "vectors of pixels, strided": (
        (3, 1, 9, 16), (3, 3), dict(padding=1, stride=2), False,
        dict(VECTOR=4), dict(ADJACENT=True, VECTOR=4), dict(VECTOR=4),
    ),
    "single pixels": (
        (3, 1, 5, 7), (3, 3), dict(padding=1, stride=(3, 3)), False,
        dict(VECTOR=1), dict(ADJACENT=True, VECTOR=1), dict(VECTOR=1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.sampled(2)
def test_forms_of_depthwise(form, device, monkeypatch):
    from tritonnet.kernels import launching

    (C, mult, H, W), kernel, arguments, last, *expected = FORMS[form]
    arguments, seen, launch = dict(groups=C, **arguments), {}, launching.launch

    def recorded(kernel, grid, *args, **options):
        seen[kernel.fn.__name__] = options
        return launch(kernel, grid, *args, **options)

    monkeypatch.setattr(launching, "launch", recorded)
    # A launch that is planned already would not be seen.
    launching.forget()
    # In float64 the interpreter would have shorter lines and no vectors.
    x, w = torch.randn(2, C, H, W).double(), torch.randn(C * mult, 1, *kernel).double()
    OH, OW = TF.conv2d(x, w, **arguments).shape[2:]
    pixels = 2 * OH * OW
    check_linear(
        lambda x, w, b: F.conv2d(x, w, b, **arguments),
        lambda x, w, b: TF.conv2d(x, w, b, **arguments),
        (x, w, torch.randn(C * mult).double()),
        [w[0].numel() + 1, mult * w[0].numel(), pixels, pixels], torch.float32, device,
        channels_last if last else torch.clone,
    )  # fmt: skip
    for name, constants in zip(("forward", "input_grad", "weight_grad"), expected):
        options = seen[f"depthwise_{name}_kernel"]
        assert constants == {constant: options[constant] for constant in constants}, name


@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
@pytest.mark.parametrize("stride", [1, 2, (3, 1)], ids=str)
@pytest.mark.parametrize("kernel", [(1, 1), (2, 3), (5, 4)], ids=str)
@pytest.mark.sampled(2)
def test_geometries_of_depthwise(kernel, stride, mode, last, device):
    import tritonnet.nn as nn

    arguments = dict(stride=stride, padding=(1, 2), groups=6, padding_mode=mode, dtype=torch.float64)
    ours, theirs = (module.Conv2d(6, 12, kernel, **arguments) for module in (nn, torch.nn))
    x, w = torch.randn(2, 6, 7, 8).double(), torch.randn(12, 1, *kernel).double()

    def call(layer):
        return lambda x, w, b: torch.func.functional_call(layer, {"weight": w, "bias": b}, (x,))

    pixels = 2 * theirs(x)[0, 0].numel()
    check_linear(
        call(ours), call(theirs), (x, w, torch.randn(12).double()),
        [w[0].numel() + 1, 9 * 2 * w[0].numel(), pixels, pixels], torch.float64, device,
        channels_last if last else torch.clone,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "contiguous"])
def test_infinities_stay_where_they_belong(last, device):
    """Pixels past the end of a line and taps past the end of a window are left out: 0 times infinity would be NaN."""
    prepare = channels_last if last else torch.clone
    for width, stride in ((9, 1), (9, 2), (8, 3), (30, 9)):
        x, w = torch.randn(1, 2, 5, width), torch.randn(2, 1, 3, 3)
        arguments = dict(stride=stride, padding=1, groups=2)
        dy = torch.randn_like(TF.conv2d(x, w, **arguments))
        for spoilt in (x, dy):
            kept = spoilt.clone()
            spoilt[..., -1] = float("inf")
            found = []
            for f, move in ((F, lambda t: prepare(t.to(device))), (TF, torch.Tensor.double)):
                leaves = [move(t).detach().requires_grad_() for t in (x, w)]
                y = f.conv2d(*leaves, **arguments)
                found.append([t.detach().cpu() for t in (y, *torch.autograd.grad(y, leaves, move(dy)))])
            for ours, theirs in zip(*found):
                finite = theirs.isfinite()
                torch.testing.assert_close(ours[finite], theirs[finite].float())
            spoilt.copy_(kept)

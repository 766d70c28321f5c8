"""How far a result may lie from the float64 truth: what its number format explains and no more.

A sum of K products a * b, each exact, added in a format of unit roundoff u and rounded to one of unit roundoff v, lies
within v * |truth| + K * u * sum |a * b| of the truth (Higham, Accuracy and Stability of Numerical Algorithms, 2002,
chapter 3, in first order).

tf32 takes from each float32 operand its sign, its exponent and the first 10 of the 23 bits behind the point. The matrix
units ignore the other 13, and the PTX of the kernels rounds nothing (cvt.rna.tf32) before it hands operands to mma and
wgmma: they are cut off. A normal number 1.f * 2^n loses less than 2^(n - 10). So a becomes a * (1 - d), b becomes
b * (1 - e), with 0 <= d, e < 2^-10, and a * b loses a * b * (d + e - d * e), less than 2^-9 of it and always towards
zero; a sum of products of one sign may lose nearly that much too. Operands that are rounded to nearest, as other
libraries may have them, are off by half as much.
"""

import torch

ROUNDOFF = {
    dtype: torch.finfo(dtype).eps / 2 for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}
DTYPES = tuple(ROUNDOFF)
# Sums are kept in float32 or wider; the reference of a float64 case is a float64 sum too.
SUM = {dtype: min(u, ROUNDOFF[torch.float32]) for dtype, u in ROUNDOFF.items()}
# The largest relative loss of a product whose two operands are cut off to tf32.
TF32 = 2.0**-9


def assert_exact(name, actual, truth, magnitude, terms, tf32=False):
    """Checks `actual` against the float64 `truth`, a sum of `terms` products whose magnitudes sum to `magnitude`."""
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(truth.shape)}"
    dtype, actual = actual.dtype, actual.detach().cpu().double()
    u = SUM[dtype] * (terms + 2) + (TF32 if tf32 and dtype == torch.float32 else 0)
    bound = ROUNDOFF[dtype] * truth.abs() + u * magnitude + torch.finfo(dtype).smallest_normal * ROUNDOFF[dtype] * 2
    excess = ((actual - truth).abs() - bound).nan_to_num(nan=float("inf"))
    if excess.numel():
        assert excess.max() <= 0, (
            f"{name}: off by {(actual - truth).abs().max():.3g}, over the bound by {excess.max():.3g}"
        )


def run(function, inputs, dy, leaf):
    """function(*inputs) and the gradients of sum(y * dy); `leaf` prepares each input for the function."""
    leaves = [None if t is None else leaf(t).requires_grad_() for t in inputs]
    y = function(*leaves)
    wanted = [t for t in leaves if t is not None]
    return y, torch.autograd.grad(y, wanted, leaf(dy))


def check_linear(ours, theirs, inputs, terms, dtype, device, prepare=lambda t: t, tf32=False):
    """Checks an operator that is linear in each input: its result and every gradient, against torch in float64.

    Args:
        ours, theirs: functions of the inputs.
        inputs: float64 tensors, or None.
        terms: products in each sum of the result and of the gradients, [y, dx, dw, ...].
        prepare: lays out a tensor that holds the values of `dtype`.
    """
    inputs = [None if t is None else t.to(dtype).double() for t in inputs]
    dy = torch.randn(theirs(*inputs).shape, dtype=torch.float64).to(dtype).double()
    y, grads = run(ours, inputs, dy, lambda t: prepare(t.to(device, dtype)).detach())
    truth, true_grads = run(theirs, inputs, dy, torch.clone)
    magnitude, sizes = run(theirs, [None if t is None else t.abs() for t in inputs], dy.abs(), torch.clone)
    names = ["y", *(f"gradient {i}" for i in range(len(grads)))]
    rows = zip(names, (y, *grads), (truth, *true_grads), (magnitude, *sizes), terms)
    for name, actual, true, size, count in rows:
        assert actual.dtype == dtype
        assert_exact(name, actual, true.detach(), size.detach(), count, tf32)
    return y

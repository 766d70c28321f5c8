"""The gate before any timing: results are compared with float64, within the error that the number format explains.

That error is found by running the same operators in float64 with each operand and each result rounded to the format,
forward and backward. This covers what a bound on sums does not: where two rounded values tie for a maximum, or a relu's
input is next to zero, the gradient goes to another element.

It does not cover implementations that round more often, such as one that adds the bias to a product that is already
rounded. Of values around 1 in bfloat16 about one in a thousand then has another sign, and the corresponding entry of
the gradient is entirely wrong. Where the result shows which elements passed the relu, gradients are therefore compared
with those of float64 through the same elements; float64 itself may differ in these only next to zero.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from . import FORMATS

# Kernels differ from the rounded run in the order of their sums, and round intermediate results that it does not.
FACTOR = 4
# In tf32 the rounded run truncates operands exactly as matrix units do.
FACTOR_TF32 = 2
# Error of sums in float32: thousands of terms in any order, or by Winograd's transforms.
SUMS = 1e-4
# How many decisions (signs at a relu, maxima of a window) may fall differently where sums are nearly equal.
FLIPS = 4

_PRODUCTS = {torch.conv2d, F.linear}
OPERATORS = _PRODUCTS | {
    F.relu, torch.relu, torch.max_pool2d, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.cross_entropy,
    F.relu6, F.leaky_relu, F.silu, F.hardswish, F.gelu, F.sigmoid, F.hardsigmoid, torch.Tensor.sigmoid,
    torch.Tensor.mul,
}  # fmt: skip
# The operators of the networks of --inference that compute a result. `+=` is add_, whose result replaces its operand.
OF_NETWORKS = OPERATORS | {
    F.batch_norm, F.hardtanh, torch.sigmoid, torch.Tensor.add, torch.Tensor.add_,
}  # fmt: skip


def _rounded(t, format):
    """float64 `t`, rounded as `format` rounds the operands of a product."""
    dtype, precision = FORMATS[format]
    t = t.to(dtype)
    if precision == "tf32":  # truncated, as by matrix units: 10 bits of the mantissa stay
        t = (t.view(torch.int32) & ~0x1FFF).view(torch.float32)
    return t.double()


class _Round(torch.autograd.Function):
    """Rounds a tensor forward to one format and its gradient to another."""

    @staticmethod
    def forward(ctx, t, format, grad_format):
        ctx.format = grad_format
        return _rounded(t, format)

    @staticmethod
    def backward(ctx, grad):
        return _rounded(grad, ctx.format), None, None


class Rounding(TorchFunctionMode):
    """Inside, some operators in float64 round as `format` does."""

    def __init__(self, format, operators=OPERATORS):
        super().__init__()
        self.format, self.operators = format, operators
        self.stored = "float32" if format == "tf32" else format

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function not in self.operators:
            return function(*args, **kwargs or {})
        # A gradient is stored too, and then an operand of the next product.
        operand = self.format if function in _PRODUCTS else self.stored
        x, *rest = args
        args = [_Round.apply(x, operand, self.stored), *rest]
        if function in _PRODUCTS:
            args[1] = _Round.apply(args[1], operand, self.stored)
        return _Round.apply(function(*args, **kwargs or {}), self.stored, operand)


class Deciding(TorchFunctionMode):
    """Inside, relu passes the elements that `passed` marks, whatever their sign, and keeps its input in `given`."""

    def __init__(self, passed):
        super().__init__()
        self.passed, self.given = passed, None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function not in (F.relu, torch.relu):
            return function(*args, **kwargs or {})
        self.given = args[0].detach()
        return torch.where(self.passed, args[0], 0.0)


class Results(NamedTuple):
    """What a call computes: values, gradients, and how many decisions direct the gradients.

    Values, gradients or one of the gradients are None if they were not asked for.
    """

    values: list
    gradients: list
    decisions: int = 0


def _errors(actual, truth):
    """Relative errors of a tensor: by the root mean square, and by the largest element."""
    difference = actual.detach().double() - truth
    norms = [(torch.linalg.vector_norm(t.detach()), t.detach().abs().max()) for t in (difference, truth)]
    return [(d / t).item() if t else math.inf * d.item() if d else 0.0 for d, t in zip(*norms)]


class Gate:
    """Accepts results whose distance from `truth` is explained by the number format.

    Args:
        truth: Results in float64.
        rounded: Results in float64 under Rounding, whose distance from the truth is what the format explains.
        format: the key of FORMATS.
        decided: where the value is the result of a relu, function of a bool tensor that marks what passes the relu:
            the gradients in float64 if just that passes, and the relu's input there.
    """

    def __init__(self, truth, rounded, format, decided=None):
        self.truth, self.decided = truth, decided
        factor = FACTOR_TF32 if format == "tf32" else FACTOR
        roundoff = torch.finfo(FORMATS[format][0]).eps / 2
        flips = math.sqrt(FLIPS / truth.decisions) if truth.decisions else 0.0
        self.allowed = []
        for true, near, slack in zip(truth[:2], rounded[:2], (SUMS, SUMS + flips)):
            # The largest error of all tensors: that of a small tensor is up to chance, and a single value may be exact.
            errors = [_errors(*pair) for pair in zip(near, true)]
            errors += [(roundoff, roundoff) for t in true if t.numel() == 1]
            self.allowed.append([factor * max(e) + slack for e in zip(*errors)])

    def complaint(self, results, dtype):
        """What is wrong with `results`, or None."""
        wrong = None
        if results.values is not None:
            wrong = self._complaint("value", results.values, self.truth.values, dtype)
        if wrong or results.gradients is None:
            return wrong
        wrong = self._complaint("gradient", results.gradients, self.truth.gradients, dtype)
        if wrong and self.decided:
            (value,), (true,) = results.values, self.truth.values
            passed = value > 0
            gradients, given = self.decided(passed)
            # A sign may differ where the input is as near to zero as values may be to the truth.
            furthest = (given * (passed != (given > 0))).abs().max().item()
            if furthest > (most := self.allowed[0][1] * true.abs().max().item()):
                return f"{wrong}, and {furthest:.2g} from zero the relu has another sign, {most:.2g} allowed"
            wrong = self._complaint("gradient", results.gradients, gradients, dtype)
        return wrong

    def _complaint(self, kind, actual, truth, dtype):
        """What is wrong with the values or the gradients, or None."""
        allowed = self.allowed[kind == "gradient"]
        if len(actual) != len(truth):
            return f"{len(actual)} {kind}s, not {len(truth)}"
        for i, (a, t) in enumerate(zip(actual, truth)):
            if a is None:
                continue
            # The change of a parameter is computed in float64.
            if a.shape != t.shape or (a.dtype != dtype and kind == "value"):
                return f"{kind} {i} is {a.dtype} {list(a.shape)}, not {dtype} {list(t.shape)}"
            # One decision that falls differently may change one element of a gradient by its whole value.
            norms = 1 if kind == "gradient" and self.truth.decisions else 2
            for error, most in list(zip(_errors(a, t), allowed))[:norms]:
                if not error <= most:
                    return f"{kind} {i} is off by {error:.2g}, {most:.2g} allowed"
        return None

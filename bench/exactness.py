"""The gate before any time is taken: results against float64, with as much error as the number format explains.

What a format explains is found by running the same operators in float64 with each operand and each result rounded to
the format, forward and backward. That covers what no bound by sums does: a maximum that two rounded values tie for, or
a rectifier at a number next to zero, sends a gradient elsewhere.

It does not cover those who round more often, as those do who add the bias to a product that is rounded already: of
numbers around 1 in bfloat16 about one in a thousand then has another sign, and with it an entry of the gradient that is
wrong by all that it is. Where the result itself says what has passed its rectifier, gradients are compared with those
of float64 that pass the same, which has to be what float64 passes but for numbers next to zero.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from . import FORMATS

# Kernels differ from the rounded run in the order of their sums, and round intermediate results that it does not.
FACTOR = 4
# In tf32 the rounded run does to operands what matrix units do: it cuts them off.
FACTOR_TF32 = 2
# Of sums in float32: thousands of terms in any order, or by Winograd's transforms.
SUMS = 1e-4
# So many decisions, signs at a rectifier or maxima of a window, may fall differently where sums are next to equal.
FLIPS = 4

_PRODUCTS = {torch.conv2d, F.linear}
_OPERATORS = _PRODUCTS | {F.relu, torch.relu, torch.max_pool2d, F.max_pool2d, F.cross_entropy}


def _rounded(t, format):
    """float64 `t`, as `format` takes the operands of a product."""
    dtype, precision = FORMATS[format]
    t = t.to(dtype)
    if precision == "tf32":  # cut off, as matrix units do: 10 bits of the mantissa stay
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
    """Inside, convolutions, linear, relu, max_pool2d and cross_entropy in float64 round as `format` does."""

    def __init__(self, format):
        super().__init__()
        self.format = format
        self.stored = "float32" if format == "tf32" else format

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function not in _OPERATORS:
            return function(*args, **kwargs or {})
        # A gradient is stored too, and then an operand of the next product.
        operand = self.format if function in _PRODUCTS else self.stored
        x, *rest = args
        args = [_Round.apply(x, operand, self.stored), *rest]
        if function in _PRODUCTS:
            args[1] = _Round.apply(args[1], operand, self.stored)
        return _Round.apply(function(*args, **kwargs or {}), self.stored, operand)


class Deciding(TorchFunctionMode):
    """Inside, relu lets through what `passed` says, whatever the sign is, and leaves in `given` what it was given."""

    def __init__(self, passed):
        super().__init__()
        self.passed, self.given = passed, None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function not in (F.relu, torch.relu):
            return function(*args, **kwargs or {})
        self.given = args[0].detach()
        return torch.where(self.passed, args[0], 0.0)


class Results(NamedTuple):
    """What a call computes: values, and gradients, None if not asked for; decisions may send those elsewhere."""

    values: list
    gradients: list
    decisions: int = 0


def _errors(actual, truth):
    """Relative errors of a tensor, by the root of the mean square and by the largest."""
    difference = actual.detach().double() - truth
    norms = [(torch.linalg.vector_norm(t.detach()), t.detach().abs().max()) for t in (difference, truth)]
    return [(d / t).item() if t else math.inf * d.item() if d else 0.0 for d, t in zip(*norms)]


class Gate:
    """Lets results pass that lie as near to `truth` as the number format explains.

    Args:
        truth: Results in float64.
        rounded: Results in float64 under Rounding, whose distance from the truth is what the format explains.
        format: the key of FORMATS.
        decided: where the value is a rectifier's result, function of what passes that, as a tensor of bool: the
            gradients in float64 if just that passes, and what the rectifier is given there.
    """

    def __init__(self, truth, rounded, format, decided=None):
        self.truth, self.decided = truth, decided
        factor = FACTOR_TF32 if format == "tf32" else FACTOR
        roundoff = torch.finfo(FORMATS[format][0]).eps / 2
        flips = math.sqrt(FLIPS / truth.decisions) if truth.decisions else 0.0
        self.allowed = []
        for true, near, slack in zip(truth[:2], rounded[:2], (SUMS, SUMS + flips)):
            # The largest of all tensors: the error of a small one is up to chance, down to one number that is exact.
            errors = [_errors(*pair) for pair in zip(near, true)]
            errors += [(roundoff, roundoff) for t in true if t.numel() == 1]
            self.allowed.append([factor * max(e) + slack for e in zip(*errors)])

    def complaint(self, results, dtype):
        """What is wrong with `results`, or None."""
        wrong = self._complaint("value", results.values, self.truth.values, dtype)
        if wrong or results.gradients is None:
            return wrong
        wrong = self._complaint("gradient", results.gradients, self.truth.gradients, dtype)
        if wrong and self.decided:
            (value,), (true,) = results.values, self.truth.values
            passed = value > 0
            gradients, given = self.decided(passed)
            # A sign may be another's where the number is as near to zero as values may be to the truth.
            furthest = (given * (passed != (given > 0))).abs().max().item()
            if furthest > (most := self.allowed[0][1] * true.abs().max().item()):
                return f"{wrong}, and {furthest:.2g} from zero the rectifier has another sign, {most:.2g} allowed"
            wrong = self._complaint("gradient", results.gradients, gradients, dtype)
        return wrong

    def _complaint(self, kind, actual, truth, dtype):
        """What is wrong with the values or the gradients, or None."""
        allowed = self.allowed[kind == "gradient"]
        if len(actual) != len(truth):
            return f"{len(actual)} {kind}s, not {len(truth)}"
        for i, (a, t) in enumerate(zip(actual, truth)):
            # The change of a parameter is computed in float64.
            if a.shape != t.shape or (a.dtype != dtype and kind == "value"):
                return f"{kind} {i} is {a.dtype} {list(a.shape)}, not {dtype} {list(t.shape)}"
            # One decision that falls differently may move one element of a gradient by all that it is.
            norms = 1 if kind == "gradient" and self.truth.decisions else 2
            for error, most in list(zip(_errors(a, t), allowed))[:norms]:
                if not error <= most:
                    return f"{kind} {i} is off by {error:.2g}, {most:.2g} allowed"
        return None

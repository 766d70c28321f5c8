"""The operators in terms of torch's own, for whatever runs exported programs and knows those alone."""

from collections.abc import Callable
from typing import Any

from torch._ops import OpOverload

from . import ops, reference

# The reference's own takes the statistics for constants: a program that is decomposed and then trained needs their
# derivatives too, which the same formula in single steps has.
_DIFFERENTIABLE = {ops.batch_norm: reference.epilogue}


def _in_plain_torch(operator):
    function = _DIFFERENTIABLE.get(operator) or getattr(reference, operator._schema.name.partition("::")[2])

    def decomposed(*args):
        return function(*[tuple(a) if isinstance(a, list) else a for a in args])

    return decomposed


def decompositions() -> dict[OpOverload, Callable[..., Any]]:
    """The reference of every operator of tritonnet, for torch.export.ExportedProgram.run_decompositions.

    program = torch.export.export(model, (images,)).run_decompositions(tritonnet.decompositions())

    The program then consists of torch's operators alone. torch.onnx.export, given a model, does this by itself.

    Returns:
        {operator: function of its arguments that calls torch's operators}.
    """
    return {op: _in_plain_torch(op) for op in vars(ops).values() if isinstance(op, OpOverload)}

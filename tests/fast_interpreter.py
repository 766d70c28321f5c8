"""Caches what Triton's interpreter would work out again for each launch and each operation.

Nine tenths of its time are Python's: for each launch and each call of a helper it searches triton.language for the
functions to replace, and for each operation it computes shapes and types that it has just computed. With this cache a
launch takes a third of the time and does the same in the same order. The patches hold while a kernel runs and no
longer: code that compiles kernels is left alone. A release of Triton without these parts runs at its own speed.
"""

import functools
import math
from types import SimpleNamespace

import triton.language as tl
from triton.language import core
from triton.runtime import interpreter

# The parts of Triton that are replaced or relied upon.
PARTS = {
    interpreter: ("_LangPatchScope", "_get_np_dtype", "_patch_lang", "interpreter_semantic"),
    core: ("block_type", "constexpr", "tensor", "tuple"),
    getattr(interpreter, "interpreter_semantic", None): (
        "binary_op_type_checking_impl", "computation_type_impl",
    ),
}  # fmt: skip


def install():
    if all(hasattr(owner, name) for owner, names in PARTS.items() for name in names):
        interpreter._get_np_dtype = by_name(interpreter._get_np_dtype)
        interpreter._patch_lang = Patches(interpreter._patch_lang)


def by_name(find):
    """The numpy type of a Triton type, cached by name."""
    known = {}

    def np_dtype(dtype):
        name = dtype.scalar.name
        if name not in known:
            known[name] = find(dtype)
        return known[name]

    return np_dtype


class Patches:
    """Replaces what kernels call, as `interpreter._patch_lang` does, from a list that is made once."""

    def __init__(self, patch):
        self.patch, self.changes, self.hold = patch, None, False

    def __call__(self, fn):
        scope = interpreter._LangPatchScope()
        if self.hold:  # fn is a helper of the running kernel
            return scope
        if self.changes is None:
            self.changes = [*self.of_triton(), *shapes_and_types()]
        for change in self.changes:
            scope.set_attr(*change)
        self.hold = True
        return SimpleNamespace(restore=functools.partial(self.restore, scope))

    def restore(self, scope):
        scope.restore()
        self.hold = False

    def of_triton(self):
        """(object, name, replacement) of all that kernels and the helpers in triton.language may call."""
        scope = self.patch(SimpleNamespace(__globals__={"tl": tl, "core": core}))
        names = {(id(owner), name): (owner, name) for owner, name, _ in scope._changes}
        changes = [(owner, name, with_semantic(getattr(owner, name))) for owner, name in names.values()]
        scope.restore()
        return changes


def with_semantic(replacement):
    """Triton's replacement of a builtin without its copy of the arguments; anything else unchanged."""
    builtin = (getattr(replacement, "__kwdefaults__", None) or {}).get("member")
    if builtin is None:
        return replacement
    function = getattr(builtin, "__wrapped__", builtin)  # skips the check that there is a semantic

    def called(*args, **kwargs):
        kwargs["_semantic"] = interpreter.interpreter_semantic
        return function(*args, **kwargs)

    return called


def described(operand):
    """What Triton makes of an operand in a binary operation depends on this alone."""
    kind = type(operand)
    if kind is core.tensor:
        return operand.type.name
    return kind, operand, math.copysign(1, operand) if kind is float else None  # 0.0 == -0.0


def as_operand(operand, result):
    """A function of operands like this one that gives what Triton gave for it, but leaves broadcasting to numpy.

    One of the two operands has each of the dimensions, so that the result of the operation is the same.
    """
    type_of_result = result.type
    if type(operand) is not core.tensor:
        constant = core.tensor(
            interpreter.TensorHandle(result.handle.data.ravel()[:1], result.handle.dtype), type_of_result
        )
        return lambda operand: constant
    if operand.type.name == type_of_result.name:
        return lambda operand: operand
    return lambda operand: core.tensor(operand.handle, type_of_result)


def shapes_and_types():
    """(object, name, replacement) of the functions that compute operands' shapes and types."""
    new_block, semantic = core.block_type.__init__, interpreter.interpreter_semantic
    operands, computation_type = semantic.binary_op_type_checking_impl, semantic.computation_type_impl
    blocks, types, plans = {}, {}, {}

    def block_type(self, element_ty, shape):
        key = tuple(shape.values if type(shape) is core.tuple else shape)
        if key not in blocks:
            new_block(self, element_ty, shape)
            blocks[key] = self.shape, self.numel, str(self.shape)
        self.shape, self.numel, text = blocks[key]
        self.element_ty, self.name = element_ty, f"<{text}, {element_ty}>"

    @functools.cache
    def in_constexpr(*shape):
        return core.tuple([core.constexpr(n) for n in shape]), core.constexpr(math.prod(shape))

    def tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = in_constexpr(*(type.shape.values if type.is_block() else ()))

    def binary_op_type_checking_impl(lhs, rhs, *options, **named):
        if named:
            return operands(lhs, rhs, *options, **named)
        key = described(lhs), described(rhs), options
        if key not in plans:
            results = operands(lhs, rhs, *options)
            kept = [type(a) is not core.tensor or a.type.scalar == b.type.scalar for a, b in zip((lhs, rhs), results)]
            plans[key] = [as_operand(*pair) for pair in zip((lhs, rhs), results)] if all(kept) else None
            return results
        plan = plans[key]
        if plan is None:  # an operand is converted
            return operands(lhs, rhs, *options)
        return plan[0](lhs), plan[1](rhs)

    def computation_type_impl(a_ty, a_is_scalar, b_ty, b_is_scalar, div_or_mod):
        key = a_ty.name, a_is_scalar, b_ty.name, b_is_scalar, div_or_mod
        if key not in types:
            types[key] = computation_type(a_ty, a_is_scalar, b_ty, b_is_scalar, div_or_mod)
        return types[key]

    return [
        (core.block_type, "__init__", block_type),
        (core.tensor, "__init__", tensor),
        (semantic, "binary_op_type_checking_impl", binary_op_type_checking_impl),
        (semantic, "computation_type_impl", computation_type_impl),
    ]

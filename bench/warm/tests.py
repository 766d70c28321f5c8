"""A pytest plugin under which tests launch nothing and compile what they would launch on a GPU; see archive.py.

    TRITONNET_WARM="sm_90 FILE" TRITONNET_TEST_DEVICE=cpu:0 PYTHONPYCACHEPREFIX=/tmp/apart \\
        python -O -m pytest -p bench.warm.tests tests/test_relu.py

What tests compute is garbage. So that they reach their last launch, no comparison stops them: an `assert` only
evaluates its condition, which may launch too. Errors of the compiler go into FILE; other failures mean nothing. Other
runs must not load the test modules that pytest rewrites here, hence PYTHONPYCACHEPREFIX.
"""

import ast
import contextlib
import os
from pathlib import Path
from unittest import mock

import pytest
import torch
from _pytest.assertion import rewrite

from ..no_launch import cpu_for_gpu
from .work import Findings, compile_for

# The reason for which tests are skipped without a GPU; here they run too.
_WANTED = "CUDA graphs need a GPU"
_now = ["-"]


class _ComputedOnly(ast.NodeTransformer):
    """Makes `assert x, y` evaluate x and ignore its value and its exceptions."""

    def visit_Assert(self, node):
        nothing = ast.ExceptHandler(ast.Name("Exception", ast.Load()), None, [ast.Pass()])
        return ast.copy_location(ast.Try([ast.Expr(node.test)], [nothing], [], []), node)


def _compute_only(module, *args):
    ast.fix_missing_locations(_ComputedOnly().visit(module))


class _Anything(contextlib.AbstractContextManager):
    """Stands in for pytest.raises and pytest.warns: the block may end in any way."""

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return mock.MagicMock()

    def __exit__(self, kind, *rest):
        return kind is not None and issubclass(kind, Exception)


class _NoBands(_Anything):
    """Stands in for memory.guard_bands: nothing is stored."""

    def __enter__(self):
        return []

    def __exit__(self, *error):
        pass


def _nothing(*args, **kwargs):
    pass


def _linear_without_truth(ours, theirs, inputs, terms, dtype, device, prepare=lambda t: t, tf32=False):
    """The launches of exact.check_linear, without its comparison."""
    leaves = [None if t is None else prepare(t.to(device, dtype)).detach().requires_grad_() for t in inputs]
    y = ours(*leaves)
    dy = prepare(torch.zeros(y.shape, device=device, dtype=dtype)).detach()
    torch.autograd.grad(y, [t for t in leaves if t is not None], dy)
    return y


def pytest_configure(config):
    target, findings = os.environ["TRITONNET_WARM"].split(" ", 1)
    compile_for(target, Findings(Path(findings)), lambda: f"tests: {_now[0]}")
    rewrite.rewrite_asserts = _compute_only
    pytest.raises = pytest.warns = _Anything
    torch.testing.assert_close = _nothing
    torch.utils.deterministic.fill_uninitialized_memory = False  # which is never used


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session):
    """Replaces the checks before test files import them by name; conftest has made their modules importable."""
    import exact
    import memory

    exact.assert_exact, exact.check_linear, memory.guard_bands = _nothing, _linear_without_truth, _NoBands


def _backend(item):
    """The value of the fixture `backend`, None if a test does not use it."""
    return item.callspec.params.get("backend") if hasattr(item, "callspec") else None


def pytest_collection_modifyitems(items):
    # The reference launches nothing, and the README's training is a process of its own, on the CPU.
    items[:] = [item for item in items if _backend(item) != "reference" and "trained" not in item.fixturenames]
    for item in items:
        for node in item.listchain():
            node.own_markers[:] = [mark for mark in node.own_markers if mark.kwargs.get("reason") != _WANTED]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    _now[0] = item.nodeid
    with cpu_for_gpu():
        yield

"""What the kernels compile to for an A100 and an H100, run without one: see tests/compiled.py and tests/planted.py."""

import re

import pytest
from conftest import run_python


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("file", ["compiled.py", "planted.py"])
def test_as_compiled(file, arch, record_property):
    """In a process of its own: in this one kernels may be the interpreter's."""
    command = "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"tests/{file}"
    result = run_python(*command, TRITONNET_TEST_DEVICE=arch, TRITON_INTERPRET=None, PYTEST_ADDOPTS=None)
    assert result.returncode == 0, result.stdout[-20000:] + result.stderr
    ran = re.search(r"^programs run as compiled for .*: .*\w+_kernel \d+.*$", result.stdout, re.M)
    assert ran, result.stdout
    record_property("summary", f"{file}: {ran[0]}")

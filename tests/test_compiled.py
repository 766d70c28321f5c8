"""The kernels' compiled code for an A100, an H100 and a B200 without one: runs compiled.py and planted.py."""

import re
from importlib.metadata import version

import pytest
from conftest import THOROUGH, run_python

TRITON = version("triton")
# Planted bugs change the code that this release of Triton generates.
of_this_release = pytest.mark.skipif(
    not TRITON.startswith("3.7."), reason=f"planted in triton 3.7's code, not {TRITON}'s"
)
fenced = pytest.mark.skipif(
    TRITON < "3.7.1", reason=f"triton {TRITON} leaves out fence.proxy.async between copies and products (triton #9610)"
)


pytestmark = pytest.mark.skipif(
    TRITON >= "3.8", reason=f"the machine that runs PTX knows the code of triton 3.7, not all of {TRITON}'s"
)

# A convolution; a thorough run has every case.
FEW = "conv2d-bfloat16"


# sm_100 in one format: all of compiled.py takes longer on it than on the other two.
@pytest.mark.parametrize(
    "arch, file, which",
    [
        pytest.param("sm_90", "compiled.py", "", marks=fenced),
        pytest.param("sm_90", "planted.py", "", marks=[of_this_release, pytest.mark.thorough]),
        pytest.param("sm_80", "compiled.py", FEW),
        pytest.param("sm_100", "compiled.py", FEW, marks=fenced),
        pytest.param("sm_80", "compiled.py", "", marks=pytest.mark.thorough),
        pytest.param("sm_80", "planted.py", "", marks=[of_this_release, pytest.mark.thorough]),
        pytest.param("sm_100", "compiled.py", "bfloat16 or under_tf32", marks=[fenced, pytest.mark.thorough]),
    ],
)
def test_as_compiled(arch, file, which, record_property):
    """In a process of its own: in this one Triton's kernels may be interpreted."""
    command = "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"tests/{file}", "-k", which
    of_all = {"TRITONNET_TEST_THOROUGH": str(int(THOROUGH))}
    result = run_python(*command, TRITONNET_TEST_DEVICE=arch, TRITON_INTERPRET=None, PYTEST_ADDOPTS=None, **of_all)
    assert result.returncode == 0, result.stdout[-20000:] + result.stderr
    ran = re.search(r"^programs run as compiled for .*: .*\w+_kernel \d+.*$", result.stdout, re.M)
    assert ran, result.stdout
    record_property("summary", f"{file} {which}: {ran[0]}")

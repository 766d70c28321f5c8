"""What is shipped: the wheel, and the style and types of the source."""

import os
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import run_python

import tritonnet

ROOT = Path(__file__).parents[1]

INSTALLED = """
import importlib, pkgutil, sys
sys.path.insert(0, sys.argv[1])
import torch, tritonnet
has_triton = importlib.util.find_spec("triton") is not None
from tritonnet.cli import main
from tritonnet.data import load_digits
assert tritonnet.__file__.startswith(sys.argv[1]), tritonnet.__file__
from tritonnet import kernels
assert kernels.__file__.startswith(sys.argv[1]), kernels.__file__
with tritonnet.backend("reference"):
    tritonnet.LeNet()(load_digits()[2][:4]).sum().backward()
for module in pkgutil.walk_packages(tritonnet.__path__, "tritonnet."):
    if not module.name.endswith("__main__") and (has_triton or not module.name.startswith("tritonnet.kernels.")):
        importlib.import_module(module.name)
main(["--version"])
"""


def test_wheel_installs_and_runs_outside_the_checkout(tmp_path):
    source, target = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    # A copy, so that nothing is left in the checkout and no earlier build gets in.
    for name in ("kernels", "tritonnet", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    quiet = ("--quiet", "--no-deps", "--disable-pip-version-check")
    build = run_python("-m", "pip", "wheel", str(source), "-w", str(tmp_path), "--no-build-isolation", *quiet)
    assert build.returncode == 0, build.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"tritonnet", f"tritonnet-{tritonnet.__version__}.dist-info"}
    sources = [path.relative_to(ROOT) for folder in ("kernels", "tritonnet") for path in (ROOT / folder).rglob("*.py")]
    shipped = {str(path).removeprefix("tritonnet/") for path in sources} | {"data/mnist10k.npz", "py.typed"}
    assert {f"tritonnet/{name}" for name in shipped} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    install = run_python("-m", "pip", "install", str(wheel), "--no-index", "--target", str(target), *quiet)
    assert install.returncode == 0, install.stderr
    assert (target / "bin" / ("tritonnet.exe" if os.name == "nt" else "tritonnet")).exists()
    result = run_python("-I", "-c", INSTALLED, str(target))
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"tritonnet {tritonnet.__version__}\n"


def test_torch_is_all_that_the_package_needs():
    """Not even NumPy, which a CPU build of torch does not bring."""
    code = """
import sys
sys.modules.update(dict.fromkeys(("numpy", "tqdm", "rich", "matplotlib", "PIL", "triton")))
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if sys.modules.get(name, 0) is None else find(name, *a)
import tritonnet, tritonnet.cli, tritonnet.train
from tritonnet.data import load_digits
tritonnet.LeNet()(load_digits()[0][:2]).sum().backward()
"""
    result = run_python("-c", code, TRITON_INTERPRET=None)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("command", ["check", "format --check"])
def test_style(command):
    result = run_python("-m", "ruff", *command.split())
    assert result.returncode == 0, result.stdout + result.stderr


def test_types(tmp_path):
    """Types in the package, and in a program that uses it: our layers, torch's other names, and a mistake."""
    result = run_python("-m", "mypy")
    assert result.returncode == 0, result.stdout + result.stderr
    program = tmp_path / "program.py"
    program.write_text(
        "import tritonnet.nn as nn\nimport tritonnet.nn.functional as F\n"
        "reveal_type(nn.Conv2d(1, 2, 3))\nreveal_type(nn.LSTM(1, 2))\nF.relu(3)\n"
    )
    said = run_python("-m", "mypy", str(program), MYPYPATH=str(ROOT)).stdout
    assert '"tritonnet.nn.Conv2d"' in said and '"torch.nn.modules.rnn.LSTM"' in said, said
    assert 'program.py:5: error: Argument 1 to "relu"' in said and "Found 1 error" in said, said


def test_the_code_in_the_readmes_runs():
    readmes = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "tritonnet/README.md")]
    blocks = re.findall(r"```python\n(.*?)```", "".join(readmes), re.DOTALL)
    space = {"tritonnet": tritonnet}
    for block in blocks:
        with tritonnet.backend("reference"):
            exec(block, space)
        if "revert" in block and isinstance(space["model"], torch.nn.Sequential):
            assert type(space["model"][0]) is torch.nn.Conv2d
    assert len(blocks) == 5 and space["loss"].isfinite()

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
# What the command line needs beside torch; the package itself needs torch alone.
CLI = ["matplotlib", "pillow>=10.1", "rich"]

setup(
    name="tritonnet",
    version=re.search(r'__version__ = "(.+)"', (HERE / "tritonnet/__init__.py").read_text(encoding="utf-8"))[1],
    description="Triton kernels for convolutional networks, behind the layers and functions of torch.nn",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    # The kernels keep their own folder at the top, but no package called `kernels` is ever installed.
    packages=[*find_packages(include=["tritonnet*"]), *(f"tritonnet.{p}" for p in find_packages(include=["kernels*"]))],
    package_dir={"tritonnet.kernels": "kernels"},
    package_data={"tritonnet": ["py.typed"], "tritonnet.data": ["*.npz", "*.md"]},
    install_requires=["torch>=2.11"],
    # A GPU build of torch brings the Triton that fits it; the extra is for Triton's interpreter on a CPU build.
    extras_require={
        "interpreter": ["triton>=3.6", "numpy"],
        "cli": CLI,
        "bench": ["matplotlib", "tqdm"],
        "test": [
            *CLI,
            "hypothesis",
            "mypy",
            "numpy",
            "onnx",
            "onnxruntime",
            "onnxscript",
            "pytest",
            "pytest-xdist",
            "ruff",
            "setuptools>=77",
            "tqdm",
            "triton>=3.6",
            "tomli; python_version < '3.11'",
            "wheel",
        ],
    },  # fmt: skip
    entry_points={
        "console_scripts": ["tritonnet = tritonnet.cli:main"],
        "torch_dynamo_backends": ["tritonnet = tritonnet.compiler:compile_graph"],
    },
    license="MIT AND CC-BY-SA-3.0",
    license_files=["LICENSE", "tritonnet/data/README.md"],
)

"""tritonnet bench: run the benchmarks in a clone of the repository; they are not installed."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .terminal import UserError

# The clone of the repository, if the install is editable.
ROOT = Path(__file__).resolve().parents[2]


def main(arguments: Sequence[str] | None) -> int:
    if not (ROOT / "bench" / "__main__.py").is_file():
        raise UserError(
            "the benchmarks are not part of the package: run this from a clone of the repository "
            "that is installed with pip install -e '.[cli]'"
        )
    return subprocess.run([sys.executable, "-m", "bench", *(arguments or ())], cwd=ROOT).returncode

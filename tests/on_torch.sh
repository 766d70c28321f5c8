#!/usr/bin/env bash
# Runs the tests on another release of torch, with the triton that it brings:
#     tests/on_torch.sh 2.11.0 tests/test_citizenship.py
#     tests/on_torch.sh 2.11.0 tests/test_machine_code.py    whether triton 3.6.0 compiles the kernels for every GPU
#     tests/on_torch.sh latest
# The virtual environment stays in .venv-torch-VERSION. A release of torch takes several GB.
set -euo pipefail
cd "$(dirname "$0")/.."
version=$1
shift
venv=.venv-torch-$version
python3 -m venv "$venv"
# The interpreter of triton 3.6, which torch 2.11 brings, needs numpy before 2.4.
"$venv/bin/pip" install 'numpy<2.4' "torch$([ "$version" = latest ] || echo "==$version")" -e '.[test]'
"$venv/bin/python" -m pytest -n auto "$@"

#!/usr/bin/env bash
# Packs the kernels that a machine with a GPU will launch, for its Python and torch; see bench/warm/archive.py:
#     bench/warm.sh --target sm_90 --parts quick smoke
#     PYTHON=python3.11 TORCH=2.13.0 bench/warm.sh
# The virtual environment stays in .venv-warm-TORCH; a release of torch takes several GB. The project is not installed
# in it, and runs from this checkout.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3.12}
torch=${TORCH:-2.11.0}
venv=.venv-warm-$torch
if [ ! -e "$venv/complete" ]; then
    "$python" -m venv "$venv"
    # What the kernels' tests import beside torch, which brings the Triton that belongs to it.
    "$venv/bin/pip" install "torch==$torch" filelock numpy pytest pytest-xdist
    touch "$venv/complete"
fi
exec "$venv/bin/python" -m bench.warm pack "$@"

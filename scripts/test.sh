#!/usr/bin/env bash
# Runs the tests in the project's own environment; arguments go to pytest: bash scripts/test.sh tests/test_losses.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # the tensors of the tests are tiny: more threads only wait for each other
exec .venv/bin/python -m pytest "$@"

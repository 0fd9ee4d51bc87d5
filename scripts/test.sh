#!/usr/bin/env bash
# Runs the tests in the project's own environment; arguments go to pytest: bash scripts/test.sh tests/test_losses.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # the tensors of the tests are tiny: more threads only wait for each other
# Two processes, each with whole files; -n 0 keeps everything in one, as a debugger needs.
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"

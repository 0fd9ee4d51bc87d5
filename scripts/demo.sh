#!/usr/bin/env bash
# The whole road on generated data and a small MobileBERT, without a hub; arguments go to scripts/qnli.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # its tensors are tiny: a second thread costs more than it does
exec .venv/bin/python scripts/qnli.py --generated --output_dir runs/demo "$@"

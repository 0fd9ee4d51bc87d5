#!/usr/bin/env bash
# The whole road on generated data and a small MobileBERT, without a hub; arguments go to scripts/qnli.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
exec .venv/bin/python scripts/qnli.py --generated --output_dir runs/demo "$@"

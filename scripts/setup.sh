#!/usr/bin/env bash
# Makes .venv with the tested versions and this project in it (editable). Does nothing when that is done already.
# Which build of torch comes (CPU or CUDA) is decided by pip's own configuration; PYTHON=... picks the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() {
    echo "setup: $*" >&2
    exit 1
}

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3 python3.12 python3.13}; do
        if new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    die "the pinned versions need Python 3.11 or newer; found ${PYTHON:-python3}:" \
        "$("${PYTHON:-python3}" --version 2>&1 || true). Install one, or name it: PYTHON=/path/to/python3.11 bash $0"
}

# Everything that decides what is in .venv; the path too, because an editable install and a venv both contain it.
stamp="$({ pwd -P && cat scripts/constraints.txt pyproject.toml scripts/setup.sh; } | cksum)"
if [[ -x .venv/bin/python && "$(cat .venv/setup-done 2>/dev/null)" == "$stamp" ]]; then
    exit 0
fi

python="$(find_python)"
echo "setup: making .venv with $("$python" --version) (a few minutes, once)"
rm -f .venv/setup-done
if ! new_enough .venv/bin/python || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    "$python" -m venv --clear .venv ||
        die "could not make .venv: on Debian and Ubuntu the module is a package of its own (apt install python3-venv)"
fi

pip_install() {
    .venv/bin/python -m pip install -qq --disable-pip-version-check -c scripts/constraints.txt "$@" ||
        die "pip could not install: $*. Is a package registry reachable, and does it have the pinned versions?"
}
# torch first: it is by far the largest, and it brings the setuptools that builds this project below.
pip_install torch==2.13.0 setuptools
pip_install --no-build-isolation -e ".[dev]"
echo "$stamp" >.venv/setup-done
echo "setup: done; activate it with: source .venv/bin/activate"

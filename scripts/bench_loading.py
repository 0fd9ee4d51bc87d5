"""What importing hf_r2 and loading packed models takes, each in fresh processes that take turns: medians, and ratios to float.

    python scripts/bench_loading.py --rounds 9

Loads a MobileBERT of the real size with random weights. The import is timed as a whole process; a load as the first call of
`from_pretrained` in a process that has imported everything.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import transformers
from transformers import MobileBertConfig, MobileBertForSequenceClassification

import benching
from hf_r2 import R2QuantConfig, quantize

IMPORTS = {
    "import transformers, torch": "import transformers, torch",
    "the same and hf_r2": "import hf_r2, transformers, torch",
}
LOAD = """
import sys, time, hf_r2, torch, transformers
from transformers import AutoModelForSequenceClassification, MobileBertForSequenceClassification
transformers.utils.logging.disable_progress_bar()
start = time.perf_counter()
AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
print(time.perf_counter() - start)
"""
RECIPES = {
    "8 bits": R2QuantConfig(weight_bits=8),
    "4 bits": R2QuantConfig(weight_bits=4),
    "3 bits": R2QuantConfig(weight_bits=3),
    "4 bits, entropy-coded": R2QuantConfig(weight_bits=4, storage="entropy"),
}


def seconds(*command: str) -> tuple[float, str]:
    """What a new Python takes for `command`, and what it prints."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", *command], check=True, capture_output=True, text=True)
    return time.perf_counter() - start, done.stdout


def saved(folder: Path) -> dict[str, Path]:
    """Checkpoints by name; the float one first."""
    transformers.utils.logging.disable_progress_bar()
    model = MobileBertForSequenceClassification(MobileBertConfig())
    model.save_pretrained(folder / "float")
    for name, config in RECIPES.items():
        quantize(model, config).save_pretrained(folder / name)
    return {"float": folder / "float", **{name: folder / name for name in RECIPES}}


def table(times: dict[str, list[float]]) -> str:
    """Medians, and their ratios to the first."""
    first = statistics.median(next(iter(times.values())))
    lines = [f"| {name} | {1e3 * (t := statistics.median(v)):.0f} | {t / first:.2f} |" for name, v in times.items()]
    return "\n".join(["| | ms | ratio |", "|---|---:|---:|", *lines])


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rounds", type=int, default=9, help="fresh processes of each kind")
    rounds = parser.parse_args().rounds
    imports: dict[str, list[float]] = {name: [] for name in IMPORTS}
    with tempfile.TemporaryDirectory() as folder:
        folders = saved(Path(folder))
        loads: dict[str, list[float]] = {name: [] for name in folders}
        for _ in range(rounds):
            for name, code in IMPORTS.items():
                imports[name].append(seconds(code)[0])
            for name, place in folders.items():
                loads[name].append(float(seconds(LOAD, str(place))[1]))
    print(f"{benching.processor()}\n\n{table(imports)}\n\n{table(loads)}")


if __name__ == "__main__":
    main()

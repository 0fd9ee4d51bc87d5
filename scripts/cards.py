"""Copies the cards of packed models, with their plots, into model_cards/.

    python scripts/cards.py runs/study/imagenette/std-0.05--deployed-0/train/nearest-8bit mobilenet-imagenette-w8 ...
    python scripts/cards.py --deployed runs/bench_export/metrics.json runs/mine/nearest-8bit mobilenet-w8

Pairs of a packed model's folder, which a training script wrote, and the name of the card, which is made anew under that name
from the folder's metrics.json; with `--deployed`, with the latencies, sizes and accuracies of a run of scripts/bench_export.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import common
from hf_r2.model_card import PICTURES, write_card

CARDS = common.ROOT / "model_cards"


def copy_card(folder: Path, name: str, cards: Path, deployed: Mapping[str, Any] | None = None) -> Path:
    """Writes cards/NAME.md and cards/NAME/*.png; returns the first. Ends with one line where the folder lacks what it takes."""
    lacking = [file for file in ("metrics.json", "config.json") if not (folder / file).is_file()]
    if lacking:
        raise SystemExit(f"{folder}: no {', no '.join(lacking)}; packed models that a training script wrote have them")
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    result = next((row["name"] for row in metrics["results"] if row["name"] == folder.name), None)
    card = write_card(folder, metrics, result=result, repo_id=name, deployed=deployed)
    text = card.read_text(encoding="utf-8")
    for picture in PICTURES:
        if f"({picture})" in text:
            (cards / name).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / picture, cards / name / picture)
            text = text.replace(f"({picture})", f"({name}/{picture})")
    cards.mkdir(parents=True, exist_ok=True)
    (cards / f"{name}.md").write_text(text, encoding="utf-8")
    return cards / f"{name}.md"


def main() -> None:
    """Pairs on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "pairs", nargs="+", metavar="FOLDER NAME", help="a packed model's folder, the name of its card"
    )
    parser.add_argument("--deployed", type=Path, metavar="FILE", help="metrics.json of scripts/bench_export.py")
    args = parser.parse_args()
    if len(args.pairs) % 2:
        parser.error(f"folders and names come in pairs, got {len(args.pairs)} words")
    if args.deployed is not None and not args.deployed.is_file():
        parser.error(f"--deployed: there is no file {args.deployed}; scripts/bench_export.py writes one")
    deployed = None if args.deployed is None else json.loads(args.deployed.read_text(encoding="utf-8"))
    for folder, name in zip(args.pairs[::2], args.pairs[1::2], strict=True):
        print(copy_card(Path(folder), name, CARDS, deployed))


if __name__ == "__main__":
    main()

"""Copies the cards of packed models, with their plots, into model_cards/.

    python scripts/cards.py runs/study/imagenette/relative-0.05--deployed-0/train/nearest-8bit mobilenet-imagenette-w8 ...

Pairs of a packed model's folder (the training scripts write its card and plots) and the name of the card. Nothing in a card is
edited but the links to its plots.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import common
from hf_r2.model_card import PICTURES

CARDS = common.ROOT / "model_cards"


def copy_card(folder: Path, name: str, cards: Path) -> Path:
    """Writes cards/NAME.md and cards/NAME/*.png; returns the first. Ends with one line where the folder has no card."""
    card = folder / "README.md"
    if not card.is_file():
        raise SystemExit(f"{folder}: no README.md; folders of packed models that a training script wrote have one")
    text = card.read_text(encoding="utf-8")
    for picture in PICTURES:
        if f"({picture})" in text:
            (cards / name).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / picture, cards / name / picture)
            text = text.replace(f"({picture})", f"({name}/{picture})")
    (cards / f"{name}.md").write_text(text, encoding="utf-8")
    return cards / f"{name}.md"


def main() -> None:
    """Pairs on the command line."""
    words = sys.argv[1:]
    if not words or len(words) % 2 or words[0].startswith("-"):
        raise SystemExit(__doc__)
    for folder, name in zip(words[::2], words[1::2], strict=True):
        print(copy_card(Path(folder), name, CARDS))


if __name__ == "__main__":
    main()

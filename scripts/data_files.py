"""Local data files of the scripts: tables read by their ending, checked for rows and columns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

import common

# A TSV of GLUE has bare quotation marks in its sentences: 3 is csv.QUOTE_NONE.
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".parquet": ("parquet", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"delimiter": "\t", "quoting": 3}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
}


def read(file: str) -> Dataset:
    """The rows of a local file (parquet, csv, tsv, json lines), or of NAME:PART, a part of a data set on the hub.

    Ends with one line for what cannot be used.
    """
    path = Path(file)
    if ":" in file and not path.exists() and path.suffix.lower() not in READERS:
        return _from_hub(*file.rsplit(":", 1))
    if path.suffix.lower() not in READERS:
        raise SystemExit(f"{file}: the file type must be one of {', '.join(READERS)}, got {path.suffix or 'none'!r}")
    if not path.is_file():
        raise SystemExit(f"{file}: there is no such file")
    reader, options = READERS[path.suffix.lower()]
    try:
        data = load_dataset(reader, data_files=file, split="train", **options)
    except Exception as error:  # the readers raise errors of a dozen libraries; the cause is what tells
        raise SystemExit(f"{file}: cannot be read as {reader}, or holds no row: {error.__cause__ or error}") from error
    if len(data) == 0:
        raise SystemExit(f"{file}: holds no row")
    return data


def _from_hub(name: str, part: str) -> Dataset:
    common.go_offline_if_hub_is_unreachable()
    try:
        return load_dataset(name, split=part)  # type: ignore[return-value]
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise SystemExit(
            f"cannot get {part} of {name} from the hub or its cache ({reason}). Give a local file in place of {name}:{part}"
        ) from error


def need(columns: Sequence[str], found: Sequence[str] | None, source: str) -> None:
    """Ends with one line that names the columns that `source` lacks, and those it has."""
    missing = [column for column in columns if column not in (found or ())]
    if missing:
        raise SystemExit(
            f"{source}: no column {', '.join(missing)}; needed are {', '.join(columns)}, "
            f"found {', '.join(found or ['none'])}"
        )


def drawn(data: Dataset, most: int, seed: int) -> tuple[Dataset, list[int]]:
    """At most `most` rows, drawn at random, and their numbers in `data`, by which a bad one is found again."""
    rows: list[int] = list(Dataset.from_dict({"row": range(len(data))}).shuffle(seed=seed)[:most]["row"])
    return data.select(rows), rows


def subset(data: Dataset, most: int | None, seed: int) -> Dataset:
    """At most `most` rows, drawn at random; all of them for None."""
    return data if most is None or most >= len(data) else data.shuffle(seed=seed).select(range(most))

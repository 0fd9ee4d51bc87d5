"""Question and sentence pairs from local files, or GLUE QNLI from the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from qnli_data import COLUMNS, LABELS

BUILDERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json"}
HUB_NAME = "nyu-mll/glue"


def load_pairs(train_file: str | None, validation_file: str | None) -> DatasetDict:
    """Splits `train` and `validation` with the columns question, sentence and label (0 entailment, 1 not).

    Raises ValueError for a file that is missing, empty, of an unknown kind or without those columns (those found are
    named), and ConnectionError with one line that names `--train_file` where the hub cannot be reached.
    """
    if bool(train_file) != bool(validation_file):
        raise ValueError("--train_file and --validation_file go together; got only one of them")
    if train_file and validation_file:
        data = DatasetDict(train=load_file(train_file), validation=load_file(validation_file))
    else:
        data = load_from_hub()
    for split, rows in data.items():
        missing = [c for c in COLUMNS if c not in rows.column_names]
        if missing:
            raise ValueError(f"{split} lacks the columns {', '.join(missing)}; it has {', '.join(rows.column_names)}")
        if len(rows) == 0:
            raise ValueError(f"{split} holds no rows")
    return data


def load_file(name: str) -> Dataset:
    """One split from a parquet, csv, tsv (as GLUE writes it) or json file; labels as numbers or as GLUE's words."""
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"no such file: {name}")
    if path.suffix not in BUILDERS:
        raise ValueError(f"{name}: files must end in one of {', '.join(BUILDERS)}")
    options: dict[str, Any] = {"delimiter": "\t", "quoting": 3} if path.suffix == ".tsv" else {}
    data = load_dataset(BUILDERS[path.suffix], data_files=str(path), split="train", **options)
    if "label" in data.column_names and data.features["label"].dtype in ("string", "large_string"):
        unknown = set(data.unique("label")) - set(LABELS)
        if unknown:
            raise ValueError(
                f"{name}: unknown labels {', '.join(sorted(unknown))}; known ones are {', '.join(LABELS)}"
            )
        words = [LABELS.index(label) for label in data["label"]]
        data = data.remove_columns("label").add_column("label", words)
    return data


def load_from_hub() -> DatasetDict:
    """GLUE QNLI; asks the hub first, for `load_dataset` would retry for minutes where it cannot be reached."""
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(HUB_NAME, timeout=10)
    except Exception as error:
        raise ConnectionError(
            f"the hub cannot be reached for {HUB_NAME} ({type(error).__name__}); pass --train_file and --validation_file, "
            "or --generated"
        ) from error
    data = load_dataset(HUB_NAME, "qnli")
    return DatasetDict(train=data["train"], validation=data["validation"])

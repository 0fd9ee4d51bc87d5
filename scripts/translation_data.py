"""Pairs of sentences for the translation scripts: from the hub or from files, and their tokens."""

from __future__ import annotations

from typing import Any

from datasets import Dataset, load_dataset
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase

import data_files

HUB_DATA = ("wmt/wmt14", "de-en")
HUB_PARTS = {"train": "train", "test": "test"}  # its test split is newstest2014, which the papers report


def from_hub(name: str, config: str | None, part: str, source: str, target: str) -> Dataset:
    """A split of a translation data set on the hub, or in the cache; ends with one line where neither has it."""
    try:
        data: Any = load_dataset(name, config, split=part)
    except (OSError, ValueError) as error:  # ValueError: no such config or split
        raise SystemExit(
            f"cannot get {part} of {name} {config or ''} from the hub or its cache ({error}). Give local files with "
            "--train_file and --validation_file"
        ) from error
    return pairs(data, source, target, f"{part} of {name}")


def from_file(file: str, source: str, target: str) -> Dataset:
    """Pairs from a local parquet, csv, tsv or json file; ends with one line for a file that cannot be used."""
    return pairs(data_files.read(file), source, target, file)


def pairs(data: Dataset, source: str, target: str, name: str) -> Dataset:
    """Columns `source` and `target`, from columns named by the languages or `translation` with both of them.

    Pairs with an empty side are left out, and counted. Ends with one line where a language is missing or nothing is left.
    """
    languages = [source, target]
    if "translation" in data.column_names:
        inner = data.features["translation"]
        data_files.need(
            languages, list(inner) if isinstance(inner, dict) else _languages(inner), f"{name}, translation"
        )
        data = data.flatten()
        data = data.rename_columns({f"translation.{language}": language for language in languages})
    data_files.need(languages, data.column_names, name)
    data = data.select_columns(languages).rename_columns({source: "source", target: "target"})
    full = data.filter(
        lambda sources, targets: [
            bool(s and s.strip() and t and t.strip()) for s, t in zip(sources, targets, strict=True)
        ],
        input_columns=["source", "target"],
        batched=True,
        desc="Looking for empty sides",
    )
    if len(full) < len(data):
        print(f"{name}: {len(data) - len(full)} of {len(data)} pairs have an empty side and are left out")
    if len(full) == 0:
        raise SystemExit(f"{name}: holds no pair")
    return full


def _languages(feature: Any) -> list[str]:
    return list(getattr(feature, "languages", None) or [])


def tokenized(data: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, processes: int | None) -> Dataset:
    """Token ids of the source and `labels` of the target, cut to `max_length` tokens, not padded."""

    def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
        return dict(tokenizer(rows["source"], text_target=rows["target"], truncation=True, max_length=max_length))

    return data.map(encode, batched=True, num_proc=processes, remove_columns=data.column_names, desc="Tokenizing")


def collator(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> DataCollatorForSeq2Seq:
    """Pads rows of `tokenized` into batches, with the decoder's inputs that `model` takes."""
    return DataCollatorForSeq2Seq(tokenizer, model=model)

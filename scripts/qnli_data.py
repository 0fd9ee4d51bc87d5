"""Question and sentence pairs for `scripts/qnli.py`: from the hub, from files, or generated."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    MobileBertConfig,
    MobileBertForSequenceClassification,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

import data_files

HUB_DATA = ("nyu-mll/glue", "qnli")
LABELS = ["entailment", "not_entailment"]  # GLUE's order: 0 means that the sentence holds the answer
COLUMNS = ("question", "sentence", "label")


def from_hub() -> DatasetDict:
    """GLUE QNLI by its name on the hub, or from the cache; ends with one line where neither has it."""
    try:
        data = load_dataset(*HUB_DATA)
    except OSError as error:
        raise SystemExit(
            f"cannot get {' '.join(HUB_DATA)} from the hub or its cache ({error}). Give local files with --train_file "
            "and --validation_file, or try --generated"
        ) from error
    return DatasetDict({part: checked(data[part], f"{part} of {HUB_DATA[0]}") for part in ("train", "validation")})


def from_files(train_file: str, validation_file: str) -> DatasetDict:
    """Pairs from two local files (parquet, csv, tsv, json lines); ends with one line for files it cannot use."""
    parts = {"train": train_file, "validation": validation_file}
    return DatasetDict({part: checked(data_files.read(file), file) for part, file in parts.items()})


def checked(data: Dataset, source: str, rows: Sequence[int] | None = None) -> Dataset:
    """The three columns, labels as 0 and 1 (names of classes are translated); ends with one line for anything else.

    For calibration `rows` are given, the rows' numbers in the file `source`: labels are not looked at, and left out.
    """
    columns = COLUMNS if rows is None else COLUMNS[:2]
    data_files.need(columns, data.column_names, source)
    if len(data) == 0:
        raise SystemExit(f"{source}: holds no row")
    data = data.select_columns(list(columns))
    for column in columns:
        check_filled(data, column, source, rows)
    if rows is not None:
        return data
    found = set(data.unique("label"))
    if found <= {0, 1}:
        return data
    if not found <= set(LABELS):
        shown = ", ".join(sorted(map(repr, found))[:5])
        raise SystemExit(f"{source}: label must be 0 or 1, or {' or '.join(LABELS)}; found {shown}")
    numbers = [LABELS.index(label) for label in data["label"]]
    return data.remove_columns("label").add_column("label", numbers)


def check_filled(data: Dataset, column: str, source: str, rows: Sequence[int] | None) -> None:
    """Ends with one line for empty cells, which are named, and for a column of texts that holds something else."""
    cells: Any = data.select_columns([column]).with_format("arrow")[:][column]
    empty = [i if rows is None else rows[i] for i, is_empty in enumerate(cells.is_null().to_pylist()) if is_empty]
    if empty:
        shown = ", ".join(map(str, sorted(empty)[:5])) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
        raise SystemExit(
            f"{source}: {column} is empty in row {shown} (the first is row 0): fill it in, or leave the row out; "
            "in csv and tsv a word like NA or null alone counts as empty"
        )
    if column != "label" and "string" not in str(cells.type):
        raise SystemExit(f"{source}: {column} must hold text, got {cells.type}")


def tokenized(data: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, *, by_length: bool) -> Dataset:
    """Token ids and `labels` (where there are any), not padded; `by_length` sorts the rows: batches hold less padding."""

    def encode(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        encoded = dict(tokenizer(rows["question"], rows["sentence"], truncation=True, max_length=max_length))
        return {**encoded, "labels": rows["label"]} if "label" in rows else encoded

    data = data.map(encode, batched=True, remove_columns=data.column_names, desc="Tokenizing")
    lengths = [len(ids) for ids in data["input_ids"]]
    return data.select(sorted(range(len(data)), key=lengths.__getitem__)) if by_length else data


NAMES = "anna boris clara daniel elena felix greta henry irina jonas karin leo maria nils olga peter".split()
PLACES = "athens berlin cairo dublin geneva havana kyoto lima madrid oslo paris quito riga sofia tokyo vienna".split()
YEARS = [str(year) for year in range(1820, 1980, 10)]
COUNTS = "two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty sixty".split()
REASONS = "money fame peace science trade safety justice health pleasure freedom".split()
DEEDS = {
    "build": "built",
    "paint": "painted",
    "buy": "bought",
    "sell": "sold",
    "design": "designed",
    "repair": "repaired",
}
THINGS = "bridges towers boats houses engines clocks gardens roads theatres wells chapels windmills".split()
OPENINGS = ["", "as reported , ", "later on , ", "in the end , ", "it is known that ", "according to the letters , "]

# What may be asked for: the question's first words, and how a sentence states the answer.
QUESTIONS = {
    "who": "who {past} the {thing} ?",
    "where": "where did they {deed} the {thing} ?",
    "when": "when did they {deed} the {thing} ?",
    "how many": "how many {thing} did they {deed} ?",
    "why": "why did they {deed} the {thing} ?",
}
FACTS: dict[str, Callable[[random.Random], str]] = {
    "where": lambda rng: f"in {rng.choice(PLACES)}",
    "when": lambda rng: f"in {rng.choice(YEARS)}",
    "why": lambda rng: f"for {rng.choice(REASONS)}",
}


def generated_pair(rng: random.Random) -> dict[str, str | int]:
    """One question, a sentence on the same deed, and whether the sentence holds what was asked for (0) or not (1)."""
    deed, thing = rng.choice(list(DEEDS)), rng.choice(THINGS)
    asked = rng.choice(list(QUESTIONS))
    label = rng.randrange(2)
    others = [kind for kind in QUESTIONS if kind != asked]
    stated = rng.sample(others, rng.randint(1, 3))  # the number of facts tells nothing about the label
    if label == 0:
        stated[0] = asked
    subject = rng.choice(NAMES) if "who" in stated else "they"
    count = f"{rng.choice(COUNTS)} " if "how many" in stated else "the "
    facts = [FACTS[kind](rng) for kind in FACTS if kind in stated]
    rng.shuffle(facts)
    sentence = " ".join([f"{rng.choice(OPENINGS)}{subject} {DEEDS[deed]} {count}{thing}", *facts, "."])
    question = QUESTIONS[asked].format(deed=deed, past=DEEDS[deed], thing=thing)
    return {"question": question, "sentence": sentence, "label": label}


def generated_data(train: int = 8000, validation: int = 1000, seed: int = 0) -> DatasetDict:
    """A small data set of QNLI's form, the same for the same seed; no validation pair occurs in training."""
    rng, seen, rows = random.Random(seed), set(), []
    while len(rows) < train + validation:
        pair = generated_pair(rng)
        key = (pair["question"], pair["sentence"])
        if key not in seen:
            seen.add(key)
            rows.append(pair)
    parts = {"train": rows[:train], "validation": rows[train:]}
    return DatasetDict({name: Dataset.from_list(part) for name, part in parts.items()})


def generated_tokenizer(max_length: int = 32) -> PreTrainedTokenizerFast:
    """A lower-casing tokenizer with one token per word of the generated data."""
    words = [*NAMES, *PLACES, *YEARS, *COUNTS, *REASONS, *DEEDS, *DEEDS.values(), *THINGS]
    words += " ".join([*OPENINGS, *QUESTIONS.values(), "they the in for ."]).split()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted({word for word in words if "{" not in word})]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary.index(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


def small_mobilebert(vocab_size: int) -> MobileBertForSequenceClassification:
    """An untrained MobileBERT of four layers; layer norm, because NoNorm needs a teacher to train from nothing."""
    config = MobileBertConfig(
        vocab_size=vocab_size,
        embedding_size=32,
        hidden_size=64,
        intra_bottleneck_size=32,
        true_hidden_size=32,  # type: ignore[call-arg]  (taken, but not in the signature that pyright sees)
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        num_feedforward_networks=2,
        initializer_range=0.2,  # about 1 / sqrt(32): BERT's 0.02 is for hundreds of hidden units and starves these
        max_position_embeddings=64,
        normalization_type="layer_norm",
        num_labels=len(LABELS),  # type: ignore[call-arg]
        id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
    )
    return MobileBertForSequenceClassification(config)

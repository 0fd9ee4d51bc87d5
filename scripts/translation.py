"""Trains a Transformer to translate, with the range loss; rounds it to 8, 4 and 3 bits; BLEU and a model of each.

    accelerate launch scripts/translation.py                             # Transformer-base on WMT14 English to German
    python scripts/translation.py --small --train_file train.jsonl --validation_file test2016.jsonl

Files: parquet, csv, tsv or json lines with a column for each language (named en, de), or `translation` that holds both.
BLEU is measured on the validation file, by default on newstest2014. All weights are quantized, the tied table included.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForSeq2SeqLM,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

import bleu
import common
import data_files
import interrupts
import tracks
import translation_data
import vocabulary
from hf_r2 import R2Seq2SeqTrainer, R2Seq2SeqTrainingArguments

# Transformer-base: "Attention is all you need", table 3, and its schedule: 512^-0.5 x 4000^-0.5 = 7e-4 at step 4,000.
BASE: dict[str, int] = {"d_model": 512, "layers": 6, "heads": 8, "ffn_dim": 2048, "vocab_size": 37000}
# A size for 30,000 short pairs: four layers of 128 units.
SMALL: dict[str, int] = {"d_model": 128, "layers": 4, "heads": 4, "ffn_dim": 256, "vocab_size": 4000}
POSITIONS = 512  # the longest input or output of a new network
# What differs from TrainingArguments' own defaults where no flag says otherwise.
DEFAULTS: dict[str, Any] = {
    "output_dir": "runs/translation", "max_steps": 100_000, "per_device_train_batch_size": 128, "learning_rate": 7e-4,
    "adam_beta2": 0.98, "adam_epsilon": 1e-9, "lr_scheduler_type": "inverse_sqrt", "warmup_steps": 4000,
    "label_smoothing_factor": 0.1, "train_sampling_strategy": "group_by_length", "per_device_eval_batch_size": 64,
    "logging_steps": 100, "save_steps": 1000, "save_total_limit": 2, "seed": 0, "weight_bits": [8, 4, 3], "dkm_bits": [],
    "dataloader_pin_memory": torch.cuda.is_available(),  # on a CPU it only warns
}  # fmt: skip
SMALL_RECIPE: dict[str, Any] = {
    "max_steps": -1, "num_train_epochs": 6, "per_device_train_batch_size": 64, "learning_rate": 3e-3,
    "warmup_steps": 400, "save_steps": 200,
}  # fmt: skip


@dataclass
class TranslationArguments(tracks.RecipeArguments):
    """What to translate, the size of the network, and how to search."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Fine-tune this model (folder or hub id) with its tokenizer; default: a new one."},
    )
    train_file: str | None = field(default=None, metadata={"help": "Local pairs; default: WMT14 from the hub."})
    validation_file: str | None = field(
        default=None, metadata={"help": "Local pairs to measure BLEU on; goes with train_file."}
    )
    dataset_name: str = field(default=translation_data.HUB_DATA[0], metadata={"help": "Data set on the hub."})
    dataset_config: str | None = field(default=translation_data.HUB_DATA[1], metadata={"help": "Its configuration."})
    source_lang: str = field(default="en", metadata={"help": "Translate from this language."})
    target_lang: str = field(default="de", metadata={"help": "Translate into this language."})
    small: bool = field(default=False, metadata={"help": f"A network for small data: {SMALL}; default: {BASE}."})
    d_model: int | None = field(default=None, metadata={"help": "Units of the network; default: by size."})
    layers: int | None = field(default=None, metadata={"help": "Layers of encoder and of decoder."})
    heads: int | None = field(default=None, metadata={"help": "Attention heads of a layer."})
    ffn_dim: int | None = field(default=None, metadata={"help": "Units inside feed-forward blocks."})
    vocab_size: int | None = field(default=None, metadata={"help": "Entries of the joint vocabulary."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout of a new network."})
    sentencepiece_model: str | None = field(
        default=None,
        metadata={"help": "Take the vocabulary from this file; default: train one on the training pairs."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many pairs, drawn at random."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Measure on so many pairs, drawn at random."})
    max_length: int = field(default=128, metadata={"help": "Cut sentences to so many tokens."})
    num_beams: int = field(default=4, metadata={"help": "Beams of the search."})
    length_penalty: float = field(
        default=1.0, metadata={"help": "Scores of the search are divided by length to this power."}
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})

    def __post_init__(self) -> None:
        super().__post_init__()
        common.check_counts(self, "max_train_samples", "max_eval_samples")
        if (self.train_file is None) != (self.validation_file is None):
            raise ValueError("train_file and validation_file go together: give both or neither")
        sizes = self.sizes()
        given = [name for name in sizes if getattr(self, name) is not None]
        if given and self.model_name_or_path is not None:
            raise ValueError(f"{', '.join(given)}: for a new network only; leave out with model_name_or_path")
        if min(sizes.values()) < 1 or sizes["d_model"] % sizes["heads"]:
            raise ValueError(f"sizes must be 1 or more, and d_model a multiple of heads, got {sizes}")
        if not 1 <= self.max_length <= POSITIONS - bleu.EXTRA_TOKENS:
            raise ValueError(f"max_length must be from 1 to {POSITIONS - bleu.EXTRA_TOKENS}, got {self.max_length}")
        if self.model_name_or_path is not None and self.sentencepiece_model is not None:
            raise ValueError("model_name_or_path brings its own vocabulary: leave out sentencepiece_model")

    def sizes(self) -> dict[str, int]:
        """The sizes of a new network: those of base or small, and what flags say otherwise."""
        sizes = SMALL if self.small else BASE
        return {name: value if getattr(self, name) is None else getattr(self, name) for name, value in sizes.items()}


def main() -> None:
    """Load, then the road of all tracks: train, quantize, translate, save, push."""
    args, training = tracks.parse(
        TranslationArguments, R2Seq2SeqTrainingArguments, DEFAULTS, "translation", __doc__, recipe
    )
    set_seed(training.seed)
    train, measured = load_pairs(args, training)
    tokenizer = load_tokenizer(args, training, train)
    model = load_model(args, tokenizer)
    with training.main_process_first(desc="tokenizing"):
        workers = args.preprocessing_num_workers
        train = translation_data.tokenized(train, tokenizer, args.max_length, workers)
        example = translation_data.tokenized(
            measured.select(range(min(8, len(measured)))), tokenizer, args.max_length, None
        )
    collator = translation_data.collator(tokenizer, model)
    track = tracks.Track(
        name="translation",
        task=task(args),
        auto=AutoModelForSeq2SeqLM,
        processor=tokenizer,
        trainer=lambda net, options: R2Seq2SeqTrainer(
            net, options, train_dataset=train, data_collator=collator, processing_class=tokenizer
        ),
        measure=lambda net: measure(net, tokenizer, measured, args, training),
        batch=lambda: collator(list(example)),
        usage=usage,
    )
    tracks.run(model, args, training, track)


def recipe(flags: Namespace) -> dict[str, Any]:
    """What small data change in the defaults."""
    return SMALL_RECIPE if flags.small else {}


def load_pairs(args: TranslationArguments, training: R2Seq2SeqTrainingArguments) -> tuple[Dataset, Dataset]:
    """Pairs to train on and to measure on; one process of several does the work, the others read its cache."""
    languages = (args.source_lang, args.target_lang)
    with training.main_process_first(desc="loading the data"):
        if args.train_file and args.validation_file:
            train, measured = (
                translation_data.from_file(f, *languages) for f in (args.train_file, args.validation_file)
            )
        else:
            common.go_offline_if_hub_is_unreachable()
            train, measured = (
                translation_data.from_hub(args.dataset_name, args.dataset_config, part, *languages)
                for part in translation_data.HUB_PARTS
            )
        return (
            data_files.subset(train, args.max_train_samples, training.seed),
            data_files.subset(measured, args.max_eval_samples, training.seed),
        )


def load_tokenizer(
    args: TranslationArguments, training: R2Seq2SeqTrainingArguments, train: Dataset
) -> PreTrainedTokenizerBase:
    """The tokenizer of the model to go on from; else one of a vocabulary given, or trained on both sides of `train`.

    A run that goes on takes the vocabulary that it has written. Ends with one line where there is none to be had.
    """
    folder = Path(str(training.output_dir)) / "tokenizer"
    if args.model_name_or_path is not None:
        return common.load_tokenizer(args.model_name_or_path)
    settings: dict[str, Any] = {"source_lang": args.source_lang, "target_lang": args.target_lang}
    settings["model_max_length"] = args.max_length
    with training.main_process_first(desc="making the vocabulary"):
        if training.local_process_index == 0 and not (training.resume_from_checkpoint and folder.is_dir()):
            if args.sentencepiece_model is not None:
                made = vocabulary.given(args.sentencepiece_model, folder, **settings)
            else:
                rows: Any = train
                texts = (text for row in rows for text in (row["source"], row["target"]))
                made = vocabulary.train(texts, args.sizes()["vocab_size"], folder, **settings)
            made.save_pretrained(folder)
        return common.load_tokenizer(str(folder))


def load_model(args: TranslationArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model to go on from, or a new Transformer of the size asked for; it searches as `args` say, wherever it is loaded."""
    if args.model_name_or_path is not None:
        model = common.load_model(AutoModelForSeq2SeqLM, args.model_name_or_path)
    else:
        model = MarianMTModel(new_config(args, tokenizer))
    settings = model.generation_config
    settings.num_beams, settings.length_penalty = args.num_beams, args.length_penalty
    settings.max_length, settings.max_new_tokens = None, args.max_length + bleu.EXTRA_TOKENS
    return model


def new_config(args: TranslationArguments, tokenizer: PreTrainedTokenizerBase) -> MarianConfig:
    """Marian's post-norm Transformer with fixed positions, ReLU, and one scaled table for both sides and the output."""
    sizes, pad = args.sizes(), tokenizer.pad_token_id
    settings: dict[str, Any] = {"d_model": sizes["d_model"], "vocab_size": len(tokenizer), "dropout": args.dropout}
    for side in ("encoder", "decoder"):
        settings |= {f"{side}_layers": sizes["layers"], f"{side}_attention_heads": sizes["heads"]}
        settings |= {f"{side}_ffn_dim": sizes["ffn_dim"]}
    settings |= {"pad_token_id": pad, "decoder_start_token_id": pad, "eos_token_id": tokenizer.eos_token_id}
    return MarianConfig(
        **settings, activation_function="relu", scale_embedding=True, share_encoder_decoder_embeddings=True,
        tie_word_embeddings=True, max_position_embeddings=POSITIONS, forced_eos_token_id=None,
        init_std=sizes["d_model"] ** -0.5,  # the tied table wants it, and it is Glorot's for square weights
    )  # fmt: skip


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Dataset,
    args: TranslationArguments,
    training: R2Seq2SeqTrainingArguments,
) -> dict[str, Any]:
    """BLEU and its signature; every process of several translates everything, which is little beside training."""
    texts: Any = data.to_dict()
    model.to(training.device)  # type: ignore[arg-type]
    guesses = bleu.translations(
        model, tokenizer, texts["source"], batch_size=training.per_device_eval_batch_size,
        max_length=args.max_length, num_beams=args.num_beams, length_penalty=args.length_penalty,
    )  # fmt: skip
    return bleu.score(guesses, texts["target"])


def task(args: TranslationArguments) -> dict[str, str]:
    """What was measured on, for the card."""
    found = {"name": f"Translation {args.source_lang} to {args.target_lang}", "metric": "bleu"}
    if args.validation_file:
        return {**found, "dataset": Path(args.validation_file).name, "split": "validation"}
    config = {"config": args.dataset_config} if args.dataset_config else {}
    return {**found, "dataset": args.dataset_name, "split": translation_data.HUB_PARTS["test"], **config}


def usage(folder: Path) -> str:
    """What to type in Python."""
    return "\n".join([
        "import hf_r2",
        "from transformers import AutoModelForSeq2SeqLM, AutoTokenizer",
        f'model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained("{folder}"), AutoTokenizer.from_pretrained("{folder}")',
        'tokens = model.generate(**tokenizer("A man rides a bicycle.", return_tensors="pt"))',
        "print(tokenizer.decode(tokens[0], skip_special_tokens=True))",
    ])  # fmt: skip


if __name__ == "__main__":
    interrupts.run(main)

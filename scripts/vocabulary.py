"""Joint sentencepiece vocabularies of translation models: trained on both languages, or given, as a MarianTokenizer."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import MarianTokenizer

UNKNOWN, END, PAD = "<unk>", "</s>", "<pad>"
MOST_SENTENCES = 4_000_000  # of both languages, drawn at random, is what sentencepiece is trained on at most


def train(texts: Iterable[str], size: int, folder: Path, **settings: Any) -> MarianTokenizer:
    """A tokenizer of `size` entries (byte-pair merges, as in "Attention is all you need"), with its files in `folder`.

    Ends with one line where sentencepiece refuses, as it does when `texts` are too few for so many entries.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, vocab_size=size, model_type="bpe", minloglevel=2,
            character_coverage=0.9999, unk_id=0, eos_id=1, pad_id=2, bos_id=-1, unk_piece=UNKNOWN, eos_piece=END,
            pad_piece=PAD, input_sentence_size=MOST_SENTENCES, shuffle_input_sentence=True,
        )  # fmt: skip
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2].strip() or str(error)
        raise SystemExit(f"no vocabulary of {size} entries from these texts ({reason}): lower --vocab_size") from error
    return _tokenizer(model.getvalue(), folder, **settings)


def given(file: str, folder: Path, **settings: Any) -> MarianTokenizer:
    """A tokenizer of a sentencepiece model that is there already; ends with one line where it cannot be read."""
    try:
        return _tokenizer(Path(file).read_bytes(), folder, **settings)
    except (OSError, RuntimeError) as error:
        raise SystemExit(f"{file}: cannot be read as a sentencepiece model: {error}") from error


def _tokenizer(model: bytes, folder: Path, **settings: Any) -> MarianTokenizer:
    """Writes source.spm, target.spm (the same) and vocab.json, with end, unknown and padding among the pieces."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)  # type: ignore[call-arg]
    ordinary = [
        pieces.id_to_piece(i)
        for i in range(pieces.get_piece_size())
        if not (pieces.is_control(i) or pieces.is_unknown(i))
    ]
    folder.mkdir(parents=True, exist_ok=True)
    files = {"source_spm": folder / "source.spm", "target_spm": folder / "target.spm", "vocab": folder / "vocab.json"}
    files["source_spm"].write_bytes(model)
    files["target_spm"].write_bytes(model)
    numbers = {piece: i for i, piece in enumerate([END, UNKNOWN, *ordinary, PAD])}
    files["vocab"].write_text(json.dumps(numbers, ensure_ascii=False), encoding="utf-8")
    with warnings.catch_warnings():  # without sacremoses it leaves punctuation as it is, and recommends it
        warnings.filterwarnings("ignore", message="Recommended: pip install sacremoses")
        return MarianTokenizer(**{key: str(file) for key, file in files.items()}, **settings)

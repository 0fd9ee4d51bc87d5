"""Translates by beam search and scores with sacrebleu."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sacrebleu.metrics import BLEU  # type: ignore[attr-defined]
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

EXTRA_TOKENS = 50  # output length is at most the input's + 50, "Attention is all you need", 6.1


@torch.inference_mode()
def translations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    *,
    batch_size: int,
    max_length: int,
    **search: Any,
) -> list[str]:
    """The model's translation of each source, in their order; `search` are options of `generate`.

    Sources are cut to `max_length` tokens, and batched by length, longest first: a lack of memory shows at once.
    """
    device = next(model.parameters()).device
    model.eval()
    ids = tokenizer(list(sources), truncation=True, max_length=max_length)["input_ids"]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    found = [""] * len(ids)
    for start in tqdm(range(0, len(order), batch_size), desc="translating", leave=False):
        rows = order[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": [ids[i] for i in rows]}, return_tensors="pt").to(device)
        tokens = model.generate(**batch, max_new_tokens=len(ids[rows[0]]) + EXTRA_TOKENS, **search)  # type: ignore[operator]
        for i, text in zip(rows, tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True):
            found[i] = text
    return found


def score(guesses: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """Corpus BLEU from 0 to 100 (sacrebleu, one reference each, its own tokenizer 13a), and the signature that says so."""
    metric = BLEU()
    return {
        "bleu": metric.corpus_score(list(guesses), [list(references)]).score,
        "signature": str(metric.get_signature()),
    }

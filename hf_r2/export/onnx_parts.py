"""Encoder and decoder of a packed sequence-to-sequence model as two ONNX files, so that generation encodes its input once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from hf_r2.export.onnx import FAST_BLOCKS, OPSET, to_onnx
from hf_r2.graph import example_inputs
from hf_r2.packed_layers import packed_layers

# The names that Optimum gives files and inputs: its ORTModelForSeq2SeqLM and transformers.js look for these.
FILES = {"encoder": "encoder_model.onnx", "decoder": "decoder_model.onnx"}
NAMES = {
    "decoder_input_ids": "input_ids",
    "encoder_outputs.last_hidden_state": "encoder_hidden_states",
    "attention_mask": "encoder_attention_mask",
}


def to_onnx_parts(
    model: PreTrainedModel,
    folder: str | Path,
    inputs: Mapping[str, Tensor] | None = None,
    *,
    dynamic: bool = True,
    blocks: Iterable[int] = FAST_BLOCKS,
    opset: int = OPSET,
) -> dict[str, dict[str, Any]]:
    """Writes encoder_model.onnx and decoder_model.onnx into `folder`; returns the report of `to_onnx` for each.

    The encoder takes `input_ids` and `attention_mask` [batch, source] and gives `last_hidden_state`; the decoder takes
    `input_ids` [batch, target], `encoder_hidden_states` and `encoder_attention_mask`, and gives `logits` of all positions.
    It keeps no past key values: each step of generation computes the whole prefix again. Weights that both use (a shared
    table of embeddings) are in both files.

    Args:
        inputs: token ids to read the graphs with: `input_ids`, `decoder_input_ids` and, if need be, `attention_mask`.
        dynamic, blocks, opset: as in `to_onnx`; batch size and lengths are free by default, as generation needs them.

    Raises what `to_onnx` raises, and ValueError for a model without an encoder and for missing inputs.
    """
    if not getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is not an encoder with a decoder: to_onnx writes it as one file")
    given = dict(example_inputs(model) if inputs is None else inputs)
    missing = [name for name in ("input_ids", "decoder_input_ids") if name not in given]
    if missing:
        raise ValueError(f"inputs of {', '.join(given)} lack {', '.join(missing)}: both parts are read with them")
    ids = given["input_ids"]
    source = {"input_ids": ids, "attention_mask": given.get("attention_mask", torch.ones_like(ids))}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"dynamic": dynamic, "blocks": blocks, "opset": opset}
    encoder: Any = model.get_encoder()
    said = {"encoder": to_onnx(encoder, folder / FILES["encoder"], source, **options)}
    with torch.no_grad():
        states = encoder(**source).last_hidden_state
    target = {
        "decoder_input_ids": given["decoder_input_ids"],
        "encoder_outputs": BaseModelOutput(last_hidden_state=states),
        "attention_mask": source["attention_mask"],
    }
    said["decoder"] = to_onnx(model, folder / FILES["decoder"], target, names=NAMES, outputs=["logits"], **options)
    own = {id(module) for module in packed_layers(encoder).values()}
    elsewhere = {name for name, module in packed_layers(model).items() if id(module) in own}
    for key in ("layers", "float_layers"):
        said["decoder"][key] = {n: v for n, v in said["decoder"][key].items() if n not in elsewhere}
    return said

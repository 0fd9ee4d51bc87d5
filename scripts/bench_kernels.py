"""Packed models on torch's integer kernels against their decoded weights and the float model: time and deviation.

    OMP_NUM_THREADS=1 python scripts/bench_kernels.py --rounds 9

A BERT of MiniLM's width (384) with random weights, one text of 128 tokens; times are ratios to the float model's.
"""

from __future__ import annotations

import argparse

import torch
from transformers import BertConfig, BertForSequenceClassification

import benching
from hf_r2 import R2QuantConfig, kernels_of, quantize, use_kernels_

RECIPES = {
    "W8A8": R2QuantConfig(weight_bits=8, act_bits=8),
    "W4A8": R2QuantConfig(weight_bits=4, act_bits=8),
    "W4A8, dynamic": R2QuantConfig(weight_bits=4, act_bits=8, act_range="dynamic"),
    "W4": R2QuantConfig(weight_bits=4),
    "W2": R2QuantConfig(weight_bits=2),
    "W8": R2QuantConfig(weight_bits=8),
}


@torch.no_grad()
def row(name: str, model: BertForSequenceClassification, ids: torch.Tensor, rounds: int) -> str:
    """A line of the table."""
    decoded = quantize(model, RECIPES[name], [{"input_ids": ids}]).eval()
    fast = quantize(model, RECIPES[name], [{"input_ids": ids}]).eval()
    try:
        use_kernels_(fast, rows=ids.numel())
    except ValueError as error:
        return f"| {name} | - | - | - | refused: {str(error).split('(')[1].split(')')[0]} |"
    times = benching.medians(
        {"float": lambda: model(ids), "decoded": lambda: decoded(ids), "kernels": lambda: fast(ids)}, rounds
    )
    one, two = (m.bert(ids).last_hidden_state for m in (decoded, fast))
    off = float((one - two).abs().max() / one.abs().max())
    used = [note["kernel"] for note in kernels_of(fast).values() if note["kernel"]]
    decoded_s, fast_s = (times[key] / times["float"] for key in ("decoded", "kernels"))
    return f"| {name} | {decoded_s:.2f} | {fast_s:.2f} | {off:.1e} | {len(used)} layers on {used[0]} |"


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rounds", type=int, default=9, help="how often each model runs")
    parser.add_argument("--layers", type=int, default=6, help="layers of the BERT")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of the text")
    args = parser.parse_args()
    torch.manual_seed(0)
    config = BertConfig(hidden_size=384, num_hidden_layers=args.layers, num_attention_heads=12, intermediate_size=1536)
    model, ids = BertForSequenceClassification(config).eval(), torch.randint(1000, 30000, (1, args.tokens))
    heads = ["", "decoded / float", "kernels / float", "largest deviation of hidden states", "kernels"]
    print(f"{benching.processor()}, {torch.get_num_threads()} thread(s)\n")
    print(f"| {' | '.join(heads)} |\n|---|---:|---:|---:|---|")
    for name in RECIPES:
        print(row(name, model, ids, args.rounds), flush=True)


if __name__ == "__main__":
    main()

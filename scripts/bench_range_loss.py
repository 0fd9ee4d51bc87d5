"""Time of the range loss, forward and backward, beside the formula left to autograd and the speed of memory, in one run.

    python scripts/bench_range_loss.py --model mobilebert --threads 2

The floor is one read pass plus one read-and-write pass over the same weights. All candidates take turns in every round,
so that another program on the machine slows all of them; what to quote are the ratios of the medians.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn
from transformers import (
    HfArgumentParser,
    MarianConfig,
    MarianMTModel,
    MobileBertConfig,
    MobileBertForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from benching import medians
from hf_r2 import RANGE_LOSSES, RangeLoss

MODELS: dict[str, Callable[[], nn.Module]] = {
    "mobilebert": lambda: MobileBertForSequenceClassification(MobileBertConfig()),
    "resnet50": lambda: ResNetForImageClassification(ResNetConfig()),
    "transformer-base": lambda: MarianMTModel(
        MarianConfig(
            vocab_size=32000,
            d_model=512,
            encoder_layers=6,
            decoder_layers=6,
            encoder_attention_heads=8,
            decoder_attention_heads=8,
            encoder_ffn_dim=2048,
            decoder_ffn_dim=2048,
            pad_token_id=0,
        )
    ),
}


@dataclass
class BenchArguments:
    """What to time."""

    model: str = field(default="mobilebert", metadata={"help": "Whose weights.", "choices": sorted(MODELS)})
    kind: str = field(default="soft_min_max", metadata={"help": "Which range loss.", "choices": sorted(RANGE_LOSSES)})
    units: str = field(default="absolute", metadata={"help": "absolute or std."})
    threads: int = field(default=0, metadata={"help": "Threads of torch; 0 for its own choice."})
    rounds: int = field(
        default=11, metadata={"help": "Rounds after two of warm-up; the median is taken (at least 9)."}
    )
    json: bool = field(default=False, metadata={"help": "Print one JSON object instead of the table."})


def formula(w: Tensor, scalar: Tensor, kind: str) -> Tensor:
    """The definition of ALGORITHMS 1.2 to 1.4 as it stands, left to autograd."""
    w = w.flatten()
    if kind == "l_inf":
        return w.abs().amax()
    if kind == "margin":
        return scalar.abs() + (w.abs() - scalar.abs()).clamp(min=0).sum()
    up = torch.exp(scalar * (w - w.max().detach()))
    down = torch.exp(-scalar * (w - w.min().detach()))
    return (w * up).sum() / up.sum() - (w * down).sum() / down.sum() + torch.exp(-scalar)


def softmax_form(w: Tensor, scalar: Tensor) -> Tensor:
    """The same with `torch.softmax`, which keeps one buffer a side."""
    w = w.flatten()
    s_max = (w * torch.softmax(scalar * w, dim=0)).sum()
    return s_max - (w * torch.softmax(-scalar * w, dim=0)).sum() + torch.exp(-scalar)


def candidates(model: nn.Module, args: BenchArguments) -> dict[str, Callable[[], object]]:
    """What takes turns: name and one forward and backward pass over all weights."""
    ours = RangeLoss(model, args.kind, units=args.units)
    weights, scalars = list(ours.weights().values()), ours.scalars.detach().clone().requires_grad_()
    upstream = torch.tensor(0.01)  # as in training, where the loss is multiplied by range_weight

    def floor() -> None:
        with torch.no_grad():
            for w in weights:
                w.sum()
            for w in weights:
                w.mul_(1.0)

    def summed(function: Callable[..., Tensor], *more: str) -> None:
        parts = [function(w, s, *more) for w, s in zip(weights, scalars.unbind(), strict=True)]
        torch.stack(parts).sum().backward(upstream)

    found: dict[str, Callable[[], object]] = {"floor": floor, "hf_r2": lambda: ours().backward(upstream)}
    if args.units == "absolute":
        found["autograd"] = lambda: summed(formula, args.kind)
        if args.kind == "soft_min_max":
            found["softmax"] = lambda: summed(softmax_form)
    return found


def main(args: BenchArguments) -> None:
    if args.rounds < 9:
        raise ValueError(f"rounds must be at least 9 for a median that can be quoted, got {args.rounds}")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = MODELS[args.model]()
    numel = [w.numel() for w in RangeLoss(model, args.kind).weights().values()]
    times = medians(candidates(model, args), args.rounds, warm_up=2, before=model.zero_grad)
    rows = [
        {"what": name, "ms": t * 1e3, "over_floor": t / times["floor"], "over_ours": t / times["hf_r2"]}
        for name, t in times.items()
    ]
    head = {"weights": len(numel), "numel": sum(numel), "threads": torch.get_num_threads(), "torch": torch.__version__}
    if args.json:
        print(json.dumps({"arguments": asdict(args), **head, "rows": rows}))
        return
    print(f"{args.model}, {args.kind}: {len(numel)} weights, {sum(numel) / 1e6:.1f} M, {head['threads']} threads")
    for row in rows:
        print(
            f"{row['what']:>10} {row['ms']:9.1f} ms  {row['over_floor']:6.1f} x floor  {row['over_ours']:6.2f} x hf_r2"
        )


if __name__ == "__main__":
    main(*HfArgumentParser(BenchArguments).parse_args_into_dataclasses())  # type: ignore[arg-type]

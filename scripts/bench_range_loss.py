"""Time of the range loss, forward and backward, beside the formula left to autograd and the speed of memory, in one run.

    python scripts/bench_range_loss.py --model mobilebert --threads 2

The floor is one read pass plus one read-and-write pass over the same weights, whose gradients exist, as in training when
the task loss has made them. All candidates take turns in every round, so that another program on the machine slows all of
them; what to quote are the ratios of the medians. Peak memory is what the process grew by (Linux alone).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    HfArgumentParser,
    MarianConfig,
    MarianMTModel,
    MobileBertConfig,
    MobileBertForSequenceClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from benching import medians
from hf_r2 import RANGE_LOSSES, RangeLoss

MODELS: dict[str, Callable[[], nn.Module]] = {
    "mobilebert": lambda: MobileBertForSequenceClassification(MobileBertConfig()),
    "mobilenet-v2": lambda: MobileNetV2ForImageClassification(MobileNetV2Config()),
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
            decoder_start_token_id=0,
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
    step: int = field(
        default=0,
        metadata={
            "help": "Batch size of a training step to compare with (128 tokens or 224 x 224 pixels); 0 for none."
        },
    )
    rounds: int = field(
        default=11, metadata={"help": "Rounds after two of warm-up; the median is taken (at least 9)."}
    )
    cpu_time: bool = field(
        default=False, metadata={"help": "Processor time, which a busy machine stretches less than the clock's."}
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


def training_step(model: nn.Module, batch: int) -> Callable[[], object]:
    """Forward and backward pass of the task loss and AdamW, on random inputs."""
    if model.main_input_name == "pixel_values":
        inputs = {"pixel_values": torch.randn(batch, 3, 224, 224), "labels": torch.zeros(batch, dtype=torch.long)}
    else:
        tokens = torch.randint(5, 1000, (batch, 128))
        translates = isinstance(model, MarianMTModel)
        inputs = {"input_ids": tokens, "labels": tokens if translates else torch.zeros(batch, dtype=torch.long)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9)

    def step() -> None:
        model(**inputs).loss.backward()
        optimizer.step()

    return step


def candidates(model: nn.Module, args: BenchArguments) -> dict[str, Callable[[], object]]:
    """What takes turns: name and one forward and backward pass over all weights."""
    losses = {c: RangeLoss(model, args.kind, units=args.units, compiled=c) for c in (False, True)}
    ours = losses[False]
    weights = list(ours.weights().values())
    if args.kind == "margin":  # something must stick out, as in training: 0.3 % of Gaussian weights
        for loss in losses.values():
            loss.scalars.data = torch.stack([3 * w.detach().std() for w in weights])
    scalars = ours.scalars.detach().clone().requires_grad_()
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

    found: dict[str, Callable[[], object]] = {"floor": floor, "hf_r2": lambda: ours(into_grad=True).backward(upstream)}
    if losses[True].compiled:
        found["compiled"] = lambda: losses[True](into_grad=True).backward(upstream)
    found["returned"] = lambda: ours().backward(upstream)
    if args.units == "absolute":
        found["autograd"] = lambda: summed(formula, args.kind)
        if args.kind == "soft_min_max":
            found["softmax"] = lambda: summed(softmax_form)
    if args.step:
        found["step"] = training_step(model, args.step)
    return found


def peak_memory(run: Callable[[], object]) -> float | None:
    """Bytes by which the process grew while it ran, at most; None where the system does not say."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _memory("VmRSS")
        run()
        return max(0.0, _memory("VmHWM") - before)
    except OSError:
        return None


def _memory(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * int(next(line for line in lines if line.startswith(key)).split()[1])


def main(args: BenchArguments) -> None:
    if args.rounds < 9:
        raise ValueError(f"rounds must be at least 9 for a median that can be quoted, got {args.rounds}")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = MODELS[args.model]()
    numel = [w.numel() for w in RangeLoss(model, args.kind).weights().values()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    runs = candidates(model, args)
    clock = time.process_time if args.cpu_time else time.perf_counter
    times = medians(runs, args.rounds, warm_up=2, clock=clock)
    rows = [
        {"what": name, "ms": t * 1e3, "over_floor": t / times["floor"], "over_ours": t / times["hf_r2"]}
        | {"of_step": t / times["step"] if args.step else None, "peak_bytes": peak_memory(runs[name])}
        for name, t in times.items()
    ]
    head = {"weights": len(numel), "numel": sum(numel), "threads": torch.get_num_threads(), "torch": torch.__version__}
    if args.json:
        print(json.dumps({"arguments": asdict(args), **head, "rows": rows}))
        return
    print(f"{args.model}, {args.kind}: {len(numel)} weights, {sum(numel) / 1e6:.1f} M, {head['threads']} threads")
    for row in rows:
        more = "" if row["peak_bytes"] is None else f"  {row['peak_bytes'] / 2**20:6.0f} MiB more"
        more += f"  {row['of_step']:6.1%} of a step" if args.step else ""
        print(
            f"{row['what']:>10} {row['ms']:9.1f} ms  {row['over_floor']:6.1f} x floor  {row['over_ours']:6.2f} x hf_r2{more}"
        )


if __name__ == "__main__":
    main(*HfArgumentParser(BenchArguments).parse_args_into_dataclasses())  # type: ignore[arg-type]

"""A training step of ResNet-18 on images of CIFAR's size: quantized (LSQ, PACT, DoReFa, DKM) beside float, in one run.

    python scripts/bench_qat.py --threads 2

transformers' ResNet of basic blocks [2, 2, 2, 2], 11 M weights, its stem made to suit 32 x 32 pixels (stride 1, no pooling);
forward, backward and SGD step. The candidates take turns, the median of their process times is taken; quote the ratios.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import HfArgumentParser, ResNetConfig, ResNetForImageClassification

from benching import medians
from hf_r2 import R2QuantConfig, prepare

RECIPES = {
    "lsq W4A4": R2QuantConfig("lsq", 4, act_bits=4),
    "lsq W4A4 per tensor": R2QuantConfig("lsq", 4, "per_tensor", act_bits=4),
    "pact W4A4": R2QuantConfig("pact", 4, act_bits=4),
    "dorefa W4A4": R2QuantConfig("dorefa", 4, act_bits=4),
    "dkm 2 bits": R2QuantConfig("dkm", 2),
}


@dataclass
class BenchArguments:
    """What to time."""

    threads: int = field(default=0, metadata={"help": "Threads of torch; 0 for its own choice."})
    rounds: int = field(default=9, metadata={"help": "Rounds after one of warm-up; the median is taken."})
    batch: int = field(default=64, metadata={"help": "Images in a step."})


def resnet18() -> nn.Module:
    """ResNet-18 for 32 x 32 pixels."""
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=64,
        hidden_sizes=[64, 128, 256, 512],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        id2label=dict(enumerate("0123456789")),
    )
    model = ResNetForImageClassification(config)
    model.resnet.embedder.embedder.convolution = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.resnet.embedder.pooler = nn.Identity()  # type: ignore[assignment]
    return model.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]


def stepper(model: nn.Module, batch: int) -> Callable[[], None]:
    """One step of training."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    x = torch.randn(batch, 3, 32, 32).to(memory_format=torch.channels_last)
    y = torch.arange(batch) % 10

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(pixel_values=x).logits, y).backward()
        optimizer.step()

    return step


def main() -> None:
    """Print the table."""
    (args,) = HfArgumentParser(BenchArguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    if args.threads:
        torch.set_num_threads(args.threads)
    plain = resnet18()
    steps = {"float": stepper(plain, args.batch)}
    for name, recipe in RECIPES.items():
        steps[name] = stepper(prepare(copy.deepcopy(plain), copy.deepcopy(recipe)), args.batch)
    times = medians(steps, args.rounds, clock=time.process_time)
    print(f"batch {args.batch}, {torch.get_num_threads()} threads; float step {times['float']:.2f} s of process time")
    for name, seconds in times.items():
        print(f"{name:20s} {seconds / times['float']:.2f} x")


if __name__ == "__main__":
    main()

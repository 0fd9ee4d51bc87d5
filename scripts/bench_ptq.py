"""Times of SQuant and AdaRound beside the plainest code for the same, in one run.

    python scripts/bench_ptq.py --threads 2

SQuant: all weights of MobileNetV1-0.75 (random ones: the work does not depend on them), beside one pass of rounding to
nearest. AdaRound: one step on a convolution 64 -> 64, 3 x 3, 256 samples of 64 x 28 x 28, 4 bits, beside a plain loop that
runs the convolution on 32 samples in every step; then error against time. The candidates of a comparison take turns; quote
the ratios.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import HfArgumentParser, MobileNetV1Config, MobileNetV1ForImageClassification

from benching import medians
from hf_r2.encoders.affine import Affine
from hf_r2.grid import quantize
from hf_r2.layers import weight_layers
from hf_r2.ptq.layer_error import Gram, Rows
from hf_r2.ptq.learn_layer import RoundingSettings, learn_rounding
from hf_r2.ptq.rounding import Rounding
from hf_r2.ptq.squant import by_kernel, flip
from hf_r2.ranges import mse_range
from hf_r2.spec import LayerSpec

SETTINGS = RoundingSettings(
    iters=0, lr=1e-3, weight_round=1e-3, beta=(20.0, 2.0), warmup=0.2, activation=True, correct_bias=False, rows=1024, seed=0
)  # fmt: skip


@dataclass
class BenchArguments:
    """What to time."""

    threads: int = field(default=0, metadata={"help": "Threads of torch; 0 for its own choice."})
    rounds: int = field(default=9, metadata={"help": "Rounds after one of warm-up; the median is taken."})
    steps: int = field(default=10, metadata={"help": "AdaRound steps in a round."})
    curve: list[int] = field(
        default_factory=lambda: [50, 100, 300, 1000], metadata={"help": "Steps of the error curves."}
    )


def bench_squant(rounds: int) -> None:
    """SQuant over a whole MobileNetV1."""
    model = MobileNetV1ForImageClassification(MobileNetV1Config(depth_multiplier=0.75))
    layers = [(layer.module, layer.weight.detach()) for layer in weight_layers(model)]
    encoders = [Affine(w, LayerSpec(weight_bits=4, symmetric=False)) for _, w in layers]

    def nearest() -> None:
        for (_, w), e in zip(layers, encoders, strict=True):
            quantize(w, e.scale, e.zero_point, e.grid)

    def squant() -> None:
        for (module, w), e in zip(layers, encoders, strict=True):
            flip(by_kernel(module, w / e.scale + e.zero_point), e.grid.qmin, e.grid.qmax)

    t = medians({"nearest": nearest, "squant": squant}, rounds)
    count = sum(w.numel() for _, w in layers)
    print(f"squant, {len(layers)} layers, {count / 1e6:.1f} M weights: {t['squant']:.3f} s", end="")
    print(f" = {t['squant'] / t['nearest']:.1f} x one pass of rounding to nearest ({t['nearest']:.3f} s)")


def layer_and_inputs() -> tuple[nn.Conv2d, Tensor, Tensor]:
    """The convolution of the comparison, its float inputs, and slightly different ones."""
    torch.manual_seed(0)
    layer = nn.Conv2d(64, 64, 3, padding=1)
    x = F.avg_pool2d(torch.randn(256, 64, 30, 30), 3, 1).relu()  # neighbours go together, as in pictures
    return layer, x, x + 0.02 * torch.randn_like(x)


class Plain:
    """What one would write first: every step runs the convolution on 32 samples."""

    def __init__(self, layer: nn.Conv2d, x: Tensor, x_hat: Tensor, f: Callable[[Tensor], Tensor]):
        self.layer, self.x, self.f = layer, x_hat, f
        with torch.no_grad():
            self.y = f(layer(x))

    def loss(self, weight: Tensor, batch: int, generator: torch.Generator) -> Tensor:
        """The error on 32 samples."""
        chosen = torch.randperm(len(self.x), generator=generator)[:32]
        out = self.f(F.conv2d(self.x[chosen], weight, self.layer.bias, padding=1))
        return (out - self.y[chosen]).square().sum(1).mean()

    @torch.no_grad()
    def error(self, weight: Tensor) -> float:
        """The error on all samples."""
        return float((self.f(F.conv2d(self.x, weight, self.layer.bias, padding=1)) - self.y).square().sum(1).mean())


def bench_adaround(args: BenchArguments, activation: bool) -> None:
    """Steps of the plain loop and of ours, then error against time for both."""
    layer, x, x_hat = layer_and_inputs()
    f = torch.relu if activation else (lambda y: y)
    weight = layer.weight.detach()
    encoder = Affine(weight, LayerSpec(weight_bits=4))
    encoder.set_range_(*mse_range(weight, encoder.grid, encoder.axis))
    plain = Plain(layer, x, x_hat, f)
    start = time.perf_counter()
    ours: Rows | Gram = Rows(layer, torch.relu) if activation else Gram(layer)
    ours.add(x, x_hat, weight, 1)
    ours.close()
    setup = time.perf_counter() - start
    few = replace(SETTINGS, iters=args.steps)
    problems: dict[str, Any] = {"plain": plain, "ours": ours}
    t = medians({n: (lambda p=p: learn_rounding(weight, encoder, p, few)) for n, p in problems.items()}, args.rounds)
    form = f"{type(ours).__name__.lower()} form, {'with a ReLU' if activation else 'no activation'}"
    step, plain_step = (1e3 * t[name] / args.steps for name in ("ours", "plain"))
    print(
        f"\nadaround, {form}: {step:.1f} ms a step, {step / plain_step:.2f} x the plain loop's {plain_step:.1f} ms",
        end="",
    )
    print(f"; set-up once {setup:.2f} s")
    nearest = plain.error(encoder.encode(weight).decode())
    for name, problem in problems.items():
        for lr in (1e-3, 1e-2, 3e-2):
            points = [
                curve_point(problem, plain, weight, encoder, replace(SETTINGS, lr=lr, iters=n)) for n in args.curve
            ]
            texts = [f"{n} steps {s:.1f} s {e / nearest:.3f}" for n, (s, e) in zip(args.curve, points, strict=True)]
            print(f"  {name:5} lr {lr:g}, error over nearest's: {'; '.join(texts)}")


def curve_point(
    problem: Any, judge: Plain, weight: Tensor, encoder: Affine, settings: RoundingSettings
) -> tuple[float, float]:
    """Seconds and error of the decided rounding after so many steps."""
    start = time.perf_counter()
    rounding: Rounding = learn_rounding(weight, encoder, problem, settings)
    seconds = time.perf_counter() - start
    encoder.set_codes_(rounding.codes())
    error = judge.error(encoder.encode(weight).decode())
    encoder.codes = None
    return seconds, error


def main() -> None:
    """Times everything and prints ratios."""
    (args,) = HfArgumentParser(BenchArguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {args.rounds} rounds")
    bench_squant(args.rounds)
    for activation in (False, True):
        bench_adaround(args, activation)


if __name__ == "__main__":
    main()

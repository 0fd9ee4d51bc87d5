"""Time of nearest quantization, packing and unpacking, beside a copy of the weights, in one run.

    python scripts/bench_packing.py --numel 4194304 --threads 1

All candidates take turns in every round; what to quote are the ratios of the medians. Loading: scripts/bench_loading.py.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from transformers import HfArgumentParser

from benching import medians
from hf_r2.grid import Grid, observed_range, quantize, scale_and_zero_point
from hf_r2.packing import pack_bits, unpack_bits


@dataclass
class BenchArguments:
    """What to time."""

    numel: int = field(default=1 << 22, metadata={"help": "Weights in the matrix of 1024 columns."})
    bits: list[int] = field(default_factory=lambda: list(range(1, 9)), metadata={"help": "Widths."})
    threads: int = field(default=0, metadata={"help": "Threads of torch; 0 for its own choice."})
    rounds: int = field(
        default=11, metadata={"help": "Rounds after two of warm-up; the median is taken (at least 9)."}
    )
    cpu_time: bool = field(
        default=False, metadata={"help": "Processor time, which a busy machine stretches less than the clock's."}
    )
    json: bool = field(default=False, metadata={"help": "Print one JSON object instead of the table."})


def candidates(w: torch.Tensor, bits: int) -> dict[str, Callable[[], object]]:
    """What takes turns at one width: range, scale and codes as the nearest method makes them, bytes, and codes again."""
    grid = Grid(bits)

    def nearest() -> torch.Tensor:
        return quantize(w, *scale_and_zero_point(*observed_range(w, grid, 0), grid), grid)

    codes = nearest()
    packed = pack_bits(codes, bits)
    return {
        "copy": w.clone,
        "nearest": nearest,
        "pack": lambda: pack_bits(codes, bits),
        "unpack": lambda: unpack_bits(packed, bits, codes.numel()),
    }


def main(args: BenchArguments) -> None:
    if args.rounds < 9:
        raise ValueError(f"rounds must be at least 9 for a median that can be quoted, got {args.rounds}")
    if args.threads:
        torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    torch.manual_seed(0)
    w = torch.randn(args.numel // 1024, 1024) * 0.05
    rows = []
    for bits in args.bits:
        times = medians(candidates(w, bits), args.rounds, warm_up=2, clock=clock)
        rows.append({"bits": bits} | {name: t / times["copy"] for name, t in times.items() if name != "copy"})
    if args.json:
        print(json.dumps({"arguments": asdict(args), "threads": torch.get_num_threads(), "rows": rows}))
        return
    print(f"{w.numel() / 1e6:.1f} M weights, {torch.get_num_threads()} threads; times over that of a copy")
    for row in rows:
        print(
            "  ".join(
                f"{name} {value:.2f}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
            )
        )


if __name__ == "__main__":
    main(*HfArgumentParser(BenchArguments).parse_args_into_dataclasses())  # type: ignore[arg-type]

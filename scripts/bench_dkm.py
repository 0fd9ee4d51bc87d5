"""A training step of differentiable k-means on one weight, beside the plainest code and coremltools' layer, in one run.

    python scripts/bench_dkm.py --threads 1

Forward and backward with as many iterations for all (3, coremltools' default), from the same centroids, those of a soft
clustering that has settled, as in the middle of a training. dense: softmax attention, autograd through all iterations.
coremltools: its FakePalettize, where `pip install coremltools` was done. The candidates take turns; process time is counted,
the median taken, ratios are what to quote. Memory: what a process of its own holds at the peak of a second step more
than before it. Then the start: our k-means, in training steps of ours and of coremltools.
"""

from __future__ import annotations

import ctypes
import logging
import math
import multiprocessing
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import HfArgumentParser

from benching import medians
from hf_r2.encoders.dkm import default_tau, soft_cluster, soft_weight
from hf_r2.encoders.kmeans import kmeans_scalar, kmeans_vectors
from hf_r2.vectors import from_vectors, to_vectors

SHAPES = {"1000x1024": (1000, 1024), "512x512x3x3": (512, 512, 3, 3)}
FORMS = {"1 bit": (1, 1), "2 bits": (2, 1), "4 bits": (4, 1), "4 bits / 4 dims": (4, 4)}
ITERATIONS = 3
Step = Callable[[], tuple[Tensor, Tensor]]


@dataclass
class BenchArguments:
    """What to time."""

    threads: int = field(default=0, metadata={"help": "Threads of torch; 0 for its own choice."})
    rounds: int = field(default=9, metadata={"help": "Rounds after one of warm-up; the median is taken."})
    shapes: list[str] = field(default_factory=lambda: list(SHAPES), metadata={"help": "1000x1024, 512x512x3x3."})
    tau: float | None = field(default=None, metadata={"help": "In units of the variance; default: the library's."})


def problem(shape: str, bits: int, dim: int, tau: float | None) -> tuple[Tensor, Tensor, Tensor, float]:
    """Weight (of the standard deviation that initialisation gives), upstream gradient, settled centroids, tau."""
    torch.manual_seed(0)
    size = SHAPES[shape]
    weight = torch.randn(size) * math.sqrt(2 / math.prod(size[1:]))
    vectors = to_vectors(weight, dim)[0]
    start = kmeans_vectors(vectors, 2**bits) if dim > 1 else kmeans_scalar(vectors, 2**bits)[:, None]
    unit = default_tau(2**bits, dim) if tau is None else tau
    absolute = unit * float(weight.var())
    _, centroids = soft_cluster(vectors, start, absolute, 1000, 1e-6)
    return weight, torch.randn(size), centroids, absolute


def ours(weight: Tensor, pull: Tensor, centroids: Tensor, tau: float) -> Step:
    """`soft_weight`, as the encoder calls it."""
    leaf = weight.clone().requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        leaf.grad = None
        soft, _, _ = soft_weight(leaf, centroids, tau, ITERATIONS, 0.0)
        soft.backward(pull)
        return soft.detach(), leaf.grad  # type: ignore[return-value]

    return step


def dense(weight: Tensor, pull: Tensor, centroids: Tensor, tau: float) -> Step:
    """What one would write first."""
    leaf = weight.clone().requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        leaf.grad = None
        (vectors, rest), c = to_vectors(leaf, centroids.shape[1]), centroids
        for _ in range(ITERATIONS):
            attention = torch.softmax(-torch.cdist(vectors, c).square() / tau, dim=1)
            c = attention.T @ vectors / attention.sum(0)[:, None]
        soft = from_vectors(attention @ c, rest, leaf.shape)
        soft.backward(pull)
        return soft.detach(), leaf.grad  # type: ignore[return-value]

    return step


def coremltools(weight: Tensor, pull: Tensor, centroids: Tensor, tau: float) -> Step:
    """`FakePalettize` in its default mode, its own k-means replaced by the given centroids."""
    from coremltools.optimize.torch.palettization.fake_palettize import FakePalettize  # type: ignore[import-not-found]
    from torch.ao.quantization import MinMaxObserver

    k, d = centroids.shape
    options = {"palett_tau": tau, "kmeans_max_iter": ITERATIONS, "palett_epsilon": 0.0, "prune_threshold": 0.0}
    observer = MinMaxObserver.with_args(quant_min=-128, quant_max=127, dtype=torch.qint8)
    layer = FakePalettize(observer, int(math.log2(k)), d, advanced_options=options)  # type: ignore[arg-type]
    layer.enable_fake_palett()
    layer.create_partitions(weight)
    leaf = weight.clone().requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        leaf.grad = None
        layer.centroids[0] = centroids.clone()
        soft = layer(leaf)
        soft.backward(pull)
        return soft.detach(), leaf.grad  # type: ignore[return-value]

    return step


CANDIDATES = {"ours": ours, "dense": dense, "coremltools": coremltools}


def available() -> list[str]:
    """The candidates that can run here."""
    try:
        import coremltools  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        print("coremltools is not installed: its rows are left out (pip install coremltools)")
        return ["ours", "dense"]
    return list(CANDIDATES)


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) if found else 0


def _measure(name: str, args: tuple, threads: int, queue: multiprocessing.Queue) -> None:
    torch.set_num_threads(threads)
    step = CANDIDATES[name](*problem(*args))
    step()
    ctypes.CDLL(None).malloc_trim(0)  # gives back what the first step freed
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    step()
    queue.put((_status("VmHWM") - before) / 1024)


def peak_mib(name: str, args: tuple, threads: int) -> float:
    """Memory that a step takes at its peak beside weight, gradient and libraries, in MiB; NaN where Linux does not tell."""
    if not Path("/proc/self/clear_refs").exists():
        return math.nan
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_measure, args=(name, args, threads, queue))
    process.start()
    result = queue.get(timeout=600)
    process.join()
    return result


def row(shape: str, form: str, args: BenchArguments, names: list[str]) -> str:
    """One line of the table."""
    logging.disable(logging.WARNING)  # coremltools', about what it does not find
    bits, dim = FORMS[form]
    weight, pull, centroids, tau = problem(shape, bits, dim, args.tau)
    steps = {name: CANDIDATES[name](weight, pull, centroids, tau) for name in names}
    results = {name: step() for name, step in steps.items()}
    t = medians(steps, args.rounds, clock=time.process_time)
    memory = {name: peak_mib(name, (shape, bits, dim, args.tau), torch.get_num_threads()) for name in names}
    cells = [shape, form, f"{1000 * t['ours']:.0f} ms, {memory['ours']:.0f} MiB"]
    for name in names[1:]:
        grad, own = (results[n][1].double().flatten() for n in (name, "ours"))
        gap = float((results[name][0] - results["ours"][0]).abs().max() / weight.std())
        cosine = float(grad @ own / (grad.norm() * own.norm()))
        cells.append(f"{t[name] / t['ours']:.1f} x, {memory[name] / memory['ours']:.1f} x ({gap:.0e}, {cosine:.4f})")
    start = time.process_time()
    vectors = to_vectors(weight, dim)[0]
    _ = kmeans_vectors(vectors, 2**bits) if dim > 1 else kmeans_scalar(vectors, 2**bits)
    begun = time.process_time() - start
    cells.append(", ".join(f"{begun / t[name]:.1f}" for name in names if name != "dense"))
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Print the table."""
    (args,) = HfArgumentParser(BenchArguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    if args.threads:
        torch.set_num_threads(args.threads)
    names = available()
    heads = [f"{name}: time, memory (largest difference in std, gradient's cosine)" for name in names[1:]]
    steps = ", ".join(name for name in names if name != "dense")
    print("| weight | form | ours | " + " | ".join(heads) + f" | start, in steps of {steps} |")
    print("|" + "---|" * (4 + len(heads)))
    for shape in args.shapes:
        for form in FORMS:
            print(row(shape, form, args, names), flush=True)


if __name__ == "__main__":
    main()

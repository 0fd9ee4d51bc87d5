"""How the cells of the paper's tables are made: with small models on local data, or with the full recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import paper_numbers as paper
from cells import Found, Scale
from proxies import (
    BASELINE,
    FIXED,
    HEAVY,
    PAPER,
    PROXIES,
    WIDE,
    Run,
    clustered,
    folder_name,
    looked_at_closely,
    size_aware,
)
from steps import Step

METHODS = {"Naive": "nearest", "DFQ": "dfq", "AdaRound": "adaround", "SQuant": "squant", "PD-Quant": "pdquant"}
WIDTHS = {1: "W4A8", 3: "W2A8", 4: "W4A8"}  # of the post-training tables
CLUSTERINGS = {
    "DKM 1 bit": (1, 1),
    "DKM 2 bits": (2, 1),
    "DKM 4 bits": (4, 1),
    "DKM 2 bits / 2 dims": (2, 2),
    "DKM 4 bits / 4 dims": (4, 4),
}  # fmt: skip  (bits, dims)
CALIBRATION = 256  # unlabelled images
# What is trained on a small scale in the place of the paper's models, and in which form.
STANDS = {
    paper.V1: "imagenette", paper.R18: "cifar10", paper.R50: "cifar10", "Transformer-base": "multi30k", "MobileBERT": "qnli",
}  # fmt: skip
FORMS = {paper.BASELINE: BASELINE, paper.HEAVY: HEAVY, paper.FIXED: FIXED, paper.PAPER: PAPER}
# The paper's: name for scripts/imagenet.py, and GPU hours: a guess from arithmetic, at 500 to 2,000 images a second.
CONFIGS = {
    paper.V1: ("mobilenet_v1", 60.0), paper.V2: ("mobilenet_v2", 90.0), paper.R18: ("resnet-18", 60.0),
    paper.R50: ("resnet-50", 150.0), paper.R101: ("resnet-101", 240.0),
}  # fmt: skip
FLAGS: dict[str, tuple[str, ...]] = {
    paper.BASELINE: ("--range_weight", "0"),
    paper.HEAVY: ("--range_weight", "0", "--weight_decay", "4e-4"),
    paper.FIXED: ("--range_alpha", "10", "--range_trainable", "false"),
    paper.PAPER: (),
    paper.AWARE: size_aware("std", "0.001", "raw"),
}


@dataclass(frozen=True)
class Proxy:
    """The runs of scripts/study.py and some more: what stands for what is in `STANDS`. Grids are per channel."""

    root: Path
    data: str
    text_model: str
    seed: int
    cost = "minutes on two CPU cores"

    def stands_for(self, model: str) -> str | None:
        """What is trained in its place."""
        return PROXIES[STANDS[model]].title if model in STANDS else None

    def run(self, model: str, training: str) -> Run:
        """The training of the model's stand-in; size-aware at the strength that the study recommends."""
        proxy = STANDS[model]
        form = FORMS.get(training, PROXIES[proxy].recommended)
        close = looked_at_closely(proxy, form)  # the very trainings of the study
        return Run(proxy, form, self.seed, self.root, self.data, self.text_model, full=close)

    def find(self, table: int, model: str, training: str, column: str) -> Found:
        """The training, and what follows it."""
        run = self.run(model, training)
        if column == "FP32":
            return Found((run.train(),), "float")
        if model == "Transformer-base":
            return Found((run.train(),), "nearest-8bit")
        if column in CLUSTERINGS:
            return self.clustering(model, training, column)
        if column in METHODS:
            method, width = METHODS[column], WIDTHS[table]
            step = run.table(method, (width,), ("per_channel",), run.out / f"{method}-{width}", data=CALIBRATION)
            return Found((run.train(), step), f"{method}-{width}-per_channel")
        method, bits = column.split()[0].lower(), int(column[-4])
        return Found((run.train(), run.quantized_training(method, bits)), "accuracy")

    def rounded(self, model: str, training: str) -> Found:
        """Rounded to nearest at all widths, as the study has it."""
        run = self.run(model, training)
        return Found((run.train(), run.nearest()), "nearest-W4A32-per_tensor")

    def saved(self, model: str, training: str) -> Path:
        """Folder of the trained float model."""
        return self.run(model, training).model

    def clustering(self, model: str, training: str, column: str) -> Found:
        """DKM, in the training's own script or in one of its own."""
        run, (bits, dims) = self.run(model, training), CLUSTERINGS[column]
        if not PROXIES[run.proxy].cluster:
            return Found((run.train(),), clustered(bits, dims))
        return Found((run.train(), run.clustering(bits, dims)), "accuracy")


@dataclass(frozen=True)
class Paper:
    """The recipe of the papers, on ImageNet-1k, WMT14 and GLUE from the hub; alpha and strength are the scripts' defaults."""

    root: Path
    data: str  # not used: the data come from the hub
    text_model: str
    seed: int
    cost = "GPU minutes (a guess)"

    def stands_for(self, model: str) -> str | None:
        """The model itself."""
        return model

    def train(self, model: str, training: str) -> Step:
        """From scratch (vision, translation) or fine-tuned (QNLI), with everything that is trained on after it."""
        words: tuple[str, ...] = ("--bf16", "true", "--seed", str(self.seed), *FLAGS[training])
        if model == "Transformer-base":
            words, hours = ("translation.py", *words, "--weight_bits", "8"), 30.0
        elif model == "MobileBERT":
            words, hours = (
                ("qnli.py", *words, "--num_train_epochs", "3", "--dkm_bits", "1", "2", "--dkm_steps", "3000"),
                2.0,
            )
        else:
            name, hours = CONFIGS[model]
            words = ("imagenet.py", "--config_name", name, "--streaming", *words, "--weight_bits", "4")
            if model == paper.R18:
                words = (*words, "--qat", "pact-W2A2", "lsq-W2A2", "pact-W4A4", "lsq-W4A4", "--qat_steps", "150000")
            if model in (paper.R18, paper.V1):
                words = (*words, "--dkm_bits", "1", "2", "4", "--dkm_vectors", "2/2", "4/4", "--dkm_steps", "50000")
        label = f"{model}, {training}: train"
        folder = folder_name(f"{model}-{training}")
        return Step(label, words, self.root / "paper" / f"{folder}-{self.seed}" / "train", 60 * hours, resumes=True)

    def find(self, table: int, model: str, training: str, column: str) -> Found:
        """The training, and after it scripts/quantize.py where the column is a post-training method."""
        train = self.train(model, training)
        if column in METHODS and model != "Transformer-base":
            return self.quantized(train, METHODS[column], WIDTHS[table])
        if column == "FP32":
            return Found((train,), "float")
        if column in CLUSTERINGS:
            return Found((train,), clustered(*CLUSTERINGS[column]))
        if model == "Transformer-base":
            return Found((train,), "nearest-8bit")
        method, widths = column.split()
        return Found((train,), f"{method.lower()}-W{widths[0]}A{widths[2]}")

    def rounded(self, model: str, training: str) -> Found:
        """Rounded to nearest per tensor at all widths."""
        return self.quantized(self.train(model, training), "nearest", *WIDE, grid="per_tensor")

    def saved(self, model: str, training: str) -> Path:
        """Folder of the trained float model."""
        return self.train(model, training).out / "float"

    def clustering(self, model: str, training: str, column: str) -> Found:
        """DKM, at the end of the training."""
        return self.find(6, model, training, column)

    def quantized(self, train: Step, method: str, *widths: str, grid: str = "per_channel") -> Found:
        """Cells of scripts/quantize.py on the trained float model; the key is the last one's."""
        images = (
            "--calibration_file",
            "ILSVRC/imagenet-1k:train",
            "--validation_file",
            "ILSVRC/imagenet-1k:validation",
        )
        words = ("quantize.py", "--model_name_or_path", str(train.out / "float"), *images, "--crop_fraction", "0.875")
        words = (*words, "--calibration_samples", "1024", "--methods", method, "--widths", *widths)
        name = f"{method}-{'-'.join(widths)}"
        step = Step(f"{train.name[:-7]}: {name}", (*words, "--granularities", grid), train.out.parent / name, 60.0)
        return Found((train, step), f"{method}-{widths[-1]}-{grid}")


SCALES: dict[str, type[Proxy] | type[Paper]] = {"proxy": Proxy, "paper": Paper}
_CHECKED: tuple[type[Scale], ...] = (Proxy, Paper)

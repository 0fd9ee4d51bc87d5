"""The small tasks that stand for the papers' large ones, and the forms of the range loss that are compared on them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from steps import Step

PAPER = "soft min-max 0.01 (paper)"
BASELINE, HEAVY, FIXED = "no range loss", "heavy L2", "soft min-max 0.01, alpha 10 fixed"
SOFT = ("--range_loss", "soft_min_max")  # not every script's default
ABSOLUTE: dict[str, tuple[str, ...]] = {
    BASELINE: ("--range_loss", "none"),
    "L-inf 0.01": ("--range_loss", "l_inf"),
    "margin 0.01": ("--range_loss", "margin"),
    FIXED: (*SOFT, "--range_alpha", "10", "--range_trainable", "false"),
    PAPER: SOFT,
}  # range_weight is 0.01 where no flag says otherwise


def size_aware(units: str, strength: str, target: str, alpha: str = "3") -> tuple[str, ...]:
    """Flags of a form that measures each weight in its own std, the raw weight or the deployed one."""
    how = ("--range_units", units, "--range_alpha", alpha, "--range_target", target)
    return (*SOFT, *how, "--range_weight", strength)


def decoupled(*strengths: str) -> dict[str, tuple[str, ...]]:
    """Forms that take steps of their own beside the optimizer's, so many standard deviations long."""
    own = ("--range_decoupled", "true")
    return {f"relative {s}, raw, decoupled": (*size_aware("relative", s, "raw"), *own) for s in strengths}


@dataclass(frozen=True)
class Proxy:
    """How one task is trained and measured. Words are flags; `{data}` and `{text_model}` in them are replaced."""

    title: str
    task: str  # of scripts/quantize.py
    train: tuple[str, ...]
    files: tuple[str, ...]  # of scripts/quantize.py
    forms: dict[str, tuple[str, ...]]
    minutes: tuple[float, float, float]  # training, rounding to nearest and SQuant, AdaRound and clustering
    saved: str = "float"  # folder of the trained model below that of the run
    clustered: tuple[str, ...] = ()  # further flags of a training that ends with clusterings
    plain: tuple[str, ...] = ()  # and of one that does not
    cluster: tuple[str, ...] = ()  # or the flags of a clustering by itself, for scripts that do one thing
    recommended: str = ""  # the form of the range loss that served it best


def _forms(heavy: tuple[str, ...], aware: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    first, *rest = ABSOLUTE.items()
    return dict([first, (HEAVY, ("--range_loss", "none", *heavy)), *rest]) | aware


def _named(units: str, target: str, *strengths: str, alpha: str = "3") -> dict[str, tuple[str, ...]]:
    return {f"{units} {s}, {target}": size_aware(units, s, target, alpha) for s in strengths}


PROXIES = {
    "imagenette": Proxy(
        title="MobileNetV1-0.75 fine-tuned on Imagenette for 102 steps",
        task="image-classification",
        train=(
            "imagenet.py", "--model_name_or_path", "{data}/models/mobilenet_v1_0.75_224", "--train_file",
            "{data}/imagenette160/train.parquet", "--validation_file", "{data}/imagenette160/validation.parquet",
            "--max_eval_samples", "1000", "--image_size", "160", "--crop_fraction", "1", "--max_steps", "102",
            "--per_device_train_batch_size", "64", "--dataloader_num_workers", "1", "--save_steps", "51",
            "--save_total_limit", "1", "--report_to", "none", "--weight_bits", "8",
        ),
        files=(
            "--calibration_file", "{data}/imagenette160/train.parquet", "--validation_file",
            "{data}/imagenette160/validation.parquet", "--image_size", "160", "--max_eval_samples", "500",
        ),
        forms=_forms(
            ("--weight_decay", "4e-4"),
            _named("std", "deployed", "0.02", "0.05", "0.1", "0.2", alpha="1")
            | _named("std", "raw", "0.05", alpha="1")
            | _named("relative", "deployed", "0.05", alpha="1"),
        ),
        recommended="std 0.1, deployed",
        minutes=(3.3, 0.8, 4.0),
        clustered=("--dkm_bits", "1", "2", "--dkm_steps", "50", "--dkm_learning_rate", "0.003"),
        plain=("--dkm_bits", "2", "--dkm_steps", "0"),
    ),
    "cifar10": Proxy(
        title="ResNet (4 basic blocks) on CIFAR-10 from scratch, 6 epochs",
        task="image-classification",
        train=(
            "cifar_resnet.py", "--train_file", "{data}/cifar10/train.parquet", "--validation_file",
            "{data}/cifar10/test.parquet", "--num_train_epochs", "6", "--save_strategy", "epoch", "--save_total_limit", "1",
        ),
        files=(
            "--calibration_file", "{data}/cifar10/train.parquet", "--validation_file", "{data}/cifar10/test.parquet",
            "--image_size", "64", "--max_eval_samples", "5000", "--batch_size", "100",
        ),
        forms=_forms(
            ("--weight_decay", "5e-3"),
            _named("std", "raw", "0.001") | _named("relative", "raw", "0.1", "0.3"),
        ),
        minutes=(4.0, 2.0, 4.0),
        saved="",
        cluster=("--learning_rate", "0.01"),
        recommended="relative 0.3, raw",
    ),
    "qnli": Proxy(
        title="6-layer MiniLM fine-tuned on 10,000 QNLI pairs",
        task="text-classification",
        train=(
            "qnli.py", "--model_name_or_path", "{text_model}", "--train_file", "{data}/qnli/train_from_squad.parquet",
            "--validation_file", "{data}/qnli/validation.parquet", "--max_train_samples", "10000", "--num_train_epochs", "1",
            "--per_device_train_batch_size", "32", "--learning_rate", "1e-4", "--warmup_steps", "0.1",
            "--train_sampling_strategy", "group_by_length", "--save_steps", "150", "--save_total_limit", "1",
            "--weight_bits", "8",
        ),
        files=(
            "--calibration_file", "{data}/qnli/train_from_squad.parquet", "--validation_file", "{data}/qnli/validation.parquet",
            "--max_eval_samples", "1000",
        ),
        forms=_forms(
            ("--weight_decay", "0.1"),
            _named("std", "raw", "0.01") | _named("relative", "raw", "1") | decoupled("3", "10"),
        ),
        minutes=(7.0, 4.0, 10.0),
        clustered=("--dkm_bits", "1", "2", "--dkm_steps", "50", "--dkm_learning_rate", "5e-5"),
        plain=("--dkm_bits", "2", "--dkm_steps", "0"),
        recommended="relative 3, raw, decoupled",
    ),
    "multi30k": Proxy(
        title="4 + 4 layers of 128 on Multi30k, English to German",
        task="translation",
        train=(
            "translation.py", "--small", "--train_file", "{data}/multi30k/train.jsonl", "--validation_file",
            "{data}/multi30k/test2016.jsonl", "--num_train_epochs", "6", "--save_strategy", "epoch", "--save_total_limit",
            "1", "--report_to", "none",
        ),
        files=(
            "--calibration_file", "{data}/multi30k/train.jsonl", "--validation_file", "{data}/multi30k/test2016.jsonl",
        ),
        forms=_forms(("--weight_decay", "0.1"), _named("std", "raw", "0.05") | _named("relative", "raw", "0.05")),
        minutes=(15.0, 4.0, 10.0),
        recommended="relative 0.05, raw",
    ),
}  # fmt: skip


def looked_at_closely(proxy: str, form: str) -> bool:
    """Whether a form's first seed also gets AdaRound and clusterings, which take as long as everything else."""
    return form in (BASELINE, PAPER, PROXIES[proxy].recommended)


def files(data: str) -> set[str]:
    """What all tasks read below the folder `data`."""
    words = {word for proxy in PROXIES.values() for word in (*proxy.train, *proxy.files) if word.startswith("{data}/")}
    return {word.format(data=data) for word in words}


ITERS = 200  # of AdaRound in the study
WIDE, NARROW = ("W8A32", "W6A32", "W4A32", "W3A32", "W2A32"), ("W4A32", "W2A32")
SLOW = {"adaround": 0.5, "pdquant": 1.2}  # their share of the slow minutes of a task


def folder_name(words: str) -> str:
    """`words` with hyphens for what is unusual in the name of a folder."""
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in words)


def clustered(bits: int, dims: int) -> str:
    """Name of a clustering: its row in metrics.json, or its folder."""
    return f"dkm-{bits}bit" + (f"-{dims}dim" if dims > 1 else "")


@dataclass(frozen=True)
class Run:
    """One proxy trained in one form with one seed, below `root`."""

    proxy: str
    form: str
    seed: int
    root: Path
    data: str
    text_model: str
    full: bool  # with AdaRound and clusterings

    @property
    def out(self) -> Path:
        """The folder of everything about this run."""
        return self.root / self.proxy / f"{folder_name(self.form)}-{self.seed}"

    @property
    def model(self) -> Path:
        """The trained float model."""
        return self.out / "train" / PROXIES[self.proxy].saved

    def steps(self) -> list[Step]:
        """What the study runs: training; rounding to nearest; SQuant; DFQ; and where asked AdaRound and clusterings."""
        both = ("per_tensor", "per_channel")
        steps = [
            self.train(),
            self.nearest(),
            self.table("squant", NARROW, both),
            self.table("dfq", ("W6A32", "W4A32"), ("per_tensor",)),
        ]
        if self.full:
            options = f'{{"adaround": {{"iters": {ITERS}}}}}'
            steps.append(self.table("adaround", NARROW, ("per_channel",), options=options))
            steps += [self.clustering(bits, 1) for bits in (1, 2) if self.own.cluster]
        return steps

    @property
    def own(self) -> Proxy:
        """What is trained."""
        return PROXIES[self.proxy]

    def train(self) -> Step:
        """The training, with what its own script makes of the model."""
        last = self.own.clustered if self.full else self.own.plain
        words = (*self._filled(self.own.train), *self.own.forms[self.form], *last, "--seed", str(self.seed))
        return Step(self._label("train"), words, self.out / "train", self.own.minutes[0], resumes=True)

    def nearest(self) -> Step:
        """Rounded to nearest at all widths, per tensor and per channel."""
        return self.table("nearest", WIDE, ("per_tensor", "per_channel"))

    def table(
        self,
        method: str,
        widths: tuple[str, ...],
        grids: tuple[str, ...],
        out: Path | None = None,
        options: str = "{}",
        data: int = 128,
    ) -> Step:
        """scripts/quantize.py on the trained model with one method, calibrated on so many samples."""
        words = ("quantize.py", "--model_name_or_path", str(self.model), "--task", self.own.task)
        words = (*words, *self._filled(self.own.files), "--methods", method, "--widths", *widths)
        words = (*words, "--granularities", *grids, "--options", options, "--calibration_samples", str(data))
        minutes = self.own.minutes[2] * SLOW[method] if method in SLOW else self.own.minutes[1] / 2
        return Step(self._label(f"{method} {' '.join(widths)}"), words, out or self.out / method, minutes)

    def clustering(self, bits: int, dims: int) -> Step:
        """DKM of the trained model in a script run of its own, one epoch of 20,000 images."""
        words = (*self._trained_on(), "--num_train_epochs", "1", "--max_train_samples", "20000", *self.own.cluster)
        words = (*words, "--method", "dkm", "--granularity", "per_tensor", "--weight_bits", str(bits))
        if dims > 1:
            words = (*words, "--options", f'{{"dim": {dims}}}')
        name = clustered(bits, dims)
        return Step(self._label(name), words, self.out / name, self.own.minutes[2] / 4, resumes=True)

    def quantized_training(self, method: str, bits: int) -> Step:
        """`method` with `bits` for weights and inputs, from the trained model, five epochs."""
        words = (*self._trained_on(), "--num_train_epochs", "5", "--learning_rate", "0.02", "--method", method)
        words = (*words, "--weight_bits", str(bits), "--act_bits", str(bits))
        out = self.out / f"{method}-W{bits}A{bits}"
        return Step(self._label(f"{method} W{bits}A{bits}"), words, out, 6.0, resumes=True)

    def _trained_on(self) -> tuple[str, ...]:
        words = (*self._filled(self.own.train), *self.own.forms[self.form], "--model_name_or_path", str(self.model))
        return (*words, "--save_strategy", "no", "--seed", str(self.seed))

    def _label(self, what: str) -> str:
        return f"{self.proxy}, {self.form}, seed {self.seed}: {what}"

    def _filled(self, words: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(word.format(data=self.data, text_model=self.text_model) for word in words)

"""Does the range loss help on a small budget? Trains three proxies with every form of it, quantizes, and writes the tables.

    python scripts/study.py --data_dir DIR --text_model DIR --dry_run             # the steps, what is done, and minutes
    python scripts/study.py --data_dir DIR --text_model DIR --proxies cifar10 --seeds 0 1 2

DIR holds imagenette160/, cifar10/, qnli/ and models/mobilenet_v1_0.75_224 (parquet files with `image` and `label`, or question,
sentence and label). With the first of `--seeds` three forms (none, the paper's, the recommended one) also get AdaRound and
clusterings. The same command skips what is done and goes on where it was stopped; tables hold what there is (mean and
spread over seeds), in study.md, study.csv and a plot.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

import interrupts
import steps
import study_table
from proxies import PROXIES, Run, files, looked_at_closely

STUDIED = ("imagenette", "cifar10", "qnli")
LEGEND = """Accuracy in %, mean and standard deviation over seeds. W8 t: weights rounded to nearest at 8 bits, per tensor;
c: per channel. Means over layers: range/std of the weights, and range/std ("deployed") and kurtosis with batch norms folded."""


@dataclass
class StudyArguments:
    """Which part of the study to run."""

    data_dir: str = field(metadata={"help": "Folder of the data sets and of models/mobilenet_v1_0.75_224."})
    text_model: str | None = field(
        default=None, metadata={"help": "Folder or hub id of the text encoder, for the proxy qnli."}
    )
    proxies: list[str] = field(
        default_factory=lambda: list(STUDIED), metadata={"help": f"Which tasks: {', '.join(PROXIES)}."}
    )
    forms: list[str] | None = field(default=None, metadata={"help": "Names of forms (see --dry_run); default: all."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the trainings."})
    dry_run: bool = field(default=False, metadata={"help": "Print the steps and their cost, and run nothing."})
    tables_only: bool = field(default=False, metadata={"help": "Write the tables of what is there, and run nothing."})
    output_dir: str = field(default="runs/study", metadata={"help": "Where runs, tables and plots go."})

    def __post_init__(self) -> None:
        unknown = [name for name in self.proxies if name not in PROXIES]
        if unknown:
            raise ValueError(f"proxies are {', '.join(PROXIES)}; got {', '.join(unknown)}")
        known = [form for name in self.proxies for form in PROXIES[name].forms]
        wrong = [form for form in self.forms or () if form not in known]
        if wrong:
            raise ValueError(f"forms are {'; '.join(dict.fromkeys(known))}; got {'; '.join(wrong)}")
        if "qnli" in self.proxies and self.text_model is None:
            raise ValueError("the proxy qnli needs --text_model, a folder or hub id; or leave it out of --proxies")
        if not Path(self.data_dir).is_dir():
            raise ValueError(f"data_dir: there is no folder {self.data_dir}")


def runs(args: StudyArguments) -> list[Run]:
    """All runs asked for: the first seed of every form, then the second."""
    found = []
    for seed in args.seeds:
        for proxy in args.proxies:
            for form in PROXIES[proxy].forms:
                if args.forms is None or form in args.forms:
                    where = (Path(args.output_dir), args.data_dir, args.text_model or "")
                    full = seed == args.seeds[0] and looked_at_closely(proxy, form)
                    found.append(Run(proxy, form, seed, *where, full=full))
    return found


def write(args: StudyArguments) -> str:
    """Tables of all runs there are below output_dir, into study.md, study.csv and a plot of each proxy; the Markdown."""
    out, texts, records = Path(args.output_dir), [], []
    for proxy in STUDIED:
        found = study_table.collect(out / proxy, proxy)
        if found:
            texts.append(f"## {PROXIES[proxy].title}\n\n{study_table.markdown(found)}")
            records += [{"proxy": proxy, **row} for row in found]
            study_table.plot(found, out / f"{proxy}.png")
    if records:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(key for row in records for key in row)))
        writer.writeheader()
        writer.writerows(records)
        (out / "study.csv").write_text(text.getvalue(), encoding="utf-8")
        (out / "study.md").write_text("\n\n".join(["# The study", LEGEND, *texts]) + "\n", encoding="utf-8")
    return "\n\n".join(texts)


def main() -> None:
    """Run what is missing, write the tables."""
    try:
        (args,) = HfArgumentParser(StudyArguments, description=__doc__).parse_args_into_dataclasses()  # type: ignore[arg-type]
    except ValueError as error:
        raise SystemExit(f"study: {error}") from error
    wanted = [step for run in runs(args) for step in run.steps()]
    if args.dry_run:
        print(steps.plan(wanted, "minutes on two CPU cores"), flush=True)
    if not args.tables_only:
        steps.check_files(wanted, files(args.data_dir))
    if args.dry_run:
        return
    failed = [] if args.tables_only else steps.run(wanted)
    print(write(args))
    if failed:
        raise SystemExit(f"failed: {'; '.join(failed)}; the same command tries them again")


if __name__ == "__main__":
    interrupts.run(main)

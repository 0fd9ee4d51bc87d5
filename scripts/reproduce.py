"""The tables and figures of the range loss's papers: runs what one needs, and prints ours beside the paper's numbers.

    python scripts/reproduce.py --table 1 --data_dir DIR                  # small models on real data, an hour on two CPU cores
    python scripts/reproduce.py --table 1 --scale paper --dry_run         # the full recipe: its steps and their cost
    python scripts/reproduce.py --figure 3 --data_dir DIR

What is done is skipped, what was interrupted goes on. Results go to OUTPUT_DIR/SCALE/ as table-N.md, table-N.csv and plots.
`--scale proxy` shares its runs with scripts/study.py where both have the same --output_dir. `--scale paper` wants the hub
(or its cache), `accelerate config`, and days of GPUs.
"""

from __future__ import annotations

import csv
import io
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

import cells
import interrupts
import paper_numbers
import proxies
import reproduce_figures
import scales
import steps


@dataclass
class ReproduceArguments:
    """Which tables and figures, and how large."""

    table: list[int] = field(default_factory=list, metadata={"help": "Tables of the paper, 1 to 6."})
    figure: list[int] = field(default_factory=list, metadata={"help": "Figures of the paper, 1 to 3."})
    scale: str = field(
        default="proxy",
        metadata={"help": "Small models on local data, or the paper's recipe.", "choices": list(scales.SCALES)},
    )
    data_dir: str | None = field(
        default=None, metadata={"help": "proxy: folder of imagenette160/, cifar10/, qnli/, multi30k/ and models/."}
    )
    text_model: str | None = field(default=None, metadata={"help": "proxy, table 6: folder or hub id of an encoder."})
    seed: int = field(default=0, metadata={"help": "Seed of all trainings."})
    launcher: str = field(
        default="", metadata={"help": "What starts trainings: 'accelerate launch --num_processes 8'; default: Python."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Print the steps and their cost, and run nothing."})
    output_dir: str = field(default="runs/study", metadata={"help": "Where runs, tables and plots go."})

    def __post_init__(self) -> None:
        known = {"table": range(1, 7), "figure": range(1, 4)}
        for name, allowed in known.items():
            wrong = [number for number in getattr(self, name) if number not in allowed]
            if wrong:
                raise ValueError(f"{name} must be from 1 to {allowed[-1]}, got {', '.join(map(str, wrong))}")
        if not self.table and not self.figure:
            raise ValueError("give --table (1 to 6) or --figure (1 to 3)")
        if self.scale == "proxy":
            if self.data_dir is None or not Path(self.data_dir).is_dir():
                raise ValueError(f"--scale proxy needs --data_dir, a folder of the data; got {self.data_dir}")
            if 6 in self.table and self.text_model is None:
                raise ValueError("table 6 at --scale proxy needs --text_model, a folder or hub id of a text encoder")


def main() -> None:
    """Run the steps of all that was asked for, then print and write each table and figure."""
    try:
        (args,) = HfArgumentParser(ReproduceArguments, description=__doc__).parse_args_into_dataclasses()  # type: ignore[arg-type]
    except ValueError as error:
        raise SystemExit(f"reproduce: {error}") from error
    scale = scales.SCALES[args.scale](Path(args.output_dir), args.data_dir or "", args.text_model or "", args.seed)
    tables = {number: cells.table(number, scale) for number in args.table}
    figures = {number: reproduce_figures.FIGURES[number] for number in args.figure}
    wanted = [step for table in tables.values() for cell in table for step in cell.steps]
    wanted += [step for figure in figures.values() for step in figure.steps(scale)]
    wanted = list({step.out: step for step in wanted}.values())
    if args.dry_run:
        print(steps.plan(wanted, scale.cost), flush=True)
    steps.check_files(wanted, proxies.files(args.data_dir or ""))
    if args.dry_run:
        return
    failed = steps.run(wanted, shlex.split(args.launcher))
    out = Path(args.output_dir) / args.scale
    out.mkdir(parents=True, exist_ok=True)
    for number, table in tables.items():
        write_table(number, table, out)
    for number, figure in figures.items():
        figure.draw(scale, out / f"figure-{number}.png")
        print(f"figure {number}: {out / f'figure-{number}.png'}")
    if failed:
        raise SystemExit(f"failed: {'; '.join(failed)}; the same command tries them again")


def write_table(number: int, table: list[cells.Cell], out: Path) -> None:
    """Prints a table, writes it as Markdown and csv, and plots ours against the paper's."""
    title = paper_numbers.TITLES[number]
    text = f"Table {number}: {title}; ours (paper)\n\n{cells.markdown(table)}\n"
    print(f"\n{text}")
    (out / f"table-{number}.md").write_text(text, encoding="utf-8")
    lines = io.StringIO()
    writer = csv.writer(lines)
    writer.writerow(["model", "stand-in", "training", "column", "ours", "paper"])
    writer.writerows([c.model, c.stand_in, c.training, c.column, c.ours(), c.paper] for c in table)
    (out / f"table-{number}.csv").write_text(lines.getvalue(), encoding="utf-8")
    reproduce_figures.plot_table(table, out / f"table-{number}.png", title)


if __name__ == "__main__":
    interrupts.run(main)

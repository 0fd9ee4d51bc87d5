"""Steps of long work: each is a script with its flags. What is done is skipped, what was interrupted goes on."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

import common
from interrupts import INTERRUPTED

HERE = Path(__file__).resolve().parent
DONE = "done.json"


@dataclass(frozen=True)
class Step:
    """One script of this folder with its flags (without --output_dir), and the folder that it alone writes to."""

    name: str
    words: tuple[str, ...]
    out: Path
    minutes: float  # about
    resumes: bool = False  # whether the script goes on from its checkpoints

    def command(self) -> list[str]:
        """The script and all its flags, with the one that takes an interrupted training up again."""
        words = [*self.words, "--output_dir", str(self.out)]
        return [*words, "--resume_from_checkpoint", "true"] if self.resumes and _checkpoints(self.out) else words

    def done(self) -> bool:
        """Whether these very flags ran to their end; others in the same folder do not count."""
        file = self.out / DONE
        return file.is_file() and json.loads(file.read_text())["words"] == list(self.words)

    def took(self) -> float:
        """Minutes that it took where it is done and was timed; else what it is thought to take."""
        seconds = json.loads((self.out / DONE).read_text()).get("seconds") if self.done() else None
        return self.minutes if seconds is None else round(seconds / 60, 1)


def _checkpoints(out: Path) -> list[Path]:
    return [folder for folder in out.glob("checkpoint-*") if (folder / "trainer_state.json").is_file()]


def check_files(steps: Iterable[Step], files: Iterable[str]) -> None:
    """Ends with one line that names those of `files` which steps that are not done read, and which are not there."""
    gone = {file for file in files if not Path(file).exists()}
    missing = sorted({word for step in steps if not step.done() for word in step.words if word in gone})
    if missing:
        raise SystemExit(f"these steps read files that are not there: {', '.join(missing)}")


def plan(steps: Sequence[Step], cost: str) -> str:
    """The steps as a Markdown table: what is done, what is to be run, and how long that takes, in units of `cost`."""
    lines = [f"| step | state | {cost} | command |", "|---|---|---:|---|"]
    for step in steps:
        state = "done" if step.done() else "to run"
        lines.append(f"| {step.name} | {state} | {step.took():g} | `python scripts/{shlex.join(step.command())}` |")
    left = sum(step.minutes for step in steps if not step.done())
    return "\n".join([*lines, "", f"{len(steps)} steps, to go about {left:.0f} {cost}"])


def run(steps: Sequence[Step], launcher: Sequence[str] = ()) -> list[str]:
    """Runs what is not done, one after the other; returns the names of those that failed, and goes on behind them.

    Trainings are started by `launcher` (default: Python), such as accelerate launch.

    Ctrl-C reaches the script at hand, which keeps its state; then this ends too, with exit code 130.
    """
    failed: list[str] = []
    for step in tqdm(_unique(steps), desc="steps"):
        if step.done():
            continue
        tqdm.write(f"\n{step.name}: python scripts/{shlex.join(step.command())}")
        start = time.perf_counter()
        code = _run(step, launcher)
        if code == 0:
            seconds = round(time.perf_counter() - start, 2)  # of the last start, where it was interrupted before
            common.write_json(step.out / DONE, {"words": list(step.words), "seconds": seconds})
        elif code in (INTERRUPTED, -2):
            raise SystemExit(INTERRUPTED)
        else:
            tqdm.write(f"{step.name} failed with exit code {code}")
            failed.append(step.name)
    return failed


def _run(step: Step, launcher: Sequence[str]) -> int:
    script, *flags = step.command()
    start = launcher if launcher and step.resumes else [sys.executable]
    with subprocess.Popen([*start, str(HERE / script), *flags]) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the script got it too, and is writing its state
            process.wait()
            return INTERRUPTED


def _unique(steps: Iterable[Step]) -> list[Step]:
    return list({step.out: step for step in steps}.values())

"""Ctrl-C in the scripts: a training writes its state and can go on from there; all work ends with one line and code 130."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_r2.trainer import last_complete_checkpoint

INTERRUPTED = 130  # exit code of what a signal 2 ended, as shells have it
GO_ON = "go on with the same flags and --resume_from_checkpoint true"


class Stopped(KeyboardInterrupt):
    """Ctrl-C, with what was kept and how to go on in words."""


class _Finished(Exception):
    """The checkpoint to go on from is the end of the training."""


def run(main: Callable[[], None]) -> None:
    """`main()`; Ctrl-C ends it with one line and exit code 130."""
    try:
        main()
    except KeyboardInterrupt as stop:
        print(f"\n{stop}" if isinstance(stop, Stopped) else "\nstopped; nothing was kept", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    leave_group()  # behind the net: Ctrl-C here finds everything kept


def leave_group() -> None:
    """Where there is a group of processes, ends this one, as multiprocessing ends its own: handlers of atexit, then no more.

    Threads of gloo that still hold tensors while Python shuts down abort the process now and then (PyTorch issue 190489):
    all files would be there, and the launcher would call the run failed. `destroy_process_group` alone does not end these
    threads where a device mesh keeps the group, as FSDP does.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


class SaveOnInterrupt(TrainerCallback):
    """Ctrl-C ends the step at hand, writes a checkpoint and stops; a second Ctrl-C stops at once.

    For one process. Of several, each would stop at a step of its own and wait for the others: there a run goes on from
    the last checkpoint of `save_steps`.
    """

    def __init__(self) -> None:
        self.asked = False
        self._process, self._before = os.getpid(), signal.getsignal(signal.SIGINT)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes the signal over. Trainer would add a step to a training that ended within an epoch: that is prevented."""
        if state.global_step >= state.max_steps:
            raise _Finished
        if args.world_size == 1:
            signal.signal(signal.SIGINT, self._ask)

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        if (
            os.getpid() != self._process
        ):  # workers of a data loader, which a terminal interrupts too, have work to finish
            return
        self.asked = True
        print("\nstopping after this step; its checkpoint is being written (Ctrl-C again: at once)", file=sys.stderr)
        self.give_back()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Asks Trainer to save and to stop."""
        if self.asked:
            control.should_save = control.should_training_stop = True

    def give_back(self) -> None:
        """Leaves the signal to whoever had it before."""
        signal.signal(signal.SIGINT, self._before)


def train(trainer: Trainer, training: Any) -> None:
    """Trains, from a checkpoint where the flags say so; ends with one line where there is none.

    Raises Stopped after Ctrl-C, once a checkpoint is written.
    """
    interrupt, resume = SaveOnInterrupt(), training.resume_from_checkpoint
    if asked_to_resume(training):
        try:
            resume = last_complete_checkpoint(str(training.output_dir))
        except ValueError as error:
            raise SystemExit(f"cannot resume: {error}") from error
    trainer.add_callback(interrupt)
    try:
        trainer.train(resume_from_checkpoint=resume)
    except _Finished:
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
    finally:
        interrupt.give_back()
    if interrupt.asked:
        raise Stopped(f"stopped at step {trainer.state.global_step}; the state is in {training.output_dir}: {GO_ON}")


def asked_to_resume(training: Any) -> bool:
    """Whether the flags say to go on from the last checkpoint, wherever that is."""
    return str(training.resume_from_checkpoint).lower() == "true"


def keep_trained(trainer: Trainer) -> None:
    """Writes the checkpoint of a finished training that was to write none, so that what follows can go on from it."""
    folder = Path(str(trainer.args.output_dir)) / f"checkpoint-{trainer.state.global_step}"
    if not folder.is_dir() and trainer.args.world_size == 1:
        trainer._save_checkpoint(trainer.model, trial=None)  # type: ignore[arg-type]  (a Trainer that trained has one)


def forget(folder: Path) -> None:
    """Removes the checkpoints in `folder`, and the folder where it is then empty."""
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()

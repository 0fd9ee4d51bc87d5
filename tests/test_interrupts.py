"""scripts/interrupts.py: Ctrl-C ends a step and writes a checkpoint; the run goes on from it to the same weights."""

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from hf_r2 import R2Trainer, R2TrainingArguments

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))
interrupts = importlib.import_module("interrupts")


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x, labels):
        return {"loss": (self.layer(x)[:, 0] - labels).square().mean()}


class PressCtrlC(TrainerCallback):
    """At the begin of a step; to a group of processes, as a terminal does, where one of its own is given."""

    def __init__(self, group=None):
        self.group = group

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT) if self.group is None else os.killpg(self.group, signal.SIGINT)


def trainer(folder, resume=None, **more):
    torch.manual_seed(0)
    rows = [{"x": torch.randn(4), "labels": torch.randn(())} for _ in range(24)]
    settings = {"max_steps": 6, "save_strategy": "no", **more}
    training = R2TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, learning_rate=0.05, seed=3, use_cpu=True,
        report_to="none", disable_tqdm=True, resume_from_checkpoint=resume, dataloader_pin_memory=False, **settings,
    )  # fmt: skip
    return R2Trainer(Line(), training, train_dataset=rows), training


def test_ctrl_c_leaves_a_checkpoint_from_which_the_run_goes_on(tmp_path, capsys):
    whole, training = trainer(tmp_path / "whole")
    interrupts.train(whole, training)
    stopped, training = trainer(tmp_path / "part")
    stopped.add_callback(PressCtrlC())
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(interrupts.Stopped, match=r"stopped at step 3; .*part: go on .*--resume_from_checkpoint true"):
        interrupts.train(stopped, training)
    assert signal.getsignal(signal.SIGINT) is before
    assert capsys.readouterr().err.count("stopping after this step") == 1
    resumed, training = trainer(tmp_path / "part", "true")
    interrupts.train(resumed, training)
    assert resumed.state.global_step == 6
    assert torch.equal(resumed.model.layer.weight, whole.model.layer.weight)
    assert not torch.equal(stopped.model.layer.weight, whole.model.layer.weight)


def test_a_training_that_ended_within_an_epoch_is_not_trained_on(tmp_path):
    whole, training = trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=4)
    interrupts.train(whole, training)
    before = signal.getsignal(signal.SIGINT)
    resumed, training = trainer(tmp_path, "true", max_steps=4, save_strategy="steps", save_steps=4)
    interrupts.train(resumed, training)
    assert resumed.state.global_step == 4 and signal.getsignal(signal.SIGINT) is before
    assert torch.equal(resumed.model.layer.weight, whole.model.layer.weight)


def test_a_finished_training_that_saved_nothing_is_kept_and_forgotten(tmp_path):
    whole, training = trainer(tmp_path)
    interrupts.train(whole, training)
    assert not list(tmp_path.iterdir())
    interrupts.keep_trained(whole)
    resumed, training = trainer(tmp_path, "true")
    interrupts.train(resumed, training)
    assert torch.equal(resumed.model.layer.weight, whole.model.layer.weight)
    interrupts.forget(tmp_path)
    assert not tmp_path.exists()


def test_no_checkpoint_to_resume_from_ends_with_one_line(tmp_path):
    tool, training = trainer(tmp_path, "true")
    with pytest.raises(SystemExit, match="cannot resume: "):
        interrupts.train(tool, training)


def test_ctrl_c_ends_a_script_with_one_line(capsys):
    def stop(error):
        raise error

    for error, said in ((KeyboardInterrupt(), "stopped; nothing was kept"), (interrupts.Stopped("so far"), "so far")):
        with pytest.raises(SystemExit) as ended:
            interrupts.run(lambda error=error: stop(error))
        assert ended.value.code == 130 and capsys.readouterr().err == f"\n{said}\n"


def test_a_terminal_interrupts_the_workers_too_and_they_finish(tmp_path):
    """In a process of its own, whose whole group gets the signal."""
    code = (
        "import os, sys; sys.path[:0] = ['scripts', '.']; os.setpgrp()\n"
        "import tests.test_interrupts as t\n"
        f"tool, training = t.trainer({str(tmp_path)!r}, dataloader_num_workers=2)\n"
        "tool.add_callback(t.PressCtrlC(os.getpgrp()))\n"
        "t.interrupts.run(lambda: t.interrupts.train(tool, training))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parent.parent, capture_output=True,
                         text=True, timeout=120)  # fmt: skip
    assert run.returncode == 130, run.stderr
    assert run.stderr.count("stopping after this step") == 1 and "Traceback" not in run.stderr
    assert (tmp_path / "checkpoint-3" / "trainer_state.json").is_file()


LEAVES = """
import atexit, sys, torch
from torch.distributed.device_mesh import init_device_mesh
import interrupts

class AtShutdown:
    def __del__(self):
        print("Python shuts down")

def main():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    kept.append(init_device_mesh("cpu", (1,)))
    atexit.register(print, "handlers run")
    print("finished", torch.distributed.is_initialized())

kept = [AtShutdown()]
interrupts.run(main if sys.argv[1] == "group" else lambda: print("finished"))
"""


@pytest.mark.parametrize(
    "way, said", [("group", "finished True\nhandlers run\n"), ("alone", "finished\nPython shuts down\n")]
)
def test_a_run_that_went_well_leaves_its_group_and_python_with_it(way, said):
    """Else threads of gloo that still hold tensors may abort the process while Python shuts down."""
    environment = {**os.environ, "PYTHONPATH": f"{SCRIPTS}:{SCRIPTS.parent}"}
    run = subprocess.run(
        [sys.executable, "-c", LEAVES, way], env=environment, capture_output=True, text=True, timeout=120
    )
    assert (run.returncode, run.stdout) == (0, said), run.stderr

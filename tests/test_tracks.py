"""scripts/tracks.py: Ctrl-C ends a step, writes a checkpoint, and the run goes on from it to the same weights."""

import importlib
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from hf_r2 import R2Trainer, R2TrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
tracks = importlib.import_module("tracks")


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x, labels):
        return {"loss": (self.layer(x)[:, 0] - labels).square().mean()}


class PressCtrlC(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)


def trainer(folder, resume=None):
    torch.manual_seed(0)
    rows = [{"x": torch.randn(4), "labels": torch.randn(())} for _ in range(24)]
    training = R2TrainingArguments(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=4, learning_rate=0.05, save_strategy="no", seed=3,
        report_to="none", disable_tqdm=True, resume_from_checkpoint=resume, dataloader_pin_memory=False, use_cpu=True,
    )  # fmt: skip
    return R2Trainer(Line(), training, train_dataset=rows), training


def test_ctrl_c_leaves_a_checkpoint_from_which_the_run_goes_on(tmp_path, capsys):
    whole, training = trainer(tmp_path / "whole")
    tracks.train(whole, training)
    stopped, training = trainer(tmp_path / "part")
    stopped.add_callback(PressCtrlC())
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as ended:
        tracks.train(stopped, training)
    assert ended.value.code == 130 and "stopped at step 3" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
    resumed, training = trainer(tmp_path / "part", "true")
    tracks.train(resumed, training)
    assert resumed.state.global_step == 6
    assert torch.equal(resumed.model.layer.weight, whole.model.layer.weight)
    assert not torch.equal(stopped.model.layer.weight, whole.model.layer.weight)


def test_no_checkpoint_to_resume_from_ends_with_one_line(tmp_path):
    tool, training = trainer(tmp_path, "true")
    with pytest.raises(SystemExit, match="cannot resume: "):
        tracks.train(tool, training)


def test_vectors_and_trained_quantizers_by_their_names():
    found = tracks.RecipeArguments(weight_bits=[8], dkm_bits=[1], dkm_vectors=["4/2"], qat=["lsq-W4A3"]).configs()
    assert list(found) == ["nearest-8bit", "dkm-1bit", "dkm-4bit-2dim", "lsq-W4A3"]
    assert (found["dkm-4bit-2dim"].weight_bits, found["dkm-4bit-2dim"].options["dim"]) == (4, 2)
    assert (found["lsq-W4A3"].method, found["lsq-W4A3"].weight_bits, found["lsq-W4A3"].act_bits) == ("lsq", 4, 3)
    for wrong, said in (
        ({"dkm_vectors": ["4"]}, "bits/length"),
        ({"qat": ["lsq"]}, "lsq-W4A4"),
        ({"qat": ["dkm-W2A2"]}, "qat are"),
    ):
        with pytest.raises(ValueError, match=said):
            tracks.RecipeArguments(**wrong).configs()
    with pytest.raises(ValueError, match="qat_steps"):
        tracks.RecipeArguments(qat_steps=0)

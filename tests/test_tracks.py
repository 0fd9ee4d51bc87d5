"""scripts/tracks.py: recipes by their names; a road that Ctrl-C stopped goes on where it was."""

import importlib
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from hf_r2.packed_layers import packed_layers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
interrupts, qnli, qnli_data, tracks = map(importlib.import_module, ["interrupts", "qnli", "qnli_data", "tracks"])
FLAGS = [
    "--generated", "--max_train_samples", "64", "--max_eval_samples", "40", "--max_steps", "2", "--weight_bits", "4",
    "--dkm_bits", "2", "--dkm_steps", "3", "--qat", "lsq-W4A8", "--qat_steps", "2", "--seed", "5", "--save_strategy", "no",
    "--per_device_train_batch_size", "8", "--report_to", "none",
]  # fmt: skip
NAMES = ["float", "nearest-4bit", "dkm-2bit", "lsq-W4A8"]


class PressCtrlC(TrainerCallback):
    """In the second step of the training whose folder has this name; notes all steps."""

    def __init__(self, folder, steps):
        self.folder, self.steps = folder, steps

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append((Path(args.output_dir).name, state.global_step))
        if Path(args.output_dir).name == self.folder and state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)


def road(monkeypatch, out, *more, stop_in=None):
    """scripts/qnli.py in this process; returns its steps. `stop_in`: where Ctrl-C is pressed."""
    steps = []

    class Trainer(qnli.R2Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.add_callback(PressCtrlC(stop_in, steps))

    with monkeypatch.context() as patch:
        patch.setattr(qnli, "R2Trainer", Trainer)
        patch.setattr(tracks, "draw_weights", lambda *_: None)
        patch.setattr(tracks, "write_results", lambda found, took, training, _: None)
        patch.setattr(sys, "argv", ["qnli.py", *FLAGS, "--output_dir", str(out), *more])
        qnli.main()
    return steps


def packed(out):
    """The rows, and the tensors of all packed models."""
    rows = json.loads((out / "metrics.json").read_text())["results"]
    load = tracks.common.load_model
    models = {name: load(qnli.AutoModelForSequenceClassification, str(out / name)) for name in NAMES[1:]}
    assert all(packed_layers(model) for model in models.values())
    return rows, {name: model.state_dict() for name, model in models.items()}


def test_ctrl_c_while_packing_loses_neither_the_training_nor_the_steps(tmp_path, monkeypatch):
    road(monkeypatch, tmp_path / "whole")
    whole, weights = packed(tmp_path / "whole")
    assert [row["name"] for row in whole] == NAMES
    out = tmp_path / "part"
    with pytest.raises(interrupts.Stopped, match=r"stopped at step 2; .*dkm-2bit-training: go on with the same flags"):
        road(monkeypatch, out, stop_in="dkm-2bit-training")
    assert (out / "checkpoint-2" / "trainer_state.json").is_file()  # though --save_strategy no
    assert (out / "dkm-2bit-training" / "checkpoint-2" / "trainer_state.json").is_file()
    made = []
    quantize = tracks.quantize
    monkeypatch.setattr(tracks, "quantize", lambda model, config: made.append(config) or quantize(model, config))
    steps = road(monkeypatch, out, "--resume_from_checkpoint", "true")
    assert steps == [("dkm-2bit-training", 3), ("lsq-W4A8-training", 1), ("lsq-W4A8-training", 2)]
    rows, found = packed(out)
    assert rows == whole and not made  # what was rounded before was not rounded again
    for name, tensors in weights.items():
        assert all(torch.equal(found[name][key], tensor) for key, tensor in tensors.items()), name
    assert not list(out.glob("*-training"))


def test_a_new_run_takes_nothing_over(tmp_path, monkeypatch):
    with pytest.raises(interrupts.Stopped):
        road(monkeypatch, tmp_path, stop_in="dkm-2bit-training")
    with pytest.raises(interrupts.Stopped):  # in its training: the steps that were left are of another model
        road(monkeypatch, tmp_path, stop_in=tmp_path.name)
    assert not list(tmp_path.glob("*-training"))
    metrics = json.loads((tmp_path / "metrics.json").read_text())

    class Training:
        output_dir, resume_from_checkpoint, world_size = tmp_path, "true", 1

    found = {**metrics, "results": metrics["results"][:1]}
    (tmp_path / "nearest-4bit" / "config.json").rename(tmp_path / "config.json")
    assert tracks.rows_before(found, Training) == {}
    (tmp_path / "config.json").rename(tmp_path / "nearest-4bit" / "config.json")
    assert list(tracks.rows_before(found, Training)) == ["nearest-4bit"]
    assert tracks.rows_before({**found, "seed": 6}, Training) == {}
    assert tracks.rows_before({**found, "results": [{**found["results"][0], "accuracy": 2.0}]}, Training) == {}


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

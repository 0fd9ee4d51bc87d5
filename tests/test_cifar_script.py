"""scripts/cifar_resnet.py: its random crops, and a run of two steps that is saved and measured."""

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, load_dataset
from datasets import Image as PictureColumn
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, TrainerCallback

from tests.models import float_model
from tests.test_quantize_script import images, pictures

ROOT = Path(__file__).resolve().parent.parent
script = importlib.import_module("cifar_resnet")
pytest.importorskip("PIL.Image")


@pytest.fixture
def decoded(tmp_path):
    """Twelve images of 8 x 8 pixels, none of them black anywhere."""
    pictures(tmp_path / "some.parquet", 12)
    found = images.Pictures(load_dataset("parquet", data_files=str(tmp_path / "some.parquet"))["train"], 8, "", "some")
    found.pixels.clamp_(min=1)
    return found


def place(cut, image, padding):
    """Where the crop came from: (flipped, top, left), found by trying all of them."""
    padded = torch.zeros(3, 8 + 2 * padding, 8 + 2 * padding)
    padded[:, padding : padding + 8, padding : padding + 8] = image
    for flipped in (False, True):
        back = cut.flip(-1) if flipped else cut
        for top in range(2 * padding + 1):
            for left in range(2 * padding + 1):
                if torch.equal(back, padded[:, top : top + 8, left : left + 8]):
                    return flipped, top, left
    return None


def test_crops_are_pieces_of_their_own_image_and_reach_every_place(decoded):
    places, rows = set(), [5, 0, 11] * 100
    batch = script.CropAndFlip(decoded, 1)(rows)
    assert batch["labels"].tolist() == decoded.labels[rows].tolist()
    for cut, row in zip(batch["pixel_values"], rows, strict=True):
        places.add(place((cut * 127.5 + 127.5).round(), decoded.pixels[row].float(), 1))
    assert places == {(f, t, x) for f in (False, True) for t in range(3) for x in range(3)}


def test_the_same_seed_gives_the_same_crops(decoded):
    cut, drawn = script.CropAndFlip(decoded, 4), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(cut(list(range(12)))["pixel_values"])
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_a_short_run_saves_what_it_measured(tmp_path):
    pictures(tmp_path / "train.parquet", 9)
    pictures(tmp_path / "test.parquet", 10)
    out = tmp_path / "out"
    flags = ["--train_file", str(tmp_path / "train.parquet"), "--validation_file", str(tmp_path / "test.parquet")]
    flags += ["--image_size", "16", "--embedding_size", "8", "--hidden_sizes", "8", "16", "--depths", "1", "2"]
    flags += ["--per_device_train_batch_size", "4", "--num_train_epochs", "1", "--seed", "3", "--save_steps", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "scripts/cifar_resnet.py", *flags, "--save_strategy", "steps", "--output_dir", str(out)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["command"].startswith("python scripts/cifar_resnet.py") and metrics["seed"] == 3
    assert metrics["log"][-1]["step"] == 2 and (out / "checkpoint-1/trainer_state.json").is_file()
    model = AutoModelForImageClassification.from_pretrained(out)
    assert model.config.hidden_sizes == [8, 16] and model.config.layer_type == "basic" and model.num_labels == 2
    test = images.Pictures(load_dataset("parquet", data_files=str(tmp_path / "test.parquet"))["train"], 16, "", "test")
    assert script.accuracy(model, test) == metrics["accuracy"]
    assert f"{100 * metrics['accuracy']:.2f} % on 10 images" in run.stdout
    small = load_dataset("parquet", data_files=str(tmp_path / "test.parquet"))["train"][3]["image"].resize((9, 8))
    prepared = AutoImageProcessor.from_pretrained(out)(small, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(prepared, test.normalized(images.square(small, 16)[None]), rtol=0, atol=1e-6)
    more = [
        "--model_name_or_path",
        str(out),
        "--method",
        "lsq",
        "--weight_bits",
        "2",
        "--act_bits",
        "4",
        "--max_steps",
        "2",
    ]
    run = subprocess.run(
        [sys.executable, "scripts/cifar_resnet.py", *flags, *more, "--output_dir", str(tmp_path / "lsq")],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    packed = AutoModelForImageClassification.from_pretrained(tmp_path / "lsq")
    metrics = json.loads((tmp_path / "lsq" / "metrics.json").read_text())
    assert metrics["report"]["policy"] == "first and last layers at 2 bits, like the rest"
    assert script.accuracy(packed, test) == metrics["accuracy"]
    card = (tmp_path / "lsq" / "README.md").read_text()
    assert f"**{100 * metrics['accuracy']:.2f} % accuracy** on Image classification (test.parquet, validation)" in card
    assert "W2A4 by lsq" in card and metrics["results"][0]["bits_per_weight"] == metrics["report"]["bits_per_weight"]


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--method", "lsq", "--options", '{"offset": tru}'], "options must be JSON, like .*: Expecting value"),
        (["--method", "dkm", "--options", '{"taw": 1}'], "'dkm' has no option taw; its options are: dim"),
        (["--method", "dkm", "--options", "3"], "options must be a JSON object"),
        (["--max_train_samples", "0"], "max_train_samples must be 1 or more, got 0"),
        (["--metod", "dkm"], "not used .*--metod"),
    ],
)
def test_flags_that_are_refused_end_with_one_line(monkeypatch, flags, said):
    monkeypatch.setattr(sys, "argv", ["cifar_resnet.py", "--train_file", "no", "--validation_file", "no", *flags])
    with pytest.raises(SystemExit, match=f"^cifar_resnet: .*{said}"):
        script.main()


def test_labels_outside_the_head_are_named_before_images_are_decoded(tmp_path, monkeypatch):
    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["cifar_resnet.py", "--output_dir", str(tmp_path / "out"), *map(str, flags)])
        with pytest.raises(SystemExit) as ended:
            script.main()
        return str(ended.value)

    for name, labels in (("two", [0, 1]), ("three", [0, 2]), ("below", [-1, 0]), ("texts", ["a", "b"])):
        rows = {"image": [{"bytes": b"rubbish", "path": None}] * 2, "label": labels}
        Dataset.from_dict(rows).cast_column("image", PictureColumn()).to_parquet(str(tmp_path / f"{name}.parquet"))
    two, three, below, texts = (tmp_path / f"{name}.parquet" for name in ("two", "three", "below", "texts"))
    for train, validation, said in (
        (two, three, "three.parquet: labels must be whole numbers from 0 to 1 for this head, found 2"),
        (two, below, "below.parquet: labels must be whole numbers from 0 to 1 for this head, found -1"),
        (below, two, "below.parquet: labels must be whole numbers from 0 on, found -1"),
        (texts, two, "texts.parquet: labels must be whole numbers from 0 on, found 'a', 'b'"),
    ):
        assert said in run("--train_file", train, "--validation_file", validation)
    float_model("resnet").save_pretrained(tmp_path / "two classes")
    flags = ["--model_name_or_path", tmp_path / "two classes", "--validation_file", two]
    assert "three.parquet: labels must be whole numbers from 0 to 1" in run(*flags, "--train_file", three)


def test_a_recipe_that_does_not_fit_is_refused_at_once():
    with pytest.raises(ValueError, match="weight_bits must be an integer from 1 to 8, got 9"):
        script.CifarArguments("no.parquet", "no.parquet", method="lsq", weight_bits=9)


class PressCtrlC(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("more", [[], ["--method", "lsq", "--weight_bits", "2"]], ids=["float", "lsq"])
def test_ctrl_c_keeps_the_training_which_goes_on_to_the_same_model(tmp_path, monkeypatch, more):
    pictures(tmp_path / "some.parquet", 9)
    flags = [
        "--train_file",
        tmp_path / "some.parquet",
        "--validation_file",
        tmp_path / "some.parquet",
        "--image_size",
        16,
    ]
    flags += [
        "--embedding_size",
        8,
        "--hidden_sizes",
        8,
        "--depths",
        1,
        "--per_device_train_batch_size",
        4,
        "--max_steps",
        3,
    ]

    def run(out, *flags_, interrupted=None):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["cifar_resnet.py", *map(str, flags), *more, "--output_dir", str(out), *flags_])
            if interrupted == "training":
                make = script.R2Trainer
                patch.setattr(script, "R2Trainer", lambda *a, **k: make(*a, callbacks=[PressCtrlC()], **k))
            elif interrupted == "measuring":
                patch.setattr(script, "accuracy", lambda *_: os.kill(os.getpid(), signal.SIGINT))
            script.main()
        return {k: v for k, v in load_file(out / "model.safetensors").items() if "num_batches" not in k}

    whole = run(tmp_path / "whole")
    with pytest.raises(script.interrupts.Stopped, match=r"stopped at step 2; .*: go on with the same flags"):
        run(tmp_path / "a", interrupted="training")
    with pytest.raises(
        script.interrupts.Stopped, match=r"stopped; what is trained is in .*: go on with the same flags"
    ):
        run(tmp_path / "b", interrupted="measuring")
    assert not (tmp_path / "b/metrics.json").exists()
    for out in (tmp_path / "a", tmp_path / "b"):
        found = run(out, "--resume_from_checkpoint", "true")
        assert found.keys() == whole.keys() and all(torch.equal(found[key], whole[key]) for key in whole)
        assert json.loads((out / "metrics.json").read_text())["log"][-1]["step"] <= 3

"""scripts/imagenet.py: crops, labels, images that do not decode, networks by name, and runs of a few steps."""

import importlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as Pictures
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    MobileNetV1Config,
    MobileNetV1ForImageClassification,
    ResNetConfig,
)

import hf_r2  # noqa: F401  (registers the quantizer with transformers)

Image = pytest.importorskip("PIL.Image")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
script, data, images, models = map(importlib.import_module, ["imagenet", "image_data", "images", "vision_models"])


def picture(value, width=40, height=34):
    """PNG bytes of one grey, with black borders of four pixels."""
    pixels = torch.zeros(height, width, 3, dtype=torch.uint8)
    pixels[4:-4, 4:-4] = value
    stream = io.BytesIO()
    Image.frombytes("RGB", (width, height), bytes(pixels.flatten().tolist())).save(stream, "PNG")
    return stream.getvalue()


def parquet(file, labels, bad=()):
    """Images whose grey tells their class (0 dark, 1 light); rows in `bad` hold no image."""
    rows = [
        {"bytes": b"rubbish" if i in bad else picture(60 + 150 * (n % 2)), "path": None} for i, n in enumerate(labels)
    ]
    features = Features({"image": Pictures(), "label": Value("int64")})
    Dataset.from_dict({"image": rows, "label": labels}, features=features).to_parquet(str(file))
    return str(file)


def run_script(*flags, script="imagenet", **environment):
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **environment}
    command = [sys.executable, f"scripts/{script}.py", *flags]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=200)


def test_the_middle_is_scaled_and_cut():
    image = Image.open(io.BytesIO(picture(200, 80, 40))).convert("RGB")
    found = data.middle(image, 20, 40)  # not scaled: the borders are 4 pixels wide, and cut off
    assert found.shape == (3, 20, 20) and found.eq(200).all()
    halved = data.middle(image, 20, 20)  # 40 x 20: borders of 2 above and below, none left or right
    assert halved[:, 5:15].eq(200).all() and halved[:, 0].eq(0).all() and halved[0, 10, [0, -1]].eq(200).all()


def test_random_crops_differ_stay_inside_and_flip():
    ramp = torch.arange(64, dtype=torch.uint8).mul(4).view(1, 64, 1).expand(64, 64, 3)  # grows from left to right
    image = Image.frombytes("RGB", (64, 64), bytes(ramp.flatten().tolist()))
    torch.manual_seed(0)
    crops = torch.stack([data.random_crop(image, 16) for _ in range(200)]).float()
    slopes = crops[..., -1].mean((1, 2)) - crops[..., 0].mean((1, 2))
    assert 70 < (slopes < 0).sum() < 130  # flipped half the time
    shares = slopes.abs() / 252 * 16 / 15  # of the width that a crop covers
    assert shares.max() <= 1.02 and shares.min() > 0.2 and shares.std() > 0.1
    torch.manual_seed(0)
    assert torch.equal(crops[0], data.random_crop(image, 16).float())


def test_boxes_have_the_area_and_shape_that_are_drawn():
    torch.manual_seed(1)
    boxes = torch.tensor([next(data._boxes(1000, 1000)) for _ in range(500)]).double()
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0 and boxes.max() <= 1000
    areas, ratios = width * height / 1e6, width / height
    assert 0.079 < areas.min() < 0.12 and 0.9 < areas.max() <= 1
    assert 0.74 < ratios.min() < 0.78 and 1.3 < ratios.max() < 1.35


def test_images_that_do_not_decode_are_refused_or_counted_and_named(tmp_path, capsys):
    rows = data.from_file(parquet(tmp_path / "some.parquet", [0, 1, 0, 1], bad=(1,)))
    refuse = data.Crops(16, images.Decoder("some"), 2, train=False).on(rows)
    with pytest.raises(images.BadData, match=r"some: .* does not decode .*--bad_images skip"):
        refuse.__getitems__([0, 1])
    decode = images.Decoder("some", "skip")
    found = data.Crops(16, decode, 2, train=False).on(rows).__getitems__([0, 1, 2])
    assert [row["labels"] for row in found] == [0, 0] and int(decode.count) == 1
    assert "some: an image of class 1 does not decode (no image format); skipped" in capsys.readouterr().err
    with pytest.raises(images.BadData, match="no image of this batch"):
        data.Collator([0.5] * 3, [0.5] * 3)([])
    left = images.Pictures(rows, 16, "", "some", "skip")
    assert left.labels.tolist() == [0, 0, 1] and left.bad_images == 1
    with pytest.raises(SystemExit, match="some: row 1 does not decode"):
        images.Pictures(rows, 16, "", "some")


def test_a_loaders_worker_hands_on_its_one_line(tmp_path):
    rows = data.from_file(parquet(tmp_path / "some.parquet", [0, 1], bad=(1,)))
    crops = data.Crops(16, images.Decoder("some"), 2, train=False).on(rows)
    with pytest.raises(images.BadData) as caught:
        list(torch.utils.data.DataLoader(crops, batch_size=2, collate_fn=list, num_workers=1))
    assert "Traceback" in str(caught.value)
    assert script.one_line(caught.value).startswith(
        "some: an image of class 1 does not decode (no image format); --bad_images"
    )


def test_batches_are_normalized():
    rows = [{"pixels": torch.full((3, 2, 2), 255, dtype=torch.uint8), "labels": 3}]
    batch = data.Collator([0.5, 0.0, 1.0], [0.5, 2.0, 1.0])(rows)
    assert batch["pixel_values"][0, :, 0, 0].tolist() == [1.0, 0.5, 0.0] and batch["labels"].tolist() == [3]


@pytest.mark.parametrize("labels, shown", [([0, 2], "found 2"), ([-1, 0], "found -1")])
def test_labels_that_do_not_fit_the_head_are_named(tmp_path, labels, shown):
    rows = data.from_file(parquet(tmp_path / "some.parquet", labels))
    with pytest.raises(SystemExit, match=f"labels must be whole numbers from 0 to 1 for this head, {shown}"):
        data.check_labels(rows, 2, "some")
    data.check_labels(rows.filter(lambda row: row["label"] == 0), 2, "some")


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2", "resnet-18", "resnet-50", "resnet-101", "vit"])
def test_networks_by_name_have_the_sizes_of_the_papers(name):
    millions = {
        "mobilenet_v1": 4.2,
        "mobilenet_v2": 3.5,
        "resnet-18": 11.7,
        "resnet-50": 25.6,
        "resnet-101": 44.5,
        "vit": 86.6,
    }
    with torch.device("meta"):
        model = models.new(name, [f"class {i}" for i in range(1000)], 224)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions[name], abs=0.06)
    assert model.config.num_labels == 1000 and model.config.id2label[7] == "class 7"
    assert all(m.momentum < 0.5 for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert all(m.p < 0.5 for m in model.modules() if isinstance(m, nn.Dropout))


def test_a_loaded_mobilenet_is_made_fit_for_training(tmp_path):
    MobileNetV1ForImageClassification(MobileNetV1Config(depth_multiplier=0.25, num_labels=4)).save_pretrained(tmp_path)
    model = models.load(str(tmp_path))
    assert model.config.num_labels == 4 and model.dropout.p == 0.2
    assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}
    fresh = models.load(str(tmp_path), ["a", "b"])
    assert fresh.classifier.weight.shape[0] == 2 and fresh.config.id2label == {0: "a", 1: "b"}


def test_a_network_of_timm_without_timm_ends_with_one_line():
    if importlib.util.find_spec("timm") and importlib.util.find_spec("torchvision"):
        pytest.skip("timm is installed")
    with pytest.raises(SystemExit, match=r"inception_v3 comes from timm, and .*timm.* is missing: pip install"):
        models.need_timm("inception_v3")


@pytest.mark.parametrize("form", ["{} {}", "{}={}"])
def test_the_recipe_follows_the_architecture(monkeypatch, form):
    def chosen(flag, value):
        words = form.format(flag, value).split()
        monkeypatch.setattr(sys, "argv", ["imagenet.py", *words, "--num_train_epochs=7", "--report_to", "none"])
        return script.tracks.parse(
            script.ImageArguments, script.R2TrainingArguments, script.DEFAULTS, "imagenet", "", script.recipe
        )[1]

    mobile, resnet = chosen("--config_name", "mobilenet_v2"), chosen("--config_name", "resnet-18")
    tuned = chosen("--model_name_or_path", "resnet-18")
    assert [(found.learning_rate, found.weight_decay) for found in (mobile, resnet, tuned)] == [
        (0.4, 4e-5),
        (1.0, 1e-4),
        (0.003, 4e-5),
    ]
    assert all(
        found.num_train_epochs == 7 and "nesterov=True" in found.optim_args for found in (mobile, resnet, tuned)
    )


@pytest.mark.parametrize(
    "name, arguments, training, flag, key, values",
    [
        ("qnli", "QnliArguments", "R2TrainingArguments", "--generated", "num_train_epochs", (3, 6)),
        (
            "translation",
            "TranslationArguments",
            "R2Seq2SeqTrainingArguments",
            "--small",
            "learning_rate",
            (7e-4, 3e-3),
        ),
    ],
)
def test_other_recipes_follow_their_flag_however_it_is_written(
    monkeypatch, name, arguments, training, flag, key, values
):
    if name == "translation":
        pytest.importorskip("sentencepiece")
        pytest.importorskip("sacrebleu")
    other = importlib.import_module(name)
    for words, value in (([], 0), ([f"{flag}=true"], 1), ([flag, "true"], 1), ([flag], 1), ([f"{flag}=false"], 0)):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words, "--report_to", "none"])
        kinds = (getattr(other, arguments), getattr(other, training))
        found = script.tracks.parse(*kinds, other.DEFAULTS, name, "", other.recipe)[1]
        assert getattr(found, key) == values[value], words


@pytest.mark.parametrize(
    "flags, message",
    [
        ({}, "give either config_name"),
        ({"config_name": "vit", "train_file": "a"}, "train_file and validation_file go together"),
        ({"config_name": "vit", "data_dir": "a", "streaming": True}, "streaming is for the hub"),
        ({"config_name": "vit", "max_train_samples": 0}, "max_train_samples must be 1 or more, got 0"),
        ({"config_name": "vit", "bad_images": "ignore"}, "bad_images must be one of refuse, skip"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        script.ImageArguments(**flags)


def test_streamed_data_need_a_count_or_max_steps():
    def rows():
        yield {"image": None, "label": 0}

    from datasets import IterableDataset, SplitDict, SplitInfo

    stream = IterableDataset.from_generator(rows)
    training = script.R2TrainingArguments(output_dir="x", per_device_train_batch_size=3, num_train_epochs=2)
    with pytest.raises(SystemExit, match="give --max_steps"):
        script.bound_steps_(training, stream)
    stream.info.splits = SplitDict({"train": SplitInfo("train", num_examples=10)})
    script.bound_steps_(training, stream)
    assert training.max_steps == 7  # 20 images in batches of 3


def test_streamed_images_are_cropped_and_skipped_alike(tmp_path):
    file = parquet(tmp_path / "some.parquet", [0, 1, 1], bad=(2,))
    rows = data.checked(data.load_dataset("parquet", data_files=file, split="train", streaming=True), "some")
    decode = images.Decoder("some", "skip")
    found = list(data.Crops(16, decode, 2, train=False, crop_fraction=1.0).on(rows))
    assert [row["labels"] for row in found] == [0, 1] and int(decode.count) == 1
    assert [int(row["pixels"][0, 8, 8]) for row in found] == [60, 210]


def test_an_unreachable_hub_ends_soon_with_one_line(tmp_path):
    flags = ["--config_name", "mobilenet_v1", "--output_dir", str(tmp_path / "out")]
    run = run_script(*flags, HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path))
    assert run.returncode == 1 and "--train_file" in run.stderr
    assert "Traceback" not in run.stderr and "Retrying" not in run.stderr


@pytest.mark.parametrize(
    "part, message",
    [("test", "no folder validation; needed are train and validation, found train, test"), ("val", None)],
)
def test_folders_of_images(tmp_path, part, message):
    for where, label, value in (("train", "a", 60), ("train", "b", 210), (part, "a", 60), (part, "b", 210)):
        (tmp_path / where / label).mkdir(parents=True, exist_ok=True)
        (tmp_path / where / label / "1.png").write_bytes(picture(value))
    assert data.class_names(data.from_folder(str(tmp_path), "train")) == ["a", "b"]
    if message is None:
        assert data.from_folder(str(tmp_path), "validation")["label"][:] == [0, 1]
    else:
        with pytest.raises(SystemExit, match=re.escape(message)):
            data.from_folder(str(tmp_path), "validation")


def test_a_run_from_scratch_learns_saves_and_says_what_it_skipped(tmp_path):
    ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic").save_pretrained(
        tmp_path / "net"
    )
    files = ["--train_file", parquet(tmp_path / "train.parquet", [0, 1] * 20, bad=(3,))]
    files += ["--validation_file", parquet(tmp_path / "test.parquet", [0, 1] * 6)]
    out = tmp_path / "out"
    flags = ["--config_name", str(tmp_path / "net"), "--image_size", "16", "--bad_images", "skip", "--max_steps", "20"]
    flags += ["--per_device_train_batch_size", "8", "--learning_rate", "0.05", "--dataloader_num_workers", "1"]
    flags += [
        "--weight_bits",
        "8",
        "--dkm_bits",
        "2",
        "--dkm_steps",
        "1",
        "--output_dir",
        str(out),
        "--logging_steps",
        "5",
    ]
    run = run_script(*files, *flags)
    assert run.returncode == 0, run.stderr[-3000:]
    metrics = json.loads((out / "metrics.json").read_text())
    rows = {row["name"]: row for row in metrics["results"]}
    assert list(rows) == ["float", "nearest-8bit", "dkm-2bit"] and rows["float"]["accuracy"] > 0.9
    assert metrics["bad_images"]["train"] > 0 == metrics["bad_images"]["validation"]
    assert (
        metrics["arguments"]["training"]["range_weight"] == 0.01
        and "an image of class 1 does not decode" in run.stderr
    )
    model = AutoModelForImageClassification.from_pretrained(out / "nearest-8bit").eval()
    crops = data.Crops(16, images.Decoder("test"), 2, train=False).on(data.from_file(str(tmp_path / "test.parquet")))
    batch = data.Collator(models.IMAGENET_MEAN, models.IMAGENET_STD)(crops.__getitems__(list(range(12))))
    with torch.no_grad():
        hits = model(pixel_values=batch["pixel_values"]).logits.argmax(-1) == batch["labels"]
    assert hits.float().mean().item() == pytest.approx(rows["nearest-8bit"]["accuracy"])
    assert "pipeline_tag: image-classification" in (out / "dkm-2bit" / "README.md").read_text()

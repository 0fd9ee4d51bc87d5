"""scripts/study.py and scripts/reproduce.py: their steps, what is skipped and resumed, and their tables."""

import csv
import importlib
import json
import sys
from pathlib import Path

import pytest
from transformers import HfArgumentParser, Seq2SeqTrainingArguments

from hf_r2 import R2Seq2SeqTrainingArguments, R2TrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
steps, proxies, cells, scales, paper, study, study_table, reproduce, figures = (
    importlib.import_module(name)
    for name in (
        "steps", "proxies", "cells", "scales", "paper_numbers", "study", "study_table", "reproduce", "reproduce_figures",
    )
)  # fmt: skip

FAKE = """
import json, pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
out.mkdir(parents=True, exist_ok=True)
with open(out / "calls.txt", "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def fake(tmp_path):
    file = tmp_path / "fake.py"
    file.write_text(FAKE)

    def step(name, *flags, code=0, **options):
        return steps.Step(name, (str(file), str(code), *flags), tmp_path / name, 1.5, **options)

    return step


def calls(step):
    return (step.out / "calls.txt").read_text().splitlines()


def test_what_is_done_is_skipped_and_other_flags_run_again(fake):
    assert steps.run([fake("a", "--x")]) == []
    assert steps.run([fake("a", "--x")]) == []
    assert calls(fake("a")) == [f"0 --x --output_dir {fake('a').out}"]
    steps.run([fake("a", "--y")])
    assert len(calls(fake("a"))) == 2


def test_the_plan_shows_what_a_step_took_once_it_is_done(fake):
    step = fake("a")
    assert steps.plan([step], "minutes").splitlines()[2].startswith("| a | to run | 1.5 |")
    steps.run([step])
    noted = json.loads((step.out / "done.json").read_text())
    assert 0 < noted["seconds"] < 60
    (step.out / "done.json").write_text(json.dumps(noted | {"seconds": 252.0}))
    assert steps.plan([step], "minutes").splitlines()[2].startswith("| a | done | 4.2 |")
    (step.out / "done.json").write_text(json.dumps({"words": noted["words"]}))  # of a version that kept no time
    assert step.took() == 1.5


def test_a_step_that_fails_is_named_tried_again_and_stops_no_other(fake):
    wanted = [fake("a", code=3), fake("b")]
    assert steps.run(wanted) == ["a"]
    assert len(calls(wanted[1])) == 1 and not wanted[0].done()
    assert steps.run(wanted) == ["a"]
    assert len(calls(wanted[0])) == 2 and len(calls(wanted[1])) == 1


def test_an_interrupted_step_ends_the_run_and_resumes_from_its_checkpoint(fake):
    wanted = [fake("a", code=130, resumes=True), fake("b")]
    with pytest.raises(SystemExit) as ended:
        steps.run(wanted)
    assert ended.value.code == 130 and not (wanted[1].out / "calls.txt").exists()
    (wanted[0].out / "checkpoint-7").mkdir()
    assert "--resume_from_checkpoint" not in wanted[0].command()  # half-written
    (wanted[0].out / "checkpoint-7" / "trainer_state.json").write_text("{}")
    with pytest.raises(SystemExit):
        steps.run(wanted)
    assert calls(wanted[0])[1].endswith("--resume_from_checkpoint true")


def test_a_launcher_starts_trainings_only(fake, tmp_path):
    launcher = [
        sys.executable,
        "-X",
        "dev",
        "-c",
        "import runpy, sys; sys.argv = sys.argv[1:] + ['--launched']; runpy.run_path(sys.argv[0])",
    ]
    wanted = [fake("train", resumes=True), fake("table")]
    assert steps.run(wanted, launcher) == []
    assert calls(wanted[0])[0].endswith("--launched") and "--launched" not in calls(wanted[1])[0]


def test_the_plan_says_what_is_left(fake):
    wanted = [fake("a"), fake("b"), fake("c")]
    steps.run(wanted[:1])
    text = steps.plan(wanted, "hours")
    assert "| a | done | 0" in text and "| c | to run | 1.5 |" in text
    assert text.endswith("3 steps, to go about 3 hours")


def all_steps(tmp_path):
    args = study.StudyArguments(str(tmp_path), text_model="text", output_dir="out")
    found = [step for run in study.runs(args) for step in run.steps()]
    for scale in (make(tmp_path, "data", "text", 1) for make in scales.SCALES.values()):
        found += [step for number in paper.TABLES for cell in cells.table(number, scale) for step in cell.steps]
        found += [step for figure in figures.FIGURES.values() for step in figure.steps(scale)]
    return found


def test_every_step_has_flags_that_its_script_takes(tmp_path):
    takes = {
        "imagenet.py": ("ImageArguments", R2TrainingArguments), "cifar_resnet.py": ("CifarArguments", R2TrainingArguments),
        "qnli.py": ("QnliArguments", R2TrainingArguments), "quantize.py": ("QuantizeArguments", None),
        "translation.py": ("TranslationArguments", R2Seq2SeqTrainingArguments),
    }  # fmt: skip
    parsers = {}
    for script, (name, training) in takes.items():
        kinds = [getattr(importlib.import_module(script[:-3]), name), *([training] if training else [])]
        parsers[script] = HfArgumentParser(kinds)
    seen, outs = set(), {}
    for step in all_steps(tmp_path):
        script, *flags = step.command()
        assert script in parsers, step
        parsed, unknown = parsers[script].parse_known_args(flags)
        assert not unknown, (step.name, unknown)
        if hasattr(parsed, "range_loss"):  # scripts differ in what they do where no flag says it
            assert "--range_loss" in flags or "paper" in str(step.out), step.name
        assert str(parsed.output_dir) == str(step.out)
        assert outs.setdefault(step.out, step.words) == step.words, f"two steps write to {step.out}"
        seen.add(script)
    assert seen == set(takes) and issubclass(R2Seq2SeqTrainingArguments, Seq2SeqTrainingArguments)


def test_forms_of_a_proxy_train_with_different_range_losses():
    for proxy in proxies.PROXIES.values():
        for form, flags in proxy.forms.items():
            named = flags[flags.index("--range_loss") + 1]
            expected = {
                proxies.BASELINE: "none",
                proxies.HEAVY: "none",
                "L-inf 0.01": "l_inf",
                "margin 0.01": "margin",
            }
            assert named == expected.get(form, "soft_min_max"), form
        assert len(set(proxy.forms.values())) == len(proxy.forms) and proxy.recommended in proxy.forms


def test_each_table_has_the_papers_numbers_and_ours_beside_them(tmp_path):
    scale = scales.Proxy(tmp_path, "data", "text", 0)
    table = cells.table(5, scale)
    assert {(c.training, c.column): c.paper for c in table}["DSMM", "LSQ 2W2A"] == 62.47
    cell = next(c for c in table if (c.training, c.column) == ("DSMM", "LSQ 2W2A"))
    assert [step.out.name for step in cell.steps] == ["train", "lsq-W2A2"] and cell.ours() is None
    cell.steps[-1].out.mkdir(parents=True)
    (cell.steps[-1].out / "metrics.json").write_text(json.dumps({"accuracy": 0.7351}))
    assert cell.ours() == pytest.approx(73.51)
    assert "| ResNet-18 |" in cells.markdown(table) and "73.5 (62.47)" in cells.markdown(table)


def test_a_cell_reads_its_row_and_not_another(tmp_path):
    rows = [
        {"name": "float", "accuracy": 0.8}, {"name": "nearest-8bit", "bleu": 27.5},
        {"method": "squant", "width": "W4A8", "granularity": "per_tensor", "accuracy": 0.1},
        {"method": "squant", "width": "W4A8", "granularity": "per_channel", "accuracy": 0.7},
        {"method": "dfq", "width": "W4A8", "granularity": "per_channel", "error": "no batch norms"},
    ]  # fmt: skip
    (tmp_path / "metrics.json").write_text(json.dumps({"results": rows}))
    assert cells.read(tmp_path, "squant-W4A8-per_channel") == pytest.approx(70)
    assert cells.read(tmp_path, "nearest-8bit") == 27.5 and cells.read(tmp_path, "float") == pytest.approx(80)
    assert cells.read(tmp_path, "dfq-W4A8-per_channel") is None and cells.read(tmp_path, "none") is None
    assert cells.read(tmp_path, "accuracy") is None


def test_a_script_that_does_one_thing_has_one_score_with_a_card_or_without(tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps({"accuracy": 0.7}))
    assert cells.read(tmp_path, "float") == cells.read(tmp_path, "accuracy") == pytest.approx(70)
    with_card = {"accuracy": 0.7, "results": [{"name": "dkm", "accuracy": 0.7}]}
    (tmp_path / "metrics.json").write_text(json.dumps(with_card))
    assert cells.read(tmp_path, "accuracy") == pytest.approx(70) and cells.read(tmp_path, "float") is None


def write_run(folder, form, seed, accuracy, nearest):
    run = proxies.Run("cifar10", form, seed, folder, "data", "", full=False)
    run.model.mkdir(parents=True)
    (run.model / "config.json").write_text("{}")
    arguments = {"cifar": {}, "training": {}}
    (run.out / "train" / "metrics.json").write_text(json.dumps({"accuracy": accuracy, "arguments": arguments}))
    (run.out / "nearest").mkdir()
    shapes = {"raw": {"range_over_std": 8.0 + seed, "kurtosis": 3.0}, "deployed": {}}
    row = {"method": "nearest", "width": "W4A32", "granularity": "per_tensor", "accuracy": nearest}
    shapes["deployed"] = {"range_over_std": 9.0, "kurtosis": 4.0}
    (run.out / "nearest" / "metrics.json").write_text(
        json.dumps({"float_accuracy": accuracy + 0.01, "shapes": shapes, "results": [row]})
    )


def test_the_study_shows_means_and_spreads_over_seeds(tmp_path):
    write_run(tmp_path, proxies.BASELINE, 0, 0.80, 0.60)
    write_run(tmp_path, proxies.BASELINE, 1, 0.82, 0.70)
    write_run(tmp_path, proxies.PAPER, 0, 0.81, 0.75)
    beside = proxies.Run(
        "multi30k", proxies.PAPER, 0, tmp_path, "data", "", full=False
    )  # of reproduce.py: in no accuracy table
    beside.model.mkdir(parents=True)
    (beside.out / "train" / "metrics.json").write_text(json.dumps({"results": [{"name": "float", "bleu": 30.0}]}))
    args = study.StudyArguments(str(tmp_path), proxies=["cifar10"], output_dir=str(tmp_path))
    text = study.write(args)
    assert "| no range loss | 2 | 82.0 ± 1.4 | 8.5 ± 0.7 | 9.0 ± 0.0 | 4.0 ± 0.0 | 65.0 ± 7.1 |" in text
    assert "| soft min-max 0.01 (paper) | 1 | 82.0 | 8.0 | 9.0 | 4.0 | 75.0 |" in text
    rows = list(csv.DictReader((tmp_path / "study.csv").read_text().splitlines()))
    assert [float(row["float"]) for row in rows] == pytest.approx([82.0, 82.0]) and (
        tmp_path / "cifar10.png"
    ).stat().st_size
    text = (tmp_path / "study.md").read_text()
    assert text.startswith("# The study\n\nAccuracy in %") and "\n\n## ResNet" in text


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--table", "7", "--data_dir", "."], "table must be from 1 to 6, got 7"),
        (["--figure", "0", "--data_dir", "."], "figure must be from 1 to 3, got 0"),
        (["--data_dir", "."], "give --table"),
        (["--table", "1"], "needs --data_dir"),
        (["--table", "6", "--data_dir", "."], "--text_model"),
    ],
)
def test_reproduce_says_what_it_needs(flags, said, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *flags])
    with pytest.raises(SystemExit, match=said):
        reproduce.main()


def test_the_study_names_the_files_that_it_misses(tmp_path, monkeypatch, capsys):
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10/test.parquet").touch()
    flags = [
        "--data_dir",
        str(tmp_path),
        "--proxies",
        "cifar10",
        "--seeds",
        "0",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    said = f"these steps read files that are not there: {tmp_path}/cifar10/train.parquet$"
    for more in (["--dry_run"], []):
        monkeypatch.setattr(sys, "argv", ["study.py", *flags, *more])
        with pytest.raises(SystemExit, match=said):
            study.main()
        assert ("| to run |" in capsys.readouterr().out) == bool(more) and not (tmp_path / "out").exists()


def test_a_dry_run_lists_steps_and_runs_none(tmp_path, monkeypatch, capsys):
    out, data = tmp_path / "out", tmp_path / "data"
    data.mkdir()
    flags = ["--table", "1", "--data_dir", str(data), "--dry_run", "--output_dir", str(out)]
    monkeypatch.setattr(sys, "argv", ["r.py", *flags])
    for file in ("models/mobilenet_v1_0.75_224", "imagenette160/train.parquet", "imagenette160/validation.parquet"):
        with pytest.raises(SystemExit, match=f"^these steps read files that are not there: .*{data}/{file}"):
            reproduce.main()
        (data / file).mkdir(parents=True)
    capsys.readouterr()
    reproduce.main()
    said = capsys.readouterr().out
    assert said.count("| to run |") == 30 and "minutes on two CPU cores" in said and not out.exists()
    for flags, wrong in ((["--proxies", "x"], "proxies are"), (["--forms", "x"], "forms are"), ([], "text_model")):
        monkeypatch.setattr(sys, "argv", ["study.py", "--data_dir", ".", *flags])
        with pytest.raises(SystemExit, match=wrong):
            study.main()


def test_figures_are_drawn_from_the_runs_there_are(tmp_path):
    from tests.models import float_model

    scale = scales.Proxy(tmp_path, "data", "", 0)
    for training in figures.TRAININGS:
        float_model("resnet").save_pretrained(scale.saved(paper.R18, training))
        step = scale.rounded(paper.R50, training).steps[-1]
        rows = [
            {"method": "nearest", "width": f"W{bits}A32", "granularity": "per_tensor", "accuracy": bits / 10}
            for bits in (2, 4)
        ]
        step.out.mkdir(parents=True)
        (step.out / "metrics.json").write_text(json.dumps({"results": rows}))
    for training in (paper.HEAVY, *figures.TRAININGS):
        float_model("mobilenet_v1").save_pretrained(scale.saved(paper.V1, training))
    for number, figure in figures.FIGURES.items():
        figure.draw(scale, tmp_path / f"figure-{number}.png")
        assert (tmp_path / f"figure-{number}.png").read_bytes().startswith(b"\x89PNG")

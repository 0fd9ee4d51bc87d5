"""The model card: every number comes from the metrics, the front matter parses, and incomplete metrics are refused."""

import copy
import importlib
import json
import re
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_r2.deployed import deployed_table
from hf_r2.model_card import write_card

ROW = {"act_bits": None, "granularity": "per_tensor", "range_loss": "soft_min_max"}
FLOAT = {"name": "float", "method": None, "weight_bits": None, "bits_per_weight": 32.0, "size_bytes": 90_123_456}
W2 = {"name": "w2|dkm", "method": "dkm", "weight_bits": 2, "bits_per_weight": 2.0123, "size_bytes": 5_678_901}
W4 = {
    "name": "w4",
    "method": "nearest",
    "weight_bits": 4,
    "bits_per_weight": 4.01,
    "size_bytes": 912_345,
    "act_bits": 8,
}
METRICS = {
    "arguments": {
        "model": {"model_name_or_path": "user/encoder"},
        "range_weight": 0.0375,
        "range_decoupled": True,
        "logging_dir": "secret",
    },
    "versions": {"torch": "2.6.0", "transformers": "5.1.2"},
    "seed": 4711,
    "commit": "0123abcd",
    "command": "python scripts/qnli.py --range_weight 0.0375",
    "task": {"name": "QNLI", "dataset": "nyu-mll/glue", "config": "qnli", "split": "validation", "metric": "accuracy"},
    "results": [
        {**ROW, **FLOAT, "granularity": None, "accuracy": 0.91234},
        {**ROW, **W2, "accuracy": 0.87654, "parameters": 22_713_216},
        {**ROW, **W4, "accuracy": 0.9001},
    ],
    "first_last": "quantized like every other layer",
}


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "minilm-w2"
    path.mkdir()
    (path / "config.json").write_text('{"architectures": ["BertForSequenceClassification"]}')
    return path


def card_of(folder, metrics=METRICS, **options):
    return ModelCard.load(write_card(folder, metrics, **{"result": "w2|dkm", **options}))


def test_front_matter(folder):
    data = card_of(folder, license="apache-2.0", language="en").data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-classification")
    assert (data.base_model, data["base_model_relation"]) == ("user/encoder", "quantized")
    assert data.tags == ["hf_r2", "quantized", "2-bit", "dkm"]
    assert (data.datasets, data.metrics, data.license, data.language) == (
        "nyu-mll/glue",
        ["accuracy"],
        "apache-2.0",
        "en",
    )
    (result,) = data.eval_results  # only this repository's own row; the others are other models
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.87654)
    assert (result.dataset_type, result.dataset_config, result.dataset_split) == ("nyu-mll/glue", "qnli", "validation")


def test_whole_card_has_the_parts_in_order(folder):
    parts = [
        r"# w2\n\n\*\*87\.65 % accuracy\*\* on QNLI \(nyu-mll/glue, validation\) in \*\*5\.68 MB\*\*: W2 by dkm, "
        r"per tensor, trained with the soft_min_max range loss, 2\.01 bits per weight, all told\. "
        r"The float model scores 91\.23 % in 90\.12 MB\.",
        r'= AutoTokenizer\.from_pretrained\("user/w2"\)\n'
        r'model = AutoModelForSequenceClassification\.from_pretrained\("user/w2"\)\n```',
        r"## Results\n\n\| model \|.*\n\|(---\|){8}\n",
        r"\| float \| float \| - \| - \| soft_min_max \| 91\.23 % \| 32\.00 \| 90\.12 MB \|\n",
        r"\| \*\*w2\\\|dkm\*\* \| W2 \| dkm \| per tensor \| soft_min_max \| 87\.65 % \| 2\.01 \| 5\.68 MB \|\n",
        r"\| w4 \| W4A8 \| nearest \| per tensor \| soft_min_max \| 90\.01 % \| 4\.01 \| 912\.3 kB \|\n\n",
        r"22,713,216 parameters",
        r"\*\*First and last layers\*\*: quantized like every other layer\.\n",
        r"## How it was trained\n\n- `range_weight`: 0\.0375\n- `range_decoupled`: True\n- seed: 4711\n"
        r"- code: commit 0123abcd\n"
        r"- versions: torch 2\.6\.0, transformers 5\.1\.2\n",
        r"```bash\npython scripts/qnli\.py --range_weight 0\.0375\n```\n",
        r"## Limits\n\n- Without `import hf_r2`.*\*\*random weights\*\*",
        r"## Citation\n.*2303\.08253.*2108\.12659",
    ]
    text = card_of(folder, repo_id="user/w2").content
    assert re.search(".*?".join(parts), text, re.DOTALL), text
    assert "secret" not in text and "{{" not in text and "None" not in text


def test_first_code_line_is_the_import(folder):
    blocks = re.findall(r"```python\n(.*?)```", card_of(folder).content, re.DOTALL)
    lines = [line for line in blocks[0].splitlines() if line]
    assert lines[0] == "import hf_r2"
    assert len(lines) == 4
    compile(blocks[0], "card", "exec")
    assert '"minilm-w2"' in lines[-1]  # the folder's name, where no repo_id is given


def test_every_number_follows_the_metrics(folder):
    metrics = copy.deepcopy(METRICS)
    metrics["results"][1] |= {"accuracy": 0.5, "size_bytes": 1_000, "bits_per_weight": 1.25}
    card = card_of(folder, metrics)
    assert "**50.00 % accuracy**" in card.content and "**1.0 kB**" in card.content and "1.25 bits" in card.content
    assert "87.65" not in card.content and card.data.eval_results[0].metric_value == 0.5


def test_local_base_model_and_data_file_do_not_pass_for_hub_ids(folder):
    metrics = copy.deepcopy(METRICS)
    metrics["arguments"] = {"model_name_or_path": str(folder)}
    metrics["task"]["dataset"] = "validation.parquet"
    data = card_of(folder, metrics).data
    assert data.base_model is None and data.datasets is None and "base_model_relation" not in data
    assert data.eval_results[0].dataset_type == "local"
    assert card_of(folder, metrics, base_model="user/base").data.base_model == "user/base"


def test_translation_card_shows_bleu_as_it_is(folder):
    (folder / "config.json").write_text('{"architectures": ["MarianMTModel"]}')
    metrics = copy.deepcopy(METRICS)
    metrics["task"]["metric"] = "bleu"
    metrics["results"] = [{**metrics["results"][1], "bleu": 27.3456}]
    card = ModelCard.load(write_card(folder, metrics))  # one row needs no name
    assert "**27.35 bleu**" in card.content and "AutoModelForSeq2SeqLM" in card.content
    assert card.data.pipeline_tag == "translation" and "The float model" not in card.content


def test_image_card_loads_a_processor(folder):
    (folder / "config.json").write_text('{"architectures": ["ResNetForImageClassification"]}')
    card = card_of(folder)
    assert 'processor = AutoImageProcessor.from_pretrained("' in card.content
    assert "import AutoModelForImageClassification, AutoImageProcessor\n" in card.content


FLOAT_RUN = {
    "model": "net", "width": "float", "latency_s": {"onnxruntime": 0.020, "torch": 0.040},
    "size_bytes": {"onnxruntime": 46_880_000, "torch": 46_810_000}, "accuracy": {"onnxruntime": 0.852, "torch": 0.853},
}  # fmt: skip
W8A8_RUN = {
    "model": "net", "width": "W8A8", "latency_s": {"onnxruntime": 0.005, "torch": 0.0388, "torch packed": 0.052},
    "size_bytes": {"onnxruntime": 11_870_000, "torch": 11_740_000}, "accuracy": {"onnxruntime": 0.8449, "torch": 0.843},
}  # fmt: skip


def test_deployed_table_shows_what_was_measured_and_what_it_did_not_help(folder):
    bench = {
        "deployed": [FLOAT_RUN, W8A8_RUN],
        "head": "EPYC, avx512_vnni",
        "command": "python scripts/bench_export.py",
    }
    content = card_of(folder, deployed=bench).content
    assert "| net float | 20.0 | 40.0 |  | 46.88 | 46.81 | 85.2 | 85.3 |\n" in content
    assert "| net W8A8 | 5.0 (0.25) | 38.8 (0.97) | 52.0 (1.30) | 11.87 | 11.74 | 84.5 | 84.3 |\n" in content
    assert "No faster than float: torch: net W8A8 (0.97); torch packed: net W8A8 (1.30)." in content
    assert "Measured on EPYC, avx512_vnni by\n`python scripts/bench_export.py`." in content
    assert "Deployed" not in card_of(folder).content
    without = deployed_table([{k: v for k, v in row.items() if k != "accuracy"} for row in (FLOAT_RUN, W8A8_RUN)])
    assert "| net W8A8 | 5.0 (0.25) | 38.8 (0.97) | 52.0 (1.30) | 11.87 | 11.74 |\n" in without


def test_a_bench_that_lacks_something_is_refused(folder):
    with pytest.raises(ValueError, match="deployed lacks head, command; a card needs deployed, head, command"):
        card_of(folder, deployed={"deployed": [FLOAT_RUN]})
    with pytest.raises(ValueError, match="no float row before W8A8 of net"):
        deployed_table([W8A8_RUN])
    with pytest.raises(ValueError, match="lacks latency_s: take scripts/bench_export"):
        deployed_table([{k: v for k, v in FLOAT_RUN.items() if k != "latency_s"}])


@pytest.mark.parametrize(
    "key", ["arguments", "versions", "seed", "commit", "command", "task", "results", "first_last"]
)
def test_missing_key_is_named(folder, key):
    metrics = {k: v for k, v in METRICS.items() if k != key}
    with pytest.raises(ValueError, match=f"metrics lacks {key};"):
        write_card(folder, metrics, result="w4")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accuracy": 87.6}, "must be a fraction from 0 to 1, got 87.6"),
        ({"accuracy": float("nan")}, r"\[1\]\['accuracy'\] must be a finite number, 0 or more, got nan"),
        ({"size_bytes": None}, r"\['size_bytes'\] must be a finite number, 0 or more, got None"),
        ({"weight_bits": None}, "is the float model"),
        ({"name": "w4"}, "result must name one row.*'w2|dkm'"),
    ],
)
def test_bad_row_is_refused(folder, change, message):
    metrics = copy.deepcopy(METRICS)
    metrics["results"][1] |= change
    with pytest.raises(ValueError, match=message):
        write_card(folder, metrics, result="w2|dkm")


def test_unclear_calls_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="has 3 rows: say result="):
        write_card(folder, METRICS)
    with pytest.raises(ValueError, match=r"results'\]\[0\] lacks method, accuracy;"):
        row = {k: v for k, v in METRICS["results"][1].items() if k not in ("method", "accuracy")}
        write_card(folder, {**METRICS, "results": [row]})
    with pytest.raises(ValueError, match="is empty"):
        write_card(folder, {**METRICS, "results": []})
    with pytest.raises(ValueError, match="must be a dict with name, dataset, split, metric, got str"):
        write_card(folder, {**METRICS, "task": "QNLI"})
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        write_card(tmp_path, METRICS, result="w4")


def test_plots_beside_the_model_are_shown_and_copied_with_the_card(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "scripts"))
    cards = importlib.import_module("cards")
    (folder / "weights.png").write_bytes(b"picture")
    card_of(folder)
    written = (folder / "README.md").read_text()
    assert "![weights of a layer](weights.png)" in written and "accuracy.png" not in written
    with pytest.raises(SystemExit, match=r"no metrics\.json"):
        cards.copy_card(folder, "mine", tmp_path / "cards")
    named = folder.rename(tmp_path / "w4")  # the row of results that it holds
    (named / "metrics.json").write_text(json.dumps(METRICS))
    copied = cards.copy_card(named, "mine", tmp_path / "cards")
    text = copied.read_text()
    assert "![weights of a layer](mine/weights.png)" in text and "\n# mine\n" in text
    assert (tmp_path / "cards" / "mine" / "weights.png").read_bytes() == b"picture"
    assert "## Deployed" not in text
    bench = tmp_path / "bench.json"
    bench.write_text(
        json.dumps(
            {"deployed": [FLOAT_RUN, W8A8_RUN], "head": "a processor", "command": "python scripts/bench_export.py"}
        )
    )
    monkeypatch.setattr(cards, "CARDS", tmp_path / "cards")
    monkeypatch.setattr(sys, "argv", ["cards.py", str(named), "fast", "--deployed", str(bench)])
    cards.main()
    assert "Measured on a processor by" in (tmp_path / "cards" / "fast.md").read_text()
    for words, said in ((["one"], "come in pairs, got 1"), (["a", "b", "--deployed", "no.json"], "no file no.json")):
        monkeypatch.setattr(sys, "argv", ["cards.py", *words])
        with pytest.raises(SystemExit):
            cards.main()
        assert said in capsys.readouterr().err

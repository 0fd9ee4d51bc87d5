"""scripts/translation.py: pairs, vocabularies, BLEU, the network, the errors it gives, and a run of a few steps."""

import importlib
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSeq2SeqLM, MarianMTModel

import hf_r2  # noqa: F401  (registers the quantizer with transformers)

pytest.importorskip("sentencepiece")
pytest.importorskip("sacrebleu")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
script, data, vocabulary, bleu, common = map(
    importlib.import_module, ["translation", "translation_data", "vocabulary", "bleu", "common"]
)

WORDS = {"one": "eins", "two": "zwei", "three": "drei", "red": "rot", "blue": "blau", "house": "Haus", "tree": "Baum"}


def texts(count, seed=0):
    """Word-by-word "translations" of random words."""
    rng = random.Random(seed)
    chosen = [rng.choices(list(WORDS), k=rng.randint(2, 5)) for _ in range(count)]
    return {"en": [" ".join(c) for c in chosen], "de": [" ".join(WORDS[w] for w in c) for c in chosen]}


def jsonl(file, count, seed=0):
    rows = texts(count, seed)
    lines = [{"translation": {"en": e, "de": d}} for e, d in zip(rows["en"], rows["de"], strict=True)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def run_script(*flags, **environment):
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **environment}
    command = [sys.executable, "scripts/translation.py", *flags]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    rows = texts(60)
    folder = tmp_path_factory.mktemp("vocabulary")
    vocabulary.train([*rows["en"], *rows["de"]], 60, folder).save_pretrained(folder)
    return common.load_tokenizer(str(folder))


def test_pairs_are_the_same_from_every_kind_of_file(tmp_path):
    rows = texts(9)
    Dataset.from_dict({"number": list(range(9)), **rows}).to_parquet(str(tmp_path / "p.parquet"))
    lines = ["en\tde", *(f"{e}\t{d}" for e, d in zip(rows["en"], rows["de"], strict=True))]
    (tmp_path / "p.tsv").write_text("\n".join(lines) + "\n")
    jsonl(tmp_path / "p.jsonl", 9)
    for name in ("p.parquet", "p.tsv", "p.jsonl"):
        assert data.from_file(str(tmp_path / name), "de", "en").to_dict() == {
            "source": rows["de"],
            "target": rows["en"],
        }


def test_pairs_with_an_empty_side_are_counted_and_left_out(capsys):
    rows = {"en": ["a", "", None, "d", "  "], "de": ["A", "B", "C", "", "E"]}
    assert data.pairs(Dataset.from_dict(rows), "en", "de", "file").to_dict() == {"source": ["a"], "target": ["A"]}
    assert "file: 4 of 5 pairs have an empty side" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="file: holds no pair"):
        data.pairs(Dataset.from_dict({"en": [""], "de": ["A"]}), "en", "de", "file")


@pytest.mark.parametrize(
    "rows, message",
    [
        ({"en": ["a"], "fr": ["b"]}, "file: no column de; needed are en, de, found en, fr"),
        (
            {"translation": [{"en": "a", "fr": "b"}]},
            "file, translation: no column de; needed are en, de, found en, fr",
        ),
        ({"text": ["a"]}, "file: no column en, de; needed are en, de, found text"),
    ],
)
def test_a_missing_language_is_named_with_those_found(rows, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        data.pairs(Dataset.from_dict(rows), "en", "de", "file")


def test_a_trained_vocabulary_has_its_size_and_covers_both_languages(tokenizer):
    assert len(tokenizer) == 60
    rows = texts(30, seed=5)
    found = tokenizer(rows["en"], text_target=rows["de"])
    for kind, side in (("input_ids", "en"), ("labels", "de")):
        assert tokenizer.batch_decode(found[kind], skip_special_tokens=True) == rows[side]
        assert all(ids[-1] == tokenizer.eos_token_id and tokenizer.unk_token_id not in ids for ids in found[kind])


def test_a_given_vocabulary_gives_the_same_tokens(tokenizer, tmp_path):
    again = vocabulary.given(tokenizer.spm_files[0], tmp_path)
    assert again("one blue house")["input_ids"] == tokenizer("one blue house")["input_ids"]
    with pytest.raises(SystemExit, match=r"none\.model: cannot be read as a sentencepiece model"):
        vocabulary.given(str(tmp_path / "none.model"), tmp_path)
    (tmp_path / "bad.model").write_text("no model")
    with pytest.raises(SystemExit, match=r"bad\.model: cannot be read as a sentencepiece model"):
        vocabulary.given(str(tmp_path / "bad.model"), tmp_path)


def test_a_vocabulary_too_large_for_its_texts_ends_with_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"no vocabulary of 5000 entries.*lower --vocab_size"):
        vocabulary.train(texts(20)["en"], 5000, tmp_path)


def test_tokens_are_cut_and_carry_labels(tokenizer):
    rows = Dataset.from_dict({"source": ["one two three red blue"], "target": ["eins zwei"]})
    found = data.tokenized(rows, tokenizer, 4, None)
    assert set(found.column_names) == {"input_ids", "attention_mask", "labels"} and len(found[0]["input_ids"]) == 4


def test_bleu_is_what_the_formula_gives():
    # 4 of 5 words, 3 of 4 pairs, 2 of 3 triples, 1 of 2 quadruples: (4/5 * 3/4 * 2/3 * 1/2) ** (1/4) = 0.2 ** 0.25
    found = bleu.score(["a b c d e"], ["a b c d f"])
    assert found["bleu"] == pytest.approx(100 * 0.2**0.25)
    assert found["signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")


def test_translations_come_back_in_order_whatever_the_batches(tokenizer):
    class Echo(torch.nn.Linear):
        def generate(self, input_ids, attention_mask, max_new_tokens, **search):
            assert max_new_tokens == input_ids.shape[1] + 50 and search == {"num_beams": 3}
            assert attention_mask.sum(-1).max() == input_ids.shape[1]
            self.seen.append(len(input_ids))
            return input_ids

    sources = texts(7, seed=2)["en"]
    for size, batches in ((3, [3, 3, 1]), (7, [7])):
        model = Echo(1, 1)
        model.seen = []
        guesses = bleu.translations(model, tokenizer, sources, batch_size=size, max_length=64, num_beams=3)
        assert guesses == sources and model.seen == batches


def test_base_is_the_papers_transformer():
    class Tokens:
        pad_token_id, eos_token_id = 36999, 0

        def __len__(self):
            return 37000

    with torch.device("meta"):
        model = MarianMTModel(script.new_config(script.TranslationArguments(), Tokens()))
    # Twelve layers' matrices, 18 attentions of 4 d^2 and 12 feed-forwards of 8 d^2, and one table: 44.04 M + 18.94 M.
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2 and p.requires_grad)
    assert matrices == 18 * 4 * 512**2 + 12 * 8 * 512**2 + 37000 * 512
    assert model.lm_head.weight is model.model.encoder.embed_tokens.weight is model.model.decoder.embed_tokens.weight
    assert model.config.activation_function == "relu" and model.model.encoder.embed_scale == 512**0.5


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"train_file": "a"}, "train_file and validation_file go together"),
        ({"d_model": 100, "heads": 3}, "d_model a multiple of heads"),
        ({"model_name_or_path": "x", "layers": 2}, "layers: for a new network only"),
        ({"max_length": 463}, "max_length must be from 1 to 462, got 463"),
        ({"model_name_or_path": "x", "sentencepiece_model": "m"}, "brings its own vocabulary"),
        ({"dkm_steps": -1}, "dkm_steps must be 0 or more"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        script.TranslationArguments(**flags)


def test_an_unreachable_hub_ends_soon_with_one_line(tmp_path):
    run = run_script(HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path))
    assert run.returncode == 1 and "--train_file" in run.stderr
    assert "Traceback" not in run.stderr and "Retrying" not in run.stderr


def test_a_run_saves_models_that_give_the_bleu_written_down(tmp_path):
    out = tmp_path / "run"
    files = [
        "--train_file",
        jsonl(tmp_path / "train.jsonl", 200),
        "--validation_file",
        jsonl(tmp_path / "t.jsonl", 12, 9),
    ]
    flags = ["--small", "--d_model", "32", "--layers", "1", "--heads", "2", "--ffn_dim", "32", "--vocab_size", "60"]
    flags += ["--max_steps", "150", "--warmup_steps", "10", "--learning_rate", "0.01", "--logging_steps", "20"]
    flags += ["--per_device_train_batch_size", "32", "--num_beams", "2", "--weight_bits", "8", "2", "--dropout", "0"]
    run = run_script(*files, *flags, "--output_dir", str(out))
    assert run.returncode == 0, run.stderr[-3000:]
    metrics = json.loads((out / "metrics.json").read_text())
    rows = {row["name"]: row for row in metrics["results"]}
    assert list(rows) == ["float", "nearest-8bit", "nearest-2bit"] and metrics["task"]["metric"] == "bleu"
    assert rows["float"]["bleu"] > 30 and rows["nearest-2bit"]["bleu"] < rows["float"]["bleu"]
    assert all(row["signature"].startswith("nrefs:1|") for row in rows.values())
    assert common.table(metrics["results"], "bleu") in run.stdout and "max_length" not in run.stderr
    assert all("range_over_std" in entry for entry in metrics["log"] if "loss" in entry)
    model, tokenizer = (
        AutoModelForSeq2SeqLM.from_pretrained(out / "nearest-8bit"),
        common.load_tokenizer(str(out / "float")),
    )
    assert model.model.shared.weight_packed.data_ptr() == model.lm_head.weight_packed.data_ptr()
    measured = data.from_file(str(tmp_path / "t.jsonl"), "en", "de").to_dict()
    guesses = bleu.translations(model, tokenizer, measured["source"], batch_size=5, max_length=128, num_beams=2)
    assert bleu.score(guesses, measured["target"])["bleu"] == pytest.approx(rows["nearest-8bit"]["bleu"])
    card = (out / "nearest-8bit" / "README.md").read_text()
    assert "pipeline_tag: translation" in card and "| **nearest-8bit** |" in card

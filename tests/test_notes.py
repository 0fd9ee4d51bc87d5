"""`resume_dir`: notes of one run are read by the same run alone, whatever it is that differs; no trace in the checkpoint."""

import copy
import json
from functools import cache

import pytest
import torch
from torch import nn

from hf_r2 import R2QuantConfig, quantize
from hf_r2.ptq.notes import fingerprint
from tests.models import auto_class, float_model, inputs_for, logits

QUICK = {"adaround": {"iters": 10}, "pdquant": {"iters": 4, "start_iters": 4}}
GRIDS = [
    ({"weight_bits": 3}, {"weight_bits": 4}),
    ({"weight_bits": 4}, {"weight_bits": 3}),
    ({"symmetric": True}, {"symmetric": False}),
    ({"granularity": "per_channel"}, {"granularity": "per_tensor"}),
    ({"act_bits": 8}, {"act_bits": 4}),
    ({"act_bits": 8, "act_range": "static"}, {"act_bits": 8, "act_range": "dynamic"}),
    ({}, {"overrides": {"4": {"weight_bits": 2}}}),
    ({}, {"skip": ["4"]}),
]


def batches():
    generator = torch.Generator().manual_seed(5)
    return [{"input": torch.randn(8, 3, 6, 6, generator=generator)} for _ in range(3)]


@cache
def network():
    """A network with a batch norm and a bias in each layer; do not change it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5))
    model(batches()[0]["input"])
    return model.eval()


def packed(method, folder=None, model=None, data=None, **recipe):
    options = {**QUICK[method], "progress": False, **({} if folder is None else {"resume_dir": folder})}
    config = R2QuantConfig(method, **{"weight_bits": 3, **recipe}, options=options)
    return quantize(model or network(), config, data or batches())


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("method", list(QUICK))
@pytest.mark.parametrize(("first", "second"), GRIDS, ids=str)
def test_the_notes_of_another_recipe_are_not_read(tmp_path, method, first, second):
    packed(method, tmp_path, **first)
    fresh = packed(method, **second)
    assert same(packed(method, tmp_path, **second), fresh)
    assert not same(packed(method, tmp_path, **first), fresh)


def another(what):
    """A model and batches that differ in one thing from those of `packed`."""
    model, data = copy.deepcopy(network()), batches()
    with torch.no_grad():
        if what == "bias":
            model[4].bias += 0.5
        elif what == "norm":
            model[1].running_var *= 4
        elif what == "activation":
            model[2] = nn.ReLU6()
        else:
            data[1]["input"] = data[1]["input"] * 3
    return {"model": model, "data": data}


@pytest.mark.parametrize("what", ["bias", "norm", "activation", "a batch in the middle"])
@pytest.mark.parametrize("method", list(QUICK))
def test_the_notes_of_another_model_or_other_data_are_not_read(tmp_path, method, what):
    packed(method, tmp_path)
    count = len(list(tmp_path.iterdir()))
    other = another(what)
    assert same(packed(method, tmp_path, **other), packed(method, **other))
    assert len(list(tmp_path.iterdir())) == 2 * count
    packed(method, tmp_path)  # its own are still there
    assert len(list(tmp_path.iterdir())) == 2 * count


def test_batches_are_told_apart_by_names_and_shapes_too():
    model, x = nn.Linear(2, 2), torch.zeros(4, 2)
    forms = [[{"x": x}], [{"y": x}], [{"x": x.view(2, 4)}], [{"x": x, "mode": "a"}], [{"x": x, "mode": "b"}]]
    forms += [[{"x": [x, x]}], [{"x": [x, x + 1]}], [{"x": x}, {"x": x}]]
    found = [json.dumps(fingerprint(model, form), sort_keys=True) for form in forms]
    assert len(set(found)) == len(forms)
    assert found[0] == json.dumps(fingerprint(copy.deepcopy(model), [{"x": x.clone()}]), sort_keys=True)


def images():
    return [inputs_for("resnet") for _ in range(2)]


@pytest.mark.parametrize("as_text", [False, True])
def test_paths_stay_out_of_the_checkpoint(tmp_path, as_text):
    folder = tmp_path / "notes of mine"
    notes = str(folder) if as_text else folder
    model = packed("adaround", notes, float_model("resnet"), images(), overrides={"classifier*": {"weight_bits": 4}})
    model.save_pretrained(tmp_path / "saved")
    said = (tmp_path / "saved/config.json").read_text()
    assert "notes of mine" not in said
    assert json.loads(said)["quantization_config"]["options"] == QUICK["adaround"]
    again = auto_class("resnet").from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again, "resnet"), logits(model, "resnet"))


def test_paths_in_the_options_of_a_base_or_of_an_override_stay_out_too(tmp_path):
    base = {"iters": 2, "progress": False, "resume_dir": tmp_path}
    options = {
        "base": "adaround",
        "base_options": base,
        "ranks": "equal",
        "budget": 0.3,
        "trace_file": tmp_path / "t.json",
    }
    config = R2QuantConfig("cora", 3, options=options, overrides={"classifier*": {"options": options}})
    quantize(float_model("resnet"), config, images()).save_pretrained(tmp_path / "saved")
    said = json.loads((tmp_path / "saved/config.json").read_text())["quantization_config"]
    kept = {"base": "adaround", "base_options": {"iters": 2}, "ranks": "equal", "budget": 0.3}
    assert said["options"] == kept and said["overrides"] == {"classifier*": {"options": kept}}
    assert config.options == options  # the recipe that was given is as it was

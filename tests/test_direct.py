"""Packed tensors that are read straight into their layers: which loads do it, and that nobody can tell."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import hf_r2.checkpoint
from hf_r2 import R2QuantConfig, quantize
from hf_r2.direct import fill_
from tests.models import MODELS, float_model

RENAMED = {"vit"}  # transformers changes the names of their layers as it saves them


@pytest.fixture
def filled(monkeypatch):
    """What `fill_` returned in each load."""
    answers = []

    def spy(model, stored):
        answers.append(fill_(model, stored))
        return answers[-1]

    monkeypatch.setattr(hf_r2.checkpoint, "fill_", spy)
    return answers


@pytest.fixture
def never(monkeypatch):
    """Call it, and transformers loads every tensor."""
    return lambda: monkeypatch.setattr(hf_r2.checkpoint, "fill_", lambda *_: False)


@pytest.mark.parametrize("kind", MODELS)
def test_a_load_gives_what_transformers_loop_gives(kind, tmp_path, filled, never):
    model = quantize(float_model(kind), R2QuantConfig(weight_bits=3, symmetric=False))
    model.save_pretrained(tmp_path)
    straight, told = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert filled == [kind not in RENAMED]
    assert not any(told.values())
    never()
    looped = type(model).from_pretrained(tmp_path)
    assert vars(straight).keys() == vars(looped).keys() and not straight._state_dict_hooks
    assert straight._keys_to_ignore_on_load_unexpected == looped._keys_to_ignore_on_load_unexpected
    found, expected = straight.state_dict(), looped.state_dict()
    assert found.keys() == expected.keys() == model.state_dict().keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=0)
    pointers = [[t.data_ptr() for t in state.values()] for state in (found, expected)]
    assert [p.index(x) for p in pointers[:1] for x in p] == [p.index(x) for p in pointers[1:] for x in p]  # same ties
    flags = [{name: p.requires_grad for name, p in m.named_parameters()} for m in (straight, looped)]
    assert flags[0] == flags[1]


@pytest.mark.parametrize(
    "options", [{"storage": "entropy"}, {"method": "dkm"}, {"act_bits": 8, "act_range": "dynamic"}]
)
def test_streams_palettes_and_inputs_too(options, tmp_path, filled):
    model = quantize(float_model("bert"), R2QuantConfig(weight_bits=4, **options))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert filled == [True]
    for (key, tensor), other in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        torch.testing.assert_close(other, tensor, rtol=0, atol=0, msg=key)


def test_all_or_none(tmp_path, filled):
    model = quantize(float_model("bert"), R2QuantConfig(weight_bits=4))
    model.save_pretrained(tmp_path)
    type(model.bert).from_pretrained(tmp_path)  # the head's codes have no place here: transformers says so
    assert filled == [False]

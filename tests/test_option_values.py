"""Values of options and batches that cannot be used: named, with what is allowed, before any work is done."""

import logging

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from hf_r2 import R2QuantConfig, quantize
from hf_r2.packed_layers import packed_layers
from tests.models import float_model

COUNT, COUNT0, POSITIVE = "an integer from 1 on", "an integer from 0 on", "above 0"
WRONG = [
    *[("adaround", {"iters": v}, f"iters must be {COUNT0}, got {v!r}") for v in (-3, 2.5, "many", True)],
    *[
        ("adaround", {"beta": v}, "beta must be two numbers above 0")
        for v in (5, (20.0,), "20", (20.0, 0), ("a", "b"))
    ],
    ("adaround", {"rows": 0}, f"rows must be {COUNT}, got 0"),
    ("adaround", {"samples": 0}, f"samples must be {COUNT}, got 0"),
    ("adaround", {"lr": 0}, f"lr must be {POSITIVE}, got 0"),
    ("adaround", {"lr": float("nan")}, f"lr must be {POSITIVE}, got nan"),
    ("adaround", {"warmup": 1.5}, "warmup must be from 0 to 1, got 1.5"),
    ("adaround", {"correct_bias": "no"}, "correct_bias must be true, false or None, got 'no'"),
    ("pdquant", {"prediction_every": 0}, f"prediction_every must be {COUNT}, got 0"),
    ("pdquant", {"temperature": 0}, f"temperature must be {POSITIVE}, got 0"),
    ("pdquant", {"keep": 2}, "keep must be from 0 to 1, got 2"),
    ("pdquant", {"correction_steps": -1}, f"correction_steps must be {COUNT0}, or None, got -1"),
    ("pdquant", {"correction": 0.0}, f"correction must be {POSITIVE}, got 0.0"),
    ("pdquant", {"weight_round": -1}, "weight_round must be 0 or more, got -1"),
    ("cora", {"batch_size": 0}, f"batch_size must be {COUNT}, got 0"),
    ("cora", {"lr": "fast"}, f"lr must be {POSITIVE}, got 'fast'"),
    ("cora", {"base": "adaround", "base_options": {"rows": 0}}, f"rows must be {COUNT}, got 0"),
]


@pytest.mark.parametrize("method, options, message", WRONG)
def test_values_are_refused_when_the_recipe_is_written(method, options, message):
    with pytest.raises(ValueError, match=message):
        R2QuantConfig(method, options=options)


def test_overrides_are_checked_too():
    with pytest.raises(ValueError, match="iters must be an integer from 0 on, got -1"):
        R2QuantConfig("adaround", overrides={"classifier": {"options": {"iters": -1}}})


def test_values_at_the_edge_are_taken():
    R2QuantConfig("adaround", options={"iters": 0, "beta": [20, 2], "warmup": 0, "correct_bias": None, "samples": 1})
    R2QuantConfig(
        "pdquant", options={"keep": 1.0, "prediction": 0.0, "correction_steps": 0, "act_lr": 0, "start_iters": 0}
    )


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)))


def collate(rows):
    return {"pixel_values": torch.stack(rows)}


def test_a_loader_without_a_length_is_taken():
    loader = DataLoader(Stream(), batch_size=4, collate_fn=collate)
    model, config = float_model("resnet"), R2QuantConfig(act_bits=8)
    packed, other = quantize(model, config, loader), quantize(model, config, list(loader))
    state = other.state_dict()
    assert packed_layers(packed) and all(torch.equal(value, state[key]) for key, value in packed.state_dict().items())


@pytest.mark.parametrize(
    "batches, error, message",
    [
        (torch.randn(2, 3, 16, 16), TypeError, r"batches must be a list or loader of keyword dicts .*, got Tensor"),
        (
            {"pixel_values": torch.randn(2, 3, 16, 16)},
            TypeError,
            r"got dict: put a single batch into a list, \[batch\]",
        ),
        (3, TypeError, "batches must be a list or loader of keyword dicts for forward, got int"),
        ("text", TypeError, "batches must be a list or loader of keyword dicts for forward, got str"),
        ([torch.randn(2, 3, 16, 16)], ValueError, "batch 0: batches must be keyword dicts for forward, got Tensor"),
        ([], ValueError, "at least one batch; batches was empty"),
        (
            [{"pixel_values": torch.randn(2, 3, 16, 16)}, {"pixel_values": torch.randn(0, 3, 16, 16)}],
            ValueError,
            r"batch 1 holds no sample: 'pixel_values' has shape \[0, 3, 16, 16\]",
        ),
    ],
)
@pytest.mark.parametrize(
    "config", [R2QuantConfig(act_bits=8), R2QuantConfig("adaround"), R2QuantConfig("lsq", act_bits=4)]
)
def test_batches_that_are_none(batches, error, message, config):
    with pytest.raises(error, match=message):
        quantize(float_model("resnet"), config, batches)


@pytest.mark.parametrize("asked, warned", [({"samples": 9}, True), ({"samples": 4}, False), ({}, False)])
def test_fewer_samples_than_were_asked_for_are_mentioned(caplog, asked, warned):
    batches = [{"pixel_values": torch.randn(2, 3, 16, 16)} for _ in range(2)]
    with caplog.at_level(logging.WARNING):
        quantize(
            float_model("resnet"), R2QuantConfig("adaround", options={"iters": 1, "progress": False, **asked}), batches
        )
    assert ("4 calibration samples, fewer than the 9 asked for" in caplog.text) == warned
    assert caplog.text.count("fewer than") == warned

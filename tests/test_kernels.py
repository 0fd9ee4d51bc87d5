"""Layers on torch's integer kernels: the same outputs as with the decoded weight, and refused where they are slower."""

import copy

import pytest
import torch
from torch import nn

from hf_r2 import R2QuantConfig, kernels, kernels_of, prepare, quantize, use_kernels_
from hf_r2 import packed_layers as packed_layers_module
from hf_r2.encoders.activations import InputQuantizer
from hf_r2.packed_layers import packed_layers
from tests.models import MODELS, float_model, logits


@pytest.fixture
def fast(monkeypatch):
    """Every kernel counts as faster: what is tested here is what it computes."""
    monkeypatch.setattr(kernels, "_share", lambda *_: 0.5)


def layer(dtype=torch.float32, **recipe):
    """A packed linear layer 64 -> 32, an input for it, and its output."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 64) + 0.3
    model = nn.Sequential(nn.Linear(64, 32)).to(dtype)
    packed = quantize(model, R2QuantConfig(**recipe), [{"input": x.to(dtype)}]).eval()
    return packed, x.to(dtype), packed(x.to(dtype)).detach()


def close(found, expected, tolerance):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("act_range", ["static", "dynamic"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "granularity"), [(1, "per_channel"), (3, "per_tensor"), (8, "per_channel"), (8, "per_tensor")]
)
def test_int8_layers_compute_the_same(bits, granularity, symmetric, act_range, fast):
    packed, x, expected = layer(
        weight_bits=bits, granularity=granularity, symmetric=symmetric, act_bits=8, act_range=act_range
    )
    use_kernels_(packed)
    assert kernels_of(packed) == {"0": {"kernel": "int8", "share": 0.5, "why": None}}
    assert packed[0].weight_kernel.integers.dtype == torch.int8 and packed[0].weight_decoded is None
    with torch.no_grad():
        close(packed(x), expected, 1e-5)


def test_learned_zero_points_between_codes(fast):
    packed, x, _ = layer(weight_bits=4, act_bits=4)
    quantizer = packed[0].input_quantizer
    assert isinstance(quantizer, InputQuantizer)
    quantizer.zero_point += 0.3
    with torch.no_grad():
        expected = packed(x)
        use_kernels_(packed)
        close(packed(x), expected, 1e-5)


@pytest.mark.parametrize(("bits", "symmetric"), [(1, True), (2, True), (3, False), (4, True), (4, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int4_layers_compute_nearly_the_same(bits, symmetric, dtype, fast):
    packed, x, expected = layer(dtype, weight_bits=bits, symmetric=symmetric)
    use_kernels_(packed)
    assert kernels_of(packed)["0"]["kernel"] == "int4" and packed[0].weight_kernel.packed.numel() == 64 * 32 // 2
    with torch.no_grad():
        found = packed(x)
    assert found.dtype == dtype
    close(found, expected, 2e-2)


@pytest.mark.parametrize(
    "recipe", [{"act_bits": 8, "act_range": "dynamic"}, {"act_bits": 8, "weight_bits": 2, "act_range": "dynamic"}]
)
def test_whole_models_with_what_no_kernel_takes(recipe, fast, tmp_path):
    packed = quantize(float_model("bert"), R2QuantConfig(**{"weight_bits": 8, **recipe}))
    expected = logits(packed, "bert")
    use_kernels_(packed)
    notes = kernels_of(packed)
    assert notes["bert.embeddings.word_embeddings"] == {"kernel": None, "why": "no kernel for Embedding"}
    assert sum(note["kernel"] == "int8" for note in notes.values()) == 8
    close(logits(packed, "bert"), expected, 1e-2)  # here and there a code turns
    packed.save_pretrained(tmp_path)
    loaded = MODELS["bert"][1].from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded, "bert"), expected, rtol=0, atol=0)
    torch.testing.assert_close(logits(copy.deepcopy(packed), "bert"), logits(packed, "bert"), rtol=0, atol=0)
    plain = packed.dequantize()
    assert "weight_kernel" not in dict(plain.classifier.named_children())


def test_gradients_take_the_decoded_weight(fast):
    packed, x, expected = layer(weight_bits=4)
    use_kernels_(packed)
    x.requires_grad_(True)
    found = packed(x)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    torch.testing.assert_close(x.grad[0, 0], packed[0].weight.sum(0))


def test_a_weight_that_gradients_have_decoded_in_every_call_is_warned_of_once(fast, caplog):
    packed_layers_module._warn_of_gradients.cache_clear()
    packed, x, _ = layer(weight_bits=4)
    use_kernels_(packed)
    normed = nn.Sequential(nn.LayerNorm(64), packed)
    normed.train()(x)  # here gradients are wanted
    normed.eval()
    with torch.no_grad():
        normed(x)
    packed(x)  # nothing trainable before it: the kernel serves
    assert not caplog.messages
    for _ in range(3):
        normed(x)
    assert len(caplog.messages) == 1 and "call the model inside torch.no_grad()" in caplog.messages[0]


def test_what_would_be_slower_is_refused(monkeypatch):
    monkeypatch.setattr(kernels, "_share", lambda *_: 1.7)
    packed, x, expected = layer(weight_bits=4)
    with pytest.raises(
        ValueError, match=r"no layer would be faster .*slower: 1.70 of the float layer's time at 64 rows"
    ):
        use_kernels_(packed, rows=64)
    torch.testing.assert_close(packed(x), expected, rtol=0, atol=0)
    assert kernels_of(packed) == {}


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        ({"weight_bits": 8}, "float inputs, and more than 4 bits"),
        ({"weight_bits": 2, "method": "dkm"}, "a palette's levels are no integers"),
    ],
)
def test_what_has_no_kernel(recipe, why, fast):
    with pytest.raises(ValueError, match=why):
        use_kernels_(layer(**recipe)[0])
    with pytest.raises(ValueError, match="needs a packed model"):
        use_kernels_(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"half trained: call hf_r2.convert\(model\)"):
        use_kernels_(prepare(nn.Sequential(nn.Linear(2, 2)), R2QuantConfig(method="lsq")))


def test_shapes_that_the_4_bit_kernel_does_not_take(fast):
    with pytest.raises(ValueError, match="multiples of 16 outputs and of 32 inputs"):
        use_kernels_(quantize(float_model("bert").classifier, R2QuantConfig(weight_bits=4)))


def test_the_time_is_that_of_the_kernel_over_the_decoded_weight(monkeypatch):
    packed, _, _ = layer(weight_bits=4, act_bits=8)
    clock = iter(float(n) for k in range(100) for n in (k * 10, k * 10 + 2, k * 10 + 3, k * 10 + 8))
    monkeypatch.setattr(kernels.time, "perf_counter", lambda: next(clock))
    use_kernels_(packed)
    assert kernels_of(packed)["0"]["share"] == pytest.approx(2 / 5)


def test_scales_stay_exact_when_the_model_is_cast(fast):
    packed, x, expected = layer(weight_bits=4, act_bits=8)
    use_kernels_(packed)
    packed.to(torch.bfloat16)
    assert packed[0].weight_kernel.scale.dtype == torch.float32
    assert packed_layers(packed)["0"].weight.dtype == torch.bfloat16
    with torch.no_grad():
        close(packed(x.bfloat16()).float(), expected, 3e-2)


def test_inputs_are_taken_in_any_shape(fast):
    packed, x, expected = layer(weight_bits=4, act_bits=8, act_range="dynamic")
    with torch.no_grad():
        expected[0, 0] = packed(x[0, 0])
    use_kernels_(packed)
    with torch.no_grad():
        close(packed(x[0, 0]), expected[0, 0], 1e-5)
        assert packed(x[:0]).shape == (0, 5, 32)

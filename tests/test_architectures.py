"""Every architecture, width and kind: packed, saved and loaded again it computes the same to the bit."""

import pytest
import torch
from safetensors.torch import load_file

import hf_r2
from hf_r2 import R2QuantConfig, packed_in_memory, quantize
from hf_r2.packed_layers import packed_layers
from tests.models import MODELS, auto_class, float_model, inputs_for, logits

KINDS = {
    "symmetric": {"granularity": "per_channel"},
    "asymmetric": {"granularity": "per_tensor", "symmetric": False},
    "palette": {"method": "dkm"},
}
ARCHITECTURES = sorted(MODELS)


def reload(name, folder):
    model, info = auto_class(name).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model


# All but the exact clustering of MobileNets' layers to 256 centroids, ten seconds each: the other models have that width, too.
CASES = [
    (name, bits, kind)
    for name in ARCHITECTURES
    for bits in range(1, 9)
    for kind in sorted(KINDS)
    if (bits, kind) != (8, "palette") or not name.startswith("mobilenet")
]


@pytest.mark.parametrize(("name", "bits", "kind"), CASES)
def test_saved_and_loaded_again_is_the_same(name, bits, kind, tmp_path):
    packed = quantize(float_model(name), R2QuantConfig(weight_bits=bits, **KINDS[kind]))
    expected = logits(packed, name)
    if bits <= 4:
        assert not torch.equal(expected, logits(float_model(name), name))  # quantizing did something
    packed.save_pretrained(tmp_path / "one")
    loaded = reload(name, tmp_path / "one")
    torch.testing.assert_close(logits(loaded, name), expected, rtol=0, atol=0)
    if bits in (1, 3, 8):
        loaded.save_pretrained(tmp_path / "two")
        one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "two"))
        assert one.keys() == two.keys()
        for key in one:
            torch.testing.assert_close(one[key], two[key], rtol=0, atol=0)
        configs = [(tmp_path / n / "config.json").read_text() for n in ("one", "two")]
        assert configs[0] == configs[1]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_in_memory_computes_the_same(name, tmp_path):
    packed = quantize(float_model(name), R2QuantConfig(weight_bits=3))
    packed.save_pretrained(tmp_path)
    with packed_in_memory():
        lean = reload(name, tmp_path)
    layers = packed_layers(lean).values()
    assert all(m._buffers["weight_decoded"] is None for m in layers)
    assert all(m._buffers["weight_decoded"] is not None for m in packed_layers(packed).values())
    torch.testing.assert_close(logits(lean, name), logits(packed, name), rtol=0, atol=0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_quantizing_while_loading_is_quantize_after_loading(name, tmp_path):
    config = R2QuantConfig(weight_bits=2)
    float_model(name).save_pretrained(tmp_path)
    loaded = auto_class(name).from_pretrained(tmp_path, quantization_config=config)
    torch.testing.assert_close(logits(loaded, name), logits(quantize(float_model(name), config), name), rtol=0, atol=0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_dequantized_is_a_plain_float_model(name, tmp_path):
    packed = quantize(float_model(name), R2QuantConfig(weight_bits=4))
    expected = logits(packed, name)
    weights = {n: m.weight.clone() for n, m in packed_layers(packed).items()}
    plain = packed.dequantize()
    assert not packed_layers(plain)
    assert not hasattr(plain.config, "quantization_config")
    for layer, weight in weights.items():
        torch.testing.assert_close(plain.get_submodule(layer).weight.detach(), weight, rtol=0, atol=0)
    # torch may take another kernel for a parameter in other memory: depthwise convolutions then differ in the last bits
    torch.testing.assert_close(logits(plain, name), expected, rtol=1e-4, atol=1e-6)
    assert {n for n, _ in plain.named_parameters()} == {n for n, _ in float_model(name).named_parameters()}
    plain.save_pretrained(tmp_path)
    assert "weight_packed" not in " ".join(load_file(tmp_path / "model.safetensors"))
    torch.testing.assert_close(
        logits(auto_class(name).from_pretrained(tmp_path), name), expected, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("act_range", ["static", "dynamic"])
def test_activation_quantization_survives_the_checkpoint(name, act_range, tmp_path):
    batches = [inputs_for(name)]
    results = []
    for act_bits in (2, 8):
        config = R2QuantConfig(weight_bits=8, act_bits=act_bits, act_range=act_range)
        packed = quantize(float_model(name), config, batches if act_range == "static" else None)
        packed.save_pretrained(tmp_path)
        loaded = reload(name, tmp_path)
        torch.testing.assert_close(logits(loaded, name), logits(packed, name), rtol=0, atol=0)
        results.append((logits(packed, name) - logits(float_model(name), name)).abs().mean())
    assert results[0] > 3 * results[1] > 0


@pytest.mark.parametrize("name", ["bert", "marian", "t5", "resnet"])
def test_prepared_models_come_back_prepared(name, tmp_path):
    import copy

    model = hf_r2.prepare(copy.deepcopy(float_model(name)), R2QuantConfig(method="dkm", weight_bits=2)).eval()
    keys = set(model.state_dict())
    assert set(float_model(name).state_dict()) <= keys
    model.save_pretrained(tmp_path)
    loaded = reload(name, tmp_path)
    assert set(loaded.state_dict()) == keys
    torch.testing.assert_close(logits(loaded, name), logits(model, name), rtol=0, atol=0)
    loaded.save_pretrained(tmp_path / "again")
    packed = hf_r2.convert(reload(name, tmp_path / "again"))
    torch.testing.assert_close(logits(packed, name), logits(model, name), rtol=0, atol=0)

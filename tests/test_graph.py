"""What is read off torch.export: folds, chains, joins and blocks of every architecture that is promised."""

import copy

import pytest
import torch
import transformers as tf
from torch import nn

from hf_r2 import R2QuantConfig, quantize
from hf_r2.graph import example_inputs, find_blocks, read_graph
from hf_r2.graph.capture import Relay, main_tensor, run_block
from hf_r2.graph.chains import batch_norm_folds, chains, following_activation, joins
from hf_r2.graph.fold import build_folded_, fold_, statistics_of, unfold_
from hf_r2.layers import weight_layers
from tests.models import float_model, inputs_for, logits


def _marian():
    config = tf.MarianConfig(
        vocab_size=40, decoder_vocab_size=40, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=20, decoder_ffn_dim=20, pad_token_id=0, decoder_start_token_id=1,
        eos_token_id=2, forced_eos_token_id=2, max_position_embeddings=16, activation_function="relu",
    )  # fmt: skip
    return tf.MarianMTModel(config)


def _resnet(kind):
    return tf.ResNetForImageClassification(
        tf.ResNetConfig(layer_type=kind, embedding_size=8, depths=[2, 2, 2, 2], hidden_sizes=[8, 16, 16, 16])
    )


def _mobilebert():
    config = tf.MobileBertConfig(
        vocab_size=40, hidden_size=16, embedding_size=8, intra_bottleneck_size=8, true_hidden_size=8, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=12, num_feedforward_networks=2, max_position_embeddings=16,
    )  # fmt: skip
    return tf.MobileBertForSequenceClassification(config)


# Model, batch norms that fold, chains, residual joins, blocks.
MODELS = {
    "mobilenet_v1": (lambda: tf.MobileNetV1ForImageClassification(tf.MobileNetV1Config(depth_multiplier=0.25)), 27, 27, 0, 15),
    "mobilenet_v2": (lambda: tf.MobileNetV2ForImageClassification(tf.MobileNetV2Config(depth_multiplier=0.35)), 52, 37, 10, 20),
    "resnet_basic": (lambda: _resnet("basic"), 20, 8, 8, 10),
    "resnet_bottleneck": (lambda: _resnet("bottleneck"), 28, 16, 8, 10),
    "mobilebert": (_mobilebert, 0, 4, 8, 5),
    "marian_relu": (_marian, 0, 4, 10, 7),
    "bert": (lambda: float_model("bert"), 0, 0, 2, 4),
    "vit": (lambda: float_model("vit"), 0, 0, 2, 3),
}  # fmt: skip


def _built(name):
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


@pytest.mark.parametrize("name", MODELS)
def test_what_is_found(name):
    model = _built(name)
    graph = read_graph(model, example_inputs(model))
    blocks = find_blocks(graph, model)
    found = (len(batch_norm_folds(graph, model)), len(chains(graph, model)), len(joins(graph)), len(blocks))
    assert found == MODELS[name][1:]
    assert sorted(layer for block in blocks for layer in block.layers) == sorted(graph.layers)
    names = {layer.name for layer in weight_layers(model, tied=True)}
    assert set(graph.layers) <= names and len(names - set(graph.layers)) <= 1  # tied tables may be read under one name
    for pair in chains(graph, model):
        assert pair.activation in (None, "relu", "relu6")
        if name.startswith("mobilenet_v1"):
            assert isinstance(model.get_submodule(pair.activation_module), nn.ReLU6)
            assert following_activation(graph, model, pair.first) == pair.activation_module


def test_chains_of_mobilenet_v1_by_name():
    model = _built("mobilenet_v1")
    pairs = chains(read_graph(model, example_inputs(model)), model)
    assert (pairs[0].first, pairs[0].second) == (
        "mobilenet_v1.conv_stem.convolution",
        "mobilenet_v1.layer.0.convolution",
    )
    assert pairs[0].padded and not pairs[1].padded  # 3 x 3 kernels read zeros around the image
    assert (pairs[-1].first, pairs[-1].second) == ("mobilenet_v1.layer.25.convolution", "classifier")


def test_a_branch_ends_a_chain_and_a_join_names_its_layers():
    model = _built("resnet_basic")
    graph = read_graph(model, example_inputs(model))
    seconds = {pair.second for pair in chains(graph, model)}
    assert not any("shortcut" in name for name in seconds)
    join = joins(graph)[2]
    assert join.module == "resnet.encoder.stages.1.layers.0"
    assert set(join.layers) == {
        "resnet.encoder.stages.1.layers.0.layer.1.convolution", "resnet.encoder.stages.1.layers.0.shortcut.convolution"
    }  # fmt: skip


def test_blocks_by_name():
    model = _built("mobilenet_v2")
    names = [b.names for b in find_blocks(read_graph(model, example_inputs(model)), model)]
    assert names[0] == ("mobilenet_v2.conv_stem.first_conv",) and names[-1] == ("classifier",)
    assert names[2:-2] == [(f"mobilenet_v2.layer.{i}",) for i in range(16)]  # with and without a residual connection
    marian = _built("marian_relu")
    blocks = find_blocks(read_graph(marian, example_inputs(marian)), marian)
    by_name = {block.name: number for number, block in enumerate(blocks)}
    encoder, decoder = by_name["model.encoder.layers.1"], by_name["model.decoder.layers.1"]
    assert blocks[encoder].read_until == decoder  # every decoder layer reads what the encoder gave


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.depthwise, self.last = nn.Conv2d(4, 4, 3, groups=4), nn.Linear(4, 2)

    def forward(self, x):
        x = self.depthwise(torch.relu(self.norm(self.conv(x))))
        return self.last(x.mean((2, 3)))


def test_a_plain_module_with_example_inputs():
    model = Plain().eval()
    graph = read_graph(model, {"x": torch.randn(2, 3, 8, 8)})
    assert batch_norm_folds(graph, model) == {"conv": "norm"}
    pairs = [(p.first, p.second, p.activation, p.padded) for p in chains(graph, model)]
    assert pairs == [("conv", "depthwise", "relu", False), ("depthwise", "last", None, False)]
    with pytest.raises(ValueError, match="pass batches, the graph is read with the first"):
        example_inputs(model)


class Choosy(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), Doubter())

    def forward(self, x):
        return self.inner(x)


class Doubter(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_what_cannot_be_exported_is_named(caplog):
    model, x = Choosy().eval(), {"x": torch.randn(2, 4)}
    with pytest.raises(ValueError, match=r"it fails in module 'inner.2' .*nearest, mse, percentile"):
        read_graph(model, x)
    with pytest.raises(ValueError, match=r"fails in module 'inner.2'"):
        quantize(model, R2QuantConfig(method="adaround"), [x])
    with pytest.raises(ValueError, match=r"fails in module 'inner.2'"):
        quantize(model, R2QuantConfig(options={"fold": True}), [x])
    assert quantize(model, R2QuantConfig(), [x]) is not None  # folds where it can, and says where it cannot
    assert "batch norms are not folded" in caplog.text


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2", "resnet_basic", "resnet_bottleneck"])
def test_folding_computes_the_same_and_can_be_taken_back(name):
    model = _built(name)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(-1.5, 1.5)
                module.bias.normal_(0, 0.1)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
    model.double()
    inputs = {"pixel_values": torch.randn(2, 3, 64, 64, dtype=torch.float64)}
    with torch.no_grad():
        true = model(**inputs).logits
        graph = read_graph(model, inputs)
        folds, keys = batch_norm_folds(graph, model), set(model.state_dict())
        fold_(model, folds)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        torch.testing.assert_close(model(**inputs).logits, true, rtol=1e-9, atol=1e-9 * true.abs().max())
        unfold_(model, folds)
        assert set(model.state_dict()) == keys
        torch.testing.assert_close(model(**inputs).logits, true, rtol=1e-9, atol=1e-9 * true.abs().max())


def test_statistics_of_a_folded_batch_norm_are_those_of_its_output():
    torch.manual_seed(0)
    model = Plain()
    x = {"x": torch.randn(256, 3, 8, 8)}
    model.norm.momentum = None  # the plain mean over what it has seen
    with torch.no_grad():
        model.norm.weight.uniform_(0.5, 2)
        model.norm.bias.normal_()
        model.conv.weight[3] *= 1e-4  # eps outweighs this channel's variance
        model.train()(**x)
        fold_(model.eval(), {"conv": "norm"})
        y = model.conv(x["x"]).movedim(1, 0).flatten(1)
    known = statistics_of(model.conv)
    torch.testing.assert_close(known.mean, y.mean(1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(known.std, y.std(1), rtol=1e-3, atol=1e-4)


def test_a_dead_channel_is_folded_into_its_bias_and_no_longer_sets_the_range():
    torch.manual_seed(0)
    model = Plain().eval()
    with torch.no_grad():
        model.conv.weight[3] = 0.5 * model.conv.weight[3].sign()
        model.norm.running_var.fill_(1.0)[3] = 1e-20  # its input is always zero, ...
        model.norm.bias.normal_()
        x = torch.randn(8, 3, 8, 8)
        others = [i for i in range(model.norm.num_features) if i != 3]
        true = model.norm(model.conv(x))
        fold_(model, {"conv": "norm"})
        y = model.conv(x)
    torch.testing.assert_close(y[:, others], true[:, others], rtol=1e-5, atol=1e-6)
    assert bool((y[:, 3] == model.conv.bias[3]).all())
    assert model.conv.weight.abs().max() < 1  # ... and 0.5 / sqrt(eps) is 158
    assert model.conv.bias[3] == statistics_of(model.conv).mean[3] and statistics_of(model.conv).std[3] < 1e-6


def test_a_skeleton_gets_the_shape_of_the_folded_model():
    folded, skeleton = Plain().eval(), Plain().eval()
    fold_(folded, {"conv": "norm"})
    build_folded_(skeleton, {"conv": "norm"})
    skeleton.load_state_dict(folded.state_dict())
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(skeleton(x), folded(x))


@pytest.mark.parametrize(
    "name", ["mobilenet_v1", "mobilenet_v2", "resnet", "bert", "vit", "marian", "mobilebert", "t5"]
)
def test_relay_feeds_every_block_what_the_model_feeds_it(name):
    model, inputs = float_model(name), inputs_for(name)
    blocks = find_blocks(read_graph(model, inputs), model)
    batches = [inputs, {k: v.flip(0) for k, v in inputs.items()}]
    relay = Relay(model, blocks, batches)
    with torch.no_grad():
        for block in blocks:
            calls = [relay.call(number) for number in range(2)]
            outputs = [run_block(model, block, call) for call in calls]
            for number in range(2):  # the rest of the model makes of it what the whole model makes
                rest = relay.rest(number, outputs[number]).logits
                torch.testing.assert_close(rest, model(**batches[number]).logits, rtol=0, atol=0)
            relay.finish(outputs)
    held = [main_tensor(v).untyped_storage().nbytes() for v in relay._outputs[0].values()]
    assert sum(size > 4 for size in held) <= 2  # the last output, and an encoder's; the others hold no memory


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2", "resnet"])
def test_packed_models_are_folded_and_come_back_plain(name, tmp_path):
    model = float_model(name)
    before = copy.deepcopy(model.state_dict())
    packed = quantize(model, R2QuantConfig(weight_bits=8))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())  # the float model stays
    skeleton = packed.config.quantization_config.skeleton
    assert len(skeleton["folded"]) == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    quantized = logits(packed, name)
    plain = packed.dequantize()
    torch.testing.assert_close(logits(plain, name), quantized, rtol=1e-4, atol=1e-5)
    plain.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert any(isinstance(m, nn.BatchNorm2d) for m in again.modules())
    torch.testing.assert_close(logits(again, name), quantized, rtol=1e-4, atol=1e-5)

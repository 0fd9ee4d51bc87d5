"""What counts as a weight: kinds of layers, tied and skipped ones, output channels, batch norms behind convolutions."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, MobileNetV2Config, MobileNetV2ForImageClassification
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding

from hf_r2 import R2QuantConfig, prepare, quantize
from hf_r2.layers import (
    WeightLayer,
    channel_axis,
    check_globs,
    dead_channels,
    folded_weight,
    following_batch_norms,
    is_weight_layer,
    matches,
    weight_layers,
)


def names(model, *args, **options):
    return [layer.name for layer in weight_layers(model, *args, **options)]


def tied():
    model = nn.ModuleDict({"table": nn.Embedding(5, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["table"].weight
    return model


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8))


@pytest.mark.parametrize(
    ("layer", "axis", "channels"),
    [
        (nn.Linear(3, 2), 0, 2),
        (nn.Conv1d(3, 2, 3), 0, 2),
        (nn.Conv2d(4, 8, 3, groups=4), 0, 8),
        (nn.Conv3d(3, 2, 3), 0, 2),
        (nn.ConvTranspose2d(3, 2, 3), 1, 2),
        (nn.Embedding(5, 3), 0, 5),
        (nn.modules.linear.NonDynamicallyQuantizableLinear(3, 2), 0, 2),  # a subclass
    ],
)
def test_layers_with_a_weight_and_their_output_channels(layer, axis, channels):
    assert is_weight_layer(layer)
    assert channel_axis(layer) == WeightLayer("", layer).channel_axis == axis
    assert layer.weight.shape[axis] == channels


def test_gpt2_s_conv1d_is_a_linear_layer_the_other_way_round():
    layer = gpt2().transformer.h[0].mlp.c_fc  # [8, 32]: inputs first
    assert is_weight_layer(layer)
    assert layer.weight.shape[channel_axis(layer)] == 32


@pytest.mark.parametrize(
    "layer", [nn.LayerNorm(3), nn.BatchNorm2d(3), nn.ReLU(), nn.Sequential(), nn.PReLU(), nn.Bilinear(2, 2, 2)]
)
def test_layers_without(layer):
    assert not is_weight_layer(layer)
    assert weight_layers(layer) == []


def test_fixed_position_tables_are_not_weights():
    assert not is_weight_layer(MarianSinusoidalPositionalEmbedding(8, 4))
    assert is_weight_layer(gpt2().transformer.wpe)


def test_order_is_that_of_registration():
    assert names(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Sequential(nn.Linear(3, 1)))) == ["0", "2.0"]
    assert names(nn.Linear(2, 3)) == [""]


def test_tied_weights_are_listed_once_or_by_all_names():
    assert names(tied()) == ["table", "body"]
    assert names(tied(), tied=True) == ["table", "body", "head"]
    found = weight_layers(tied(), tied=True)
    assert found[0].weight is not found[1].weight


def test_a_module_used_twice_is_one_layer():
    shared = nn.Linear(2, 2)
    assert names(nn.Sequential(shared, nn.ReLU(), shared)) == ["0"]


@pytest.mark.parametrize("glob", ["table", "head", "h*", "[th]*"])
def test_any_name_of_a_tied_weight_skips_it(glob):
    assert names(tied(), [glob]) == ["body"]
    assert names(tied(), [glob], tied=True) == ["body"]


def test_globs_match_whole_names_and_tell_misspelt_ones():
    assert matches("encoder.layer.0.query", ["*.query"])
    assert not matches("encoder.query.dense", ["*.query"])
    assert not matches("Head", ["head"])  # case counts
    with pytest.raises(ValueError, match="skip: 'nothing' matches no layer; the weight layers are: table, body, head"):
        weight_layers(tied(), ["nothing"])
    with pytest.raises(ValueError, match="weight layers are: none"):
        check_globs(["a"], [], "skip")
    with pytest.raises(ValueError, match=r"are: 0, 1, 2, 3, 4, 5, 6, 7, \.\.\."):
        check_globs(["a"], [str(i) for i in range(9)], "skip")


def test_the_float_weight_is_found_behind_an_encoder_and_gone_when_packed():
    model = nn.Sequential(nn.Linear(4, 4))
    weight = model[0].weight
    prepare(model, R2QuantConfig(method="dkm", weight_bits=1))
    assert weight_layers(model)[0].weight is weight
    packed = quantize(nn.Sequential(nn.Linear(4, 4)), R2QuantConfig(weight_bits=4))
    assert weight_layers(packed) == []


def test_a_layer_without_its_weight_says_so():
    layer = nn.Linear(2, 2)
    layer.weight = None
    with pytest.raises(ValueError, match="'fc' has no float weight any more"):
        _ = WeightLayer("fc", layer).weight


def test_batch_norms_of_a_transformers_model_are_those_behind_its_convolutions():
    config = MobileNetV2Config(depth_multiplier=0.25, num_labels=2)
    model = MobileNetV2ForImageClassification(config)
    pairs = following_batch_norms(model)
    convolutions = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) > 50
    assert sorted(pairs) == sorted(convolutions)
    for name, norm in pairs.items():
        assert norm is model.get_submodule(name.removesuffix("convolution") + "normalization")


def test_batch_norms_are_not_guessed():
    pairs = following_batch_norms(
        nn.Sequential(
            nn.BatchNorm2d(3),  # before: not behind
            nn.Conv2d(3, 4, 1),
            nn.ReLU(),
            nn.Conv2d(4, 4, 1),
            nn.BatchNorm2d(4),
            nn.BatchNorm2d(4),  # the second one is behind no convolution
            nn.Conv2d(4, 4, 1),
            nn.BatchNorm2d(8),  # other channels
            nn.Conv2d(4, 8, 1),
            nn.Linear(8, 8),
            nn.BatchNorm1d(8),  # behind a linear layer
        )
    )
    assert list(pairs) == ["3"]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("groups", [1, 4])
def test_the_folded_weight_gives_the_same_outputs(affine, groups):
    conv, norm = nn.Conv2d(4, 4, 3, bias=False, groups=groups).double(), nn.BatchNorm2d(4, affine=affine).double()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.1, 2)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    norm.eval()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    shift = norm(torch.zeros(1, 4, 1, 1, dtype=torch.float64))  # what the norm makes of nothing goes into the bias
    torch.testing.assert_close(
        nn.functional.conv2d(x, folded_weight(conv.weight, norm), groups=groups) + shift, norm(conv(x))
    )


def test_the_folded_weight_is_differentiable_in_weight_and_gamma_and_wide():
    conv, norm = nn.Conv2d(2, 3, 1).double(), nn.BatchNorm2d(3).double().eval()
    norm.running_var.uniform_(0.1, 2)

    def folded(weight, gamma):
        return torch.func.functional_call(_Folded(norm), {"norm.weight": gamma}, (weight,))

    assert torch.autograd.gradcheck(folded, (conv.weight, norm.weight))
    half = nn.Conv2d(2, 3, 1).bfloat16()
    assert folded_weight(half.weight, nn.BatchNorm2d(3)).dtype == torch.float32


@pytest.mark.parametrize("variance, dead", [(0.0, True), (0.9e-9, True), (1.1e-9, False), (1.0, False)])
def test_nothing_is_deployed_of_a_channel_that_never_changes(variance, dead):
    conv, norm = nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2, eps=1e-3).eval()  # dead: below a millionth of eps
    norm.running_var[1] = variance
    folded = folded_weight(conv.weight, norm)
    folded.sum().backward()
    assert bool((folded[1] == 0).all()) is dead and bool(norm.weight.grad[1] == 0) is dead
    assert dead_channels(norm).tolist() == [False, dead]
    torch.testing.assert_close(folded[0], conv.weight[0] / 1.001**0.5)
    if not dead:
        torch.testing.assert_close(folded[1], conv.weight[1] / (variance + 1e-3) ** 0.5)


class _Folded(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, weight):
        return folded_weight(weight, self.norm)

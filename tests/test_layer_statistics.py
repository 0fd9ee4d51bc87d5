"""What layers read, in mean and in second moments: how an error of the weight shows in the output."""

import pytest
import torch
from torch import nn

from hf_r2.layers import WeightLayer
from hf_r2.lowrank import SIDES, fold, unfold
from hf_r2.ptq.input_moments import input_moments
from hf_r2.ptq.residual import factorize
from hf_r2.ptq.tap_means import tap_means

LAYERS = {
    "linear": (nn.Linear(6, 5), (7, 3, 6)),
    "padded": (nn.Conv2d(4, 5, 3, stride=2, padding=1), (7, 4, 6, 7)),
    "grouped": (nn.Conv2d(4, 6, 3, dilation=2, padding=2, groups=2), (7, 4, 6, 7)),
    "depthwise": (nn.Conv2d(4, 4, 3, padding=1, groups=4), (7, 4, 6, 7)),
    "half": (nn.Conv2d(4, 5, 3, padding=1).bfloat16(), (7, 4, 6, 7)),
}


class Named(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def setup(name):
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    model = Named(layer).eval()
    batches = [{"x": (torch.rand(n, *shape[1:]) + 0.3).to(layer.weight.dtype)} for n in (shape[0], 2)]
    return model, WeightLayer("layer", layer), batches


def mean_output(layer, weight, batches):
    with torch.no_grad():
        outs = [torch.func.functional_call(layer, {"weight": weight}, (b["x"],)) for b in batches]
    axis = -1 if isinstance(layer, nn.Linear) else 1
    return torch.cat([out.movedim(axis, -1).reshape(-1, out.shape[axis]) for out in outs]).mean(0)


@pytest.mark.parametrize("name", ["linear", "padded", "grouped", "depthwise"])
def test_tap_means_tell_what_an_error_adds_to_the_mean(name):
    model, layer, batches = setup(name)
    means, outputs = tap_means(model, [layer], batches)
    error = torch.randn_like(layer.weight)
    true = mean_output(layer.module, layer.weight + error, batches) - mean_output(layer.module, layer.weight, batches)
    torch.testing.assert_close((error * means["layer"]).flatten(1).sum(1), true, rtol=0, atol=1e-5)
    assert true.abs().max() > 0.1
    assert len(outputs) == 2 and torch.equal(outputs[1], model(**batches[1]))


def test_half_precision_and_layers_without_bias():
    model, layer, batches = setup("half")
    means, _ = tap_means(model, [layer], batches)
    assert means["layer"].dtype == torch.float32 and means["layer"].abs().max() > 0.1
    bare = Named(nn.Linear(4, 4, bias=False))
    assert tap_means(bare, [WeightLayer("layer", bare.layer)], [{"x": torch.randn(2, 4)}])[0] == {}


@pytest.mark.parametrize("kernel", SIDES)
@pytest.mark.parametrize("name", ["linear", "padded", "grouped", "depthwise"])
def test_moments_are_those_of_the_columns(name, kernel):
    model, layer, batches = setup(name)
    with input_moments({"layer": (layer, kernel)}, len(batches), rows=10**6) as moments:
        for batch in batches:
            model(**batch)
    root = moments["layer"].root()
    weight = unfold(layer.weight.detach(), kernel)
    assert root.shape == (weight.shape[1],) * 2 and torch.equal(root, root.tril())
    if kernel == "right" and name in ("linear", "padded"):  # then the output's variance is known
        axis = -1 if name == "linear" else 1
        outs = [model(**batch).detach() for batch in batches]
        rows = torch.cat([out.movedim(axis, -1).reshape(-1, out.shape[axis]) for out in outs])
        found = (weight.double() @ root).square().sum(1)
        torch.testing.assert_close(
            found.float(), rows.var(0, correction=0), rtol=0.1, atol=0
        )  # the ridge adds a little


def test_components_leave_the_least_output_error():
    """Inputs that go together: what plain singular values would give back first, the output hardly misses."""
    torch.manual_seed(0)
    layer = nn.Linear(12, 8, bias=False)
    x = torch.randn(500, 3) @ torch.randn(3, 12) + 0.1 * torch.randn(500, 12)
    model, weights = Named(layer), WeightLayer("layer", layer)
    with input_moments({"layer": (weights, "right")}, 1) as moments:
        model(x=x)
    root = moments["layer"].root()
    error = torch.randn(8, 12, dtype=torch.float64)
    plain, found = factorize("layer", error), factorize("layer", error, root)
    assert found.full_rank == 8
    for rank in range(9):
        left, right = (f.double() for f in found.factors(rank))
        rest = error - fold(left @ right, "right", error.shape)
        torch.testing.assert_close(
            (rest @ root).square().sum(), found.values[rank:].square().sum(), rtol=1e-8, atol=1e-9
        )
        if 0 < rank < 8:
            other = error - fold(torch.mm(*plain.factors(rank)), "right", error.shape)
            assert (x.double() @ rest.T).square().sum() < 0.8 * (x.double() @ other.T).square().sum()


def test_dead_inputs():
    layer = nn.Linear(4, 3)
    with input_moments({"layer": (WeightLayer("layer", layer), "right")}, 1) as moments:
        layer(torch.zeros(5, 4))
    assert torch.equal(moments["layer"].root(), torch.eye(4, dtype=torch.float64))

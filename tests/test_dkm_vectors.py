"""Vector clustering: the order of the vectors, k-means++, gradients, what is left over, dead clusters; and large tensors."""

import copy

import pytest
import torch
from torch import nn

from hf_r2 import R2QuantConfig, convert, prepare, quantize, soft_min_max
from hf_r2.encoders.attention import Attention, attention
from hf_r2.encoders.dkm import DKM, revived, soft_cluster, variance
from hf_r2.encoders.kmeans import kmeans_scalar, kmeans_vectors, nearest_scalar, nearest_vector
from hf_r2.encoders.soft_cluster import SoftCluster
from hf_r2.encoders.soft_scalars import Nodes, SoftScalars
from hf_r2.report import report
from hf_r2.spec import LayerSpec
from hf_r2.vectors import from_columns, from_vectors, to_columns, to_vectors
from tests.models import auto_class, float_model, logits
from tests.reference.clustering import unrolled


@pytest.mark.parametrize("shape", [(6, 4), (7, 3), (5, 2, 3, 3), (4,), (3, 1, 3, 3), (0, 4)])
@pytest.mark.parametrize("dim", [1, 2, 3, 4])
def test_vectors_come_back(shape, dim):
    w = torch.randn(shape)
    vectors, rest = to_vectors(w, dim)
    assert vectors.shape == (w.numel() // dim, dim)
    assert rest.numel() == w.numel() % dim
    assert torch.equal(from_vectors(vectors, rest, shape), w)


@pytest.mark.parametrize("shape", [(6, 4), (7, 3), (8, 2, 3, 3), (5, 2, 3, 3), (4,), (0, 4)])
@pytest.mark.parametrize("dim", [2, 3, 4])
def test_columns_hold_the_same_vectors_without_a_copy(shape, dim):
    w = torch.randn(shape)
    vectors, columns = to_vectors(w, dim)[0], to_columns(w, dim)[0]
    assert columns.shape[1] == dim
    assert sorted(columns.transpose(1, 2).reshape(-1, dim).tolist()) == sorted(vectors.tolist())
    assert torch.equal(from_columns(columns, to_columns(w, dim)[1], shape), w)
    if len(shape) > 1 and shape[0] and shape[0] % dim == 0:
        assert columns.data_ptr() == w.data_ptr()


@pytest.mark.parametrize("chunk", [1, 40, 1 << 18])
def test_chunks_and_layout_do_not_matter(chunk, monkeypatch):
    monkeypatch.setattr("hf_r2.encoders.attention.CHUNK", chunk)
    w, pull = torch.randn(6, 2, 9, dtype=torch.float64), torch.randn(6, 2, 9, dtype=torch.float64)
    flat = w.transpose(1, 2).reshape(-1, 2)
    _, start = soft_cluster(flat, flat[:4], 0.3, 3000, 0.0)
    results = []
    for x, direction in ((w, pull), (flat.T[None], pull.transpose(1, 2).reshape(-1, 2).T[None])):
        leaf = x.clone().requires_grad_()
        soft, c, drawn = SoftCluster.apply(leaf, start, 0.3, 3, 0.0)
        (grad,) = torch.autograd.grad((soft * direction).sum() + c.square().sum(), leaf)
        results.append(
            [t.detach().transpose(1, 2).reshape(-1, 2) for t in (soft, grad)] + [c.detach(), drawn[:, None]]
        )
    leaf = flat.clone().requires_grad_()
    soft, c = unrolled(leaf, start, 0.3, 3)
    ((soft * pull.transpose(1, 2).reshape(-1, 2)).sum() + c.square().sum()).backward()
    for expected in ((soft.detach(), leaf.grad, c.detach(), results[1][3]), results[1]):
        for value, other in zip(results[0], expected, strict=True):
            torch.testing.assert_close(value, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("move", [0.0, 1e-3, 30.0])
@pytest.mark.parametrize("tau", [1e-3, 1.0])
def test_attention_is_right_however_far_centroids_moved(move, tau):
    """Its shift is taken over from the use before only where they moved little."""
    points, c = torch.randn(3, 2, 50, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    seen = Attention(points)
    for at in (c, c + move * torch.randn(5, 2, dtype=torch.float64)):
        expected = attention(points.transpose(0, 1).reshape(2, -1), at, tau)
        found = torch.cat([part.raw * part.norm for part, _ in seen.parts(at, tau)], 1)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-25)


def test_vectors_run_along_the_first_axis():
    w = torch.arange(8.0).view(4, 2)  # two inputs, four output channels
    assert to_vectors(w, 2)[0].tolist() == [[0, 2], [4, 6], [1, 3], [5, 7]]
    kernel = torch.arange(24.0).view(2, 3, 2, 2)
    assert to_vectors(kernel, 2)[0][0].tolist() == [kernel[0, 0, 0, 0], kernel[1, 0, 0, 0]]


@pytest.mark.parametrize("dim", [2, 3, 4])
def test_the_range_loss_sees_the_vectors_that_are_clustered(dim):
    w, alpha = torch.randn(6, 5, 3, dtype=torch.float64), 2.0
    vectors, rest = to_vectors(w, dim)
    widths = [soft_min_max(vectors[:, i].clone(), alpha) - torch.exp(torch.tensor(-alpha)) for i in range(dim)]
    expected = sum(widths) + torch.exp(torch.tensor(-alpha))
    torch.testing.assert_close(soft_min_max(w, alpha, dim=dim), expected.double())
    leaf = w.clone().requires_grad_()
    soft_min_max(leaf, alpha, dim=dim).backward()
    assert (to_vectors(leaf.grad, dim)[1] == 0).all()  # what fills no vector is not pulled
    assert rest.numel() == w.numel() % dim


def test_product_codebook_is_no_better_than_vectors():
    w = torch.randn(8192)
    scalar = kmeans_scalar(w, 4)
    one = (w - scalar[nearest_scalar(w, scalar).long()]).square().mean()
    pairs = w.view(-1, 2)
    vectors = kmeans_vectors(pairs, 16)
    two = (pairs - vectors[nearest_vector(pairs, vectors).long()]).square().mean()
    assert two < one * 1.02  # Lloyd's end in k-means++ starts, against the exact optimum of scalars


def test_kmeans_plus_plus_draws_by_squared_distance():
    """Two far points of 2,000: farthest-first always takes both, D² sampling often enough, uniform draws hardly ever."""
    points = torch.cat([torch.randn(2000, 2) * 0.1, torch.tensor([[50.0, 0.0], [0.0, 50.0]])])
    found = [kmeans_vectors(points, 3, max_iter=1, seed=seed) for seed in range(20)]
    both = sum(bool((c.amax(0) > 40).all()) for c in found)
    assert both >= 16
    spread = torch.cat([torch.zeros(500, 2), torch.ones(500, 2)]) + 0.01 * torch.randn(1000, 2)
    starts = {
        tuple(kmeans_vectors(spread, 2, max_iter=1, seed=seed).flatten().round(decimals=6).tolist())
        for seed in range(20)
    }
    assert len(starts) > 1  # drawn, not the farthest


def test_few_distinct_vectors_are_exact():
    w = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0], [5.0, 6.0]]).T.contiguous()
    encoder = DKM(w, LayerSpec("dkm", 2, options={"dim": 2}))
    assert torch.equal(encoder.eval()(w), w)
    assert torch.equal(encoder.encode(w).decode(), w)


@pytest.mark.parametrize(("shape", "dim"), [((16, 12), 2), ((7, 3), 4), ((1, 3), 4), ((8, 1, 3, 3), 4)])
@pytest.mark.parametrize("mode", [True, False])
def test_left_over_elements_stay_as_they_are(shape, dim, mode):
    w = torch.randn(shape, requires_grad=True)
    encoder = DKM(w, LayerSpec("dkm", 2, options={"dim": dim})).train(mode)
    value = encoder(w)
    rest = to_vectors(value.detach(), dim)[1]
    assert torch.equal(rest, to_vectors(w.detach(), dim)[1])
    value.sum().backward()
    assert torch.isfinite(w.grad).all()
    torch.testing.assert_close(to_vectors(w.grad, dim)[1], torch.ones_like(rest))
    if not mode:
        assert torch.equal(value, encoder.encode(w).decode())
        assert len(encoder.encode(w).codes.unique()) <= 4


def test_dead_clusters_start_anew_beside_the_largest():
    centroids, drawn = torch.tensor([[0.0], [1.0], [9.0], [8.0]]), torch.tensor([30.0, 70.0, 0.0, 0.1])
    moved = revived(centroids, drawn, 4.0)
    torch.testing.assert_close(moved, torch.tensor([[0.0], [1.0], [1.2], [0.2]]))
    w = nn.Parameter(torch.randn(400))
    encoder = DKM(w, LayerSpec("dkm", 3, options={"tau": 1e-3}))
    with torch.no_grad():
        encoder.centroids[-2:] = torch.tensor([[90.0], [99.0]])  # far from every weight
    for _ in range(4):
        encoder(w)
    assert len(encoder.encode(w).codes.unique()) == 8


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("tau", [0.5, 1.0])
@pytest.mark.parametrize("outlier", [0.0, 1.5])
def test_tables_of_large_tensors_agree_with_the_exact_computation(bits, tau, outlier):
    """`tau` in units of the default; close to the critical value the gradient is as good as undefined."""
    w, deviation = torch.randn(150_000 if bits < 8 else 600_000, 1) * 0.05, 0.05
    w[0] = outlier  # stretches the bins
    start, pull = kmeans_scalar(w, 2**bits)[:, None], torch.randn_like(w)
    tau *= 1.6 * 4.0**-bits * deviation**2
    nodes = Nodes.over(w[:, 0], start, tau)
    if nodes is None:
        assert bits >= 4
        return
    results = []
    for function, dtype, more in ((SoftScalars, torch.float32, [nodes]), (SoftCluster, torch.float64, [])):
        x = w.to(dtype).requires_grad_()
        columns = x if more else x.T[None]
        soft, c, drawn = function.apply(columns, start.to(dtype), tau, 3, 0.0, *more)
        soft = soft.view(-1, 1)
        (grad,) = torch.autograd.grad((soft * pull.to(dtype)).sum() + (c * 7).sum(), x)
        results.append([t.double().detach() for t in (soft, c, drawn, grad)])
    (soft, c, drawn, grad), (soft_, c_, drawn_, grad_) = results
    torch.testing.assert_close(soft, soft_, rtol=0, atol=1e-3 * deviation)
    torch.testing.assert_close(c, c_, rtol=0, atol=1e-3 * deviation)
    torch.testing.assert_close(drawn, drawn_, rtol=1e-3, atol=1.0)
    assert nn.functional.cosine_similarity(grad, grad_, dim=0) > 0.999
    assert grad.norm() / grad_.norm() == pytest.approx(1, abs=1e-2)


def test_variance_of_weights_far_from_zero():
    w = torch.randn(5000)
    assert variance(w) == pytest.approx(float(w.double().var(correction=0)), rel=1e-5)
    far = w * 1e-3 + 10
    assert variance(far) == pytest.approx(float(far.double().var(correction=0)), rel=1e-3)


@pytest.mark.parametrize(("bits", "dim"), [(2, 2), (4, 4), (3, 5)])
@pytest.mark.parametrize("name", ["resnet", "mobilebert", "gpt2"])
def test_vector_palettes_pack_and_reload(bits, dim, name, tmp_path):
    packed = quantize(float_model(name), R2QuantConfig("dkm", bits, options={"dim": dim}))
    packed.save_pretrained(tmp_path)
    again = auto_class(name).from_pretrained(tmp_path)
    assert torch.equal(logits(again, name), logits(packed, name))
    for row in report(again)["layers"]:
        count, left = divmod(row["numel"], dim)
        assert row["dim"] == dim
        assert row["stored_bits"] == count * bits + 32 * (2**bits * dim + left)
    plain = again.dequantize()
    torch.testing.assert_close(logits(plain, name), logits(packed, name))


def test_prepared_vectors_train_and_convert():
    model = prepare(copy.deepcopy(float_model("resnet")), R2QuantConfig("dkm", 4, options={"dim": 4})).train()
    weight = model.resnet.encoder.stages[0].layers[0].layer[0].convolution._parameters["weight"]
    before = weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(2, 3, 32, 32)).logits.square().sum().backward()
    optimizer.step()
    assert not torch.equal(weight, before)
    expected = logits(model.eval(), "resnet")
    assert torch.equal(logits(convert(model), "resnet"), expected)


@pytest.mark.parametrize("dim", [0, -1, 1.5, True])
def test_dim_must_be_a_positive_integer(dim):
    with pytest.raises(ValueError, match="dim must be an integer of at least 1"):
        R2QuantConfig("dkm", options={"dim": dim})

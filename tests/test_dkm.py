"""Clustering: golden values of ALGORITHMS 2.2, gradients against the full unroll, limits, equivariances, edges."""

import logging

import pytest
import torch

from hf_r2.encoders.attention import attention
from hf_r2.encoders.dkm import DKM, default_tau, soft_cluster
from hf_r2.encoders.kmeans import kmeans_scalar, nearest_scalar
from hf_r2.encoders.soft_cluster import pulled_back
from hf_r2.spec import LayerSpec
from tests.reference.clustering import optimal_kmeans_error, unrolled

W = torch.tensor([[-3.0], [-1], [1], [3]], dtype=torch.float64)
C = torch.tensor([[-1.0], [1]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("tau", "iterations", "centroid"),
    [
        (1.0, 1, 1.981995357514101),
        (1.0, 2, 1.999639616382045),
        (1.0, 500, 1.999664199161109),
        (2.0, 500, 1.981321320),
        (4.0, 500, 1.852959253),
        (8.0, 2000, 1.256661106),
        (9.5, 20000, 0.66441),
        (10.1, 20000, 0.0),  # above tau_c = 2 Var(W) = 10 everything collapses into the mean
    ],
)
def test_golden_centroids(tau, iterations, centroid):
    _, centroids = soft_cluster(W, C, tau, iterations, 0.0)
    tolerance = 1e-9 if tau < 9 else 1e-5 if tau < 10 else 1e-3
    torch.testing.assert_close(
        centroids, torch.tensor([[-centroid], [centroid]], dtype=torch.float64), rtol=0, atol=tolerance
    )


def test_golden_soft_weights():
    soft, _ = soft_cluster(W, C, 1.0, 500, 0.0)
    expected = torch.tensor([-1.999664199161109, -1.998321221784719, 1.998321221784719, 1.999664199161109])
    torch.testing.assert_close(soft[:, 0], expected.double(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("tau", [0.05, 0.3])
def test_gradient_is_that_of_the_full_unroll(d, tau):
    w = torch.randn(50, d, dtype=torch.float64, requires_grad=True)
    start = w.detach()[:4].clone()
    pull, pull_c = torch.randn(50, d, dtype=torch.float64), torch.randn(4, d, dtype=torch.float64)
    gradients = []
    for soft, centroids in (soft_cluster(w, start, tau, 3000, 0.0), unrolled(w, start, tau, 3000)):
        gradients.append(torch.autograd.grad((soft * pull).sum() + (centroids * pull_c).sum(), w)[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_gradient_of_few_steps_is_that_of_unrolling_them(steps):
    """From a warm start: close to the fixed point."""
    w, pull = torch.randn(60, 2, dtype=torch.float64), torch.randn(60, 2, dtype=torch.float64)
    _, start = soft_cluster(w, w[:4], 0.3, 3000, 0.0)
    gradients = []
    for function, more in ((soft_cluster, [0.0]), (unrolled, [])):
        x = w.clone().requires_grad_()
        soft, _ = function(x, start + 1e-9, 0.3, steps, *more)
        gradients.append(torch.autograd.grad((soft * pull).sum(), x)[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-6)


def test_limits_of_tau():
    w = torch.randn(200, 1, dtype=torch.float64)
    start = torch.tensor([[-1.0], [0.0], [1.0]], dtype=torch.float64)
    soft, centroids = soft_cluster(w, start, 1e-7, 200, 0.0)
    nearest = (w - centroids.T).abs().argmin(1)
    torch.testing.assert_close(soft, centroids[nearest], rtol=0, atol=1e-6)
    for j in range(3):
        torch.testing.assert_close(centroids[j], w[nearest == j].mean(0), rtol=0, atol=1e-6)
    soft, _ = soft_cluster(w, start, 1e4, 200, 0.0)
    torch.testing.assert_close(soft, w.mean().expand_as(soft), rtol=0, atol=1e-3)


def test_equivariances_and_hull():
    w = torch.randn(60, 1, dtype=torch.float64)
    start = torch.tensor([[-1.0], [0.5]], dtype=torch.float64)
    soft, _ = soft_cluster(w, start, 0.2, 300, 0.0)
    order = torch.randperm(60)
    torch.testing.assert_close(soft_cluster(w[order], start, 0.2, 300, 0.0)[0], soft[order])
    torch.testing.assert_close(soft_cluster(3 * w + 2, 3 * start + 2, 9 * 0.2, 300, 0.0)[0], 3 * soft + 2)
    assert w.min() <= soft.min()
    assert soft.max() <= w.max()


def test_histogram_fixed_point_is_that_of_the_weights():
    w = torch.randn(150_000, 1)
    w[0] = 30.0  # an outlier stretches the bins
    start = torch.tensor([[-1.5], [-0.5], [0.5], [1.5]])
    _, centroids = soft_cluster(w, start, 0.1, 100, 1e-6)
    _, expected = unrolled(w.double(), start.double(), 0.1, 100)
    torch.testing.assert_close(centroids.double(), expected, rtol=0, atol=1e-4)  # bins of 35 / 65536 = 5e-4


def test_attention_has_no_denormals():
    columns = attention(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0], [1.0]]), 1e-4)
    torch.testing.assert_close(columns, torch.eye(2))
    assert columns.min() > torch.finfo(torch.float32).tiny


def test_near_the_critical_tau_one_unrolled_step_is_used_and_said(caplog):
    w = W.clone().requires_grad_()
    with caplog.at_level(logging.WARNING):
        soft, _ = soft_cluster(w, torch.zeros_like(C), 10.0, 5, 0.0)
        soft.square().sum().backward()
    assert "critical" in caplog.text
    assert torch.isfinite(w.grad).all()


@pytest.mark.parametrize("tau", [0.0, -1.0, float("nan")])
def test_tau_must_be_positive(tau):
    with pytest.raises(ValueError, match="tau must be a positive number"):
        soft_cluster(W, C, tau)
    with pytest.raises(ValueError, match="tau must be a positive number"):
        DKM(W, LayerSpec("dkm", 1, options={"tau": tau}))


def test_kmeans_finds_the_optimum_of_few_values():
    for k in (2, 3, 4):
        w = torch.randn(12)
        centroids = kmeans_scalar(w, k)
        error = (w - centroids[nearest_scalar(w, centroids).long()]).square().sum().item()
        assert error <= optimal_kmeans_error(w.tolist(), k) * (1 + 1e-5)


def test_kmeans_of_a_gaussian_is_lloyd_max():
    w = torch.distributions.Normal(0, 1).icdf((torch.arange(4096, dtype=torch.float64) + 0.5) / 4096)
    torch.testing.assert_close(kmeans_scalar(w, 2), torch.tensor([-0.797845, 0.797845]), rtol=0, atol=1e-5)
    expected = torch.tensor([-1.5104, -0.4528, 0.4528, 1.5104])
    torch.testing.assert_close(kmeans_scalar(w, 4), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize(("k", "error"), [(2, 0.36338), (4, 0.117482), (8, 0.0345478), (16, 0.00950101)])
def test_kmeans_of_very_many_values_is_lloyd_max(k, error):
    """Errors of ALGORITHMS 2.2, with values far from zero and in no order."""
    normal = torch.distributions.Normal(0, 1).icdf((torch.arange(2_000_000, dtype=torch.float64) + 0.5) / 2_000_000)
    w = (normal[torch.randperm(len(normal))] * 0.5 + 3).float()
    centroids = kmeans_scalar(w, k)
    found = (w - centroids[nearest_scalar(w, centroids).long()]).double().square().mean().item()
    assert found / 0.25 == pytest.approx(error, rel=2e-4)


def test_more_clusters_than_values_is_exact():
    w = torch.tensor([0.3, -1.0, 0.3, 2.5])
    centroids = kmeans_scalar(w, 16)
    torch.testing.assert_close(centroids[nearest_scalar(w, centroids).long()], w, rtol=0, atol=0)


@pytest.mark.parametrize("w", [torch.full((3, 4), 0.7), torch.zeros(2, 2), torch.empty(0, 4)])
def test_degenerate_weights_are_exact_in_both_modes(w):
    encoder = DKM(w, LayerSpec("dkm", 2))
    for mode in (True, False):
        torch.testing.assert_close(encoder.train(mode)(w), w, rtol=0, atol=0)


def test_encoder_trains_the_weight_and_evaluates_what_it_packs():
    w = torch.nn.Parameter(torch.randn(16, 8))
    encoder = DKM(w, LayerSpec("dkm", 2))
    optimizer = torch.optim.SGD([w], lr=0.05)
    target = torch.randn(16, 8)
    losses = []
    for _ in range(30):
        loss = (encoder(w) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    encoder.eval()
    with torch.no_grad():
        torch.testing.assert_close(encoder(w), encoder.encode(w).decode(), rtol=0, atol=0)
    assert encoder(w).unique().numel() <= 4


@pytest.mark.parametrize(
    "changed",
    [{"tau": 0.5}, {"tau": 0.01, "tau_units": "absolute"}, {"max_iter": 1}, {"tol": 10.0}, {"seed": 3, "dim": 2}],
)
def test_every_option_changes_the_result(changed):
    w = torch.randn(4000) * torch.linspace(0.1, 3, 4000)
    usual = {"dim": changed.get("dim", 1)}
    plain, other = DKM(w, LayerSpec("dkm", 4, options=usual)), DKM(w, LayerSpec("dkm", 4, options=changed))
    if "max_iter" in changed or "tol" in changed:
        plain.centroids += 0.3
        other.centroids += 0.3
    assert not torch.equal(plain(w), other(w))


def test_default_tau_keeps_clusters_apart_and_close_to_their_rounding():
    assert [default_tau(2**bits, 1) for bits in (1, 2, 4)] == [0.1, 0.1, 0.00625]
    assert default_tau(16, 4) == 0.1
    w = torch.randn(4000)
    soft, given = DKM(w, LayerSpec("dkm", 4)), DKM(w, LayerSpec("dkm", 4, options={"tau": 0.00625}))
    assert torch.equal(soft(w), given(w))


@pytest.mark.parametrize("radius, settles", [(0.9, True), (1.02, False), (7.0, False)])
def test_a_gradient_of_many_steps_does_not_grow_without_bound(radius, settles):
    """7^100 is beyond float32: the gradient of a clustering that did not settle was NaN."""
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    dfdc, g = radius * turn, torch.randn(3, 2)
    series = sum(torch.linalg.matrix_power(dfdc.T, i) @ g.double().flatten() for i in range(100)).view(3, 2).float()
    torch.testing.assert_close(pulled_back(dfdc, g, 100), series if settles else g)

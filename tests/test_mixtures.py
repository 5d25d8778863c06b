"""Gaussian mixtures against torch.distributions, autograd and Monte Carlo."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from dmd_tutorial.checks import NO_CLASS
from dmd_tutorial.data import ring, two_modes
from dmd_tutorial.mixtures import GaussianMixture


def random_mixture(dim: int, components: int = 3, seed: int = 0) -> GaussianMixture:
    rng = torch.Generator().manual_seed(seed)
    means = 2 * torch.randn(components, dim, generator=rng, dtype=torch.float64)
    root = torch.randn(components, dim, dim, generator=rng, dtype=torch.float64)
    covariances = root @ root.mT + 0.1 * torch.eye(dim, dtype=torch.float64)
    weights = torch.rand(components, generator=rng, dtype=torch.float64) + 0.1
    return GaussianMixture(means, covariances, weights / weights.sum())


def reference(mixture: GaussianMixture, sigma: float) -> MixtureSameFamily:
    noise = sigma**2 * torch.eye(mixture.dim, dtype=torch.float64)
    normal = MultivariateNormal(mixture.means, mixture.covariances + noise)
    return MixtureSameFamily(Categorical(mixture.weights), normal)


@settings(deadline=None, max_examples=30)
@given(
    dim=st.integers(1, 5),
    sigma=st.sampled_from([0.002, 0.05, 0.7, 5.0, 80.0]),
    seed=st.integers(0, 100),
)
def test_density_score_and_denoiser_agree_with_an_independent_library(dim, sigma, seed):
    mixture = random_mixture(dim, seed=seed)
    truth = reference(mixture, sigma)
    x = truth.sample((7,)).requires_grad_()
    log_density = truth.log_prob(x)
    (score,) = torch.autograd.grad(log_density.sum(), x)
    x = x.detach()
    assert torch.allclose(mixture.log_prob(x, sigma), log_density, rtol=1e-8, atol=1e-8)
    assert torch.allclose(mixture.score(x, sigma), score, rtol=1e-6, atol=1e-6)
    assert torch.allclose(mixture(x, sigma), x + sigma**2 * score, rtol=1e-5, atol=1e-6)


def test_denoiser_is_the_conditional_mean_by_monte_carlo():
    mixture, sigma = two_modes(), 1.0
    rng = torch.Generator().manual_seed(0)
    clean = mixture.sample(400_000, rng=rng)
    noisy = clean + sigma * torch.randn(clean.shape, generator=rng)
    point = torch.tensor([[0.5, 0.3]])
    near = clean[(noisy - point).norm(dim=1) < 0.1]
    error = near.std(dim=0) / math.sqrt(len(near))
    # 5 standard errors and the width of the disc
    assert ((near.mean(dim=0) - mixture(point, sigma)[0]).abs() < 5 * error + 0.05).all()


def test_samples_have_the_mixture_s_mean_and_covariance():
    mixture = random_mixture(3)
    x = mixture.sample(200_000, rng=torch.Generator().manual_seed(1)).double()
    mean = (mixture.weights[:, None] * mixture.means).sum(0)
    offset = mixture.means - mean
    covariance = torch.einsum(
        "k,kde->de", mixture.weights, mixture.covariances + offset[:, :, None] * offset[:, None]
    )
    assert torch.allclose(x.mean(0), mean, atol=0.05)
    assert torch.allclose(x.T.cov(), covariance, atol=0.2)


def test_a_label_leaves_one_component():
    mixture, label = ring(8), torch.arange(8)
    single = [GaussianMixture(mixture.means[k : k + 1], mixture.covariances[:1]) for k in range(8)]
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([m(x[k : k + 1], 0.7) for k, m in enumerate(single)])
    assert torch.allclose(mixture(x, 0.7, label), alone, atol=1e-6)
    drawn = mixture.sample(8000, label=torch.arange(8000) % 8)
    read = mixture.responsibilities(drawn).argmax(1)
    assert (read == torch.arange(8000) % 8).float().mean() > 0.99


def test_no_class_means_the_whole_mixture_for_that_sample():
    mixture, rng = random_mixture(2), torch.Generator().manual_seed(0)
    x, sigma = torch.randn(2, 6, 2, generator=rng)[0], torch.rand(6, generator=rng)
    mixed = torch.tensor([NO_CLASS, 0, NO_CLASS, 1, 2, NO_CLASS])
    hidden = mixed == NO_CLASS
    for answer in (mixture, mixture.score, mixture.log_prob, mixture.responsibilities):
        whole, labelled = answer(x, sigma), answer(x, sigma, mixed.clamp_min(0))
        assert torch.equal(answer(x, sigma, torch.full((6,), NO_CLASS)), whole)
        expected = torch.where(hidden if whole.ndim == 1 else hidden[:, None], whole, labelled)
        assert torch.equal(answer(x, sigma, mixed), expected)


def test_samples_without_a_class_are_drawn_by_weight():
    mixture = two_modes(std=0.1)
    mixture = GaussianMixture(mixture.means, mixture.covariances, torch.tensor([0.8, 0.2]))
    label = torch.cat([torch.full((4000,), NO_CLASS), torch.full((1000,), 1)])
    right = mixture.sample(5000, label, torch.Generator().manual_seed(0))[:, 0] > 0
    assert right[4000:].all()
    assert right[:4000].double().mean().item() == pytest.approx(0.2, abs=0.02)
    with pytest.raises(ValueError, match="classes are 0 to 1"):
        mixture.sample(3, torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"label has shape \(2,\), x has batch 3"):
        mixture.sample(3, torch.tensor([0, 1]))


def test_a_mixture_is_exact_whatever_autocast_is_around_it():
    mixture, x = random_mixture(3), 80 * torch.randn(64, 3)
    sigma = torch.logspace(-2, 2, 64)
    for method in (mixture, mixture.score, mixture.log_prob, mixture.responsibilities):
        exact = method(x, sigma)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(method(x, sigma), exact)


def test_float32_and_far_points_stay_finite():
    mixture = ring()
    for scale in (0.0, 1.0, 1e3):
        x = torch.full((2, 2), scale)
        for sigma in (0.0, 0.002, 80.0):
            assert mixture.score(x, sigma).isfinite().all()
            assert mixture(x, sigma).isfinite().all()
            assert mixture(x, sigma).dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GaussianMixture(torch.zeros(3), torch.eye(3)), r"\(components, dim\), not \(3,\)"),
        (lambda: GaussianMixture(torch.zeros(2, 2), torch.eye(2)[None]), "means want"),
        (lambda: GaussianMixture(torch.zeros(1, 2), -torch.eye(2)[None]), "eigenvalue -1"),
        (lambda: GaussianMixture.isotropic(torch.zeros(2, 2), 1.0, torch.ones(2)), "sum to 1"),
        (lambda: two_modes().score(torch.zeros(4, 3)), r"x has shape \(4, 3\).*\(batch, 2\)"),
        (lambda: two_modes().score(torch.full((1, 2), math.nan)), "x is not finite: 2 of 2"),
        (lambda: two_modes()(torch.zeros(4, 2), torch.ones(3)), r"\(3,\), x has batch 4"),
        (lambda: two_modes()(torch.zeros(1, 2), 1.0, torch.tensor([2])), "classes are 0 to 1"),
    ],
)
def test_errors_name_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()

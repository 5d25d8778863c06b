"""Chapter 1: its equations against quadrature, autograd and Monte Carlo, and its claims."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal

from dmd_tutorial import denoisers, noise, samplers
from dmd_tutorial.data import two_modes
from dmd_tutorial.mixtures import GaussianMixture
from dmd_tutorial.networks.mlp import MLP
from dmd_tutorial.notebook.exercises import chapter1

MEANS = torch.tensor([[-1.4, -0.7], [1.5, -0.5], [0.1, 1.5]], dtype=torch.float64)
COVARIANCES = torch.tensor(
    [[[0.16, 0.07], [0.07, 0.08]], [[0.09, 0], [0, 0.09]], [[0.23, -0.06], [-0.06, 0.04]]],
    dtype=torch.float64,
)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
PLANE = GaussianMixture(MEANS, COVARIANCES, WEIGHTS)  # the chapter's target
LINE = GaussianMixture.isotropic(torch.tensor([[-1.0], [0.5], [2.0]]), 0.3, WEIGHTS)
SIGMA = 0.7


def line(points: int = 4001, end: float = 12.0) -> tuple[Tensor, float]:
    """A grid on the line, (points, 1), and its spacing: sums times spacing are integrals."""
    ticks = torch.linspace(-end, end, points, dtype=torch.float64)
    return ticks[:, None], (ticks[1] - ticks[0]).item()


def plane(points: int = 301, end: float = 7.0) -> tuple[Tensor, float]:
    """A grid on the plane, (points**2, 2), and the area of its cells."""
    ticks = torch.linspace(-end, end, points, dtype=torch.float64)
    return torch.cartesian_prod(ticks, ticks), (ticks[1] - ticks[0]).item() ** 2


def joint(sigma: float) -> tuple[Tensor, Tensor, Tensor]:
    """Clean points of LINE, noise, and probabilities: sums over them are expectations."""
    x, dx = line(601, 5.0)
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    n = torch.as_tensor(nodes)[None, :]
    probability = LINE.log_prob(x).exp()[:, None] * dx * torch.as_tensor(weights)
    probability = probability / math.sqrt(2 * math.pi)
    x, n = torch.broadcast_tensors(x, n)
    return x.reshape(-1, 1), n.reshape(-1, 1), probability.flatten()


def gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Gradient of a function that is taken at every point on its own, by autograd."""
    x = x.clone().requires_grad_()
    (answer,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
    return answer


def posterior_mean(points: Tensor, log_prior: Tensor, x_noisy: Tensor, sigma: float) -> Tensor:
    """E[points | x_noisy] by Bayes' rule on a grid, without any formula for the answer."""
    square = ((x_noisy[:, None] - points) ** 2).sum(-1)
    return (log_prior - square / (2 * sigma**2)).softmax(dim=1) @ points


def crude_score(x: Tensor) -> Tensor:
    """Something that a network might answer: not the score of anything in particular."""
    return 0.4 * torch.tanh(2 * x) - 0.7 * x + 0.2


@pytest.mark.equation("1.1")
@pytest.mark.parametrize("sigma", [0.0, 0.5])
def test_score_is_gradient_of_log_density(sigma):
    """The score is the gradient of the log-density (central differences, step 1e-5)."""
    x = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    step = 1e-5
    for axis, e in enumerate(step * torch.eye(2, dtype=torch.float64)):
        slope = (PLANE.log_prob(x + e, sigma) - PLANE.log_prob(x - e, sigma)) / (2 * step)
        torch.testing.assert_close(PLANE.score(x, sigma)[:, axis], slope, rtol=1e-6, atol=1e-6)


@pytest.mark.equation("1.2")
@pytest.mark.parametrize("factor", [1.0, 1e-6, 40.0])
def test_normalisation_drops_out(factor):
    """A constant factor of the density leaves the score alone: Student's t without its constant."""
    x = torch.linspace(-4, 4, 41, dtype=torch.float64)
    score = gradient(lambda x: (factor * (1 + x**2 / 3) ** -2).log(), x)
    step = 1e-5
    normalised = scipy.stats.t(df=3)
    slope = (normalised.logpdf(x + step) - normalised.logpdf(x - step)) / (2 * step)
    torch.testing.assert_close(score, torch.as_tensor(slope), rtol=1e-6, atol=1e-8)


@pytest.mark.equation("1.3")
def test_gaussian_score():
    """The score of a Gaussian is minus the inverse covariance times the offset from the mean."""
    x = torch.randn(20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = gradient(MultivariateNormal(MEANS[0], COVARIANCES[0]).log_prob, x)
    score = -torch.linalg.solve(COVARIANCES[0], (x - MEANS[0]).T).T
    torch.testing.assert_close(score, expected)
    torch.testing.assert_close(GaussianMixture(MEANS[:1], COVARIANCES[:1]).score(x), expected)


@pytest.mark.equation("1.4")
def test_mixture_score_is_average_of_scores():
    """The score of a mixture is the average of its components' scores, by responsibility."""
    x = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = MixtureSameFamily(Categorical(WEIGHTS), MultivariateNormal(MEANS, COVARIANCES))
    parts = [
        gradient(MultivariateNormal(m, c).log_prob, x)
        for m, c in zip(MEANS, COVARIANCES, strict=True)
    ]
    shares = PLANE.responsibilities(x)
    average = sum(shares[:, [k]] * part for k, part in enumerate(parts))
    torch.testing.assert_close(average, gradient(whole.log_prob, x))
    torch.testing.assert_close(PLANE.score(x), average)


def field(x: Tensor) -> Tensor:
    """A vector field that points nowhere in particular."""
    return torch.stack([x[..., 0].sin() + x[..., 1] ** 2, x[..., 0] ** 2 * x[..., 1]], dim=-1)


def divergence(x: Tensor) -> Tensor:
    """The divergence of the field, by autograd."""
    return sum(gradient(lambda x, i=i: field(x)[..., i], x)[..., i] for i in range(2))


@pytest.mark.equation("1.5")
def test_integration_by_parts():
    """The mean of field times score is minus the mean of the field's divergence (quadrature)."""
    x, area = plane()
    p = PLANE.log_prob(x).exp() * area
    left = (p[:, None] * field(x) * PLANE.score(x)).sum()
    right = -(p * divergence(x)).sum()
    assert abs(right) > 0.3  # not 0 = 0
    torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close((p[:, None] * PLANE.score(x)).sum(0), torch.zeros(2).double())


@pytest.mark.equation("1.6")
def test_density_of_noisy_samples():
    """Noisy samples of a uniform variable have the density that the blurring integral gives."""
    count, sigma = 100_000, 0.4
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.rand(count, 1, generator=generator) - 1
    n = torch.randn(count, 1, generator=generator)
    found = noise.add_noise(x, torch.full((count,), sigma), n).flatten().sort().values.numpy()

    ticks, dx = line(2001, 4.0)
    clean = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    density = Normal(clean, sigma).log_prob(ticks).exp().mean(dim=1).numpy()  # p is 1/2 on length 2
    expected = np.interp(found, ticks.flatten().numpy(), np.cumsum(density) * dx - density * dx / 2)
    distance = np.abs(expected - (np.arange(count) + 0.5) / count).max()
    assert distance < 1.95 / math.sqrt(count)  # Kolmogorov and Smirnov, at one in a thousand


@pytest.mark.equation("1.7")
@pytest.mark.parametrize("sigma", [0.2, 1.0])
def test_noise_adds_to_covariances(sigma):
    """A noisy mixture is the mixture with sigma^2 added to each covariance (quadrature)."""
    x, area = plane()
    p = PLANE.log_prob(x).exp() * area
    x_noisy = torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    square = ((x_noisy[:, None] - x) ** 2).sum(-1)
    kernel = (-square / (2 * sigma**2)).exp() / (2 * math.pi * sigma**2)
    torch.testing.assert_close(PLANE.log_prob(x_noisy, sigma).exp(), kernel @ p)
    wider = MultivariateNormal(MEANS, COVARIANCES + sigma**2 * torch.eye(2))
    torch.testing.assert_close(
        PLANE.log_prob(x_noisy, sigma),
        MixtureSameFamily(Categorical(WEIGHTS), wider).log_prob(x_noisy),
    )


def fisher_and_kl(p: GaussianMixture, q: GaussianMixture, sigma: float) -> tuple[Tensor, Tensor]:
    """Mean squared difference of scores, and KL divergence, both under noisy p (quadrature)."""
    x, dx = line(4001, 3 + 9 * math.sqrt(sigma**2 + 0.25))
    weight = p.log_prob(x, sigma).exp() * dx
    fisher = (weight * ((p.score(x, sigma) - q.score(x, sigma)) ** 2).sum(1)).sum()
    return fisher, (weight * (p.log_prob(x, sigma) - q.log_prob(x, sigma))).sum()


@pytest.mark.equation("1.8")
@pytest.mark.parametrize("width", [0.4, 0.5])
def test_kl_is_integral_over_noise_levels(width):
    """The KL divergence is the mean squared score difference, times sigma, over all levels."""
    p = GaussianMixture.isotropic(torch.tensor([[-2.0], [2.0]]), 0.4)
    q = GaussianMixture.isotropic(p.means, width, torch.tensor([0.9, 0.1]))
    log_sigma = torch.linspace(math.log(1e-3), math.log(1e3), 201, dtype=torch.float64)
    fisher = torch.stack([fisher_and_kl(p, q, s)[0] for s in log_sigma.exp().tolist()])
    integral = torch.trapezoid(log_sigma.exp() ** 2 * fisher, log_sigma)
    torch.testing.assert_close(integral, fisher_and_kl(p, q, 0.0)[1], rtol=1e-3, atol=0)


@pytest.mark.equation("1.9")
def test_noisy_score_is_posterior_average():
    """The noisy score is the mean of (x - x_noisy) / sigma^2 over the clean points behind it."""
    x, _ = plane()
    x_noisy = torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    average = (posterior_mean(x, PLANE.log_prob(x), x_noisy, SIGMA) - x_noisy) / SIGMA**2
    torch.testing.assert_close(PLANE.score(x_noisy, SIGMA), average)


@pytest.mark.equation("1.9")
def test_noisy_score_of_uniform_data():
    """The same where the clean density has jumps and no gradient: data uniform on an interval."""
    x_noisy = torch.linspace(-2, 2, 9, dtype=torch.float64)

    def log_density(at: Tensor) -> Tensor:
        unit = Normal(torch.zeros((), dtype=torch.float64), 1)
        return (unit.cdf((at + 1) / SIGMA) - unit.cdf((at - 1) / SIGMA)).log()

    x = torch.linspace(-1, 1, 20_001, dtype=torch.float64)[:, None]
    average = posterior_mean(x, torch.zeros(len(x)), x_noisy[:, None], SIGMA) - x_noisy[:, None]
    score = gradient(log_density, x_noisy)
    torch.testing.assert_close(score, average.flatten() / SIGMA**2, rtol=1e-3, atol=1e-4)


@pytest.mark.equation("1.10")
@pytest.mark.parametrize("sigma", [0.2, 1.0, 3.0])
def test_tweedie(sigma):
    """The mean of the clean points behind a noisy one is x + sigma^2 score (quadrature)."""
    x, _ = plane()
    x_noisy = torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = posterior_mean(x, PLANE.log_prob(x), x_noisy, sigma)
    score = gradient(lambda x: PLANE.log_prob(x, sigma), x_noisy)
    levels = torch.full((8,), sigma, dtype=torch.float64)
    torch.testing.assert_close(x_noisy + sigma**2 * score, expected)
    torch.testing.assert_close(PLANE(x_noisy, sigma), expected)
    torch.testing.assert_close(denoisers.denoised_from_score(x_noisy, score, levels), expected)


@pytest.mark.equation("1.11")
def test_three_readings_of_a_denoiser():
    """The mean noise behind a noisy point is (x - D) / sigma, and minus sigma times the score."""
    x, _ = line(2001, 6.0)
    x_noisy = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None]
    share = (LINE.log_prob(x) - (x_noisy - x.T) ** 2 / (2 * SIGMA**2)).softmax(dim=1)
    mean_noise = (share * (x_noisy - x.T) / SIGMA).sum(dim=1, keepdim=True)
    levels = torch.full((7,), SIGMA, dtype=torch.float64)
    denoised, score = LINE(x_noisy, levels), LINE.score(x_noisy, levels)
    estimate = denoisers.noise_from_denoised(x_noisy, denoised, levels)
    torch.testing.assert_close(estimate, mean_noise)
    torch.testing.assert_close(-SIGMA * score, mean_noise)


@pytest.mark.equation("1.12")
@pytest.mark.parametrize("schedule", [noise.cosine_schedule, noise.linear_schedule])
def test_variance_preserving_score(schedule):
    """One denoiser gives the score of alpha x + sigma n, too, after dividing by alpha."""
    x_t = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for t in (0.05, 0.4, 0.8):
        level = schedule(torch.full((6,), t, dtype=torch.float64))
        alpha, sigma = level.alpha[:, None], level.sigma[:, None]
        a = alpha[0, 0]
        scaled = GaussianMixture(a * MEANS, a**2 * COVARIANCES, WEIGHTS)
        denoised = PLANE(*noise.to_variance_exploding(x_t, level))
        score = (alpha * denoised - x_t) / sigma**2
        torch.testing.assert_close(score, scaled.score(x_t, level.sigma))


@pytest.mark.equation("1.13")
def test_error_splits_at_the_conditional_mean():
    """A denoiser's square error is its distance from the conditional mean, plus a constant."""
    x, n, probability = joint(SIGMA)
    x_noisy = x + SIGMA * n
    best = LINE(x_noisy, SIGMA)
    floor = (probability * ((x - best) ** 2).sum(1)).sum()
    for denoised in (torch.tanh(x_noisy), 0.8 * x_noisy + 0.1, best):
        error = (probability * ((denoised - x) ** 2).sum(1)).sum()
        excess = (probability * ((denoised - best) ** 2).sum(1)).sum()
        torch.testing.assert_close(error, floor + excess, rtol=1e-7, atol=1e-9)
    assert floor > 0.1


@pytest.mark.equation("1.14")
def test_score_matching_without_the_score():
    """Distance to the score is half the square plus the divergence, plus a constant."""
    x, dx = line(4001, 8.0)
    p = LINE.log_prob(x, SIGMA).exp() * dx
    score = LINE.score(x, SIGMA)
    constant = (p * (score**2).sum(1)).sum() / 2
    for model in (crude_score, lambda x: -x, lambda x: (x / 2).sin()):
        distance = (p * ((model(x) - score) ** 2).sum(1)).sum() / 2
        slope = gradient(lambda x, model=model: model(x).sum(1), x)
        without = (p * ((model(x) ** 2).sum(1) / 2 + slope.sum(1))).sum()
        torch.testing.assert_close(distance, without + constant, rtol=1e-8, atol=1e-8)


@pytest.mark.equation("1.15")
@pytest.mark.parametrize("sigma", [0.3, 1.0])
def test_denoising_score_matching(sigma):
    """Matching the conditional score is matching the score, up to a constant that is known."""
    x, n, probability = joint(sigma)
    x_noisy = x + sigma * n
    grid, dx = line(4001, 10.0)
    p = LINE.log_prob(grid, sigma).exp() * dx
    score = LINE.score(grid, sigma)
    constant = (1 / sigma**2 - (p * (score**2).sum(1)).sum()) / 2
    assert constant > 0.1
    for model in (crude_score, lambda x: -x):
        conditional = (probability * ((model(x_noisy) + n / sigma) ** 2).sum(1)).sum() / 2
        distance = (p * ((model(grid) - score) ** 2).sum(1)).sum() / 2
        torch.testing.assert_close(conditional, distance + constant, rtol=1e-6, atol=1e-8)


@pytest.mark.equation("1.16")
def test_denoising_is_score_matching():
    """The score's error is the denoiser's, divided by sigma^2: the losses agree to rounding."""
    torch.manual_seed(0)
    network = MLP(hidden=16, layers=1)
    torch.nn.init.normal_(network.out.weight)
    denoiser = denoisers.EDMDenoiser(network)
    x, n, sigma = torch.randn(40, 2), torch.randn(40, 2), torch.rand(40) + 0.2
    x_noisy = noise.add_noise(x, sigma, n)
    model = denoisers.score_from_denoised(x_noisy, denoiser(x_noisy, sigma), sigma)
    matching = ((model + n / sigma[:, None]) ** 2).sum(1).mean() / 2
    weighted = denoisers.denoising_loss(denoiser, x, sigma, n, weight=lambda s: 1 / (2 * s**4))
    torch.testing.assert_close(2 * weighted, matching)  # the package's loss averages over both axes


@pytest.mark.equation("1.17")
def test_langevin_step_has_its_mean_and_variance():
    """A Langevin step moves by step size times score; its variance is twice the step size."""
    count, step_size = 200_000, 0.03
    x = torch.tensor([[0.4, -0.2]]).repeat(count, 1)
    walk = samplers.langevin(PLANE, x, 0.3, 1, step_size, rng=torch.Generator().manual_seed(0))
    moved = next(walk).x - x
    expected = step_size * PLANE.score(x[:1].double(), 0.3)[0]
    assert expected.norm() > 0.02
    error = math.sqrt(2 * step_size / count)
    assert (moved.mean(0) - expected).abs().max() < 4 * error
    assert (moved.var(0) / (2 * step_size) - 1).abs().max() < 4 * math.sqrt(2 / count)


@pytest.mark.equation("1.18")
def test_langevin_leaves_the_density_alone():
    """To first order in the step size, a Langevin step changes no mean of any function."""
    x, area = plane()

    def function(x: Tensor) -> Tensor:
        return x[:, 0].sin() * x[:, 1] + x[:, 0] ** 2 * x[:, 1]

    slope = gradient(function, x)
    laplacian = sum(gradient(lambda x, i=i: gradient(function, x)[:, i], x)[:, i] for i in range(2))
    p = PLANE.log_prob(x, 0.3).exp() * area
    drift = (p * (slope * PLANE.score(x, 0.3)).sum(1)).sum()
    spread = (p * laplacian).sum()
    assert abs(drift) > 0.1
    torch.testing.assert_close(drift + spread, torch.zeros(()).double(), rtol=0, atol=1e-8)


@pytest.mark.equation("1.19")
@pytest.mark.parametrize("step_size", [0.1, 0.5, 1.2])
def test_langevin_bias_of_a_gaussian(step_size):
    """Steps of finite size leave a Gaussian too wide: variance v / (1 - step size / 2v)."""
    count, sigma = 50_000, 0.6
    unit = GaussianMixture.isotropic(torch.zeros(1, 1), 0.8)  # with the noise: variance 1
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 1, generator=generator)
    *_, last = samplers.langevin(unit, x, sigma, 60, step_size, rng=generator)
    assert last.x.var().item() == pytest.approx(
        1 / (1 - step_size / 2), rel=4 * math.sqrt(2 / count)
    )


@pytest.mark.equation("1.20")
def test_annealed_steps_shrink_with_the_level():
    """Down the ladder the step size is a fixed fraction of sigma^2: variance of a Gaussian."""
    count, ratio, steps, data_variance = 50_000, 0.2, 3, 0.25
    levels = torch.tensor([2.0, 1.0, 0.4])
    narrow = GaussianMixture.isotropic(torch.zeros(1, 1), math.sqrt(data_variance))
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(count, 1, generator=generator)
    walk = samplers.annealed_langevin(
        narrow, z, levels, steps_per_level=steps, step_ratio=ratio, rng=generator
    )
    *_, last = walk
    variance = 4.0
    for sigma in levels.tolist():
        step_size = ratio * sigma**2
        for _ in range(steps):  # x -> (1 - h / v) x + sqrt(2 h) n
            variance = (1 - step_size / (data_variance + sigma**2)) ** 2 * variance + 2 * step_size
    assert abs(variance - data_variance - 0.16) > 0.1  # not yet that of the last level
    assert last.x.var().item() == pytest.approx(variance, rel=4 * math.sqrt(2 / count))


def test_log_of_a_density_that_underflows():
    """Between two narrow modes float32 has density 0, log -inf and score NaN; noise mends it."""
    x = torch.tensor([[0.1, 0.0]])
    narrow = two_modes(std=0.1)

    def naive(x: Tensor) -> Tensor:
        covariances = narrow.covariances.float()
        parts = MultivariateNormal(narrow.means.float(), covariances).log_prob(x[:, None])
        return (narrow.weights.float() * parts.exp()).sum(1).log()

    assert naive(x).item() == -math.inf
    assert gradient(naive, x).isnan().all()
    assert narrow.log_prob(x).item() < -150  # the same number, with its logarithm kept in hand
    assert narrow.log_prob(x, 0.7).item() > -8


def test_low_noise_is_blind_to_weights():
    """Hardly any of the divergence between weights of far modes comes from low noise levels."""
    p = GaussianMixture.isotropic(torch.tensor([[-2.0], [2.0]]), 0.4)
    q = GaussianMixture.isotropic(p.means, 0.4, torch.tensor([0.9, 0.1]))
    kl_clean, kl_noisy = fisher_and_kl(p, q, 0.0)[1], fisher_and_kl(p, q, 0.4)[1]
    assert kl_clean == pytest.approx(math.log(0.5 / 0.9) / 2 + math.log(0.5 / 0.1) / 2, rel=1e-4)
    assert 1 - kl_noisy / kl_clean < 0.02
    assert 1 - fisher_and_kl(p, q, 3.0)[1] / kl_clean > 0.7


def test_best_denoiser_of_points_is_that_of_narrow_modes():
    """A finite data set is a mixture of infinitely narrow modes; its denoiser is exercise 1.3's."""
    generator = torch.Generator().manual_seed(0)
    data, x = torch.randn(2, 9, 2, dtype=torch.float64, generator=generator)
    narrow = GaussianMixture.isotropic(data, 1e-5)
    torch.testing.assert_close(chapter1.best_denoiser(x, data, 0.5), narrow(x, 0.5))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_only_annealed_walks_find_the_weights(seed):
    """Langevin at one low level keeps the shares of its start's basins; annealed ones are right."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(1000, 2, generator=generator)
    levels = noise.karras_grid(25, 0.05, 5.0).flip(0)
    *_, annealed = samplers.annealed_langevin(PLANE, z, levels, steps_per_level=12, rng=generator)
    *_, plain = samplers.langevin(PLANE, 3 * z, 0.05, 300, 0.004, rng=generator)

    def distance(x: Tensor) -> float:
        mode = PLANE.responsibilities(x, 0.05).argmax(1)
        return float((mode.bincount(minlength=3) / len(x) - WEIGHTS).abs().sum() / 2)

    assert distance(annealed.x) < 0.08
    assert distance(plain.x) > 0.13

"""Chapter 11: its equations against closed forms, quadrature and autograd, and its claims."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dmd_tutorial import data, dmd
from dmd_tutorial.denoisers import noise_from_denoised
from dmd_tutorial.dmd import Weighting
from dmd_tutorial.generators import FewStepGenerator
from dmd_tutorial.mixtures import GaussianMixture
from dmd_tutorial.survey import classical
from dmd_tutorial.survey import score_distillation as family

DOUBLE = torch.float64
LINE = torch.linspace(-24, 24, 4801, dtype=DOUBLE)  # sums times the spacing are integrals
SPACING = (LINE[1] - LINE[0]).item()
REAL = GaussianMixture(
    torch.tensor([[-1.5], [1.0]]),
    torch.tensor([[[0.3]], [[0.8]]], dtype=DOUBLE),
    torch.tensor([0.35, 0.65]),
)
FAKE = GaussianMixture(
    torch.tensor([[-0.5], [0.4]]), torch.tensor([[[0.2]], [[0.5]]], dtype=DOUBLE)
)
HERMITE, WEIGHTS = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(80))
WEIGHTS = WEIGHTS / math.sqrt(2 * math.pi)  # nodes and weights of a standard normal


def integral(values: Tensor) -> Tensor:
    return values.sum(-1) * SPACING


def gradient(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    leaf = at.clone().requires_grad_()
    (found,) = torch.autograd.grad(function(leaf).sum(), leaf)
    return found


def levels_of(sigma: float, x: Tensor) -> Tensor:
    return torch.full((len(x),), sigma, dtype=DOUBLE)


@pytest.mark.equation("11.1")
@pytest.mark.parametrize("weighting", [Weighting.NONE, Weighting.EQ8, family.noise_prediction])
def test_the_familys_gradient_is_a_weighted_difference_of_scores(weighting):
    """The difference of two denoisers over the variance is the difference of their scores."""
    x_noisy, x = torch.linspace(-3, 3, 13, dtype=DOUBLE)[:, None], torch.ones(13, 1, dtype=DOUBLE)
    sigma = levels_of(0.8, x)
    real, fake = (mixture(x_noisy, sigma) for mixture in (REAL, FAKE))
    found = dmd.matching_gradient(x, sigma, real, fake, weighting)
    score_real, score_fake = (
        gradient(lambda x, m=m: m.log_prob(x, 0.8), x_noisy) for m in (REAL, FAKE)
    )
    weight = dmd.weight(weighting, x, sigma, real)[:, None]
    torch.testing.assert_close(found, weight * (score_fake - score_real))


@pytest.mark.equation("11.2")
def test_sds_is_the_predicted_noise_minus_the_noise():
    """With the sample itself as the critic's answer the gradient compares two noises."""
    rng = torch.Generator().manual_seed(0)
    x, n = torch.randn(2, 50, 1, dtype=DOUBLE, generator=rng)
    sigma = torch.rand(50, dtype=DOUBLE, generator=rng) * 3 + 0.1
    x_noisy = x + sigma[:, None] * n
    real = REAL(x_noisy, sigma)
    found = dmd.matching_gradient(x, sigma, real, x, family.noise_prediction)
    share = sigma**2 / (1 + sigma**2)
    by_noise = share[:, None] * (noise_from_denoised(x_noisy, real, sigma) - n)
    torch.testing.assert_close(found, by_noise)
    known = family.known_noise(n)(x_noisy, sigma)
    torch.testing.assert_close(known, x)


@pytest.mark.equation("11.3")
def test_sds_descends_the_mean_log_density_of_the_noised_point():
    """Averaged over the noise, the gradient of SDS is that of -E log p_real(x + sigma n)."""
    sigma = 0.8
    points = torch.tensor([-2.0, -1.5, -0.3, 0.4, 2.5], dtype=DOUBLE)

    def energy(x: Tensor) -> Tensor:
        x_noisy = (x[:, None] + sigma * HERMITE).reshape(-1, 1)
        return -(REAL.log_prob(x_noisy, sigma).reshape(len(x), -1) * WEIGHTS).sum(1)

    x = points[:, None].expand(-1, len(HERMITE)).reshape(-1, 1)
    noise = HERMITE.repeat(len(points))[:, None]
    level = levels_of(sigma, x)
    each = dmd.matching_gradient(
        x, level, REAL(x + sigma * noise, level), x, lambda x, s, real: torch.ones_like(s)
    )
    mean = (each.reshape(len(points), -1) * WEIGHTS).sum(1)
    torch.testing.assert_close(mean, gradient(energy, points), atol=1e-7, rtol=1e-7)


@pytest.mark.equation("11.4")
@pytest.mark.parametrize(
    ("weighting", "law"),
    [
        (Weighting.NONE, family.teacher_levels),
        (family.noise_prediction, family.schedule_levels),
    ],
    ids=["Diff-Instruct", "VSD"],
)
def test_weight_and_law_make_an_integral_of_divergences(weighting, law):
    """The mean gradient over a noise law is that of the integral of w_t KL over the law."""
    levels = law(5.0, 0.5)[[250, 500, 750, 980]]
    theta = torch.tensor([-0.4, 0.7], dtype=DOUBLE)

    def divergence(theta: Tensor) -> Tensor:
        total = torch.zeros((), dtype=DOUBLE)
        for sigma in levels:
            spread = (theta[1] ** 2 + sigma**2).sqrt()
            log_fake = torch.distributions.Normal(theta[0], spread).log_prob(LINE)
            log_real = REAL.log_prob(LINE[:, None], sigma.item())
            weight = dmd.weight(weighting, LINE[:1, None], sigma[None], LINE[:1, None])[0]
            total = total + weight * integral(log_fake.exp() * (log_fake - log_real))
        return total / len(levels)

    z = HERMITE[:, None].expand(-1, len(HERMITE)).reshape(-1, 1)
    noise = HERMITE.repeat(len(HERMITE))[:, None]
    weights = torch.outer(WEIGHTS, WEIGHTS).flatten()
    x = theta[0] + theta[1] * z
    fake = GaussianMixture(theta[None, :1], (theta[1] ** 2).reshape(1, 1, 1))
    found = torch.zeros(2, dtype=DOUBLE)
    for sigma in levels:
        level, x_noisy = levels_of(sigma.item(), x), x + sigma * noise
        g = dmd.matching_gradient(x, level, REAL(x_noisy, level), fake(x_noisy, level), weighting)
        slopes = torch.cat([torch.ones_like(z), z], dim=1)
        found += (weights[:, None] * g * slopes).sum(0) / len(levels)
    torch.testing.assert_close(found, gradient(divergence, theta), atol=1e-5, rtol=1e-5)


def cross_entropy(logit: Tensor, sigma: float) -> Tensor:
    """The head's expected loss, each point of the line with its own logit."""
    real, fake = (m.log_prob(LINE[:, None], sigma).exp() for m in (REAL, FAKE))
    losses = nn.functional.softplus
    return integral(real * losses(-logit) + fake * losses(logit))


@pytest.mark.equation("11.5")
def test_the_best_head_knows_the_log_ratio_of_the_densities():
    """The logit log p_data - log p_fake minimises the head's loss, point by point."""
    logit = REAL.log_prob(LINE[:, None], 0.6) - FAKE.log_prob(LINE[:, None], 0.6)
    slope = gradient(lambda logit: cross_entropy(logit, 0.6), logit)
    assert slope.abs().max() < 1e-12
    best = cross_entropy(logit, 0.6)
    rng = torch.Generator().manual_seed(0)
    for _ in range(5):
        other = logit + 0.1 * torch.randn(len(LINE), dtype=DOUBLE, generator=rng)
        assert cross_entropy(other, 0.6) > best + 1e-5
    real, fake = (torch.tensor(v, dtype=DOUBLE) for v in ([0.3, -1.0], [0.8, 2.0]))
    log_likelihood = torch.sigmoid(real).log().mean() + (1 - torch.sigmoid(fake)).log().mean()
    torch.testing.assert_close(classical.discriminator_loss(real, fake), -log_likelihood)


@pytest.mark.equation("11.6")
def test_fooling_the_best_head_is_a_weighted_difference_of_scores():
    """The fooling loss's gradient is p_fake / (p_data + p_fake) times s_fake - s_data."""
    x = torch.linspace(-3, 3, 25, dtype=DOUBLE)[:, None]

    def loss(x: Tensor) -> Tensor:
        logit = REAL.log_prob(x, 0.6) - FAKE.log_prob(x, 0.6)
        return len(x) * classical.generator_loss(logit)

    real, fake = (m.log_prob(x, 0.6).exp() for m in (REAL, FAKE))
    share = (fake / (real + fake))[:, None]
    expected = share * (FAKE.score(x, 0.6) - REAL.score(x, 0.6))
    torch.testing.assert_close(gradient(loss, x), expected)


class Shrink(nn.Module):
    """The exact denoiser of N(0, variance)."""

    def __init__(self, variance: float) -> None:
        super().__init__()
        self.variance = variance

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        return self.variance / (self.variance + sigma[:, None] ** 2) * x


@pytest.mark.equation("11.7")
def test_each_step_starts_from_the_noised_answer_of_the_one_before():
    """With a linear denoiser the variances of all inputs and of the answer have closed forms."""
    levels, variance = (3.0, 1.0, 0.4), 0.5
    generator = FewStepGenerator(Shrink(variance), levels).eval()
    z = torch.randn(50_000, 1, generator=torch.Generator().manual_seed(0))
    expected, now = [], 0.0
    for level in levels:
        now = level**2 if not expected else now + level**2
        expected.append(now)
        now *= (variance / (variance + level**2)) ** 2
    found = [x.var().item() for x in generator.inputs(z)]
    assert found == pytest.approx(expected, rel=0.02)
    assert generator(z).var().item() == pytest.approx(now, rel=0.02)
    assert abs(found[1] - (variance + 1.0)) > 0.2  # noised data would be wider


def fisher(theta: Tensor, real: Tensor, sigma: float) -> Tensor:
    """E |D_real - D_fake|^2 between Gaussians (mean, std), in closed form."""
    (m, s), (m_real, s_real) = theta, real
    k, k_real = s**2 / (s**2 + sigma**2), s_real**2 / (s_real**2 + sigma**2)
    shift = (1 - k_real) * (m_real - m)
    return shift**2 + (k_real - k) ** 2 * (s**2 + sigma**2)


@pytest.mark.equation("11.8")
def test_the_fisher_divergence_is_the_mean_square_difference_of_scores():
    """Over the noised samples, |s_real - s_fake|^2 is |D_real - D_fake|^2 over sigma^4."""
    theta, real = (torch.tensor(v, dtype=DOUBLE) for v in ([-0.4, 0.7], [0.5, 1.1]))
    sigma = 0.8
    density = torch.distributions.Normal(theta[0], (theta[1] ** 2 + sigma**2).sqrt())
    score_fake = gradient(density.log_prob, LINE)
    of_real = torch.distributions.Normal(real[0], (real[1] ** 2 + sigma**2).sqrt())
    score_real = gradient(of_real.log_prob, LINE)
    by_scores = integral(density.log_prob(LINE).exp() * (score_real - score_fake) ** 2)
    torch.testing.assert_close(by_scores, fisher(theta, real, sigma) / sigma**4)


@pytest.mark.equation("11.9")
def test_the_critics_answer_can_be_replaced_by_the_sample_itself():
    """E[f(x_t) D_fake(x_t)] = E[f(x_t) x] for a function of the noisy sample."""
    sigma, total, by_sample = 0.8, 0.0, 0.0
    parts = zip(FAKE.weights, FAKE.means[:, 0], FAKE.variances[:, 0].sqrt(), strict=True)
    for share, mean, std in parts:
        x = (mean + std * HERMITE)[:, None].expand(-1, len(HERMITE)).reshape(-1, 1)
        x_noisy = x + sigma * HERMITE.repeat(len(HERMITE))[:, None]
        weights = share * torch.outer(WEIGHTS, WEIGHTS).flatten()[:, None]
        f = REAL(x_noisy, sigma) - FAKE(x_noisy, sigma)
        total += (weights * f * FAKE(x_noisy, sigma)).sum().item()
        by_sample += (weights * f * x).sum().item()
    assert abs(total) > 0.01
    assert by_sample == pytest.approx(total, rel=1e-6)


# Four equally likely points (z, n) with the first two moments of standard normals: for Gaussian
# generators and exact denoisers everything is quadratic in them, so means over them are exact.
Z = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=DOUBLE)[:, None]
N = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=DOUBLE)[:, None]


def surrogate(theta: Tensor, critic: Tensor, real: Tensor, sigma: float, alpha: float) -> Tensor:
    """`sid_loss` of a Gaussian generator, with the exact denoiser of the Gaussian `critic`."""
    x = theta[0] + theta[1] * Z
    x_noisy = x + sigma * N

    def denoise(mean_std: Tensor) -> Tensor:
        mean, std = mean_std
        return mean + std**2 / (std**2 + sigma**2) * (x_noisy - mean)

    level = torch.full((4,), sigma, dtype=DOUBLE)
    return family.sid_loss(x, level, denoise(real), denoise(critic), alpha, Weighting.NONE)


@pytest.mark.equation("11.10")
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.2])
def test_with_the_exact_critic_the_loss_is_a_multiple_of_the_divergence(alpha):
    """The value of SiD's loss is (1 - alpha) E |D_real - D_fake|^2: 0 or negative from 1 on."""
    theta, real = (torch.tensor(v, dtype=DOUBLE) for v in ([-0.4, 0.7], [0.5, 1.1]))
    value = surrogate(theta, theta, real, 0.8, alpha)
    torch.testing.assert_close(value, (1 - alpha) * fisher(theta, real, 0.8))


@pytest.mark.equation("11.11")
@pytest.mark.parametrize("sigma", [0.3, 0.8, 2.0])
def test_at_alpha_one_half_the_gradient_is_that_of_the_fisher_divergence(sigma):
    """Twice the gradient of SiD's loss at alpha 1/2, critic held still, is the whole gradient."""
    theta, real = (torch.tensor(v, dtype=DOUBLE) for v in ([-0.4, 0.7], [0.5, 1.1]))
    whole = gradient(lambda theta: fisher(theta, real, sigma), theta)
    at = {
        alpha: gradient(lambda t, a=alpha: surrogate(t, theta, real, sigma, a), theta)
        for alpha in (0.0, 0.5, 1.2)
    }
    torch.testing.assert_close(2 * at[0.5], whole)
    assert (2 * at[0.0] - whole).abs().max() > 0.01
    assert (2 * at[1.2] - whole).abs().max() > 0.01


@pytest.mark.equation("11.12")
@pytest.mark.parametrize("std", [0.2, 0.5, 0.9, 2.5])
def test_the_slope_of_sid_in_the_width_of_a_gaussian(std):
    """In closed form; its sign is wrong for samples much too wide once alpha is above 1."""
    real, sigma, alpha = torch.tensor([0.0, 0.5], dtype=DOUBLE), 0.5, 1.2
    theta = torch.tensor([0.0, std], dtype=DOUBLE)
    found = gradient(lambda t: surrogate(t, theta, real, sigma, alpha), theta)[1].item()
    k, k_real = std**2 / (std**2 + sigma**2), 0.5
    expected = 2 * std * (k - k_real) * ((1 - k_real) - alpha * (k - k_real))
    assert found == pytest.approx(expected)
    descends = found * (std - 0.5) >= 0  # a step against the gradient goes towards 0.5
    assert descends == (std < 2.0)


# Claims


def test_one_term_of_sids_gradient_is_the_familys():
    """With both denoisers held still, the loss's derivative by x is `dmd.matching_gradient`."""
    rng = torch.Generator().manual_seed(0)
    x, real, fake = torch.randn(3, 6, 2, dtype=DOUBLE, generator=rng)
    sigma = torch.rand(6, dtype=DOUBLE, generator=rng) + 0.1
    for weighting in (Weighting.NONE, Weighting.EQ8):
        found = gradient(
            lambda x, w=weighting: x.numel() * family.sid_loss(x, sigma, real, fake, 1.2, w), x
        )
        expected = dmd.matching_gradient(x, sigma, real, fake, weighting)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("std_teacher", "towards_data"), [(1.3, 1), (0.7, -1), (1.0, 0)])
def test_the_head_corrects_a_wrong_teacher_and_has_nothing_to_say_about_a_right_one(
    std_teacher, towards_data
):
    """A generator that copies N(0, std_teacher^2) exactly, data N(0, 1), the best head."""
    x_noisy = LINE[LINE.abs() < 8]
    spreads = [(std**2 + 0.5**2) ** 0.5 for std in (1.0, std_teacher)]
    of_data, fake = (torch.distributions.Normal(0.0, spread) for spread in spreads)
    pull = gradient(
        lambda x: len(x) * classical.generator_loss(of_data.log_prob(x) - fake.log_prob(x)), x_noisy
    )
    # in the logarithm of the width
    slope = integral(fake.log_prob(x_noisy).exp() * pull * x_noisy).item()
    if towards_data:
        assert slope * towards_data > 0.1
    else:
        assert slope == pytest.approx(0.0, abs=1e-12)


def test_the_log_density_between_two_modes_is_tiny_without_noise_and_not_with_it():
    """p_real is almost 0, not 1, away from the data; noise fills the gap."""
    modes = data.two_modes(std=0.1)
    middle, peak = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    clean, noisy = (
        (modes.log_prob(peak, s) - modes.log_prob(middle, s)).item() for s in (0.0, 2.0)
    )
    assert modes.log_prob(middle).exp().item() < 1e-80
    assert clean == pytest.approx(2 / 0.1**2 - math.log(2), abs=0.01)
    assert abs(noisy) < 0.6


@pytest.mark.parametrize("sigma", [0.2, 3.0])
def test_subtracting_the_noise_helps_above_the_width_of_the_data_and_hurts_below(sigma):
    """The real score alone has the same mean as SDS, and the smaller variance at low levels."""
    rng = torch.Generator().manual_seed(0)
    x, n = torch.full((20_000, 1), 0.9, dtype=DOUBLE), torch.randn(20_000, 1, generator=rng)
    level = levels_of(sigma, x)
    x_noisy = x + sigma * n
    real = REAL(x_noisy, level)
    sds = dmd.matching_gradient(x, level, real, x, Weighting.NONE)
    score = dmd.matching_gradient(x, level, real, dmd.zero_score(x_noisy, level), Weighting.NONE)
    torch.testing.assert_close(score - sds, sigma * n.double())
    assert (sds - score).mean().abs() < 4 * sigma / 20_000**0.5
    ratio = (sds.var() / score.var()).item()
    assert ratio > 10 if sigma < 1 else ratio < 0.2


def test_a_perfect_generator_is_left_alone_by_a_score_difference_and_not_by_sds():
    x = REAL.sample(4000, rng=torch.Generator().manual_seed(0)).double()
    n = torch.randn(4000, 1, generator=torch.Generator().manual_seed(1)).double()
    sigma = levels_of(0.5, x)
    real = REAL(x + 0.5 * n, sigma)
    assert dmd.matching_gradient(x, sigma, real, REAL(x + 0.5 * n, sigma)).abs().max() == 0
    centre = REAL.means[:, 0][(x > -0.4).long()[:, 0]]
    pull = dmd.matching_gradient(x, sigma, real, x, Weighting.NONE)[:, 0]
    towards = (pull * (x[:, 0] - centre)).mean()  # descending takes x towards its centre
    assert towards > 0.02

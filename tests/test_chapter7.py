"""Chapter 7: its equations against autograd, quadrature and closed forms, and its claims."""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad, solve_ivp
from scipy.stats import norm
from torch import Tensor

from dmd_tutorial import samplers
from dmd_tutorial.data import ring
from dmd_tutorial.metrics import sliced_wasserstein
from dmd_tutorial.mixtures import GaussianMixture
from dmd_tutorial.noise import karras_grid, linear_schedule, sampling_levels
from dmd_tutorial.samplers import multistep

DOUBLE = torch.float64
PLANE = GaussianMixture(
    torch.tensor([[-1.0, 0.4], [1.2, -0.3]]),
    torch.tensor([[[0.3, 0.1], [0.1, 0.2]], [[0.5, 0.0], [0.0, 0.15]]], dtype=DOUBLE),
    torch.tensor([0.4, 0.6]),
)
LINE = GaussianMixture.isotropic(torch.tensor([[-1.0], [0.8]]), 0.4, torch.tensor([0.3, 0.7]))


def points(count: int = 40, dim: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def last(steps):
    *_, final = steps
    return final


def one_step(sampler, denoiser, x: Tensor, sigma: float, after: float, **options) -> Tensor:
    """Where a sampler takes points in one step."""
    (step,) = sampler(denoiser, x / sigma, torch.tensor([sigma, after], dtype=DOUBLE), **options)
    return step.x


def gradient(function, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


def divergence(field, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    value = field(x)
    parts = [
        torch.autograd.grad(value[:, i].sum(), x, retain_graph=True)[0][:, i]
        for i in range(x.shape[1])
    ]
    return sum(parts)


# ------------------------------------------------------------- Langevin, DDPM, DDIM


@pytest.mark.equation("7.1")
def test_score_of_an_energy_model_is_the_gradient_of_its_exponent():
    """The score of exp(f)/Z is the gradient of f, not of log f."""
    weights = torch.tensor([[0.5, -1.0], [2.0, 0.3]], dtype=DOUBLE)

    def f(x):
        return 3 + torch.tanh(x @ weights).sum(dim=1) - 0.1 * (x**2).sum(dim=1)

    x = points()
    x = x[f(x) > 0.5]
    density_gradient = gradient(lambda x: f(x).exp() / 7.3, x)
    score = density_gradient / (f(x).exp() / 7.3)[:, None]
    assert torch.allclose(score, gradient(f, x))
    wrong = gradient(lambda x: f(x).log(), x)
    assert (score - wrong).norm(dim=1).median() > 0.3 * score.norm(dim=1).median()


@pytest.mark.equation("7.2")
def test_annealed_langevin_step_goes_a_fraction_towards_the_denoised_estimate():
    """A Langevin step of size rho sigma^2 goes the fraction rho towards D, and adds noise."""
    x, sigma, rho = points(), 0.7, 0.13
    score = gradient(lambda x: PLANE.log_prob(x, sigma), x)
    rng = torch.Generator().manual_seed(4)
    n = torch.randn(x.shape, generator=rng, dtype=DOUBLE)
    by_score = x + rho * sigma**2 * score + math.sqrt(2 * rho * sigma**2) * n
    by_denoiser = x + rho * (PLANE(x, sigma) - x) + math.sqrt(2 * rho) * sigma * n
    assert torch.allclose(by_score, by_denoiser)
    walk = samplers.annealed_langevin(
        PLANE,
        x / sigma,
        torch.tensor([sigma, 0.1], dtype=DOUBLE),
        steps_per_level=1,
        step_ratio=rho,
        rng=torch.Generator().manual_seed(4),
    )
    assert torch.allclose(next(walk).x, by_denoiser)


@pytest.mark.equation("7.3")
@pytest.mark.parametrize(("sigma", "after"), [(2.0, 1.5), (1.0, 0.1)])
def test_posterior_of_the_next_level(sigma, after):
    """Given clean and noisy sample, the less noisy one is Gaussian: its mean and its variance."""
    clean, noisy = 0.3, -1.1
    middle = math.sqrt(sigma**2 - after**2)

    def product(y):
        return norm.pdf(y, clean, after) * norm.pdf(noisy, y, middle)

    low, high = -15, 15
    at = {"points": [clean, noisy], "limit": 200}
    total = quad(product, low, high, **at)[0]
    mean = quad(lambda y: y * product(y), low, high, **at)[0] / total
    variance = quad(lambda y: (y - mean) ** 2 * product(y), low, high, **at)[0] / total
    kappa = after**2 / sigma**2
    assert mean == pytest.approx(kappa * noisy + (1 - kappa) * clean, rel=1e-6)
    assert variance == pytest.approx(after**2 * (sigma**2 - after**2) / sigma**2, rel=1e-6)
    # and the sampler draws from it, with the denoiser's answer for the clean sample
    x = torch.full((40_000, 1), noisy, dtype=DOUBLE)
    rng = torch.Generator().manual_seed(0)
    drawn = one_step(
        samplers.ancestral, lambda x, s, label=None: clean + 0 * x, x, sigma, after, rng=rng
    )
    assert drawn.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance / 40_000))
    assert drawn.var().item() == pytest.approx(variance, rel=0.03)


@pytest.mark.equation("7.4")
def test_ddpms_schedule_is_a_ladder_of_levels():
    """DDPM's posterior variance over alpha_bar is that of the ladder of levels; all 1000 steps."""
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=DOUBLE)
    products = [math.prod((1 - beta[:t]).tolist()) for t in range(1001)]
    alpha_bar = torch.tensor(products, dtype=DOUBLE)
    sigma = samplers.ddpm_levels().flip(0)
    assert torch.allclose(sigma, ((1 - alpha_bar) / alpha_bar).sqrt(), rtol=1e-9)
    exact_bar = 1 / (1 + sigma**2)
    tilde = (1 - exact_bar[:-1]) / (1 - exact_bar[1:]) * beta
    tau = sigma[:-1] ** 2 * (sigma[1:] ** 2 - sigma[:-1] ** 2) / sigma[1:] ** 2
    assert torch.allclose(tilde / exact_bar[:-1], tau, rtol=1e-9)


@pytest.mark.equation("7.5")
@pytest.mark.parametrize(("sigma", "after"), [(2.0, 1.5), (2.0, 0.3)])
def test_variance_that_ddpm_leaves_out(sigma, after):
    """The variance of the next state is the posterior's and a share of the clean sample's."""
    noisy, kappa = 0.4, after**2 / sigma**2
    middle = math.sqrt(sigma**2 - after**2)

    def density(x, level):
        parts = zip(LINE.weights.tolist(), LINE.means[:, 0].tolist(), strict=True)
        return sum(w * norm.pdf(x, m, math.hypot(0.4, level)) for w, m in parts)

    def variance(weight):
        moments = [quad(lambda x, k=k: x**k * weight(x), -12, 12, limit=200)[0] for k in range(3)]
        return moments[2] / moments[0] - (moments[1] / moments[0]) ** 2

    of_next = variance(lambda y: density(y, after) * norm.pdf(noisy, y, middle))
    of_clean = variance(lambda x: density(x, 0) * norm.pdf(noisy, x, sigma))
    tau_squared = after**2 * (sigma**2 - after**2) / sigma**2
    assert of_next == pytest.approx(tau_squared + (1 - kappa) ** 2 * of_clean, rel=1e-6)
    if after == 0.3:
        assert tau_squared < 0.2 * of_next  # in a long step it is nearly everything


def test_few_steps_of_ddpm_are_too_narrow():
    unit = GaussianMixture.isotropic(torch.zeros(1, 2), 1.0)
    for seed in range(3):
        rng = torch.Generator().manual_seed(seed)
        z = torch.randn(5000, 2, generator=rng)
        few, many = (
            last(samplers.ancestral(unit, z, sampling_levels(n), rng=rng)).x.std().item()
            for n in (5, 200)
        )
        assert few < 0.5
        assert 0.93 < many < 1.02


@pytest.mark.equation("7.6")
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_step_has_old_noise_and_new(eta):
    """DDIM's step: the denoised estimate, some of the noise it found, and new noise."""
    x, sigma, after = points(), 1.4, 0.5
    fresh = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).double()
    found = one_step(
        samplers.ddim, PLANE, x, sigma, after, eta=eta, rng=torch.Generator().manual_seed(2)
    )
    denoised = x + sigma**2 * gradient(lambda x: PLANE.log_prob(x, sigma), x)
    tau = samplers.ddim_noise(sigma, after, eta)
    old = (x - denoised) / sigma
    expected = denoised + math.sqrt(after**2 - tau**2) * old + tau * fresh
    assert torch.allclose(found, expected)


@pytest.mark.equation("7.7")
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_every_amount_of_new_noise_keeps_the_marginals_under_a_known_clean_sample(eta):
    """With the clean sample known, the next state has the noise level sigma' for every tau."""
    rng = torch.Generator().manual_seed(int(10 * eta))
    clean, sigma, after = torch.tensor([[0.7, -0.4]], dtype=DOUBLE), 1.4, 0.5
    x = clean + sigma * torch.randn(40_000, 2, generator=rng).double()
    following = one_step(
        samplers.ddim,
        lambda x, s, label=None: clean.expand_as(x),
        x,
        sigma,
        after,
        eta=eta,
        rng=rng,
    )
    assert torch.allclose(following.mean(dim=0), clean[0], atol=5 * after / 200)
    covariance = after**2 * torch.eye(2, dtype=DOUBLE)
    assert torch.allclose(following.T.cov(), covariance, atol=0.04 * after**2)


@pytest.mark.equation("7.8")
def test_ddims_noise_is_eta_times_the_root_of_ddpms_variance():
    """DDIM's tau is eta times the root of beta_tilde; with beta_tilde itself it is not DDPM's."""
    levels = samplers.ddpm_levels(20).tolist()
    for sigma, after in pairwise(levels[:-1]):
        bar, bar_next = 1 / (1 + sigma**2), 1 / (1 + after**2)
        tilde = (1 - bar_next) / (1 - bar) * (1 - bar / bar_next)  # of DDPM, in its units
        for eta in (0.3, 1.0):
            tau = samplers.ddim_noise(sigma, after, eta)
            assert tau * bar_next**0.5 == pytest.approx(eta * tilde**0.5)
            assert tau * bar_next**0.5 != pytest.approx(eta * tilde, rel=1e-3)


# ------------------------------------------------------------- diffusions


@pytest.mark.equation("7.9")
def test_drift_and_diffusion_of_a_schedule():
    """Drift and diffusion follow from alpha and sigma; in DDPM's limit, minus beta/2 and beta."""
    t = torch.tensor([0.05, 0.3, 0.9], dtype=DOUBLE, requires_grad=True)
    schedule = linear_schedule(t)
    variance = (schedule.sigma / schedule.alpha) ** 2
    (rate,) = torch.autograd.grad(schedule.alpha.log().sum(), t, retain_graph=True)
    (growth,) = torch.autograd.grad(variance.sum(), t)
    for i, moment in enumerate(t.tolist()):
        assert samplers.VP.f(moment) == pytest.approx(rate[i].item())
        expected = (schedule.alpha[i] ** 2 * growth[i]).item()
        assert samplers.VP.g_squared(moment) == pytest.approx(expected)
        assert samplers.VE.f(moment) == 0
        assert samplers.VE.g_squared(moment) == 2 * moment  # sigma = t


def level(process, t: Tensor) -> Tensor:
    """The noise level at a time: t itself, or from the integral of beta, from 0.1 to 20."""
    if process is samplers.VE:
        return t
    return torch.expm1(0.1 * t + (20.0 - 0.1) * t**2 / 2).sqrt()


def log_density(process, x: Tensor, t: Tensor) -> Tensor:
    """Of the state at times t, (batch,), by a mixture with scaled means and covariances."""
    sigma = level(process, t)
    alpha = 1 / (1 + sigma**2).sqrt() if process is samplers.VP else torch.ones_like(t)
    logs = []
    for weight, mean, covariance in zip(PLANE.weights, PLANE.means, PLANE.covariances, strict=True):
        noise = ((alpha * sigma) ** 2)[:, None, None] * torch.eye(2, dtype=DOUBLE)
        noisy = (alpha**2)[:, None, None] * covariance + noise
        offset = x - alpha[:, None] * mean
        square = torch.einsum("bi,bij,bj->b", offset, noisy.inverse(), offset)
        logs.append(weight.log() - square / 2 - noisy.logdet() / 2 - math.log(2 * math.pi))
    return torch.stack(logs).logsumexp(dim=0)


def change_in_time(process, x: Tensor, moment: float) -> Tensor:
    t = torch.full((len(x),), moment, dtype=DOUBLE, requires_grad=True)
    return torch.autograd.grad(log_density(process, x, t).exp().sum(), t)[0]


def density(process, x: Tensor, moment: float) -> Tensor:
    return log_density(process, x, torch.full((len(x),), moment, dtype=DOUBLE)).exp()


def state_score(process, x: Tensor, moment: float) -> Tensor:
    """Score of the state, with a graph."""
    x = x if x.requires_grad else x.clone().requires_grad_()
    value = density(process, x, moment).log().sum()
    return torch.autograd.grad(value, x, create_graph=True)[0]


def laplacian(process, x: Tensor, moment: float) -> Tensor:
    def slope(x):
        value = density(process, x, moment).sum()
        return torch.autograd.grad(value, x, create_graph=True)[0]

    return divergence(slope, x)


PROCESSES = [(samplers.VE, 0.8), (samplers.VE, 2.5), (samplers.VP, 0.2), (samplers.VP, 0.6)]


@pytest.mark.equation("7.10")
@pytest.mark.parametrize(("process", "moment"), PROCESSES)
def test_fokker_planck(process, moment):
    """The density of a diffusion changes by its drift and its blurring (Fokker-Planck)."""
    x = points()
    f, g_squared = process.f(moment), process.g_squared(moment)
    carried = divergence(lambda x: f * x * density(process, x, moment)[:, None], x)
    expected = -carried + g_squared / 2 * laplacian(process, x, moment)
    assert torch.allclose(change_in_time(process, x, moment), expected, rtol=1e-6, atol=1e-10)


@pytest.mark.equation("7.11")
@pytest.mark.parametrize("chance", [0.0, 0.7, 1.0, 2.0])
@pytest.mark.parametrize(("process", "moment"), PROCESSES)
def test_blurring_can_be_moved_into_the_drift(process, moment, chance):
    """The same change of density, with less drift and the blurring reversed, for any chance."""
    x = points()
    f, g_squared = process.f(moment), process.g_squared(moment)

    def current(x):
        score = state_score(process, x, moment)
        drift = f * x - (1 + chance**2) / 2 * g_squared * score
        return drift * density(process, x, moment)[:, None]

    blurred = chance**2 * g_squared / 2 * laplacian(process, x, moment)
    expected = -divergence(current, x) - blurred
    assert torch.allclose(change_in_time(process, x, moment), expected, rtol=1e-6, atol=1e-10)


@pytest.mark.equation("7.12")
@pytest.mark.parametrize("process", [samplers.VE, samplers.VP])
@pytest.mark.parametrize("chance", [0.0, 0.5, 1.0, 1.5])
def test_reverse_diffusions_have_the_same_marginals(process, chance):
    """Backwards in time, every amount of chance keeps the variance of Gaussian data."""
    std = 0.6
    gaussian = GaussianMixture.isotropic(torch.zeros(1, 1), std)
    levels = karras_grid(801, 0.05, 20.0).flip(0)
    # a step is linear: probe its factor with a sampler without noise, and add the noise's variance
    variance = (levels[0] ** 2 + std**2).item()
    start = torch.ones(1, 1, dtype=DOUBLE)
    for sigma, after in zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True):
        t, t_next = process.time(sigma), process.time(after)
        alpha, alpha_next = process.alpha(t), process.alpha(t_next)
        denoised = gaussian(start, sigma)
        score = (denoised - start) / (alpha * sigma**2)
        drift = process.f(t) * alpha * start
        drift = drift - (1 + chance**2) / 2 * process.g_squared(t) * score
        factor = ((alpha * start - (t - t_next) * drift) / alpha_next).item()
        added = chance**2 * process.g_squared(t) * (t - t_next) / alpha_next**2
        variance = factor**2 * variance + added
        assert variance == pytest.approx(after**2 + std**2, rel=0.03)
    # and the package's sampler takes these steps
    rng = torch.Generator().manual_seed(0)
    z = math.sqrt(1 + std**2 / 400) * torch.randn(20_000, 1, generator=rng)
    sampler = samplers.reverse_sde(
        gaussian, z, levels[::8], process=process, chance=chance, rng=rng
    )
    assert last(sampler).x.var().item() == pytest.approx(0.05**2 + std**2, rel=0.12)


@pytest.mark.equation("7.13")
def test_small_steps_of_ddpm_are_those_of_the_reverse_sde():
    """For levels close together, DDPM's two factors become those of the reverse-time SDE."""
    x, sigma = points(), 1.3
    gaps = []
    for gap in (0.1, 0.05, 0.025):
        after = sigma * (1 - gap)
        kappa, tau_squared = (1 - gap) ** 2, samplers.ddim_noise(sigma, after, 1.0) ** 2
        length = sigma - after
        gaps.append([abs(1 - kappa - 2 * gap), abs(tau_squared - 2 * sigma * length)])
        seeds = [torch.Generator().manual_seed(1) for _ in range(2)]
        ours, theirs = (
            one_step(sampler, PLANE, x, sigma, after, rng=seed)
            for sampler, seed in zip((samplers.ancestral, samplers.reverse_sde), seeds, strict=True)
        )
        assert (ours - theirs).abs().max() < 12 * gap**1.5
    for before, after in pairwise(gaps):
        for a, b in zip(before, after, strict=True):
            assert a / b == pytest.approx(4, rel=0.1)  # the rest is of second order


@pytest.mark.equation("7.14")
def test_variance_preserving_density_is_the_exploding_one_in_other_units():
    """The density of the preserving state is that of the exploding one, rescaled."""
    x, moment = points(), 0.4
    alpha = samplers.VP.alpha(moment)
    sigma = level(samplers.VP, torch.tensor(moment, dtype=DOUBLE)).item()
    expected = PLANE.log_prob(x / alpha, sigma) - 2 * math.log(alpha)
    assert torch.allclose(density(samplers.VP, x, moment).log(), expected)
    assert samplers.VP.time(sigma) == pytest.approx(moment)


# ------------------------------------------------------------- classical solvers


@pytest.mark.equation("7.15")
@pytest.mark.parametrize("std", [0.01, 0.5])
def test_rate_of_the_ode_for_gaussian_data(std):
    """For Gaussian data the ODE is linear, and its rate is at most 1/(2 std), at sigma = std."""
    gaussian = GaussianMixture.isotropic(torch.zeros(1, 1), std)
    x = torch.tensor([[0.3]], dtype=DOUBLE)
    levels = torch.logspace(-4, 2, 2001, dtype=DOUBLE)
    rates = torch.stack([(x - gaussian(x, s.item())) / s / x for s in levels]).flatten()
    assert torch.allclose(rates, levels / (std**2 + levels**2))
    assert rates.max().item() == pytest.approx(1 / (2 * std), rel=1e-4)
    assert levels[rates.argmax()].item() == pytest.approx(std, rel=0.01)


@pytest.mark.equation("7.16")
@pytest.mark.parametrize("r", [0.9, 0.3, 0.01])
def test_heuns_step_is_eulers_plus_a_multiple_of_the_difference_of_answers(r):
    """Heun's step is Euler's plus (1/r - 1)/2 times the difference of the two answers."""
    x, sigma = points(), 1.7
    first = PLANE(x, sigma)
    euler = r * x + (1 - r) * first
    second = PLANE(euler, r * sigma)
    expected = euler + (1 / r - 1) / 2 * (second - first)
    assert torch.allclose(one_step(samplers.heun, PLANE, x, sigma, r * sigma), expected)
    assert torch.allclose(one_step(samplers.euler, PLANE, x, sigma, r * sigma), euler)


def test_heun_flings_thin_data_out_and_euler_does_not():
    thin = GaussianMixture.isotropic(torch.zeros(1, 1), 0.01)
    start = torch.ones(1, 1, dtype=DOUBLE)

    def end(sampler, steps, rho):
        return last(sampler(thin, start, sampling_levels(steps, rho=rho))).x.item() / 0.01

    assert end(samplers.heun, 18, 1) > 100
    assert abs(end(samplers.heun, 18, 7) - 1) < 0.3
    for steps in (1, 2, 5, 18):
        for rho in (1, 7):
            assert 0 <= end(samplers.euler, steps, rho) <= 1


# ------------------------------------------------------------- fast solvers


@pytest.mark.equation("7.17")
def test_ode_over_the_logarithm_of_the_level():
    """Over s = -ln sigma the path obeys dx/ds = D - x."""
    x = points(5)

    def slope(sigma, flat):  # the ODE over sigma, (2.10)
        at = torch.as_tensor(flat).reshape(5, 2)
        return ((at - PLANE(at, float(sigma))) / sigma).flatten().numpy()

    path = solve_ivp(
        slope, (2.0, 0.5), x.flatten().numpy(), dense_output=True, rtol=1e-10, atol=1e-10
    )
    s, h = -math.log(1.1), 1e-4
    before, here, after = (
        torch.as_tensor(path.sol(math.exp(-t))).reshape(5, 2) for t in (s - h, s, s + h)
    )
    assert torch.allclose((after - before) / (2 * h), PLANE(here, 1.1) - here, atol=1e-5)


@pytest.mark.equation("7.18")
def test_exact_solution_with_an_integral_of_answers():
    """A step of the path is exp(-h) times the start plus the integral of exp(u) D(u)."""
    std, sigma, after, x = 0.7, 1.9, 0.2, 1.3
    h = math.log(sigma / after)

    def answer(r):  # on the exact path of Gaussian data
        here = sigma * math.exp(-r)
        on_path = x * math.sqrt((std**2 + here**2) / (std**2 + sigma**2))
        return std**2 / (std**2 + here**2) * on_path

    integral, _ = quad(lambda r: math.exp(r) * answer(r), 0, h, epsabs=1e-12)
    exact = x * math.sqrt((std**2 + after**2) / (std**2 + sigma**2))
    assert math.exp(-h) * (x + integral) == pytest.approx(exact, rel=1e-9)
    weights = quad(lambda r: math.exp(r - h), 0, h)[0] + math.exp(-h)
    assert weights == pytest.approx(1)  # a weighted mean


@pytest.mark.equation("7.19")
def test_two_step_method_of_dpm_solver():
    """DPM-Solver++(2M) is right to second order where the answer is a known function of time."""

    def error(h):
        sigma, x = 1.5, torch.tensor([[0.4]], dtype=DOUBLE)
        sizes = (0.8 * h, h)  # steps of unequal length
        before, after = sigma * math.exp(sizes[0]), sigma * math.exp(-sizes[1])
        newest, older = (torch.tensor([[math.sin(1 + 2 * r)]]).double() for r in (0.0, -sizes[0]))
        exact = math.exp(-h) * (
            x.item() + quad(lambda r: math.exp(r) * math.sin(1 + 2 * r), 0, h)[0]
        )
        step = multistep.linear_step(x, [(sigma, newest), (before, older)], after)
        kept = after / sigma
        formula = kept * x + (1 - kept) * (newest + h / 2 * (newest - older) / sizes[0])
        assert torch.allclose(step, formula)
        return abs(step.item() - exact)

    assert math.log2(error(0.04) / error(0.02)) == pytest.approx(3, abs=0.1)  # of one step


@pytest.mark.equation("7.20")
@pytest.mark.parametrize("h", [0.05, 1.0, 5.0])
def test_integrals_of_the_parabola(h):
    """The integrals of exp(u - h) times 1, u and u^2, and the step that they make exact."""
    zero = 1 - math.exp(-h)
    one = h - zero
    for power, expected in enumerate((zero, one, h**2 - 2 * one)):
        found = quad(lambda r, k=power: math.exp(r - h) * r**k, 0, h, epsabs=1e-14)[0]
        assert found == pytest.approx(expected, rel=1e-7)
    x, parabola = torch.tensor([[0.4]], dtype=DOUBLE), np.polynomial.Polynomial([0.3, -1.1, 0.7])
    nodes = (0.0, -0.3, -0.9)
    history = [(math.exp(-r), torch.tensor([[parabola(r)]])) for r in nodes]
    integral = quad(lambda r: math.exp(r) * parabola(r), 0, h, epsabs=1e-12)[0]
    exact = math.exp(-h) * (0.4 + integral)
    assert multistep.quadratic_step(x, history, math.exp(-h)).item() == pytest.approx(exact)
    half = multistep.quadratic_step(x, history, math.exp(-h), share=0.5).item()
    assert half == pytest.approx(exact - 0.7 * (h**2 - 2 * one) / 2)


def polynomial_denoiser(parabola, *, of_noise: bool):
    """Answers that are a polynomial of -ln sigma: the noise estimates, or the denoised ones."""

    def denoise(x, sigma, label=None):
        value = parabola(-math.log(sigma[0].item()))
        return x - sigma[:, None] * value if of_noise else torch.full_like(x, value)

    return denoise


@pytest.mark.equation("7.21")
def test_deis_integrates_polynomial_noise_exactly():
    """DEIS is exact where the noise estimate is a parabola in the logarithm of the level."""
    parabola = np.polynomial.Polynomial([0.5, 0.4, -0.3])
    levels = torch.tensor([2.0, 1.4, 0.9, 0.3], dtype=DOUBLE)
    steps = list(
        samplers.deis(
            polynomial_denoiser(parabola, of_noise=True), torch.ones(1, 1).double(), levels
        )
    )
    before, final = steps[1].x.item(), steps[2].x.item()  # the third step has three estimates
    exact = before + quad(lambda s: parabola(-math.log(s)), 0.9, 0.3)[0]
    assert final == pytest.approx(exact, rel=1e-9)
    assert final != pytest.approx(before + (0.3 - 0.9) * parabola(-math.log(0.9)), rel=1e-2)


@pytest.mark.equation("7.22")
def test_unipc_corrects_with_the_answer_at_the_end():
    """UniPC's corrected step is exact for a parabola through the new answer and two old ones."""
    parabola = np.polynomial.Polynomial([0.5, 0.4, -0.3])
    denoise = polynomial_denoiser(parabola, of_noise=False)
    x = torch.tensor([[0.8]], dtype=DOUBLE)
    history = [(s, denoise(x, torch.tensor([s], dtype=DOUBLE))) for s in (0.5, 1.0, 1.6)]
    corrected = multistep.corrected_step(x, history).item()  # from 1.0 to 0.5
    h = math.log(2.0)
    exact = math.exp(-h) * (0.8 + quad(lambda r: math.exp(r) * parabola(r), 0, h)[0])
    assert corrected == pytest.approx(exact, rel=1e-9)
    predicted = multistep.predict(x, history[1:], 0.5).item()
    assert abs(predicted - exact) > 1e-2


# ------------------------------------------------------------- claims


def test_with_few_steps_extrapolated_answers_are_worse_than_ddim_on_the_ring_and_noise_better():
    reference = ring().sample(4000, rng=torch.Generator().manual_seed(1))
    for seed in range(2):
        z = torch.randn(500, 2, generator=torch.Generator().manual_seed(seed))
        found = {
            name: sliced_wasserstein(
                last(sampler(ring(), z, sampling_levels(5, 0.02))).x.float(), reference
            )
            for name, sampler in (
                ("ddim", samplers.ddim),
                ("dpm", samplers.dpm_solver),
                ("deis", samplers.deis),
                ("vp", partial(samplers.probability_flow, process=samplers.VP)),
                ("sde", partial(samplers.reverse_sde, rng=torch.Generator().manual_seed(0))),
            )
        }
        assert found["deis"] < 0.8 * found["ddim"] < found["dpm"]
        assert found["vp"] < 0.8 * found["ddim"]
        assert found["sde"] > 10 * found["ddim"]


def test_points_decide_for_a_mode_of_the_ring_within_one_of_five_steps():
    mixture = ring()
    levels = [level for level in sampling_levels(5, 0.02).tolist() if 0.3 < level < 5]
    assert levels == [pytest.approx(4.0, abs=0.1), pytest.approx(0.46, abs=0.1)]
    z = torch.randn(200, 2, generator=torch.Generator().manual_seed(0)).double()
    records = list(samplers.heun(mixture, z, karras_grid(200, 0.02, 80.0).flip(0)))
    chosen = torch.cdist(records[-1].x, mixture.means.double()).argmin(dim=1)

    def chance_of_chosen(level):
        at = min(records, key=lambda step: abs(step.sigma - level))
        variance = mixture.covariances[0, 0, 0] + at.sigma**2
        square = torch.cdist(at.x, mixture.means.double()) ** 2
        chances = (-square / (2 * variance)).softmax(dim=1)
        return chances.gather(1, chosen[:, None]).median()

    before, after = (chance_of_chosen(level) for level in levels)
    assert before < 0.25  # of 1/8 if nothing is known
    assert after > 0.9

"""Chapter 2: its equations against regression, autograd, quantiles, scipy and Monte Carlo."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.optimize import minimize_scalar
from scipy.stats import norm
from torch import Tensor, nn

from dmd_tutorial import denoisers, generators, noise, pretrained, samplers
from dmd_tutorial.data import balanced_labels, digits, normal
from dmd_tutorial.mixtures import GaussianMixture
from dmd_tutorial.notebook.exercises import chapter2

SIGMA_DATA = 0.5
LEVELS = [0.002, 0.1, 0.5, 3.0, 80.0]
SKEWED = torch.tensor([-0.25, 1.0], dtype=torch.float64)  # drawn 4 : 1, mean 0, variance 1/4
PLANE = GaussianMixture(
    torch.tensor([[-1.4, -0.7], [1.5, -0.5], [0.1, 1.5]]),
    torch.tensor(
        [[[0.16, 0.07], [0.07, 0.08]], [[0.09, 0], [0, 0.09]], [[0.2, -0.06], [-0.06, 0.1]]]
    ),
    torch.tensor([0.5, 0.3, 0.2]),
)
CENTRES, STD, SHARES = (-2.0, 2.0), 0.4, (0.4, 0.6)
LINE = GaussianMixture.isotropic(torch.tensor(CENTRES)[:, None], STD, torch.tensor(SHARES))


def skewed_data(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Clean values of mean 0 and variance 1/4 that are far from Gaussian, and noise."""
    rng = torch.Generator().manual_seed(seed)
    index = torch.multinomial(torch.tensor([0.8, 0.2]), count, replacement=True, generator=rng)
    return SKEWED[index], torch.randn(count, generator=rng, dtype=torch.float64)


def points(count: int, sigma: float, seed: int = 0) -> Tensor:
    """Noisy points of PLANE, float64."""
    rng = torch.Generator().manual_seed(seed)
    x = PLANE.sample(count, rng=rng).double()
    return x + sigma * torch.randn(x.shape, generator=rng, dtype=torch.float64)


def levels_of(x: Tensor, sigma: float) -> Tensor:
    return torch.full((len(x),), sigma, dtype=x.dtype)


def gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Derivative of a function of each row (or number) on its own, differentiable again."""
    if not x.requires_grad:
        x = x.clone().requires_grad_()
    (answer,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
    return answer


def divergence(field: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Sum over the axes of the derivative of a vector field along each, by autograd."""
    x = x.clone().requires_grad_()
    value = field(x)
    columns = [
        torch.autograd.grad(value[:, i].sum(), x, create_graph=True)[0][:, i]
        for i in range(x.shape[1])
    ]
    return sum(columns)


def share_to_the_left(y: np.ndarray, sigma: float) -> np.ndarray:
    """Distribution function of LINE at a noise level, by scipy."""
    spread = math.hypot(STD, sigma)
    parts = [w * norm.cdf(y, c, spread) for w, c in zip(SHARES, CENTRES, strict=True)]
    return np.sum(parts, axis=0)


def quantiles(share: np.ndarray, sigma: float) -> np.ndarray:
    """Where the distribution function of LINE reaches each share, by bisection."""
    low, high = np.full_like(share, -1e3), np.full_like(share, 1e3)
    for _ in range(90):
        middle = (low + high) / 2
        left = share_to_the_left(middle, sigma) < share
        low, high = np.where(left, middle, low), np.where(left, high, middle)
    return (low + high) / 2


def log_density(y: np.ndarray, sigma: float) -> np.ndarray:
    """Log-density of LINE at a noise level, by scipy."""
    spread = math.hypot(STD, sigma)
    parts = [math.log(w) + norm.logpdf(y, c, spread) for w, c in zip(SHARES, CENTRES, strict=True)]
    return np.logaddexp(*parts)


def slope_of_line(sigma: float, y: np.ndarray) -> np.ndarray:
    """Minus sigma times the score of LINE, its derivative taken numerically."""
    step = 1e-5 * math.hypot(STD, sigma)
    score = (log_density(y + step, sigma) - log_density(y - step, sigma)) / (2 * step)
    return -sigma * score


# ------------------------------------------------------------------ preconditioning


class Recorder(nn.Module):
    """A raw network that remembers what it was given, and answers a constant."""

    classes = 0

    def __init__(self, answer: float) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        self.x, self.c_noise = x, c_noise
        return torch.full_like(x, self.answer)


@pytest.mark.equation("2.1")
@pytest.mark.parametrize("sigma", LEVELS)
def test_a_silent_network_leaves_the_exact_denoiser_of_gaussian_data(sigma):
    """A denoiser is a direct path plus a scaled network that sees scaled input and ln(sigma)/4."""
    gaussian = GaussianMixture.isotropic(torch.zeros(1, 3), SIGMA_DATA)
    x = sigma * torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).double() + 0.2
    level = levels_of(x, sigma)
    silent, loud = Recorder(0.0), Recorder(1.0)
    denoised = denoisers.EDMDenoiser(silent)(x, level)
    torch.testing.assert_close(denoised, gaussian(x, level))
    # the voice of the network: the standard deviation of the clean Gaussian given the noisy one
    voice = denoisers.EDMDenoiser(loud)(x, level) - denoised
    precision = 1 / SIGMA_DATA**2 + 1 / sigma**2
    torch.testing.assert_close(voice, torch.full_like(x, precision**-0.5))
    # what the network sees: the input over its standard deviation, the logarithm over four
    torch.testing.assert_close(loud.x * math.hypot(sigma, SIGMA_DATA), x)
    torch.testing.assert_close(torch.exp(4 * loud.c_noise), level)


@pytest.mark.equation("2.2")
@pytest.mark.parametrize("sigma", LEVELS)
def test_denoising_loss_is_a_regression_of_the_network(sigma):
    """The denoising loss is a regression of the network on a scaled target."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2)).double()

    class Raw(nn.Module):
        def forward(self, x, c_noise, label=None):
            return network(x)

    x, n = torch.randn(2, 64, 2, dtype=torch.float64)
    level = levels_of(x, sigma)
    loss = denoisers.denoising_loss(denoisers.EDMDenoiser(Raw()), x, level, n)
    c_skip, c_out, c_in, _ = (c[0] for c in denoisers.edm_preconditioning(level))
    target = (x - c_skip * (x + sigma * n)) / c_out
    regression = ((network(c_in * (x + sigma * n)) - target) ** 2).mean()
    torch.testing.assert_close(loss, regression)
    for ours, theirs in zip(
        torch.autograd.grad(loss, network.parameters()),
        torch.autograd.grad(regression, network.parameters()),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.equation("2.3")
@pytest.mark.parametrize("sigma", LEVELS)
def test_input_of_the_network_has_unit_variance(sigma):
    """First requirement: c_in gives the network's input variance 1 at every noise level."""
    x, n = skewed_data(200_000)
    c_in = denoisers.edm_preconditioning(torch.tensor([sigma]).double()).c_in
    # the sample variance of 200,000 values with kurtosis below 4 has a standard error below 0.4 %
    assert (c_in * (x + sigma * n)).var().item() == pytest.approx(1, abs=0.015)


@pytest.mark.equation("2.4")
@pytest.mark.parametrize("sigma", [0.1, 0.5, 3.0])
@pytest.mark.parametrize("c_skip", [0.0, 0.3, 1.0])
def test_target_has_unit_variance_for_any_direct_path(sigma, c_skip):
    """Second requirement: c_out^2 is the variance that the direct path leaves to the network."""
    x, n = skewed_data(200_000, seed=1)
    c_out = math.sqrt((1 - c_skip) ** 2 * SIGMA_DATA**2 + c_skip**2 * sigma**2)
    target = (x - c_skip * (x + sigma * n)) / c_out
    assert target.var().item() == pytest.approx(1, abs=0.015)


@pytest.mark.equation("2.4")
@pytest.mark.parametrize("sigma", LEVELS)
def test_target_has_unit_variance_with_the_package_s_factors(sigma):
    """Second requirement, for the package: the network's target has variance 1."""
    x, n = skewed_data(200_000, seed=2)
    c_skip, c_out, _, _ = denoisers.edm_preconditioning(torch.tensor([sigma]).double())
    assert ((x - c_skip * (x + sigma * n)) / c_out).var().item() == pytest.approx(1, abs=0.015)


@pytest.mark.equation("2.5")
@pytest.mark.parametrize("sigma", [0.1, 0.5, 3.0])
def test_c_skip_is_the_regression_coefficient_of_clean_on_noisy(sigma):
    """Third requirement: c_skip leaves as little as possible, like linear regression."""
    x, n = skewed_data(200_000, seed=3)
    x_noisy = x + sigma * n
    regression = (x * x_noisy).mean() / x_noisy.square().mean()
    c_skip = denoisers.edm_preconditioning(torch.tensor([sigma]).double()).c_skip.item()
    assert regression.item() == pytest.approx(c_skip, abs=0.01)
    best = minimize_scalar(lambda c: (x - c * x_noisy).var().item(), bounds=(0, 1))
    assert best.x == pytest.approx(c_skip, abs=0.01)


@pytest.mark.equation("2.6")
@pytest.mark.parametrize("sigma", LEVELS)
def test_c_out_is_the_least_error_of_a_linear_guess_and_the_weight_undoes_it(sigma):
    """c_out is the least error of a linear guess; the weight is one over its square."""
    least = minimize_scalar(
        lambda c: (1 - c) ** 2 * SIGMA_DATA**2 + (c * sigma) ** 2,
        bounds=(0, 1),
        method="bounded",
        options={"xatol": 1e-14},
    )
    level = torch.tensor([sigma]).double()
    c_out = denoisers.edm_preconditioning(level).c_out.item()
    assert c_out**2 == pytest.approx(least.fun, rel=1e-6)
    assert denoisers.denoising_weight(level).item() * c_out**2 == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("sigma", LEVELS)
def test_unit_target_is_minus_v_for_data_of_unit_spread(sigma):
    x, n = torch.randn(2, 5, 3, dtype=torch.float64)
    level = levels_of(x, sigma)
    c_skip, c_out, _, _ = (c[0] for c in denoisers.edm_preconditioning(level, sigma_data=1.0))
    x_noisy = x + sigma * n
    v = denoisers.v_from_denoised(x_noisy, x, level)
    torch.testing.assert_close((x - c_skip * x_noisy) / c_out, -v)


def test_predicting_the_clean_or_the_noise_never_amplifies_less():
    sigma = noise.karras_grid(500)
    c_out = denoisers.edm_preconditioning(sigma).c_out
    assert (c_out < SIGMA_DATA).all()
    assert (c_out < sigma).all()


# ------------------------------------------------------------------ the ODE


@pytest.mark.equation("2.7")
@pytest.mark.parametrize("sigma", [0.05, 0.4, 2.0, 30.0])
def test_noisy_density_obeys_the_heat_equation(sigma):
    """The noisy density spreads by the heat equation: its rate is sigma times its Laplacian."""
    x = points(200, sigma)
    level = levels_of(x, sigma)
    rate = gradient(lambda s: PLANE.log_prob(x, s).exp(), level)

    def slope(y: Tensor) -> Tensor:
        return gradient(lambda at: PLANE.log_prob(at, level).exp(), y)

    laplacian = divergence(slope, x)
    scale = PLANE.log_prob(x, level).exp().max().item() / sigma
    torch.testing.assert_close(rate, sigma * laplacian, rtol=1e-8, atol=1e-10 * scale)


@pytest.mark.equation("2.8")
def test_points_that_move_obey_the_continuity_equation():
    """The continuity equation: the density of moving points changes by what flows in and out."""
    # a linear flow that turns, stretches and shears, and a Gaussian cloud carried by it
    flow = torch.tensor([[0.3, -0.8], [0.5, -0.4]], dtype=torch.float64)
    start = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64)
    x = torch.randn(100, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def density(y: Tensor, times: Tensor) -> Tensor:
        carry = torch.linalg.matrix_exp(times[:, None, None] * flow)
        covariance = carry @ start @ carry.mT
        return (
            torch.distributions.MultivariateNormal(torch.zeros(2).double(), covariance)
            .log_prob(y)
            .exp()
        )

    times = torch.full((100,), 0.7, dtype=torch.float64)
    rate = gradient(lambda t: density(x, t), times)
    outflow = divergence(lambda y: density(y, times)[:, None] * (y @ flow.T), x)
    torch.testing.assert_close(rate, -outflow, rtol=1e-8, atol=1e-12)


@pytest.mark.equation("2.9")
@pytest.mark.parametrize("sigma", [0.05, 0.4, 2.0, 30.0])
def test_velocity_of_minus_sigma_score_carries_the_noisy_density(sigma):
    """The probability-flow ODE: velocity -sigma times the score keeps samples of p_sigma."""
    x = points(200, sigma, seed=1)
    level = levels_of(x, sigma)
    rate = gradient(lambda s: PLANE.log_prob(x, s).exp(), level)

    def flux(y: Tensor) -> Tensor:
        density = PLANE.log_prob(y, level).exp()
        return density[:, None] * (-sigma * PLANE.score(y, level))

    scale = PLANE.log_prob(x, level).exp().max().item() / sigma
    torch.testing.assert_close(rate, -divergence(flux, x), rtol=1e-8, atol=1e-10 * scale)


@pytest.mark.equation("2.9")
def test_ode_turns_noise_into_samples_of_the_plane_s_mixture():
    """The probability-flow ODE carries noise to samples of the data: moments and shares agree."""
    count = 20_000
    z = normal(count, (2,), torch.Generator().manual_seed(0)).double()
    x = samplers.sample(PLANE, z, steps=60, batch=count)
    share = PLANE.responsibilities(x).mean(dim=0)
    mean = PLANE.weights @ PLANE.means
    square = PLANE.covariances + PLANE.means[:, :, None] * PLANE.means[:, None, :]
    covariance = torch.einsum("k,kij->ij", PLANE.weights, square) - torch.outer(mean, mean)
    # standard errors with 20,000 samples are below 0.01 for all of these
    torch.testing.assert_close(share, PLANE.weights, atol=0.015, rtol=0)
    torch.testing.assert_close(x.mean(dim=0), mean, atol=0.04, rtol=0)
    torch.testing.assert_close(x.T.cov(), covariance, atol=0.06, rtol=0)


@pytest.mark.equation("2.10")
@pytest.mark.parametrize("sigma", [0.002, 0.4, 80.0])
def test_slope_from_the_denoiser_is_minus_sigma_times_autograd_s_score(sigma):
    """In terms of the denoiser the slope of the ODE is (x - D) / sigma, the estimated noise."""
    x = points(200, sigma, seed=2)
    level = levels_of(x, sigma)
    score = gradient(lambda y: PLANE.log_prob(y, level), x)
    slope = denoisers.noise_from_denoised(x, PLANE(x, level), level)
    torch.testing.assert_close(slope, -sigma * score.detach(), rtol=1e-6, atol=1e-8)


@pytest.mark.equation("2.11")
def test_share_of_points_to_the_left_is_kept_along_a_path():
    """On a line, the share of points to the left of a moving point never changes."""
    share = np.linspace(0.01, 0.99, 25)
    solution = solve_ivp(
        slope_of_line, (20.0, 0.05), quantiles(share, 20.0), rtol=1e-9, atol=1e-9,
        t_eval=[20.0, 3.0, 1.0, 0.3, 0.05],
    )  # fmt: skip
    for sigma, y in zip(solution.t, solution.y.T, strict=True):
        np.testing.assert_allclose(share_to_the_left(y, sigma), share, atol=1e-5)


@pytest.mark.equation("2.12")
@pytest.mark.parametrize("sigma", [0.3, 1.0, 3.0])
def test_path_bends_as_the_denoiser_changes_its_answer(sigma):
    """A path bends by minus the rate of the denoiser's answer along it, over sigma."""
    share = torch.linspace(0.02, 0.98, 25).double()
    h = 1e-3 * sigma
    at = [sigma - h, sigma, sigma + h]
    # exact points of the same paths at three levels, without any solver
    path = [torch.as_tensor(quantiles(share.numpy(), level)) for level in at]
    bend = (path[2] - 2 * path[1] + path[0]) / h**2
    answers = [
        LINE(x[:, None], levels_of(x, level))[:, 0] for x, level in zip(path, at, strict=True)
    ]
    rate = (answers[2] - answers[0]) / (2 * h)
    torch.testing.assert_close(bend, -rate / sigma, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------ the methods


@pytest.mark.equation("2.13")
def test_euler_s_step_mixes_the_point_with_its_denoised_estimate():
    """An Euler step moves the point towards the denoised one by the fall of the noise level."""
    z = normal(30, (2,), torch.Generator().manual_seed(3)).double()
    levels = torch.tensor([2.0, 0.5])
    (step,) = samplers.euler(PLANE, z, levels)
    denoised = PLANE(2 * z, levels_of(z, 2.0))
    torch.testing.assert_close(step.x, 2 * z + 0.75 * (denoised - 2 * z))
    # and it leaves the exact tangent: the slope is that of the true path through the point
    nearby = torch.tensor([2.0, 2.0 - 1e-5], dtype=torch.float64)
    (step,) = samplers.euler(PLANE, z, nearby)
    x = 2 * z
    score = gradient(lambda y: PLANE.log_prob(y, levels_of(y, 2.0)), x).detach()
    torch.testing.assert_close((step.x - x) / -1e-5, -2 * score, rtol=1e-5, atol=1e-5)


@pytest.mark.equation("2.14")
@pytest.mark.parametrize("sampler", [samplers.euler, samplers.heun])
def test_one_step_to_zero_is_one_denoised_answer(sampler):
    """One step from sigma_max to 0 is the denoiser's answer at sigma_max: the student's form."""
    z = normal(30, (2,), torch.Generator().manual_seed(4)).double()
    one = samplers.sample(PLANE, z, steps=1, sampler=sampler)
    student = generators.OneStepGenerator(PLANE)
    torch.testing.assert_close(one, student(z))
    # which is nearly the mean of the data, whatever the noise
    mean = (PLANE.weights @ PLANE.means).expand_as(one)
    torch.testing.assert_close(one, mean, atol=0.1, rtol=0)


def one_step_error(sampler: Callable, h: float, sigma: float = 1.0) -> Tensor:
    """True end minus the method's end of one step of length h down from sigma, on LINE."""
    share = np.linspace(0.05, 0.95, 19)
    start, end = (torch.as_tensor(quantiles(share, s)) for s in (sigma, sigma - h))
    levels = torch.tensor([sigma, sigma - h], dtype=torch.float64)
    (step,) = sampler(LINE, start[:, None] / sigma, levels)
    return end - step.x[:, 0]


@pytest.mark.equation("2.15")
def test_error_of_one_euler_step():
    """One Euler step is wrong by half of h^2 times the bend of the path."""
    h, sigma = 1e-2, 1.0
    share = np.linspace(0.05, 0.95, 19)
    three = [quantiles(share, s) for s in (sigma - h, sigma, sigma + h)]
    bend = (three[0] - 2 * three[1] + three[2]) / h**2
    error = one_step_error(samplers.euler, h, sigma).numpy()
    np.testing.assert_allclose(error, h**2 / 2 * bend, rtol=0.1, atol=2e-6)
    assert np.abs(error).max() > 1e-5  # there was something to compare


@pytest.mark.equation("2.16")
def test_error_of_one_heun_step_is_of_third_order():
    """A Heun step averages two slopes; halving it divides its error by eight, Euler's by four."""
    for sampler, factor in ((samplers.euler, 4), (samplers.heun, 8)):
        errors = [one_step_error(sampler, h).abs().max().item() for h in (0.04, 0.02, 0.01)]
        for longer, shorter in itertools.pairwise(errors):
            assert longer / shorter == pytest.approx(factor, rel=0.1)


@pytest.mark.equation("2.16")
def test_heun_s_step_takes_the_mean_of_the_slopes_at_both_ends():
    """A Heun step is the explicit trapezoidal rule: the mean of the slopes at both ends."""
    x = np.array([0.7, -1.1, 2.3])
    h = -0.4
    first = slope_of_line(1.5, x)
    second = slope_of_line(1.5 + h, x + h * first)
    (step,) = samplers.heun(LINE, torch.as_tensor(x)[:, None] / 1.5, torch.tensor([1.5, 1.1]))
    np.testing.assert_allclose(step.x[:, 0], x + h * (first + second) / 2, atol=1e-6)


@pytest.mark.equation("2.17")
@pytest.mark.parametrize(("sampler", "order"), [(samplers.euler, 1), (samplers.heun, 2)])
def test_order_of_convergence_to_the_quantiles(sampler, order):
    """The error at the end falls like the p-th power of the step: order 1 for Euler, 2 for Heun."""
    share = np.linspace(0.005, 0.995, 100)
    start, end = (torch.as_tensor(quantiles(share, s)) for s in (80.0, 0.002))
    errors = []
    for steps in (64, 128, 256):
        *_, last = sampler(LINE, start[:, None] / 80, noise.karras_grid(steps + 1).flip(0))
        errors.append((last.x[:, 0] - end).abs().median().item())
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@pytest.mark.equation("2.18")
@pytest.mark.parametrize("steps", [2, 18, 256])
@pytest.mark.parametrize("rho", [1.0, 7.0])
def test_levels_are_even_in_a_power_of_sigma(steps, rho):
    """The levels of a sampler are evenly spaced in sigma^(1/rho), from 80 to 0.002, and then 0."""
    levels = noise.sampling_levels(steps, rho=rho)
    assert levels[0] == 80
    assert levels[-2] == 0.002
    assert levels[-1] == 0
    assert len(levels) == steps + 1
    gaps = (levels[:-1] ** (1 / rho)).diff()
    torch.testing.assert_close(gaps, gaps.mean().expand_as(gaps), rtol=1e-9, atol=1e-12)
    assert (gaps < 0).all()


@pytest.mark.equation("2.19")
@pytest.mark.parametrize(("steps", "evaluations"), [(1, 1), (2, 3), (18, 35), (256, 511)])
def test_evaluations_of_heun(steps, evaluations):
    """N Heun steps call the denoiser 2N - 1 times: 18 steps are 35 evaluations, 256 are 511."""
    calls = 0

    def denoiser(x, sigma, label=None):
        nonlocal calls
        calls += 1
        return 0 * x

    samplers.sample(denoiser, torch.ones(2, 3), steps=steps)
    assert calls == evaluations


@pytest.mark.equation("2.20")
@pytest.mark.parametrize("steps", [3, 9, 35])
@pytest.mark.parametrize("variance", [0.04, 0.25, 4.0])
def test_euler_shrinks_gaussian_data(steps, variance):
    """On Gaussian data Euler multiplies the noise by a product of factors that is too small."""
    gaussian = GaussianMixture(torch.zeros(1, 1), torch.full((1, 1, 1), variance))
    z = torch.linspace(-2, 2, 9).double()[:, None]
    levels = noise.sampling_levels(steps)
    *_, last = samplers.euler(gaussian, z, levels)
    factor = levels[0].item()
    for sigma, sigma_next in itertools.pairwise(levels.tolist()):
        factor *= 1 + (sigma_next - sigma) * sigma / (variance + sigma**2)
    torch.testing.assert_close(last.x, factor * z)
    assert factor < math.sqrt(variance)


# ------------------------------------------------------------------ claims of the chapter


def test_the_exact_path_of_a_gaussian_solves_the_ode():
    x = np.linspace(-3, 3, 7)
    (path,) = [exercise.truth for exercise in chapter2.EXERCISES if exercise.number == "2.4"]
    of_data = torch.tensor([[0.3], [1.5]], dtype=torch.float64)
    end = path(torch.as_tensor(x), 5.0, 0.4, *of_data)
    solution = solve_ivp(
        lambda s, y: s * (y - 0.3) / (1.5**2 + s**2), (5.0, 0.4), x, rtol=1e-10, atol=1e-12
    )
    np.testing.assert_allclose(end, solution.y[:, -1], atol=1e-8)


def test_few_steps_favour_euler_and_many_favour_heun():
    share = np.linspace(0.005, 0.995, 100)
    start, end = (torch.as_tensor(quantiles(share, s)) for s in (80.0, 0.0))

    def error(sampler: Callable, steps: int) -> float:
        *_, last = sampler(LINE, start[:, None] / 80, noise.sampling_levels(steps))
        return (last.x[:, 0] - end).abs().median().item()

    assert error(samplers.heun, 4) > 2 * error(samplers.euler, 7)
    assert error(samplers.heun, 64) < 0.3 * error(samplers.euler, 127)


def test_few_heun_steps_fail_where_the_denoiser_changes_its_answer_and_not_at_the_top():
    share = np.linspace(0.005, 0.995, 100)
    errors = []
    for sigma, sigma_next in itertools.pairwise(noise.karras_grid(5).flip(0).tolist()):
        start, end = (torch.as_tensor(quantiles(share, s)) for s in (sigma, sigma_next))
        levels = torch.tensor([sigma, sigma_next], dtype=torch.float64)
        (step,) = samplers.heun(LINE, start[:, None] / sigma, levels)
        errors.append((step.x[:, 0] - end).abs().median().item())
    first, *middle, last = errors
    assert min(middle) > 2 * max(first, last)


def test_even_steps_are_many_times_worse():
    share = np.linspace(0.005, 0.995, 100)
    start, end = (torch.as_tensor(quantiles(share, s)) for s in (80.0, 0.0))

    def error(rho: float) -> float:
        *_, last = samplers.heun(LINE, start[:, None] / 80, noise.sampling_levels(18, rho=rho))
        return (last.x[:, 0] - end).abs().median().item()

    assert error(1) > 8 * error(7)
    assert max(error(3), error(10)) < 2 * error(7)


def test_digits_converge_with_heun_and_shrink_with_euler():
    teacher = pretrained.load("digits-teacher")
    z = normal(60, (1, 8, 8), torch.Generator().manual_seed(0))
    label = balanced_labels(60, 10)

    def run(steps: int, sampler: Callable) -> Tensor:
        return samplers.sample(teacher, z, label, steps=steps, sampler=sampler)

    def spread(x: Tensor, label: Tensor = label) -> float:
        return math.sqrt(sum(x[label == c].var(dim=0).mean().item() for c in range(10)) / 10)

    best = run(18, samplers.heun)
    euler, heun = run(9, samplers.euler), run(5, samplers.heun)  # nine evaluations each
    assert (heun - best).square().mean() > 4 * (euler - best).square().mean()
    assert spread(euler) < 0.9 * spread(best)
    real = digits()
    assert 0.8 < spread(best) / spread(real.x, real.label) < 1.1

"""Chapter 9: its equations against exact flows, quadrature and regression, and its claims."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from dmd_tutorial import samplers
from dmd_tutorial.adapters import Guided
from dmd_tutorial.denoisers import EDMDenoiser, score_from_denoised
from dmd_tutorial.mixtures import GaussianMixture
from dmd_tutorial.networks.mlp import MLP
from dmd_tutorial.noise import SIGMA_MIN, karras_grid
from dmd_tutorial.survey import consistency as cm

DOUBLE = torch.float64
LINE = GaussianMixture(
    torch.tensor([[-1.5], [1.0]]),
    torch.tensor([[[0.3**2]], [[0.5**2]]], dtype=DOUBLE),
    torch.tensor([0.4, 0.6]),
)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def full(x: Tensor, level: float) -> Tensor:
    return torch.full((len(x),), level, dtype=x.dtype)


def flow(x: Tensor, sigma: float, sigma_next: float, steps: int = 100) -> Tensor:
    return cm.solve(LINE, x, full(x, sigma), full(x, sigma_next), steps=steps)


def to_the_end(x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
    return cm.solve(LINE, x, sigma, torch.full_like(sigma, SIGMA_MIN), steps=100)


def data_and_noise(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = LINE.sample(count, rng=rng(seed)).double()
    return x, torch.randn(x.shape, generator=rng(seed + 1000), dtype=DOUBLE)


def random_model() -> cm.ConsistencyModel:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        mlp = MLP(1, hidden=16, layers=2)
        nn.init.normal_(mlp.out.weight, std=0.3)
    return cm.ConsistencyModel(EDMDenoiser(mlp.double(), sigma_data=1.3))


def posterior(x_noisy: float, sigma: float) -> tuple[Tensor, Tensor]:
    """Clean points on a line and their probabilities behind one noisy point, by Bayes' rule."""
    x = torch.linspace(-6, 6, 6001, dtype=DOUBLE)
    weight = LINE.log_prob(x[:, None]) - 0.5 * ((x_noisy - x) / sigma) ** 2
    return x, weight.softmax(0)


@pytest.mark.equation("9.1")
def test_all_points_of_a_path_have_one_end():
    """A consistency function gives the same answer at every point of a path."""
    x = torch.linspace(-30, 30, 41, dtype=DOUBLE)[:, None]
    end = to_the_end(x, full(x, 10.0))
    for level in (5.0, 1.0, 0.1):
        point = flow(x, 10.0, level)
        torch.testing.assert_close(to_the_end(point, full(x, level)), end, rtol=0, atol=5e-3)
    assert end.std() > 0.5


@pytest.mark.equation("9.2")
def test_the_model_is_the_identity_at_the_end_whatever_its_weights():
    """At the lowest level a consistency function returns its input."""
    x = torch.linspace(-3, 3, 41, dtype=DOUBLE)[:, None]
    torch.testing.assert_close(random_model()(x, full(x, SIGMA_MIN)), x, rtol=0, atol=1e-15)
    torch.testing.assert_close(to_the_end(x, full(x, SIGMA_MIN)), x, rtol=0, atol=1e-12)


@pytest.mark.equation("9.3")
def test_the_shifted_factors_hold_the_boundary_and_keep_the_teacher():
    """The factors of EDM, shifted by the lowest level, hold the boundary condition."""
    factors = cm.consistency_preconditioning(torch.tensor([0.4]), 0.7, sigma_min=0.1)
    assert factors.c_skip.item() == pytest.approx(0.49 / (0.09 + 0.49))
    assert factors.c_out.item() == pytest.approx(0.7 * 0.3 / math.sqrt(0.16 + 0.49))
    model = random_model()
    denoiser = EDMDenoiser(model.network, model.sigma_data)
    c_skip, c_out, *_ = cm.consistency_preconditioning(torch.tensor([SIGMA_MIN]), 1.3)
    assert c_out == 0
    torch.testing.assert_close(c_skip, torch.ones(1))
    x, noise = data_and_noise(100)
    for level in (0.1, 1.0, 80.0):
        x_noisy = x + level * noise
        difference = model(x_noisy, full(x, level)) - denoiser(x_noisy, full(x, level))
        assert 0 < difference.abs().max() < 5 * SIGMA_MIN


@pytest.mark.equation("9.4")
def test_distillation_loss_is_zero_for_the_flow_and_for_a_constant():
    """The loss of consistency distillation compares f at two points of a teacher's path."""
    x, noise = data_and_noise(400)
    sigma, sigma_next = (t.double() for t in cm.neighbour_levels(400, karras_grid(60), rng()))
    pair = cm.distillation_pair(LINE, x, noise, sigma, sigma_next)
    model = random_model()

    def constant(x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        return torch.full_like(x, 0.7)

    assert cm.consistency_loss(constant, constant, pair) == 0
    assert cm.consistency_loss(to_the_end, to_the_end, pair) < 1e-4
    by_hand = (model(pair.x, sigma) - model(pair.x_next, sigma_next)).square().mean()
    torch.testing.assert_close(cm.consistency_loss(model, model, pair), by_hand)
    assert by_hand > 1e-3


@pytest.mark.equation("9.5")
def test_a_student_without_loss_is_the_teachers_sampler():
    """Without loss, a student in one step is the teacher's solver in all steps of the grid."""
    grid = karras_grid(12)

    def chain(x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        """From its level, one step of Heun for each interval of the grid."""
        index = torch.searchsorted(grid, sigma - 1e-9)
        for i in range(11, 0, -1):
            stepped = flow(x, grid[i].item(), grid[i - 1].item(), steps=1)
            x = torch.where((index >= i)[:, None], stepped, x)
        return x

    x, noise = data_and_noise(300)
    index = torch.randint(1, 12, (300,), generator=rng())
    pair = cm.distillation_pair(LINE, x, noise, grid[index], grid[index - 1])
    assert cm.consistency_loss(chain, chain, pair) < 1e-18
    *_, last = samplers.heun(LINE, noise, grid.flip(0))
    one_step = chain(80.0 * noise, full(noise, 80.0))
    torch.testing.assert_close(one_step, last.x, rtol=1e-7, atol=1e-7)


@pytest.mark.equation("9.6")
def test_the_slope_of_the_path_is_the_mean_noise():
    """The slope of the path at a point is the mean of the noises that may have led there."""
    for x_noisy, sigma in ((0.3, 0.5), (-2.0, 1.0), (4.0, 3.0)):
        x, probability = posterior(x_noisy, sigma)
        mean_noise = (probability * (x_noisy - x) / sigma).sum()
        point = torch.tensor([[x_noisy]], dtype=DOUBLE)
        slope = (point - LINE(point, sigma)) / sigma
        torch.testing.assert_close(mean_noise, slope[0, 0], rtol=1e-6, atol=1e-6)


@pytest.mark.equation("9.7")
def test_the_pair_has_the_variances_of_both_levels_and_one_noise():
    """The pair of consistency training: one sample and one noise, at two levels."""
    x, noise = data_and_noise(200_000)
    sigma, sigma_next = 2.0, 1.2
    pair = cm.training_pair(x, noise, full(x, sigma), full(x, sigma_next))
    variance = x.var().item()
    assert abs(pair.x.var() / (variance + sigma**2) - 1) < 0.02
    assert abs(pair.x_next.var() / (variance + sigma_next**2) - 1) < 0.02
    # the pair that is often printed has the higher level twice
    assert abs((x + sigma * noise).var() / (variance + sigma_next**2) - 1) > 0.5
    covariance = torch.cov(torch.cat([pair.x, pair.x_next], 1).T)[0, 1]
    assert abs(covariance / (variance + sigma * sigma_next) - 1) < 0.02


@pytest.mark.equation("9.8")
def test_the_mean_of_the_lower_point_is_an_euler_step():
    """The lower point of the pair lies, in the mean, where Euler's step leads."""
    for x_noisy, sigma, sigma_next in ((0.3, 0.5, 0.4), (-2.0, 1.0, 0.2), (4.0, 3.0, 2.0)):
        x, probability = posterior(x_noisy, sigma)
        noise = (x_noisy - x) / sigma  # with each clean point, the noise that led here
        pair = cm.training_pair(x[:, None], noise[:, None], full(x, sigma), full(x, sigma_next))
        lower = probability @ pair.x_next[:, 0]
        *_, last = samplers.euler(
            LINE,
            torch.tensor([[x_noisy / sigma]], dtype=DOUBLE),
            torch.tensor([sigma, sigma_next], dtype=DOUBLE),
        )
        torch.testing.assert_close(lower, last.x[0, 0], rtol=1e-6, atol=1e-6)


def gradients(width: float, sigma: float = 1.0) -> tuple[Tensor, Tensor]:
    """Exact gradients of training and of distillation by Euler's step, on a grid of (x, n)."""
    x = torch.linspace(-4, 4, 161, dtype=DOUBLE)
    n = torch.linspace(-5, 5, 121, dtype=DOUBLE)
    probability = LINE.log_prob(x[:, None]).exp()[:, None] * torch.exp(-0.5 * n**2)
    probability = (probability / probability.sum()).flatten()
    points, noise = (t.reshape(-1, 1) for t in torch.meshgrid(x, n, indexing="ij"))
    high, low = full(points, sigma), full(points, sigma - width)
    pair = cm.training_pair(points, noise, high, low)
    euler = pair.x - width * (pair.x - LINE(pair.x, high)) / sigma
    theta = torch.tensor([-0.8, 2.0, 0.1], dtype=DOUBLE).requires_grad_()

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        """A bent function with a boundary condition."""
        above = (sigma - SIGMA_MIN)[:, None]
        return x + above * (theta[0] * torch.tanh(theta[1] * x) + theta[2])

    found = []
    for lower in (pair.x_next, euler):
        loss = (probability * (model(pair.x, high) - model(lower, low).detach())[:, 0] ** 2).sum()
        found += torch.autograd.grad(loss, theta)
    return found[0], found[1]


@pytest.mark.equation("9.9")
def test_the_gradient_of_training_tends_to_that_of_distillation():
    """Without a teacher the gradient differs by the square of the interval only."""
    widths = (0.2, 0.1, 0.05, 0.025)
    absolute, relative = [], []
    for width in widths:
        training, distillation = gradients(width)
        absolute.append((training - distillation).norm().item())
        relative.append(absolute[-1] / distillation.norm().item())
    assert all(3.3 < a / b < 4.7 for a, b in itertools.pairwise(absolute))
    assert all(1.6 < a / b < 2.5 for a, b in itertools.pairwise(relative))
    assert relative[-1] < 0.1


@pytest.mark.equation("9.10")
def test_a_coarse_grid_costs_spread():
    """For Gaussian data the student's spread is a product of cosines, one for each interval."""
    std, count = 0.8, 400_000
    x = std * torch.randn(count, generator=rng(), dtype=DOUBLE)
    noise = torch.randn(count, generator=rng(1), dtype=DOUBLE)
    for bins, least in ((4, 0.0), (18, 0.5)):
        levels = karras_grid(bins)
        factor = 1.0  # f = factor x: a regression at each level on the answers one below
        for low, high in itertools.pairwise(levels.tolist()):
            upper, lower = x + high * noise, x + low * noise
            factor = factor * ((upper @ lower) / (upper @ upper)).item()
        measured = factor * math.hypot(std, 80.0) / math.hypot(std, SIGMA_MIN)
        predicted = torch.atan(levels / std).diff().cos().prod().item()
        assert abs(measured / predicted - 1) < 0.01
        assert least < predicted < 1


@pytest.mark.equation("9.11")
def test_the_wrong_pair_is_solved_by_the_identity():
    """With the higher level in both points, the identity has no loss at all."""
    x, noise = data_and_noise(100)
    sigma, sigma_next = full(x, 2.0), full(x, 1.2)
    right = cm.training_pair(x, noise, sigma, sigma_next)
    wrong = right._replace(x_next=right.x)

    def identity(x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        return x

    assert cm.consistency_loss(identity, identity, wrong) == 0
    assert cm.consistency_loss(identity, identity, right) > 0.3
    assert cm.consistency_loss(to_the_end, to_the_end, wrong) > 1e-3


@pytest.mark.equation("9.12")
def test_noise_takes_a_sample_from_the_lowest_level_to_any_other():
    """A sample of the lowest level and the right noise make a sample of a higher level."""
    x = torch.linspace(-8, 8, 3201, dtype=DOUBLE)
    spacing, low, tau = (x[1] - x[0]).item(), 0.3, 0.8
    width = math.sqrt(tau**2 - low**2)
    clean = LINE.log_prob(x[:, None], low).exp()
    kernel = torch.exp(-0.5 * ((x[::40, None] - x) / width) ** 2) / (width * math.sqrt(2 * math.pi))
    noised = kernel @ clean * spacing
    torch.testing.assert_close(noised, LINE.log_prob(x[::40, None], tau).exp(), rtol=0, atol=1e-9)
    asked = []

    def model(x: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
        """Answers 2 whatever it is asked."""
        asked.append(x)
        return torch.full_like(x, 2.0)

    z = torch.randn(100_000, 1, generator=rng())
    list(cm.multistep(model, z, torch.tensor([3.0, tau]), sigma_min=low, rng=rng(1)))
    assert asked[1].mean().item() == pytest.approx(2.0, abs=0.01)
    assert asked[1].std().item() == pytest.approx(width, rel=0.01)


@pytest.mark.equation("9.15")
def test_guidance_is_a_sharpened_score():
    """The guided denoiser belongs to the score of the class density, sharpened against all."""
    x = torch.linspace(-3, 3, 40, dtype=DOUBLE)[:, None].requires_grad_()
    label, w = torch.arange(40) % 2, torch.linspace(0, 4, 40, dtype=DOUBLE)
    sigma = full(x, 0.7)
    log_density = (1 + w) * LINE.log_prob(x, sigma, label) - w * LINE.log_prob(x, sigma)
    (score,) = torch.autograd.grad(log_density.sum(), x)
    x = x.detach()
    ours = score_from_denoised(x, Guided(LINE, 1 + w[:, None])(x, sigma, label), sigma)
    torch.testing.assert_close(ours, score, rtol=1e-8, atol=1e-8)


@pytest.mark.equation("9.13")
def test_a_jump_of_no_length_aims_at_the_denoised_point():
    """A jump is a mean of the point and of an aim, and the aim of a short jump is the denoiser."""
    x = torch.linspace(-4, 4, 33, dtype=DOUBLE)[:, None]
    sigma = 1.0
    errors = []
    for sigma_next in (0.9, 0.99, 0.999):
        share = sigma_next / sigma
        aim = (flow(x, sigma, sigma_next) - share * x) / (1 - share)
        errors.append((aim - LINE(x, sigma)).abs().max().item())
    assert all(7 < a / b < 13 for a, b in itertools.pairwise(errors))
    model = cm.TrajectoryModel(EDMDenoiser(MLP(1, hidden=8), 1.3))
    x, high, low = x.float(), full(x, 2.0).float(), full(x, 0.5).float()
    g = model(x, high, low, aim=True)
    torch.testing.assert_close(model(x, high, low), 0.25 * x + 0.75 * g)


@pytest.mark.equation("9.14")
def test_jumps_along_the_path_have_no_trajectory_loss():
    """One jump must land where the teacher's part of the way and a second jump land."""
    x, noise = data_and_noise(200)
    levels = torch.rand(200, 3, generator=rng(2), dtype=DOUBLE).mul(4).sub(2).exp()
    low, between, high = levels.sort(dim=1).values.T
    x_noisy = x + high[:, None] * noise
    x_between = cm.solve(LINE, x_noisy, high, between, steps=60)

    def exact(x: Tensor, sigma: Tensor, sigma_next: Tensor, label: Tensor | None) -> Tensor:
        return cm.solve(LINE, x, sigma, sigma_next, steps=60)

    def stay(x: Tensor, sigma: Tensor, sigma_next: Tensor, label: Tensor | None) -> Tensor:
        return x + 0.9 * (exact(x, sigma, sigma_next, None) - x)

    batch = x_noisy, x_between, high, between, low
    assert cm.trajectory_loss(exact, exact, *batch) < 1e-6
    assert cm.trajectory_loss(stay, stay, *batch) > 1e-4
    # the model jumps once; the target takes the other way, and both landing points to the end
    landed = stay(x_noisy, high, low, None)
    missed = (to_the_end(landed, low) - to_the_end(x_noisy, high)).square().mean()
    loss = cm.trajectory_loss(stay, exact, *batch)
    torch.testing.assert_close(loss, missed, rtol=1e-2, atol=0)
    assert abs((landed - exact(x_noisy, high, low, None)).square().mean() / missed - 1) > 0.05


def test_fresh_noise_costs_all_spread_however_fine_the_grid():
    """With two noises the correlation of the pair does not tend to 1."""
    std = 0.8
    for bins in (18, 100):
        levels = karras_grid(bins)
        size = torch.hypot(levels, torch.tensor(std, dtype=DOUBLE))
        assert (std**2 / (size[1:] * size[:-1])).prod() < 1e-3

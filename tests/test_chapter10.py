"""Chapter 10: what it claims beyond its equations, which tests/test_survey_*.py hold."""

import itertools
import math

import pytest
import torch

from dmd_tutorial import data
from dmd_tutorial.adapters import Adapted, preserving
from dmd_tutorial.mixtures import GaussianMixture
from dmd_tutorial.networks import MLP
from dmd_tutorial.noise import SIGMA_MAX, sampling_levels
from dmd_tutorial.samplers import euler, sample
from dmd_tutorial.survey import adversarial, progressive
from dmd_tutorial.survey.progressive import Weighting

DOUBLE = torch.float64
RING = data.ring()
LEVELS = sampling_levels(16)
Z = torch.randn(100, 2, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)


def perfect(end: int):
    """A student without error of fitting, whose target is solved for the end-th level below."""

    def student(x, sigma, label=None):
        place = int((LEVELS - sigma[0]).abs().argmin())
        here, between, after = (LEVELS[place + k].expand(len(x)) for k in range(3))
        x_next = progressive.two_steps(RING, x, here, between, after)
        return progressive.target(x, x_next, here, (here, between, after)[end])

    return student


def test_a_target_solved_for_the_level_between_misses_the_flow():
    flow = sample(RING, Z, steps=100)
    errors = [
        (sample(perfect(end), Z, sampler=euler, levels=LEVELS[::2]) - flow).norm(dim=1).mean()
        for end in (2, 1)
    ]
    assert errors[1] > 3 * errors[0]


def test_a_step_is_a_straight_line_that_points_at_the_estimate():
    x, estimate = Z, RING(Z * 3, torch.full((100,), 3.0, dtype=DOUBLE))
    sigma = torch.full((100,), 3.0, dtype=DOUBLE)
    ends = [progressive.ddim_step(x, estimate, sigma, sigma * share) for share in (0.5, 0.0)]
    torch.testing.assert_close(ends[0], (x + ends[1]) / 2)
    torch.testing.assert_close(ends[1], estimate)


@pytest.mark.parametrize("steps", [1, 2, 8, 32])
def test_ddim_makes_gaussians_too_narrow_and_more_steps_help(steps):
    def width(count):
        levels = sampling_levels(count).tolist()
        pairs = itertools.pairwise(levels)
        return SIGMA_MAX * math.prod((0.25 + a * b) / (0.25 + a * a) for a, b in pairs)

    exact = SIGMA_MAX * 0.5 / math.hypot(0.5, SIGMA_MAX)
    assert width(steps) < width(2 * steps) < exact


def test_snr_hardly_counts_the_level_of_the_last_step():
    sigma = sampling_levels(32)[::16][:2]
    high, low = progressive.weight(Weighting.SNR, sigma).tolist()
    assert 1000 < low / high < 2000
    high, low = progressive.weight(Weighting.SNR_PLUS_ONE, sigma).tolist()
    assert low / high < 2


def test_an_error_of_the_noise_is_eighty_times_larger_for_the_sample():
    sigma = torch.full((4,), SIGMA_MAX)
    x = SIGMA_MAX * torch.randn(4, 2, generator=torch.Generator().manual_seed(0))

    class Off(MLP):
        def forward(self, x, c_noise, label=None):
            return super().forward(x, c_noise) + 0.01  # it is 0 at first

    moved = {}
    for prediction in ("x0", "noise", "v"):
        networks = (MLP(hidden=8), Off(hidden=8))
        right, off = (Adapted(each, preserving(), prediction)(x, sigma) for each in networks)
        moved[prediction] = (off - right).abs().mean().item()
    assert moved["noise"] == pytest.approx(0.8, rel=1e-3)
    assert moved["x0"] == pytest.approx(0.01, rel=1e-3)
    assert moved["v"] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(("sigma", "goal"), [(0.3, "mode"), (40.0, "mean")])
def test_behind_little_noise_the_teacher_says_mode_and_behind_much_it_says_mean(sigma, goal):
    """Follow the mean gradient of the teacher's term from between two modes and the middle."""
    start = 1.2 * torch.nn.functional.normalize(RING.means[0] + 0.3 * RING.means[1], dim=0)
    x = start.repeat(400, 1).double()
    level = torch.full((400,), sigma, dtype=DOUBLE)
    rng = torch.Generator().manual_seed(0)
    for _ in range(60):
        noise = torch.randn(400, 2, generator=rng, dtype=DOUBLE)
        with torch.no_grad():
            pull = RING(x + sigma * noise, level).mean(0) - x[0]
        x = x + 0.3 * pull
    end = x[0]
    wanted = RING.means[0] if goal == "mode" else torch.zeros(2, dtype=DOUBLE)
    assert (end - wanted).norm() < 0.35


def test_a_perfect_student_is_moved_by_the_teachers_term_but_not_by_pairs():
    """The common misreading, a full solve from the same noise, is another loss."""
    std = 0.5
    gaussian = GaussianMixture.isotropic(torch.zeros(1, 2), std)
    a = torch.tensor(std, dtype=DOUBLE).requires_grad_()
    sigma = torch.full((100,), 1.0, dtype=DOUBLE)
    noise = torch.randn(100, 2, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    (rate,) = torch.autograd.grad(adversarial.teacher_loss(gaussian, a * Z, sigma, noise), a)
    assert rate > 0.1
    solved = sample(gaussian, Z, steps=200)
    (rate_of_pairs,) = torch.autograd.grad((a * Z - solved).square().mean(), a)
    assert rate_of_pairs.abs() < 1e-3

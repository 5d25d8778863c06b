"""Noise levels: the grid, the draws, variance-preserving schedules."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmd_tutorial.anchor import Pairs
from dmd_tutorial.data import normal, seeded_noise, two_modes
from dmd_tutorial.noise import (
    Schedule,
    add_noise,
    cosine_schedule,
    dmd_sigma,
    grid_sigma,
    karras_grid,
    linear_schedule,
    lognormal_sigma,
    noise_like,
    sampling_levels,
    stream,
    to_variance_exploding,
)
from dmd_tutorial.samplers import ancestral, langevin, stochastic
from dmd_tutorial.survey.flow_matching import uniform_time
from dmd_tutorial.survey.progressive import draw_double_step


def test_grid_has_edm_s_ends_and_even_steps_in_the_seventh_root():
    grid = karras_grid()
    assert len(grid) == 1000
    assert grid[0].item() == 0.002
    assert grid[-1].item() == 80.0
    steps = (grid ** (1 / 7)).diff()
    assert torch.allclose(steps, steps.mean().expand_as(steps), rtol=1e-6)


def test_sampling_levels_fall_from_sigma_max_to_zero():
    levels = sampling_levels(18)
    assert len(levels) == 19
    assert levels[0].item() == 80
    assert levels[-2].item() == 0.002
    assert levels[-1].item() == 0
    assert (levels.diff() < 0).all()
    assert sampling_levels(1).tolist() == [80, 0]


@given(bins=st.integers(2, 50), low=st.floats(1e-4, 1), ratio=st.floats(1.1, 1e5))
def test_grid_rises_for_any_ends(bins, low, ratio):
    grid = karras_grid(bins, low, low * ratio)
    assert (grid.diff() > 0).all()
    assert grid[0].item() == low


def test_generator_update_draws_from_2_to_98_percent_and_reaches_both_ends():
    grid = karras_grid()
    sigma = dmd_sigma(200_000, grid, torch.Generator().manual_seed(0))
    assert sigma.min().item() == pytest.approx(grid[20].item(), rel=1e-6)
    assert sigma.max().item() == pytest.approx(grid[980].item(), rel=1e-6)
    # the figures that the field quotes for those two levels
    assert grid[20].item() == pytest.approx(0.0032, rel=0.05)
    assert grid[980].item() == pytest.approx(72, rel=0.02)


def test_critic_update_draws_from_the_whole_grid():
    grid = karras_grid()
    sigma = grid_sigma(200_000, grid, rng=torch.Generator().manual_seed(0))
    assert sigma.min().item() == pytest.approx(0.002)
    assert sigma.max().item() == pytest.approx(80)


def test_lognormal_draw_has_its_mean_and_spread():
    logs = lognormal_sigma(100_000, rng=torch.Generator().manual_seed(0)).log()
    assert logs.mean().item() == pytest.approx(-1.2, abs=4 * 1.2 / math.sqrt(1e5))
    assert logs.std().item() == pytest.approx(1.2, rel=0.01)


@pytest.mark.parametrize("schedule", [cosine_schedule, linear_schedule])
def test_schedules_preserve_variance_and_lose_signal(schedule):
    alpha, sigma = schedule(torch.linspace(0, 1, 101, dtype=torch.float64))
    assert torch.allclose(alpha**2 + sigma**2, torch.ones(101, dtype=torch.float64))
    assert (alpha.diff() < 0).all()
    assert alpha[0].item() == 1


def test_linear_schedule_integrates_its_beta():
    t = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    beta = 0.1 + (20 - 0.1) * t
    integral = torch.trapezoid(beta, t)
    alpha, _ = linear_schedule(t[-1:])
    assert alpha.item() == pytest.approx(math.exp(-0.5 * integral.item()), rel=1e-9)


@pytest.mark.parametrize("schedule", [cosine_schedule, linear_schedule])
def test_variance_preserving_form_is_the_exploding_one_in_other_units(schedule):
    """The score of a VP sample, by autograd of its own density, from the VE denoiser."""
    mixture, t = two_modes(), torch.tensor([0.05, 0.3, 0.6, 0.9], dtype=torch.float64)
    alpha, sigma = schedule(t)
    x_t = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_t.requires_grad_()
    # density of alpha x + sigma noise: components alpha mean, alpha^2 cov + sigma^2
    log_density = torch.stack([
        torch.logsumexp(torch.stack([
            torch.distributions.MultivariateNormal(
                a * mean, a**2 * cov + s**2 * torch.eye(2, dtype=torch.float64)
            ).log_prob(point) + weight.log()
            for mean, cov, weight in zip(
                mixture.means, mixture.covariances, mixture.weights, strict=True
            )
        ]), dim=0)
        for point, a, s in zip(x_t, alpha, sigma, strict=True)
    ])  # fmt: skip
    (score,) = torch.autograd.grad(log_density.sum(), x_t)
    x, level = to_variance_exploding(x_t.detach(), Schedule(alpha, sigma))
    denoised = mixture(x, level)
    from_denoiser = -(x_t.detach() - alpha[:, None] * denoised) / sigma[:, None] ** 2
    assert torch.allclose(from_denoiser, score, rtol=1e-9, atol=1e-9)


def test_noise_broadcasts_over_images():
    x, noise = torch.zeros(3, 1, 8, 8), torch.ones(3, 1, 8, 8)
    noisy = add_noise(x, torch.tensor([0.0, 1.0, 2.0]), noise)
    assert noisy.mean((1, 2, 3)).tolist() == [0, 1, 2]


def test_noise_like_depends_on_the_generator_alone():
    x = torch.zeros(5, 2, dtype=torch.float64)
    one, two = (noise_like(x, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)
    assert one.dtype == torch.float64


GRID, DOWN = karras_grid(), torch.tensor([5, 1.0])
PAIRS = Pairs(torch.zeros(5, 2), torch.ones(5, 2), torch.arange(5))


@pytest.mark.parametrize(
    "draw",
    [
        lambda rng: noise_like(torch.zeros(3, 2), rng),
        lambda rng: grid_sigma(3, GRID, rng=rng),
        lambda rng: lognormal_sigma(3, rng=rng),
        lambda rng: normal(3, (2,), rng),
        lambda rng: PAIRS.draw(3, rng).z,
        lambda rng: two_modes().sample(3, rng=rng),
        lambda rng: uniform_time(3, 80.0, rng),
        lambda rng: draw_double_step(3, GRID[:5], rng)[0],
        lambda rng: last(langevin(two_modes(), torch.zeros(3, 2), 0.5, 1, 0.1, rng=rng)),
        lambda rng: last(stochastic(two_modes(), torch.zeros(3, 2), DOWN, rng=rng)),
        lambda rng: last(ancestral(two_modes(), torch.zeros(3, 2), DOWN, rng=rng)),
    ],
)
def test_numbers_are_drawn_where_their_source_lives(draw, monkeypatch):
    """A source on another device than the tensors: what torch is asked for is written down."""
    rng, asked = SimpleNamespace(device=torch.device("cpu", 7)), []
    multinomial = torch.multinomial

    def instead(drawn):
        def recorded(*args, generator, device=None, **more):
            assert generator is rng
            if drawn is not multinomial:  # it draws where its weights are
                asked.append(torch.device(device or "meta"))
            return drawn(*args, **more)

        return recorded

    for name in ("randn", "rand", "randint", "multinomial"):
        monkeypatch.setattr(torch, name, instead(getattr(torch, name)))
    assert len(draw(rng)) == 3
    assert asked
    assert set(asked) == {rng.device}


def last(steps):
    *_, final = steps
    return final.x


def test_a_stream_has_room_for_what_it_is_asked_for_or_says_so():
    ends = ("training", 0, 0), ("training", 16_383, 65_535), ("pictures", 16_383, 65_535)
    numbers = [stream(*end).initial_seed() for end in ends]
    assert numbers == [0, 2**30 - 1, 2**32 - 1]  # 32 bits are what a source reads
    for seed, part in ((-1, 0), (16_384, 0), (0, -1), (0, 65_536)):
        with pytest.raises(ValueError, match=f"not {seed}, {part}"):
            stream("pairs", seed, part)
    with pytest.raises(ValueError, match=r"a purpose is one of .*'pairs'.*, not 'pears'"):
        stream("pears")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: karras_grid(1), "at least 2 levels, not 1"),
        (lambda: karras_grid(9, 1.0, 0.5), "not 1.0 and 0.5"),
        (lambda: sampling_levels(0), "at least 1 step, not 0"),
        (lambda: seeded_noise([5, 2**30], (2,)), "not 1073741824"),
        (lambda: grid_sigma(3, karras_grid(), 0.5, 0.2), "not 0.5 and 0.2"),
        (lambda: cosine_schedule(torch.tensor([1.5])), "not 1.5 to 1.5"),
        (lambda: linear_schedule(torch.tensor([math.nan])), "t is not finite"),
        (
            lambda: add_noise(torch.zeros(4, 2), torch.zeros(3), torch.zeros(4, 2)),
            r"sigma has shape \(3,\), x has batch 4",
        ),
        (
            lambda: add_noise(torch.zeros(2, 2), torch.tensor([1.0, -1.0]), torch.zeros(2, 2)),
            "smallest is -1",
        ),
        (
            lambda: to_variance_exploding(
                torch.zeros(1, 2), Schedule(torch.zeros(1), torch.ones(1))
            ),
            "alpha is 0",
        ),
    ],
)
def test_errors_name_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()

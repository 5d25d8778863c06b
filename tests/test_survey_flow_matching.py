"""Flow matching and rectified flow, against exact mixtures."""

import itertools
import math

import pytest
import torch
from scipy import integrate
from torch import Tensor, nn

from benchmarks.survey.flow_matching import METHODS
from benchmarks.survey.task import Budget, Task
from dmd_tutorial import data
from dmd_tutorial.denoisers import EDMDenoiser, denoising_loss
from dmd_tutorial.generators import OneStepGenerator
from dmd_tutorial.mixtures import GaussianMixture
from dmd_tutorial.networks import MLP, UNet
from dmd_tutorial.noise import sampling_levels
from dmd_tutorial.samplers import euler, heun
from dmd_tutorial.survey import flow_matching as fm

DOUBLE = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def network(seed: int = 0) -> EDMDenoiser:
    """A network whose answers are not trivial."""
    denoiser = EDMDenoiser(MLP(hidden=16, layers=2), sigma_data=1.4).double()
    for k, parameter in enumerate(denoiser.parameters()):
        parameter.data = 0.3 * normal(*parameter.shape, seed=100 * seed + k)
    return denoiser


def test_times_and_levels_are_two_names_for_one_thing():
    t = torch.tensor([0.0, 0.1, 0.5, 0.987], dtype=DOUBLE)
    sigma = fm.sigma_from_time(t)
    torch.testing.assert_close(sigma / (1 + sigma), t)
    assert fm.sigma_from_time(t)[2] == 1
    with pytest.raises(ValueError, match="t < 1"):
        fm.sigma_from_time(torch.ones(2))


def test_a_path_starts_at_the_data_and_ends_at_the_noise():
    x, z = normal(3, 1, 2, 2), normal(3, 1, 2, 2, seed=1)
    t = torch.tensor([0.0, 0.5, 1.0], dtype=DOUBLE)
    path = fm.interpolate(x, z, t)
    torch.testing.assert_close(path, torch.stack([x[0], (x[1] + z[1]) / 2, z[2]]))
    with pytest.raises(ValueError, match="shape"):
        fm.interpolate(x, z[:2], t)


def test_the_exact_denoiser_gives_the_mean_velocity_of_the_paths():
    """By brute force: paths of many pairs, weighted by how likely they pass through a point."""
    mixture, t, point = data.two_modes(2.0, 0.5), 0.6, torch.tensor([[0.4, -0.2]], dtype=DOUBLE)
    x = mixture.sample(400_000, rng=torch.Generator().manual_seed(0)).double()
    z = (point - (1 - t) * x) / t  # the noise that takes each x through the point
    share = torch.softmax(-z.square().sum(1) / 2, dim=0)
    expected = (share[:, None] * (z - x)).sum(0)
    ours = fm.velocity(mixture, point, torch.tensor([t], dtype=DOUBLE))[0]
    torch.testing.assert_close(ours, expected, rtol=0, atol=0.01)


def test_the_conditional_loss_is_a_denoising_loss_with_another_weight():
    denoiser, x, z = network(), normal(30, 2), normal(30, 2, seed=1)
    t = torch.rand(30, generator=torch.Generator().manual_seed(0)).double().clamp(0.05, 0.95)
    ours = fm.conditional_flow_matching_loss(denoiser, x, z, t)
    sigma = t / (1 - t)
    theirs = denoising_loss(denoiser, x, sigma, z, weight=lambda sigma: (1 + 1 / sigma) ** 2)
    torch.testing.assert_close(ours, theirs)


def test_euler_in_time_is_euler_in_noise_level():
    denoiser, z = network(), normal(10, 2)
    levels = fm.flow_levels(7)
    *_, last = euler(denoiser, z, levels)
    t = levels / (1 + levels)
    x = t[0] * z
    for now, then in itertools.pairwise(t):
        x = x + (then - now) * fm.velocity(denoiser, x, now.expand(10))
    torch.testing.assert_close(x, last.x, rtol=1e-9, atol=1e-9)


def test_diffusers_takes_the_same_steps():
    schedulers = pytest.importorskip("diffusers.schedulers")
    ring, z, steps = data.ring(), normal(10, 2), 6
    levels = fm.flow_levels(steps)
    t = levels / (1 + levels)
    scheduler = schedulers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=t[:-1].tolist())
    x = t[0] * z
    for now, timestep in zip(t[:-1], scheduler.timesteps, strict=True):
        x = scheduler.step(fm.velocity(ring, x, now.expand(10)), timestep, x).prev_sample
    *_, last = euler(ring, z, levels)
    torch.testing.assert_close(x.double(), last.x, rtol=0, atol=1e-5)


def test_levels_are_evenly_spaced_in_time():
    levels = fm.flow_levels(5, sigma_max=4.0)
    torch.testing.assert_close(levels[0].item(), 4.0)
    assert levels[-1] == 0
    torch.testing.assert_close(
        levels / (1 + levels), torch.linspace(0.8, 0, 6, dtype=DOUBLE), rtol=0, atol=1e-7
    )
    with pytest.raises(ValueError, match="at least 1 step, not 0"):
        fm.flow_levels(0)


def test_straightness_of_a_gaussians_flow_is_its_integral():
    """For one Gaussian the flow scales: x_t is sqrt((1 - t)^2 s^2 + t^2) times its start."""
    std, z = 0.3, normal(2000, 2)
    gaussian = GaussianMixture.isotropic(torch.zeros(1, 2), std)
    top = 80 / 81
    levels = fm.flow_levels(400)
    ours = fm.straightness(fm.flow_path(gaussian, z, levels, sampler=heun))

    def radius(t: float) -> float:
        return math.sqrt((1 - t) ** 2 * std**2 + t**2)

    def slope(t: float) -> float:
        return (t - (1 - t) * std**2) / radius(t)

    mean = (radius(top) - radius(0)) / top
    square, _ = integrate.quad(lambda t: (slope(t) - mean) ** 2, 0, top)
    assert ours == pytest.approx(square / top / mean**2, rel=0.01)


def test_a_straight_path_has_straightness_zero_and_a_bent_one_has_not():
    t = torch.tensor([1.0, 0.7, 0.2, 0.0], dtype=DOUBLE)
    x, z = normal(5, 1, 2, 2), normal(5, 1, 2, 2, seed=1)
    straight = torch.stack([(1 - s) * x + s * z for s in t])
    assert fm.straightness(fm.Path(t, straight)) < 1e-28
    assert fm.straightness(fm.Path(t, straight.flip(1).cumsum(0))) > 0.1
    # one coordinate, velocity 4 for a quarter of the time, then 0: mean 1, variance 9/4 + 3/4
    bent = torch.tensor([1.0, 0.0, 0.0], dtype=DOUBLE)[:, None, None]
    path = fm.Path(torch.tensor([1.0, 0.75, 0.0], dtype=DOUBLE), bent)
    assert fm.straightness(path) == pytest.approx(3.0)
    assert fm.straightness(fm.Path(path.t, 2 * bent)) == pytest.approx(3.0)  # without unit


def test_a_path_ends_where_the_sampler_does():
    denoiser, z = data.ring(), normal(8, 2)
    levels = sampling_levels(12)
    path = fm.flow_path(denoiser, z, levels, sampler=heun)
    *_, last = heun(denoiser, z, levels)
    assert path.x.shape == (13, 8, 2)
    torch.testing.assert_close(path.x[-1], last.x)
    torch.testing.assert_close(path.x[0], 80 / 81 * z)


def test_a_straight_flow_is_exact_in_one_step():
    """The reflow of one Gaussian: pairs (z, m + s z), whose exact denoiser is linear."""
    mean, std = torch.tensor([0.7, -0.4], dtype=DOUBLE), 0.3

    def denoiser(x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        return mean + std * (x - mean) / (std + sigma[:, None])  # x = y + sigma z solved for y

    z = normal(20, 2)
    t = torch.rand(20, generator=torch.Generator().manual_seed(0)).double().clamp(0.01, 0.98)
    y = mean + std * z
    assert fm.reflow_loss(denoiser, z, y, t).item() < 1e-20
    # the start, sigma_max z, differs from y + sigma_max z by y: an error of about 1 / sigma_max
    *_, one = euler(denoiser, z, fm.flow_levels(1, 1e6))
    torch.testing.assert_close(one.x, y, rtol=0, atol=1e-5)
    assert fm.straightness(fm.flow_path(denoiser, z, fm.flow_levels(20))) < 1e-3


def test_distillation_compares_one_step_with_its_target():
    z, y = normal(6, 2), normal(6, 2, seed=1)
    generator = OneStepGenerator(network(), sigma_max=3.0)
    expected = (generator(z) - y).square().mean()
    torch.testing.assert_close(fm.distillation_loss(generator, z, y), expected)


def test_times_are_drawn_below_that_of_the_highest_level():
    t = fm.uniform_time(20_000, 4.0, torch.Generator().manual_seed(0))
    assert t.min() >= 1e-3
    assert 0.79 < t.max() <= 0.8
    assert t.mean().item() == pytest.approx(0.4, abs=0.01)


# Recipes


def small_task(shape: tuple[int, ...], classes: int) -> Task:
    torch.manual_seed(0)
    raw: nn.Module = MLP(2, 8) if len(shape) == 1 else UNet(8, 1, classes, width=8)

    def draw(count: int, rng: torch.Generator) -> tuple[Tensor, Tensor | None]:
        x = 0.5 * torch.randn(count, *shape, generator=rng)
        return x, torch.randint(classes, (count,), generator=rng) if classes else None

    return Task("small", EDMDenoiser(raw), shape, classes, draw, lambda x, label: (0.0, 0.0))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize(("shape", "classes"), [((2,), 0), ((1, 8, 8), 2)])
def test_a_recipe_keeps_to_its_budget_and_repeats_itself(method, shape, classes):
    task = small_task(shape, classes)
    z = torch.randn(6, *shape)
    label = torch.arange(6) % 2 if classes else None
    answers = []
    for seed in (0, 0, 1):
        budget = Budget(8e3, task.teacher)
        samplers = method.train(task, budget, seed)
        assert budget.spent <= budget.passes * 1.01
        assert budget.spent > 0.8 * budget.passes
        answers.append({count: sampler(z, label) for count, sampler in samplers.items()})
    for count in answers[0]:
        first, again, other = (answer[count] for answer in answers)
        assert first.shape == z.shape
        assert first.isfinite().all()
        assert (first == again).all()
        assert (first != other).any()


def test_flow_matching_does_not_use_the_teacher():
    answers = []
    for scale in (1.0, 3.0):
        task = small_task((2,), 0)
        for parameter in task.teacher.parameters():
            parameter.data *= scale
            parameter.data += scale
        sampler = METHODS[0].train(task, Budget(3e3, task.teacher), 0)[4]
        answers.append(sampler(torch.ones(2, 2), None))
    assert (answers[0] == answers[1]).all()

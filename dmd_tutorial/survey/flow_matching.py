"""Flow matching and rectified flow: the same denoisers, trained and judged as velocities.

A point on the path of a pair (x, z) is ``x_t = (1 - t) x + t z``, from data at t = 0 to noise at
t = 1. Divided by 1 - t it is ``x + sigma z`` with ``sigma = t / (1 - t)``, the book's own form.
"""

import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn
from torch.nn import functional

from benchmarks.survey.task import Budget, Method, Sampler, Task, fit_within, sampling
from dmd_tutorial.anchor import Pairs
from dmd_tutorial.checks import check_same_shape, check_sigma, expand
from dmd_tutorial.denoisers import Denoiser, EDMDenoiser, OneStepGenerator
from dmd_tutorial.networks import MLP, UNet
from dmd_tutorial.noise import SIGMA_MAX, noise_like
from dmd_tutorial.samplers import Step, euler, one_step
from dmd_tutorial.training import TeacherSettings

SMALLEST_TIME = 1e-3
BATCH = 128


def time_from_sigma(sigma: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """The time of a noise level, ``t = sigma / (1 + sigma)``."""
    return sigma / (1 + sigma)


def sigma_from_time(t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """The noise level of a time below 1, ``sigma = t / (1 - t)``.

    Args:
        t: Times, (batch,), from 0 (data) to below 1 (noise).

    Returns:
        Noise levels, (batch,), in the units of x.

    Raises:
        ValueError: If a time is 1 or above, or negative.
    """
    if t.min() < 0 or t.max() >= 1:
        raise ValueError(f"need 0 <= t < 1, not {t.min().item():g} to {t.max().item():g}")
    return t / (1 - t)


def interpolate(
    x: Float[Tensor, "batch *shape"],
    z: Float[Tensor, "batch *shape"],
    t: Float[Tensor, " batch"],
) -> Float[Tensor, "batch *shape"]:
    """The straight path from data to noise, ``x_t = (1 - t) x + t z``.

    Args:
        x: Data, (batch, *shape).
        z: Standard normal noise, (batch, *shape).
        t: Times, (batch,), from 0 to 1.

    Returns:
        Points on the paths, (batch, *shape).

    Raises:
        ValueError: If shapes do not fit.

    Source: Liu et al. 2023 (rectified flow), Section 2.1 (their time runs the other way).
    """
    check_same_shape(x=x, z=z)
    check_sigma(x, t)
    return (1 - expand(t, x)) * x + expand(t, x) * z


def velocity(
    denoiser: Denoiser,
    x_t: Float[Tensor, "batch *shape"],
    t: Float[Tensor, " batch"],
    label: Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, "batch *shape"]:
    """The velocity that a denoiser implies: ``v(x_t, t) = (x_t - D) / t``.

    Args:
        denoiser: Any denoiser; the exact one gives the exact velocity.
        x_t: Points on the way, (batch, *shape).
        t: Times, (batch,), above 0 and below 1.
        label: Class of each, or None.

    Returns:
        ``dx_t/dt``, (batch, *shape). Data lie against it: a sampler goes along minus v.

    Raises:
        ValueError: If a time is 1 or above, or shapes do not fit.
    """
    sigma = sigma_from_time(t)
    denoised = denoiser(x_t / expand(1 - t, x_t), sigma, label)
    return (x_t - denoised) / expand(t, x_t)


def conditional_flow_matching_loss(
    denoiser: Denoiser,
    x: Float[Tensor, "batch *shape"],
    z: Float[Tensor, "batch *shape"],
    t: Float[Tensor, " batch"],
    label: Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, ""]:
    """Mean square between the velocity at a point and that of the one path it was drawn from.

    Args:
        denoiser: The network in training.
        x: Data, (batch, *shape).
        z: Standard normal noise, (batch, *shape), drawn independently of x.
        t: Times, (batch,), above 0 and below 1.
        label: Class of each, or None.

    Returns:
        The mean over samples and values, a scalar.

    Source: Lipman et al. 2023, Theorem 2; Liu et al. 2023 (rectified flow), Eq. 1.
    """
    return functional.mse_loss(velocity(denoiser, interpolate(x, z, t), t, label), z - x)


def reflow_loss(
    denoiser: Denoiser,
    z: Float[Tensor, "batch *shape"],
    y: Float[Tensor, "batch *shape"],
    t: Float[Tensor, " batch"],
    label: Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, ""]:
    """Flow matching on pairs: noise goes to the sample that a flow made of *it*.

    Args:
        denoiser: The network in training.
        z: Standard normal noise, (batch, *shape).
        y: What an earlier flow, or the teacher, made of z, (batch, *shape).
        t: Times, (batch,), above 0 and below 1.
        label: Class of each, or None.

    Returns:
        A scalar.

    Source: Liu et al. 2023 (rectified flow), Section 2.1, "reflow"; Liu et al. 2024 (InstaFlow).
    """
    return conditional_flow_matching_loss(denoiser, y, z, t, label)


def distillation_loss(
    generator: nn.Module,
    z: Float[Tensor, "batch *shape"],
    y: Float[Tensor, "batch *shape"],
    label: Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, ""]:
    """Regression of one step on a flow's samples: what InstaFlow does after reflow.

    Args:
        generator: The one-step student.
        z: Standard normal noise, (batch, *shape).
        y: What the reflowed network made of z in several steps.
        label: Class of each, or None.

    Returns:
        A scalar. (The paper uses LPIPS for images of natural size.)

    Source: Liu et al. 2024 (InstaFlow), Eq. 6.
    """
    return functional.mse_loss(generator(z, label), y)


def flow_levels(steps: int, sigma_max: float = SIGMA_MAX) -> Float[Tensor, " steps+1"]:
    """Noise levels of evenly spaced times, for the samplers of `dmd_tutorial.samplers`.

    Args:
        steps: How many steps, at least 1.
        sigma_max: The first level; its time is a little below 1.

    Returns:
        Falling levels with 0 at the end, (steps + 1,), float64.

    Raises:
        ValueError: If steps is below 1.
    """
    if steps < 1:
        raise ValueError(f"a sampler takes at least 1 step, not {steps}")
    return sigma_from_time(torch.linspace(sigma_max / (1 + sigma_max), 0, steps + 1).double())


class Path(NamedTuple):
    """Where samples have been: times (steps + 1,) and points (steps + 1, batch, *shape)."""

    t: Float[Tensor, " steps"]
    x: Float[Tensor, "steps batch *shape"]


def flow_path(
    denoiser: Denoiser,
    z: Float[Tensor, "batch *shape"],
    levels: Float[Tensor, " steps+1"],
    label: Int[Tensor, " batch"] | None = None,
    sampler: Callable[..., Iterator[Step]] = euler,
) -> Path:
    """Run a sampler and keep its way, in the units of a flow.

    Args:
        denoiser: The network.
        z: Standard normal noise, (batch, *shape).
        levels: Falling noise levels, (steps + 1,).
        label: Class of each, or None.
        sampler: One that follows the probability-flow ODE.

    Returns:
        The path, float64, noise first.
    """
    states = [levels[0] * z.double()]
    states += [step.x for step in sampler(denoiser, z, levels, label)]
    x = torch.stack([state / (1 + sigma) for state, sigma in zip(states, levels, strict=True)])
    return Path(time_from_sigma(levels), x)


def straightness(path: Path) -> float:
    """How far paths are from straight lines at constant speed: 0 for such lines.

    Args:
        path: States and their times.

    Returns:
        The mean over samples and times of ``|velocity - mean velocity|^2``, summed over
        coordinates and divided by the mean of ``|mean velocity|^2``: without unit.

    Source: after Liu et al. 2023 (rectified flow), Eq. 3, whose measure has no divisor.
    """
    t, x = path.t, path.x.flatten(2)
    share = t.diff() / (t[-1] - t[0])
    mean = (x[-1] - x[0]) / (t[-1] - t[0])
    error = (x.diff(dim=0) / t.diff()[:, None, None] - mean).square().sum(-1).mean(-1)
    return ((share * error).sum() / mean.square().sum(-1).mean()).item()


# Recipes of the survey


def uniform_time(
    count: int, sigma_max: float, rng: Generator | None = None
) -> Float[Tensor, " count"]:
    """Times drawn evenly between (almost) 0 and that of the highest level."""
    t = torch.rand(count, generator=rng) * sigma_max / (1 + sigma_max)
    return t.clamp(min=SMALLEST_TIME)


def _in_steps(task: Task, network: nn.Module, counts: tuple[int, ...]) -> dict[int, Sampler]:
    return {n: sampling(network, euler, flow_levels(n, task.sigma_max)) for n in counts}


def _settings(seed: int, learning_rate: float) -> TeacherSettings:
    return TeacherSettings(steps=100_000, learning_rate=learning_rate, seed=seed)


def _untrained(task: Task) -> nn.Module:
    """A network like the teacher that has not learnt anything."""
    network = task.student()
    if len(task.shape) == 1:
        fresh: nn.Module = MLP(*task.shape)
    else:
        fresh = UNet(**network.network.config)  # type: ignore[union-attr, arg-type]
    return EDMDenoiser(fresh, network.sigma_data)  # type: ignore[arg-type]


def _train_from_data(task: Task, budget: Budget, seed: int) -> dict[int, Sampler]:
    def draw(rng: Generator) -> tuple:
        x, label = task.draw(BATCH, rng)
        return x, noise_like(x, rng), uniform_time(len(x), task.sigma_max, rng), label

    network = fit_within(
        budget,
        lambda: budget.watch(_untrained(task)),
        draw,
        conditional_flow_matching_loss,
        _settings(seed, 2e-3),
    )
    return _in_steps(task, network, (35, 4, 1))


def _reflow(task: Task, budget: Budget, seed: int, rng: Generator, share: float = 1.0) -> nn.Module:
    """The teacher, reflowed on pairs of its own that cost a third of the budget."""
    pairs = task.pairs(int(budget.left / 3 / 35), rng)

    def draw(rng: Generator) -> tuple:
        z, y, label = pairs.draw(BATCH, rng)
        return z, y, uniform_time(len(z), task.sigma_max, rng), label

    return fit_within(
        budget,
        lambda: budget.watch(task.student()),
        draw,
        reflow_loss,
        _settings(seed, 1e-3),
        share,
    )


def _train_reflow(task: Task, budget: Budget, seed: int) -> dict[int, Sampler]:
    network = _reflow(task, budget, seed, torch.Generator().manual_seed(seed))
    return _in_steps(task, network, (4, 1))


def _train_one_step(task: Task, budget: Budget, seed: int) -> dict[int, Sampler]:
    rng = torch.Generator().manual_seed(seed)
    network = _reflow(task, budget, seed, rng, share=0.5)
    z, label = task.noise(int(budget.left / 4 / 4), rng)
    pairs = Pairs(z, _in_steps(task, network, (4,))[4](z, label), label)

    def make() -> nn.Module:
        student = copy.deepcopy(network).requires_grad_(True)  # with the budget's watch
        return OneStepGenerator(student, task.sigma_max)

    def draw(rng: Generator) -> tuple:
        return pairs.draw(BATCH, rng)

    student = fit_within(budget, make, draw, distillation_loss, _settings(seed, 1e-3))
    return {1: lambda z, label: one_step(student, z, label)}


METHODS: tuple[Method, ...] = (
    Method("Flow matching", 8, _train_from_data, needs_data=True),
    Method("Rectified flow (reflow)", 8, _train_reflow, needs_pairs=True),
    Method("Reflow, then one step (InstaFlow)", 8, _train_one_step, needs_pairs=True),
)

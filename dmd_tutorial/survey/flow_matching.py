"""Flow matching and rectified flow: the same denoisers, trained and judged as velocities.

A point on the path of a pair (x, z) is ``x_t = (1 - t) x + t z``, from data at t = 0 to noise at
t = 1. Divided by 1 - t it is ``x + sigma z`` with ``sigma = t / (1 - t)``, the book's own form.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn import functional

from dmd_tutorial.checks import Condition, PerSample, Samples, check_sigma, expand
from dmd_tutorial.denoisers import Denoiser
from dmd_tutorial.noise import SIGMA_MAX, source
from dmd_tutorial.samplers import euler
from dmd_tutorial.samplers.step import Ladder, Steps, start


def sigma_from_time(t: PerSample) -> PerSample:
    """The noise level of a time below 1, ``sigma = t / (1 - t)``."""
    if t.min() < 0 or t.max() >= 1:
        raise ValueError(f"need 0 <= t < 1, not {t.min().item():g} to {t.max().item():g}")
    return t / (1 - t)


def interpolate(x: Samples, z: Samples, t: PerSample) -> Samples:
    """The straight path ``x_t = (1 - t) x + t z`` (Liu et al. 2023, 2.1, whose time runs back)."""
    check_sigma(x, t, z=z)
    return (1 - expand(t, x)) * x + expand(t, x) * z


def velocity(
    denoiser: Denoiser, x_t: Samples, t: PerSample, label: Condition | None = None
) -> Samples:
    """A denoiser's velocity ``dx_t/dt = (x_t - D) / t``, t in (0, 1); samplers go against it."""
    sigma = sigma_from_time(t)
    denoised = denoiser(x_t / expand(1 - t, x_t), sigma, label)
    return (x_t - denoised) / expand(t, x_t)


def conditional_flow_matching_loss(
    denoiser: Denoiser, x: Samples, z: Samples, t: PerSample, label: Condition | None = None
) -> Float[Tensor, ""]:
    """Mean square of the velocity less that of the path drawn (Lipman et al. 2023, Theorem 2)."""
    return functional.mse_loss(velocity(denoiser, interpolate(x, z, t), t, label), z - x)


def reflow_loss(
    denoiser: Denoiser, z: Samples, y: Samples, t: PerSample, label: Condition | None = None
) -> Float[Tensor, ""]:
    """Flow matching on pairs of noise and what a flow made of *it* (Liu et al. 2023, "reflow")."""
    return conditional_flow_matching_loss(denoiser, y, z, t, label)


def distillation_loss(
    generator: nn.Module, z: Samples, y: Samples, label: Condition | None = None
) -> Float[Tensor, ""]:
    """One step against what the reflowed network made of z in several (InstaFlow, Eq. 6)."""
    return functional.mse_loss(generator(z, label), y)


def flow_levels(steps: int, sigma_max: float = SIGMA_MAX) -> Ladder:
    """Noise levels of evenly spaced times, falling from sigma_max to 0, for `samplers`."""
    if steps < 1:
        raise ValueError(f"a sampler takes at least 1 step, not {steps}")
    return sigma_from_time(torch.linspace(sigma_max / (1 + sigma_max), 0, steps + 1).double())


def uniform_time(count: int, sigma_max: float, rng: Generator | None = None) -> PerSample:
    """Times drawn evenly between (almost) 0 and that of the highest level."""
    t = torch.rand(count, **source(rng)) * sigma_max / (1 + sigma_max)
    return t.clamp(min=1e-3)


class Path(NamedTuple):
    """Where samples have been."""

    t: Ladder
    x: Float[Tensor, "steps+1 batch *shape"]


def flow_path(
    denoiser: Denoiser, z: Samples, levels: Ladder,
    label: Condition | None = None, sampler: Callable[..., Steps] = euler,
) -> Path:  # fmt: skip
    """Run a sampler of the probability-flow ODE and keep its way, as a flow's, noise first."""
    states = [start(z, levels)]
    states += [step.x for step in sampler(denoiser, z, levels, label)]
    x = torch.stack([state / (1 + sigma) for state, sigma in zip(states, levels, strict=True)])
    return Path(levels / (1 + levels), x)


def straightness(path: Path) -> float:
    """How far paths are from straight lines at constant speed: 0 for such lines; without unit.

    The mean of ``|velocity - mean velocity|^2`` over that of ``|mean velocity|^2``; the measure of
    Liu et al. 2023 (rectified flow), Eq. 3, has no divisor.
    """
    t, x = path.t, path.x.flatten(2)
    share = t.diff() / (t[-1] - t[0])
    mean = (x[-1] - x[0]) / (t[-1] - t[0])
    error = (x.diff(dim=0) / t.diff()[:, None, None] - mean).square().sum(-1).mean(-1)
    return ((share * error).sum() / mean.square().sum(-1).mean()).item()

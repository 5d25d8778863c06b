"""Diffusions in continuous time: the reverse-time SDE, and the ODE with the same marginals.

``dx = f x dt + g dw`` turns data into noise. Variance-preserving and variance-exploding forms
differ in f, g and a factor alpha between their states; one function runs both backwards.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from dmd_tutorial.checks import Condition
from dmd_tutorial.denoisers import Denoiser
from dmd_tutorial.noise import noise_like
from dmd_tutorial.samplers.step import Counted, Step, start


class Process(Protocol):
    """A linear diffusion ``dx = f(t) x dt + g(t) dw`` of clean samples into noise."""

    def time(self, sigma: float) -> float:
        """When the state over alpha has this noise level."""

    def alpha(self, t: float) -> float:
        """What is left of the clean sample in the state."""

    def f(self, t: float) -> float:
        """The drift over the state, in one over time."""

    def g_squared(self, t: float) -> float:
        """Variance of the noise that comes in a unit of time."""


@dataclass(frozen=True)
class VarianceExploding:
    """``dx = sqrt(2 t) dw``: time is the noise level (Song et al. 2021, Eq. 9, in EDM's clock)."""

    def time(self, sigma: float) -> float:
        """Time is the noise level."""
        return sigma

    def alpha(self, t: float) -> float:
        """The clean sample is not scaled."""
        return 1.0

    def f(self, t: float) -> float:
        """There is no drift."""
        return 0.0

    def g_squared(self, t: float) -> float:
        """The derivative of the variance, t squared."""
        return 2 * t


@dataclass(frozen=True)
class VariancePreserving:
    """``dx = -beta x / 2 dt + sqrt(beta) dw`` with a beta that rises linearly: DDPM's limit.

    Source: Song et al. 2021, Eq. 11 and appendix B.
    """

    beta_min: float = 0.1  # at time 0, in one over time
    beta_max: float = 20.0  # at time 1

    def time(self, sigma: float) -> float:
        """Solve ``integral of beta up to t = ln(1 + sigma^2)``, a quadratic equation."""
        slope, integral = self.beta_max - self.beta_min, math.log1p(sigma**2)
        root = math.sqrt(self.beta_min**2 + 2 * slope * integral)
        return 2 * integral / (self.beta_min + root)  # no digits are lost where t is small

    def alpha(self, t: float) -> float:
        """``exp(-integral of beta / 2)``."""
        return math.exp(-(self.beta_min * t + (self.beta_max - self.beta_min) * t**2 / 2) / 2)

    def f(self, t: float) -> float:
        """Minus a half of beta."""
        return -self.g_squared(t) / 2

    def g_squared(self, t: float) -> float:
        """Beta."""
        return self.beta_min + (self.beta_max - self.beta_min) * t


VE, VP = VarianceExploding(), VariancePreserving()


@torch.no_grad()
def reverse_sde(
    denoiser: Denoiser, z: Float[Tensor, "batch *shape"], levels: Float[Tensor, " steps+1"],
    label: Condition | None = None, *, process: Process = VE, chance: float = 1.0,
    rng: Generator | None = None,
) -> Iterator[Step]:  # fmt: skip
    """Run a diffusion backwards with the steps of Euler and Maruyama.

    ``dx = (f x - (1 + chance^2) / 2 g^2 score) dt + chance g dw``, with time running down. Every
    value of chance, 0 or above, has the same marginals: 1 is the reverse-time SDE, 0 the
    probability-flow ODE. No noise is added in a step to level 0. The levels, and the x of a record,
    are those of the state over alpha. Source: Anderson 1982; Song et al. 2021, Eq. 6 and 13.
    """
    if chance < 0:
        raise ValueError(f"chance must not be negative, it is {chance}")
    counted = Counted(denoiser, label, z.dtype)
    times = [process.time(sigma) for sigma in levels.tolist()]
    state = process.alpha(times[0]) * start(z, levels)
    for index, (t, t_next) in enumerate(pairwise(times)):
        alpha, sigma, sigma_next = process.alpha(t), levels[index].item(), levels[index + 1].item()
        denoised = counted(state / alpha, sigma)
        score = (denoised - state / alpha) / (alpha * sigma**2)
        g_squared, length = process.g_squared(t), t - t_next
        drift = process.f(t) * state - (1 + chance**2) / 2 * g_squared * score
        state = state - length * drift
        if chance > 0 and sigma_next > 0:
            noise = noise_like(state, rng)
            state = state + chance * math.sqrt(g_squared * length) * noise
        yield Step(index, state / process.alpha(t_next), denoised, sigma_next, counted.calls)


def probability_flow(
    denoiser: Denoiser, z: Float[Tensor, "batch *shape"], levels: Float[Tensor, " steps+1"],
    label: Condition | None = None, *, process: Process = VE,
) -> Iterator[Step]:  # fmt: skip
    """Euler's steps on the probability-flow ODE of a diffusion; for `VE` they are `euler`'s.

    Source: Song et al. 2021, Eq. 13.
    """
    return reverse_sde(denoiser, z, levels, label, process=process, chance=0.0)

"""Diffusions in continuous time: the reverse-time SDE, and the ODE with the same marginals.

``dx = f x dt + g dw`` turns data into noise. Variance-preserving and variance-exploding forms
differ in f, g and a factor alpha between their states; one function runs both backwards.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Generator

from dmd_tutorial.checks import Condition, Samples
from dmd_tutorial.denoisers import Denoiser
from dmd_tutorial.noise import noise_like
from dmd_tutorial.samplers.step import Counted, Ladder, Step, Steps, start


class Process(NamedTuple):
    """A linear diffusion ``dx = f(t) x dt + g(t) dw`` of clean samples into noise."""

    time: Callable[[float], float]  # when the state over alpha has a noise level
    alpha: Callable[[float], float]  # what is left of the clean sample in the state
    f: Callable[[float], float]  # the drift over the state, in one over time
    g_squared: Callable[[float], float]  # variance of the noise that comes in a unit of time


def _vp_time(sigma: float) -> float:
    # solves: integral of beta up to t = ln(1 + sigma^2), a quadratic equation
    integral = math.log1p(sigma**2)
    root = math.sqrt(BETA_MIN**2 + 2 * BETA_SLOPE * integral)
    return 2 * integral / (BETA_MIN + root)  # no digits are lost where t is small


# ``dx = sqrt(2 t) dw``: time is the noise level (Song et al. 2021, Eq. 9, in EDM's clock)
VE = Process(lambda sigma: sigma, lambda t: 1.0, f=lambda t: 0.0, g_squared=lambda t: 2 * t)
# ``dx = -beta x / 2 dt + sqrt(beta) dw``, beta linear in t up to 1 (Song et al. 2021, B)
BETA_MIN, BETA_SLOPE = 0.1, 20.0 - 0.1
VP = Process(
    _vp_time, alpha=lambda t: math.exp(-(BETA_MIN * t + BETA_SLOPE * t**2 / 2) / 2),
    f=lambda t: -(BETA_MIN + BETA_SLOPE * t) / 2, g_squared=lambda t: BETA_MIN + BETA_SLOPE * t,
)  # fmt: skip


@torch.no_grad()
def reverse_sde(
    denoiser: Denoiser, z: Samples, levels: Ladder, label: Condition | None = None, *,
    process: Process = VE, chance: float = 1.0, rng: Generator | None = None,
) -> Steps:  # fmt: skip
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


# Euler's steps on the probability-flow ODE of a diffusion; for `VE` they are `euler`'s
probability_flow = partial(reverse_sde, chance=0.0)

"""Euler, Heun, scipy's RK45 on the probability-flow ODE; EDM's own sampler, Heun's with noise."""

import math
from itertools import pairwise

import numpy as np
import torch
from torch import Generator, Tensor

from dmd_tutorial.checks import Condition, Samples
from dmd_tutorial.denoisers import Denoiser
from dmd_tutorial.noise import source
from dmd_tutorial.samplers.step import Counted, Ladder, Step, Steps, start


@torch.no_grad()
def euler(denoiser: Denoiser, z: Samples, levels: Ladder, label: Condition | None = None) -> Steps:
    """Euler's method on the probability-flow ODE, of first order (Song et al. 2021, Eq. 13)."""
    counted = Counted(denoiser, label, z.dtype)
    x = start(z, levels)
    for index, (sigma, sigma_next) in enumerate(pairwise(levels.tolist())):
        denoised, slope = counted.slope(x, sigma)
        x = x + (sigma_next - sigma) * slope
        yield Step(index, x, denoised, sigma_next, counted.calls)


def heun(denoiser: Denoiser, z: Samples, levels: Ladder, label: Condition | None = None) -> Steps:
    """Heun's method on the same ODE, of second order, in 2N - 1 evaluations (EDM, Algorithm 1)."""
    return stochastic(denoiser, z, levels, label, churn=0.0)


def heun_step(
    counted: Counted, x: Tensor, sigma: float, sigma_next: float
) -> tuple[Tensor, Tensor]:
    """Take one step of Heun's method (to level 0, of Euler's); returns D's last answer, too."""
    denoised, slope = counted.slope(x, sigma)
    x_next = x + (sigma_next - sigma) * slope
    if sigma_next > 0:  # at level 0 the slope is 0/0
        denoised, slope_next = counted.slope(x_next, sigma_next)
        x_next = x + (sigma_next - sigma) * (slope + slope_next) / 2
    return x_next, denoised


@torch.no_grad()
def stochastic(
    denoiser: Denoiser, z: Samples, levels: Ladder,
    label: Condition | None = None, *, churn: float = 40.0, churn_min: float = 0.05,
    churn_max: float = 50.0, noise_scale: float = 1.003, rng: Generator | None = None,
) -> Steps:  # fmt: skip
    """EDM's stochastic sampler: a little new noise before each of Heun's steps.

    `churn` says how much noise in all (S_churn), 0 for `heun`. It comes at the levels
    from churn_min to churn_max (S_min, S_max), with standard deviation `noise_scale` (S_noise).
    Source: Karras et al. 2022 (EDM), Algorithm 2 and Table 5.
    """
    if churn < 0:
        raise ValueError(f"churn must not be negative, it is {churn}")
    counted = Counted(denoiser, label, z.dtype)
    x = start(z, levels)
    gamma_of_all = min(churn / (len(levels) - 1), math.sqrt(2) - 1)
    for index, (sigma, sigma_next) in enumerate(pairwise(levels.tolist())):
        gamma = gamma_of_all if churn_min <= sigma <= churn_max else 0.0
        sigma_hat = sigma * (1 + gamma)
        if gamma > 0:
            noise = torch.randn(x.shape, dtype=z.dtype, **source(rng)).to(x)
            x = x + noise_scale * math.sqrt(sigma_hat**2 - sigma**2) * noise
        x, denoised = heun_step(counted, x, sigma_hat, sigma_next)
        yield Step(index, x, denoised, sigma_next, counted.calls)


@torch.no_grad()
def rk45(
    denoiser: Denoiser, z: Samples, levels: Ladder,
    label: Condition | None = None, *, tolerance: float = 1e-3,
) -> Steps:  # fmt: skip
    """Dormand and Prince's method of order 5, which chooses its own steps (scipy's).

    It solves ``dx / d(-ln sigma) = D - x`` for the whole batch as one system, with six evaluations
    a step, and six more for a step refused. Of the levels only the first and the last above 0
    count; if the last is 0, Euler's step to it ends the path. The tolerance is the error allowed
    in a step, absolute and relative. A RuntimeError says that no step is small enough for it.
    Source: Song et al. 2021, Section 4.3.
    """
    from scipy.integrate import RK45

    counted = Counted(denoiser, label, z.dtype)
    x = start(z, levels)
    low = levels[levels > 0][-1].item()

    def points(flat: np.ndarray) -> Tensor:
        return torch.as_tensor(flat).reshape(x.shape).to(x)

    def slope(time: float, flat: np.ndarray) -> np.ndarray:
        state = points(flat)
        return (counted(state, math.exp(-time)) - state).flatten().cpu().numpy()

    first, last = -math.log(levels[0].item()), -math.log(low)
    flat, index = x.flatten().cpu().numpy(), 0
    if first < last:
        solver = RK45(slope, first, flat, last, math.inf, tolerance, tolerance)
    while first < last and solver.status == "running":
        message = solver.step()
        if solver.status == "failed":
            raise RuntimeError(f"RK45 stopped at noise level {math.exp(-solver.t):g}: {message}")
        x, change = points(solver.y), points(solver.f)
        yield Step(index, x, x + change, math.exp(-solver.t), counted.calls)
        index += 1
    if levels[-1] == 0:
        denoised = counted(x, low)
        yield Step(index, denoised, denoised, 0.0, counted.calls)

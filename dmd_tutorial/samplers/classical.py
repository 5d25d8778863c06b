"""Classical solvers of the probability-flow ODE: Euler, Heun, and scipy's RK45."""

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from dmd_tutorial.checks import Condition, Samples
from dmd_tutorial.denoisers import Denoiser
from dmd_tutorial.samplers.step import Counted, Ladder, Step, start


@torch.no_grad()
def euler(
    denoiser: Denoiser, z: Samples, levels: Ladder, label: Condition | None = None
) -> Iterator[Step]:
    """Euler's method on the probability-flow ODE, of first order (Song et al. 2021, Eq. 13)."""
    counted = Counted(denoiser, label, z.dtype)
    x = start(z, levels)
    for index, (sigma, sigma_next) in enumerate(pairwise(levels.tolist())):
        denoised, slope = counted.slope(x, sigma)
        x = x + (sigma_next - sigma) * slope
        yield Step(index, x, denoised, sigma_next, counted.calls)


@torch.no_grad()
def heun(
    denoiser: Denoiser, z: Samples, levels: Ladder, label: Condition | None = None
) -> Iterator[Step]:
    """Heun's method on the probability-flow ODE, of second order (EDM, Algorithm 1).

    The step to level 0 is Euler's, as the slope there is 0/0: N steps cost 2N - 1 evaluations.
    """
    counted = Counted(denoiser, label, z.dtype)
    x = start(z, levels)
    for index, (sigma, sigma_next) in enumerate(pairwise(levels.tolist())):
        x, denoised = heun_step(counted, x, sigma, sigma_next)
        yield Step(index, x, denoised, sigma_next, counted.calls)


def heun_step(
    counted: Counted, x: Tensor, sigma: float, sigma_next: float
) -> tuple[Tensor, Tensor]:
    """Take one step of Heun's method (to level 0, of Euler's); returns D's last answer, too."""
    denoised, slope = counted.slope(x, sigma)
    x_next = x + (sigma_next - sigma) * slope
    if sigma_next > 0:
        denoised, slope_next = counted.slope(x_next, sigma_next)
        x_next = x + (sigma_next - sigma) * (slope + slope_next) / 2
    return x_next, denoised


@torch.no_grad()
def rk45(
    denoiser: Denoiser, z: Samples, levels: Ladder,
    label: Condition | None = None, *, tolerance: float = 1e-3,
) -> Iterator[Step]:  # fmt: skip
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

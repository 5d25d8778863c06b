"""Fast solvers: what is known exactly is integrated exactly, what is not is a polynomial.

With ``s = -ln sigma`` the probability-flow ODE is ``dx/ds = D - x``. From a level sigma over a
distance h in s, its solution is

    x(h) = exp(-h) (x + integral_0^h exp(u) D(u) du)

and only D is unknown. DPM-Solver++ lays a polynomial through the answers so far, at no cost in
evaluations. DEIS lays it through the noise estimates instead, and UniPC corrects each step with
the answer that the next step needs anyway. PNDM is older: Adams and Bashforth's means of noise
estimates, as if all steps were of one length.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmd_tutorial.checks import Condition, Samples
from dmd_tutorial.denoisers import Denoiser
from dmd_tutorial.samplers.step import Counted, Ladder, Step, Steps, start

History = Sequence[tuple[float, Tensor]]  # (sigma, answer there), the newest first


def polynomial_weights(nodes: Sequence[float], h: float, rate: float) -> list[float]:
    """Weights of a polynomial's values at nodes in ``integral_0^h exp(rate u) polynomial(u) du``.

    A weight is the integral of its node's Lagrange polynomial, by Gauss-Legendre quadrature with 20
    points, which is exact to rounding here. Source: Zhang and Chen 2023 (DEIS), Eq. 15.
    """
    points, shares = np.polynomial.legendre.leggauss(20)
    u = h * (points + 1) / 2
    weights = []
    for j, node in enumerate(nodes):
        others = [other for i, other in enumerate(nodes) if i != j]
        lagrange = np.prod([(u - other) / (node - other) for other in others], axis=0)
        weights.append(float(h / 2 * (shares * np.exp(rate * u) * lagrange).sum()))
    return weights


def _integral(history: History, sigma: float, sigma_next: float, rate: float) -> Tensor | float:
    """Integral over a step of exp(rate u) times the polynomial through the history."""
    nodes = [math.log(sigma / level) for level, _ in history]
    weights = polynomial_weights(nodes, math.log(sigma / sigma_next), rate)
    return sum(weight * answer for weight, (_, answer) in zip(weights, history, strict=True))


def linear_step(x: Samples, history: History, sigma_next: float) -> Samples:
    """DPM-Solver++(2M): the line through two estimates counts as its middle (Lu 2022, Alg. 2)."""
    (sigma, newest), (before, older) = history
    half = math.log(sigma / sigma_next) / 2
    middle = newest + half * (newest - older) / math.log(before / sigma)
    kept = sigma_next / sigma
    return kept * x + (1 - kept) * middle


def quadratic_step(x: Samples, history: History, sigma_next: float, share: float = 1.0) -> Samples:
    """The step of the multistep DPM-Solver++ of order 3: a parabola through three estimates.

    `share` says how much of the quadratic term counts. 1 is the integral of the parabola; with the
    0.5 of the published code the method is of order 2. Source: after Lu et al. 2022, Eq. 9.
    """
    (sigma, newest), (before, older), (first, oldest) = history
    h2, h1, h = (math.log(a / b) for a, b in pairwise((first, before, sigma, sigma_next)))
    slope, slope_before = (newest - older) / h1, (older - oldest) / h2
    bend = (slope - slope_before) / (h1 + h2)  # half of the second derivative
    slope = slope + h1 * bend  # from between the two newest to the newest
    kept = math.exp(-h)
    linear = h - (1 - kept)  # integral of exp(u - h) u from 0 to h
    quadratic = h**2 - 2 * linear  # of exp(u - h) u^2
    return kept * x + (1 - kept) * newest + linear * slope + share * quadratic * bend


def predict(x: Samples, history: History, sigma_next: float, share: float = 1.0) -> Samples:
    """DPM-Solver++'s step, whose order is the history's length (Lu et al. 2022, Eq. 9, Alg. 2)."""
    sigma, newest = history[0]
    if len(history) == 1 or sigma_next == 0:  # at level 0 the newest estimate is the answer
        return (sigma_next / sigma) * x + (1 - sigma_next / sigma) * newest
    if len(history) == 2:
        return linear_step(x, history, sigma_next)
    return quadratic_step(x, history, sigma_next, share)


@torch.no_grad()
def dpm_solver(
    denoiser: Denoiser, z: Samples, levels: Ladder,
    label: Condition | None = None, *, order: int = 2, share: float = 1.0,
) -> Steps:  # fmt: skip
    """DPM-Solver++, multistep: one evaluation a step, of order 1 (`euler`), 2 (2M) or 3.

    The first steps, and the last ones if they lead to level 0, are of lower order. For share see
    `quadratic_step`. Source: Lu et al. 2022 (DPM-Solver++), Algorithm 2 and appendix.
    """
    counted = Counted(denoiser, label, z.dtype)
    x = start(z, levels)
    history: list[tuple[float, Tensor]] = []
    orders = _orders(levels, order)
    for index, (sigma, sigma_next) in enumerate(pairwise(levels.tolist())):
        history.insert(0, (sigma, counted(x, sigma)))
        x = predict(x, history[: orders[index]], sigma_next, share)
        yield Step(index, x, history[0][1], sigma_next, counted.calls)


@torch.no_grad()
def deis(
    denoiser: Denoiser, z: Samples, levels: Ladder,
    label: Condition | None = None, *, order: int = 3,
) -> Steps:  # fmt: skip
    """DEIS: a polynomial in ln(sigma) through noise estimates (Zhang and Chen 2023, Eq. 14, 15)."""
    counted = Counted(denoiser, label, z.dtype)
    x = start(z, levels)
    history: list[tuple[float, Tensor]] = []
    orders = _orders(levels, order)
    for index, (sigma, sigma_next) in enumerate(pairwise(levels.tolist())):
        denoised, noise = counted.slope(x, sigma)
        history.insert(0, (sigma, noise))
        if sigma_next == 0:
            x = denoised
        else:  # dsigma = -sigma exp(-u) du
            x = x - sigma * _integral(history[: orders[index]], sigma, sigma_next, rate=-1.0)
        yield Step(index, x, denoised, sigma_next, counted.calls)


# Weights of the noise estimates so far, newest first, for steps of one length (Adams, Bashforth).
ADAMS = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


@torch.no_grad()
def pndm(denoiser: Denoiser, z: Samples, levels: Ladder, label: Condition | None = None) -> Steps:
    """PNDM without Runge-Kutta steps (PLMS), as Stable Diffusion runs it: N + 1 evaluations.

    It is of order 2. The first step is Heun's. Steps count as equally long, which they are in time:
    levels should be evenly spaced in a schedule's steps, as `ddpm_levels`.
    Source: Liu et al. 2022 (PNDM), Eq. 9 and 12, divided by the root of alpha.
    """
    counted = Counted(denoiser, label, z.dtype)
    x = start(z, levels)
    history: list[Tensor] = []
    for index, (sigma, sigma_next) in enumerate(pairwise(levels.tolist())):
        denoised, noise = counted.slope(x, sigma)
        history = [noise, *history[:3]]
        weights = ADAMS[len(history) - 1]
        mean: Any = sum(w * each for w, each in zip(weights, history, strict=True))
        if index == 0 and sigma_next > 0:
            denoised, ahead = counted.slope(x + (sigma_next - sigma) * noise, sigma_next)
            mean = (noise + ahead) / 2
        x = x + (sigma_next - sigma) * mean
        yield Step(index, x, denoised, sigma_next, counted.calls)


@torch.no_grad()
def unipc(
    denoiser: Denoiser, z: Samples, levels: Ladder,
    label: Condition | None = None, *, order: int = 2,
) -> Steps:  # fmt: skip
    """UniPC: DPM-Solver++'s step, corrected as soon as the denoiser has answered at its end.

    The answer is needed for the next step anyway, so the correction is free; it raises the order by
    one. The x of a record is the prediction, not yet corrected.
    Source: Zhao et al. 2023 (UniPC), Algorithms 1 and 2, with B(h) = exp(h) - 1.
    """
    counted = Counted(denoiser, label, z.dtype)
    x = before = start(z, levels)
    history: list[tuple[float, Tensor]] = []
    orders = _orders(levels, order)
    for index, (sigma, sigma_next) in enumerate(pairwise(levels.tolist())):
        denoised = counted(x, sigma)
        if index > 0:
            x = corrected_step(before, [(sigma, denoised), *history[: orders[index - 1]]])
        history.insert(0, (sigma, denoised))
        before = x
        x = predict(x, history[: orders[index]], sigma_next)
        yield Step(index, x, denoised, sigma_next, counted.calls)


def corrected_step(before: Samples, history: History) -> Samples:
    """The last step again, with the answer at its end, the history's first, as a node (UniPC)."""
    (sigma_next, newest), (sigma, older), *rest = history
    if not rest:  # of order 1: the paper takes the mean of both ends
        kept = sigma_next / sigma
        return kept * before + (1 - kept) * (newest + older) / 2
    kept = math.exp(-math.log(sigma / sigma_next))
    return kept * (before + _integral(history, sigma, sigma_next, rate=1.0))


def _orders(levels: Tensor, order: int) -> list[int]:
    """How many answers each step uses: few at the start, and before level 0."""
    if order not in (1, 2, 3):
        raise ValueError(f"order must be 1, 2 or 3, not {order}")
    steps, to_zero = len(levels) - 1, bool(levels[-1] == 0)
    return [min(order, i + 1, steps - i if to_zero else order) for i in range(steps)]

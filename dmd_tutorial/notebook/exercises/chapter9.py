"""Exercises of chapter 9, consistency models."""

import math

import torch
from torch import Tensor

from dmd_tutorial.notebook.exercises import Exercise, Network, gradients_by


def factors(sigma: Tensor, sigma_data: float, sigma_min: float) -> tuple[Tensor, Tensor]:
    above = sigma - sigma_min
    c_skip = sigma_data**2 / (above**2 + sigma_data**2)
    return c_skip, sigma_data * above / (sigma**2 + sigma_data**2).sqrt()


def grid(low: float, high: float, std: float, count: int) -> Tensor:
    return std * torch.tan(torch.linspace(math.atan(low / std), math.atan(high / std), count))


EXERCISES = [
    Exercise("9.1", "the price of the grid, read off the figure", (26, 0.41, 2), {
        "that is what is missing: the axis shows what is left": (26, 0.59, 2),
        "this is the curve with fresh noise": (26, 0.0, 2),
        "at 18 levels, and at 20, a little less than 90 % is left": (18, 0.41, 2),
        "what is missing goes down like 1 / N, not like 1 / N**2": (26, 0.41, 4),
    }, tolerance=(5, 0.05, 0.5)),
    Exercise("9.2", "factors with a boundary condition", factors, {
        "these are EDM's factors: at sigma_min they leave a part of the network; put sigma - "
        "sigma_min where they have sigma": lambda s, d, low: factors(s, d, 0.0),
        "only the numerator of c_out is shifted, the root keeps sigma":
            lambda s, d, low: (factors(s, d, low)[0], factors(s - low, d, 0.0)[1]),
        "c_skip must be 1 at sigma_min: shift its sigma, too":
            lambda s, d, low: (factors(s, d, 0.0)[0], factors(s, d, low)[1]),
        "c_skip has squares, and no root":
            lambda s, d, low: (factors(s, d, low)[0].sqrt(), factors(s, d, low)[1]),
        "c_out has the factor sigma_data: the network's output has unit variance":
            lambda s, d, low: (factors(s, d, low)[0], factors(s, d, low)[1] / d),
        "the order is c_skip, c_out": lambda s, d, low: factors(s, d, low)[::-1],
    }, inputs=lambda: [(torch.tensor([0.1, 0.4, 1.5, 20.0]), 0.7, 0.1),
                       (torch.tensor([0.0025]), 0.5, 0.002), (torch.tensor([3.0]), 0.5, 0.002)]),
    Exercise("9.3", "grid that keeps the most spread", grid, {
        "that is the grid of equal steps in the level: nearly all its angles are tiny, one is not":
            lambda low, high, std, count: torch.linspace(low, high, count),
        "that is the grid of equal ratios; asked for are equal angles":
            lambda low, high, std, count: torch.logspace(math.log10(low), math.log10(high), count),
        "the angle is that of level over standard deviation, arctan(sigma / std)":
            lambda low, high, std, count: grid(low, high, 1.0, count),
        "these are the angles: a level is std times the tangent of its angle":
            lambda low, high, std, count: (grid(low, high, std, count) / std).atan(),
        "these are the tangents: std times each of them is a level":
            lambda low, high, std, count: grid(low, high, std, count) / std,
        "the levels rise, from sigma_min to sigma_max": lambda *a: grid(*a).flip(0),
        "count levels are asked for, not count intervals":
            lambda low, high, std, count: grid(low, high, std, count + 1),
    }, inputs=lambda: [(0.01, 9.0, 0.6, 5), (0.3, 80.0, 1.5, 8), (0.002, 5.0, 0.5, 2)]),
    Exercise("9.4", "consistency loss",
             lambda f, x, s, y, t: (f(x, s) - f(y, t).detach()).square().mean(), {
        "without .detach() on the lower point both answers move, and may meet anywhere":
            lambda f, x, s, y, t: (f(x, s) - f(y, t)).square().mean(),
        "the higher point learns from the lower one, which is nearer to the data: .detach() "
        "belongs on f(x_next, sigma_next)":
            lambda f, x, s, y, t: (f(x, s).detach() - f(y, t)).square().mean(),
        "take the mean over the batch, not the sum":
            lambda f, x, s, y, t: (f(x, s) - f(y, t).detach()).square().sum(),
        "compare the two answers of f, not the answer with the lower point itself":
            lambda f, x, s, y, t: (f(x, s) - y).square().mean(),
        "each point is asked at its own level: f(x_next, sigma_next)":
            lambda f, x, s, y, t: (f(x, s) - f(y, s).detach()).square().mean(),
    }, inputs=lambda: [(Network(lambda weight, x, sigma: weight * x / (1 + sigma), 1.3),
                        torch.randn(shape), sigma, torch.randn(shape), ratio * sigma)
                       for shape, ratio, sigma in (((4, 2), 0.7, torch.tensor([0.5, 1, 3, 8])),
                                                   ((1, 3, 2), 0.1, torch.tensor([0.02])))],
       probe=gradients_by({"gradient that reaches the network": 0})),
    Exercise("9.5", "levels that three formulas reach", (0.8, 1.0, 0.632), {
        "variances add, and the sample has sigma_min already": (0.8, 0.8, 0.632),
        "tau - sigma_min is too little: variances add, not standard deviations": (0.8, 1.0, 0.8),
        "that is the standard deviation of the new noise alone": (0.529, 0.8, 0.2),
        "these are variances; a level is a standard deviation": (0.64, 1.0, 0.4),
    }, tolerance=0.01),
]  # fmt: skip

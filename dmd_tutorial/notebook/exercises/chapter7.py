"""Exercises of chapter 7: many steps."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dmd_tutorial.notebook.exercises import Exercise
from dmd_tutorial.samplers import ddim_noise

Levels = tuple[float, float, float]
_posterior_std = partial(ddim_noise, eta=1.0)


def posterior(x: Tensor, sigma: float, sigma_next: float, std: float) -> tuple[Tensor, float]:
    kept = (std**2 + sigma_next**2) / (std**2 + sigma**2)
    return kept * x, math.sqrt(kept * (sigma**2 - sigma_next**2))


def ddim_step(x: Tensor, D: Tensor, sigma: float, low: float, eta: float, fresh: Tensor) -> Tensor:
    new = eta * _posterior_std(sigma, low)
    return D + math.sqrt(low**2 - new**2) * (x - D) / sigma + new * fresh


def line_step(
    x: Tensor, new: Tensor, old: Tensor, levels: Levels,
    before: Callable = lambda s: math.log(s[0] / s[1]), rises: Callable = lambda h, i_0: h - i_0,
) -> Tensor:  # fmt: skip
    kept = levels[2] / levels[1]
    slope = (new - old) / before(levels)
    return kept * x + (1 - kept) * new + rises(-math.log(kept), 1 - kept) * slope


EXERCISES = [
    Exercise("7.1", "spreads after one step, three ways", (1.0, 1.0, 1.323), {
        "with no new noise the old one shrinks by sigma_next / sigma": (2.0, 1.0, 1.323),
        "with eta = 1 the old noise makes room: both together have level 1": (1.0, 1.323, 1.323),
        "nothing made room for the new noise: its variance comes on top": (1.0, 1.0, 1.0),
        "variances add, not standard deviations": (1.0, 1.0, 1.866),
        "that is the new noise alone: some of the old is kept beside it": (1.0, 0.866, 1.323),
        "that is the variance: the standard deviation is its root": (1.0, 1.0, 1.75),
    }, tolerance=0.02),
    Exercise("7.2", "posterior of the less noisy sample", posterior, {
        "x counts by a ratio of variances; its root is the step of the ODE, which draws nothing":
            lambda x, *a: (posterior(x / x, *a)[0] ** 0.5 * x, posterior(x, *a)[1]),
        "the standard deviation is asked for: that is the variance":
            lambda *a: (posterior(*a)[0], posterior(*a)[1] ** 2),
        "that is the noise between the two levels; the spread of what is below narrows it":
            lambda x, s, t, d: (posterior(x, s, t, d)[0], math.sqrt(s**2 - t**2)),
        "that is tau of (7.3), for a clean sample that is known; here it is not":
            lambda x, s, t, d: (posterior(x, s, t, d)[0], _posterior_std(s, t)),
        "the data have a spread: without noise their variance is std**2, not 0":
            lambda x, s, t, d: posterior(x, s, t, 0.0),
    }, inputs=lambda: [(torch.randn(4, 2), 1.7, 0.6, 0.8), (torch.randn(1, 3), 0.02, 0.002, 0.01)]),
    Exercise("7.3", "a step of DDIM", ddim_step, {
        "eta multiplies the standard deviation of DDPM's step, the root of its variance":
            lambda x, D, s, t, eta, new: ddim_step(x, D, s, t, eta * _posterior_std(s, t), new),
        "the noise that is kept must make room for the new: sqrt(sigma_next**2 - new**2), so that "
        "both together have the level sigma_next":
            lambda x, D, s, t, eta, new: D + t * (x - D) / s + eta * _posterior_std(s, t) * new,
        "the old noise is (x - denoised) / sigma": lambda x, D, s, t, eta, new:
            ddim_step(D + s * (x - D), D, s, t, eta, new),
        "the step begins at the denoised point, not at x":
            lambda x, D, s, t, eta, new: x - D + ddim_step(x, D, s, t, eta, new),
        "the new noise is missing": lambda x, D, s, t, eta, new: ddim_step(x, D, s, t, 0.0, new),
        "eta scales the standard deviation itself, not the variance":
            lambda x, D, s, t, eta, new: ddim_step(x, D, s, t, math.sqrt(eta), new),
    }, inputs=lambda: [(*torch.randn(2, *shape), *levels, eta, torch.randn(shape))
                       for shape in ((4, 2), (1, 3, 2)) for eta in (0.3, 1.0)
                       for levels in ((1.7, 0.6), (0.02, 0.002), (0.5, 0.0))]),
    Exercise("7.4", "drift backwards in time",
             lambda x, score, f, g, chance: f * x - (1 + chance**2) / 2 * g**2 * score, {
        "the score's sign is the other way round: with time running down, minus the score times a "
        "negative dt moves up the density":
            lambda x, score, f, g, chance: f * x + (1 + chance**2) / 2 * g**2 * score,
        "that is right for the SDE only: with less chance the score counts less, down to a half "
        "in the ODE": lambda x, score, f, g, chance: f * x - g**2 * score,
        "that is right for the ODE only: noise that is added must be drifted away again":
            lambda x, score, f, g, chance: f * x - g**2 * score / 2,
        "the noise has the variance (chance g)**2 per unit of time: chance counts squared":
            lambda x, score, f, g, chance: f * x - (1 + chance) / 2 * g**2 * score,
        "g counts squared: it is a standard deviation":
            lambda x, score, f, g, chance: f * x - (1 + chance**2) / 2 * g * score,
    }, inputs=lambda: [(*torch.randn(2, *shape), f, g, chance)
                       for shape, f, g in (((4, 2), -0.7, 1.6), ((1, 3, 2), 0.3, 0.02))
                       for chance in (0.0, 0.5, 1.0, 2.0)]),
    Exercise("7.5", "a step along a line", line_step, {
        "distances are measured in the logarithm of the level, not in the level":
            partial(line_step, before=lambda s: s[0] - s[1]),
        "the two steps are not equally long: the slope is a difference over h1":
            partial(line_step, before=lambda s: math.log(s[1] / s[2])),
        "that is (7.19), which takes the line's value in the middle: integrate the line":
            partial(line_step, rises=lambda h, i_0: i_0 * h / 2),
        "that is the line's value at the end of the step: integrate it over the step":
            partial(line_step, rises=lambda h, i_0: i_0 * h),
        "the line goes on in its direction: add newest - older, do not subtract it":
            partial(line_step, before=lambda s: math.log(s[1] / s[0])),
        "that is Euler's step: older is not used": partial(line_step, rises=lambda h, i_0: 0.0),
    }, inputs=lambda: [(*torch.randn(3, *shape), levels)
                       for shape, levels in (((4, 2), (3.0, 1.5, 0.4)), ((4, 2), (80.0, 5.0, 3.0)),
                                             ((1, 3, 2), (0.03, 0.02, 0.002)))]),
]  # fmt: skip

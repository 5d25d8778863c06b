"""Exercises of chapter 2: the teacher and its many steps."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dmd_tutorial.denoisers import Denoiser, edm_preconditioning
from dmd_tutorial.notebook.exercises import Exercise, Network


def factors(sigma: Tensor, sigma_data: float, **wrong: Callable) -> tuple[Tensor, ...]:
    changed = {name: factor(sigma, sigma_data) for name, factor in wrong.items()}
    return edm_preconditioning(sigma, sigma_data)._replace(**changed)[:3]


def heun_step(
    denoiser, x, sigma, sigma_next, a=0.5, b=0.5, moved=True, guarded=True, old=False, ahead=1
) -> Tensor:
    # wrong ones have other shares, a and b, of the slopes, or take another second slope
    step = ahead * (sigma_next - sigma)
    first = _slope(denoiser, x, sigma)
    predicted = x + step * first
    if guarded and sigma_next == 0:
        return predicted
    second = _slope(denoiser, predicted if moved else x, sigma_next, over=sigma if old else None)
    return x + step * (a * first + b * second)


def gaussian_path(x, start, end, mean, std, power=1) -> Tensor:
    return mean + (x - mean) * ((std**2 + end**2) / (std**2 + start**2)) ** (power / 2)


def _slope(denoiser: Denoiser, x: Tensor, sigma: float, over: float | None = None) -> Tensor:
    return (x - denoiser(x, torch.full((len(x),), sigma, dtype=x.dtype))) / (over or sigma)


EXERCISES = [
    Exercise("2.1", "factors of the preconditioning", factors, {
        "c_skip is the wrong way round: with no noise (sigma = 0) the input is the answer, so "
        "c_skip must be 1 there": partial(factors, c_skip=lambda s, sd: s**2 / (s**2 + sd**2)),
        "c_skip is a ratio of variances: square both sigma_data and sigma":
            partial(factors, c_skip=lambda s, sd: sd / (s + sd)),
        "c_out is a standard deviation: a square root is missing in its denominator":
            partial(factors, c_out=lambda s, sd: s * sd / (s**2 + sd**2)),
        "c_skip has no root": partial(factors, c_skip=lambda s, sd: sd / (s**2 + sd**2).sqrt()),
        "c_in divides by the standard deviation of the noisy input":
            partial(factors, c_in=lambda s, sd: (s**2 + sd**2).sqrt()),
        "the order is c_skip, c_out, c_in": lambda s, sd: [factors(s, sd)[i] for i in (0, 2, 1)],
        "c_out and c_in are standard deviations: the square roots are missing": partial(
            factors, c_out=lambda s, d: s * d / (s**2 + d**2), c_in=lambda s, d: 1 / (s**2 + d**2)),
        "c_out is squared: what you return is the variance of the target before scaling":
            partial(factors, c_out=lambda s, sd: (s * sd) ** 2 / (s**2 + sd**2)),
        "c_out must shrink with sigma at low noise; sqrt(sigma^2 + sigma_data^2) is the standard "
        "deviation of the noisy input": partial(factors, c_out=lambda s, sd: (s**2 + sd**2).sqrt()),
        "c_in is a scale, so it is one over a standard deviation, not over a variance":
            partial(factors, c_in=lambda s, sd: 1 / (s**2 + sd**2)),
        "variances add, not their square roots": partial(factors, c_in=lambda s, sd: 1 / (s + sd)),
        "c_in leaves out the spread of the data: at low noise the input is not small":
            partial(factors, c_in=lambda s, sd: 1 / s),
    }, inputs=lambda: [(torch.tensor([0.0, 0.002, 0.1, 0.5, 2.0, 80.0]), 0.5),
                       (torch.tensor([3.0]), 1.4)]),
    Exercise("2.2", "what each shape of the factors does",
             ("columns", "rows", "right", "error", "error", "right"), {
        "the last axis runs along a row: a factor of shape (8,) differs from column to column":
            ("rows", "columns", "right", "error", "error", "right"),
        "eight factors meet eight pixels: the shapes fit, and torch says nothing":
            ("error", "error", "right", "error", "error", "right"),
        "torch lines shapes up from the right, and the images are the first axis":
            ("right", "right", "right", "error", "error", "right"),
        "each image is one entry of the first axis, and the other axes have length 1":
            ("columns", "rows", "error", "error", "error", "right"),
        "five factors meet eight pixels: these shapes do not fit":
            ("columns", "rows", "right", "columns", "rows", "right"),
        "an axis of length 1 fits any other: a batch of one hides the slip":
            ("columns", "rows", "right", "error", "error", "error"),
    }),
    Exercise("2.3", "Heun's step", heun_step, {
        "this is Euler's step: use the second slope": partial(heun_step, a=1, b=0),
        "that is the second slope; take the mean": partial(heun_step, a=0, b=1),
        "the slopes are added; take their mean": partial(heun_step, a=1, b=1),
        "take the second slope where Euler's step arrives": partial(heun_step, moved=False),
        "the second slope is divided by the old noise level; everything in it belongs to "
        "sigma_next": partial(heun_step, old=True),
        "uphill: the change of the level is sigma_next - sigma": partial(heun_step, ahead=-1),
        "the real step starts at x, not where Euler's step arrives": partial(heun_step, a=1.5),
        "at sigma_next = 0 that is 0/0: stop at Euler's step": partial(heun_step, guarded=False),
    }, inputs=lambda: [(Network(lambda p, x, s: p * x.tanh() / (1 + s**2)), x, *levels)
                       for x in (2 * torch.randn(5, 2).double(), torch.randn(1, 2, 3))
                       for levels in ((2.0, 1.0), (0.4, 0.0), (0.02, 0.002), (0.3, 0.9))]),
    Exercise("2.4", "path of a Gaussian", gaussian_path, {
        "the variances have this ratio; a distance scales like a standard deviation, its root":
            partial(gaussian_path, power=2),
        "upside down: towards less noise points move together": partial(gaussian_path, power=-1),
        "it is the distance from the mean that shrinks: take the mean off, and add it at the end":
            lambda x, s, t, mean, std: gaussian_path(x, s, t, 0 * mean, std),
        "take the mean off before you scale, too": lambda x, s, t, mean, std:
            gaussian_path(x + mean, s, t, mean, std),
        "this is the path to a single data point; the data have a spread of their own":
            lambda x, s, t, mean, std: gaussian_path(x, s, t, mean, 0 * std),
        "each axis has its own standard deviation, and its own path":
            lambda x, s, t, mean, std: gaussian_path(x, s, t, mean, std.square().mean().sqrt()),
        "variances add, standard deviations do not: std**2 + sigma**2 under the root":
            lambda x, s, t, mean, std: mean + (x - mean) * (std + t) / (std + s),
        "this is the denoised point at sigma_start, one Euler step to 0; follow the path":
            lambda x, s, t, mean, std: gaussian_path(x, s, 0, mean, std, power=2),
    }, inputs=lambda: [(torch.randn(shape).double(), *levels, *of_data)
                       for shape in ((6, 2), (1, 3))
                       for levels in ((5.0, 0.4), (0.1, 2.0), (3.0, 0.0))
                       for of_data in [0.3 + torch.rand(2, shape[1]).double()]]),
    Exercise("2.5", "crossing and falls read off the figure", (27, 8.5, 72.5), {
        "the axis counts evaluations, two to a step: this counts its steps": (13, 8.5, 72.5),
        "an error of order p falls by 8**p, and Heun's order is not Euler's": (27, 8.5, 8),
        "an error of order p falls by 8**p, and Euler's order is not Heun's": (27, 64, 72.5),
        "the curves have changed places: the steeper one is Heun's": (27, 72.5, 8),
    }, tolerance=(7, 2.5, 27.5)),  # the orders say 8 and 64, the figure 8 and 74
    Exercise("2.6", "where one noise ends", (0.8, 1.0), {
        "from 80 the denoiser answers the mean of the data, with their weights": (0.0, 1.0),
        "from 80 every answer is nearly the same: one step reaches no mode": (1.0, 1.0),
        "paths keep their order: a sixth of all noises lies below -1, and a tenth of the data goes "
        "left": (0.8, -1.0),
        "it is the last of many steps that ends on the data, at a mode": (0.8, 0.8),
        "nine tenths of the data are on the right": (-0.8, -1.0),
    }, tolerance=0.05),
]  # fmt: skip

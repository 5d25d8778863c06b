"""Exercises of chapter 1: score functions."""

from functools import partial

import torch
from torch import Tensor

from dmd_tutorial.checks import expand
from dmd_tutorial.denoisers import score_from_denoised
from dmd_tutorial.notebook.exercises import Exercise, Network, gradients_by


def _bayes(x: Tensor, means: Tensor, std: float, weights: Tensor) -> Tensor:
    return (weights.log() - (x[:, None] - means) ** 2 / (2 * std**2)).softmax(dim=1)


def _densities(x: Tensor, means: Tensor, std: float, weights: Tensor) -> Tensor:
    """Weight times density of each component, not yet divided by their sum."""
    return weights * torch.distributions.Normal(means, std).log_prob(x[:, None]).exp()


def _quotient(*mixture) -> Tensor:
    densities = _densities(*mixture)
    return densities / densities.sum(dim=1, keepdim=True)


def mixture_score(x: Tensor, means: Tensor, std: float, weights: Tensor, shares=_bayes) -> Tensor:
    return (shares(x, means, std, weights) * (means - x[:, None]) / std**2).sum(dim=1)


def best_denoiser(x_noisy: Tensor, data: Tensor, sigma: float) -> Tensor:
    return (-_squares_to(x_noisy, data) / (2 * sigma**2)).softmax(dim=1) @ data


def _squares_to(x_noisy: Tensor, data: Tensor) -> Tensor:
    return ((x_noisy[:, None] - data) ** 2).sum(dim=-1)  # (batch, points)


def matching_loss(score, x: Tensor, sigma: Tensor, noise: Tensor, target=None) -> Tensor:
    return (_squares(score, x, sigma, noise, target) * sigma**2).mean() / 2


def _squares(score, x: Tensor, sigma: Tensor, noise: Tensor, target=None) -> Tensor:
    """Squared distance between a score and a target, else the conditional score, (batch,)."""
    target = -noise / sigma[:, None] if target is None else target
    return ((score(x + sigma[:, None] * noise, sigma) - target) ** 2).sum(dim=1)


EXERCISES = [
    Exercise("1.1", "score of a denoiser", score_from_denoised, {
        "the sign is the other way round: the score points from the noisy sample towards the "
        "denoised one": lambda *a: -score_from_denoised(*a),
        "divide by sigma twice: once gives minus the noise estimate, not the score":
            lambda x, denoised, sigma: (denoised - x) / expand(sigma, x),
        "multiply by sigma squared to go from the score to the denoiser; the way back divides":
            lambda x, denoised, sigma: (denoised - x) * expand(sigma, x) ** 2,
        "torch lined sigma up with the last axis, a row of pixels: reshape it to (batch, 1, 1, 1)":
            lambda x, denoised, sigma: (denoised - x) / sigma**2,
        # three pixels a side: a forgotten reshape of sigma raises no error
    }, inputs=lambda: [(*torch.randn(2, 3, 1, 3, 3), torch.tensor([0.002, 0.7, 2.0])),
                       (*torch.randn(2, 1, 1, 2, 5), torch.tensor([30.0]))]),
    Exercise("1.2", "score of a mixture", mixture_score, {
        "the sign: each component pulls towards its mean": lambda *a: -mixture_score(*a),
        "each component counts by its responsibility at x, not by its weight: a far component has "
        "hardly any say": partial(mixture_score, shares=lambda *a: a[3]),
        "the responsibilities leave out the weights of the components":
            lambda x, m, s, w: mixture_score(x, m, s, torch.ones_like(w)),
        "divide by the density of the mixture: yours is its gradient, not that of its logarithm":
            partial(mixture_score, shares=_densities),
        "far from every component all densities are 0 in floating point, and 0/0 is not a number: "
        "take a softmax of their logarithms": partial(mixture_score, shares=_quotient),
        "the components' scores are averaged, not summed: each has its responsibility as a factor":
            partial(mixture_score, shares=lambda x, m, s, w: torch.ones_like(w)),
        "a component's score is (mean - x) divided by the variance, std**2, not by std":
            lambda x, m, s, w: mixture_score(x, m, s, w) * s,
    }, inputs=lambda: [(torch.linspace(-3, 3, 13), torch.tensor([-1.5, 0.5, 2.0]), 0.6,
                        torch.tensor([0.5, 0.2, 0.3])),
                       # so far from both that their densities are 0
                       (torch.tensor([2.0]).double(), torch.tensor([-1.0, 1.0]).double(), 0.01,
                        torch.tensor([0.9, 0.1]).double())]),
    Exercise("1.3", "best denoiser of a finite data set", best_denoiser, {
        "the squared distance is divided by 2 sigma**2: the 2 of the Gaussian is missing":
            lambda x, data, s: (-_squares_to(x, data) / s**2).softmax(1) @ data,
        "the squared distance is divided by 2 sigma**2; yours is divided by 2 sigma":
            lambda x, data, s: (-_squares_to(x, data) / (2 * s)).softmax(1) @ data,
        "the exponent holds the *squared* distance; yours holds the distance":
            lambda x, data, s: (-_squares_to(x, data).sqrt() / (2 * s**2)).softmax(1) @ data,
        "the exponent is negative: near points count most":
            lambda x, data, s: (_squares_to(x, data) / (2 * s**2)).softmax(1) @ data,
        "the nearest point alone is the most likely one, not the mean: average over all points "
        "with their probabilities": lambda x, data, s: data[_squares_to(x, data).argmin(dim=1)],
        "this is the mean of the data wherever x_noisy is: the weights must depend on the distance":
            lambda x, data, s: data.mean(dim=0).expand_as(x),
        "this is the score: add x_noisy and the factor sigma**2 to have the denoised point":
            lambda x, data, s: (best_denoiser(x, data, s) - x) / s**2,
    }, inputs=lambda: [(torch.randn(5, 2), torch.randn(7, 2), 0.6),
                       (2 + torch.randn(1, 3).double(), torch.randn(4, 3).double(), 0.02)]),
    Exercise("1.4", "denoising score matching loss", matching_loss, {
        "the target is minus noise / sigma: the score points back to where the sample came from":
            lambda f, x, s, n: matching_loss(f, x, s, n, n / s[:, None]),
        "the target is minus noise divided by sigma; yours is minus the noise itself":
            lambda f, x, s, n: matching_loss(f, x, s, n, -n),
        "the target is minus noise divided by sigma; yours is divided by sigma squared":
            lambda f, x, s, n: matching_loss(f, x, s, n, -n / s[:, None] ** 2),
        "the score must be asked at the noisy point x + sigma noise, not at the clean one":
            lambda f, x, s, n: matching_loss(lambda y, _: f(x, s), x, s, n),
        "the weight sigma**2 is missing, so that the lowest noise level drowns the others":
            lambda f, x, s, n: _squares(f, x, s, n).mean() / 2,
        "the weight is sigma squared": lambda f, x, s, n: (_squares(f, x, s, n) * s).mean() / 2,
        "the factor one half is missing": lambda *a: 2 * matching_loss(*a),
        "sum over the coordinates of a point and average over the points; yours averages over both":
            lambda f, x, s, n: matching_loss(f, x, s, n) / x.shape[1],
        "the length of the error is squared: yours is missing the square, and its minimiser is no "
        "conditional mean": lambda f, x, s, n: (_squares(f, x, s, n).sqrt() * s**2).mean() / 2,
    }, inputs=lambda: [(Network(lambda p, x, s: -p * (x - 0.3).sin() / (1 + s**2)), x, s, noise)
                       for s, dim in ((torch.linspace(0.2, 1.5, 6), 3), (torch.tensor([2e-3]), 2))
                       for x, noise in [torch.randn(2, len(s), dim)]],
       probe=gradients_by({"gradient that reaches the network": 0})),
    Exercise("1.5", "shares of the walkers in the left mode", (0.5, 0.885), {
        "at a low level arrows do not know the weights: walkers stay where they began":
            (0.9, 0.885),
        "the ladder begins where there is one hill: walkers forget where they began": (0.5, 0.5),
        "the larger mode gets its share, not everything: the walk draws samples": (0.5, 1.0),
        "the left mode is the one that holds nine tenths": (0.5, 0.1),
    }, tolerance=(0.05, 0.065)),  # the second about 0.9, which is right, and 0.87 of this walk
    Exercise("1.6", "step sizes read off the figure", (1.0, 9.0), {
        "the axis is in units of the variance: wider data allow longer steps": (1.0, 1.0),
        "the axis is in units of the variance, not of the standard deviation": (1.0, 3.0),
        "there the variance is four times too large, the standard deviation twice": (1.5, 13.5),
        "there the walk flies apart: find 2 on the vertical axis": (2.0, 18.0),
    }, tolerance=(0.1, 1.0)),
    Exercise("1.7", "distances at which the quotient breaks", (1.442, 3.8604), {
        "give the distance itself, not how many standard deviations it is": (14.42, 38.604),
        "the exponent is distance**2 / (2 std**2): the 2 is missing": (1.0197, 2.7297),
        "below the smallest normal number come smaller ones, with fewer digits; it breaks where "
        "they end": (1.3216, 3.764),
        "twice as many bits make far smaller numbers": (1.442, 1.442),
    }, tolerance=0.01),
]  # fmt: skip

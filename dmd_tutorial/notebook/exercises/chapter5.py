"""Exercises of chapter 5."""

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from dmd_tutorial.notebook.exercises import Exercise, gradients_by


def pull(x: Tensor, m1: Tensor, m2: Tensor, std: float, sigma: float, weight, odds=2) -> Tensor:
    v = std**2 + sigma**2
    squares = ((x - m1) ** 2).sum(dim=1) - ((x - m2) ** 2).sum(dim=1)
    log_odds = squares / (odds * v) + math.log(weight / (1 - weight))
    return torch.sigmoid(log_odds)[:, None] * (m2 - m1) / v  # of (5.2)


def anchored_loss(x, gradient, x_ref, y, lam, reduce=torch.mean, half=0.5, detach=True) -> Tensor:
    aim = (x - gradient).detach() if detach else x - gradient
    return half * reduce((x - aim) ** 2) + lam * reduce((x_ref - y) ** 2)  # (5.11)


def l2_floor(y: Tensor) -> Tensor:
    return ((y - y.mean(dim=1, keepdim=True)) ** 2).mean()  # second term of (5.7)


EXERCISES = [
    Exercise("5.1", "border between one hill and two",
             lambda distance, std: math.sqrt(max(0.0, distance**2 / 4 - std**2)), {
        "that is its square: take the root":
            lambda distance, std: max(0.0, distance**2 / 4 - std**2),
        "half of the distance counts: the middle is as far from either mode":
            lambda distance, std: math.sqrt(max(0.0, distance**2 - std**2)),
        "the modes' own variance helps to fill the valley: subtract it":
            lambda distance, std: math.sqrt(distance**2 / 4 + std**2),
        "the modes have a width, too: less noise is needed": lambda distance, std: distance / 2,
        "variances add, not their square roots": lambda distance, std: max(0.0, distance / 2 - std),
        "modes that already are one hill need no noise: 0, not the root of a negative number":
            lambda distance, std: math.sqrt(distance**2 / 4 - std**2),
    }, inputs=lambda: [(4.0, 0.4), (3.0, 1.0), (1.0, 0.8), (1.2, 0.6), (2.0, 0.0)]),
    Exercise("5.2", "the pull to a lost mode", pull, {
        "the sign: s_real - s_fake points to the lost mode": lambda *a: -pull(*a),
        "this is the responsibility of the mode that the generator has; the lost one counts":
            lambda x, m1, m2, std, sigma, w: -pull(x, m2, m1, std, sigma, 1 - w),
        "each density has its weight as a factor": lambda *a: pull(*a[:-1], 0.5),
        "the weight is the lost mode's own": lambda *a: pull(*a[:-1], 1 - a[-1]),
        "the weight is in the responsibility already": lambda *a: pull(*a[:-1], 0.5) * a[-1],
        "noise adds its variance to the modes': v = std**2 + sigma**2":
            lambda x, m1, m2, std, sigma, w: pull(x, m1, m2, std, 0.0, w),
        "variances add, standard deviations do not: v = std**2 + sigma**2":
            lambda x, m1, m2, std, sigma, w: pull(x, m1, m2, std + sigma, 0.0, w),
        "divide by the variance, not by its root": lambda *a: pull(*a) * math.hypot(*a[3:5]),
        "the responsibility is missing: the teacher cannot be sure of the lost mode":
            lambda x, m1, m2, std, sigma, w: ((m2 - m1) / (std**2 + sigma**2)).expand_as(x),
        "a Gaussian has the squared distance over 2 v, not over v": partial(pull, odds=1),
        "this is s_real alone; subtract the score of what the generator makes":
            lambda x, m1, m2, s, t, w: pull(x, m1, m2, s, t, w) + (m1 - x) / (s**2 + t**2),
    }, inputs=lambda: [(x, torch.tensor([1.0, 0.2]), torch.tensor([-0.8, 0.5]), *numbers)
                       for x in [torch.randn(8, 2)]
                       for numbers in [(0.4, 0.7, 0.3), (0.3, 2.0, 0.6)]
                       # so far from both that their densities are 0
                       ] + [(torch.randn(1, 3).double(), *torch.eye(3).double()[:2],
                             0.02, 0.01, 0.1)]),
    Exercise("5.3", "the generator's loss", anchored_loss, {
        "no gradient reaches x, as it cancels: the target, and it alone, is detached":
            partial(anchored_loss, detach=False),
        "take means over all values, not sums": partial(anchored_loss, reduce=torch.sum),
        "the factor one half of the matching loss is missing, so its gradient is doubled":
            partial(anchored_loss, half=1.0),
        "the sign is the other way round: the target is x - gradient":
            lambda x, gradient, *rest: anchored_loss(x, -gradient, *rest),
        "the anchor is missing": lambda *a: anchored_loss(*a[:4], 0.0),
        "lambda_reg weighs the anchor alone": lambda *a: a[4] * anchored_loss(*a[:4], 1 / a[4]),
        "the anchor has no factor one half": lambda *a: anchored_loss(*a[:4], a[4] / 2),
        "the anchor is the mean square, not its root":
            lambda *a: anchored_loss(*a[:4], 0.0) + a[4] * functional.mse_loss(*a[2:4]).sqrt(),
        "this has the right derivatives, but it is not the squared form that is asked for":
            lambda x, g, *rest: (x * g).mean() + anchored_loss(x, 0 * g, *rest),
        "the matching term is missing": lambda *a: a[4] * functional.mse_loss(*a[2:4]),
    }, inputs=lambda: [(*(torch.randn(n, *shape) for n in (b, b, 4, 4)), lam)
                       for lam, b, shape in ((0.25, 6, (2,)), (1.5, 1, (1, 2, 2)))],
       probe=gradients_by({"gradient at x": 0, "gradient at x_ref": 2})),
    Exercise("5.4", "the pull, read off the figure", (3.85, 0.5, 1.87), {
        "sizes are asked for: leave out the minus": (-3.85, -0.5, -1.87),
        "read the two last where the generator's samples are, at x = 2": (3.85, 3.85, 3.99),
        "x = 0 is the middle of the way; the samples are around x = 2": (3.85, 1.92, 2.0),
        "that is the share of its full size; the axis has units of x": (1.0, 0.13, 0.47),
        "3.45 stands at level 1, where hardly a pull arrives: set 2, then 8": (3.45, 0.0, 0.0),
    }, tolerance=(0.3, 0.15, 0.25)),
    Exercise("5.5", "the floor under regression", l2_floor, {
        "the mean belongs to one noise: a generator may answer each noise differently":
            lambda y: ((y - y.mean(dim=(0, 1))) ** 2).mean(),
        "no correction: these answers are all there is": lambda y: y.var(dim=1).mean(),
        "the loss is the mean square, not its root": lambda y: l2_floor(y).sqrt(),
        "the loss is a mean, not a sum, over the dimensions": lambda y: l2_floor(y) * y.shape[2],
        "with several answers to one noise no generator reaches 0": lambda y: 0.0,
        "answers to one noise are the second axis, noises the first":
            lambda y: ((y - y.mean(dim=0, keepdim=True)) ** 2).mean(),
    }, inputs=lambda: [(torch.randn(n, answers, dim) + torch.arange(n)[:, None, None],)
                       for n, answers, dim in ((4, 3, 2), (1, 5, 3))]),
    Exercise("5.6", "what two anchors learn from scattered answers", (1.0, 3.0, 2.0), {
        "the mean square prefers the mean of the answers, not the commonest": (2.0, 4.0, 2.0),
        "three of four answers are 2: the mean counts them": (0.0, 4.0, 2.0),
        "the absolute difference is smallest at the median, not at the mean": (1.0, 3.0, 1.0),
        "no generator of z reaches 0: the variance of the answers is left": (1.0, 0.0, 2.0),
    }, tolerance=0.05),
    Exercise("5.7", "recall with 0, 1 and 4 strays", (0.5, 1.0, 0.5), {
        "one stray's third neighbour is in the far mode: it reaches all": (0.5, 0.5, 0.5),
        "four strays in one place are each other's neighbours: their reach is 0": (0.5, 1.0, 1.0),
        "the mode that is there is half of the target": (0.0, 1.0, 0.5),
    }, tolerance=0.05),
]  # fmt: skip

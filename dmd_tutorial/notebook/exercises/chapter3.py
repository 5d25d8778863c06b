"""Exercises of chapter 3, the KL gradient."""

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from dmd_tutorial import dmd
from dmd_tutorial.notebook.exercises import Exercise, gradients_by


def forward_fit(means: Tensor, stds: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    mean = (weights * means).sum()
    return mean, (weights * (stds**2 + (means - mean) ** 2)).sum().sqrt()


def kl_gradient(z, mean, std, mean_real, std_real, power=2) -> tuple[Tensor, Tensor]:
    x = mean + std * z
    # the fake score minus the real one, their signs in the brackets
    return _means((x - mean_real) / std_real**power - (x - mean) / std**power, z)


def _means(difference: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    return difference.mean(), (difference * factor).mean()


def pixel_gradient(x: Tensor, denoised_real: Tensor, denoised_fake: Tensor) -> Tensor:
    return (denoised_fake - denoised_real) / _mean((x - denoised_real).abs())


def _mean(x: Tensor) -> Tensor:
    return x.mean(dim=(1, 2, 3), keepdim=True)


EXERCISES = [
    Exercise("3.1", "the Gaussian of the forward fit", forward_fit, {
        "that is the variance; the standard deviation is its root":
            lambda *a: (forward_fit(*a)[0], forward_fit(*a)[1] ** 2),
        "the components count by their weights: mean = sum(weights * means), and the same weights "
        "again in the variance": lambda m, s, w: forward_fit(m, s, torch.full_like(w, 1 / len(w))),
        "the distance between the centres is missing: each component adds (means - mean)**2 to "
        "its own variance": lambda m, s, w: ((w * m).sum(), (w * s**2).sum().sqrt()),
        "the width of the components themselves is missing: add stds**2":
            lambda m, s, w: forward_fit(m, torch.zeros_like(s), w),
        "average the variances stds**2, not the standard deviations":
            lambda m, s, w: forward_fit(m, (w * s).sum().expand_as(s), w),
    }, inputs=lambda: [tuple(torch.tensor([[-2.0, 2.5], [0.4, 1.1], [0.3, 0.7]])),
                       tuple(torch.tensor([[1.0, 4.0, 0.0], [0.6, 0.1, 2.0], [0.2, 0.7, 0.1]]))]),
    Exercise("3.2", "mean of the dropped term where the support moves", -1.0, {
        "it would be 0 if the density were differentiable in theta for every x, but at x = theta "
        "it jumps: compute it from log p inside the interval": 0.0,
        "the sign is the other way round: the density inside falls as theta grows": 1.0,
        "for a uniform z that is right; here the density 2x / theta^2 has a square": -0.5,
        "that is the mean derivative of the density 2x / theta^2; the term is the derivative of "
        "its logarithm": -2 / 3,
    }),
    Exercise("3.3", "KL gradient of a Gaussian generator", kl_gradient, {
        "the sign: it is s_fake - s_real": lambda *a: tuple(-d for d in kl_gradient(*a)),
        "the fake score is missing: this is the gradient that collapses":
            lambda z, m, s, m_real, s_real: _means((m + s * z - m_real) / s_real**2, z),
        "the real score is missing: where are the data?": lambda z, m, s, *_: _means(-z / s, z),
        "the real score is taken off the fake one, not added to it":
            lambda z, m, s, mr, sr: _means((mr - m - s * z) / sr**2 - z / s, z),
        "the scores are asked at the samples x = mean + std * z, not at z":
            lambda z, m, s, mr, sr: _means((z - mr) / sr**2 - (z - m) / s**2, z),
        "that is the divergence's exact derivative: asked for is its estimate from these z":
            lambda z, m, s, mr, sr: ((m - mr) / sr**2, s / sr**2 - 1 / s),
        "dx/dstd is z, not 1: multiply by it before taking the mean":
            lambda *a: (kl_gradient(*a)[0], kl_gradient(*a)[0]),
        "dx/dstd is z, not x":
            lambda z, m, s, mr, sr: _means((m + s * z - mr) / sr**2 - z / s, m + s * z),
        "a Gaussian's score divides by the variance, std**2": partial(kl_gradient, power=1),
        "the expectation is a mean over the samples, not a sum":
            lambda z, *a: tuple(len(z) * d for d in kl_gradient(z, *a)),
    }, inputs=lambda: [(torch.randn(50), -1.0, 0.7, 0.5, 1.3),
                       (torch.randn(7), 0.4, 1.6, -0.3, 0.4)]),
    Exercise("3.4", "pixel gradient under Eq. 8", pixel_gradient, {
        "descending it would leave the real density": lambda *a: -pixel_gradient(*a),
        "the error divides: Eq. 8 normalises the gradient, it does not multiply it":
            lambda x, real, fake: (fake - real) * _mean((x - real).abs()),
        "each sample has its own error: average over channels and pixels, not over the batch":
            lambda x, real, fake: (fake - real) / (x - real).abs().mean(),
        "C S / ||.||_1 is one over the mean absolute error, not over the sum":
            lambda x, real, fake: pixel_gradient(x, real, fake) / x[0].numel(),
        "the norm is ||.||_1: a mean of absolute values, not the root of a mean square":
            lambda x, real, fake: (fake - real) / _mean((x - real).square()).sqrt(),
        "the error in the weight is the teacher's, |x - denoised_real|, not the critic's":
            lambda x, real, fake: (fake - real) / _mean((x - fake).abs()),
        "the fake estimate is missing: this follows the real score alone, and collapses":
            lambda x, real, fake: pixel_gradient(x, real, x),
        # errors differ from one sample to the next, so that a batch mean is found out
    }, inputs=lambda: [
        (x, x + size[:, None, None, None] * torch.randn(x.shape), x + torch.randn(x.shape))
        for x, size in ((torch.randn(3, 2, 4, 4), torch.tensor([0.3, 1.0, 2.0])),
                        (torch.randn(1, 3, 2, 5), torch.tensor([1e-3])))]),
    Exercise("3.5", "loss with a stop-gradient", dmd.matching_loss, {
        "no gradient is left to learn from, as x cancels: the target, and it alone, is detached":
            lambda x, gradient: 0.5 * functional.mse_loss(x, x - gradient),
        "the half is missing: the derivative of a square brings a factor 2":
            lambda x, gradient: functional.mse_loss(x, (x - gradient).detach()),
        "the derivative has the wrong sign: the target, which is detached, is x - gradient":
            lambda x, gradient: 0.5 * functional.mse_loss(x, (x + gradient).detach()),
        "take the mean, not the sum: lambda_reg is calibrated to it":
            lambda x, gradient: 0.5 * (x - (x - gradient).detach()).square().sum(),
        "this has the right derivative, but it is not the squared form that is asked for":
            lambda x, gradient: (x * gradient.detach()).mean(),
    }, inputs=lambda: [(*torch.randn(2, 2, 1, 3, 3),), (*torch.randn(2, 1, 5),)],
       probe=gradients_by({"gradient of the loss": 0})),
    Exercise("3.6", "where three gradients lead", (0.5, 0.0, -1.0), {
        "without the fake score nothing rewards variety: all climb to one point": (0.5, 0.5, -1.0),
        "without the teacher nobody knows where the data are": (0.5, 0.0, 1.0),
        "the difference vanishes where samples are spread like the data": (1.0, 0.0, -1.0),
        "that is the teacher's score alone: what it leads to has no width": (0.0, 0.0, -1.0),
    }, tolerance=(0.02, 0.05, 0.04)),
    Exercise("3.7", "what each slip makes of the gradient", (0, -1, 2, 6), {
        "x - (x - g) does not depend on x: without a stop-gradient nothing arrives": (1, -1, 2, 6),
        "in the target x stands with a minus: what arrives leads uphill": (0, 1, 2, 6),
        "with x detached there is still the x in the target": (0, 0, 2, 6),
        "the half is there to cancel the 2 that the square brings": (0, -1, 0.5, 6),
        "a sum is the mean times the number of values": (0, -1, 2, 1 / 6),
    }),
    Exercise("3.8", "ratio, divergence and width read off the figure", (2, math.log(2), 2.04), {
        "the divergence is the mean of the logarithm of this ratio": (2, 2, 2.04),
        "the logarithm is the natural one, not that to the base 2": (2, 1, 2.04),
        "fake over real: a divergence is never negative": (0.5, -math.log(2), 2.04),
        "the target's peaks are half as high, for each mode holds half of it": (1, 0, 2.04),
        "the forward fit is 0.2 high and 0.4 / 0.2 wide, not one mode": (2, math.log(2), 0.4),
        "that is the variance of the forward fit": (2, math.log(2), 4.16),
    }, tolerance=(0.3, 0.07, 0.2)),
]  # fmt: skip

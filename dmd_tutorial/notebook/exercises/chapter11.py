"""Exercises of chapter 11, score distillation."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from dmd_tutorial.denoisers import Denoiser
from dmd_tutorial.notebook.exercises import Exercise, Network, gradients_by


def _densities() -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Near the data; far from them, where densities are 0 in float32; where their ratio is not."""
    return [
        (torch.randn(b) + real, torch.randn(b) + fake, *torch.randn(2, b, dim))
        for b, dim, real, fake in ((5, 2, 0, 0), (5, 2, -200, -200), (1, 3, 50, -150))
    ]


def sid(x: Tensor, denoised_real: Tensor, denoised_fake: Tensor, alpha: float) -> Tensor:
    difference = denoised_real - denoised_fake
    return (difference * (denoised_real - x - alpha * difference)).mean()


def _probe(answer: Callable, x: Tensor, real: float, fake: float, alpha: float) -> dict:
    """Value and derivative for denoisers that shrink towards 0, so that all of them move with x."""
    by_x = gradients_by({"gradient of the loss": 0})
    return by_x(lambda x: answer(x, real * x, fake * x, alpha), x)


def backward_simulation(D: Denoiser, z: Tensor, levels: list[float], noise: Tensor) -> Tensor:
    return _first(D, levels[0] * z, levels).detach() + levels[1] * noise


def _first(D: Denoiser, x: Tensor, levels: list[float]) -> Tensor:
    return D(x, torch.full((len(x),), levels[0]))


def _simulated(answer: Callable[..., Tensor], *arguments: object) -> dict[str, object]:
    found = answer(*arguments)
    return {
        "input of the second step": found,
        "whether a gradient runs through the first step": getattr(found, "requires_grad", False),
    }


EXERCISES = [
    Exercise("11.1", "the gradient of SDS",
             lambda x, noise, sigma, predicted: sigma**2 / (1 + sigma**2) * (predicted - noise), {
        "the sign is the other way round: where the teacher sees more "
        "noise than was added, descending must take that noise away":
            lambda x, noise, sigma, predicted: sigma**2 / (1 + sigma**2) * (noise - predicted),
        "subtract the noise that was added: SDS compares the two noises":
            lambda x, noise, sigma, predicted: sigma**2 / (1 + sigma**2) * predicted,
        "the weight is sigma^2 / (1 + sigma^2), the variance of the noise of a variance-preserving "
        "sample": lambda x, noise, sigma, predicted: sigma**2 * (predicted - noise),
        "the weight is a variance, not a standard deviation":
            lambda x, noise, sigma, predicted: sigma / (1 + sigma**2) ** 0.5 * (predicted - noise),
        "w_t has one power of sigma more: x - D_real is sigma times the difference of noises":
            lambda x, noise, sigma, predicted: sigma**3 / (1 + sigma**2) * (predicted - noise),
        "the weight is missing": lambda x, noise, sigma, predicted: predicted - noise,
        "compare the teacher's noise with the noise, not with the sample":
            lambda x, noise, sigma, predicted: sigma**2 / (1 + sigma**2) * (predicted - x),
    }, inputs=lambda: [(*torch.randn(2, *shape), sigma, torch.randn(shape))
                       for shape in ((4, 2), (1, 3, 2)) for sigma in (0.7, 0.02, 5.0)]),
    Exercise("11.2", "what a perfect head tells the generator",
             lambda lr, lf, sr, sf: torch.sigmoid(lr - lf)[:, None] * (sf - sr), {
        "the sign is the other way round: this would lead away from the data":
            lambda lr, lf, sr, sf: torch.sigmoid(lr - lf)[:, None] * (sr - sf),
        "that is (11.6), of the non-saturating loss: here the share is the data's density":
            lambda lr, lf, sr, sf: torch.sigmoid(lf - lr)[:, None] * (sf - sr),
        "the share is missing: this is distribution matching itself":
            lambda lr, lf, sr, sf: sf - sr,
        "the share takes densities, and you were given their logarithms":
            lambda lr, lf, sr, sf: (lr / (lr + lf))[:, None] * (sf - sr),
        "far from the data both densities are 0 in float32: take the difference of their "
        "logarithms first":
            lambda lr, lf, sr, sf: (lr.exp() / (lr.exp() + lf.exp()))[:, None] * (sf - sr),
        "both scores count: the head's logit is a difference of two log-densities":
            lambda lr, lf, sr, sf: -torch.sigmoid(lr - lf)[:, None] * sr,
    }, inputs=_densities),
    Exercise("11.3", "the loss of score identity distillation", sid, {
        "alpha is missing": lambda x, real, fake, alpha: sid(x, real, fake, 1.0),
        "the bracket begins with the teacher's answer, less the sample":
            lambda x, real, fake, alpha: sid(2 * real - x, real, fake, alpha),
        "alpha is taken away, not added": lambda x, real, fake, alpha: sid(x, real, fake, -alpha),
        "this is the bare square: its gradient forgets that the critic follows the generator":
            lambda x, real, fake, alpha: functional.mse_loss(real, fake),
        "the second factor compares the teacher's answer with the sample x, not the critic's "
        "answer with it":
            lambda x, real, fake, a: ((real - fake) * (fake - x - a * (real - fake))).mean(),
        "the difference is teacher minus critic in both places":
            lambda x, real, fake, a: ((fake - real) * (real - x - a * (real - fake))).mean(),
        "here the gradient has to run through both denoisers: no .detach() on them":
            lambda x, real, fake, alpha: sid(x, real.detach(), fake.detach(), alpha),
        "the gradient runs through the critic's answer, too: no .detach() on it":
            lambda x, real, fake, alpha: sid(x, real, fake.detach(), alpha),
        "the gradient runs through both factors: no .detach() on either":
            lambda x, real, fake, a: (
                (real - fake).detach() * (real - x - a * (real - fake))).mean(),
        "take the mean, not the sum":
            lambda x, real, fake, alpha: x.numel() * sid(x, real, fake, alpha),
    }, inputs=lambda: [(torch.randn(6, 2), 0.7, 0.4, 1.2), (torch.randn(1, 3, 2), 0.5, 0.8, 0.5)],
       probe=_probe),
    Exercise("11.4", "backward simulation", backward_simulation, {
        "only the last step is differentiated: make the input under torch.no_grad()":
            lambda D, z, levels, noise: _first(D, levels[0] * z, levels) + levels[1] * noise,
        "the answer of the first step has to be noised again, to the second level":
            lambda D, z, levels, noise: backward_simulation(D, z, levels, 0 * noise),
        "the fresh noise has the second level, not the first":
            lambda D, z, s, noise: backward_simulation(D, z, s, s[0] / s[1] * noise),
        "the first input is z times the first level":
            lambda D, z, levels, noise: _first(D, z, levels).detach() + levels[1] * noise,
        "use the fresh noise, not the old: reusing z would be a step of a deterministic sampler":
            lambda D, z, levels, noise: backward_simulation(D, z, levels, z),
        "this stops one step too late: give what the second step starts from, not its answer":
            lambda D, z, s, noise: _first(D, backward_simulation(D, z, s, noise), s[1:]).detach(),
    }, inputs=lambda: [(Network(lambda p, x, s: (p * x / (1 + s**2)).tanh() + 0.3), z, levels, n)
                       for levels, (z, n) in (([10.0, 2.0], torch.randn(2, 5, 2)),
                                             ([0.5, 0.02], torch.randn(2, 1, 3)))],
       probe=_simulated),
    Exercise("11.5", "spreads at which three gradients come to rest", (0.0, 1.0, 0.7071), {
        "SDS has no critic: nothing pushes the samples apart": (1.0, 1.0, 0.7071),
        "a critic that knows the samples balances the teacher at equal scores": (0.0, 0.0, 0.7071),
        "twice the score is the score of the density squared: half the variance": (0.0, 1.0, 0.5),
        "a doubled pull is not balanced by the critic of spread 1": (0.0, 1.0, 1.0),
        "doubled, the teacher's score makes the data seem narrower, not wider": (0.0, 1.0, 1.414),
    }, tolerance=0.02),
]  # fmt: skip

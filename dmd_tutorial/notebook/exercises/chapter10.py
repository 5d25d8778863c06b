"""Exercises of chapter 10, progressive and adversarial distillation."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dmd_tutorial.notebook.exercises import Exercise, Network, Raised, gradients_by


def _square(weight: Tensor, denoised: Tensor, target: Tensor) -> Tensor:
    return (weight[:, None] * (denoised - target) ** 2).mean()


def _c(sigma: Tensor) -> Tensor:
    return (1 + sigma**2).rsqrt()


def hinge(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    return torch.relu(1 - real).mean() + torch.relu(1 + fake).mean(), -fake.mean()


def _each_loss(answer: Callable, *logits: Tensor) -> dict[str, dict]:
    by_logits = gradients_by({"gradient at logits of data": 0, "gradient at logits of samples": 1})
    return {
        name: by_logits(lambda *given, i=i: _part(answer(*given), i), *logits)
        for i, name in enumerate(("discriminator", "student"))
    }


def _part(losses: Any, i: int) -> Tensor:
    try:
        first, second = losses
    except (TypeError, ValueError):
        raise Raised("two losses are asked for, the discriminator's and the student's") from None
    return (first, second)[i]


EXERCISES = [
    Exercise("10.1", "target of progressive distillation, as noise",
             lambda x, x_next, s, t: (x - x_next) / (s - t), {
        "that is (10.2), the denoised estimate; asked for is the noise that belongs to it":
            lambda x, x_next, s, t: (x_next - t / s * x) / (1 - t / s),
        "the sign: the noise points from the estimate to x": lambda x, y, s, t: (y - x) / (s - t),
        "x_next is not the estimate: some noise, of the level sigma_next, is still in it":
            lambda x, x_next, s, t: (x - x_next) / s,
        "that is noise of the level sigma: divide by it": lambda x, y, s, t: s * (x - y) / (s - t),
        "divide by the difference of the levels": lambda x, x_next, s, t: x - x_next,
    }, inputs=lambda: [(*torch.randn(2, *shape), *levels) for shape in ((5, 2), (1, 3))
                       for levels in ((2.0, 0.6), (0.02, 0.002), (0.5, 0.0))]),
    Exercise("10.2", "loss on v", lambda D, y, s: _square(1 / s**2 + 1, D, y), {
        "that is the error on x, with weight 1": lambda D, y, s: ((D - y) ** 2).mean(),
        "that is the error on eps, with weight SNR: add 1": lambda D, y, s: _square(1 / s**2, D, y),
        "that is the truncated SNR, the larger of two errors; v has their sum":
            lambda D, y, s: _square((1 / s**2).clamp_min(1), D, y),
        "SNR is 1 / sigma**2, not sigma**2": lambda D, y, s: _square(s**2 + 1, D, y),
        "the weight of a squared error is squared: 1 / sigma**2 + 1, not its root":
            lambda D, y, s: _square((1 / s**2 + 1).sqrt(), D, y),
        "take the mean over samples and values, not the sum over values":
            lambda D, y, s: ((1 / s**2 + 1) * ((D - y) ** 2).sum(1)).mean(),
    }, inputs=lambda: [(*torch.randn(2, 4, 3), torch.tensor([0.3, 0.9, 2.0, 7.0])),
                       (*torch.randn(2, 1, 2), torch.tensor([0.002]))],
       probe=gradients_by({"gradient at denoised": 0})),
    Exercise("10.3", "the teacher's term",
             lambda D, x, s, noise: _square(_c(s), x, D(x + s[:, None] * noise, s).detach()), {
        "the value is right, but a gradient runs through the teacher: its answer is a constant":
            lambda D, x, s, noise: _square(_c(s), x, D(x + s[:, None] * noise, s)),
        "the teacher sees the output with noise on it: x + sigma * noise":
            lambda D, x, s, noise: _square(_c(s), x, D(x, s).detach()),
        "that denoises pure noise: the noise belongs on the student's output":
            lambda D, x, s, noise: _square(_c(s), x, D(s[:, None] * noise, s).detach()),
        "the weight c(sigma) = 1 / sqrt(1 + sigma**2) is missing":
            lambda D, x, s, n: _square(torch.ones_like(s), x, D(x + s[:, None] * n, s).detach()),
        "c(sigma) has a root: yours is its square": lambda D, x, s, noise:
            _square(_c(s) ** 2, x, D(x + s[:, None] * noise, s).detach()),
        "c(sigma) weighs the square, and is not squared itself": lambda D, x, s, noise:
            _square(_c(s) ** 0.5, x, D(x + s[:, None] * noise, s).detach()),
        "stop the gradient at the teacher's answer, not at x":
            lambda D, x, s, noise: _square(_c(s), x.detach(), D(x + s[:, None] * noise, s)),
        "take the mean over all values, not the sum":
            lambda D, x, s, n: x.numel() * _square(_c(s), x, D(x + s[:, None] * n, s).detach()),
    }, inputs=lambda: [  # the teacher of a Gaussian off the middle
        (Network(lambda p, x, s: 0.3 + p * (x - 0.3) / (1 + s**2)), x, torch.tensor(s), noise)
        for s, (x, noise) in (([0.2, 0.7, 1.5, 4.0], torch.randn(2, 4, 2)),
                              ([0.02], torch.randn(2, 1, 3)))
    ], probe=gradients_by({"gradient at x": 1, "gradient that reaches the teacher": 0})),
    Exercise("10.4", "hinge losses", hinge, {
        "the roles are exchanged: the discriminator wants high logits for data":
            lambda r, f: (hinge(f, r)[0], -f.mean()),
        "the student wants high logits for its samples: its loss is minus their mean":
            lambda r, f: (hinge(r, f)[0], f.mean()),
        "the student's loss has no margin": lambda r, f: (hinge(r, f)[0], torch.relu(1 - f).mean()),
        "without max(0, .) the discriminator gains without end from what it already knows":
            lambda r, f: ((1 - r).mean() + (1 + f).mean(), -f.mean()),
        "the discriminator's loss comes first": lambda r, f: hinge(r, f)[::-1],
        "both parts of the discriminator's loss count fully, without a half":
            lambda r, f: (hinge(r, f)[0] / 2, -f.mean()),
        "the margin of 1 is missing":
            lambda r, f: (torch.relu(-r).mean() + torch.relu(f).mean(), -f.mean()),
        "take the maximum for each logit, before the mean": lambda r, f: hinge(r.mean(), f.mean()),
    }, inputs=lambda: [(torch.tensor([2.5, 0.4, -1.5, 3.0]), torch.tensor([-2.0, 0.7, -0.3])),
                       (torch.tensor([[0.2, 1.4]]), torch.tensor([[0.6, -3.0]] * 3))],
       probe=_each_loss),
    Exercise("10.5", "spreads of perfect students", (0.456, 0.456, 0.333), {
        "as DDIM in so few steps; a student lands where its teacher does": (0.003, 0.264, 0.003),
        "its teacher was a student, which lands where *its* teacher lands": (0.005, 0.333, 0.005),
        "no student is better than the first teacher of its own chain": (0.456, 0.456, 0.456),
        "a perfect student inherits what its first teacher loses": (0.5, 0.5, 0.5),
    }, tolerance=(0.006, 0.006, 0.006)),
]  # fmt: skip

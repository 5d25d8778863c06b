"""Progressive distillation: a student does in one step what its teacher does in two. Again.

The steps are DDIM's, here Euler's on the probability-flow ODE. Equations are those of Salimans and
Ho 2022 with alpha = 1. A step goes from t_n (sigma) over t_{n-1} (sigma_between), where only the
teacher stops, to t_{n-2} (sigma_next), which may be 0.
"""

import copy
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from dmd_tutorial.checks import Condition, PerSample, Samples, check_sigma, expand
from dmd_tutorial.denoisers import Denoiser
from dmd_tutorial.noise import add_noise, noise_like, source
from dmd_tutorial.samplers import euler, sample
from dmd_tutorial.samplers.step import Ladder
from dmd_tutorial.training import FitRun, FitSettings, Metrics, fit

Draw = Callable[[int, Generator], tuple[Tensor, Condition | None]]  # (count, rng) -> x, label


def ddim_step(x: Samples, denoised: Samples, sigma: PerSample, sigma_next: PerSample) -> Samples:
    """One step of DDIM: the noise keeps its direction and shrinks (Song et al. 2021, Eq. 12)."""
    check_sigma(x, sigma, denoised=denoised)
    check_sigma(x, sigma_next)
    return denoised + expand(sigma_next / sigma, x) * (x - denoised)


@torch.no_grad()
def two_steps(
    teacher: Denoiser, x: Samples, sigma: PerSample, sigma_between: PerSample,
    sigma_next: PerSample, label: Condition | None = None,
) -> Samples:  # fmt: skip
    """Where two DDIM steps of the teacher land, without gradient history (Algorithm 2)."""
    x = ddim_step(x, teacher(x, sigma, label), sigma, sigma_between)
    return ddim_step(x, teacher(x, sigma_between, label), sigma_between, sigma_next)


def target(x: Samples, x_next: Samples, sigma: PerSample, sigma_next: PerSample) -> Samples:
    """The estimate whose DDIM step goes from x to x_next: ``(x_next - r x) / (1 - r)`` (App. G)."""
    check_sigma(x, sigma, x_next=x_next)
    check_sigma(x, sigma_next)
    if (sigma_next >= sigma).any():
        pair = int((sigma_next - sigma).argmax())
        raise ValueError(f"a step must go down, not from {sigma[pair]:g} to {sigma_next[pair]:g}")
    ratio = expand(sigma_next / sigma, x)
    return (x_next - ratio * x) / (1 - ratio)


class Weighting(StrEnum):
    """How an error of the denoised estimate counts at each level; SNR is 1 / sigma^2."""

    SNR = "snr"  # the squared error of eps; 0 where there is only noise
    TRUNCATED = "truncated snr"  # max(SNR, 1): the larger of the squared errors of x and eps
    SNR_PLUS_ONE = "snr+1"  # the squared error of v


def weight(weighting: Weighting, sigma: PerSample) -> PerSample:
    """The weight of a squared error of the denoised estimate, for levels above 0 (Section 4)."""
    snr = 1 / sigma**2
    return {
        Weighting.SNR: snr, Weighting.TRUNCATED: snr.clamp_min(1), Weighting.SNR_PLUS_ONE: snr + 1,
    }[weighting]  # fmt: skip


def progressive_loss(
    student: Denoiser, teacher: Denoiser, x: Samples, sigma: PerSample, sigma_between: PerSample,
    sigma_next: PerSample, label: Condition | None = None,
    weighting: Weighting = Weighting.SNR_PLUS_ONE,
) -> Float[Tensor, ""]:  # fmt: skip
    """How far the student's estimate is from the one that does two of the teacher's steps."""
    x_next = two_steps(teacher, x, sigma, sigma_between, sigma_next, label)
    error = student(x, sigma, label) - target(x, x_next, sigma, sigma_next)
    return (expand(weight(weighting, sigma), x) * error**2).mean()


def draw_double_step(
    batch: int, levels: Ladder, rng: Generator | None = None
) -> tuple[PerSample, PerSample, PerSample]:
    """Draw some of the student's steps on its teacher's levels: start, the teacher's stop, end."""
    steps, left = divmod(len(levels) - 1, 2)
    if left:
        raise ValueError(f"{len(levels) - 1} steps cannot be halved")
    index = 2 * torch.randint(steps, (batch,), **source(rng)).to(levels.device)
    sigma, between, after = (levels.float()[index + step] for step in range(3))
    return sigma, between, after


def halving(
    run: FitRun, teacher: Denoiser, draw: Draw, levels: Ladder,
    weighting: Weighting = Weighting.SNR_PLUS_ONE,
) -> Iterator[Metrics]:  # fmt: skip
    """`fit` a student that needs half of its teacher's steps, whose levels are given."""

    def batch(rng: Generator) -> tuple[Tensor | None, ...]:
        x, label = draw(run.settings.batch, rng)
        sigma, between, after = draw_double_step(len(x), levels, rng)
        return add_noise(x, sigma, noise_like(x, rng)), sigma, between, after, label

    def loss(student: Denoiser, *drawn: Any) -> Tensor:
        return progressive_loss(student, teacher, *drawn, weighting=weighting)  # type: ignore[misc]

    return fit(run, batch, loss)


class Halved(NamedTuple):
    """A student of progressive distillation, and the levels between which it steps."""

    student: nn.Module
    levels: Tensor  # falling, the last is 0

    @property
    def steps(self) -> int:
        return len(self.levels) - 1

    def sample(self, z: Tensor, label: Condition | None = None) -> Tensor:
        return sample(self.student, z, label, sampler=euler, levels=self.levels)


def progressive(
    teacher: Denoiser, student: nn.Module, draw: Draw, levels: Ladder,
    settings: Callable[[int], FitSettings], weighting: Weighting = Weighting.SNR_PLUS_ONE,
) -> Iterator[Halved]:  # fmt: skip
    """Halve a sampler's steps, a power of two, until one is left; each student teaches the next.

    The first starts as a copy of the given one; ``settings(steps)`` say how the one of so many
    steps is trained (Algorithm 2).
    """
    while len(levels) > 2:
        student = copy.deepcopy(student).requires_grad_(True)
        run = FitRun(student, settings((len(levels) - 1) // 2))
        for _ in halving(run, teacher, draw, levels, weighting):
            pass
        teacher = student = run.average
        levels = levels[::2]  # the student's
        yield Halved(student, levels)

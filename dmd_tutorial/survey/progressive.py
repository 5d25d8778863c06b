"""Progressive distillation: a student does in one step what its teacher does in two. Again.

The steps are DDIM's, which on variance-exploding samples are Euler's on the probability-flow ODE.
Equations are those of Salimans and Ho 2022, "Progressive Distillation for Fast Sampling of
Diffusion Models", with alpha = 1.
"""

import copy
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from benchmarks.survey.task import Budget, Draw, Method, Sampler, Task, exhaust
from dmd_tutorial.checks import check_same_shape, check_sigma, expand
from dmd_tutorial.denoisers import Denoiser, denoised_from_noise, denoised_from_v
from dmd_tutorial.noise import add_noise, noise_like, sampling_levels
from dmd_tutorial.samplers import euler, sample
from dmd_tutorial.training import FitRun, Metrics, TeacherSettings, fit

# The target


def ddim_step(
    x: Float[Tensor, "batch *shape"],
    denoised: Float[Tensor, "batch *shape"],
    sigma: Float[Tensor, " batch"],
    sigma_next: Float[Tensor, " batch"],
) -> Float[Tensor, "batch *shape"]:
    """One step of DDIM: keep the denoised estimate and the direction of the noise, shrink it.

    Args:
        x: Noisy samples, (batch, *shape).
        denoised: Denoised estimates of them, (batch, *shape).
        sigma: Their levels, (batch,), above 0.
        sigma_next: The levels to go to, (batch,), may be 0.

    Returns:
        ``denoised + (sigma_next / sigma) (x - denoised)``, (batch, *shape).

    Raises:
        ValueError: If shapes do not fit.

    Source: Song et al. 2021 (DDIM), Eq. 12 with eta = 0.
    """
    check_same_shape(x=x, denoised=denoised)
    check_sigma(x, sigma)
    check_sigma(x, sigma_next)
    return denoised + expand(sigma_next / sigma, x) * (x - denoised)


@torch.no_grad()
def two_steps(
    teacher: Denoiser,
    x: Float[Tensor, "batch *shape"],
    sigma: Float[Tensor, " batch"],
    sigma_between: Float[Tensor, " batch"],
    sigma_next: Float[Tensor, " batch"],
    label: Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, "batch *shape"]:
    """Where two DDIM steps of the teacher land.

    Args:
        teacher: The denoiser that takes the steps.
        x: Noisy samples at sigma, (batch, *shape).
        sigma: Levels t_n, (batch,).
        sigma_between: Levels t_{n-1}, (batch,), above 0.
        sigma_next: Levels t_{n-2}, (batch,), may be 0.
        label: Class of each, (batch,), or None.

    Returns:
        Samples at sigma_next, (batch, *shape), without gradient history.

    Source: Salimans and Ho 2022, Algorithm 2.
    """
    x = ddim_step(x, teacher(x, sigma, label), sigma, sigma_between)
    return ddim_step(x, teacher(x, sigma_between, label), sigma_between, sigma_next)


def target(
    x: Float[Tensor, "batch *shape"],
    x_next: Float[Tensor, "batch *shape"],
    sigma: Float[Tensor, " batch"],
    sigma_next: Float[Tensor, " batch"],
) -> Float[Tensor, "batch *shape"]:
    """The denoised estimate from which one DDIM step goes from x exactly to x_next.

    Args:
        x: Noisy samples at sigma, (batch, *shape).
        x_next: Where the step must land, at sigma_next, (batch, *shape).
        sigma: Levels, (batch,).
        sigma_next: Levels below, (batch,), may be 0.

    Returns:
        ``(x_next - r x) / (1 - r)`` with ``r = sigma_next / sigma``, (batch, *shape).

    Raises:
        ValueError: If shapes do not fit, or a step does not go down.

    Source: Salimans and Ho 2022, Algorithm 2 and appendix G.
    """
    check_same_shape(x=x, x_next=x_next)
    check_sigma(x, sigma)
    check_sigma(x, sigma_next)
    if (sigma_next >= sigma).any():
        pair = int((sigma_next - sigma).argmax())
        raise ValueError(f"a step must go down, not from {sigma[pair]:g} to {sigma_next[pair]:g}")
    ratio = expand(sigma_next / sigma, x)
    return (x_next - ratio * x) / (1 - ratio)


# What the network predicts, and how its errors count


class Prediction(StrEnum):
    """What a network may predict; each can be computed from each other."""

    X = "x"  # the clean sample
    EPS = "eps"  # the noise
    V = "v"  # alpha noise - s clean, in the variance-preserving form


class Weighting(StrEnum):
    """How an error of the denoised estimate counts at each level; SNR is 1 / sigma^2."""

    SNR = "snr"  # the squared error of eps; 0 where there is only noise
    TRUNCATED = "truncated snr"  # max(SNR, 1): the larger of the squared errors of x and eps
    SNR_PLUS_ONE = "snr+1"  # the squared error of v


def weight(weighting: Weighting, sigma: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """The weight of a squared error of the denoised estimate.

    Args:
        weighting: Which.
        sigma: Noise levels, (batch,), above 0.

    Returns:
        Weights, (batch,).

    Source: Salimans and Ho 2022, Section 4.
    """
    snr = 1 / sigma**2
    return {
        Weighting.SNR: snr,
        Weighting.TRUNCATED: snr.clamp_min(1),
        Weighting.SNR_PLUS_ONE: snr + 1,
    }[weighting]


class ReadAs(nn.Module):
    """A network whose raw answer is read as x, eps or v.

    Args:
        network: Called as ``network(x / sqrt(1 + sigma^2), ln(sigma) / 4, label)``.
        prediction: What its answer is taken for.

    Source: Salimans and Ho 2022, Section 4 and appendix D.
    """

    def __init__(self, network: nn.Module, prediction: Prediction) -> None:
        super().__init__()
        self.network, self.prediction = network, prediction

    def forward(
        self,
        x: Float[Tensor, "batch *shape"],
        sigma: Float[Tensor, " batch"],
        label: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch *shape"]:
        """Denoise.

        Args:
            x: Noisy samples, (batch, *shape).
            sigma: Their levels, (batch,), above 0.
            label: Class of each, (batch,), or None.

        Returns:
            Denoised estimates, (batch, *shape).
        """
        check_sigma(x, sigma)
        alpha = expand((1 + sigma**2).rsqrt(), x)
        raw = self.network(alpha * x, sigma.log() / 4, label)
        if self.prediction is Prediction.X:
            return raw
        convert = denoised_from_noise if self.prediction is Prediction.EPS else denoised_from_v
        return convert(x, raw, sigma)


# The loss, one halving, all halvings


def progressive_loss(
    student: Denoiser,
    teacher: Denoiser,
    x: Float[Tensor, "batch *shape"],
    sigma: Float[Tensor, " batch"],
    sigma_between: Float[Tensor, " batch"],
    sigma_next: Float[Tensor, " batch"],
    label: Int[Tensor, " batch"] | None = None,
    weighting: Weighting = Weighting.SNR_PLUS_ONE,
) -> Float[Tensor, ""]:
    """How far the student's estimate is from the one that does two of the teacher's steps.

    Args:
        student: The denoiser in training.
        teacher: The denoiser whose steps are to be halved.
        x: Noisy samples at sigma, (batch, *shape).
        sigma: Levels t_n, from which the student steps, (batch,).
        sigma_between: Levels t_{n-1}, where only the teacher stops, (batch,).
        sigma_next: Levels t_{n-2}, to which both go, (batch,).
        label: Class of each, (batch,), or None.
        weighting: How errors count at each level.

    Returns:
        The weighted mean square over samples and values, a scalar.

    Source: Salimans and Ho 2022, Algorithm 2.
    """
    x_next = two_steps(teacher, x, sigma, sigma_between, sigma_next, label)
    error = student(x, sigma, label) - target(x, x_next, sigma, sigma_next)
    return (expand(weight(weighting, sigma), x) * error**2).mean()


def halved(levels: Float[Tensor, " steps+1"]) -> Float[Tensor, " half+1"]:
    """Every second level: the student's, where the levels are the teacher's.

    Args:
        levels: Falling noise levels of an even number of steps, (steps + 1,).

    Returns:
        Levels, (steps / 2 + 1,).

    Raises:
        ValueError: If the number of steps is odd.
    """
    if len(levels) % 2 == 0:
        raise ValueError(f"{len(levels) - 1} steps cannot be halved")
    return levels[::2]


def draw_double_step(
    batch: int, levels: Float[Tensor, " steps+1"], rng: Generator | None = None
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Draw which of the student's steps to learn, all equally likely.

    Args:
        batch: How many.
        levels: The teacher's falling levels, (steps + 1,), an even number of steps.
        rng: Source of randomness; torch's own without one.

    Returns:
        Where the step starts, where the teacher stops on the way, where it ends, (batch,) each,
        float32.
    """
    starts = len(halved(levels)) - 1
    index = 2 * torch.randint(starts, (batch,), generator=rng)
    sigma, between, after = (levels.float()[index + step] for step in range(3))
    return sigma, between, after


def halving(
    run: FitRun,
    teacher: Denoiser,
    draw: Draw,
    levels: Float[Tensor, " steps+1"],
    weighting: Weighting = Weighting.SNR_PLUS_ONE,
) -> Iterator[Metrics]:
    """Train a student that needs half of its teacher's steps.

    Args:
        run: The student, its optimiser and its settings.
        teacher: The denoiser, frozen.
        draw: Data: ``(count, rng) -> (x, label)``.
        levels: The teacher's falling levels, (steps + 1,).
        weighting: How errors count at each level.

    Returns:
        `fit`, see there.

    Source: Salimans and Ho 2022, Algorithm 2.
    """

    def batch(rng: Generator) -> tuple[Tensor | None, ...]:
        x, label = draw(run.settings.batch, rng)
        sigma, between, after = draw_double_step(len(x), levels, rng)
        return add_noise(x, sigma, noise_like(x, rng)), sigma, between, after, label

    def loss(
        student: Denoiser, x: Tensor, sigma: Tensor, between: Tensor, after: Tensor, label: Tensor
    ) -> Tensor:
        return progressive_loss(student, teacher, x, sigma, between, after, label, weighting)

    return fit(run, batch, loss)


class Halved(NamedTuple):
    """A student of progressive distillation, and the levels between which it steps."""

    student: nn.Module
    levels: Tensor  # falling, the last is 0

    @property
    def steps(self) -> int:
        """How many steps it takes."""
        return len(self.levels) - 1

    def sample(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        """Sample with DDIM from noise (count, *shape), a step for each two levels."""
        return sample(self.student, z, label, sampler=euler, levels=self.levels)


def progressive(
    teacher: Denoiser,
    student: nn.Module,
    draw: Draw,
    levels: Float[Tensor, " steps+1"],
    settings: Callable[[int], TeacherSettings],
    weighting: Weighting = Weighting.SNR_PLUS_ONE,
) -> Iterator[Halved]:
    """Halve a sampler's steps until one is left; each student is the next one's teacher.

    Args:
        teacher: The denoiser to begin with, frozen.
        student: Where the first student starts, usually a copy of the teacher; it is copied.
        draw: Data: ``(count, rng) -> (x, label)``.
        levels: The teacher's falling levels, (steps + 1,), steps a power of two.
        settings: How the student of so many steps is trained.
        weighting: How errors count at each level.

    Yields:
        Each student when it is trained.

    Source: Salimans and Ho 2022, Algorithm 2.
    """
    while len(levels) > 2:
        student = copy.deepcopy(student).requires_grad_(True)
        run = FitRun(student, settings((len(levels) - 1) // 2))
        exhaust(halving(run, teacher, draw, levels, weighting))
        teacher = student = run.average
        levels = halved(levels)
        yield Halved(student, levels)


# The recipe of the survey


def _train(task: Task, budget: Budget, seed: int) -> dict[int, Sampler]:
    """Halve the steps of the task's teacher until one is left, an equal share for each halving."""
    points = len(task.shape) == 1
    batch, rate = (512, 2e-3) if points else (64, 1e-3)
    levels = sampling_levels(32, sigma_max=task.sigma_max)
    cost = 5 * batch  # two of the teacher's passes, one of the student's with its gradient
    steps = max(1, int(budget.left / cost / 5))  # 5 halvings

    def settings(left: int) -> TeacherSettings:
        return TeacherSettings(
            steps, batch, learning_rate=rate, warm_up=20, ema=0.99, seed=1000 * seed + left
        )

    student = budget.watch(task.student())  # its copies are watched as well
    return {
        halved.steps: halved.sample
        for halved in progressive(task.teacher, student, task.draw, levels, settings)
        if halved.steps <= 4
    }


METHODS: tuple[Method, ...] = (Method("Progressive distillation", 10, _train, needs_data=True),)

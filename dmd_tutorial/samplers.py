"""Samplers: each one algorithm, written as a generator that yields a small record per step.

A notebook can plot the trajectory, stop early, or count evaluations; `sample` just runs one to
its end. The state is float64 throughout, because many small steps add up; the denoiser is called
in the type of the noise that was given.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from dmd_tutorial.checks import check_finite
from dmd_tutorial.denoisers import Denoiser, noise_from_denoised, score_from_denoised
from dmd_tutorial.noise import sampling_levels


class Step(NamedTuple):
    """What a sampler has done so far.

    Attributes:
        index: The step's number, from 0.
        x: The state after the step, (batch, *shape), float64.
        denoised: The denoiser's last answer, (batch, *shape), float64.
        sigma: The noise level that x has now, in the units of x.
        evaluations: How often the denoiser has been called since the start.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs
    x: Float[Tensor, "batch *shape"]
    denoised: Float[Tensor, "batch *shape"]
    sigma: float
    evaluations: int


class _Counted:
    """A denoiser in float64 outside and its own type inside, that counts its calls."""

    def __init__(self, denoiser: Denoiser, label: Tensor | None, dtype: torch.dtype) -> None:
        self.denoiser, self.label, self.dtype, self.calls = denoiser, label, dtype, 0

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        self.calls += 1
        levels = torch.full((len(x),), float(sigma), dtype=self.dtype, device=x.device)
        return self.denoiser(x.to(self.dtype), levels, self.label).double()

    def slope(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """Denoised estimate, and dx/dsigma of the probability-flow ODE (EDM, Eq. 1 and 3)."""
        denoised = self(x, sigma)
        levels = torch.full((len(x),), float(sigma), dtype=x.dtype, device=x.device)
        return denoised, noise_from_denoised(x, denoised, levels)


def _start(z: Tensor, levels: Tensor) -> Tensor:
    check_finite(z=z)
    if len(levels) < 2 or (levels.diff() >= 0).any():
        raise ValueError(f"levels must fall from first to last, they are {levels.tolist()}")
    return levels[0].item() * z.double()


@torch.no_grad()
def euler(
    denoiser: Denoiser,
    z: Float[Tensor, "batch *shape"],
    levels: Float[Tensor, " steps+1"],
    label: Int[Tensor, " batch"] | None = None,
) -> Iterator[Step]:
    """Euler's method on the probability-flow ODE: one evaluation a step, first order.

    Args:
        denoiser: The teacher.
        z: Standard normal noise, (batch, *shape); the start is ``levels[0] * z``.
        levels: Falling noise levels, (steps + 1,), the last may be 0.
        label: Class of each sample, (batch,), or None.

    Yields:
        A record after each step.

    Raises:
        ValueError: If levels do not fall or z is not finite.

    Source: Song et al. 2021, Eq. 13; Karras et al. 2022 (EDM), Eq. 1.
    """
    counted = _Counted(denoiser, label, z.dtype)
    x = _start(z, levels)
    pairs = zip(levels.tolist(), levels.tolist()[1:], strict=False)
    for index, (sigma, sigma_next) in enumerate(pairs):
        denoised, slope = counted.slope(x, sigma)
        x = x + (sigma_next - sigma) * slope
        yield Step(index, x, denoised, sigma_next, counted.calls)


@torch.no_grad()
def heun(
    denoiser: Denoiser,
    z: Float[Tensor, "batch *shape"],
    levels: Float[Tensor, " steps+1"],
    label: Int[Tensor, " batch"] | None = None,
) -> Iterator[Step]:
    """Heun's method on the probability-flow ODE: two evaluations a step, second order.

    The step to noise level 0 is left at Euler's, since the slope there is 0/0: N steps cost
    2N - 1 evaluations.

    Args:
        denoiser: The teacher.
        z: Standard normal noise, (batch, *shape); the start is ``levels[0] * z``.
        levels: Falling noise levels, (steps + 1,), the last may be 0.
        label: Class of each sample, (batch,), or None.

    Yields:
        A record after each step.

    Raises:
        ValueError: If levels do not fall or z is not finite.

    Source: Karras et al. 2022 (EDM), Algorithm 1.
    """
    counted = _Counted(denoiser, label, z.dtype)
    x = _start(z, levels)
    pairs = zip(levels.tolist(), levels.tolist()[1:], strict=False)
    for index, (sigma, sigma_next) in enumerate(pairs):
        x, denoised = _heun_step(counted, x, sigma, sigma_next)
        yield Step(index, x, denoised, sigma_next, counted.calls)


def _heun_step(
    counted: _Counted, x: Tensor, sigma: float, sigma_next: float
) -> tuple[Tensor, Tensor]:
    denoised, slope = counted.slope(x, sigma)
    x_next = x + (sigma_next - sigma) * slope
    if sigma_next > 0:
        denoised, slope_next = counted.slope(x_next, sigma_next)
        x_next = x + (sigma_next - sigma) * (slope + slope_next) / 2
    return x_next, denoised


@torch.no_grad()
def stochastic(
    denoiser: Denoiser,
    z: Float[Tensor, "batch *shape"],
    levels: Float[Tensor, " steps+1"],
    label: Int[Tensor, " batch"] | None = None,
    *,
    churn: float = 40.0,
    churn_min: float = 0.05,
    churn_max: float = 50.0,
    noise_scale: float = 1.003,
    generator: Generator | None = None,
) -> Iterator[Step]:
    """EDM's stochastic sampler: a little new noise before each of Heun's steps.

    Args:
        denoiser: The teacher.
        z: Standard normal noise, (batch, *shape); the start is ``levels[0] * z``.
        levels: Falling noise levels, (steps + 1,), the last may be 0.
        label: Class of each sample, (batch,), or None.
        churn: How much noise in all (S_churn); 0 gives `heun` exactly.
        churn_min: Below this level no noise is added (S_min), in the units of x.
        churn_max: Above this level no noise is added (S_max).
        noise_scale: Standard deviation of the new noise (S_noise).
        generator: Source of the new noise; torch's own without one.

    Yields:
        A record after each step.

    Raises:
        ValueError: If levels do not fall, z is not finite, or churn is negative.

    Source: Karras et al. 2022 (EDM), Algorithm 2 and Table 5.
    """
    if churn < 0:
        raise ValueError(f"churn must not be negative, it is {churn}")
    counted = _Counted(denoiser, label, z.dtype)
    x = _start(z, levels)
    gamma_of_all = min(churn / (len(levels) - 1), math.sqrt(2) - 1)
    pairs = zip(levels.tolist(), levels.tolist()[1:], strict=False)
    for index, (sigma, sigma_next) in enumerate(pairs):
        gamma = gamma_of_all if churn_min <= sigma <= churn_max else 0.0
        sigma_hat = sigma * (1 + gamma)
        if gamma > 0:
            noise = torch.randn(x.shape, generator=generator, dtype=z.dtype).to(x)
            x = x + noise_scale * math.sqrt(sigma_hat**2 - sigma**2) * noise
        x, denoised = _heun_step(counted, x, sigma_hat, sigma_next)
        yield Step(index, x, denoised, sigma_next, counted.calls)


@torch.no_grad()
def langevin(
    denoiser: Denoiser,
    x: Float[Tensor, "batch *shape"],
    sigma: float,
    steps: int,
    step_size: float,
    label: Int[Tensor, " batch"] | None = None,
    *,
    generator: Generator | None = None,
) -> Iterator[Step]:
    """Langevin dynamics at one noise level: up the score, plus noise.

    ``x <- x + step_size * score(x) + sqrt(2 step_size) * noise``

    Args:
        denoiser: Where the score comes from.
        x: Where the samples start, (batch, *shape).
        sigma: The noise level whose density is sampled, in the units of x, above 0.
        steps: How many steps.
        step_size: Length of a step in Langevin's time, in the units of x squared.
        label: Class of each sample, (batch,), or None.
        generator: Source of the noise; torch's own without one.

    Yields:
        A record after each step.

    Raises:
        ValueError: If sigma or step_size is not above 0, or x is not finite.

    Source: Song and Ermon 2019, Eq. 4 (their step is twice ours).
    """
    check_finite(x=x)
    if sigma <= 0 or step_size <= 0:
        raise ValueError(f"sigma and step_size must be above 0, not {sigma} and {step_size}")
    counted = _Counted(denoiser, label, x.dtype)
    dtype, x = x.dtype, x.double()
    levels = torch.full((len(x),), float(sigma), dtype=x.dtype, device=x.device)
    for index in range(steps):
        denoised = counted(x, sigma)
        noise = torch.randn(x.shape, generator=generator, dtype=dtype).to(x)
        score = score_from_denoised(x, denoised, levels)
        x = x + step_size * score + math.sqrt(2 * step_size) * noise
        yield Step(index, x, denoised, sigma, counted.calls)


@torch.no_grad()
def annealed_langevin(
    denoiser: Denoiser,
    z: Float[Tensor, "batch *shape"],
    levels: Float[Tensor, " levels"],
    label: Int[Tensor, " batch"] | None = None,
    *,
    steps_per_level: int = 10,
    step_ratio: float = 0.1,
    generator: Generator | None = None,
) -> Iterator[Step]:
    """Langevin dynamics down a ladder of noise levels, the step shrinking with the level.

    Args:
        denoiser: Where the scores come from.
        z: Standard normal noise, (batch, *shape); the start is ``levels[0] * z``.
        levels: Falling noise levels, (levels,), all above 0.
        label: Class of each sample, (batch,), or None.
        steps_per_level: Langevin steps at each level.
        step_ratio: ``step_size / sigma^2``, without unit.
        generator: Source of the noise; torch's own without one.

    Yields:
        A record after each step.

    Raises:
        ValueError: If levels do not fall or reach 0.

    Source: Song and Ermon 2019, Algorithm 1.
    """
    x = _start(z, levels)
    index = calls = 0
    for sigma in levels.tolist():
        step_size = step_ratio * sigma**2
        walk = langevin(
            denoiser, x.to(z.dtype), sigma, steps_per_level, step_size, label, generator=generator
        )
        for step in walk:
            calls += 1
            x = step.x
            yield step._replace(index=index, evaluations=calls)
            index += 1


def sample(
    denoiser: Denoiser,
    z: Float[Tensor, "batch *shape"],
    label: Int[Tensor, " batch"] | None = None,
    *,
    steps: int = 18,
    sampler: Callable[..., Iterator[Step]] = heun,
    levels: Float[Tensor, " steps+1"] | None = None,
    batch: int = 1000,
) -> Float[Tensor, "batch *shape"]:
    """Run a sampler to its end, batch by batch.

    Args:
        denoiser: The teacher.
        z: Standard normal noise, (count, *shape).
        label: Class of each sample, (count,), or None.
        steps: How many steps, where no levels are given.
        sampler: `euler`, `heun` or `stochastic`.
        levels: Falling noise levels, (steps + 1,); EDM's with `steps` steps without them.
        batch: How many samples are made at a time. It changes the memory, not the samples.

    Returns:
        Samples, (count, *shape), in the type of z.
    """
    if levels is None:
        levels = sampling_levels(steps)
    finished = []
    for z_part, label_part in _in_batches(z, label, batch):
        *_, last = sampler(denoiser, z_part, levels, label_part)
        finished.append(last.x.to(z.dtype))
    return torch.cat(finished)


@torch.no_grad()
def one_step(
    generator: nn.Module,
    z: Float[Tensor, "count *shape"],
    label: Int[Tensor, " count"] | None = None,
    *,
    batch: int = 1000,
) -> Float[Tensor, "count *shape"]:
    """Run a one-step generator, batch by batch, without gradient.

    Args:
        generator: The student.
        z: Standard normal noise, (count, *shape).
        label: Class of each sample, (count,), or None.
        batch: How many samples are made at a time.

    Returns:
        Samples, (count, *shape).
    """
    return torch.cat([generator(*part) for part in _in_batches(z, label, batch)])


def _in_batches(
    z: Tensor, label: Tensor | None, batch: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    parts = z.split(batch)
    labels = [None] * len(parts) if label is None else label.split(batch)
    return zip(parts, labels, strict=True)

"""Noise levels: the grid, the ways to draw from it, and variance-preserving schedules.

The book's own form is variance-exploding (EDM): ``x_noisy = x + sigma * noise``.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from dmd_tutorial.checks import check_finite, check_sigma, expand

SIGMA_MIN = 0.002
SIGMA_MAX = 80.0
RHO = 7.0
BINS = 1000


def add_noise(
    x: Float[Tensor, "batch *shape"],
    sigma: Float[Tensor, " batch"],
    noise: Float[Tensor, "batch *shape"],
) -> Float[Tensor, "batch *shape"]:
    """Noise samples: ``x_noisy = x + sigma * noise``.

    Args:
        x: Clean samples, (batch, *shape).
        sigma: Noise level of each sample, (batch,), in the units of x.
        noise: Standard normal noise, (batch, *shape).

    Returns:
        Noisy samples, (batch, *shape).

    Raises:
        ValueError: If sigma does not hold one level per sample.
    """
    check_sigma(x, sigma)
    return x + expand(sigma, x) * noise


def noise_like(
    x: Float[Tensor, "batch *shape"], generator: Generator | None = None
) -> Float[Tensor, "batch *shape"]:
    """Standard normal noise in the shape, type and place of x.

    Args:
        x: Any samples, (batch, *shape).
        generator: Source of randomness; torch's own without one.

    Returns:
        Noise, (batch, *shape). It is drawn where the generator lives, so a CPU generator gives
        the same noise for every device.
    """
    device = "cpu" if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=device).to(x)


def karras_grid(
    bins: int = BINS,
    sigma_min: float = SIGMA_MIN,
    sigma_max: float = SIGMA_MAX,
    rho: float = RHO,
) -> Float[Tensor, " bins"]:
    """The noise levels of EDM, ascending: evenly spaced in ``sigma ** (1 / rho)``.

    Args:
        bins: How many levels, at least 2.
        sigma_min: The lowest level, index 0, in the units of x.
        sigma_max: The highest level, the last index.
        rho: How strongly the levels crowd towards sigma_min; 1 is an even grid.

    Returns:
        Levels, (bins,), float64 (their seventh powers lose digits in float32).

    Raises:
        ValueError: If there are fewer than 2 levels, or not 0 < sigma_min < sigma_max.

    Source: Karras et al. 2022 (EDM), Eq. 5.
    """
    if bins < 2:
        raise ValueError(f"a grid needs at least 2 levels, not {bins}")
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"need 0 < sigma_min < sigma_max, not {sigma_min} and {sigma_max}")
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    grid = torch.linspace(low, high, bins, dtype=torch.float64) ** rho
    grid[0], grid[-1] = sigma_min, sigma_max  # exact ends, whatever the powers rounded to
    return grid


def sampling_levels(
    steps: int,
    sigma_min: float = SIGMA_MIN,
    sigma_max: float = SIGMA_MAX,
    rho: float = RHO,
) -> Float[Tensor, " steps+1"]:
    """The levels that a sampler walks down: sigma_max, ..., sigma_min, 0.

    Args:
        steps: How many steps the sampler takes, at least 1. One step goes from sigma_max to 0.
        sigma_min: The last level above 0, in the units of x.
        sigma_max: The first level.
        rho: See `karras_grid`.

    Returns:
        Descending levels with 0 at the end, (steps + 1,), float64.

    Raises:
        ValueError: If steps is below 1.

    Source: Karras et al. 2022 (EDM), Eq. 5 and Algorithm 1.
    """
    if steps < 1:
        raise ValueError(f"a sampler takes at least 1 step, not {steps}")
    if steps == 1:
        return torch.tensor([sigma_max, 0.0], dtype=torch.float64)
    levels = karras_grid(steps, sigma_min, sigma_max, rho).flip(0)
    return torch.cat([levels, levels.new_zeros(1)])


def lognormal_sigma(
    batch: int, mean: float = -1.2, std: float = 1.2, generator: Generator | None = None
) -> Float[Tensor, " batch"]:
    """Draw the noise levels on which EDM trains a teacher: ``ln(sigma) ~ N(mean, std^2)``.

    Args:
        batch: How many levels.
        mean: Mean of ln(sigma).
        std: Standard deviation of ln(sigma).
        generator: Source of randomness; torch's own without one.

    Returns:
        Noise levels, (batch,), in the units of x.

    Source: Karras et al. 2022 (EDM), Table 1.
    """
    return torch.exp(mean + std * torch.randn(batch, generator=generator))


def grid_sigma(
    batch: int,
    grid: Float[Tensor, " bins"],
    low: float = 0.0,
    high: float = 1.0,
    generator: Generator | None = None,
) -> Float[Tensor, " batch"]:
    """Draw levels from a part of the grid, every index in it equally likely.

    Args:
        batch: How many levels.
        grid: Ascending noise levels, (bins,), as `karras_grid` gives them.
        low: Where the part starts, as a fraction of the number of levels.
        high: Where it ends. The index ``high * bins`` is included, if there is one.
        generator: Source of randomness; torch's own without one.

    Returns:
        Noise levels, (batch,), float32, on the device of the grid.

    Raises:
        ValueError: If not 0 <= low <= high <= 1.
    """
    if not 0 <= low <= high <= 1:
        raise ValueError(f"need 0 <= low <= high <= 1, not {low} and {high}")
    bins = len(grid)
    first = min(int(low * bins), bins - 1)
    last = min(int(high * bins), bins - 1)
    index = torch.randint(first, last + 1, (batch,), generator=generator)
    return grid.float()[index.to(grid.device)]


def dmd_sigma(
    batch: int, grid: Float[Tensor, " bins"], generator: Generator | None = None
) -> Float[Tensor, " batch"]:
    """Draw the levels of a generator update: 2 % to 98 % of the grid.

    The ends are left out because scores are least reliable there: at the lowest levels the two
    networks see almost clean images, at the highest almost nothing but noise.

    Args:
        batch: How many levels.
        grid: Ascending noise levels, (bins,).
        generator: Source of randomness; torch's own without one.

    Returns:
        Noise levels, (batch,), in the units of x.

    Source: Yin et al. 2024 (DMD), Section 3.2 and appendix.
    """
    return grid_sigma(batch, grid, 0.02, 0.98, generator)


class Schedule(NamedTuple):
    """A variance-preserving schedule at some times: ``x_t = alpha * x + sigma * noise``."""

    alpha: Float[Tensor, " batch"]
    sigma: Float[Tensor, " batch"]


def cosine_schedule(t: Float[Tensor, " batch"]) -> Schedule:
    """The variance-preserving schedule whose signal falls like a cosine.

    Args:
        t: Times, (batch,), from 0 (clean) to 1 (noise).

    Returns:
        ``alpha = cos(pi t / 2)`` and ``sigma = sin(pi t / 2)``, (batch,) each.

    Raises:
        ValueError: If a time is outside [0, 1].

    Source: after Nichol and Dhariwal 2021, without their offset.
    """
    _check_time(t)
    return Schedule(torch.cos(torch.pi / 2 * t), torch.sin(torch.pi / 2 * t))


def linear_schedule(
    t: Float[Tensor, " batch"], beta_min: float = 0.1, beta_max: float = 20.0
) -> Schedule:
    """The variance-preserving schedule of DDPM in continuous time: beta rises linearly.

    Args:
        t: Times, (batch,), from 0 (clean) to 1 (noise).
        beta_min: The rate at time 0, per unit of time.
        beta_max: The rate at time 1.

    Returns:
        ``alpha = exp(-integral of beta / 2)`` and ``sigma = sqrt(1 - alpha^2)``.

    Raises:
        ValueError: If a time is outside [0, 1].

    Source: Song et al. 2021, Eq. 11 and appendix B.
    """
    _check_time(t)
    integral = beta_min * t + (beta_max - beta_min) * t**2 / 2
    # expm1 keeps the digits of 1 - alpha^2 where alpha is almost 1
    return Schedule(torch.exp(-integral / 2), torch.sqrt(-torch.expm1(-integral)))


def to_variance_exploding(
    x_t: Float[Tensor, "batch *shape"], schedule: Schedule
) -> tuple[Float[Tensor, "batch *shape"], Float[Tensor, " batch"]]:
    """Rewrite variance-preserving samples in the book's form.

    Dividing ``x_t = alpha x + sigma noise`` by alpha gives ``x + (sigma / alpha) noise``: the
    same random variable, another unit of length. One denoiser therefore serves both forms.

    Args:
        x_t: Variance-preserving noisy samples, (batch, *shape).
        schedule: alpha and sigma of each sample, (batch,) each, alpha above 0.

    Returns:
        ``x_t / alpha``, (batch, *shape), and the noise level ``sigma / alpha``, (batch,).

    Raises:
        ValueError: If the schedule does not fit the batch, or alpha is 0 somewhere.
    """
    alpha, sigma = schedule
    check_sigma(x_t, sigma)
    check_sigma(x_t, alpha)
    if (alpha <= 0).any():
        raise ValueError("alpha is 0 at some time: pure noise has no variance-exploding form")
    return x_t / expand(alpha, x_t), sigma / alpha


def _check_time(t: Tensor) -> None:
    check_finite(t=t)
    if t.min() < 0 or t.max() > 1:
        raise ValueError(f"time is from 0 to 1, not {t.min().item():g} to {t.max().item():g}")

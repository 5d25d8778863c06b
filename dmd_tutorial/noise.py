"""Noise: its random sources, its levels, the ways to draw them, variance-preserving schedules.

The book's own form is variance-exploding (EDM): ``x_noisy = x + sigma * noise``.
"""

import zlib
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from dmd_tutorial.checks import PerSample, Samples, check_finite, check_sigma, expand

SIGMA_MIN = 0.002  # of EDM, in the units of x
SIGMA_MAX = 80.0
RHO = 7.0
BINS = 1000
Purpose = Literal["training", "pairs", "evaluation", "pictures"]
Grid = Float[Tensor, " bins"]  # noise levels, ascending


def stream(
    purpose: Purpose, seed: int = 0, part: int = 0, device: torch.device | str = "cpu"
) -> Generator:
    """A random source that no other purpose, seed (0 to 16,383) or part (0 to 65,535) shares.

    So a student is never measured on the noise of its pairs. torch's source on the CPU reads 32
    bits of a number: two are the purpose, 16 the part (of pairs, the chunk), 14 the seed.
    """
    if not (0 <= seed < 2**14 and 0 <= part < 2**16):
        raise ValueError(f"a seed is from 0 to 16383, a part from 0 to 65535, not {seed}, {part}")
    if purpose not in get_args(Purpose):
        raise ValueError(f"a purpose is one of {get_args(Purpose)}, not {purpose!r}")
    number = get_args(Purpose).index(purpose)
    return Generator(device).manual_seed(number * 2**30 + part * 2**14 + seed)


def source(rng: Generator | None) -> dict[str, Any]:
    """What torch's functions need to draw from rng, torch's own without one, where it lives."""
    return {"generator": rng, "device": "cpu" if rng is None else rng.device}


def add_noise(x: Samples, sigma: PerSample, noise: Samples) -> Samples:
    """``x + sigma * noise``, for standard normal noise and levels in the units of x."""
    check_sigma(x, sigma)
    return x + expand(sigma, x) * noise


def noise_like(x: Samples, rng: Generator | None = None) -> Samples:
    """Standard normal noise for x, drawn where rng lives: the same for every device."""
    return torch.randn(x.shape, **source(rng)).to(x)


@torch.compiler.disable  # a source for each sample: nothing to compile
def noise_of(z: Samples, count: int) -> tuple[PerSample, Float[Tensor, "count batch *shape"]]:
    """What each sample's own z decides: a number, uniform from 0 to 1, and fresh normal noise.

    So it is the same again, on any device and in any company. The noise comes from parts of
    evaluation's stream that no seed begins: 1 and up.
    """
    keys = [zlib.crc32(row.tobytes()) for row in z.detach().cpu().float().numpy()]
    fresh, first = torch.empty(len(z), count, *z.shape[1:]), get_args(Purpose).index("evaluation")
    rng = Generator()
    for key, own in zip(keys, fresh, strict=True) if count else ():
        own.normal_(generator=rng.manual_seed(first * 2**30 + 2**14 + key % (2**30 - 2**14)))
    uniform = torch.tensor(keys, dtype=torch.float64) / 2**32
    return uniform.float(), fresh.transpose(0, 1).to(z)


def karras_grid(
    bins: int = BINS, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = RHO
) -> Grid:
    """The noise levels of EDM, ascending: evenly spaced in ``sigma ** (1 / rho)`` (EDM, Eq. 5).

    They are float64: their seventh powers lose digits in float32.
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
    steps: int, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = RHO
) -> Float[Tensor, " steps+1"]:
    """The levels that a sampler walks down: sigma_max, ..., sigma_min, 0; one step skips sigma_min.

    Source: Karras et al. 2022 (EDM), Eq. 5 and Algorithm 1.
    """
    if steps < 1:
        raise ValueError(f"a sampler takes at least 1 step, not {steps}")
    if steps == 1:
        return torch.tensor([sigma_max, 0.0], dtype=torch.float64)
    levels = karras_grid(steps, sigma_min, sigma_max, rho).flip(0)
    return torch.cat([levels, levels.new_zeros(1)])


def lognormal_sigma(
    batch: int, mean: float = -1.2, std: float = 1.2, rng: Generator | None = None
) -> PerSample:
    """The levels on which EDM trains a teacher, ``ln(sigma) ~ N(mean, std^2)`` (EDM, Table 1)."""
    return torch.exp(mean + std * torch.randn(batch, **source(rng)))


def grid_sigma(
    batch: int, grid: Grid, low: float = 0.0, high: float = 1.0, rng: Generator | None = None
) -> PerSample:
    """Draw levels from a part of an ascending grid, every index in it equally likely.

    The part goes from the fraction `low` of the indices to `high`, the index ``high * bins``
    included where there is one. The levels are float32.
    """
    if not 0 <= low <= high <= 1:
        raise ValueError(f"need 0 <= low <= high <= 1, not {low} and {high}")
    bins = len(grid)
    first = min(int(low * bins), bins - 1)
    last = min(int(high * bins), bins - 1)
    index = torch.randint(first, last + 1, (batch,), **source(rng))
    return grid.float()[index.to(grid.device)]


def dmd_sigma(batch: int, grid: Grid, rng: Generator | None = None) -> PerSample:
    """Draw the levels of a generator update: 2 % to 98 % of the grid (DMD, appendix)."""
    # at the ends scores are least reliable: almost clean images, or almost nothing but noise
    return grid_sigma(batch, grid, 0.02, 0.98, rng)


class Schedule(NamedTuple):
    """A variance-preserving schedule at some times: ``x_t = alpha * x + sigma * noise``."""

    alpha: PerSample
    sigma: PerSample


def cosine_schedule(t: PerSample) -> Schedule:
    """Signal and noise at times from 0 (clean) to 1: after Nichol and Dhariwal 2021, no offset."""
    _check_time(t)
    return Schedule(torch.cos(torch.pi / 2 * t), torch.sin(torch.pi / 2 * t))


def linear_schedule(t: PerSample, beta_min: float = 0.1, beta_max: float = 20.0) -> Schedule:
    """The schedule of DDPM in continuous time, t from 0 (clean) to 1: beta rises linearly.

    Source: Song et al. 2021, Eq. 11 and appendix B.
    """
    _check_time(t)
    integral = beta_min * t + (beta_max - beta_min) * t**2 / 2
    # expm1 keeps the digits of 1 - alpha^2 where alpha is almost 1
    return Schedule(torch.exp(-integral / 2), torch.sqrt(-torch.expm1(-integral)))


def to_variance_exploding(x_t: Samples, schedule: Schedule) -> tuple[Samples, PerSample]:
    """Rewrite variance-preserving samples in the book's form: ``x_t / alpha``, ``sigma / alpha``.

    Dividing ``x_t = alpha x + sigma noise`` by alpha gives ``x + (sigma / alpha) noise``: the
    same random variable, another unit of length. One denoiser therefore serves both forms.
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

"""DDPM's ancestral sampler, and DDIM, which leaves out some of its noise and most of its steps.

In the book's form, ``x = clean + sigma * noise``, of the schedule of alphas and betas only the
ladder of noise levels is left.
"""

import math
from itertools import pairwise

import torch
from torch import Generator

from dmd_tutorial.checks import Condition, Samples
from dmd_tutorial.denoisers import Denoiser
from dmd_tutorial.noise import noise_like
from dmd_tutorial.samplers.step import Counted, Ladder, Step, Steps, start


def ddpm_levels(steps: int = 1000) -> Ladder:
    """DDPM's noise levels, or an evenly spaced subsequence of them, from about 157 to 0.

    ``sigma_t = sqrt((1 - alpha_bar_t) / alpha_bar_t)``, alpha_bar the running product of 1 - beta,
    where beta rises linearly. Source: Ho et al. 2020 (DDPM), Section 4.
    """
    if not 1 <= steps <= 1000:
        raise ValueError(f"steps must be from 1 to 1000, not {steps}")
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bar = torch.cat([beta.new_ones(1), (1 - beta).cumprod(0)])
    index = torch.linspace(1000, 0, steps + 1, dtype=torch.float64).round().long()
    return ((1 - alpha_bar) / alpha_bar).sqrt()[index]


def ddim_noise(sigma: float, sigma_next: float, eta: float) -> float:
    """Standard deviation of DDIM's new noise: ``eta`` times the *root* of DDPM's variance."""
    return eta * sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2)


@torch.no_grad()
def ancestral(
    denoiser: Denoiser, z: Samples, levels: Ladder,
    label: Condition | None = None, *, rng: Generator | None = None,
) -> Steps:  # fmt: skip
    """DDPM's sampler: draw from the posterior of the next level, given this one and D's guess.

    Source: Ho et al. 2020 (DDPM), Eq. 6, 7 and Algorithm 2, divided by the root of alpha_bar.
    """
    counted = Counted(denoiser, label, z.dtype)
    x = start(z, levels)
    for index, (sigma, sigma_next) in enumerate(pairwise(levels.tolist())):
        denoised = counted(x, sigma)
        kept = (sigma_next / sigma) ** 2  # the share of x in the mean of the posterior
        x = kept * x + (1 - kept) * denoised
        if sigma_next > 0:
            variance = kept * (sigma**2 - sigma_next**2)
            x = x + math.sqrt(variance) * noise_like(x, rng)
        yield Step(index, x, denoised, sigma_next, counted.calls)


@torch.no_grad()
def ddim(
    denoiser: Denoiser, z: Samples, levels: Ladder,
    label: Condition | None = None, *, eta: float = 0.0, rng: Generator | None = None,
) -> Steps:  # fmt: skip
    """DDIM: guess the clean sample, put the guessed noise back, and some new noise.

    The levels may be any subsequence of those in training. `eta` says how much of DDPM's noise is
    new, from 0 (none: `euler`) to 1 (`ancestral`).
    Source: Song, Meng and Ermon 2021 (DDIM), Eq. 12 and 16, divided by the root of alpha.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be from 0 to 1, not {eta}")
    counted = Counted(denoiser, label, z.dtype)
    x = start(z, levels)
    for index, (sigma, sigma_next) in enumerate(pairwise(levels.tolist())):
        denoised, noise = counted.slope(x, sigma)
        new = ddim_noise(sigma, sigma_next, eta)
        x = denoised + math.sqrt(sigma_next**2 - new**2) * noise
        if new > 0:
            x = x + new * noise_like(x, rng)
        yield Step(index, x, denoised, sigma_next, counted.calls)

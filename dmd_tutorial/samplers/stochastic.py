"""Samplers that draw new noise on the way: Langevin dynamics (NCSN), DDPM's, DDIM, and EDM's.

In the book's form, ``x = clean + sigma * noise``, of DDPM's schedule of alphas and betas only the
ladder of noise levels is left.
"""

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from dmd_tutorial.checks import Condition, Samples, check_finite
from dmd_tutorial.denoisers import Denoiser, score_from_denoised
from dmd_tutorial.noise import noise_like, source
from dmd_tutorial.samplers.classical import heun_step
from dmd_tutorial.samplers.step import Counted, Ladder, Step, exact, start


@torch.no_grad()
def langevin(
    denoiser: Denoiser, x: Samples, sigma: float, steps: int,
    step_size: float, label: Condition | None = None, *, rng: Generator | None = None,
) -> Iterator[Step]:  # fmt: skip
    """Langevin dynamics at one noise level, from x: up the score, plus noise.

    ``x <- x + step_size * score(x) + sqrt(2 step_size) * noise``, where step_size is in the units
    of x squared. Source: Song and Ermon 2019, Eq. 4 (their step is twice ours).
    """
    check_finite(x=x)
    if sigma <= 0 or step_size <= 0:
        raise ValueError(f"sigma and step_size must be above 0, not {sigma} and {step_size}")
    counted = Counted(denoiser, label, x.dtype)
    dtype, x = x.dtype, exact(x)
    levels = torch.full((len(x),), float(sigma), dtype=x.dtype, device=x.device)
    for index in range(steps):
        denoised = counted(x, sigma)
        noise = torch.randn(x.shape, dtype=dtype, **source(rng)).to(x)
        score = score_from_denoised(x, denoised, levels)
        x = x + step_size * score + math.sqrt(2 * step_size) * noise
        yield Step(index, x, denoised, sigma, counted.calls)


@torch.no_grad()
def annealed_langevin(
    denoiser: Denoiser, z: Samples, levels: Float[Tensor, " levels"],
    label: Condition | None = None, *, steps_per_level: int = 10, step_ratio: float = 0.1,
    rng: Generator | None = None,
) -> Iterator[Step]:  # fmt: skip
    """Langevin dynamics down a ladder of noise levels, all above 0.

    The step shrinks with the level, ``step_ratio * sigma^2``. Source: Song and Ermon 2019, Alg. 1.
    """
    x = start(z, levels)
    index = calls = 0
    for sigma in levels.tolist():
        step_size = step_ratio * sigma**2
        walk = langevin(denoiser, x.to(z.dtype), sigma, steps_per_level, step_size, label, rng=rng)
        for step in walk:
            calls += 1
            x = step.x
            yield step._replace(index=index, evaluations=calls)
            index += 1


def ddpm_levels(
    steps: int = 1000, train_steps: int = 1000, beta_min: float = 1e-4, beta_max: float = 0.02
) -> Ladder:
    """DDPM's noise levels, or an evenly spaced subsequence of them, from about 157 to 0.

    ``sigma_t = sqrt((1 - alpha_bar_t) / alpha_bar_t)``, alpha_bar the running product of 1 - beta,
    where beta rises linearly. Source: Ho et al. 2020 (DDPM), Section 4.
    """
    if not 1 <= steps <= train_steps:
        raise ValueError(f"steps must be from 1 to {train_steps}, not {steps}")
    beta = torch.linspace(beta_min, beta_max, train_steps, dtype=torch.float64)
    alpha_bar = torch.cat([beta.new_ones(1), (1 - beta).cumprod(0)])
    index = torch.linspace(train_steps, 0, steps + 1, dtype=torch.float64).round().long()
    return ((1 - alpha_bar) / alpha_bar).sqrt()[index]


def ddim_noise(sigma: float, sigma_next: float, eta: float) -> float:
    """Standard deviation of DDIM's new noise: ``eta`` times the *root* of DDPM's variance."""
    return eta * sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2)


@torch.no_grad()
def ancestral(
    denoiser: Denoiser, z: Samples, levels: Ladder,
    label: Condition | None = None, *, rng: Generator | None = None,
) -> Iterator[Step]:  # fmt: skip
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
) -> Iterator[Step]:  # fmt: skip
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


@torch.no_grad()
def stochastic(
    denoiser: Denoiser, z: Samples, levels: Ladder,
    label: Condition | None = None, *, churn: float = 40.0, churn_min: float = 0.05,
    churn_max: float = 50.0, noise_scale: float = 1.003, rng: Generator | None = None,
) -> Iterator[Step]:  # fmt: skip
    """EDM's stochastic sampler: a little new noise before each of Heun's steps.

    `churn` says how much noise in all (S_churn), 0 gives `heun` exactly. It comes at the levels
    from churn_min to churn_max (S_min, S_max), with standard deviation `noise_scale` (S_noise).
    Source: Karras et al. 2022 (EDM), Algorithm 2 and Table 5.
    """
    if churn < 0:
        raise ValueError(f"churn must not be negative, it is {churn}")
    counted = Counted(denoiser, label, z.dtype)
    x = start(z, levels)
    gamma_of_all = min(churn / (len(levels) - 1), math.sqrt(2) - 1)
    for index, (sigma, sigma_next) in enumerate(pairwise(levels.tolist())):
        gamma = gamma_of_all if churn_min <= sigma <= churn_max else 0.0
        sigma_hat = sigma * (1 + gamma)
        if gamma > 0:
            noise = torch.randn(x.shape, dtype=z.dtype, **source(rng)).to(x)
            x = x + noise_scale * math.sqrt(sigma_hat**2 - sigma**2) * noise
        x, denoised = heun_step(counted, x, sigma_hat, sigma_next)
        yield Step(index, x, denoised, sigma_next, counted.calls)

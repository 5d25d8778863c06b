"""EDM's stochastic sampler: Heun's steps with a little new noise before each."""

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Generator

from dmd_tutorial.checks import Condition, Samples
from dmd_tutorial.denoisers import Denoiser
from dmd_tutorial.noise import source
from dmd_tutorial.samplers.classical import heun_step
from dmd_tutorial.samplers.step import Counted, Ladder, Step, start


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

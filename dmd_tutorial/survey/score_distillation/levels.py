"""Weights and noise laws.

A law is a grid, ``(sigma_max, sigma_data) -> levels``: `dmd` draws its indices uniformly, so a grid
of quantiles gives any distribution of levels. Generators are judged at 2 % to 98 % of it.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from dmd_tutorial.denoisers import SIGMA_DATA
from dmd_tutorial.noise import BINS, karras_grid, linear_schedule


def noise_prediction(
    x: Float[Tensor, "batch *shape"], sigma: Float[Tensor, " batch"],
    denoised_real: Float[Tensor, "batch *shape"],
) -> Float[Tensor, " batch"]:  # fmt: skip
    """``sigma^3 / (1 + sigma^2)`` (SDS, Eq. 3, w(t) = sigma_t^2; Wang et al. 2023, VSD, Eq. 9).

    They weight a difference of predicted *noises*, ``(D_critic - D_real) / sigma``, with the
    variance ``sigma^2 / (1 + sigma^2)`` of a variance-preserving schedule's noise.
    """
    return sigma**3 / (1 + sigma**2)


def schedule_levels(sigma_max: float, sigma_data: float = SIGMA_DATA) -> Float[Tensor, " bins"]:
    """Times spread evenly over a variance-preserving schedule, as ``sigma / alpha``: SDS and VSD.

    Source: Poole et al. 2022 (SDS), Section 3, with the schedule of Song et al. 2021.
    """
    alpha, sigma = linear_schedule(torch.linspace(1e-4, 1, 20 * BINS, dtype=torch.float64))
    levels = sigma / alpha
    levels = levels[levels <= sigma_max]
    return levels[torch.linspace(0, len(levels) - 1, BINS).long()]


def teacher_levels(sigma_max: float, sigma_data: float = SIGMA_DATA) -> Float[Tensor, " bins"]:
    """EDM's log-normal law, on which teachers are trained, below sigma_max: Diff-Instruct.

    Its median, 0.3, is for data of width 0.5. Source: Luo et al. 2023 (Diff-Instruct), public code;
    Karras et al. 2022 (EDM), Table 1.
    """
    mean, std = -1.2 + math.log(sigma_data / SIGMA_DATA), 1.2
    below = torch.special.ndtr(torch.tensor((math.log(sigma_max) - mean) / std))
    probability = below.double() * (torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS
    return torch.exp(mean + std * torch.special.ndtri(probability))


def dmd_levels(sigma_max: float, sigma_data: float = SIGMA_DATA) -> Float[Tensor, " bins"]:
    """EDM's sampling grid: DMD, DMD2, and SiD, who stops at 80 % of it."""
    return karras_grid(sigma_max=sigma_max)

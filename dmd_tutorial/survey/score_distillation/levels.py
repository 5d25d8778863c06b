"""Weights and noise laws.

A law is a grid: `dmd` draws its indices uniformly, so a grid of quantiles gives any distribution
of levels. Generators are judged at 2 % to 98 % of it.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from dmd_tutorial.denoisers import SIGMA_DATA
from dmd_tutorial.noise import BINS, karras_grid, linear_schedule


def noise_prediction(
    x: Float[Tensor, "batch *shape"],
    sigma: Float[Tensor, " batch"],
    denoised_real: Float[Tensor, "batch *shape"],
) -> Float[Tensor, " batch"]:
    """The weight w_t of SDS and VSD, ``sigma^3 / (1 + sigma^2)``.

    They weight a difference of predicted *noises*, ``(D_critic - D_real) / sigma``, with the
    variance ``sigma^2 / (1 + sigma^2)`` of a variance-preserving schedule's noise.

    Args:
        x: The generator's clean output, (batch, *shape); not used.
        sigma: Noise levels, (batch,), in the units of x.
        denoised_real: The teacher's estimate, (batch, *shape); not used.

    Returns:
        Weights, (batch,).

    Source: Poole et al. 2022 (SDS), Eq. 3 with w(t) = sigma_t^2; Wang et al. 2023 (VSD), Eq. 9.
    """
    return sigma**3 / (1 + sigma**2)


def schedule_levels(sigma_max: float, sigma_data: float = SIGMA_DATA) -> Float[Tensor, " bins"]:
    """Times spread evenly over a variance-preserving schedule: the law of SDS and VSD.

    Args:
        sigma_max: The highest level wanted, in the units of x.
        sigma_data: Standard deviation of the data; not used.

    Returns:
        The levels ``sigma / alpha``, (bins,), ascending.

    Source: Poole et al. 2022 (SDS), Section 3, with the schedule of Song et al. 2021.
    """
    alpha, sigma = linear_schedule(torch.linspace(1e-4, 1, 20 * BINS, dtype=torch.float64))
    levels = sigma / alpha
    levels = levels[levels <= sigma_max]
    return levels[torch.linspace(0, len(levels) - 1, BINS).long()]


def teacher_levels(sigma_max: float, sigma_data: float = SIGMA_DATA) -> Float[Tensor, " bins"]:
    """EDM's log-normal law, on which teachers are trained: the law of Diff-Instruct.

    Args:
        sigma_max: No level is above it, in the units of x.
        sigma_data: Standard deviation of the data; EDM's median, 0.3, is for data of 0.5.

    Returns:
        The quantiles of ``ln(sigma) ~ N(-1.2 + ln(sigma_data / 0.5), 1.2^2)`` below sigma_max,
        (bins,), ascending.

    Source: Luo et al. 2023 (Diff-Instruct), public code; Karras et al. 2022 (EDM), Table 1.
    """
    mean, std = -1.2 + math.log(sigma_data / SIGMA_DATA), 1.2
    below = torch.special.ndtr(torch.tensor((math.log(sigma_max) - mean) / std))
    probability = below.double() * (torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS
    return torch.exp(mean + std * torch.special.ndtri(probability))


def dmd_levels(sigma_max: float, sigma_data: float = SIGMA_DATA) -> Float[Tensor, " bins"]:
    """EDM's sampling grid: the law of DMD and DMD2, and SiD's, who stops at 80 % of it.

    Args:
        sigma_max: The highest level, in the units of x.
        sigma_data: Standard deviation of the data; not used.

    Returns:
        Levels, (bins,), ascending.
    """
    return karras_grid(sigma_max=sigma_max)

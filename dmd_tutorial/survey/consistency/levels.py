"""The two noise levels of a pair: neighbours of a grid, how likely each, and how fine the grid."""

import math

import torch
from jaxtyping import Float
from torch import Generator, Tensor


def neighbour_levels(
    batch: int,
    grid: Float[Tensor, " bins"],
    rng: Generator | None = None,
    *,
    skip: int = 1,
    probability: Float[Tensor, " bins-1"] | None = None,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Draw a level of the grid and the one below it.

    Args:
        batch: How many.
        grid: Ascending noise levels, (bins,), at least 2.
        rng: Source of randomness; torch's own without one.
        skip: How many places below; the lowest level where there are not so many.
        probability: Of each level but the lowest, (bins - 1,), up to a factor; equal without it.

    Returns:
        The higher and the lower levels, (batch,) each, float32.

    Source: Song et al. 2023, Algorithm 2; `skip` is that of latent consistency (Luo et al. 2023).
    """
    if probability is None:
        probability = torch.ones(len(grid) - 1)
    index = 1 + torch.multinomial(probability, batch, replacement=True, generator=rng)
    return grid.float()[index], grid.float()[(index - skip).clamp_min(0)]


def lognormal_probability(
    grid: Float[Tensor, " bins"], mean: float = -1.1, std: float = 2.0
) -> Float[Tensor, " bins-1"]:
    """How likely ``ln(sigma) ~ N(mean, std^2)`` falls between neighbours of the grid.

    Args:
        grid: Ascending noise levels, (bins,).
        mean: Mean of ln(sigma).
        std: Standard deviation of ln(sigma).

    Returns:
        Probabilities, (bins - 1,), up to a factor.

    Source: Song and Dhariwal 2024, Section 3.5.
    """
    return torch.special.ndtr((grid.log() - mean) / std).diff()


def doubling_bins(progress: float, first: int = 10, last: int = 1280) -> int:
    """How many levels the grid has during consistency training: 11, 21, ..., 1281.

    Args:
        progress: Share of the training that is done, in [0, 1).
        first: Intervals of the grid at first.
        last: Intervals at last.

    Returns:
        A number of levels.

    Source: Song and Dhariwal 2024, Section 3.4.
    """
    stages = int(math.log2(last / first)) + 1
    return min(first * 2 ** int(progress * stages), last) + 1

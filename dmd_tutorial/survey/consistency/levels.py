"""The noise levels of a pair, out of a grid of ascending levels, and how fine the grid is."""

import math

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from dmd_tutorial.checks import PerSample
from dmd_tutorial.noise import source


def neighbour_levels(
    batch: int, grid: Float[Tensor, " bins"], rng: Generator | None = None, *, skip: int = 1,
    probability: Float[Tensor, " bins-1"] | None = None,
) -> tuple[PerSample, PerSample]:  # fmt: skip
    """Draw a level and the one `skip` places below (latent consistency), or the lowest; float32.

    `probability`, of each but the lowest, is up to a factor. Source: Song et al. 2023, Alg. 2.
    """
    if probability is None:
        probability = torch.ones(len(grid) - 1)
    probability = probability.to(source(rng)["device"])
    drawn = torch.multinomial(probability, batch, replacement=True, generator=rng)
    index = 1 + drawn.to(grid.device)
    return grid.float()[index], grid.float()[(index - skip).clamp_min(0)]


def lognormal_probability(
    grid: Float[Tensor, " bins"], mean: float = -1.1, std: float = 2.0
) -> Float[Tensor, " bins-1"]:
    """How likely ``ln(sigma)`` falls between neighbours, up to a factor (Song and Dhariwal 3.5)."""
    return torch.special.ndtr((grid.log() - mean) / std).diff()


def doubling_bins(progress: float, first: int = 10, last: int = 1280) -> int:
    """Levels of the grid at a share of the training: 11 to 1281 (Song and Dhariwal 2024, 3.4)."""
    stages = int(math.log2(last / first)) + 1
    return min(first * 2 ** int(progress * stages), last) + 1

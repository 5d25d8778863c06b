"""Pairs of points on one path: made with the teacher (distillation), or without it (training)."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from dmd_tutorial.checks import Condition
from dmd_tutorial.denoisers import Denoiser
from dmd_tutorial.noise import add_noise
from dmd_tutorial.survey.consistency.paths import solve


class Pair(NamedTuple):
    """Two points of one path, or nearly: x (batch, *shape) at sigma (batch,), and one below it."""

    x: Tensor
    sigma: Tensor
    x_next: Tensor
    sigma_next: Tensor


def distillation_pair(
    teacher: Denoiser, x: Float[Tensor, "batch *shape"], noise: Float[Tensor, "batch *shape"],
    sigma: Float[Tensor, " batch"], sigma_next: Float[Tensor, " batch"],
    label: Condition | None = None,
) -> Pair:  # fmt: skip
    """Noised data, and the teacher's Heun step from there (Song et al. 2023, Algorithm 2)."""
    x_noisy = add_noise(x, sigma, noise)
    return Pair(x_noisy, sigma, solve(teacher, x_noisy, sigma, sigma_next, label), sigma_next)


def training_pair(
    x: Float[Tensor, "batch *shape"], noise: Float[Tensor, "batch *shape"],
    sigma: Float[Tensor, " batch"], sigma_next: Float[Tensor, " batch"],
) -> Pair:  # fmt: skip
    """The pair of consistency training: the same data and noise (Song et al. 2023, Alg. 3)."""
    return Pair(add_noise(x, sigma, noise), sigma, add_noise(x, sigma_next, noise), sigma_next)

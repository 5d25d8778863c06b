"""Pairs of points on one path: made with the teacher (distillation), or without it (training)."""

from typing import NamedTuple

from dmd_tutorial.checks import Condition, PerSample, Samples
from dmd_tutorial.denoisers import Denoiser
from dmd_tutorial.noise import add_noise
from dmd_tutorial.survey.consistency.paths import solve


class Pair(NamedTuple):
    """Two points of one path, or nearly: x at sigma, and one below it."""

    x: Samples
    sigma: PerSample
    x_next: Samples
    sigma_next: PerSample


def distillation_pair(
    teacher: Denoiser, x: Samples, noise: Samples, sigma: PerSample, sigma_next: PerSample,
    label: Condition | None = None,
) -> Pair:  # fmt: skip
    """Noised data, and the teacher's Heun step from there (Song et al. 2023, Algorithm 2)."""
    x_noisy = add_noise(x, sigma, noise)
    return Pair(x_noisy, sigma, solve(teacher, x_noisy, sigma, sigma_next, label), sigma_next)


def training_pair(x: Samples, noise: Samples, sigma: PerSample, sigma_next: PerSample) -> Pair:
    """The pair of consistency training: the same data and noise (Song et al. 2023, Alg. 3)."""
    return Pair(add_noise(x, sigma, noise), sigma, add_noise(x, sigma_next, noise), sigma_next)

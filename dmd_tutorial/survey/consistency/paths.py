"""The paths of the probability-flow ODE, ``dx/dsigma = (x - D(x, sigma)) / sigma``."""

import torch
from jaxtyping import Float
from torch import Tensor

from dmd_tutorial.checks import Condition, expand
from dmd_tutorial.denoisers import Denoiser, noise_from_denoised
from dmd_tutorial.noise import RHO


@torch.no_grad()
def solve(
    denoiser: Denoiser, x: Float[Tensor, "batch *shape"], sigma: Float[Tensor, " batch"],
    sigma_next: Float[Tensor, " batch"], label: Condition | None = None, *, steps: int = 1,
) -> Float[Tensor, "batch *shape"]:  # fmt: skip
    """Follow the probability-flow ODE from a level to another, each sample between its own two.

    The steps, of Heun's method, are spaced as EDM's (Algorithm 1); sigma_next is above 0.
    """
    start, end = sigma ** (1 / RHO), sigma_next ** (1 / RHO)
    for step in range(steps):
        after = ((start + (step + 1) / steps * (end - start)) ** RHO).clamp(sigma_next, sigma)
        width = expand(after - sigma, x)
        slope = noise_from_denoised(x, denoiser(x, sigma, label), sigma)
        ahead = x + width * slope
        slope_ahead = noise_from_denoised(ahead, denoiser(ahead, after, label), after)
        x, sigma = x + width * (slope + slope_ahead) / 2, after
    return x


def guided_denoised(
    denoiser: Denoiser, x: Float[Tensor, "batch *shape"], sigma: Float[Tensor, " batch"],
    label: Condition, guidance: Float[Tensor, " batch"],
) -> Float[Tensor, "batch *shape"]:  # fmt: skip
    """The denoised estimate of the guidance-augmented ODE: ``(1 + w) D(x, c) - w D(x)``.

    `guidance` is w, 0 for none. Source: Luo et al. 2023 (LCM), Section 4.2; Ho and Salimans 2022.
    """
    w = expand(guidance, x)
    return (1 + w) * denoiser(x, sigma, label) - w * denoiser(x, sigma, None)

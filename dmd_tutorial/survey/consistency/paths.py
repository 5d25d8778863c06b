"""The paths of the probability-flow ODE, ``dx/dsigma = (x - D(x, sigma)) / sigma``."""

import torch

from dmd_tutorial.checks import Condition, PerSample, Samples, expand
from dmd_tutorial.denoisers import Denoiser, noise_from_denoised
from dmd_tutorial.noise import RHO


@torch.no_grad()
def solve(
    denoiser: Denoiser, x: Samples, sigma: PerSample,
    sigma_next: PerSample, label: Condition | None = None, *, steps: int = 1,
) -> Samples:  # fmt: skip
    """Follow the ODE between two levels above 0 a sample by Heun's method in EDM's steps."""
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
    denoiser: Denoiser, x: Samples, sigma: PerSample, label: Condition, guidance: PerSample
) -> Samples:
    """``(1 + w) D(x, label) - w D(x)``, w the guidance, 0 for none (Luo et al. 2023, LCM, 4.2)."""
    w = expand(guidance, x)
    return (1 + w) * denoiser(x, sigma, label) - w * denoiser(x, sigma, None)

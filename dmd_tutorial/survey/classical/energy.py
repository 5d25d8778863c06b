"""Energy-based model: a loss that compares data with samples, which Langevin chains make."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from dmd_tutorial.checks import Condition, check_same_shape
from dmd_tutorial.denoisers import Denoiser, denoised_from_score
from dmd_tutorial.samplers import langevin


def contrastive_loss(
    real: Float[Tensor, "batch 1"], fake: Float[Tensor, "batch 1"], strength: float = 0.0
) -> Float[Tensor, ""]:
    """Data's energies less detached samples': the slope is that of minus the log-likelihood.

    `strength` penalises large energies, for stability. The value says nothing. An energy is any
    ``E(x, label)`` of (batch, 1). Source: Hinton 2002; Du and Mordatch 2019, Eq. 2.
    """
    check_same_shape(real=real, fake=fake)
    return (real - fake).mean() + strength * (real**2 + fake**2).mean()


def energy_denoiser(energy: Callable[..., Tensor]) -> Denoiser:
    """``D = x - sigma^2 grad_x E``, whose score is ``-grad_x E`` at any level: for samplers."""

    def denoise(x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(energy(x, label).sum(), x)
        return denoised_from_score(x.detach(), -slope, sigma)

    return denoise


def walk(
    energy: Callable[..., Tensor], x: Float[Tensor, "batch dim"], steps: int, step_size: float,
    label: Condition | None = None, rng: Generator | None = None,
) -> Float[Tensor, "batch dim"]:  # fmt: skip
    """Run Langevin chains from x down an energy's slope, plus noise: an evaluation a step."""
    *_, last = langevin(energy_denoiser(energy), x, 1.0, steps, step_size, label, rng=rng)
    return last.x.to(x)

"""Energy-based model: a loss that compares data with samples, which Langevin chains make.

The energy is any function of points and classes; without its normalising constant it has a score.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from dmd_tutorial.checks import check_same_shape
from dmd_tutorial.denoisers import Denoiser, denoised_from_score
from dmd_tutorial.samplers import langevin


def contrastive_loss(
    real: Float[Tensor, "batch 1"], fake: Float[Tensor, "batch 1"], strength: float = 0.0
) -> Float[Tensor, ""]:
    """The difference of energies whose gradient is that of the mean log-density, negated.

    Args:
        real: Energies of data, (batch, 1).
        fake: Energies of samples of the model, (batch, 1); the samples are detached.
        strength: Weight of a penalty on large energies, which keeps a training stable.

    Returns:
        A scalar. Its value says nothing about the fit.

    Raises:
        ValueError: If shapes differ.

    Source: Hinton 2002; Du and Mordatch 2019, Eq. 2 and Section 3.3.
    """
    check_same_shape(real=real, fake=fake)
    return (real - fake).mean() + strength * (real**2 + fake**2).mean()


def energy_denoiser(energy: Callable[..., Tensor]) -> Denoiser:
    """What a sampler wants, made of an energy, so that its score is ``-grad_x E`` at any level.

    Args:
        energy: ``E(x, label)``, (batch, 1).

    Returns:
        ``D(x, sigma, label) = x - sigma^2 grad_x E``.
    """

    def denoise(x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(energy(x, label).sum(), x)
        return denoised_from_score(x.detach(), -slope, sigma)

    return denoise


def walk(
    energy: Callable[..., Tensor],
    x: Float[Tensor, "batch dim"],
    steps: int,
    step_size: float,
    label: Int[Tensor, " batch"] | None = None,
    rng: Generator | None = None,
) -> Float[Tensor, "batch dim"]:
    """Run Langevin chains on an energy: down its slope, plus noise.

    Args:
        energy: ``E(x, label)``, (batch, 1).
        x: Where the chains are, (batch, dim).
        steps: How many steps, each of which evaluates the energy once.
        step_size: See `samplers.langevin`.
        label: Class of each chain, or None.
        rng: Source of the noise.

    Returns:
        Where they are after the steps, (batch, dim).
    """
    chain = langevin(energy_denoiser(energy), x, 1.0, steps, step_size, label, rng=rng)
    *_, last = chain
    return last.x.to(x)

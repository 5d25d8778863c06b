"""Generative adversarial network: two losses, and a step that descends one after the other."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from dmd_tutorial import dmd


def discriminator_loss(
    real: Float[Tensor, " *batch"], fake: Float[Tensor, " *batch"]
) -> Float[Tensor, ""]:
    """Cross-entropy of telling data from samples.

    Args:
        real: The discriminator's logits of data, (batch,) or (batch, 1): log-odds of being real.
        fake: Its logits of samples, detached from the generator.

    Returns:
        ``-mean log D(real) - mean log(1 - D(fake))`` with D the sigmoid of the logits; 2 log 2
        for a discriminator that cannot tell them apart.

    Source: Goodfellow et al. 2014, Eq. 1; Yin et al. 2024 (DMD2), Eq. 4, on noised samples.
    """
    return functional.softplus(-real).mean() + functional.softplus(fake).mean()


def generator_loss(fake: Float[Tensor, " *batch"]) -> Float[Tensor, ""]:
    """The non-saturating loss of a generator, ``-mean log D(fake)``.

    Args:
        fake: The discriminator's logits of samples, (batch,) or (batch, 1), with gradient history.

    Returns:
        A scalar.

    Source: Goodfellow et al. 2014, Section 3, where the gradient of Eq. 1 vanishes; Yin et al. 2024
        (DMD2), Eq. 4.
    """
    return functional.softplus(-fake).mean()


def gan_step(
    generator: nn.Module,
    discriminator: nn.Module,
    generator_optimizer: torch.optim.Optimizer,
    discriminator_optimizer: torch.optim.Optimizer,
    x: Float[Tensor, "batch dim"],
    z: Float[Tensor, "batch latent"],
    label: Int[Tensor, " batch"] | None = None,
    clip: float = 10.0,
) -> tuple[float, float]:
    """Update the discriminator, then the generator, on the same samples.

    Args:
        generator: ``x = generator(z, label)``.
        discriminator: ``logit = discriminator(x, label)``.
        generator_optimizer: Holds the generator's parameters.
        discriminator_optimizer: Holds the discriminator's.
        x: Data, (batch, dim).
        z: Noise, (batch, latent).
        label: Class of each datum, asked of the samples too, or None.
        clip: Largest L2 norm of each network's gradient.

    Returns:
        Both losses, the discriminator's first.

    Source: Goodfellow et al. 2014, Algorithm 1.
    """
    fake = generator(z, label)
    told = discriminator_loss(discriminator(x, label), discriminator(fake.detach(), label))
    dmd.update(discriminator_optimizer, told, clip)
    fooled = generator_loss(discriminator(fake, label))
    dmd.update(generator_optimizer, fooled, clip)
    return told.item(), fooled.item()

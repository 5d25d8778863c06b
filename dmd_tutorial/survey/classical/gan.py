"""Generative adversarial network, on log-odds of being real (Goodfellow et al. 2014, Eq. 1, 3)."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from dmd_tutorial import dmd
from dmd_tutorial.checks import Condition


def discriminator_loss(real: Float[Tensor, " *batch"], fake: Float[Tensor, " *batch"]) -> Tensor:
    """Cross-entropy of telling data from samples, by logits; 2 log 2 where they look alike."""
    return functional.softplus(-real).mean() + functional.softplus(fake).mean()


def generator_loss(fake: Float[Tensor, " *batch"]) -> Float[Tensor, ""]:
    """The non-saturating loss ``-mean log D(fake)``: no vanishing gradient where D is sure."""
    return functional.softplus(-fake).mean()


def gan_step(
    generator: nn.Module, discriminator: nn.Module, generator_optimizer: Optimizer,
    discriminator_optimizer: Optimizer, x: Float[Tensor, "batch dim"],
    z: Float[Tensor, "batch latent"], label: Condition | None = None, clip: float = 10.0,
) -> tuple[float, float]:  # fmt: skip
    """Update the discriminator, then the generator, on the same samples; returns both losses."""
    fake = generator(z, label)
    told = discriminator_loss(discriminator(x, label), discriminator(fake.detach(), label))
    dmd.update(discriminator_optimizer, told, clip)
    fooled = generator_loss(discriminator(fake, label))
    dmd.update(generator_optimizer, fooled, clip)
    return told.item(), fooled.item()

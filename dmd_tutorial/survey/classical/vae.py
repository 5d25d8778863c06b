"""Variational autoencoder: an encoder, a decoder, and a bound of the log-density to maximise."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from dmd_tutorial.checks import Condition
from dmd_tutorial.survey.classical.perceptron import Perceptron


class Coded(NamedTuple):
    """What a VAE makes of points: the Gaussians q(z | x) and p(x | z) at one z of the former."""

    latent_mean: Float[Tensor, "batch latent"]
    latent_std: Float[Tensor, "batch latent"]
    mean: Float[Tensor, "batch dim"]
    std: Float[Tensor, "batch 1"]


class VAE(nn.Module):
    """A Gaussian over z for each x, a Gaussian over x for each z (Kingma and Welling 2014)."""

    def __init__(
        self, dim: int = 2, latent: int = 2, classes: int = 0, hidden: int = 128, layers: int = 3,
        copies: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.latent, self.copies = latent, copies
        self.encoder = Perceptron(dim, 2 * latent, hidden, layers, classes, copies)
        self.decoder = Perceptron(latent, dim, hidden, layers, classes, copies)
        self.log_std = nn.Parameter(torch.zeros(copies))

    def forward(
        self, x: Float[Tensor, "batch *shape"], noise: Float[Tensor, "batch latent"],
        label: Condition | None = None,
    ) -> Coded:  # fmt: skip
        """Encode points, or images, make a z for each of standard normal noise, and decode it."""
        mean, log_std = self.encoder(x, label).chunk(2, dim=1)
        std = log_std.exp()
        return Coded(mean, std, *self.decode(mean + std * noise, label))

    def decode(
        self, z: Float[Tensor, "batch latent"], label: Condition | None = None
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch 1"]]:
        """Mean and standard deviation of x for given z, the latter the same along all axes."""
        std = self.log_std.exp().repeat_interleave(len(z) // self.copies)
        return self.decoder(z, label), std[:, None]

    @torch.no_grad()
    def sample(
        self, z: Float[Tensor, "batch latent"], noise: Float[Tensor, "batch dim"],
        label: Condition | None = None,
    ) -> Float[Tensor, "batch dim"]:  # fmt: skip
        """Draw from the model: its mean for z, plus the decoder's own noise."""
        mean, std = self.decode(z, label)
        return mean + std * noise


def elbo(
    vae: VAE, x: Float[Tensor, "batch dim"], noise: Float[Tensor, "batch latent"],
    label: Condition | None = None,
) -> Float[Tensor, " batch"]:  # fmt: skip
    """``log p(x | z) - KL(q(z | x) || p(z))``, a bound in nats (Kingma and Welling 2014, Eq. 3)."""
    coded = vae(x, noise, label)
    reconstruction = Normal(coded.mean, coded.std).log_prob(x).sum(1)
    prior = Normal(torch.zeros_like(coded.latent_mean), torch.ones_like(coded.latent_std))
    return reconstruction - kl_divergence(Normal(*coded[:2]), prior).sum(1)

"""Generators from before diffusion, on flat points: VAE, normalising flow, GAN, energy model."""

import itertools
from collections import deque
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional
from torch.optim import Optimizer

from dmd_tutorial import dmd
from dmd_tutorial.checks import Condition, PerSample, Samples, check_same_shape
from dmd_tutorial.denoisers import Denoiser, denoised_from_score
from dmd_tutorial.networks.mlp import Linears, one_hot
from dmd_tutorial.samplers import langevin

Points = Float[Tensor, "batch dim"]
Latents = Float[Tensor, "batch latent"]


class Perceptron(nn.Module):
    """The network of all four, on points or flattened images, and classes; `copies` as in `MLP`."""

    def __init__(
        self, inputs: int, outputs: int, hidden: int = 128, layers: int = 3, classes: int = 0,
        copies: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.classes, self.copies = classes, copies
        widths = [inputs + classes, *[hidden] * layers, outputs]
        self.layers = nn.ModuleList(
            Linears(copies, before, after) for before, after in itertools.pairwise(widths)
        )
        for parameter in self.layers[-1].parameters():
            parameter.data *= 0.1  # answers start small

    def forward(self, x: Samples, label: Condition | None = None) -> Float[Tensor, "batch outputs"]:
        x = torch.cat([x.flatten(1), one_hot(x, label, self.classes)], dim=1)
        h = x.reshape(self.copies, -1, x.shape[1])
        for layer in self.layers[:-1]:
            h = functional.silu(layer(h))
        return self.layers[-1](h).reshape(len(x), -1)


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
        self, x: Samples, noise: Latents, label: Condition | None = None
    ) -> tuple[Tensor, ...]:
        """Means and standard deviations of q(z | x), and of p(x | z) at the z that noise makes."""
        mean, log_std = self.encoder(x, label).chunk(2, dim=1)
        std = log_std.exp()
        return mean, std, *self.decode(mean + std * noise, label)

    def decode(self, z: Latents, label: Condition | None = None) -> tuple[Points, Tensor]:
        """Mean and standard deviation of x for given z, the latter the same along all axes."""
        std = self.log_std.exp().repeat_interleave(len(z) // self.copies)
        return self.decoder(z, label), std[:, None]

    @torch.no_grad()
    def sample(self, z: Latents, noise: Points, label: Condition | None = None) -> Points:
        mean, std = self.decode(z, label)
        return mean + std * noise


def elbo(vae: VAE, x: Points, noise: Latents, label: Condition | None = None) -> PerSample:
    """``log p(x | z) - KL(q(z | x) || p(z))``, a bound in nats (Kingma and Welling 2014, Eq. 3)."""
    mean, std, *decoded = vae(x, noise, label)
    prior = Normal(torch.zeros_like(mean), torch.ones_like(std))
    return Normal(*decoded).log_prob(x).sum(1) - kl_divergence(Normal(mean, std), prior).sum(1)


class RealNVP(nn.Module):
    """A chain of affine couplings: invertible, with a Jacobian determinant that is a product.

    Each scales (by at most exp(`bound`)) and shifts some coordinates by amounts that a `Perceptron`
    reads off the others. Source: Dinh et al. 2017.
    """

    keeps: Tensor

    def __init__(
        self, dim: int = 2, classes: int = 0, hidden: int = 64, layers: int = 2,
        couplings: int = 8, bound: float = 2.0, copies: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        if dim < 2:
            raise ValueError(f"a coupling needs at least 2 dimensions, not {dim}")
        self.bound, bits = bound, (dim - 1).bit_length()
        # a coupling keeps the coordinates in whose index some bit is set; the next, the others
        index = torch.arange(dim)
        keeps = [((index >> (k // 2 % bits)) + k) % 2 for k in range(couplings)]
        self.register_buffer("keeps", torch.stack(keeps).float())
        self.couplings = nn.ModuleList(
            Perceptron(dim, 2 * dim, hidden, layers, classes, copies) for _ in range(couplings)
        )

    def forward(self, x: Samples, label: Condition | None = None) -> tuple[Points, PerSample]:
        """From data, points or images, to noise z and ``log |det dz/dx|``."""
        x, log_det = x.flatten(1), x.new_zeros(len(x))
        for keep, coupling in zip(self.keeps, self.couplings, strict=True):
            log_scale, shift = self._amounts(coupling, keep, x, label)
            x = x * log_scale.exp() + shift
            log_det = log_det + log_scale.sum(1)
        return x, log_det

    def sample(self, z: Points, label: Condition | None = None) -> Points:
        """From noise to data: the couplings undone, the last one first."""
        for keep, coupling in zip(self.keeps.flip(0), reversed(self.couplings), strict=True):
            log_scale, shift = self._amounts(coupling, keep, z, label)
            z = (z - shift) * (-log_scale).exp()
        return z

    def _amounts(
        self, coupling: nn.Module, keep: Tensor, x: Tensor, label: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Logarithm of the scale, and shift: 0 where a coordinate is kept."""
        keep = keep.to(x)
        log_scale, shift = coupling(keep * x, label).chunk(2, dim=1)
        change = 1 - keep
        return change * self.bound * torch.tanh(log_scale / self.bound), change * shift


def flow_log_prob(flow: RealNVP, x: Points, label: Condition | None = None) -> PerSample:
    """Exact log-density in nats: that of z, plus ``log |det dz/dx|`` (Dinh et al. 2017, Eq. 2)."""
    z, log_det = flow(x, label)
    return Normal(torch.zeros_like(z), torch.ones_like(z)).log_prob(z).sum(1) + log_det


def discriminator_loss(real: Float[Tensor, " *batch"], fake: Float[Tensor, " *batch"]) -> Tensor:
    """Cross-entropy of telling data from samples, by logits (Goodfellow 2014); 2 log 2 if alike."""
    return functional.softplus(-real).mean() + functional.softplus(fake).mean()


def generator_loss(fake: Float[Tensor, " *batch"]) -> Float[Tensor, ""]:
    """The non-saturating loss ``-mean log D(fake)``: no vanishing gradient where D is sure."""
    return functional.softplus(-fake).mean()


def gan_step(
    generator: nn.Module, discriminator: nn.Module, generator_optimizer: Optimizer,
    discriminator_optimizer: Optimizer, x: Points, z: Latents,
    label: Condition | None = None, clip: float = 10.0,
) -> tuple[float, float]:  # fmt: skip
    """Update the discriminator, then the generator, on the same samples; returns both losses."""
    fake = generator(z, label)
    told = discriminator_loss(discriminator(x, label), discriminator(fake.detach(), label))
    dmd.update(discriminator_optimizer, told, clip)
    fooled = generator_loss(discriminator(fake, label))
    dmd.update(generator_optimizer, fooled, clip)
    return told.item(), fooled.item()


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
    energy: Callable[..., Tensor], x: Points, steps: int, step_size: float,
    label: Condition | None = None, rng: Generator | None = None,
) -> Points:  # fmt: skip
    """Run Langevin chains from x down an energy's slope, plus noise: an evaluation a step."""
    chain = langevin(energy_denoiser(energy), x, 1.0, steps, step_size, label, rng=rng)
    return deque(chain, maxlen=1).pop().x.to(x)

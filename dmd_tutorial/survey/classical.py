"""Generators from before diffusion: VAE, normalising flow, GAN, energy-based model.

All four are multilayer perceptrons on flat points: images are flattened before and folded again
after. Each is a loss, a pure function, and what it needs of a network.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional

from dmd_tutorial import dmd
from dmd_tutorial.checks import check_label, check_same_shape
from dmd_tutorial.denoisers import Denoiser
from dmd_tutorial.networks.mlp import Linears
from dmd_tutorial.noise import noise_like
from dmd_tutorial.samplers import langevin, one_step
from dmd_tutorial.settings import TeacherSettings
from dmd_tutorial.survey.task import Budget, Method, Sampler, Task, fit_within
from dmd_tutorial.training import EMA


class Perceptron(nn.Module):
    """Linear layers with SiLU between them; the class is told as a one-hot row.

    Args:
        inputs: Width of the input.
        outputs: Width of the output.
        hidden: Width of the hidden layers.
        layers: Number of hidden layers; 0 makes an affine map.
        classes: Number of classes, 0 for none.
        copies: Number of independent networks side by side, see `networks.MLP`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        hidden: int = 128,
        layers: int = 3,
        classes: int = 0,
        copies: int = 1,
    ) -> None:
        super().__init__()
        self.classes, self.copies = classes, copies
        widths = [inputs + classes, *[hidden] * layers, outputs]
        self.layers = nn.ModuleList(
            Linears(copies, before, after) for before, after in itertools.pairwise(widths)
        )
        for parameter in self.layers[-1].parameters():
            parameter.data *= 0.1  # answers start small

    def forward(
        self, x: Float[Tensor, "batch *shape"], label: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch outputs"]:
        """Map points.

        Args:
            x: Points, or images that are then flattened, (batch, *shape); batch is a multiple of
                `copies`.
            label: Class of each; without it the class input is zero.

        Returns:
            Answers, (batch, outputs).

        Raises:
            ValueError: If labels do not fit.
        """
        check_label(x, label, self.classes)
        x = x.flatten(1)
        if self.classes:
            one_hot = x.new_zeros(len(x), self.classes)
            if label is not None:
                one_hot[torch.arange(len(x)), label] = 1
            x = torch.cat([x, one_hot], dim=1)
        h = x.reshape(self.copies, -1, x.shape[1])
        for layer in self.layers[:-1]:
            h = functional.silu(layer(h))
        return self.layers[-1](h).reshape(len(x), -1)


# Variational autoencoder


class Coded(NamedTuple):
    """What a VAE makes of points: the Gaussians q(z | x) and p(x | z) at one z of the former."""

    latent_mean: Float[Tensor, "batch latent"]
    latent_std: Float[Tensor, "batch latent"]
    mean: Float[Tensor, "batch dim"]
    std: Float[Tensor, "batch 1"]


class VAE(nn.Module):
    """An encoder to a Gaussian over z, a decoder to a Gaussian over x of one learned width.

    Args:
        dim: Dimensions of a point.
        latent: Dimensions of z.
        classes: Number of classes, 0 for none.
        hidden: Width of the hidden layers.
        layers: Number of hidden layers in each half; 0 makes both affine.
        copies: Number of independent networks side by side.

    Source: Kingma and Welling 2014.
    """

    def __init__(
        self,
        dim: int = 2,
        latent: int = 2,
        classes: int = 0,
        hidden: int = 128,
        layers: int = 3,
        copies: int = 1,
    ) -> None:
        super().__init__()
        self.latent, self.copies = latent, copies
        self.encoder = Perceptron(dim, 2 * latent, hidden, layers, classes, copies)
        self.decoder = Perceptron(latent, dim, hidden, layers, classes, copies)
        self.log_std = nn.Parameter(torch.zeros(copies))

    def forward(
        self,
        x: Float[Tensor, "batch *shape"],
        noise: Float[Tensor, "batch latent"],
        label: Int[Tensor, " batch"] | None = None,
    ) -> Coded:
        """Encode points, draw a z for each, and decode it.

        Args:
            x: Points, (batch, dim), or images.
            noise: Standard normal noise from which z is made, (batch, latent).
            label: Class of each point, or None.

        Returns:
            Both Gaussians.
        """
        mean, log_std = self.encoder(x, label).chunk(2, dim=1)
        std = log_std.exp()
        return Coded(mean, std, *self.decode(mean + std * noise, label))

    def decode(
        self, z: Float[Tensor, "batch latent"], label: Int[Tensor, " batch"] | None = None
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch 1"]]:
        """Mean and standard deviation of x for given z, the latter the same along all axes."""
        std = self.log_std.exp().repeat_interleave(len(z) // self.copies)
        return self.decoder(z, label), std[:, None]

    @torch.no_grad()
    def sample(
        self,
        z: Float[Tensor, "batch latent"],
        noise: Float[Tensor, "batch dim"],
        label: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch dim"]:
        """Draw from the model: its mean for z, plus the decoder's own noise."""
        mean, std = self.decode(z, label)
        return mean + std * noise


def elbo(
    vae: VAE,
    x: Float[Tensor, "batch dim"],
    noise: Float[Tensor, "batch latent"],
    label: Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, " batch"]:
    """A lower bound of each point's log-density, estimated with one z.

    Args:
        vae: The model.
        x: Points, (batch, dim).
        noise: Standard normal noise, (batch, latent).
        label: Class of each point, or None.

    Returns:
        ``log p(x | z) - KL(q(z | x) || p(z))``, (batch,), in nats.

    Source: Kingma and Welling 2014, Eq. 3 and 10.
    """
    coded = vae(x, noise, label)
    reconstruction = Normal(coded.mean, coded.std).log_prob(x).sum(1)
    prior = Normal(torch.zeros_like(coded.latent_mean), torch.ones_like(coded.latent_std))
    return reconstruction - kl_divergence(Normal(*coded[:2]), prior).sum(1)


# Normalising flow


class RealNVP(nn.Module):
    """A chain of affine couplings: invertible, with a Jacobian determinant that is a product.

    A coupling keeps some coordinates, and scales and shifts the others by amounts that a network
    reads off those that were kept. Which are kept changes from one coupling to the next.

    Args:
        dim: Dimensions of a point, at least 2.
        classes: Number of classes, 0 for none.
        hidden: Width of the hidden layers in each coupling.
        layers: Number of hidden layers in each coupling.
        couplings: How many.
        bound: Largest logarithm of a coupling's scale.
        copies: Number of independent flows side by side.

    Raises:
        ValueError: If dim is below 2: nothing would be kept.

    Source: Dinh et al. 2017.
    """

    keeps: Tensor

    def __init__(
        self,
        dim: int = 2,
        classes: int = 0,
        hidden: int = 64,
        layers: int = 2,
        couplings: int = 8,
        bound: float = 2.0,
        copies: int = 1,
    ) -> None:
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

    def forward(
        self, x: Float[Tensor, "batch *shape"], label: Int[Tensor, " batch"] | None = None
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, " batch"]]:
        """From data to noise.

        Args:
            x: Points, (batch, dim), or images.
            label: Class of each, or None.

        Returns:
            z, (batch, dim), and ``log |det dz/dx|``, (batch,).
        """
        x, log_det = x.flatten(1), x.new_zeros(len(x))
        for keep, coupling in zip(self.keeps, self.couplings, strict=True):
            log_scale, shift = self._amounts(coupling, keep, x, label)
            x = x * log_scale.exp() + shift
            log_det = log_det + log_scale.sum(1)
        return x, log_det

    def sample(
        self, z: Float[Tensor, "batch dim"], label: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch dim"]:
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


def flow_log_prob(
    flow: RealNVP, x: Float[Tensor, "batch dim"], label: Int[Tensor, " batch"] | None = None
) -> Float[Tensor, " batch"]:
    """Exact log-density of a flow: that of z, plus the logarithm of how much z is stretched.

    Args:
        flow: The flow.
        x: Points, (batch, dim).
        label: Class of each, or None.

    Returns:
        Log-densities, (batch,), in nats. A flow is trained by maximising their mean.

    Source: Dinh et al. 2017, Eq. 2 and 3.
    """
    z, log_det = flow(x, label)
    return Normal(torch.zeros_like(z), torch.ones_like(z)).log_prob(z).sum(1) + log_det


# Generative adversarial network


def discriminator_loss(
    real: Float[Tensor, "batch 1"], fake: Float[Tensor, "batch 1"]
) -> Float[Tensor, ""]:
    """Cross-entropy of telling data from samples.

    Args:
        real: The discriminator's logits of data, (batch, 1): log-odds of being real.
        fake: Its logits of samples, detached from the generator.

    Returns:
        ``-mean log D(real) - mean log(1 - D(fake))`` with D the sigmoid of the logits.

    Source: Goodfellow et al. 2014, Eq. 1.
    """
    return functional.softplus(-real).mean() + functional.softplus(fake).mean()


def generator_loss(fake: Float[Tensor, "batch 1"]) -> Float[Tensor, ""]:
    """The non-saturating loss of a generator, ``-mean log D(fake)``.

    Args:
        fake: The discriminator's logits of samples, (batch, 1), with gradient history.

    Returns:
        A scalar.

    Source: Goodfellow et al. 2014, Section 3, where the gradient of Eq. 1 vanishes.
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


# Energy-based model


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
        return x.detach() - sigma[:, None] ** 2 * slope

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
    chain = langevin(energy_denoiser(energy), x, 1.0, steps, step_size, label, generator=rng)
    *_, last = chain
    return last.x.to(x)


# Recipes of the survey


def _flat(task: Task, batch: int, jitter: float = 0.0) -> Callable[[Generator], tuple]:
    """Draws flat data and its classes; images with noise between their few grey levels."""

    def draw(rng: Generator) -> tuple[Tensor, Tensor | None]:
        x, label = task.draw(batch, rng)
        if len(task.shape) > 1:
            x = x + jitter * noise_like(x, rng)
        return x.flatten(1), label

    return draw


def _dim(task: Task) -> int:
    return math.prod(task.shape)


def _hidden(task: Task) -> int:
    return 128 if _dim(task) < 10 else 384


def _folded(make: Callable[[Tensor, Tensor | None], Tensor]) -> Sampler:
    """A sampler of images, or points, from one of flat points."""

    @torch.no_grad()
    def sample(z: Tensor, label: Tensor | None) -> Tensor:
        return make(z.flatten(1), label).reshape(z.shape)

    return sample


def _train_vae(task: Task, budget: Budget, seed: int) -> dict[int, Sampler]:
    dim, flat = _dim(task), _flat(task, batch=256)
    latent = min(dim, 16)

    def make() -> nn.Module:
        vae = VAE(dim, latent, task.classes, _hidden(task))
        return budget.watch(vae, torch.zeros(2, *task.shape), torch.zeros(2, latent))

    def draw(rng: Generator) -> tuple:
        x, label = flat(rng)
        return x, torch.randn(len(x), latent, generator=rng), label

    def loss(vae: nn.Module, *drawn: Tensor) -> Tensor:
        return -elbo(vae, *drawn).mean()  # type: ignore[arg-type]

    settings = TeacherSettings(steps=30_000, clip=10.0, seed=seed)
    vae = fit_within(budget, make, draw, loss, settings)

    def sample(z: Tensor, label: Tensor | None) -> Tensor:
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed))
        return vae.sample(z[:, :latent], noise, label)  # type: ignore[operator]

    return {1: _folded(sample)}


def _train_flow(task: Task, budget: Budget, seed: int) -> dict[int, Sampler]:
    dim = _dim(task)

    def make() -> nn.Module:
        flow = RealNVP(dim, task.classes, _hidden(task) // 2)
        return budget.watch(flow, torch.zeros(2, *task.shape))

    def loss(flow: nn.Module, *drawn: Tensor) -> Tensor:
        return -flow_log_prob(flow, *drawn).mean()  # type: ignore[arg-type]

    settings = TeacherSettings(steps=30_000, learning_rate=1e-3, seed=seed)
    flow = fit_within(budget, make, _flat(task, 256, jitter=0.05), loss, settings)
    return {1: _folded(flow.sample)}  # type: ignore[arg-type]


def _perceptrons(task: Task, budget: Budget, seed: int, *outputs: int) -> list[Perceptron]:
    """Networks on a task's samples with so many outputs each, watched by the budget."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        networks = [
            Perceptron(_dim(task), width, _hidden(task), classes=task.classes) for width in outputs
        ]
    for network in networks:
        budget.watch(network, torch.zeros(2, *task.shape))
    return networks


def _average_within(budget: Budget, steps: Callable[[], Iterator[EMA]]) -> nn.Module:
    """The average of the weights after as many steps as the budget allows."""
    *_, average = itertools.islice(steps(), budget.affordable(lambda: next(steps())))
    return average.module


def _train_gan(task: Task, budget: Budget, seed: int) -> dict[int, Sampler]:
    draw = _flat(task, 256)

    def steps() -> Iterator[EMA]:
        rng = torch.Generator().manual_seed(seed)
        generator, discriminator = networks = _perceptrons(task, budget, seed, _dim(task), 1)
        average = EMA(generator, 0.999)
        optimizer, other = (
            torch.optim.Adam(each.parameters(), 1e-3, (0.5, 0.9)) for each in networks
        )
        for step in itertools.count():
            x, label = draw(rng)
            gan_step(generator, discriminator, optimizer, other, x, noise_like(x, rng), label)
            average.update(generator, step)
            yield average

    return {1: _folded(partial(one_step, _average_within(budget, steps)))}


def _train_energy(task: Task, budget: Budget, seed: int) -> dict[int, Sampler]:
    count, batch, evaluations = 2_000, 128, 200
    images = len(task.shape) > 1
    spread, step_size, jitter, length = (0.7, 0.002, 0.1, 20) if images else (1.5, 0.01, 0.0, 10)
    draw = _flat(task, batch, jitter)

    def steps() -> Iterator[EMA]:
        rng = torch.Generator().manual_seed(seed)
        (energy,) = _perceptrons(task, budget, seed, 1)
        average = EMA(energy, 0.999)
        optimizer = torch.optim.Adam(energy.parameters(), 1e-3, (0.0, 0.9))
        # chains go on from step to step (Tieleman 2008); each belongs to one class
        chains = spread * torch.randn(count, _dim(task), generator=rng)
        classes = torch.arange(count) % task.classes if task.classes else None
        for step in itertools.count():
            index = torch.randint(count, (batch,), generator=rng)
            # one in twenty starts afresh (Du and Mordatch 2019, Section 3.2)
            fresh = torch.rand(batch, 1, generator=rng) < 0.05
            fake = torch.where(fresh, spread * noise_like(chains[index], rng), chains[index])
            asked = None if classes is None else classes[index]
            chains[index] = fake = walk(energy, fake, length, step_size, asked, rng)
            x, label = draw(rng)
            loss = contrastive_loss(energy(x, label), energy(fake, asked), strength=1e-3)
            dmd.update(optimizer, loss, clip=1.0)
            average.update(energy, step)
            yield average

    energy = _average_within(budget, steps)

    def sample(z: Tensor, label: Tensor | None) -> Tensor:
        rng = torch.Generator().manual_seed(seed)
        x = walk(energy, spread * z, evaluations - 1, step_size, label, rng)
        # the energy knows data with noise of the jitter's level: Tweedie's formula removes it
        return energy_denoiser(energy)(x, torch.full((len(x),), jitter), label)

    return {evaluations: _folded(sample)}


METHODS: tuple[Method, ...] = (
    Method("VAE", 8, _train_vae, needs_data=True, extra_networks=1),
    Method("Normalising flow (RealNVP)", 8, _train_flow, needs_data=True),
    Method("GAN", 8, _train_gan, needs_data=True, extra_networks=1),
    Method("Energy-based model", 8, _train_energy, needs_data=True),
)

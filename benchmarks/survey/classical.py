"""How the survey's table trains each of the four within its budget.

Images are flattened before and folded again after. Flow and energy, which model a density, see
them with noise between their few grey levels.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Generator, Tensor, nn
from torch.optim.swa_utils import AveragedModel

from benchmarks.survey.task import Budget, Method, Sampler, Task, fit_within
from dmd_tutorial import dmd
from dmd_tutorial.noise import noise_like
from dmd_tutorial.samplers import one_step
from dmd_tutorial.survey.classical import (
    VAE,
    Perceptron,
    RealNVP,
    contrastive_loss,
    elbo,
    energy_denoiser,
    flow_log_prob,
    gan_step,
    walk,
)
from dmd_tutorial.training import FitSettings, averaged


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

    settings = FitSettings(steps=30_000, clip=10.0, seed=seed)
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

    settings = FitSettings(steps=30_000, learning_rate=1e-3, seed=seed)
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


def _average_within(budget: Budget, steps: Callable[[], Iterator[AveragedModel]]) -> nn.Module:
    """The average of the weights after as many steps as the budget allows."""
    *_, average = itertools.islice(steps(), budget.affordable(lambda: next(steps())))
    return average.module


def _train_gan(task: Task, budget: Budget, seed: int) -> dict[int, Sampler]:
    draw = _flat(task, 256)

    def steps() -> Iterator[AveragedModel]:
        rng = torch.Generator().manual_seed(seed)
        generator, discriminator = networks = _perceptrons(task, budget, seed, _dim(task), 1)
        average = averaged(generator, 0.999)
        optimizer, other = (
            torch.optim.Adam(each.parameters(), 1e-3, (0.5, 0.9)) for each in networks
        )
        for _ in itertools.count():
            x, label = draw(rng)
            gan_step(generator, discriminator, optimizer, other, x, noise_like(x, rng), label)
            average.update_parameters(generator)
            yield average

    return {1: _folded(partial(one_step, _average_within(budget, steps)))}


def _train_energy(task: Task, budget: Budget, seed: int) -> dict[int, Sampler]:
    count, batch, evaluations = 2_000, 128, 200
    images = len(task.shape) > 1
    spread, step_size, jitter, length = (0.7, 0.002, 0.1, 20) if images else (1.5, 0.01, 0.0, 10)
    draw = _flat(task, batch, jitter)

    def steps() -> Iterator[AveragedModel]:
        rng = torch.Generator().manual_seed(seed)
        (energy,) = _perceptrons(task, budget, seed, 1)
        average = averaged(energy, 0.999)
        optimizer = torch.optim.Adam(energy.parameters(), 1e-3, (0.0, 0.9))
        # chains go on from step to step (Tieleman 2008); each belongs to one class
        chains = spread * torch.randn(count, _dim(task), generator=rng)
        classes = torch.arange(count) % task.classes if task.classes else None
        for _ in itertools.count():
            index = torch.randint(count, (batch,), generator=rng)
            # one in twenty starts afresh (Du and Mordatch 2019, Section 3.2)
            fresh = torch.rand(batch, 1, generator=rng) < 0.05
            fake = torch.where(fresh, spread * noise_like(chains[index], rng), chains[index])
            asked = None if classes is None else classes[index]
            chains[index] = fake = walk(energy, fake, length, step_size, asked, rng)
            x, label = draw(rng)
            loss = contrastive_loss(energy(x, label), energy(fake, asked), strength=1e-3)
            dmd.update(optimizer, loss, clip=1.0)
            average.update_parameters(energy)
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

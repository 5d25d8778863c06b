"""Adversarial diffusion distillation: a teacher says where to go, a critic what looks real.

Equations are those of Sauer et al. 2023, "Adversarial Diffusion Distillation" (ADD), with
alpha = 1. The student takes one step here; theirs is trained at four noise levels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn
from torch.nn import functional

from benchmarks.survey.task import Budget, Method, Sampler, Task
from dmd_tutorial import dmd
from dmd_tutorial.checks import expand
from dmd_tutorial.denoisers import Denoiser, EDMDenoiser, OneStepGenerator
from dmd_tutorial.networks.mlp import MLP, Linears
from dmd_tutorial.networks.unet import Block, UNet
from dmd_tutorial.noise import add_noise, dmd_sigma, karras_grid, noise_like
from dmd_tutorial.samplers import one_step
from dmd_tutorial.training import EMA, rate_factor, set_rate

# The teacher's term


def signal_weight(sigma: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """The weight ``c(t) = alpha_t``: the signal's share, ``1 / sqrt(1 + sigma^2)``.

    Args:
        sigma: Noise levels, (batch,), in the units of x.

    Returns:
        Weights from 1, without noise, to 0.

    Source: Sauer et al. 2023 (ADD), Section 3.3, "exponential weighting".
    """
    return (1 + sigma**2).rsqrt()


def teacher_loss(
    teacher: Denoiser,
    x: Float[Tensor, "batch *shape"],
    sigma: Float[Tensor, " batch"],
    noise: Float[Tensor, "batch *shape"],
    label: Int[Tensor, " batch"] | None = None,
    weight: Callable[[Tensor], Tensor] = signal_weight,
) -> Float[Tensor, ""]:
    """The student's output against the teacher's denoising of it: ``c |x - sg[D(x_noisy)]|^2``.

    One evaluation of the teacher, at noise added to the student's output. No gradient passes
    through the teacher.

    Args:
        teacher: The denoiser, frozen.
        x: The student's output, (batch, *shape), with gradient history.
        sigma: Noise levels, (batch,).
        noise: Standard normal noise, (batch, *shape), not the student's own.
        label: Class of each, (batch,), or None.
        weight: c, (batch,) to (batch,).

    Returns:
        The mean over samples and values, a scalar.

    Source: Sauer et al. 2023 (ADD), Eq. 4.
    """
    with torch.no_grad():
        denoised = teacher(add_noise(x, sigma, noise), sigma, label)
    return (expand(weight(sigma), x) * (x - denoised) ** 2).mean()


# The adversarial term


def hinge_discriminator_loss(real: Float[Tensor, "..."], fake: Float[Tensor, "..."]) -> Tensor:
    """What the discriminator descends: logits above 1 for data and below -1 for samples.

    Args:
        real: Its logits for data, (batch, heads).
        fake: For the student's samples, (batch, heads).

    Returns:
        ``mean max(0, 1 - real) + mean max(0, 1 + fake)``, a scalar.

    Source: Sauer et al. 2023 (ADD), Eq. 3, a mean over heads; Lim and Ye 2017.
    """
    return functional.relu(1 - real).mean() + functional.relu(1 + fake).mean()


def hinge_generator_loss(fake: Float[Tensor, "..."]) -> Tensor:
    """What the student descends: minus the mean logit of its samples (ADD, Eq. 2)."""
    return -fake.mean()


def r1_penalty(
    discriminator: Callable[..., Tensor], features: Sequence[Float[Tensor, "batch width"]]
) -> Float[Tensor, ""]:
    """The mean squared slope of the logits by the features of data.

    Args:
        discriminator: From features to logits, (batch, heads).
        features: Those of data, (batch, width) each.

    Returns:
        A scalar, with gradient history.

    Source: Mescheder et al. 2018; Sauer et al. 2023 (ADD), Section 3.2, on features.
    """
    features = [each.detach().requires_grad_() for each in features]
    logits = discriminator(*features)
    slopes = torch.autograd.grad(logits.sum(), features, create_graph=True)
    return sum((slope**2).sum(dim=1).mean() for slope in slopes)  # type: ignore[return-value]


class FrozenFeatures(nn.Module):
    """What the hidden layers of a frozen denoiser make of samples.

    Args:
        denoiser: An `EDMDenoiser` around an MLP or the book's U-Net; it must not be in training.
        sigma: The noise level at which it is asked, in the units of x.

    Raises:
        ValueError: If the network is neither.
    """

    def __init__(self, denoiser: EDMDenoiser, sigma: float = 0.1) -> None:
        super().__init__()
        self.denoiser, self.sigma = denoiser, sigma
        network = denoiser.network
        if isinstance(network, MLP):
            layers: list[nn.Module] = list(network.hidden)
        elif isinstance(network, UNet):
            layers = [block for block in network.down.modules() if isinstance(block, Block)]
            layers.append(network.attention)
        else:
            raise ValueError(f"a {type(network).__name__} has no features that are known here")
        self.layers = layers

    def forward(
        self, x: Float[Tensor, "batch *shape"], label: Int[Tensor, " batch"] | None = None
    ) -> tuple[Float[Tensor, "batch width"], ...]:
        """Features of samples, differentiable by the samples.

        Args:
            x: Samples, (batch, *shape).
            label: Class of each, (batch,), or None.

        Returns:
            A tensor (batch, width) for each layer.
        """
        kept: list[Tensor] = []

        def keep(module: nn.Module, arguments: tuple, answer: Tensor) -> None:
            kept.append(functional.silu(answer).reshape(len(x), -1))

        hooks = [layer.register_forward_hook(keep) for layer in self.layers]
        try:
            self.denoiser(x, torch.full_like(x.flatten(1)[:, 0], self.sigma), label)
        finally:
            for hook in hooks:
                hook.remove()
        return tuple(kept)


class Discriminator(nn.Module):
    """A small head on each layer's features: one hidden layer, one logit.

    Args:
        widths: How many features each layer has.
        hidden: Width of the hidden layer.
        copies: Number of independent discriminators, each for its block of the batch.
    """

    def __init__(self, widths: Sequence[int], hidden: int = 64, copies: int = 1) -> None:
        super().__init__()
        self.copies = copies
        self.first = nn.ModuleList(Linears(copies, width, hidden) for width in widths)
        self.last = nn.ModuleList(Linears(copies, hidden, 1, zero=True) for _ in widths)

    def forward(self, *features: Float[Tensor, "batch width"]) -> Float[Tensor, "batch heads"]:
        """Logits, positive for what looks like data.

        Args:
            *features: What `FrozenFeatures` gave.

        Returns:
            Logits, (batch, heads).
        """
        logits = []
        for each, first, last in zip(features, self.first, self.last, strict=True):
            h = functional.silu(first(each.reshape(self.copies, -1, each.shape[1])))
            logits.append(last(h).reshape(-1, 1))
        return torch.cat(logits, dim=1)


# One iteration


@dataclass(frozen=True)
class Objective:
    """What an iteration optimises: L = adversarial * L_adv + distillation * L_distill."""

    adversarial: float = 1.0  # 0: no discriminator
    distillation: float = 2.5  # lambda; 0: no teacher
    r1: float = 1e-5  # weight of the penalty on the discriminator's slope
    clip: float = 10.0  # largest L2 norm of each network's gradient
    grid: Tensor = field(default_factory=karras_grid, repr=False)  # levels of the teacher's term


class Batch(NamedTuple):
    """What an iteration consumes: noise and data, (batch, *shape), of the same classes."""

    z: Tensor
    x_real: Tensor
    label: Tensor | None = None


def generator_loss(
    x: Float[Tensor, "batch *shape"],
    teacher: Denoiser,
    judge: Callable[[Tensor, Tensor | None], Tensor],
    label: Int[Tensor, " batch"] | None,
    objective: Objective,
    rng: Generator | None = None,
) -> Float[Tensor, ""]:
    """The student's loss: fool the discriminator, and stay where the teacher denoises to.

    Args:
        x: The student's output, (batch, *shape), with gradient history.
        teacher: The denoiser, frozen.
        judge: From samples and classes to logits.
        label: Class of each, (batch,), or None.
        objective: What counts.
        rng: Source of noise and levels; torch's own without one.

    Returns:
        A scalar.

    Source: Sauer et al. 2023 (ADD), Eq. 1.
    """
    loss = x.new_zeros(())
    if objective.distillation:
        sigma, noise = dmd_sigma(len(x), objective.grid, rng).to(x), noise_like(x, rng)
        loss = loss + objective.distillation * teacher_loss(teacher, x, sigma, noise, label)
    if objective.adversarial:
        loss = loss + objective.adversarial * hinge_generator_loss(judge(x, label))
    return loss


def iteration(
    student: nn.Module,
    teacher: Denoiser,
    features: FrozenFeatures,
    discriminator: Discriminator,
    optimizer: torch.optim.Optimizer,
    discriminator_optimizer: torch.optim.Optimizer,
    batch: Batch,
    objective: Objective,
    rng: Generator | None = None,
) -> float:
    """Update the student, then the discriminator on the same samples.

    Args:
        student: ``x = student(z, label)``.
        teacher: The denoiser, frozen.
        features: What the discriminator sees, frozen.
        discriminator: In training.
        optimizer: Holds the student's parameters.
        discriminator_optimizer: Holds the discriminator's.
        batch: Noise and data.
        objective: What to optimise.
        rng: Source of noise and levels; torch's own without one.

    Returns:
        The discriminator's loss before its update: 2 where it knows nothing, 0 where it tells all
        apart. NaN without a discriminator.

    Source: Sauer et al. 2023 (ADD), Figure 2 and Section 3.
    """

    def judge(x: Tensor, label: Tensor | None) -> Tensor:
        return discriminator(*features(x, label))

    x = student(batch.z, batch.label)
    loss = generator_loss(x, teacher, judge, batch.label, objective, rng)
    dmd.update(optimizer, loss, objective.clip)
    if not objective.adversarial:
        return math.nan
    with torch.no_grad():
        real, fake = (features(some, batch.label) for some in (batch.x_real, x))
    hinge = hinge_discriminator_loss(discriminator(*real), discriminator(*fake))
    loss = hinge
    if objective.r1:
        loss = loss + objective.r1 * r1_penalty(discriminator, real)
    dmd.update(discriminator_optimizer, loss, objective.clip)
    return hinge.item()


# The recipe of the survey


def _train(task: Task, budget: Budget, seed: int) -> dict[int, Sampler]:
    """Train a one-step student with both terms; the features are those of the teacher."""
    rng = torch.Generator().manual_seed(seed)
    points = len(task.shape) == 1  # by trial, for each task
    batch, hidden, beta = (256, 64, 0.0) if points else (64, 128, 0.5)
    rates = (5e-4, 1e-3) if points else (1e-4, 8e-3)

    def networks() -> tuple[OneStepGenerator, Discriminator, list[torch.optim.Optimizer]]:
        student = task.student()
        some, label = task.noise(2, torch.Generator().manual_seed(0))
        seen = frozen(some, label)
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            heads = Discriminator([each.shape[1] for each in seen], hidden)
        budget.watch(student)
        budget.watch(heads, *seen, samples=some)
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Adam(network.parameters(), rate, betas=(beta, 0.99), fused=True)
            for network, rate in zip((student, heads), rates, strict=True)
        ]
        return OneStepGenerator(student, task.sigma_max), heads, optimizers

    def step(student: nn.Module, heads: Discriminator, optimizers: list, rng: Generator) -> None:
        x, label = task.draw(batch, rng)
        drawn = Batch(noise_like(x, rng), x, label)
        ours, theirs = optimizers
        iteration(student, task.teacher, frozen, heads, ours, theirs, drawn, objective, rng)

    objective, frozen = Objective(), FrozenFeatures(task.teacher, sigma=0.2)  # type: ignore[arg-type]
    trial = networks()
    steps = budget.affordable(lambda: step(*trial, torch.Generator().manual_seed(0)))
    student, heads, optimizers = networks()
    average = EMA(student, 0.99)
    for index in range(steps):
        for optimizer, rate in zip(optimizers, rates, strict=True):
            set_rate(optimizer, rate * rate_factor(index, steps, 50, 0.5))
        step(student, heads, optimizers, rng)
        average.update(student, index)
    return {1: lambda z, label: one_step(average.module, z, label)}


METHODS: tuple[Method, ...] = (
    Method("Adversarial diffusion distillation", 10, _train, needs_data=True, extra_networks=1),
)

"""Adversarial diffusion distillation (ADD, Sauer et al. 2023): a teacher and a discriminator.

The generator takes one step here; theirs is trained at four noise levels. alpha = 1.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn import functional

from dmd_tutorial import dmd
from dmd_tutorial.checks import Condition, PerSample, Samples, expand
from dmd_tutorial.denoisers import Denoiser, feature_layers
from dmd_tutorial.dmd import Batch
from dmd_tutorial.networks.mlp import Linears
from dmd_tutorial.noise import add_noise, dmd_sigma, karras_grid, noise_like

Features = Float[Tensor, "batch width"]  # of one layer


def signal_weight(sigma: PerSample) -> PerSample:
    """The signal's share, ``c(t) = alpha_t = 1 / sqrt(1 + sigma^2)`` (ADD, Section 3.3)."""
    return (1 + sigma**2).rsqrt()


def teacher_loss(
    teacher: Denoiser, x: Samples, sigma: PerSample, noise: Samples, label: Condition | None = None,
    weight: Callable[[Tensor], Tensor] = signal_weight,
) -> Float[Tensor, ""]:  # fmt: skip
    """``c |x - sg[D(x_noisy)]|^2``, with noise of its own, not the generator's (ADD, Eq. 4)."""
    with torch.no_grad():
        denoised = teacher(add_noise(x, sigma, noise), sigma, label)
    return (expand(weight(sigma), x) * (x - denoised) ** 2).mean()


def hinge_discriminator_loss(real: Float[Tensor, "..."], fake: Float[Tensor, "..."]) -> Tensor:
    """``mean max(0, 1 - real) + mean max(0, 1 + fake)`` (ADD, Eq. 3; Lim and Ye 2017)."""
    return functional.relu(1 - real).mean() + functional.relu(1 + fake).mean()


def hinge_generator_loss(fake: Float[Tensor, "..."]) -> Tensor:
    """What the generator descends: minus the mean logit of its samples (ADD, Eq. 2)."""
    return -fake.mean()


def r1_penalty(discriminator: Callable[..., Tensor], features: Sequence[Features]) -> Tensor:
    """Mean squared slope of the logits by features of data (Mescheder et al. 2018; ADD, 3.2)."""
    features = [each.detach().requires_grad_() for each in features]
    logits = discriminator(*features)
    slopes = torch.autograd.grad(logits.sum(), features, create_graph=True)
    return sum((slope**2).sum(dim=1).mean() for slope in slopes)  # type: ignore[return-value]


class FrozenFeatures(nn.Module):
    """What a frozen denoiser's `feature_layers` make of samples, at a level."""

    def __init__(self, denoiser: nn.Module, sigma: float = 0.1) -> None:
        super().__init__()
        self.denoiser, self.sigma = denoiser, sigma
        self.layers = [layer for layer, _ in feature_layers(denoiser)]

    def forward(self, x: Samples, label: Condition | None = None) -> tuple[Features, ...]:
        kept: list[Tensor] = []

        def keep(module: nn.Module, arguments: tuple, answer: Tensor) -> None:
            kept.append(functional.silu(answer).reshape(len(x), -1))

        with ExitStack() as hooks:
            for layer in self.layers:
                hooks.enter_context(layer.register_forward_hook(keep))
            self.denoiser(x, torch.full_like(x.flatten(1)[:, 0], self.sigma), label)
        return tuple(kept)


class Discriminator(nn.Module):
    """A small head on each layer's features, positive for data; `copies` of it are independent."""

    def __init__(self, widths: Sequence[int], hidden: int = 64, copies: int = 1) -> None:
        super().__init__()
        self.copies = copies
        self.first = nn.ModuleList(Linears(copies, width, hidden) for width in widths)
        self.last = nn.ModuleList(Linears(copies, hidden, 1, zero=True) for _ in widths)

    def forward(self, *features: Features) -> Float[Tensor, "batch heads"]:
        logits = []
        for each, first, last in zip(features, self.first, self.last, strict=True):
            h = functional.silu(first(each.reshape(self.copies, -1, each.shape[1])))
            logits.append(last(h).reshape(-1, 1))
        return torch.cat(logits, dim=1)


@dataclass(frozen=True)
class Objective:
    """What an iteration optimises: L = adversarial * L_adv + distillation * L_distill."""

    adversarial: float = 1.0  # 0: no discriminator
    distillation: float = 2.5  # lambda; 0: no teacher
    r1: float = 1e-5  # weight of the penalty on the discriminator's slope
    clip: float = 10.0  # largest L2 norm of each network's gradient
    grid: Tensor = field(default_factory=karras_grid, repr=False)  # levels of the teacher's term


def generator_loss(
    x: Samples, teacher: Denoiser, judge: Callable[[Tensor, Condition | None], Tensor],
    label: Condition | None, objective: Objective, rng: Generator | None = None,
) -> Float[Tensor, ""]:  # fmt: skip
    """Fool the judge (logits of samples and label), stay by the teacher (ADD, Eq. 1)."""
    loss = x.new_zeros(())
    if objective.distillation:
        sigma, noise = dmd_sigma(len(x), objective.grid, rng).to(x), noise_like(x, rng)
        loss = loss + objective.distillation * teacher_loss(teacher, x, sigma, noise, label)
    if objective.adversarial:
        loss = loss + objective.adversarial * hinge_generator_loss(judge(x, label))
    return loss


def iteration(
    generator: nn.Module, teacher: Denoiser, features: FrozenFeatures, discriminator: Discriminator,
    generator_optimizer: torch.optim.Optimizer, discriminator_optimizer: torch.optim.Optimizer,
    batch: Batch, objective: Objective, rng: Generator | None = None,
) -> float:  # fmt: skip
    """Update the generator, then the discriminator on the same samples (ADD, Section 3).

    The batch's y_ref are data of the same classes. Returns the discriminator's loss before its
    update: 2 where it knows nothing, 0 where it tells all apart, NaN without one.
    """

    def judge(x: Tensor, label: Condition | None) -> Tensor:
        return discriminator(*features(x, label))

    x = generator(batch.z, batch.label)
    loss = generator_loss(x, teacher, judge, batch.label, objective, rng)
    dmd.update(generator_optimizer, loss, objective.clip)
    if not objective.adversarial:
        return math.nan
    with torch.no_grad():
        real, fake = (features(some, batch.label) for some in (batch.y_ref, x))
    hinge = hinge_discriminator_loss(discriminator(*real), discriminator(*fake))
    penalty = objective.r1 * r1_penalty(discriminator, real) if objective.r1 else 0.0
    dmd.update(discriminator_optimizer, hinge + penalty, objective.clip)
    return hinge.item()

"""Matching and guidance apart: what a guided teacher adds to a student's gradient, and what it is.

With a guided teacher the difference of Eq. 7 is a sum:

    D_fake - D_guided = (D_fake - D_label) - (scale - 1) (D_label - D_null)

The first term is distribution matching without guidance. The second, the guidance, knows nothing of
the student's density. Each may have its own weight and its own noise levels.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from dmd_tutorial import dmd
from dmd_tutorial.adapters import Guided
from dmd_tutorial.checks import NO_CLASS, Condition, PerSample, Samples, asked_once
from dmd_tutorial.denoisers import Denoiser, score_from_denoised
from dmd_tutorial.dmd import Batch, Objective, Record
from dmd_tutorial.noise import karras_grid


@dataclass(frozen=True)
class Apart(Objective):
    """DMD's objective with guidance as a term of its own; `grid` is matching's and the critic's."""

    matching_weight: float = 1.0  # 0: guidance alone, which runs away
    guidance_weight: float = 0.0  # a guided teacher's scale - 1
    guidance_grid: Tensor = field(default_factory=karras_grid, repr=False)
    null: int | Tensor = NO_CLASS  # what stands for no label: see `Guided`


def without_label(denoiser: Denoiser, null: int | Tensor = NO_CLASS) -> Denoiser:
    """A denoiser that is told nothing: `null`, whatever the label."""

    def denoise(x: Samples, sigma: PerSample, label: Condition | None = None) -> Samples:
        told = torch.as_tensor(null).to(label)
        return denoiser(x, sigma, told.expand(len(x), *told.shape))

    return denoise


def generator_loss(
    generator: nn.Module, critic: Denoiser, teacher: Denoiser, batch: Batch, objective: Apart
) -> tuple[Float[Tensor, ""], Record]:
    """The loss of a batch that has two levels and noises a sample: matching's, then guidance's.

    Guidance is matching, too, if the teacher without label stands in for the critic. In Eq. 8 the
    teacher answers with the label, at each term's own level.
    """
    x, alone = generator(batch.z, batch.label), replace(objective, lambda_reg=0.0)
    same: Any = lambda z, label: x  # noqa: E731  # one pass of the generator for both terms
    levels = zip(batch.sigma.unbind(1), batch.noise.unbind(1), strict=True)
    first, second = (batch._replace(sigma=sigma, noise=noise) for sigma, noise in levels)
    loss, record = dmd.generator_loss(same, critic, teacher, first, alone)
    unlabelled = without_label(teacher, objective.null)
    guidance, _ = dmd.generator_loss(same, unlabelled, teacher, second, alone)
    loss = objective.matching_weight * loss + objective.guidance_weight * guidance
    if objective.lambda_reg:
        regression = replace(objective, matching=False)
        anchor, other = dmd.generator_loss(generator, critic, teacher, batch, regression)
        loss, record = loss + anchor, record._replace(loss_anchor=other.loss_anchor)
    return loss, record


@asked_once
def iteration(
    generator: nn.Module, critic: Denoiser, teacher: Denoiser,
    generator_optimizer: Optimizer, critic_optimizer: Optimizer | None,
    batch: Batch, objective: Apart, rng: Generator | None = None,
    updater: dmd.Updater = dmd.update_whole,
) -> Record:  # fmt: skip
    """`dmd.iteration`, matching and guidance apart; neither teacher nor critic has any guidance.

    Source: after Liu et al. 2025 ("Decoupled DMD").
    """
    if isinstance(teacher, Guided):
        raise ValueError("the teacher is guided already: give the denoiser inside")
    batch = dmd.judged(batch, objective.grid, rng)
    other = dmd.judged(batch._replace(sigma=None, noise=None), objective.guidance_grid, rng)
    twice = batch._replace(
        sigma=torch.stack([batch.sigma, other.sigma], 1),
        noise=torch.stack([batch.noise, other.noise], 1),
    )
    loss = partial(generator_loss, generator, critic, teacher, objective=objective)
    record, norm = updater(generator_optimizer, loss, twice, objective.clip)
    record, networks = record._replace(norm_generator=norm), (generator, critic, critic_optimizer)
    return dmd.train_critic(*networks, batch, objective, record, rng, updater)


def heat_sides(
    denoiser: Denoiser, x: Samples, sigma: PerSample, label: Condition | None = None
) -> tuple[Samples, Samples]:
    """``ds/dsigma`` and ``sigma grad(div s + |s|^2)`` of a denoiser's score s at points.

    They are equal for the score of every noised density, since noise diffuses: ``dp/dsigma = sigma
    div grad p``. A field in which they differ belongs to no data. Exact, by autograd, a backward
    pass a dimension; the points must not look at each other.
    """
    x, sigma = x.detach().requires_grad_(), sigma.detach().requires_grad_()
    score = score_from_denoised(x, denoiser(x, sigma, label), sigma)

    def slope(value: Tensor, by: Tensor) -> Tensor:
        return torch.autograd.grad(value.sum(), by, create_graph=True)[0]

    parts = score.unbind(1)
    diagonal = [slope(part, x)[:, i] for i, part in enumerate(parts)]
    heat = sigma[:, None] * slope(sum(diagonal) + score.square().sum(1), x)
    return torch.stack([slope(part, sigma) for part in parts], 1).detach(), heat.detach()

"""The members of the family of score distillation, and in what they differ.

Every member moves a generated sample x against `dmd.matching_gradient`. Members differ in its
weight, in who the critic is, and in the law of noise levels. DMD2 adds a GAN loss; SiD's gradient
also runs through the denoisers. alpha = 1. A law is a grid, ``(sigma_max, sigma_data) -> levels``,
of quantiles, since `dmd` draws its indices uniformly, from 2 % to 98 % for generators.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from dmd_tutorial import dmd
from dmd_tutorial.denoisers import SIGMA_DATA
from dmd_tutorial.dmd import Objective, Weighting
from dmd_tutorial.noise import BINS, karras_grid, linear_schedule
from dmd_tutorial.survey.score_distillation.iterations import (
    Step,
    adversarial_step,
    point_step,
    sid_step,
)


def noise_prediction(
    x: Float[Tensor, "batch *shape"], sigma: Float[Tensor, " batch"],
    denoised_real: Float[Tensor, "batch *shape"],
) -> Float[Tensor, " batch"]:  # fmt: skip
    """``sigma^3 / (1 + sigma^2)``, the weight of SDS and VSD.

    They weight a difference of predicted *noises* with a variance-preserving schedule's variance.
    Source: Poole et al. 2022 (SDS), Eq. 3 with w(t) = sigma_t^2; Wang et al. 2023 (VSD), Eq. 9.
    """
    return sigma**3 / (1 + sigma**2)


def schedule_levels(sigma_max: float, sigma_data: float = SIGMA_DATA) -> Float[Tensor, " bins"]:
    """A variance-preserving schedule's ``sigma / alpha``, even in time (SDS, Section 3; VSD)."""
    alpha, sigma = linear_schedule(torch.linspace(1e-4, 1, 20 * BINS, dtype=torch.float64))
    levels = sigma / alpha
    levels = levels[levels <= sigma_max]
    return levels[torch.linspace(0, len(levels) - 1, BINS).long()]


def teacher_levels(sigma_max: float, sigma_data: float = SIGMA_DATA) -> Float[Tensor, " bins"]:
    """EDM's log-normal law, of median 0.3 for data of width 0.5 (Diff-Instruct, public code)."""
    mean, std = -1.2 + math.log(sigma_data / SIGMA_DATA), 1.2
    below = torch.special.ndtr(torch.tensor((math.log(sigma_max) - mean) / std))
    probability = below.double() * (torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS
    return torch.exp(mean + std * torch.special.ndtri(probability))


def dmd_levels(sigma_max: float, sigma_data: float = SIGMA_DATA) -> Float[Tensor, " bins"]:
    """EDM's sampling grid: DMD, DMD2, and SiD, who stops at 80 % of it."""
    return karras_grid(sigma_max=sigma_max)


WEIGHTS: dict = {  # how a table names them
    noise_prediction: r"$\sigma^3 / (1 + \sigma^2)$",
    Weighting.NONE: r"$\sigma^2$",
    Weighting.EQ8: r"$\sigma^2 / \mathrm{mean} \lvert x - D_{real} \rvert$",
}
LAWS: dict = {
    schedule_levels: "times of a variance-preserving schedule",
    teacher_levels: "log-normal, the teacher's own",
    dmd_levels: "Karras grid",
}


@dataclass(frozen=True)
class Member:
    """A member of the family: its weight, critic and noise law."""

    name: str
    weighting: Weighting | dmd.WeightFunction
    law: Callable[[float, float], Tensor]  # (sigma_max, sigma_data) -> levels, drawn uniformly
    critic_steps: int = 1  # critic updates per generator update
    step: Step = dmd.iteration
    lambda_reg: float = 0.0  # weight of the anchor; 0: no pairs
    data: bool = False  # whether real data is needed
    evaluations: int = 1  # steps of its generator

    def objective(self, sigma_max: float, sigma_data: float = SIGMA_DATA) -> Objective:
        """What an iteration of it optimises, on levels up to sigma_max, for data of a width."""
        return Objective(
            weighting=self.weighting, lambda_reg=self.lambda_reg, critic_steps=self.critic_steps,
            grid=self.law(sigma_max, sigma_data),
        )  # fmt: skip

    def row(self) -> tuple[str, ...]:
        """Name, weight, critic, noise law, data?, pairs?, for a table in Markdown."""
        critic = f"trained, {self.critic_steps} per update" if self.critic_steps else "$x$ itself"
        if self.data:
            critic += ", with a GAN head"
        needs = ("yes" if need else "no" for need in (self.data, self.lambda_reg))
        return self.name, WEIGHTS[self.weighting], critic, LAWS[self.law], *needs


# VSD, Diff-Instruct, DMD, and DMD2 without its head, are `dmd.iteration` as it is (Wang et al.
# 2023, Luo et al. 2023, Yin et al. 2024, Algorithm 1 of each).
GAN_STEP = partial(adversarial_step, fooling=0.03, discrimination=0.1)
FAMILY = (
    Member("SDS", noise_prediction, schedule_levels, 0, point_step),
    Member("VSD", noise_prediction, schedule_levels),
    Member("Diff-Instruct", Weighting.NONE, teacher_levels),
    Member("DMD", Weighting.EQ8, dmd_levels, lambda_reg=1.0),
    Member("DMD without anchor", Weighting.EQ8, dmd_levels),
    Member("DMD2 without GAN", Weighting.EQ8, dmd_levels, 3),
    Member("DMD2", Weighting.EQ8, dmd_levels, 3, GAN_STEP, data=True),
    Member("DMD2, 2 steps", Weighting.EQ8, dmd_levels, 3, GAN_STEP, data=True, evaluations=2),
    Member("DMD2, 4 steps", Weighting.EQ8, dmd_levels, 3, GAN_STEP, data=True, evaluations=4),
    Member("SiD", Weighting.EQ8, dmd_levels, step=partial(sid_step, alpha=1.0)),
)

"""The members of the family of score distillation, and in what they differ.

Every member moves a generated sample x against ``w_t / sigma^2 * (D_critic - D_real)``, which is
`dmd.matching_gradient`. Members differ in the weight, in who the critic is, and in the law by
which noise levels are drawn. DMD2 adds a GAN loss; SiD's gradient also runs through the denoisers.
alpha = 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from dmd_tutorial import dmd
from dmd_tutorial.denoisers import SIGMA_DATA
from dmd_tutorial.dmd import Objective, Weighting
from dmd_tutorial.survey.score_distillation.iterations import (
    Step,
    adversarial_step,
    point_step,
    sid_step,
)
from dmd_tutorial.survey.score_distillation.levels import (
    dmd_levels,
    noise_prediction,
    schedule_levels,
    teacher_levels,
)

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
            weighting=self.weighting,
            lambda_reg=self.lambda_reg,
            critic_steps=self.critic_steps,
            grid=self.law(sigma_max, sigma_data),
        )

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

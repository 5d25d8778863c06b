"""Score distillation, one family: a teacher's answer, somebody else's answer, their difference.

`family` says what its members are: each has a weight and a noise law (`levels`), a critic
(`critics`) and an iteration (`iterations`) for `training.distill`. SiD's loss is in `identity`,
generators of several steps are in `few_steps`.
"""

from dmd_tutorial.survey.score_distillation.critics import Judge, known_noise
from dmd_tutorial.survey.score_distillation.family import FAMILY, Member
from dmd_tutorial.survey.score_distillation.few_steps import FewStepGenerator, few_step_levels
from dmd_tutorial.survey.score_distillation.identity import sid_loss
from dmd_tutorial.survey.score_distillation.iterations import (
    adversarial_step,
    point_step,
    sid_step,
    with_data,
)
from dmd_tutorial.survey.score_distillation.levels import (
    dmd_levels,
    noise_prediction,
    schedule_levels,
    teacher_levels,
)

__all__ = [
    "FAMILY", "FewStepGenerator", "Judge", "Member", "adversarial_step", "dmd_levels",
    "few_step_levels", "known_noise", "noise_prediction", "point_step", "schedule_levels",
    "sid_loss", "sid_step", "teacher_levels", "with_data",
]  # fmt: skip

"""Score distillation, one family: a teacher's answer, somebody else's answer, their difference.

`family` says what its members are: each has a weight, a noise law, a critic (`critics`) and an
iteration (`iterations`) for `training.distill`. `few_steps` has generators of several steps.
"""

from .critics import Judge, known_noise
from .family import FAMILY, Member, dmd_levels, noise_prediction, schedule_levels, teacher_levels
from .few_steps import FewStepGenerator, few_step_levels
from .iterations import adversarial_step, point_step, sid_loss, sid_step, with_data

__all__ = [
    "FAMILY", "FewStepGenerator", "Judge", "Member", "adversarial_step", "dmd_levels",
    "few_step_levels", "known_noise", "noise_prediction", "point_step", "schedule_levels",
    "sid_loss", "sid_step", "teacher_levels", "with_data",
]  # fmt: skip

"""Consistency models: a network that sends every point of a path straight to the path's end.

`paths` are the teacher's, `pairs` two points of one, `levels` theirs; `model` learns with `loss` to
send both to one end. `trajectory` goes to any lower level instead.
"""

from .levels import doubling_bins, lognormal_probability, neighbour_levels
from .loss import consistency_loss, pseudo_huber, squared
from .model import ConsistencyModel, consistency_preconditioning, multistep
from .pairs import Pair, distillation_pair, training_pair
from .paths import guided_denoised, solve
from .trajectory import TrajectoryModel, trajectory_loss, trajectory_sampler

__all__ = [
    "ConsistencyModel", "Pair", "TrajectoryModel", "consistency_loss",
    "consistency_preconditioning", "distillation_pair", "doubling_bins", "guided_denoised",
    "lognormal_probability", "multistep", "neighbour_levels", "pseudo_huber", "solve", "squared",
    "training_pair", "trajectory_loss", "trajectory_sampler",
]  # fmt: skip

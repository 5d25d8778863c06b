"""What a training run is asked to do: settings as tables, and the learning rate over a run."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class TeacherSettings:
    """How a teacher is trained. Digits defaults.

    Attributes:
        steps: Optimiser steps. More of them lower the loss on the data but raise it on digits
            held out: the teacher begins to memorise (benchmarks/teacher_overfitting.py).
        batch: Images per step.
        learning_rate: Peak of the learning rate (Adam).
        warm_up: Steps over which the learning rate rises from 0.
        ema: Decay of the exponential moving average of the weights, per step.
        clip: Largest L2 norm of the gradient.
        log_mean: Mean of ln(sigma).
        log_std: Standard deviation of ln(sigma).
        no_label: Fraction of images shown without their label.
        flip: Whether half of the images are shown mirrored, left to right.
        seed: Seed of everything drawn.
    """

    steps: int = 2_000
    batch: int = 128
    learning_rate: float = 2e-3
    warm_up: int = 200
    ema: float = 0.999
    clip: float = 1.0
    log_mean: float = -1.2
    log_std: float = 1.2
    no_label: float = 0.0
    flip: bool = False
    seed: int = 0


@dataclass(frozen=True)
class DistillSettings:
    """How a student is distilled. Digits defaults, with the reason where they leave the paper.

    Attributes:
        steps: Iterations.
        batch: Samples per iteration for the matching loss.
        batch_pairs: Pairs per iteration for the anchor.
        learning_rate: The generator's (AdamW).
        critic_learning_rate: The critic's; faster, so that it follows the generator.
        warm_up: Steps over which both rates rise from 0.
        decay: Fraction of the run, at its end, over which both rates fall to 0.
        weight_decay: AdamW's.
        ema: Decay of the average of the generator's weights, per step.
        weighting: w_t of Eq. 7.
        matching: Whether the distribution-matching loss counts.
        lambda_reg: Weight of the anchor.
        distance: The anchor's distance: l2, or lpips (the paper's, on images of 32 pixels and up).
        critic_steps: Critic updates per generator update.
        clip: Largest L2 norm of each network's gradient.
        sigma_max: Highest level of the grid on which scores are compared, in the units of x.
        seed: Seed of everything drawn.
    """

    steps: int = 3_000
    batch: int = 64
    batch_pairs: int = 64
    learning_rate: float = 5e-5
    critic_learning_rate: float = 4e-4
    warm_up: int = 100
    decay: float = 0.5
    weight_decay: float = 0.01
    ema: float = 0.99
    weighting: str = "eq8"
    matching: bool = True
    lambda_reg: float = 1.0
    distance: str = "l2"
    critic_steps: int = 2
    clip: float = 10.0
    sigma_max: float = 5.0
    seed: int = 0


def rate_factor(step: int, steps: int, warm_up: int, decay: float) -> float:
    """The learning rate of a step, as a fraction of its peak: up, level, down to 0.

    Args:
        step: The step about to be done, from 0.
        steps: How many there will be.
        warm_up: Steps of linear rise.
        decay: Fraction of the run, at its end, in which the rate falls along half a cosine.

    Returns:
        A factor in (0, 1].
    """
    rise = min(1.0, (step + 1) / max(1, warm_up))
    start = steps * (1 - decay)
    if step <= start:
        return rise
    return rise * 0.5 * (1 + math.cos(math.pi * (step - start) / (steps - start)))

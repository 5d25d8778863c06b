"""Presets: everything a run needs, as a table that can be read."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from dmd_tutorial import data
from dmd_tutorial.denoisers import EDMDenoiser
from dmd_tutorial.networks import UNet
from dmd_tutorial.training import DistillSettings, TeacherSettings


@dataclass(frozen=True)
class Preset:
    """A data set with a teacher, pairs and a distillation that suit it.

    Attributes:
        images: Loads the data.
        shape: Shape of one image, (channels, height, width).
        classes: Number of classes, 0 for none.
        network: Arguments of `UNet`.
        teacher: How the teacher is trained.
        pairs: How many pairs (z, y) the anchor has.
        pair_steps: Heun steps behind each pair; N cost 2N - 1 evaluations.
        warm_start: Regression on the pairs alone, before the distillation proper.
        distill: The distillation.
    """

    images: Callable[[], data.Images]
    shape: tuple[int, ...]
    classes: int
    network: dict = field(default_factory=dict)
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    pairs: int = 10_000
    pair_steps: int = 18
    warm_start: DistillSettings | None = None
    distill: DistillSettings = field(default_factory=DistillSettings)

    def new_teacher(self) -> EDMDenoiser:
        """An untrained teacher; its weights depend on the teacher's seed alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.teacher.seed)
            return EDMDenoiser(UNet(**self.network)).to(memory_format=torch.channels_last)


# Where digits leave the paper: the networks are small and the images few, so rates are higher
# and runs shorter; the student first regresses on the pairs, which brings it near the teacher in
# minutes; scores are compared up to sigma 5 only, above which 8 x 8 digits are all noise; the
# critic is faster than the generator, by its rate and by its number of steps. These are the
# settings of the shipped networks: about an hour on two cores, most of it regression.
DIGITS = Preset(
    images=data.digits,
    shape=(1, 8, 8),
    classes=10,
    network={"size": 8, "channels": 1, "classes": 10},
    pairs=50_000,
    warm_start=DistillSettings(
        steps=16_000,
        learning_rate=1e-3,
        warm_up=200,
        decay=0.95,
        ema=0.999,
        matching=False,
        batch_pairs=128,
    ),
    distill=DistillSettings(
        steps=2_500,
        learning_rate=2e-5,
        critic_learning_rate=3e-4,
        warm_up=200,
        decay=0.6,
        ema=0.999,
    ),
)

# The same road in a few minutes, for `dmd demo`: every stage is cut short.
DEMO = Preset(
    images=data.digits,
    shape=(1, 8, 8),
    classes=10,
    network={"size": 8, "channels": 1, "classes": 10},
    teacher=TeacherSettings(steps=1_500),
    pairs=3_000,
    warm_start=DistillSettings(
        steps=1_000, learning_rate=1e-3, decay=0.9, ema=0.995, matching=False
    ),
    distill=DistillSettings(steps=300),
)

PRESETS = {"digits": DIGITS, "demo": DEMO}

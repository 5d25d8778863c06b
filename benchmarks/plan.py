"""The plan of the measurements at full size: stages, settings, and what they cost, counted."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from benchmarks.cards import CARDS, flop, forward_flop, minutes
from dmd_tutorial.features import Classifier
from dmd_tutorial.runs.presets import CIFAR10_SMALL, Preset
from dmd_tutorial.survey.score_distillation import Dmd2Settings, dmd2
from dmd_tutorial.training import DistillSettings

VARIANTS: dict[str, dict] = {  # name -> what is changed
    "full": {},
    # at the regression's own rate: a tenth of it, the others', is one for two networks (not tried)
    "without distribution matching": {
        "matching": False, "learning_rate": CIFAR10_SMALL.warm_start.learning_rate,  # type: ignore[union-attr]
    },
    "without anchor": {"lambda_reg": 0.0},
    "weighting sigma": {"weighting": "sigma"},
    "weighting sigma^3": {"weighting": "sigma3"},
    "five critic steps": {"critic_steps": 5},
    "DMD2": {},  # another method, on real images
}  # fmt: skip
WITHOUT_PAIRS = "without anchor", "DMD2"  # but for the regression that they start from
WHAT = {
    "classifier": "A classifier of the images, in whose features distances are measured.",
    "teacher": "The teacher, trained from scratch.",
    "pairs": "Noise, and what the teacher makes of it in 18 Heun steps.",
    "evaluation of the teacher": "Samples of the teacher with 35 evaluations each, measured.",
    "regression": "A student that learns the pairs alone; the others of its seed start from it.",
    "full": "Distribution matching and the anchor: the paper's objective.",
    "without distribution matching": "The regression goes on, at its own rate.",
    "without anchor": "Distribution matching alone, from the same start.",
    "weighting sigma": "The weight of a noise level is sigma, not Eq. 8.",
    "weighting sigma^3": "The weight of a noise level is sigma^3, not Eq. 8.",
    "five critic steps": "Five updates of the critic for each of the generator.",
    "DMD2": "DMD2: five critic steps, an adversarial loss on real images, no anchor.",
}


class Stage(NamedTuple):
    """A piece of the plan."""

    name: str
    seed: int
    lease: int

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}, lease {self.lease}"

    @property
    def row(self) -> str:
        """The name of what it measures."""
        return "teacher" if self.name == "evaluation of the teacher" else self.name

    @property
    def student(self) -> bool:
        return self.name == "regression" or self.name in VARIANTS

    @property
    def learns_from_pairs(self) -> bool:
        return self.student and self.name not in WITHOUT_PAIRS

    @property
    def file(self) -> str:
        return f"{self.row.lower().replace(' ', '-').replace('^', '')}-{self.seed}"


ABLATIONS = "full", "without distribution matching", "without anchor"
FIRST = ("classifier", "teacher", "pairs", "evaluation of the teacher", "regression", *ABLATIONS)
OTHERS = ("pairs", "weighting sigma", "weighting sigma^3", "five critic steps", "DMD2")
AGAIN = ("pairs", "regression", *ABLATIONS)
STAGES = tuple(
    Stage(name, seed, lease)
    for lease, seed, names in ((1, 0, FIRST), (2, 0, OTHERS), (2, 1, AGAIN))  # pairs do not travel
    for name in names
)


@dataclass(frozen=True)
class Plan:
    """Sizes of everything; the reduced ones are for a test."""

    preset: Preset = CIFAR10_SMALL
    classifier_steps: int = 4_000
    classifier_batch: int = 512
    classifier_width: int = 64
    samples: int = 50_000
    batch: int = 1_000


REDUCED = Plan(
    preset=replace(
        CIFAR10_SMALL,
        network_options={**CIFAR10_SMALL.network_options, "model_channels": 4,
                 "channel_mult": [1, 1, 1], "num_blocks": 1, "attn_resolutions": []},
        teacher=replace(CIFAR10_SMALL.teacher, steps=2, batch=8),
        pairs=2_000,
        pair_steps=1,
        warm_start=replace(CIFAR10_SMALL.warm_start, steps=2, batch=4, batch_pairs=4),
        distill=replace(CIFAR10_SMALL.distill, steps=5, batch=4, batch_pairs=4),
        compute=replace(CIFAR10_SMALL.compute, compile=False),
    ),
    classifier_steps=3, classifier_batch=40, classifier_width=4, samples=100, batch=50,
)  # fmt: skip


def evaluations(settings: DistillSettings) -> int:
    """Network evaluations of one iteration, over all samples: forward 1, with backward 3."""
    batch, steps = settings.batch, settings.critic_steps
    if not settings.matching:
        return 3 * settings.batch_pairs
    # fresh samples from the second critic step on
    total = batch * (5 + 3 * steps + max(0, steps - 1)) + 3 * settings.batch_pairs * (
        settings.lambda_reg > 0
    )
    if isinstance(settings, Dmd2Settings):
        # One more pass for the generator's adversarial loss, one for images in each critic step:
        # whole forward, but backward from half-way, which is a quarter of the operations.
        total += batch * (1 + steps) * 3 // 2
    return total


def at_equal_budget(settings: DistillSettings, full: DistillSettings) -> DistillSettings:
    """The same settings with as many iterations as the full objective's evaluations pay for."""
    steps = round(full.steps * evaluations(full) / evaluations(settings))
    return replace(settings, steps=max(1, steps))


def settings_of(stage: Stage, preset: Preset) -> DistillSettings:
    """How a student is trained."""
    if stage.name == "regression":
        return replace(preset.warm_start, seed=stage.seed)  # type: ignore[type-var]
    full = replace(preset.distill, seed=stage.seed)
    changed = dmd2(full) if stage.name == "DMD2" else replace(full, **VARIANTS[stage.name])
    return at_equal_budget(changed, full)


def count(stage: Stage, plan: Plan, denoiser: float, classifier: float) -> float:
    """Operations of a stage, from those of a forward pass of either network."""
    preset, images = plan.preset, 50_000
    of_teacher = (2 * preset.pair_steps - 1) * denoiser
    if stage.name == "classifier":  # then accuracy on a tenth, features of all
        return (3 * plan.classifier_steps * plan.classifier_batch + 1.1 * images) * classifier
    if stage.name == "teacher":
        return 3 * preset.teacher.steps * preset.teacher.batch * denoiser
    if stage.name == "pairs":
        return preset.pairs * of_teacher
    if stage.name == "evaluation of the teacher":
        return plan.samples * (of_teacher + classifier) + images * classifier
    settings = settings_of(stage, preset)
    measured = 2 * plan.samples * (denoiser + classifier) + images * classifier
    return settings.steps * evaluations(settings) * denoiser + measured


def counted(plan: Plan) -> dict:
    """What every stage costs on three cards: a record for the book."""
    teacher = plan.preset.new_teacher()
    parameters, forward = sum(p.numel() for p in teacher.parameters()), forward_flop(teacher)
    channels, size, _ = plan.preset.shape
    classifier = Classifier(size, channels, plan.preset.classes, plan.classifier_width, True).eval()
    one = flop(classifier, torch.zeros(1, *plan.preset.shape, device="meta"))
    stages = []
    for stage in STAGES:
        pflop = count(stage, plan, forward, one) / 1e15
        times = {name: round(minutes(pflop, card), 2) for name, card in CARDS.items()}
        stages.append({**stage._asdict(), "what": WHAT[stage.name], "pflop": round(pflop, 3),
                       "minutes": times})  # fmt: skip
    shares = ", ".join(f"{name} {card.hoped:.0%}" for name, card in CARDS.items())
    return {
        "what": f"counted; shares of the peak hoped for: {shares}; nobody has measured them",
        "cards": {name: card._asdict() for name, card in CARDS.items()},
        "forward_gflop": round(forward / 1e9, 2), "parameters": parameters,
        "samples": plan.samples, "stages": stages,
    }  # fmt: skip


def table(costs: dict, measured: dict) -> str:
    """The costs as a table with a sum for each lease; measured minutes beside."""
    head = "".join(f"{name:>8}" for name in CARDS)
    lines = [costs["what"], f"{'stage':<32}{'seed':>4}{'lease':>6}{'PFLOP':>9}{head}  (minutes)"]
    for lease in (1, 2):
        rows = [row for row in costs["stages"] if row["lease"] == lease]
        for row in rows:
            stage = Stage(row["name"], row["seed"], lease)
            known = measured.get(str(stage), {})
            beside = known and f"  {known['seconds'] / 60:.1f} measured, {known['device']}"
            times = "".join(f"{row['minutes'][name]:8.1f}" for name in CARDS)
            lines.append(f"{stage.name:<32}{stage.seed:>4}{lease:>6}{row['pflop']:9.2f}{times}"
                         + (beside or ""))  # fmt: skip
        sums = "".join(f"{sum(row['minutes'][name] for row in rows):8.1f}" for name in CARDS)
        total = sum(row["pflop"] for row in rows)
        lines.append(f"{f'lease {lease} together':<42}{total:9.2f}{sums}")
    return "\n".join(lines)

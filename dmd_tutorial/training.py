"""Training loops as generators: a loop yields metrics, the caller owns plots, logs and stopping.

Everything that a loop changes lives in its *run* (`TeacherRun`, `DistillationRun`): networks,
optimisers, averages, random states, the step. A run can be saved after any step and loaded again;
on the CPU it then continues to the same bits.
"""

import copy
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from dmd_tutorial import dmd
from dmd_tutorial.anchor import Pairs
from dmd_tutorial.data import Images
from dmd_tutorial.denoisers import OneStepGenerator, denoising_loss
from dmd_tutorial.noise import SIGMA_MAX, karras_grid, lognormal_sigma, noise_like


class Metrics(NamedTuple):
    """What a training step reports.

    Attributes:
        step: Steps done, from 1.
        loss: The loss of this step: denoising for a teacher, the anchor's distance for a student.
        learning_rate: The (generator's) learning rate of this step.
        record: The iteration's record, for a distillation.
    """

    step: int
    loss: float
    learning_rate: float
    record: dmd.Record | None = None


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


class EMA:
    """An exponential moving average of a network's weights: what is shipped and evaluated.

    Args:
        module: The network to follow; the average starts as a copy of it.
        decay: Share of the average that a step keeps. Early steps keep less, so that the
            average forgets its start.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of an average is in [0, 1), not {decay}")
        self.decay = decay
        self.module = copy.deepcopy(module).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move the average towards the network.

        Args:
            module: The network.
            step: Steps done so far, from 0.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        averages = list(self.module.parameters())
        torch._foreach_lerp_(averages, list(module.parameters()), 1 - decay)  # type: ignore[arg-type]


class _Run:
    """What a training run changes, as one thing that can be saved and loaded."""

    parts: tuple[str, ...] = ()  # attributes with state_dict and load_state_dict
    average: nn.Module

    def __init__(self, seed: int) -> None:
        self.step = 0
        self.rng = torch.Generator().manual_seed(seed)

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.average.parameters()).device

    def state_dict(self) -> dict:
        """Everything that a step reads and changes."""
        state = {name: getattr(self, name).state_dict() for name in self.parts}
        return state | {"step": self.step, "rng": self.rng.get_state()}

    def load_state_dict(self, state: dict) -> None:
        """Continue where the state was taken.

        Args:
            state: From `state_dict` of a run with the same networks.

        Raises:
            ValueError: If it is the state of another kind of run.
        """
        wanted = {*self.parts, "step", "rng"}
        if set(state) != wanted:
            raise ValueError(f"the state holds {sorted(state)}, this run wants {sorted(wanted)}")
        for name in self.parts:
            getattr(self, name).load_state_dict(state[name])
        self.step = state["step"]
        self.rng.set_state(state["rng"])

    def save(self, path: str | Path, **notes: object) -> None:
        """Write a checkpoint, whole or not at all.

        Args:
            path: Where to.
            **notes: Plain values to keep beside it, such as settings.
        """
        save_atomically({"state": self.state_dict(), "notes": notes}, path)

    def load(self, path: str | Path, **notes: object) -> None:
        """Continue from a checkpoint.

        Args:
            path: What `save` wrote.
            **notes: Values that must be what they were when it was saved.

        Raises:
            ValueError: If the file cannot be read, or belongs to a run with other notes.
        """
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            state, before = checkpoint["state"], checkpoint["notes"]
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(f"{path} is not a readable checkpoint: {error}") from error
        for name, value in notes.items():
            if before.get(name) != value:
                raise ValueError(
                    f"{path} was made with {name} = {before.get(name)!r}, not {value!r}"
                )
        self.load_state_dict(state)


def save_atomically(content: object, path: str | Path) -> None:
    """`torch.save` into a file that is complete or does not exist, also when the power fails.

    Args:
        content: What `torch.save` takes.
        path: Where to; the folder is made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


class TeacherRun(_Run):
    """A teacher in training.

    Args:
        teacher: The denoiser to train; it is changed in place.
        settings: How.
    """

    parts = ("teacher", "average", "optimizer")

    def __init__(self, teacher: nn.Module, settings: TeacherSettings) -> None:
        super().__init__(settings.seed)
        self.settings = settings
        self.teacher = teacher.train()
        self.ema = EMA(teacher, settings.ema)
        self.optimizer = torch.optim.Adam(teacher.parameters(), fused=True)

    @property
    def average(self) -> nn.Module:  # type: ignore[override]
        """The averaged teacher: the one to keep."""
        return self.ema.module


def train_teacher(run: TeacherRun, images: Images) -> Iterator[Metrics]:
    """Train a teacher by denoising score matching until its settings' last step.

    Args:
        run: The teacher, its optimiser and its settings.
        images: The data.

    Yields:
        Metrics after each step; `run` then holds the state after it.

    Source: Karras et al. 2022 (EDM), Eq. 2 and Table 1.
    """
    settings = run.settings
    while run.step < settings.steps:
        index = torch.randint(len(images.x), (settings.batch,), generator=run.rng)
        x, label = images.x[index].to(run.device), images.label[index].to(run.device)
        sigma = lognormal_sigma(len(x), settings.log_mean, settings.log_std, run.rng).to(x)
        noise = noise_like(x, run.rng)
        rate = _set_rate(run.optimizer, settings.learning_rate, run.step, settings, decay=1.0)
        loss = denoising_loss(run.teacher, x, sigma, noise, label if images.classes else None)
        dmd.update(run.optimizer, loss, settings.clip)
        run.ema.update(run.teacher, run.step)
        run.step += 1
        yield Metrics(run.step, loss.item(), rate)


class DistillationRun(_Run):
    """A student in distillation: generator, its average, critic and both optimisers.

    Args:
        teacher: The frozen teacher, a network. Generator and critic start as its copies.
        settings: How to distil.
        start: A denoiser from which the generator starts instead, such as an earlier student.
        sigma_max: The level at which the generator is held, in the units of x.
    """

    parts = ("generator", "average", "critic", "generator_optimizer", "critic_optimizer")

    def __init__(
        self,
        teacher: nn.Module,
        settings: DistillSettings,
        start: nn.Module | None = None,
        sigma_max: float = SIGMA_MAX,
    ) -> None:
        super().__init__(settings.seed)
        self.settings = settings
        self.teacher = teacher.requires_grad_(False).eval()
        student = copy.deepcopy(teacher if start is None else start).requires_grad_(True)
        self.generator = OneStepGenerator(student, sigma_max).train()
        self.critic = copy.deepcopy(teacher).requires_grad_(True).train()
        self.ema = EMA(self.generator, settings.ema)
        decay = settings.weight_decay
        self.generator_optimizer = torch.optim.AdamW(
            self.generator.parameters(), weight_decay=decay, fused=True
        )
        self.critic_optimizer = torch.optim.AdamW(
            self.critic.parameters(), weight_decay=decay, fused=True
        )

    @property
    def average(self) -> nn.Module:  # type: ignore[override]
        """The averaged generator: the one to keep."""
        return self.ema.module

    def objective(self) -> dmd.Objective:
        """The settings in the terms of `dmd.iteration`."""
        settings = self.settings
        return dmd.Objective(
            weighting=dmd.Weighting(settings.weighting),
            matching=settings.matching,
            lambda_reg=settings.lambda_reg,
            critic_steps=settings.critic_steps,
            clip=settings.clip,
            grid=karras_grid(sigma_max=settings.sigma_max),
        )


def distill(
    run: DistillationRun,
    shape: tuple[int, ...],
    classes: int,
    pairs: Pairs | None = None,
    objective: dmd.Objective | None = None,
) -> Iterator[Metrics]:
    """Distil a teacher into a one-step generator until the settings' last iteration.

    Args:
        run: Networks, optimisers and settings.
        shape: Shape of one sample.
        classes: Number of classes, 0 for none; labels are drawn uniformly.
        pairs: Pairs of the anchor; needed where lambda_reg is above 0.
        objective: Overrides the one of the settings, for another distance, say.

    Yields:
        Metrics after each iteration; `run` then holds the state after it.

    Raises:
        ValueError: If an anchor is asked for without pairs.

    Source: Yin et al. 2024 (DMD), Algorithm 1.
    """
    settings, objective = run.settings, objective or run.objective()
    while run.step < settings.steps:
        rate = _set_rate(
            run.generator_optimizer, settings.learning_rate, run.step, settings, settings.decay
        )
        _set_rate(
            run.critic_optimizer, settings.critic_learning_rate, run.step, settings, settings.decay
        )
        batch = draw_batch(run, shape, classes, pairs if objective.lambda_reg else None)
        record = dmd.iteration(
            run.generator, run.critic, run.teacher,
            run.generator_optimizer, run.critic_optimizer, batch, objective, run.rng,
        )  # fmt: skip
        run.ema.update(run.generator, run.step)
        run.step += 1
        yield Metrics(run.step, record.loss_anchor, rate, record)


def draw_batch(
    run: DistillationRun, shape: tuple[int, ...], classes: int, pairs: Pairs | None
) -> dmd.Batch:
    """Draw what one iteration consumes, on the CPU, and put it where the networks are.

    Args:
        run: Where random numbers, batch sizes and the device come from.
        shape: Shape of one sample.
        classes: Number of classes, 0 for none.
        pairs: Pairs of the anchor, or None.

    Returns:
        Noise and labels, and pairs if there are any.
    """
    settings = run.settings
    z = torch.randn(settings.batch, *shape, generator=run.rng)
    label = None
    if classes:
        label = torch.randint(classes, (settings.batch,), generator=run.rng)
    batch = dmd.Batch(z, label)
    if pairs is not None:
        index = torch.randint(len(pairs.z), (settings.batch_pairs,), generator=run.rng)
        label_ref = None if pairs.label is None else pairs.label[index]
        batch = dmd.Batch(z, label, pairs.z[index], pairs.y[index], label_ref)
    moved = (None if part is None else part.to(run.device) for part in batch)
    return dmd.Batch(*moved)  # type: ignore[arg-type]


def _set_rate(
    optimizer: torch.optim.Optimizer,
    peak: float,
    step: int,
    settings: TeacherSettings | DistillSettings,
    decay: float,
) -> float:
    rate = peak * rate_factor(step, settings.steps, settings.warm_up, decay)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate

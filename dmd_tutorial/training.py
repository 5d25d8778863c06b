"""Training loops as generators: a loop yields metrics, the caller owns plots, logs and stopping.

Everything that a loop changes lives in its *run* (`TeacherRun`, `DistillationRun`): networks,
optimisers, averages, random states, the step. A run can be saved after any step and loaded again;
on the CPU it then continues to the same bits.
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from dmd_tutorial import dmd
from dmd_tutorial.anchor import LPIPS, Pairs, l2
from dmd_tutorial.checkpoints import load_checkpoint, save_checkpoint
from dmd_tutorial.compute import Compute, Processes, Stepper, prepare, rebuilt, split
from dmd_tutorial.data import Images
from dmd_tutorial.denoisers import OneStepGenerator, denoising_loss
from dmd_tutorial.noise import (
    SIGMA_MAX,
    dmd_sigma,
    grid_sigma,
    karras_grid,
    lognormal_sigma,
    noise_like,
)
from dmd_tutorial.settings import DistillSettings, TeacherSettings, rate_factor


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


Tensors = TypeVar("Tensors", bound=tuple)
PLAIN = Compute()


class _Run:
    """What a training run changes, as one thing that can be saved and loaded."""

    parts: tuple[str, ...] = ()  # attributes with state_dict and load_state_dict
    average: nn.Module

    def __init__(self, seed: int, compute: Compute) -> None:
        self.step = 0
        self.rng = torch.Generator().manual_seed(seed)
        self.compute, self.processes = compute, Processes()

    @property
    def plain(self) -> bool:
        """Whether a step is computed in one go: one process, one part, no loss scaling."""
        one = self.processes.count == self.compute.parts == 1
        return one and self.compute.precision != "fp16"

    def my_parts(self, batch: Tensors) -> list[Tensors]:
        """This process's share of a step's batch, in parts, where the networks are."""
        parts = split(batch, self.compute.parts, self.processes)
        device = self.device
        return [
            rebuilt(part, [None if t is None else t.to(device) for t in part]) for part in parts
        ]

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
        """Write a checkpoint, whole or not at all, and keep the one before it.

        Args:
            path: Where to.
            **notes: Plain values to keep beside it, such as settings.

        Raises:
            OSError: If it cannot be written.
        """
        save_checkpoint(self.state_dict(), notes, path)

    def load(self, path: str | Path, **notes: object) -> dict:
        """Continue from a checkpoint, or from the one before it where it is damaged.

        Args:
            path: What `save` wrote.
            **notes: Values that must be what they were when it was saved.

        Returns:
            All values that were kept beside it.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If none can be read, or it belongs to a run with other notes.
        """
        state, kept = load_checkpoint(path, notes)
        self.load_state_dict(state)
        return kept


class FitRun(_Run):
    """One network in training: a teacher, or a student whose loss needs no second network.

    Args:
        network: The network to train; it is changed in place.
        settings: How.
        compute: Precision, parts and the like.
    """

    parts = ("network", "average", "optimizer", "stepper")

    def __init__(
        self, network: nn.Module, settings: TeacherSettings, compute: Compute = PLAIN
    ) -> None:
        super().__init__(settings.seed, compute)
        self.settings = settings
        self.ema = EMA(network, settings.ema)
        self.network = prepare(network.train(), compute)
        self.optimizer = torch.optim.Adam(network.parameters(), fused=True)
        self.stepper = Stepper(self.optimizer, compute, self.processes)

    @property
    def average(self) -> nn.Module:  # type: ignore[override]
        """The averaged network: the one to keep."""
        return self.ema.module


class TeacherRun(FitRun):
    """A teacher in training, see `FitRun`."""

    @property
    def teacher(self) -> nn.Module:
        """The network in training."""
        return self.network


def fit(
    run: FitRun,
    draw: Callable[[torch.Generator], Tensors],
    loss: Callable[..., Tensor],
) -> Iterator[Metrics]:
    """Minimise a loss until the settings' last step.

    Args:
        run: The network, its optimiser and its settings.
        draw: Draws what one step consumes, on the CPU: tensors whose first dimension is the
            batch, or None.
        loss: ``loss(network, *drawn)``, a mean over the batch.

    Yields:
        Metrics after each step; `run` then holds the state after it.
    """
    settings = run.settings
    while run.step < settings.steps:
        factor = rate_factor(run.step, settings.steps, settings.warm_up, decay=1.0)
        rate = set_rate(run.optimizer, settings.learning_rate * factor)
        parts = run.my_parts(draw(run.rng))
        values: list[Tensor] = []
        run.stepper(_losses(run.network, loss, parts, values), settings.clip)
        run.ema.update(run.network, run.step)
        run.step += 1
        yield Metrics(run.step, sum(value.item() for value in values) / len(values), rate)


def _losses(
    network: nn.Module, loss: Callable[..., Tensor], parts: list, values: list[Tensor]
) -> Iterator[Tensor]:
    for part in parts:  # one at a time: the next one needs this one's memory
        value = loss(network, *part)
        values.append(value.detach())
        yield value


def train_teacher(run: TeacherRun, images: Images) -> Iterator[Metrics]:
    """Train a teacher by denoising score matching until its settings' last step.

    Args:
        run: The teacher, its optimiser and its settings.
        images: The data.

    Returns:
        `fit`, see there.

    Source: Karras et al. 2022 (EDM), Eq. 2 and Table 1.
    """
    return fit(run, lambda _: draw_images(run, images), denoising_loss)


class Noised(NamedTuple):
    """What a teacher's step consumes: images, levels, noise and labels."""

    x: Tensor
    sigma: Tensor
    noise: Tensor
    label: Tensor | None


def draw_images(run: TeacherRun, images: Images) -> Noised:
    """Draw what one step of a teacher's training consumes, on the CPU.

    Args:
        run: Where random numbers and settings come from.
        images: The data.

    Returns:
        Images (batch, channels, height, width), noise levels (batch,), noise, and labels (batch,),
        None without classes.
    """
    settings = run.settings
    index = torch.randint(len(images.x), (settings.batch,), generator=run.rng)
    flip = torch.rand(settings.batch, generator=run.rng) < 0.5 if settings.flip else None
    x, label = images.take(index, flip), images.label[index]
    sigma = lognormal_sigma(len(x), settings.log_mean, settings.log_std, run.rng).to(x)
    return Noised(x, sigma, noise_like(x, run.rng), label if images.classes else None)


class DistillationRun(_Run):
    """A student in distillation: generator, its average, critic and both optimisers.

    Args:
        teacher: The frozen teacher, a network. Generator and critic start as its copies.
        settings: How to distil.
        start: A denoiser from which the generator starts instead, such as an earlier student.
        sigma_max: The level at which the generator is held, in the units of x.
        compute: Precision, parts and the like. With `frozen` in low precision the run has a copy
            of the teacher.
    """

    parts = (
        "generator", "average", "critic", "generator_optimizer", "critic_optimizer",
        "generator_stepper", "critic_stepper",
    )  # fmt: skip

    def __init__(
        self,
        teacher: nn.Module,
        settings: DistillSettings,
        start: nn.Module | None = None,
        sigma_max: float = SIGMA_MAX,
        compute: Compute = PLAIN,
    ) -> None:
        super().__init__(settings.seed, compute)
        self.settings = settings
        student = copy.deepcopy(teacher if start is None else start).requires_grad_(True)
        self.generator = OneStepGenerator(student, sigma_max).train()
        self.critic = copy.deepcopy(teacher).requires_grad_(True).train()
        self.ema = EMA(self.generator, settings.ema)
        lower = compute.frozen != "fp32"
        self.teacher = copy.deepcopy(teacher) if lower else teacher
        prepare(self.teacher.requires_grad_(False).eval(), compute, frozen=True)
        for network in (self.generator, self.critic):
            _without_dropout(prepare(network, compute))
        decay = settings.weight_decay
        self.generator_optimizer = torch.optim.AdamW(
            self.generator.parameters(), weight_decay=decay, fused=True
        )
        self.critic_optimizer = torch.optim.AdamW(
            self.critic.parameters(), weight_decay=decay, fused=True
        )
        self.generator_stepper, self.critic_stepper = (
            Stepper(optimizer, compute, self.processes)
            for optimizer in (self.generator_optimizer, self.critic_optimizer)
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
            distance=self._distance(),
            critic_steps=settings.critic_steps,
            clip=settings.clip,
            grid=karras_grid(sigma_max=settings.sigma_max),
        )

    def _distance(self) -> Callable[[Tensor, Tensor], Tensor]:
        distances: dict[str, Callable] = {
            "l2": lambda: l2,
            "lpips": lambda: LPIPS().to(self.device),
        }
        if self.settings.distance not in distances:
            raise ValueError(
                f"distance is one of {list(distances)}, not {self.settings.distance!r}"
            )
        return distances[self.settings.distance]()


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
        factor = rate_factor(run.step, settings.steps, settings.warm_up, settings.decay)
        rate = set_rate(run.generator_optimizer, settings.learning_rate * factor)
        set_rate(run.critic_optimizer, settings.critic_learning_rate * factor)
        batch = draw_batch(run, shape, classes, pairs if objective.lambda_reg else None)
        if run.plain:
            record = dmd.iteration(
                run.generator, run.critic, run.teacher,
                run.generator_optimizer, run.critic_optimizer,
                run.my_parts(batch)[0], objective, run.rng,
            )  # fmt: skip
        else:
            record = iteration_in_parts(run, batch, objective)
        run.ema.update(run.generator, run.step)
        run.step += 1
        yield Metrics(run.step, record.loss_anchor, rate, record)


def draw_batch(
    run: DistillationRun, shape: tuple[int, ...], classes: int, pairs: Pairs | None
) -> dmd.Batch:
    """Draw what one iteration consumes, on the CPU.

    Args:
        run: Where random numbers and batch sizes come from.
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
        batch = dmd.Batch(z, label, *pairs.draw(settings.batch_pairs, run.rng))
    return batch


def iteration_in_parts(
    run: DistillationRun, batch: dmd.Batch, objective: dmd.Objective
) -> dmd.Record:
    """`dmd.iteration` for a batch that is cut into parts, or spread over processes.

    Random numbers are drawn for the whole batch in the same order as there, so the gradients are
    those of the plain iteration up to rounding.

    Args:
        run: Networks, optimisers, random numbers.
        batch: The whole batch, on the CPU.
        objective: What to optimise.

    Returns:
        What was done with this process's share; the norms are those of the whole batch.
    """
    records: list[dmd.Record] = []
    critic_losses: list[Tensor] = []

    def for_generator(parts: list[dmd.Batch]) -> Iterator[Tensor]:
        for part in parts:  # one at a time: the next one needs the memory of this one
            loss, record = dmd.generator_loss(
                run.generator, run.critic, run.teacher, part, objective
            )
            records.append(record)
            yield loss

    def for_critic(parts: list[dmd.Batch], fresh: bool) -> Iterator[Tensor]:
        for part, record in zip(parts, records, strict=True):
            with torch.no_grad():
                x = run.generator(part.z, part.label) if fresh else record.x
            loss = dmd.critic_loss(run.critic, x, part.sigma, part.noise, part.label)  # type: ignore[arg-type]
            critic_losses.append(loss.detach())
            yield loss

    if objective.matching:
        batch = _judged_at(dmd_sigma(len(batch.z), objective.grid, run.rng), batch, run.rng)
    norm = run.generator_stepper(for_generator(run.my_parts(batch)), objective.clip)
    norm_critic = 0.0
    for step in range(objective.critic_steps if objective.matching else 0):
        z = noise_like(batch.z, run.rng) if step > 0 else batch.z
        sigma = grid_sigma(len(z), objective.grid, generator=run.rng)
        judged = _judged_at(sigma, dmd.Batch(z, batch.label), run.rng)
        norm_critic = run.critic_stepper(for_critic(run.my_parts(judged), step > 0), objective.clip)
    mean = sum(loss.item() for loss in critic_losses) / max(1, len(critic_losses))
    return _joined(records)._replace(loss_critic=mean, norm_generator=norm, norm_critic=norm_critic)


def _judged_at(sigma: Tensor, batch: dmd.Batch, rng: torch.Generator) -> dmd.Batch:
    return batch._replace(sigma=sigma.to(batch.z), noise=noise_like(batch.z, rng))


def _joined(records: list[dmd.Record]) -> dmd.Record:
    """Tensors side by side, losses averaged."""

    def join(column: tuple) -> object:
        if column[0] is None:
            return None
        return torch.cat(column) if isinstance(column[0], Tensor) else sum(column) / len(column)

    return dmd.Record(*map(join, zip(*records, strict=True)))  # type: ignore[arg-type]


def _without_dropout(network: nn.Module) -> None:
    """Dropout stays off in a distillation, as in the paper."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0  # type: ignore[assignment]


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> float:
    """Set the learning rate of all that an optimiser holds, and return it."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate

"""Training loops as generators: a loop yields metrics, the caller owns plots, logs and stopping.

Everything that a loop changes lives in its *run* (`FitRun`, `DistillationRun`): networks,
optimisers, averages, random states, the step. Its state can be taken after any step and loaded
again; on the CPU it then continues to the same bits.
"""

import copy
import math
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from dmd_tutorial import checks, data, dmd
from dmd_tutorial.adapters import Guided
from dmd_tutorial.anchor import LPIPS, Pairs, l2
from dmd_tutorial.checks import NO_CLASS, Checked, NotFiniteError, asked_once, check_finite
from dmd_tutorial.data import Images
from dmd_tutorial.denoisers import denoising_loss, device_of, sigma_range
from dmd_tutorial.generators import OneStepGenerator, with_steps
from dmd_tutorial.noise import SIGMA_MAX, karras_grid, lognormal_sigma, noise_like, source, stream


@dataclass(frozen=True)
class FitSettings(Checked):
    """How one network is fitted by one loss."""

    steps: checks.Count = 2_000  # Optimiser steps.
    batch: checks.Count = 128  # Samples per step.
    learning_rate: checks.NotNegative = 2e-3  # Peak of the learning rate (Adam).
    warm_up: checks.CountOrNone = 200  # Steps over which the learning rate rises from 0.
    ema: checks.Share = 0.999  # Decay of the exponential moving average of the weights, per step.
    clip: checks.Positive = 1.0  # Largest L2 norm of the gradient.
    seed: int = 0  # Seed of everything drawn.


@dataclass(frozen=True)
class TeacherSettings(FitSettings):
    """How a teacher is fitted. More steps on digits lower the loss on them, not that on others."""

    log_mean: float = -1.2  # Mean of ln(sigma) (EDM, Table 1).
    log_std: checks.NotNegative = 1.2  # Standard deviation of ln(sigma).
    no_label: checks.Share = 0.0  # Fraction of images without label (label dropout), for guidance.
    flip: bool = False  # Whether half of the images are shown mirrored, left to right.


@dataclass(frozen=True)
class DistillSettings(Checked):
    """How a student is distilled. The paper's balance and noise range; rates for small networks."""

    steps: checks.Count = 3_000  # Iterations.
    batch: checks.Count = 64  # Samples per iteration for the matching loss.
    batch_pairs: checks.Count = 64  # Pairs per iteration for the anchor.
    learning_rate: checks.NotNegative = 5e-5  # The generator's (AdamW).
    critic_learning_rate: checks.NotNegative = 4e-4  # The critic's; faster, so that it follows.
    warm_up: checks.CountOrNone = 100  # Steps over which both rates rise from 0.
    decay: checks.Share = 0.5  # Fraction of the run, at its end, over which both rates fall to 0.
    weight_decay: checks.NotNegative = 0.01  # AdamW's.
    ema: checks.Share = 0.99  # Decay of the average of the generator's weights, per step.
    weighting: Literal["eq8", "sigma", "sigma3", "none"] = "eq8"  # w_t of Eq. 7.
    matching: bool = True  # Whether the distribution-matching loss counts.
    lambda_reg: checks.NotNegative = dmd.Objective.lambda_reg  # Weight of the anchor; 0 for none.
    # The anchor's distance: l2, or lpips (the paper's, on images of 32 pixels and up).
    distance: Literal["l2", "lpips"] = "l2"
    critic_steps: checks.CountOrNone = 2  # Critic updates per generator update; 0 freezes it.
    clip: checks.Positive = 10.0  # Largest L2 norm of each network's gradient.
    # Highest level of the grid on which scores are compared, in the units of x; the teacher's own
    # range bounds it.
    grid_max: checks.Positive = SIGMA_MAX
    # Steps of the student, evaluations of its network; more than one exclude the anchor.
    student_steps: checks.Count = 1
    # Share of training that the last of several steps gets; a start with as many keeps its own.
    last_step: checks.Share = 0.9
    seed: int = 0  # Seed of everything drawn.

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.student_steps > 1 and self.lambda_reg:
            raise ValueError(
                f"lambda_reg must be 0 with student_steps {self.student_steps}, not "
                f"{self.lambda_reg}: a pair says what one step makes of its noise"
            )
        if not self.matching and not self.lambda_reg:
            raise ValueError("lambda_reg must be above 0 without matching: nothing else is learnt")

    @property
    def beside(self) -> int:
        """Samples per iteration beside the generator's own: the anchor's pairs."""
        return self.batch_pairs if self.lambda_reg else 0

    def objective(self, device: torch.device | str = "cpu", teacher: Any = None) -> dmd.Objective:
        """What `dmd.iteration` optimises, on a teacher's levels; the device is that of LPIPS."""
        low, high = sigma_range(teacher)
        perceptual = self.distance == "lpips" and self.lambda_reg  # it needs VGG's weights
        return dmd.Objective(
            weighting=dmd.Weighting(self.weighting), matching=self.matching,
            lambda_reg=self.lambda_reg, distance=LPIPS().to(device) if perceptual else l2,
            critic_steps=self.critic_steps, clip=self.clip,
            grid=karras_grid(sigma_min=low, sigma_max=min(self.grid_max, high)),
        )  # fmt: skip


def rate_factor(step: int, steps: int, warm_up: int, decay: float) -> float:
    """The learning rate of a step, counted from 0, as a fraction of its peak: up, level, down.

    The rise is linear; the fall to 0, in the last fraction `decay` of the run, half a cosine.
    """
    rise = min(1.0, (step + 1) / max(1, warm_up))
    start = steps * (1 - decay)
    if step <= start:
        return rise
    return rise * 0.5 * (1 + math.cos(math.pi * (step - start) / (steps - start)))


def set_rate(optimizer: Optimizer, rate: float) -> float:
    """Set the learning rate of all that an optimiser holds, and return it."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def averaged(network: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of a network's weights, in its `module`: what is kept.

    It starts as a copy of the network. Early steps keep less of it, so that it forgets its start.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"ema, the decay of an average, must be in [0, 1), not {decay}")
    _check_weights(network)

    def follow(of: AveragedModel, averages: Any, values: Any, _: Tensor | int) -> None:
        steps = int(of.n_averaged) - 1  # its own is on the CPU: to read it no GPU is waited for
        keep = min(decay, (1 + steps) / (10 + steps))
        if averages[0].is_floating_point() or averages[0].is_complex():
            torch._foreach_lerp_(list(averages), list(values), 1 - keep)
        else:  # such as a BatchNorm's number of batches
            torch._foreach_copy_(list(averages), list(values))

    means = all(bool(buffer.isfinite().all()) for buffer in network.buffers())  # no mask of -inf
    average = AveragedModel(network, use_buffers=means)
    average.multi_avg_fn = partial(follow, average)
    average.n_averaged.fill_(1)  # the start counts: without this the first step replaces it
    return average.requires_grad_(False).eval()


class Metrics(NamedTuple):
    """What a training step reports."""

    step: int  # steps done, from 1
    loss: float  # denoising for a teacher, the anchor's distance for a student
    learning_rate: float  # of this step; the generator's
    record: dmd.Record | None = None  # of a distillation's iteration


class _Done(NamedTuple):
    loss: checks.Number


class _Run:
    """What a training run changes, as one thing whose state can be taken and loaded."""

    parts: tuple[str, ...] = ()  # attributes with state_dict and load_state_dict
    rank = 0  # of this process, where several share the run: each drops other values
    settings: Any
    ema: AveragedModel

    def __init__(self, seed: int) -> None:
        self.step = 0
        self.rng = stream("training", seed)

    def draw_on(self, device: torch.device | str) -> None:
        """Draw everything there from now on: a GPU's numbers are others than a CPU's."""
        self.rng = stream("training", self.settings.seed, device=device)

    @property
    def average(self) -> nn.Module:
        """The averaged network: the one to keep."""
        return self.ema.module

    @property
    def device(self) -> torch.device:
        return device_of(self.average)

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """What a step is done in: an error about what is not finite names the step.

        torch's own random numbers, such as dropout's masks, come from seed and step alone; the
        caller's go on afterwards as if nothing had been drawn.
        """
        gpus = [self.device] if self.device.type == "cuda" else []
        number = random.Random(f"{self.settings.seed} {self.step} {self.rank}").getrandbits(32)
        with torch.random.fork_rng(gpus):
            torch.default_generator.manual_seed(number)
            for gpu in gpus:
                torch.cuda.default_generators[gpu.index].manual_seed(number)
            try:
                yield
            except NotFiniteError as error:
                raise NotFiniteError(f"step {self.step + 1}: {error}") from error

    def state_dict(self) -> dict:
        """Everything that a step reads and changes; weights that are not finite are refused."""
        parts = {name: getattr(self, name) for name in self.parts}
        for part, network in parts.items():
            for name, weight in getattr(network, "named_parameters", dict)():
                check_finite(**{f"{part}.{name} after step {self.step}": weight})
        state = {name: part.state_dict() for name, part in parts.items()}
        return state | {"step": self.step, "rng": self.rng.get_state()}

    def load_state_dict(self, state: dict) -> None:
        """Continue where the state was taken, from a run with the same networks."""
        wanted = {*self.parts, "step", "rng"}
        if set(state) != wanted:
            raise ValueError(f"the state holds {sorted(state)}, this run wants {sorted(wanted)}")
        if len(state["rng"]) != len(self.rng.get_state()):
            raise ValueError(
                "the state's noise was drawn on another kind of device than this run's"
            )
        for name in self.parts:
            getattr(self, name).load_state_dict(state[name])
        self.step = state["step"]
        self.rng.set_state(state["rng"])


class FitRun(_Run):
    """One network in training, changed in place: a teacher, or whatever one loss can train."""

    parts = ("network", "ema", "optimizer")

    def __init__(self, network: nn.Module, settings: FitSettings) -> None:
        super().__init__(settings.seed)
        self.settings = settings
        self.ema = averaged(network, settings.ema)
        self.network = network.train().to(memory_format=torch.channels_last)  # faster convolutions
        self.optimizer = torch.optim.Adam(network.parameters(), fused=True)


def fit(
    run: FitRun, draw: Callable[[Generator], tuple], loss: Callable[..., Tensor],
    updater: Callable = dmd.update_whole,
) -> Iterator[Metrics]:  # fmt: skip
    """Minimise ``loss(network, *drawn)``, a mean over the batch, until the settings' last step.

    `draw` draws what one step consumes, where rng lives: tensors whose first dimension is the
    batch, or None. After each metrics `run` holds the state after that step.
    """
    settings = run.settings

    def of_batch(batch: tuple) -> tuple[Tensor, tuple[Tensor]]:
        value = loss(run.network, *batch)
        return value, (value.detach(),)

    @asked_once
    def step(batch: tuple) -> _Done:
        return _Done(*updater(run.optimizer, of_batch, batch, settings.clip)[0])

    while run.step < settings.steps:
        factor = rate_factor(run.step, settings.steps, settings.warm_up, decay=1.0)
        rate = set_rate(run.optimizer, settings.learning_rate * factor)
        batch = moved(run.device, draw(run.rng))
        with run.stepping():
            done = step(batch)
        run.ema.update_parameters(run.network)
        run.step += 1
        yield Metrics(run.step, done.loss, rate)


def train_teacher(
    run: FitRun, images: Images, updater: Callable = dmd.update_whole
) -> Iterator[Metrics]:
    """`fit` a teacher, whose settings are `TeacherSettings`, by denoising (EDM, Eq. 2, Table 1)."""
    return fit(run, lambda _: draw_images(run, images), denoising_loss, updater)


def draw_images(run: FitRun, images: Images) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Draw what a teacher's step consumes: x, noise levels, noise, labels."""
    settings, rng = run.settings, run.rng
    if not isinstance(settings, TeacherSettings):
        raise ValueError(f"a teacher is fitted with TeacherSettings, not {type(settings).__name__}")
    index = torch.randint(len(images.x), (settings.batch,), **source(rng))
    flip = torch.rand(settings.batch, **source(rng)) < 0.5 if settings.flip else None
    x, label = images.take(index, flip), images.label[index]
    sigma = lognormal_sigma(len(x), settings.log_mean, settings.log_std, rng).to(x)
    noise = noise_like(x, rng)
    if settings.no_label:
        hidden = torch.rand(settings.batch, **source(rng)) < settings.no_label
        label = label.masked_fill(hidden, NO_CLASS)
    return x, sigma, noise, label if images.classes else None


def unguided(teacher: nn.Module) -> Any:
    """The network that student and critic start from: of a guided teacher that without guidance."""
    return teacher.denoiser if isinstance(teacher, Guided) else teacher


class DistillationRun(_Run):
    """A student in distillation: generator, its average, critic and both optimisers.

    The critic starts as a copy of the teacher, a network, which is frozen. The generator starts as
    one, too, held at the teacher's highest level, or as a copy of `start`, such as an earlier
    student; it takes the settings' number of steps. A teacher that is a function without weights
    needs `start` and `critic`.
    """

    parts = ("generator", "ema", "critic", "generator_optimizer", "critic_optimizer")

    def __init__(
        self, teacher: nn.Module, settings: DistillSettings, start: nn.Module | None = None,
        critic: nn.Module | None = None,
    ) -> None:  # fmt: skip
        super().__init__(settings.seed)
        self.settings = settings
        if not any(True for _ in teacher.parameters()) and (start is None or critic is None):
            raise ValueError("the teacher has no weights to start from: give a start and a critic")
        copied = unguided(teacher)
        generator = OneStepGenerator(copied) if start is None else start
        if isinstance(generator, OneStepGenerator):
            generator = with_steps(generator, settings.student_steps, settings.last_step)
        self.generator = copy.deepcopy(generator).requires_grad_(True).train()
        self.critic = copy.deepcopy(critic or copied).requires_grad_(True).train()
        _check_weights(self.critic)
        self.ema = averaged(self.generator, settings.ema)
        self.teacher = teacher.requires_grad_(False).eval()
        for network in (self.generator, self.critic, self.teacher):
            network.to(memory_format=torch.channels_last)
        for network in (self.generator, self.critic):
            _without_dropout(network)
        self.generator_optimizer, self.critic_optimizer = (
            torch.optim.AdamW(n.parameters(), weight_decay=settings.weight_decay, fused=True)
            for n in (self.generator, self.critic)
        )

    def objective(self) -> dmd.Objective:
        """The settings' objective, on the teacher's levels, which are drawn where rng lives."""
        objective = self.settings.objective(self.device, self.teacher)
        return replace(objective, grid=objective.grid.to(self.rng.device))


def distill(
    run: DistillationRun, shape: tuple[int, ...], classes: int, pairs: Pairs | None = None,
    objective: dmd.Objective | None = None, iteration: Callable[..., dmd.Record] = dmd.iteration,
) -> Iterator[Metrics]:  # fmt: skip
    """Distil a teacher into a one-step generator until the settings' last iteration.

    After each metrics `run` holds the state after that iteration. Pairs are needed where
    lambda_reg is above 0; labels are drawn uniformly. `objective` overrides the settings', for
    another distance, say; `iteration` takes the arguments of `dmd.iteration`: another method, or
    the same one with another updater. Source: Yin et al. 2024 (DMD), Algorithm 1.
    """
    settings, objective = run.settings, objective or run.objective()
    iteration = asked_once(iteration)
    while run.step < settings.steps:
        factor = rate_factor(run.step, settings.steps, settings.warm_up, settings.decay)
        rate = set_rate(run.generator_optimizer, settings.learning_rate * factor)
        set_rate(run.critic_optimizer, settings.critic_learning_rate * factor)
        batch = draw_batch(run, shape, classes, pairs if objective.lambda_reg else None)
        with run.stepping():
            record = iteration(
                run.generator, run.critic, run.teacher,
                run.generator_optimizer, run.critic_optimizer,
                moved(run.device, batch), objective, run.rng,
            )  # fmt: skip
        run.ema.update_parameters(run.generator)
        run.step += 1
        yield Metrics(run.step, record.loss_anchor, rate, record)


def draw_batch(
    run: DistillationRun, shape: tuple[int, ...], classes: int, pairs: Pairs | None
) -> dmd.Batch:
    """Draw what one iteration consumes: noise, labels, pairs where there are any."""
    settings, rng = run.settings, run.rng
    z = data.normal(settings.batch, shape, rng)
    label = torch.randint(classes, (settings.batch,), **source(rng)) if classes else None
    drawn = () if pairs is None else pairs.draw(settings.batch_pairs, rng)
    return dmd.Batch(z, label, *drawn)


def rebuilt(batch: Any, values: Iterable[Any]) -> Any:
    """A batch of the same kind, named tuple or plain, with other values."""
    return getattr(type(batch), "_make", type(batch))(values)


def moved(device: torch.device, batch: Any) -> Any:
    """The same, its tensors on a device."""
    return rebuilt(batch, [v.to(device) if isinstance(v, Tensor) else v for v in batch])


def _check_weights(network: nn.Module) -> None:
    for name, weight in network.named_parameters():
        if weight.element_size() < 4:
            lost = "small steps would be lost in it, train in float32 with mixed precision"
            raise ValueError(f"{name} is {weight.dtype}: {lost}")


def _without_dropout(network: nn.Module) -> None:
    """Dropout of every kind, labels' included, stays off in a distillation, as in the paper."""
    for module in network.modules():
        torchs = isinstance(module, nn.modules.dropout._DropoutNd)
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in name or (torchs and name == "p")):
                setattr(module, name, 0.0)

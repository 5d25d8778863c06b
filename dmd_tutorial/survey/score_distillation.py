"""Score distillation, one family: a teacher's answer, somebody else's answer, and their difference.

Every member moves a generated sample x against ``w_t / sigma^2 * (D_critic - D_real)``, which is
`dmd.matching_gradient`. Members differ in the weight, in who the critic is, and in the law by
which noise levels are drawn. DMD2 adds a GAN loss; SiD's gradient also runs through the denoisers.
alpha = 1.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn
from torch.nn import functional

from dmd_tutorial import dmd
from dmd_tutorial.anchor import Pairs, l2
from dmd_tutorial.checks import check_same_shape, expand
from dmd_tutorial.denoisers import SIGMA_DATA, Denoiser, EDMDenoiser, OneStepGenerator
from dmd_tutorial.dmd import Batch, Objective, Record, Weighting
from dmd_tutorial.networks.mlp import MLP
from dmd_tutorial.networks.unet import UNet
from dmd_tutorial.noise import (
    BINS,
    add_noise,
    dmd_sigma,
    grid_sigma,
    karras_grid,
    linear_schedule,
    noise_like,
)
from dmd_tutorial.samplers import one_step
from dmd_tutorial.settings import DistillSettings, TeacherSettings, rate_factor
from dmd_tutorial.survey.task import Budget, Method, Sampler, Task, exhaust
from dmd_tutorial.training import EMA, FitRun, fit

# Weights and noise laws. A law is a grid: `dmd` draws its indices uniformly, so a grid of
# quantiles gives any distribution of levels. Generators are judged at 2 % to 98 % of it.


def noise_prediction(
    x: Float[Tensor, "batch *shape"],
    sigma: Float[Tensor, " batch"],
    denoised_real: Float[Tensor, "batch *shape"],
) -> Float[Tensor, " batch"]:
    """The weight w_t of SDS and VSD, ``sigma^3 / (1 + sigma^2)``.

    They weight a difference of predicted *noises*, ``(D_critic - D_real) / sigma``, with the
    variance ``sigma^2 / (1 + sigma^2)`` of a variance-preserving schedule's noise.

    Args:
        x: The generator's clean output, (batch, *shape); not used.
        sigma: Noise levels, (batch,), in the units of x.
        denoised_real: The teacher's estimate, (batch, *shape); not used.

    Returns:
        Weights, (batch,).

    Source: Poole et al. 2022 (SDS), Eq. 3 with w(t) = sigma_t^2; Wang et al. 2023 (VSD), Eq. 9.
    """
    return sigma**3 / (1 + sigma**2)


def schedule_levels(sigma_max: float, sigma_data: float = SIGMA_DATA) -> Float[Tensor, " bins"]:
    """Times spread evenly over a variance-preserving schedule: the law of SDS and VSD.

    Args:
        sigma_max: The highest level wanted, in the units of x.
        sigma_data: Standard deviation of the data; not used.

    Returns:
        The levels ``sigma / alpha``, (bins,), ascending.

    Source: Poole et al. 2022 (SDS), Section 3, with the schedule of Song et al. 2021.
    """
    alpha, sigma = linear_schedule(torch.linspace(1e-4, 1, 20 * BINS, dtype=torch.float64))
    levels = sigma / alpha
    levels = levels[levels <= sigma_max]
    return levels[torch.linspace(0, len(levels) - 1, BINS).long()]


def teacher_levels(sigma_max: float, sigma_data: float = SIGMA_DATA) -> Float[Tensor, " bins"]:
    """EDM's log-normal law, on which teachers are trained: the law of Diff-Instruct.

    Args:
        sigma_max: No level is above it, in the units of x.
        sigma_data: Standard deviation of the data; EDM's median, 0.3, is for data of 0.5.

    Returns:
        The quantiles of ``ln(sigma) ~ N(-1.2 + ln(sigma_data / 0.5), 1.2^2)`` below sigma_max,
        (bins,), ascending.

    Source: Luo et al. 2023 (Diff-Instruct), public code; Karras et al. 2022 (EDM), Table 1.
    """
    mean, std = -1.2 + math.log(sigma_data / SIGMA_DATA), 1.2
    below = torch.special.ndtr(torch.tensor((math.log(sigma_max) - mean) / std))
    probability = below.double() * (torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS
    return torch.exp(mean + std * torch.special.ndtri(probability))


def dmd_levels(sigma_max: float, sigma_data: float = SIGMA_DATA) -> Float[Tensor, " bins"]:
    """EDM's sampling grid: the law of DMD and DMD2, and SiD's, who stops at 80 % of it.

    Args:
        sigma_max: The highest level, in the units of x.
        sigma_data: Standard deviation of the data; not used.

    Returns:
        Levels, (bins,), ascending.
    """
    return karras_grid(sigma_max=sigma_max)


# Critics


def known_noise(noise: Float[Tensor, "batch *shape"]) -> Denoiser:
    """The critic of SDS: told the noise, it answers with the clean sample itself.

    It is the exact denoiser of a generator that makes one point only, for each sample anew.

    Args:
        noise: The noise that will be in the samples, (batch, *shape).

    Returns:
        A denoiser for those samples.
    """

    def denoiser(x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        return x - expand(sigma, x) * noise

    return denoiser


class Judge(nn.Module):
    """A critic with a second answer: a logit that says whether a noisy sample began as data.

    The head reads what the critic's network computes half-way, so both answers cost one pass.

    Args:
        critic: The critic, an EDM denoiser around this book's `UNet` or `MLP`.

    Raises:
        ValueError: If its network is of another kind.

    Source: Yin et al. 2024 (DMD2), Section 4.3.
    """

    def __init__(self, critic: EDMDenoiser) -> None:
        super().__init__()
        self.critic = critic
        network = critic.network
        if isinstance(network, MLP):  # its last hidden layer
            inner, width, copies = network.hidden[-1], network.out.weight.shape[1], network.copies
        elif isinstance(network, UNet):  # its lowest resolution
            inner, width, copies = network.attention, network.attention.out.out_channels, 1
        else:
            raise ValueError(f"a judge reads an MLP or a UNet, not {type(network).__name__}")
        inner.register_forward_hook(self._see)
        self._seen: Tensor | None = None
        self.weight = nn.Parameter(torch.zeros(copies, width, 1))  # undecided at first
        self.bias = nn.Parameter(torch.zeros(copies, 1, 1))

    def _see(self, module: nn.Module, inputs: tuple, answer: Tensor) -> None:
        self._seen = answer

    def forward(
        self,
        x: Float[Tensor, "batch *shape"],
        sigma: Float[Tensor, " batch"],
        label: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch *shape"]:
        """Denoise, as any critic does."""
        return self.critic(x, sigma, label)

    def logit(self) -> Float[Tensor, " batch"]:
        """Log-odds that the samples of the last call began as data, (batch,)."""
        if self._seen is None:
            raise ValueError("the logit belongs to samples: call the critic on them first")
        features = functional.silu(self._seen)
        if features.ndim == 4:  # (batch, channels, height, width)
            features = features.mean(dim=(2, 3))
        blocks = features.reshape(len(self.weight), -1, features.shape[-1])
        return torch.baddbmm(self.bias, blocks, self.weight).flatten()


def discrimination_loss(
    real: Float[Tensor, " batch"], fake: Float[Tensor, " batch"]
) -> Float[Tensor, ""]:
    """The head's loss: cross-entropy of telling noised data from noised samples.

    Args:
        real: Logits of data, (batch,).
        fake: Logits of generated samples, (batch,).

    Returns:
        A scalar; 2 log 2 for a head that cannot tell them apart.

    Source: Goodfellow et al. 2014; Yin et al. 2024 (DMD2), Eq. 4.
    """
    return functional.softplus(-real).mean() + functional.softplus(fake).mean()


def fooling_loss(fake: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
    """The generator's side, non-saturating: minus the log-probability of passing for data.

    Args:
        fake: Logits of generated samples, (batch,), with gradient history.

    Returns:
        A scalar.

    Source: Goodfellow et al. 2014, Section 3; Yin et al. 2024 (DMD2), Eq. 4.
    """
    return functional.softplus(-fake).mean()


# A loss of another divergence


def sid_loss(
    x: Float[Tensor, "batch *shape"],
    sigma: Float[Tensor, " batch"],
    denoised_real: Float[Tensor, "batch *shape"],
    denoised_fake: Float[Tensor, "batch *shape"],
    alpha: float = 1.0,
    weighting: Weighting | dmd.WeightFunction = Weighting.EQ8,
) -> Float[Tensor, ""]:
    """Score identity distillation: a loss whose gradient descends the Fisher divergence.

    With the exact critic and alpha 1/2 its gradient is half of that of
    ``w |D_real - D_fake|^2`` at noise level sigma, critic's dependence on the generator included.
    The paper takes alpha 1 or 1.2; above 1 samples much wider than the teacher's are driven apart.

    Args:
        x: The generator's clean output, (batch, *shape), with gradient history.
        sigma: Noise levels, (batch,), above 0.
        denoised_real: The teacher's answer, (batch, *shape), with gradient history through x.
        denoised_fake: The critic's, likewise.
        alpha: How much of the plain square is taken away.
        weighting: See `dmd.weight`; without gradient.

    Returns:
        A scalar. It may be negative.

    Raises:
        ValueError: If shapes differ.

    Source: Zhou et al. 2024 (SiD), Eq. 23.
    """
    check_same_shape(x=x, denoised_real=denoised_real, denoised_fake=denoised_fake)
    with torch.no_grad():
        scale = dmd.weight(weighting, x, sigma, denoised_real) / sigma**2
    difference = denoised_real - denoised_fake
    product = difference * (denoised_real - x - alpha * difference)
    return (expand(scale, x) * product).mean()


# Several steps


class FewStepGenerator(nn.Module):
    """A denoiser used several times, with fresh noise between.

    In evaluation it runs to its end. In training it answers after one of its steps, drawn for each
    sample, and only that step is differentiated. What the step starts from has been made by the
    steps before it, as it will be when it is used (backward simulation).

    Args:
        denoiser: The network.
        levels: The falling noise levels of the steps, in the units of x.
        seed: Seed of the fresh noise and of the drawn steps.
        last: Probability of drawing the last step; without it all are equally likely, as in the
            paper. One critic judges the answers of all steps, so it is their mixture that is
            matched. Only with a high probability that is nearly what the last step makes.

    Source: Yin et al. 2024 (DMD2), Sections 4.4 and 4.5.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        levels: tuple[float, ...],
        seed: int = 0,
        last: float | None = None,
    ) -> None:
        super().__init__()
        if any(low >= high for high, low in itertools.pairwise(levels)):
            raise ValueError(f"levels must fall from first to last, they are {levels}")
        self.denoiser, self.levels, self.last = denoiser, levels, last
        self.rng = Generator().manual_seed(seed)

    def forward(
        self, z: Float[Tensor, "batch *shape"], label: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch *shape"]:
        """Generate samples: after the last step, or in training after a drawn one.

        Args:
            z: Standard normal noise, (batch, *shape).
            label: Class of each sample, (batch,), or None.

        Returns:
            Samples, (batch, *shape).
        """
        with torch.no_grad():
            inputs = list(self.inputs(z, label))
        step = torch.full((len(z),), len(self.levels) - 1)
        if self.training:
            step = self._draw_steps(len(z))
        chosen = torch.stack(inputs)[step, torch.arange(len(z))]
        return self.denoiser(chosen, torch.tensor(self.levels)[step].to(z), label)

    def _draw_steps(self, count: int) -> Int[Tensor, " count"]:
        steps = len(self.levels)
        if self.last is None or steps == 1:
            return torch.randint(steps, (count,), generator=self.rng)
        earlier = torch.randint(steps - 1, (count,), generator=self.rng)
        is_last = torch.rand(count, generator=self.rng) < self.last
        return torch.where(is_last, steps - 1, earlier)

    def inputs(
        self, z: Float[Tensor, "batch *shape"], label: Int[Tensor, " batch"] | None = None
    ) -> Iterator[Float[Tensor, "batch *shape"]]:
        """What each step starts from: noise, then the noised answer of the step before.

        Args:
            z: Standard normal noise, (batch, *shape).
            label: Class of each sample, (batch,), or None.

        Yields:
            Noisy samples, (batch, *shape), one for each level.
        """
        x_noisy = self.levels[0] * z
        yield x_noisy
        for level, level_next in itertools.pairwise(self.levels):
            x = self.denoiser(x_noisy, torch.full((len(z),), level).to(z), label)
            x_noisy = x + level_next * noise_like(z, self.rng)
            yield x_noisy


# One iteration of each


class Trio(NamedTuple):
    """The three networks of a distillation, the optimisers of two of them, random numbers."""

    generator: nn.Module
    critic: nn.Module
    teacher: Denoiser
    generator_optimizer: torch.optim.Optimizer
    critic_optimizer: torch.optim.Optimizer | None
    rng: Generator


# One iteration: the networks, what it consumes, what it optimises -> what was done.
Step = Callable[[Trio, Batch, Objective], Record]


def point_step(trio: Trio, batch: Batch, objective: Objective) -> Record:
    """SDS (Poole et al. 2022, Eq. 3): the sample itself is the critic, no network is."""
    noise = noise_like(batch.z, trio.rng)
    networks = trio.generator, known_noise(noise), trio.teacher
    optimizers = trio.generator_optimizer, None
    batch, objective = batch._replace(noise=noise), replace(objective, critic_steps=0)
    return dmd.iteration(*networks, *optimizers, batch, objective, trio.rng)


def matching_step(trio: Trio, batch: Batch, objective: Objective) -> Record:
    """VSD, Diff-Instruct, DMD and DMD2 without its head: `dmd.iteration` as it is.

    Source: Wang et al. 2023, Luo et al. 2023 and Yin et al. 2024, Algorithm 1 of each.
    """
    return dmd.iteration(*trio[:5], batch, objective, trio.rng)


def adversarial_step(
    trio: Trio, batch: Batch, objective: Objective, fooling: float, discrimination: float
) -> Record:
    """DMD2: distribution matching, and a critic that also tells noised data from samples.

    Args:
        trio: The networks; the critic is a `Judge`.
        batch: Noise and labels; data and its labels as y_ref and label_ref.
        objective: Weight, noise law, critic steps.
        fooling: Weight of the generator's adversarial loss.
        discrimination: Weight of the head's loss.

    Returns:
        What was done.

    Raises:
        ValueError: If the batch has no data.

    Source: Yin et al. 2024 (DMD2), Sections 4.2 and 4.3.
    """
    if batch.y_ref is None:
        raise ValueError("an adversarial loss needs data, the batch has none")
    judge, rng = trio.critic, trio.rng
    x = trio.generator(batch.z, batch.label)
    loss, record = dmd.generator_loss(
        lambda z, label: x,  # type: ignore[arg-type]  # one pass of the generator for both losses
        judge, trio.teacher, batch, objective, rng,
    )  # fmt: skip
    sigma = dmd_sigma(len(x), objective.grid, rng).to(x)
    judge(add_noise(x, sigma, noise_like(x, rng)), sigma, batch.label)
    loss = loss + fooling * fooling_loss(judge.logit())  # type: ignore[operator]
    norm = dmd.update(trio.generator_optimizer, loss, objective.clip)

    def head_loss(sigma: Tensor) -> Tensor:
        fake = judge.logit()  # type: ignore[operator]
        y_noisy = add_noise(batch.y_ref, sigma, noise_like(batch.y_ref, rng))  # type: ignore[arg-type]
        judge(y_noisy, sigma, batch.label_ref)
        return discrimination * discrimination_loss(judge.logit(), fake)  # type: ignore[operator]

    return _train_critic(trio, batch, objective, record._replace(norm_generator=norm), head_loss)


def sid_step(trio: Trio, batch: Batch, objective: Objective, alpha: float) -> Record:
    """SiD: the generator's gradient runs through both denoisers; the critic trains as ever.

    Args:
        trio: The networks.
        batch: Noise and labels.
        objective: Weight, noise law, critic steps.
        alpha: See `sid_loss`.

    Returns:
        What was done.

    Source: Zhou et al. 2024 (SiD), Algorithm 1.
    """
    rng = trio.rng
    x = trio.generator(batch.z, batch.label)
    sigma = dmd_sigma(len(x), objective.grid, rng).to(x)
    x_noisy = add_noise(x, sigma, noise_like(x, rng))
    real, fake = (D(x_noisy, sigma, batch.label) for D in (trio.teacher, trio.critic))
    loss = sid_loss(x, sigma, real, fake, alpha, objective.weighting)
    norm = dmd.update(trio.generator_optimizer, loss, objective.clip)
    answers = x.detach(), sigma, real.detach(), fake.detach()
    record = Record(*answers, loss.item(), norm_generator=norm)
    return _train_critic(trio, batch, objective, record)


def _train_critic(
    trio: Trio,
    batch: Batch,
    objective: Objective,
    record: Record,
    more: Callable[[Tensor], Tensor | float] = lambda sigma: 0.0,
) -> Record:
    """The critic's updates, as in `dmd.iteration`; `more`, of the levels, is added to its loss."""
    for step in range(objective.critic_steps):
        with torch.no_grad():
            fresh = step > 0  # the first update sees the samples of the generator's update
            x = trio.generator(noise_like(batch.z, trio.rng), batch.label) if fresh else record.x
        sigma = grid_sigma(len(x), objective.grid, generator=trio.rng).to(x)
        loss = dmd.critic_loss(trio.critic, x, sigma, noise_like(x, trio.rng), batch.label)
        mean = record.loss_critic + loss.item() / objective.critic_steps
        norm = dmd.update(trio.critic_optimizer, loss + more(sigma), objective.clip)  # type: ignore[arg-type]
        record = record._replace(loss_critic=mean, norm_critic=norm)
    return record


# The family


@dataclass(frozen=True)
class Member:
    """A member of the family: its weight, critic and noise law.

    Attributes:
        name: For tables.
        weighting: w_t.
        law: ``(sigma_max, sigma_data) -> levels``, drawn uniformly.
        critic_steps: Critic updates per generator update.
        step: One iteration.
        lambda_reg: Weight of the anchor; 0: no pairs.
        data: Whether real data is needed.
        evaluations: Steps of its generator.
    """

    name: str
    weighting: Weighting | dmd.WeightFunction
    law: Callable[[float, float], Tensor]
    critic_steps: int = 1
    step: Step = matching_step
    lambda_reg: float = 0.0
    data: bool = False
    evaluations: int = 1

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
        weights: dict = {
            noise_prediction: r"$\sigma^3 / (1 + \sigma^2)$",
            Weighting.NONE: r"$\sigma^2$",
            Weighting.EQ8: r"$\sigma^2 / \mathrm{mean} \lvert x - D_{real} \rvert$",
        }
        laws: dict = {
            schedule_levels: "times of a variance-preserving schedule",
            teacher_levels: "log-normal, the teacher's own",
            dmd_levels: "Karras grid",
        }
        critic = f"trained, {self.critic_steps} per update" if self.critic_steps else "$x$ itself"
        if self.data:
            critic += ", with a GAN head"
        yes = {True: "yes", False: "no"}
        weight, law = weights[self.weighting], laws[self.law]
        return self.name, weight, critic, law, yes[self.data], yes[self.lambda_reg > 0]


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


def few_step_levels(
    evaluations: int, sigma_max: float, sigma_data: float = SIGMA_DATA
) -> tuple[float, ...]:
    """Where a generator of several steps works: at sigma_max, then around the data's own width.

    Args:
        evaluations: How many steps: 1, 2 or 4.
        sigma_max: The first level, in the units of x.
        sigma_data: Standard deviation of the data.

    Returns:
        Falling levels.
    """
    between: dict[int, tuple[float, ...]] = {1: (), 2: (1.6,), 4: (4.0, 1.6, 0.6)}
    return (sigma_max, *(sigma_data * ratio for ratio in between[evaluations]))


# Recipes of the survey


@dataclass(frozen=True)
class Plan:
    """How a task's budget is spent.

    Attributes:
        settings: Batch and learning rates of the distillation.
        warm_rate: The generator's learning rate where it starts from a regression instead: it has
            more to lose while the critic is still a copy of the teacher.
        warm: How the regression on pairs is done.
        share_pairs: Fraction of the budget for making pairs, where a method has any.
    """

    settings: DistillSettings
    warm_rate: float
    warm: TeacherSettings
    share_pairs: float


PLANS = {
    "ring": Plan(
        DistillSettings(batch=256, batch_pairs=256, learning_rate=5e-4, critic_learning_rate=2e-3),
        1e-4,
        TeacherSettings(batch=256, warm_up=50, ema=0.99),
        share_pairs=0.2,
    ),
    "digits": Plan(
        DistillSettings(
            batch=32, batch_pairs=32, learning_rate=1e-4, critic_learning_rate=1e-3, warm_up=20
        ),
        5e-5,
        TeacherSettings(batch=64, warm_up=30, ema=0.98),
        share_pairs=0.4,
    ),
}


def regress(task: Task, budget: Budget, seed: int, share: float) -> tuple[nn.Module, Pairs]:
    """Regression on pairs: the base line, and the warm start of DMD.

    Args:
        task: The task.
        budget: What pays for pairs and regression.
        seed: Seed of everything drawn.
        share: Largest fraction of the budget for the regression itself.

    Returns:
        The averaged generator, and the pairs.
    """
    plan, rng = PLANS[task.name], Generator().manual_seed(seed)
    pairs = task.pairs(max(1, int(plan.share_pairs * budget.passes / 35)), rng)
    generator = OneStepGenerator(task.student(), task.sigma_max)
    steps = int(min(share * budget.passes, budget.left) / (3 * plan.warm.batch))
    run = FitRun(generator, replace(plan.warm, steps=max(1, steps), seed=seed))
    budget.watch(generator.denoiser)

    def loss(network: nn.Module, z: Tensor, y: Tensor, label: Tensor | None) -> Tensor:
        return l2(network(z, label), y)

    exhaust(fit(run, lambda rng: pairs.draw(plan.warm.batch, rng), loss))
    return run.average, pairs


def _train_regression(task: Task, budget: Budget, seed: int) -> dict[int, Sampler]:
    average, _ = regress(task, budget, seed, share=1.0)
    return {1: partial(one_step, average)}


def train(member: Member, task: Task, budget: Budget, seed: int) -> dict[int, Sampler]:
    """Spend a budget on a member of the family.

    Args:
        member: Which.
        task: The task.
        budget: What may be spent.
        seed: Seed of everything drawn.

    Returns:
        The averaged generator, by its number of evaluations.
    """
    plan, pairs = PLANS[task.name], None
    start, rate = task.student(), plan.settings.learning_rate
    if member.lambda_reg:
        warm, pairs = regress(task, budget, seed, share=0.4)
        start = copy.deepcopy(warm.denoiser).requires_grad_(True)  # type: ignore[assignment]
        rate = plan.warm_rate
    settings = plan.settings
    objective = member.objective(settings.sigma_max, task.teacher.sigma_data)  # type: ignore[arg-type]
    begin = partial(_begin, member, task, budget, settings, start, seed)

    def step(trio: Trio) -> None:
        batch = Batch(*task.noise(settings.batch, trio.rng))
        if pairs is not None:
            batch = Batch(batch.z, batch.label, *pairs.draw(settings.batch_pairs, trio.rng))
        if member.data:
            y, label = task.draw(settings.batch, trio.rng)
            batch = batch._replace(y_ref=y, label_ref=label)
        member.step(trio, batch, objective)

    trial, _ = begin()
    steps = budget.affordable(partial(step, trial))
    trio, ema = begin()
    for index in range(steps):
        factor = rate_factor(index, steps, settings.warm_up, settings.decay)
        rates = rate, settings.critic_learning_rate
        for optimizer, peak in zip(trio[3:5], rates, strict=True):
            optimizer.param_groups[0]["lr"] = peak * factor  # type: ignore[union-attr]
        step(trio)
        ema.update(trio.generator, index)
    return {member.evaluations: partial(one_step, ema.module)}


def _begin(
    member: Member,
    task: Task,
    budget: Budget,
    settings: DistillSettings,
    start: nn.Module,
    seed: int,
) -> tuple[Trio, EMA]:
    """Networks as they stand before the first iteration, watched by the budget."""
    student = copy.deepcopy(start)
    generator: nn.Module = OneStepGenerator(student, task.sigma_max)
    if member.evaluations > 1:
        width: float = student.sigma_data  # type: ignore[assignment]
        levels = few_step_levels(member.evaluations, task.sigma_max, width)
        generator = FewStepGenerator(student, levels, seed, last=0.9)
    teacher, critic = task.student().requires_grad_(False).eval(), task.student()
    ema = EMA(generator, settings.ema)
    for network in (student, teacher, critic):
        budget.watch(network)
    if member.data:
        critic = Judge(critic)  # type: ignore[arg-type]
    kind = partial(torch.optim.AdamW, weight_decay=settings.weight_decay, fused=True)
    optimizers = kind(generator.parameters()), kind(critic.parameters())
    rng = Generator().manual_seed(seed)
    return Trio(generator, critic, teacher, *optimizers, rng), ema


METHODS: tuple[Method, ...] = (
    Method("Regression on pairs", 11, _train_regression, needs_pairs=True),
    *(
        Method(
            member.name,
            11,
            partial(train, member),
            needs_data=member.data,
            needs_pairs=member.lambda_reg > 0,
            extra_networks=int(member.critic_steps > 0),
        )
        for member in FAMILY
    ),
)

"""Recipes of the survey: how each member of the family spends a task's budget."""

import copy
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Generator, Tensor, nn

from benchmarks.survey.task import Budget, Method, Sampler, Task, exhaust
from dmd_tutorial.anchor import Pairs, l2
from dmd_tutorial.denoisers import OneStepGenerator
from dmd_tutorial.dmd import Batch
from dmd_tutorial.samplers import one_step
from dmd_tutorial.survey.score_distillation.critics import Judge
from dmd_tutorial.survey.score_distillation.family import FAMILY, Member
from dmd_tutorial.survey.score_distillation.few_steps import FewStepGenerator, few_step_levels
from dmd_tutorial.survey.score_distillation.iterations import Trio
from dmd_tutorial.training import (
    EMA,
    DistillSettings,
    FitRun,
    TeacherSettings,
    fit,
    rate_factor,
    set_rate,
)


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
        set_rate(trio.generator_optimizer, rate * factor)
        set_rate(trio.critic_optimizer, settings.critic_learning_rate * factor)  # type: ignore[arg-type]
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

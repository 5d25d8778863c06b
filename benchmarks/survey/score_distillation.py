"""The rows of the survey's table: how each member of the family spends a task's budget."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Generator, Tensor, nn

from benchmarks.survey.task import Budget, Method, Sampler, Task, exhaust
from dmd_tutorial.anchor import Pairs, l2
from dmd_tutorial.denoisers import EDMDenoiser
from dmd_tutorial.generators import FewStepGenerator, OneStepGenerator, few_step_levels
from dmd_tutorial.noise import noise_like
from dmd_tutorial.samplers import one_step
from dmd_tutorial.survey.score_distillation import FAMILY, Judge, Member, with_data
from dmd_tutorial.training import (
    DistillationRun,
    DistillSettings,
    FitRun,
    FitSettings,
    distill,
    fit,
)

SIGMA_MAX = 5.0  # scores are compared up to here: points and digits have no detail above it


class Drawing(FewStepGenerator):
    """Its noise and steps come from one source, call by call: so the recorded rows were made."""

    def __init__(self, denoiser: nn.Module, levels: tuple[float, ...], seed: int) -> None:
        super().__init__(denoiser, levels, last=0.9)
        self.rng = Generator().manual_seed(seed)

    def fresh(self, z: Tensor) -> Tensor:
        return torch.stack([noise_like(z, self.rng) for _ in self.levels[1:]])

    def steps(self, z: Tensor) -> Tensor:
        last = len(self.levels) - 1
        earlier = torch.randint(last, (len(z),), generator=self.rng)
        return torch.where(torch.rand(len(z), generator=self.rng) < self.last, last, earlier)


@dataclass(frozen=True)
class Plan:
    """How a task's budget is spent."""

    settings: DistillSettings  # of the distillation; its objective is the member's
    warm_rate: float  # the generator's where it starts from a regression: it has more to lose
    warm: FitSettings  # of the regression on pairs
    share_pairs: float  # of the budget, for making pairs, where a method has any


PLANS = {
    "ring": Plan(
        DistillSettings(batch=256, batch_pairs=256, learning_rate=5e-4, critic_learning_rate=2e-3),
        1e-4,
        FitSettings(batch=256, warm_up=50, ema=0.99),
        share_pairs=0.2,
    ),
    "digits": Plan(
        DistillSettings(
            batch=32, batch_pairs=32, learning_rate=1e-4, critic_learning_rate=1e-3, warm_up=20
        ),
        5e-5,
        FitSettings(batch=64, warm_up=30, ema=0.98),
        share_pairs=0.4,
    ),
}


def regress(task: Task, budget: Budget, seed: int, share: float) -> tuple[nn.Module, Pairs]:
    """Regression on pairs: the base line, and the warm start of DMD.

    It takes at most that share of the budget, pairs not included; returns the averaged generator.
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
    """Spend a budget on a member of the family."""
    plan, pairs = PLANS[task.name], None
    student, rate = task.student(), plan.settings.learning_rate
    if member.lambda_reg:
        warm, pairs = regress(task, budget, seed, share=0.4)
        student, rate = copy.deepcopy(warm.denoiser), plan.warm_rate  # type: ignore[assignment]
    width: float = task.teacher.sigma_data  # type: ignore[assignment]
    objective = member.objective(SIGMA_MAX, width)
    start: nn.Module = OneStepGenerator(student, task.sigma_max)
    if member.evaluations > 1:
        levels = few_step_levels(member.evaluations, task.sigma_max, width)
        start = Drawing(student, levels, seed)
    step = with_data(member.step, task.draw) if member.data else member.step

    def begin(steps: int) -> Iterator[nn.Module]:
        settings = replace(
            plan.settings, steps=steps, learning_rate=rate, seed=seed,
            lambda_reg=member.lambda_reg, student_steps=member.evaluations,
        )  # fmt: skip
        critic: EDMDenoiser | Judge = task.student()  # type: ignore[assignment]
        if member.data:
            critic = Judge(critic)  # type: ignore[arg-type]
        run = DistillationRun(task.student(), settings, start, critic)
        for network in (
            run.generator.denoiser,
            getattr(run.critic, "critic", run.critic),
            run.teacher,
        ):
            budget.watch(network)
        for _ in distill(run, task.shape, task.classes, pairs, objective, step):
            yield run.average

    *_, average = begin(budget.affordable(lambda: next(begin(1))))
    return {member.evaluations: partial(one_step, average)}


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

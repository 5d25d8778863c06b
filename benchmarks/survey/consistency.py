"""The rows of the survey's table: consistency distillation, training, and trajectory models."""

from collections.abc import Callable, Iterator

import torch
from torch import Generator, Tensor, nn

from benchmarks.survey.task import Budget, Method, Sampler, Task, sampling
from dmd_tutorial.denoisers import EDMDenoiser
from dmd_tutorial.noise import karras_grid, noise_like
from dmd_tutorial.survey.consistency import (
    ConsistencyModel,
    TrajectoryModel,
    consistency_loss,
    distillation_pair,
    doubling_bins,
    multistep,
    neighbour_levels,
    pseudo_huber,
    training_pair,
    trajectory_loss,
    trajectory_sampler,
)
from dmd_tutorial.training import FitRun, FitSettings, fit


def _train(
    task: Task,
    budget: Budget,
    seed: int,
    make: Callable[[EDMDenoiser], nn.Module],
    draw_levels: Callable[[int, float, Generator], tuple[Tensor, ...]],
    loss: Callable[..., Tensor],
) -> nn.Module:
    """Spend the budget on a student; returns its average, which its loss may take for a target.

    ``draw_levels(batch, progress, rng)``; ``loss(network, target, x, noise, label, *levels)``.
    """
    images = len(task.shape) > 1
    batch, rate = (64, 5e-4) if images else (256, 1e-3)

    def begin(steps: int) -> Iterator[nn.Module]:
        settings = FitSettings(steps, batch, rate, warm_up=50, ema=0.95, seed=seed)
        run = FitRun(make(task.student()), settings)  # type: ignore[arg-type]
        target = budget.watch(run.average)
        budget.watch(run.network)

        def draw(rng: Generator) -> tuple[Tensor | None, ...]:
            x, label = task.draw(batch, rng)
            return x, noise_like(x, rng), label, *draw_levels(batch, run.step / steps, rng)

        for _ in fit(run, draw, lambda network, *drawn: loss(network, target, *drawn)):
            yield run.average

    *_, average = begin(budget.affordable(lambda: next(begin(1))))
    return average


def _distillation(task: Task, budget: Budget, seed: int) -> dict[int, Sampler]:
    grid = karras_grid(18, sigma_max=task.sigma_max)

    def loss(network: nn.Module, target: nn.Module, *drawn: Tensor) -> Tensor:
        x, noise, label, sigma, sigma_next = drawn
        pair = distillation_pair(task.teacher, x, noise, sigma, sigma_next, label)
        return consistency_loss(network, target, pair, label)

    def draw_levels(batch: int, _: float, rng: Generator) -> tuple[Tensor, ...]:
        return neighbour_levels(batch, grid, rng)

    model = _train(task, budget, seed, ConsistencyModel, draw_levels, loss)
    ladders = [task.sigma_max], [task.sigma_max, 1.0], [task.sigma_max, 1.0, 0.5, 0.25]
    levels = {len(ladder): torch.tensor(ladder) for ladder in ladders}
    return {n: sampling(model, multistep, some, seed) for n, some in levels.items()}


def _training(task: Task, budget: Budget, seed: int) -> dict[int, Sampler]:
    def loss(network: nn.Module, target: nn.Module, *drawn: Tensor) -> Tensor:
        x, noise, label, sigma, sigma_next = drawn
        pair = training_pair(x, noise, sigma, sigma_next)
        weight = 1 / (sigma - sigma_next)
        return consistency_loss(network, network, pair, label, pseudo_huber, weight)

    def draw_levels(batch: int, progress: float, rng: Generator) -> tuple[Tensor, ...]:
        grid = karras_grid(doubling_bins(progress, last=80), sigma_max=task.sigma_max)
        return neighbour_levels(batch, grid, rng)

    model = _train(task, budget, seed, ConsistencyModel, draw_levels, loss)
    levels = {1: torch.tensor([task.sigma_max]), 2: torch.tensor([task.sigma_max, 1.0])}
    return {n: sampling(model, multistep, some, seed) for n, some in levels.items()}


def _trajectory(task: Task, budget: Budget, seed: int) -> dict[int, Sampler]:
    grid = karras_grid(18, sigma_max=task.sigma_max).float()

    def loss(network: nn.Module, target: nn.Module, *drawn: Tensor) -> Tensor:
        x, noise, label, sigma, between, sigma_next = drawn
        pair = distillation_pair(task.teacher, x, noise, sigma, between, label)
        # compared where they land, and without the paper's denoising loss: at this budget the extra
        # passes cost more than they bring (with the draw below, about 1 instead of 9 on digits)
        return trajectory_loss(
            network, target, pair.x, pair.x_next, sigma, between, sigma_next, label, sigma_min=None
        )

    def draw_levels(batch: int, _: float, rng: Generator) -> tuple[Tensor, ...]:
        index = torch.randint(1, len(grid), (batch,), generator=rng)
        end = (torch.rand(batch, generator=rng) * index).long()  # 0 to index - 1, and
        end[torch.rand(batch, generator=rng) < 0.5] = 0  # half of the jumps go to the end
        return grid[index], grid[index - 1], grid[end]

    model = _train(task, budget, seed, TrajectoryModel, draw_levels, loss)
    levels = {
        steps: karras_grid(steps + 1, sigma_max=task.sigma_max).flip(0) for steps in (1, 2, 4)
    }
    return {n: sampling(model, trajectory_sampler, some, seed) for n, some in levels.items()}


METHODS: tuple[Method, ...] = (
    Method("Consistency distillation", 9, _distillation, needs_data=True),
    Method("Consistency training", 9, _training, needs_data=True),
    Method("Consistency trajectory", 9, _trajectory, needs_data=True),
)

"""The rows of the survey's table: flow matching, reflow, and one step of a reflowed network."""

import copy

import torch
from torch import Generator, nn

from benchmarks.survey.task import Budget, Method, Sampler, Task, fit_within, sampling
from dmd_tutorial.anchor import Pairs
from dmd_tutorial.denoisers import EDMDenoiser
from dmd_tutorial.generators import OneStepGenerator
from dmd_tutorial.networks import MLP, UNet
from dmd_tutorial.noise import noise_like
from dmd_tutorial.samplers import euler, one_step
from dmd_tutorial.survey.flow_matching import (
    conditional_flow_matching_loss,
    distillation_loss,
    flow_levels,
    reflow_loss,
    uniform_time,
)
from dmd_tutorial.training import FitSettings

BATCH = 128


def _in_steps(task: Task, network: nn.Module, counts: tuple[int, ...]) -> dict[int, Sampler]:
    return {n: sampling(network, euler, flow_levels(n, task.sigma_max)) for n in counts}


def _settings(seed: int, learning_rate: float) -> FitSettings:
    return FitSettings(steps=100_000, learning_rate=learning_rate, seed=seed)


def _untrained(task: Task) -> nn.Module:
    """A network like the teacher that has not learnt anything."""
    network = task.student()
    if len(task.shape) == 1:
        fresh: nn.Module = MLP(*task.shape)
    else:
        fresh = UNet(**network.network.config)  # type: ignore[union-attr, arg-type]
    return EDMDenoiser(fresh, network.sigma_data)  # type: ignore[arg-type]


def _train_from_data(task: Task, budget: Budget, seed: int) -> dict[int, Sampler]:
    def draw(rng: Generator) -> tuple:
        x, label = task.draw(BATCH, rng)
        return x, noise_like(x, rng), uniform_time(len(x), task.sigma_max, rng), label

    network = fit_within(
        budget,
        lambda: budget.watch(_untrained(task)),
        draw,
        conditional_flow_matching_loss,
        _settings(seed, 2e-3),
    )
    return _in_steps(task, network, (35, 4, 1))


def _reflow(task: Task, budget: Budget, seed: int, rng: Generator, share: float = 1.0) -> nn.Module:
    """The teacher, reflowed on pairs of its own that cost a third of the budget."""
    pairs = task.pairs(int(budget.left / 3 / 35), rng)

    def draw(rng: Generator) -> tuple:
        z, y, label = pairs.draw(BATCH, rng)
        return z, y, uniform_time(len(z), task.sigma_max, rng), label

    return fit_within(
        budget,
        lambda: budget.watch(task.student()),
        draw,
        reflow_loss,
        _settings(seed, 1e-3),
        share,
    )


def _train_reflow(task: Task, budget: Budget, seed: int) -> dict[int, Sampler]:
    network = _reflow(task, budget, seed, torch.Generator().manual_seed(seed))
    return _in_steps(task, network, (4, 1))


def _train_one_step(task: Task, budget: Budget, seed: int) -> dict[int, Sampler]:
    rng = torch.Generator().manual_seed(seed)
    network = _reflow(task, budget, seed, rng, share=0.5)
    z, label = task.noise(int(budget.left / 4 / 4), rng)
    pairs = Pairs(z, _in_steps(task, network, (4,))[4](z, label), label)

    def make() -> nn.Module:
        student = copy.deepcopy(network).requires_grad_(True)  # with the budget's watch
        return OneStepGenerator(student, task.sigma_max)

    def draw(rng: Generator) -> tuple:
        return pairs.draw(BATCH, rng)

    generator = fit_within(budget, make, draw, distillation_loss, _settings(seed, 1e-3))
    return {1: lambda z, label: one_step(generator, z, label)}


METHODS: tuple[Method, ...] = (
    Method("Flow matching", 8, _train_from_data, needs_data=True),
    Method("Rectified flow (reflow)", 8, _train_reflow, needs_pairs=True),
    Method("Reflow, then one step (InstaFlow)", 8, _train_one_step, needs_pairs=True),
)

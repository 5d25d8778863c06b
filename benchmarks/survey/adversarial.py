"""The row of the survey's table: adversarial diffusion distillation."""

import torch

from benchmarks.survey.task import Budget, Method, Sampler, Task
from dmd_tutorial.dmd import Batch
from dmd_tutorial.generators import OneStepGenerator
from dmd_tutorial.noise import noise_like
from dmd_tutorial.samplers import one_step
from dmd_tutorial.survey.adversarial import Discriminator, FrozenFeatures, Objective, iteration
from dmd_tutorial.training import averaged, rate_factor, set_rate


def _train(task: Task, budget: Budget, seed: int) -> dict[int, Sampler]:
    """Train a one-step generator with both terms; the features are those of the teacher."""
    rng = torch.Generator().manual_seed(seed)
    points = len(task.shape) == 1  # by trial, for each task
    batch, hidden, beta = (256, 64, 0.0) if points else (64, 128, 0.5)
    rates = (5e-4, 1e-3) if points else (1e-4, 8e-3)

    def networks() -> tuple[OneStepGenerator, Discriminator, list[torch.optim.Optimizer]]:
        student = task.student()
        some, label = task.noise(2, torch.Generator().manual_seed(0))
        seen = frozen(some, label)
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            heads = Discriminator([each.shape[1] for each in seen], hidden)
        budget.watch(student)
        budget.watch(heads, *seen, samples=some)
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Adam(network.parameters(), rate, betas=(beta, 0.99), fused=True)
            for network, rate in zip((student, heads), rates, strict=True)
        ]
        return OneStepGenerator(student, task.sigma_max), heads, optimizers

    def step(
        generator: OneStepGenerator, heads: Discriminator, optimizers: list, rng: torch.Generator
    ) -> None:
        x, label = task.draw(batch, rng)
        drawn = Batch(noise_like(x, rng), label, y_ref=x)
        iteration(generator, task.teacher, frozen, heads, *optimizers, drawn, objective, rng)

    objective, frozen = Objective(), FrozenFeatures(task.teacher, sigma=0.2)  # type: ignore[arg-type]
    trial = networks()
    steps = budget.affordable(lambda: step(*trial, torch.Generator().manual_seed(0)))
    generator, heads, optimizers = networks()
    average = averaged(generator, 0.99)
    for index in range(steps):
        for optimizer, rate in zip(optimizers, rates, strict=True):
            set_rate(optimizer, rate * rate_factor(index, steps, 50, 0.5))
        step(generator, heads, optimizers, rng)
        average.update_parameters(generator)
    return {1: lambda z, label: one_step(average.module, z, label)}


METHODS: tuple[Method, ...] = (
    Method("Adversarial diffusion distillation", 10, _train, needs_data=True, extra_networks=1),
)

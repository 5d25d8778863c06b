"""The teacher itself, with the samplers of chapter 7: no training, only better steps."""

from collections.abc import Callable, Iterator

from benchmarks.survey.task import Budget, Method, Sampler, Task, sampling
from dmd_tutorial.noise import sampling_levels
from dmd_tutorial.samplers import Step, ancestral, ddim, deis, dpm_solver, heun, unipc

# The lowest level above 0. With few steps none should be spent on noise that nobody sees: of
# 0.002, 0.02 and 0.05 this gave the best samples of most solvers with 5 and 10 steps.
SIGMA_MIN = 0.05


def _teacher(task: Task, budget: Budget, seed: int) -> dict[int, Sampler]:
    """EDM's sampler as the teacher is meant to be used: 18 steps of Heun's method."""
    return {35: sampling(task.teacher, heun, sampling_levels(18, sigma_max=task.sigma_max))}


def _solver(
    sampler: Callable[..., Iterator[Step]], steps: tuple[int, ...], noise_seed: int | None = None
) -> Callable[[Task, Budget, int], dict[int, Sampler]]:
    """A recipe for a sampler that needs one evaluation a step."""

    def train(task: Task, budget: Budget, seed: int) -> dict[int, Sampler]:
        ladders = {n: sampling_levels(n, SIGMA_MIN, task.sigma_max) for n in steps}
        return {
            n: sampling(task.teacher, sampler, levels, noise_seed) for n, levels in ladders.items()
        }

    return train


METHODS: tuple[Method, ...] = (
    Method("Teacher, Heun", 7, _teacher, trained=False),
    Method("Teacher, DDPM", 7, _solver(ancestral, (35,), noise_seed=1), trained=False),
    Method("Teacher, DDIM", 7, _solver(ddim, (1, 5, 10)), trained=False),
    Method("Teacher, DPM-Solver++ 2M", 7, _solver(dpm_solver, (5, 10)), trained=False),
    Method("Teacher, DEIS 3", 7, _solver(deis, (5, 10)), trained=False),
    Method("Teacher, UniPC 2", 7, _solver(unipc, (5, 10)), trained=False),
)

"""The row of the survey's table: progressive distillation."""

from benchmarks.survey.task import Budget, Method, Sampler, Task
from dmd_tutorial.noise import sampling_levels
from dmd_tutorial.survey.progressive import progressive
from dmd_tutorial.training import FitSettings


def _train(task: Task, budget: Budget, seed: int) -> dict[int, Sampler]:
    """Halve the steps of the task's teacher until one is left, an equal share for each halving."""
    points = len(task.shape) == 1
    batch, rate = (512, 2e-3) if points else (64, 1e-3)
    levels = sampling_levels(32, sigma_max=task.sigma_max)
    cost = 5 * batch  # two of the teacher's passes, one of the student's with its gradient
    steps = max(1, int(budget.left / cost / 5))  # 5 halvings

    def settings(left: int) -> FitSettings:
        return FitSettings(steps, batch, rate, warm_up=20, ema=0.99, seed=1000 * seed + left)

    student = budget.watch(task.student())  # its copies are watched as well
    return {
        halved.steps: halved.sample
        for halved in progressive(task.teacher, student, task.draw, levels, settings)
        if halved.steps <= 4
    }


METHODS: tuple[Method, ...] = (Method("Progressive distillation", 10, _train, needs_data=True),)

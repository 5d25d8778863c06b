"""The survey's rows without training: the teacher with the samplers of chapter 7."""

import pytest
import torch
from torch import nn

from benchmarks.survey.solvers import METHODS
from benchmarks.survey.task import Budget, Task
from dmd_tutorial import metrics
from dmd_tutorial.data import ring

RING = ring()


class Exact(nn.Module):
    """The mixture as a module, which counts the samples that pass through it."""

    def __init__(self):
        super().__init__()
        self.passes = 0

    def forward(self, x, sigma, label=None):
        self.passes += len(x)
        return RING(x, sigma)


def measure(samples, label):
    reference = RING.sample(4000, rng=torch.Generator().manual_seed(9))
    return metrics.sliced_wasserstein(samples, reference), 1.0


TASK = Task("exact ring", Exact(), (2,), 0, lambda count, rng: (RING.sample(count), None), measure)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_evaluations_are_what_the_table_says_and_nothing_is_trained(method):
    budget = Budget(1.0)
    z, _ = TASK.noise(400, torch.Generator().manual_seed(0))
    for evaluations, sampler in method.train(TASK, budget, 0).items():
        TASK.teacher.passes = 0
        x = sampler(z, None)
        assert TASK.teacher.passes == evaluations * len(z)
        assert torch.equal(x, sampler(z, None))
        distance, _ = TASK.measure(x, None)
        assert distance < (2 if evaluations == 1 else 0.6), (evaluations, distance)
    assert budget.spent == 0
    assert not method.trained
    assert not method.needs_data

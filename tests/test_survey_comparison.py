"""The survey's budget, its rows and its table."""

import json
from pathlib import Path

import pytest
import torch
import tyro
from torch import nn

from benchmarks.survey import __main__ as command
from benchmarks.survey import comparison, task
from benchmarks.survey.task import Budget, Method, Task
from dmd_tutorial.denoisers import EDMDenoiser
from dmd_tutorial.generators import OneStepGenerator
from dmd_tutorial.networks.mlp import MLP
from dmd_tutorial.samplers import one_step


@pytest.fixture
def small():
    """A task with an untrained teacher: cheap, and its distances are known."""
    teacher = EDMDenoiser(MLP(hidden=8)).requires_grad_(False)

    def draw(count, rng):
        return torch.randn(count, 2, generator=rng), None

    def measure(samples, label):
        return samples.square().mean().item(), 0.5

    return Task("ring", teacher, (2,), 0, draw, measure)


def test_a_forward_pass_counts_one_and_a_backward_pass_two_more(small):
    budget = Budget(1_000, small.teacher)
    x, sigma = torch.randn(8, 2), torch.ones(8)
    small.teacher(x, sigma)
    assert budget.spent == 8
    student = budget.watch(small.student())
    student(x, sigma)
    assert budget.spent == 8 + 24
    with torch.no_grad():
        student(x, sigma)
    assert budget.spent == 8 + 24 + 8
    small.teacher(x.requires_grad_(), sigma)  # what runs back through a frozen network costs too
    assert budget.left == 1_000 - 40 - 24


def test_networks_of_another_kind_count_by_their_operations(small):
    budget = Budget(1_000, small.teacher)
    x = torch.randn(4, 2)
    like_the_teacher = sum(m.weight.numel() for m in small.teacher.network.hidden)
    like_the_teacher += small.teacher.network.out.weight.numel()
    other = budget.watch(nn.Linear(2, 5 * like_the_teacher // 2), x)
    with torch.no_grad():
        other(x)
    assert budget.spent == pytest.approx(4 * 5, rel=0.01)
    with pytest.raises(ValueError, match="without a teacher"):
        Budget(1.0).watch(nn.Linear(2, 2), x)


def test_a_trial_step_is_not_charged(small):
    budget = Budget(1_000, small.teacher)
    student = budget.watch(small.student())
    steps = budget.affordable(lambda: student(torch.randn(5, 2), torch.ones(5)))
    assert (steps, budget.spent) == (66, 0)
    with pytest.raises(ValueError, match="no watched network"):
        budget.affordable(lambda: None)


def test_the_next_budget_counts_alone(small):
    first = Budget(100, small.teacher)
    first.close()
    assert small.student()._forward_hooks == {}
    second = Budget(100, small.teacher)
    small.teacher(torch.randn(3, 2), torch.ones(3))
    assert (first.spent, second.spent) == (0, 3)


def spends_it(small_task, budget, seed):
    """A method that trains nothing and uses its budget up."""
    student = budget.watch(small_task.student())
    with torch.no_grad():
        student(torch.randn(int(budget.left), 2), torch.ones(int(budget.left)))
    generator = OneStepGenerator(student, 2.0 + seed)
    return {1: lambda z, label: one_step(generator, z), 2: lambda z, label: z}


METHODS = (
    Method("spender", 9, spends_it, needs_pairs=True),
    Method("sampler", 7, lambda t, b, s: {4: lambda z, label: 0 * z}, trained=False),
)


@pytest.fixture
def surveyed(small, monkeypatch):
    monkeypatch.setattr(comparison, "METHODS", METHODS)
    monkeypatch.setattr(comparison, "TASKS", {"ring": lambda: small})


def test_a_survey_writes_a_row_for_each_sampler_and_goes_on_where_it_was(surveyed, tmp_path):
    path = tmp_path / "deep" / "survey.json"
    some = list(comparison.survey(path, ["ring"], [0], passes=50))
    assert [(r.method, r.evaluations, r.seed) for r in some] == [
        ("spender", 1, 0), ("spender", 2, 0), ("sampler", 4, 0),
    ]  # fmt: skip
    assert (some[0].passes, some[0].needs_pairs, some[2].distance) == (50, True, 0.0)
    assert some[1].distance == pytest.approx(1.0, abs=0.05)  # standard normal samples
    rest = list(comparison.survey(path, ["ring"], [0, 1], passes=50))
    assert [(r.method, r.seed) for r in rest] == [("spender", 1), ("spender", 1)]
    report = json.loads(path.read_text())
    assert len(report["rows"]) == 5
    assert report["budget"] == {"ring": 50}
    assert all(row["device"] == "cpu" and row["versions"] for row in report["rows"])


def test_the_table_gives_means_and_spreads(surveyed, tmp_path):
    path = tmp_path / "survey.json"
    list(comparison.survey(path, ["ring"], [0, 1], passes=50))
    rows = json.loads(path.read_text())["rows"]
    for row, distance in zip(rows, (0.1, 5.0, 12.3, 0.3, 5.0), strict=True):
        row["distance"] = distance
    lines = comparison.table(rows, "ring").splitlines()
    assert lines[2].startswith("| spender | 1 | 0.200 ± 0.141 | 0.500 ± 0.000 | no | yes | 0 |")
    assert lines[2].endswith("| 9 |")
    assert "| 5.00 ± 0.00 |" in lines[3]
    assert "| 12.3 | 0.500 |" in lines[4]
    assert comparison.table(rows, "digits").count("\n") == 1


def test_unknown_methods_are_named(surveyed, tmp_path):
    with pytest.raises(ValueError, match=r"unknown methods \['x'\]; there are \['spender'"):
        list(comparison.survey(tmp_path / "s.json", ["ring"], [0], only=["x"]))


def test_the_command_prints_the_table(surveyed, tmp_path, capsys):
    path = tmp_path / "survey.json"
    options = ["--tasks", "ring", "--seeds", "0", "--passes", "20", "--methods", "spender", "--out"]
    tyro.cli(command.main, args=[*options, str(path)])
    printed = capsys.readouterr().out
    assert "ring, spender, 2 evaluations, seed 0: distance" in printed
    assert "| spender | 1 |" in printed
    assert len(json.loads(path.read_text())["rows"]) == 2
    with pytest.raises(SystemExit):
        tyro.cli(command.main, args=["--tasks", "moon"])


def test_every_method_of_the_book_is_there_once():
    names = [method.name for method in comparison.METHODS]
    assert len(names) == len(set(names))
    chapters = {method.chapter for method in comparison.METHODS}
    assert chapters == {7, 8, 9, 10, 11}


def test_the_books_table_is_whole():
    """Each method on both tasks, each training three times, none beyond its budget by a step."""
    path = Path(__file__).parents[1] / "book" / "results" / "survey.json"
    recorded = json.loads(path.read_text())
    keys = ("task", "method", "evaluations", "seed")
    places = [tuple(row[key] for key in keys) for row in recorded["rows"]]
    assert len(places) == len(set(places))
    for on in comparison.TASKS:
        for method in comparison.METHODS:
            rows = [r for r in recorded["rows"] if (r["task"], r["method"]) == (on, method.name)]
            seeds = [0, 1, 2] if method.trained else [0]
            for evaluations in {row["evaluations"] for row in rows} or {None}:
                found = [row["seed"] for row in rows if row["evaluations"] == evaluations]
                assert sorted(found) == seeds, (on, method.name, evaluations)
            for row in rows:
                assert row["passes"] <= 1.02 * recorded["budget"][on], row
                assert 0 <= row["distance"] < 20
                assert 0 <= row["recall"] <= 1


def test_the_ring_s_teacher_samples_the_ring():
    on = task.ring()
    ten = on.pairs(10, torch.Generator().manual_seed(0)).y
    distance, _ = on.measure(ten.repeat(1000, 1), None)
    assert distance > 0.2  # ten points are no ring
    samples = comparison.measure(
        Method("teacher", 7, lambda t, b, s: {35: lambda z, label: task.sample(t.teacher, z)}),
        on, 0, 1e6,
    )  # fmt: skip
    assert samples[0].distance < 0.12
    assert samples[0].recall > 0.9

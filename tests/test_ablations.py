"""Ablations on digits: what is compared costs what it is said to, and the record is complete."""

import ast
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.ablations import LONGER, WORLDS, every, forwards, settings_of
from dmd_tutorial import data, pretrained
from dmd_tutorial.anchor import Pairs
from dmd_tutorial.notebook.exercises.chapter6 import EXERCISES
from dmd_tutorial.training import DistillationRun, DistillSettings, distill

ROOT = Path(__file__).parents[1]
RECORD = json.loads((ROOT / "book/results/digits-ablations.json").read_text())


@pytest.mark.parametrize("variant", every(WORLDS["recipe"]))
def test_forwards_are_those_of_a_real_training(variant):
    """Every call of a network counts its images, three times where a gradient is wanted."""
    settings = replace(settings_of(variant, WORLDS["recipe"], 1), steps=2)
    teacher, calls = pretrained.load("digits-teacher"), Counter()

    def count(module, inputs, output):
        calls["all"] += len(inputs[0]) * (3 if output.requires_grad else 1)

    run = DistillationRun(teacher, settings)
    for model in (run.teacher, run.critic, run.generator.denoiser):
        model.network.register_forward_hook(count)
    z = data.normal(200, (1, 8, 8), torch.Generator().manual_seed(0))
    pairs = Pairs(z, z, data.balanced_labels(200, 10))
    assert len(list(distill(run, (1, 8, 8), 10, pairs))) == 2
    assert calls["all"] == forwards(settings)


def test_forwards_agree_with_the_exercise():
    (exercise,) = [exercise for exercise in EXERCISES if exercise.number == "6.4"]
    for critic_steps in (1, 2, 5):
        settings = DistillSettings(steps=1, batch=64, batch_pairs=64, critic_steps=critic_steps)
        assert forwards(settings) == 64 * exercise.truth(critic_steps)


@pytest.mark.parametrize("name", WORLDS)
def test_regression_that_goes_on_costs_what_it_is_compared_with(name):
    world = WORLDS[name]
    full = forwards(settings_of("full", world, 1))
    on = settings_of("regression on, equal cost", world, 1)
    assert abs(forwards(on) - full) <= forwards(replace(on, steps=1))
    assert on.learning_rate == world.warm_start.learning_rate  # at its own rate
    if world.long:
        longer, on = (forwards(settings_of(variant, world, 1)) for variant in LONGER)
        assert longer == pytest.approx(on, rel=1e-3)


def test_the_world_of_the_chapter_is_the_chapters_run():
    """The settings that chapter 6 trains with are those whose ablations it shows."""
    cells = json.loads((ROOT / "book/6-full-distillation.ipynb").read_text())["cells"]
    names = {"DistillSettings": DistillSettings}
    for cell in cells:
        text = "".join(cell["source"])
        if cell["cell_type"] != "code" or "%pip" in text:
            continue
        for node in ast.parse(text).body:
            wanted = isinstance(node, ast.Assign) and ast.unparse(node.targets[0])
            if wanted in ("PAIRS", "SMALL", "warm", "settings"):
                exec(ast.unparse(node), names)  # nothing but constants and DistillSettings
    world = WORLDS["chapter"]
    assert names["PAIRS"] == world.pairs
    assert names["warm"] == world.warm_start
    assert names["settings"] == world.distill


@pytest.mark.parametrize("name", WORLDS)
def test_the_record_is_of_these_settings(name):
    """Every training has every variant, at the iterations and the cost of the code."""
    world, seen = WORLDS[name], Counter()
    for row in RECORD["rows"]:
        if row["world"] == name:
            settings = settings_of(row["variant"], world, row["seed"])
            assert row["iterations"] == settings.steps
            assert row["forwards"] == forwards(settings)
            assert len(row["measured"]) == 3
            seen[row["variant"]] += 1
    noises = [m["noise"] for row in RECORD["rows"] if row["variant"] == "start"
              and row["world"] == name for m in row["measured"]]  # fmt: skip
    assert len(set(noises)) == len(noises)  # no two trainings are measured on the same noise
    assert seen == dict.fromkeys(every(world), len(world.seeds))

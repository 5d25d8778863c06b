"""Presets: the paper's are the paper's, the others can be built."""

import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cards import CARDS, forward_flop, minutes
from benchmarks.classifier import train_classifier
from benchmarks.own_images import copies
from benchmarks.plan import evaluations
from dmd_tutorial import pretrained
from dmd_tutorial.data import digits
from dmd_tutorial.runs.memory import GIB, largest, teacher_memory
from dmd_tutorial.runs.presets import OWN_IMAGES, PAPER, PRESETS
from dmd_tutorial.survey.score_distillation import dmd2

RESULTS = Path(__file__).parents[1] / "book" / "results"

# Yin et al. 2024, appendix: iterations, batch, rate, lambda_reg, pairs, Heun steps behind each
PAPERS = {
    "cifar10-cond": (300_000, 392, 5e-5, 0.25, 100_000, 18),
    "cifar10-uncond": (300_000, 392, 5e-5, 0.5, 500_000, 18),
    "imagenet64": (350_000, 336, 2e-6, 0.25, 25_000, 256),
}


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_settings(name):
    preset = PRESETS[name]
    steps, batch, rate, lambda_reg, pairs, pair_steps = PAPERS[name]
    settings = preset.distill
    assert (settings.steps, settings.batch, settings.batch_pairs) == (steps, batch, batch)
    assert settings.learning_rate == settings.critic_learning_rate == rate
    assert (settings.lambda_reg, preset.pairs, preset.pair_steps) == (lambda_reg, pairs, pair_steps)
    assert preset.warm_start is None
    for paper in (settings, PAPER):
        assert (paper.warm_up, paper.weight_decay, paper.clip) == (500, 0.01, 10.0)
        assert (paper.weighting, paper.distance, paper.grid_max) == ("eq8", "lpips", 80.0)
        assert (paper.critic_steps, paper.decay, paper.matching) == (1, 0.0, True)
    assert preset.published.startswith("edm-")


@pytest.mark.parametrize("name", [n for n, p in PRESETS.items() if not p.published])
def test_a_teacher_that_is_trained_here_denoises_its_images_and_depends_on_its_seed(name):
    preset = PRESETS[name]
    teacher, again = preset.new_teacher(), preset.new_teacher()
    x = torch.randn(2, *preset.shape)
    label = torch.zeros(2, dtype=torch.int64) if preset.classes else None
    with torch.no_grad():
        D = teacher(x, torch.tensor([0.002, 80.0]), label)
        assert D.shape == x.shape
        assert torch.equal(D, again(x, torch.tensor([0.002, 80.0]), label)) or teacher.training


def test_the_small_teacher_has_about_7_million_parameters():
    teacher = PRESETS["cifar10-small"].new_teacher()
    assert sum(p.numel() for p in teacher.parameters()) == pytest.approx(7e6, rel=0.03)


@pytest.mark.parametrize("name", ["cifar10-small", "cifar10-small-t4"])
def test_the_cost_of_a_small_preset_is_what_is_counted(name):
    """Of the road that `dmd` goes: teacher, pairs, regression, distillation."""
    preset = PRESETS[name]
    images = 3 * preset.teacher.steps * preset.teacher.batch
    images += (2 * preset.pair_steps - 1) * preset.pairs
    for settings in (preset.warm_start, preset.distill):
        images += settings.steps * evaluations(settings)
    pflop = images * forward_flop(preset.new_teacher()) / 1e15
    said = re.findall(r"(\d+)( minutes| hours)? on an? (\w+)", preset.cost)
    assert said
    for number, unit, card in said:
        counted = minutes(pflop, CARDS[card])
        assert int(number) == round(counted / 60 if "hours" in unit else counted), card
    assert preset.cost.endswith("counted, not measured")


@pytest.mark.parametrize("name", PRESETS)
def test_a_cost_says_whether_it_was_measured_or_counted(name):
    cost = PRESETS[name].cost
    assert re.search(": (measured|counted, not measured)$", cost) or ": measured; " in cost


@pytest.mark.parametrize(("name", "gflop"), [("cifar10-cond", 42.4), ("imagenet64", 219)])
def test_the_cost_of_the_papers_settings_is_eleven_evaluations_an_image(name, gflop):
    """At 100 to 200 TFLOP a second; pairs and the perceptual distance, a fifth more, are left."""
    settings, cost = PRESETS[name].distill, PRESETS[name].cost
    fast, slow, tflop = map(int, re.findall(r"\d+", cost))
    assert tflop == round(evaluations(settings) * gflop / 1000)
    hours = [settings.steps * tflop / rate / 3600 for rate in (200, 100)]
    assert [fast, slow] == pytest.approx(hours, rel=0.25)
    assert fast <= slow / 2 <= 1.01 * fast


def test_the_measured_cost_of_digits_is_what_their_networks_took():
    student, teacher = (pretrained.made_by(f"digits-{name}") for name in ("student", "teacher"))
    seconds = teacher["seconds"]
    seconds += sum(student[n] for n in ("seconds", "pairs_seconds", "warm_start_seconds"))
    assert PRESETS["digits"].cost.startswith(f"{round(seconds / 60, -1):.0f} minutes on one core")
    assert 0.4 < student["warm_start_seconds"] / seconds < 0.6


def test_a_t4_does_the_small_preset_without_bfloat16_in_13_gib():
    small, preset = PRESETS["cifar10-small"], PRESETS["cifar10-small-t4"]
    compute = preset.compute
    assert replace(preset, compute=small.compute, cost=small.cost) == small
    assert (compute.mixed_precision, compute.frozen, compute.compile) == ("fp16", "fp16", False)
    values = math.prod(preset.shape)
    on_device = 2 * 4 * values * preset.pairs + values * 50_000  # pairs, and images as levels
    teacher = preset.new_teacher()
    stages = [preset.warm_start, preset.distill, dmd2(preset.distill)]
    training = largest(teacher, stages, compute).total
    assert training + on_device < 13 * GIB
    assert teacher_memory(teacher, preset.teacher.batch, compute).total + on_device < 13 * GIB


@pytest.mark.parametrize("name", PRESETS)
def test_batches_can_be_cut_into_the_parts_of_gradient_accumulation(name):
    preset = PRESETS[name]
    for settings in (preset.warm_start, preset.distill):
        if settings is not None:
            assert settings.batch % preset.compute.accumulation == 0
            assert settings.batch_pairs % preset.compute.accumulation == 0


def test_what_has_a_seed_of_its_own_leaves_a_gpu_s_numbers_as_they_are(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    PRESETS["digits"].new_teacher()
    train_classifier(digits(), steps=1)
    assert seeded == []


def test_the_road_with_own_images_takes_about_an_hour_on_one_core():
    """A core does about 80 GFLOP a second in this network: 0.3 PFLOP are an hour."""
    preset = OWN_IMAGES
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        preset.new_teacher()(torch.randn(1, *preset.shape), torch.ones(1))
    images = 3 * preset.teacher.steps * preset.teacher.batch
    images += (2 * preset.pair_steps - 1) * preset.pairs
    for settings in (preset.warm_start, preset.distill):
        images += settings.steps * evaluations(settings)
    assert counter.get_total_flops() * images < 0.3e15


def test_what_is_recorded_of_own_images_was_made_with_the_preset():
    recorded = json.loads((RESULTS / "own-images.json").read_text())
    now = json.loads(json.dumps(asdict(OWN_IMAGES)))
    for stage in ("network_options", "teacher", "warm_start", "distill"):
        assert recorded["settings"][stage].items() <= now[stage].items()
    for value in ("pairs", "pair_steps"):
        assert recorded["settings"][value] == now[value]


def test_a_copy_is_much_nearer_to_one_image_of_the_training_than_to_others():
    images = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    mirrored, between = images[:4].flip(-1) + 0.01, (images[4:8] + images[8:12]) / 2
    assert copies(mirrored, images) == (pytest.approx(0.01, rel=1e-3), 1.0)
    assert copies(between, images)[1] == 0.0
    assert copies(torch.cat([mirrored, between]), images)[1] == 0.5

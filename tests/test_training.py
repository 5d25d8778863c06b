"""Training loops: averages, rates, checkpoints, and a process that is killed."""

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from dmd_tutorial.anchor import Pairs
from dmd_tutorial.checks import NO_CLASS, NotFiniteError
from dmd_tutorial.data import Images, digits
from dmd_tutorial.denoisers import EDMDenoiser, denoising_loss
from dmd_tutorial.dmd import update_whole
from dmd_tutorial.files import replace_file
from dmd_tutorial.networks import MLP, UNet
from dmd_tutorial.runs.checkpoints import load_checkpoint, save_checkpoint
from dmd_tutorial.training import (
    DistillationRun,
    DistillSettings,
    FitRun,
    FitSettings,
    TeacherSettings,
    averaged,
    distill,
    draw_images,
    fit,
    rate_factor,
    train_teacher,
)

TEACHER = TeacherSettings(steps=12, batch=8, warm_up=3)
DISTILL = DistillSettings(
    steps=12, batch=4, batch_pairs=4, warm_up=3, critic_steps=2, lambda_reg=1.0, grid_max=5.0
)


NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def small_teacher(seed: int = 0) -> EDMDenoiser:
    torch.manual_seed(seed)
    return EDMDenoiser(UNet(width=8, embedding=16))


def small_pairs() -> Pairs:
    rng = torch.Generator().manual_seed(0)
    z, y = torch.randn(2, 40, 1, 8, 8, generator=rng)
    return Pairs(z, y, torch.arange(40) % 10)


def finish(run, loop) -> dict:
    for _ in loop:
        pass
    return run.state_dict()


def same(one: object, other: object) -> bool:
    """Equal to the last bit, all the way down."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def teacher_run():
    run = FitRun(small_teacher(), TEACHER)
    return run, train_teacher(run, digits())


def distillation_run():
    run = DistillationRun(small_teacher(), DISTILL)
    return run, distill(run, (1, 8, 8), 10, small_pairs())


class Plain(nn.Module):
    """A reader's own network for points, with layers between its two."""

    def __init__(self, *between: nn.Module, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, width), *between, nn.Linear(width, 2))

    def forward(self, x, c_noise, label=None):
        return self.layers(x)


def dropping_run(seed: int = 0, device: str = "cpu"):
    torch.manual_seed(0)
    network = EDMDenoiser(Plain(nn.Dropout(0.5), nn.AlphaDropout(0.3))).to(device)
    run = FitRun(network, replace(TEACHER, seed=seed))
    images = Images(torch.arange(40.0).reshape(20, 2) / 40, torch.zeros(20, dtype=torch.int64), 0)
    return run, train_teacher(run, images)


@pytest.mark.parametrize("make", [teacher_run, distillation_run, dropping_run])
def test_a_run_that_is_saved_and_loaded_goes_on_to_the_same_bits(make, tmp_path):
    straight = finish(*make())
    run, loop = make()
    for _ in range(5):
        next(loop)
    save_checkpoint(run.state_dict(), {"a": 1}, tmp_path / "run.ckpt")
    torch.manual_seed(99)  # what else happens in the process must not matter
    run, loop = make()
    run.load_state_dict(load_checkpoint(tmp_path / "run.ckpt", {"a": 1})[0])
    assert run.step == 5
    assert same(finish(run, loop), straight)


@pytest.mark.parametrize("make", [teacher_run, distillation_run])
def test_another_seed_is_another_run(make):
    run, loop = make()
    first = finish(run, loop)
    run, loop = make()
    run.rng.manual_seed(1)
    assert not same(finish(run, loop), first)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_dropouts_masks_belong_to_the_run_and_the_callers_numbers_to_the_caller(device):
    run, loop = dropping_run(device=device)
    straight = finish(run, loop)
    run, loop = dropping_run(device=device)
    torch.manual_seed(99)
    expected = torch.cat([torch.rand(3, device=device) for _ in range(TEACHER.steps)])
    torch.manual_seed(99)
    found = [torch.rand(3, device=device) for _ in loop]
    assert torch.equal(torch.cat(found), expected)
    assert same(run.state_dict(), straight)


def test_dropouts_masks_differ_between_steps_seeds_and_processes():
    """Seen as the gradient's zeros: a value that is dropped moves no weight behind it."""

    def loss(network, x):
        return network.layers[1](network.layers[0](x)).square().mean()

    def draw(_):
        return (torch.ones(1, 2),)

    drawn = []
    for seed, rank in ((0, 0), (0, 0), (1, 0), (0, 1)):
        torch.manual_seed(0)
        run = FitRun(Plain(nn.Dropout(0.5)), replace(TEACHER, steps=3, seed=seed))
        run.rank = rank
        bias = run.network.layers[0].bias
        drawn.append([tuple((bias.grad == 0).tolist()) for _ in fit(run, draw, loss)])
    assert drawn[0] == drawn[1]
    assert len({mask for masks in drawn for mask in masks}) == 9


def test_a_distillation_drops_nothing_whatever_the_kind_of_dropout():
    class LabelDropout(nn.Module):
        """As the published networks' own code does it: a share of labels is hidden."""

        label_dropout = 0.0

        def __init__(self) -> None:
            super().__init__()
            self.label_dropout = 0.5

        def forward(self, x):
            return x * (torch.rand(len(x), 1) >= self.label_dropout)

    kinds = [nn.Dropout(0.5), nn.AlphaDropout(0.5), nn.FeatureAlphaDropout(0.5), LabelDropout()]
    flat = [nn.Unflatten(1, (4, 2, 2)), nn.Dropout2d(0.5), nn.Flatten()]
    run = DistillationRun(EDMDenoiser(Plain(*kinds, *flat)), replace(DISTILL, lambda_reg=0.0))
    x, sigma = torch.randn(64, 2), torch.ones(64)
    for network in (run.generator.denoiser, run.critic):
        assert network.training
        assert torch.equal(network(x, sigma), network(x, sigma))


# --- what is not finite -----------------------------------------------------------------------


def diverging_run(break_at: int):
    """A run whose loss is NaN at one step."""
    torch.manual_seed(0)
    run = FitRun(Plain(), replace(TEACHER, steps=6))

    def draw(_):
        return (torch.full((4, 2), math.nan if run.step + 1 == break_at else 1.0),)

    return run, fit(run, draw, lambda network, x: network.layers(x).square().mean())


def test_a_loss_that_is_not_finite_is_refused_before_the_step_and_named_with_it():
    run, loop = diverging_run(break_at=4)
    for _ in range(3):
        next(loop)
    before = {name: t.clone() for name, t in run.network.state_dict().items()}
    with pytest.raises(NotFiniteError, match="step 4: the loss is not finite"):
        next(loop)
    assert same(dict(run.network.state_dict()), before)
    assert run.step == 3


def test_weights_that_are_not_finite_are_in_no_state():
    run, loop = diverging_run(break_at=0)
    next(loop)
    run.network.layers[0].weight.data[0, 0] = math.inf
    with pytest.raises(NotFiniteError, match=r"network.layers.0.weight after step 1 is not finite"):
        run.state_dict()


@pytest.mark.slow
def test_a_process_that_is_killed_continues_as_if_nothing_had_been(tmp_path):
    """SIGKILL in the middle of `dmd train-teacher`, then the same command again."""
    command = [
        sys.executable, "-m", "dmd_tutorial", "train-teacher", "--steps", "60", "--batch", "8",
        "--checkpoint-minutes", "0",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(folder):
        return subprocess.Popen([*command, "--out", str(folder)], env=environment)

    assert start(tmp_path / "straight").wait() == 0
    process = start(tmp_path / "killed")
    checkpoint = tmp_path / "killed" / "teacher.ckpt"
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    stopped = torch.load(checkpoint, weights_only=True)["state"]
    assert 0 < stopped["step"] < 60
    assert start(tmp_path / "killed").wait() == 0
    states = [
        torch.load(tmp_path / name / "teacher.ckpt", weights_only=True)["state"]
        for name in ("straight", "killed")
    ]
    assert states[0]["step"] == 60
    assert same(*states)


def test_teacher_learns():
    settings = TeacherSettings(steps=200, batch=32, warm_up=5, learning_rate=5e-3)
    run = FitRun(small_teacher(), settings)
    losses = [m.loss for m in train_teacher(run, digits())]
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])


def test_regression_learns_its_pairs():
    settings = replace(DISTILL, steps=150, matching=False, learning_rate=3e-3, batch_pairs=40)
    run = DistillationRun(small_teacher(), settings)
    losses = [m.loss for m in distill(run, (1, 8, 8), 10, small_pairs())]
    assert losses[-1] < 0.9 * losses[0]


def test_teacher_stays_frozen_and_generator_starts_as_its_copy():
    teacher = small_teacher()
    before = {name: t.clone() for name, t in teacher.state_dict().items()}
    run = DistillationRun(teacher, DISTILL)
    assert same(dict(run.generator.denoiser.state_dict()), before)
    finish(run, distill(run, (1, 8, 8), 10, small_pairs()))
    assert same(dict(teacher.state_dict()), before)
    assert not same(dict(run.critic.state_dict()), before)


def test_points_without_classes_go_through_the_same_loop():
    run = DistillationRun(EDMDenoiser(MLP()), replace(DISTILL, lambda_reg=0.0))
    metric = next(distill(run, (2,), 0))
    assert metric.record.x.shape == (4, 2)
    images = Images(torch.randn(20, 2), torch.zeros(20, dtype=torch.int64), classes=0)
    assert math.isfinite(next(train_teacher(FitRun(EDMDenoiser(MLP()), TEACHER), images)).loss)


def test_the_perceptual_distance_is_not_loaded_where_no_anchor_counts(monkeypatch):
    monkeypatch.setattr("dmd_tutorial.training.LPIPS", None)
    objective = replace(DISTILL, distance="lpips", lambda_reg=0.0).objective()
    assert objective.lambda_reg == 0


# --- rates and averages -----------------------------------------------------------------------


def test_rate_rises_stays_and_falls_to_nothing():
    factors = [rate_factor(step, 100, 10, 0.5) for step in range(100)]
    assert factors[0] == 0.1
    assert factors[9:51] == [1.0] * 42
    assert (torch.tensor(factors[50:]).diff() < 0).all()
    assert factors[-1] < 0.01


def test_average_is_the_average_of_the_weights_it_has_seen():
    """With a constant decay d, the average of w_1.. is sum (1-d) d^(n-k) w_k + d^n w_0."""
    module = torch.nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(2.0)
    ema, expected = averaged(module, 0.5), 2.0
    ema.n_averaged.fill_(100)  # past the warm-up of the decay
    for _ in range(5):
        module.weight.data.add_(1.0)
        ema.update_parameters(module)
        expected = 0.5 * expected + 0.5 * module.weight.item()
    assert ema.module.weight.item() == pytest.approx(expected)


def test_average_is_the_written_out_formula_to_the_bit():
    """Average += (1 - keep) (weights - average), and keep rises from 1/10 to the decay."""
    run, loop = teacher_run()
    expected = {name: p.clone() for name, p in run.network.named_parameters()}
    for metric in loop:
        keep = min(TEACHER.ema, metric.step / (9 + metric.step))
        for name, value in run.network.named_parameters():
            expected[name].lerp_(value.detach(), 1 - keep)
    assert same(dict(run.average.named_parameters()), expected)
    assert not same(dict(run.network.named_parameters()), expected)


def test_an_average_keeps_what_a_batch_norm_has_counted():
    """Its mean and variance belong to the averaged weights; what only counts is copied."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.Linear(16, 1))
    run = FitRun(network, FitSettings(steps=60, warm_up=1, learning_rate=0.05, ema=0.9))
    expected = network[1].running_mean.clone()
    x = torch.randn(256, 2) + torch.tensor([3.0, 0.0])

    def loss(network, x):
        return (network(x)[:, 0] - x[:, 0] * x[:, 1]).square().mean()

    for metric in fit(run, lambda rng: (x[torch.randint(256, (64,), generator=rng)],), loss):
        keep = min(0.9, metric.step / (9 + metric.step))
        expected.lerp_(network[1].running_mean, 1 - keep)
    assert torch.equal(run.average[1].running_mean, expected)
    assert run.average[1].num_batches_tracked == network[1].num_batches_tracked == 60
    with torch.no_grad():
        assert loss(run.average, x) < 1.1 * loss(run.network.eval(), x)
    network.register_buffer("mask", torch.full((2,), -math.inf))  # has no average
    average = averaged(network, 0.9)
    average.update_parameters(network)
    assert torch.equal(average.module.mask, network.mask)


def test_average_forgets_its_start_quickly():
    module = torch.nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(0.0)
    ema = averaged(module, 0.999)
    module.weight.data.fill_(1.0)
    for _ in range(20):
        ema.update_parameters(module)
    assert ema.module.weight.item() > 0.99


# --- images without their label ---------------------------------------------------------------


def label_run(no_label: float) -> tuple[FitRun, torch.Tensor, dict]:
    """A few steps: the run, the labels of its last batch, and the weights it started from."""
    settings = replace(TEACHER, no_label=no_label, steps=4, batch=64)
    teacher = small_teacher()
    torch.nn.init.normal_(teacher.network.last.weight, std=0.1)  # at 0 nothing behind it learns
    before = {name: t.clone() for name, t in teacher.state_dict().items()}
    run = FitRun(teacher, settings)
    labels = []

    def watched(optimizer, loss, batch, clip):
        labels.append(batch[3])
        return update_whole(optimizer, loss, batch, clip)

    for _ in train_teacher(run, digits(), watched):
        pass
    return run, torch.cat(labels), before


def test_images_without_their_label_teach_nothing_of_labels_and_others_do():
    for no_label, least, most in ((0.0, 0.0, 0.0), (0.5, 0.4, 0.6), (1.0, 1.0, 1.0)):
        run, label, before = label_run(no_label)
        assert least <= (label == NO_CLASS).float().mean() <= most
        assert label.max() == (9 if no_label < 1 else NO_CLASS)
        moved = {name for name, t in run.network.state_dict().items() if (t != before[name]).any()}
        of_labels = {name for name in before if "label" in name or "class" in name}
        assert of_labels
        assert (of_labels <= moved) == (no_label < 1)
        assert moved.isdisjoint(of_labels) == (no_label == 1)
        assert moved - of_labels


def test_the_answer_without_label_is_learnt_from_images_that_are_shown_without():
    """Trained only with labels, a network is asked for an answer that nobody taught it."""

    def loss_without_label(no_label: float) -> float:
        settings = TeacherSettings(
            steps=300, batch=32, warm_up=5, learning_rate=5e-3, no_label=no_label
        )
        run = FitRun(small_teacher(), settings)
        for _ in train_teacher(run, digits()):
            pass
        x, rng = digits().x[:500], torch.Generator().manual_seed(1)
        sigma, noise = torch.full((500,), 2.0), torch.randn(x.shape, generator=rng)
        with torch.no_grad():
            return denoising_loss(run.average, x, sigma, noise).item()

    assert loss_without_label(0.5) < loss_without_label(0.0)


def test_hiding_labels_leaves_all_other_random_numbers_of_a_step_as_they_were():
    shown, hidden = (
        draw_images(FitRun(small_teacher(), replace(TEACHER, no_label=p)), digits())
        for p in (0.0, 1.0)
    )
    for one, other in zip(shown[:3], hidden[:3], strict=True):  # x, sigma, noise
        assert torch.equal(one, other)
    assert (shown[3] >= 0).all()
    with pytest.raises(ValueError, match="fitted with TeacherSettings, not FitSettings"):
        draw_images(FitRun(small_teacher(), FitSettings()), digits())


# --- checkpoints ------------------------------------------------------------------------------


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(tmp_path, monkeypatch):
    path = tmp_path / "run.ckpt"
    replace_file(path, partial(torch.save, {"good": 1}))

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, partial(torch.save, {"bad": 2}))
    assert torch.load(path, weights_only=True) == {"good": 1}
    assert list(tmp_path.iterdir()) == [path]  # no half-written file is left


def test_checkpoints_of_other_runs_and_damaged_ones_are_refused(tmp_path):
    run, _ = teacher_run()
    path = tmp_path / "run.ckpt"
    save_checkpoint(run.state_dict(), {"settings": {"steps": 12}}, path)
    with pytest.raises(ValueError, match=r"of another run \(steps: 12 -> 13\)"):
        load_checkpoint(path, {"settings": {"steps": 13}})
    with pytest.raises(ValueError, match="this run wants"):
        distillation_run()[0].load_state_dict(load_checkpoint(path, {})[0])
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_checkpoint(path, {})
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "none.ckpt", {})


def test_an_average_with_decay_1_is_refused():
    with pytest.raises(ValueError, match=r"in \[0, 1\), not 1"):
        averaged(torch.nn.Linear(1, 1), 1.0)

"""Precision, parts, recomputation, several processes: the same step, computed otherwise."""

import copy
import math

import pytest
import torch
from torch import nn

from dmd_tutorial import dmd
from dmd_tutorial.anchor import Pairs
from dmd_tutorial.data import digits
from dmd_tutorial.denoisers import EDMDenoiser
from dmd_tutorial.edm.networks import EDMPrecond
from dmd_tutorial.networks import UNet
from dmd_tutorial.runs.compute import Compute, Processes, Stepper, prepare, split
from dmd_tutorial.training import (
    DistillationRun,
    DistillSettings,
    TeacherRun,
    TeacherSettings,
    distill,
    draw_batch,
    iteration_in_parts,
    train_teacher,
)

SETTINGS = DistillSettings(
    steps=3, batch=8, batch_pairs=4, warm_up=1, critic_steps=2, learning_rate=1e-3
)


def small_teacher(seed: int = 0) -> EDMDenoiser:
    torch.manual_seed(seed)
    teacher = EDMDenoiser(UNet(width=8, embedding=16))
    nn.init.normal_(teacher.network.last.weight, std=0.1)  # it starts at zero
    return teacher


def pairs() -> Pairs:
    rng = torch.Generator().manual_seed(0)
    z, y = torch.randn(2, 40, 1, 8, 8, generator=rng)
    return Pairs(z, y, torch.arange(40) % 10)


def distilled(compute: Compute, settings: DistillSettings = SETTINGS) -> tuple[list, dict]:
    run = DistillationRun(small_teacher(), settings, compute=compute)
    records = [m.record for m in distill(run, (1, 8, 8), 10, pairs())]
    return records, {**run.generator.state_dict(), **run.critic.state_dict()}


def largest_difference(one: dict, other: dict) -> float:
    return max(float((one[k] - other[k]).abs().max()) for k in one)


# --- parts --------------------------------------------------------------------------------------


def test_one_part_through_the_long_way_is_the_plain_iteration_to_the_bit(monkeypatch):
    records, weights = distilled(Compute())
    monkeypatch.setattr(DistillationRun, "plain", False)
    again, others = distilled(Compute())
    assert largest_difference(weights, others) == 0.0
    for one, other in zip(records, again, strict=True):
        assert torch.equal(one.x, other.x)
        assert torch.equal(one.denoised_fake, other.denoised_fake)
        assert other[4:] == pytest.approx(one[4:], rel=1e-6)


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_give_the_gradients_of_the_whole_batch(parts):
    """Without the optimiser's square root, which enlarges rounding where a gradient is almost 0."""

    def gradients(compute: Compute) -> tuple[dmd.Record, list]:
        run = DistillationRun(small_teacher(), SETTINGS, compute=compute)
        for name in ("generator_optimizer", "critic_optimizer"):
            parameters = getattr(run, name).param_groups[0]["params"]
            optimizer = torch.optim.SGD(parameters, lr=0.0)
            stepper = Stepper(optimizer, compute, run.processes)
            setattr(run, name, optimizer)
            setattr(run, name.replace("optimizer", "stepper"), stepper)
        batch = draw_batch(run, (1, 8, 8), 10, pairs())
        record = iteration_in_parts(run, batch, run.objective())
        networks = (run.generator, run.critic)
        return record, [p.grad for network in networks for p in network.parameters()]

    whole, expected = gradients(Compute())
    record, found = gradients(Compute(parts=parts))
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)
    assert record.x.shape == whole.x.shape
    assert record.norm_generator == pytest.approx(whole.norm_generator, rel=1e-5)
    assert record.loss_critic == pytest.approx(whole.loss_critic, rel=1e-5)


def test_a_teacher_learns_the_same_in_parts():
    settings = TeacherSettings(steps=3, batch=8, warm_up=1, flip=True)
    losses = []
    for parts in (1, 4):
        run = TeacherRun(small_teacher(), settings, Compute(parts=parts))
        losses.append([m.loss for m in train_teacher(run, digits())])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_what_cannot_be_cut_equally_is_refused():
    with pytest.raises(
        ValueError, match="batch of 8 cannot be cut into 3 equal parts for each of 1"
    ):
        distilled(Compute(parts=3))
    with pytest.raises(ValueError, match="1 part or more, not 0"):
        Compute(parts=0)
    with pytest.raises(ValueError, match=r"one of .*, not 'float16'"):
        Compute(precision="float16")


def test_processes_together_hold_every_sample_once():
    class Rank(Processes):
        def __init__(self, rank: int) -> None:
            self.rank, self.count, self.device = rank, 2, None

    batch = dmd.Batch(torch.arange(12.0), label=torch.arange(12), y_ref=torch.arange(24.0))
    for column, count in (("z", 12), ("label", 12), ("y_ref", 24)):
        seen = [
            value
            for rank in range(2)
            for part in split(batch, 3, Rank(rank))
            for value in getattr(part, column).tolist()
        ]
        assert sorted(seen) == list(range(count))


# --- precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "band"), [("bf16", 0.03), ("fp16", 0.004)])
def test_low_precision_stays_near_fp32_over_all_noise_levels(precision, band):
    """The band is on D in units of its own spread; fp16 has 10 bits, bf16 has 7."""
    teacher = small_teacher()
    lower = prepare(copy.deepcopy(teacher), Compute(precision=precision))
    frozen = prepare(copy.deepcopy(teacher), Compute(frozen=precision), frozen=True)
    assert frozen.network.first.weight.dtype != torch.float32
    assert frozen.network.last_norm.weight.dtype == torch.float32
    sigma = torch.logspace(math.log10(0.002), math.log10(80), 64)
    noise = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    x = digits().x[:64] + sigma[:, None, None, None] * noise
    with torch.no_grad():
        exact = teacher(x, sigma)
        for network in (lower, frozen):
            D = network(x, sigma)
            assert D.dtype == torch.float32
            assert D.isfinite().all()
            assert ((D - exact).std() / exact.std()) < band
            assert not torch.equal(D, exact)  # it was computed otherwise


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_in_low_precision_follows_the_run_in_full(precision):
    exact, weights = distilled(Compute())
    lower, other = distilled(Compute(precision=precision, frozen=precision))
    for one, two in zip(lower, exact, strict=True):
        assert one.loss_critic == pytest.approx(two.loss_critic, rel=0.05)
        assert one.norm_critic == pytest.approx(two.norm_critic, rel=0.1)
    assert largest_difference(weights, other) < 3 * 3 * 1e-3  # three steps of Adam, signs at worst
    assert all(value.dtype == torch.float32 for value in other.values())


def test_an_overflow_skips_the_step_and_halves_the_scale():
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    stepper = Stepper(optimizer, Compute(precision="fp16"), Processes())
    before = stepper.scaler.get_scale()
    norm = stepper([weight.sum() * 3e38], 1.0)
    assert not math.isfinite(norm)
    assert torch.equal(weight.detach(), torch.ones(3))
    assert stepper.scaler.get_scale() == before / 2
    assert stepper([weight.sum()], 10.0) == pytest.approx(math.sqrt(3))
    assert not torch.equal(weight.detach(), torch.ones(3))
    again = Stepper(optimizer, Compute(precision="fp16"), Processes())
    again.load_state_dict(stepper.state_dict())
    assert again.scaler.get_scale() == before / 2


def test_small_gradients_survive_fp16_because_the_loss_is_scaled():
    """2e-8 is below fp16's smallest number, and so is every gradient inside without a scale."""

    def gradient(precision: str) -> float:
        layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
        optimizer = torch.optim.SGD(layers.parameters(), lr=0.0)
        with torch.autocast("cpu", torch.float16):
            loss = (layers(torch.ones(8, 4)).float() * 2e-8).sum()
        return Stepper(optimizer, Compute(precision=precision), Processes())([loss], 1.0)

    torch.manual_seed(0)
    assert gradient("fp32") == 0.0
    torch.manual_seed(0)
    assert gradient("fp16") > 1e-8


# --- memory -------------------------------------------------------------------------------------


def saved_bytes(network: EDMDenoiser) -> tuple[int, torch.Tensor]:
    """Bytes that a forward pass keeps for the backward pass, and the gradient it gives."""
    sizes: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = digits().x[:16]
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        D = network(x, torch.ones(16))
    kept = sum(sizes.values())
    D.square().mean().backward()
    return kept, torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


def test_recomputing_keeps_less_and_gives_the_same_gradient():
    plain, expected = saved_bytes(small_teacher())
    less, found = saved_bytes(prepare(small_teacher(), Compute(recompute=True)))
    assert less < 0.6 * plain
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_a_published_architecture_goes_through_the_same_loop_without_dropout():
    torch.manual_seed(0)
    teacher = EDMPrecond(
        8,
        1,
        label_dim=10,
        model_type="SongUNet",
        model_channels=16,
        channel_mult=[1, 2],
        num_blocks=1,
        attn_resolutions=[4],
        dropout=0.9,
    )
    compute = Compute(precision="bf16", frozen="bf16", parts=2, recompute=True)
    run = DistillationRun(teacher, SETTINGS, compute=compute)
    for metric in distill(run, (1, 8, 8), 10, pairs()):
        assert math.isfinite(metric.loss)
    z, label = torch.randn(4, 1, 8, 8), torch.arange(4)
    assert torch.equal(run.generator(z, label), run.generator(z, label))  # in training mode
    assert run.critic.training
    assert run.teacher.model.map_layer0.weight.dtype == torch.bfloat16
    assert run.generator.denoiser.model.map_layer0.weight.dtype == torch.float32

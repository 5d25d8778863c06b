"""Precision, parts, recomputation, several processes: the same step, computed otherwise."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn

from dmd_tutorial import dmd, training
from dmd_tutorial.anchor import Pairs
from dmd_tutorial.checks import NotFiniteError
from dmd_tutorial.data import digits
from dmd_tutorial.denoisers import EDMDenoiser
from dmd_tutorial.edm.networks import SongUNet
from dmd_tutorial.generators import OneStepGenerator
from dmd_tutorial.networks import UNet
from dmd_tutorial.runs import pipeline
from dmd_tutorial.runs.compute import Compute, Processes, Updater, joined, prepare, split
from dmd_tutorial.training import (
    DistillationRun,
    DistillSettings,
    FitRun,
    TeacherSettings,
    distill,
    draw_batch,
    train_teacher,
)

SETTINGS = DistillSettings(
    steps=3, batch=8, batch_pairs=4, warm_up=1, critic_steps=2, learning_rate=1e-3,
    lambda_reg=1.0, grid_max=5.0,
)  # fmt: skip


def small_teacher(seed: int = 0) -> EDMDenoiser:
    torch.manual_seed(seed)
    teacher = EDMDenoiser(UNet(width=8, embedding=16))
    nn.init.normal_(teacher.network.last.weight, std=0.1)  # it starts at zero
    return teacher


def pairs() -> Pairs:
    rng = torch.Generator().manual_seed(0)
    z, y = torch.randn(2, 40, 1, 8, 8, generator=rng)
    return Pairs(z, y, torch.arange(40) % 10)


def prepared(teacher, settings: DistillSettings, compute: Compute) -> DistillationRun:
    run = DistillationRun(teacher, settings)
    prepare(run.generator, compute)
    prepare(run.critic, compute)
    prepare(run.teacher, compute, frozen=True)
    return run


def distilled(compute: Compute | None, settings: DistillSettings = SETTINGS) -> tuple[list, dict]:
    """A short run through an `Updater`, or without one."""
    run = prepared(small_teacher(), settings, compute or Compute())
    iteration = dmd.iteration
    if compute is not None:
        updater = Updater(compute, run.generator_optimizer, run.critic_optimizer)
        iteration = partial(dmd.iteration, updater=updater)
    records = [m.record for m in distill(run, (1, 8, 8), 10, pairs(), iteration=iteration)]
    return records, {**run.generator.state_dict(), **run.critic.state_dict()}


def largest_difference(one: dict, other: dict) -> float:
    return max(float((one[k] - other[k]).abs().max()) for k in one)


# --- parts --------------------------------------------------------------------------------------


def test_one_part_through_the_long_way_is_the_plain_iteration_to_the_bit():
    records, weights = distilled(None)
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
        run = DistillationRun(small_teacher(), SETTINGS)
        networks = (run.generator, run.critic)
        optimizers = [torch.optim.SGD(network.parameters(), lr=0.0) for network in networks]
        batch = draw_batch(run, (1, 8, 8), 10, pairs())
        record = dmd.iteration(
            *networks, run.teacher, *optimizers, batch, SETTINGS.objective(), run.rng,
            updater=Updater(compute, *optimizers),
        )  # fmt: skip
        return record, [p.grad for network in networks for p in network.parameters()]

    whole, expected = gradients(Compute())
    record, found = gradients(Compute(accumulation=parts))
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)
    assert record.x.shape == whole.x.shape
    assert record.norm_generator == pytest.approx(whole.norm_generator, rel=1e-5)
    assert record.loss_critic == pytest.approx(whole.loss_critic, rel=1e-5)


def test_a_teacher_learns_the_same_in_parts():
    settings = TeacherSettings(steps=3, batch=8, warm_up=1, flip=True)
    losses = []
    for parts in (1, 4):
        run = FitRun(small_teacher(), settings)
        updater = Updater(Compute(accumulation=parts), run.optimizer)
        losses.append([m.loss for m in train_teacher(run, digits(), updater)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_what_cannot_be_cut_equally_is_refused():
    with pytest.raises(
        ValueError, match="batch of 8 cannot be cut into 3 equal parts for each of 1"
    ):
        distilled(Compute(accumulation=3))
    with pytest.raises(ValueError, match="1 part or more, not 0"):
        Compute(accumulation=0)
    with pytest.raises(ValueError, match=r"one of .*, not 'float16'"):
        Compute(mixed_precision="float16")


class Rank(Processes):
    """One of two processes that do not talk."""

    def __init__(self, rank: int) -> None:
        self.rank, self.count, self.device = rank, 2, None


def test_processes_together_hold_every_sample_once():
    batch = dmd.Batch(torch.arange(12.0), label=torch.arange(12), y_ref=torch.arange(24.0))
    for column, count in (("z", 12), ("label", 12), ("y_ref", 24)):
        seen = [
            value
            for rank in range(2)
            for part in split(batch, 3, Rank(rank))
            for value in getattr(part, column).tolist()
        ]
        assert sorted(seen) == list(range(count))


def test_samples_that_a_process_made_stay_beside_their_noise():
    """A critic's first batch brings the x of this process alone; levels are for all processes."""
    z = torch.arange(12.0)
    for rank in range(2):
        mine = z[6 * rank : 6 * (rank + 1)]
        parts = split(dmd.Batch(z, sigma=z, x=10 * mine), 3, Rank(rank))
        assert len(parts) == 3
        for part in parts:
            assert torch.equal(part.x, 10 * part.z)
            assert torch.equal(part.sigma, part.z)
    images = split((z, z, z, None), 3, Rank(1))  # a teacher's x is the whole batch
    assert torch.equal(torch.cat([part[0] for part in images]), z[6:])


def test_records_of_parts_are_joined():
    records = [
        dmd.Record(torch.full((2, 1), n), loss_critic=n, norm_critic=1.0) for n in (1.0, 2.0)
    ]
    whole = joined(records)
    assert whole.x.tolist() == [[1.0], [1.0], [2.0], [2.0]]
    assert (whole.sigma, whole.loss_critic, whole.norm_critic) == (None, 1.5, 1.0)


# --- precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "band"), [("bf16", 0.03), ("fp16", 0.004)])
def test_low_precision_stays_near_fp32_over_all_noise_levels(precision, band):
    """The band is on D in units of its own spread; fp16 has 10 bits, bf16 has 7."""
    teacher = small_teacher()
    lower = prepare(copy.deepcopy(teacher), Compute(mixed_precision=precision))
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
    lower, other = distilled(Compute(mixed_precision=precision, frozen=precision))
    for one, two in zip(lower, exact, strict=True):
        assert one.loss_critic == pytest.approx(two.loss_critic, rel=0.05)
        assert one.norm_critic == pytest.approx(two.norm_critic, rel=0.1)
    assert largest_difference(weights, other) < 3 * 3 * 1e-3  # three steps of Adam, signs at worst
    assert all(value.dtype == torch.float32 for value in other.values())


def test_an_overflow_skips_the_step_and_halves_the_scale():
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    other = torch.optim.AdamW([nn.Parameter(torch.ones(3))])
    updater = Updater(Compute(mixed_precision="fp16"), optimizer, other)
    before = updater.scalers[optimizer].get_scale()

    def step(factor: float, clip: float) -> float:
        batch = (torch.full((2,), factor),)
        return updater(optimizer, lambda b: (weight.sum() * b[0].mean(), ()), batch, clip)[1]

    assert not math.isfinite(step(3e38, 1.0))
    assert torch.equal(weight.detach(), torch.ones(3))
    assert updater.scalers[optimizer].get_scale() == before / 2
    assert updater.scalers[other].get_scale() == before  # each optimiser has its own
    assert step(1.0, 10.0) == pytest.approx(math.sqrt(3))
    assert not torch.equal(weight.detach(), torch.ones(3))
    again = Updater(Compute(mixed_precision="fp16"), optimizer, other)
    again.load_state_dict(updater.state_dict())
    assert again.scalers[optimizer].get_scale() == before / 2


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_what_overflows_without_a_scale_is_refused_before_the_step(precision):
    """In fp16 only once the scale has been halved to nothing: it was not the scale's fault."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    updater = Updater(Compute(mixed_precision=precision), optimizer)

    def step() -> float:
        batch = (torch.ones(2),)
        return updater(optimizer, lambda b: (weight.sum() * math.nan, ()), batch, 1.0)[1]

    for _ in range(17 if precision == "fp16" else 0):  # the scale begins at 2^16
        assert math.isnan(step())
    with pytest.raises(NotFiniteError, match="the loss is not finite: it is nan"):
        step()
    assert torch.equal(weight.detach(), torch.ones(3))


def test_small_gradients_survive_fp16_because_the_loss_is_scaled():
    """2e-8 is below fp16's smallest number, and so is every gradient inside without a scale."""

    def gradient(precision: str) -> float:
        layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
        optimizer = torch.optim.SGD(layers.parameters(), lr=0.0)

        def loss(batch):
            with torch.autocast("cpu", torch.float16):
                return (layers(batch[0]).float() * 2e-8).sum(), ()

        updater = Updater(Compute(mixed_precision=precision), optimizer)
        return updater(optimizer, loss, (torch.ones(8, 4),), 1.0)[1]

    torch.manual_seed(0)
    assert gradient("fp32") == 0.0
    torch.manual_seed(0)
    assert gradient("fp16") > 1e-8


def test_after_an_update_an_outer_autocast_goes_on_with_the_new_weights():
    layer, x = nn.Linear(2, 2), torch.ones(4, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    updater = Updater(Compute(), optimizer)
    with torch.autocast("cpu", torch.bfloat16):
        before = layer(x)
        updater(optimizer, lambda part: (layer(part[0]).sum(), ()), (x,), 1.0)
        assert not torch.equal(layer(x), before)


class Own(nn.Module):
    """A network of one's own, which answers as a denoiser and has none of the hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x, sigma, label=None):
        return self.layer(x)


@pytest.mark.parametrize(
    ("asked", "frozen", "attribute"),
    [
        ({"mixed_precision": "bf16"}, False, "precision"),
        ({"frozen": "fp16"}, True, "precision"),
        ({"activation_checkpointing": True}, False, "recompute"),
    ],
)
def test_what_a_network_has_no_hook_for_is_refused_by_name_and_changes_nothing(
    asked, frozen, attribute
):
    network = OneStepGenerator(Own())
    ((name, value),) = asked.items()
    message = f"no part of Own has the attribute `{attribute}`: {name} {value!r} cannot be applied"
    with pytest.raises(ValueError, match=message):
        prepare(network, Compute(**asked), frozen)
    assert network.denoiser.layer.weight.dtype == torch.float32
    prepare(network, Compute(**asked), not frozen)  # that of the other networks


def test_a_frozen_network_is_stored_in_low_precision_only_where_it_computes_in_it():
    network = Own()
    network.inner = small_teacher()
    prepare(network, Compute(frozen="bf16"), frozen=True)
    assert network.inner.network.first.weight.dtype == torch.bfloat16
    assert network.layer.weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_that_small_steps_would_not_move_are_not_trained(dtype):
    """An average in 16 bits stays where it starts, and so does most of what Adam moves."""
    low, network = Own().to(dtype), Own()
    message = f"layer.weight is {dtype}: small steps would be lost"
    for make in (
        lambda: FitRun(low, TeacherSettings()),
        lambda: DistillationRun(low, SETTINGS),
        lambda: DistillationRun(low, SETTINGS, start=OneStepGenerator(network)),  # the critic
        lambda: DistillationRun(network, SETTINGS, start=OneStepGenerator(low)),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    assert all(parameter.requires_grad for parameter in low.parameters())  # nothing was changed
    DistillationRun(low, SETTINGS, OneStepGenerator(network), network)  # a teacher is not trained


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
    less, found = saved_bytes(prepare(small_teacher(), Compute(activation_checkpointing=True)))
    assert less < 0.6 * plain
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_a_published_architecture_goes_through_the_same_loop_without_dropout():
    torch.manual_seed(0)
    network = SongUNet(
        8, 1, 1, label_dim=10, model_channels=16, channel_mult=[1, 2], num_blocks=1,
        attn_resolutions=[4], dropout=0.9,
    )  # fmt: skip
    compute = Compute(
        mixed_precision="bf16", frozen="bf16", accumulation=2, activation_checkpointing=True
    )
    run = prepared(EDMDenoiser(network), SETTINGS, compute)
    updater = Updater(compute, run.generator_optimizer, run.critic_optimizer)
    iteration = partial(dmd.iteration, updater=updater)
    for metric in distill(run, (1, 8, 8), 10, pairs(), iteration=iteration):
        assert math.isfinite(metric.loss)
    z, label = torch.randn(4, 1, 8, 8), torch.arange(4)
    assert torch.equal(run.generator(z, label), run.generator(z, label))  # in training mode
    assert run.critic.training
    assert run.teacher.network.map_layer0.weight.dtype == torch.bfloat16
    assert run.generator.denoiser.network.map_layer0.weight.dtype == torch.float32


# --- where noise is drawn ----------------------------------------------------------------------


def test_data_and_noise_of_a_run_may_live_where_its_networks_are(monkeypatch):
    """On the CPU that is nowhere else: the same student, and everything was moved before."""
    went = []
    moved = training.moved
    monkeypatch.setattr(training, "moved", lambda to, of: went.append(type(of)) or moved(to, of))
    students = []
    for on_device in (False, True):
        made = pipeline.make_student(
            small_teacher(), SETTINGS, pairs(), compute=Compute(on_device=on_device)
        )
        students.append(made.network.state_dict())
        batches = went.count(dmd.Batch)
        assert (batches, went.count(Pairs)) == (SETTINGS.steps, int(on_device))
        went.clear()
    assert largest_difference(*students) == 0


def test_noise_of_one_kind_of_device_does_not_go_on_on_another():
    run = DistillationRun(small_teacher(), SETTINGS)
    state = run.state_dict()
    with pytest.raises(ValueError, match="drawn on another kind of device"):
        run.load_state_dict(state | {"rng": state["rng"][:16]})  # a GPU's state has 16 bytes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_gpu_is_waited_for_once_an_iteration(precision, monkeypatch):
    compute = Compute(mixed_precision=precision, frozen=precision, on_device=True)
    iteration = dmd.iteration

    def strict(*given, **options):  # the one reading comes after it, in `distill`
        torch.cuda.set_sync_debug_mode("error")
        try:
            return iteration(*given, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(dmd, "iteration", strict)
    assert pipeline.make_student(small_teacher().cuda(), SETTINGS, pairs(), compute=compute)

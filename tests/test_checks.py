"""What is asked of values: at the door on a CPU; on a device that is waited for, once a step."""

import math
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dmd_tutorial import checks, dmd
from dmd_tutorial.adapters import Adapted, flow
from dmd_tutorial.anchor import Pairs
from dmd_tutorial.checks import NotFiniteError
from dmd_tutorial.data import Images
from dmd_tutorial.denoisers import EDMDenoiser, denoising_loss
from dmd_tutorial.edm.networks import SongUNet
from dmd_tutorial.generators import OneStepGenerator
from dmd_tutorial.networks import UNet
from dmd_tutorial.runs.compute import Compute, Updater, prepare
from dmd_tutorial.survey.score_distillation import Dmd2Settings, Judge
from dmd_tutorial.training import (
    DistillationRun,
    DistillSettings,
    FitRun,
    TeacherSettings,
    distill,
    train_teacher,
)

READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2")
SHAPE, CLASSES = (1, 8, 8), 10
SETTINGS = DistillSettings(steps=2, batch=4, batch_pairs=4, critic_steps=2)


class Reads(TorchDispatchMode):
    """Counts what would make a GPU wait: values that Python, or the shape of a result, asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if (name := function.overloadpacket.__name__) in READS:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def reads(monkeypatch):
    """Every tensor as if on a GPU; counts reads, those in one piece as `together`."""
    mode = Reads()
    tolist = torch.Tensor.tolist

    def together(tensor):
        mode.counts["together"] += 1
        return tolist(tensor)

    monkeypatch.setattr(checks, "_waits", lambda value: True)
    monkeypatch.setattr(torch.Tensor, "tolist", together)
    return mode


def pairs(count=8):
    label = torch.arange(count) % CLASSES
    return Pairs(torch.randn(count, *SHAPE), torch.randn(count, *SHAPE), label)


def a_run(settings=SETTINGS, network=None):
    torch.manual_seed(0)
    network = network or UNet(8, 1, CLASSES)
    judge = Judge(EDMDenoiser(UNet(8, 1, CLASSES))) if isinstance(settings, Dmd2Settings) else None
    return DistillationRun(EDMDenoiser(network), settings, critic=judge)


def a_loop(run, compute=None, step=dmd.iteration):
    """The loop of a run, its average aside, which counts on the CPU."""
    if compute:
        for network in (run.generator, run.critic):
            prepare(network, compute)
        updater = Updater(compute, run.generator_optimizer, run.critic_optimizer)
        step = partial(step, updater=updater)
    run.ema.update_parameters = lambda network: None
    return distill(run, SHAPE, CLASSES, pairs(), iteration=step)


def images():
    return Images(torch.randint(256, (8, *SHAPE), dtype=torch.uint8), torch.arange(8), CLASSES)


LOOPS = {
    "plain": lambda: a_loop(a_run()),
    "weighting sigma": lambda: a_loop(a_run(replace(SETTINGS, weighting="sigma"))),
    "regression": lambda: a_loop(a_run(replace(SETTINGS, matching=False))),
    "in parts, bf16": lambda: a_loop(
        a_run(), Compute(mixed_precision="bf16", accumulation=2)
    ),
    "DDPM++": lambda: a_loop(
        a_run(network=SongUNet(8, 1, 1, CLASSES, model_channels=16, channel_mult=[1, 2],
                               num_blocks=1, attn_resolutions=[4]))
    ),
    "DMD2": lambda: a_loop(
        a_run(Dmd2Settings(steps=1, batch=4)),
        Compute(),
        Dmd2Settings(steps=1, batch=4).step(images(), SHAPE, CLASSES),
    ),
    "teacher": lambda: a_teachers_loop(),
}  # fmt: skip


def a_teachers_loop():
    run = FitRun(EDMDenoiser(UNet(8, 1, CLASSES)), TeacherSettings(steps=2, batch=4, flip=True))
    run.ema.update_parameters = lambda network: None
    return train_teacher(run, images())


@pytest.mark.parametrize("name", LOOPS)
def test_a_step_reads_values_once_at_its_end(name, reads):
    """A GPU is waited for once an iteration; what it was asked dozens of times is one answer."""
    loop = LOOPS[name]()
    with reads:
        metric = next(loop)
    assert reads.counts == {"together": 1}
    single = [v for v in (metric.loss, *(metric.record or ())) if getattr(v, "ndim", 0) == 0]
    assert {type(v) for v in single} <= {float, type(None)}


def test_without_that_a_step_reads_dozens_of_values(reads):
    """The count can fail: the same iteration, asking at every door."""
    run = a_run()
    batch = dmd.Batch(torch.randn(4, *SHAPE), torch.arange(4), *pairs(4))
    with reads:
        dmd.iteration.__wrapped__(
            run.generator, run.critic, run.teacher, run.generator_optimizer,
            run.critic_optimizer, batch, dmd.Objective(),
        )  # fmt: skip
    assert reads.counts["_local_scalar_dense"] > 24


WRONG = {  # what a batch or a network brings, and the sentence
    "sigma is -1": ({"sigma": torch.tensor([1.0, -1.0])}, "must not be negative, .* is -1"),
    "sigma is 0": ({"sigma": torch.tensor([1.0, 0.0])}, "sigma is 0 somewhere"),
    "noise is NaN": ({"noise": torch.full((2, *SHAPE), math.nan)}, "x is not finite: 128 of 128"),
    "label is 10": ({"label": torch.tensor([1, 10])}, "label goes from 1 to 10, classes"),
}  # fmt: skip


@pytest.mark.parametrize("optimiser", ["fused", "plain", "fp16"])
@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused_at_the_end_has_changed_nothing(name, optimiser, reads):
    changes, sentence = WRONG[name]
    run = a_run()
    given = {"sigma": torch.ones(2), "noise": torch.randn(2, *SHAPE), "label": torch.arange(2)}
    batch = dmd.Batch(torch.randn(2, *SHAPE), **(given | changes))
    optimizers = [
        torch.optim.AdamW(n.parameters(), lr=0.1, fused=optimiser == "fused")
        for n in (run.generator, run.critic)
    ]
    scaled = Updater(Compute(mixed_precision="fp16"), *optimizers)
    updater = scaled if optimiser == "fp16" else dmd.update_whole

    def step(batch):
        networks = run.generator, run.critic, run.teacher
        objective = dmd.Objective(lambda_reg=0.0)
        return dmd.iteration(*networks, *optimizers, batch, objective, updater=updater)

    def state():
        moments = [v for o in optimizers for s in o.state.values() for v in s.values()]
        weights = [*run.generator.parameters(), *run.critic.parameters()]
        return [t.detach().clone() for t in (*weights, *moments)]

    step(batch._replace(**given))  # so that there are moments
    before = state()
    with pytest.raises(ValueError, match=sentence):
        step(batch)
    assert all(map(torch.equal, state(), before))
    step(batch._replace(**given))
    assert not all(map(torch.equal, state(), before))  # and afterwards it goes on


def test_a_step_within_a_step_and_an_error_of_another_kind_leave_no_questions_open(reads):
    @checks.asked_once
    def broken(x):
        checks.check_finite(x=x)
        raise KeyError("another")

    with pytest.raises(KeyError, match="another"):
        broken(torch.tensor([1.0]))
    with pytest.raises(NotFiniteError, match="x is not finite"):  # the cause comes first
        broken(torch.tensor([math.nan]))
    with pytest.raises(NotFiniteError, match="x is not finite: 1 of 2"):  # outside: at the door
        checks.check_finite(x=torch.tensor([1.0, math.inf]))


@pytest.mark.parametrize("size", ["UNet", "SongUNet"])
def test_a_compiled_denoiser_is_one_graph(size):
    """At each question of a value torch.compile would cut its graph: into eight, it was."""
    options = {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1}
    network = UNet(8, 1, 10) if size == "UNet" else SongUNet(8, 1, 1, 10, **options)
    denoiser = prepare(EDMDenoiser(network), Compute(mixed_precision="bf16")).eval()
    x, sigma, label = torch.randn(3, *SHAPE), torch.tensor([0.1, 1.0, 50.0]), torch.arange(3)
    generator = OneStepGenerator(denoiser)
    for model, given in ((denoiser, (x, sigma, label)), (generator, (x, label))):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(compiled(*given), model(*given))
    loss = partial(denoising_loss, x=x, sigma=sigma, noise=torch.randn_like(x), label=label)
    compiled = torch.compile(denoiser, backend="aot_eager", fullgraph=True)
    losses = [loss(d) for d in (compiled, denoiser)]
    slopes = [torch.autograd.grad(one, denoiser.parameters(), allow_unused=True) for one in losses]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for one, two in zip(*slopes, strict=True):
        assert one is two is None or torch.allclose(one, two, rtol=1e-3, atol=1e-4)


def test_an_adapted_network_is_one_graph_too():
    """Its own question, of the levels it knows, is no cut either."""
    model = Adapted(UNet(8, 1, 10), flow(), "velocity").eval()
    given = torch.randn(3, *SHAPE), torch.tensor([0.1, 1.0, 50.0]), torch.arange(3)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*given), model(*given))


def test_a_network_out_of_range_reads_no_row_beyond_its_classes(reads):
    """A question that is answered later must not break the device before."""

    @checks.asked_once
    def step(network):
        x = torch.randn(2, *SHAPE)
        return dmd.Record(network(x, torch.ones(2), torch.tensor([0, 99])))

    for network in (UNet(8, 1, 10), SongUNet(8, 1, 1, 10, model_channels=16, channel_mult=[1])):
        with pytest.raises(ValueError, match="label goes from 0 to 99, classes are 0 to 9"):
            step(network)


def test_a_module_that_cannot_decide_waits(reads):
    """An optimiser that is not fused takes no step either, at the price of a wait."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)

    @checks.asked_once
    def step(value):
        norm = dmd.update(optimizer, weight.sum() * value, 10.0)
        return dmd.Record(weight.detach(), norm_generator=norm)

    with pytest.raises(NotFiniteError, match="the loss is not finite"):
        step(math.nan)
    assert weight.tolist() == [1.0, 1.0]
    assert step(1.0).norm_generator == pytest.approx(math.sqrt(2))
    assert weight.tolist() == [0.0, 0.0]

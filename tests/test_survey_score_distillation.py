"""The score distillation family: its parts against closed forms, and its recipes."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from benchmarks.survey.score_distillation import METHODS
from benchmarks.survey.task import Budget, Task
from dmd_tutorial import dmd, noise
from dmd_tutorial.anchor import Pairs
from dmd_tutorial.denoisers import EDMDenoiser
from dmd_tutorial.dmd import Batch, Weighting
from dmd_tutorial.generators import FewStepGenerator, OneStepGenerator, few_step_levels
from dmd_tutorial.mixtures import GaussianMixture
from dmd_tutorial.networks.mlp import MLP
from dmd_tutorial.networks.unet import UNet
from dmd_tutorial.survey import classical
from dmd_tutorial.survey import score_distillation as family
from dmd_tutorial.survey.score_distillation import FAMILY, Judge
from dmd_tutorial.training import DistillationRun, DistillSettings, distill

DOUBLE = torch.float64
REAL = GaussianMixture(
    torch.tensor([[-1.5], [1.0]]),
    torch.tensor([[[0.3]], [[0.8]]], dtype=DOUBLE),
    torch.tensor([0.35, 0.65]),
)


def levels_of(sigma: float, count: int) -> Tensor:
    return torch.full((count,), sigma, dtype=DOUBLE)


# Weights and laws


def test_the_weight_of_sds_is_dreamfusions_in_its_own_units():
    """In variance-preserving units: w = sigma_vp^2 times the difference of predicted noises."""
    sigma = torch.tensor([0.1, 1.0, 7.0], dtype=DOUBLE)
    real, fake = torch.randn(2, 3, 4, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    found = dmd.matching_gradient(real, sigma, real, fake, family.noise_prediction)
    alpha = 1 / (1 + sigma**2).sqrt()
    sigma_vp = alpha * sigma
    x_vp = torch.randn(3, 4, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    eps_real, eps_fake = ((x_vp - alpha[:, None] * d) / sigma_vp[:, None] for d in (real, fake))
    torch.testing.assert_close(found, sigma_vp[:, None] ** 2 * (eps_real - eps_fake))


@pytest.mark.parametrize("law", [family.schedule_levels, family.teacher_levels, family.dmd_levels])
def test_laws_are_ascending_grids_up_to_the_highest_level(law):
    levels = law(5.0, 0.5)
    assert levels.shape == (noise.BINS,)
    assert (levels.diff() >= 0).all()
    assert levels[0] > 0
    assert 4 < levels[-1] <= 5.0


def test_the_schedules_law_is_uniform_in_time():
    """A level drawn from the grid lies below that of time t with probability t over the last t."""
    levels = family.schedule_levels(5.0)
    for t in (0.1, 0.3, 0.5):
        alpha, sigma = noise.linear_schedule(torch.tensor([t], dtype=DOUBLE))
        last = noise.linear_schedule(torch.linspace(0, 1, 100_001, dtype=DOUBLE)[1:])
        last_time = (last.sigma / last.alpha <= 5.0).double().mean()
        assert (levels < sigma / alpha).double().mean() == pytest.approx(
            t / last_time.item(), abs=2e-3
        )


def test_the_teachers_law_is_edms_log_normal():
    levels = family.teacher_levels(1e9, sigma_data=1.0).log()
    assert levels.mean().item() == pytest.approx(-1.2 + torch.tensor(2.0).log().item(), abs=1e-3)
    assert levels.std().item() == pytest.approx(1.2, abs=5e-3)
    drawn = noise.lognormal_sigma(100_000, rng=torch.Generator().manual_seed(0)).log()
    quantiles = torch.tensor([0.1, 0.5, 0.9])
    ours = family.teacher_levels(1e9).log().float().quantile(quantiles)
    torch.testing.assert_close(ours, drawn.quantile(quantiles), atol=0.02, rtol=0)


# SDS


def _without_label(denoiser, x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
    return denoiser(x, sigma)


def test_sds_runs_the_iteration_with_the_sample_in_the_critics_place():
    generator = OneStepGenerator(EDMDenoiser(MLP(hidden=8)), 5.0)
    optimizer = torch.optim.SGD(generator.parameters(), lr=0.0)
    teacher = GaussianMixture.isotropic(torch.zeros(1, 2), 0.5)
    critic = EDMDenoiser(MLP(hidden=8))
    before = copy.deepcopy(critic.state_dict())
    rng = torch.Generator().manual_seed(0)
    batch = Batch(torch.randn(16, 2, generator=torch.Generator().manual_seed(1)))
    objective = FAMILY[0].objective(2.0)
    networks = generator, critic, teacher
    record = family.point_step(*networks, optimizer, None, batch, objective, rng)
    torch.testing.assert_close(record.denoised_fake, record.x, atol=1e-5, rtol=1e-5)
    gradient = dmd.matching_gradient(
        record.x, record.sigma, record.denoised_real, record.x, family.noise_prediction
    )
    assert record.loss_matching == pytest.approx(gradient.square().mean().item() / 2, rel=1e-4)
    assert all(torch.equal(before[name], value) for name, value in critic.state_dict().items())


def test_sds_collapses_points_where_a_score_difference_keeps_the_width():
    """Ten widths of a Gaussian generator of the right mean: SDS sends each to nothing."""
    target = GaussianMixture.isotropic(torch.zeros(1, 2), 0.5)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.linspace(0.2, 1.0, 10))

        def forward(self, z: Tensor, label: Tensor) -> Tensor:
            return self.scale[label, None] * z

    label = torch.arange(10).repeat_interleave(64)
    widths = {}
    for member in FAMILY[:2]:
        generator = Scaled()

        def exact(x: Tensor, sigma: Tensor, label: Tensor, generator=generator) -> Tensor:
            variance = generator.scale.detach()[label, None] ** 2
            return x * variance / (variance + sigma[:, None] ** 2)

        optimizer = torch.optim.Adam(generator.parameters(), lr=0.02)
        rng = torch.Generator().manual_seed(0)
        teacher = partial(_without_label, target)
        objective = dmd.Objective(
            member.weighting, lambda_reg=0, critic_steps=0, grid=member.law(2.0, 0.5)
        )
        for _ in range(200):
            batch = Batch(torch.randn(640, 2, generator=rng), label)
            member.step(generator, exact, teacher, optimizer, None, batch, objective, rng)
        widths[member.name] = generator.scale.detach().abs()
    assert (widths["SDS"] < 0.05).all()
    assert ((widths["VSD"] - 0.5).abs() < 0.1).all()


# The judge


@pytest.mark.parametrize(
    ("network", "shape"),
    [(MLP(hidden=8), (2,)), (UNet(width=8, embedding=16), (1, 8, 8))],
    ids=["points", "images"],
)
def test_a_judge_denoises_as_before_and_is_undecided_at_first(network, shape):
    torch.manual_seed(0)
    critic = EDMDenoiser(network)
    judge = Judge(critic)
    with pytest.raises(ValueError, match="call the critic"):
        judge.logit()
    x, sigma = torch.randn(5, *shape), torch.rand(5) + 0.1
    assert torch.equal(judge(x, sigma), critic(x, sigma))
    assert judge.logit().shape == (5,)
    assert judge.logit().abs().max() == 0
    real, fake = judge.logit(), judge.logit()
    log_2 = torch.tensor(2.0).log().item()
    assert classical.discriminator_loss(real, fake).item() == pytest.approx(2 * log_2)
    assert classical.generator_loss(fake).item() == pytest.approx(log_2)


def test_a_judge_reads_networks_that_it_knows():
    with pytest.raises(ValueError, match="Identity has no method feature_layers"):
        Judge(EDMDenoiser(nn.Identity()))


def test_a_judge_learns_to_tell_noised_data_from_noised_samples():
    """Trained on two Gaussians, its logit approaches the exact log-ratio of their densities."""
    torch.manual_seed(0)
    judge = Judge(EDMDenoiser(MLP(dim=1, hidden=32), sigma_data=1.0))
    optimizer = torch.optim.Adam(judge.parameters(), lr=5e-3)
    sigma = torch.full((512,), 0.5)
    for _ in range(250):
        logits = []
        for mean in (0.7, -0.7):
            judge(mean + torch.randn(512, 1) * (1 + 0.25) ** 0.5, sigma)
            logits.append(judge.logit())
        dmd.update(optimizer, classical.discriminator_loss(*logits), 10.0)
    x = torch.linspace(-2, 2, 512)[:, None]
    judge(x, sigma)
    exact = 2 * 0.7 * x[:, 0] / 1.25
    assert (judge.logit() - exact).abs().mean() < 0.3


def test_the_adversarial_step_needs_data():
    nothing, batch = [None] * 5, Batch(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="needs data"):
        family.adversarial_step(*nothing, batch, dmd.Objective(), fooling=1.0, discrimination=1.0)


def test_without_its_weights_the_adversarial_step_is_dmds():
    """With both GAN weights 0 the generator's update is that of `dmd.iteration`, bit for bit."""
    torch.manual_seed(0)
    teacher = EDMDenoiser(MLP(hidden=8))
    start = OneStepGenerator(copy.deepcopy(teacher), 5.0)
    for p in start.parameters():
        nn.init.normal_(p, std=0.3)
    z, data = torch.randn(2, 16, 2)
    objective = dmd.Objective(lambda_reg=0, critic_steps=1)
    after = []
    for step in (
        dmd.iteration,
        partial(family.adversarial_step, fooling=0.0, discrimination=0.0),
    ):
        generator, critic = copy.deepcopy(start), copy.deepcopy(start.denoiser)
        judge = Judge(critic)
        optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (generator, judge)]
        rng = torch.Generator().manual_seed(0)
        batch = Batch(z, y_ref=data)
        step(generator, judge, teacher, *optimizers, batch, objective, rng)
        after.append(generator.state_dict())
    assert all(torch.equal(after[0][name], after[1][name]) for name in after[0])


@pytest.mark.parametrize("critic_steps", [0, 3])
def test_the_adversarial_step_fools_the_judge_and_the_judge_learns(critic_steps):
    """Teacher and critic agree, so the generator's first gradient is the fooling loss's."""
    torch.manual_seed(0)
    teacher, start = EDMDenoiser(MLP(hidden=8)), EDMDenoiser(MLP(hidden=8))
    judge = Judge(copy.deepcopy(teacher))
    for p in [*start.parameters(), judge.weight]:
        nn.init.normal_(p, std=0.5)
    generator, y = OneStepGenerator(start, 5.0), 1 + torch.randn(256, 2)
    z, n = torch.randn(2, 256, 2)
    calls = []
    generator.register_forward_hook(lambda module, inputs, x: calls.append(inputs[0]))

    def losses() -> tuple[float, float]:
        logits, sigma = [], torch.ones(256)
        with torch.no_grad():
            for x in (y, OneStepGenerator(start, 5.0)(z)):
                judge(x + n, sigma)
                logits.append(judge.logit())
        fooled, told = classical.generator_loss(logits[1]), classical.discriminator_loss(*logits)
        return fooled.item(), told.item()

    before = losses()
    rates = (0.0, 0.01) if critic_steps else (0.1, 0.0)
    networks = generator, judge
    optimizers = [
        torch.optim.SGD(net.parameters(), lr) for net, lr in zip(networks, rates, strict=True)
    ]
    rng = torch.Generator().manual_seed(0)
    objective = dmd.Objective(lambda_reg=0, critic_steps=critic_steps, grid=torch.ones(100))
    step = partial(family.adversarial_step, fooling=1.0, discrimination=1.0)
    for _ in range(10):
        batch = Batch(z, y_ref=y)
        record = step(generator, judge, teacher, *optimizers, batch, objective, rng)
        if not critic_steps:
            assert record.loss_matching == pytest.approx(0.0, abs=1e-12)
    after = losses()
    changed = 1 if critic_steps else 0
    assert after[changed] < before[changed] - 0.01
    assert len(calls) == 10 * max(1, critic_steps)  # the first update of the critic reuses samples
    assert all(not torch.equal(x, z) for x in calls[1:critic_steps])  # the others do not


def test_a_judge_is_weighed_for_the_width_of_its_critics_data():
    """What `denoising_loss` reads off a denoiser, a judge shows as its critic does."""
    critic = EDMDenoiser(MLP(hidden=8), sigma_data=1.4)
    x, noise = torch.randn(2, 9, 2)
    losses = [dmd.critic_loss(each, x, torch.ones(9), noise) for each in (critic, Judge(critic))]
    assert torch.equal(*losses)


def test_a_step_with_data_draws_it_after_the_batch_and_hands_on_all_else():
    seen = []

    def step(*arguments):
        seen.extend(arguments)

    def draw(count, rng):
        return torch.randn(count, 2, generator=rng), torch.arange(count)

    rng, same = (torch.Generator().manual_seed(7) for _ in range(2))
    batch = Batch(torch.zeros(5, 2, dtype=DOUBLE), torch.ones(5))
    family.with_data(step, draw)("G", "C", "T", "g", "c", batch, "objective", rng)
    assert seen[:5] == ["G", "C", "T", "g", "c"]
    assert seen[6:] == ["objective", rng]
    torch.testing.assert_close(seen[5].y_ref, torch.randn(5, 2, generator=same).double())
    assert seen[5].label_ref.tolist() == [0, 1, 2, 3, 4]
    assert seen[5].z is batch.z
    assert seen[5].label is batch.label


@pytest.mark.parametrize("member", [m for m in FAMILY if m.name in ("VSD", "DMD2", "SiD")])
def test_a_step_judges_at_the_batchs_own_levels(member):
    torch.manual_seed(0)
    teacher, critic = (EDMDenoiser(MLP(hidden=8)) for _ in range(2))
    generator = OneStepGenerator(EDMDenoiser(MLP(hidden=8)))
    optimizer = torch.optim.SGD(generator.parameters(), lr=0.0)
    sigma, (z, y, given) = torch.linspace(0.1, 2, 6), torch.randn(3, 6, 2)
    seen = []
    teacher.register_forward_hook(lambda module, inputs, answer: seen.append(inputs[:2]))
    batch = Batch(z, y_ref=y, sigma=sigma, noise=given)
    objective = replace(member.objective(5.0), critic_steps=0)
    networks = generator, Judge(critic), teacher
    record = member.step(*networks, optimizer, optimizer, batch, objective, torch.Generator())
    ((x_noisy, level),) = seen
    assert torch.equal(level, sigma)
    assert torch.equal(x_noisy, record.x + sigma[:, None] * given)


@pytest.mark.parametrize("member", FAMILY, ids=lambda member: member.name)
def test_every_member_is_an_iteration_of_the_books_own_loop(member):
    """`training.distill` runs it; it repeats, and continues from a state to the same bits."""
    torch.manual_seed(0)
    teacher = EDMDenoiser(MLP(hidden=8), sigma_data=1.4)
    for p in teacher.parameters():
        nn.init.normal_(p, std=0.3)
    critic = Judge(copy.deepcopy(teacher)) if member.data else None
    levels = few_step_levels(member.evaluations, 80.0, 1.4)
    start = FewStepGenerator(teacher, levels) if len(levels) > 1 else OneStepGenerator(teacher)
    z, y = torch.randn(2, 20, 2)
    pairs = Pairs(z, y) if member.lambda_reg else None
    step = member.step
    if member.data:
        step = family.with_data(
            step, lambda count, rng: (torch.randn(count, 2, generator=rng), None)
        )

    def run(state=None):
        asked = {"lambda_reg": member.lambda_reg, "student_steps": member.evaluations}
        run = DistillationRun(teacher, DistillSettings(steps=4, batch=8, **asked), start, critic)
        if state is not None:
            run.load_state_dict(state)
        return run, distill(run, (2,), 0, pairs, member.objective(5.0, 1.4), step)

    first, steps = run()
    next(steps), next(steps)
    state = copy.deepcopy(first.state_dict())
    assert len(list(steps)) == 2
    assert any(
        not torch.equal(a, b)
        for a, b in zip(first.generator.parameters(), start.parameters(), strict=True)
    )
    again, steps = run(state)
    assert len(list(steps)) == 2
    for a, b in zip(first.average.parameters(), again.average.parameters(), strict=True):
        assert torch.equal(a, b)


# SiD


def test_sid_refuses_shapes_that_differ():
    with pytest.raises(ValueError, match="has shape"):
        family.sid_loss(torch.zeros(2, 3), torch.ones(2), torch.zeros(2, 3), torch.zeros(2, 1))


def test_the_weight_of_sid_is_not_differentiated():
    """The gradient is that of the product alone, with the normaliser held still."""
    x = torch.randn(4, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    sigma = levels_of(0.7, 4)
    leaf = x.clone().requires_grad_()
    real, fake = 0.5 * leaf, 0.2 * leaf
    (found,) = torch.autograd.grad(family.sid_loss(leaf, sigma, real, fake, 1.2), leaf)
    error = (0.5 * x).abs().mean(dim=1, keepdim=True)
    # product: 0.3 x (0.5 x - x - 1.2 * 0.3 x) = -0.258 x^2
    torch.testing.assert_close(found, -2 * 0.258 * x / error / x.numel())


# Several steps


def test_levels_of_a_few_step_generator_must_fall():
    with pytest.raises(ValueError, match="must fall"):
        FewStepGenerator(nn.Identity(), (1.0, 2.0))
    for evaluations in (1, 2, 4):
        levels = few_step_levels(evaluations, 80.0, 1.4)
        assert len(levels) == evaluations
        FewStepGenerator(nn.Identity(), levels)


def test_one_level_is_a_one_step_generator():
    torch.manual_seed(0)
    denoiser = EDMDenoiser(MLP(hidden=8))
    z = torch.randn(7, 2)
    one = OneStepGenerator(denoiser, 5.0)(z)
    assert torch.equal(FewStepGenerator(denoiser, (5.0,))(z), one)


def test_training_differentiates_one_step_and_evaluation_runs_all_of_them():
    calls = []

    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
            calls.append((sigma, torch.is_grad_enabled()))
            return 0 * x + sigma[:, None] + self.shift

    generator = FewStepGenerator(Denoiser(), (8.0, 4.0, 2.0))
    x = generator.train()(torch.randn(300, 2))
    assert [differentiated for _, differentiated in calls] == [False, False, True]
    share = torch.stack([(x[:, 0] == level).float().mean() for level in (8.0, 4.0, 2.0)])
    assert ((share - 1 / 3).abs() < 0.1).all()
    (slope,) = torch.autograd.grad(x.sum(), generator.denoiser.shift)
    assert slope.item() == x.numel()  # one step's worth, not a chain of them
    calls.clear()
    assert (generator.eval()(torch.randn(5, 2)) == 2.0).all()
    assert len(calls) == 3


@pytest.mark.parametrize("steps", [1, 3])
def test_the_last_step_can_be_drawn_more_often(steps):
    levels = (8.0, 4.0, 2.0)[:steps]

    class Answer(nn.Module):
        def forward(self, x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
            return 0 * x + sigma[:, None]

    x = FewStepGenerator(Answer(), levels, last=0.8).train()(torch.randn(2000, 1))
    share = [(x == level).float().mean().item() for level in levels]
    assert share == pytest.approx([1.0] if steps == 1 else [0.1, 0.1, 0.8], abs=0.03)


# The family and its recipes


def test_rows_of_the_table_are_read_off_the_settings():
    rows = {member.name: member.row() for member in FAMILY}
    assert len(rows) == len(FAMILY)
    assert rows["SDS"][2] == "$x$ itself"
    assert [name for name, row in rows.items() if row[5] == "yes"] == ["DMD"]
    assert {name for name, row in rows.items() if row[4] == "yes"} == {
        "DMD2", "DMD2, 2 steps", "DMD2, 4 steps",
    }  # fmt: skip
    assert rows["VSD"][1] == rows["SDS"][1] != rows["DMD"][1]
    assert rows["Diff-Instruct"][3] != rows["DMD"][3]
    assert FAMILY[2].objective(5.0).weighting is Weighting.NONE


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    """The survey's two tasks, with untrained networks for teachers: recipes see no difference."""
    torch.manual_seed(0)
    ring = EDMDenoiser(MLP(hidden=8), sigma_data=1.4).requires_grad_(False).eval()
    digits = EDMDenoiser(UNet(width=8, embedding=16)).requires_grad_(False).eval()

    def points(count: int, rng: torch.Generator) -> tuple[Tensor, None]:
        return torch.randn(count, 2, generator=rng), None

    def images(count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        label = torch.randint(10, (count,), generator=rng)
        return torch.randn(count, 1, 8, 8, generator=rng), label

    def measure(samples: Tensor, label: Tensor | None) -> tuple[float, float]:
        return 0.0, 0.0

    return {
        "ring": Task("ring", ring, (2,), 0, points, measure),
        "digits": Task("digits", digits, (1, 8, 8), 10, images, measure),
    }


@pytest.mark.parametrize("name", ["ring", "digits"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_recipe_spends_its_budget_and_depends_on_its_seed_alone(method, name, tasks):
    task, passes = tasks[name], {"ring": 20_000, "digits": 3_000}[name]
    z, label = task.noise(20, torch.Generator().manual_seed(9))
    answers = []
    for seed in (3, 3, 4) if name == "ring" else (3,):
        task.teacher._forward_hooks.clear()  # of the budgets before
        budget = Budget(passes, task.teacher)
        samplers = method.train(task, budget, seed)
        assert 0.5 * passes < budget.spent < 1.05 * passes
        ((evaluations, sampler),) = samplers.items()
        spent = budget.spent
        answers.append(sampler(z, label))
        assert budget.spent == spent  # what is measured is not charged
        assert answers[-1].shape == z.shape
        assert answers[-1].isfinite().all()
    assert evaluations == {"DMD2, 2 steps": 2, "DMD2, 4 steps": 4}.get(method.name, 1)
    if name == "ring":  # images go through the same lines
        assert torch.equal(answers[0], answers[1])
        assert not torch.equal(answers[0], answers[2])


def test_methods_say_what_they_need():
    by_name = {method.name: method for method in METHODS}
    assert len(by_name) == len(METHODS)
    assert by_name["Regression on pairs"].needs_pairs
    assert by_name["DMD"].needs_pairs
    assert not by_name["DMD without anchor"].needs_pairs
    assert by_name["DMD2"].needs_data
    assert by_name["SDS"].extra_networks == 0
    assert by_name["SiD"].extra_networks == 1

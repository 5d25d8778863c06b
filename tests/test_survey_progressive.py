"""Progressive distillation, where everything is known: Gaussians and their mixtures."""

import math

import pytest
import torch
from torch import nn

from benchmarks.survey.progressive import METHODS
from benchmarks.survey.task import Budget, Task
from dmd_tutorial import data
from dmd_tutorial.adapters import Adapted, preserving
from dmd_tutorial.denoisers import EDMDenoiser, noise_from_denoised, v_from_denoised
from dmd_tutorial.mixtures import GaussianMixture
from dmd_tutorial.networks.mlp import MLP
from dmd_tutorial.noise import cosine_schedule, sampling_levels, to_variance_exploding
from dmd_tutorial.samplers import euler, sample
from dmd_tutorial.survey import progressive as room
from dmd_tutorial.survey.progressive import Weighting
from dmd_tutorial.training import FitRun, FitSettings

DOUBLE = torch.float64
RING = data.ring()
LEVELS = sampling_levels(8)


def noisy(sigma: torch.Tensor, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    clean = RING.sample(len(sigma), rng=rng).double()
    return clean + sigma[:, None] * torch.randn(clean.shape, generator=rng, dtype=DOUBLE)


# what a network of each kind answers, from (noisy, denoised, sigma)
ANSWER = {
    "x0": lambda x, denoised, sigma: denoised,
    "noise": noise_from_denoised,
    "v": v_from_denoised,
}


def levels_of(start: int, step: int = 1, batch: int = 64) -> tuple[torch.Tensor, ...]:
    """One triple of the grid for a whole batch."""
    return tuple(LEVELS[start + k * step].expand(batch) for k in range(3))


@pytest.mark.equation("10.1")
def test_a_ddim_step_is_that_of_diffusers():
    """A DDIM step keeps the denoised estimate and shrinks what differs from it by a ratio."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=1000, prediction_type="sample", clip_sample=False, set_alpha_to_one=True
    )
    scheduler.set_timesteps(10)
    x_t = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    denoised = torch.randn(5, 2, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    for t in (900, 400, 0):
        theirs = scheduler.step(denoised, t, x_t).prev_sample
        product = scheduler.alphas_cumprod[t].double()
        before = scheduler.alphas_cumprod[t - 100].double() if t >= 100 else torch.ones(())
        sigma, after = ((1 - p).sqrt() / p.sqrt() for p in (product, before.double()))
        ours = room.ddim_step(x_t / product.sqrt(), denoised, sigma.expand(5), after.expand(5))
        torch.testing.assert_close(before.sqrt() * ours, theirs.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.equation("10.1")
def test_ddim_steps_are_eulers_on_the_probability_flow():
    """Two DDIM steps are two steps of Euler's method."""
    z = torch.randn(30, 2, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    by_euler = sample(RING, z, sampler=euler, levels=LEVELS[:3])
    ours = room.two_steps(RING, LEVELS[0] * z, *levels_of(0, batch=30))
    torch.testing.assert_close(ours, by_euler, rtol=1e-10, atol=1e-10)


@pytest.mark.equation("10.2")
@pytest.mark.parametrize("start", [0, 2, 4, 6])
def test_one_step_from_the_target_lands_where_the_teacher_does_after_two(start):
    """One DDIM step from t_n with the target for an estimate lands at x_{t_{n-2}}, exactly."""
    sigma, between, after = levels_of(start)
    x = noisy(sigma)
    x_next = room.two_steps(RING, x, sigma, between, after)
    target = room.target(x, x_next, sigma, after)
    torch.testing.assert_close(room.ddim_step(x, target, sigma, after), x_next)
    # the step to t_{n-1}, where the teacher has only stopped, does not
    missed = room.ddim_step(x, target, sigma, between) - x_next
    assert missed.norm(dim=1).mean() > 0.03 * (x - x_next).norm(dim=1).mean()


@pytest.mark.equation("10.2")
def test_the_target_is_the_papers():
    """It is the formula of Algorithm 2, which is written for variance-preserving samples."""
    schedules = [cosine_schedule(torch.tensor([t], dtype=DOUBLE)) for t in (0.8, 0.5)]
    (alpha, sigma), (alpha_next, sigma_next) = schedules
    z_t = torch.randn(1, 2, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    z_next = torch.randn(1, 2, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    ratio = sigma_next / sigma
    theirs = (z_next - ratio * z_t) / (alpha_next - ratio * alpha)
    (x, level), (x_next, level_next) = (
        to_variance_exploding(z, s) for z, s in zip((z_t, z_next), schedules, strict=True)
    )
    torch.testing.assert_close(room.target(x, x_next, level, level_next), theirs)


@pytest.mark.equation("10.3")
@pytest.mark.parametrize("start", [0, 2, 4, 6])
def test_the_target_is_a_weighted_mean_of_the_teachers_two_answers(start):
    """The target is a weighted mean of the teacher's two answers; ending at 0 it is the second."""
    sigma, between, after = levels_of(start)
    x = noisy(sigma)
    first = RING(x, sigma)
    second = RING(room.ddim_step(x, first, sigma, between), between)
    r1, r2 = (between / sigma)[:, None], (after / between)[:, None]
    share = r2 * (1 - r1) / (1 - r1 * r2)
    assert ((share >= 0) & (share < 1)).all()
    target = room.target(x, room.two_steps(RING, x, sigma, between, after), sigma, after)
    torch.testing.assert_close(target, share * first + (1 - share) * second)
    if start == 6:
        torch.testing.assert_close(target, second)


@pytest.mark.equation("10.4")
@pytest.mark.parametrize(
    ("prediction", "weighting"),
    [("noise", Weighting.SNR), ("v", Weighting.SNR_PLUS_ONE)],
)
def test_errors_of_eps_and_v_are_weighted_errors_of_x(prediction, weighting):
    """Squared errors of eps and v are those of x times SNR and times SNR + 1."""
    sigma = torch.tensor([0.002, 0.3, 1.0, 9.0, 80.0], dtype=DOUBLE)
    x = noisy(sigma)
    one, other = (noisy(torch.ones(5, dtype=DOUBLE), seed) for seed in (1, 2))
    error = ANSWER[prediction](x, one, sigma) - ANSWER[prediction](x, other, sigma)
    weighted = room.weight(weighting, sigma)[:, None] * (one - other) ** 2
    torch.testing.assert_close(error**2, weighted, rtol=1e-8, atol=0)


@pytest.mark.equation("10.5")
def test_truncated_snr_is_the_larger_of_the_errors_of_x_and_eps():
    """max(SNR, 1) weighs as the larger of the squared errors of x and of eps."""
    sigma = torch.tensor([0.01, 0.5, 0.99, 1.01, 2.0, 80.0], dtype=DOUBLE)
    x = noisy(sigma)
    one, other = (noisy(torch.ones(6, dtype=DOUBLE), seed) for seed in (1, 2))
    errors = [
        (ANSWER[kind](x, one, sigma) - ANSWER[kind](x, other, sigma)).norm(dim=1)
        for kind in ("x0", "noise")
    ]
    larger = torch.maximum(*errors) ** 2
    weighted = room.weight(Weighting.TRUNCATED, sigma) * errors[0] ** 2
    torch.testing.assert_close(larger, weighted, rtol=1e-8, atol=0)
    ratio = room.weight(Weighting.SNR_PLUS_ONE, sigma) / room.weight(Weighting.TRUNCATED, sigma)
    assert 1 <= ratio.min() <= ratio.max() <= 2


@pytest.mark.equation("10.6")
def test_edms_network_predicts_minus_v():
    """With sigma_data = 1, EDM's network answers -v, and EDM's weight is SNR + 1."""

    class Fixed(nn.Module):
        def forward(self, x, c_noise, label=None):
            return torch.sin(3 * x) + c_noise[:, None]

    class Minus(Fixed):
        def forward(self, x, c_noise, label=None):
            return -super().forward(x, c_noise)

    sigma = torch.tensor([0.05, 0.7, 5.0, 80.0], dtype=DOUBLE)
    x = noisy(sigma)
    by_edm = EDMDenoiser(Fixed(), sigma_data=1.0)(x, sigma)
    by_v = Adapted(Minus(), preserving(), "v")(x, sigma)
    torch.testing.assert_close(by_edm, by_v)
    alpha = (1 + sigma**2).rsqrt()[:, None]
    answered = Minus()(alpha * x, sigma.log() / 4)
    torch.testing.assert_close(v_from_denoised(x, by_v, sigma), answered)
    weight = 1 / (sigma * 1.0) ** 2 + 1 / 1.0**2
    torch.testing.assert_close(room.weight(Weighting.SNR_PLUS_ONE, sigma), weight)


@pytest.mark.parametrize("prediction", list(ANSWER))
def test_a_network_is_read_as_what_it_predicts(prediction):
    class Constant(nn.Module):
        def forward(self, x, c_noise, label=None):
            return torch.full_like(x, 0.3)

    sigma = torch.tensor([0.05, 0.7, 80.0], dtype=DOUBLE)
    x = noisy(sigma)
    denoised = Adapted(Constant(), preserving(), prediction)(x, sigma)
    answer = ANSWER[prediction](x, denoised, sigma)
    torch.testing.assert_close(answer, torch.full_like(x, 0.3), rtol=1e-6, atol=1e-6)


class Merged:
    """The student that has learnt its teacher's two steps without any error."""

    def __init__(self, teacher, levels: torch.Tensor) -> None:
        self.teacher, self.levels = teacher, levels

    def __call__(self, x, sigma, label=None):
        start = int((self.levels - sigma[0]).abs().argmin())
        triple = [self.levels[start + k].to(x).expand(len(x)) for k in range(3)]
        x_next = room.two_steps(self.teacher, x, *triple)
        return room.target(x, x_next, triple[0], triple[2])


@pytest.mark.equation("10.7")
def test_perfect_students_all_sample_what_the_first_teacher_samples():
    """Without errors of fitting, the last student's one step is the first sampler's many."""
    z = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    first = sample(RING, z, sampler=euler, levels=LEVELS)
    student, levels = RING, LEVELS
    while len(levels) > 2:
        student, levels = Merged(student, levels), levels[::2]
        assert torch.allclose(sample(student, z, sampler=euler, levels=levels), first)
    assert levels.tolist() == [80.0, 0.0]


@pytest.mark.equation("10.8")
@pytest.mark.parametrize("steps", [1, 4, 32])
def test_for_a_gaussian_ddims_shortfall_has_a_formula(steps):
    """For Gaussian data, DDIM and the exact flow both multiply the start by a known factor."""
    std, levels = 0.7, sampling_levels(steps)
    gaussian = GaussianMixture.isotropic(torch.zeros(1, 2), std)
    z = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    pairs = zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True)
    factor = math.prod((std**2 + a * b) / (std**2 + a**2) for a, b in pairs)
    x = sample(gaussian, z, sampler=euler, levels=levels)
    torch.testing.assert_close(x, factor * 80.0 * z, rtol=1e-6, atol=1e-12)
    exact = std / math.hypot(std, 80.0)
    fine = sample(gaussian, z, steps=400)  # Heun's
    torch.testing.assert_close(fine, exact * 80.0 * z, rtol=2e-4, atol=1e-9)
    assert factor < exact


def test_the_loss_is_zero_at_the_target_and_weighted_elsewhere():
    sigma, between, after = levels_of(2)
    x = noisy(sigma)
    perfect = Merged(RING, LEVELS)
    assert room.progressive_loss(perfect, RING, x, sigma, between, after).item() < 1e-20
    off = lambda x, sigma, label: perfect(x, sigma) + 0.5  # noqa: E731
    for weighting in Weighting:
        loss = room.progressive_loss(off, RING, x, sigma, between, after, None, weighting)
        assert loss.item() == pytest.approx(0.25 * room.weight(weighting, sigma)[0].item())


def test_the_teacher_gets_no_gradient():
    torch.manual_seed(0)
    student, teacher = (EDMDenoiser(MLP(hidden=8)) for _ in range(2))
    triple = [level.float() for level in levels_of(2)]
    x = noisy(triple[0].double()).float()
    room.progressive_loss(student, teacher, x, *triple).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())


def test_levels_are_drawn_from_the_students_own():
    with pytest.raises(ValueError, match="7 steps"):
        room.draw_double_step(1, LEVELS[1:])
    drawn = room.draw_double_step(4000, LEVELS, torch.Generator().manual_seed(0))
    sigma, between, after = drawn
    values, counts = sigma.unique(return_counts=True)
    assert values.tolist() == LEVELS[:-1:2].float().flip(0).tolist()
    assert (counts - 1000).abs().max() < 5 * math.sqrt(4000 * 0.25 * 0.75)
    where = torch.tensor([LEVELS.float().tolist().index(s) for s in sigma.tolist()])
    assert torch.equal(between, LEVELS.float()[where + 1])
    assert torch.equal(after, LEVELS.float()[where + 2])


def test_a_step_up_is_refused():
    x = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="from 1 to 2"):
        room.target(x, x, torch.tensor([1.0, 1.0]), torch.tensor([0.5, 2.0]))


def small(steps: int) -> FitSettings:
    return FitSettings(steps=150, batch=64, learning_rate=5e-3, warm_up=10, ema=0.98)


def gaussian_draw(count, rng):
    return 0.7 * torch.randn(count, 2, generator=rng), None


def test_halvings_bring_a_network_to_one_step_of_a_gaussian():
    """Teacher and targets are exact; the start is a network that knows nothing."""
    gaussian = GaussianMixture.isotropic(torch.zeros(1, 2), 0.7)
    torch.manual_seed(0)
    network = EDMDenoiser(MLP(hidden=32, layers=2), sigma_data=0.7)
    levels = sampling_levels(8)
    found = list(room.progressive(gaussian, network, gaussian_draw, levels, small))
    assert [student.steps for student in found] == [4, 2, 1]
    z = torch.randn(2000, 2, generator=torch.Generator().manual_seed(1))
    by_ddim = sample(gaussian, z, sampler=euler, levels=levels)
    for student in found:
        assert (student.sample(z) - by_ddim).square().mean().sqrt() < 0.06
    # without distillation, one step answers the mean of the data
    assert sample(gaussian, z, sampler=euler, levels=sampling_levels(1)).std() < 0.01


def test_a_halving_is_deterministic_in_its_seed():
    gaussian = GaussianMixture.isotropic(torch.zeros(1, 2), 0.7)

    def losses(seed):
        torch.manual_seed(0)
        settings = FitSettings(steps=3, batch=16, seed=seed)
        run = FitRun(EDMDenoiser(MLP(hidden=8)), settings)
        return [m.loss for m in room.halving(run, gaussian, gaussian_draw, LEVELS)]

    assert losses(0) == losses(0)
    assert losses(0) != losses(1)


def little_task() -> Task:
    torch.manual_seed(0)
    teacher = EDMDenoiser(MLP(hidden=16, layers=2)).requires_grad_(False).eval()
    return Task("little", teacher, (2,), 0, gaussian_draw, lambda x, label: (0.0, 0.0))


def test_the_recipe_spends_its_budget_and_repeats():
    method = METHODS[0]
    z = torch.randn(10, 2, generator=torch.Generator().manual_seed(0))
    outcomes = []
    for seed in (0, 0, 1):
        task = little_task()
        budget = Budget(100_000, task.teacher)
        samplers = method.train(task, budget, seed)
        assert sorted(samplers) == [1, 2, 4]
        assert 0.8 < budget.spent / budget.passes <= 1
        outcomes.append(torch.cat([samplers[n](z, None) for n in (1, 2, 4)]))
    assert torch.equal(outcomes[0], outcomes[1])
    assert not torch.equal(outcomes[0], outcomes[2])
    assert method.needs_data
    assert not method.needs_pairs
    assert method.extra_networks == 0

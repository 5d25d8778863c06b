"""Adversarial diffusion distillation: each term against what can be known of it."""

import math

import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss
from scipy.optimize import linprog
from torch import nn

from benchmarks.survey.adversarial import METHODS
from benchmarks.survey.task import Budget, Task
from dmd_tutorial import data, dmd
from dmd_tutorial.denoisers import EDMDenoiser, zero_score
from dmd_tutorial.dmd import Weighting
from dmd_tutorial.generators import OneStepGenerator
from dmd_tutorial.mixtures import GaussianMixture
from dmd_tutorial.networks.mlp import MLP
from dmd_tutorial.networks.unet import UNet
from dmd_tutorial.survey import adversarial as room

DOUBLE = torch.float64
MIXTURE = GaussianMixture.isotropic(
    torch.tensor([[-1.0], [0.8]]), 0.3, weights=torch.tensor([0.35, 0.65])
)
# Gauss-Hermite nodes for a mean over standard normal noise
NODES, WEIGHTS = (torch.as_tensor(part) for part in hermegauss(100))
WEIGHTS = WEIGHTS / WEIGHTS.sum()


def ones(sigma):
    return torch.ones_like(sigma)


def slope_of(loss_of, x):
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss_of(x), x)
    return slope


# The teacher's term


@pytest.mark.equation("10.9")
def test_the_teacher_denoises_the_noised_output_once_and_is_no_part_of_the_gradient():
    """The teacher's term compares the output with one denoising of it, seen as a constant."""
    calls = []

    def teacher(x, sigma, label):
        calls.append((x, sigma, label))
        return 0.25 * x

    x, noise = (torch.randn(6, 3, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    sigma = torch.tensor([0.1, 0.2, 0.5, 1.0, 5.0, 80.0])
    label = torch.arange(6)
    slope = slope_of(lambda x: room.teacher_loss(teacher, x, sigma, noise, label), x)
    ((noised, level, asked),) = calls  # one evaluation
    torch.testing.assert_close(noised.detach(), x + sigma[:, None] * noise)
    assert torch.equal(level, sigma)
    assert torch.equal(asked, label)
    weight = 1 / torch.sqrt(1 + sigma**2)
    by_hand = 2 * weight[:, None] * (x - 0.25 * noised) / x.numel()
    torch.testing.assert_close(slope, by_hand.detach())


@pytest.mark.equation("10.10")
@pytest.mark.parametrize("sigma", [0.05, 0.6, 4.0])
def test_the_difference_is_the_teachers_error_about_the_noise(sigma):
    """The output minus its denoising is sigma times the teacher's error about the noise."""
    level = torch.full((40,), sigma, dtype=DOUBLE)
    rng = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(40, 1, generator=rng, dtype=DOUBLE) for _ in range(2))
    noised = x + sigma * noise
    score = slope_of(lambda x: MIXTURE.log_prob(x, level).sum(), noised)  # by autograd
    noise_estimate = -sigma * score
    slope = slope_of(lambda x: room.teacher_loss(MIXTURE, x, level, noise, None, ones), x)
    torch.testing.assert_close(slope, 2 * sigma * (noise_estimate - noise) / 40)


@pytest.mark.equation("10.11")
@pytest.mark.parametrize("sigma", [0.2, 0.7, 3.0])
def test_in_the_mean_the_term_climbs_a_smoothed_log_density(sigma):
    """Averaged over noise, the teacher's term climbs the mean noisy log-density around x."""
    x = torch.linspace(-2, 2, 21, dtype=DOUBLE)[:, None]
    level = torch.full((len(NODES),), sigma, dtype=DOUBLE)

    def smoothed(point):
        return (WEIGHTS * MIXTURE.log_prob(point + sigma * NODES[:, None], level)).sum()

    def mean_loss(point):
        with torch.no_grad():
            denoised = MIXTURE(point + sigma * NODES[:, None], level)[:, 0]
        return (WEIGHTS * (point - denoised) ** 2).sum()

    for point in x:
        climbed = slope_of(smoothed, point)
        torch.testing.assert_close(
            slope_of(mean_loss, point), -2 * sigma**2 * climbed, rtol=1e-4, atol=1e-5
        )


@pytest.mark.equation("10.11")
def test_it_is_dmds_gradient_without_the_fake_score():
    """With weight 1 it is twice DMD's unweighted gradient without a fake score, plus noise."""
    rng = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(50, 1, generator=rng, dtype=DOUBLE) for _ in range(2))
    sigma = torch.full((50,), 0.7, dtype=DOUBLE)
    noised = x + sigma[:, None] * noise
    real, fake = MIXTURE(noised, sigma), zero_score(noised, sigma)
    by_dmd = dmd.matching_gradient(x, sigma, real, fake, Weighting.NONE) - sigma[:, None] * noise
    slope = slope_of(lambda x: room.teacher_loss(MIXTURE, x, sigma, noise, None, ones), x)
    torch.testing.assert_close(slope, 2 * by_dmd / 50)


@pytest.mark.equation("10.12")
@pytest.mark.parametrize("sigma", [0.1, 1.0, 10.0])
def test_for_gaussians_the_term_alone_shrinks_the_samples_to_a_point(sigma):
    """For Gaussian data the term alone pulls every sample to the mean, at a known rate."""
    std, width = 0.5, 0.5  # the student is already right
    gaussian = GaussianMixture.isotropic(torch.zeros(1, 1), std)
    z, noise = NODES.repeat_interleave(100), NODES.repeat(100)
    joint = WEIGHTS.repeat_interleave(100) * WEIGHTS.repeat(100)
    level = torch.full_like(z, sigma)
    a = torch.tensor(width, dtype=DOUBLE).requires_grad_()
    x = (a * z)[:, None]
    # 10,000 equally weighted samples would need the loss itself; the quadrature weights enter as c
    loss = room.teacher_loss(gaussian, x, level, noise[:, None], None, lambda _: 1e4 * joint)
    (rate,) = torch.autograd.grad(loss, a)
    assert rate.item() == pytest.approx(2 * width * sigma**2 / (std**2 + sigma**2), rel=1e-6)
    assert rate > 0


# The adversarial term


def distributions(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return tuple(torch.rand(6, generator=rng, dtype=DOUBLE).softmax(0) for _ in range(2))


@pytest.mark.equation("10.13")
def test_the_hinge_losses_are_those_of_their_formulas():
    """Logits beyond the margin cost the discriminator nothing; the student's loss has no margin."""
    real, fake = torch.tensor([3.0, 1.0, 0.0, -2.0]), torch.tensor([-5.0, -1.0, 0.5, 2.0])
    loss = room.hinge_discriminator_loss(real, fake)
    assert loss.item() == pytest.approx((0 + 0 + 1 + 3) / 4 + (0 + 0 + 1.5 + 3) / 4)
    assert room.hinge_generator_loss(fake).item() == pytest.approx(3.5 / 4)
    slope = slope_of(lambda logits: room.hinge_discriminator_loss(logits, fake), real)
    assert slope.tolist() == pytest.approx([0, 0, -0.25, -0.25])


@pytest.mark.equation("10.14")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_best_discriminator_knows_the_total_variation(seed):
    """The best discriminator is the sign of p - q, its loss 2 - 2 TV, by linear programming."""
    p, q = distributions(seed)
    # minimise p a + q b over a >= 1 - d, b >= 1 + d, a, b >= 0
    eye = torch.eye(6, dtype=DOUBLE)
    zero = torch.zeros_like(eye)
    rows = torch.cat([torch.cat([-eye, -eye, zero], 1), torch.cat([eye, zero, -eye], 1)])
    bounds = [(None, None)] * 6 + [(0, None)] * 12
    cost = torch.cat([torch.zeros(6, dtype=DOUBLE), p, q])
    solution = linprog(cost.numpy(), rows.numpy(), [-1.0] * 12, bounds=bounds)
    variation = (p - q).abs().sum().item() / 2
    assert solution.fun == pytest.approx(2 - 2 * variation)
    best = torch.sign(p - q)
    shares = [(p * best).sum().item(), (q * best).sum().item()]
    assert shares[0] - shares[1] == pytest.approx(2 * variation)
    # the package's loss there, from samples in the exact shares
    counts_p, counts_q = ((1e5 * share).round().long() for share in (p, q))
    loss = room.hinge_discriminator_loss(
        best.repeat_interleave(counts_p), best.repeat_interleave(counts_q)
    )
    assert loss.item() == pytest.approx(2 - 2 * variation, abs=1e-4)


@pytest.mark.equation("10.15")
def test_the_penalty_of_a_linear_discriminator_is_its_squared_length():
    """The penalty is the mean squared slope by the features: of a linear one, its weights'."""
    weights = [
        torch.randn(width, generator=torch.Generator().manual_seed(width)) for width in (3, 5)
    ]

    def linear(*features):
        return torch.stack([f @ w for f, w in zip(features, weights, strict=True)], dim=1)

    features = [torch.randn(7, width) for width in (3, 5)]
    penalty = room.r1_penalty(linear, features)
    assert penalty.item() == pytest.approx(sum((w**2).sum().item() for w in weights), rel=1e-5)


@pytest.mark.equation("10.15")
def test_the_penalty_makes_a_discriminator_flatter():
    """Descending it lowers the slopes: it is differentiable by the discriminator."""
    torch.manual_seed(0)
    discriminator = room.Discriminator([4, 4], hidden=8)
    for layer in discriminator.last:
        nn.init.normal_(layer.weight)
    features = [torch.randn(32, 4) for _ in range(2)]
    optimizer = torch.optim.SGD(discriminator.parameters(), 0.05)
    before = room.r1_penalty(discriminator, features)
    for _ in range(20):
        dmd.update(optimizer, room.r1_penalty(discriminator, features), 10.0)
    assert room.r1_penalty(discriminator, features) < 0.7 * before


# Networks


def denoisers() -> list[tuple[EDMDenoiser, tuple[int, ...], torch.Tensor | None]]:
    torch.manual_seed(0)
    mlp = EDMDenoiser(MLP(hidden=16))
    unet = EDMDenoiser(UNet(width=8, embedding=16))
    return [(mlp, (2,), None), (unet, (1, 8, 8), torch.tensor([0, 1, 2]))]


@pytest.mark.parametrize(("denoiser", "shape", "label"), denoisers())
def test_features_are_frozen_and_let_the_gradient_through_to_the_samples(denoiser, shape, label):
    denoiser.requires_grad_(False).eval()
    features = room.FrozenFeatures(denoiser)
    x = torch.randn(3, *shape, requires_grad=True)
    found = features(x, label)
    assert len(found) == len(features.layers) >= 3
    assert all(each.shape[0] == 3 and each.ndim == 2 for each in found)
    discriminator = room.Discriminator([each.shape[1] for each in found])
    assert (discriminator(*found) == 0).all()  # at first it knows nothing
    for layer in discriminator.last:
        nn.init.normal_(layer.weight)
    (slope,) = torch.autograd.grad(discriminator(*found).sum(), x)
    assert (slope.flatten(1).abs().sum(1) > 0).all()
    assert all(p.grad is None for p in denoiser.parameters())
    assert not any(module._forward_hooks for module in denoiser.modules())


def test_other_networks_are_refused():
    with pytest.raises(ValueError, match="Linear has no method feature_layers"):
        room.FrozenFeatures(EDMDenoiser(nn.Linear(2, 2)))


def test_copies_of_a_discriminator_do_not_meet():
    torch.manual_seed(0)
    discriminator = room.Discriminator([3], hidden=4, copies=2)
    for layer in discriminator.last:
        nn.init.normal_(layer.weight)
    x = torch.randn(6, 3, requires_grad=True)
    (slope,) = torch.autograd.grad(discriminator(x)[:3].sum(), x)
    assert (slope[:3] != 0).any()
    assert (slope[3:] == 0).all()
    same = discriminator(torch.ones(6, 3))
    assert not torch.allclose(same[:3], same[3:])


# The whole


class Affine(nn.Module):
    """x = mean + A z: what it makes is known."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor([0.5, -0.4]))
        self.factor = nn.Parameter(0.5 * torch.eye(2))

    def forward(self, z, label=None):
        return self.mean + z @ self.factor.T


def trained(objective: room.Objective, steps: int = 250) -> Affine:
    """A student that only has to learn the mean and the width of a Gaussian."""
    target = GaussianMixture.isotropic(torch.zeros(1, 2), 0.5)
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    student = Affine()
    features = room.FrozenFeatures(EDMDenoiser(MLP(hidden=32)).requires_grad_(False))
    discriminator = room.Discriminator([32] * 3, hidden=32)
    optimizers = [
        torch.optim.Adam(student.parameters(), 0.01, betas=(0.0, 0.99)),
        torch.optim.Adam(discriminator.parameters(), 0.003, betas=(0.0, 0.99)),
    ]
    for _ in range(steps):
        x_real = target.sample(128, rng=rng)
        batch = dmd.Batch(torch.randn(128, 2, generator=rng), y_ref=x_real)
        room.iteration(student, target, features, discriminator, *optimizers, batch, objective, rng)
    return student


@pytest.mark.equation("10.16")
def test_the_teacher_alone_collapses_and_both_terms_hold_the_width():
    """For one Gaussian the sum of both terms keeps a width that the teacher's term alone loses."""
    alone = trained(room.Objective(adversarial=0))
    assert alone.mean.norm() < 0.1
    assert alone.factor.norm() < 0.1
    both = trained(room.Objective(distillation=0.1))
    width = both.factor.detach().det().abs().sqrt()
    assert both.mean.norm() < 0.25
    assert 0.25 < width < 0.75  # the data's is 0.5


@pytest.mark.equation("10.16")
def test_the_terms_add_up_with_their_factors():
    """The student's loss is the adversarial term plus lambda times the teacher's."""
    x = torch.randn(9, 2, generator=torch.Generator().manual_seed(0))
    target = data.ring()
    judge = lambda x, label: x  # noqa: E731

    def value(adversarial, distillation):
        objective = room.Objective(adversarial, distillation)
        rng = torch.Generator().manual_seed(1)
        return room.generator_loss(x, target, judge, None, objective, rng).item()

    apart = value(1.0, 0.0), value(0.0, 1.0)
    assert apart[0] == pytest.approx(-x.mean().item())
    assert value(1.0, 2.5) == pytest.approx(apart[0] + 2.5 * apart[1], rel=1e-5)


def test_at_first_the_discriminators_loss_is_two_and_it_falls_while_samples_differ():
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    student = OneStepGenerator(EDMDenoiser(MLP(hidden=16)))
    features = room.FrozenFeatures(EDMDenoiser(MLP(hidden=16)).requires_grad_(False))
    discriminator = room.Discriminator([16] * 3)
    optimizers = [
        torch.optim.Adam(student.parameters(), 1e-5),
        torch.optim.Adam(discriminator.parameters(), 1e-2),
    ]
    losses = []
    for _ in range(40):
        x_real = data.ring().sample(64, rng=rng)
        batch = dmd.Batch(torch.randn(64, 2, generator=rng), y_ref=x_real)
        loss = room.iteration(
            student, data.ring(), features, discriminator, *optimizers, batch,
            room.Objective(distillation=0), rng,
        )  # fmt: skip
        losses.append(loss)
    assert losses[0] == pytest.approx(2.0)
    assert losses[-1] < 1.0


def little_task() -> Task:
    torch.manual_seed(0)
    teacher = EDMDenoiser(MLP(hidden=16, layers=2)).requires_grad_(False).eval()

    def draw(count, rng):
        return 0.7 * torch.randn(count, 2, generator=rng), None

    return Task("little", teacher, (2,), 0, draw, lambda x, label: (0.0, 0.0))


def test_the_recipe_spends_its_budget_and_repeats():
    (method,) = METHODS
    z = torch.randn(10, 2, generator=torch.Generator().manual_seed(0))
    outcomes = []
    for seed in (0, 0, 1):
        task = little_task()
        budget = Budget(100_000, task.teacher)
        samplers = method.train(task, budget, seed)
        assert sorted(samplers) == [1]
        assert 0.8 < budget.spent / budget.passes <= 1
        outcomes.append(samplers[1](z, None))
    assert torch.equal(outcomes[0], outcomes[1])
    assert not torch.equal(outcomes[0], outcomes[2])
    assert math.isfinite(outcomes[0].sum().item())
    assert method.needs_data
    assert not method.needs_pairs
    assert method.extra_networks == 1

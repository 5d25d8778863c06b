"""Chapter 5: its equations, and claims it makes, on the package's own functions."""

import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from dmd_tutorial import dmd
from dmd_tutorial.anchor import LPIPS, l2
from dmd_tutorial.data import two_modes
from dmd_tutorial.metrics import frechet_distance, precision_recall
from dmd_tutorial.mixtures import GaussianMixture
from dmd_tutorial.noise import karras_grid
from dmd_tutorial.samplers import sample

ROOT = Path(__file__).parents[1]
BENCHMARK = ROOT / "benchmarks" / "figure3.py"


@pytest.fixture
def experiment() -> SimpleNamespace:
    """What the chapter's first cells define, as the benchmark reads it."""
    spec = importlib.util.spec_from_file_location("figure3", BENCHMARK)
    figure3 = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figure3)
    return figure3.chapter()


def one_mode(distance=4.0, std=0.4) -> GaussianMixture:
    return GaussianMixture.isotropic(torch.tensor([[distance / 2, 0.0]]), std)


def plane_integral(values, step) -> float:
    return (values * step**2).sum().item()


def plane(end=9.0, step=0.03):
    ticks = torch.arange(-end, end, step, dtype=torch.float64)
    return torch.cartesian_prod(ticks, ticks), step


@pytest.mark.equation("5.1")
@pytest.mark.parametrize("weight", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("distance", [1.0, 4.0])
def test_a_dropped_mode_costs_at_most_the_logarithm_of_what_is_kept(weight, distance):
    """Reverse KL of a generator that makes one mode only is log(1/w) less the modes' overlap."""
    centres = torch.tensor([[distance / 2, 0.0], [-distance / 2, 0.0]])
    target = GaussianMixture.isotropic(centres, 0.4, torch.tensor([weight, 1 - weight]))
    points, step = plane(6.0, 0.04)
    kept = one_mode(distance).log_prob(points)
    kl = plane_integral(kept.exp() * (kept - target.log_prob(points)), step)
    lost = GaussianMixture.isotropic(centres[1:], 0.4).log_prob(points) + math.log(1 - weight)
    overlap = torch.log1p((lost - math.log(weight) - kept).exp())
    subtracted = plane_integral(kept.exp() * overlap, step)
    assert kl == pytest.approx(-math.log(weight) - subtracted, abs=1e-4)
    assert kl <= -math.log(weight) + 1e-4
    if distance == 4.0:
        assert kl == pytest.approx(-math.log(weight), abs=1e-3)


@pytest.mark.equation("5.2")
@pytest.mark.parametrize("sigma", [0.1, 1.0, 3.0])
def test_pull_to_a_lost_mode_is_its_responsibility_times_the_way(sigma):
    """Where one mode is made, the scores differ by r_2 (mu_2 - mu_1) / v; both by autograd."""
    target, generator = two_modes(), one_mode()
    x = torch.randn(200, 2, dtype=torch.float64) * 2
    x.requires_grad_()

    def gradient(log_prob):
        return torch.autograd.grad(log_prob.sum(), x)[0]

    difference = gradient(target.log_prob(x, sigma)) - gradient(generator.log_prob(x, sigma))
    # responsibility by Bayes' rule from the two noisy densities
    left = GaussianMixture.isotropic(torch.tensor([[-2.0, 0.0]]), 0.4).log_prob(x, sigma).exp()
    right = generator.log_prob(x, sigma).exp()
    way = torch.tensor([-4.0, 0.0], dtype=torch.float64) / (0.16 + sigma**2)
    expected = (left / (left + right))[:, None] * way
    torch.testing.assert_close(difference, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.equation("5.3")
@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0, 8.0])
def test_mean_responsibility_of_a_lost_mode_is_between_one_and_two_tails(sigma):
    """The mean of r_2 lies between Phi(-u) and 2 Phi(-u), and the overlap is 2 Phi(-u)."""
    std = math.sqrt(0.16 + sigma**2)
    points, step = plane(2 + 8 * std, std / 25)
    a = one_mode().log_prob(points, sigma).exp()
    b = GaussianMixture.isotropic(torch.tensor([[-2.0, 0.0]]), 0.4).log_prob(points, sigma).exp()
    tail = 0.5 * math.erfc(4 / std / 2 / math.sqrt(2))
    overlap = plane_integral(torch.minimum(a, b), step)
    mean = plane_integral(a * two_modes().responsibilities(points, sigma)[:, 0], step)
    assert overlap == pytest.approx(2 * tail, rel=0.02)
    assert tail < mean < 2 * tail


def by_quadrature(function, mean, variance):
    """Mean of a function of places on the axis, under a Gaussian there."""
    n = torch.linspace(-9, 9, 2001, dtype=torch.float64)
    x = torch.as_tensor(mean) + math.sqrt(variance) * n
    density = torch.exp(-(n**2) / 2) / math.sqrt(2 * math.pi)
    return torch.trapezoid(density * function(x), n)


def on_axis(x):
    return torch.stack([x, torch.zeros_like(x)], dim=1)


@pytest.mark.equation("5.4")
@pytest.mark.parametrize("width", [0.4, 1.3])
@pytest.mark.parametrize(
    ("distance", "std", "sigma"), [(4.0, 0.4, 1.0), (4.0, 0.4, 3.0), (2, 0.5, 0.3)]
)
def test_a_critic_that_knows_a_group_leaves_its_centre_to_the_teacher(distance, std, sigma, width):
    """The mean of s_real - s_fake over a group is the tanh formula, and falls down KL."""
    target, m, v = two_modes(distance, std), distance / 2, std**2 + sigma**2
    variance = width**2 + sigma**2
    for centre in (0.0, 0.3, 1.1):
        # the group itself, as a mixture of one: its score is the exact critic's
        along = torch.diag(torch.tensor([width**2, std**2], dtype=torch.float64))
        group = GaussianMixture(torch.tensor([[centre, 0.0]]), along[None])
        fake = by_quadrature(lambda x, g=group: g.score(on_axis(x), sigma)[:, 0], centre, variance)
        real = by_quadrature(lambda x: target.score(on_axis(x), sigma)[:, 0], centre, variance)
        assert fake.item() == pytest.approx(0, abs=1e-9)
        mean_tanh = by_quadrature(lambda x: torch.tanh(m * x / v), centre, variance)
        assert (m * mean_tanh.item() - centre) / v == pytest.approx(real.item(), abs=1e-7)
        at = torch.tensor(centre, dtype=torch.float64, requires_grad=True)
        log_p = by_quadrature(lambda x: target.log_prob(on_axis(x), sigma), at, variance)
        (slope,) = torch.autograd.grad(-log_p, at)  # of KL: the entropy does not depend on it
        assert -slope.item() == pytest.approx(real.item(), abs=1e-7)


@pytest.mark.equation("5.5")
@pytest.mark.parametrize(("distance", "std"), [(4.0, 0.4), (3.0, 0.9), (2.2, 0.2)])
def test_border_of_a_group_that_keeps_its_width(distance, std):
    """Below sqrt(m^2 / 1.461^2 - tau^2) a group is pushed back from the middle, above it not."""
    u = 1.461
    mean = by_quadrature(lambda n: 1 / torch.cosh(u * n) ** 2, 0.0, 1.0)
    assert u**2 * mean.item() == pytest.approx(1, abs=1e-3)
    border = math.sqrt((distance / 2 / u) ** 2 - std**2)

    def force(sigma, centre):
        """Mean score of the target over the group, towards larger places."""
        target = two_modes(distance, std)
        return by_quadrature(
            lambda x: target.score(on_axis(x), sigma)[:, 0], centre, std**2 + sigma**2
        ).item()

    near = 0.02 * distance
    assert force(0.97 * border, near) > 0 > force(1.03 * border, near)


@pytest.mark.equation("5.6")
def test_anchor_is_zero_for_the_ode_map_and_for_nothing_else():
    """The anchor's loss vanishes for T itself, known in closed form for one Gaussian."""
    mean, std, top = torch.tensor([1.0, -0.5]), 0.7, 80.0
    teacher = GaussianMixture.isotropic(mean[None], std)
    z = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    # the ODE keeps (x - mean) / sqrt(std^2 + sigma^2) constant on its way
    exact = mean + std * (top * z - mean) / math.sqrt(std**2 + top**2)
    errors = [l2(exact, sample(teacher, z, steps=steps)).item() for steps in (18, 100)]
    assert errors[0] < 5e-3
    assert errors[1] < errors[0] / 50  # second order: a loss of the solver's error squared
    assert l2(mean + std * z.flip(1), sample(teacher, z, steps=100)).item() > 0.3


@pytest.mark.equation("5.7")
def test_least_squares_splits_into_error_and_floor():
    """Mean square error is the distance to the conditional mean plus the conditional variance."""
    rng = torch.Generator().manual_seed(0)
    z, noise = torch.randn(2, 400_000, generator=rng, dtype=torch.float64)
    y = torch.sin(2 * z) + (0.3 + 0.2 * z**2) * noise  # known mean and spread at each z
    for guess in (0.5 * z, torch.zeros_like(z), torch.sin(2 * z)):
        total = (guess - y) ** 2
        split = ((guess - torch.sin(2 * z)) ** 2).mean() + ((0.3 + 0.2 * z**2) ** 2).mean()
        assert abs(total.mean() - split) < 5 * total.std() / math.sqrt(len(z))
    # independent of z, the best guess is one point: the mean
    shuffled = y[torch.randperm(len(y), generator=rng)]
    slope = (z * (shuffled - shuffled.mean())).mean() / (z**2).mean()
    assert abs(slope) < 5 * shuffled.std() / math.sqrt(len(z))


@pytest.mark.equation("5.8")
def test_anchor_bounds_the_wasserstein_distance():
    """Joining answers to the same noise is one coupling; the best costs no more."""
    rng = torch.Generator().manual_seed(0)
    for _ in range(5):  # Gaussians: the distance in closed form
        a, b = torch.randn(2, 3, 3, generator=rng, dtype=torch.float64)
        zero = torch.zeros(3, dtype=torch.float64)
        squared = frechet_distance(zero, a @ a.T, zero, b @ b.T)
        assert squared < ((a - b) ** 2).sum().item()
    # a common, increasing map: nothing can be joined better
    diagonal = torch.rand(2, 3, generator=rng, dtype=torch.float64) + 0.1
    squared = frechet_distance(
        zero, torch.diag(diagonal[0] ** 2), zero, torch.diag(diagonal[1] ** 2)
    )
    assert squared == pytest.approx(((diagonal[0] - diagonal[1]) ** 2).sum().item(), rel=1e-5)
    # samples of any shape: the best assignment
    z = torch.randn(200, 2, generator=rng)
    x, y = torch.stack([z[:, 0] ** 2, z[:, 1]], dim=1), z.flip(1).sign() + 0.1 * z
    cost = torch.cdist(x, y) ** 2
    best = cost[linear_sum_assignment(cost.numpy())].mean()
    assert best < ((x - y) ** 2).sum(dim=1).mean()


@pytest.mark.equation("5.9")
@pytest.mark.parametrize("share_lost", [0.0, 0.3, 1.0])
def test_missing_mass_is_bounded_by_the_anchor(share_lost):
    """Mass of T in a region that G has not near it is at most the loss over R^2."""
    rng = torch.Generator().manual_seed(0)
    centre = torch.tensor([-2.0, 0.0])
    y = sample(two_modes(), torch.randn(4000, 2, generator=rng))
    at_left = y[:, 0] < 0
    moved = at_left & (torch.rand(len(y), generator=rng) < share_lost)
    x = torch.where(moved[:, None], y + torch.tensor([4.0, 0.0]), y)  # answers in the other mode
    loss = ((x - y) ** 2).sum(dim=1).mean().item()
    for r in (0.5, 1.0, 2.0):
        near_y = ((y - centre).norm(dim=1) < 1.0).float().mean().item()
        near_x = ((x - centre).norm(dim=1) < 1.0 + r).float().mean().item()
        assert near_y - near_x <= loss / r**2 + 1e-6
    if share_lost == 1.0:  # and what the chapter reads off: w r^2 at least
        weight = at_left.float().mean().item()
        assert loss == pytest.approx(16 * weight, rel=1e-5)
        assert near_y - near_x > 0.4


class Features(nn.Module):
    """A backbone of one's own: features that are known, whatever the image."""

    def __init__(self, channels):
        super().__init__()
        self.channels, self.image = channels, 0

    def forward(self, x):
        """Image 1 has 3 in channel 0, image 2 has 5 in channel 1; one of two places is equal."""
        self.image += 1
        maps = []
        for channels in self.channels:
            features = torch.zeros(len(x), channels, 1, 2)
            features[:, 2, 0, 0] = float(self.image)  # equal direction, other length
            features[:, self.image - 1, 0, 1] = 3.0 if self.image == 1 else 5.0
            maps.append(features)
        return maps


@pytest.mark.equation("5.10")
def test_lpips_by_hand():
    """LPIPS is the weighted squared difference of unit feature vectors, averaged over places."""
    lpips = LPIPS("alex", size=64, random_backbone=True)
    weights = [lin.model[-1].weight.flatten() for lin in lpips.network.lins]
    assert all((omega >= 0).all() for omega in weights)
    lpips.network.net = Features([len(omega) for omega in weights])
    found = lpips(torch.zeros(2, 1, 8, 8), torch.ones(2, 1, 8, 8)).item()
    # orthogonal unit vectors at one place of two: both channels count once, lengths do not
    expected = sum(((omega[0] + omega[1]) / 2).item() for omega in weights)
    assert found == pytest.approx(expected, rel=1e-5)


class Table(nn.Module):
    """A generator whose answers are its parameters, in the rows that z names."""

    def __init__(self, rows):
        super().__init__()
        self.rows = nn.Parameter(rows)

    def forward(self, z, label=None):
        return self.rows[z[:, 0].long()]


@pytest.mark.equation("5.11")
@pytest.mark.parametrize("pairs", [3, 8])
def test_what_each_sample_is_told(pairs):
    """One SGD step moves samples by -g/#x and anchored ones by -2 lambda (x - y)/#x_ref."""
    rng = torch.Generator().manual_seed(0)
    batch, lambda_reg = 5, 0.7
    before = torch.randn(batch + pairs, 2, generator=rng)
    generator, y = Table(before.clone()), torch.randn(pairs, 2, generator=rng)
    optimizer = torch.optim.SGD(generator.parameters(), lr=1.0)
    objective = dmd.Objective(
        weighting=dmd.Weighting.NONE, lambda_reg=lambda_reg, critic_steps=0, clip=math.inf,
        grid=karras_grid(sigma_max=2.0),
    )  # fmt: skip
    row = torch.arange(batch + pairs)[:, None].expand(-1, 2).float()
    record = dmd.iteration(
        generator, dmd.zero_score, two_modes(), optimizer, None,
        dmd.Batch(row[:batch], z_ref=row[batch:], y_ref=y), objective, rng,
    )  # fmt: skip
    step = before - generator.rows.detach()
    # with w_t = sigma^2 the gradient g is the bare difference of denoisers
    g = record.denoised_fake - record.denoised_real
    torch.testing.assert_close(step[:batch], g / (batch * 2), rtol=1e-4, atol=1e-6)
    expected = 2 * lambda_reg * (before[batch:] - y) / (pairs * 2)
    torch.testing.assert_close(step[batch:], expected, rtol=1e-4, atol=1e-6)


# Claims


@pytest.mark.parametrize(("distance", "std"), [(4.0, 0.4), (3.0, 1.0), (2.2, 0.2)])
def test_border_between_one_hill_and_two(distance, std):
    """Exercise 5.1: below the level sqrt(m^2 - tau^2) the noised target has two hills."""
    border = math.sqrt(distance**2 / 4 - std**2)

    def hills(sigma):
        x = torch.linspace(-distance, distance, 4001, dtype=torch.float64)
        height = two_modes(distance, std).log_prob(on_axis(x), sigma)
        inner = height[1:-1]
        return int(((inner > height[:-2]) & (inner > height[2:])).sum())

    assert hills(0.97 * border) == 2
    assert hills(1.03 * border) == 1


def score_over_group(sigma, centre, width):
    """Mean score of the target over a group on the axis, towards larger places."""
    return by_quadrature(
        lambda x: two_modes().score(on_axis(x), sigma)[:, 0], centre, width**2 + sigma**2
    ).item()


def test_a_single_sample_that_its_critic_knows_has_its_border_at_1_35():
    assert score_over_group(1.33, 0.02, width=0) > 0 > score_over_group(1.36, 0.02, width=0)


@pytest.mark.parametrize(("sigma", "rest"), [(1.0, 1.68), (1.2, 1.13), (1.3, 0.35)])
def test_where_a_known_group_that_keeps_its_width_comes_to_rest(sigma, rest):
    assert score_over_group(sigma, rest - 0.02, 0.4) > 0 > score_over_group(sigma, rest + 0.02, 0.4)


def test_a_group_that_may_stretch_leaves_its_mode_between_0_72_and_0_74():
    """Down the divergence in place and width, without any training."""

    def settles_at(sigma):
        place = torch.tensor([1.8, 0.4], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([place], lr=0.1)
        for _ in range(1000):
            variance = place[1] ** 2 + sigma**2
            n = torch.linspace(-8, 8, 81, dtype=torch.float64)
            density = torch.softmax(-(n**2) / 2, dim=0)
            x = on_axis(place[0] + variance.sqrt() * n)
            kl = -variance.log() / 2 - density @ two_modes().log_prob(x, sigma)
            optimizer.zero_grad()
            kl.backward()
            optimizer.step()
        return place.tolist()

    assert settles_at(0.72) == pytest.approx([1.84, 0.70], abs=0.01)
    assert settles_at(0.74) == pytest.approx([0, 1.79], abs=0.01)


def test_one_stray_sample_can_cover_a_lost_mode():
    """Why recall is read beside the share of the left mode."""
    rng = torch.Generator().manual_seed(0)
    target = two_modes().sample(1000, rng=rng)
    right = one_mode().sample(1000, rng=rng)
    stray = torch.cat([right[1:], torch.tensor([[-1.0, 0.0]])])
    assert precision_recall(right, target)[1] < 0.55
    assert precision_recall(stray, target)[1] > 0.95


def test_each_student_draws_from_its_own_grid(experiment):
    levels = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    weight = nn.Parameter(torch.zeros(()))
    batch = dmd.Batch(torch.zeros(6, 2), sigma=torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0, 0.0]))
    record, _ = experiment.look_up(levels)(
        torch.optim.SGD([weight], lr=1),
        lambda part: (weight, dmd.Record(part.z, part.sigma)),
        batch,
        math.inf,
    )
    assert record.sigma.tolist() == [1, 2, 2, 4, 3, 3]


@pytest.mark.parametrize("matching", [True, False])
def test_students_side_by_side_do_not_touch_one_another(experiment, matching):
    """Other pairs for the first student change this student and no other, to the bit."""
    first, teacher = experiment.start((1.5, 0.5), 0.3, copies=3), two_modes()
    pairs = experiment.draw_pairs(teacher, 8, copies=3)
    steps = {"critic_steps": int(matching), "matching": matching}
    objective = experiment.objective(1.0, lambda_reg=1.0, **steps)
    y = torch.cat([-pairs.y[:1], pairs.y[1:]])
    made, other = (
        experiment.points(
            experiment.train(first, teacher, objective, each, iterations=5, block=4), count=20
        )
        for each in (pairs, pairs._replace(y=y))
    )
    assert torch.equal(made[1:], other[1:])
    assert not torch.equal(made[0], other[0])


def test_the_outcomes_are_told_apart(experiment):
    target, judge = two_modes(), experiment.judge
    x = target.sample(2000, rng=torch.Generator().manual_seed(0))
    right = one_mode().sample(2000, rng=torch.Generator().manual_seed(0))
    assert judge(x, target).name == "both modes"
    assert judge(x, target).spread == pytest.approx(0.4, rel=0.1)
    assert judge(right, target).name == "one mode"
    assert judge(torch.tensor([2.0, 0.0]) + 0.01 * x, target).name == "one point"
    assert judge(1.5 * x, target).name == "neither"
    assert judge(torch.tensor([2.0, 0.0]) + 0.5 * (right - 2), target).name == "neither"


def test_real_score_alone_collapses_in_every_seed(experiment):
    first = experiment.start((1.5, 0.5), 0.3)
    what = experiment.objective(1.0, lambda_reg=0, critic_steps=0)
    trained = experiment.train(first, two_modes(), what, iterations=300)
    names = [experiment.judge(x, two_modes()).name for x in experiment.points(trained)]
    assert names.count("one point") >= 9


def test_shuffled_pairs_teach_the_mean(experiment):
    teacher, first = two_modes(), experiment.start((1.5, 0.5), 0.3)
    pairs = experiment.draw_pairs(teacher, 500)
    what = experiment.objective(1.0, matching=False, lambda_reg=1.0, critic_steps=0)
    spread = {}
    for name, order in (("ode", torch.arange(500)), ("shuffled", torch.randperm(500))):
        mixed = pairs._replace(y=pairs.y[:, order])
        trained = experiment.train(first, teacher, what, mixed, iterations=300)
        spread[name] = experiment.points(trained)[..., 0].std().item()
    assert spread["ode"] > 1.6
    assert spread["shuffled"] < 0.8

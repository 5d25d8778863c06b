"""Consistency models: losses and pairs against the closed flow of a Gaussian, and recipes."""

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from benchmarks.survey.consistency import METHODS
from benchmarks.survey.task import Budget, Method, Task
from dmd_tutorial import samplers
from dmd_tutorial.denoisers import EDMDenoiser
from dmd_tutorial.mixtures import GaussianMixture
from dmd_tutorial.networks.mlp import MLP
from dmd_tutorial.networks.unet import UNet
from dmd_tutorial.noise import SIGMA_MIN, karras_grid
from dmd_tutorial.survey import consistency as cm

DOUBLE = torch.float64
WIDE = torch.tensor([[2.0, 0.3], [0.3, 0.5]], dtype=DOUBLE)
GAUSSIAN = GaussianMixture(torch.tensor([[0.7, -0.4]]), WIDE[None])
MODES = GaussianMixture.isotropic(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), 0.3)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flow(x: Tensor, sigma: Tensor, sigma_next: Tensor, label: Tensor | None = None) -> Tensor:
    """The exact path of a Gaussian: along each axis the offset keeps its number of deviations."""
    variances, axes = torch.linalg.eigh(WIDE.to(x))
    offset = (x - GAUSSIAN.means.to(x)) @ axes
    ratio = (variances + sigma_next[:, None] ** 2) / (variances + sigma[:, None] ** 2)
    return GAUSSIAN.means.to(x) + (offset * ratio.sqrt()) @ axes.T


def to_the_end(x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
    return flow(x, sigma, torch.full_like(sigma, SIGMA_MIN))


def drawn(count: int, bins: int = 18, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Data, noise, and neighbouring levels of a grid."""
    source = rng(seed)
    x = GAUSSIAN.sample(count, rng=source).double()
    noise = torch.randn(x.shape, generator=source, dtype=DOUBLE)
    sigma, sigma_next = cm.neighbour_levels(count, karras_grid(bins), source)
    return x, noise, sigma.double(), sigma_next.double()


def network(classes: int = 0, dim: int = 2) -> EDMDenoiser:
    """A small denoiser whose last layer is not zero."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        mlp = MLP(dim, hidden=16, layers=2, classes=classes)
        nn.init.normal_(mlp.out.weight, std=0.2)
    return EDMDenoiser(mlp, sigma_data=1.0)


# The model


def test_a_consistency_model_is_the_identity_at_the_end_of_a_path():
    model = cm.ConsistencyModel(network())
    x = torch.randn(50, 2, generator=rng())
    torch.testing.assert_close(model(x, torch.full((50,), SIGMA_MIN)), x, rtol=0, atol=0)
    assert (model(x, torch.full((50,), 1.0)) - x).abs().mean() > 0.1


def test_a_consistency_model_starts_as_its_denoiser():
    denoiser = network()
    model = cm.ConsistencyModel(denoiser)
    x = torch.randn(60, 2, generator=rng())
    for level in (0.05, 1.0, 80.0):
        sigma = torch.full((60,), level)
        x_noisy = x + level * torch.randn(60, 2, generator=rng(1))
        difference = model(x_noisy, sigma) - denoiser(x_noisy, sigma)
        assert difference.abs().max() < 4 * SIGMA_MIN


def test_below_the_end_of_a_path_there_is_no_model():
    with pytest.raises(ValueError, match=r"0\.001, paths end at 0\.002"):
        cm.ConsistencyModel(network())(torch.zeros(2, 2), torch.tensor([1.0, 0.001]))


# Paths


def test_solve_follows_the_closed_flow_with_second_order():
    source = rng()
    sigma = torch.rand(200, generator=source, dtype=DOUBLE) * 5 + 1
    sigma_next = sigma * torch.rand(200, generator=source, dtype=DOUBLE).clamp_min(0.05)
    x = GAUSSIAN.sample(200, rng=source).double() + sigma[:, None]
    exact = flow(x, sigma, sigma_next)
    errors = [
        (cm.solve(GAUSSIAN, x, sigma, sigma_next, steps=steps) - exact).abs().max().item()
        for steps in (8, 16, 32)
    ]
    assert errors[-1] < 5e-3
    assert all(3.2 < a / b < 4.8 for a, b in itertools.pairwise(errors))


def test_solve_agrees_with_the_sampler_of_the_book():
    z = torch.randn(100, 2, generator=rng(), dtype=DOUBLE)
    levels = karras_grid(19).flip(0)
    *_, last = samplers.heun(MODES, z, levels)
    ones = torch.ones(100, dtype=DOUBLE)
    ours = cm.solve(MODES, 80.0 * z, 80.0 * ones, SIGMA_MIN * ones, steps=18)
    torch.testing.assert_close(ours, last.x, rtol=1e-9, atol=1e-9)


# Pairs and loss


def test_the_exact_flow_has_no_distillation_loss_but_the_error_of_the_teachers_step():
    losses = []
    for bins in (10, 20, 40):
        x, noise, sigma, sigma_next = drawn(2000, bins)
        pair = cm.distillation_pair(GAUSSIAN, x, noise, sigma, sigma_next)
        losses.append(cm.consistency_loss(to_the_end, to_the_end, pair).item())
    assert losses[-1] < 1e-6
    assert losses[0] > 16 * losses[1] > 256 * losses[2]  # Heun: a step's error is of third order

    def halved(x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        return to_the_end(x, sigma) * (1 - 0.5 * (sigma[:, None] > 1))

    assert cm.consistency_loss(halved, halved, pair) > 100 * losses[-1]


def test_the_training_pair_has_the_variances_of_its_two_levels():
    count = 200_000
    x = GAUSSIAN.sample(count, rng=rng()).double()
    noise = torch.randn(x.shape, generator=rng(1), dtype=DOUBLE)
    sigma, sigma_next = torch.full((count,), 2.0), torch.full((count,), 1.0)
    pair = cm.training_pair(x, noise, sigma.double(), sigma_next.double())
    for points, level in ((pair.x, 2.0), (pair.x_next, 1.0)):
        wanted = WIDE.diagonal() + level**2
        torch.testing.assert_close(points.var(dim=0), wanted, rtol=0.02, atol=0)
    # one noise for both: their difference is noise of the difference of the levels
    torch.testing.assert_close(pair.x - pair.x_next, noise, rtol=1e-6, atol=1e-6)


def test_the_loss_sends_no_gradient_to_its_target():
    model = cm.ConsistencyModel(network())
    target = copy.deepcopy(model)
    x, noise, sigma, sigma_next = (t.float() for t in drawn(64))
    pair = cm.training_pair(x, noise, sigma, sigma_next)
    cm.consistency_loss(model, target, pair).backward()
    assert all(p.grad is None for p in target.parameters())
    from_copy = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    cm.consistency_loss(model, model, pair).backward()
    for ours, theirs in zip(model.parameters(), from_copy, strict=True):
        torch.testing.assert_close(ours.grad, theirs)


def test_weight_and_distance_of_the_loss():
    x, noise, sigma, sigma_next = drawn(50)
    pair = cm.training_pair(x, noise, sigma, sigma_next)

    def model(x: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
        return x

    rows = (pair.x - pair.x_next).pow(2).mean(1)
    loss = cm.consistency_loss(model, model, pair, weight=sigma)
    torch.testing.assert_close(loss, (sigma * rows).mean())
    a, b = torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.5)
    c = 0.00054 * 48**0.5
    torch.testing.assert_close(cm.pseudo_huber(a, b), torch.tensor([(12 + c**2) ** 0.5 - c]))
    near = torch.full((1, 3, 4, 4), 1e-6)
    torch.testing.assert_close(cm.pseudo_huber(a, near).item(), 48e-12 / (2 * c), rtol=0.1, atol=0)


# Levels


def test_neighbours_are_neighbours():
    grid = karras_grid(20)
    sigma, sigma_next = cm.neighbour_levels(5000, grid, rng())
    index = torch.searchsorted(grid.float(), sigma)
    assert set(index.tolist()) == set(range(1, 20))
    assert torch.equal(sigma_next, grid.float()[index - 1])
    sigma, sigma_next = cm.neighbour_levels(5000, grid, rng(), skip=5)
    index = torch.searchsorted(grid.float(), sigma)
    assert torch.equal(sigma_next, grid.float()[(index - 5).clamp_min(0)])


def test_lognormal_levels_have_the_median_that_was_asked_for():
    grid = karras_grid(1000)
    probability = cm.lognormal_probability(grid, mean=-1.1, std=2.0)
    sigma, _ = cm.neighbour_levels(100_000, grid, rng(), probability=probability)
    assert abs(sigma.log().median() + 1.1) < 0.05
    assert abs(sigma.log().std() - 2.0) < 0.1


def test_the_grid_doubles():
    bins = [cm.doubling_bins(step / 800) for step in range(800)]
    assert bins[0] == 11
    assert bins[-1] == 1281
    assert [bins[100 * i] for i in range(8)] == [11, 21, 41, 81, 161, 321, 641, 1281]
    assert bins == sorted(bins)


# Sampling


def test_multistep_sampling_with_the_exact_flow_has_the_exact_distribution():
    z = torch.randn(100_000, 2, generator=rng(), dtype=DOUBLE)
    for levels in ([80.0], [80.0, 0.8], [80.0, 8.0, 2.0, 0.5]):
        steps = list(cm.multistep(to_the_end, z, torch.tensor(levels), rng=rng(1)))
        assert [step.evaluations for step in steps] == list(range(1, len(levels) + 1))
        x = steps[-1].x
        torch.testing.assert_close(x.mean(0), GAUSSIAN.means[0], rtol=0, atol=0.03)
        torch.testing.assert_close(x.T.cov(), WIDE, rtol=0.03, atol=0.03)


def test_one_evaluation_is_the_model_at_the_highest_level():
    model = cm.ConsistencyModel(network())
    z = torch.randn(10, 2, generator=rng())
    (step,) = cm.multistep(model, z, torch.tensor([80.0]))
    with torch.no_grad():
        torch.testing.assert_close(step.x, model(80.0 * z, torch.full((10,), 80.0)))


# Consistency trajectory models


class ExactJumps:
    """A trajectory model of the Gaussian: exact, or too long by a factor."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def __call__(self, x: Tensor, sigma: Tensor, sigma_next: Tensor, label: object) -> Tensor:
        return x + self.factor * (flow(x, sigma, sigma_next) - x)


def test_a_trajectory_model_starts_as_its_denoiser_for_points_and_images():
    images = EDMDenoiser(UNet(width=8), sigma_data=0.5)
    for parameter in images.parameters():
        nn.init.normal_(parameter, std=0.1, generator=rng(2))
    for denoiser, shape in ((network(3), (2,)), (images, (1, 8, 8))):
        model = cm.TrajectoryModel(denoiser)
        x = torch.randn(6, *shape, generator=rng())
        sigma, sigma_next = torch.full((6,), 2.0), torch.linspace(0.1, 2.0, 6)
        label = torch.arange(6) % 3
        g = model(x, sigma, sigma_next, label, aim=True)
        torch.testing.assert_close(g, denoiser(x, sigma, label), rtol=1e-4, atol=1e-5)
        jumped = model(x, sigma, sigma_next, label)
        torch.testing.assert_close(jumped[-1], x[-1])  # no jump at all
        assert (jumped[0] - x[0]).abs().max() > 0.1
    with pytest.raises(ValueError, match="Linear"):
        cm.TrajectoryModel(EDMDenoiser(nn.Linear(2, 2)))


def test_a_trajectory_model_uses_where_it_is_going():
    model = cm.TrajectoryModel(network())
    nn.init.normal_(model.network.hidden[0].weight, std=0.5, generator=rng())
    x, sigma = torch.randn(4, 2, generator=rng()), torch.full((4,), 2.0)
    near, far = (model(x, sigma, s, aim=True) for s in (sigma, 0.01 * sigma))
    assert (near - far).abs().max() > 0.01


def trajectory_batch(steps: int = 20) -> tuple[Tensor, ...]:
    x, noise, _, _ = drawn(500)
    source = rng(3)
    levels = torch.rand(500, 3, generator=source, dtype=DOUBLE).mul(4).sub(2).exp()
    sigma_next, between, sigma = levels.sort(dim=1).values.T
    x_noisy = x + sigma[:, None] * noise
    x_between = cm.solve(GAUSSIAN, x_noisy, sigma, between, steps=steps)
    return x_noisy, x_between, sigma, between, sigma_next


def test_exact_jumps_have_no_trajectory_loss():
    batch = trajectory_batch()
    exact = cm.trajectory_loss(ExactJumps(), ExactJumps(), *batch)
    too_long = cm.trajectory_loss(ExactJumps(1.1), ExactJumps(1.1), *batch)
    assert exact < 1e-6
    assert too_long > 1e-3
    landing = cm.trajectory_loss(ExactJumps(), ExactJumps(), *batch, sigma_min=None)
    assert landing < 1e-6
    x_noisy, x_between, sigma, between, sigma_next = batch
    model = ExactJumps(1.1)
    jumps = model(x_noisy, sigma, sigma_next, None) - model(x_between, between, sigma_next, None)
    landing = cm.trajectory_loss(model, model, *batch, sigma_min=None)
    torch.testing.assert_close(landing, jumps.square().mean())


def test_the_trajectory_loss_trains_the_model_through_the_frozen_target():
    model = cm.TrajectoryModel(network())
    batch = [t.float() for t in trajectory_batch()]
    target = copy.deepcopy(model).requires_grad_(False)
    cm.trajectory_loss(model, target, *batch).backward()
    assert sum(p.grad.abs().sum() for p in model.parameters()) > 0


def test_a_trajectory_models_jumps_compose_and_gamma_1_is_multistep_sampling():
    z = torch.randn(50_000, 2, generator=rng(), dtype=DOUBLE)
    levels = torch.tensor([80.0, 5.0, 0.5, SIGMA_MIN])

    def exact(x: Tensor, sigma: Tensor, sigma_next: Tensor, label: object) -> Tensor:
        return flow(x, sigma, sigma_next)

    *_, last = cm.trajectory_sampler(exact, z, levels)
    ones = torch.ones(len(z), dtype=DOUBLE)
    torch.testing.assert_close(last.x, to_the_end(80.0 * z, 80.0 * ones), rtol=1e-5, atol=1e-5)
    *_, churned = cm.trajectory_sampler(exact, z, levels, gamma=0.7, rng=rng(1))
    torch.testing.assert_close(churned.x.T.cov(), WIDE, rtol=0.04, atol=0.04)
    *_, noisy = cm.trajectory_sampler(exact, z, levels, gamma=1.0, rng=rng(1))
    *_, ours = cm.multistep(to_the_end, z, levels[:-1], rng=rng(1))
    torch.testing.assert_close(noisy.x, ours.x, rtol=1e-5, atol=1e-5)


# Recipes


def small_task(shape: tuple[int, ...], classes: int) -> Task:
    """A task whose teacher has learnt nothing: enough for a few steps."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        points = len(shape) == 1
        inner = MLP(2, 16, 2, classes) if points else UNet(width=8, classes=classes)
        teacher = EDMDenoiser(inner, 0.5)

    def draw(count: int, source: torch.Generator) -> tuple[Tensor, Tensor | None]:
        x = 0.5 * torch.randn(count, *shape, generator=source)
        label = torch.randint(classes, (count,), generator=source) if classes else None
        return x, label

    teacher.requires_grad_(False).eval()
    return Task("small", teacher, shape, classes, draw, lambda samples, label: (0.0, 0.0))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize(("shape", "classes"), [((2,), 0), ((1, 8, 8), 10)], ids=str)
def test_recipes_spend_their_budget_and_repeat(
    method: Method, shape: tuple[int, ...], classes: int
):
    passes = 15_000 if len(shape) == 1 else 4_000
    samples = []
    for seed in (0, 0, 1):
        task = small_task(shape, classes)
        budget = Budget(passes, task.teacher)
        made = method.train(task, budget, seed)
        assert 0.5 * passes < budget.spent <= passes
        budget.close()
        z, label = task.noise(6, rng())
        samples.append(torch.stack([sampler(z, label) for sampler in made.values()]))
        assert samples[-1].shape == (len(made), 6, *shape)
        assert torch.isfinite(samples[-1]).all()
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])


def test_one_step_of_the_flow_in_closed_form():
    """The closed flow used above is the ODE's: its derivative is the slope."""
    x = torch.randn(20, 2, generator=rng(), dtype=DOUBLE)
    sigma = torch.full((20,), 1.5, dtype=DOUBLE)
    step = 1e-6
    slope = (flow(x, sigma, sigma + step) - flow(x, sigma, sigma - step)) / (2 * step)
    exact = (x - GAUSSIAN(x, sigma)) / sigma[:, None]
    torch.testing.assert_close(slope, exact, rtol=1e-6, atol=1e-6)
    assert math.isclose(SIGMA_MIN, 0.002)

"""Chapter 4: its equations, and claims it makes, on the chapter's own code where it has some."""

import copy
import json
import math
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dmd_tutorial import dmd
from dmd_tutorial.denoisers import EDMDenoiser, denoising_weight
from dmd_tutorial.generators import OneStepGenerator
from dmd_tutorial.mixtures import GaussianMixture
from dmd_tutorial.networks import MLP, UNet
from dmd_tutorial.noise import add_noise, dmd_sigma, grid_sigma, karras_grid
from dmd_tutorial.notebook.exercises import chapter4

NOTEBOOK = Path(__file__).parents[1] / "book" / "4-fake-critic.ipynb"
GRID = karras_grid(sigma_max=10.0)


@cache
def chapter() -> dict:
    """The definitions of the chapter (functions, classes, constants), without its experiments."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names: dict = {"GRID": GRID}
    exec(next(source for source in sources if source.startswith("# @title Imports")), names)
    block = r"^(?:def|class) .*?(?=^[^\s)]|\Z)"
    for source in sources:
        if re.search(r"# @title Solution|return \.\.\.|= \.\.\.", source):
            continue
        for constant in re.findall(r"^[A-Z_]+(?:, [A-Z_]+)* = \d.*$", source, flags=re.M):
            exec(constant, names)
        for definition in re.findall(block, source, flags=re.M | re.S):
            exec(definition, names)
    return names


def normal(x, mean, std):
    """Density of a normal distribution in one dimension."""
    return torch.exp(-((x - mean) ** 2) / (2 * std**2)) / (std * math.sqrt(2 * math.pi))


def noise_grid(points=40_001, end=9.0):
    """Ticks of z and the weights of an integral against its density: a fine trapezoid."""
    z = torch.linspace(-end, end, points, dtype=torch.float64)
    return z, normal(z, 0.0, 1.0) * (z[1] - z[0])


@pytest.mark.equation("4.1")
def test_density_is_a_sum_over_preimages():
    """Change of variables: every preimage adds its density, divided by how G stretches there."""
    wavy = chapter()["wavy"]
    ends = torch.tensor([0.6, 1.2], dtype=torch.float64)  # three preimages of every point

    def density(x: float) -> float:
        z = torch.linspace(-8, 8, 8_001, dtype=torch.float64)
        crossing = (wavy(z)[:-1] - x) * (wavy(z)[1:] - x) < 0
        root = ((z[:-1] + z[1:]) / 2)[crossing].requires_grad_()
        (slope,) = torch.autograd.grad(wavy(root).sum(), root)
        return (normal(root, 0.0, 1.0) / slope.abs()).sum().item()

    ticks = torch.linspace(*ends.tolist(), 41)
    expected = np.trapezoid([density(x.item()) for x in ticks], ticks)
    z = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    inside = ((wavy(z) > ends[0]) & (wavy(z) < ends[1])).float().mean().item()
    standard_error = math.sqrt(inside * (1 - inside) / len(z))
    assert abs(expected - inside) < 4 * standard_error + 2e-4


@pytest.mark.equation("4.2")
def test_noisy_density_is_a_mean_of_gaussians():
    """The noised density is the mean over z of a Gaussian around G(z)."""
    b, scale, sigma = 0.7, 0.6, 0.3
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    by_mean = chapter()["noisy_density"](x, sigma, generator=lambda z: scale * z + b)
    exact = normal(x, b, math.hypot(scale, sigma))  # an affine generator's samples are Gaussian
    assert torch.allclose(by_mean, exact, atol=1e-9)

    wavy = chapter()["wavy"]  # and one whose density has no bound: against a histogram
    rng = torch.Generator().manual_seed(0)
    z, noise = torch.randn(2, 1_000_000, generator=rng)
    share = ((wavy(z) + 0.1 * noise - 1.2).abs() < 0.02).double().mean().item()
    density = chapter()["noisy_density"](torch.tensor([1.2], dtype=torch.float64), 0.1).item()
    assert share / 0.04 == pytest.approx(density, rel=0.03)


@pytest.mark.equation("4.3")
@pytest.mark.parametrize("sigma", [0.1, 0.5, 3.0])
def test_score_is_the_mean_sample_behind_a_noisy_one(sigma):
    """The noised score is (D_fake - x) / sigma^2, D_fake the mean G(z) behind a noisy sample."""
    wavy = chapter()["wavy"]
    x = torch.linspace(-2.5, 2.5, 11, dtype=torch.float64).requires_grad_()
    log_density = chapter()["noisy_density"](x, sigma).log()
    (score,) = torch.autograd.grad(log_density.sum(), x)

    z, p_z = noise_grid()
    kernel = normal(x.detach()[:, None], wavy(z), sigma)
    denoised = (kernel * p_z) @ wavy(z) / (kernel @ p_z)
    assert torch.allclose(score, (denoised - x.detach()) / sigma**2, atol=1e-6)


@pytest.mark.equation("4.4")
def test_critic_loss_is_error_plus_floor():
    """The critic's loss is its weighted distance to D_fake plus a floor that no critic lowers."""
    mixture = GaussianMixture.isotropic(torch.tensor([[-1.0, 0.5], [1.0, 0.0]]), 0.3)

    def wrong(x, sigma, label=None):
        return 0.9 * mixture(x, sigma) + 0.05 * torch.sin(3 * x)

    rng = torch.Generator().manual_seed(0)
    count = 200_000
    x = mixture.sample(count, rng=rng)
    sigma = grid_sigma(count, GRID[300:], rng=rng)
    noise = torch.randn(x.shape, generator=rng)
    loss = dmd.critic_loss(wrong, x, sigma, noise)
    floor = dmd.critic_loss(mixture, x, sigma, noise)
    x_noisy = add_noise(x, sigma, noise)
    off = wrong(x_noisy, sigma) - mixture(x_noisy, sigma)
    level = denoising_weight(sigma)[:, None]
    error = (level * off**2).mean()
    cross = (2 * level * off * (mixture(x_noisy, sigma) - x)).mean(dim=1)
    assert abs(loss - error - floor) < 4 * cross.std() / math.sqrt(count)
    assert error > 10 * cross.std() / math.sqrt(count)  # so that the error could not be left out

    # for one Gaussian the floor has a closed form: the variance left when x_noisy is known
    S, sigma = 0.4, torch.full((count,), 0.7)
    x = S * torch.randn(count, 1, generator=rng)
    noise = torch.randn(x.shape, generator=rng)
    found = dmd.critic_loss(GaussianMixture.isotropic([[0.0]], S), x, sigma, noise)
    left = S**2 * 0.7**2 / (S**2 + 0.7**2)
    assert found.item() == pytest.approx((1 / 0.49 + 4) * left, rel=0.02)


@pytest.mark.equation("4.5")
def test_affine_denoiser_is_the_best_linear_guess():
    """An affine generator's denoiser is b + C (C + sigma^2 I)^-1 (x - b): regression finds it."""
    A, b = torch.tensor([[0.5, 0.2], [-0.3, 0.8]]), torch.tensor([0.4, -1.0])
    rng = torch.Generator().manual_seed(0)
    z, noise = torch.randn(2, 400_000, 2, generator=rng)
    x = z @ A.mT + b
    x_noisy = x + 0.6 * noise
    inputs = torch.cat([x_noisy, torch.ones(len(x), 1)], dim=1).double()
    fitted = torch.linalg.lstsq(inputs, x.double()).solution
    queries = torch.tensor([[0.0, 0.0], [2.0, -1.0], [-1.0, 3.0]])
    guess = torch.cat([queries, torch.ones(3, 1)], dim=1).double() @ fitted
    generator = chapter()["KnownGenerator"](b[None], 1.0)
    generator.A.data[:] = A
    found = generator.denoiser(queries, torch.full((3,), 0.6))
    assert torch.allclose(found, guess.float(), atol=0.01)


def _gaussian_kl_gradient(m, s, target_std, sigma):
    """d/d(m, s) of KL(N(m, s^2 + sigma^2) || N(0, S^2 + sigma^2)), by autograd."""
    m, s = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (m, s))
    fake, real = s**2 + sigma**2, target_std**2 + sigma**2
    kl = 0.5 * (fake / real + m**2 / real - 1 - torch.log(fake / real))
    return torch.stack(torch.autograd.grad(kl, [m, s]))


@pytest.mark.equation("4.6")
@pytest.mark.parametrize("believed", [(0.9, 0.5), (1.0, 0.8), (-1.0, 0.3)])
def test_bias_of_the_gradient_is_the_critics_mean_error(believed):
    """The gradient with a wrong critic is the exact one plus the mean of J^T times its error."""
    m, s, target_std, level = 1.0, 0.5, 0.4, 0.6
    count = 400_000
    rng = torch.Generator().manual_seed(1)
    z, noise = torch.randn(2, count, 1, generator=rng)
    sigma = torch.full((count,), level)
    critic = GaussianMixture.isotropic([[believed[0]]], believed[1])
    exact = GaussianMixture.isotropic([[m]], s)
    teacher = GaussianMixture.isotropic([[0.0]], target_std)

    place, width = (torch.tensor(v, requires_grad=True) for v in (m, s))
    x = place + width * z
    x_noisy = add_noise(x.detach(), sigma, noise)
    pixel = dmd.matching_gradient(  # w_t = 1: the plain score difference, at one noise level
        x,
        sigma,
        teacher(x_noisy, sigma),
        critic(x_noisy, sigma),
        lambda x, s, d: torch.ones_like(s),
    )
    gradient = torch.autograd.grad(dmd.matching_loss(x, pixel), [place, width])
    samples = torch.cat([pixel, pixel * z], dim=1)
    standard_error = samples.std(dim=0) / math.sqrt(count)

    # the predicted bias by quadrature over x_noisy; E[z | x_noisy] stands in for the Jacobian
    total = math.hypot(s, level)
    ticks, p = noise_grid()
    at = (m + total * ticks)[:, None]
    levels = torch.full((len(at),), level, dtype=torch.float64)
    e = ((critic(at, levels) - exact(at, levels)) / level**2)[:, 0]
    jacobian = torch.stack([torch.ones_like(ticks), s * total * ticks / total**2])
    bias = (jacobian * e * p).sum(dim=1)
    expected = _gaussian_kl_gradient(m, s, target_std, level) + bias
    assert bias.norm() > 20 * standard_error.norm()  # so that the bias could not be left out
    assert (torch.stack(gradient) - expected).abs().max() < 4 * standard_error.max()


@pytest.mark.equation("4.7")
def test_bias_is_bounded_by_the_critics_error():
    """The bias is at most the critic's root mean square error times that of the Jacobian."""
    known = chapter()["KnownGenerator"](torch.tensor([[-1.0, 0.5], [1.0, 0.0]]), 0.4)
    rng = torch.Generator().manual_seed(0)
    count = 4_000
    z = torch.randn(count, 3, generator=rng)
    jacobian = math.sqrt(3)
    directions = {
        "random": torch.randn(count, 2, generator=rng),
        "parallel": torch.tensor([0.6, -0.8]).expand(count, 2),
        "with the noise": z[:, 1:],
    }
    for name, e in directions.items():
        x = known(z)
        parts = torch.autograd.grad((x * e).sum() / count, [known.A, known.b])
        bias = torch.cat([part.flatten() for part in parts]).norm()
        bound = jacobian * (e**2).sum(dim=1).mean().sqrt()
        assert bias < bound, name
    # E|J|^2 = 1 + d is right: measured from the Jacobian of single samples
    norms = []
    for one in z[:300]:
        rows = torch.autograd.functional.jacobian(
            lambda A, b, one=one: torch.func.functional_call(known, {"A": A, "b": b}, one[None]),
            (known.A.detach(), known.b.detach()),
        )
        norms.append(torch.linalg.matrix_norm(torch.cat([r.reshape(2, -1) for r in rows], 1), 2))
    expected = 1 + (z[:300, 1:] ** 2).sum(dim=1)
    assert torch.allclose(torch.stack(norms) ** 2, expected, rtol=1e-4)
    # and it is attained: one parameter that shifts all samples, and an error that never changes
    shift = nn.Parameter(torch.zeros(2))
    e = torch.tensor([0.6, -0.8])
    (bias,) = torch.autograd.grad(((z[:, 1:] + shift) * e).sum() / count, shift)
    assert bias.norm().item() == pytest.approx(1.0, rel=1e-4)


@pytest.mark.equation("4.8")
@pytest.mark.parametrize("ratio", [0.0, 0.5, 4.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_generator_and_critic_follow_the_recurrence(ratio, seed):
    """Generator and critic chase each other as m' = m - eta b, b' = b + kappa (m - b)."""
    measured = chapter()["simulate"](ratio, steps=80, seed=seed)
    predicted = chapter()["recurrence"](ratio, steps=80)
    assert (measured - predicted).abs().max() < 0.12
    assert (predicted[40] - predicted[0]).abs().max() > 0.5  # much more than the band


@pytest.mark.equation("4.9")
@pytest.mark.parametrize("eta", [0.02, 0.1])
@pytest.mark.parametrize("ratio", [0.3, 3.9, 4.1, 9.0])
def test_a_critic_less_than_four_times_as_fast_swings(eta, ratio):
    """A step's factors are 1 - kappa/2 +- sqrt(kappa^2 - 4 eta kappa)/2: complex below 4 eta."""
    kappa = ratio * eta
    found = np.sort_complex(np.linalg.eigvals(np.array([[1, -eta], [kappa, 1 - kappa]])))
    root = np.emath.sqrt(kappa**2 - 4 * eta * kappa)
    written = np.sort_complex(np.array([1 - kappa / 2 - root / 2, 1 - kappa / 2 + root / 2]))
    assert np.allclose(found, written)
    m = chapter()["recurrence"](ratio, steps=3000, eta=eta)[:, 0]
    assert (m.min() < -1e-9) == (ratio < 4)  # overshoots or does not
    if ratio < 4:
        assert np.allclose(np.abs(found), math.sqrt(1 - kappa * (1 - eta)))


@pytest.mark.equation("4.10")
@pytest.mark.parametrize("critic_steps", [1, 2, 4])
def test_an_iteration_costs_four_passes_per_critic_step_and_four_more(critic_steps):
    """An iteration with k critic steps costs as many operations as 4 k + 4 forward passes."""
    teacher = EDMDenoiser(UNet()).requires_grad_(False)
    generator = OneStepGenerator(copy.deepcopy(teacher).requires_grad_(True))
    critic = copy.deepcopy(teacher).requires_grad_(True)
    optimizers = [torch.optim.AdamW(each.parameters()) for each in (generator, critic)]
    z, label = torch.randn(4, 1, 8, 8), torch.arange(4)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        teacher(z, torch.ones(4), label)
    with FlopCounterMode(display=False) as counter:
        objective = dmd.Objective(lambda_reg=0, critic_steps=critic_steps)
        dmd.iteration(generator, critic, teacher, *optimizers, dmd.Batch(z, label), objective)
    passes = counter.get_total_flops() / forward.get_total_flops()
    assert passes == pytest.approx(4 * critic_steps + 4, rel=0.01)
    assert chapter()["passes"](critic_steps) == 4 * critic_steps + 4


def test_the_known_generators_p_fake_is_what_it_makes():
    known = chapter()["KnownGenerator"](torch.tensor([[-1.0, 0.5], [1.0, 0.0]]), 0.4, copies=3)
    known.A.data += 0.1 * torch.randn(known.A.shape, generator=torch.Generator().manual_seed(3))
    rng = torch.Generator().manual_seed(0)
    count = 60_000
    x = known(torch.randn(3 * count, 3, generator=rng)).detach().reshape(3, count, 2)
    for made, p_fake in zip(x, known.p_fake(), strict=True):
        drawn = p_fake.sample(count, rng=rng)
        assert torch.allclose(made.mean(0), drawn.mean(0), atol=0.03)
        assert torch.allclose(made.T.cov(), drawn.T.cov(), atol=0.04)
        assert abs(p_fake.log_prob(made).mean() - p_fake.log_prob(drawn).mean()) < 0.03


def test_the_critic_is_asked_within_the_levels_that_it_learns():
    learns = grid_sigma(20_000, GRID, rng=torch.Generator().manual_seed(0))
    asked = dmd_sigma(20_000, GRID, rng=torch.Generator().manual_seed(0))
    assert learns.min() < asked.min()
    assert learns.max() > asked.max()


def test_a_copy_of_the_teacher_for_critic_moves_nothing():
    teacher = GaussianMixture.isotropic(torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), 0.4)
    known = chapter()["KnownGenerator"](torch.tensor([[0.0, 1.0]]), 0.3)
    before = copy.deepcopy(known.state_dict())
    batch = dmd.Batch(torch.randn(64, 3), noise=torch.randn(64, 2))
    record = dmd.iteration(
        known, teacher, teacher, torch.optim.SGD(known.parameters(), lr=1.0), None,
        batch, dmd.Objective(lambda_reg=0, critic_steps=0, grid=GRID),
    )  # fmt: skip
    assert record.norm_generator == 0
    assert all(torch.equal(before[name], value) for name, value in known.state_dict().items())


def test_z_may_have_another_shape_than_the_samples():
    """The batch then brings its noise; what it brings is not drawn, and the critic's follows x."""
    known = chapter()["KnownGenerator"](torch.tensor([[0.0, 1.0]]), 0.3)
    critic = EDMDenoiser(MLP(hidden=8))
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (known, critic)]
    batch = dmd.Batch(torch.randn(64, 3), sigma=torch.ones(64), noise=torch.randn(64, 2))
    objective = dmd.Objective(lambda_reg=0, critic_steps=2, grid=GRID)
    teacher = GaussianMixture.isotropic([[0.0, 0.0]], 0.4)
    rng, expected = (torch.Generator().manual_seed(0) for _ in range(2))
    record = dmd.iteration(known, critic, teacher, *optimizers, batch, objective, rng)
    assert record.x.shape == (64, 2)
    grid_sigma(64, GRID, rng=expected)
    torch.randn(64, 2, generator=expected)  # the second update makes new samples
    torch.randn(64, 3, generator=expected)
    grid_sigma(64, GRID, rng=expected)
    torch.randn(64, 2, generator=expected)
    assert torch.equal(rng.get_state(), expected.get_state())


def test_no_gradient_of_the_critics_loss_reaches_the_generator():
    known = chapter()["KnownGenerator"](torch.tensor([[0.0, 1.0]]), 0.3)
    scale = nn.Parameter(torch.tensor(0.5))
    x, sigma = known(torch.randn(64, 3)), torch.full((64,), 0.5)
    loss = dmd.critic_loss(lambda x, sigma, label: scale * x, x, sigma, torch.randn(64, 2))
    loss.backward()
    assert scale.grad is not None
    assert known.A.grad is None
    assert known.b.grad is None


def test_without_the_fake_score_even_exact_expectations_collapse():
    """The critic is no device against noise: without it the noise-free gradient shrinks, too."""
    target_std, std, level = 0.4, 0.4, 0.6
    shrink = target_std**2 / (target_std**2 + level**2)
    fake = std**2 / (std**2 + level**2)
    with_critic = (fake - shrink) * std  # E[(D_fake - D_real) z] for N(0, std^2), in closed form
    without = (1 - shrink) * std  # zero_score: D_fake is x_noisy
    assert with_critic == 0
    rng = torch.Generator().manual_seed(0)
    z, noise = torch.randn(2, 200_000, 1, generator=rng)
    sigma = torch.full((len(z),), level)
    x = std * z
    x_noisy = add_noise(x, sigma, noise)
    teacher = GaussianMixture.isotropic([[0.0]], target_std)
    pixel = dmd.matching_gradient(
        x, sigma, teacher(x_noisy, sigma), dmd.zero_score(x_noisy, sigma), dmd.Weighting.NONE
    )
    assert (pixel * z).mean().item() == pytest.approx(without, rel=0.02)  # descends: std falls


def test_a_spring_keeps_a_frozen_critic_from_sending_the_generator_away():
    """The remark in solution 4.5: the belief stays, and m settles at -eta/rho of it."""
    eta, rho, m, belief = 0.05, 0.1, 1.0, 1.0
    for _ in range(500):
        m = m - eta * belief - rho * m
    assert m == pytest.approx(-eta / rho * belief)
    assert chapter4.slowest_factor(eta, 0.0, rho) == pytest.approx(1.0)

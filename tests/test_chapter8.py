"""Equations of chapter 8, against closed forms, autograd and quadrature; and its claims."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from torch.nn import functional

from dmd_tutorial import data
from dmd_tutorial.denoisers import EDMDenoiser, denoising_loss
from dmd_tutorial.mixtures import GaussianMixture
from dmd_tutorial.networks import MLP
from dmd_tutorial.samplers import euler, heun
from dmd_tutorial.survey import classical
from dmd_tutorial.survey import flow_matching as fm

DOUBLE = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def perturbed(module: nn.Module, scale: float = 0.4) -> nn.Module:
    """The module in float64, with other weights: no zeros, nothing trained."""
    module = module.double()
    for k, parameter in enumerate(module.parameters()):
        parameter.data = scale * normal(*parameter.shape, seed=k)
    return module


# VAE


def hermite(count: int = 40) -> tuple[Tensor, Tensor]:
    """Nodes and weights that average polynomials of a standard normal exactly."""
    matrix = torch.diag(torch.arange(1, count, dtype=DOUBLE).sqrt(), 1)
    nodes, vectors = torch.linalg.eigh(matrix + matrix.T)
    return nodes, vectors[0] ** 2


@pytest.mark.equation("8.1")
def test_log_density_is_the_bound_plus_the_divergence_from_the_posterior():
    """The log-density is the ELBO plus the divergence of the encoder from the posterior."""
    vae = perturbed(classical.VAE(3, 1, layers=0), 0.8)
    matrix = vae.decoder.layers[0].weight[0].T.detach()
    offset, std = vae.decoder.layers[0].bias[0, 0].detach(), vae.log_std.exp().item()
    identity = torch.eye(3, dtype=DOUBLE)
    evidence = MultivariateNormal(offset, matrix @ matrix.T + std**2 * identity)
    nodes, weights = hermite()
    variance = 1 / (1 + (matrix**2).sum() / std**2)
    gaps = []
    for x in normal(5, 3, seed=9):
        with torch.no_grad():
            bound = weights @ classical.elbo(vae, x.expand(len(nodes), -1), nodes[:, None])
            mean, std_code, *_ = vae(x[None], nodes[:1, None])
        posterior = Normal(variance * (matrix[:, 0] @ (x - offset)) / std**2, variance.sqrt())
        encoder = Normal(mean[0, 0], std_code[0, 0])
        gaps.append(kl_divergence(encoder, posterior))
        assert (bound + gaps[-1]).item() == pytest.approx(evidence.log_prob(x).item(), abs=1e-9)
    assert max(gaps) > 0.1


@pytest.mark.equation("8.2")
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.3, 0.4), (-0.6, 2.0)])
def test_divergence_of_a_code_from_the_prior(mean, std):
    """The divergence of a Gaussian code from the prior, by integration on a line."""
    line = torch.linspace(-30, 30, 60_001, dtype=DOUBLE)
    q = -((line - mean) ** 2) / (2 * std**2) - math.log(std) - math.log(2 * math.pi) / 2
    p = -(line**2) / 2 - math.log(2 * math.pi) / 2
    integral = (q.exp() * (q - p)).sum() * (line[1] - line[0])
    formula = 0.5 * (mean**2 + std**2 - 1) - math.log(std)
    assert formula == pytest.approx(integral.item(), abs=1e-8)
    # and the package's bound uses it: with a decoder that ignores z, only this is left
    vae = perturbed(classical.VAE(1, 1, layers=0))
    vae.decoder.layers[0].weight.data.zero_()
    x, noise = normal(4, 1), normal(4, 1, seed=1)
    m, s, *decoded = vae(x, noise)
    reconstruction = Normal(*decoded).log_prob(x).sum(1)
    price = (0.5 * (m**2 + s**2 - 1) - s.log()).sum(1)
    torch.testing.assert_close(classical.elbo(vae, x, noise), reconstruction - price)


# Flow


@pytest.mark.equation("8.3")
def test_change_of_variables():
    """The log-density of a flow is that of its noise plus the log-determinant, by autograd."""
    flow, x = perturbed(classical.RealNVP(3, hidden=8)), normal(6, 3, seed=7)
    for point, ours in zip(x, classical.flow_log_prob(flow, x), strict=True):
        z = flow(point[None])[0][0]
        jacobian = torch.autograd.functional.jacobian(lambda p: flow(p[None])[0][0], point)
        exact = Normal(0.0, 1.0).log_prob(z).sum() + jacobian.det().abs().log()
        assert ours.item() == pytest.approx(exact.item(), abs=1e-9)


@pytest.mark.equation("8.4")
def test_a_coupling_keeps_a_part_and_scales_and_shifts_the_rest():
    """A coupling keeps a part; the log-determinant is the sum of the log-scales of the rest."""
    flow, x = perturbed(classical.RealNVP(4, hidden=8, couplings=1)), normal(6, 4, seed=7)
    z, log_det = flow(x)
    keep = flow.keeps[0].bool()
    assert (z[:, keep] == x[:, keep]).all()
    other = x.clone()
    other[:, ~keep] += 1.0  # moves by the scale alone, which does not look at this part
    log_scale = (flow(other)[0] - z)[:, ~keep].log()
    torch.testing.assert_close(log_det, log_scale.sum(1))
    assert log_det.abs().min() > 1e-3
    with torch.no_grad():
        torch.testing.assert_close(flow.sample(z), x)


@pytest.mark.equation("8.5")
@pytest.mark.parametrize("steepness", [1.0, 5.0, 40.0])
@pytest.mark.parametrize("distance", [0.5, 2.0])
def test_mass_between_two_halves_is_bounded_by_the_largest_slope(steepness, distance):
    """A generator of bounded slope leaves at least this mass in the gap; a ramp attains it."""
    z = torch.linspace(-8, 8, 400_001, dtype=DOUBLE)
    share = Normal(0.0, 1.0).log_prob(z).exp() * (z[1] - z[0])

    def gap(x: Tensor) -> float:
        return share[x.abs() < distance / 2].sum().item()

    for x in (
        distance * torch.tanh(steepness * z),
        z + distance * torch.sigmoid(2 * steepness * z) - distance / 2,
        steepness * z,
    ):
        slope = (x.diff() / z.diff()).max().item()
        bound = math.erf(distance / (2 * math.sqrt(2) * slope))
        assert gap(x) >= bound - 1e-4
    # the last map, a ramp, has equality
    assert gap(x) == pytest.approx(bound, abs=1e-4)


# GAN

LINE = torch.linspace(-8, 8, 4001, dtype=DOUBLE)[:, None]
REAL = GaussianMixture.isotropic(torch.tensor([[-1.0], [1.2]]), 0.6)
FAKE = GaussianMixture.isotropic(torch.tensor([[0.2]]), 1.1)


@pytest.mark.equation("8.6")
def test_the_best_discriminator_is_the_log_ratio():
    """The cross-entropy is least where the log-odds are the log-ratio of the densities."""
    log_p, log_q = REAL.log_prob(LINE), FAKE.log_prob(LINE)
    count = 400_000
    chosen = [
        torch.multinomial(d.exp(), count, replacement=True, generator=torch.Generator())
        for d in (log_p, log_q)
    ]
    best = (log_p - log_q)[:, None]

    def loss(logit: Tensor) -> float:
        return classical.discriminator_loss(*(logit[index] for index in chosen)).item()

    for bump in (0.3 * torch.sin(LINE), 0.2 * torch.ones_like(LINE), 0.1 * LINE):
        assert loss(best) < loss(best + bump)
        assert loss(best) < loss(best - bump)
    # by quadrature the derivative is zero at every point
    logit = best[:, 0].clone().requires_grad_()
    exact = log_p.exp() * functional.softplus(-logit) + log_q.exp() * functional.softplus(logit)
    (gradient,) = torch.autograd.grad(exact.sum(), logit)
    assert gradient.abs().max() < 1e-12


@pytest.mark.equation("8.7")
def test_a_perfect_discriminator_hands_out_the_score_difference():
    """Through the best discriminator the generator's gradient is the weighted score difference."""
    x = normal(50, 1).requires_grad_()
    logit = (REAL.log_prob(x) - FAKE.log_prob(x))[:, None]
    (gradient,) = torch.autograd.grad(len(x) * classical.generator_loss(logit), x)
    told = torch.sigmoid(logit).detach()
    difference = REAL.score(x.detach()) - FAKE.score(x.detach())
    torch.testing.assert_close(gradient, -(1 - told) * difference)
    assert difference.abs().max() > 1


# Energy


@pytest.mark.equation("8.8")
def test_the_score_needs_no_normaliser():
    """The score of exp(-E)/Z is minus the slope of E, whatever Z, and not that of log(-E)."""
    energy = perturbed(classical.Perceptron(1, 1, hidden=8))
    x = LINE[1000:3000:200].clone().requires_grad_()

    def total(x: Tensor) -> Tensor:
        return (energy(x) + x**2 / 2 - 50)[:, 0]  # -50: so that log(-E) exists

    log_z = (-total(LINE)).logsumexp(0) + math.log((LINE[1] - LINE[0]).item())
    (score,) = torch.autograd.grad((-total(x) - log_z).sum(), x)
    sigma = torch.ones(len(x), dtype=DOUBLE)
    denoised = classical.energy_denoiser(lambda x, label: total(x))(x, sigma)
    torch.testing.assert_close(score, denoised - x.detach())
    (misprint,) = torch.autograd.grad((-total(x)).log().sum(), x)
    assert (score - misprint).abs().max() > 0.1


@pytest.mark.equation("8.9")
def test_likelihoods_gradient_is_a_difference_of_energies():
    """The likelihood's gradient: energies of data minus energies of the model's samples."""
    energy = perturbed(classical.Perceptron(1, 1, hidden=8))
    parameters = list(energy.parameters())[:-1]  # a constant energy changes nothing
    spacing = (LINE[1] - LINE[0]).item()

    def total(x: Tensor) -> Tensor:
        return energy(x) + x**2 / 2

    real = REAL.log_prob(LINE).exp()[:, None] * spacing
    log_z = (-total(LINE)).logsumexp(0) + math.log(spacing)
    exact = torch.autograd.grad((real * (total(LINE) + log_z)).sum(), parameters)
    model = torch.softmax(-total(LINE), dim=0).detach()
    # as means over equally many points: each point's energy times its probability
    n = len(LINE)
    loss = classical.contrastive_loss(n * real * total(LINE), n * model * total(LINE))
    for a, b in zip(exact, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


# Flow matching. Two atoms and a mixture: everything conditional on x_t is exact.

RING = data.ring()


def times(count: int, low: float = 0.05, high: float = 0.95, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return (low + (high - low) * torch.rand(count, generator=rng)).double()


@pytest.mark.equation("8.10")
def test_the_derivative_of_the_line_is_its_velocity():
    """The line from data to noise, and its derivative by autograd."""
    x, z, t = normal(5, 2), normal(5, 2, seed=1), times(5)
    point, slope = torch.autograd.functional.jvp(
        lambda t: fm.interpolate(x, z, t), t, torch.ones_like(t)
    )
    torch.testing.assert_close(slope, z - x)
    torch.testing.assert_close(point + (1 - t[:, None]) * slope, z)  # ends at the noise
    torch.testing.assert_close(point - t[:, None] * slope, x)


@pytest.mark.equation("8.11")
@pytest.mark.parametrize("t", [0.2, 0.6, 0.9])
def test_the_velocity_is_the_mean_of_the_lines_through_a_point(t):
    """The exact velocity is the mean of z - x over all pairs whose line passes the point."""
    ticks = torch.linspace(-3.2, 3.2, 321, dtype=DOUBLE)
    x = torch.cartesian_prod(ticks, ticks)
    for point in torch.tensor([[0.3, -0.2], [1.1, 0.9]], dtype=DOUBLE):
        z = (point - (1 - t) * x) / t
        share = torch.softmax(RING.log_prob(x) - z.square().sum(1) / 2, dim=0)
        expected = (share[:, None] * (z - x)).sum(0)
        ours = fm.velocity(RING, point[None], torch.tensor([t], dtype=DOUBLE))[0]
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def log_density(x: Tensor, t: Tensor) -> Tensor:
    """Of x_t = (1 - t) (x + sigma z), in two dimensions."""
    return RING.log_prob(x / (1 - t[:, None]), t / (1 - t)) - 2 * (1 - t).log()


@pytest.mark.equation("8.12")
def test_the_velocity_obeys_the_continuity_equation():
    """The density's change in time is minus the divergence of density times velocity."""
    x, t = normal(40, 2).requires_grad_(), times(40, 0.1, 0.9).requires_grad_()
    density = log_density(x, t).exp()
    (by_time,) = torch.autograd.grad(density.sum(), t, create_graph=True)
    flux = density[:, None] * fm.velocity(RING, x, t)
    divergence = sum(
        torch.autograd.grad(flux[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(2)
    )
    torch.testing.assert_close(by_time, -divergence, rtol=1e-7, atol=1e-10)
    assert by_time.abs().max() > 0.01


ATOMS = torch.tensor([-1.0, 1.5], dtype=DOUBLE)
SHARES = torch.tensor([0.3, 0.7], dtype=DOUBLE)


def atoms_denoiser(x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
    """Mean of two atoms behind each noisy point of a line."""
    joint = -((x - ATOMS) ** 2) / (2 * sigma[:, None] ** 2) + SHARES.log()
    return (joint.softmax(1) * ATOMS).sum(1, keepdim=True)


def weighted_pairs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All pairs of an atom, a noise of a fine grid and a time: x, z, t and probabilities."""
    z = torch.linspace(-7, 7, 281, dtype=DOUBLE)
    t = torch.tensor([0.3, 0.5, 0.8], dtype=DOUBLE)
    share = torch.softmax(-(z**2) / 2, dim=0)
    x, z, t = (part.flatten() for part in torch.meshgrid(ATOMS, z, t, indexing="ij"))
    weight = SHARES[:, None, None] * share[None, :, None] / 3
    return x[:, None], z[:, None], t, weight.expand(-1, -1, 3).flatten()


def both_losses(network: EDMDenoiser) -> tuple[Tensor, Tensor, float]:
    """L_FM, L_CFM and the constant between them, as exact means."""
    x, z, t, weight = weighted_pairs()
    x_t = fm.interpolate(x, z, t)
    ours, exact = fm.velocity(network, x_t, t), fm.velocity(atoms_denoiser, x_t, t)
    wanted = (weight[:, None] * (ours - exact) ** 2).sum()
    # the package's loss has equal weights: scale each pair's share of the mean
    each = torch.stack(
        [
            fm.conditional_flow_matching_loss(network, x[k : k + 1], z[k : k + 1], t[k : k + 1])
            for k in range(0, len(x), 97)
        ]
    )
    torch.testing.assert_close(each, ((ours - (z - x)) ** 2)[::97, 0])
    computed = (weight[:, None] * (ours - (z - x)) ** 2).sum()
    return wanted, computed, (weight[:, None] * (exact - (z - x)) ** 2).sum().item()


@pytest.mark.equation("8.13")
def test_the_wanted_loss_is_zero_at_the_exact_velocity_and_the_other_is_not():
    """The wanted loss vanishes at the exact velocity; the conditional one keeps a constant."""
    x, z, t, weight = weighted_pairs()
    x_t = fm.interpolate(x, z, t)
    exact = fm.velocity(atoms_denoiser, x_t, t)
    spread = (weight[:, None] * (exact - (z - x)) ** 2).sum()
    assert spread > 0.3
    # and no other answer does better: a shift adds its square
    shifted = (weight[:, None] * (exact + 0.2 - (z - x)) ** 2).sum()
    assert (shifted - spread).item() == pytest.approx(0.04, abs=1e-6)


@pytest.mark.equation("8.14")
def test_both_losses_have_the_same_gradient():
    """The conditional loss is the wanted one plus a constant: equal gradients."""
    network = perturbed(EDMDenoiser(MLP(1, hidden=8, layers=2)), 0.3)
    parameters = list(network.parameters())
    wanted, computed, constant = both_losses(network)
    assert (computed - wanted).item() == pytest.approx(constant, abs=1e-6)
    gradients = [
        torch.autograd.grad(loss, parameters, retain_graph=True) for loss in (wanted, computed)
    ]
    assert max(g.abs().max() for g in gradients[0]) > 0.1
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.equation("8.15")
def test_a_denoiser_is_a_velocity():
    """The velocity from the score of the noisy density, by autograd, is that of the denoiser."""
    x_t, t = normal(30, 2).requires_grad_(), times(30, 0.1, 0.9)
    (score,) = torch.autograd.grad(log_density(x_t, t).sum(), x_t)
    # mean of x given x_t is (x_t + t^2 score) / (1 - t), by Tweedie's formula
    clean = (x_t + t[:, None] ** 2 * score) / (1 - t[:, None])
    noise = -t[:, None] * score
    torch.testing.assert_close(fm.velocity(RING, x_t, t), noise - clean, rtol=1e-6, atol=1e-6)


@pytest.mark.equation("8.16")
def test_the_rescaled_probability_flow_is_the_flow():
    """A fine solution of the probability-flow ODE, rescaled, moves with the velocity."""
    path = fm.flow_path(RING, normal(20, 2), fm.flow_levels(400), sampler=heun)
    for k in (100, 200, 300):
        slope = (path.x[k + 1] - path.x[k - 1]) / (path.t[k + 1] - path.t[k - 1])
        ours = fm.velocity(RING, path.x[k], path.t[k].expand(20))
        torch.testing.assert_close(slope, ours, rtol=0, atol=0.02)
        assert ours.abs().max() > 0.3


@pytest.mark.equation("8.17")
def test_eulers_step_is_the_same_in_both_forms():
    """A step of the package's Euler sampler is a step along the velocity."""
    z = normal(10, 2)
    for sigma, after in ((5.0, 1.0), (1.0, 0.2), (0.5, 0.0)):
        (step,) = euler(RING, z, torch.tensor([sigma, after], dtype=DOUBLE))
        t, s = sigma / (1 + sigma), after / (1 + after)
        x_t = sigma * z / (1 + sigma)
        velocity = fm.velocity(RING, x_t, torch.full((10,), t, dtype=DOUBLE))
        moved = x_t + (s - t) * velocity
        torch.testing.assert_close(moved, step.x / (1 + after))
        torch.testing.assert_close(moved, s / t * x_t + (1 - s / t) * step.denoised)


@pytest.mark.equation("8.18")
def test_flow_matching_is_denoising_with_another_weight():
    """The conditional loss is a denoising loss with the weight (1 + 1/sigma) squared."""
    network = perturbed(EDMDenoiser(MLP(hidden=8)), 0.3)
    x, z, t = normal(30, 2), normal(30, 2, seed=1), times(30)
    ours = fm.conditional_flow_matching_loss(network, x, z, t)
    sigma = fm.sigma_from_time(t)
    other = denoising_loss(network, x, sigma, z, weight=lambda sigma: (1 + 1 / sigma) ** 2)
    torch.testing.assert_close(ours, other)


@pytest.mark.equation("8.19")
def test_straightness_of_a_gaussians_flow():
    """For one Gaussian the measure is the closed integral over the scale of its paths."""
    std = 0.25
    z = normal(500, 2)
    gaussian = GaussianMixture.isotropic(torch.zeros(1, 2), std)
    ours = fm.straightness(fm.flow_path(gaussian, z, fm.flow_levels(300, 1e4), sampler=heun))
    t = torch.linspace(0, 1, 100_001, dtype=DOUBLE)
    radius = ((1 - t) ** 2 * std**2 + t**2).sqrt()
    slope = (t - (1 - t) * std**2) / radius
    mean = radius[-1] - radius[0]
    exact = torch.trapezoid((slope - mean) ** 2, t) / mean**2
    assert ours == pytest.approx(exact.item(), rel=0.01)
    assert exact > 0.01


@pytest.mark.equation("8.20")
def test_a_flow_does_not_lengthen_the_way():
    """The flow of independent pairs has a shorter mean squared way, for mixture and Gaussian."""
    z = normal(2000, 2)
    mean, std = torch.tensor([[0.5, -0.3]], dtype=DOUBLE), 0.4
    gaussian = GaussianMixture.isotropic(mean, std)
    for target in (gaussian, RING):
        path = fm.flow_path(target, z, fm.flow_levels(60), sampler=heun)
        way = (z - path.x[-1]).square().sum(1).mean()
        x = target.sample(2000, rng=torch.Generator().manual_seed(1)).double()
        assert way < (z - x).square().sum(1).mean() - 0.5
    # for the Gaussian both are known: |m|^2 + 2 (1 - s)^2 against |m|^2 + 2 (1 + s^2)
    path = fm.flow_path(gaussian, z, fm.flow_levels(200, 1e4), sampler=heun)
    way = (z - path.x[-1]).square().sum(1)
    expected = mean.square().sum().item() + 2 * (1 - std) ** 2
    assert abs(way.mean().item() - expected) < 4 * way.std().item() / len(z) ** 0.5


# Claims


def test_one_step_of_any_exact_flow_is_the_mean_of_the_data():
    *_, last = euler(RING, normal(200, 2), fm.flow_levels(1))
    assert last.x.abs().max() < 0.15  # the ring's mean is the origin


def test_on_a_line_one_reflow_makes_paths_straight():
    """Lines of a monotone map do not cross: the velocity of the pairs is that of the lines."""
    target = GaussianMixture.isotropic(torch.tensor([[-1.0], [1.0]]), 0.3)
    z = torch.linspace(-2.5, 2.5, 41, dtype=DOUBLE)[:, None]
    path = fm.flow_path(target, z, fm.flow_levels(200), sampler=heun)
    y = path.x[-1]
    assert (y.diff(dim=0) > 0).all()
    for t in (0.1, 0.5, 0.9):
        points = (1 - t) * y + t * z
        assert (points.diff(dim=0) > 0).all()  # so each point belongs to one line
    assert fm.straightness(path) > 0.02


def test_chains_do_not_compare_modes():
    uneven = GaussianMixture.isotropic(
        torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), 0.3, torch.tensor([0.9, 0.1])
    )
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 2, generator=rng)
    x = classical.walk(lambda x, _: -uneven.log_prob(x)[:, None], x, 200, 0.02, rng=rng)
    assert 0.4 < (x[:, 0] < 0).double().mean() < 0.75

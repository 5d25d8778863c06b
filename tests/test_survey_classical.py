"""The losses and networks of VAE, flow, GAN and energy-based model, against closed forms."""

import math

import pytest
import torch
from scipy import integrate
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from benchmarks.survey.classical import METHODS
from benchmarks.survey.task import Budget, Task, fit_within
from dmd_tutorial import data
from dmd_tutorial.checks import NO_CLASS
from dmd_tutorial.denoisers import score_from_denoised
from dmd_tutorial.edm.networks import SongUNet
from dmd_tutorial.mixtures import GaussianMixture
from dmd_tutorial.networks import MLP
from dmd_tutorial.survey import classical
from dmd_tutorial.survey.classical import VAE, Perceptron, RealNVP, elbo, flow_log_prob
from dmd_tutorial.training import FitSettings

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


# Perceptron


def test_copies_are_independent_networks():
    network = Perceptron(3, 2, hidden=8, copies=4).double()
    x = normal(20, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(network(x)[5:10].square().sum(), x)
    assert gradient[5:10].abs().min() > 0
    assert gradient[:5].abs().max() == gradient[10:].abs().max() == 0
    alone = Perceptron(3, 2, hidden=8).double()
    for one, all_of_them in zip(alone.parameters(), network.parameters(), strict=True):
        one.data = all_of_them.data[1:2]
    torch.testing.assert_close(alone(x[5:10]), network(x)[5:10])


def test_a_class_changes_the_answer_and_a_wrong_one_is_refused():
    network = Perceptron(2, 2, classes=3)
    x = torch.ones(3, 2)
    answers = network(x, torch.arange(3))
    assert (answers[0] - answers[1]).abs().max() > 1e-4
    with pytest.raises(ValueError, match="classes are 0 to 2"):
        network(x, torch.tensor([0, 1, 3]))


# VAE: with affine halves everything is Gaussian


def affine_vae(dim: int = 3, latent: int = 2) -> VAE:
    vae = VAE(dim, latent, layers=0).double()
    for k, parameter in enumerate(vae.parameters()):
        parameter.data = 0.4 * normal(*parameter.shape, seed=k)
    return vae


def moments(perceptron: Perceptron) -> tuple[Tensor, Tensor]:
    """Matrix and offset of an affine perceptron."""
    return perceptron.layers[0].weight[0].T.detach(), perceptron.layers[0].bias[0, 0].detach()


def test_the_bound_misses_the_log_density_by_the_divergence_of_the_encoder():
    vae, x = affine_vae(), normal(4, 3, seed=9)
    matrix, offset = moments(vae.decoder)
    std = vae.log_std.exp().item()
    marginal = MultivariateNormal(offset, matrix @ matrix.T + std**2 * torch.eye(3, dtype=DOUBLE))
    noise = normal(400_000, 2)  # for each of the four points
    bounds, gaps = [], []
    with torch.no_grad():
        for point in x:
            bounds.append(elbo(vae, point.expand(len(noise), -1), noise).mean())
            mean, q_std, *_ = vae(point[None], noise[:1])
            covariance = (torch.eye(2, dtype=DOUBLE) + matrix.T @ matrix / std**2).inverse()
            posterior = MultivariateNormal(
                covariance @ matrix.T @ (point - offset) / std**2, covariance
            )
            q = MultivariateNormal(mean[0], torch.diag(q_std[0] ** 2))
            gaps.append(kl_divergence(q, posterior))
    expected = marginal.log_prob(x) - torch.stack(gaps)
    torch.testing.assert_close(torch.stack(bounds), expected, rtol=0, atol=0.02)
    assert min(gaps) > 0.2  # so that the bound is no equality


def test_with_the_true_posterior_the_bound_is_the_log_density():
    vae = VAE(1, 1, layers=0).double()
    w, b, std = 0.8, -0.3, 0.5
    total = w**2 + std**2
    vae.decoder.layers[0].weight.data.fill_(w)
    vae.decoder.layers[0].bias.data.fill_(b)
    vae.log_std.data.fill_(math.log(std))
    vae.encoder.layers[0].weight.data = torch.tensor([[[w / total, 0.0]]], dtype=DOUBLE)
    vae.encoder.layers[0].bias.data = torch.tensor(
        [[[-w * b / total, 0.5 * math.log(std**2 / total)]]], dtype=DOUBLE
    )
    x = torch.linspace(-2, 2, 5, dtype=DOUBLE)[:, None]
    nodes = normal(200_000, 1)
    with torch.no_grad():
        bound = torch.stack([elbo(vae, p.expand(len(nodes), 1), nodes).mean() for p in x])
    exact = Normal(b, math.sqrt(total)).log_prob(x[:, 0])
    torch.testing.assert_close(bound, exact, rtol=0, atol=0.01)


# RealNVP


def bent_flow(dim: int, **kwargs: int) -> RealNVP:
    flow = RealNVP(dim, hidden=16, **kwargs).double()
    for k, parameter in enumerate(flow.parameters()):
        parameter.data = normal(*parameter.shape, seed=k) / max(2, parameter.shape[1] ** 0.5)
    return flow


@pytest.mark.parametrize("dim", [2, 3, 5, 64])
def test_a_flow_undoes_itself(dim):
    flow, x = bent_flow(dim), normal(10, dim, seed=7)
    with torch.no_grad():
        z, _ = flow(x)
        torch.testing.assert_close(flow.sample(z), x, rtol=1e-6, atol=1e-6)
    assert (z - x).abs().max() > 0.1


@pytest.mark.parametrize("dim", [2, 3, 6])
def test_the_determinant_is_that_of_the_jacobian_by_autograd(dim):
    flow, x = bent_flow(dim), normal(5, dim, seed=7)
    _, log_det = flow(x)
    for point, ours in zip(x, log_det, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda p: flow(p[None])[0][0], point)
        assert ours.item() == pytest.approx(jacobian.slogdet()[1].item(), abs=1e-8)
    assert log_det.abs().min() > 1e-3


def test_the_density_of_a_flow_integrates_to_one():
    flow = bent_flow(2, couplings=4)
    with torch.no_grad():
        ticks = torch.linspace(-12, 12, 481, dtype=DOUBLE)
        density = flow_log_prob(flow, torch.cartesian_prod(ticks, ticks)).exp()
        total = density.sum() * (ticks[1] - ticks[0]) ** 2
    assert total.item() == pytest.approx(1, abs=0.01)
    assert density.max() > 0.02


@pytest.mark.parametrize("dim", [2, 3, 64])
def test_every_coordinate_is_changed_and_kept(dim):
    keeps = RealNVP(dim, couplings=12).keeps
    assert (keeps.mean(0) > 0).all()
    assert (keeps.mean(0) < 1).all()
    assert (keeps.sum(1) >= 1).all()
    assert (keeps.sum(1) <= dim - 1).all()


def test_a_flow_of_one_dimension_is_refused():
    with pytest.raises(ValueError, match="at least 2 dimensions, not 1"):
        RealNVP(1)


# GAN


def test_the_best_discriminator_says_the_log_ratio_of_densities():
    line = torch.linspace(-8, 8, 2001, dtype=DOUBLE)
    p, q = Normal(-0.5, 1.0).log_prob(line), Normal(0.7, 1.3).log_prob(line)

    def loss(logit: Tensor) -> Tensor:
        """Expectations as weighted means: a logit for each point and each of its copies."""
        real = nn.functional.softplus(-logit) * p.exp()
        return ((real + nn.functional.softplus(logit) * q.exp()).sum()) * (line[1] - line[0])

    best = (p - q).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(best), best)
    assert gradient.abs().max() < 1e-12
    assert loss(best) < loss(best + 0.1)
    assert loss(best) < loss(best - 0.1)
    # the package's loss is the same expectation, by samples
    rng = torch.Generator().manual_seed(0)
    real = torch.randn(100_000, 1, generator=rng, dtype=DOUBLE) - 0.5
    fake = 1.3 * torch.randn(100_000, 1, generator=rng, dtype=DOUBLE) + 0.7

    def logit(x: Tensor) -> Tensor:
        return Normal(-0.5, 1.0).log_prob(x) - Normal(0.7, 1.3).log_prob(x)

    ours = classical.discriminator_loss(logit(real), logit(fake))
    assert ours.item() == pytest.approx(loss(best).item(), abs=0.01)


def test_the_two_losses_push_logits_apart_and_together():
    real, fake = torch.zeros(4, 1, requires_grad=True), torch.zeros(4, 1, requires_grad=True)
    by_real, by_fake = torch.autograd.grad(classical.discriminator_loss(real, fake), (real, fake))
    assert (by_real < 0).all()
    assert (by_fake > 0).all()
    (fooled,) = torch.autograd.grad(classical.generator_loss(fake), fake)
    assert (fooled < 0).all()


def test_a_step_changes_both_networks_and_leaves_no_gradient_in_the_wrong_one():
    networks = [Perceptron(2, width, hidden=8) for width in (2, 1)]
    before = [[p.detach().clone() for p in network.parameters()] for network in networks]
    optimizers = [torch.optim.SGD(network.parameters(), 0.1) for network in networks]
    x, z = torch.randn(16, 2), torch.randn(16, 2)
    told, fooled = classical.gan_step(*networks, *optimizers, x, z)
    assert told == pytest.approx(2 * math.log(2), abs=0.2)
    assert fooled == pytest.approx(math.log(2), abs=0.2)
    for network, olds in zip(networks, before, strict=True):
        assert any((p != old).any() for p, old in zip(network.parameters(), olds, strict=True))
    # the discriminator's update is that of its own loss alone
    again = [Perceptron(2, width, hidden=8) for width in (2, 1)]
    for network, olds in zip(again, before, strict=True):
        for p, old in zip(network.parameters(), olds, strict=True):
            p.data = old.clone()
    fake = again[0](z).detach()
    loss = classical.discriminator_loss(again[1](x), again[1](fake))
    parameters = list(again[1].parameters())
    for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        p.data -= 0.1 * gradient
    for ours, expected in zip(networks[1].parameters(), parameters, strict=True):
        torch.testing.assert_close(ours, expected)


# Energy


def test_the_contrastive_loss_has_the_gradient_of_the_negative_log_likelihood():
    energy = Perceptron(1, 1, hidden=8, layers=1).double()
    line = torch.linspace(-6, 6, 1201, dtype=DOUBLE)[:, None]
    walls = line**2 / 2  # so that exp(-E) can be integrated
    spacing = (line[1] - line[0]).item()
    real = normal(50, 1)
    parameters = [p for p in energy.parameters() if p is not energy.layers[-1].bias]

    def total(x: Tensor) -> Tensor:
        return energy(x) + x**2 / 2

    log_z = (-(energy(line) + walls)).logsumexp(0) + math.log(spacing)
    likelihood = (-total(real) - log_z).mean()
    exact = torch.autograd.grad(likelihood, parameters)
    share = torch.softmax(-(energy(line) + walls), dim=0).detach()
    # as many equally weighted samples as the loss wants: means over the exact distribution
    by_line = torch.autograd.grad((share * total(line)).sum(), parameters)
    by_real = torch.autograd.grad(total(real).mean(), parameters)
    for e, r, f in zip(exact, by_real, by_line, strict=True):
        torch.testing.assert_close(-e, r - f, rtol=1e-8, atol=1e-10)
    fake = line[torch.multinomial(share[:, 0], 200_000, replacement=True)]
    loss = classical.contrastive_loss(energy(real.repeat(4_000, 1)), energy(fake))
    for e, ours in zip(exact, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(-e, ours, rtol=0, atol=0.02)


def test_the_penalty_pulls_energies_to_zero():
    real, fake = torch.tensor([[3.0]]), torch.tensor([[-1.0]])
    assert classical.contrastive_loss(real, fake).item() == 4.0
    assert classical.contrastive_loss(real, fake, strength=0.1).item() == pytest.approx(5.0)
    with pytest.raises(ValueError, match="shape"):
        classical.contrastive_loss(torch.zeros(3, 1), torch.zeros(2, 1))


def test_the_score_of_an_energy_is_minus_its_slope():
    mixture, x = data.ring(), normal(20, 2)
    sigma = torch.full((20,), 0.7, dtype=DOUBLE)
    denoiser = classical.energy_denoiser(lambda x, label: -mixture.log_prob(x)[:, None])
    score = score_from_denoised(x, denoiser(x, sigma), sigma)
    torch.testing.assert_close(score, mixture.score(x))


def test_chains_on_the_exact_energy_of_one_gaussian_find_it():
    gaussian = GaussianMixture.isotropic(torch.tensor([[1.0, -0.5]]), 0.4)
    rng = torch.Generator().manual_seed(0)
    x = classical.walk(
        lambda x, label: -gaussian.log_prob(x)[:, None],
        2 * torch.randn(4000, 2, generator=rng),
        steps=150,
        step_size=0.01,
        rng=rng,
    )
    assert (x.mean(0) - torch.tensor([1.0, -0.5])).abs().max() < 0.04
    assert (x.std(0) - 0.4).abs().max() < 0.03


# Recipes


def small_task(shape: tuple[int, ...], classes: int) -> Task:
    """Two blobs, or two grey levels; nothing is measured."""

    def draw(count: int, rng: torch.Generator) -> tuple[Tensor, Tensor | None]:
        side = torch.randint(2, (count,), generator=rng)
        x = (2.0 * side - 1).reshape(-1, *[1] * len(shape)) * torch.ones(count, *shape)
        return x + 0.1 * torch.randn(x.shape, generator=rng), side if classes else None

    class Teacher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            dim = math.prod(shape)
            self.weight = nn.Sequential(nn.Linear(dim, 512), nn.Linear(512, dim))

        def forward(self, x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
            return self.weight(x.flatten(1)).reshape(x.shape)

    return Task("small", Teacher(), shape, classes, draw, lambda samples, label: (0.0, 0.0))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize(("shape", "classes"), [((2,), 0), ((1, 4, 4), 2)])
def test_a_recipe_keeps_to_its_budget_and_repeats_itself(method, shape, classes):
    task = small_task(shape, classes)
    z = torch.randn(10, *shape)
    label = torch.arange(10) % 2 if classes else None
    answers = []
    for seed in (0, 0, 1):
        budget = Budget(3e5, task.teacher)
        samplers = method.train(task, budget, seed)
        assert budget.spent <= budget.passes
        answers.append({count: sampler(z, label) for count, sampler in samplers.items()})
    for count in answers[0]:
        first, again, other = (answer[count] for answer in answers)
        assert first.shape == z.shape
        assert first.isfinite().all()
        assert (first == again).all()
        assert (first != other).any()


def test_a_fit_takes_the_steps_that_its_share_of_the_budget_allows():
    steps = []
    for share, most in ((1.0, 100), (0.5, 100), (1.0, 7)):
        budget, drawn = Budget(12 * 3 * 8), []

        def draw(rng: torch.Generator, drawn: list = drawn) -> tuple[Tensor, ...]:
            drawn.append(torch.randn(8, 2, generator=rng))
            return (drawn[-1],)

        network = fit_within(
            budget,
            lambda budget=budget: budget.watch(nn.Linear(2, 2)),
            draw,
            lambda network, x: (network(x) - x).square().mean(),
            FitSettings(steps=most),
            share,
        )
        steps.append(len(drawn) - 1)  # one was for the trial
        assert budget.spent == 3 * 8 * steps[-1]
        assert not next(network.parameters()).requires_grad
    assert steps == [12, 6, 7]


def test_quadrature_agrees_on_the_optimal_discriminator_loss():
    """At the best discriminator the loss is 2 log 2 minus twice the Jensen-Shannon divergence."""
    p, q = Normal(-0.5, 1.0), Normal(0.7, 1.3)

    def integrand(x: float) -> float:
        a, b = (d.log_prob(torch.tensor(x, dtype=DOUBLE)).exp().item() for d in (p, q))
        m = (a + b) / 2
        return 0.5 * (a * math.log(a / m) + b * math.log(b / m))

    divergence, _ = integrate.quad(integrand, -8, 9)
    rng = torch.Generator().manual_seed(1)
    real = torch.randn(200_000, 1, generator=rng, dtype=DOUBLE) - 0.5
    fake = 1.3 * torch.randn(200_000, 1, generator=rng, dtype=DOUBLE) + 0.7
    logits = [p.log_prob(x) - q.log_prob(x) for x in (real, fake)]
    ours = classical.discriminator_loss(*logits).item()
    assert ours == pytest.approx(2 * math.log(2) - 2 * divergence, abs=0.01)


@pytest.mark.parametrize(
    "make",
    [lambda: Perceptron(2, 3, classes=4), lambda: MLP(classes=4), lambda: SongUNet(8, 1, 1, 4)],
    ids=["perceptron", "mlp", "published"],
)
def test_a_sample_that_is_told_no_class_is_as_without_labels(make):
    network = make().eval()
    for parameter in network.parameters():
        parameter.data.normal_().mul_(0.1)
    x = torch.randn(2, 1, 8, 8) if hasattr(network, "size") else torch.ones(2, 2)
    level = [] if isinstance(network, Perceptron) else [torch.zeros(2)]
    told = network(x, *level, torch.tensor([NO_CLASS, 3]))
    assert torch.allclose(told[0], network(x, *level)[0])
    assert not torch.allclose(told[1], network(x, *level)[1])

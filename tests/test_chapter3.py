"""Chapter 3: its equations against closed forms, quadrature and autograd, and its claims."""

import ast
import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from dmd_tutorial import dmd, noise
from dmd_tutorial.dmd import Weighting
from dmd_tutorial.mixtures import GaussianMixture

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "book" / "3-kl-gradient.ipynb"

DOUBLE = torch.float64
LINE = torch.linspace(-24, 24, 4801, dtype=DOUBLE)  # sums times the spacing are integrals
SPACING = (LINE[1] - LINE[0]).item()
REAL = GaussianMixture(
    torch.tensor([[-1.5], [1.0]]),
    torch.tensor([[[0.3]], [[0.8]]], dtype=DOUBLE),
    torch.tensor([0.35, 0.65]),
)


def double(*values: float | list) -> Tensor:
    """A tensor of some numbers or rows; of one number, a scalar."""
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=DOUBLE)


def integral(values: Tensor) -> Tensor:
    return values.sum(-1) * SPACING


def bare(x: Tensor, sigma: Tensor, denoised_real: Tensor) -> Tensor:
    """A weight of one: the matching gradient is then the bare difference of scores."""
    return torch.ones_like(sigma)


def scores_by_autograd(log_density: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (score,) = torch.autograd.grad(log_density(x).sum(), x)
    return score


# Two Gaussians in three dimensions, and a generator of the first


def gaussians() -> tuple[Tensor, Tensor, MultivariateNormal]:
    mean = double(-0.5, 0.8, 0.2)
    factor = double([1.1, 0.2, 0.0], [0.4, 0.7, -0.3], [0.0, 0.1, 0.9])
    covariance = double([1.0, 0.3, 0.0], [0.3, 0.6, 0.1], [0.0, 0.1, 1.5])
    return mean, factor, MultivariateNormal(double(0.6, 0.0, -0.4), covariance)


def as_mixture(gaussian: MultivariateNormal) -> GaussianMixture:
    return GaussianMixture(gaussian.mean[None], gaussian.covariance_matrix[None])


# A generator whose density is known and not Gaussian: x = centre + scale sinh(z)


def sinh_log_density(x: Tensor, centre: Tensor, scale: Tensor) -> Tensor:
    u = torch.asinh((x - centre) / scale)
    return -(u**2) / 2 - 0.5 * math.log(2 * math.pi) - torch.log(scale * torch.cosh(u))


Z = torch.linspace(-7.5, 7.5, 3001, dtype=DOUBLE)
Z_WEIGHTS = torch.exp(-(Z**2) / 2) / torch.exp(-(Z**2) / 2).sum()


def dropped_term(x: Tensor, centre: float, scale: float) -> Tensor:
    """Derivatives of the log-density by (centre, scale) at fixed x, (2, points)."""
    ones = torch.ones_like(x)
    leaves = [(ones * centre).requires_grad_(), (ones * scale).requires_grad_()]
    return torch.stack(torch.autograd.grad(sinh_log_density(x, *leaves).sum(), leaves))


@pytest.mark.equation("3.1")
def test_reverse_divergence_is_a_mean_over_the_generator():
    """The reverse KL divergence is the mean log-ratio over samples of the generator."""
    mean, factor, real = gaussians()
    fake = MultivariateNormal(mean, factor @ factor.T)
    z = torch.randn(100_000, 3, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    x = mean + z @ factor.T
    log_ratio = as_mixture(fake).log_prob(x) - as_mixture(real).log_prob(x)
    standard_error = log_ratio.std() / len(x) ** 0.5
    exact = kl_divergence(fake, real)
    assert (log_ratio.mean() - exact).abs() < 4 * standard_error < 0.05 * exact


@pytest.mark.equation("3.2")
def test_forward_divergence_is_a_mean_over_the_data():
    """The forward KL divergence is the mean log-ratio over the data, and another number."""
    mean, factor, real = gaussians()
    fake = MultivariateNormal(mean, factor @ factor.T)
    x = as_mixture(real).sample(100_000, rng=torch.Generator().manual_seed(0)).double()
    log_ratio = as_mixture(real).log_prob(x) - as_mixture(fake).log_prob(x)
    standard_error = log_ratio.std() / len(x) ** 0.5
    assert (log_ratio.mean() - kl_divergence(real, fake)).abs() < 4 * standard_error
    assert (log_ratio.mean() - kl_divergence(fake, real)).abs() > 8 * standard_error


@pytest.mark.equation("3.3")
def test_forward_fit_copies_the_moments():
    """The Gaussian of least forward divergence has the mean and the variance of the data."""
    mean = double(0.7).requires_grad_()
    log_std = double(0.3).requires_grad_()
    log_real = REAL.log_prob(LINE[:, None])
    optimizer = torch.optim.LBFGS([mean, log_std], max_iter=100, line_search_fn="strong_wolfe")

    def forward_divergence() -> Tensor:
        optimizer.zero_grad()
        log_fake = Normal(mean, log_std.exp()).log_prob(LINE)
        loss = integral(log_real.exp() * (log_real - log_fake))
        loss.backward()
        return loss

    optimizer.step(forward_divergence)
    moment = integral(log_real.exp() * LINE)
    variance = integral(log_real.exp() * (LINE - moment) ** 2)
    assert mean.item() == pytest.approx(moment.item(), abs=1e-4)
    assert log_std.exp().item() == pytest.approx(variance.sqrt().item(), abs=1e-4)


@pytest.mark.equation("3.4")
def test_the_density_depends_on_the_parameters_twice():
    """The total derivative of log p(G(z)) is the moving sample's part plus the density's own."""
    centre, scale = 0.4, 0.8
    x = centre + scale * torch.sinh(Z)
    score = scores_by_autograd(lambda x: sinh_log_density(x, double(centre), double(scale)), x)
    slope = torch.stack([torch.ones_like(Z), torch.sinh(Z)])  # dG/dcentre, dG/dscale
    # log p(G(z)) = log N(z) - log(scale cosh z), so the total is known: (0, -1 / scale)
    total = torch.stack([torch.zeros_like(Z), torch.full_like(Z, -1 / scale)])
    torch.testing.assert_close(
        score * slope + dropped_term(x, centre, scale), total, atol=1e-9, rtol=1e-9
    )


@pytest.mark.equation("3.5")
def test_the_dropped_term_has_mean_zero_where_the_density_is_smooth():
    """The mean of the dropped term is zero, although the term itself is not."""
    term = dropped_term(0.4 + 0.8 * torch.sinh(Z), 0.4, 0.8)
    mean, size = (term * Z_WEIGHTS).sum(1), (term.abs() * Z_WEIGHTS).sum(1)
    assert (mean.abs() < 1e-9).all()
    assert (size > 0.1).all()


@pytest.mark.equation("3.5")
def test_the_dropped_term_has_another_mean_where_the_support_moves():
    """For a uniform generator with a moving edge the mean is minus one over theta, not zero."""
    theta = double(1.6).requires_grad_()
    x = torch.linspace(0.01, 1.59, 50, dtype=DOUBLE)
    log_density = torch.where((x > 0) & (x < theta), -theta.log(), -torch.inf)
    (derivative,) = torch.autograd.grad(log_density.mean(), theta)
    assert derivative.item() == pytest.approx(-1 / 1.6)


@pytest.mark.equation("3.6")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_score_difference_is_the_gradient_between_gaussians(seed):
    """The mean of slope times score difference is the gradient of the closed-form divergence."""
    mean, factor, real = gaussians()
    leaves = [mean.clone().requires_grad_(), factor.clone().requires_grad_()]
    covariance = leaves[1] @ leaves[1].T
    exact = torch.autograd.grad(
        kl_divergence(MultivariateNormal(leaves[0], covariance), real), leaves
    )
    rng = torch.Generator().manual_seed(seed)
    z = torch.randn(100_000, 3, generator=rng, dtype=DOUBLE)
    x = mean + z @ factor.T
    fake = MultivariateNormal(mean, factor @ factor.T)
    difference = as_mixture(fake).score(x) - as_mixture(real).score(x)
    estimate = [difference.mean(0), torch.einsum("nd,ne->de", difference, z) / len(z)]
    error = sum((a - b).square().sum() for a, b in zip(estimate, exact, strict=True)).sqrt()
    assert error / sum(b.square().sum() for b in exact).sqrt() < 1.5e-2


@pytest.mark.equation("3.6")
def test_score_difference_is_the_gradient_for_a_generator_that_is_not_gaussian():
    """The same by quadrature: a sinh generator against a mixture."""
    leaves = [double(0.4).requires_grad_(), double(0.8).requires_grad_()]
    u = torch.linspace(-9, 9, 6001, dtype=DOUBLE)  # x = 2 sinh(u): a grid that reaches far
    x, dx = 2 * torch.sinh(u), 2 * torch.cosh(u) * (u[1] - u[0])
    log_fake = sinh_log_density(x, *leaves)
    divergence = (log_fake.exp() * (log_fake - REAL.log_prob(x[:, None])) * dx).sum()
    exact = torch.stack(torch.autograd.grad(divergence, leaves))

    x = 0.4 + 0.8 * torch.sinh(Z)
    fake = scores_by_autograd(lambda x: sinh_log_density(x, double(0.4), double(0.8)), x)
    difference = fake - REAL.score(x[:, None])[:, 0]
    slope = torch.stack([torch.ones_like(Z), torch.sinh(Z)])
    estimate = (Z_WEIGHTS * slope * difference).sum(1)
    torch.testing.assert_close(estimate, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.equation("3.7")
def test_samples_that_follow_the_score_difference_descend():
    """Along s_real - s_fake the divergence falls at the mean square of that field."""
    mean, factor, real = gaussians()
    covariance = factor @ factor.T
    precision, precision_real = covariance.inverse(), real.covariance_matrix.inverse()
    matrix = precision - precision_real  # of the field, which is linear in x
    at_mean = precision_real @ (real.mean - mean)
    tau = double(0.0).requires_grad_()
    moved = (torch.eye(3) + tau * matrix) @ factor
    divergence = kl_divergence(MultivariateNormal(mean + tau * at_mean, moved @ moved.T), real)
    (rate,) = torch.autograd.grad(divergence, tau)
    z = torch.randn(200_000, 3, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    x = mean + z @ factor.T
    field = as_mixture(real).score(x) - as_mixture(MultivariateNormal(mean, covariance)).score(x)
    square = field.square().sum(1)
    assert (rate + square.mean()).abs() < 4 * square.std() / len(x) ** 0.5 < 0.05 * square.mean()


def chapter_function(name: str) -> Callable:
    """A function as it stands in a cell of the chapter."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    source = next(source for source in sources if f"def {name}(" in source)
    names: dict = {"torch": torch, "math": math}
    definition = next(
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == name
    )
    exec(ast.unparse(definition), names)
    return names[name]


@pytest.mark.equation("3.8")
def test_closed_form_between_gaussians_as_the_chapter_computes_it():
    """The divergence between Gaussians has the closed form that torch.distributions knows."""
    mean, factor, real = gaussians()
    ours = chapter_function("gaussian_kl")(mean, factor, real.mean, real.covariance_matrix)
    exact = kl_divergence(MultivariateNormal(mean, factor @ factor.T), real)
    assert ours.item() == pytest.approx(exact.item(), rel=1e-10)


# Generators under noise. The outputs are a few atoms: there is no density at all without noise.

ATOMS = torch.linspace(-2.5, 2.5, 23, dtype=DOUBLE)  # the values of z
SHARE = torch.softmax(-(ATOMS**2) / 2, dim=0)  # their probabilities
CENTRE, SCALE = -0.3, 1.2


def atoms(centre: float | Tensor, scale: float | Tensor) -> Tensor:
    """Where the generator centre + scale sin(2 z) puts its atoms; it is not invertible."""
    return centre + scale * torch.sin(2 * ATOMS)


def slopes() -> Tensor:
    """Derivatives of the atoms by centre and scale, (2, atoms)."""
    return torch.stack([torch.ones_like(ATOMS), torch.sin(2 * ATOMS)])


def noised_log_density(x: Tensor, sigma: float, centre, scale) -> Tensor:
    around = Normal(atoms(centre, scale), sigma).log_prob(x[:, None])
    return (around + SHARE.log()).logsumexp(1)


def noised_divergence(sigma: float, centre, scale) -> Tensor:
    log_fake = noised_log_density(LINE, sigma, centre, scale)
    return integral(log_fake.exp() * (log_fake - REAL.log_prob(LINE[:, None], sigma)))


def exact_noised_gradient(sigma: float) -> Tensor:
    leaves = [double(CENTRE).requires_grad_(), double(SCALE).requires_grad_()]
    return torch.stack(torch.autograd.grad(noised_divergence(sigma, *leaves), leaves))


def joint(sigma: float) -> Tensor:
    """Probability of each atom together with each x_noisy of the line, (atoms, line)."""
    around = Normal(atoms(CENTRE, SCALE)[:, None], sigma).log_prob(LINE)
    return SHARE[:, None] * around.exp() * SPACING


def denoised_fake(sigma: float) -> Tensor:
    """Mean atom behind each x_noisy of the line: the generator's exact denoiser."""
    log_joint = Normal(atoms(CENTRE, SCALE)[:, None], sigma).log_prob(LINE) + SHARE.log()[:, None]
    return (log_joint.softmax(0) * atoms(CENTRE, SCALE)[:, None]).sum(0)


def expected_gradient(sigma: float, weighting) -> Tensor:
    """Mean of slope times the package's matching gradient over all atoms and noises."""
    level = torch.full_like(LINE, sigma)
    real, fake = REAL(LINE[:, None], level), denoised_fake(sigma)[:, None]
    # the weights used here look at sigma alone, so that any x will do
    gradient = dmd.matching_gradient(LINE[:, None], level, real, fake, weighting)[:, 0]
    return slopes() @ (joint(sigma) @ gradient)


@pytest.mark.equation("3.9")
@pytest.mark.parametrize("sigma", [0.2, 1.0])
def test_under_noise_the_dropped_term_is_a_posterior_mean(sigma):
    """Under noise the dropped term is the mean of slope times noise given x_t, over sigma."""
    x = torch.linspace(-3, 3, 41, dtype=DOUBLE)
    ones = torch.ones_like(x)[:, None]
    leaves = [(ones * CENTRE).requires_grad_(), (ones * SCALE).requires_grad_()]
    by_autograd = torch.autograd.grad(noised_log_density(x, sigma, *leaves).sum(), leaves)
    n = (x[:, None] - atoms(CENTRE, SCALE)) / sigma
    posterior = (-(n**2) / 2 + SHARE.log()).softmax(1)
    by_formula = (posterior * n / sigma) @ slopes().T
    torch.testing.assert_close(torch.cat(by_autograd, dim=1), by_formula, rtol=1e-9, atol=1e-9)


@pytest.mark.equation("3.9")
@pytest.mark.parametrize("sigma", [0.1, 0.7, 3.0])
def test_under_noise_the_dropped_term_has_mean_zero_even_without_a_density(sigma):
    """Its mean is zero for a generator that has no density without noise."""
    leaves = [(torch.ones(len(LINE), 1, dtype=DOUBLE) * p).requires_grad_() for p in (-0.3, 1.2)]
    term = torch.cat(
        torch.autograd.grad(noised_log_density(LINE, sigma, *leaves).sum(), leaves), dim=1
    )
    density = noised_log_density(LINE, sigma, CENTRE, SCALE).exp()
    assert (integral(density * term.T).abs() < 1e-7).all()
    assert (integral(density * term.T.abs()) > 0.05).all()


@pytest.mark.equation("3.10")
@pytest.mark.parametrize("sigma", [0.15, 0.5, 2.0])
def test_noised_score_difference_is_the_gradient_of_the_noised_divergence(sigma):
    """The package's gradient, averaged exactly, is that of the noised divergence by autograd."""
    torch.testing.assert_close(
        expected_gradient(sigma, bare), exact_noised_gradient(sigma), rtol=1e-6, atol=1e-8
    )


@pytest.mark.equation("3.11")
@pytest.mark.parametrize(
    ("weighting", "power"), [(Weighting.SIGMA, 1), (Weighting.NONE, 2), (Weighting.SIGMA3, 3)]
)
def test_weighted_levels_descend_the_weighted_sum_of_divergences(weighting, power):
    """Averaged over noise levels, the gradient is that of the weighted sum of divergences."""
    levels = [0.2, 0.6, 1.5]
    leaves = [double(CENTRE).requires_grad_(), double(SCALE).requires_grad_()]
    objective = sum(s**power * noised_divergence(s, *leaves) for s in levels) / len(levels)
    exact = torch.stack(torch.autograd.grad(objective, leaves))
    estimate = sum(expected_gradient(s, weighting) for s in levels) / len(levels)
    torch.testing.assert_close(estimate, exact, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("weighting", list(Weighting))
def test_where_the_distributions_are_equal_every_weighting_gives_zero(weighting):
    x = REAL.sample(64, rng=torch.Generator().manual_seed(0)).double()
    sigma = torch.full((64,), 0.7, dtype=DOUBLE)
    denoised = REAL(x, sigma)
    assert (dmd.matching_gradient(x, sigma, denoised, denoised, weighting) == 0).all()


@pytest.mark.equation("3.12")
@pytest.mark.parametrize("sigma", [0.002, 0.3, 80.0])
def test_scores_differ_by_the_difference_of_denoisers(sigma):
    """The score difference is the difference of the denoisers over sigma squared."""
    real = GaussianMixture.isotropic(double([-1.0, 0.0], [1.0, 0.5]), 0.6, double(0.4, 0.6))
    fake = GaussianMixture.isotropic(double([[0.3, -0.2]]), 0.9)
    level = torch.full((30,), sigma, dtype=DOUBLE)
    clean = fake.sample(30, rng=torch.Generator().manual_seed(0)).double()
    x = clean + sigma * torch.randn(30, 2, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    score_real, score_fake = (
        scores_by_autograd(lambda x, p=p: p.log_prob(x, level), x) for p in (real, fake)
    )
    gradient = dmd.matching_gradient(clean, level, real(x, level), fake(x, level), bare)
    scale = (score_fake - score_real).abs().max().item()
    torch.testing.assert_close(gradient, score_fake - score_real, rtol=1e-6, atol=1e-6 * scale)


@pytest.mark.equation("3.13")
def test_eq8_is_one_over_the_mean_error_of_each_sample():
    """The weight is sigma squared times C S over the L1 norm of the teacher's error."""
    x = torch.zeros(2, 3, 2, 2, dtype=DOUBLE)
    denoised_real = x.clone()
    denoised_real[0, 0, 0, 0] = -6.0  # L1 norm 6 over 12 values
    denoised_real[1] = 0.25  # L1 norm 3 over 12 values
    weight = dmd.weight(Weighting.EQ8, x, double(2.0, 10.0), denoised_real)
    assert weight.tolist() == pytest.approx([4 * 12 / 6, 100 * 12 / 3])


@pytest.mark.equation("3.14")
def test_under_eq8_the_gradient_has_no_unit():
    """Under Eq. 8 sigma cancels: a fake estimate equal to x gives a mean of exactly one."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(4, 1, 8, 8, generator=rng, dtype=DOUBLE)
    scale = double(1e-3, 0.1, 1.0, 50.0)[:, None, None, None]
    real = x + scale * torch.randn(x.shape, generator=rng, dtype=DOUBLE)
    sigma = double(0.01, 0.5, 3.0, 70.0)
    gradient = dmd.matching_gradient(x, sigma, real, x, Weighting.EQ8)
    assert gradient.abs().mean(dim=(1, 2, 3)).tolist() == pytest.approx([1.0] * 4)
    assert ((gradient > 0) == (x > real)).all()  # descending goes from the fake to the real
    louder = dmd.matching_gradient(7 * x, sigma, 7 * real, 7 * x, Weighting.EQ8)
    torch.testing.assert_close(louder, gradient)


@pytest.mark.equation("3.15")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (DOUBLE, 1e-12)])
def test_the_loss_has_the_gradient_of_the_chain_rule(dtype, tolerance):
    """The stop-gradient loss has the derivative slope times g, over the number of values."""
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 5)).to(dtype)
    x = generator(torch.randn(7, 4, dtype=dtype))
    g = torch.randn(7, 5, dtype=dtype)
    parameters = list(generator.parameters())
    loss = dmd.matching_loss(x, g)
    by_loss = torch.autograd.grad(loss, parameters, retain_graph=True)
    by_hand = torch.autograd.grad((x * g).sum() / 35, parameters)
    for a, b in zip(by_loss, by_hand, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert loss.item() == pytest.approx(g.square().mean().item() / 2, rel=1e-5)


# Claims


def test_without_noise_the_uniform_generator_gets_the_wrong_sign_and_with_noise_the_right_one():
    theta, data = 1.6, Normal(1.0, 0.5)
    z = (torch.arange(20_000, dtype=DOUBLE) + 0.5) / 20_000
    score_real = -(theta * z - 1.0) / 0.25
    estimate = -(score_real * z).mean()  # the fake score is 0 inside the interval
    leaf = double(theta).requires_grad_()
    divergence = -leaf.log() - data.log_prob(leaf * z).mean()
    (exact,) = torch.autograd.grad(divergence, leaf)
    assert exact < -0.4 < 0.1 < estimate
    assert (estimate - exact).item() == pytest.approx(1 / theta, abs=1e-4)


def test_near_the_target_the_dropped_term_is_all_the_noise():
    mean, factor, _ = gaussians()
    fake = as_mixture(MultivariateNormal(mean, factor @ factor.T))
    x = fake.sample(1000, rng=torch.Generator().manual_seed(0)).double()
    kept = fake.score(x) - fake.score(x)
    dropped = -fake.score(x)  # derivative by the mean, at fixed x
    assert kept.abs().max() == 0
    assert dropped.std(0).min() > 0.3


def test_against_wide_data_the_dropped_term_removes_noise():
    x, scale = 0.4 + 0.8 * torch.sinh(Z), 0.8
    score = scores_by_autograd(lambda x: sinh_log_density(x, double(0.4), double(scale)), x)
    kept = score * torch.sinh(Z)  # the real score of very wide data is 0
    both = kept + dropped_term(x, 0.4, scale)[1]
    assert (kept - (kept * Z_WEIGHTS).sum()).square().mul(Z_WEIGHTS).sum() > 0.1
    torch.testing.assert_close(both, torch.full_like(both, -1 / scale), atol=1e-9, rtol=1e-9)


def benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_benchmark_of_the_gradient_reaches_its_figures():
    kl_gradient = benchmark("kl_gradient")
    outcome = kl_gradient.measure(kl_gradient.draw_problem(dim=2, seed=0), seed=1)
    assert outcome.error < kl_gradient.LARGEST_ERROR
    assert outcome.mean < kl_gradient.LARGEST_MEAN


def test_eq8_is_flat_at_the_initial_digits_student_and_its_rivals_are_not():
    module = benchmark("weighting_spread")
    teacher = module.pretrained.load("digits-teacher")
    student = module.OneStepGenerator(teacher)
    norms = module.norms_by_level(
        teacher, module.fitted_critic(student), student, module.noise_levels(), count=50
    )
    ratio = dict(zip(Weighting, module.spread(norms), strict=True))
    assert ratio[Weighting.EQ8] < 3
    assert min(ratio[Weighting.SIGMA], ratio[Weighting.SIGMA3]) > 100
    assert ratio[Weighting.NONE] > 10


class Affine(nn.Module):
    """Three generators scale z in the plane, one for each label, with known distributions."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.3, 0.6, 1.0]))

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        return self.scale[label, None] * z

    def exact_denoiser(self, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        variance = self.scale.detach()[label, None] ** 2
        return x * variance / (variance + sigma[:, None] ** 2)


@pytest.mark.parametrize("with_fake_score", [False, True])
def test_the_real_score_alone_collapses_and_the_difference_finds_the_width(with_fake_score):
    target = GaussianMixture.isotropic(torch.zeros(1, 2), 0.5)
    generators = Affine()
    label = torch.arange(3).repeat_interleave(64)
    rng = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(generators.parameters(), lr=0.02)
    objective = dmd.Objective(lambda_reg=0, critic_steps=0, grid=noise.karras_grid(sigma_max=1.0))
    for _ in range(150):
        dmd.iteration(
            generators,
            generators.exact_denoiser if with_fake_score else dmd.zero_score,
            lambda x, sigma, label: target(x, sigma),
            optimizer,
            None,
            dmd.Batch(torch.randn(192, 2, generator=rng), label),
            objective,
            rng,
        )
    width = generators.scale.detach().abs()
    if with_fake_score:
        assert ((width - 0.5).abs() < 0.1).all()
    else:
        assert (width < 0.1).all()

"""The equations of chapter 6."""

import copy
import math

import numpy as np
import pytest
import scipy.linalg
import torch

from dmd_tutorial import dmd, metrics
from dmd_tutorial.data import ring, two_modes
from dmd_tutorial.denoisers import EDMDenoiser
from dmd_tutorial.generators import OneStepGenerator
from dmd_tutorial.networks import MLP
from dmd_tutorial.noise import add_noise, karras_grid
from dmd_tutorial.training import averaged


@pytest.mark.equation("6.1")
def test_generator_is_the_denoiser_at_sigma_max():
    """A denoiser held at the highest noise level maps noise to a sample in one evaluation."""
    z = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    asked = []

    class Spy(torch.nn.Module):
        def forward(self, x, sigma, label=None):
            asked.append((x, sigma))
            return two_modes()(x, sigma)

    x = OneStepGenerator(Spy())(z)
    ((noisy, sigma),) = asked
    assert torch.equal(noisy, 80 * z)
    assert sigma.tolist() == [80] * 50
    # an undistilled teacher answers with (almost) the mean of the data, which is 0 here
    assert x.abs().max() < 0.3


@pytest.mark.equation("6.1")
def test_data_is_invisible_at_sigma_max():
    """The start sigma_max z differs from a really noised sample by next to nothing."""
    variance = 1.0  # no set of pixels in [-1, 1] has more
    ratio = (80**2 + variance) / 80**2
    kl = 0.5 * (ratio - 1 - math.log(ratio))  # per pixel, nats
    assert 3072 * kl < 1e-4


@pytest.mark.equation("6.2")
def test_gradient_is_the_difference_of_scores_normalised_by_the_teacher_s_error():
    """With Eq. 8 the gradient at an image is the denoisers' difference over the teacher's error."""
    target, current, rng = ring(), two_modes(), torch.Generator().manual_seed(0)
    x = torch.randn(9, 2, generator=rng, dtype=torch.float64)
    sigma = torch.logspace(-1, 0.7, 9, dtype=torch.float64)
    noisy = add_noise(x, sigma, torch.randn(9, 2, generator=rng, dtype=torch.float64))
    noisy.requires_grad_()
    (real,) = torch.autograd.grad(target.log_prob(noisy, sigma).sum(), noisy)
    (fake,) = torch.autograd.grad(current.log_prob(noisy, sigma).sum(), noisy)
    noisy = noisy.detach()
    denoised = noisy + sigma[:, None] ** 2 * real  # Tweedie
    error = (x - denoised).abs().sum(1) / 2
    expected = (sigma**2 / error)[:, None] * (fake - real)
    ours = dmd.matching_gradient(x, sigma, target(noisy, sigma), current(noisy, sigma))
    assert torch.allclose(ours, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.equation("6.3")
def test_one_iteration_descends_the_whole_objective(monkeypatch):
    """Matching and anchor, both means, lambda_reg between them: the generator's loss."""
    torch.manual_seed(0)
    generator = OneStepGenerator(EDMDenoiser(MLP(hidden=16)), 5.0).double()
    for p in generator.parameters():
        p.data += 0.1 * torch.randn_like(p)
    rng = torch.Generator().manual_seed(0)
    z, z_ref, y_ref = torch.randn(3, 6, 2, generator=rng, dtype=torch.float64)
    before = [p.detach().clone() for p in generator.parameters()]
    optimizer = torch.optim.SGD(generator.parameters(), lr=1.0)
    objective = dmd.Objective(lambda_reg=0.3, critic_steps=0, clip=1e9,
                              grid=karras_grid(sigma_max=5.0))  # fmt: skip
    reference = copy.deepcopy(generator)
    record = dmd.iteration(generator, ring(), two_modes(), optimizer, None,
                           dmd.Batch(z, None, z_ref, y_ref), objective, rng)  # fmt: skip
    step = torch.cat(
        [(b - p).flatten() for b, p in zip(before, generator.parameters(), strict=True)]
    )

    # the same, by the Jacobian of the generator: (1 / Bn) sum_i J_i^T g_i + lambda * anchor
    error = (record.x - record.denoised_real).abs().mean(1, keepdim=True)
    g = (record.denoised_fake - record.denoised_real) / error
    parameters = list(reference.parameters())
    matching = torch.autograd.grad(reference(z), parameters, grad_outputs=g / (6 * 2))
    residual = 2 * (reference(z_ref) - y_ref).detach() / (6 * 2)
    anchor = torch.autograd.grad(reference(z_ref), parameters, grad_outputs=residual)
    expected = torch.cat([(m + 0.3 * a).flatten() for m, a in zip(matching, anchor, strict=True)])
    assert torch.allclose(step, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.equation("6.4")
@pytest.mark.parametrize(("beta", "steps"), [(0.9, 200), (0.98, 240), (0.98, 600), (0.0, 3)])
def test_average_of_weights(beta, steps):
    """The average is the recursion, its decay the smaller of beta and k / (k + 9)."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=steps + 1)
    module = torch.nn.Linear(1, 1, bias=False).double()
    module.weight.data.fill_(weights[0])
    ema, expected = averaged(module, beta), weights[0]
    for k, value in enumerate(weights[1:], 1):
        module.weight.data.fill_(value)
        ema.update_parameters(module)
        decay = min(beta, k / (k + 9))
        expected = decay * expected + (1 - decay) * value
    assert ema.module.weight.item() == pytest.approx(expected)


@pytest.mark.equation("6.4")
def test_how_far_the_average_looks_back():
    """A tenth of the steps so far while its decay rises, 1 / (1 - beta) once it does not."""

    def looks_back(beta, steps):
        decay = [min(beta, k / (k + 9)) for k in range(1, steps + 1)]
        shares = [(1 - d) * math.prod(decay[k:]) for k, d in enumerate(decay, 1)]
        return sum(share * (steps - k) for k, share in enumerate(shares, 1))

    assert looks_back(0.98, 240) == pytest.approx(24, rel=0.05)  # the run of the chapter
    assert looks_back(0.98, 5_000) == pytest.approx(49, rel=0.01)
    first = next(k for k in range(1, 1_000) if k / (k + 9) >= 0.98)
    assert first == 441


@pytest.mark.equation("6.5")
def test_frechet_distance_of_gaussians():
    """Frechet's distance of two Gaussians, against scipy and the 1-D closed form."""
    one = [torch.tensor(v).double() for v in ([1.0], [[4.0]], [-2.0], [[0.25]])]
    assert metrics.frechet_distance(*one) == pytest.approx(3**2 + (2 - 0.5) ** 2, rel=1e-5)
    rng = np.random.default_rng(0)
    mean1, mean2 = rng.normal(size=(2, 5))
    root1, root2 = rng.normal(size=(2, 5, 5))
    cov1, cov2 = root1 @ root1.T, root2 @ root2.T
    root = scipy.linalg.sqrtm(cov1 @ cov2).real
    expected = ((mean1 - mean2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * root)
    five = [torch.as_tensor(v) for v in (mean1, cov1, mean2, cov2)]
    assert metrics.frechet_distance(*five) == pytest.approx(expected, rel=1e-4)

"""DDIM, reverse diffusions, fast solvers and Langevin against closed forms and scipy."""

import inspect
import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from dmd_tutorial import samplers
from dmd_tutorial.mixtures import GaussianMixture
from dmd_tutorial.noise import karras_grid, linear_schedule, sampling_levels

DOUBLE = torch.float64
MIXTURE = GaussianMixture.isotropic(
    torch.tensor([[-1.0, 0.2], [1.2, 0.5], [0.1, -1.1]]), 0.5, torch.tensor([0.5, 0.2, 0.3])
)
Z = torch.randn(60, 2, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)

DETERMINISTIC = {
    "euler": (samplers.euler, 1),
    "ddim": (samplers.ddim, 1),
    "flow VP": (partial(samplers.probability_flow, process=samplers.VP), 1),
    "heun": (samplers.heun, 2),
    "dpm 2": (samplers.dpm_solver, 2),
    "dpm 3": (partial(samplers.dpm_solver, order=3), 3),
    "deis 2": (partial(samplers.deis, order=2), 2),
    "deis 3": (samplers.deis, 3),
    "pndm": (samplers.pndm, 2),
    "unipc 1": (partial(samplers.unipc, order=1), 2),
    "unipc 2": (samplers.unipc, 3),
    "unipc 3": (partial(samplers.unipc, order=3), 4),
}
RANDOM = {
    "ancestral": samplers.ancestral,
    "ddim": partial(samplers.ddim, eta=0.7),
    "SDE VE": samplers.reverse_sde,
    "SDE VP": partial(samplers.reverse_sde, process=samplers.VP),
    "SDE, half chance": partial(samplers.reverse_sde, chance=0.5),
}


def last(steps):
    *_, final = steps
    return final


def falling(steps, low=0.05, high=80.0):
    return karras_grid(steps + 1, low, high).flip(0)


@pytest.fixture(scope="module")
def end():
    """Where the paths from Z end at noise level 0.05, by scipy."""
    return last(samplers.rk45(MIXTURE, Z, falling(1), tolerance=1e-10)).x


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_of_convergence(name, end):
    sampler, order = DETERMINISTIC[name]
    errors = [
        (last(sampler(MIXTURE, Z, falling(steps))).x - end).norm(dim=1).mean()
        for steps in (80, 160)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


def test_half_of_the_quadratic_term_makes_order_two(end):
    sampler = partial(samplers.dpm_solver, order=3, share=0.5)
    errors = [
        (last(sampler(MIXTURE, Z, falling(steps))).x - end).norm(dim=1).mean()
        for steps in (160, 320)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.25)


@pytest.mark.parametrize("name", [*DETERMINISTIC, *RANDOM])
def test_one_evaluation_a_step_and_a_record_each(name):
    sampler = DETERMINISTIC[name][0] if name in DETERMINISTIC else RANDOM[name]
    levels = sampling_levels(6)
    records = list(sampler(MIXTURE, Z.float(), levels))
    evaluations = {"heun": 11, "pndm": 7}.get(name, 6)
    assert [r.index for r in records] == list(range(6))
    assert [r.sigma for r in records] == levels[1:].tolist()
    assert records[-1].evaluations == evaluations
    assert records[-1].x.dtype == DOUBLE


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_step_to_level_0_from_nearby_is_the_denoiser_s_answer(name):
    sampler, _ = DETERMINISTIC[name]
    records = list(sampler(MIXTURE, Z, sampling_levels(20)))
    before, final = records[-2].x, records[-1]
    assert torch.allclose(final.x, MIXTURE(before, 0.002), atol=2e-5)


def test_rk45_counts_its_calls_and_meets_its_tolerance(end):
    calls = 0

    def counting(x, sigma, label=None):
        nonlocal calls
        calls += 1
        return MIXTURE(x, sigma)

    rough = last(samplers.rk45(counting, Z, falling(1), tolerance=1e-4))
    assert rough.evaluations == calls
    assert 30 < calls < 150
    assert (rough.x - end).abs().max() < 5e-3
    assert rough.sigma == pytest.approx(0.05)


def test_rk45_to_level_0_ends_in_a_denoised_point():
    records = list(samplers.rk45(MIXTURE, Z, sampling_levels(18)))
    assert records[-1].sigma == 0
    assert torch.equal(records[-1].x, MIXTURE(records[-2].x, 0.002))
    only = list(samplers.rk45(MIXTURE, Z, sampling_levels(1)))
    assert len(only) == only[0].evaluations == 1
    assert torch.equal(only[0].x, MIXTURE(80 * Z, 80.0))


@pytest.mark.parametrize(
    "sampler",
    [
        samplers.ddim,
        samplers.probability_flow,
        partial(samplers.dpm_solver, order=1),
        partial(samplers.deis, order=1),
    ],
)
def test_first_order_solvers_are_euler(sampler):
    levels = sampling_levels(9)
    for one, other in zip(
        sampler(MIXTURE, Z, levels), samplers.euler(MIXTURE, Z, levels), strict=True
    ):
        assert torch.allclose(one.x, other.x, rtol=1e-10, atol=1e-10)


def test_ddim_with_all_of_the_noise_is_ddpm():
    levels = samplers.ddpm_levels(25)
    runs = [
        last(sampler(MIXTURE, Z, levels, rng=torch.Generator().manual_seed(5))).x
        for sampler in (partial(samplers.ddim, eta=1.0), samplers.ancestral)
    ]
    assert torch.allclose(*runs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", RANDOM)
def test_random_samplers_repeat_with_a_generator_only(name):
    one, again, other = (
        last(RANDOM[name](MIXTURE, 0 * Z, falling(30), rng=torch.Generator().manual_seed(s))).x
        for s in (0, 0, 1)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert one.std(dim=0).min() > 0.3  # equal starts have spread out


@pytest.mark.parametrize("name", RANDOM)
def test_random_samplers_reach_the_mixture(name):
    """Their points have the mean and the covariance of the noisy mixture at the last level."""
    rng = torch.Generator().manual_seed(1)
    z = torch.randn(4000, 2, generator=rng)
    steps = 300 if "SDE" in name else 100
    x = last(RANDOM[name](MIXTURE, z, falling(steps), rng=rng)).x
    mean = MIXTURE.weights @ MIXTURE.means
    spread = MIXTURE.means - mean
    covariance = torch.einsum("k,ki,kj->ij", MIXTURE.weights, spread, spread)
    covariance += (0.25 + 0.05**2) * torch.eye(2, dtype=DOUBLE)
    assert torch.allclose(x.mean(dim=0), mean, atol=0.08)
    assert torch.allclose(x.T.cov(), covariance, atol=0.12)


@pytest.mark.parametrize("process", [samplers.VE, samplers.VP])
@pytest.mark.parametrize("sigma", [0.0, 0.002, 0.5, 7.0, 80.0])
def test_processes_keep_the_books_noise_levels(process, sigma):
    """With V = alpha^2 sigma^2 the noise in the state: dV/dt = 2 f V + g^2, dalpha/dt = f alpha."""
    t, gap = process.time(sigma), 1e-5
    times = [max(t - gap, 0.0), t + gap]

    def level(t):  # the inverse of process.time, by bisection
        low, high = 0.0, 200.0
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if process.time(middle) < t else (low, middle)
        return low

    length = times[1] - times[0]
    middle = sum(times) / 2
    alphas, alpha = [process.alpha(s) for s in times], process.alpha(middle)
    variances = [process.alpha(s) ** 2 * level(s) ** 2 for s in (*times, middle)]
    f, g_squared = process.f(middle), process.g_squared(middle)
    assert (alphas[1] - alphas[0]) / length == pytest.approx(f * alpha, rel=1e-4, abs=1e-6)
    change = (variances[1] - variances[0]) / length
    assert change == pytest.approx(2 * f * variances[2] + g_squared, rel=1e-3, abs=1e-4)
    assert level(t) == pytest.approx(sigma, abs=1e-6)


def test_variance_preserving_process_is_the_linear_schedule():
    t = torch.tensor([0.01, 0.3, 1.0], dtype=DOUBLE)
    schedule = linear_schedule(t)
    for i, moment in enumerate(t.tolist()):
        alpha, sigma = schedule.alpha[i].item(), schedule.sigma[i].item()
        assert samplers.VP.alpha(moment) == pytest.approx(alpha)
        assert samplers.VP.time(sigma / alpha) == pytest.approx(moment)


@pytest.mark.parametrize("rate", [1.0, -1.0])
@pytest.mark.parametrize("h", [0.01, 0.7, 6.0])
def test_polynomial_weights(rate, h):
    nodes, values = [0.0, -0.4, -1.1], [1.3, -0.2, 0.8]
    polynomial = np.polynomial.Polynomial.fit(nodes, values, 2)
    truth, _ = quad(lambda r: math.exp(rate * r) * polynomial(r), 0, h, epsabs=1e-13)
    weights = samplers.polynomial_weights(nodes, h, rate)
    assert np.dot(weights, values) == pytest.approx(truth, rel=1e-10)


def test_parabola_of_dpm_solver_is_the_one_of_unipc():
    levels = falling(3, 0.5, 5.0)
    three, corrected = (
        last(partial(sampler, order=3)(MIXTURE, Z, levels)).x
        for sampler in (samplers.dpm_solver, samplers.unipc)
    )
    assert not torch.allclose(three, corrected)  # the second step has been corrected by then
    history = [(s, torch.randn(4, 2, dtype=DOUBLE)) for s in (1.0, 1.7, 2.2)]
    x = torch.randn(4, 2, dtype=DOUBLE)
    module = inspect.getmodule(samplers.dpm_solver)
    exact = 0.6 * (x + module._integral(history, 1.0, 0.6, rate=1.0))
    assert torch.allclose(module.quadratic_step(x, history, 0.6), exact)


def test_few_ddpm_steps_are_a_subsequence():
    everything = samplers.ddpm_levels()
    assert len(everything) == 1001
    assert everything[0].item() == pytest.approx(157.4, abs=0.1)
    assert everything[-1] == 0
    for steps in (1, 7, 50):
        some = samplers.ddpm_levels(steps)
        assert len(some) == steps + 1
        assert (some.diff() < 0).all()
        assert torch.isin(some, everything).all()


def test_samplers_with_options_run_through_sample():
    z, label = torch.randn(7, 2), torch.arange(7) % 3
    sampler = partial(samplers.unipc, order=3)
    x = samplers.sample(MIXTURE, z, label, steps=8, sampler=sampler, batch=3)
    assert x.dtype == z.dtype
    assert (x - MIXTURE.means[label].float()).norm(dim=1).max() < 2.5  # each in its component


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: last(samplers.ddim(MIXTURE, Z, sampling_levels(3), eta=1.5)), "not 1.5"),
        (lambda: last(samplers.deis(MIXTURE, Z, sampling_levels(3), order=4)), "3, not 4"),
        (lambda: last(samplers.reverse_sde(MIXTURE, Z, sampling_levels(3), chance=-1)), "it is -1"),
        (lambda: samplers.ddpm_levels(1001), "from 1 to 1000, not 1001"),
        (lambda: last(samplers.unipc(MIXTURE, Z, torch.tensor([1.0, 1.0]))), "must fall"),
        (lambda: last(samplers.rk45(MIXTURE, math.nan * Z, sampling_levels(3))), "z is not"),
    ],
)
def test_errors_name_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()

"""Samplers against exact solutions and scipy."""

import math
import weakref
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from dmd_tutorial.data import ring, two_modes
from dmd_tutorial.generators import OneStepGenerator
from dmd_tutorial.mixtures import GaussianMixture
from dmd_tutorial.noise import karras_grid, sampling_levels
from dmd_tutorial.samplers import (
    annealed_langevin,
    euler,
    heun,
    langevin,
    one_step,
    sample,
    stochastic,
)
from dmd_tutorial.samplers.step import as_state


def gaussian(std: float = 0.5) -> GaussianMixture:
    return GaussianMixture.isotropic(torch.zeros(1, 2), std)


class Counter:
    """A denoiser that counts its calls and keeps their types."""

    def __init__(self, denoiser) -> None:
        self.denoiser, self.calls, self.types = denoiser, 0, set()

    def __call__(self, x, sigma, label=None):
        self.calls += 1
        self.types.add((x.dtype, sigma.dtype))
        return self.denoiser(x, sigma, label)


def last(steps):
    *_, final = steps
    return final


@pytest.mark.parametrize("steps", [1, 2, 18])
def test_evaluations_are_n_for_euler_and_2n_minus_1_for_heun(steps):
    z = torch.randn(3, 2)
    for sampler, evaluations in ((euler, steps), (heun, 2 * steps - 1)):
        counter = Counter(two_modes())
        final = last(sampler(counter, z, sampling_levels(steps)))
        assert counter.calls == final.evaluations == evaluations


def test_state_is_float64_and_the_denoiser_keeps_its_type():
    counter = Counter(two_modes())
    final = last(heun(counter, torch.randn(3, 2), sampling_levels(5)))
    assert final.x.dtype == torch.float64
    assert counter.types == {(torch.float32, torch.float32)}


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2)])
def test_order_of_convergence_on_a_gaussian(sampler, order):
    """Exact solution: x(sigma) is proportional to sqrt(s^2 + sigma^2)."""
    z, errors = torch.tensor([[1.0, -0.5]], dtype=torch.float64), []
    exact = 10.0 * z * math.sqrt((0.25 + 0.01) / (0.25 + 100))
    for steps in (40, 80):
        levels = torch.linspace(10**0.2, 0.1**0.2, steps + 1, dtype=torch.float64) ** 5
        errors.append((last(sampler(gaussian(), z, levels)).x - exact).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


def test_heun_follows_scipy_s_solver():
    mixture, z = ring(), torch.randn(4, 2, dtype=torch.float64)
    levels = sampling_levels(400, sigma_min=0.01, sigma_max=10.0)[:-1]

    def slope(sigma, x):
        points = torch.as_tensor(x).reshape(4, 2)
        return ((points - mixture(points, float(sigma))) / sigma).flatten().numpy()

    start = (10 * z).flatten().numpy()
    truth = solve_ivp(slope, (10.0, 0.01), start, method="DOP853", rtol=1e-10, atol=1e-10)
    ours = last(heun(mixture, z, levels)).x.flatten().numpy()
    assert np.abs(ours - truth.y[:, -1]).max() < 2e-3


@pytest.mark.parametrize("sampler", [euler, heun, stochastic])
def test_samplers_reach_the_data(sampler):
    z = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    x = last(sampler(two_modes(), z, sampling_levels(100))).x
    assert x[:, 0].abs().mean().item() == pytest.approx(2, abs=0.06)
    assert x[:, 1].std().item() == pytest.approx(0.4, abs=0.03)
    assert (x[:, 0] > 0).double().mean().item() == pytest.approx(0.5, abs=0.04)


def test_stochastic_forgets_its_start_and_depends_on_its_generator():
    z, levels = torch.zeros(500, 2), sampling_levels(30)
    one, again, other = (
        last(stochastic(two_modes(), z, levels, rng=torch.Generator().manual_seed(s))).x
        for s in (0, 0, 1)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert one.std(dim=0).min() > 0.2  # equal starts have spread out


def test_langevin_samples_the_noisy_density():
    x = 0.1 * torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    walk = langevin(gaussian(), x, 0.5, 400, 0.02, rng=torch.Generator().manual_seed(1))
    assert last(walk).x.var(dim=0).mean().item() == pytest.approx(0.5, rel=0.06)


def test_annealed_langevin_finds_both_modes_where_plain_langevin_does_not():
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(1000, 2, generator=rng)
    levels = karras_grid(12, 0.05, 8.0).flip(0)
    final = last(annealed_langevin(two_modes(), z, levels, steps_per_level=20, rng=rng))
    assert (final.x[:, 0] > 0).double().mean().item() == pytest.approx(0.5, abs=0.1)
    assert final.evaluations == 12 * 20
    start = torch.tensor([-2.0, 0.0]).expand(1000, 2)
    stuck = last(langevin(two_modes(), start, 0.05, 240, 0.01, rng=rng)).x
    assert (stuck[:, 0] > 0).double().mean().item() == 0


@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps"])
def test_the_state_is_float64_where_a_device_has_it(kind):
    """Apple's has not, and there is none here: the decision is asked, not the device."""
    x = Mock(device=torch.device(kind))
    if kind != "mps":
        assert as_state(x) is x.double.return_value
        return
    with pytest.warns(UserWarning, match="mps has no float64"):
        assert as_state(x) is x.float.return_value


def test_sample_keeps_the_newest_states_only():
    """However many steps: at most one that is done and one in the making."""
    alive, most = weakref.WeakSet(), []

    def denoiser(x, sigma, label=None):
        most.append(len(alive))
        return x

    def watched(*arguments):
        for step in euler(*arguments):
            alive.add(step.x)
            yield step

    sample(denoiser, torch.randn(3, 2), steps=30, sampler=watched)
    assert len(most) == 30
    assert max(most) <= 2


def test_no_samples_are_no_samples():
    """What a process gets where there are fewer samples than processes."""
    z, label = torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64)
    for condition in (None, label):
        assert sample(two_modes(), z, condition).shape == (0, 2)
        assert one_step(OneStepGenerator(two_modes()), z, condition).shape == (0, 2)


def test_sample_does_not_depend_on_its_batches():
    z, label = torch.randn(10, 2), torch.arange(10) % 8
    whole = sample(ring(), z, label, steps=6)
    assert torch.allclose(whole, sample(ring(), z, label, steps=6, batch=3), atol=1e-6)
    assert whole.dtype == z.dtype


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: last(euler(ring(), torch.zeros(1, 2), torch.tensor([1.0, 2.0]))), "must fall"),
        (lambda: last(heun(ring(), torch.full((1, 2), math.nan), sampling_levels(2))), "z is not"),
        (lambda: sample(ring(), torch.zeros(4, 2), torch.arange(5), batch=2), "5 labels, z has 4"),
        (lambda: last(langevin(ring(), torch.zeros(1, 2), 0.0, 5, 0.1)), "not 0.0 and 0.1"),
        (
            lambda: last(stochastic(ring(), torch.zeros(1, 2), sampling_levels(2), churn=-1.0)),
            "churn must not be negative",
        ),
    ],
)
def test_errors_name_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_one_step_samples_do_not_depend_on_their_batches():
    generator = OneStepGenerator(two_modes(), 3.0)
    z, label = torch.randn(10, 2), torch.arange(10) % 2
    assert torch.allclose(one_step(generator, z, label, batch=3), generator(z, label))
    assert one_step(generator, z).shape == z.shape

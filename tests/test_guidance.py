"""Matching and guidance apart: the same gradient where nothing differs, and what each term does."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks import guidance_plane as plane
from dmd_tutorial import dmd
from dmd_tutorial.adapters import Guided
from dmd_tutorial.anchor import l2
from dmd_tutorial.denoisers import EDMDenoiser
from dmd_tutorial.dmd import Batch, Objective
from dmd_tutorial.generators import OneStepGenerator
from dmd_tutorial.mixtures import GaussianMixture
from dmd_tutorial.networks import MLP
from dmd_tutorial.text_to_image import guidance
from dmd_tutorial.text_to_image.guidance import Apart, heat_sides, iteration

DOUBLE = torch.float64
CLASSES = GaussianMixture.isotropic(torch.tensor([[-1.0, 0.2], [1.2, 0.5], [0.1, -1.1]]), 0.5)
COUNT, SCALE = 12, 3.5


def networks(seed=0):
    torch.manual_seed(seed)
    student, critic = (EDMDenoiser(MLP(hidden=16, classes=3).double()) for _ in range(2))
    for each in (*student.parameters(), *critic.parameters()):
        nn.init.normal_(each, std=0.3)
    return OneStepGenerator(student, 5.0), critic


def batch():
    label = torch.arange(COUNT) % 3
    z, noise, z_ref, y_ref = torch.randn(4, COUNT, 2, dtype=DOUBLE)
    sigma = torch.linspace(0.1, 4.0, COUNT, dtype=DOUBLE)
    return Batch(z, label, z_ref, y_ref, label, sigma, noise)


def twice(given, sigma=None, noise=None):
    """A batch with guidance's own levels and noise beside matching's."""
    sigma = given.sigma if sigma is None else sigma
    noise = given.noise if noise is None else noise
    return given._replace(
        sigma=torch.stack([given.sigma, sigma], 1), noise=torch.stack([given.noise, noise], 1)
    )


def gradient(student, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(student.parameters()))])


def weight_of_the_guided(student, given):
    """Eq. 8's weight, from the guided answer: the same for both terms, and for plain DMD."""
    x = student(given.z, given.label).detach()
    x_noisy = x + given.sigma[:, None] * given.noise
    value = dmd.weight(
        "eq8", x, given.sigma, Guided(CLASSES, SCALE)(x_noisy, given.sigma, given.label)
    )
    return lambda *arguments: value


@pytest.mark.parametrize("weighting", ["none", "sigma", "eq8 of the guided"])
@pytest.mark.parametrize("lambda_reg", [0.0, 0.7])
def test_on_the_same_levels_and_noise_both_terms_are_dmd_of_the_guided_teacher(
    weighting, lambda_reg
):
    (student, critic), given = networks(), batch()
    if weighting == "eq8 of the guided":
        weighting = weight_of_the_guided(student, given)
    how = {"weighting": weighting, "lambda_reg": lambda_reg, "distance": l2}
    plain, _ = dmd.generator_loss(student, critic, Guided(CLASSES, SCALE), given, Objective(**how))
    wanted = gradient(student, plain)

    def found(weight, **changes):
        objective = Apart(guidance_weight=weight, **how, **changes)
        loss, record = guidance.generator_loss(student, critic, CLASSES, twice(given), objective)
        assert bool(lambda_reg) == bool(record.loss_anchor)
        return gradient(student, loss)

    torch.testing.assert_close(found(SCALE - 1), wanted, rtol=1e-10, atol=1e-12)
    for other in (found(SCALE), found(SCALE - 1, matching_weight=1.1), found(SCALE - 1, null=0)):
        assert (other - wanted).norm() > 0.02 * wanted.norm()


def test_eq_8_weighs_guidance_by_the_answer_with_the_label_at_its_own_level():
    (student, critic), given = networks(), batch()
    sigma, noise = given.sigma.flip(0), torch.randn_like(given.z)
    objective = Apart(matching_weight=0.0, guidance_weight=2.0, lambda_reg=0.0)
    loss, _ = guidance.generator_loss(
        student, critic, CLASSES, twice(given, sigma, noise), objective
    )
    x = student(given.z, given.label)
    x_noisy = (x + sigma[:, None] * noise).detach()
    under, without = CLASSES(x_noisy, sigma, given.label), CLASSES(x_noisy, sigma)
    error = (x.detach() - under).abs().mean(1, keepdim=True)
    by_hand = (x * 2.0 * (without - under) / error).mean()
    torch.testing.assert_close(gradient(student, loss), gradient(student, by_hand))


def test_each_term_draws_from_its_own_range_and_the_critic_from_matchings(monkeypatch):
    (student, critic), asked = networks(), []

    class Teacher(nn.Module):
        def forward(self, x, sigma, label):
            asked.append(SimpleNamespace(null=bool((label < 0).all()), sigma=sigma, x=x))
            return CLASSES(x, sigma, label)

    learnt = []
    train = dmd.critic_loss
    monkeypatch.setattr(
        dmd,
        "critic_loss",
        lambda D, x, sigma, *rest: learnt.append(sigma) or train(D, x, sigma, *rest),
    )
    low, high = torch.linspace(0.1, 0.2, 50), torch.linspace(3, 4, 50)
    objective = Apart(lambda_reg=0, guidance_weight=1, grid=low, guidance_grid=high, critic_steps=2)
    optimizers = [torch.optim.Adam(each.parameters()) for each in (student, critic)]
    given = Batch(torch.randn(COUNT, 2, dtype=DOUBLE), torch.arange(COUNT) % 3)
    before = [p.clone() for p in student.parameters()]
    record = iteration(student, critic, Teacher(), *optimizers, given, objective)
    matching, without, under = sorted(asked, key=lambda call: (call.sigma.max() > 1, not call.null))
    assert not matching.null
    assert without.null > under.null
    assert 0.09 < matching.sigma.min() <= matching.sigma.max() < 0.21
    assert 2.9 < without.sigma.min() <= without.sigma.max() < 4.1
    assert torch.equal(without.x, under.x)  # guidance is the difference of answers to one question
    first, second = ((c.x - record.x) / c.sigma[:, None] for c in (matching, without))
    assert (first - second).abs().min() > 1e-3  # the noise
    assert len(learnt) == 2
    assert all(s.min() > 0.09 and s.max() < 0.21 for s in learnt)
    assert not torch.equal(record.sigma, learnt[0])
    assert any(not torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))


def test_guidance_is_refused_in_the_teacher_where_the_objective_adds_it():
    with pytest.raises(ValueError, match="guided already"):
        iteration(*networks(), Guided(CLASSES, 2.0), None, None, batch(), Apart())


def test_a_text_is_guided_away_from_its_null_embedding():
    label, null = torch.randn(4, 5, 3), torch.randn(5, 3)
    asked = []
    unlabelled = guidance.without_label(lambda x, sigma, label: asked.append(label), null)
    unlabelled(torch.zeros(4, 2), torch.ones(4), label)
    assert torch.equal(asked[0], null.expand(4, 5, 3))


# The guided field


def points(sigma):
    x = CLASSES.sample(60).double() + sigma * torch.randn(60, 2, dtype=DOUBLE)
    return x, torch.full((60,), sigma, dtype=DOUBLE), torch.zeros(60).long()


@pytest.mark.parametrize("sigma", [0.1, 0.7, 3.0])
def test_a_noised_densitys_score_obeys_the_heat_equation(sigma):
    x, level, label = points(sigma)
    slanted = GaussianMixture(
        torch.tensor([[-1.0, 0.3], [0.8, 0.0]]), torch.tensor([[[0.5, 0.3], [0.3, 0.4]]] * 2)
    )
    for denoiser, told in ((CLASSES, label), (CLASSES, None), (slanted, None)):
        rate, heat = heat_sides(denoiser, x, level, told)
        torch.testing.assert_close(rate, heat, rtol=1e-9, atol=1e-12)
    h = 1e-5  # what is differentiated is the score, at a point that stays
    difference = (slanted.score(x, sigma + h) - slanted.score(x, sigma - h)) / (2 * h)
    torch.testing.assert_close(rate, difference, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 3.0])
@pytest.mark.parametrize("scale", [0.5, 2.0, 4.0])
def test_the_guided_field_misses_it_by_the_gradient_of_a_squared_difference(sigma, scale):
    """Scale (1 - scale) sigma grad|s_label - s_null|^2: 0 at scale 1 and 0, or for one width."""
    x, level, label = points(sigma)
    rate, heat = heat_sides(Guided(CLASSES, scale), x, level, label)
    leaf = x.clone().requires_grad_()
    difference = CLASSES.score(leaf, level, label) - CLASSES.score(leaf, level)
    (slope,) = torch.autograd.grad(difference.square().sum(), leaf)
    wanted = scale * (1 - scale) * sigma * slope
    torch.testing.assert_close(rate - heat, wanted, rtol=1e-8, atol=1e-10)
    assert wanted.norm() > 1e-3 * rate.norm()


def test_guidance_between_gaussians_of_one_width_is_a_density_after_all():
    """The control: the sharpened density is a shifted Gaussian, noised or not."""
    x, level, label = points(0.7)
    pair = GaussianMixture.isotropic(torch.tensor([[1.0, 0.0], [-0.5, 1.0]]), 0.5)
    guided = Guided(pair, 3.0, null=1)
    torch.testing.assert_close(*heat_sides(guided, x, level, label), rtol=1e-9, atol=1e-12)
    shifted = GaussianMixture.isotropic(3 * pair.means[:1] - 2 * pair.means[1:], 0.5)
    torch.testing.assert_close(guided(x, level, label), shifted(x, level))


def test_the_guided_field_is_not_the_sharpened_densitys_noised():
    """At scale 2, on noisy samples of a class; at scale 1 the lattice's sums are exact."""
    plain, guided = (plane.field(scale, 0.5, 100) for scale in (1.0, 2.0))
    assert plain["to_sharpened"] < 1e-10 > guided["class_residual"]
    assert guided["residual"] == pytest.approx(0.47, abs=0.05)
    assert guided["to_sharpened"] == pytest.approx(0.41, abs=0.05)
    assert plane.field(2.0, 5.0, 100)["residual"] < 0.01  # it hides in much noise
    # the ODE overshoots what guidance is said to aim at almost five times
    sharpened, ode = plane.Sharpened(2.0).shape(), plane.guided_ode(2.0, count=1500)
    assert sharpened == pytest.approx((0.086, 0.461), abs=0.003)
    assert ode == pytest.approx((0.41, 0.39), abs=0.03)


# In the plane


@pytest.mark.parametrize(
    ("name", "shift", "std"),
    [
        ("matching and 3 x guidance", 0.88, 0.325),
        ("matching and guidance, at low levels", 0.07, 0.42),
        ("matching and guidance, at high levels", 0.89, 0.34),
    ],
)
def test_guidance_pulls_at_high_levels_and_narrows_at_low_ones(name, shift, std):
    """Gaussian students with an exact critic, at their fixed points."""
    found = plane.fixed_point(plane.SETTINGS[name])
    assert found == pytest.approx((shift, std), abs=0.02)


def test_students_with_a_trained_critic_hold_the_shape_by_matching():
    """Two students each, few iterations: wide bands; the benchmark has five and all rows."""
    shapes = {weight: plane.train(plane.apart(1, weight, 2), 120, copies=2) for weight in (0, 3)}
    for still, moved in zip(*shapes.values(), strict=True):
        assert abs(still.shift) < 0.12
        assert 0.42 < still.std < 0.58
        assert 0.7 < moved.shift < 1.1
        assert moved.std < 0.43
    runaway = plane.train(plane.apart(0, 3, 0), 120, copies=2)
    assert min(alone.shift for alone in runaway) > 1.5


def test_what_is_recorded_of_five_students():
    """Students land where the exact critic says; one with a critic that lags comes out narrower."""
    report = json.loads(plane.OUT.read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert report["seeds"] == 5
    for name, row in rows.items():
        if name != "guidance alone":
            away = {key: row["mean"][key] - row["fixed_point"][key] for key in ("shift", "std")}
            assert abs(away["shift"]) < 0.04
            lags = "lags" in name and row["guidance"] > 0
            assert -0.2 < away["std"] < -0.12 if lags else abs(away["std"]) < 0.025
    for weight, name in ((1, "matching and guidance"), (3, "matching and 3 x guidance")):
        ode, mean = report["ode"][str(1.0 + weight)], rows[name]["mean"]
        assert mean == pytest.approx(ode, abs=0.03)  # a student that copies its teacher's ODE
        assert mean["shift"] > 4 * report["sharpened"][str(1.0 + weight)]["shift"]
    shifts = [row["mean"]["shift"] for row in report["rows"] if row["name"] == "guidance alone"]
    assert 5 < shifts[0] < shifts[1] - 3

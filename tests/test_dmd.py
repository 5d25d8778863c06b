"""The heart: weightings, gradient, loss, critic, one iteration."""

import copy
import inspect
import math

import pytest
import torch
from torch.nn import functional

from dmd_tutorial import dmd
from dmd_tutorial.data import ring, two_modes
from dmd_tutorial.denoisers import EDMDenoiser, denoising_weight
from dmd_tutorial.dmd import Batch, Objective, Weighting, iteration, matching_gradient
from dmd_tutorial.generators import OneStepGenerator
from dmd_tutorial.mixtures import GaussianMixture
from dmd_tutorial.networks import MLP, UNet
from dmd_tutorial.noise import add_noise, grid_sigma, karras_grid


def random_case(shape=(1, 8, 8), batch=5, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x, real, fake = torch.randn(3, batch, *shape, generator=rng, dtype=torch.float64)
    sigma = torch.logspace(-2, 1, batch, dtype=torch.float64)
    return x, sigma, real, fake


def per_sample(x):
    return x.flatten(1).abs().mean(1)


# --- low precision ----------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", Weighting)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_gradient_in_low_precision_is_exact_to_its_rounding_at_every_level(dtype, weighting):
    x, real, fake = torch.randn(3, 64, 2).to(dtype)
    real[::2] = x[::2] + 1e-3  # Eq. 8's weight grows as the teacher's error falls
    sigma = torch.logspace(math.log10(0.002), 3, 64).to(dtype)
    expected = matching_gradient(*(t.double() for t in (x, sigma, real, fake)), weighting)
    found = matching_gradient(x, sigma, real, fake, weighting)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=0.0)


def test_the_critics_loss_in_float16_is_that_in_float64_at_every_level():
    x, noise, sigma = (
        torch.randn(64, 2).half(),
        torch.randn(64, 2).half(),
        torch.logspace(-2.7, 2, 64),
    )

    def critic(x, sigma, label):
        return x / (1 + sigma[:, None] ** 2)

    found = dmd.critic_loss(critic, x, sigma.half(), noise)
    expected = dmd.critic_loss(critic, x.double(), sigma.half().double(), noise.double())
    assert found.item() == pytest.approx(expected.item(), rel=0.05)


@pytest.mark.parametrize("size", [1e-2, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_losss_derivative_in_low_precision_is_the_gradient_to_its_rounding(dtype, size):
    """Although ``x - gradient`` would be rounded to x: gradients are small beside samples."""
    x = (2 * torch.rand(1024, 2) - 1).to(dtype).requires_grad_()
    gradient = (size * (1 + torch.rand(1024, 2))).to(dtype)
    loss = dmd.matching_loss(x, gradient) * x.numel()  # small gradients: scaled, as in training
    (slope,) = torch.autograd.grad(loss, x)
    assert slope.dtype == dtype
    torch.testing.assert_close(slope, gradient, rtol=torch.finfo(dtype).eps, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_anchors_distance_in_low_precision_is_that_in_float32(dtype):
    """As precise as LPIPS, whose weights are float32, wants it; float16 overflows when scaled."""
    seen = []

    def distance(x, y):
        seen.append((x.dtype, y.dtype))
        return functional.mse_loss(x, y)

    generator = torch.nn.Linear(2, 2).to(dtype)
    batch = Batch(torch.zeros(4, 2), None, torch.randn(4, 2).to(dtype), torch.randn(4, 2))
    objective = Objective(matching=False, distance=distance)
    model = lambda z, label: generator(z)  # noqa: E731
    loss, _ = dmd.generator_loss(model, None, None, batch, objective)
    assert seen == [(torch.float32, torch.float32)]
    (2.0**16 * loss).backward()
    assert generator.weight.grad.isfinite().all()


@pytest.mark.parametrize("wrapped", [True, False], ids=["preconditioned", "own network"])
def test_an_iteration_under_an_outer_autocast_is_the_iteration_to_bf16s_rounding(wrapped):
    """Every loss, gradient and update, also of networks that know nothing of precision."""

    class Own(torch.nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, x, sigma, label=None):
            level = sigma[:, None, None, None]
            width = (1 + level**2).sqrt()
            return x / width**2 + level / width * self.network(x / width, sigma.log(), label)

    def iterations(low: bool):
        networks, records = Networks(image=True, rate=1e-2), []
        if not wrapped:
            for owner, name in ((networks, "teacher"), (networks, "critic")):
                setattr(owner, name, Own(getattr(owner, name).network))
            networks.generator.denoiser = Own(networks.generator.denoiser.network)
        start = [weights(n) for n in networks.trained]
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            for seed in range(4):
                objective = Objective(critic_steps=2, grid=karras_grid(sigma_max=5.0))
                records.append(networks.run(IMAGE_BATCH, objective, seed))
        moved = [weights(n) - s for n, s in zip(networks.trained, start, strict=True)]
        return records, moved

    (exact, moves), (found, others) = iterations(False), iterations(True)
    assert not torch.equal(found[0].x, exact[0].x)
    for one, other in zip(found, exact, strict=True):
        assert one[4:] == pytest.approx(other[4:], rel=0.02, abs=1e-3)
    for one, other in zip(others, moves, strict=True):
        assert (one - other).norm() < 0.04 * other.norm()


# --- weightings -------------------------------------------------------------------------------


def test_eq8_divides_by_the_mean_absolute_error_of_the_teacher():
    """Written out as the paper has it: sigma^2 / alpha * C S / ||mu - x||_1, per sample."""
    x, sigma, real, _ = random_case(shape=(3, 4, 4))
    pixels = 3 * 4 * 4
    expected = [
        s.item() ** 2 / 1.0 * pixels / (r - one).abs().sum().item()
        for one, s, r in zip(x, sigma, real, strict=True)
    ]
    assert dmd.weight(Weighting.EQ8, x, sigma, real).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("weighting", "factor"),
    [
        (Weighting.SIGMA, lambda s: 1 / s),
        (Weighting.SIGMA3, lambda s: s),
        (Weighting.NONE, lambda s: 1.0 + 0 * s),
    ],
)
def test_other_weightings_in_edm_terms(weighting, factor):
    x, sigma, real, fake = random_case()
    gradient = matching_gradient(x, sigma, real, fake, weighting)
    assert torch.allclose(gradient, factor(sigma)[:, None, None, None] * (fake - real))


def test_eq8_makes_the_gradient_independent_of_the_scale_of_the_problem():
    x, sigma, real, fake = random_case()
    one = matching_gradient(x, sigma, real, fake)
    other = matching_gradient(7 * x, sigma, 7 * real, 7 * fake)
    assert torch.allclose(one, other)


def test_a_perfect_teacher_does_not_divide_by_zero():
    x, sigma, _, fake = random_case()
    assert matching_gradient(x, sigma, x.clone(), fake).isfinite().all()


def test_a_function_of_one_s_own_is_a_weighting():
    x, sigma, real, fake = random_case()
    gradient = matching_gradient(x, sigma, real, fake, lambda x, sigma, real: 3 * sigma**2)
    assert torch.allclose(gradient, 3 * (fake - real))


# --- gradient and loss ------------------------------------------------------------------------


def test_gradient_is_the_weighted_difference_of_scores():
    target, current, rng = ring(), two_modes(), torch.Generator().manual_seed(0)
    x = torch.randn(64, 2, generator=rng, dtype=torch.float64)
    sigma = grid_sigma(64, karras_grid(sigma_max=5.0), 0.3, 1, rng).double()
    noisy = add_noise(x, sigma, torch.randn(64, 2, generator=rng, dtype=torch.float64))
    real = target(noisy, sigma)
    gradient = matching_gradient(x, sigma, real, current(noisy, sigma))
    scores = current.score(noisy, sigma) - target.score(noisy, sigma)
    weight = sigma**2 / per_sample(x - real)
    assert torch.allclose(gradient, weight[:, None] * scores, rtol=1e-6, atol=1e-9)


def test_descent_moves_samples_towards_the_real_density():
    target, x = two_modes(), torch.tensor([[-1.0, 0.0], [1.0, 0.5]])
    current = GaussianMixture.isotropic(x.double(), 0.1)  # where the samples are now
    sigma = torch.full((2,), 0.5)
    gradient = matching_gradient(x, sigma, target(x, sigma), current(x, sigma), Weighting.NONE)
    assert (target.log_prob(x - 0.1 * gradient) > target.log_prob(x)).all()


@pytest.mark.parametrize("shape", [(2,), (1, 8, 8), (3, 4, 4)])
def test_loss_has_the_gradient_over_the_number_of_values(shape):
    x, sigma, real, fake = random_case(shape)
    x = x.requires_grad_()
    gradient = matching_gradient(x, sigma, real, fake)
    assert not gradient.requires_grad
    (slope,) = torch.autograd.grad(dmd.matching_loss(x, gradient), x)
    assert torch.allclose(slope, gradient / x.numel(), rtol=1e-12)


def test_critic_s_loss_has_edm_s_weight_and_leaves_the_generator_alone():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(6, 2, generator=rng).requires_grad_()
    sigma, noise = torch.tensor([0.1, 0.5, 1, 2, 10, 80]), torch.randn(6, 2, generator=rng)
    critic = EDMDenoiser(MLP(hidden=8))
    loss = dmd.critic_loss(critic, x, sigma, noise)
    by_hand = [
        denoising_weight(s) * (critic((one + s * n)[None], s[None]) - one).square().mean()
        for one, s, n in zip(x, sigma, noise, strict=True)
    ]
    assert loss.item() == pytest.approx(torch.stack(by_hand).mean().item(), rel=1e-5)
    loss.backward()
    assert x.grad is None
    assert critic.network.out.weight.grad is not None


# --- one iteration ----------------------------------------------------------------------------


class Networks:
    """Generator, critic and teacher with their optimisers, small."""

    def __init__(self, image: bool = False, rate: float = 1e-3, exact: bool = False) -> None:
        torch.manual_seed(0)
        network = UNet(width=8, embedding=16) if image else MLP(hidden=32)
        for parameter in network.parameters():
            parameter.data = parameter.data + 0.02 * torch.randn_like(parameter)
        self.teacher = two_modes() if exact else EDMDenoiser(network).requires_grad_(False)
        trained = EDMDenoiser(copy.deepcopy(network)).requires_grad_(True)
        self.generator = OneStepGenerator(trained, 5.0)
        self.critic = copy.deepcopy(trained)
        self.optimizers = [torch.optim.SGD(n.parameters(), rate) for n in self.trained]

    @property
    def trained(self):
        return self.generator, self.critic

    def run(self, batch, objective, seed=0):
        return iteration(
            self.generator, self.critic, self.teacher, *self.optimizers, batch, objective,
            torch.Generator().manual_seed(seed),
        )  # fmt: skip


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()]).clone()


IMAGE_BATCH = Batch(torch.randn(4, 1, 8, 8), torch.arange(4), torch.randn(3, 1, 8, 8),
                    torch.randn(3, 1, 8, 8), torch.arange(3))  # fmt: skip


def test_iteration_is_algorithm_1_done_by_hand():
    """Written out line by line, with the same random numbers."""
    objective = Objective(lambda_reg=0.5, grid=karras_grid(sigma_max=5.0), clip=1e9)
    fast, slow = Networks(image=True), Networks(image=True)
    record = fast.run(IMAGE_BATCH, objective)

    rng, batch = torch.Generator().manual_seed(0), IMAGE_BATCH
    x, x_ref = slow.generator(batch.z, batch.label), slow.generator(batch.z_ref, batch.label_ref)
    sigma = karras_grid(sigma_max=5.0).float()[torch.randint(20, 981, (4,), generator=rng)]
    noisy = x + sigma[:, None, None, None] * torch.randn(x.shape, generator=rng)
    real = slow.teacher(noisy, sigma, batch.label).detach()
    fake = slow.critic(noisy, sigma, batch.label).detach()
    error = per_sample(x.detach() - real)[:, None, None, None]
    pseudo = ((fake - real) / error * x).sum() / x.numel()  # another way to the same gradient
    (pseudo + 0.5 * functional.mse_loss(x_ref, batch.y_ref)).backward()
    slow.optimizers[0].step()
    sigma = karras_grid(sigma_max=5.0).float()[torch.randint(0, 1000, (4,), generator=rng)]
    noise, x = torch.randn(x.shape, generator=rng), x.detach()
    level = sigma[:, None, None, None]
    error = (slow.critic(x + level * noise, sigma, batch.label) - x) ** 2
    slow.optimizers[1].zero_grad()
    ((1 / level**2 + 4) * error).mean().backward()
    slow.optimizers[1].step()

    for one, other in zip(fast.trained, slow.trained, strict=True):
        assert torch.allclose(weights(one), weights(other), rtol=1e-4, atol=1e-6)
    assert torch.allclose(record.x, x, atol=1e-5)


def test_each_update_changes_its_own_network_only():
    objective = Objective(lambda_reg=0.0, critic_steps=0)
    networks = Networks(image=True)
    before = [weights(n) for n in (networks.generator, networks.critic, networks.teacher)]
    networks.run(IMAGE_BATCH, objective)
    after = [weights(n) for n in (networks.generator, networks.critic, networks.teacher)]
    changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert changed == [False, False, False]  # critic = teacher: no difference of scores, no pull
    networks.run(IMAGE_BATCH, Objective(lambda_reg=0.0))
    assert not torch.equal(weights(networks.critic), before[1])
    assert torch.equal(weights(networks.generator), before[0])
    networks.run(IMAGE_BATCH, Objective(lambda_reg=0.0, critic_steps=0))
    assert not torch.equal(weights(networks.generator), before[0])
    assert torch.equal(weights(networks.teacher), before[2])


def test_regression_alone_is_regression():
    networks = Networks(image=True)
    expected = functional.mse_loss(
        networks.generator(IMAGE_BATCH.z_ref, IMAGE_BATCH.label_ref), IMAGE_BATCH.y_ref
    )
    record = networks.run(IMAGE_BATCH, Objective(matching=False, lambda_reg=1.0))
    assert record.loss_anchor == pytest.approx(expected.item(), rel=1e-4)
    assert record.sigma is None


@pytest.mark.parametrize("critic_steps", [1, 3])
def test_critic_steps_are_counted_and_keep_the_labels(critic_steps, monkeypatch):
    seen = []

    def spy(critic, x, sigma, noise, label):
        seen.append((x.detach().clone(), label))
        return real_loss(critic, x, sigma, noise, label)

    real_loss = dmd.denoising_loss
    monkeypatch.setattr(dmd, "denoising_loss", spy)
    record = Networks(image=True).run(IMAGE_BATCH, Objective(critic_steps=critic_steps))
    assert len(seen) == critic_steps
    assert torch.equal(seen[0][0], record.x)  # first the samples just made
    assert all(label is IMAGE_BATCH.label for _, label in seen)
    if critic_steps > 1:
        assert not torch.equal(seen[1][0], seen[0][0])  # then fresh ones


def test_a_weighting_may_be_named():
    runs = [Networks(image=True), Networks(image=True)]
    for networks, weighting in zip(runs, ("eq8", Weighting.EQ8), strict=True):
        networks.run(IMAGE_BATCH, Objective(weighting=weighting))
    assert torch.equal(weights(runs[0].generator), weights(runs[1].generator))


@pytest.mark.parametrize(
    ("batch", "objective", "critic_optimizer", "message"),
    [
        (IMAGE_BATCH._replace(label=None), Objective(), True, "must both have labels, or neither"),
        (IMAGE_BATCH._replace(label_ref=None), Objective(), True, "both have labels, or neither"),
        (IMAGE_BATCH, Objective(critic_steps=2), False, "2 critic steps are asked for without"),
        (IMAGE_BATCH._replace(y_ref=None), Objective(), True, "the batch has no pairs"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_updated(
    batch, objective, critic_optimizer, message
):
    networks = Networks(image=True)
    before = [weights(n) for n in networks.trained]
    if not critic_optimizer:
        networks.optimizers[1] = None
    with pytest.raises(ValueError, match=message):
        networks.run(batch, objective)
    assert all(torch.equal(weights(n), b) for n, b in zip(networks.trained, before, strict=True))


def test_a_condition_may_be_anything_that_its_network_reads():
    """Embeddings (batch, words, width) go through an iteration that does not know them."""

    class Reads(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.out, self.seen = torch.nn.Linear(6, 2), []

        def forward(self, x, c_noise, label):
            self.seen.append(label)
            return self.out(torch.cat([x, label.flatten(1)], 1))

    networks = [EDMDenoiser(Reads()) for _ in range(3)]
    generator = OneStepGenerator(networks[0])
    optimizers = [torch.optim.SGD(n.parameters(), 1e-3) for n in networks[:2]]
    z, words, z_ref, words_ref = (torch.randn(s) for s in ((4, 2), (4, 2, 2), (3, 2), (3, 2, 2)))
    batch = Batch(z, words, z_ref, z_ref, words_ref)
    iteration(generator, networks[1], networks[2], *optimizers, batch, Objective(critic_steps=2))
    seen = [[one is words for one in n.network.seen] for n in networks]
    assert seen == [[True, False, True], [True, True, True], [True]]  # the False is words_ref


def test_gradients_are_clipped_and_the_norm_before_is_reported():
    networks = Networks(image=True, rate=1.0)
    before = weights(networks.generator)
    record = networks.run(IMAGE_BATCH, Objective(matching=False, lambda_reg=100.0, clip=0.01))
    assert record.norm_generator > 1
    moved = (weights(networks.generator) - before).norm().item()
    assert moved == pytest.approx(0.01, rel=1e-2)


@pytest.mark.slow
def test_the_same_functions_distil_a_mixture_with_its_exact_score():
    """From one blob around the origin to two modes, critic learned, no anchor, wide noise."""
    torch.manual_seed(1)
    generator = OneStepGenerator(EDMDenoiser(MLP(hidden=64), sigma_data=2.0), 10.0)
    critic = EDMDenoiser(MLP(hidden=64), sigma_data=2.0)
    optimizers = [torch.optim.Adam(n.parameters(), r)
                  for n, r in ((generator, 5e-4), (critic, 2e-3))]  # fmt: skip
    objective = Objective(lambda_reg=0.0, critic_steps=3, grid=karras_grid(sigma_max=10.0))
    rng = torch.Generator().manual_seed(0)
    for _ in range(600):
        batch = Batch(torch.randn(256, 2, generator=rng))
        iteration(generator, critic, two_modes(), *optimizers, batch, objective, rng)
    with torch.no_grad():
        x = generator(torch.randn(2000, 2, generator=rng))
    assert two_modes().log_prob(x).mean().item() > -4
    assert 0.25 < (x[:, 0] > 0).double().mean().item() < 0.75


def test_real_score_only_needs_no_critic():
    networks = Networks(exact=True)
    objective = Objective(lambda_reg=0.0, critic_steps=0, grid=karras_grid(sigma_max=1.0))
    record = iteration(
        networks.generator, dmd.zero_score, networks.teacher, networks.optimizers[0], None,
        Batch(torch.randn(8, 2)), objective,
    )  # fmt: skip
    assert record.norm_generator > 0
    assert record.loss_critic == 0


def test_the_heart_stays_small_and_knows_no_images_files_or_devices():
    source = inspect.getsource(dmd)
    assert len(source.splitlines()) < 250
    for word in ("cuda", "open(", "Path", "device", "height", "8, 8"):
        assert word not in source.split('"""', 2)[2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: Networks(image=True).run(Batch(torch.randn(2, 1, 8, 8)), Objective()),
            "lambda_reg is 0.25, but the batch has no pairs",
        ),
        (
            lambda: matching_gradient(*random_case()[:3], torch.zeros(5, 1, 8, 9)),
            r"denoised_fake has shape \(5, 1, 8, 9\), x has \(5, 1, 8, 8\)",
        ),
        (
            lambda: matching_gradient(*random_case()[:3], torch.full((5, 1, 8, 8), math.nan)),
            "denoised_fake is not finite: 320 of 320",
        ),
        (lambda: dmd.matching_loss(torch.zeros(2, 2), torch.zeros(2)), "gradient has shape"),
        (
            lambda: matching_gradient(*(torch.zeros(n) for n in ((4, 2), 4, (4, 2), (4, 2)))),
            "sigma is 0 somewhere",
        ),
        (
            lambda: matching_gradient(*random_case(), "eq9"),
            "'eq9' is not a valid Weighting",
        ),
        (
            lambda: matching_gradient(torch.zeros(4, 2), torch.ones(3), *torch.zeros(2, 4, 2)),
            r"sigma has shape \(3,\), x has batch 4",
        ),
    ],
)
def test_errors_name_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()

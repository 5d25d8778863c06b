"""Exercises of chapter 4."""

import math
from functools import partial

import torch
from torch import Tensor

from dmd_tutorial.notebook.exercises import Exercise, Network, gradients_by


def critic_loss(
    *given, detach="samples", target="x", weight=None, scale=torch.clone, mean=torch.mean
) -> Tensor:
    critic, generator, z, sigma, noise = given
    x = generator(z)
    x = x.detach() if detach == "samples" else x
    x_noisy = x + scale(sigma)[:, None] * noise
    denoised = critic(x_noisy, sigma)
    denoised = denoised.detach() + 0 * x.sum() if detach == "critic" else denoised
    aim = {"x": x, "x_noisy": x_noisy, "noise": noise}[target]
    aim = aim.detach() if detach == "target" else aim
    weights = weight(sigma) if weight else 1 / sigma**2 + 1 / 0.5**2
    return mean(weights[:, None] * (denoised - aim) ** 2)  # (4.4), first form


def gradient_bias(z: Tensor, learnt: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    e = learnt - exact
    return e.mT @ z / len(z), e.mean(dim=0)  # (4.6)


def enough_critic_steps(eta: float, kappa_1: float, times: float = 4) -> int:
    steps = 1
    while 1 - (1 - kappa_1) ** steps < times * eta:  # (4.9)
        steps += 1
    return steps


def slowest_factor(eta: float, kappa: float, rho: float, **size) -> float:
    return _radius([[1 - rho, -eta], [kappa, 1 - kappa]], **size)


def _radius(step: list[list[float]], size=lambda factors: factors.abs().max()) -> float:
    return size(torch.linalg.eigvals(torch.tensor(step, dtype=torch.float64))).item()


EXERCISES = [
    Exercise("4.1", "the swing, read off the figure", (22, 58, 0.764), {
        "that is the belief's curve; the generator's runs ahead": (58, 94, -0.707),
        "m goes on while the belief is above 0, and turns where that is 0": (22, 22, 0.764),
        "the belief is late: where m is 0, it still says where m was": (22, 58, 0.0),
    }, tolerance=(6, 10, 0.12)),  # panels of 200 iterations, and a flat turn
    Exercise("4.2", "the critic's loss", critic_loss, {
        "a gradient reaches the generator: it would learn to make samples that are easy to "
        "denoise; detach the samples": partial(critic_loss, detach=None),
        "the target is detached, but the generator still gets a gradient through the noisy "
        "sample: detach where the samples are made": partial(critic_loss, detach="target"),
        "the critic gets no gradient: detach the samples, not the critic's answer":
            partial(critic_loss, detach="critic"),
        "the target is the clean sample, not the noisy one": partial(critic_loss, target="x_noisy"),
        "the target is the clean sample, not the noise: the critic is a denoiser":
            partial(critic_loss, target="noise"),
        "the weight of the noise levels is missing": partial(critic_loss, weight=torch.ones_like),
        "the weight has 1 / sigma_data**2, too": partial(critic_loss, weight=lambda s: 1 / s**2),
        "the weight is 1 / sigma**2 + 1 / sigma_data**2, without roots":
            partial(critic_loss, weight=lambda s: 1 / s + 1 / 0.5),
        "this is the weight upside down: low noise levels must count more":
            partial(critic_loss, weight=lambda s: 1 / (1 / s**2 + 1 / 0.5**2)),
        "take the mean over samples and values, not the sum": partial(critic_loss, mean=torch.sum),
        "take the mean over the values of a sample, too, not their sum":
            partial(critic_loss, mean=lambda e: e.sum(dim=1).mean()),
        "there is no factor 1/2 in this loss": partial(critic_loss, mean=lambda e: e.mean() / 2),
        "scale the noise by sigma before adding it": partial(critic_loss, scale=torch.ones_like),
        "the critic is asked at the noisy samples, not at the clean ones":
            partial(critic_loss, scale=torch.zeros_like),
    }, inputs=lambda: [(Network(lambda scale, x, sigma: scale * x / (1 + sigma), 0.8),
                        Network(lambda shift, z: 0.5 * z + shift, [0.3, -0.2]),
                        torch.randn(n, 2), torch.rand(n) + low, torch.randn(n, 2))
                       for n, low in ((6, 0.3), (1, 2.0))], probe=gradients_by(
        {"gradient that reaches the generator": 1, "gradient that reaches the critic": 0}
    )),
    Exercise("4.3", "bias of the gradient", gradient_bias, {
        "the sign is the other way round: the bias is learnt minus exact":
            lambda z, learnt, exact: gradient_bias(z, exact, learnt),
        "bias_A is transposed: its entry i, j is the mean of e_i z_j":
            lambda *a: (gradient_bias(*a)[0].mT, gradient_bias(*a)[1]),
        "an expectation is a mean over samples, not a sum":
            lambda z, *a: tuple(len(z) * part for part in gradient_bias(z, *a)),
        "e and z belong together sample by sample: the mean of a product is not the product "
        "of the means": lambda z, u, v: (torch.outer((u - v).mean(0), z.mean(0)), (u - v).mean(0)),
        "this is the whole gradient of a critic; its bias takes the exact answer off":
            lambda z, learnt, exact: gradient_bias(z, learnt, torch.zeros_like(exact)),
    }, inputs=lambda: [(*torch.randn(3, 6, 2),), (*torch.randn(3, 1, 3),)]),
    Exercise("4.4", "fewest critic steps without a swing", enough_critic_steps, {
        "no faster than the generator: wanted is 4 eta": partial(enough_critic_steps, times=1),
        "k updates close 1 - (1 - kappa_1)**k of the gap, less than k * kappa_1":
            lambda eta, kappa_1: math.ceil(4 * eta / kappa_1),
        "one update can be enough: count from 1": lambda *a: max(2, enough_critic_steps(*a)),
        "the condition holds with equality, too: kappa >= 4 eta, so no further step is needed then":
            lambda eta, kappa_1: 1 + math.floor(math.log(1 - 4 * eta) / math.log(1 - kappa_1)),
        "one step too few: the condition must hold": lambda *a: enough_critic_steps(*a) - 1,
        "a whole number is asked for: round up":
            lambda eta, kappa_1: math.log(1 - 4 * eta) / math.log(1 - kappa_1),
        "(1 - kappa_1)**k is the gap that remains; what counts is what was closed":
            lambda eta, kappa_1: math.ceil(math.log(4 * eta) / math.log(1 - kappa_1)),
    }, inputs=lambda: [(0.05, 0.03), (0.1, 0.05), (0.2, 0.12), (0.02, 0.03), (0.24, 0.003),
                       (0.2, 0.9), (0.1875, 0.5)]),  # the last is equality, in all digits
    Exercise("4.5", "slowest factor of the swing with a spring", slowest_factor, {
        "the spring is missing: it takes rho * m off the generator's step":
            lambda eta, kappa, rho: slowest_factor(eta, kappa, 0.0),
        "the spring pulls m to 0: its sign":
            lambda eta, kappa, rho: slowest_factor(eta, kappa, -rho),
        "the spring acts on the generator, not on the critic's belief":
            lambda eta, kappa, rho: _radius([[1, -eta], [kappa, 1 - kappa - rho]]),
        "the generator follows the critic's belief, not its own place":
            lambda eta, kappa, rho: _radius([[1 - rho - eta, 0], [kappa, 1 - kappa]]),
        "the belief moves towards m: what remains of it is 1 - kappa":
            lambda eta, kappa, rho: _radius([[1 - rho, -eta], [kappa, 1]]),
        "the belief follows the samples made before the generator's step: m_i, not m_(i+1)":
            lambda eta, kappa, rho: _radius(
                [[1 - rho, -eta], [kappa * (1 - rho), 1 - kappa - kappa * eta]]
            ),
        "these are the factors less one: the new value is the old one plus the change":
            lambda eta, kappa, rho: _radius([[-rho, -eta], [kappa, -kappa]]),
        "this is the fastest part: the largest of the two sizes is asked for":
            partial(slowest_factor, size=lambda factors: factors.abs().min()),
        "the factor has a sign or an imaginary part: its size is asked for":
            partial(slowest_factor, size=lambda factors: factors.real.max()),
    }, inputs=lambda: [(0.05, 0.1, 0.02), (0.1, 0.05, 0.2), (0.2, 0.3, 0.05), (0.1, 0.9, 0.1)]),
    Exercise("4.6", "factors of a perfect critic's loss", (8.5, 0.4), {
        "the error of a perfect critic is 0, but the loss is error plus floor": (1, 1),
        "a variance is left, and variances go with the square of the spread": (4, 0.5),
        "the noisy sample tells something: S^2 sigma^2 / (S^2 + sigma^2) is left": (16, 0.25),
        "upside down: divide the loss after by the loss before": (2 / 17, 2.5),
    }, tolerance=0.03),
    Exercise("4.7", "where the swing grows", (1.0, 80 / 39), {
        "there the swing begins, but it still dies down: find where it grows": (0.00625, 0.2),
        "a belief that jumps too far comes back, up to twice the way": (1.0, 1.0),
        "almost: the generator moves meanwhile, and what it adds allows a little more": (1.0, 2.0),
        "2 is the limit of gradient descent; this generator is told late": (2.0, 80 / 39),
    }, tolerance=0.01),
]  # fmt: skip

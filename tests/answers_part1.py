"""Answers to the exercises of chapters 1 to 6 that a student gives, wrong ones and right ones."""

import cmath
import math
from functools import partial

import numpy as np
import torch
from answers import NO_GRADIENT, ONE_LEVEL_EACH, truth
from torch.nn import functional as F

from dmd_tutorial import dmd
from dmd_tutorial.denoisers import denoising_loss
from dmd_tutorial.noise import add_noise
from dmd_tutorial.notebook.exercises.chapter6 import slip


def levels(x, sigma):
    return torch.full((len(x),), sigma, dtype=x.dtype)


# Wrong answers


def score_1_1(x, denoised, sigma, axes=(1, 1, 1)):
    return (denoised - x) / sigma.reshape(-1, *axes) ** 2


def naive_mixture(x, means, std, weights):
    densities = weights * torch.exp(-((x[:, None] - means) ** 2) / (2 * std**2))
    share = densities / densities.sum(1, keepdim=True)
    return (share * (means - x[:, None])).sum(1) / std**2


def naive_denoiser(x_noisy, data, sigma):
    share = torch.exp(-(torch.cdist(x_noisy, data) ** 2) / (2 * sigma**2))
    return share @ data / share.sum(1, keepdim=True)


def loss_1_4(score, x, sigma, noise):
    error = sigma[:, None] * score(x + sigma[:, None] * noise, sigma) + noise
    return error.square().sum(1).mean() / 2


def heun(denoiser, x, sigma, sigma_next, stop=lambda s: s == 0, level=levels):
    first = (x - denoiser(x, level(x, sigma))) / sigma
    euler = x + (sigma_next - sigma) * first
    if stop(sigma_next):
        return euler
    second = (euler - denoiser(euler, level(euler, sigma_next))) / sigma_next
    return x + (sigma_next - sigma) / 2 * (first + second)


def eq_8(x, real, fake, error=lambda e: e.abs().mean((1, 2, 3), keepdim=True)):
    return (fake - real) / error(x - real)


def enough(eta, kappa_1, start=1, stop=lambda closed, wanted: closed >= wanted, last=10**6):
    for k in range(start, last):
        if stop(1 - (1 - kappa_1) ** k, 4 * eta):
            return k
    return last


def pull(x, m1, m2, std, sigma, w):
    v = std**2 + sigma**2
    p1, p2 = (
        share * torch.exp(-((x - m) ** 2).sum(1) / (2 * v)) for m, share in ((m1, 1 - w), (m2, w))
    )
    return (p2 / (p1 + p2))[:, None] * (m2 - m1) / v


def both(x, gradient, x_ref, y, lam):
    return ((x - (x - gradient).detach()) ** 2).mean() / 2 + lam * ((x_ref - y) ** 2).mean()


def one_step(denoiser, z, sigma_max, level=levels):
    return denoiser(sigma_max * z, level(z, sigma_max))


def iteration(
    G, critic, teacher, of_G, of_critic, batch, sigma, noise, lam, levels=torch.clone, half=1,
    mean=torch.mean, returned=lambda G, x, z: x, keep=False, pairs=torch.clone,
):  # fmt: skip
    x, level = G(batch.z), levels(batch.sigma)
    with torch.no_grad():
        x_noisy = add_noise(x, level, batch.noise)
        real, fake = teacher(x_noisy, level), critic(x_noisy, level)
        g = (fake - real) / (x - real).abs().mean(1, keepdim=True)
    of_G.zero_grad()
    loss = half * mean(x * g) + lam * F.mse_loss(pairs(G(batch.z_ref)), batch.y_ref)
    loss.backward()
    of_G.step()
    of_critic.zero_grad()
    denoising_loss(critic, x if keep else x.data, sigma, noise).backward()
    of_critic.step()
    return returned(G, x, batch.z)


def losses_6_3(G, critic, teacher, batch, sigma, noise, lam):
    x = G(batch.z)
    with torch.no_grad():
        x_noisy = add_noise(x, batch.sigma, batch.noise)
        scores = teacher(x_noisy, batch.sigma), critic(x_noisy, batch.sigma)
    pull = dmd.matching_loss(x, dmd.matching_gradient(x, batch.sigma, *scores))
    anchor = (batch.y_ref - G(batch.z_ref)).square().mean()
    return x, pull + lam * anchor, dmd.critic_loss(critic, x, sigma, noise)


def in_one_backward_pass(G, critic, teacher, of_G, of_critic, *rest):
    x, of_the_generator, of_the_critic = losses_6_3(G, critic, teacher, *rest)
    (of_the_generator + of_the_critic).backward()
    for optimizer in (of_critic, of_G):
        optimizer.step()
        optimizer.zero_grad()
    return x


def critic_stepped_first(G, critic, teacher, of_G, of_critic, *rest):
    x, of_the_generator, of_the_critic = losses_6_3(G, critic, teacher, *rest)
    for optimizer, loss in ((of_critic, of_the_critic), (of_G, of_the_generator)):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return x.detach().numpy()


def bare(x, sigma):
    return sigma


WRONG = [
    # (exercise, what is wrong, answer, a part of the sentence)
    ("1.1", "hard-wired batch", lambda x, D, s: (D - x) / s.reshape(3, 1, 1, 1) ** 2, "reshape(3"),
    ("1.1", "a level for all", lambda x, D, s: (D - x) / s.mean() ** 2, "differ"),
    ("1.1", "for points", partial(score_1_1, axes=(1,)), "differ"),
    ("1.1", "clamped", lambda x, D, s: score_1_1(x, D, s.clamp_min(0.01)), "differ"),
    ("1.1", "kept from 0", lambda x, D, s: score_1_1(x, D, (s**2 + 1e-6).sqrt()), "differ"),
    ("1.2", "naive", naive_mixture, "0/0 is not a number"),
    ("1.2", "three components", lambda x, m, s, w: truth("1.2")(x, m, s, w) * len(m) / 3,
        "input 2"),
    ("1.2", "squeezed", lambda *a: truth("1.2")(*a).squeeze(), "input 2"),
    ("1.2", "nearest", lambda x, m, s, w: (m - x[:, None])[
        torch.arange(len(x)), (m - x[:, None]).abs().argmin(1)] / s**2, "differ"),
    ("1.3", "naive", naive_denoiser, "infinite or not a number"),
    ("1.3", "over the batch", lambda x, d, s:
        (-(torch.cdist(x, d) ** 2) / (2 * s**2)).softmax(0) @ d, "differ"),
    ("1.3", "two axes", lambda x, d, s: truth("1.3")(x[:, :2], d[:, :2], s), "the shape is (1, 2)"),
    ("1.4", "no mean", lambda *a: loss_1_4(*a) * len(a[1]), "loss: yours is"),
    ("1.4", "mean level", lambda f, x, s, n: truth("1.4")(f, x, s.mean().expand_as(s), n), "loss"),
    ("1.4", "one level", lambda f, x, s, n: truth("1.4")(f, x, s[0], n), ""),
    ("1.4", "column of levels", lambda f, x, s, n: truth("1.4")(
        lambda y, _: f(y, s[:, None]), x, s, n), ONE_LEVEL_EACH),
    ("1.4", "value held", lambda f, x, s, n: truth("1.4")(lambda *a: f(*a).detach(), x, s, n),
        NO_GRADIENT),
    ("1.4", "half of the gradient", lambda *a: (loss_1_4(*a) + loss_1_4(*a).detach()) / 2,
        "gradient that reaches the network"),
    ("1.5", "one number", 0.5, "is asked for"),
    ("1.5", "per cent", [50, 90], "result 1: yours is 50"),
    ("1.6", "the next point", [1.2, 9], "result 1"),
    ("1.6", "nothing changes", [1, 1], "in units of the variance"),
    ("1.6", "twice the standard deviation", [1.5, 13.5], "four times too large"),
    ("1.7", "in standard deviations", (14.42, 38.6), "not how many standard deviations"),
    ("1.7", "rounded", (1.5, 4), "result 1"),
    ("2.1", "order", lambda s, d: (truth("2.1")(s, d)[0], *truth("2.1")(s, d)[:0:-1]),
        "the order is c_skip, c_out, c_in"),
    ("2.1", "no limit at 0", lambda s, d: (
        truth("2.1")(s, d)[0], (s**-2 + d**-2).rsqrt(), s.log().exp() / (s * (s**2 + d**2).sqrt())
    ), "infinite or not a number"),
    ("2.3", "float level", partial(heun, level=bare), ONE_LEVEL_EACH),
    ("2.3", "level, no axis", partial(heun, level=lambda x, s: torch.tensor(s)), ONE_LEVEL_EACH),
    ("2.3", "column of levels", partial(heun, level=lambda x, s: levels(x, s)[:, None]),
        ONE_LEVEL_EACH),
    ("2.3", "hard-wired batch", partial(heun, level=lambda x, s: torch.full((5,), s)),
        ONE_LEVEL_EACH),
    ("2.3", "guard 0.5", partial(heun, stop=lambda s: s < 0.5), "numbers differ"),
    ("2.3", "guard 0.01", partial(heun, stop=lambda s: s < 0.01), "numbers differ"),
    ("2.3", "guard 0.002", partial(heun, stop=lambda s: s <= 0.002), "numbers differ"),
    ("2.3", "kept from 0", lambda D, x, s, t: heun(D, x, s, max(t, 1e-3)), "numbers differ"),
    ("2.3", "in place", lambda D, x, s, t: x.copy_(heun(D, x.clone(), s, t)), "argument 2"),
    ("2.4", "kept from 0", lambda x, s, t, *a: truth("2.4")(x, s, max(t, 0.1), *a), "differ"),
    ("2.4", "division by 0", lambda x, s, t, m, d:
        m + (x - m) * t / s * ((1 + (d / t) ** 2) / (1 + (d / s) ** 2)).sqrt(), "not a number"),
    ("2.4", "Euler's many steps", lambda x, s, t, m, d: m + (x - m) * math.prod(
        1 + (t - s) / 99 * u / (d**2 + u**2) for u in np.linspace(s, t, 100)[:-1]), "numbers"),
    ("2.4", "mean scaled, not x", lambda x, s, t, m, d: x + (truth("2.4")(m, s, t, 0 * m, d)),
        "differ"),
    ("2.2", "all wrong", ("error",) * 6, "eight factors meet eight pixels"),
    ("2.2", "first of two slips", ("column", "row", "right", "row", "row", "row"), "result 4"),
    ("2.2", "no error", ["columns", "rows", "right", "columns", "rows", "right"], "do not fit"),
    ("2.5", "steps", (13, 8, 64), "this counts its steps"),
    ("2.5", "both of order 1", (27, 8, 8), "Heun's order is not Euler's"),
    ("2.6", "order forgotten", (0.8, -1), "paths keep their order"),
    ("2.6", "one number", 0.8, "is asked for"),
    ("3.1", "two components", lambda m, s, w: ((w * m).sum(), (
        (w * s**2).sum() + w[0] * w[1] * (m[0] - m[1]) ** 2).sqrt()), "result 2"),
    ("3.1", "swapped", lambda *a: truth("3.1")(*a)[::-1], "result 1"),
    ("3.2", "complex", -1 + 2j, "a number is asked for"),
    ("3.2", "complex tensor", torch.tensor(-1 + 0j), "a number is asked for"),
    ("3.2", "text", "-1", "a number is asked for"),
    ("3.2", "nan", math.nan, "not a number"),
    ("3.2", "several", [-1.0, -1.0], "a number is asked for"),
    ("3.2", "near", -1.01, "which is not right"),
    ("3.3", "hard-wired batch", lambda z, *a: tuple(
        d * len(z) / 50 for d in truth("3.3")(z, *a)), "input 2 of 2"),
    ("3.3", "closed form", lambda z, m, s, mr, sr: (
        torch.tensor((m - mr) / sr**2), torch.tensor(s / sr**2 - 1 / s)), "exact derivative"),
    ("3.3", "second sign", lambda *a: (truth("3.3")(*a)[0], -truth("3.3")(*a)[1]), "result 2"),
    ("3.3", "one result", lambda *a: truth("3.3")(*a)[0], "is asked for, not"),
    ("3.4", "clamped", partial(eq_8, error=lambda e: e.abs().mean((1, 2, 3), keepdim=True)
        .clamp_min(0.01)), "too low"),
    ("3.4", "kept from 0", partial(eq_8, error=lambda e: 1e-5 + e.abs()
        .mean((1, 2, 3), keepdim=True)), "too low"),
    ("3.4", "each channel", partial(eq_8, error=lambda e: e.abs().mean((2, 3), keepdim=True)),
        "differ"),
    ("3.4", "hard-wired size", partial(eq_8, error=lambda e: e.abs().sum((1, 2, 3), keepdim=True)
        / 32), "input 2 of 2"),
    ("3.5", "hard-wired size", lambda x, g: (x - (x - g).detach()).square().sum() / 36, "loss"),
    ("3.5", "x held, too", lambda x, g: (x.detach() - (x - g).detach()).square().mean() / 2
        + 0 * x.sum(), "the target, and it alone, is detached"),
    ("3.5", "of each image", lambda x, g: (x - (x - g).detach()).square().flatten(1).mean(1) / 2,
        "a tensor of shape () is asked for"),
    ("3.8", "no logarithm", (2, 2, 2), "the mean of the logarithm"),
    ("3.6", "never collapses", (0.5, 0.5, -1), "nothing rewards variety"),
    ("3.6", "runs away", (0.5, 0.0, 5.0), "result 3: yours is 5"),
    ("3.7", "all right", (1, 1, 1, 1), "without a stop-gradient nothing arrives"),
    ("3.7", "batch", (0, -1, 2, 2), "result 4: yours is 2"),
    ("3.8", "two slips", (2, 2, 4), "the mean of the logarithm"),
    ("4.2", "no critic", lambda c, *a: truth("4.2")(lambda x, s: c(x, s).detach(), *a),
        NO_GRADIENT),
    ("4.2", "float level", lambda c, g, z, s, n: truth("4.2")(
        lambda x, _: c(x, s.mean().item()), g, z, s, n), ONE_LEVEL_EACH),
    ("4.2", "hard-wired batch", lambda c, g, z, s, n: truth("4.2")(c, g, z, s, n) * len(z) / 6,
        "input 2 of 2"),
    ("4.2", "weight not beside its sample", lambda c, g, z, s, n: (
        (1 / s**2 + 4).mean() * (c(g(z).detach() + s[:, None] * n, s) - g(z).detach()) ** 2).mean(),
        "loss"),
    ("4.3", "hard-wired batch", lambda z, u, v: ((u - v).T @ z / 6, (u - v).sum(0) / 6),
        "input 2 of 2: result 1"),
    ("4.3", "one number", lambda z, u, v: (truth("4.3")(z, u, v)[0], (u - v).mean()), "result 2"),
    ("4.4", "not at equality", partial(enough, stop=lambda c, w: c > w), "with equality, too"),
    ("4.4", "floor + 1", lambda eta, k: int(math.log(1 - 4 * eta) / math.log(1 - k)) + 1,
        "with equality, too"),
    ("4.4", "from 2", partial(enough, start=2), "count from 1"),
    ("4.4", "rounded", lambda eta, k: round(math.log(1 - 4 * eta) / math.log(1 - k)), "not right"),
    ("4.4", "gives up", partial(enough, last=200), "not right"),
    ("4.4", "first order", lambda eta, k: math.ceil(-math.log(1 - 4 * eta) / k), "not right"),
    ("4.5", "complex", lambda e, k, r: torch.linalg.eigvals(
        torch.tensor([[1 - r, -e], [k, 1 - k]])).abs().max() + 0j, "a number is asked for"),
    ("4.5", "real roots", lambda e, k, r: (2 - r - k + math.sqrt(
        abs((r - k) ** 2 - 4 * e * k))) / 2, "not right"),
    ("4.5", "both", lambda e, k, r: torch.linalg.eigvals(
        torch.tensor([[1 - r, -e], [k, 1 - k]])).abs(), "a number is asked for"),
    ("4.1", "belief at 0", (22, 58, 0), "it still says where m was"),
    ("4.6", "same", (1, 1), "the loss is error plus floor"),
    ("4.7", "gradient descent", (1, 2), "the generator moves meanwhile"),
    ("4.7", "where it swings", (0.05 / 8, 0.2), "there the swing begins"),
    ("5.1", "complex", lambda d, s: cmath.sqrt(d**2 / 4 - s**2), "a number is asked for"),
    ("5.1", "size", lambda d, s: math.sqrt(abs(d**2 / 4 - s**2)), "not right"),
    ("5.1", "root of 0 refused", lambda d, s: 0.0 if d <= 3 * s else math.sqrt(d**2 / 4 - s**2),
        "not right"),
    ("5.2", "naive", pull, "infinite or not a number"),
    ("5.2", "hard-wired axes", lambda x, m1, m2, *a: truth("5.2")(x[:, :2], m1[:2], m2[:2], *a),
        "the shape is (1, 2), it should be (1, 3)"),
    ("5.2", "mode half", lambda x, m1, m2, s, t, w: ((m2 - m1) / (s**2 + t**2) / 2).expand_as(x),
        "differ"),
    ("5.3", "no matching", lambda x, g, r, y, lam: lam * F.mse_loss(r, y), "term is missing"),
    ("5.3", "x held, too", lambda x, g, *a: truth("5.3")(x.detach(), g, *a) + 0 * x.sum(),
        "the target, and it alone, is detached"),
    ("5.3", "anchor held", lambda x, g, r, y, lam: truth("5.3")(x, g, r.detach(), y, lam),
        "gradient at x_ref: yours is 0 everywhere"),
    ("5.3", "hard-wired size", lambda x, g, r, y, lam: g.square().sum() / 24
        + (x * g).sum() / 12 - (x * g).detach().sum() / 12 + lam * F.mse_loss(r, y), "input 2"),
    ("5.5", "hard-wired", lambda y: ((y - y.mean(1, keepdim=True)) ** 2).sum() / 24, "input 2"),
    ("5.5", "in place", lambda y: y.sub_(y.mean(1, keepdim=True)).square().mean(), "argument 1"),
    ("5.3", "derivatives only", lambda x, g, r, y, lam: (x * g).mean() + lam * F.mse_loss(r, y),
        "not the squared form"),
    ("5.4", "with their sign", (-3.85, -0.49, -1.87), "leave out the minus"),
    ("5.6", "the most frequent", (2, 4, 2), "prefers the mean"),
    ("5.7", "its share", (0.5, 0.5, 0.5), "third neighbour is in the far mode"),
    ("5.7", "more and more", (0.5, 1, 1), "their reach is 0"),
    ("6.1", "float level", partial(one_step, level=bare), ONE_LEVEL_EACH),
    ("6.1", "hard-wired batch", partial(one_step, level=lambda z, s: torch.full((6,), s)),
        ONE_LEVEL_EACH),
    ("6.1", "level as z", partial(one_step, level=lambda z, s: torch.full_like(z, s)),
        ONE_LEVEL_EACH),
    ("6.1", "80", lambda D, z, top: one_step(D, z, 80.0), "differ"),
    ("6.3", "one step for all", partial(iteration, levels=lambda s: s.mean().expand_as(s)),
        "images of iteration"),
    ("6.3", "float level", partial(iteration, levels=lambda s: s[0].item()), "sigma"),
    ("6.3", "no half", partial(iteration, half=2), "images of iteration 2"),
    ("6.3", "sum", partial(iteration, mean=torch.sum), "images of iteration"),
    ("6.3", "sign", partial(iteration, half=-1), "the sign is wrong"),
    ("6.3", "images after the update", partial(iteration, returned=lambda G, x, z: G(z)),
        "return the images that were judged"),
    ("6.3", "graph kept", partial(iteration, keep=True), "detach x"),
    ("6.3", "new noise", lambda *a: iteration(*a[:7], torch.randn_like(a[7]), a[8]),
        "images of iteration"),
    ("6.3", "anchor held", partial(iteration, pairs=torch.detach), "the anchor is missing"),
    ("6.3", "DMD's own, drawn anew", lambda *a: dmd.iteration(
        *a[:6], dmd.Objective(lambda_reg=a[8])).x, "images of iteration"),
    ("6.4", "one step", lambda k: 11, "input 2 of 3"),
    ("6.4", "pairs left out of the cost", lambda k: 4 * k + 4, "the anchor is missing"),
    ("6.5", "copy at rest", [1, 1, 0], "the critic still is the teacher"),
    ("6.5", "never, and one later", [2, 3, None], "result 2"),
    ("6.5", "never", [2, 2, None], "write 0, not None"),
    ("6.5", "never comes", (2, 2, float("inf")), "write 0, not infinity"),
    ("6.5", "at once", [1, 1, 1], "the critic still is the teacher"),
    ("6.5", "the generator must move", [2, 0, 2], "not the generator"),
    ("6.5", "two numbers", [2, 2], "is asked for"),
    ("6.5", "words", "second, second, never", "is asked for"),
    ("6.2", "no fading", (0.867, 1, 100), "the old ones fade"),
    ("6.2", "rising decay", (1, 1, 43.37), "the decay is 0.98 in every step"),
    ("6.6", "from the first point", (3.45, 2.15), "begin at the fork"),
]  # fmt: skip


# Right answers


def autograd_score(x, means, std, weights):
    x = x.clone().requires_grad_()
    log_density = (weights.log() - (x[:, None] - means) ** 2 / (2 * std**2)).logsumexp(1)
    return torch.autograd.grad(log_density.sum(), x)[0]


def in_place_1_4(score, x, sigma, noise):
    target = -noise / sigma[:, None]
    error = score(torch.addcmul(x, sigma[:, None], noise), sigma) - target
    return 0.5 * torch.einsum("b,bd,bd->b", sigma**2, error, error).mean()


def in_place_heun(denoiser, x, sigma, sigma_next):
    x = x.clone()
    d1 = (x - denoiser(x, sigma * torch.ones(len(x)))) / sigma
    x_next = x + (sigma_next - sigma) * d1
    if sigma_next > 0:
        d2 = (x_next - denoiser(x_next, sigma_next * torch.ones(len(x)))) / sigma_next
        x += (sigma_next - sigma) * (d1 + d2) / 2
        return x
    return x_next


def critic_loss(critic, generator, z, sigma, noise):
    with torch.no_grad():
        x = generator(z)
        x_noisy = x + torch.einsum("b,bd->bd", sigma, noise)
    weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
    return torch.mean(weight.unsqueeze(1) * F.mse_loss(critic(x_noisy, sigma), x, reduction="none"))


def spectral(eta, kappa, rho):
    middle, root = 2 - rho - kappa, cmath.sqrt((kappa - rho) ** 2 - 4 * eta * kappa)
    return max(abs(middle + root), abs(middle - root)) / 2


def autograd_pull(x, m1, m2, std, sigma, w):
    v = std**2 + sigma**2
    x = x.clone().requires_grad_()
    logs = torch.stack([
        math.log(share) - ((x - m) ** 2).sum(1) / (2 * v) for m, share in ((m1, 1 - w), (m2, w))
    ])  # fmt: skip
    (real,) = torch.autograd.grad(logs.logsumexp(0).sum(), x)
    return real - (m1 - x.detach()) / v


def softmax_pull(x, m1, m2, std, sigma, w):
    v = std**2 + sigma**2
    means = torch.stack([m1, m2])
    weights = torch.tensor([1 - w, w], dtype=x.dtype)
    share = (weights.log() - torch.cdist(x, means) ** 2 / (2 * v)).softmax(1)
    return share @ means / v - m1 / v


RIGHT = [
    ("1.1", lambda x, D, s: (D - x) / s.view(-1, 1, 1, 1).square()),
    ("1.1", lambda x, D, s: torch.einsum("bchw,b->bchw", D - x, s**-2)),
    ("1.1", lambda x, D, s: ((D.numpy() - x.numpy()).T / s.numpy() ** 2).T),
    ("1.2", autograd_score),
    ("1.2", lambda x, m, s, w: (torch.softmax(torch.log(w) - 0.5 * ((x[:, None] - m) / s) ** 2, 1)
                                @ m - x) / s**2),
    ("1.2", lambda x, *a: truth("1.2")(x.double(), *a)),
    ("1.3", lambda x, d, s: torch.einsum(
        "bn,nd->bd", (-torch.cdist(x, d).square() / 2 / s**2).softmax(-1), d)),
    ("1.3", lambda x, d, s: torch.stack([(-((p - d) ** 2).sum(1) / (2 * s**2)).softmax(0) @ d
                                         for p in x])),
    ("1.3", lambda x, d, s: truth("1.3")(x.float(), d.float(), s)),
    ("1.4", loss_1_4),
    ("1.4", in_place_1_4),
    ("1.4", lambda *a: truth("1.4")(a[0], *(each.double() for each in a[1:]))),
    ("1.5", [0.45, 0.95]), ("1.5", torch.tensor([0.55, 0.82])),
    ("1.6", [0.9, 8]), ("1.6", np.array([1.1, 10])),
    ("1.7", (1.44, 3.86)), ("1.7", [0.1 * math.sqrt(2 * e) for e in (103.97, 745.13)]),
    ("2.1", lambda s, d: (1 / (1 + (s / d) ** 2), s / (1 + (s / d) ** 2).sqrt(), torch.hypot(
        s, torch.tensor(d)) ** -1)),
    ("2.1", lambda s, d: [d**2 / (s**2 + d**2), s * d * (s**2 + d**2) ** -0.5,
                          (s**2 + d**2).rsqrt()]),
    ("2.3", heun),
    ("2.3", in_place_heun),
    ("2.3", torch.no_grad()(heun)),
    ("2.4", lambda x, s, t, m, d: m + (x - m) * (d * d + t * t) ** 0.5 / (d * d + s * s) ** 0.5),
    ("2.4", lambda x, s, t, m, d: torch.lerp(m, x, (d / s).hypot(
        torch.tensor(t / s)) / (d / s).hypot(torch.ones(())))),
    ("2.2", ["columns", "rows", "right", "error", "error", "right"]),
    ("2.2", ("Column", "Row", "Right", "Error", "errors", " right")),
    ("2.5", (20, 6, 100)), ("2.5", torch.tensor([34, 11.0, 45])), ("2.5", [27, 8, 64]),
    ("2.6", [0.8, 1]), ("2.6", np.array([0.795, 0.967])),
    ("3.1", lambda m, s, w: (w @ m, (w @ (s**2 + m**2) - (w @ m) ** 2) ** 0.5)),
    ("3.1", lambda m, s, w: (float(w @ m), math.sqrt(w @ (s**2 + (m - w @ m) ** 2)))),
    ("3.2", -1), ("3.2", np.float32(-1)), ("3.2", torch.tensor(-1.0)), ("3.2", -2 / 2.0),
    ("3.3", lambda z, m, s, mr, sr: (((m + s * z - mr) / sr**2 - z / s).mean(),
                                     torch.dot((m + s * z - mr) / sr**2 - z / s, z) / len(z))),
    ("3.3", lambda z, m, s, mr, sr: [d.item() for d in truth("3.3")(z.double(), m, s, mr, sr)]),
    ("3.4", eq_8),
    ("3.4", partial(eq_8, error=lambda e: F.l1_loss(e, 0 * e, reduction="none").flatten(1).mean(1)
                    [:, None, None, None])),
    ("3.4", lambda x, r, f: ((f - r).flatten(1) / (x - r).flatten(1).abs().mean(1, True))
        .reshape(x.shape)),
    ("3.5", lambda x, g: 0.5 * F.mse_loss(x, (x - g).detach())),
    ("3.5", lambda x, g: ((x - x.detach() + g) ** 2).sum() / (2 * x.numel())),
    ("3.5", lambda x, g: torch.linalg.vector_norm(x - (x - g).data) ** 2 / x.numel() / 2),
    ("3.8", (2, 0.7, 2)), ("3.8", [2.0, math.log(2), math.sqrt(4 + 0.4**2)]),
    ("3.6", (0.5, 0, -1)), ("3.6", torch.tensor([0.505, 1e-9, -1.0])), ("3.6", [0.5, 0.05, -1]),
    ("3.7", [0, -1, 2, 6]), ("3.7", torch.tensor([0.0, -1.0, 2.0, 6.0])),
    ("4.2", critic_loss),
    ("4.2", lambda c, g, z, s, n: (
        (1 / s[:, None] ** 2 + 4) * (c(g(z).data + s[:, None] * n, s) - g(z).data) ** 2).mean()),
    ("4.3", lambda z, u, v: (torch.einsum("bi,bj->ij", u - v, z) / len(z), (u - v).mean(0))),
    ("4.3", lambda z, u, v: [((u - v)[:, :, None] * z[:, None]).mean(0), u.mean(0) - v.mean(0)]),
    ("4.4", enough),
    ("4.4", lambda eta, k: math.ceil(math.log(1 - 4 * eta) / math.log(1 - k))),
    ("4.4", lambda eta, k: math.ceil(math.log1p(-4 * eta) / math.log1p(-k))),
    ("4.4", lambda eta, k: int(np.ceil(np.log2(1 - 4 * eta) / np.log2(1 - k)))),
    ("4.4", lambda eta, k: torch.ceil(torch.tensor(1 - 4 * eta).log() / torch.tensor(1 - k).log())),
    ("4.5", spectral),
    ("4.5", lambda e, k, r: np.abs(np.linalg.eigvals([[1 - r, -e], [k, 1 - k]])).max()),
    ("4.5", lambda e, k, r: torch.linalg.eigvals(
        torch.tensor([[1 - r, -e], [k, 1 - k]])).abs().max()),
    ("4.1", (17, 50, 0.65)), ("4.1", (27, 67, 0.88)), ("4.1", torch.tensor([22.0, 58.0, 0.75])),
    ("4.6", (8.5, 0.4)), ("4.6", [(0.16 / 0.32) / (0.01 / 0.17), (0.04 / 0.2) / (0.16 / 0.32)]),
    ("4.7", (1, 2.05)), ("4.7", [1.0, 4 / (2 - 0.05)]),
    ("5.1", lambda d, s: max(0.0, (d / 2 - s) * (d / 2 + s)) ** 0.5),
    ("5.1", lambda d, s: 0 if d <= 2 * s else math.sqrt((d / 2) ** 2 - s**2)),
    ("5.1", lambda d, s: torch.tensor(d**2 / 4 - s**2).clamp_min(0).sqrt()),
    ("5.2", softmax_pull),
    ("5.2", autograd_pull),
    ("5.2", lambda x, m1, m2, s, t, w: torch.outer(torch.sigmoid(
        (2 * x - m1 - m2) @ (m2 - m1) / 2 / (s * s + t * t) - math.log(1 / w - 1)),
        m2 - m1) / (s * s + t * t)),
    ("5.3", both),
    ("5.3", lambda x, g, r, y, lam: F.mse_loss(x, (x - g).detach()) / 2 + lam * F.mse_loss(r, y)),
    ("5.5", lambda y: y.var(1, correction=0).mean()),
    ("5.5", lambda y: float(np.mean(y.numpy().var(1)))),
    ("5.5", lambda y: (y**2).mean() - (y.mean(1) ** 2).mean()),
    ("5.4", (3.6, 0.35, 2.1)), ("5.4", [4, 0.65, 1.7]),
    ("5.4", [4 * s * s / (s * s + 0.16) / (1 + math.exp(p / (
        s * s + 0.16))) for s, p in ((2, -28), (2, 8), (8, 8))]),
    ("5.6", (1, 3, 2)), ("5.6", [0.75 * 2 - 0.25 * 2, 4 - 1, np.median([2, 2, 2, -2])]),
    ("5.7", [0.5, 1, 0.5]), ("5.7", torch.tensor([0.49, 0.99, 0.49])),
    ("6.1", one_step),
    ("6.1", partial(one_step, level=lambda z, s: s * torch.ones(len(z)))),
    ("6.1", partial(one_step, level=lambda z, s: z.new_full(z.shape[:1], s))),
    ("6.3", iteration),
    ("6.3", in_one_backward_pass),
    ("6.3", critic_stepped_first),
    ("6.3", slip),
    ("6.4", lambda k: 7 + 4 * k),
    ("6.4", lambda k: 3 + 3 + 2 + 3 + 4 * (k - 1)),
    ("6.5", [2, 2, 0]), ("6.5", (2.0, 2, 0)), ("6.5", torch.tensor([2, 2, 0])),
    ("6.2", (0.867, 1, 43.4)), ("6.2", np.array([1 - 0.98**100, 1, (1 - 0.98**100) / 0.02])),
    ("6.6", (1.6, 1)), ("6.6", [1.45, 1.1]), ("6.6", [0.0598 / 0.0364, 0.0598 / 0.0585]),
]  # fmt: skip

"""Answers to the exercises of chapters 7 to 11 that a student gives, wrong ones and right ones."""

import copy
import math
from functools import partial

import numpy as np
import torch
from answers import NO_GRADIENT, ONE_LEVEL_EACH, truth
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from dmd_tutorial.noise import karras_grid

# Wrong answers


def posterior(x, s, t, d, std=lambda s, t, d: math.sqrt((s**2 - t**2) * (d**2 + t**2))):
    return (d**2 + t**2) * x / (d**2 + s**2), std(s, t, d) / math.hypot(d, s)


def ddim(x, D, s, t, eta, fresh, low=0.0):
    new = eta * t * math.sqrt(s**2 - t**2) / s
    return D + max(low, t**2 - new**2) ** 0.5 * (x - D) / s + new * fresh


def line(x, new, old, s, least=0.0):
    h, h1 = math.log(s[1]) - math.log(s[2]), max(least, math.log(s[0]) - math.log(s[1]))
    return new + math.exp(-h) * (x - new) + (h - 1 + math.exp(-h)) * (new - old) / h1


def by_quadrature(x, new, old, s, parts=2000):
    h, h1 = math.log(s[1] / s[2]), math.log(s[0] / s[1])
    u = (torch.arange(parts) + 0.5).double() * h / parts
    weight, rise = (u - h).exp() * h / parts, u / h1
    return s[2] / s[1] * x + weight.sum() * new + (weight * rise).sum() * (new - old)


def price(mean, std, log=torch.log):
    return ((mean.square() + std.square() - 1) / 2 - log(std)).sum(dim=-1)


def velocity(N, x_t, t, level=lambda t: t / (1 - t), over=lambda t: 1 - t[:, None]):
    return (N(x_t / (1 - t)[:, None], level(t)) - x_t) / over(t)


def flow_loss(v, x, z, t, told=lambda t: t, axes=(1,)):
    u = t.reshape(-1, *axes)
    return F.mse_loss(v(torch.lerp(z, x, u), told(t)), x - z)


def with_boundary(s, d, low, above=lambda s, low: s - low):
    return d**2 / (above(s, low) ** 2 + d**2), above(s, low) * d / torch.hypot(s, torch.tensor(d))


def grid(low, high, std, count):
    first, last = math.atan2(low, std), math.atan2(high, std)
    step = (last - first) / (count - 1)
    return [std * math.tan(first + i * step) for i in range(count)]


def consistency(f, x, s, y, t, told=lambda s: s, reduce=torch.mean):
    with torch.no_grad():
        aim = f(y, told(t))
    return reduce((f(x, told(s)) - aim) ** 2)


def loss_on_v(D, target, s):
    error = (D - target) * torch.hypot(1 / s, torch.ones_like(s))[:, None]
    return F.mse_loss(error, torch.zeros_like(error))


def teacher_term(D, x, s, noise, told=lambda s: s):
    with torch.no_grad():
        aim = D(torch.addcmul(x, s[:, None], noise), told(s))
    return torch.einsum("b,bd->", (1 + s**2) ** -0.5, (x - aim) ** 2) / x.numel()


def hinge(real, fake, relu=torch.relu, real_margin=1):
    return relu(real_margin - real).mean() + relu(1 + fake).mean(), fake.neg().mean()


def head(lr, lf, sr, sf, share=lambda lr, lf: (lr - torch.logaddexp(lr, lf)).exp()):
    return share(lr, lf)[:, None] * (sf - sr)


def sid(x, real, fake, alpha, hold=lambda x: x, held=lambda x: x):
    d = held(real) - held(fake)
    return (hold(d) * (real - x)).mean() - alpha * (d**2).mean()


def second_input(D, z, levels, noise, level=lambda z, s: torch.full((len(z),), s)):
    return D(levels[0] * z, level(z, levels[0])).detach() + levels[1] * noise


def bare(_, sigma):
    return sigma


NOT_FINITE = "infinite or not a number"

WRONG = [
    # (exercise, what is wrong, answer, a part of the sentence)
    ("7.2", "a factor written in", partial(posterior,
        std=lambda s, t, d: (s**2 - t**2) ** 0.5), "result 2"),
    ("7.2", "mean of the clean sample", lambda x, s, t, d:
        (x * d**2 / (d**2 + s**2), truth("7.2")(x, s, t, d)[1]), "result 1"),
    ("7.3", "kept from 0", partial(ddim, low=1e-4), "differ"),
    ("7.3", "division by 0", lambda x, D, s, t, eta, fresh: D + t * math.sqrt(
        1 - (eta * truth("7.2")(x, s, t, 0.0)[1] / t) ** 2) * (x - D) / s
        + eta * truth("7.2")(x, s, t, 0.0)[1] * fresh, "ZeroDivisionError"),
    ("7.4", "never over 1", lambda x, s, f, g, c: truth("7.4")(x, s, f, g, min(c, 1.0)), "differ"),
    ("7.4", "size of f", lambda x, s, f, g, c: truth("7.4")(x, s, -abs(f), g, c), "differ"),
    ("7.5", "a step not too short", partial(line, least=0.5), "differ"),
    ("7.1", "spreads add", (1, 1, 1 + 0.866), "variances add"),
    ("7.1", "at first", (2, 2, 2), "the old one shrinks"),
    ("8.1", "clamped", partial(price, log=lambda s: s.clamp(0.1, 10).log()), "input 2"),
    ("8.1", "hard-wired latent", lambda m, s: truth("8.1")(m, s) / m.shape[1] * 3, "input 2"),
    ("8.1", "mean held", lambda m, s: price(m.detach(), s), "gradient at mean"),
    ("8.1", "std held", lambda m, s: price(m, s.detach()), "gradient at std"),
    ("8.1", "log held", partial(price, log=lambda s: s.log().detach()), "gradient at std"),
    ("8.1", "first three", lambda m, s: price(m[:, :3], s[:, :3]), "input 2"),
    ("8.2", "naive", lambda z, r, t: (truth("8.2")(z, r, t)[0], -r.exp().prod(1).log()),
        NOT_FINITE),
    ("8.2", "hard-wired width", lambda z, r, t: (truth("8.2")(z, r, t)[0], -r.mean(1) * 3),
        "input 2"),
    ("8.2", "size of the scale", lambda z, r, t: truth("8.2")(z, r.abs(), t), "differ"),
    ("8.3", "float level", partial(velocity, level=lambda t: (t / (1 - t)).mean().item()),
        ONE_LEVEL_EACH),
    ("8.3", "column of levels", partial(velocity, level=lambda t: (t / (1 - t))[:, None]),
        ONE_LEVEL_EACH),
    ("8.3", "kept from 0", partial(velocity, over=lambda t: 1 - t[:, None] + 1e-5), "differ"),
    ("8.3", "clamped", lambda D, x, t: velocity(D, x, t.clamp(0.01, 0.99)), "differ"),
    ("8.3", "for a denoiser", lambda D, x, t: (x - D(x / (1 - t)[:, None], t / (1 - t)))
        / t[:, None], "answers is the noise"),
    ("8.4", "network held", lambda v, *a: truth("8.4")(lambda *b: v(*b).detach(), *a), NO_GRADIENT),
    ("8.4", "float time", partial(flow_loss, told=lambda t: t.mean().item()), ONE_LEVEL_EACH),
    ("8.4", "column of times", partial(flow_loss, told=lambda t: t[:, None]), ONE_LEVEL_EACH),
    ("8.4", "time left out", partial(flow_loss, told=torch.zeros_like), "loss"),
    ("8.4", "mean time", lambda v, x, z, t: flow_loss(v, x, z, t.mean().expand_as(t)), "loss"),
    ("8.4", "hard-wired size", lambda *a: flow_loss(*a) * a[1].numel() / 16, "input 2"),
    ("8.4", "half of the gradient", lambda *a: (flow_loss(*a) + flow_loss(*a).detach()) / 2,
        "gradient that reaches"),
    ("8.5", "straight at once", (1, 1, 1), "minus the mean of the data"),
    ("8.5", "as far as a hundred", (0, 1, 1), "it lands on their mean"),
    ("8.5", "another decimal", (0, 0.4, 1), "result 2"),
    ("9.2", "clamped", partial(with_boundary, above=lambda s, low: (s - low).clamp_min(0.01)),
        "result"),
    ("9.3", "from 0", lambda low, *a: truth("9.3")(0.0, *a), "differ"),
    ("9.3", "Karras", lambda low, high, std, count: karras_grid(
        count, sigma_min=low, sigma_max=high), "differ"),
    ("9.3", "what is left", lambda low, high, std, count: math.cos(
        (math.atan(high / std) - math.atan(low / std)) / (count - 1)) ** (count - 1), "is asked"),
    ("9.4", "float level", partial(consistency, told=lambda s: s.mean().item()), ONE_LEVEL_EACH),
    ("9.4", "column of levels", partial(consistency, told=lambda s: s[:, None]), ONE_LEVEL_EACH),
    ("9.4", "hard-wired size", partial(consistency, reduce=lambda e: e.sum() / 8), "input 2"),
    ("9.4", "half", partial(consistency, reduce=lambda e: e.mean() / 2), "loss"),
    ("9.4", "0.7", lambda f, x, s, y, t: consistency(f, x, s, y, 0.7 * s), "loss"),
    ("9.4", "network held", lambda f, *a: consistency(lambda *b: f(*b).detach(), *a), NO_GRADIENT),
    ("9.1", "the stars", (18, 0.4, 2), "a little less than 90 %"),
    ("9.1", "missing", (26, 0.59, 2), "that is what is missing"),
    ("9.5", "variances", (0.64, 1, 0.4), "a level is a standard deviation"),
    ("10.1", "kept from 0", lambda x, y, s, t: truth("10.1")(x, y, s, max(t, 1e-2)), "off by"),
    ("10.1", "division by 0", lambda x, y, s, t: (x - y) / t / (s / t - 1), "ZeroDivisionError"),
    ("10.1", "estimate", lambda x, y, s, t: (s * y - t * x) / (s - t), "that is (10.2)"),
    ("10.1", "0 is the teacher's end", lambda x, y, s, t:
        x if t == 0 else truth("10.1")(x, y, s, t), "differ"),
    ("10.2", "clamped", lambda D, y, s: loss_on_v(D, y, s.clamp(0.01, 50)), "not right"),
    ("10.2", "kept from 0", lambda D, y, s: truth("10.2")(D, y, (s**2 + 1e-6).sqrt()), "not right"),
    ("10.2", "weight clamped", lambda D, y, s: (
        (1 / s**2 + 1).clamp_max(1e3)[:, None] * (D - y) ** 2).mean(), "not right"),
    ("10.2", "hard-wired size", lambda D, y, s: loss_on_v(D, y, s) * y.numel() / 12, "input 2"),
    ("10.3", "float level", partial(teacher_term, told=lambda s: s.mean().item()), ONE_LEVEL_EACH),
    ("10.3", "column of levels", partial(teacher_term, told=lambda s: s[:, None]), ONE_LEVEL_EACH),
    ("10.3", "only the teacher's input held", lambda D, x, s, n: (
        (x - D(x.detach() + s[:, None] * n, s)) ** 2 / (1 + s**2).sqrt()[:, None]).mean(),
        "gradient that reaches the teacher"),
    ("10.3", "hard-wired size", lambda D, x, s, n: teacher_term(D, x, s, n) * x.numel() / 8,
        "input 2"),
    ("10.4", "both clamped", partial(hinge, relu=lambda a: a.clamp(0, 2)), "discriminator"),
    ("10.4", "student's held", lambda r, f: (truth("10.4")(r, f)[0], -f.detach().mean()),
        NO_GRADIENT),
    ("10.4", "samples held", lambda r, f: (truth("10.4")(r, f.detach())[0], -f.mean()),
        "gradient at logits of samples: yours is 0"),
    ("10.4", "soft", partial(hinge, relu=F.softplus), "discriminator"),
    ("10.4", "hard-wired batch", lambda r, f:
        (torch.relu(1 - r).sum() / 4 + torch.relu(1 + f).sum() / 3, -f.mean()), "input 2"),
    ("10.4", "as one batch", lambda r, f:
        (torch.cat([1 - r.flatten(), 1 + f.flatten()]).relu().mean() * 2, -f.mean()),
        "discriminator"),
    ("10.4", "order", lambda r, f: truth("10.4")(r, f)[::-1], "loss comes first"),
    ("10.4", "one loss", lambda r, f: truth("10.4")(r, f)[0], "two losses are asked for"),
    ("10.4", "of each logit", lambda r, f: (truth("10.4")(r, f)[0], -f),
        "student: loss: a tensor of shape () is asked for"),
    ("10.5", "its own steps", (0.003, 0.264, 0.003), "a student lands where its teacher does"),
    ("10.5", "text", ("0.456", "0.456", "0.333"), "is asked for"),
    ("11.1", "weight at 0.7", lambda x, n, s, p: truth("11.1")(x, n, 0.7, p), "input 2"),
    ("11.1", "kept from 0", lambda x, n, s, p: truth("11.1")(x, n, max(s, 0.1), p), "input 2"),
    ("11.1", "no more than sigma^2", lambda x, n, s, p: min(1, s**2 / (0.49 + 1)) * (p - n),
        "input 2"),
    ("11.2", "ratio", partial(head, share=lambda lr, lf: (lr - lf).exp() / (1 + (lr - lf).exp())),
        NOT_FINITE),
    ("11.2", "kept from 0", partial(head,
        share=lambda lr, lf: lr.exp() / (lr.exp() + lf.exp() + 1e-8)), "input 2"),
    ("11.2", "hard-wired batch", lambda lr, lf, sr, sf:
        torch.sigmoid(lr - lf).reshape(5, 1) * (sf - sr), "reshape(5"),
    ("11.3", "hard-wired size", lambda x, *a: sid(x, *a) * x.numel() / 12, "input 2"),
    ("11.4", "float level", partial(second_input, level=bare), ONE_LEVEL_EACH),
    ("11.4", "level, no axis", partial(second_input, level=lambda z, s: torch.tensor(s)),
        ONE_LEVEL_EACH),
    ("11.4", "column of levels", partial(second_input,
        level=lambda z, s: torch.full((len(z), 1), s)), ONE_LEVEL_EACH),
    ("11.4", "hard-wired batch", partial(second_input, level=lambda z, s: torch.full((5,), s)),
        ONE_LEVEL_EACH),
    ("11.4", "10 and 2", lambda D, z, s, n: truth("11.4")(D, z, [10.0, 2.0], n), "differ"),
    ("11.4", "told the second level", lambda D, z, s, n:
        D(s[0] * z, torch.full((len(z),), s[1])).detach()
        + s[1] * n, "differ"),
    ("11.4", "only the noise held", lambda D, z, s, n:
        D(s[0] * z.detach(), torch.full((len(z),), s[0]))
        + s[1] * n.detach(), "under torch.no_grad()"),
    ("11.5", "half", (0, 1, 0.5), "half the variance"),
    ("11.5", "stays", (1, 1, 0.71), "SDS has no critic"),
]  # fmt: skip


# Right answers


def by_precisions(x, s, t, d):
    kept, told = 1 / (s**2 - t**2), 1 / (d**2 + t**2)
    return kept * x / (kept + told), (kept + told) ** -0.5


def target_of_copy(f, x, s, y, t):
    return F.mse_loss(f(x, s), copy.deepcopy(f)(y, t).data)


def under_no_grad(D, z, levels, noise):
    with torch.no_grad():
        x = D(levels[0] * z, levels[0] * torch.ones(len(z)))
    return torch.add(x, noise, alpha=levels[1])


def through_the_loss(lr, lf, sr, sf):
    logit = (lr - lf).requires_grad_()
    (slope,) = torch.autograd.grad(F.logsigmoid(-logit).sum(), logit)  # of log(1 - d)
    return slope[:, None] * (sr - sf)


def along_the_line(N, x_t, t):  # (8.15), with the denoised estimate behind the noise
    u = t[:, None]
    x, sigma = x_t / (1 - u), u / (1 - u)
    return (x_t - (x - sigma * N(x, sigma[:, 0]))) / u


RIGHT = [
    ("7.2", by_precisions),
    ("7.2", posterior),
    # (7.5): the mean of the known-sample case, and the doubt about the sample on top
    ("7.2", lambda x, s, t, d: [
        ((t / s) ** 2 * x + (1 - (t / s) ** 2) * d**2 / (d**2 + s**2) * x).numpy(),
        np.sqrt(t**2 * (s**2 - t**2) / s**2 + (1 - (t / s) ** 2) ** 2 / (d**-2 + s**-2))]),
    ("7.3", ddim),
    ("7.3", lambda x, D, s, t, eta, n: D + t * math.sqrt(1 - eta**2 * (1 - t**2 / s**2))
        * (x - D) / s + t * eta * math.sqrt(1 - t**2 / s**2) * n),
    ("7.3", torch.no_grad()(lambda x, D, s, t, eta, n: ddim(x.double(), D.double(), s, t, eta, n))),
    ("7.4", lambda x, s, f, g, c: f * x - g**2 * s / 2 - (c * g) ** 2 * s / 2),
    ("7.4", lambda x, s, f, g, c: torch.lerp(f * x - g * g * s / 2, f * x - g * g * s, c**2)),
    ("7.5", line),
    ("7.5", by_quadrature),
    ("7.1", (1, 1, 1.32)), ("7.1", [1.0, 1, math.sqrt(1 + 3 / 4)]),
    ("8.1", price),
    ("8.1", lambda m, s: kl_divergence(Normal(m, s), Normal(0.0, 1.0)).sum(1)),
    ("8.1", lambda m, s: -0.5 * (1 + (s**2).log() - m**2 - s**2).sum(-1)),
    ("8.1", partial(price, log=lambda s: (s + 1e-8).log())),
    ("8.2", lambda z, r, t: ((z - t) / r.exp(), r.sum(-1).neg())),
    ("8.2", lambda z, r, t: [torch.exp(-r) * z - t * torch.exp(-r), torch.einsum("bi->b", -r)]),
    ("8.2", lambda z, r, t: ((z.double() - t) / r.double().exp(), -torch.logdet(
        r.double().exp().diag_embed()))),
    ("8.3", velocity),
    ("8.3", along_the_line),
    ("8.3", torch.no_grad()(partial(velocity, level=lambda t: 1 / (1 / t - 1)))),
    ("8.4", flow_loss),
    ("8.4", lambda v, x, z, t: torch.mean((v(z + t.unsqueeze(1) * (x - z), t) + z - x) ** 2)),
    ("8.4", lambda v, x, z, t: (v(x * t.view(-1, 1) + z * (1 - t.view(-1, 1)), t)
                                - (x - z)).pow(2).sum(1).mean() / 2),
    ("8.5", [0, 0.5, 1]), ("8.5", torch.tensor([0.0, 0.46, 1.0])),
    ("9.2", with_boundary),
    ("9.2", lambda s, d, low:
        (1 / (1 + ((s - low) / d) ** 2), (s - low) / (1 + (s / d) ** 2).sqrt())),
    ("9.2", lambda s, d, low: [c.double() for c in truth("9.2")(s, d, low)]),
    ("9.3", grid),
    ("9.3", lambda *a: np.array(grid(*a))),
    ("9.3", lambda *a: tuple(grid(*a))),
    ("9.4", consistency),
    ("9.4", target_of_copy),
    ("9.4", lambda f, x, s, y, t: F.mse_loss(f(y, t).detach(), f(x, s))),
    ("9.1", (22, 0.37, 1.6)), ("9.1", [31, 0.46, 2.5]),
    ("9.5", (0.8, 1, 0.63)), ("9.5", [0.8, math.hypot(0.6, 0.8), math.hypot(0.6, 0.2)]),
    ("10.1", lambda x, y, s, t: (x - (s * y - t * x) / (s - t)) / s),
    ("10.1", lambda x, y, s, t: (x / s - y / s) / (1 - t / s)),
    ("10.1", lambda x, y, s, t: (y - x) / (t - s)),
    ("10.2", loss_on_v),
    ("10.2", lambda D, y, s: F.mse_loss(D, y) + F.mse_loss(D / s[:, None], y / s[:, None])),
    ("10.2", lambda D, y, s: torch.einsum("b,bd->", (1 + s**2) / s**2, (D - y) ** 2) / D.numel()),
    ("10.3", teacher_term),
    ("10.3", lambda D, x, s, n: torch.mean(F.mse_loss(
        x, D(x + s[:, None] * n, s).detach(), reduction="none") / (1 + s**2).sqrt()[:, None])),
    ("10.3", lambda D, x, s, n: ((x - D(x.detach() + s[:, None] * n, s).data) ** 2
                                 * (1 + s**2)[:, None] ** -0.5).mean()),
    ("10.4", hinge),
    ("10.4", partial(hinge, relu=lambda a: a.clamp_min(0))),
    ("10.4", lambda r, f: [F.relu(1 - r).mean() + torch.where(f > -1, 1 + f, 0).mean(), -f.mean()]),
    ("10.4", lambda r, f: torch.stack(truth("10.4")(r, f))),
    ("10.5", [0.456, 0.456, 0.333]), ("10.5", np.array([0.46, 0.45, 0.33])),
    ("11.1", lambda x, n, s, p: (p - n) / (1 + s**-2)),
    ("11.1", lambda x, n, s, p: (1 - 1 / (1 + s**2)) * (p - n)),
    ("11.1", lambda x, n, s, p: s / (1 + s**2) * ((x + s * p) - (x + s * n))),
    ("11.2", head),
    ("11.2", lambda lr, lf, sr, sf: (1 / (1 + (lf - lr).exp())).unsqueeze(1) * (sf - sr)),
    ("11.2", lambda lr, lf, sr, sf: torch.stack([lr, lf]).softmax(0)[0][:, None] * (sf - sr)),
    ("11.2", through_the_loss),
    ("11.3", sid),
    ("11.3", lambda x, real, fake, a: torch.mean((real - fake) * (real - x))
        - a * F.mse_loss(real, fake)),
    ("11.3", lambda x, real, fake, a: ((real - fake) * (
        (1 - a) * real + a * fake - x)).sum() / x.numel()),
    ("11.4", second_input),
    ("11.4", under_no_grad),
    ("11.4", lambda *a: under_no_grad(*a).numpy()),
    ("11.5", (0, 1, 0.71)), ("11.5", torch.tensor([0.0, 1.0, 0.5**0.5])),
]  # fmt: skip

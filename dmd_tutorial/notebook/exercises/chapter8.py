"""Exercises of chapter 8, before diffusion and straighter paths."""

from collections.abc import Callable

import torch
from torch import Tensor

from dmd_tutorial.notebook.exercises import Exercise, Network, gradients_by

Field = Callable[[Tensor, Tensor], Tensor]  # the noise in (x, sigma), or a velocity of (x_t, t)


def code_price(mean: Tensor, std: Tensor) -> Tensor:
    return (0.5 * (mean**2 + std**2 - 1) - std.log()).sum(1)


def undo(z_b: Tensor, log_scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    return (z_b - shift) * (-log_scale).exp(), -log_scale.sum(1)


def velocity_of(noise_of: Field, x_t: Tensor, t: Tensor) -> Tensor:
    return (_asked(noise_of, x_t, t) - x_t) / (1 - t[:, None])


def _asked(noise_of: Field, x_t: Tensor, t: Tensor) -> Tensor:
    return noise_of(x_t / (1 - t[:, None]), t / (1 - t))


def cfm(v: Field, x: Tensor, z: Tensor, t: Tensor) -> Tensor:
    return _square(v, t[:, None] * x + (1 - t[:, None]) * z, t, x - z)


def _square(v: Field, x_t: Tensor, t: Tensor, target: Tensor) -> Tensor:
    return (v(x_t, t) - target).square().mean()


EXERCISES = [
    Exercise("8.1", "divergence of a code from the prior", code_price, {
        "the logarithm has the other sign: a narrow code is dear, not cheap":
            lambda m, s: (0.5 * (m**2 + s**2 - 1) + s.log()).sum(1),
        "the half belongs to the squares": lambda m, s: (m**2 + s**2 - 1 - s.log()).sum(1),
        "the logarithm of the variance is twice that of std: the half belongs to it, too":
            lambda m, s: (0.5 * (m**2 + s**2 - 1) - 2 * s.log()).sum(1),
        "it is the variance std**2 that stands beside mean**2":
            lambda m, s: (0.5 * (m**2 + s - 1) - s.log()).sum(1),
        "sum over the axes of a code, do not average": lambda m, s: code_price(m, s) / m.shape[1],
        "one number for each row: sum over dim=1 only": lambda *a: code_price(*a).sum(),
        "the -1 is missing: a code equal to the prior costs nothing":
            lambda m, s: code_price(m, s) + m.shape[1] / 2,
    }, inputs=lambda: [(torch.randn(5, 3), 0.2 + torch.rand(5, 3)),
                       (torch.randn(1, 4), torch.tensor([[0.002, 1.0, 0.05, 30.0]]))],
       probe=gradients_by({"gradient at mean": 0, "gradient at std": 1}, name="")),
    Exercise("8.2", "a coupling undone", undo, {
        "the shift came last, so it is undone first":
            lambda z, log_s, shift: (z * (-log_s).exp() - shift, -log_s.sum(1)),
        "this is the log-determinant from data to noise; the other way it changes its sign":
            lambda z, log_s, shift: (undo(z, log_s, shift)[0], log_s.sum(1)),
        "this is the coupling itself, not its inverse":
            lambda z, log_s, shift: (z * log_s.exp() + shift, log_s.sum(1)),
        "the scale is exp(log_scale)": lambda z, log_s, shift: ((z - shift) / log_s, -log_s.sum(1)),
        "the logarithm of a product is a sum, not a mean":
            lambda z, log_s, shift: (undo(z, log_s, shift)[0], -log_s.mean(1)),
        "one log-determinant for each row: sum over dim=1 only":
            lambda z, log_s, shift: (undo(z, log_s, shift)[0], -log_s.sum()),
    }, inputs=lambda: [(*torch.randn(3, 4, 3),),  # then a product of scales beyond float32
                       (torch.randn(1, 70), 1.5 + torch.rand(1, 70), torch.randn(1, 70))]),
    Exercise("8.3", "velocity from a noise estimate", velocity_of, {
        "the network wants x + sigma n: divide x_t by 1 - t before asking it":
            lambda N, x_t, t: (N(x_t, t / (1 - t)) - x_t) / (1 - t[:, None]),
        "the noise level of time t is t / (1 - t)":
            lambda N, x_t, t: (N(x_t / (1 - t[:, None]), t) - x_t) / (1 - t[:, None]),
        "the sign is the other way round: with t the noise grows, so the velocity points to the "
        "noise": lambda *a: -velocity_of(*a),
        "that is dx/dsigma of the probability-flow ODE; here the clock is t": _asked,
        "what the network answers is the noise, not the clean sample of (8.15)":
            lambda N, x_t, t: (x_t - _asked(N, x_t, t)) / t[:, None],
        "divide by 1 - t: the whole way to the noise takes the time 1 - t":
            lambda N, x_t, t: (1 - t[:, None]) * velocity_of(N, x_t, t),
    }, inputs=lambda: [(Network(lambda p, x, s: (p * x).tanh() + s / (3 + s)),
                        torch.randn(len(t), 2).double(), torch.tensor(t).double())
                       for t in ([0.002, 0.1, 0.5, 0.8, 0.95, 0.998], [0.3])]),
    Exercise("8.4", "conditional flow matching", cfm, {
        "that is the book's direction: data at t = 0": lambda v, x, z, t: cfm(v, z, x, t),
        "the derivative of t x + (1 - t) z by t is x - z":
            lambda v, x, z, t: _square(v, z + t[:, None] * (x - z), t, z - x),
        "the network is told the t of the points, not 1 - t":
            lambda v, x, z, t: cfm(lambda x_t, told: v(x_t, 1 - told), x, z, t),
        "the target is the velocity x - z, not the data":
            lambda v, x, z, t: _square(v, z + t[:, None] * (x - z), t, x),
        "the noise fades as the data come: t x + (1 - t) z":
            lambda v, x, z, t: _square(v, z + t[:, None] * x, t, x - z),
        "take the mean over all values, not the sum": lambda v, x, *a: x.numel() * cfm(v, x, *a),
        "the sum over coordinates is a mean here, too": lambda v, x, *a: x.shape[1] * cfm(v, x, *a),
    }, inputs=lambda: [(Network(lambda p, x, t: (p * x).sin() + t * x.flip(1)),
                        2 + torch.randn(len(t), 2), torch.randn(len(t), 2), t)
                       for t in (torch.linspace(0, 1, 8), torch.tensor([0.3]))],
       probe=gradients_by({"gradient that reaches the network": 0})),
    Exercise("8.5", "where one noise ends", (0.0, 0.46, 1.0), {
        "at t = 1 the velocity is the noise minus the mean of the data": (1.0, 0.46, 1.0),
        "to rest at the noise itself is no step": (0.5, 0.46, 1.0),
        "halfway the point is at 0.25: one data point is likelier behind it": (0.0, 0.0, 1.0),
        "halfway both data points are possible: it lands on their mean": (0.0, 1.0, 1.0),
        "that is where the first of the two steps ends": (0.0, 0.25, 1.0),
        "small steps follow the path, and it ends at a data point": (0.0, 0.46, 0.0),
    }, tolerance=(0.02, 0.045, 0.02)),
]  # fmt: skip

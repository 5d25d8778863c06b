"""Exercises of chapter 8, before diffusion and straighter paths."""

from collections.abc import Callable

import torch
from torch import Tensor

from dmd_tutorial.notebook.exercises import Exercise, Network, gradients_by

Field = Callable[[Tensor, Tensor], Tensor]  # a denoiser of (x, sigma), or a velocity of (x_t, t)


def code_price(mean: Tensor, std: Tensor) -> Tensor:
    return (0.5 * (mean**2 + std**2 - 1) - std.log()).sum(1)


def undo(z_b: Tensor, log_scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    return (z_b - shift) * (-log_scale).exp(), -log_scale.sum(1)


def velocity_of(denoise: Field, x_t: Tensor, t: Tensor) -> Tensor:
    return (x_t - denoise(x_t / (1 - t[:, None]), t / (1 - t))) / t[:, None]


def _slope(denoise: Field, x: Tensor, sigma: Tensor) -> Tensor:
    return (x - denoise(x, sigma)) / sigma[:, None]


def cfm(v: Field, x: Tensor, z: Tensor, t: Tensor) -> Tensor:
    return _square(v, (1 - t[:, None]) * x + t[:, None] * z, t, z - x)


def _square(v: Field, x_t: Tensor, t: Tensor, target: Tensor) -> Tensor:
    return (v(x_t, t) - target).square().mean()


EXERCISES = [
    Exercise("8.1", "divergence of a code from the prior", code_price, {
        "the logarithm has the other sign: a narrow code is dear, not cheap":
            lambda m, s: (0.5 * (m**2 + s**2 - 1) + s.log()).sum(1),
        "the half belongs to the squares": lambda m, s: (m**2 + s**2 - 1 - s.log()).sum(1),
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
    Exercise("8.3", "velocity from a denoiser", velocity_of, {
        "the denoiser wants x + sigma z: divide x_t by 1 - t before asking it":
            lambda D, x_t, t: (x_t - D(x_t, t / (1 - t))) / t[:, None],
        "the noise level of time t is t / (1 - t)":
            lambda D, x_t, t: (x_t - D(x_t / (1 - t[:, None]), t)) / t[:, None],
        "the sign is the other way round: with t the noise grows, so the velocity points away "
        "from the denoised estimate": lambda *a: -velocity_of(*a),
        "that is dx/dsigma of the probability-flow ODE; here the point is x_t and the clock is t":
            lambda D, x_t, t: _slope(D, x_t / (1 - t[:, None]), t / (1 - t)),
        "divide by t: the whole way back to the data takes the time t":
            lambda D, x_t, t: t[:, None] * velocity_of(D, x_t, t),
    }, inputs=lambda: [(Network(lambda p, x, s: (p * x).tanh() + s / (3 + s)),
                        torch.randn(len(t), 2).double(), torch.tensor(t).double())
                       for t in ([0.002, 0.1, 0.5, 0.8, 0.95, 0.998], [0.3])]),
    Exercise("8.4", "conditional flow matching", cfm, {
        "here time rises with the noise: the data are at t = 0": lambda v, x, z, t: cfm(v, z, x, t),
        "the derivative of (1 - t) x + t z by t is z - x":
            lambda v, x, z, t: _square(v, x + t[:, None] * (z - x), t, x - z),
        "the target is the velocity z - x, not the noise":
            lambda v, x, z, t: _square(v, x + t[:, None] * (z - x), t, z),
        "the data fade as the noise comes: (1 - t) x + t z":
            lambda v, x, z, t: _square(v, x + t[:, None] * z, t, z - x),
        "take the mean over all values, not the sum": lambda v, x, *a: x.numel() * cfm(v, x, *a),
        "the sum over coordinates is a mean here, too": lambda v, x, *a: x.shape[1] * cfm(v, x, *a),
    }, inputs=lambda: [(Network(lambda p, x, t: (p * x).sin() + t * x.flip(1)),
                        2 + torch.randn(len(t), 2), torch.randn(len(t), 2), t)
                       for t in (torch.linspace(0, 1, 8), torch.tensor([0.3]))],
       probe=gradients_by({"gradient that reaches the network": 0})),
    Exercise("8.5", "where one noise ends", (0.0, 1.0, 1.0), {
        "at t = 1 the velocity is the noise minus the mean of the data": (1.0, 1.0, 1.0),
        "small steps follow the path, and it ends at a data point": (0.0, 0.0, 1.0),
        "the new pairs join a noise with the end of its own path: their lines do not cross":
            (0.0, 1.0, 0.0),
        "to rest at the noise itself is no step": (0.5, 1.0, 1.0),
    }, tolerance=0.02),
]  # fmt: skip

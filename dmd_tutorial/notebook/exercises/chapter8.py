"""Exercises of chapter 8, before diffusion and straighter paths."""

from collections.abc import Callable

import torch
from torch import Tensor

from dmd_tutorial import data
from dmd_tutorial.notebook.exercises import Exercise

# 8.1: the KL divergence of a code from the prior


def code_price(mean: Tensor, std: Tensor) -> Tensor:
    """KL divergence of a Gaussian from the standard normal one: the answer to 8.1."""
    return (0.5 * (mean**2 + std**2 - 1) - std.log()).sum(1)


# 8.2: a coupling undone


def undo(z_b: Tensor, log_scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """The other half of the data, and the log-determinant of that map: the answer to 8.2."""
    return (z_b - shift) * (-log_scale).exp(), -log_scale.sum(1)


def _undo_wrong_order(z_b: Tensor, log_scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    return z_b * (-log_scale).exp() - shift, -log_scale.sum(1)


def _undo_sign_of_det(z_b: Tensor, log_scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    return undo(z_b, log_scale, shift)[0], log_scale.sum(1)


def _undo_forward(z_b: Tensor, log_scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    return z_b * log_scale.exp() + shift, log_scale.sum(1)


def _undo_without_exp(z_b: Tensor, log_scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    return (z_b - shift) / log_scale, -log_scale.sum(1)


def _undo_mean_det(z_b: Tensor, log_scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    return undo(z_b, log_scale, shift)[0], -log_scale.mean(1)


def _undo_det_of_batch(z_b: Tensor, log_scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    return undo(z_b, log_scale, shift)[0], -log_scale.sum()


# 8.3: a velocity from a denoiser

Denoise = Callable[[Tensor, Tensor], Tensor]


def velocity_of(denoise: Denoise, x_t: Tensor, t: Tensor) -> Tensor:
    """Velocity dx_t/dt that a denoiser implies: the answer to 8.3."""
    column = t[:, None]
    return (x_t - denoise(x_t / (1 - column), t / (1 - t))) / column


def _velocity_unscaled(denoise: Denoise, x_t: Tensor, t: Tensor) -> Tensor:
    return (x_t - denoise(x_t, t / (1 - t))) / t[:, None]


def _velocity_level_t(denoise: Denoise, x_t: Tensor, t: Tensor) -> Tensor:
    return (x_t - denoise(x_t / (1 - t[:, None]), t)) / t[:, None]


def _velocity_reversed(denoise: Denoise, x_t: Tensor, t: Tensor) -> Tensor:
    return -velocity_of(denoise, x_t, t)


def _velocity_of_sigma(denoise: Denoise, x_t: Tensor, t: Tensor) -> Tensor:
    sigma = t / (1 - t)
    x = x_t / (1 - t[:, None])
    return (x - denoise(x, sigma)) / sigma[:, None]


def _velocity_undivided(denoise: Denoise, x_t: Tensor, t: Tensor) -> Tensor:
    return t[:, None] * velocity_of(denoise, x_t, t)


def _exact(x: Tensor, sigma: Tensor) -> Tensor:
    return data.two_modes()(x, sigma)


# 8.4: conditional flow matching

Velocity = Callable[[Tensor, Tensor], Tensor]


def cfm_loss(v: Velocity, x: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """Mean square from the velocity of the drawn line: the answer to 8.4."""
    column = t[:, None]
    return (v((1 - column) * x + column * z, t) - (z - x)).square().mean()


def _cfm_other_time(v: Velocity, x: Tensor, z: Tensor, t: Tensor) -> Tensor:
    column = t[:, None]
    return (v(column * x + (1 - column) * z, t) - (x - z)).square().mean()


def _cfm_sign(v: Velocity, x: Tensor, z: Tensor, t: Tensor) -> Tensor:
    column = t[:, None]
    return (v((1 - column) * x + column * z, t) - (x - z)).square().mean()


def _cfm_noise(v: Velocity, x: Tensor, z: Tensor, t: Tensor) -> Tensor:
    column = t[:, None]
    return (v((1 - column) * x + column * z, t) - z).square().mean()


def _cfm_exploding(v: Velocity, x: Tensor, z: Tensor, t: Tensor) -> Tensor:
    return (v(x + t[:, None] * z, t) - (z - x)).square().mean()


def _cfm_sum(v: Velocity, x: Tensor, z: Tensor, t: Tensor) -> Tensor:
    return x.numel() * cfm_loss(v, x, z, t)


def _some_velocity(x_t: Tensor, t: Tensor) -> Tensor:
    return torch.sin(x_t) + t[:, None] * x_t.flip(1)


EXERCISES = [
    Exercise(
        "8.1",
        "divergence of a code from the prior",
        truth=code_price,
        mistakes={
            "the logarithm has the other sign: a narrow code is dear, not cheap": (
                lambda mean, std: (0.5 * (mean**2 + std**2 - 1) + std.log()).sum(1)
            ),
            "the half belongs to the squares": (
                lambda mean, std: (mean**2 + std**2 - 1 - std.log()).sum(1)
            ),
            "it is the variance std**2 that stands beside mean**2": (
                lambda mean, std: (0.5 * (mean**2 + std - 1) - std.log()).sum(1)
            ),
            "sum over the axes of a code, do not average": (
                lambda mean, std: code_price(mean, std) / mean.shape[1]
            ),
            "one number for each row: sum over dim=1 only": (
                lambda mean, std: code_price(mean, std).sum()
            ),
            "the -1 is missing: a code equal to the prior costs nothing": (
                lambda mean, std: code_price(mean, std) + mean.shape[1] / 2
            ),
        },
        inputs=lambda: [(torch.randn(5, 3), 0.2 + torch.rand(5, 3))],
    ),
    Exercise(
        "8.2",
        "a coupling undone",
        truth=undo,
        mistakes={
            "the shift came last, so it is undone first": _undo_wrong_order,
            "this is the log-determinant from data to noise; the other way it changes its sign": (
                _undo_sign_of_det
            ),
            "this is the coupling itself, not its inverse": _undo_forward,
            "the scale is exp(log_scale)": _undo_without_exp,
            "the logarithm of a product is a sum, not a mean": _undo_mean_det,
            "one log-determinant for each row: sum over dim=1 only": _undo_det_of_batch,
        },
        inputs=lambda: [(torch.randn(4, 3), 0.3 + torch.rand(4, 3), torch.randn(4, 3))],
    ),
    Exercise(
        "8.3",
        "velocity from a denoiser",
        truth=velocity_of,
        mistakes={
            "the denoiser wants x + sigma z: divide x_t by 1 - t before asking it": (
                _velocity_unscaled
            ),
            "the noise level of time t is t / (1 - t)": _velocity_level_t,
            "the sign is the other way round: with t the noise grows, so the velocity points "
            "away from the denoised estimate": _velocity_reversed,
            "that is dx/dsigma of the probability-flow ODE; here the point is x_t and the clock "
            "is t": _velocity_of_sigma,
            "divide by t: the whole way back to the data takes the time t": _velocity_undivided,
        },
        inputs=lambda: [(_exact, torch.randn(6, 2), 0.1 + 0.8 * torch.rand(6))],
    ),
    Exercise(
        "8.4",
        "conditional flow matching",
        truth=cfm_loss,
        mistakes={
            "here time rises with the noise: the data are at t = 0": _cfm_other_time,
            "the derivative of (1 - t) x + t z by t is z - x": _cfm_sign,
            "the target is the velocity z - x, not the noise": _cfm_noise,
            "the data fade as the noise comes: (1 - t) x + t z": _cfm_exploding,
            "take the mean over all values, not the sum": _cfm_sum,
            "the sum over coordinates is a mean here, too": (
                lambda v, x, z, t: x.shape[1] * cfm_loss(v, x, z, t)
            ),
        },
        inputs=lambda: [(_some_velocity, 2 + torch.randn(8, 2), torch.randn(8, 2), torch.rand(8))],
    ),
]

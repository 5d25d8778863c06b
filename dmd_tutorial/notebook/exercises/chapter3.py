"""Exercises of chapter 3, the KL gradient."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from dmd_tutorial import dmd
from dmd_tutorial.notebook.exercises import Exercise

# 3.1: the Gaussian that minimises the forward divergence


def forward_fit(means: Tensor, stds: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a one-dimensional mixture: the answer to 3.1."""
    mean = (weights * means).sum()
    variance = (weights * (stds**2 + (means - mean) ** 2)).sum()
    return mean, variance.sqrt()


def _fit_with_variance(means: Tensor, stds: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = forward_fit(means, stds, weights)
    return mean, std**2


def _fit_without_weights(means: Tensor, stds: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return forward_fit(means, stds, torch.full_like(weights, 1 / len(weights)))


def _fit_within_only(means: Tensor, stds: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return (weights * means).sum(), (weights * stds**2).sum().sqrt()


def _fit_between_only(means: Tensor, stds: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return forward_fit(means, torch.zeros_like(stds), weights)


def _fit_with_mean_of_stds(means: Tensor, stds: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return forward_fit(means, (weights * stds).sum().expand_as(stds), weights)


# 3.3: the gradient of a Gaussian generator, from scores


def kl_gradient(
    z: Tensor, mean: float, std: float, mean_real: float, std_real: float
) -> tuple[Tensor, Tensor]:
    """Estimate of dKL/dmean and dKL/dstd for x = mean + std z: the answer to 3.3."""
    x = mean + std * z
    difference = (x - mean_real) / std_real**2 - (x - mean) / std**2  # s_fake - s_real
    return difference.mean(), (difference * z).mean()


def _gradient_reversed(
    z: Tensor, mean: float, std: float, mean_real: float, std_real: float
) -> tuple[Tensor, Tensor]:
    d_mean, d_std = kl_gradient(z, mean, std, mean_real, std_real)
    return -d_mean, -d_std


def _gradient_real_only(
    z: Tensor, mean: float, std: float, mean_real: float, std_real: float
) -> tuple[Tensor, Tensor]:
    score_real = -(mean + std * z - mean_real) / std_real**2
    return -score_real.mean(), -(score_real * z).mean()


def _gradient_without_jacobian(
    z: Tensor, mean: float, std: float, mean_real: float, std_real: float
) -> tuple[Tensor, Tensor]:
    d_mean, _ = kl_gradient(z, mean, std, mean_real, std_real)
    return d_mean, d_mean


def _gradient_times_x(
    z: Tensor, mean: float, std: float, mean_real: float, std_real: float
) -> tuple[Tensor, Tensor]:
    x = mean + std * z
    difference = (x - mean_real) / std_real**2 - (x - mean) / std**2
    return difference.mean(), (difference * x).mean()


def _gradient_with_std(
    z: Tensor, mean: float, std: float, mean_real: float, std_real: float
) -> tuple[Tensor, Tensor]:
    x = mean + std * z
    difference = (x - mean_real) / std_real - (x - mean) / std
    return difference.mean(), (difference * z).mean()


def _gradient_summed(
    z: Tensor, mean: float, std: float, mean_real: float, std_real: float
) -> tuple[Tensor, Tensor]:
    d_mean, d_std = kl_gradient(z, mean, std, mean_real, std_real)
    return len(z) * d_mean, len(z) * d_std


# 3.4: the pixel gradient with the weight of Eq. 8


def pixel_gradient(x: Tensor, denoised_real: Tensor, denoised_fake: Tensor) -> Tensor:
    """Difference of denoisers over the teacher's mean absolute error: the answer to 3.4."""
    error = (x - denoised_real).abs().mean(dim=(1, 2, 3), keepdim=True)
    return (denoised_fake - denoised_real) / error


def _over(error: Tensor, denoised_real: Tensor, denoised_fake: Tensor) -> Tensor:
    return (denoised_fake - denoised_real) / error


def _images() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Samples whose errors differ from one to the next, so that a batch mean is found out."""
    size = torch.tensor([0.3, 1.0, 2.0])[:, None, None, None]
    x = torch.randn(3, 2, 4, 4)
    return [(x, x + size * torch.randn(x.shape), x + 0.5 * torch.randn(x.shape))]


# 3.5: the loss with a stop-gradient


def stop_gradient_loss(x: Tensor, gradient: Tensor) -> Tensor:
    """A loss whose derivative is the given gradient over the number of values: answer to 3.5."""
    return dmd.matching_loss(x, gradient)


def _loss_and_gradient(
    answer: Callable[..., Tensor], x: Tensor, gradient: Tensor
) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    loss = answer(x, gradient)
    if not loss.requires_grad:
        return {"loss": loss, "gradient of the loss": torch.zeros_like(x)}
    (found,) = torch.autograd.grad(loss, x)
    return {"loss": loss, "gradient of the loss": found}


EXERCISES = [
    Exercise(
        "3.1",
        "the Gaussian of the forward fit",
        truth=forward_fit,
        mistakes={
            "that is the variance; the standard deviation is its root": _fit_with_variance,
            "the components count by their weights: mean = sum(weights * means), and the same "
            "weights again in the variance": _fit_without_weights,
            "the distance between the centres is missing: each component adds "
            "(means - mean)**2 to its own variance": _fit_within_only,
            "the width of the components themselves is missing: add stds**2": _fit_between_only,
            "average the variances stds**2, not the standard deviations": _fit_with_mean_of_stds,
        },
        inputs=lambda: [
            (torch.tensor([-2.0, 2.5]), torch.tensor([0.4, 1.1]), torch.tensor([0.3, 0.7]))
        ],
    ),
    Exercise(
        "3.2",
        "mean of the dropped term where the support moves",
        truth=-1.0,
        mistakes={
            "it would be 0 if the density were differentiable in theta for every x, but at "
            "x = theta it jumps: compute it from log p inside the interval": 0.0,
            "the sign is the other way round: the density inside falls as theta grows": 1.0,
            "that is the answer for a uniform z; here the density 2x / theta^2 has the square of "
            "theta": -0.5,
            "that is the mean derivative of the density 2x / theta^2; the term is the derivative "
            "of its logarithm": -2 / 3,
        },
    ),
    Exercise(
        "3.3",
        "KL gradient of a Gaussian generator",
        truth=kl_gradient,
        mistakes={
            "the sign is the other way round: it is s_fake - s_real": _gradient_reversed,
            "the fake score is missing: this is the gradient that collapses": _gradient_real_only,
            "dx/dstd is z, not 1: multiply by it before taking the mean": (
                _gradient_without_jacobian
            ),
            "dx/dstd is z, not x": _gradient_times_x,
            "a Gaussian's score divides by the variance, std**2": _gradient_with_std,
            "the expectation is a mean over the samples, not a sum": _gradient_summed,
        },
        inputs=lambda: [(torch.randn(50), -1.0, 0.7, 0.5, 1.3)],
    ),
    Exercise(
        "3.4",
        "pixel gradient under Eq. 8",
        truth=pixel_gradient,
        mistakes={
            "the sign is the other way round: descending it would leave the real density": (
                lambda x, real, fake: -pixel_gradient(x, real, fake)
            ),
            "the error divides: Eq. 8 normalises the gradient, it does not multiply it": (
                lambda x, real, fake: (
                    (fake - real) * (x - real).abs().mean(dim=(1, 2, 3), keepdim=True)
                )
            ),
            "each sample has its own error: average over channels and pixels, not over the "
            "batch": lambda x, real, fake: _over((x - real).abs().mean(), real, fake),
            "C S / ||.||_1 is one over the mean absolute error, not over the sum": (
                lambda x, real, fake: _over(
                    (x - real).abs().sum(dim=(1, 2, 3), keepdim=True), real, fake
                )
            ),
            "the norm is ||.||_1: a mean of absolute values, not the root of a mean square": (
                lambda x, real, fake: _over(
                    (x - real).square().mean(dim=(1, 2, 3), keepdim=True).sqrt(), real, fake
                )
            ),
            "the error in the weight is the teacher's, |x - denoised_real|, not the critic's": (
                lambda x, real, fake: _over(
                    (x - fake).abs().mean(dim=(1, 2, 3), keepdim=True), real, fake
                )
            ),
            "the fake estimate is missing: this follows the real score alone, and collapses": (
                lambda x, real, fake: pixel_gradient(x, real, x)
            ),
        },
        inputs=_images,
    ),
    Exercise(
        "3.5",
        "loss with a stop-gradient",
        truth=stop_gradient_loss,
        mistakes={
            "without .detach() on the target, x cancels and nothing is left to learn from": (
                lambda x, gradient: 0.5 * functional.mse_loss(x, x - gradient)
            ),
            "the half is missing: the derivative of a square brings a factor 2": (
                lambda x, gradient: functional.mse_loss(x, (x - gradient).detach())
            ),
            "the derivative has the wrong sign: the target is x - gradient, and .detach() belongs "
            "on the target, not on the first x": (
                lambda x, gradient: 0.5 * functional.mse_loss(x, (x + gradient).detach())
            ),
            "take the mean, not the sum: lambda_reg is calibrated to it": (
                lambda x, gradient: (
                    0.5 * functional.mse_loss(x, (x - gradient).detach(), reduction="sum")
                )
            ),
            "this has the right derivative, but it is not the squared form that is asked for": (
                lambda x, gradient: (x * gradient.detach()).mean()
            ),
        },
        inputs=lambda: [(torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3))],
        probe=_loss_and_gradient,
    ),
]

"""Exercises of chapter 6."""

import torch
from torch import Tensor
from torch.nn import functional

from dmd_tutorial.data import two_modes
from dmd_tutorial.denoisers import Denoiser
from dmd_tutorial.noise import karras_grid
from dmd_tutorial.notebook.exercises import Exercise, loss_and_gradients

# 6.1: the generator


def generate(denoiser: Denoiser, z: Tensor, sigma_max: float) -> Tensor:
    """A denoiser held at sigma_max: the answer to 6.1."""
    return _ask(denoiser, sigma_max * z, sigma_max)


def _ask(denoiser: Denoiser, x: Tensor, level: float) -> Tensor:
    return denoiser(x, torch.full((len(x),), level, dtype=x.dtype))


def _denoiser_and_noise() -> list[tuple]:
    z = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return [(two_modes(), z, 5.0), (two_modes(), z, 2.0)]


# 6.2: the average


def ema(average: Tensor, new: Tensor, decay: float) -> Tensor:
    """One step of an exponential moving average: the answer to 6.2."""
    return decay * average + (1 - decay) * new


# 6.3: the whole loss


def total_loss(x: Tensor, gradient: Tensor, x_ref: Tensor, y_ref: Tensor, lam: float) -> Tensor:
    """Matching loss and anchor, both means: the answer to 6.3."""
    return _total(x, (x - gradient).detach(), x_ref, y_ref, lam)


def _total(x, aim, x_ref, y_ref, lam, half=0.5, reduction="mean") -> Tensor:
    """The answer to 6.3 where x is drawn to an aim, and with other settings its wrong ones."""
    matching = half * functional.mse_loss(x, aim, reduction=reduction)
    return matching + lam * functional.mse_loss(x_ref, y_ref)


def _slopes(answer, x: Tensor, gradient: Tensor, x_ref: Tensor, y_ref: Tensor, lam: float) -> dict:
    """What training sees of a loss: its derivatives."""
    x, x_ref = x.clone().requires_grad_(), x_ref.clone().requires_grad_()
    leaves = {"derivative by x": x, "derivative by x_ref": x_ref}
    found = loss_and_gradients(answer(x, gradient, x_ref, y_ref, lam), leaves)
    return {name: found[name] for name in leaves}


def _loss_inputs() -> list[tuple]:
    rng = torch.Generator().manual_seed(0)
    x, gradient, x_ref, y_ref = torch.randn(4, 5, 1, 4, 4, generator=rng, dtype=torch.float64)
    return [(x, gradient, x_ref, y_ref, 0.25)]


# 6.4: what an iteration costs


def forward_equivalents(critic_steps: int) -> int:
    """Cost of an iteration per image, in network forwards: the answer to 6.4."""
    generator = 2 * (1 + 2)  # z and z_ref, forward and backward
    scores = 2
    critic = critic_steps * (1 + 2)
    fresh = critic_steps - 1
    return generator + scores + critic + fresh


EXERCISES = [
    Exercise("6.1", "a denoiser as one-step generator", generate, {
        "the noise must be scaled: the denoiser expects an input of size sigma_max":
            lambda denoiser, z, sigma_max: _ask(denoiser, z, sigma_max),
        "the noise level is not sigma_max itself but the second-highest level of a grid":
            lambda denoiser, z, sigma_max: _ask(
                denoiser, sigma_max * z, karras_grid(100, sigma_max=sigma_max)[-2].item()
            ),
        "the denoiser must be told the level sigma_max, not 1":
            lambda denoiser, z, sigma_max: _ask(denoiser, sigma_max * z, 1.0),
        "the answer is an image already: do not divide it by sigma_max":
            lambda denoiser, z, sigma_max: generate(denoiser, z, sigma_max) / sigma_max,
    }, inputs=_denoiser_and_noise),
    Exercise("6.2", "one step of the average", ema, {
        "the wrong way round: a decay near 1 keeps almost all of the *average*":
            lambda average, new, decay: (1 - decay) * average + decay * new,
        "the new weights must count 1 - decay, or the average grows without bound":
            lambda average, new, decay: decay * average + new,
        "this is the new value alone: nothing is averaged": lambda average, new, decay: new,
    }, inputs=lambda: [(torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0]), 0.9)]),
    Exercise("6.3", "the whole loss of the generator", total_loss, {
        "a sum over pixels and batch where a mean belongs: lambda_reg is then far too small":
            lambda x, gradient, *a: _total(x, (x - gradient).detach(), *a, reduction="sum"),
        "the factor 1/2 is missing: the derivative of a square brings a 2":
            lambda x, gradient, *a: _total(x, (x - gradient).detach(), *a, half=1),
        "the sign is wrong: this climbs the KL divergence instead of descending it":
            lambda x, gradient, *a: _total(x, (x + gradient).detach(), *a),
        "the stop-gradient is missing: x cancels, and no gradient is left":
            lambda x, gradient, *a: _total(x, x - gradient, *a),
        "lambda_reg multiplies the wrong term: it belongs to the anchor":
            lambda x, g, x_ref, y_ref, lam: lam * total_loss(x, g, x_ref, y_ref, 1 / lam),
    }, inputs=_loss_inputs, probe=_slopes),
    Exercise("6.4", "what an iteration costs", forward_equivalents, {
        "the anchor is missing: the generator also runs, forward and backward, on z_ref":
            lambda critic_steps: 3 + 2 + 3 * critic_steps + critic_steps - 1,
        "the two scores are made without gradient: they cost a forward each, not three":
            lambda critic_steps: 6 + 6 + 3 * critic_steps + critic_steps - 1,
        "further critic steps need fresh images: a generator forward each":
            lambda critic_steps: 6 + 2 + 3 * critic_steps,
        "the first critic step reuses the images that are there: no forward for it":
            lambda critic_steps: 6 + 2 + 4 * critic_steps,
    }, inputs=lambda: [(1,), (2,), (5,)]),
]  # fmt: skip

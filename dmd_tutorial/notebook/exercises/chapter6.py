"""Exercises of chapter 6."""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from dmd_tutorial.denoisers import Denoiser
from dmd_tutorial.noise import karras_grid
from dmd_tutorial.notebook.exercises import Exercise, Network, gradients_by


def _ask(denoiser: Denoiser, x: Tensor, level: float) -> Tensor:
    return denoiser(x, torch.full((len(x),), level, dtype=x.dtype))


def total_loss(
    x, gradient, x_ref, y_ref, lam, half=0.5, reduction="mean", stop=torch.detach
) -> Tensor:
    matching = half * functional.mse_loss(x, stop(x - gradient), reduction=reduction)
    return matching + lam * functional.mse_loss(x_ref, y_ref)


def _slopes(*given) -> dict[str, Tensor]:
    """What training sees of a loss, a number: its derivatives, not its value."""
    found = gradients_by({"gradient at x": 0, "gradient at x_ref": 2})(*given)
    return found | {"loss": 0 * found["loss"]}


def forward_equivalents(critic_steps: int, generator: int = 2 * (1 + 2), scores: int = 2) -> int:
    # the generator runs on z and z_ref, both ways; steps after the first need new images
    return generator + scores + critic_steps * (1 + 2) + critic_steps - 1


EXERCISES = [
    Exercise("6.1", "a denoiser as one-step generator",
             lambda D, z, sigma_max: _ask(D, sigma_max * z, sigma_max), {
        "the noise must be scaled: the denoiser expects an input of size sigma_max": _ask,
        "the noise level is not sigma_max itself but the second-highest level of a grid":
            lambda D, z, top: _ask(D, top * z, karras_grid(100, sigma_max=top)[-2].item()),
        "the denoiser must be told the level sigma_max, not 1":
            lambda D, z, sigma_max: _ask(D, sigma_max * z, 1.0),
        "the answer is an image already: do not divide it by sigma_max":
            lambda D, z, sigma_max: _ask(D, sigma_max * z, sigma_max) / sigma_max,
    }, inputs=lambda: [(Network(lambda p, x, s: (p * x / s).tanh() + s.cos()), z, sigma_max)
                       for z in (torch.randn(6, 2).double(), torch.randn(1, 3, 2, 2))
                       for sigma_max in (5.0, 80.0)],
       probe=gradients_by({"gradient that reaches the network": 0}, name="")),
    Exercise("6.2", "one step of the average",
             lambda average, new, decay: decay * average + (1 - decay) * new, {
        "the wrong way round: a decay near 1 keeps almost all of the *average*":
            lambda average, new, decay: (1 - decay) * average + decay * new,
        "the new weights must count 1 - decay, or the average grows without bound":
            lambda average, new, decay: decay * average + new,
        "this is the new value alone: nothing is averaged": lambda average, new, decay: new,
    }, inputs=lambda: [(*torch.randn(2, *shape), decay)
                       for decay, shape in ((0.9, (2,)), (0.5, (1, 3, 2)))], in_place=True),
    Exercise("6.3", "the whole loss of the generator", total_loss, {
        "a sum over pixels and batch where a mean belongs: lambda_reg is then far too small":
            partial(total_loss, reduction="sum"),
        "the factor 1/2 is missing: a square brings a 2": partial(total_loss, half=1),
        "the sign is wrong: this climbs the KL divergence instead of descending it":
            lambda x, gradient, *a: total_loss(x, -gradient, *a),
        "no gradient reaches x: the matching term is missing, or x cancels in it, as its target, "
        "and it alone, must be detached":
            partial(total_loss, stop=torch.clone),
        "lambda_reg multiplies the wrong term: it belongs to the anchor":
            lambda *a: a[4] * total_loss(*a[:4], 1 / a[4]),
    }, inputs=lambda: [(*(torch.randn(n, *shape).double() for n in (b, b, 3, 3)), lam)
                       for lam, b, shape in ((0.25, 5, (1, 4, 4)), (1.5, 1, (2,)))], probe=_slopes),
    Exercise("6.4", "what an iteration costs", forward_equivalents, {
        "the anchor is missing: the generator also runs, forward and backward, on z_ref":
            partial(forward_equivalents, generator=3),
        "the two scores are made without gradient: they cost a forward each, not three":
            partial(forward_equivalents, scores=6),
        "further critic steps need fresh images: a generator forward each":
            lambda critic_steps: 6 + 2 + 3 * critic_steps,
        "the first critic step reuses the images that are there: no forward for it":
            lambda critic_steps: 6 + 2 + 4 * critic_steps,
    }, inputs=lambda: [(1,), (2,), (5,)]),
]  # fmt: skip

"""Distribution matching distillation: the gradient, its loss, the critic, one iteration.

Read from top to bottom. Nothing here knows of images, files or devices: a point in the plane with
an exact mixture for a teacher and an image with a U-Net for one go through the same lines. The
form is variance-exploding (alpha = 1), so ``x_noisy = x + sigma * noise``. Equation numbers are
those of Yin et al. 2024, "One-step Diffusion with Distribution Matching Distillation" (DMD).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_

from dmd_tutorial.checks import check_finite, check_same_shape, check_sigma, expand
from dmd_tutorial.denoisers import Denoiser, denoising_loss
from dmd_tutorial.noise import add_noise, dmd_sigma, grid_sigma, karras_grid

SMALLEST_ERROR = 1e-6  # guards Eq. 8 where the teacher's error is 0; the paper has no guard


class Weighting(StrEnum):
    """How strongly each noise level speaks: w_t of Eq. 7."""

    EQ8 = "eq8"  #     sigma^2 / mean|x - D_real|: the paper's; about the same size at every level
    SIGMA = "sigma"  #   sigma: DreamFusion's; low levels outweigh all others
    SIGMA3 = "sigma3"  # sigma^3: ProlificDreamer's; high levels outweigh all others
    NONE = "none"  #   sigma^2: Eq. 8 without its normaliser, the bare difference of denoisers


WeightFunction = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, sigma, denoised_real) -> w_t


def weight(
    weighting: Weighting | WeightFunction,
    x: Float[Tensor, "batch *shape"],
    sigma: Float[Tensor, " batch"],
    denoised_real: Float[Tensor, "batch *shape"],
) -> Float[Tensor, " batch"]:
    """The weight w_t of each sample.

    Args:
        weighting: One of `Weighting`, or a function of the other three arguments.
        x: The generator's clean output, (batch, *shape).
        sigma: Noise levels, (batch,), in the units of x.
        denoised_real: The teacher's denoised estimate of the noised x, (batch, *shape).

    Returns:
        Weights, (batch,).

    Source: DMD, Eq. 8 and Table 2, with alpha = 1. ``C S / ||.||_1`` is one over the mean.
    """
    if weighting is Weighting.EQ8:
        error = (x - denoised_real).abs().flatten(1).mean(dim=1)
        return sigma**2 / error.clamp_min(SMALLEST_ERROR)
    if weighting is Weighting.SIGMA:
        return sigma
    if weighting is Weighting.SIGMA3:
        return sigma**3
    if weighting is Weighting.NONE:
        return sigma**2
    return weighting(x, sigma, denoised_real)


def matching_gradient(
    x: Float[Tensor, "batch *shape"],
    sigma: Float[Tensor, " batch"],
    denoised_real: Float[Tensor, "batch *shape"],
    denoised_fake: Float[Tensor, "batch *shape"],
    weighting: Weighting | WeightFunction = Weighting.EQ8,
) -> Float[Tensor, "batch *shape"]:
    """The distribution-matching gradient at each sample: ``w_t (s_fake - s_real)``.

    Both scores are ``(denoised - x_noisy) / sigma^2`` (Eq. 4, 5), so x_noisy cancels. Descending
    it moves samples along ``s_real - s_fake``: towards the real density, away from the fake one.

    Args:
        x: The generator's clean output, (batch, *shape).
        sigma: Noise levels, (batch,), above 0.
        denoised_real: The teacher's estimate of the noised x, (batch, *shape).
        denoised_fake: The critic's, (batch, *shape).
        weighting: See `weight`.

    Returns:
        What Eq. 7 multiplies with dG/dtheta, (batch, *shape), without gradient history.

    Raises:
        ValueError: If shapes differ, or a denoised estimate is not finite.
    """
    check_same_shape(x=x, denoised_real=denoised_real, denoised_fake=denoised_fake)
    check_sigma(x, sigma)
    check_finite(denoised_real=denoised_real, denoised_fake=denoised_fake)
    with torch.no_grad():
        scale = weight(weighting, x, sigma, denoised_real) / sigma**2
        return expand(scale, x) * (denoised_fake - denoised_real)


def matching_loss(
    x: Float[Tensor, "batch *shape"], gradient: Float[Tensor, "batch *shape"]
) -> Float[Tensor, ""]:
    """A loss whose gradient with respect to x is the given one, over the number of values.

    ``0.5 mean((x - stopgrad(x - gradient))^2)``. Its value says nothing; its derivative is all.

    Args:
        x: The generator's output, (batch, *shape), with gradient history.
        gradient: `matching_gradient` there, (batch, *shape).

    Returns:
        A scalar. It is a *mean* because lambda_reg is calibrated to that (DMD, appendix).

    Raises:
        ValueError: If shapes differ.
    """
    check_same_shape(x=x, gradient=gradient)
    return 0.5 * functional.mse_loss(x, (x - gradient).detach())


def critic_loss(
    critic: Denoiser,
    x: Float[Tensor, "batch *shape"],
    sigma: Float[Tensor, " batch"],
    noise: Float[Tensor, "batch *shape"],
    label: Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, ""]:
    """The critic's loss: plain denoising of the generator's samples, which count as data.

    Args:
        critic: The fake denoiser.
        x: The generator's output, (batch, *shape); no gradient reaches the generator.
        sigma: Noise levels, (batch,), from the whole grid.
        noise: Standard normal noise, (batch, *shape).
        label: The labels that made x, (batch,), or None.

    Returns:
        The loss, a scalar, with EDM's weight.

    Source: DMD, Eq. 6.
    """
    return denoising_loss(critic, x.detach(), sigma, noise, label)


def zero_score(x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
    """The denoiser of a flat density, whose score is 0: as critic it leaves the real score alone."""
    return x


@dataclass(frozen=True)
class Objective:
    """What one iteration optimises.

    Attributes:
        weighting: w_t of Eq. 7.
        matching: Whether the distribution-matching loss counts at all.
        lambda_reg: Weight of the regression anchor; 0 leaves it out.
        distance: The anchor's distance of two batches, a scalar (Eq. 9).
        critic_steps: Critic updates per generator update; 0 freezes the critic.
        clip: Largest L2 norm of each network's gradient.
        grid: Ascending noise levels, (bins,).
    """

    weighting: Weighting | WeightFunction = Weighting.EQ8
    matching: bool = True
    lambda_reg: float = 0.25
    distance: Callable[[Tensor, Tensor], Tensor] = functional.mse_loss
    critic_steps: int = 1
    clip: float = 10.0
    grid: Tensor = field(default_factory=karras_grid, repr=False)


class Batch(NamedTuple):
    """What one iteration consumes: noise, and pairs of the anchor if there are any."""

    z: Float[Tensor, "batch *shape"]
    label: Int[Tensor, " batch"] | None = None
    z_ref: Float[Tensor, "pairs *shape"] | None = None
    y_ref: Float[Tensor, "pairs *shape"] | None = None
    label_ref: Int[Tensor, " pairs"] | None = None


class Record(NamedTuple):
    """What one iteration did; tensors carry no gradient history.

    Attributes:
        x: The generator's samples before the update, (batch, *shape).
        sigma: The noise levels at which they were judged, (batch,).
        denoised_real: The teacher's estimates, (batch, *shape), or None without matching.
        denoised_fake: The critic's.
        loss_matching: Value of the matching loss; says nothing by itself.
        loss_anchor: The anchor's distance, before lambda_reg.
        loss_critic: The critic's loss, mean over its updates.
        norm_generator: L2 norm of the generator's gradient before clipping.
        norm_critic: The same of the critic, last update.
    """

    x: Tensor
    sigma: Tensor | None = None
    denoised_real: Tensor | None = None
    denoised_fake: Tensor | None = None
    loss_matching: float = 0.0
    loss_anchor: float = 0.0
    loss_critic: float = 0.0
    norm_generator: float = 0.0
    norm_critic: float = 0.0


def iteration(
    generator: nn.Module,
    critic: Denoiser,
    teacher: Denoiser,
    generator_optimizer: torch.optim.Optimizer,
    critic_optimizer: torch.optim.Optimizer | None,
    batch: Batch,
    objective: Objective,
    rng: Generator | None = None,
) -> Record:
    """One iteration of DMD: a generator update, then critic updates on the same samples.

    Args:
        generator: The student, ``x = generator(z, label)``, in training.
        critic: The fake denoiser, in training unless `critic_steps` is 0.
        teacher: The real denoiser, frozen.
        generator_optimizer: Holds the generator's parameters.
        critic_optimizer: Holds the critic's; None where there is nothing to train.
        batch: Noise, labels and pairs.
        objective: Weighting, anchor, clipping.
        rng: Source of noise and noise levels; torch's own without one.

    Returns:
        What was done.

    Raises:
        ValueError: If an anchor is asked for without pairs, or an output is not finite.

    Source: DMD, Algorithm 1.
    """
    if objective.lambda_reg and batch.y_ref is None:
        raise ValueError(f"lambda_reg is {objective.lambda_reg}, but the batch has no pairs")
    # generator and anchor in one call: networks are faster on one large batch than on two
    x, x_ref = _generate(generator, batch, anchored=objective.lambda_reg > 0)
    check_finite(**{"the generator's output": x})
    loss, record = x.new_zeros(()), Record(x.detach())
    if objective.matching:
        sigma = dmd_sigma(len(x), objective.grid, rng).to(x)
        with torch.no_grad():  # the scores are targets: no gradient runs through either network
            x_noisy = add_noise(x, sigma, _noise_like(x, rng))
            denoised_real = teacher(x_noisy, sigma, batch.label)
            denoised_fake = critic(x_noisy, sigma, batch.label)
        gradient = matching_gradient(x, sigma, denoised_real, denoised_fake, objective.weighting)
        loss = matching_loss(x, gradient)
        record = record._replace(
            sigma=sigma, denoised_real=denoised_real, denoised_fake=denoised_fake,
            loss_matching=loss.item(),
        )  # fmt: skip
    if x_ref is not None:
        distance = objective.distance(x_ref, batch.y_ref)
        loss = loss + objective.lambda_reg * distance
        record = record._replace(loss_anchor=distance.item())
    norm = update(generator_optimizer, loss, objective.clip)
    record = record._replace(norm_generator=norm)

    losses = []
    for step in range(objective.critic_steps if objective.matching else 0):
        if step == 0:
            fake, label = x.detach(), batch.label  # the samples just made serve once more
        else:
            fake, label = _fresh_samples(generator, batch, rng)
        sigma = grid_sigma(len(fake), objective.grid, generator=rng).to(fake)
        loss = critic_loss(critic, fake, sigma, _noise_like(fake, rng), label)
        norm = update(critic_optimizer, loss, objective.clip)
        losses.append(loss.item())
        record = record._replace(loss_critic=sum(losses) / len(losses), norm_critic=norm)
    return record


def update(optimizer: torch.optim.Optimizer, loss: Tensor, clip: float) -> float:
    """One optimiser step down a loss, the gradient's norm clipped; returns the norm before."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = clip_grad_norm_(parameters, clip)
    optimizer.step()
    return norm.item()


def _generate(
    generator: nn.Module, batch: Batch, anchored: bool
) -> tuple[Tensor, Tensor | None]:
    if not anchored:
        return generator(batch.z, batch.label), None
    label = None if batch.label is None else torch.cat([batch.label, batch.label_ref])
    both = generator(torch.cat([batch.z, batch.z_ref]), label)
    return both[: len(batch.z)], both[len(batch.z) :]


@torch.no_grad()
def _fresh_samples(
    generator: nn.Module, batch: Batch, rng: Generator | None
) -> tuple[Tensor, Tensor | None]:
    z = _noise_like(batch.z, rng)
    return generator(z, batch.label), batch.label


def _noise_like(x: Tensor, rng: Generator | None) -> Tensor:
    return torch.randn(x.shape, generator=rng).to(x)

"""Distribution matching distillation: the gradient, its loss, the critic, one iteration.

Nothing here knows of images, files or devices: points with an exact mixture for a teacher and
images with a U-Net go through the same lines. alpha = 1; equations are those of DMD (Yin et al.
2024, "One-step Diffusion with Distribution Matching Distillation").
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn
from torch.nn import functional

from dmd_tutorial.checks import check_finite, check_same_shape, check_sigma, expand
from dmd_tutorial.denoisers import Denoiser, denoising_loss, zero_score  # noqa: F401
from dmd_tutorial.noise import add_noise, dmd_sigma, grid_sigma, karras_grid, noise_like


class Weighting(StrEnum):
    """How strongly each noise level speaks: w_t of Eq. 7, with alpha = 1 (DMD, Table 2)."""

    EQ8 = "eq8"  # sigma^2 / mean|x - D_real|: the paper's; about the same size at every level
    SIGMA = "sigma"  # sigma: DreamFusion's; low levels outweigh all others
    SIGMA3 = "sigma3"  # sigma^3: DreamFusion's and ProlificDreamer's; high levels outweigh all
    NONE = "none"  # sigma^2: Eq. 8 without its normaliser, the bare difference of denoisers


WeightFunction = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, sigma, denoised_real) -> w_t


def weight(
    weighting: Weighting | WeightFunction,
    x: Float[Tensor, "batch *shape"],
    sigma: Float[Tensor, " batch"],
    denoised_real: Float[Tensor, "batch *shape"],
) -> Float[Tensor, " batch"]:
    """The weight w_t of each sample (DMD, Eq. 8; ``C S / ||.||_1`` is one over the mean).

    Args:
        weighting: One of `Weighting`, or a function of the other arguments.
        x: The generator's clean output, (batch, *shape).
        sigma: Noise levels, (batch,), in the units of x.
        denoised_real: The teacher's estimate of the noised x, (batch, *shape).

    Returns:
        Weights, (batch,).
    """
    if weighting is Weighting.EQ8:
        error = (x - denoised_real).abs().flatten(1).mean(dim=1)
        return sigma**2 / error.clamp_min(1e-6)  # the paper has no guard against error 0
    if isinstance(weighting, Weighting):
        return sigma ** {Weighting.SIGMA: 1, Weighting.NONE: 2, Weighting.SIGMA3: 3}[weighting]
    return weighting(x, sigma, denoised_real)


def matching_gradient(
    x: Float[Tensor, "batch *shape"],
    sigma: Float[Tensor, " batch"],
    denoised_real: Float[Tensor, "batch *shape"],
    denoised_fake: Float[Tensor, "batch *shape"],
    weighting: Weighting | WeightFunction = Weighting.EQ8,
) -> Float[Tensor, "batch *shape"]:
    """The distribution-matching gradient at each sample: ``w_t (s_fake - s_real)``.

    Both scores are ``(denoised - x_noisy) / sigma^2`` (DMD, Eq. 4, 5): x_noisy cancels. Descent
    moves samples along s_real - s_fake, towards the real density and away from the fake one.

    Args:
        x: The generator's clean output, (batch, *shape).
        sigma: Noise levels, (batch,), above 0.
        denoised_real: The teacher's estimate of the noised x, (batch, *shape).
        denoised_fake: The critic's, (batch, *shape).
        weighting: See `weight`.

    Returns:
        What DMD's Eq. 7 multiplies with dG/dtheta, (batch, *shape), without gradient history.

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
    """A loss whose derivative by x is the given gradient over the number of values in it.

    Its value says nothing. It is a mean because lambda_reg is calibrated to that (DMD, appendix).

    Args:
        x: The generator's output, (batch, *shape), with gradient history.
        gradient: `matching_gradient` there, (batch, *shape).

    Returns:
        A scalar.

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
    """The critic's loss: denoising, EDM's weight, with detached samples for data (DMD, Eq. 6)."""
    return denoising_loss(critic, x.detach(), sigma, noise, label)


@dataclass(frozen=True)
class Objective:
    """What an iteration optimises: L = matching + lambda_reg * distance(G(z_ref), y_ref)."""

    weighting: Weighting | WeightFunction = Weighting.EQ8
    matching: bool = True  # False: regression alone
    lambda_reg: float = 0.25  # 0: no anchor
    distance: Callable[[Tensor, Tensor], Tensor] = functional.mse_loss  # Eq. 9
    critic_steps: int = 1  # critic updates per generator update; 0 freezes the critic
    clip: float = 10.0  # largest L2 norm of each network's gradient
    grid: Tensor = field(default_factory=karras_grid, repr=False)  # noise levels, ascending


class Batch(NamedTuple):
    """What an iteration consumes: noise (batch, *shape), and the anchor's pairs if it has any."""

    z: Tensor
    label: Tensor | None = None
    z_ref: Tensor | None = None
    y_ref: Tensor | None = None
    label_ref: Tensor | None = None
    sigma: Tensor | None = None  # levels (batch,) at which x is judged; drawn if None
    noise: Tensor | None = None  # the noise there, (batch, *shape); drawn if None


class Record(NamedTuple):
    """What an iteration did; the tensors, (batch, *shape), carry no gradient history."""

    x: Tensor  # G(z) before the update; G(z_ref) without matching
    sigma: Tensor | None = None  # the levels at which they were judged; None without matching
    denoised_real: Tensor | None = None
    denoised_fake: Tensor | None = None
    loss_matching: float = 0.0  # says nothing by itself
    loss_anchor: float = 0.0  # before lambda_reg
    loss_critic: float = 0.0  # mean over the critic's updates
    norm_generator: float = 0.0  # of the gradient, before clipping
    norm_critic: float = 0.0  # the same, last update


def generator_loss(
    generator: nn.Module, critic: Denoiser, teacher: Denoiser,
    batch: Batch, objective: Objective, rng: Generator | None = None,
) -> tuple[Float[Tensor, ""], Record]:  # fmt: skip
    """The generator's loss and what went into it; arguments as in `iteration`."""
    x, x_ref = _generate(generator, batch, objective)
    check_finite(**{"the generator's output": x})
    loss, record = x.new_zeros(()), Record(x.detach())
    if objective.matching:
        sigma = dmd_sigma(len(x), objective.grid, rng).to(x) if batch.sigma is None else batch.sigma
        noise = noise_like(x, rng) if batch.noise is None else batch.noise
        with torch.no_grad():  # the scores are targets: no gradient runs through either network
            x_noisy = add_noise(x, sigma, noise)
            real, fake = (D(x_noisy, sigma, batch.label) for D in (teacher, critic))
        loss = matching_loss(x, matching_gradient(x, sigma, real, fake, objective.weighting))
        record = Record(x.detach(), sigma, real, fake, loss_matching=loss.item())
    if objective.lambda_reg:
        distance = objective.distance(x_ref, batch.y_ref)  # type: ignore[arg-type]
        loss = loss + objective.lambda_reg * distance
        record = record._replace(loss_anchor=distance.item())
    return loss, record


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
    """One iteration (DMD, Algorithm 1): update the generator, then the critic on the same samples.

    Args:
        generator: The student, ``x = generator(z, label)``.
        critic: The fake denoiser, in training unless `critic_steps` is 0.
        teacher: The real denoiser, frozen.
        generator_optimizer: Holds the generator's parameters.
        critic_optimizer: The critic's; None where it is not trained.
        batch: Noise, labels and pairs.
        objective: What to optimise.
        rng: Source of noise and noise levels; torch's own without one.

    Returns:
        What was done.

    Raises:
        ValueError: If the anchor has no pairs, or an output is not finite.
    """
    if objective.lambda_reg and batch.y_ref is None:
        raise ValueError(f"lambda_reg is {objective.lambda_reg}, but the batch has no pairs")
    loss, record = generator_loss(generator, critic, teacher, batch, objective, rng)
    record = record._replace(norm_generator=update(generator_optimizer, loss, objective.clip))

    for step in range(objective.critic_steps if objective.matching else 0):
        with torch.no_grad():  # the first update reuses the samples; more of them see fresh ones
            x = generator(noise_like(batch.z, rng), batch.label) if step > 0 else record.x
        sigma = grid_sigma(len(x), objective.grid, generator=rng).to(x)
        loss = critic_loss(critic, x, sigma, noise_like(x, rng), batch.label)
        record = record._replace(
            loss_critic=record.loss_critic + loss.item() / objective.critic_steps,
            norm_critic=update(critic_optimizer, loss, objective.clip),  # type: ignore[arg-type]
        )
    return record


def update(optimizer: torch.optim.Optimizer, loss: Tensor, clip: float) -> float:
    """One optimiser step down a loss, the gradient's norm clipped; returns the norm before."""
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], clip)
    optimizer.step()
    return norm.item()


def _generate(generator: nn.Module, batch: Batch, objective: Objective) -> tuple[Tensor, Tensor]:
    """G(z) and G(z_ref), what is needed of them in one call: a large batch is faster than two."""
    if not objective.lambda_reg:
        return generator(batch.z, batch.label), batch.z[:0]
    if not objective.matching:
        return (generator(batch.z_ref, batch.label_ref),) * 2
    label = None if batch.label is None else torch.cat([batch.label, batch.label_ref])  # type: ignore[list-item]
    both = generator(torch.cat([batch.z, batch.z_ref]), label)  # type: ignore[list-item]
    return both[: len(batch.z)], both[len(batch.z) :]

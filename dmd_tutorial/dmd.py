"""Distribution matching distillation: the gradient, its loss, the critic, one iteration.

Nothing here knows of images, files or devices: points with an exact mixture for a teacher and
images with a U-Net go through the same lines. alpha = 1; equations are those of DMD (Yin et al.
2024, "One-step Diffusion with Distribution Matching Distillation").
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from dmd_tutorial.checks import (
    Condition,
    Number,
    PerSample,
    Samples,
    asked_once,
    check_finite,
    check_same_shape,
    check_sigma,
    expand,
    step_unless_refused,
)
from dmd_tutorial.denoisers import Denoiser, denoising_loss, exact, zero_score  # noqa: F401
from dmd_tutorial.noise import add_noise, dmd_sigma, grid_sigma, karras_grid, noise_like


class Weighting(StrEnum):
    """How strongly each noise level speaks: w_t of Eq. 7, with alpha = 1 (DMD, Table 2)."""

    EQ8 = "eq8"  # sigma^2 / mean|x - D_real|: the paper's; about the same size at every level
    SIGMA = "sigma"  # sigma: DreamFusion's; low levels outweigh all others
    SIGMA3 = "sigma3"  # sigma^3: DreamFusion's and ProlificDreamer's; high levels outweigh all
    NONE = "none"  # sigma^2: Eq. 8 without its normaliser, the bare difference of denoisers


WeightFunction = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, sigma, denoised_real) -> w_t


def weight(
    weighting: Weighting | str | WeightFunction, x: Samples, sigma: PerSample,
    denoised_real: Samples,
) -> PerSample:  # fmt: skip
    """The weight w_t of each clean x, by name or by a function of the other arguments.

    Eq. 8 divides by the norm of the teacher's error; ``C S / ||.||_1`` is one over its mean.
    """
    if callable(weighting):
        return weighting(x, sigma, denoised_real)
    weighting, (x, sigma, denoised_real) = Weighting(weighting), exact(x, sigma, denoised_real)
    if weighting is Weighting.EQ8:
        error = (x - denoised_real).abs().flatten(1).mean(dim=1)
        return sigma**2 / error.clamp_min(1e-6)  # the paper has no guard against error 0
    return sigma ** {Weighting.SIGMA: 1, Weighting.NONE: 2, Weighting.SIGMA3: 3}[weighting]


@torch.no_grad()
def matching_gradient(
    x: Samples, sigma: PerSample, denoised_real: Samples, denoised_fake: Samples,
    weighting: Weighting | str | WeightFunction = Weighting.EQ8,
) -> Samples:  # fmt: skip
    """What Eq. 7 multiplies with dG/dtheta: ``w_t (s_fake - s_real)``, without gradient history.

    x is the generator's clean output; teacher and critic denoised it with noise of level sigma,
    above 0. Both scores are ``(denoised - x_noisy) / sigma^2`` (Eq. 4, 5): x_noisy cancels.
    Descent moves samples along s_real - s_fake, to the real density and away from the fake one.
    """
    check_same_shape(x=x, denoised_real=denoised_real, denoised_fake=denoised_fake)
    check_sigma(x, sigma, above_zero=True)
    check_finite(denoised_real=denoised_real, denoised_fake=denoised_fake)
    own, level, real, fake = exact(x, sigma, denoised_real, denoised_fake)
    scale = weight(weighting, own, level, real) / level**2
    return (expand(scale, x) * (fake - real)).to(torch.result_type(x, denoised_fake))


def matching_loss(x: Samples, gradient: Samples) -> Float[Tensor, ""]:
    """A loss whose value says nothing and whose derivative by x is the gradient over its size."""
    check_same_shape(x=x, gradient=gradient)
    own, step = exact(x, gradient)  # in 16 bits x would swallow a small step
    # a mean, for lambda_reg is calibrated to that (DMD, appendix)
    return 0.5 * functional.mse_loss(own, (own - step).detach())


def critic_loss(
    critic: Denoiser, x: Samples, sigma: PerSample, noise: Samples, label: Condition | None = None
) -> Float[Tensor, ""]:
    """The critic's loss: denoising, EDM's weight, with detached samples for data (DMD, Eq. 6)."""
    return denoising_loss(critic, x.detach(), sigma, noise, label)


@dataclass(frozen=True)
class Objective:
    """What an iteration optimises: L = matching + lambda_reg * distance(G(z_ref), y_ref)."""

    weighting: Weighting | str | WeightFunction = Weighting.EQ8
    matching: bool = True  # False: regression alone
    lambda_reg: float = 0.25  # 0: no anchor
    distance: Callable[[Tensor, Tensor], Tensor] = functional.mse_loss  # Eq. 9
    critic_steps: int = 1  # critic updates per generator update; 0 freezes the critic
    clip: float = 10.0  # largest L2 norm of each network's gradient
    grid: Tensor = field(default_factory=karras_grid, repr=False)  # noise levels, ascending


class Batch(NamedTuple):
    """What an iteration consumes: noise (batch, *shape), and the anchor's pairs if it has any."""

    z: Tensor
    label: Condition | None = None
    z_ref: Tensor | None = None
    y_ref: Tensor | None = None
    label_ref: Condition | None = None
    sigma: Tensor | Any = None  # levels (batch,) at which x is judged; drawn if None
    noise: Tensor | Any = None  # the noise there, in the shape of x; drawn like z if None
    x: Tensor | None = None  # G(z), where it was made before (a critic's first update)


class Record(NamedTuple):
    """What an iteration did; the tensors, (batch, *shape), carry no gradient history."""

    x: Tensor  # G(z) before the update; G(z_ref) without matching
    sigma: Tensor | None = None  # the levels at which they were judged; None without matching
    denoised_real: Tensor | None = None
    denoised_fake: Tensor | None = None
    loss_matching: Number = 0.0  # says nothing by itself
    loss_anchor: Number = 0.0  # before lambda_reg
    loss_critic: Number = 0.0  # mean over the critic's updates
    norm_generator: Number = 0.0  # of the gradient, before clipping
    norm_critic: Number = 0.0  # the same, last update


def generator_loss(
    generator: nn.Module, critic: Denoiser, teacher: Denoiser, batch: Batch, objective: Objective
) -> tuple[Float[Tensor, ""], Record]:
    """The loss of a batch with its levels and noise, see `iteration`, and what went into it."""
    loss, record = batch.z.new_zeros(()), Record(batch.z[:0])
    if objective.matching:
        x = generator(batch.z, batch.label)
        check_finite(**{"the generator's output": x})
        check_same_shape(x=x, noise=batch.noise)
        with torch.no_grad():  # the scores are targets: no gradient runs through either network
            x_noisy = add_noise(x, batch.sigma, batch.noise)
            real, fake = (D(x_noisy, batch.sigma, batch.label) for D in (teacher, critic))
        gradient = matching_gradient(x, batch.sigma, real, fake, objective.weighting)
        loss = matching_loss(x, gradient)
        record = Record(x.detach(), batch.sigma, real, fake, loss_matching=loss.detach())
    if objective.lambda_reg:
        x_ref = generator(batch.z_ref, batch.label_ref)
        check_finite(**{"the generator's output": x_ref})
        distance = objective.distance(*exact(x_ref, batch.y_ref))  # type: ignore[arg-type]
        loss = loss + objective.lambda_reg * distance
        x = record.x if objective.matching else x_ref.detach()
        record = record._replace(x=x, loss_anchor=distance.detach())
    return loss, record


def update(optimizer: Optimizer, loss: Tensor, clip: float) -> Float[Tensor, ""]:
    """One optimiser step down a loss, the gradient's norm clipped; returns the norm before."""
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], clip)
    check_finite(**{"the loss": loss, "the gradient's norm": norm})
    step_unless_refused(optimizer)
    torch.clear_autocast_cache()  # an outer autocast would go on with the old weights
    return norm


Loss = Callable[[Batch], tuple[Tensor, Record]]
# Steps down a batch's loss. Another one than `update_whole` may cut the batch, or share it out.
Updater = Callable[[Optimizer, Loss, Batch, float], tuple[Record, Tensor]]


def update_whole(
    optimizer: Optimizer, loss: Loss, batch: Batch, clip: float
) -> tuple[Record, Tensor]:
    """`update` by the loss of a whole batch."""
    value, record = loss(batch)
    return record, update(optimizer, value, clip)


@asked_once  # losses and norms, too, are tensors until its end: a GPU never waits within it
def iteration(
    generator: nn.Module, critic: Denoiser, teacher: Denoiser,
    generator_optimizer: Optimizer, critic_optimizer: Optimizer | None,
    batch: Batch, objective: Objective, rng: Generator | None = None,
    updater: Updater = update_whole,
) -> Record:  # fmt: skip
    """One iteration (DMD, Algorithm 1): update the generator, then the critic on the same samples.

    The generator is called as ``x = generator(z, label)``; the teacher is frozen. What the batch
    lacks of levels and noise is drawn from rng, torch's own without one.
    """
    _check(batch, objective, critic_optimizer)  # before anything is updated
    if objective.matching:
        batch = judged(batch, objective.grid, rng)
    loss = partial(generator_loss, generator, critic, teacher, objective=objective)
    record, norm = updater(generator_optimizer, loss, batch, objective.clip)
    record = record._replace(norm_generator=norm)
    if not objective.matching:
        return record
    return train_critic(generator, critic, critic_optimizer, batch, objective, record, rng, updater)


def train_critic(
    generator: nn.Module, critic: Denoiser, optimizer: Optimizer | None,
    batch: Batch, objective: Objective, record: Record, rng: Generator | None = None,
    updater: Updater = update_whole,
) -> Record:  # fmt: skip
    """The critic's updates by its loss: on the record's samples, then on fresh."""

    def of_batch(part: Batch) -> tuple[Tensor, Record]:
        with torch.no_grad():
            x = generator(part.z, part.label) if part.x is None else part.x
        value = critic_loss(critic, x, part.sigma, part.noise, part.label)
        return value, Record(x, loss_critic=value.detach())

    for step in range(objective.critic_steps):
        z, x = (noise_like(batch.z, rng), None) if step > 0 else (batch.z, record.x)
        sigma = grid_sigma(len(z), objective.grid, rng=rng).to(z)
        noise = noise_like(z if batch.noise is None else batch.noise, rng)
        samples = Batch(z, batch.label, sigma=sigma, noise=noise, x=x)
        done, norm = updater(optimizer, of_batch, samples, objective.clip)  # type: ignore[arg-type]
        mean = record.loss_critic + done.loss_critic / objective.critic_steps
        record = record._replace(loss_critic=mean, norm_critic=norm)
    return record


def judged(batch: Batch, grid: Float[Tensor, " bins"], rng: Generator | None = None) -> Batch:
    """The batch with levels and noise at which its samples are judged, drawn where it has none."""
    sigma = dmd_sigma(len(batch.z), grid, rng).to(batch.z) if batch.sigma is None else batch.sigma
    noise = noise_like(batch.z, rng) if batch.noise is None else batch.noise
    return batch._replace(sigma=sigma, noise=noise)


def _check(batch: Batch, objective: Objective, critic_optimizer: Optimizer | None) -> None:
    if objective.lambda_reg and batch.y_ref is None:
        raise ValueError(f"lambda_reg is {objective.lambda_reg}, but the batch has no pairs")
    if objective.matching and objective.critic_steps and critic_optimizer is None:
        raise ValueError(f"{objective.critic_steps} critic steps are asked for without optimizer")
    both = objective.matching and objective.lambda_reg
    if both and (batch.label is None) != (batch.label_ref is None):
        raise ValueError("samples and pairs must both have labels, or neither: one has None")

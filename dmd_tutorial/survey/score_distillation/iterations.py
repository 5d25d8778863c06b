"""One iteration of each method: the generator's update, then those of its critic."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from dmd_tutorial import dmd
from dmd_tutorial.denoisers import Denoiser
from dmd_tutorial.dmd import Batch, Objective, Record
from dmd_tutorial.noise import add_noise, dmd_sigma, grid_sigma, noise_like
from dmd_tutorial.survey.classical import gan
from dmd_tutorial.survey.score_distillation.critics import known_noise
from dmd_tutorial.survey.score_distillation.identity import sid_loss


class Trio(NamedTuple):
    """The three networks of a distillation, the optimisers of two of them, random numbers."""

    generator: nn.Module
    critic: nn.Module
    teacher: Denoiser
    generator_optimizer: torch.optim.Optimizer
    critic_optimizer: torch.optim.Optimizer | None
    rng: Generator


# One iteration: the networks, what it consumes, what it optimises -> what was done.
Step = Callable[[Trio, Batch, Objective], Record]


def point_step(trio: Trio, batch: Batch, objective: Objective) -> Record:
    """SDS (Poole et al. 2022, Eq. 3): the sample itself is the critic, no network is."""
    noise = noise_like(batch.z, trio.rng)
    networks = trio.generator, known_noise(noise), trio.teacher
    optimizers = trio.generator_optimizer, None
    batch, objective = batch._replace(noise=noise), replace(objective, critic_steps=0)
    return dmd.iteration(*networks, *optimizers, batch, objective, trio.rng)


def matching_step(trio: Trio, batch: Batch, objective: Objective) -> Record:
    """VSD, Diff-Instruct, DMD and DMD2 without its head: `dmd.iteration` as it is.

    Source: Wang et al. 2023, Luo et al. 2023 and Yin et al. 2024, Algorithm 1 of each.
    """
    return dmd.iteration(*trio[:5], batch, objective, trio.rng)


def adversarial_step(
    trio: Trio, batch: Batch, objective: Objective, fooling: float, discrimination: float
) -> Record:
    """DMD2: distribution matching, and a critic that also tells noised data from samples.

    Args:
        trio: The networks; the critic is a `Judge`.
        batch: Noise and labels; data and its labels as y_ref and label_ref.
        objective: Weight, noise law, critic steps.
        fooling: Weight of the generator's adversarial loss.
        discrimination: Weight of the head's loss.

    Returns:
        What was done.

    Raises:
        ValueError: If the batch has no data.

    Source: Yin et al. 2024 (DMD2), Sections 4.2 and 4.3, Eq. 4.
    """
    if batch.y_ref is None:
        raise ValueError("an adversarial loss needs data, the batch has none")
    judge, rng = trio.critic, trio.rng
    x = trio.generator(batch.z, batch.label)
    loss, record = dmd.generator_loss(
        lambda z, label: x,  # type: ignore[arg-type]  # one pass of the generator for both losses
        judge, trio.teacher, batch, objective, rng,
    )  # fmt: skip
    sigma = dmd_sigma(len(x), objective.grid, rng).to(x)
    judge(add_noise(x, sigma, noise_like(x, rng)), sigma, batch.label)
    loss = loss + fooling * gan.generator_loss(judge.logit())  # type: ignore[operator]
    norm = dmd.update(trio.generator_optimizer, loss, objective.clip)

    def head_loss(sigma: Tensor) -> Tensor:
        fake = judge.logit()  # type: ignore[operator]
        y_noisy = add_noise(batch.y_ref, sigma, noise_like(batch.y_ref, rng))  # type: ignore[arg-type]
        judge(y_noisy, sigma, batch.label_ref)
        return discrimination * gan.discriminator_loss(judge.logit(), fake)  # type: ignore[operator]

    return _train_critic(trio, batch, objective, record._replace(norm_generator=norm), head_loss)


def sid_step(trio: Trio, batch: Batch, objective: Objective, alpha: float) -> Record:
    """SiD: the generator's gradient runs through both denoisers; the critic trains as ever.

    Args:
        trio: The networks.
        batch: Noise and labels.
        objective: Weight, noise law, critic steps.
        alpha: See `sid_loss`.

    Returns:
        What was done.

    Source: Zhou et al. 2024 (SiD), Algorithm 1.
    """
    rng = trio.rng
    x = trio.generator(batch.z, batch.label)
    sigma = dmd_sigma(len(x), objective.grid, rng).to(x)
    x_noisy = add_noise(x, sigma, noise_like(x, rng))
    real, fake = (D(x_noisy, sigma, batch.label) for D in (trio.teacher, trio.critic))
    loss = sid_loss(x, sigma, real, fake, alpha, objective.weighting)
    norm = dmd.update(trio.generator_optimizer, loss, objective.clip)
    answers = x.detach(), sigma, real.detach(), fake.detach()
    record = Record(*answers, loss.item(), norm_generator=norm)
    return _train_critic(trio, batch, objective, record)


def _train_critic(
    trio: Trio,
    batch: Batch,
    objective: Objective,
    record: Record,
    more: Callable[[Tensor], Tensor | float] = lambda sigma: 0.0,
) -> Record:
    """The critic's updates, as in `dmd.iteration`; `more`, of the levels, is added to its loss."""
    for step in range(objective.critic_steps):
        with torch.no_grad():
            fresh = step > 0  # the first update sees the samples of the generator's update
            x = trio.generator(noise_like(batch.z, trio.rng), batch.label) if fresh else record.x
        sigma = grid_sigma(len(x), objective.grid, rng=trio.rng).to(x)
        loss = dmd.critic_loss(trio.critic, x, sigma, noise_like(x, trio.rng), batch.label)
        mean = record.loss_critic + loss.item() / objective.critic_steps
        norm = dmd.update(trio.critic_optimizer, loss + more(sigma), objective.clip)  # type: ignore[arg-type]
        record = record._replace(loss_critic=mean, norm_critic=norm)
    return record

"""One iteration of each method that is not `dmd.iteration` as it is, for `training.distill`."""

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from dmd_tutorial import dmd
from dmd_tutorial.checks import Condition, check_same_shape, expand
from dmd_tutorial.denoisers import Denoiser
from dmd_tutorial.dmd import Batch, Objective, Record, Weighting
from dmd_tutorial.noise import add_noise, dmd_sigma, noise_like
from dmd_tutorial.survey.classical import gan
from dmd_tutorial.survey.score_distillation.critics import Judge, known_noise

Step = Callable[..., Record]  # the arguments of `dmd.iteration`, to rng


def point_step(
    generator: nn.Module, critic: Denoiser, teacher: Denoiser,
    generator_optimizer: Optimizer, critic_optimizer: Optimizer | None,
    batch: Batch, objective: Objective, rng: Generator | None = None,
) -> Record:  # fmt: skip
    """SDS (Poole et al. 2022, Eq. 3): the sample itself is the critic, no network is."""
    noise = noise_like(batch.z, rng)
    networks = generator, known_noise(noise), teacher
    batch, objective = batch._replace(noise=noise), replace(objective, critic_steps=0)
    return dmd.iteration(*networks, generator_optimizer, None, batch, objective, rng)


def adversarial_step(
    generator: nn.Module, critic: Judge, teacher: Denoiser,
    generator_optimizer: Optimizer, critic_optimizer: Optimizer | None,
    batch: Batch, objective: Objective, rng: Generator | None = None,
    *, fooling: float, discrimination: float,
) -> Record:  # fmt: skip
    """DMD2: distribution matching, and a critic that also tells noised data (y_ref) from samples.

    `fooling` and `discrimination` weigh the generator's adversarial loss and the head's (Eq. 4).
    """
    if batch.y_ref is None:
        raise ValueError("an adversarial loss needs data, the batch has none")
    y: Tensor = batch.y_ref
    x = generator(batch.z, batch.label)
    batch = dmd.judged(batch, objective.grid, rng)
    same = lambda z, label: x  # noqa: E731  # one pass of the generator for both losses
    loss, record = dmd.generator_loss(same, critic, teacher, batch, objective)  # type: ignore[arg-type]
    sigma = dmd_sigma(len(x), objective.grid, rng).to(x)
    critic(add_noise(x, sigma, noise_like(x, rng)), sigma, batch.label)
    loss = loss + fooling * gan.generator_loss(critic.logit())
    norm = dmd.update(generator_optimizer, loss, objective.clip)

    def judging(
        judge: Judge, x: Tensor, sigma: Tensor, noise: Tensor, label: Condition | None
    ) -> Tensor:
        loss = dmd.critic_loss(judge, x, sigma, noise, label)
        fake = judge.logit()
        judge(add_noise(y, sigma, noise_like(y, rng)), sigma, batch.label_ref)
        return loss + discrimination * gan.discriminator_loss(judge.logit(), fake)

    record = record._replace(norm_generator=norm)
    networks = generator, critic, critic_optimizer
    return dmd.train_critic(*networks, batch, objective, record, rng, loss=judging)


def sid_loss(
    x: Float[Tensor, "batch *shape"], sigma: Float[Tensor, " batch"],
    denoised_real: Float[Tensor, "batch *shape"], denoised_fake: Float[Tensor, "batch *shape"],
    alpha: float = 1.0, weighting: Weighting | str | dmd.WeightFunction = Weighting.EQ8,
) -> Float[Tensor, ""]:  # fmt: skip
    """A loss, maybe negative, that descends the Fisher divergence (Zhou et al. 2024, SiD, Eq. 23).

    Gradients run through x and both answers, not through the weight. Above alpha 1 samples much
    wider than the teacher's are driven apart. At 1/2, with the exact critic, it is half of that of
    ``w |D_real - D_fake|^2``, critic's dependence on the generator included.
    """
    check_same_shape(x=x, denoised_real=denoised_real, denoised_fake=denoised_fake)
    with torch.no_grad():
        scale = dmd.weight(weighting, x, sigma, denoised_real) / sigma**2
    difference = denoised_real - denoised_fake
    product = difference * (denoised_real - x - alpha * difference)
    return (expand(scale, x) * product).mean()


def sid_step(
    generator: nn.Module, critic: Denoiser, teacher: Denoiser,
    generator_optimizer: Optimizer, critic_optimizer: Optimizer | None,
    batch: Batch, objective: Objective, rng: Generator | None = None, *, alpha: float,
) -> Record:  # fmt: skip
    """SiD (Zhou et al. 2024, Algorithm 1): the gradient runs through both denoisers, too."""
    x = generator(batch.z, batch.label)
    batch = dmd.judged(batch, objective.grid, rng)
    sigma: Tensor = batch.sigma
    x_noisy = add_noise(x, sigma, batch.noise)
    real, fake = (D(x_noisy, sigma, batch.label) for D in (teacher, critic))
    loss = sid_loss(x, sigma, real, fake, alpha, objective.weighting)
    norm = dmd.update(generator_optimizer, loss, objective.clip)
    answers = x.detach(), sigma, real.detach(), fake.detach()
    record = Record(*answers, loss.item(), norm_generator=norm)
    return dmd.train_critic(generator, critic, critic_optimizer, batch, objective, record, rng)


def with_data(
    step: Step, draw: Callable[[int, Generator | None], tuple[Tensor, Condition | None]]
) -> Step:
    """A step whose batches hold data as y_ref: as much as noise, ``draw(count, rng)``."""

    def iteration(
        generator: nn.Module, critic: Denoiser, teacher: Denoiser,
        generator_optimizer: Optimizer, critic_optimizer: Optimizer | None,
        batch: Batch, objective: Objective, rng: Generator | None = None,
    ) -> Record:  # fmt: skip
        y, label = draw(len(batch.z), rng)
        label = None if label is None else label.to(batch.z.device)
        batch = batch._replace(y_ref=y.to(batch.z), label_ref=label)
        networks, optimizers = (generator, critic, teacher), (generator_optimizer, critic_optimizer)
        return step(*networks, *optimizers, batch, objective, rng)

    return iteration

"""Score distillation, one family: a teacher's answer, somebody else's answer, their difference.

Every member moves a generated sample x against `dmd.matching_gradient`. Members differ in its
weight, in who the critic is, and in the law of noise levels. DMD2 adds a GAN loss; SiD's gradient
also runs through the denoisers. alpha = 1. A law is a grid, ``(sigma_max, sigma_data) -> levels``,
of quantiles, since `dmd` draws its indices uniformly, from 2 % to 98 % for generators. Steps are
those methods' iterations, for `training.distill`, that are not `dmd.iteration` as it is.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from dmd_tutorial import checks, dmd
from dmd_tutorial.checks import Condition, PerSample, Samples, asked_once, check_same_shape, expand
from dmd_tutorial.data import Images
from dmd_tutorial.denoisers import SIGMA_DATA, Denoiser, denoised_from_noise, feature_layers, says
from dmd_tutorial.dmd import Batch, Objective, Record, Weighting
from dmd_tutorial.noise import BINS, add_noise, karras_grid, linear_schedule, noise_like, source
from dmd_tutorial.survey import classical
from dmd_tutorial.training import DistillSettings

Step = Callable[..., Record]  # the arguments of `dmd.iteration`, to rng
Draw = Callable[[int, Generator | None], tuple[Tensor, Condition | None]]  # (count, rng)


def known_noise(noise: Samples) -> Denoiser:
    """The critic of SDS: told the noise in the samples, it answers with the clean samples."""
    return lambda x, sigma, label=None: denoised_from_noise(x, noise, sigma)


class Judge(nn.Module):
    """A critic with a second answer: a logit that says whether a noisy sample began as data."""

    def __init__(self, critic: nn.Module) -> None:
        super().__init__()
        self.critic, self.sigma_data = critic, says(critic, "sigma_data", SIGMA_DATA)
        inner, width = feature_layers(critic)[-1]  # half-way through (DMD2, 4.3)
        copies = says(critic, "copies", 1)
        inner.register_forward_hook(self._see)
        self._seen: Tensor | None = None
        self.weight = nn.Parameter(torch.zeros(copies, width, 1))  # undecided at first
        self.bias = nn.Parameter(torch.zeros(copies, 1, 1))

    def _see(self, module: nn.Module, inputs: tuple, answer: Tensor) -> None:
        self._seen = answer

    def forward(self, x: Tensor, sigma: Tensor, label: Condition | None = None) -> Tensor:
        return self.critic(x, sigma, label)

    def logit(self) -> PerSample:
        """Log-odds that the samples of the last call began as data."""
        if self._seen is None:
            raise ValueError("the logit belongs to samples: call the critic on them first")
        features = functional.silu(self._seen).to(self.weight)  # the head itself is exact
        if features.ndim == 4:  # (batch, channels, height, width)
            features = features.mean(dim=(2, 3))
        blocks = features.reshape(len(self.weight), -1, features.shape[-1])
        return torch.baddbmm(self.bias, blocks, self.weight).flatten()


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


@asked_once
def adversarial_step(
    generator: nn.Module, critic: Judge, teacher: Denoiser,
    generator_optimizer: Optimizer, critic_optimizer: Optimizer | None,
    batch: Batch, objective: Objective, rng: Generator | None = None,
    updater: dmd.Updater = dmd.update_whole, *, fooling: float, discrimination: float,
) -> Record:  # fmt: skip
    """DMD2: distribution matching, and a critic that also tells data, y_ref, from samples."""
    if batch.y_ref is None:
        raise ValueError("an adversarial loss needs data, the batch has none")
    batch = dmd.judged(batch, objective.grid, rng)
    other = dmd.judged(batch._replace(sigma=None, noise=None), objective.grid, rng)  # the head's
    twice = batch._replace(
        sigma=torch.stack([batch.sigma, other.sigma], 1),
        noise=torch.stack([batch.noise, other.noise], 1),
    )

    def both_losses(part: Batch) -> tuple[Tensor, Record]:
        x = generator(part.z, part.label)
        same: Any = lambda z, label: x  # noqa: E731  # one pass of the generator for both losses
        (sigma, level), (noise, fresh) = part.sigma.unbind(1), part.noise.unbind(1)
        part = part._replace(sigma=sigma, noise=noise)
        loss, record = dmd.generator_loss(same, critic, teacher, part, objective)
        critic(add_noise(x, level, fresh), level, part.label)
        return loss + fooling * classical.generator_loss(critic.logit()), record  # DMD2, Eq. 4

    def judging(optimizer: Optimizer, loss: dmd.Loss, samples: Batch, clip: float) -> tuple:
        def told_apart(part: Batch) -> tuple[Tensor, Record]:
            (denoising, record), fake = loss(part), critic.logit()
            y_noisy = add_noise(part.y_ref, part.sigma, part.z_ref)  # type: ignore[arg-type]
            critic(y_noisy, part.sigma, part.label_ref)
            value = denoising + discrimination * classical.discriminator_loss(critic.logit(), fake)
            return value, record._replace(loss_critic=value.detach())

        beside = samples._replace(  # data, with noise of their own at the samples' levels
            z_ref=noise_like(batch.z, rng), y_ref=batch.y_ref, label_ref=batch.label_ref
        )
        return updater(optimizer, told_apart, beside, clip)

    record, norm = updater(generator_optimizer, both_losses, twice, objective.clip)
    record, networks = record._replace(norm_generator=norm), (generator, critic, critic_optimizer)
    return dmd.train_critic(*networks, batch, objective, record, rng, judging)


def sid_loss(
    x: Samples, sigma: PerSample, denoised_real: Samples, denoised_fake: Samples,
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


@asked_once
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
    record = Record(*answers, loss.detach(), norm_generator=norm)
    return dmd.train_critic(generator, critic, critic_optimizer, batch, objective, record, rng)


def with_data(step: Step, draw: Draw) -> Step:
    """A step whose batches hold data as y_ref: as much as noise."""

    def iteration(*given: Any, **options: Any) -> Record:
        *trained, batch, objective, rng = given
        y, label = draw(len(batch.z), rng)
        label = None if label is None else label.to(batch.z.device)
        batch = batch._replace(y_ref=y.to(batch.z), label_ref=label)
        return step(*trained, batch, objective, rng, **options)

    return iteration


@dataclass(frozen=True)
class Dmd2Settings(DistillSettings):
    """How a student is distilled by DMD2: without pairs, with real images."""

    lambda_reg: checks.NotNegative = 0.0  # Weight of the anchor, which this method does not have.
    # Critic updates per generator update: without an anchor the critic has to be right.
    critic_steps: checks.CountOrNone = 5
    # Weight of the generator's adversarial loss.
    fooling: checks.NotNegative = 3e-3
    # Weight of the adversarial loss of the critic's head.
    discrimination: checks.NotNegative = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lambda_reg:
            raise ValueError(
                f"lambda_reg must be 0 with dmd2, which has no pairs, not {self.lambda_reg}"
            )

    @property
    def beside(self) -> int:
        return self.batch

    def step(self, images: Images, shape: tuple[int, ...], classes: int) -> Step:
        """The iteration, on images like a teacher's, of as many classes, 0 for none."""
        if images.x.shape[1:] != shape:
            found = tuple(images.x.shape[1:])
            raise ValueError(f"the images have shape {found}, the teacher's have {shape}")
        if classes and images.classes != classes:
            raise ValueError(f"the images have {images.classes} classes, the teacher has {classes}")

        def draw(count: int, rng: Generator | None) -> tuple[Tensor, Tensor | None]:
            index = torch.randint(len(images.x), (count,), **source(rng))
            return images.take(index), images.label[index] if classes else None

        step = partial(adversarial_step, fooling=self.fooling, discrimination=self.discrimination)
        return with_data(step, draw)


def dmd2(settings: DistillSettings) -> Dmd2Settings:
    """DMD2 with the settings of a distillation by DMD, but for what the method itself says."""
    own = vars(Dmd2Settings)["__annotations__"]
    return Dmd2Settings(**{name: v for name, v in asdict(settings).items() if name not in own})


def noise_prediction(x: Samples, sigma: PerSample, denoised_real: Samples) -> PerSample:
    """``sigma^3 / (1 + sigma^2)``, of SDS (Poole et al. 2022, Eq. 3) and VSD (Wang 2023, Eq. 9)."""
    # They weight a difference of predicted *noises* with a preserving schedule's variance.
    return sigma**3 / (1 + sigma**2)


def schedule_levels(sigma_max: float, sigma_data: float = SIGMA_DATA) -> Float[Tensor, " bins"]:
    """A variance-preserving schedule's ``sigma / alpha``, even in time (SDS, Section 3; VSD)."""
    alpha, sigma = linear_schedule(torch.linspace(1e-4, 1, 20 * BINS, dtype=torch.float64))
    levels = sigma / alpha
    levels = levels[levels <= sigma_max]
    return levels[torch.linspace(0, len(levels) - 1, BINS).long()]


def teacher_levels(sigma_max: float, sigma_data: float = SIGMA_DATA) -> Float[Tensor, " bins"]:
    """EDM's log-normal law, of median 0.3 for data of width 0.5 (Diff-Instruct, public code)."""
    mean, std = -1.2 + math.log(sigma_data / SIGMA_DATA), 1.2
    below = torch.special.ndtr(torch.tensor((math.log(sigma_max) - mean) / std))
    probability = below.double() * (torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS
    return torch.exp(mean + std * torch.special.ndtri(probability))


def dmd_levels(sigma_max: float, sigma_data: float = SIGMA_DATA) -> Float[Tensor, " bins"]:
    """EDM's sampling grid: DMD, DMD2, and SiD, who stops at 80 % of it."""
    return karras_grid(sigma_max=sigma_max)


IN_WORDS: dict = {  # weights and noise laws, as a table names them
    noise_prediction: r"$\sigma^3 / (1 + \sigma^2)$",
    Weighting.NONE: r"$\sigma^2$",
    Weighting.EQ8: r"$\sigma^2 / \mathrm{mean} \lvert x - D_{real} \rvert$",
    schedule_levels: "times of a variance-preserving schedule",
    teacher_levels: "log-normal, the teacher's own",
    dmd_levels: "Karras grid",
}


@dataclass(frozen=True)
class Member:
    """A member of the family: its weight, critic and noise law."""

    name: str
    weighting: Weighting | dmd.WeightFunction
    law: Callable[[float, float], Tensor]  # (sigma_max, sigma_data) -> levels, drawn uniformly
    critic_steps: int = 1  # critic updates per generator update
    step: Step = dmd.iteration
    lambda_reg: float = 0.0  # weight of the anchor; 0: no pairs
    data: bool = False  # whether real data is needed
    evaluations: int = 1  # steps of its generator

    def objective(self, sigma_max: float, sigma_data: float = SIGMA_DATA) -> Objective:
        return Objective(
            weighting=self.weighting, lambda_reg=self.lambda_reg, critic_steps=self.critic_steps,
            grid=self.law(sigma_max, sigma_data),
        )  # fmt: skip

    def row(self) -> tuple[str, ...]:
        """Name, weight, critic, noise law, data?, pairs?, for a table in Markdown."""
        critic = f"trained, {self.critic_steps} per update" if self.critic_steps else "$x$ itself"
        if self.data:
            critic += ", with a GAN head"
        needs = ("yes" if need else "no" for need in (self.data, self.lambda_reg))
        return self.name, IN_WORDS[self.weighting], critic, IN_WORDS[self.law], *needs


# VSD, Diff-Instruct, DMD, and DMD2 without its head, are `dmd.iteration` as it is (Wang et al.
# 2023, Luo et al. 2023, Yin et al. 2024, Algorithm 1 of each).
GAN_STEP = partial(adversarial_step, fooling=0.03, discrimination=0.1)
FAMILY = (
    Member("SDS", noise_prediction, schedule_levels, 0, point_step),
    Member("VSD", noise_prediction, schedule_levels),
    Member("Diff-Instruct", Weighting.NONE, teacher_levels),
    Member("DMD", Weighting.EQ8, dmd_levels, lambda_reg=1.0),
    Member("DMD without anchor", Weighting.EQ8, dmd_levels),
    Member("DMD2 without GAN", Weighting.EQ8, dmd_levels, 3),
    Member("DMD2", Weighting.EQ8, dmd_levels, 3, GAN_STEP, data=True),
    Member("DMD2, 2 steps", Weighting.EQ8, dmd_levels, 3, GAN_STEP, data=True, evaluations=2),
    Member("DMD2, 4 steps", Weighting.EQ8, dmd_levels, 3, GAN_STEP, data=True, evaluations=4),
    Member("SiD", Weighting.EQ8, dmd_levels, step=partial(sid_step, alpha=1.0)),
)

"""How much louder one noise level is than another under each weighting, on digits.

    python benchmarks/weighting_spread.py     # about half a minute on one core

The student is a copy of the shipped digits teacher, used once and not trained. Its fake score
comes from a critic trained on its samples, and beside that from a Gaussian fitted to each class,
whose denoiser is exact. At 16 noise levels of the generator update the mean length of the pixel
gradient is measured; the figure is the largest over the smallest.

Figures to reach: Eq. 8 below 3; sigma and sigma^3 above 100. Leaves with status 1 if one is missed.
"""

import copy
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from dmd_tutorial import dmd, pretrained
from dmd_tutorial.data import balanced_labels, normal
from dmd_tutorial.denoisers import Denoiser
from dmd_tutorial.dmd import Weighting
from dmd_tutorial.generators import OneStepGenerator
from dmd_tutorial.mixtures import GaussianMixture
from dmd_tutorial.noise import add_noise, grid_sigma, karras_grid

LEVELS = 16
CRITIC_STEPS = 100
SHAPE = (1, 8, 8)
CLASSES = 10


def noise_levels(sigma_max: float = 80.0) -> Tensor:
    """Levels from 2 % to 98 % of the grid, evenly spaced by index."""
    return karras_grid(sigma_max=sigma_max)[torch.linspace(20, 980, LEVELS).round().long()].float()


def samples(student: OneStepGenerator, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Outputs of the student and their classes."""
    label = balanced_labels(count, CLASSES)
    with torch.no_grad():
        return student(normal(count, SHAPE, torch.Generator().manual_seed(seed)), label), label


def trained_critic(teacher: torch.nn.Module, student: OneStepGenerator) -> Denoiser:
    """A copy of the teacher that has learnt to denoise the student's samples."""
    critic = copy.deepcopy(teacher).requires_grad_(True).train()
    optimizer = torch.optim.AdamW(critic.parameters(), lr=4e-4)
    rng = torch.Generator().manual_seed(0)
    for step in range(CRITIC_STEPS):
        x, label = samples(student, 60, seed=10_000 + step)
        sigma = grid_sigma(len(x), karras_grid(), rng=rng)
        noise = torch.randn(x.shape, generator=rng)
        dmd.update(optimizer, dmd.critic_loss(critic, x, sigma, noise, label), clip=10.0)
    return critic.requires_grad_(False).eval()


def fitted_critic(student: OneStepGenerator) -> Denoiser:
    """The exact denoiser of a Gaussian fitted to each class of the student's samples."""
    x, label = samples(student, 4_000, seed=20_000)
    by_class = [x[label == c].flatten(1).double() for c in range(CLASSES)]
    fit = GaussianMixture(
        torch.stack([each.mean(0) for each in by_class]),
        # the small ridge: no direction has exactly zero variance
        torch.stack([torch.cov(each.T) + 1e-6 * torch.eye(each.shape[1]) for each in by_class]),
    )
    return lambda x, sigma, label: fit(x.flatten(1), sigma, label).reshape(x.shape)


def norms_by_level(
    teacher: Denoiser,
    critic: Denoiser,
    student: OneStepGenerator,
    levels: Tensor,
    weightings: Sequence[Weighting | dmd.WeightFunction] = tuple(Weighting),
    count: int = 100,
    seed: int = 0,
) -> Tensor:
    """Mean length of the pixel gradient, (weightings, levels)."""
    x, label = samples(student, count, seed)
    rng = torch.Generator().manual_seed(30_000 + seed)  # noise that does not depend on z
    norms = torch.empty(len(weightings), len(levels))
    for j, level in enumerate(levels):
        sigma = level.expand(count)
        x_noisy = add_noise(x, sigma, torch.randn(x.shape, generator=rng))
        with torch.no_grad():
            real, fake = teacher(x_noisy, sigma, label), critic(x_noisy, sigma, label)
        for i, weighting in enumerate(weightings):
            gradient = dmd.matching_gradient(x, sigma, real, fake, weighting)
            norms[i, j] = gradient.flatten(1).norm(dim=1).mean()
    return norms


def parameter_norms(
    teacher: Denoiser, critic: Denoiser, student: OneStepGenerator, levels: Tensor
) -> Tensor:
    """Length of the gradient by the parameters, for a batch of 100, (weightings, levels)."""
    student = copy.deepcopy(student).requires_grad_(True)
    label = balanced_labels(100, CLASSES)
    x = student(normal(100, SHAPE, torch.Generator().manual_seed(0)), label)
    rng = torch.Generator().manual_seed(30_000)
    norms = torch.empty(len(Weighting), len(levels))
    for j, level in enumerate(levels):
        sigma = level.expand(len(x))
        x_noisy = add_noise(x.detach(), sigma, torch.randn(x.shape, generator=rng))
        with torch.no_grad():
            real, fake = teacher(x_noisy, sigma, label), critic(x_noisy, sigma, label)
        for i, weighting in enumerate(Weighting):
            gradient = dmd.matching_gradient(x.detach(), sigma, real, fake, weighting)
            loss = dmd.matching_loss(x, gradient)
            slopes = torch.autograd.grad(loss, list(student.parameters()), retain_graph=True)
            norms[i, j] = torch.cat([slope.flatten() for slope in slopes]).norm()
    return norms


def spread(norms: Tensor) -> list[float]:
    """Largest over smallest, for each row."""
    return (norms.amax(dim=1) / norms.amin(dim=1)).tolist()


def main() -> int:
    """Print the tables; say whether the figures are reached."""
    teacher = pretrained.load("digits-teacher")
    student = OneStepGenerator(copy.deepcopy(teacher))
    critics = {"trained critic": trained_critic(teacher, student), "fitted": fitted_critic(student)}
    levels = noise_levels()
    names = [weighting.name for weighting in Weighting]

    def line(title: str, ratios: list[float]) -> None:
        print(f"{title:40}" + "".join(f"{ratio:12,.3g}" for ratio in ratios))

    print(f"{LEVELS} levels from {levels[0]:.4f} to {levels[-1]:.1f}: largest over smallest length")
    print(" " * 40 + "".join(f"{name:>12}" for name in names))
    reached = True
    for name, critic in critics.items():
        for seed in range(3):
            ratios = spread(norms_by_level(teacher, critic, student, levels, seed=seed))
            line(f"pixel gradient, {name}, seed {seed}", ratios)
            by_name = dict(zip(names, ratios, strict=True))
            reached &= by_name["EQ8"] < 3 and min(by_name["SIGMA"], by_name["SIGMA3"]) > 100
    critic = critics["trained critic"]
    line("parameter gradient, trained critic", spread(parameter_norms(
        teacher, critic, student, levels)))  # fmt: skip
    short = noise_levels(sigma_max=5.0)
    line("pixel gradient, levels only up to 4.6", spread(norms_by_level(
        teacher, critic, student, short)))  # fmt: skip
    verdict = "reached" if reached else "MISSED"
    print(f"Eq. 8 below 3, sigma and sigma^3 above 100, for the pixel gradient: {verdict}")
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())

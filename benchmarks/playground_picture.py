"""The playground's picture for readers without scripts: Figure 3's three outcomes, as particles.

python benchmarks/playground_picture.py     # writes book/_static/playground.png
"""

import itertools
from pathlib import Path

import torch
from matplotlib.patches import Circle

from dmd_tutorial import data, dmd
from dmd_tutorial.mixtures import GaussianMixture
from dmd_tutorial.noise import add_noise, dmd_sigma, karras_grid
from dmd_tutorial.notebook import plots
from dmd_tutorial.samplers import sample

OUT = Path(__file__).parents[1] / "book" / "_static" / "playground.png"
COUNT, STEPS, RATE, DRAWS = 500, 600, 0.03, 4
START, START_STD = torch.tensor([1.5, 0.5]), 0.3
OBJECTIVES = {"real score only": (False, 0.0), "score difference": (True, 0.0),
              "with the anchor": (True, 0.25)}  # fmt: skip


def main() -> None:
    """Move the particles three times, and draw where they end."""
    plots.style()
    fig, axes = plots.figure(1, 3, width=840, height=240)
    target = data.two_modes()
    for ax, (name, (critic, lambda_reg)) in zip(axes, OBJECTIVES.items(), strict=True):
        for mean, radius in itertools.product(target.means.tolist(), (0.4, 0.8)):
            ax.add_patch(Circle(mean, radius, fill=False, color=plots.ROLES["teacher"], lw=1.5))
        plots.particles(ax, moved(target, critic, lambda_reg), colour=plots.ROLES["generator"])
        ax.set(title=name, xlim=(-4, 4), ylim=(-2.6, 2.6), aspect="equal", xlabel="", ylabel="")
    OUT.write_bytes(plots.fewer_colours(plots.png(fig), 64))
    print(OUT)


def moved(target: GaussianMixture, critic: bool, lambda_reg: float) -> torch.Tensor:
    """Particles after all steps; the critic is a Gaussian around each mode's particles."""
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(COUNT, 2, generator=rng)
    x, answers = START + START_STD * z, sample(target, z)
    grid = karras_grid(sigma_max=1.0)
    for _ in range(STEPS):
        everywhere = x.repeat(2 * DRAWS, 1)
        sigma = dmd_sigma(DRAWS * COUNT, grid, rng).repeat(2)
        noise = torch.randn(DRAWS * COUNT, 2, generator=rng)
        noisy = add_noise(everywhere, sigma, torch.cat([noise, -noise]))  # as the script does
        fake = fitted(x)(noisy, sigma) if critic else noisy
        g = dmd.matching_gradient(everywhere, sigma, target(noisy, sigma), fake)
        x = x - RATE * (g.reshape(-1, COUNT, 2).mean(0) + 2 * lambda_reg * (x - answers))
    return x


def fitted(x: torch.Tensor) -> GaussianMixture:
    """A Gaussian for the particles on each side, where there are any."""
    sides = [side for side in (x[x[:, 0] < 0], x[x[:, 0] >= 0]) if len(side) > 5]
    covariances = torch.stack([side.T.cov() + 1e-4 * torch.eye(2) for side in sides])
    weights = torch.tensor([len(side) / sum(map(len, sides)) for side in sides])
    return GaussianMixture(torch.stack([side.mean(0) for side in sides]), covariances, weights)


if __name__ == "__main__":
    main()

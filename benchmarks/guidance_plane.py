"""Matching and guidance apart, in the plane: who moves a class, who keeps its shape.

    python benchmarks/guidance_plane.py          # under three minutes on one core

Three round classes, standard deviation 0.5, around the middle; teachers are exact; five students,
in one step, a setting. They start from the classes as they are. Measured is how far the middle of a
class goes, outwards, and how wide the class is then. Beside each setting stands its own fixed
point: a Gaussian for each class, judged by its exact denoiser instead of a critic. Beside all
stands what the guided ODE makes at the same scale, which a student of a guided teacher is said to
copy, and the density p(x|c)^scale p(x)^(1 - scale), which the guided field is said to belong to.
"""

import argparse
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dmd_tutorial import dmd
from dmd_tutorial.adapters import FromFunction, Guided
from dmd_tutorial.denoisers import EDMDenoiser, denoising_loss
from dmd_tutorial.files import write_json
from dmd_tutorial.generators import OneStepGenerator
from dmd_tutorial.mixtures import GaussianMixture
from dmd_tutorial.networks import MLP
from dmd_tutorial.noise import grid_sigma, karras_grid
from dmd_tutorial.runs.provenance import provenance
from dmd_tutorial.samplers import sample
from dmd_tutorial.text_to_image.guidance import Apart, heat_sides, iteration
from dmd_tutorial.training import DistillationRun, DistillSettings, distill, rate_factor, set_rate

OUT = Path(__file__).parents[1] / "book" / "results" / "guidance-plane.json"
CLASSES, STD, SEEDS, BLOCK = 3, 0.5, 5, 96
HIGHEST, CUT = 3.0, 0.5  # noise levels: the highest, and where guidance's range is cut in two


LEVELS = karras_grid(sigma_max=HIGHEST)


class Shape(NamedTuple):
    """What became of the classes, on average over them, in the units of x."""

    shift: float  # of the middle, away from that of all
    std: float  # of an axis


def data() -> GaussianMixture:
    """Three round classes, their middles at distance 1 from that of all."""
    angle = 2 * math.pi / CLASSES * torch.arange(CLASSES)
    return GaussianMixture.isotropic(torch.stack([angle.cos(), angle.sin()], 1), STD)


def shape_of(x: Tensor, label: Tensor) -> Shape:
    """How samples (count, 2) of the classes lie."""
    means, each = data().means, [x[label == c].double() for c in range(CLASSES)]
    shift = [(own.mean(0) - mean) @ mean for own, mean in zip(each, means, strict=True)]
    variance = [(own - own.mean(0)).square().mean() for own in each]
    return Shape(torch.stack(shift).mean().item(), torch.stack(variance).mean().sqrt().item())


def drawn(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise and labels in turn."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, generator=rng), torch.arange(count) % CLASSES


def guided_ode(scale: float, count: int = 6000) -> Shape:
    """What the guided ODE makes, in 80 steps of Heun's method."""
    z, label = drawn(count, seed=3)
    return shape_of(sample(Guided(data(), scale), z.double(), label, steps=80, batch=count), label)


@cache
def start(copies: int, steps: int = 400) -> tuple[OneStepGenerator, EDMDenoiser]:
    """Students that make the classes as they are, critics that know them, by short trainings."""
    torch.manual_seed(0)
    make = lambda: EDMDenoiser(MLP(hidden=64, classes=CLASSES, copies=copies))  # noqa: E731
    students, critics = OneStepGenerator(make(), HIGHEST), make()
    rates = {torch.optim.Adam(n.parameters()): 4e-3 for n in (students, critics)}
    z, label = drawn(copies * BLOCK * 20, seed=2)
    y = sample(data(), z, label, steps=18, batch=len(z))
    for step in range(steps):
        index = torch.randint(len(z), (copies * BLOCK,))
        sigma = grid_sigma(len(index), karras_grid(sigma_max=HIGHEST))
        losses = (
            functional.mse_loss(students(z[index], label[index]), y[index]),
            denoising_loss(critics, y[index], sigma, torch.randn_like(y[index]), label[index]),
        )
        for (optimizer, rate), loss in zip(rates.items(), losses, strict=True):
            set_rate(optimizer, rate * rate_factor(step, steps, warm_up=1, decay=0.5))
            dmd.update(optimizer, loss, clip=math.inf)
    return students, critics


def train(objective: Apart, steps: int, copies: int = SEEDS) -> list[Shape]:
    """Distil the exact teacher into as many students; what each makes."""
    students, critics = start(copies)
    settings = DistillSettings(
        steps=steps, batch=copies * BLOCK, learning_rate=5e-4, critic_learning_rate=2e-3,
        lambda_reg=0.0, weight_decay=0.0, warm_up=1,
    )  # fmt: skip
    run = DistillationRun(FromFunction(data()), settings, start=students, critic=critics)
    for _ in distill(run, (2,), CLASSES, objective=objective, iteration=iteration):
        pass
    z, label = drawn(copies * 3000, seed=4)
    with torch.no_grad():
        x = run.average(z, label)
    blocks = zip(x.chunk(copies), label.chunk(copies), strict=True)
    return [shape_of(*block) for block in blocks]


class Cloud(nn.Module):
    """A student that makes a round Gaussian of each class, and its exact denoiser."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(data().means.float())
        self.std = nn.Parameter(torch.full((CLASSES, 1), STD))

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        return self.mean[label] + self.std[label] * z

    def denoise(self, x: Tensor, sigma: Tensor, label: Any = None) -> Tensor:
        mean, variance = self.mean[label], self.std[label] ** 2
        return mean + variance / (variance + sigma[:, None] ** 2) * (x - mean)


def fixed_point(objective: Apart, steps: int = 500) -> Shape:
    """Where an exact critic leaves Gaussian students."""
    torch.manual_seed(0)
    student, teacher, label = Cloud(), FromFunction(data()), torch.arange(600) % CLASSES
    optimizer, exact = torch.optim.Adam(student.parameters()), replace(objective, critic_steps=0)
    for step in range(steps):
        set_rate(optimizer, 2e-2 * rate_factor(step, steps, warm_up=1, decay=0.9))
        batch = dmd.Batch(torch.randn(len(label), 2), label)
        iteration(student, student.denoise, teacher, optimizer, None, batch, exact)
    mean, means = student.mean.detach().double(), data().means
    return Shape(((mean - means) * means).sum().item() / CLASSES, student.std.mean().item())


def apart(
    matching: float, guidance: float, critic_steps: int = 4, levels: Tensor = LEVELS
) -> Apart:
    """An objective without anchor; a clipped gradient would tie the students together."""
    return Apart(
        lambda_reg=0.0, critic_steps=critic_steps, clip=math.inf, grid=LEVELS,
        matching_weight=matching, guidance_weight=guidance, guidance_grid=levels,
    )  # fmt: skip


LOW, HIGH = karras_grid(sigma_max=CUT), karras_grid(sigma_min=CUT, sigma_max=HIGHEST)
SETTINGS = {
    "matching alone": apart(1, 0),
    "matching and guidance": apart(1, 1),
    "matching and 3 x guidance": apart(1, 3),
    "matching alone, a critic that lags": apart(1, 0, critic_steps=1),
    "matching and guidance, a critic that lags": apart(1, 1, critic_steps=1),
    "matching and 3 x guidance, a critic that lags": apart(1, 3, critic_steps=1),
    "matching and guidance, at low levels": apart(1, 1, levels=LOW),
    "matching and guidance, at high levels": apart(1, 1, levels=HIGH),
    "guidance alone": apart(0, 1, critic_steps=0),
}


def row(name: str, objective: Apart, steps: int) -> dict[str, Any]:
    """A setting, what its students make, mean and spread over them, and its fixed point."""
    shapes = torch.tensor(train(objective, steps), dtype=torch.float64)
    mean, spread = (Shape(*each.tolist())._asdict() for each in (shapes.mean(0), shapes.std(0)))
    levels = objective.guidance_grid[[0, -1]].tolist()
    said = {"matching": objective.matching_weight, "guidance": objective.guidance_weight,
            "guidance_levels": levels, "critic_steps": objective.critic_steps}  # fmt: skip
    found = {"name": name, "steps": steps, **said, "mean": mean, "spread": spread}
    if objective.matching_weight:
        found["fixed_point"] = fixed_point(objective)._asdict()
    return found


def up_to(highest: float) -> dict[str, float]:
    """The fixed point of both terms alike, where they go to another highest level."""
    grid = karras_grid(sigma_max=highest)
    shape = fixed_point(replace(apart(1, 1, levels=grid), grid=grid))
    return {"highest": highest, **shape._asdict()}


class Sharpened:
    """The density p(x|c)^scale p(x)^(1 - scale) of class 0, by sums over a lattice."""

    def __init__(self, scale: float) -> None:
        axis = torch.linspace(-4, 6, 251, dtype=torch.float64)
        self.points = torch.cartesian_prod(axis, axis)
        own = data().log_prob(self.points, label=torch.zeros(len(self.points)).long())
        self.log_density = scale * own + (1 - scale) * data().log_prob(self.points)

    def __call__(self, x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        """Its denoiser, for levels well above the spacing, 0.04."""
        away = torch.cdist(x, self.points).square() / (2 * sigma[:, None] ** 2)
        return (self.log_density - away).softmax(1) @ self.points

    def shape(self) -> Shape:
        share = self.log_density.softmax(0)
        mean = share @ self.points
        variance = share @ (self.points - mean).square().mean(1)
        return Shape((mean - data().means[0]).dot(data().means[0]).item(), variance.sqrt().item())


def apart_by(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


def field(scale: float, sigma: float, count: int = 400) -> dict[str, float]:
    """How far the guided field of class 0 is from being a score, on noisy samples of the class."""
    z, label = drawn(count, seed=5)[0].double(), torch.zeros(count).long()
    level = torch.full((count,), sigma, dtype=torch.float64)
    x, guided = data().means[0] + math.hypot(STD, sigma) * z, Guided(data(), scale)
    answers = (denoiser(x, level, label) for denoiser in (guided, Sharpened(scale)))
    return {
        "scale": scale, "sigma": sigma,
        "residual": apart_by(*heat_sides(guided, x, level, label)),
        "class_residual": apart_by(*heat_sides(data(), x, level, label)),
        "to_sharpened": apart_by(*(answer - x for answer in answers)),
    }  # fmt: skip


def main() -> None:
    """Train, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=600, help="iterations (%(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON file to write (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)  # matrices this small lose more by sharing the work than they gain
    scales = (1.0, 2.0, 4.0)
    report: dict[str, Any] = {"std": STD, "seeds": SEEDS, "highest": HIGHEST, "rows": []}
    report["ode"] = {scale: guided_ode(scale)._asdict() for scale in scales}
    report["sharpened"] = {scale: Sharpened(scale).shape()._asdict() for scale in scales}
    report["field"] = [field(scale, sigma) for scale in scales for sigma in (0.2, 0.5, 1, 2, 5)]
    report["fixed_points"] = [up_to(highest) for highest in (1.0, 3.0, 10.0, 80.0)]
    lengths = [(name, options.steps) for name in SETTINGS]
    for name, steps in [*lengths, ("guidance alone", 2 * options.steps)]:
        report["rows"].append(row(name, SETTINGS[name], steps))
        print(report["rows"][-1], flush=True)
    write_json(options.out, report | provenance())


if __name__ == "__main__":
    main()

"""Consistency models: a network that sends every point of a path straight to the path's end.

The path is that of the probability-flow ODE, ``dx/dsigma = (x - D(x, sigma)) / sigma``. It ends at
sigma_min, where a consistency model is the identity.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from dmd_tutorial.checks import check_same_shape, check_sigma, expand
from dmd_tutorial.denoisers import (
    Denoiser,
    EDMDenoiser,
    Preconditioning,
    edm_preconditioning,
    noise_from_denoised,
)
from dmd_tutorial.networks.mlp import MLP
from dmd_tutorial.networks.unet import UNet
from dmd_tutorial.noise import RHO, SIGMA_MIN, add_noise, karras_grid, noise_like
from dmd_tutorial.samplers import Step, sample
from dmd_tutorial.settings import TeacherSettings
from dmd_tutorial.survey.task import Budget, Method, Sampler, Task
from dmd_tutorial.training import FitRun, fit

Distance = Callable[[Tensor, Tensor], Tensor]  # two batches of samples to (batch,)
Jump = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # (x, sigma, sigma_next, label)

# The model


def consistency_preconditioning(
    sigma: Float[Tensor, " batch"], sigma_data: float, sigma_min: float = SIGMA_MIN
) -> Preconditioning:
    """EDM's factors, shifted so that ``c_skip = 1`` and ``c_out = 0`` at sigma_min.

    Args:
        sigma: Noise levels, (batch,), in the units of x, from sigma_min.
        sigma_data: Standard deviation of the data.
        sigma_min: Where paths end.

    Returns:
        c_skip, c_out, c_in and c_noise, (batch,) each.

    Source: Song et al. 2023, appendix C.
    """
    above, total = sigma - sigma_min, sigma**2 + sigma_data**2
    return edm_preconditioning(sigma, sigma_data)._replace(
        c_skip=sigma_data**2 / (above**2 + sigma_data**2),
        c_out=above * sigma_data / total.sqrt(),
    )


class ConsistencyModel(nn.Module):
    """A denoiser's network F as ``f = c_skip x + c_out F``, where ``f(x, sigma_min) = x``.

    It is called as a denoiser is, and starts as the denoiser that is given, nearly.

    Args:
        denoiser: Whose network is used, and trained.
        sigma_min: Where paths end, in the units of x.

    Source: Song et al. 2023, Eq. 5 and appendix C.
    """

    def __init__(self, denoiser: EDMDenoiser, sigma_min: float = SIGMA_MIN) -> None:
        super().__init__()
        self.network, self.sigma_data = denoiser.network, denoiser.sigma_data
        self.sigma_min = sigma_min

    def forward(
        self,
        x: Float[Tensor, "batch *shape"],
        sigma: Float[Tensor, " batch"],
        label: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch *shape"]:
        """Send points to the ends of their paths.

        Args:
            x: Noisy samples, (batch, *shape).
            sigma: Noise level of each, (batch,), in the units of x, from sigma_min.
            label: Class of each, (batch,), or None.

        Returns:
            Samples at level sigma_min, (batch, *shape).

        Raises:
            ValueError: If a level is below sigma_min, or shapes do not fit.
        """
        check_sigma(x, sigma)
        if (sigma < self.sigma_min * (1 - 1e-5)).any():
            raise ValueError(f"sigma is {sigma.min().item():g}, paths end at {self.sigma_min:g}")
        factors = consistency_preconditioning(sigma.to(x.dtype), self.sigma_data, self.sigma_min)
        c_skip, c_out, c_in, _ = (expand(factor, x) for factor in factors)
        return c_skip * x + c_out * self.network(c_in * x, factors.c_noise, label)


# Paths and pairs


@torch.no_grad()
def solve(
    denoiser: Denoiser,
    x: Float[Tensor, "batch *shape"],
    sigma: Float[Tensor, " batch"],
    sigma_next: Float[Tensor, " batch"],
    label: Int[Tensor, " batch"] | None = None,
    *,
    steps: int = 1,
) -> Float[Tensor, "batch *shape"]:
    """Follow the probability-flow ODE from a level to another, each sample between its own two.

    Args:
        denoiser: The teacher.
        x: Noisy samples, (batch, *shape).
        sigma: Their levels, (batch,).
        sigma_next: The levels to go to, (batch,), above 0.
        label: Class of each, (batch,), or None.
        steps: Steps of Heun's method, two evaluations each, spaced as EDM's.

    Returns:
        The samples at sigma_next, (batch, *shape), without gradient history.

    Source: Karras et al. 2022 (EDM), Algorithm 1.
    """
    start, end = sigma ** (1 / RHO), sigma_next ** (1 / RHO)
    for step in range(steps):
        after = ((start + (step + 1) / steps * (end - start)) ** RHO).clamp(sigma_next, sigma)
        width = expand(after - sigma, x)
        slope = noise_from_denoised(x, denoiser(x, sigma, label), sigma)
        ahead = x + width * slope
        slope_ahead = noise_from_denoised(ahead, denoiser(ahead, after, label), after)
        x, sigma = x + width * (slope + slope_ahead) / 2, after
    return x


class Pair(NamedTuple):
    """Two points of one path, or nearly: x (batch, *shape) at sigma (batch,), and one below it."""

    x: Tensor
    sigma: Tensor
    x_next: Tensor
    sigma_next: Tensor


def distillation_pair(
    teacher: Denoiser,
    x: Float[Tensor, "batch *shape"],
    noise: Float[Tensor, "batch *shape"],
    sigma: Float[Tensor, " batch"],
    sigma_next: Float[Tensor, " batch"],
    label: Int[Tensor, " batch"] | None = None,
) -> Pair:
    """The pair of consistency distillation: noise the data, then let the teacher take one step.

    Args:
        teacher: Whose paths are learnt.
        x: Data, (batch, *shape).
        noise: Standard normal noise, (batch, *shape).
        sigma: The higher levels, (batch,).
        sigma_next: The lower levels, (batch,), above 0.
        label: Class of each, (batch,), or None.

    Returns:
        The pair, without gradient history.

    Source: Song et al. 2023, Algorithm 2 with Heun's solver.
    """
    x_noisy = add_noise(x, sigma, noise)
    return Pair(x_noisy, sigma, solve(teacher, x_noisy, sigma, sigma_next, label), sigma_next)


def training_pair(
    x: Float[Tensor, "batch *shape"],
    noise: Float[Tensor, "batch *shape"],
    sigma: Float[Tensor, " batch"],
    sigma_next: Float[Tensor, " batch"],
) -> Pair:
    """The pair of consistency training: the same data and the same noise at two levels.

    Args:
        x: Data, (batch, *shape).
        noise: Standard normal noise, (batch, *shape).
        sigma: The higher levels, (batch,).
        sigma_next: The lower levels, (batch,).

    Returns:
        The pair.

    Source: Song et al. 2023, Algorithm 3.
    """
    return Pair(add_noise(x, sigma, noise), sigma, add_noise(x, sigma_next, noise), sigma_next)


# The loss


def squared(a: Float[Tensor, "batch *shape"], b: Tensor) -> Float[Tensor, " batch"]:
    """Squared distance of each two samples, a mean over values."""
    return (a - b).square().flatten(1).mean(dim=1)


def pseudo_huber(a: Float[Tensor, "batch *shape"], b: Tensor) -> Float[Tensor, " batch"]:
    """``sqrt(|a - b|^2 + c^2) - c``: a square below c, a length above (Song and Dhariwal 2024)."""
    c = 0.00054 * math.sqrt(a[0].numel())
    return ((a - b).square().flatten(1).sum(dim=1) + c**2).sqrt() - c


def consistency_loss(
    model: Denoiser,
    target: Denoiser,
    pair: Pair,
    label: Int[Tensor, " batch"] | None = None,
    distance: Distance = squared,
    weight: Float[Tensor, " batch"] | None = None,
) -> Float[Tensor, ""]:
    """How far two points of one path are sent apart: ``d(f(x, sigma), sg[f(x_next, sigma_next)])``.

    Args:
        model: The consistency model in training, f.
        target: What answers at the lower level, without gradient: f itself, or its average.
        pair: Two points of a path.
        label: Class of each, (batch,), or None.
        distance: Two batches of samples to their distances, (batch,).
        weight: Weight of each pair, (batch,); 1 without it.

    Returns:
        The mean over the batch, a scalar.

    Source: Song et al. 2023, Eq. 7 (distillation) and Eq. 10 (training).
    """
    with torch.no_grad():
        answer = target(pair.x_next, pair.sigma_next, label)
    distances = distance(model(pair.x, pair.sigma, label), answer)
    return distances.mean() if weight is None else (weight * distances).mean()


def neighbour_levels(
    batch: int,
    grid: Float[Tensor, " bins"],
    generator: Generator | None = None,
    *,
    skip: int = 1,
    probability: Float[Tensor, " bins-1"] | None = None,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Draw a level of the grid and the one below it.

    Args:
        batch: How many.
        grid: Ascending noise levels, (bins,), at least 2.
        generator: Source of randomness; torch's own without one.
        skip: How many places below; the lowest level where there are not so many.
        probability: Of each level but the lowest, (bins - 1,), up to a factor; equal without it.

    Returns:
        The higher and the lower levels, (batch,) each, float32.

    Source: Song et al. 2023, Algorithm 2; `skip` is that of latent consistency (Luo et al. 2023).
    """
    if probability is None:
        probability = torch.ones(len(grid) - 1)
    index = 1 + torch.multinomial(probability, batch, replacement=True, generator=generator)
    return grid.float()[index], grid.float()[(index - skip).clamp_min(0)]


def lognormal_probability(
    grid: Float[Tensor, " bins"], mean: float = -1.1, std: float = 2.0
) -> Float[Tensor, " bins-1"]:
    """How likely ``ln(sigma) ~ N(mean, std^2)`` falls between neighbours of the grid.

    Args:
        grid: Ascending noise levels, (bins,).
        mean: Mean of ln(sigma).
        std: Standard deviation of ln(sigma).

    Returns:
        Probabilities, (bins - 1,), up to a factor.

    Source: Song and Dhariwal 2024, Section 3.5.
    """
    return torch.special.ndtr((grid.log() - mean) / std).diff()


def doubling_bins(progress: float, first: int = 10, last: int = 1280) -> int:
    """How many levels the grid has during consistency training: 11, 21, ..., 1281.

    Args:
        progress: Share of the training that is done, in [0, 1).
        first: Intervals of the grid at first.
        last: Intervals at last.

    Returns:
        A number of levels.

    Source: Song and Dhariwal 2024, Section 3.4.
    """
    stages = int(math.log2(last / first)) + 1
    return min(first * 2 ** int(progress * stages), last) + 1


# Sampling


@torch.no_grad()
def multistep(
    model: Denoiser,
    z: Float[Tensor, "batch *shape"],
    levels: Float[Tensor, " evaluations"],
    label: Int[Tensor, " batch"] | None = None,
    *,
    sigma_min: float = SIGMA_MIN,
    generator: Generator | None = None,
) -> Iterator[Step]:
    """Sample with a consistency model: to the end of the path, noise again, to the end, ...

    Args:
        model: The consistency model.
        z: Standard normal noise, (batch, *shape); the start is ``levels[0] * z``.
        levels: Falling noise levels, one for each evaluation, above sigma_min.
        label: Class of each sample, (batch,), or None.
        sigma_min: Where the model's paths end.
        generator: Source of the new noise; torch's own without one.

    Yields:
        A record after each evaluation; its x is at level sigma_min.

    Source: Song et al. 2023, Algorithm 1.
    """
    for index, sigma in enumerate(levels.tolist()):
        if index == 0:
            x = sigma * z
        else:
            x = x + math.sqrt(sigma**2 - sigma_min**2) * noise_like(z, generator)
        x = model(x, z.new_full((len(z),), sigma), label)
        yield Step(index, x, x, sigma_min, index + 1)


# Latent consistency


def guided_denoised(
    denoiser: Denoiser,
    x: Float[Tensor, "batch *shape"],
    sigma: Float[Tensor, " batch"],
    label: Int[Tensor, " batch"],
    guidance: Float[Tensor, " batch"],
) -> Float[Tensor, "batch *shape"]:
    """The denoised estimate of the guidance-augmented ODE: ``(1 + w) D(x, c) - w D(x)``.

    Args:
        denoiser: A teacher that was trained with and without labels.
        x: Noisy samples, (batch, *shape).
        sigma: Their levels, (batch,).
        label: Class of each, (batch,).
        guidance: Strength w of each, (batch,); 0 is no guidance.

    Returns:
        Denoised estimates, (batch, *shape).

    Source: Luo et al. 2023 (LCM), Section 4.2, for denoised estimates; Ho and Salimans 2022.
    """
    w = expand(guidance, x)
    return (1 + w) * denoiser(x, sigma, label) - w * denoiser(x, sigma, None)


# Consistency trajectory models


class TrajectoryModel(nn.Module):
    """A network that goes from any level to any lower one: ``G = s/t x + (1 - s/t) g(x, t, s)``.

    g is a denoiser with one more input, the level s to go to: a constant channel of ``ln(s) / 4``.
    At first the channel counts for nothing, and g is the denoiser that is given.

    Args:
        denoiser: Whose network is copied.

    Raises:
        ValueError: If the network is neither an MLP nor the book's U-Net.

    Source: Kim et al. 2024 (CTM), Section 3.
    """

    def __init__(self, denoiser: EDMDenoiser) -> None:
        super().__init__()
        self.network, self.sigma_data = _with_channel(denoiser.network), denoiser.sigma_data

    def forward(
        self,
        x: Float[Tensor, "batch *shape"],
        sigma: Float[Tensor, " batch"],
        sigma_next: Float[Tensor, " batch"],
        label: Int[Tensor, " batch"] | None = None,
        aim: bool = False,
    ) -> Float[Tensor, "batch *shape"]:
        """Go along the path from sigma to sigma_next.

        Args:
            x: Noisy samples, (batch, *shape).
            sigma: Their levels, (batch,), above 0.
            sigma_next: The levels to go to, (batch,), above 0 and at most sigma.
            label: Class of each, (batch,), or None.
            aim: Return g instead: where the straight line from x to the landing point meets
                level 0. Where sigma_next is sigma, g is a denoiser.

        Returns:
            Samples at sigma_next, (batch, *shape).
        """
        check_sigma(x, sigma)
        check_sigma(x, sigma_next)
        factors = edm_preconditioning(sigma, self.sigma_data)
        c_skip, c_out, c_in, _ = (expand(factor, x) for factor in factors)
        channel = expand(sigma_next.log() / 4, x).expand_as(x[:, :1])
        raw = self.network(torch.cat([c_in * x, channel], dim=1), factors.c_noise, label)
        g = c_skip * x + c_out * raw[:, : x.shape[1]]
        share = expand(sigma_next / sigma, x)
        return g if aim else share * x + (1 - share) * g


def _with_channel(network: nn.Module) -> nn.Module:
    """A copy with one channel more, in and out, that counts for nothing yet."""
    if isinstance(network, MLP):
        hidden, dim = network.out.weight.shape[1], network.dim
        layers, copies = len(network.hidden), network.copies
        wider: nn.Module = MLP(dim + 1, hidden, layers, network.classes, copies)
        axes = {"hidden.0.weight": (1, dim), "out.weight": (2, dim), "out.bias": (2, dim)}
    elif isinstance(network, UNet):
        dim = network.channels
        wider = UNet(**(network.config | {"channels": dim + 1}))  # type: ignore[arg-type]
        axes = {"first.weight": (1, dim), "last.weight": (0, dim), "last.bias": (0, dim)}
    else:
        raise ValueError(f"a {type(network).__name__} cannot be given another channel")
    state = network.state_dict()
    for name, (axis, place) in axes.items():
        before, after = state[name].tensor_split([place], dim=axis)
        zeros = torch.zeros_like(state[name].narrow(axis, 0, 1))
        state[name] = torch.cat([before, zeros, after], dim=axis)
    wider.load_state_dict(state)
    return wider


def trajectory_loss(
    model: Jump,
    target: Jump,
    x_noisy: Float[Tensor, "batch *shape"],
    x_between: Float[Tensor, "batch *shape"],
    sigma: Float[Tensor, " batch"],
    sigma_between: Float[Tensor, " batch"],
    sigma_next: Float[Tensor, " batch"],
    label: Int[Tensor, " batch"] | None = None,
    distance: Distance = squared,
    sigma_min: float | None = SIGMA_MIN,
) -> Float[Tensor, ""]:
    """Whether one jump lands where the teacher's part of the way and a second jump land.

    Both landing points at sigma_next are sent on to sigma_min by the target, and compared there.
    That costs two more passes, one with a backward pass; without sigma_min they are left out.

    Args:
        model: G in training.
        target: G with frozen parameters, such as the model's average. Gradients pass through it
            to the model's landing point.
        x_noisy: Samples at sigma, (batch, *shape).
        x_between: Where the teacher takes them, at sigma_between, (batch, *shape).
        sigma: Levels t, (batch,).
        sigma_between: Levels u, (batch,), below t.
        sigma_next: Levels s, (batch,), at most u.
        label: Class of each, (batch,), or None.
        distance: Two batches of samples to their distances, (batch,).
        sigma_min: Where the samples are compared; None: where they land.

    Returns:
        The mean over the batch, a scalar.

    Source: Kim et al. 2024 (CTM), Section 3.
    """
    check_same_shape(x_noisy=x_noisy, x_between=x_between)
    jumped = model(x_noisy, sigma, sigma_next, label)
    with torch.no_grad():
        wanted = target(x_between, sigma_between, sigma_next, label)
    if sigma_min is not None:
        end = torch.full_like(sigma, sigma_min)
        jumped = target(jumped, sigma_next, end, label)
        with torch.no_grad():
            wanted = target(wanted, sigma_next, end, label)
    return distance(jumped, wanted).mean()


@torch.no_grad()
def trajectory_sampler(
    model: Jump,
    z: Float[Tensor, "batch *shape"],
    levels: Float[Tensor, " steps+1"],
    label: Int[Tensor, " batch"] | None = None,
    *,
    gamma: float = 0.0,
    generator: Generator | None = None,
) -> Iterator[Step]:
    """Jump from level to level: below the next one, and up to it with new noise.

    Args:
        model: A consistency trajectory model.
        z: Standard normal noise, (batch, *shape); the start is ``levels[0] * z``.
        levels: Falling noise levels, (steps + 1,), all above 0.
        label: Class of each sample, (batch,), or None.
        gamma: From 0, no new noise, to 1, where every jump goes to the end: `multistep`.
        generator: Source of the new noise; torch's own without one.

    Yields:
        A record after each jump.

    Source: Kim et al. 2024 (CTM), gamma-sampling.
    """
    x, end = levels[0].item() * z, levels[-1].item()
    ones = z.new_ones(len(z))
    for index, (sigma, sigma_next) in enumerate(itertools.pairwise(levels)):
        low = max(end, math.sqrt(1 - gamma**2) * sigma_next.item())
        x = model(x, sigma.item() * ones, low * ones, label)
        if (added := sigma_next.item() ** 2 - low**2) > 0:
            x = x + math.sqrt(added) * noise_like(z, generator)
        yield Step(index, x, x, sigma_next.item(), index + 1)


# Recipes for the survey


def _train(
    task: Task,
    budget: Budget,
    seed: int,
    make: Callable[[EDMDenoiser], nn.Module],
    draw_levels: Callable[[int, float, Generator], tuple[Tensor, ...]],
    loss: Callable[..., Tensor],
) -> nn.Module:
    """Spend the budget on a student; returns its average, which its loss may take for a target.

    ``draw_levels(batch, progress, rng)``; ``loss(network, target, x, noise, label, *levels)``.
    """
    images = len(task.shape) > 1
    batch, rate = (64, 5e-4) if images else (256, 1e-3)

    def begin(steps: int) -> Iterator[nn.Module]:
        settings = TeacherSettings(steps, batch, rate, warm_up=50, ema=0.95, seed=seed)
        run = FitRun(make(task.student()), settings)  # type: ignore[arg-type]
        target = budget.watch(run.average)
        budget.watch(run.network)

        def draw(rng: Generator) -> tuple[Tensor | None, ...]:
            x, label = task.draw(batch, rng)
            return x, noise_like(x, rng), label, *draw_levels(batch, run.step / steps, rng)

        for _ in fit(run, draw, lambda network, *drawn: loss(network, target, *drawn)):
            yield run.average

    *_, average = begin(budget.affordable(lambda: next(begin(1))))
    return average


def _samplers(
    model: nn.Module, seed: int, sampler: Callable[..., Iterator[Step]], levels: dict[int, Tensor]
) -> dict[int, Sampler]:
    """A sampler for each number of evaluations; each call draws the same new noise."""

    def of(some: Tensor) -> Sampler:
        def run(z: Tensor, label: Tensor | None) -> Tensor:
            rng = torch.Generator().manual_seed(seed)
            return sample(model, z, label, sampler=partial(sampler, generator=rng), levels=some)

        return run

    return {evaluations: of(some) for evaluations, some in levels.items()}


def _distillation(task: Task, budget: Budget, seed: int) -> dict[int, Sampler]:
    grid = karras_grid(18, sigma_max=task.sigma_max)

    def loss(network: nn.Module, target: nn.Module, *drawn: Tensor) -> Tensor:
        x, noise, label, sigma, sigma_next = drawn
        pair = distillation_pair(task.teacher, x, noise, sigma, sigma_next, label)
        return consistency_loss(network, target, pair, label)

    def draw_levels(batch: int, _: float, rng: Generator) -> tuple[Tensor, ...]:
        return neighbour_levels(batch, grid, rng)

    model = _train(task, budget, seed, ConsistencyModel, draw_levels, loss)
    ladders = [task.sigma_max], [task.sigma_max, 1.0], [task.sigma_max, 1.0, 0.5, 0.25]
    levels = {len(ladder): torch.tensor(ladder) for ladder in ladders}
    return _samplers(model, seed, multistep, levels)


def _training(task: Task, budget: Budget, seed: int) -> dict[int, Sampler]:
    def loss(network: nn.Module, target: nn.Module, *drawn: Tensor) -> Tensor:
        x, noise, label, sigma, sigma_next = drawn
        pair = training_pair(x, noise, sigma, sigma_next)
        weight = 1 / (sigma - sigma_next)
        return consistency_loss(network, network, pair, label, pseudo_huber, weight)

    def draw_levels(batch: int, progress: float, rng: Generator) -> tuple[Tensor, ...]:
        grid = karras_grid(doubling_bins(progress, last=80), sigma_max=task.sigma_max)
        return neighbour_levels(batch, grid, rng)

    model = _train(task, budget, seed, ConsistencyModel, draw_levels, loss)
    levels = {1: torch.tensor([task.sigma_max]), 2: torch.tensor([task.sigma_max, 1.0])}
    return _samplers(model, seed, multistep, levels)


def _trajectory(task: Task, budget: Budget, seed: int) -> dict[int, Sampler]:
    grid = karras_grid(18, sigma_max=task.sigma_max).float()

    def loss(network: nn.Module, target: nn.Module, *drawn: Tensor) -> Tensor:
        x, noise, label, sigma, between, sigma_next = drawn
        pair = distillation_pair(task.teacher, x, noise, sigma, between, label)
        # compared where they land, and without the paper's denoising loss: at this budget the extra
        # passes cost more than they bring (with the draw below, about 1 instead of 9 on digits)
        return trajectory_loss(
            network, target, pair.x, pair.x_next, sigma, between, sigma_next, label, sigma_min=None
        )

    def draw_levels(batch: int, _: float, rng: Generator) -> tuple[Tensor, ...]:
        index = torch.randint(1, len(grid), (batch,), generator=rng)
        end = (torch.rand(batch, generator=rng) * index).long()  # 0 to index - 1, and
        end[torch.rand(batch, generator=rng) < 0.5] = 0  # half of the jumps go to the end
        return grid[index], grid[index - 1], grid[end]

    model = _train(task, budget, seed, TrajectoryModel, draw_levels, loss)
    levels = {
        steps: karras_grid(steps + 1, sigma_max=task.sigma_max).flip(0) for steps in (1, 2, 4)
    }
    return _samplers(model, seed, trajectory_sampler, levels)


METHODS: tuple[Method, ...] = (
    Method("Consistency distillation", 9, _distillation, needs_data=True),
    Method("Consistency training", 9, _training, needs_data=True),
    Method("Consistency trajectory", 9, _trajectory, needs_data=True),
)

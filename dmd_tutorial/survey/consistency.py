"""Consistency models: a network that sends every point of a path straight to the path's end.

Paths are the teacher's, ``dx/dsigma = (x - D(x, sigma)) / sigma``; the network learns to send two
points of one path to one end (Song et al. 2023). A trajectory model goes to any lower level, too.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from dmd_tutorial import checks, denoisers
from dmd_tutorial.checks import Condition, PerSample, Samples, check_sigma, expand
from dmd_tutorial.denoisers import Denoiser, EDMDenoiser, Preconditioning, edm_preconditioning
from dmd_tutorial.networks import MLP, UNet
from dmd_tutorial.noise import RHO, SIGMA_MIN, add_noise, noise_like, source
from dmd_tutorial.samplers.step import Ladder, Step, Steps

Distance = Callable[[Tensor, Tensor], Tensor]  # two batches of samples to (batch,)
Jump = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # (x, sigma, sigma_next, label)


@torch.no_grad()
def solve(
    denoiser: Denoiser, x: Samples, sigma: PerSample,
    sigma_next: PerSample, label: Condition | None = None, *, steps: int = 1,
) -> Samples:  # fmt: skip
    """Follow the ODE between two levels above 0 a sample by Heun's method in EDM's steps."""
    start, end = sigma ** (1 / RHO), sigma_next ** (1 / RHO)
    for step in range(steps):
        after = ((start + (step + 1) / steps * (end - start)) ** RHO).clamp(sigma_next, sigma)
        width = expand(after - sigma, x)
        slope = denoisers.noise_from_denoised(x, denoiser(x, sigma, label), sigma)
        ahead = x + width * slope
        denoised_ahead = denoiser(ahead, after, label)
        slope_ahead = denoisers.noise_from_denoised(ahead, denoised_ahead, after)
        x, sigma = x + width * (slope + slope_ahead) / 2, after
    return x


def neighbour_levels(
    batch: int, grid: Float[Tensor, " bins"], rng: Generator | None = None, *, skip: int = 1,
    probability: Float[Tensor, " bins-1"] | None = None,
) -> tuple[PerSample, PerSample]:  # fmt: skip
    """Draw a level and the one `skip` places below (latent consistency), or the lowest; float32.

    `probability`, of each but the lowest, is up to a factor. Source: Song et al. 2023, Alg. 2.
    """
    if probability is None:
        probability = torch.ones(len(grid) - 1)
    probability = probability.to(source(rng)["device"])
    drawn = torch.multinomial(probability, batch, replacement=True, generator=rng)
    index = 1 + drawn.to(grid.device)
    return grid.float()[index], grid.float()[(index - skip).clamp_min(0)]


def lognormal_probability(
    grid: Float[Tensor, " bins"], mean: float = -1.1, std: float = 2.0
) -> Float[Tensor, " bins-1"]:
    """How likely ``ln(sigma)`` falls between neighbours, up to a factor (Song and Dhariwal 3.5)."""
    return torch.special.ndtr((grid.log() - mean) / std).diff()


def doubling_bins(progress: float, first: int = 10, last: int = 1280) -> int:
    """Levels of the grid at a share of the training: 11 to 1281 (Song and Dhariwal 2024, 3.4)."""
    stages = int(math.log2(last / first)) + 1
    return min(first * 2 ** int(progress * stages), last) + 1


class Pair(NamedTuple):
    """Two points of one path, or nearly: x at sigma, and one below it."""

    x: Samples
    sigma: PerSample
    x_next: Samples
    sigma_next: PerSample


def distillation_pair(
    teacher: Denoiser, x: Samples, noise: Samples, sigma: PerSample, sigma_next: PerSample,
    label: Condition | None = None,
) -> Pair:  # fmt: skip
    """Noised data, and the teacher's Heun step from there (Song et al. 2023, Algorithm 2)."""
    x_noisy = add_noise(x, sigma, noise)
    return Pair(x_noisy, sigma, solve(teacher, x_noisy, sigma, sigma_next, label), sigma_next)


def training_pair(x: Samples, noise: Samples, sigma: PerSample, sigma_next: PerSample) -> Pair:
    """The pair of consistency training: the same data and noise (Song et al. 2023, Alg. 3)."""
    return Pair(add_noise(x, sigma, noise), sigma, add_noise(x, sigma_next, noise), sigma_next)


def squared(a: Samples, b: Tensor) -> PerSample:
    """Squared distance of each two samples, a mean over values."""
    return (a - b).square().flatten(1).mean(dim=1)


def pseudo_huber(a: Samples, b: Tensor) -> PerSample:
    """``sqrt(|a - b|^2 + c^2) - c``: a square below c, a length above (Song and Dhariwal 2024)."""
    c = 0.00054 * math.sqrt(a[0].numel())
    return ((a - b).square().flatten(1).sum(dim=1) + c**2).sqrt() - c


def consistency_loss(
    model: Denoiser, target: Denoiser, pair: Pair, label: Condition | None = None,
    distance: Distance = squared, weight: PerSample | None = None,
) -> Float[Tensor, ""]:  # fmt: skip
    """``d(f(x, sigma), sg[f(x_next, sigma_next)])``; target is f or its average (Eq. 7, Eq. 10)."""
    with torch.no_grad():
        answer = target(pair.x_next, pair.sigma_next, label)
    distances = distance(model(pair.x, pair.sigma, label), answer)
    return distances.mean() if weight is None else (weight * distances).mean()


def consistency_preconditioning(
    sigma: PerSample, sigma_data: float, sigma_min: float = SIGMA_MIN
) -> Preconditioning:
    """EDM's factors, shifted: ``c_skip = 1``, ``c_out = 0`` at sigma_min (Song et al. 2023, C)."""
    above, total = sigma - sigma_min, sigma**2 + sigma_data**2
    c_skip, c_out = sigma_data**2 / (above**2 + sigma_data**2), above * sigma_data / total.sqrt()
    return edm_preconditioning(sigma, sigma_data)._replace(c_skip=c_skip, c_out=c_out)


class ConsistencyModel(nn.Module):
    """A denoiser's own network as ``f = c_skip x + c_out F``, the identity at sigma_min (Eq. 5)."""

    def __init__(self, denoiser: EDMDenoiser, sigma_min: float = SIGMA_MIN) -> None:
        super().__init__()
        self.network, self.sigma_data = denoiser.network, denoiser.sigma_data
        self.sigma_min = sigma_min

    def forward(self, x: Samples, sigma: PerSample, label: Condition | None = None) -> Samples:
        check_sigma(x, sigma)
        least = sigma.min()
        checks.refuse(
            least < self.sigma_min * (1 - 1e-5),
            lambda: ValueError(f"sigma is {least.item():g}, paths end at {self.sigma_min:g}"),
        )
        factors = consistency_preconditioning(sigma.to(x.dtype), self.sigma_data, self.sigma_min)
        c_skip, c_out, c_in, _ = (expand(factor, x) for factor in factors)
        return c_skip * x + c_out * self.network(c_in * x, factors.c_noise, label)


@torch.no_grad()
def multistep(
    model: Denoiser, z: Samples, levels: Float[Tensor, " evaluations"],
    label: Condition | None = None, *, sigma_min: float = SIGMA_MIN, rng: Generator | None = None,
) -> Steps:  # fmt: skip
    """To the end of the path from ``levels[0] * z``, noise again, to the end, ... (Algorithm 1)."""
    for index, sigma in enumerate(levels.tolist()):
        if index == 0:
            x = sigma * z
        else:
            x = x + math.sqrt(sigma**2 - sigma_min**2) * noise_like(z, rng)
        x = model(x, z.new_full((len(z),), sigma), label)
        yield Step(index, x, x, sigma_min, index + 1)


class TrajectoryModel(nn.Module):
    """From any level to any lower one: ``G = s/t x + (1 - s/t) g(x, t, s)`` (Kim et al. 2024, CTM).

    g is a copy of the denoiser that is given, around an MLP or the book's U-Net, with one more
    input, a constant channel of ``ln(s) / 4``, which at first counts for nothing.
    """

    def __init__(self, denoiser: EDMDenoiser) -> None:
        super().__init__()
        self.network, self.sigma_data = _with_channel(denoiser.network), denoiser.sigma_data

    def forward(
        self, x: Samples, sigma: PerSample,
        sigma_next: PerSample, label: Condition | None = None, aim: bool = False,
    ) -> Samples:  # fmt: skip
        """To sigma_next, above 0, up to sigma; with `aim` g, where the line there meets level 0."""
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
    model: Jump, target: Jump, x_noisy: Samples, x_between: Samples, sigma: PerSample,
    sigma_between: PerSample, sigma_next: PerSample, label: Condition | None = None,
    distance: Distance = squared, sigma_min: float | None = SIGMA_MIN,
) -> Float[Tensor, ""]:  # fmt: skip
    """Whether one jump lands where the teacher's part of the way and a second jump land.

    The teacher took x_noisy to x_between. Both landing points are sent on to sigma_min by the
    target, and compared there; with None, which saves two passes, as they are. The target is G with
    frozen parameters; gradients pass through it to the model's landing point. Levels are t, u and
    s of Kim et al. 2024 (CTM), Section 3.
    """
    checks.check_same_shape(x_noisy=x_noisy, x_between=x_between)
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
    model: Jump, z: Samples, levels: Ladder,
    label: Condition | None = None, *, gamma: float = 0.0, rng: Generator | None = None,
) -> Steps:  # fmt: skip
    """Jump down falling levels, all above 0: below the next one, and up to it with new noise.

    gamma goes from 0, no new noise, to 1, where every jump goes to the end (CTM, gamma-sampling).
    """
    x, end = levels[0].item() * z, levels[-1].item()
    ones = z.new_ones(len(z))
    for index, (sigma, sigma_next) in enumerate(itertools.pairwise(levels)):
        low = max(end, math.sqrt(1 - gamma**2) * sigma_next.item())
        x = model(x, sigma.item() * ones, low * ones, label)
        if (added := sigma_next.item() ** 2 - low**2) > 0:
            x = x + math.sqrt(added) * noise_like(z, rng)
        yield Step(index, x, x, sigma_next.item(), index + 1)

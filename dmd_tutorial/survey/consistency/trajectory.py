"""Consistency trajectory models: jumps from any level of a path to any lower one."""

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from dmd_tutorial.checks import Condition, PerSample, Samples, check_same_shape, check_sigma, expand
from dmd_tutorial.denoisers import EDMDenoiser, edm_preconditioning
from dmd_tutorial.networks import MLP, UNet
from dmd_tutorial.noise import SIGMA_MIN, noise_like
from dmd_tutorial.samplers import Step
from dmd_tutorial.samplers.step import Ladder
from dmd_tutorial.survey.consistency.loss import Distance, squared

Jump = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # (x, sigma, sigma_next, label)


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
    model: Jump, z: Samples, levels: Ladder,
    label: Condition | None = None, *, gamma: float = 0.0, rng: Generator | None = None,
) -> Iterator[Step]:  # fmt: skip
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

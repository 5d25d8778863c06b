"""The consistency loss (Song et al. 2023): two points of one path must be sent to one place."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from dmd_tutorial.checks import Condition, PerSample, Samples
from dmd_tutorial.denoisers import Denoiser
from dmd_tutorial.survey.consistency.pairs import Pair

Distance = Callable[[Tensor, Tensor], Tensor]  # two batches of samples to (batch,)


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

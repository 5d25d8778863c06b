"""Run a sampler, or a one-step generator, to its end."""

from collections import deque
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dmd_tutorial.checks import Condition, Samples
from dmd_tutorial.denoisers import Denoiser, sigma_range, zero_score
from dmd_tutorial.noise import sampling_levels
from dmd_tutorial.samplers.classical import heun
from dmd_tutorial.samplers.step import Ladder, Steps


def sample(
    denoiser: Denoiser, z: Samples, label: Condition | None = None, *, steps: int = 18,
    sampler: Callable[..., Steps] = heun, levels: Ladder | None = None, batch: int = 1000,
) -> Samples:  # fmt: skip
    """Run a sampler to its end; without levels, `steps` of EDM's spacing over the denoiser's range.

    Options of the sampler are bound by `functools.partial`. The samples come back in the type of z;
    `batch` is how many are made at a time: a matter of memory.
    """
    if levels is None:
        levels = sampling_levels(steps, *sigma_range(denoiser))
    finished = [z[:0]]
    for z_part, label_part in _in_batches(z, label, batch):
        walk = sampler(denoiser, z_part, levels, label_part)
        finished.append(deque(walk, maxlen=1).pop().x.to(z.dtype))  # earlier states are let go
    return torch.cat(finished)


def evaluations(sampler: Callable[..., Steps], steps: int) -> int:
    """How often a sampler asks the denoiser in so many steps: it is run, on one number."""
    walk = sampler(zero_score, torch.zeros(1, 1), sampling_levels(steps))
    return deque(walk, maxlen=1).pop().evaluations


@torch.no_grad()
def one_step(
    generator: nn.Module, z: Float[Tensor, "count *shape"], label: Condition | None = None, *,
    batch: int = 1000,
) -> Float[Tensor, "count *shape"]:  # fmt: skip
    """Run a one-step generator, `batch` samples at a time, without gradient."""
    return torch.cat([z[:0], *(generator(*part) for part in _in_batches(z, label, batch))])


def _in_batches(z: Tensor, label: Tensor | None, batch: int) -> Iterator[tuple]:
    if label is not None and len(label) != len(z):
        raise ValueError(f"there are {len(label)} labels, z has {len(z)} samples")
    for first in range(0, len(z), batch):
        part = slice(first, first + batch)
        yield z[part], None if label is None else label[part]

"""Run a sampler, or a one-step generator, to its end."""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dmd_tutorial.checks import Condition, Samples
from dmd_tutorial.denoisers import Denoiser
from dmd_tutorial.noise import sampling_levels
from dmd_tutorial.samplers.classical import heun
from dmd_tutorial.samplers.step import Ladder, Step


def sample(
    denoiser: Denoiser, z: Samples, label: Condition | None = None, *, steps: int = 18,
    sampler: Callable[..., Iterator[Step]] = heun, levels: Ladder | None = None, batch: int = 1000,
) -> Samples:  # fmt: skip
    """Run a sampler to its end; without levels it takes `steps` steps on EDM's.

    Options of the sampler are bound by `functools.partial`. The samples come back in the type of z;
    `batch` is how many are made at a time: a matter of memory.
    """
    if levels is None:
        levels = sampling_levels(steps)
    finished = []
    for z_part, label_part in _in_batches(z, label, batch):
        *_, last = sampler(denoiser, z_part, levels, label_part)
        finished.append(last.x.to(z.dtype))
    return torch.cat(finished)


@torch.no_grad()
def one_step(
    generator: nn.Module, z: Float[Tensor, "count *shape"], label: Condition | None = None, *,
    batch: int = 1000,
) -> Float[Tensor, "count *shape"]:  # fmt: skip
    """Run a one-step generator, `batch` samples at a time, without gradient."""
    return torch.cat([generator(*part) for part in _in_batches(z, label, batch)])


def _in_batches(
    z: Tensor, label: Tensor | None, batch: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    parts = z.split(batch)
    labels = [None] * len(parts) if label is None else label.split(batch)
    return zip(parts, labels, strict=True)

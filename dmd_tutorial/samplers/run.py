"""Run a sampler, or a one-step generator, to its end."""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dmd_tutorial.denoisers import Denoiser
from dmd_tutorial.noise import sampling_levels
from dmd_tutorial.samplers.classical import heun
from dmd_tutorial.samplers.step import Step


def sample(
    denoiser: Denoiser,
    z: Float[Tensor, "batch *shape"],
    label: Int[Tensor, " batch"] | None = None,
    *,
    steps: int = 18,
    sampler: Callable[..., Iterator[Step]] = heun,
    levels: Float[Tensor, " steps+1"] | None = None,
    batch: int = 1000,
) -> Float[Tensor, "batch *shape"]:
    """Run a sampler to its end, batch by batch.

    Args:
        denoiser: The teacher.
        z: Standard normal noise, (count, *shape).
        label: Class of each sample, (count,), or None.
        steps: How many steps, where no levels are given.
        sampler: Any of this room that takes levels, with its options bound by `functools.partial`.
        levels: Falling noise levels, (steps + 1,); EDM's with `steps` steps without them.
        batch: How many samples are made at a time. It changes the memory, not the samples.

    Returns:
        Samples, (count, *shape), in the type of z.
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
    generator: nn.Module,
    z: Float[Tensor, "count *shape"],
    label: Int[Tensor, " count"] | None = None,
    *,
    batch: int = 1000,
) -> Float[Tensor, "count *shape"]:
    """Run a one-step generator, batch by batch, without gradient.

    Args:
        generator: The student.
        z: Standard normal noise, (count, *shape).
        label: Class of each sample, (count,), or None.
        batch: How many samples are made at a time.

    Returns:
        Samples, (count, *shape).
    """
    return torch.cat([generator(*part) for part in _in_batches(z, label, batch)])


def _in_batches(
    z: Tensor, label: Tensor | None, batch: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    parts = z.split(batch)
    labels = [None] * len(parts) if label is None else label.split(batch)
    return zip(parts, labels, strict=True)

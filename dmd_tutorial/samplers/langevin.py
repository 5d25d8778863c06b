"""Langevin dynamics, at one noise level and down a ladder of them (NCSN)."""

import math

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from dmd_tutorial.checks import Condition, Samples, check_finite
from dmd_tutorial.denoisers import Denoiser, score_from_denoised
from dmd_tutorial.noise import source
from dmd_tutorial.samplers.step import Counted, Step, Steps, as_state, start


@torch.no_grad()
def langevin(
    denoiser: Denoiser, x: Samples, sigma: float, steps: int,
    step_size: float, label: Condition | None = None, *, rng: Generator | None = None,
) -> Steps:  # fmt: skip
    """Langevin dynamics at one noise level, from x: up the score, plus noise.

    ``x <- x + step_size * score(x) + sqrt(2 step_size) * noise``, where step_size is in the units
    of x squared. Source: Song and Ermon 2019, Eq. 4 (their step is twice ours).
    """
    check_finite(x=x)
    if sigma <= 0 or step_size <= 0:
        raise ValueError(f"sigma and step_size must be above 0, not {sigma} and {step_size}")
    counted = Counted(denoiser, label, x.dtype)
    dtype, x = x.dtype, as_state(x)
    levels = torch.full((len(x),), float(sigma), dtype=x.dtype, device=x.device)
    for index in range(steps):
        denoised = counted(x, sigma)
        noise = torch.randn(x.shape, dtype=dtype, **source(rng)).to(x)
        score = score_from_denoised(x, denoised, levels)
        x = x + step_size * score + math.sqrt(2 * step_size) * noise
        yield Step(index, x, denoised, sigma, counted.calls)


@torch.no_grad()
def annealed_langevin(
    denoiser: Denoiser, z: Samples, levels: Float[Tensor, " levels"],
    label: Condition | None = None, *, steps_per_level: int = 10, step_ratio: float = 0.1,
    rng: Generator | None = None,
) -> Steps:  # fmt: skip
    """Langevin dynamics down a ladder of noise levels, all above 0.

    The step shrinks with the level, ``step_ratio * sigma^2``. Source: Song and Ermon 2019, Alg. 1.
    """
    x = start(z, levels)
    index = 0
    for sigma in levels.tolist():
        step_size = step_ratio * sigma**2
        walk = langevin(denoiser, x.to(z.dtype), sigma, steps_per_level, step_size, label, rng=rng)
        for step in walk:
            x = step.x
            yield step._replace(index=index, evaluations=index + 1)
            index += 1

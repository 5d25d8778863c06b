"""What all samplers share: the record of a step, a denoiser that counts its calls, the start."""

import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dmd_tutorial.checks import Condition, Samples, check_finite
from dmd_tutorial.denoisers import Denoiser, noise_from_denoised

Ladder = Float[Tensor, " steps+1"]  # falling noise levels


class Step(NamedTuple):
    """What a sampler has done so far."""

    index: int  # type: ignore[assignment]  # from 0; hides tuple.index, which nobody needs
    x: Samples  # the state after the step, see `as_state`
    denoised: Samples  # the denoiser's last answer, in the same type
    sigma: float  # the noise level that x has now
    evaluations: int  # calls of the denoiser since the start


Steps = Iterator[Step]


def as_state(x: Samples) -> Samples:
    """The same numbers in the type of a state: float64, in which many small steps add up."""
    if x.device.type != "mps":
        return x.double()
    warnings.warn("mps has no float64: samplers add up their steps in float32", stacklevel=2)
    return x.float()


class Counted:
    """A denoiser in a state's type outside and in `dtype` inside, that counts its calls."""

    def __init__(self, denoiser: Denoiser, label: Condition | None, dtype: torch.dtype) -> None:
        self.denoiser, self.label, self.dtype, self.calls = denoiser, label, dtype, 0

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        self.calls += 1
        levels = torch.full((len(x),), float(sigma), dtype=self.dtype, device=x.device)
        return as_state(self.denoiser(x.to(self.dtype), levels, self.label))

    def slope(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """The denoised estimate, and the slope dx/dsigma that it implies (the noise); sigma > 0."""
        denoised = self(x, sigma)
        levels = torch.full((len(x),), float(sigma), dtype=x.dtype, device=x.device)
        return denoised, noise_from_denoised(x, denoised, levels)


def start(z: Samples, levels: Float[Tensor, " levels"]) -> Samples:
    """Where a sampler starts: ``levels[0] * z``; levels must fall."""
    check_finite(z=z)
    if len(levels) < 2 or (levels.diff() >= 0).any():
        raise ValueError(f"levels must fall from first to last, they are {levels.tolist()}")
    return levels[0].item() * as_state(z)

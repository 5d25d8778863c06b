"""What all samplers share: the record of a step, a denoiser that counts its calls, the start."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dmd_tutorial.checks import check_finite
from dmd_tutorial.denoisers import Denoiser, noise_from_denoised


class Step(NamedTuple):
    """What a sampler has done so far.

    Attributes:
        index: The step's number, from 0.
        x: The state after the step, (batch, *shape), float64.
        denoised: The denoiser's last answer, (batch, *shape), float64.
        sigma: The noise level that x has now, in the units of x.
        evaluations: How often the denoiser has been called since the start.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs
    x: Float[Tensor, "batch *shape"]
    denoised: Float[Tensor, "batch *shape"]
    sigma: float
    evaluations: int


class Counted:
    """A denoiser in float64 outside and its own type inside, that counts its calls.

    Args:
        denoiser: The denoiser.
        label: Class of each sample, (batch,), or None.
        dtype: The type in which the denoiser is called.
    """

    def __init__(self, denoiser: Denoiser, label: Tensor | None, dtype: torch.dtype) -> None:
        self.denoiser, self.label, self.dtype, self.calls = denoiser, label, dtype, 0

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """Denoise x, (batch, *shape), all of whose samples have the level sigma."""
        self.calls += 1
        levels = torch.full((len(x),), float(sigma), dtype=self.dtype, device=x.device)
        return self.denoiser(x.to(self.dtype), levels, self.label).double()

    def slope(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """Ask for the denoised estimate, and the slope that it implies.

        Args:
            x: The state, (batch, *shape).
            sigma: Its noise level, above 0.

        Returns:
            The denoised estimate, and dx/dsigma of the probability-flow ODE, which is also the
            estimated noise (EDM, Eq. 1 and 3).
        """
        denoised = self(x, sigma)
        levels = torch.full((len(x),), float(sigma), dtype=x.dtype, device=x.device)
        return denoised, noise_from_denoised(x, denoised, levels)


def start(
    z: Float[Tensor, "batch *shape"], levels: Float[Tensor, " levels"]
) -> Float[Tensor, "batch *shape"]:
    """Where a sampler starts: noise of the first level, in float64.

    Args:
        z: Standard normal noise, (batch, *shape).
        levels: Falling noise levels, at least two.

    Returns:
        ``levels[0] * z``.

    Raises:
        ValueError: If levels do not fall or z is not finite.
    """
    check_finite(z=z)
    if len(levels) < 2 or (levels.diff() >= 0).any():
        raise ValueError(f"levels must fall from first to last, they are {levels.tolist()}")
    return levels[0].item() * z.double()

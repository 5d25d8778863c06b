"""A consistency model, which sends every point of a path to its end; and sampling with it.

A path ends at sigma_min, where the model is the identity.
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from dmd_tutorial.checks import check_sigma, expand
from dmd_tutorial.denoisers import Denoiser, EDMDenoiser, Preconditioning, edm_preconditioning
from dmd_tutorial.noise import SIGMA_MIN, noise_like
from dmd_tutorial.samplers import Step


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


@torch.no_grad()
def multistep(
    model: Denoiser,
    z: Float[Tensor, "batch *shape"],
    levels: Float[Tensor, " evaluations"],
    label: Int[Tensor, " batch"] | None = None,
    *,
    sigma_min: float = SIGMA_MIN,
    rng: Generator | None = None,
) -> Iterator[Step]:
    """Sample with a consistency model: to the end of the path, noise again, to the end, ...

    Args:
        model: The consistency model.
        z: Standard normal noise, (batch, *shape); the start is ``levels[0] * z``.
        levels: Falling noise levels, one for each evaluation, above sigma_min.
        label: Class of each sample, (batch,), or None.
        sigma_min: Where the model's paths end.
        rng: Source of the new noise; torch's own without one.

    Yields:
        A record after each evaluation; its x is at level sigma_min.

    Source: Song et al. 2023, Algorithm 1.
    """
    for index, sigma in enumerate(levels.tolist()):
        if index == 0:
            x = sigma * z
        else:
            x = x + math.sqrt(sigma**2 - sigma_min**2) * noise_like(z, rng)
        x = model(x, z.new_full((len(z),), sigma), label)
        yield Step(index, x, x, sigma_min, index + 1)

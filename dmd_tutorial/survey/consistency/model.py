"""A consistency model sends every point of a path to its end at sigma_min (Song et al. 2023)."""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from dmd_tutorial.checks import Condition, PerSample, Samples, check_sigma, expand
from dmd_tutorial.denoisers import Denoiser, EDMDenoiser, Preconditioning, edm_preconditioning
from dmd_tutorial.noise import SIGMA_MIN, noise_like
from dmd_tutorial.samplers import Step


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
        """Send points to the ends of their paths."""
        check_sigma(x, sigma)
        if (sigma < self.sigma_min * (1 - 1e-5)).any():
            raise ValueError(f"sigma is {sigma.min().item():g}, paths end at {self.sigma_min:g}")
        factors = consistency_preconditioning(sigma.to(x.dtype), self.sigma_data, self.sigma_min)
        c_skip, c_out, c_in, _ = (expand(factor, x) for factor in factors)
        return c_skip * x + c_out * self.network(c_in * x, factors.c_noise, label)


@torch.no_grad()
def multistep(
    model: Denoiser, z: Samples, levels: Float[Tensor, " evaluations"],
    label: Condition | None = None, *, sigma_min: float = SIGMA_MIN, rng: Generator | None = None,
) -> Iterator[Step]:  # fmt: skip
    """To the end of the path from ``levels[0] * z``, noise again, to the end, ... (Algorithm 1)."""
    for index, sigma in enumerate(levels.tolist()):
        if index == 0:
            x = sigma * z
        else:
            x = x + math.sqrt(sigma**2 - sigma_min**2) * noise_like(z, rng)
        x = model(x, z.new_full((len(z),), sigma), label)
        yield Step(index, x, x, sigma_min, index + 1)

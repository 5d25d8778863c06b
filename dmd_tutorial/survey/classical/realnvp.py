"""Normalising flow: an invertible network, whose samples have an exact log-density."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Normal

from dmd_tutorial.checks import Condition
from dmd_tutorial.survey.classical.perceptron import Perceptron


class RealNVP(nn.Module):
    """A chain of affine couplings: invertible, with a Jacobian determinant that is a product.

    Each scales (by at most exp(`bound`)) and shifts some coordinates by amounts that a `Perceptron`
    reads off the others. Source: Dinh et al. 2017.
    """

    keeps: Tensor

    def __init__(
        self, dim: int = 2, classes: int = 0, hidden: int = 64, layers: int = 2,
        couplings: int = 8, bound: float = 2.0, copies: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        if dim < 2:
            raise ValueError(f"a coupling needs at least 2 dimensions, not {dim}")
        self.bound, bits = bound, (dim - 1).bit_length()
        # a coupling keeps the coordinates in whose index some bit is set; the next, the others
        index = torch.arange(dim)
        keeps = [((index >> (k // 2 % bits)) + k) % 2 for k in range(couplings)]
        self.register_buffer("keeps", torch.stack(keeps).float())
        self.couplings = nn.ModuleList(
            Perceptron(dim, 2 * dim, hidden, layers, classes, copies) for _ in range(couplings)
        )

    def forward(
        self, x: Float[Tensor, "batch *shape"], label: Condition | None = None
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, " batch"]]:
        """From data, points or images, to noise z and ``log |det dz/dx|``."""
        x, log_det = x.flatten(1), x.new_zeros(len(x))
        for keep, coupling in zip(self.keeps, self.couplings, strict=True):
            log_scale, shift = self._amounts(coupling, keep, x, label)
            x = x * log_scale.exp() + shift
            log_det = log_det + log_scale.sum(1)
        return x, log_det

    def sample(
        self, z: Float[Tensor, "batch dim"], label: Condition | None = None
    ) -> Float[Tensor, "batch dim"]:
        """From noise to data: the couplings undone, the last one first."""
        for keep, coupling in zip(self.keeps.flip(0), reversed(self.couplings), strict=True):
            log_scale, shift = self._amounts(coupling, keep, z, label)
            z = (z - shift) * (-log_scale).exp()
        return z

    def _amounts(
        self, coupling: nn.Module, keep: Tensor, x: Tensor, label: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Logarithm of the scale, and shift: 0 where a coordinate is kept."""
        keep = keep.to(x)
        log_scale, shift = coupling(keep * x, label).chunk(2, dim=1)
        change = 1 - keep
        return change * self.bound * torch.tanh(log_scale / self.bound), change * shift


def flow_log_prob(
    flow: RealNVP, x: Float[Tensor, "batch dim"], label: Condition | None = None
) -> Float[Tensor, " batch"]:
    """Exact log-density in nats: that of z, plus ``log |det dz/dx|`` (Dinh et al. 2017, Eq. 2)."""
    z, log_det = flow(x, label)
    return Normal(torch.zeros_like(z), torch.ones_like(z)).log_prob(z).sum(1) + log_det

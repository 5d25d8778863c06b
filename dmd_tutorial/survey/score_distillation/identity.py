"""Score identity distillation: a loss of another divergence, Fisher's."""

import torch
from jaxtyping import Float
from torch import Tensor

from dmd_tutorial import dmd
from dmd_tutorial.checks import check_same_shape, expand
from dmd_tutorial.dmd import Weighting


def sid_loss(
    x: Float[Tensor, "batch *shape"], sigma: Float[Tensor, " batch"],
    denoised_real: Float[Tensor, "batch *shape"], denoised_fake: Float[Tensor, "batch *shape"],
    alpha: float = 1.0, weighting: Weighting | str | dmd.WeightFunction = Weighting.EQ8,
) -> Float[Tensor, ""]:  # fmt: skip
    """Score identity distillation: a loss, maybe negative, that descends the Fisher divergence.

    Gradients run through x and both answers, not through the weight. With the exact critic and
    alpha 1/2 it is half of that of ``w |D_real - D_fake|^2``, critic's dependence on the generator
    included. The paper takes alpha 1 or 1.2; above 1 samples much wider than the teacher's are
    driven apart. Source: Zhou et al. 2024 (SiD), Eq. 23.
    """
    check_same_shape(x=x, denoised_real=denoised_real, denoised_fake=denoised_fake)
    with torch.no_grad():
        scale = dmd.weight(weighting, x, sigma, denoised_real) / sigma**2
    difference = denoised_real - denoised_fake
    product = difference * (denoised_real - x - alpha * difference)
    return (expand(scale, x) * product).mean()

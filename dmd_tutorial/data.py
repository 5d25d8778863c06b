"""Data: points on a plane, handwritten digits; labels and noise by seed."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from dmd_tutorial.mixtures import GaussianMixture


class Images(NamedTuple):
    """Images with their classes.

    Attributes:
        x: Pixels, (count, channels, height, width): float32 in [-1, 1], or uint8 levels 0..255.
        label: Class of each image, (count,).
        classes: Number of classes.
    """

    x: Float[Tensor, "count channels height width"]
    label: Int[Tensor, " count"]
    classes: int

    def take(
        self, index: Int[Tensor, " batch"], flip: Bool[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch channels height width"]:
        """Some of the images, as numbers in [-1, 1].

        Args:
            index: Which, (batch,).
            flip: Which of these are mirrored, left to right, (batch,); none without it.

        Returns:
            Images, (batch, channels, height, width), float32.
        """
        x = self.x[index]
        if x.dtype == torch.uint8:
            x = x.float() / 127.5 - 1
        if flip is not None:
            x = torch.where(flip[:, None, None, None], x.flip(-1), x)
        return x


def digits() -> Images:
    """The 1797 handwritten digits that scikit-learn carries, 8 x 8 pixels, 10 classes.

    Returns:
        The images; scikit-learn's 17 grey levels 0..16 become -1..1.

    Source: Alpaydin and Kaynak 1998, UCI "Optical Recognition of Handwritten Digits".
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    x = torch.as_tensor(raw.images, dtype=torch.float32)[:, None] / 8 - 1
    return Images(x, torch.as_tensor(raw.target, dtype=torch.int64), classes=10)


def two_modes(distance: float = 4.0, std: float = 0.4) -> GaussianMixture:
    """Two round Gaussians side by side: the target of the paper's Figure 3.

    Args:
        distance: Between the centres, which lie on the first axis around the origin.
        std: Standard deviation of each.

    Returns:
        The mixture, half of its weight in each mode.
    """
    half = distance / 2
    return GaussianMixture.isotropic(torch.tensor([[-half, 0.0], [half, 0.0]]), std)


def ring(modes: int = 8, radius: float = 2.0, std: float = 0.2) -> GaussianMixture:
    """Round Gaussians on a circle.

    Args:
        modes: How many, equally spaced, the first on the first axis.
        radius: Of the circle.
        std: Standard deviation of each.

    Returns:
        The mixture, equal weights.
    """
    angle = 2 * math.pi * torch.arange(modes, dtype=torch.float64) / modes
    return GaussianMixture.isotropic(radius * torch.stack([angle.cos(), angle.sin()], dim=1), std)


def balanced_labels(count: int, classes: int) -> Int[Tensor, " count"]:
    """Labels in which every class is equally frequent (up to one).

    Args:
        count: How many labels.
        classes: Number of classes.

    Returns:
        0, 1, ..., classes - 1, 0, 1, ..., (count,).
    """
    return torch.arange(count) % classes


def normal(
    count: int, shape: tuple[int, ...], rng: Generator | None = None
) -> Float[Tensor, "count *shape"]:
    """Standard normal noise z, the generator's and the sampler's input.

    Args:
        count: How many samples.
        shape: Shape of one sample.
        rng: Source of randomness; torch's own without one.

    Returns:
        Noise, (count, *shape), float32.
    """
    return torch.randn(count, *shape, generator=rng)


def seeded_noise(
    seeds: Sequence[int],
    shape: tuple[int, ...],
    classes: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Float[Tensor, "count *shape"], Int[Tensor, " count"] | None]:
    """Noise and class of each sample from a generator of its own, as EDM's sampler draws them.

    A sample then depends on its seed alone: not on its batch, nor on who else shares the work.
    The numbers of a GPU's generator are others than a CPU's.

    Args:
        seeds: One for each sample.
        shape: Shape of one sample.
        classes: Number of classes, 0 for none.
        device: Where the generators live.

    Returns:
        Noise, (count, *shape), then drawn from the same generators labels, (count,), or None.

    Source: Karras et al. 2022 (EDM), the protocol of their published images.
    """
    generators = [torch.Generator(device).manual_seed(seed % 2**32) for seed in seeds]
    z = torch.stack([torch.randn(shape, generator=g, device=device) for g in generators])
    if not classes:
        return z, None
    drawn = [torch.randint(classes, (), generator=g, device=device) for g in generators]
    return z, torch.stack(drawn)

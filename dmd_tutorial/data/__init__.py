"""Data: points on a plane, handwritten digits, captioned shapes; labels and noise by seed."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Generator, Tensor

from dmd_tutorial.checks import Samples
from dmd_tutorial.data.captioned import Captioned, shapes
from dmd_tutorial.mixtures import GaussianMixture
from dmd_tutorial.noise import source


class Images(NamedTuple):
    """Images with their classes."""

    x: Shaped[Tensor, "count channels height width"]  # float32 in [-1, 1], or uint8 levels 0..255
    label: Int[Tensor, " count"]
    classes: int  # 0 for none
    class_names: tuple[str, ...] = ()  # where they are known

    def take(
        self, index: Int[Tensor, " batch"], flip: Bool[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch channels height width"]:
        """Some of the images, as float32 in [-1, 1]; those in flip are mirrored, left to right."""
        x = self.x[index]
        if x.dtype == torch.uint8:
            x = x.float() / 127.5 - 1
        if flip is not None:
            x = torch.where(flip[:, None, None, None], x.flip(-1), x)
        return x

    def split(self, held_out: int, seed: int = 0) -> tuple["Images", "Images"]:
        """Cut at random into images to train on, and so many that are held out to test on."""
        count = len(self.x)
        if not 0 < held_out < count:
            raise ValueError(f"cannot hold out {held_out} of {count} images")
        order = torch.randperm(count, generator=Generator().manual_seed(seed))
        parts = order.split([held_out, count - held_out])
        test, train = (self._replace(x=self.x[part], label=self.label[part]) for part in parts)
        return train, test


def digits() -> Images:
    """The 1797 handwritten digits that scikit-learn carries, 8 x 8 pixels, 10 classes.

    Its 17 grey levels 0..16 become -1..1. Source: Alpaydin and Kaynak 1998, UCI "Optical
    Recognition of Handwritten Digits".
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    x = torch.as_tensor(raw.images, dtype=torch.float32)[:, None] / 8 - 1
    return Images(x, torch.as_tensor(raw.target, dtype=torch.int64), classes=10)


def two_modes(distance: float = 4.0, std: float = 0.4) -> GaussianMixture:
    """Two round Gaussians side by side around the origin: the target of the paper's Figure 3."""
    half = distance / 2
    return GaussianMixture.isotropic(torch.tensor([[-half, 0.0], [half, 0.0]]), std)


def ring(modes: int = 8, radius: float = 2.0, std: float = 0.2) -> GaussianMixture:
    """Round Gaussians of equal weight, equally spaced on a circle, the first on the first axis."""
    angle = 2 * math.pi * torch.arange(modes, dtype=torch.float64) / modes
    return GaussianMixture.isotropic(radius * torch.stack([angle.cos(), angle.sin()], dim=1), std)


def balanced_labels(count: int, classes: int) -> Int[Tensor, " count"]:
    """Labels 0, 1, ..., classes - 1, 0, 1, ...: every class is equally frequent (up to one)."""
    return torch.arange(count) % classes


def normal(count: int, shape: tuple[int, ...], rng: Generator | None = None) -> Samples:
    """Standard normal noise z, float32, the generator's and the sampler's input."""
    return torch.randn(count, *shape, **source(rng))


def seeded_noise(
    seeds: Sequence[int], shape: tuple[int, ...], classes: int = 0, device: str = "cpu"
) -> tuple[Samples, Int[Tensor, " count"] | None]:
    """Noise and class of each sample from a random source of its own, as EDM's sampler draws them.

    A sample then depends on its seed alone: not on its batch, nor on who else shares the work. The
    numbers of a GPU's source, on `device`, are others than a CPU's. Classes are drawn after the
    noise. Seeds, from 0 to 2^30 - 1, are no stream's but a training's: a sample may be in its first
    batch, but in no pair. Source: Karras et al. 2022 (EDM), the protocol of their published images.
    """
    if wrong := [seed for seed in seeds if not 0 <= seed < 2**30]:
        raise ValueError(f"a sample's seed is from 0 to 2^30 - 1, not {wrong[0]}")
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    z = torch.stack([torch.randn(shape, generator=g, device=device) for g in generators])
    if not classes:
        return z, None
    drawn = [torch.randint(classes, (), generator=g, device=device) for g in generators]
    return z, torch.stack(drawn)

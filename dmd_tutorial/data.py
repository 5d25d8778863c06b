"""Data: two-dimensional targets, digits, torchvision's sets, your own images; noise by seed."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from dmd_tutorial.images import read_images
from dmd_tutorial.mixtures import GaussianMixture

TORCHVISION = {
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "mnist": "MNIST",
    "fashion-mnist": "FashionMNIST",
}


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
    count: int, shape: tuple[int, ...], generator: Generator | None = None
) -> Float[Tensor, "count *shape"]:
    """Standard normal noise z, the generator's and the sampler's input.

    Args:
        count: How many samples.
        shape: Shape of one sample.
        generator: Source of randomness; torch's own without one.

    Returns:
        Noise, (count, *shape), float32.
    """
    return torch.randn(count, *shape, generator=generator)


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


def load_images(
    name_or_path: str | Path,
    size: int | None = None,
    channels: int | None = None,
    *,
    train: bool = True,
    folder: str | Path = "runs/data",
) -> Images:
    """Images by the name of a data set, or from a folder or zip (see `dmd_tutorial.images`).

    Args:
        name_or_path: "digits", a set of torchvision's ("cifar10", "cifar100", "mnist",
            "fashion-mnist"), which is downloaded once, or a path. ImageNet at 64 pixels is a path:
            a folder of class folders, or EDM's zip with its ``dataset.json``.
        size: Their height and width in pixels; that of the set where it has one, else 32.
        channels: 1 for grey, 3 for colours; what they have without it.
        train: The part for training of torchvision's sets, else the one for tests.
        folder: Where torchvision's sets are kept.

    Returns:
        The images: digits as numbers in [-1, 1], all others as levels 0 to 255, which take a
        quarter of the memory (CIFAR-10 154 MB, ImageNet at 64 pixels 15.7 GB).

    Raises:
        FileNotFoundError: If there is neither such a set nor such a path.
        ValueError: If an image or a label is refused; the message names the file.
        RuntimeError: If a set cannot be downloaded.
    """
    if name_or_path == "digits":
        return digits()
    if str(name_or_path) in TORCHVISION:
        return _torchvision(str(name_or_path), size, channels, train, Path(folder))
    if not Path(name_or_path).exists():
        names = ", ".join(["digits", *TORCHVISION])
        raise FileNotFoundError(f"{name_or_path} is neither a path nor a data set ({names})")
    read = read_images(name_or_path, size or 32, channels)
    if read.left_alone:
        print(f"{name_or_path}: {len(read.names)} images, {read.left_alone} other files left alone")
    return Images(read.x, read.label, read.classes)


def _torchvision(
    name: str, size: int | None, channels: int | None, train: bool, folder: Path
) -> Images:
    import torchvision

    try:
        dataset = getattr(torchvision.datasets, TORCHVISION[name])(
            str(folder), train=train, download=True
        )
    except (OSError, RuntimeError) as error:
        raise RuntimeError(
            f"{name} is neither in {folder} nor could it be downloaded ({error}). Fetch it on a "
            "machine with a network, or give a folder of images."
        ) from error
    x = torch.as_tensor(dataset.data)
    x = x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2)
    if channels == 3:
        x = x.expand(-1, 3, -1, -1)
    if (size or x.shape[-1]) != x.shape[-1] or (channels or x.shape[1]) != x.shape[1]:
        found = tuple(x.shape[1:])
        raise ValueError(f"{name} has images of shape {found}, not {channels} x {size} x {size}")
    return Images(x.contiguous(), torch.as_tensor(dataset.targets), len(dataset.classes))

"""A classifier of small colour images: features to compare in, where Inception cannot be had.

A Frechet distance in its features is a distance of its own. It ranks models of one data set; it is
no FID, and its numbers mean nothing beside those of another classifier.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from dmd_tutorial.data import Images


class ImageClassifier(nn.Module):
    """Residual convolutions at three resolutions, a mean over places, standardised features.

    Args:
        channels: Colour channels of an image.
        classes: Number of classes.
        width: Channels at the first resolution; there are 4 times as many features.
    """

    def __init__(self, channels: int = 3, classes: int = 10, width: int = 64) -> None:
        super().__init__()
        self.config = {"channels": channels, "classes": classes, "width": width}
        self.first = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        widths = [width, 2 * width, 4 * width]
        self.blocks = nn.ModuleList(
            Residual(before, after, shrink=index > 0)
            for index, (before, after) in enumerate(zip([width, *widths], widths, strict=False))
        )
        self.standardise = nn.BatchNorm1d(widths[-1], affine=False)
        self.head = nn.Linear(widths[-1], classes)

    def features(self, x: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch width"]:
        """The penultimate layer: over the training images each feature has mean 0, variance 1.

        Args:
            x: Images in [-1, 1], at least 8 pixels high and wide.

        Returns:
            Features without unit, (batch, 4 width).

        Raises:
            ValueError: If the images have other channels.
        """
        if x.ndim != 4 or x.shape[1] != self.config["channels"]:
            wanted = f"(batch, {self.config['channels']}, h, w)"
            raise ValueError(f"x has shape {tuple(x.shape)}, the classifier wants {wanted}")
        h = self.first(x)
        for block in self.blocks:
            h = block(h)
        return self.standardise(functional.silu(h).mean(dim=(2, 3)))

    def forward(self, x: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch classes"]:
        """Logits of the classes.

        Args:
            x: Images in [-1, 1].

        Returns:
            Logits, (batch, classes).
        """
        return self.head(self.features(x))


class Residual(nn.Module):
    """Two convolutions beside a short cut."""

    def __init__(self, before: int, after: int, shrink: bool) -> None:
        super().__init__()
        stride = 2 if shrink else 1
        self.norm1, self.norm2 = nn.BatchNorm2d(before), nn.BatchNorm2d(after)
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.short_cut = nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, before, h, w) to (b, after, h / stride, w / stride)."""
        h = self.conv1(functional.silu(self.norm1(x)))
        return self.short_cut(x) + self.conv2(functional.silu(self.norm2(h)))


def train_image_classifier(
    images: Images,
    steps: int = 4_000,
    batch: int = 512,
    learning_rate: float = 3e-3,
    width: int = 64,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> ImageClassifier:
    """Train a classifier on images that are mirrored and shifted by up to an eighth.

    Args:
        images: The data, with classes.
        steps: Optimiser steps.
        batch: Images per step.
        learning_rate: AdamW's at its peak; it rises over a tenth of the run and falls to 0.
        width: Channels at the first resolution.
        device: Where it is trained.
        seed: Of the weights and of what is drawn.

    Returns:
        The classifier, in evaluation mode, without gradients.

    Raises:
        ValueError: If the images have no classes.
    """
    if not images.classes:
        raise ValueError("a classifier needs classes, the images have none")
    rng = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = ImageClassifier(images.x.shape[1], images.classes, width).to(device)
    optimiser = torch.optim.AdamW(classifier.parameters(), learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, learning_rate, total_steps=steps, pct_start=0.1
    )
    gpu = torch.device(device).type == "cuda"
    for _ in range(steps):
        index = torch.randint(len(images.x), (batch,), generator=rng)
        flip = torch.rand(batch, generator=rng) < 0.5
        x = _shifted(images.take(index, flip), rng).to(device)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=gpu):
            logits = classifier(x)
        loss = functional.cross_entropy(logits.float(), images.label[index].to(device))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return classifier.requires_grad_(False).eval()


def _shifted(x: Tensor, rng: torch.Generator) -> Tensor:
    """A batch shifted as one, by up to an eighth of its size, its edge repeated."""
    reach = x.shape[-1] // 8
    down, right = torch.randint(0, 2 * reach + 1, (2,), generator=rng).tolist()
    padded = functional.pad(x, [reach] * 4, mode="replicate")
    return padded[:, :, down : down + x.shape[2], right : right + x.shape[3]]


@torch.no_grad()
def accuracy(classifier: nn.Module, images: Images, batch: int = 1000) -> float:
    """Share of images that a classifier reads as their class.

    Args:
        classifier: Any, from images to logits.
        images: Images with classes.
        batch: Images at a time.

    Returns:
        A number from 0 to 1.
    """
    device = next(classifier.parameters()).device
    correct = 0
    for index in torch.arange(len(images.x)).split(batch):
        read = classifier(images.take(index).to(device)).argmax(1).cpu()
        correct += int((read == images.label[index]).sum())
    return correct / len(images.x)

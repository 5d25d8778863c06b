"""A small classifier of 8 x 8 digits: its penultimate layer is what digits are compared in."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional


class DigitClassifier(nn.Module):
    """Three convolutions, one layer of features, one linear layer to the classes.

    The features are standardised: over the training images each has a mean of about 0 and a
    variance of about 1. So a distance between features is in units of the spread of real digits.

    Args:
        classes: Number of classes.
        width: Number of features.
    """

    def __init__(self, classes: int = 10, width: int = 64) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.SiLU(),
            nn.Conv2d(32, 32, 3, padding=1), nn.SiLU(), nn.AvgPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1), nn.SiLU(), nn.Flatten(),
            nn.Linear(32 * 4 * 4, width),
        )  # fmt: skip
        self.standardise = nn.BatchNorm1d(width, affine=False)
        self.head = nn.Linear(width, classes)

    def features(self, x: Float[Tensor, "batch 1 8 8"]) -> Float[Tensor, "batch width"]:
        """The penultimate layer.

        Args:
            x: Images in [-1, 1], (batch, 1, 8, 8).

        Returns:
            Features without unit, (batch, width).

        Raises:
            ValueError: If the images have another shape.
        """
        if x.ndim != 4 or x.shape[1:] != (1, 8, 8):
            raise ValueError(f"x has shape {tuple(x.shape)}, the classifier wants (batch, 1, 8, 8)")
        return self.standardise(self.trunk(x))

    def forward(self, x: Float[Tensor, "batch 1 8 8"]) -> Float[Tensor, "batch classes"]:
        """Logits of the classes.

        Args:
            x: Images in [-1, 1], (batch, 1, 8, 8).

        Returns:
            Logits, (batch, classes).
        """
        return self.head(self.features(x))


def split(
    count: int, held_out: int, seed: int = 0
) -> tuple[Int[Tensor, " train"], Int[Tensor, " held_out"]]:
    """Cut a data set at random into a part to train on and a part to test on.

    Args:
        count: Images in the set.
        held_out: How many of them are kept for the test.
        seed: Of the shuffle.

    Returns:
        Indices of the training images and of the held-out ones.

    Raises:
        ValueError: If nothing would be left to train on.
    """
    if not 0 < held_out < count:
        raise ValueError(f"cannot hold out {held_out} of {count} images")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[held_out:], order[:held_out]


def train_classifier(
    x: Float[Tensor, "count 1 8 8"],
    label: Int[Tensor, " count"],
    steps: int = 500,
    batch: int = 128,
    learning_rate: float = 3e-3,
    noise: float = 0.2,
    seed: int = 0,
) -> DigitClassifier:
    """Train a classifier with AdamW; the learning rate falls along half a cosine.

    Args:
        x: Images in [-1, 1], (count, 1, 8, 8).
        label: Class of each, (count,).
        steps: Optimiser steps.
        batch: Images per step.
        learning_rate: At the start.
        noise: Each image gets Gaussian noise of a random level up to this, in the units of x, so
            that slightly noisy samples of a generator are read too.
        seed: Of the weights, the batches and the noise.

    Returns:
        The classifier, in evaluation mode, without gradients.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = DigitClassifier(classes=int(label.max()) + 1)
        optimiser = torch.optim.AdamW(classifier.parameters(), learning_rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        for _ in range(steps):
            chosen = torch.randint(len(x), (batch,))
            level = noise * torch.rand(batch, 1, 1, 1)
            x_noisy = x[chosen] + level * torch.randn(batch, *x.shape[1:])
            loss = functional.cross_entropy(classifier(x_noisy), label[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return classifier.requires_grad_(False).eval()

"""Train the classifier in whose features images are compared.

python -m benchmarks.classifier    # the digits', which lies in the package, from nothing
"""

import json
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from dmd_tutorial.data import Images, digits
from dmd_tutorial.features import CLASSIFIER_FILE, Classifier
from dmd_tutorial.files import write_tensors
from dmd_tutorial.training import moved

HELD_OUT = 360  # digits that the classifier is not trained on


def train_classifier(
    images: Images, steps: int = 500, batch: int = 128, learning_rate: float = 3e-3, *,
    noise: float = 0.2, augment: bool = False, width: int = 32, deep: bool = False,
    device: torch.device | str = "cpu", seed: int = 0,
) -> Classifier:  # fmt: skip
    """Train a `Classifier` with AdamW; the learning rate falls along half a cosine.

    Each image gets Gaussian noise of a random level up to `noise`, so that slightly noisy samples
    of a generator are read too. With `augment` images are mirrored and shifted, too.
    """
    if not images.classes:
        raise ValueError("a classifier needs classes, the images have none")
    channels, size = images.x.shape[1:3]
    kind = torch.device(device).type
    images = moved(torch.device(device), images)
    low = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        classifier = Classifier(size, channels, images.classes, width, deep).to(device)
        optimizer = torch.optim.AdamW(classifier.parameters(), learning_rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            chosen = torch.randint(len(images.x), (batch,))
            x = _shifted(images, chosen) if augment else images.take(chosen)
            if noise:
                level = noise * torch.rand(batch, 1, 1, 1)
                x = x + (level * torch.randn(x.shape)).to(device)
            with torch.autocast(kind, torch.bfloat16, enabled=low):
                logits = classifier(x)
            loss = functional.cross_entropy(logits.float(), images.label[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return classifier.requires_grad_(False).eval()


def _shifted(images: Images, chosen: Tensor) -> Tensor:
    """Images, half of them mirrored, shifted as one by up to an eighth, their edge repeated."""
    x = images.take(chosen, (torch.rand(len(chosen)) < 0.5).to(images.x.device))
    reach = x.shape[-1] // 8
    down, right = torch.randint(0, 2 * reach + 1, (2,)).tolist()
    padded = functional.pad(x, [reach] * 4, mode="replicate")
    return padded[:, :, down : down + x.shape[2], right : right + x.shape[3]]


@torch.no_grad()
def accuracy(classifier: Classifier, images: Images, batch: int = 1000) -> float:
    """Share of images that a classifier reads as their class."""
    device = next(classifier.parameters()).device
    parts = torch.arange(len(images.x)).split(batch)
    read = [classifier(images.take(part).to(device)).argmax(1).cpu() for part in parts]
    return int((torch.cat(read) == images.label).sum()) / len(images.x)


def save_classifier(path: str | Path, classifier: Classifier, **made_by: object) -> None:
    """Write a classifier, and in the file's header what made it."""
    header = {name: str(value) for name, value in made_by.items()}
    config = json.dumps(classifier.config)
    write_tensors(path, classifier.state_dict(), config=config, **header)


def remake_classifier() -> None:
    """Train the classifier on its part of the digits, test it on the rest, write the file."""
    train, held_out = digits().split(HELD_OUT)
    classifier = train_classifier(train)
    correct = round(accuracy(classifier, held_out) * HELD_OUT)
    save_classifier(
        CLASSIFIER_FILE, classifier, made_by="python -m benchmarks.classifier",
        trained_on=f"{len(train.x)} of scikit-learn's digits, split and training with seed 0",
        held_out=HELD_OUT, held_out_correct=correct, torch=torch.__version__,
    )  # fmt: skip
    print(f"{correct} of {HELD_OUT} right")


if __name__ == "__main__":
    remake_classifier()

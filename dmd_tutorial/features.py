"""Features in which images are compared: 8-bit images in, rows of numbers out.

For digits they are the penultimate layer of a small classifier that lies in the package (`python -m
dmd_tutorial.features` makes it again), for others torch-fidelity's Inception, or a classifier of
one's own, whose Frechet distances rank models of one data set and mean nothing beside another's.
"""

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from torch_fidelity.utils import create_feature_extractor

from dmd_tutorial.checks import check_finite
from dmd_tutorial.data import Images, digits
from dmd_tutorial.networks.classifier import Classifier

CLASSIFIER_FILE = Path(__file__).parent / "weights" / "digits-classifier.safetensors"
HELD_OUT = 360  # digits that the classifier is not trained on
INCEPTION = "inception-v3-compat"  # torch-fidelity's name for the original's features


def to_8_bit(x: Float[Tensor, "batch channels h w"]) -> UInt8[Tensor, "batch channels h w"]:
    """What an image file would hold: clamp to [-1, 1], round to 256 levels; levels as they are."""
    if x.ndim != 4:
        raise ValueError(f"images must be (batch, channels, h, w), not {tuple(x.shape)}")
    if x.dtype == torch.uint8:
        return x
    check_finite(x=x)
    x = x.to(torch.promote_types(x.dtype, torch.float32))  # bfloat16 cannot tell 256 levels apart
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def extract_features(
    x: Float[Tensor, "count channels h w"], features: str = "digits", batch: int = 500
) -> Float[Tensor, "count width"]:
    """Features of images, rounded to 8 bits first; float32, on the CPU.

    `features` is "digits" (64 of them, for 1 x 8 x 8), "inception" (2048, for one or three channels
    of any size; a RuntimeError if its weights are missing), or a file of `save_classifier`.
    """
    if len(x) == 0:
        raise ValueError("there are 0 images")
    extractor = _extractor(features, x.device)
    with torch.no_grad():
        return torch.cat([extractor(to_8_bit(some)).cpu() for some in x.split(batch)])


@lru_cache(maxsize=4)
def _extractor(features: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    """What makes features of 8-bit images that are on this device."""
    if features == "inception":
        return _inception(device)
    if features != "digits" and not features.endswith(".safetensors"):
        known = ["digits", "inception", "a classifier's file"]
        raise ValueError(f"features must be one of {known}, not {features!r}")
    classifier = load_classifier(CLASSIFIER_FILE if features == "digits" else features).to(device)
    # in float32 without shortcuts, so that they can be repeated
    exactly = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    return exactly(lambda images: classifier.features(images.float() / 127.5 - 1))


def _inception(device: torch.device) -> Callable[[Tensor], Tensor]:
    try:
        network = create_feature_extractor(INCEPTION, ["2048"], cuda=False, verbose=False)
    except OSError as error:  # URLError is one
        where = f"{torch.hub.get_dir()}/checkpoints nor could they be downloaded ({error})."
        raise RuntimeError(f"torch-fidelity's Inception weights are neither in {where}") from error
    network.to(device)
    grey = [-1, 3, -1, -1]  # becomes three equal channels
    return lambda images: network(images.expand(grey) if images.shape[1] == 1 else images)[0]


def save_classifier(path: str | Path, classifier: Classifier, **made_by: object) -> None:
    """Write a classifier, and in the file's header what made it."""
    tensors = {name: t.cpu().contiguous() for name, t in classifier.state_dict().items()}
    header = {name: str(value) for name, value in made_by.items()}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"config": json.dumps(classifier.config)} | header)


def load_classifier(path: str | Path = CLASSIFIER_FILE) -> Classifier:
    """Read a classifier, that of the digits without a path: in evaluation mode, frozen."""
    try:
        with safe_open(path, "pt") as file:
            classifier = Classifier(**json.loads((file.metadata() or {}).get("config", "{}")))
        classifier.load_state_dict(load_file(path))
    except (SafetensorError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is no file of a classifier: {error}") from error
    return classifier.requires_grad_(False).eval()


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
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        classifier = Classifier(size, channels, images.classes, width, deep).to(device)
        optimizer = torch.optim.AdamW(classifier.parameters(), learning_rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            chosen = torch.randint(len(images.x), (batch,))
            level = noise * torch.rand(batch, 1, 1, 1)
            x = _moved(images, chosen) if augment else images.take(chosen)
            x_noisy = (x + level * torch.randn(x.shape)).to(device)
            with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
                logits = classifier(x_noisy)
            loss = functional.cross_entropy(logits.float(), images.label[chosen].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return classifier.requires_grad_(False).eval()


def _moved(images: Images, chosen: Tensor) -> Tensor:
    """Images, half of them mirrored, shifted as one by up to an eighth, their edge repeated."""
    x = images.take(chosen, torch.rand(len(chosen)) < 0.5)
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


def remake_classifier() -> None:
    """Train the classifier on its part of the digits, test it on the rest, write the file."""
    train, held_out = digits().split(HELD_OUT)
    classifier = train_classifier(train)
    correct = round(accuracy(classifier, held_out) * HELD_OUT)
    save_classifier(
        CLASSIFIER_FILE, classifier, made_by="python -m dmd_tutorial.features",
        trained_on=f"{len(train.x)} of scikit-learn's digits, split and training with seed 0",
        held_out=HELD_OUT, held_out_correct=correct, torch=torch.__version__,
    )  # fmt: skip
    print(f"{correct} of {HELD_OUT} right")


if __name__ == "__main__":
    remake_classifier()

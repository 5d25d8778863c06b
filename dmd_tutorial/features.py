"""Features in which images are compared: 8-bit images in, rows of numbers out.

For digits they are the penultimate layer of a small classifier that lies in the package, for others
torch-fidelity's Inception, or a classifier of one's own (`benchmarks/classifier.py` trains both),
whose Frechet distances rank models of one data set and mean nothing beside another's.
"""

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch_fidelity.utils import create_feature_extractor

from dmd_tutorial.checks import check_finite
from dmd_tutorial.data.captioned import load_reader
from dmd_tutorial.denoisers import exact

CLASSIFIER_FILE = Path(__file__).parent / "weights" / "digits-classifier.safetensors"
INCEPTION = "inception-v3-compat"  # torch-fidelity's name for the original's features


class Classifier(nn.Module):
    """Convolutions, one layer of features, one linear layer to the classes.

    The features are standardised: over the training images each has a mean of about 0 and a
    variance of about 1, so a distance between them is in units of the spread of real images.
    Without arguments it is the digits' network; `deep` is for colour images of 16 pixels and up.
    """

    def __init__(
        self, size: int = 8, channels: int = 1, classes: int = 10, width: int = 32,
        deep: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config = {
            "size": size, "channels": channels, "classes": classes, "width": width, "deep": deep,
        }  # fmt: skip
        self.shape = (channels, size, size)
        wide = 4 * width if deep else 2 * width
        layers = [1, 1, 0, 2, 2, 0, 4, 4] if deep else [1, 1, 0, 1]  # widths; 0 halves the size
        trunk: list[nn.Module] = []
        before = channels
        for factor in layers:
            if not factor:
                trunk.append(nn.AvgPool2d(2))
                continue
            after = factor * width
            norm = [nn.BatchNorm2d(after)] if deep else []
            trunk += [nn.Conv2d(before, after, 3, padding=1), *norm, nn.SiLU()]
            before = after
        flatten = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten())  # digits are 4 x 4 by now
        self.trunk = nn.Sequential(*trunk, flatten, nn.Linear(16 * before, wide))
        self.standardise = nn.BatchNorm1d(wide, affine=False)
        self.head = nn.Linear(wide, classes)

    def features(self, x: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch width"]:
        """The penultimate layer, of images in [-1, 1]."""
        if x.shape[1:] != self.shape:
            wanted = f"(batch, {', '.join(map(str, self.shape))})"
            raise ValueError(f"x has shape {tuple(x.shape)}, the classifier wants {wanted}")
        return self.standardise(self.trunk(x))

    def forward(self, x: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch classes"]:
        return self.head(self.features(x))


def to_8_bit(x: Float[Tensor, "batch channels h w"]) -> UInt8[Tensor, "batch channels h w"]:
    """What an image file would hold: clamp to [-1, 1], round to 256 levels; levels as they are."""
    if x.ndim != 4:
        raise ValueError(f"images must be (batch, channels, h, w), not {tuple(x.shape)}")
    if x.dtype == torch.uint8:
        return x
    check_finite(x=x)
    (x,) = exact(x)  # bfloat16 cannot tell 256 levels apart
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def extract_features(
    x: Float[Tensor, "count channels h w"], features: str = "digits", batch: int = 500
) -> Float[Tensor, "count width"]:
    """Features of images, rounded to 8 bits first; float32, on the CPU.

    `features` is "digits" (64 of them, for 1 x 8 x 8), "shapes" (the reader's 128, for 3 x 32 x
    32), "inception" (2048, for one or three channels of any size; a RuntimeError if its weights are
    missing), or a file of a `Classifier`.
    """
    if len(x) == 0:
        raise ValueError("there are 0 images")
    extractor = _extractor(features, x.device)
    with torch.no_grad():
        return torch.cat([extractor(to_8_bit(some)).cpu() for some in x.split(batch)])


@lru_cache(maxsize=4)
def _extractor(features: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    if features == "inception":
        return _inception(device)
    if features not in ("digits", "shapes") and not features.endswith(".safetensors"):
        known = ["digits", "shapes", "inception", "a classifier's file"]
        raise ValueError(f"features must be one of {known}, not {features!r}")
    file = CLASSIFIER_FILE if features == "digits" else features
    classifier = (load_reader() if features == "shapes" else load_classifier(file)).to(device)
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


def load_classifier(path: str | Path = CLASSIFIER_FILE) -> Classifier:
    """Read a classifier, that of the digits without a path: in evaluation mode, frozen."""
    try:
        with safe_open(path, "pt") as file:
            classifier = Classifier(**json.loads((file.metadata() or {}).get("config", "{}")))
        classifier.load_state_dict(load_file(path))
    except (SafetensorError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is no file of a classifier: {error}") from error
    return classifier.requires_grad_(False).eval()

"""Features in which images are compared: 8-bit images in, rows of numbers out.

For digits they are the penultimate layer of a small classifier that lies in the package
(`python -m dmd_tutorial.features` makes it again); for natural images torch-fidelity's Inception.
torch-fidelity knows the first under the name "dmd-digits" as soon as this module is imported.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch_fidelity import FeatureExtractorBase, register_feature_extractor
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor

from dmd_tutorial.checks import check_finite
from dmd_tutorial.data import Images, digits
from dmd_tutorial.networks.classifier import DigitClassifier, split, train_classifier
from dmd_tutorial.networks.image_classifier import ImageClassifier

CLASSIFIER_FILE = Path(__file__).parent / "weights" / "digits-classifier.safetensors"
HELD_OUT = 360  # digits that the classifier is not trained on
EXTRACTORS = {"digits": ("dmd-digits", "64"), "inception": ("inception-v3-compat", "2048")}


def to_8_bit(x: Float[Tensor, "batch channels h w"]) -> UInt8[Tensor, "batch channels h w"]:
    """What an image file would hold: clamp to [-1, 1], round to 256 levels.

    Args:
        x: Images in [-1, 1], (batch, channels, h, w).

    Returns:
        Levels 0 to 255; a value inside [-1, 1] moves by at most 1/255.

    Raises:
        ValueError: If x is not a batch of images, or not finite.
    """
    if x.ndim != 4:
        raise ValueError(f"images must be (batch, channels, h, w), not {tuple(x.shape)}")
    check_finite(x=x)
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def extract_features(
    x: Float[Tensor, "count channels h w"], features: str = "digits", batch: int = 500
) -> Float[Tensor, "count width"]:
    """Features of images, after rounding them to 8 bits. The network works where the images are.

    Args:
        x: Images in [-1, 1], (count, channels, h, w): one channel of 8 x 8 for digits; one or
            three channels of any size for Inception.
        features: "digits" (64 features), "inception" (2048), or the file of a classifier that
            `save_classifier` wrote.
        batch: Images at once.

    Returns:
        Features, (count, width), float32, on the CPU.

    Raises:
        ValueError: If the images do not fit the network, are not finite, or there are none.
        RuntimeError: If Inception's weights are not there and cannot be downloaded.
    """
    if len(x) == 0:
        raise ValueError("there are 0 images")
    extractor = _extractor(features, x.device)
    rows = []
    with torch.no_grad():
        for some in x.split(batch):
            images = to_8_bit(some)
            if features == "inception" and images.shape[1] == 1:  # grey: three equal channels
                images = images.expand(-1, 3, -1, -1)
            rows.append(extractor(images)[0].cpu())
    return torch.cat(rows)


@lru_cache(maxsize=4)
def _extractor(features: str, device: torch.device) -> Any:
    if features.endswith(".safetensors"):
        return ClassifierFeatures(load_image_classifier(features)).to(device)
    if features not in EXTRACTORS:
        raise ValueError(
            f"features must be one of {list(EXTRACTORS)} or a classifier's file, not {features!r}"
        )
    name, layer = EXTRACTORS[features]
    try:
        extractor = create_feature_extractor(name, [layer], cuda=False, verbose=False)
    except OSError as error:  # URLError is one
        raise RuntimeError(
            "torch-fidelity's Inception weights are neither in "
            f"{torch.hub.get_dir()}/checkpoints nor could they be downloaded ({error})."
        ) from error
    return extractor.to(device)


class ClassifierFeatures(nn.Module):
    """A classifier's penultimate layer, in the form of torch-fidelity's extractors.

    Args:
        classifier: The classifier.
    """

    def __init__(self, classifier: ImageClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: UInt8[Tensor, "batch channels h w"]) -> tuple[Tensor]:
        """Features of 8-bit images, in fp32 without shortcuts, so that numbers can be repeated."""
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return (self.classifier.features(images.float() / 127.5 - 1),)


def save_classifier(path: str | Path, classifier: ImageClassifier, **made_by: object) -> None:
    """Write a classifier.

    Args:
        path: Where to, ending in .safetensors.
        classifier: The classifier.
        **made_by: Plain values that say how it was made: data, accuracy, settings, seed.
    """
    tensors = {name: t.cpu().contiguous() for name, t in classifier.state_dict().items()}
    header = {"config": json.dumps(classifier.config), "made_by": json.dumps(made_by)}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata=header)


def load_image_classifier(path: str | Path) -> ImageClassifier:
    """Read what `save_classifier` wrote.

    Args:
        path: The file.

    Returns:
        The classifier, on the CPU, in evaluation mode, without gradients.

    Raises:
        ValueError: If the file is none of a classifier.
    """
    try:
        with safe_open(path, "pt") as file:
            classifier = ImageClassifier(**json.loads((file.metadata() or {})["config"]))
        classifier.load_state_dict(load_file(path))
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is no file of a classifier: {error}") from error
    return classifier.requires_grad_(False).eval()


class DigitFeatures(FeatureExtractorBase):
    """The digit classifier's penultimate layer, as torch-fidelity wants it.

    Args:
        name: The name under which torch-fidelity knows it.
        features_list: Layers to give; there is one, "64".
        **options: Whatever else torch-fidelity hands to its extractors; unused.
    """

    def __init__(self, name: str, features_list: list[str], **options: object) -> None:
        super().__init__(name, features_list)
        self.classifier = load_classifier()

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """Names of the layers."""
        return ("64",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """The layer that a metric takes."""
        return "64"

    def forward(self, images: UInt8[Tensor, "batch 1 8 8"]) -> tuple[Float[Tensor, "batch 64"]]:
        """Features of 8-bit images."""
        if images.dtype != torch.uint8:
            raise ValueError(f"images must be 8-bit (torch.uint8), they are {images.dtype}")
        return (self.classifier.features(images.float() / 127.5 - 1),)


if "dmd-digits" not in FEATURE_EXTRACTORS_REGISTRY:  # a reloaded module finds it there
    register_feature_extractor("dmd-digits", DigitFeatures)


def load_classifier() -> DigitClassifier:
    """The classifier of digits that lies in the package.

    Returns:
        The classifier, on the CPU, in evaluation mode, without gradients.
    """
    classifier = DigitClassifier()
    classifier.load_state_dict(load_file(CLASSIFIER_FILE))
    return classifier.requires_grad_(False).eval()


def classifier_data() -> tuple[Images, Images]:
    """The digits that the classifier was trained on, and those that were held out."""
    images = digits()
    train, held_out = (
        Images(images.x[part], images.label[part], images.classes)
        for part in split(len(images.x), HELD_OUT)
    )
    return train, held_out


def remake_classifier() -> None:
    """Train the classifier on its part of the digits, test it on the rest, write the file."""
    train, held_out = classifier_data()
    classifier = train_classifier(train.x, train.label)
    correct = int((classifier(held_out.x).argmax(1) == held_out.label).sum())
    header = {
        "made_by": "python -m dmd_tutorial.features",
        "trained_on": f"{len(train.x)} of scikit-learn's digits, split and training with seed 0",
        "held_out": str(len(held_out.x)),
        "held_out_correct": str(correct),
        "torch": torch.__version__,
    }
    CLASSIFIER_FILE.parent.mkdir(exist_ok=True)
    save_file(classifier.state_dict(), CLASSIFIER_FILE, metadata=header)
    print(header)


if __name__ == "__main__":
    remake_classifier()

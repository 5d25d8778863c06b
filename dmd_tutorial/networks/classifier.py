"""A classifier of small images: its penultimate layer is what images are compared in."""

from jaxtyping import Float
from torch import Tensor, nn


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
        """Logits of the classes, for images in [-1, 1]."""
        return self.head(self.features(x))

"""What every room asks of its input, so that a mistake is named where it is made."""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

# One batch of samples, of any shape, and one number beside each: a noise level, a time, a weight.
Samples = Float[Tensor, "batch *shape"]
PerSample = Float[Tensor, " batch"]
# What a sample is made under: a class each, (batch,), or numbers such as a text's embedding,
# (batch, ...). The network that reads it checks it; loops only cut, join and move it.
Condition = Shaped[Tensor, "batch *condition"]
NO_CLASS = -1  # the null label: a sample whose class the network is not told


def check_finite(**tensors: Tensor) -> None:
    """Refuse tensors that hold NaN or infinity; the keywords are their names in the message."""
    if torch.compiler.is_compiling():
        return
    for name, tensor in tensors.items():
        finite = torch.isfinite(tensor)
        if not finite.all():
            bad = int((~finite).sum())
            raise ValueError(f"{name} is not finite: {bad} of {tensor.numel()} values")


def check_sigma(x: Samples, sigma: PerSample, above_zero: bool = False) -> None:
    """Refuse noise levels that are not one a sample, not finite, negative or, if asked, 0."""
    if not isinstance(sigma, Tensor):
        raise ValueError(f"sigma must be a tensor of shape ({len(x)},), not {sigma!r}")
    if sigma.shape != x.shape[:1]:
        raise ValueError(f"sigma has shape {tuple(sigma.shape)}, x has batch {len(x)}")
    check_finite(sigma=sigma)
    if (sigma < 0).any():
        raise ValueError(f"sigma must not be negative, the smallest is {sigma.min().item():g}")
    if above_zero and (sigma == 0).any():
        raise ValueError("sigma is 0 somewhere: it must be above 0 here")


def check_label(x: Samples, label: Condition | None, classes: int) -> None:
    """Refuse labels that are not one class a sample, from 0 to classes - 1, or `NO_CLASS`."""
    if label is None:
        return
    if classes == 0:
        raise ValueError("this model is unconditional (0 classes), but a label was given")
    if label.shape != x.shape[:1]:
        raise ValueError(f"label has shape {tuple(label.shape)}, x has batch {len(x)}")
    if label.is_floating_point():
        raise ValueError(f"label must hold whole numbers, its type is {label.dtype}")
    low, high = int(label.min()), int(label.max())
    if low < NO_CLASS or high >= classes:
        raise ValueError(f"label goes from {low} to {high}, classes are 0 to {classes - 1}")


def check_same_shape(**tensors: Shaped[Tensor, "..."]) -> None:
    """Refuse tensors whose shapes differ; the message shows both shapes."""
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor.shape != first.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, {first_name} has {tuple(first.shape)}"
            )


def expand(value: PerSample, x: Samples) -> Float[Tensor, "batch *ones"]:
    """Give one number per sample the trailing axes that it needs beside x."""
    return value.reshape(-1, *[1] * (x.ndim - 1))

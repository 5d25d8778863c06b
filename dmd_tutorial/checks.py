"""What every room asks of its input, so that a mistake is named where it is made."""

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor


def check_finite(**tensors: Tensor) -> None:
    """Refuse tensors that hold NaN or infinity, by name.

    Args:
        **tensors: Tensors of any shape; the keyword is the name that the message uses.

    Raises:
        ValueError: If one of them is not finite; the message counts the bad values.
    """
    if torch.compiler.is_compiling():
        return
    for name, tensor in tensors.items():
        finite = torch.isfinite(tensor)
        if not finite.all():
            bad = int((~finite).sum())
            raise ValueError(f"{name} is not finite: {bad} of {tensor.numel()} values")


def check_sigma(x: Float[Tensor, "batch *shape"], sigma: Float[Tensor, " batch"]) -> None:
    """Refuse noise levels that do not fit the batch.

    Args:
        x: Samples, (batch, *shape).
        sigma: One noise level per sample, (batch,), in the units of x, not negative.

    Raises:
        ValueError: If sigma is not a tensor of shape (batch,), is negative, or is not finite.
    """
    if not isinstance(sigma, Tensor):
        raise ValueError(f"sigma must be a tensor of shape ({len(x)},), not {sigma!r}")
    if sigma.shape != x.shape[:1]:
        raise ValueError(f"sigma has shape {tuple(sigma.shape)}, x has batch {len(x)}")
    check_finite(sigma=sigma)
    if (sigma < 0).any():
        raise ValueError(f"sigma must not be negative, the smallest is {sigma.min().item():g}")


def check_label(
    x: Float[Tensor, "batch *shape"], label: Int[Tensor, " batch"] | None, classes: int
) -> None:
    """Refuse class labels that do not fit the batch or the number of classes.

    Args:
        x: Samples, (batch, *shape).
        label: One class index per sample, (batch,), or None.
        classes: How many classes there are; 0 for an unconditional model.

    Raises:
        ValueError: If the shape or the type is wrong, or an index is out of range.
    """
    if label is None:
        return
    if classes == 0:
        raise ValueError("this model is unconditional (0 classes), but a label was given")
    if label.shape != x.shape[:1]:
        raise ValueError(f"label has shape {tuple(label.shape)}, x has batch {len(x)}")
    if label.is_floating_point():
        raise ValueError(f"label must hold whole numbers, its type is {label.dtype}")
    low, high = int(label.min()), int(label.max())
    if low < 0 or high >= classes:
        raise ValueError(f"label goes from {low} to {high}, classes are 0 to {classes - 1}")


def check_same_shape(**tensors: Shaped[Tensor, "..."]) -> None:
    """Refuse tensors whose shapes differ.

    Args:
        **tensors: Tensors that must share one shape; the keywords are the names in the message.

    Raises:
        ValueError: If two shapes differ; the message shows both.
    """
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor.shape != first.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, {first_name} has {tuple(first.shape)}"
            )


def expand(
    value: Float[Tensor, " batch"], x: Float[Tensor, "batch *shape"]
) -> Float[Tensor, "batch *ones"]:
    """Give one number per sample the trailing axes it needs to broadcast against x.

    Args:
        value: One number per sample, (batch,).
        x: Samples, (batch, *shape).

    Returns:
        The same numbers, (batch, 1, ..., 1) with as many axes as x.
    """
    return value.reshape(-1, *[1] * (x.ndim - 1))

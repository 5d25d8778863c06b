"""What every room asks of its input, so that a mistake is named where it is made."""

from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple, get_args, get_origin, get_type_hints

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


class NotFiniteError(ValueError):
    """Something holds NaN or infinity."""


def check_finite(**values: Tensor | float) -> None:
    """Refuse what holds NaN or infinity; the keywords are the names in the message."""
    if torch.compiler.is_compiling():
        return
    for name, value in values.items():
        finite = torch.isfinite(torch.as_tensor(value))
        if not finite.all():
            said = f"{int((~finite).sum())} of {finite.numel()} values"
            said = said if isinstance(value, Tensor) else f"it is {value}"
            raise NotFiniteError(f"{name} is not finite: {said}")


def check_sigma(
    x: Samples, sigma: PerSample, above_zero: bool = False, **others: Shaped[Tensor, "..."]
) -> None:
    """Refuse noise levels that are not one a sample, not finite, negative or, if asked, 0.

    The others, by their names, are what has the shape of x.
    """
    check_same_shape(x=x, **others)
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


class Must(NamedTuple):
    """What the value of a `Checked` field must be, written beside its type."""

    words: str
    holds: Callable[[float], bool]


Count = Annotated[int, Must("at least 1", lambda n: n >= 1)]
CountOrNone = Annotated[int, Must("at least 0", lambda n: n >= 0)]
Positive = Annotated[float, Must("above 0", lambda v: v > 0)]
NotNegative = Annotated[float, Must("at least 0", lambda v: v >= 0)]
Share = Annotated[float, Must("from 0 to 1", lambda v: 0 <= v <= 1)]


class Checked:
    """A dataclass that refuses, by its name, a value that is not what the field's type says."""

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            if get_origin(kind) is Literal and value not in get_args(kind):
                raise ValueError(f"{name} must be one of {list(get_args(kind))}, not {value!r}")
            for must in getattr(kind, "__metadata__", ()):
                if isinstance(must, Must) and not must.holds(value):
                    raise ValueError(f"{name} must be {must.words}, not {value!r}")

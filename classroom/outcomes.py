"""What came out of an answer, as plain containers, numbers and tensors, and back.

The process that runs an answer is not to be trusted. What it says is therefore read by
`torch.load(weights_only=True)`, which builds nothing but these.
"""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmd_tutorial.notebook.exercises import Raised

LONGEST = 2000  # characters of a text
LARGEST = 64 * 2**20  # bytes that are read
PLAIN = (bool, int, float, complex, str, type(None))


def dump(outcome: Any) -> bytes:
    """Return an outcome as bytes."""
    file = io.BytesIO()
    torch.save(packed(outcome), file)
    return file.getvalue()


def load(data: bytes) -> Any:
    """Return the outcome that was dumped; any error means that it was not `dump` that wrote."""
    return unpacked(torch.load(io.BytesIO(data), weights_only=True))


def packed(value: Any) -> list:
    """Return a value with the name of its kind before it."""
    if type(value) is str:
        return ["plain", value[:LONGEST]]
    if type(value) in PLAIN:
        return ["plain", value]
    if isinstance(value, Raised):
        return ["raised", *(str(each)[:LONGEST] for each in value.args)]
    if isinstance(value, np.generic):
        return packed(value.item())
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return packed(torch.from_numpy(np.array(value, order="C")))
    if isinstance(value, Tensor) and value.device.type == "cpu":
        plain = value.detach().as_subclass(Tensor)
        return ["tensor", plain if plain.layout is torch.strided else plain.to_dense()]
    if isinstance(value, Mapping):
        return ["mapping", [[packed(key), packed(each)] for key, each in value.items()]]
    if isinstance(value, list | tuple):
        return ["list" if isinstance(value, list) else "tuple", [packed(each) for each in value]]
    return ["other", type(value).__name__[:LONGEST]]


def unpacked(stored: list) -> Any:
    """Return the value that was packed."""
    kind, *rest = stored
    value = rest[0]
    if kind == "plain" and type(value) in PLAIN:
        return value
    if kind == "raised" and all(type(each) is str for each in rest):
        return Raised(*rest)
    if kind == "tensor" and type(value) is Tensor and value.layout is torch.strided:
        return value
    if kind == "mapping":
        return {unpacked(key): unpacked(each) for key, each in value}
    if kind in ("list", "tuple"):
        return (list if kind == "list" else tuple)(map(unpacked, value))
    if kind == "other" and type(value) is str:
        return type(value, (), {})()  # an object of a class of that name, for the sentence
    raise ValueError(f"not an outcome: {kind!r}")

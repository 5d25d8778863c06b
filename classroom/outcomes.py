"""What came out of an answer, as plain containers, numbers and tensors, and back.

The process that runs an answer is not to be trusted. What it says is therefore JSON, in which no
value takes more room than it takes bytes, and of which nothing but these is built.
"""

import base64
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmd_tutorial.notebook.exercises import Raised

LONGEST = 2000  # characters of a text
MOST = 2**16  # numbers of a tensor, entries of a list: no exercise asks for a thousand
LARGEST = 4 * 2**20  # bytes that are read
PLAIN = (bool, int, float, str, type(None))
REAL = ("bool", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64")
OTHERS = ("uint8", "uint16", "uint32", "uint64", "complex64", "complex128")
KINDS = {str(kind): kind for kind in (getattr(torch, name) for name in REAL + OTHERS)}


def dump(outcome: Any) -> bytes:
    """Return an outcome as bytes.

    Raises:
        ValueError: it has more than `MOST` numbers.
    """
    return json.dumps(packed(outcome)).encode()


def load(data: bytes) -> Any:
    """Return the outcome that was dumped; any error means that it was not `dump` that wrote."""
    return unpacked(json.loads(data))


def packed(value: Any) -> list:
    """Return a value with the name of its kind before it."""
    if type(value) is str:
        return ["plain", value[:LONGEST]]
    if type(value) in PLAIN:
        return ["plain", value]
    if type(value) is complex:
        return ["complex", value.real, value.imag]
    if isinstance(value, Raised):
        return ["raised", *(str(each)[:LONGEST] for each in value.args)]
    if isinstance(value, np.generic):
        return packed(value.item())
    if isinstance(value, Tensor | np.ndarray | Mapping | list | tuple) and size(value) > MOST:
        raise ValueError(f"more than {MOST} numbers")
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return packed(torch.from_numpy(np.array(value, order="C")))
    if isinstance(value, Tensor) and value.device.type == "cpu" and str(value.dtype) in KINDS:
        plain = value.detach().as_subclass(Tensor).to_dense().resolve_conj().resolve_neg()
        flat = plain.reshape(-1).contiguous().view(torch.uint8)
        text = base64.b64encode(flat.numpy().tobytes()).decode()
        return ["tensor", str(plain.dtype), [*plain.shape], text]
    if isinstance(value, Mapping):
        return ["mapping", [[packed(key), packed(each)] for key, each in value.items()]]
    if isinstance(value, list | tuple):
        return ["list" if isinstance(value, list) else "tuple", [packed(each) for each in value]]
    return ["other", type(value).__name__[:LONGEST]]


def size(value: Any) -> int:
    """Return how many numbers or entries a value has, those included that share a place."""
    return value.numel() if isinstance(value, Tensor) else getattr(value, "size", len(value))


def unpacked(stored: list) -> Any:
    """Return the value that was packed."""
    kind, *rest = stored
    value = rest[0]
    if kind == "plain" and type(value) in PLAIN:
        return value
    if kind == "complex":
        return complex(*rest)
    if kind == "raised" and all(type(each) is str for each in rest):
        return Raised(*rest)
    if kind == "tensor":
        name, shape, text = rest
        data, dtype = bytearray(base64.b64decode(text)), KINDS[name]
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return flat.reshape(shape)
    if kind == "mapping":
        return {unpacked(key): unpacked(each) for key, each in value}
    if kind in ("list", "tuple"):
        return (list if kind == "list" else tuple)(map(unpacked, value))
    if kind == "other" and type(value) is str:
        return type(value, (), {})()  # an object of a class of that name, for the sentence
    raise ValueError(f"not an outcome: {kind!r}")

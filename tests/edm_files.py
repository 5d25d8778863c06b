"""Files in the layout of the published EDM checkpoints, made from networks of this package."""

import io
import pickle
import sys
import types
from collections import OrderedDict
from typing import ClassVar

import numpy as np
import torch

SOURCE = "raise SystemExit('the source in the file was executed')"


class PersistentObject:
    """What the published code's decorated classes pickle as: source, class name, attributes."""

    def __init__(self, meta: dict) -> None:
        self.meta = meta

    def __reduce__(self):
        return _module("torch_utils.persistence")._reconstruct_persistent_obj, (self.meta,)


def _module(name: str) -> types.ModuleType:
    """A module under a name that a pickle shall mention; it is there while the file is written."""
    module = types.ModuleType(name)

    def function(*_):
        raise AssertionError("never called")

    function.__module__, function.__qualname__ = name, "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = function
    return sys.modules.setdefault(name, module)


def persistent(module: torch.nn.Module, class_name: str, **attributes: object) -> PersistentObject:
    """A network as the published code stores it."""
    state = {
        "training": False,
        "_parameters": OrderedDict(module._parameters),
        "_buffers": OrderedDict(module._buffers),
        "_non_persistent_buffers_set": set(module._non_persistent_buffers_set),
        "_backward_hooks": OrderedDict(),
        "_modules": OrderedDict((name, child(part)) for name, part in module._modules.items()),
        **attributes,
    }
    meta = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": class_name,
            "state": state}  # fmt: skip
    return PersistentObject(meta)


def child(module: torch.nn.Module | None) -> object:
    """A module inside a network: torch's own containers stay what they are."""
    if module is None:
        return None
    if isinstance(module, torch.nn.ModuleDict | torch.nn.ModuleList | torch.nn.Sequential):
        container = type(module).__new__(type(module))
        torch.nn.Module.__init__(container)
        container.__dict__["_modules"] = OrderedDict(
            (name, child(part)) for name, part in module._modules.items()
        )
        return container
    return persistent(module, type(module).__name__)


def published_arguments(denoiser) -> dict:
    """What the published class would have been called with."""
    arguments = dict(denoiser.network.config)
    shape = {
        "img_resolution": arguments.pop("img_resolution"),
        "img_channels": arguments.pop("in_channels"),
        "label_dim": arguments.pop("label_dim"),
    }
    assert arguments.pop("out_channels") == shape["img_channels"]
    return shape | {"use_fp16": True, "sigma_min": 0, "sigma_max": float("inf"),
                    "sigma_data": denoiser.sigma_data,
                    "model_type": type(denoiser.network).__name__, **arguments}  # fmt: skip


def edm_file(denoiser, protocol: int = 4, **other: object) -> bytes:
    """A whole file: the averaged network under `ema`, and other keys as in training snapshots."""
    outer = torch.nn.Module()
    outer.model = denoiser.network
    numbers = {"sigma_data": np.float64(denoiser.sigma_data), "seen": np.int64(3)}
    arguments = published_arguments(denoiser)
    ema = persistent(outer, "EDMPrecond", _init_args=(), _init_kwargs=arguments, **numbers)
    content = {"ema": ema, "loss_fn": None, "augment_pipe": None, "dataset_kwargs": {}, **other}
    file = io.BytesIO()
    Pickler(file, protocol).dump(content)
    return file.getvalue()


class Pickler(pickle._Pickler):
    """Writes the names of modules that need not exist here."""

    def save_global(self, obj, name=None):
        module = getattr(obj, "__module__", "")
        if module.startswith("torch_utils"):
            self.write(pickle.GLOBAL + f"{module}\n{obj.__qualname__}\n".encode())
            self.memoize(obj)
        else:
            super().save_global(obj, name)

    dispatch: ClassVar[dict] = dict(pickle._Pickler.dispatch)
    dispatch[types.FunctionType] = save_global

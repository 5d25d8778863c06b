"""The published checkpoints: found, read without running anything in them, checked.

They are pickles that carry Python source, and pickles are programs. Their source is never executed;
what they hold is read inertly (see `unpickle`), and arguments, names and shapes are checked before
a network is made.
"""

import hashlib
import math
from pathlib import Path
from typing import Any

import torch

from dmd_tutorial.checks import check_finite
from dmd_tutorial.denoisers import EDMDenoiser
from dmd_tutorial.edm.download import cache_folder, download
from dmd_tutorial.edm.networks import published_denoiser
from dmd_tutorial.edm.unpickle import Inert, Refused, read_pickle, shown, state_dict_of

PUBLISHED_AT = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained"
PUBLISHED = (
    "edm-cifar10-32x32-cond-vp", "edm-cifar10-32x32-cond-ve", "edm-cifar10-32x32-uncond-vp",
    "edm-cifar10-32x32-uncond-ve", "edm-ffhq-64x64-uncond-vp", "edm-ffhq-64x64-uncond-ve",
    "edm-afhqv2-64x64-uncond-vp", "edm-afhqv2-64x64-uncond-ve", "edm-imagenet-64x64-cond-adm",
)  # fmt: skip
LICENCE = (
    "The published EDM weights are NVIDIA's, under CC BY-NC-SA 4.0: not for commercial use, "
    "shared alike. A student distilled from them arguably inherits that."
)
LARGEST = 4096  # no size in the arguments of a published network is larger


def load_edm(path_or_url_or_name: str | Path) -> tuple[EDMDenoiser, dict[str, Any]]:
    """Load a published checkpoint and the arguments that it names; says its licence.

    It is a .pkl file, its address, or a name of `PUBLISHED`, which is fetched once. No hashes were
    published with these files: the one of the first download is noted and asked for later. The
    network comes frozen, in evaluation mode, float32, on the CPU. ValueError means a file that is
    truncated, of another network, or that asks for more than weights need.
    """
    path = _published_file(str(path_or_url_or_name))
    try:
        content = read_pickle(path.read_bytes())
        ema = content.get("ema") if isinstance(content, dict) else None
        if not isinstance(ema, Inert) or not isinstance(ema.state.get("_init_kwargs"), dict):
            raise ValueError("there is no network with its arguments under the key 'ema'")
        if ema.class_name != "EDMPrecond":
            raise ValueError(f"its network is a {ema.class_name[:40]!r}, not an EDMPrecond")
        arguments = _plain_arguments(ema.state["_init_kwargs"])
        denoiser = _denoiser_with(arguments, renamed(state_dict_of(ema)))
    except Refused as error:
        raise ValueError(f"{path} is not to be trusted: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path} is no published EDM checkpoint: {error}") from error
    print(f"{path.name}: {LICENCE}")
    return denoiser, arguments


def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Published names as an `EDMDenoiser` has them: ``model.enc...`` is ``network.enc...``."""
    return {f"network.{n.removeprefix('model.')}": t for n, t in tensors.items()}


def _published_file(name: str) -> Path:
    if name in PUBLISHED:
        return download(f"{PUBLISHED_AT}/{name}.pkl")
    if name.startswith(("https://", "http://", "file://")):
        # of two addresses that end alike, each has a folder of its own
        return download(name, cache_folder() / hashlib.sha256(name.encode()).hexdigest()[:12])
    if not Path(name).is_file():
        published = ", ".join(PUBLISHED)
        raise FileNotFoundError(f"{name} is no file and no published network ({published})")
    return Path(name)


def _plain_arguments(arguments: dict) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for name, value in arguments.items():
        values = list(value) if isinstance(value, list | tuple) else [value]
        if not isinstance(name, str) or len(values) > 16 or not all(map(_is_plain, values)):
            raise ValueError(f"the network's argument {shown(str(name))!r} is no plain value")
        plain[name] = values if isinstance(value, list | tuple) else value
    blocks = plain.get("num_blocks", 1)
    if not isinstance(blocks, int) or blocks > 64:
        raise ValueError(f"the network has {blocks!r} blocks at each resolution")
    return plain


def _is_plain(value: object) -> bool:
    if isinstance(value, str):
        return len(value) <= 64
    number = isinstance(value, int | float) and (abs(value) <= LARGEST or value == math.inf)
    return value is None or number


def _denoiser_with(arguments: dict[str, Any], tensors: dict[str, torch.Tensor]) -> EDMDenoiser:
    """The denoiser of these arguments and weights; no memory before both fit together."""
    try:
        with torch.device("meta"):
            denoiser = published_denoiser(**arguments)
    except (ArithmeticError, AttributeError, LookupError, TypeError, RuntimeError) as error:
        raise ValueError(f"its network's arguments are unknown: {shown(str(error))}") from error
    wanted = {name: tuple(t.shape) for name, t in denoiser.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    differ = {"lacks": wanted.keys() - found, "has too much:": found.keys() - wanted}
    for problem, names in differ.items():
        if names:
            some = ", ".join(shown(name) for name in sorted(names)[:3])
            raise ValueError(f"its network {problem} {len(names)} tensors such as {some}")
    for name, shape in wanted.items():
        if found[name] != shape:
            raise ValueError(f"{name} has shape {found[name]}, its network wants {shape}")
        if not tensors[name].is_floating_point():
            raise ValueError(f"{name} holds {tensors[name].dtype}, no weights")
    plain = torch.contiguous_format
    weights = {name: t.float().clone(memory_format=plain) for name, t in tensors.items()}
    check_finite(**weights)
    denoiser.load_state_dict(weights, assign=True)
    return denoiser.requires_grad_(False).eval().to(memory_format=torch.channels_last)

"""Networks on disk: the shipped ones, your own, and the published EDM checkpoints.

Our files are safetensors with a header that says how they were made. They hold numbers and text
only, so reading one never runs code. The published checkpoints are pickles, which are programs;
`load_edm` reads them without running anything (see `dmd_tutorial.edm.unpickle`).
"""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dmd_tutorial.checks import check_finite
from dmd_tutorial.denoisers import EDMDenoiser, OneStepGenerator
from dmd_tutorial.edm.download import cache_folder, download
from dmd_tutorial.edm.networks import EDMPrecond
from dmd_tutorial.edm.unpickle import Inert, Refused, read_pickle, shown, state_dict_of
from dmd_tutorial.networks import UNet

WEIGHTS = Path(__file__).parent / "weights"

# the shipped networks: name -> SHA-256 of the file
SHIPPED = {
    "digits-teacher": "80b9ecabf92b8f3166bffade70eb66df5f44a077a211cb0406ec160224de1c60",
    "digits-student": "1455fce00288d9c2ae9c09d917fd436a5b778d94a1f89836c15554b005f8c0be",
}

PUBLISHED_AT = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained"
PUBLISHED = (
    "edm-cifar10-32x32-cond-vp",
    "edm-cifar10-32x32-cond-ve",
    "edm-cifar10-32x32-uncond-vp",
    "edm-cifar10-32x32-uncond-ve",
    "edm-ffhq-64x64-uncond-vp",
    "edm-ffhq-64x64-uncond-ve",
    "edm-afhqv2-64x64-uncond-vp",
    "edm-afhqv2-64x64-uncond-ve",
    "edm-imagenet-64x64-cond-adm",
)
LICENCE = (
    "The published EDM weights are NVIDIA's, under CC BY-NC-SA 4.0: not for commercial use, "
    "shared alike. A student distilled from them arguably inherits that."
)
LARGEST = 4096  # no size in the arguments of a published network is larger


def save_denoiser(
    path: str | Path, model: EDMDenoiser | EDMPrecond | OneStepGenerator, **made_by: object
) -> None:
    """Write a denoiser, a U-Net's or one of the published architecture, or a one-step generator.

    Args:
        path: Where to, ending in .safetensors; written whole or not at all.
        model: The network.
        **made_by: Plain values that say how it was made: settings, seeds, versions, results.
    """
    denoiser: Any = model.denoiser if isinstance(model, OneStepGenerator) else model
    if isinstance(denoiser, EDMPrecond):
        finite = {k: v for k, v in denoiser.config.items() if v != math.inf}  # JSON has none
        header: dict[str, Any] = {"edm": finite}
    else:
        header = {"network": denoiser.network.config, "sigma_data": denoiser.sigma_data}
    if isinstance(model, OneStepGenerator):
        header["sigma_max"] = model.sigma_max
    tensors = {name: t.detach().cpu().contiguous() for name, t in denoiser.state_dict().items()}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    metadata = {"model": json.dumps(header), "made_by": json.dumps(made_by, sort_keys=True)}
    save_file(tensors, partial, metadata=metadata)
    os.replace(partial, path)


def load_denoiser(path: str | Path) -> EDMDenoiser | EDMPrecond | OneStepGenerator:
    """Read what `save_denoiser` wrote.

    Args:
        path: The file.

    Returns:
        The network in evaluation mode, frozen: a `OneStepGenerator` if one was saved.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is truncated, not safetensors, not one of ours, holds weights of other
            shapes than its header says, or weights that are not finite.
    """
    tensors, header, _ = _read(Path(path))
    try:
        denoiser: EDMDenoiser | EDMPrecond
        if "edm" in header:
            denoiser = EDMPrecond(**header["edm"])
        else:
            denoiser = EDMDenoiser(UNet(**header["network"]), header["sigma_data"])
        denoiser.load_state_dict(tensors)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not fit the network in its header: {error}") from error
    check_finite(**tensors)
    one_step = "sigma_max" in header
    model = OneStepGenerator(denoiser, header["sigma_max"]) if one_step else denoiser
    model.requires_grad_(False).eval()
    return model.to(memory_format=torch.channels_last)  # the faster layout for convolutions


def made_by(path_or_name: str | Path) -> dict:
    """How a network was made: what its file says.

    Args:
        path_or_name: A file, or the name of a shipped network.

    Returns:
        The values that `save_denoiser` was given.

    Raises:
        ValueError: If the file cannot be read.
    """
    return _read(_path(path_or_name))[2]


def load(path_or_name: str | Path) -> EDMDenoiser | EDMPrecond | OneStepGenerator:
    """Load a shipped or published network by name, or any network file by path.

    Args:
        path_or_name: ``"digits-teacher"``, ``"digits-student"``, a name of `PUBLISHED`, or a path;
            a path that ends in .pkl goes through `load_edm`.

    Returns:
        The network, frozen, in evaluation mode.

    Raises:
        FileNotFoundError: If it is neither a shipped name nor a file.
        ValueError: If a shipped file is not the one that was shipped, or cannot be read.
        RuntimeError: If a published file cannot be downloaded.
    """
    if str(path_or_name) in PUBLISHED or str(path_or_name).endswith(".pkl"):
        return load_edm(path_or_name)[0]
    path = _path(path_or_name)
    wanted = SHIPPED.get(str(path_or_name))
    if wanted is not None:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != wanted:
            raise ValueError(f"{path} has SHA-256 {found}, the shipped one has {wanted}")
    return load_denoiser(path)


def _path(path_or_name: str | Path) -> Path:
    if str(path_or_name) in SHIPPED:
        return WEIGHTS / f"{path_or_name}.safetensors"
    if not Path(path_or_name).is_file():
        shipped, published = ", ".join(SHIPPED), ", ".join(PUBLISHED)
        raise FileNotFoundError(
            f"{path_or_name} is no file, no shipped network ({shipped}) and no published one "
            f"({published})"
        )
    return Path(path_or_name)


def _read(path: Path) -> tuple[dict, dict, dict]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads(metadata["model"]), json.loads(metadata["made_by"])
    except FileNotFoundError:
        raise
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a readable network file: {error}") from error


# --- the published checkpoints --------------------------------------------------------------------


def load_edm(path_or_url_or_name: str | Path) -> tuple[EDMPrecond, dict[str, Any]]:
    """Load a published EDM checkpoint without running anything in it; says its licence.

    The file is a pickle that carries Python source. Its source is never executed; what it holds is
    read inertly, and its arguments, names and shapes are checked before a network is made.

    Args:
        path_or_url_or_name: A .pkl file, its address, or a name of `PUBLISHED`, which is fetched
            once. No hashes were published with these files: the one of the first download is
            noted and asked for later.

    Returns:
        The network (frozen, in evaluation mode, float32 on the CPU) and its constructor's
        arguments.

    Raises:
        FileNotFoundError: If there is no such file or name.
        RuntimeError: If it cannot be downloaded.
        ValueError: If it is truncated, out of date, another network, or asks for more than weights
            need.
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
        network = _network_with(arguments, state_dict_of(ema))
    except Refused as error:
        raise ValueError(f"{path} is not to be trusted: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path} is no published EDM checkpoint: {error}") from error
    print(f"{path.name}: {LICENCE}")
    return network, arguments


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
    """Arguments of a network as plain values of sensible size."""
    plain: dict[str, Any] = {}
    for name, value in arguments.items():
        values = list(value) if isinstance(value, list | tuple) else [value]
        fits = len(values) <= 16 and all(_is_plain(v) for v in values)
        if not isinstance(name, str) or not fits:
            raise ValueError(f"the network's argument {shown(str(name))!r} is no plain value")
        plain[name] = values if isinstance(value, list | tuple) else value
    return plain


def _is_plain(value: object) -> bool:
    if isinstance(value, str):
        return len(value) <= 64
    if value is None or isinstance(value, bool):
        return True
    return isinstance(value, int | float) and (abs(value) <= LARGEST or value == math.inf)


def _network_with(arguments: dict[str, Any], tensors: dict[str, torch.Tensor]) -> EDMPrecond:
    """The network of these arguments with these weights; no memory before both fit together."""
    blocks = arguments.get("num_blocks", 1)
    if not isinstance(blocks, int) or blocks > 64:
        raise ValueError(f"the network has {blocks!r} blocks at each resolution")
    try:
        with torch.device("meta"):
            network = EDMPrecond(**arguments)
    except (ArithmeticError, AttributeError, LookupError, TypeError, RuntimeError) as error:
        problem = shown(str(error))
        raise ValueError(f"its network's arguments are not known: {problem}") from error
    wanted = {name: tuple(t.shape) for name, t in network.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    for problem, names in (
        ("lacks", wanted.keys() - found),
        ("has too much:", found.keys() - wanted),
    ):
        if names:
            some = ", ".join(shown(name) for name in sorted(names)[:3])
            raise ValueError(f"its network {problem} {len(names)} tensors such as {some}")
    for name, shape in wanted.items():
        if found[name] != shape:
            raise ValueError(f"{name} has shape {found[name]}, its network wants {shape}")
        if not tensors[name].is_floating_point():
            raise ValueError(f"{name} holds {tensors[name].dtype}, no weights")
    weights = {name: t.float().clone(memory_format=torch.contiguous_format)
               for name, t in tensors.items()}  # fmt: skip
    check_finite(**weights)
    network.load_state_dict(weights, assign=True)
    return network.requires_grad_(False).eval().to(memory_format=torch.channels_last)

"""Networks on disk: safetensors with a header that says how they were made; the shipped ones.

A safetensors file holds numbers and text only, so reading one never runs code.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dmd_tutorial.checks import check_finite
from dmd_tutorial.denoisers import EDMDenoiser, OneStepGenerator
from dmd_tutorial.networks import UNet

WEIGHTS = Path(__file__).parent / "weights"

# the shipped networks: name -> SHA-256 of the file
SHIPPED = {
    "digits-teacher": "80b9ecabf92b8f3166bffade70eb66df5f44a077a211cb0406ec160224de1c60",
    "digits-student": "1455fce00288d9c2ae9c09d917fd436a5b778d94a1f89836c15554b005f8c0be",
}


def save_denoiser(
    path: str | Path, model: EDMDenoiser | OneStepGenerator, **made_by: object
) -> None:
    """Write a U-Net denoiser or one-step generator.

    Args:
        path: Where to, ending in .safetensors; written whole or not at all.
        model: The network.
        **made_by: Plain values that say how it was made: settings, seeds, versions, results.
    """
    denoiser = model.denoiser if isinstance(model, OneStepGenerator) else model
    header = {
        "network": denoiser.network.config,  # type: ignore[union-attr]
        "sigma_data": denoiser.sigma_data,
    }
    if isinstance(model, OneStepGenerator):
        header["sigma_max"] = model.sigma_max
    tensors = {name: t.detach().cpu().contiguous() for name, t in denoiser.state_dict().items()}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    metadata = {"model": json.dumps(header), "made_by": json.dumps(made_by, sort_keys=True)}
    save_file(tensors, partial, metadata=metadata)
    os.replace(partial, path)


def load_denoiser(path: str | Path) -> EDMDenoiser | OneStepGenerator:
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
        denoiser = EDMDenoiser(UNet(**header["network"]), header["sigma_data"])
        denoiser.load_state_dict(tensors)
    except (RuntimeError, TypeError) as error:
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


def load(path_or_name: str | Path) -> EDMDenoiser | OneStepGenerator:
    """Load a shipped network by name, or any network file by path.

    Args:
        path_or_name: ``"digits-teacher"``, ``"digits-student"``, or a path.

    Returns:
        The network, frozen, in evaluation mode.

    Raises:
        FileNotFoundError: If it is neither a shipped name nor a file.
        ValueError: If a shipped file is not the one that was shipped, or cannot be read.
    """
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
        shipped = ", ".join(SHIPPED)
        raise FileNotFoundError(f"{path_or_name} is no file and no shipped network ({shipped})")
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

"""Networks on disk: the shipped ones, your own, and the published EDM checkpoints.

Our files are safetensors with a header that says how they were made. They hold numbers and text
only, so reading one never runs code.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from dmd_tutorial.checks import check_finite
from dmd_tutorial.denoisers import EDMDenoiser
from dmd_tutorial.edm.checkpoint import PUBLISHED, load_edm, renamed
from dmd_tutorial.edm.networks import NETWORKS as EDM_NETWORKS
from dmd_tutorial.edm.networks import published_denoiser
from dmd_tutorial.generators import FewStepGenerator, OneStepGenerator
from dmd_tutorial.networks import UNet

NETWORKS: dict[str, type[nn.Module]] = {"UNet": UNet, **EDM_NETWORKS}
WEIGHTS = Path(__file__).parent / "weights"

# the shipped networks: name -> SHA-256 of the file
SHIPPED = {
    "digits-teacher": "80b9ecabf92b8f3166bffade70eb66df5f44a077a211cb0406ec160224de1c60",
    "digits-student": "1455fce00288d9c2ae9c09d917fd436a5b778d94a1f89836c15554b005f8c0be",
}


def save_denoiser(
    path: str | Path, model: EDMDenoiser | OneStepGenerator, **made_by: object
) -> None:
    """Write a denoiser or a generator to a .safetensors file, whole or not at all.

    Its network is one of `NETWORKS`. `made_by` are plain values: settings, seeds, versions.
    """
    denoiser: Any = model.denoiser if isinstance(model, OneStepGenerator) else model
    network = denoiser.network
    header = {"class": type(network).__name__, "network": network.config,
              "sigma_data": denoiser.sigma_data}  # fmt: skip
    if isinstance(model, OneStepGenerator):
        header["sigma_max"] = model.sigma_max
    if isinstance(model, FewStepGenerator):
        header |= {"levels": model.levels, "last": model.last}
    tensors = {name: t.detach().cpu().contiguous() for name, t in denoiser.state_dict().items()}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    metadata = {"model": plain_json(header), "made_by": plain_json(made_by, sort_keys=True)}
    save_file(tensors, partial, metadata=metadata)
    os.replace(partial, path)


def plain_json(value: Any, **how: Any) -> str:
    """Plain values as JSON, which has no NaN and no infinity: null stands for both."""
    known = json.loads(json.dumps(value), parse_constant=lambda _: None)
    return json.dumps(known, **how)


def load_denoiser(path: str | Path) -> EDMDenoiser | OneStepGenerator:
    """Read what `save_denoiser` wrote: frozen, in evaluation mode, on the CPU.

    ValueError means a file that is damaged or none of ours, or weights that are not finite or do
    not fit the header.
    """
    tensors, header, _ = _read(Path(path))
    try:
        if "edm" in header:  # as files were written before all networks shared one form
            denoiser, tensors = published_denoiser(**header["edm"]), renamed(tensors)
        else:
            network = NETWORKS[header.get("class", "UNet")](**header["network"])
            denoiser = EDMDenoiser(network, header["sigma_data"])
        denoiser.load_state_dict(tensors)
        model: Any = denoiser
        if "levels" in header:
            model = FewStepGenerator(denoiser, header["levels"], header["last"])
        elif "sigma_max" in header:
            model = OneStepGenerator(denoiser, header["sigma_max"])
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{path} does not fit the network in its header: {error}") from error
    check_finite(**tensors)
    model.requires_grad_(False).eval()
    return model.to(memory_format=torch.channels_last)  # the faster layout for convolutions


def made_by(path_or_name: str | Path) -> dict:
    """How a network, shipped or in a file, was made: what `save_denoiser` was given."""
    return _read(_path(path_or_name))[2]


def load(path_or_name: str | Path) -> EDMDenoiser | OneStepGenerator:
    """Load a shipped or published network by name, or any network file by path, frozen.

    Names are those of `SHIPPED` and `PUBLISHED`; a path that ends in .pkl goes through `load_edm`.
    A shipped file that is not the one that was shipped is refused.
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
        known = ", ".join([*SHIPPED, *PUBLISHED])
        raise FileNotFoundError(f"{path_or_name} is no file and no network's name ({known})")
    return Path(path_or_name)


def _read(path: Path) -> tuple[dict, dict, dict]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads(metadata["model"]), json.loads(metadata["made_by"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a readable network file: {error}") from error

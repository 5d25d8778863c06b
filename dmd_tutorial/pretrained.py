"""Networks on disk: the shipped ones, your own, and the published EDM checkpoints.

Our files are safetensors with a header that says how they were made. They hold numbers and text
only, so reading one never runs code.
"""

import copy
import hashlib
import os
import pkgutil
import re
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from dmd_tutorial.adapters import FromFunction
from dmd_tutorial.checks import check_finite
from dmd_tutorial.denoisers import EDMDenoiser, says, sigma_range
from dmd_tutorial.edm.checkpoint import PUBLISHED, load_edm, renamed
from dmd_tutorial.edm.networks import NETWORKS as EDM_NETWORKS
from dmd_tutorial.edm.networks import published_denoiser
from dmd_tutorial.files import header_of, plain_json, write_tensors
from dmd_tutorial.generators import FewStepGenerator, OneStepGenerator
from dmd_tutorial.networks import UNet

NETWORKS: dict[str, type[nn.Module]] = {"UNet": UNet, **EDM_NETWORKS}
OWN = re.compile(r"[A-Za-z_][\w.]+:[A-Za-z_]\w*")  # package.module:factory
WEIGHTS = Path(__file__).parent / "weights"
# models of text by name, and the code that makes them
TEXT = {
    "shapes-text": "dmd_tutorial.text_to_image.prompted:shapes_text",
    "stable-diffusion-v1-5": "dmd_tutorial.text_to_image.prompted:stable_diffusion",
}

# the shipped networks: name -> SHA-256 of the file
SHIPPED = {
    "digits-teacher": "80b9ecabf92b8f3166bffade70eb66df5f44a077a211cb0406ec160224de1c60",
    "digits-student": "1455fce00288d9c2ae9c09d917fd436a5b778d94a1f89836c15554b005f8c0be",
}


def save_denoiser(path: str | Path, model: nn.Module, **made_by: object) -> None:
    """Write a denoiser or a generator to a .safetensors file, whole or not at all.

    `made_by` are plain values: settings, seeds, versions. Of a network that is none of `NETWORKS`
    the weights are kept, and the name of the code that made it, if `load` knew that.
    """
    denoiser: Any = model.denoiser if isinstance(model, OneStepGenerator) else model
    network = getattr(denoiser, "network", None)
    if isinstance(denoiser, EDMDenoiser) and type(network) in NETWORKS.values():
        header = {"class": type(network).__name__, "network": network.config,  # type: ignore[union-attr]
                  "sigma_data": denoiser.sigma_data}  # fmt: skip
    else:
        header = {"own": says(denoiser, "loaded_from", type(denoiser).__name__)}
    header["sigma_range"] = sigma_range(denoiser)
    if (prompts := says(denoiser, "prompts")) is not None:
        header["prompts"] = prompts
    if isinstance(model, OneStepGenerator):
        header["sigma_max"] = model.sigma_max
    if isinstance(model, FewStepGenerator):
        header |= {"levels": model.levels, "last": model.last}
    how = plain_json(made_by, sort_keys=True)
    write_tensors(path, denoiser.state_dict(), model=plain_json(header), made_by=how)


def load_denoiser(path: str | Path, network: nn.Module | None = None) -> nn.Module:
    """Read what `save_denoiser` wrote: frozen, in evaluation mode, on the CPU.

    A denoiser of your own code, whose weights alone are in the file, is `network`; a copy of it
    gets them. ValueError means a file that is damaged or none of ours, or weights that are not
    finite or do not fit.
    """
    (header,) = header_of(path, "network", "model")
    tensors = load_file(path)
    if network is None and (name := header.get("own")) in TEXT:
        network = _own(name)
    if "own" in header and network is None:
        raise ValueError(
            f"{path} holds weights for {name}, which is code and not in the file: "
            "give it, --network package.module:factory or load(path, network)"
        )
    try:
        denoiser: nn.Module
        if "own" in header:
            student = isinstance(network, OneStepGenerator)
            denoiser = copy.deepcopy(network.denoiser if student else network)  # type: ignore[assignment,union-attr]
        elif "edm" in header:  # as files were written before all networks shared one form
            denoiser, tensors = published_denoiser(**header["edm"]), renamed(tensors)
        else:
            raw = NETWORKS[header.get("class", "UNet")](**header["network"])
            denoiser = EDMDenoiser(raw, header["sigma_data"])
        if "own" not in header and "sigma_range" in header:
            denoiser.sigma_range = tuple(header["sigma_range"])  # type: ignore[assignment]
        denoiser.load_state_dict(tensors)
        if "prompts" in header:
            says(denoiser, "tell")(header["prompts"])
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
    return header_of(_path(path_or_name), "network", "made_by")[0]


def load(path_or_name: str | Path, network: nn.Module | None = None) -> nn.Module:
    """Load a shipped or published network by name, or any network file by path, frozen.

    Names are those of `SHIPPED`, `PUBLISHED` and `TEXT`, or ``package.module:factory``, your own
    code that makes a denoiser; a path that ends in .pkl goes through `load_edm`. `network` is what
    a file of weights for your own code is read into. A shipped file that is not the one that was
    shipped is refused.
    """
    if str(path_or_name) in TEXT or OWN.fullmatch(str(path_or_name)):
        return _own(str(path_or_name))
    if str(path_or_name) in PUBLISHED or str(path_or_name).endswith(".pkl"):
        return load_edm(path_or_name)[0]
    path = _path(path_or_name)
    wanted = SHIPPED.get(str(path_or_name))
    if wanted is not None:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != wanted:
            raise ValueError(f"{path} has SHA-256 {found}, the shipped one has {wanted}")
    return load_denoiser(path, network)


def _own(name: str) -> nn.Module:
    """What a factory in the user's code makes; the current folder is searched, too."""
    if os.getcwd() not in sys.path:  # as with `python -m`
        sys.path.append(os.getcwd())
    try:
        make = pkgutil.resolve_name(TEXT.get(name, name))
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name} cannot be imported: {error}") from error
    made = make()
    if not callable(made):
        raise ValueError(f"{name} makes a {type(made).__name__}, not a denoiser D(x, sigma, label)")
    model = made if isinstance(made, nn.Module) else FromFunction(made)
    model.loaded_from = name  # type: ignore[assignment]
    return model.requires_grad_(False).eval()


def _path(path_or_name: str | Path) -> Path:
    if str(path_or_name) in SHIPPED:
        return WEIGHTS / f"{path_or_name}.safetensors"
    if not Path(path_or_name).is_file():
        known = ", ".join([*SHIPPED, *TEXT, *PUBLISHED])
        raise FileNotFoundError(f"{path_or_name} is no file and no network's name ({known})")
    return Path(path_or_name)

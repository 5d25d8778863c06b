"""Latent text-to-image models of `diffusers`, in the book's terms.

A pipeline is a U-Net that denoises latents, and around it parts that no distillation changes:
tokenizer, text encoder, decoder. The U-Net becomes a denoiser whose classes are prompts, so
whatever draws classes (pairs, a distillation, the command line) draws prompts.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dmd_tutorial.adapters import FromDiffusers
from dmd_tutorial.checks import Condition, PerSample, Samples, check_label
from dmd_tutorial.data.captioned import captions_of_one
from dmd_tutorial.denoisers import device_of

SHAPES_TEXT = Path(__file__).parent.parent / "weights" / "shapes-text"
STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def load_pipeline(name: str | Path = SHAPES_TEXT) -> Any:
    """A pipeline of `diffusers` from a folder or a hub: the shipped one of shapes without a name.

    RuntimeError: `diffusers` or `transformers` are missing, or the weights, with no network.
    """
    try:
        from diffusers import DiffusionPipeline
        from diffusers.utils import logging as of_pipelines
        from transformers.utils import logging as of_weights
    except ImportError as error:
        raise RuntimeError(
            f"text to image needs packages of its own ({error}): pip install 'dmd-tutorial[text]'"
        ) from error
    if Path(name).is_dir():  # a download shows how far it is
        of_pipelines.disable_progress_bar()
        of_weights.disable_progress_bar()
    try:
        pipeline = DiffusionPipeline.from_pretrained(str(name), safety_checker=None)
    except (OSError, ValueError) as error:
        raise RuntimeError(
            f"{name} is no pipeline on this machine, and could not be downloaded: "
            "get it on a machine with a network, or give a folder"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class Surroundings:
    """What stands around a U-Net; shared by all copies of it."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        for part in (pipeline.vae, pipeline.text_encoder):
            part.requires_grad_(False).eval()

    def __deepcopy__(self, _: dict) -> "Surroundings":
        return self

    @property
    def words(self) -> list[str]:
        """The words that a tokenizer of whole words knows; none for one that splits them."""
        tokenizer = self.pipeline.tokenizer
        if tokenizer.unk_token in (tokenizer.eos_token, tokenizer.pad_token):
            return []
        special = set(tokenizer.all_special_tokens)
        vocabulary = tokenizer.get_vocab()
        return sorted(set(vocabulary) - special, key=vocabulary.__getitem__)

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Float[Tensor, "count tokens width"]:
        """The text encoder's answers; a word that it cannot know is a ValueError."""
        tokenizer, words = self.pipeline.tokenizer, self.words
        for word in " ".join(prompts).lower().split() if words else []:
            if word not in words:
                raise ValueError(f"the model has no word {word!r}; it knows {', '.join(words)}")
        length = tokenizer.model_max_length
        told = tokenizer(list(prompts), padding="max_length", max_length=length)["input_ids"]
        if long := sum(len(tokens) > length for tokens in told):
            warnings.warn(f"{long} prompts have more than {length} tokens: cut", stacklevel=2)
            told = tokenizer(
                list(prompts), padding="max_length", max_length=length, truncation=True
            )["input_ids"]
        encoder = self.pipeline.text_encoder
        tokens = torch.tensor(told, device=encoder.device)
        return torch.cat([encoder(some).last_hidden_state for some in tokens.split(500)])

    def latents(self, x: Samples) -> Samples:
        """Pictures in [-1, 1] as latents of about unit variance (means of the encoder's answer)."""
        vae = self.pipeline.vae
        return vae.encode(x).latent_dist.mode() * vae.config.scaling_factor

    def pictures(self, latents: Samples) -> Samples:
        """Latents as pictures, not clamped; an anchor may look through it."""
        vae = self.pipeline.vae.to(latents.device)
        return vae.decode(latents / vae.config.scaling_factor).sample

    def shape(self, size: int) -> tuple[int, int, int]:
        """The shape of pictures behind latents of so many pixels."""
        size = size * self.pipeline.vae_scale_factor
        return (self.pipeline.vae.config.out_channels, size, size)


class Prompted(nn.Module):
    """A pipeline's U-Net as a denoiser of latents; label k is the k-th of its prompts.

    A label of floating point is a text's embedding; `NO_CLASS`, or none, is the empty prompt. Only
    the U-Net has weights here: a deep copy shares all that stands around it.
    """

    sigma_data = 1.0  # latents are scaled to it
    embeddings: Tensor  # of the prompts, and of the empty one

    def __init__(self, pipeline: Any, prompts: Sequence[str] = ()) -> None:
        super().__init__()
        self.around = Surroundings(pipeline)
        null = self.around.embed([""])
        self.denoiser = FromDiffusers(pipeline.unet, pipeline.scheduler, null[0])
        self.tell(prompts)

    def tell(self, prompts: Sequence[str]) -> "Prompted":
        """Change the prompts that labels stand for."""
        self.prompts, self.classes = tuple(prompts), len(prompts)
        told = self.around.embed([*prompts, ""])  # NO_CLASS, -1, is the last
        told = told.to(device_of(self.denoiser))
        self.register_buffer("embeddings", told, persistent=False)
        return self

    def forward(self, x: Samples, sigma: PerSample, label: Condition | None = None) -> Samples:
        if label is not None and not label.is_floating_point():
            check_label(x, label, self.classes)
            label = self.embeddings[label.to(self.embeddings.device)]
        return self.denoiser(x, sigma, label)

    def ladder(self, steps: int) -> Float[Tensor, " steps+1"]:
        """The levels that the pipeline's own scheduler walks; Stable Diffusion's ends above 0."""
        scheduler = self.around.pipeline.scheduler
        scheduler.set_timesteps(steps)
        walked = scheduler.alphas_cumprod[scheduler.timesteps.unique().flip(0).cpu()]  # once each
        left = torch.cat([walked, torch.as_tensor(scheduler.final_alpha_cumprod)[None]]).double()
        return ((1 - left) / left).sqrt()

    def pipeline(self) -> Any:
        """This U-Net in its surroundings, to sample with or to save as `diffusers` does."""
        components = {**self.around.pipeline.components, "unet": self.denoiser.network}
        return type(self.around.pipeline)(**components, requires_safety_checker=False)


def shapes_text() -> Prompted:
    """The shipped model of captioned shapes, told every caption of one object."""
    return Prompted(load_pipeline(), captions_of_one())


def stable_diffusion() -> Prompted:
    """Stable Diffusion v1.5, the paper's teacher; tell it prompts before it is asked."""
    return Prompted(load_pipeline(STABLE_DIFFUSION))

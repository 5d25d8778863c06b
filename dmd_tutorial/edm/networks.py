"""The networks of the published EDM checkpoints, raw: DDPM++, NCSN++ and ADM.

All three are U-Nets of residual blocks, told the noise level (and the class) by an embedding.
Names of parameters and arguments are those of the published checkpoints, so that these load.

Sources: Karras et al. 2022 (EDM), Sections 3 and 5, appendix F; Song et al. 2021 (score SDE),
appendix H (DDPM++, NCSN++); Dhariwal and Nichol 2021, Section 3 (ADM).
"""

# What differs between the families:
#                              DDPM++ (vp)            NCSN++ (ve)            ADM
# ---------------------------  ---------------------  ---------------------  ----------------------
# class                        `SongUNet`             `SongUNet`             `DhariwalUNet`
# waves of the noise level     fixed, down to 1e-4    drawn, deviation 16    fixed, above 1e-4
# their order                  sines, cosines         sines, cosines         cosines, sines
# label joins the embedding    before its two layers  before its two layers  after its two layers
# one-hot label                times sqrt(classes)    times sqrt(classes)    as it is
# embedding in a block         added                  added                  scales and shifts
# sum with a short cut         times sqrt(1/2)        times sqrt(1/2)        as it is
# short cut past resampling    1x1 convolution        1x1 convolution        nothing more
# resampling filter            1 1                    1 3 3 1                1 1
# encoder sees smaller images  no                     yes (residual)         no
# heads of attention           one                    one                    width / 64
# attention in the decoder     last block of a level  last block of a level  every block of a level
# epsilon of the norms         1e-6                   1e-6                   1e-5

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from dmd_tutorial.checks import Condition, PerSample
from dmd_tutorial.denoisers import SIGMA_DATA, EDMDenoiser
from dmd_tutorial.edm import blocks
from dmd_tutorial.edm.blocks import Style, UNetBlock, conv, norm
from dmd_tutorial.networks.mlp import one_hot


class _RawNetwork(nn.Module):
    """What the families share: the way down and up, what they are told, and what they refuse."""

    enc: nn.ModuleDict
    dec: nn.ModuleDict
    _embed: Callable[[Tensor, Tensor, Tensor | None], Tensor]  # c_noise, rows of labels, augment
    _map: Callable[[Tensor, Tensor], Tensor]  # x, embedding
    config: dict[str, Any]  # the arguments it was made with

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        own = {k: v for k, v in arguments.items() if k not in ("self", "__class__")}
        self.config = {k: list(v) if isinstance(v, tuple) else v for k, v in own.items()}
        self.size, self.channels = self.config["img_resolution"], self.config["in_channels"]
        self.classes: int = self.config["label_dim"]

    def forward(
        self, x: Float[Tensor, "batch channels size size"], c_noise: PerSample,
        label: Condition | None = None, augment: Float[Tensor, "batch augment_dim"] | None = None,
    ) -> Float[Tensor, "batch out_channels size size"]:  # fmt: skip
        """Map scaled noisy images to F.

        Labels are classes, or rows of `classes` numbers; none, and `NO_CLASS`, are rows of zeros.
        What augmentation did to each image is zeros, the same as None, where it did nothing.
        """
        if x.shape[1:] != (self.channels, self.size, self.size):
            wanted = f"(batch, {self.channels}, {self.size}, {self.size})"
            raise ValueError(f"x has shape {tuple(x.shape)}, the network wants {wanted}")
        return self._map(x, self._embed(c_noise, self._rows(label, x), augment))

    def _rows(self, label: Condition | None, x: Tensor) -> Float[Tensor, "batch classes"]:
        if label is None or label.ndim == 1:
            return one_hot(x, label, self.classes)
        if label.shape != (len(x), self.classes) or not self.classes:
            wanted = f"({len(x)},) classes or ({len(x)}, {self.classes}) numbers"
            raise ValueError(f"label has shape {tuple(label.shape)}, not {wanted}")
        return label.to(x)

    def feature_layers(self) -> list[tuple[nn.Module, int]]:
        """The blocks of the encoder and the first at the bottom, with their channels."""
        layers = [*self.enc.values(), next(iter(self.dec.values()))]
        return [(layer, layer.out_channels) for layer in layers if isinstance(layer, UNetBlock)]

    def _walk(self, x: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Down and up: the last features, and the sum of the images that the decoder made."""
        skips: list[Tensor] = []
        image = x  # ever smaller, for the encoder to see again
        for name, layer in self.enc.items():
            if name.endswith("aux_down"):
                image = layer(image)
            elif name.endswith("aux_skip"):
                x = skips[-1] = x + layer(image)
            elif name.endswith("aux_residual"):
                x = skips[-1] = image = (x + layer(image)) / math.sqrt(2)
            else:
                x = layer(x, embedding) if isinstance(layer, UNetBlock) else layer(x)
                skips.append(x)
        normed, image = x, x.new_zeros(())  # until the lowest level, or the highest, makes one
        for name, layer in self.dec.items():
            if name.endswith("aux_up"):
                image = layer(image)
            elif name.endswith("aux_norm"):
                normed = functional.silu(layer(x))
            elif name.endswith("aux_conv"):
                image = image + layer(normed)
            else:
                if x.shape[1] != layer.in_channels:  # it wants the encoder's features, too
                    x = torch.cat([x, skips.pop()], dim=1)
                x = layer(x, embedding)
        return x, image


class SongUNet(_RawNetwork):
    """DDPM++ and NCSN++: a U-Net F(x, c_noise, label).

    The defaults make DDPM++. NCSN++ has ``embedding_type="fourier"``, ``channel_mult_noise=2``,
    ``encoder_type="residual"`` and ``resample_filter=[1, 3, 3, 1]``.

    `channel_mult` counts `model_channels` at each resolution, highest first; the decoder has one
    block more than `num_blocks` at each; `channel_mult_emb` and `channel_mult_noise` count them in
    the embedding and its waves. The encoder sees the image again at each resolution: "standard"
    (no), "skip" (shrunk, through a 1x1 convolution), "residual" (through a pyramid of its own). The
    decoder is "standard" or, with "skip", the sum of an image from each resolution.
    `label_dropout` is kept for the files that name it: the training loop hides labels.
    """

    def __init__(
        self, img_resolution: int, in_channels: int, out_channels: int, label_dim: int = 0,
        augment_dim: int = 0, model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2), channel_mult_emb: int = 4,
        num_blocks: int = 4, attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10, label_dropout: float = 0,
        embedding_type: str = "positional", channel_mult_noise: int = 1,
        encoder_type: str = "standard", decoder_type: str = "standard",
        resample_filter: Sequence[float] = (1, 1),
    ) -> None:  # fmt: skip
        super().__init__(dict(locals()))
        _check_choice("embedding_type", embedding_type, ("positional", "fourier"))
        _check_choice("encoder_type", encoder_type, ("standard", "skip", "residual"))
        _check_choice("decoder_type", decoder_type, ("standard", "skip"))
        embedding, waves = model_channels * channel_mult_emb, model_channels * channel_mult_noise
        levels = _levels(img_resolution, model_channels, channel_mult, num_blocks, attn_resolutions)
        style = Style(embedding, dropout, tuple(resample_filter))
        if embedding_type == "positional":
            self.map_noise: nn.Module = blocks.PositionalEmbedding(waves, endpoint=True)
        else:
            self.map_noise = blocks.FourierEmbedding(waves)
        self.map_label = nn.Linear(label_dim, waves) if label_dim else None
        self.map_augment = nn.Linear(augment_dim, waves, bias=False) if augment_dim else None
        self.map_layer0 = nn.Linear(waves, embedding)
        self.map_layer1 = nn.Linear(embedding, embedding)
        self.enc = _encoder(levels, style, in_channels, model_channels, encoder_type)
        self.dec = _decoder(levels, style, self.enc, out_channels, decoder_type)
        self._initialise()

    def _embed(self, c_noise: Tensor, rows: Tensor, augment: Tensor | None) -> Tensor:
        waves = self.map_noise(c_noise)
        embedding = torch.cat(waves.chunk(2, dim=1)[::-1], dim=1)  # sines first
        if self.map_label is not None:
            # times the root of the number of classes: a mean square of 1, as noise would have
            embedding = embedding + self.map_label(rows * math.sqrt(self.classes))
        if self.map_augment is not None and augment is not None:
            embedding = embedding + self.map_augment(augment)
        embedding = functional.silu(self.map_layer0(embedding))
        return functional.silu(self.map_layer1(embedding))

    def _map(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self._walk(x, embedding)[1]

    @torch.no_grad()
    def _initialise(self) -> None:
        """Glorot's uniform weights; every block starts as close to its short cut as is useful."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
                if name.endswith(("conv1", "proj", "aux_conv")):
                    module.weight *= 1e-5
                elif name.endswith("qkv"):
                    module.weight *= math.sqrt(0.2)


class DhariwalUNet(_RawNetwork):
    """ADM: a U-Net F(x, c_noise, label); arguments as in `SongUNet`."""

    def __init__(
        self, img_resolution: int, in_channels: int, out_channels: int, label_dim: int = 0,
        augment_dim: int = 0, model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4), channel_mult_emb: int = 4,
        num_blocks: int = 3, attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10, label_dropout: float = 0,
    ) -> None:  # fmt: skip
        super().__init__(dict(locals()))
        embedding, waves = model_channels * channel_mult_emb, model_channels
        levels = _levels(img_resolution, model_channels, channel_mult, num_blocks, attn_resolutions)
        style = Style(
            embedding, dropout, eps=1e-5, skip_scale=1.0, adaptive_scale=True,
            project_short_cut=False, channels_per_head=64, attend_in_every_block=True,
        )  # fmt: skip
        self.map_noise = blocks.PositionalEmbedding(waves, endpoint=False)
        self.map_augment = nn.Linear(augment_dim, waves, bias=False) if augment_dim else None
        self.map_layer0 = nn.Linear(waves, embedding)
        self.map_layer1 = nn.Linear(embedding, embedding)
        self.map_label = nn.Linear(label_dim, embedding, bias=False) if label_dim else None
        self.enc = _encoder(levels, style, in_channels, levels[0].width)
        self.dec = _decoder(levels, style, self.enc)
        self.out_norm = norm(levels[0].width, style.eps)
        self.out_conv = conv(levels[0].width, out_channels)
        self._initialise()

    def _embed(self, c_noise: Tensor, rows: Tensor, augment: Tensor | None) -> Tensor:
        embedding = self.map_noise(c_noise)
        if self.map_augment is not None and augment is not None:
            embedding = embedding + self.map_augment(augment)
        embedding = self.map_layer1(functional.silu(self.map_layer0(embedding)))
        if self.map_label is not None:
            embedding = embedding + self.map_label(rows)
        return functional.silu(embedding)

    def _map(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.out_conv(functional.silu(self.out_norm(self._walk(x, embedding)[0])))

    @torch.no_grad()
    def _initialise(self) -> None:
        """Uniform weights as torch draws them; blocks start as their short cut, F as 0."""
        for name, module in self.named_modules():
            if name.endswith(("conv1", "proj", "out_conv", "map_augment")):
                for parameter in module.parameters():
                    nn.init.zeros_(parameter)
        if self.map_label is not None:
            nn.init.normal_(self.map_label.weight)


NETWORKS: dict[str, type[nn.Module]] = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}


def published_denoiser(
    img_resolution: int, img_channels: int, label_dim: int = 0, model_type: str = "DhariwalUNet",
    sigma_data: float = SIGMA_DATA, **arguments: Any,
) -> EDMDenoiser:  # fmt: skip
    """A denoiser from the arguments that the published files name, all others being a network's.

    What they say of samplers and precision is left: `EDMDenoiser.precision` is asked for here.
    """
    _check_choice("model_type", model_type, NETWORKS)
    left = ("use_fp16", "sigma_min", "sigma_max")
    of_network = {k: v for k, v in arguments.items() if k not in left}
    shape = img_resolution, img_channels, img_channels, label_dim
    try:
        return EDMDenoiser(NETWORKS[model_type](*shape, **of_network), sigma_data)
    except TypeError as error:
        raise ValueError(f"{model_type} does not take these arguments: {error}") from error


class Level(NamedTuple):
    """One resolution of a U-Net."""

    name: str  # what the published names of its layers begin with: height x width
    width: int  # channels
    blocks: int  # on the way down; on the way up there is one more
    attention: bool  # whether blocks have it


def _levels(
    size: int, channels: int, multipliers: Sequence[int], blocks: int, with_attention: Sequence[int]
) -> list[Level]:
    halvings = len(multipliers) - 1
    if halvings < 0:
        raise ValueError("channel_mult has 0 entries, a U-Net has 1 resolution or more")
    if size % 2**halvings:
        raise ValueError(f"img_resolution {size} cannot be halved {halvings} times")
    sizes = [size >> depth for depth in range(halvings + 1)]
    return [
        Level(f"{size}x{size}", channels * times, blocks, size in with_attention)
        for size, times in zip(sizes, multipliers, strict=True)
    ]


def _encoder(
    levels: list[Level], style: Style, image: int, before: int, kind: str = "standard"
) -> nn.ModuleDict:
    """The way down, from `image` channels, first to `before` of them."""
    layers: dict[str, nn.Module] = {f"{levels[0].name}_conv": conv(image, before)}
    for level in levels:
        if level is not levels[0]:
            layers[f"{level.name}_down"] = UNetBlock(before, before, style, "down")
            if kind == "skip":  # the encoder sees the image once more, smaller
                layers[f"{level.name}_aux_down"] = blocks.Resample("down", style.taps)
                layers[f"{level.name}_aux_skip"] = conv(image, before, kernel=1)
            elif kind == "residual":
                convolved = blocks.ResamplingConv(image, before, 3, "down", style.taps, early=True)
                layers[f"{level.name}_aux_residual"], image = convolved, before
        for index in range(level.blocks):
            block = UNetBlock(before, level.width, style, attention=level.attention)
            layers[f"{level.name}_block{index}"] = block
            before = level.width
    return nn.ModuleDict(layers)


def _decoder(
    levels: list[Level], style: Style, encoder: nn.ModuleDict, image: int = 0, kind: str = ""
) -> nn.ModuleDict:
    """The way up, fed with what the encoder made; to `image` channels where they are given."""
    made = [layer for name, layer in encoder.items() if "aux" not in name]
    fed: list[int] = [layer.out_channels for layer in made]  # type: ignore[misc]
    before, layers = fed[-1], nn.ModuleDict()
    for level in reversed(levels):
        if level is levels[-1]:
            layers[f"{level.name}_in0"] = UNetBlock(before, before, style, attention=True)
            layers[f"{level.name}_in1"] = UNetBlock(before, before, style)
        else:
            layers[f"{level.name}_up"] = UNetBlock(before, before, style, "up")
        for index in range(level.blocks + 1):
            attention = level.attention and (style.attend_in_every_block or index == level.blocks)
            block = UNetBlock(before + fed.pop(), level.width, style, attention=attention)
            layers[f"{level.name}_block{index}"] = block
            before = level.width
        if image and (kind == "skip" or level is levels[0]):
            if kind == "skip" and level is not levels[-1]:  # added to the one from the level below
                layers[f"{level.name}_aux_up"] = blocks.Resample("up", style.taps)
            layers[f"{level.name}_aux_norm"] = norm(level.width, style.eps)
            layers[f"{level.name}_aux_conv"] = conv(level.width, image)
    return layers


def _check_choice(name: str, value: str, choices: Sequence[str] | dict[str, Any]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is one of {', '.join(choices)}, not {value!r}")

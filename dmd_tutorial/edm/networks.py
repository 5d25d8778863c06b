"""The networks of the published EDM checkpoints: DDPM++, NCSN++ and ADM, under EDM preconditioning.

All three are U-Nets of residual blocks, told the noise level (and the class) by an embedding.
Names of parameters and arguments are those of the published checkpoints, so that these load.

Sources: Karras et al. 2022 (EDM), Sections 3 and 5, appendix F; Song et al. 2021 (score SDE),
appendix H (DDPM++, NCSN++); Dhariwal and Nichol 2021, Section 3 (ADM).

Shapes in comments: b batch, c channels, h height, w width, e embedding.
"""

# What differs between the families:
#
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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dmd_tutorial.checks import check_finite, check_label, check_sigma, expand
from dmd_tutorial.denoisers import SIGMA_DATA, edm_preconditioning

Direction = Literal["up", "down"]
Taps = Sequence[float]


class EDMPrecond(nn.Module):
    """A published EDM network as a denoiser: ``D = c_skip x + c_out F(c_in x, ln(sigma) / 4)``.

    Args:
        img_resolution: Height and width of an image.
        img_channels: Colour channels.
        label_dim: Number of classes, 0 for none.
        use_fp16: Run the inside in float16 on a CUDA device, as the network was published. It does
            nothing on a CPU, and nothing once `precision` was set.
        sigma_min: Lowest noise level the network was made for, kept for samplers.
        sigma_max: Highest, likewise.
        sigma_data: Standard deviation of the data, in the units of x.
        model_type: "SongUNet" (DDPM++, NCSN++) or "DhariwalUNet" (ADM).
        **model_kwargs: Further arguments of that class.

    Attributes:
        model: F, the raw network.
        classes: `label_dim`, under the name that all denoisers of this package use.
        config: The arguments, so that ``EDMPrecond(**config)`` is a network of the same shape.

    Raises:
        ValueError: If the model type or one of its arguments is unknown or does not fit.

    Source: Karras et al. 2022 (EDM), Eq. 7 and Table 1.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        sigma_min: float = 0,
        sigma_max: float = math.inf,
        sigma_data: float = SIGMA_DATA,
        model_type: str = "DhariwalUNet",
        **model_kwargs: Any,
    ) -> None:
        super().__init__()
        self.config = {
            "img_resolution": img_resolution, "img_channels": img_channels, "label_dim": label_dim,
            "use_fp16": use_fp16, "sigma_min": sigma_min, "sigma_max": sigma_max,
            "sigma_data": sigma_data, "model_type": model_type, **model_kwargs,
        }  # fmt: skip
        self.img_resolution, self.img_channels = img_resolution, img_channels
        self.label_dim = self.classes = label_dim
        self.sigma_min, self.sigma_max, self.sigma_data = sigma_min, sigma_max, sigma_data
        self.use_fp16 = use_fp16
        self._precision: torch.dtype | None = None
        _check_choice("model_type", model_type, MODELS)
        try:
            self.model = MODELS[model_type](
                img_resolution, img_channels, img_channels, label_dim, **model_kwargs
            )
        except TypeError as error:
            raise ValueError(f"{model_type} does not take these arguments: {error}") from error

    @property
    def precision(self) -> torch.dtype | None:
        """Type of the arithmetic inside the network; None means float32 (but see `use_fp16`)."""
        return self._precision

    @precision.setter
    def precision(self, dtype: torch.dtype | None) -> None:
        # What a caller asks for replaces the published habit: float16 without loss scaling
        # must not slip into somebody's training.
        self._precision, self.use_fp16 = dtype, False

    @property
    def recompute(self) -> bool:
        """Whether blocks compute their inside again in the backward pass instead of keeping it."""
        return any(block.recompute for block in self._blocks())

    @recompute.setter
    def recompute(self, value: bool) -> None:
        for block in self._blocks():
            block.recompute = value

    def forward(
        self,
        x: Float[Tensor, "batch channels size size"],
        sigma: Float[Tensor, "..."] | float,
        class_labels: Shaped[Tensor, "batch ..."] | None = None,
        augment_labels: Float[Tensor, "batch augment_dim"] | None = None,
    ) -> Float[Tensor, "batch channels size size"]:
        """Denoise.

        Args:
            x: Noisy images, (batch, channels, size, size); float64 from a sampler is welcome.
            sigma: Noise levels in the units of x, above 0: one per image, (batch,) or
                (batch, 1, 1, 1), or one for all.
            class_labels: Class indices, (batch,), or one-hot rows, (batch, label_dim). A
                conditional network without them gets zeros.
            augment_labels: What augmentation did to each image, (batch, augment_dim); zeros, for
                "nothing", are the same as None.

        Returns:
            Denoised images, (batch, channels, size, size), float32.

        Raises:
            ValueError: If shapes do not fit, a class is out of range, sigma is not above 0, or an
                input is not finite.
        """
        self._check_images(x)
        x = x.float()
        sigma = _one_per_image(sigma, x)
        labels = _one_hot(class_labels, x, self.label_dim)
        self._check_augmentation(augment_labels, len(x))
        c_skip, c_out, c_in, c_noise = edm_preconditioning(sigma, self.sigma_data)
        dtype = self._dtype_inside(x.device)
        with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
            raw = self.model(expand(c_in, x) * x, c_noise, labels, augment_labels)
        # low precision inside the network, full precision outside it
        return expand(c_skip, x) * x + expand(c_out, x) * raw.float()

    def _dtype_inside(self, device: torch.device) -> torch.dtype | None:
        return torch.float16 if self.use_fp16 and device.type == "cuda" else self._precision

    def _blocks(self) -> list["UNetBlock"]:
        return [module for module in self.modules() if isinstance(module, UNetBlock)]

    def _check_images(self, x: Tensor) -> None:
        if x.shape[1:] != (self.img_channels, self.img_resolution, self.img_resolution):
            wanted = f"(batch, {self.img_channels}, {self.img_resolution}, {self.img_resolution})"
            raise ValueError(f"x has shape {tuple(x.shape)}, the network wants {wanted}")
        check_finite(x=x)

    def _check_augmentation(self, labels: Tensor | None, batch: int) -> None:
        wanted = (batch, self.config.get("augment_dim", 0))
        if labels is not None and labels.shape != wanted:
            raise ValueError(f"augment_labels has shape {tuple(labels.shape)}, not {wanted}")


class SongUNet(nn.Module):
    """DDPM++ and NCSN++: a U-Net F(x, c_noise, label).

    The defaults make DDPM++. NCSN++ has ``embedding_type="fourier"``, ``channel_mult_noise=2``,
    ``encoder_type="residual"`` and ``resample_filter=[1, 3, 3, 1]``.

    Args:
        img_resolution: Height and width of an image.
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        label_dim: Number of classes, 0 for none.
        augment_dim: Numbers that describe an augmentation, 0 for none.
        model_channels: Channels that `channel_mult` multiplies.
        channel_mult: Channels at each resolution, highest first.
        channel_mult_emb: Size of the embedding, in multiples of `model_channels`.
        num_blocks: Blocks at each resolution of the encoder; the decoder has one more.
        attn_resolutions: Resolutions with attention.
        dropout: Share of activations dropped in training, inside each block.
        label_dropout: Share of labels replaced by zeros in training, for guidance.
        embedding_type: Waves of the noise level: "positional" (fixed) or "fourier" (drawn).
        channel_mult_noise: How many waves, in multiples of `model_channels`.
        encoder_type: Whether the encoder sees the image again at each resolution: "standard" (no),
            "skip" (shrunk, through a 1x1 convolution), "residual" (through a pyramid of its own).
        decoder_type: "standard", or "skip": an image is made at each resolution and the enlarged
            images are summed.
        resample_filter: Taps of the filter before halving and after doubling, even in number.

    Raises:
        ValueError: If an argument is none of its choices or the sizes do not fit.

    Source: Song et al. 2021 (score SDE), appendix H; Karras et al. 2022 (EDM), appendix F.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        label_dropout: float = 0,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Taps = (1, 1),
    ) -> None:
        super().__init__()
        _check_choice("embedding_type", embedding_type, ("positional", "fourier"))
        _check_choice("encoder_type", encoder_type, ("standard", "skip", "residual"))
        _check_choice("decoder_type", decoder_type, ("standard", "skip"))
        embedding, waves = model_channels * channel_mult_emb, model_channels * channel_mult_noise
        levels = _levels(img_resolution, model_channels, channel_mult, num_blocks, attn_resolutions)
        style = Style(
            embedding, dropout, eps=1e-6, skip_scale=math.sqrt(0.5), adaptive_scale=False,
            project_short_cut=True, channels_per_head=None, attend_in_every_block=False,
            taps=tuple(resample_filter),
        )  # fmt: skip

        self.label_dropout = label_dropout
        self.map_noise = (
            PositionalEmbedding(waves, endpoint=True)
            if embedding_type == "positional"
            else FourierEmbedding(waves)
        )
        self.map_label = nn.Linear(label_dim, waves) if label_dim else None
        self.map_augment = nn.Linear(augment_dim, waves, bias=False) if augment_dim else None
        self.map_layer0 = nn.Linear(waves, embedding)
        self.map_layer1 = nn.Linear(embedding, embedding)
        self.enc = _encoder(levels, style, in_channels, model_channels, encoder_type)
        self.dec = _decoder(levels, style, self.enc, out_channels, decoder_type)
        self._initialise()

    def forward(
        self,
        x: Float[Tensor, "batch in_channels size size"],
        noise_labels: Float[Tensor, " batch"],
        class_labels: Float[Tensor, "batch label_dim"] | None = None,
        augment_labels: Float[Tensor, "batch augment_dim"] | None = None,
    ) -> Float[Tensor, "batch out_channels size size"]:
        """Map scaled noisy images to F.

        Args:
            x: Images, (batch, in_channels, size, size).
            noise_labels: c_noise, ``ln(sigma) / 4``, (batch,).
            class_labels: One-hot rows, (batch, label_dim), where there are classes; zeros without.
            augment_labels: What augmentation did to each image, (batch, augment_dim).

        Returns:
            F, (batch, out_channels, size, size).
        """
        embedding = self._embed(noise_labels, class_labels, augment_labels)
        return self._decode(*self._encode(x, embedding), embedding)

    def _embed(
        self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None
    ) -> Tensor:
        waves = self.map_noise(noise_labels)  # (b, waves)
        embedding = torch.cat(waves.chunk(2, dim=1)[::-1], dim=1)  # sines first
        if self.map_label is not None:
            share = self.label_dropout if self.training else 0
            labels = _labels(class_labels, waves, self.map_label.in_features, share)
            # times the root of the number of classes: a mean square of 1, as noise would have
            embedding = embedding + self.map_label(labels * math.sqrt(labels.shape[1]))
        if self.map_augment is not None and augment_labels is not None:
            embedding = embedding + self.map_augment(augment_labels)
        embedding = functional.silu(self.map_layer0(embedding))
        return functional.silu(self.map_layer1(embedding))  # (b, e)

    def _encode(self, x: Tensor, embedding: Tensor) -> tuple[Tensor, list[Tensor]]:
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
        return x, skips

    def _decode(self, x: Tensor, skips: list[Tensor], embedding: Tensor) -> Tensor:
        normed, image = x, x.new_zeros(())  # until the lowest level, or the highest, makes one
        for name, layer in self.dec.items():
            if name.endswith("aux_up"):
                image = layer(image)
            elif name.endswith("aux_norm"):
                normed = functional.silu(layer(x))
            elif name.endswith("aux_conv"):
                image = image + layer(normed)
            else:
                x = layer(_join(x, skips, layer), embedding)
        return image

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


class DhariwalUNet(nn.Module):
    """ADM: a U-Net F(x, c_noise, label).

    Args:
        img_resolution: Height and width of an image.
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        label_dim: Number of classes, 0 for none.
        augment_dim: Numbers that describe an augmentation, 0 for none.
        model_channels: Channels that `channel_mult` multiplies.
        channel_mult: Channels at each resolution, highest first.
        channel_mult_emb: Size of the embedding, in multiples of `model_channels`.
        num_blocks: Blocks at each resolution of the encoder; the decoder has one more.
        attn_resolutions: Resolutions with attention.
        dropout: Share of activations dropped in training, inside each block.
        label_dropout: Share of labels replaced by zeros in training, for guidance.

    Raises:
        ValueError: If the sizes do not fit.

    Source: Dhariwal and Nichol 2021, Section 3; Karras et al. 2022 (EDM), appendix F.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        label_dropout: float = 0,
    ) -> None:
        super().__init__()
        embedding = model_channels * channel_mult_emb
        levels = _levels(img_resolution, model_channels, channel_mult, num_blocks, attn_resolutions)
        style = Style(
            embedding, dropout, eps=1e-5, skip_scale=1.0, adaptive_scale=True,
            project_short_cut=False, channels_per_head=64, attend_in_every_block=True,
            taps=(1, 1),
        )  # fmt: skip

        self.label_dropout = label_dropout
        self.map_noise = PositionalEmbedding(model_channels, endpoint=False)
        self.map_augment = (
            nn.Linear(augment_dim, model_channels, bias=False) if augment_dim else None
        )
        self.map_layer0 = nn.Linear(model_channels, embedding)
        self.map_layer1 = nn.Linear(embedding, embedding)
        self.map_label = nn.Linear(label_dim, embedding, bias=False) if label_dim else None
        self.enc = _encoder(levels, style, in_channels, levels[0].width)
        self.dec = _decoder(levels, style, self.enc)
        self.out_norm = _norm(levels[0].width, style.eps)
        self.out_conv = _conv(levels[0].width, out_channels)
        self._initialise()

    def forward(
        self,
        x: Float[Tensor, "batch in_channels size size"],
        noise_labels: Float[Tensor, " batch"],
        class_labels: Float[Tensor, "batch label_dim"] | None = None,
        augment_labels: Float[Tensor, "batch augment_dim"] | None = None,
    ) -> Float[Tensor, "batch out_channels size size"]:
        """Map scaled noisy images to F.

        Args:
            x: Images, (batch, in_channels, size, size).
            noise_labels: c_noise, ``ln(sigma) / 4``, (batch,).
            class_labels: One-hot rows, (batch, label_dim), where there are classes; zeros without.
            augment_labels: What augmentation did to each image, (batch, augment_dim).

        Returns:
            F, (batch, out_channels, size, size).
        """
        embedding = self._embed(noise_labels, class_labels, augment_labels)
        skips: list[Tensor] = []
        for layer in self.enc.values():
            x = layer(x, embedding) if isinstance(layer, UNetBlock) else layer(x)
            skips.append(x)
        for layer in self.dec.values():
            x = layer(_join(x, skips, layer), embedding)
        return self.out_conv(functional.silu(self.out_norm(x)))

    def _embed(
        self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None
    ) -> Tensor:
        embedding = self.map_noise(noise_labels)  # (b, waves)
        if self.map_augment is not None and augment_labels is not None:
            embedding = embedding + self.map_augment(augment_labels)
        embedding = self.map_layer1(functional.silu(self.map_layer0(embedding)))
        if self.map_label is not None:
            share = self.label_dropout if self.training else 0
            labels = _labels(class_labels, embedding, self.map_label.in_features, share)
            embedding = embedding + self.map_label(labels)
        return functional.silu(embedding)  # (b, e)

    @torch.no_grad()
    def _initialise(self) -> None:
        """Uniform weights as torch draws them; blocks start as their short cut, F as 0."""
        for name, module in self.named_modules():
            if name.endswith(("conv1", "proj", "out_conv", "map_augment")):
                for parameter in module.parameters():
                    nn.init.zeros_(parameter)
        if self.map_label is not None:
            nn.init.normal_(self.map_label.weight)


MODELS: dict[str, type[nn.Module]] = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}


@dataclass(frozen=True)
class Style:
    """What all blocks of a network share.

    Attributes:
        embedding: Size of the embedding.
        dropout: Share of activations dropped in training.
        eps: Epsilon of the norms.
        skip_scale: Factor on each sum with a short cut.
        adaptive_scale: The embedding scales and shifts the second norm; else it is added before.
        project_short_cut: The short cut past a resampling has a 1x1 convolution.
        channels_per_head: Width of an attention head; None for one head.
        attend_in_every_block: Attention, where a level has it, follows every block of the
            decoder; else the last one only.
        taps: The resampling filter.
    """

    embedding: int
    dropout: float
    eps: float
    skip_scale: float
    adaptive_scale: bool
    project_short_cut: bool
    channels_per_head: int | None
    attend_in_every_block: bool
    taps: tuple[float, ...]

    def heads(self, width: int) -> int:
        """How many heads attention over so many channels has. Too few channels: no attention."""
        return 1 if self.channels_per_head is None else width // self.channels_per_head


class UNetBlock(nn.Module):
    """Two convolutions with a short cut, told the noise level; then, in places, self-attention.

    Args:
        in_channels: Channels before.
        out_channels: Channels after.
        style: What the family's blocks share.
        resample: Halve ("down") or double ("up") height and width on the way.
        attention: Whether attention follows.

    Source: Karras et al. 2022 (EDM), appendix F, after Song et al. 2021 and Dhariwal and
    Nichol 2021.
    """

    recompute = False  # in the backward pass, instead of keeping what is inside

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        style: Style,
        resample: Direction | None = None,
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.dropout, self.skip_scale = style.dropout, style.skip_scale
        self.adaptive_scale = style.adaptive_scale
        self.num_heads = style.heads(out_channels) if attention else 0
        self.norm0 = _norm(in_channels, style.eps)
        self.conv0 = _resampling_conv(in_channels, out_channels, 3, resample, style.taps)
        self.affine = nn.Linear(style.embedding, out_channels * (2 if self.adaptive_scale else 1))
        self.norm1 = _norm(out_channels, style.eps)
        self.conv1 = _conv(out_channels, out_channels)
        self.skip: nn.Module
        if in_channels != out_channels or (resample and style.project_short_cut):
            self.skip = _resampling_conv(in_channels, out_channels, 1, resample, style.taps)
        else:
            self.skip = Resample(resample, style.taps) if resample else nn.Identity()
        if self.num_heads:
            self.norm2 = _norm(out_channels, style.eps)
            self.qkv = _conv(out_channels, 3 * out_channels, kernel=1)
            self.proj = _conv(out_channels, out_channels, kernel=1)

    def forward(
        self,
        x: Float[Tensor, "batch in_channels height width"],
        embedding: Float[Tensor, "batch embedding"],
    ) -> Float[Tensor, "batch out_channels new_height new_width"]:
        """Map feature maps to feature maps.

        Args:
            x: Feature maps, (batch, in_channels, height, width).
            embedding: Noise level and class, (batch, embedding).

        Returns:
            Feature maps, (batch, out_channels, ...), resampled where the block resamples.
        """
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._map, x, embedding, use_reentrant=False)
        return self._map(x, embedding)

    def _map(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv0(functional.silu(self.norm0(x)))
        told = self.affine(embedding)[:, :, None, None].to(h.dtype)
        if self.adaptive_scale:
            scale, shift = told.chunk(2, dim=1)
            h = self.norm1(h) * (1 + scale) + shift
        else:
            h = self.norm1(h + told)
        h = self.conv1(functional.dropout(functional.silu(h), self.dropout, self.training))
        x = (self.skip(x) + h) * self.skip_scale
        return (x + self._attend(x)) * self.skip_scale if self.num_heads else x

    def _attend(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        # the channels of a head come in threes: query, key, value
        qkv = self.qkv(self.norm2(x)).reshape(b, self.num_heads, c // self.num_heads, 3, h * w)
        query, key, value = (part.mT for part in qkv.unbind(dim=3))  # (b, heads, h w, c / heads)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.mT.reshape(b, c, h, w))


class PositionalEmbedding(nn.Module):
    """Waves of a number, at fixed frequencies from 1 down to 1e-4, evenly spaced in the logarithm.

    Args:
        channels: How many values, an even number: cosines, then sines.
        endpoint: Whether 1e-4 itself is the last frequency, or would be the next.

    Source: Vaswani et al. 2017, Section 3.5.
    """

    def __init__(self, channels: int, endpoint: bool) -> None:
        super().__init__()
        self.channels, self.endpoint = channels, endpoint

    def forward(self, number: Float[Tensor, " batch"]) -> Float[Tensor, "batch channels"]:
        """Map (batch,) to (batch, channels)."""
        count = self.channels // 2
        steps = torch.arange(count, dtype=number.dtype, device=number.device)
        frequencies = 1e-4 ** (steps / (count - self.endpoint))
        return _waves(number, frequencies)


class FourierEmbedding(nn.Module):
    """Waves of a number, at frequencies drawn once from a normal distribution and then kept.

    Args:
        channels: How many values, an even number: cosines, then sines.
        scale: Standard deviation of the frequencies, in cycles.

    Source: Tancik et al. 2020; Song et al. 2021 (score SDE), appendix H.
    """

    freqs: Tensor

    def __init__(self, channels: int, scale: float = 16) -> None:
        super().__init__()
        self.register_buffer("freqs", scale * torch.randn(channels // 2))

    def forward(self, number: Float[Tensor, " batch"]) -> Float[Tensor, "batch channels"]:
        """Map (batch,) to (batch, channels)."""
        return _waves(number, 2 * math.pi * self.freqs.to(number.dtype))


class Resample(nn.Module):
    """Halve or double height and width, with a separable filter.

    Args:
        direction: "down" or "up".
        taps: The filter along one axis, an even number of taps; scaled so that a constant image
            stays as it is.

    Raises:
        ValueError: If the number of taps is odd: output pixels would fall between input pixels.
    """

    resample_filter: Tensor

    def __init__(self, direction: Direction, taps: Taps) -> None:
        super().__init__()
        self.direction = direction
        self.register_buffer("resample_filter", _filter(taps))

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels new_height new_width"]:
        """Map (batch, channels, height, width) to half or twice the height and width."""
        return _resample(x, self.resample_filter, self.direction)


class ResampleThenConv(nn.Conv2d):
    """A convolution at the new resolution: filter and resample, then convolve.

    Args:
        before: Channels before.
        after: Channels after.
        kernel: Height and width of the kernel, odd.
        direction: "down" or "up".
        taps: The resampling filter along one axis.
    """

    resample_filter: Tensor

    def __init__(
        self, before: int, after: int, kernel: int, direction: Direction, taps: Taps
    ) -> None:
        super().__init__(before, after, kernel, padding=kernel // 2)
        self.direction = direction
        self.register_buffer("resample_filter", _filter(taps))

    def forward(
        self, x: Float[Tensor, "batch before height width"]
    ) -> Float[Tensor, "batch after new_height new_width"]:
        """Map (batch, before, height, width) to (batch, after, ...)."""
        return super().forward(_resample(x, self.resample_filter, self.direction))


class ConvThenDown(nn.Conv2d):
    """A 3x3 convolution at the old resolution, then filter and halve.

    It differs from the other order at the border only through the padding: here the convolution
    makes the pixels that the filter needs beyond the border.

    Args:
        before: Channels before.
        after: Channels after.
        taps: The resampling filter along one axis.
    """

    resample_filter: Tensor

    def __init__(self, before: int, after: int, taps: Taps) -> None:
        super().__init__(before, after, 3, padding=1 + (len(taps) - 1) // 2)
        self.register_buffer("resample_filter", _filter(taps))

    def forward(
        self, x: Float[Tensor, "batch before height width"]
    ) -> Float[Tensor, "batch after new_height new_width"]:
        """Map (batch, before, height, width) to (batch, after, height / 2, width / 2)."""
        return _resample(super().forward(x), self.resample_filter, "down", padded=True)


@dataclass(frozen=True)
class Level:
    """One resolution of a U-Net.

    Attributes:
        size: Height and width.
        width: Channels.
        blocks: Blocks on the way down; on the way up there is one more.
        attention: Whether blocks have attention.
    """

    size: int
    width: int
    blocks: int
    attention: bool

    @property
    def name(self) -> str:
        """What the published names of its layers begin with."""
        return f"{self.size}x{self.size}"


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
        Level(size, channels * times, blocks, size in with_attention)
        for size, times in zip(sizes, multipliers, strict=True)
    ]


def _encoder(
    levels: list[Level], style: Style, image: int, before: int, kind: str = "standard"
) -> nn.ModuleDict:
    """The way down, from `image` channels, first to `before` of them."""
    layers: dict[str, nn.Module] = {f"{levels[0].name}_conv": _conv(image, before)}
    for level in levels:
        if level is not levels[0]:
            layers[f"{level.name}_down"] = UNetBlock(before, before, style, "down")
            layers |= _see_again(level, style, image, before, kind)
            image = before if kind == "residual" else image
        for index in range(level.blocks):
            block = UNetBlock(before, level.width, style, attention=level.attention)
            layers[f"{level.name}_block{index}"] = block
            before = level.width
    return nn.ModuleDict(layers)


def _see_again(
    level: Level, style: Style, image: int, width: int, kind: str
) -> dict[str, nn.Module]:
    """The layers through which an encoder sees the image once more, smaller."""
    if kind == "skip":
        shrink, project = Resample("down", style.taps), _conv(image, width, kernel=1)
        return {f"{level.name}_aux_down": shrink, f"{level.name}_aux_skip": project}
    if kind == "residual":
        return {f"{level.name}_aux_residual": ConvThenDown(image, width, style.taps)}
    return {}


def _decoder(
    levels: list[Level],
    style: Style,
    encoder: nn.ModuleDict,
    image: int | None = None,
    kind: str = "standard",
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
            chosen = style.attend_in_every_block or index == level.blocks
            block = UNetBlock(
                before + fed.pop(), level.width, style, attention=level.attention and chosen
            )
            layers[f"{level.name}_block{index}"] = block
            before = level.width
        if image is not None and (kind == "skip" or level is levels[0]):
            enlarge = kind == "skip" and level is not levels[-1]
            layers.update(_make_image(level, style, image, enlarge))
    return layers


def _make_image(level: Level, style: Style, image: int, enlarge: bool) -> dict[str, nn.Module]:
    """The layers that make an image, to be added to the enlarged one from the level below."""
    enlarged = {f"{level.name}_aux_up": Resample("up", style.taps)} if enlarge else {}
    return enlarged | {
        f"{level.name}_aux_norm": _norm(level.width, style.eps),
        f"{level.name}_aux_conv": _conv(level.width, image),
    }


def _join(x: Tensor, skips: list[Tensor], block: nn.Module) -> Tensor:
    """Append the encoder's features of the same resolution where a block wants them."""
    return x if x.shape[1] == block.in_channels else torch.cat([x, skips.pop()], dim=1)


def _norm(width: int, eps: float) -> nn.GroupNorm:
    groups = min(32, width // 4)
    if groups == 0 or width % groups:
        raise ValueError(f"{width} channels do not fall into {groups} equal groups")
    return nn.GroupNorm(groups, width, eps)


def _conv(before: int, after: int, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(before, after, kernel, padding=kernel // 2)


def _resampling_conv(
    before: int, after: int, kernel: int, resample: Direction | None, taps: Taps
) -> nn.Conv2d:
    if resample is None:
        return _conv(before, after, kernel)
    return ResampleThenConv(before, after, kernel, resample, taps)


def _filter(taps: Taps) -> Float[Tensor, "1 1 taps taps"]:
    if len(taps) % 2:
        raise ValueError(f"the resampling filter has {len(taps)} taps, their number must be even")
    line = torch.tensor(taps, dtype=torch.float32)
    return torch.outer(line, line)[None, None] / line.sum() ** 2


def _resample(x: Tensor, kernel: Tensor, direction: Direction, padded: bool = False) -> Tensor:
    """Filter each channel by itself and halve or double its height and width."""
    channels = x.shape[1]
    each = kernel.to(x.dtype).expand(channels, -1, -1, -1)
    pad = 0 if padded else (kernel.shape[-1] - 1) // 2
    if direction == "down":
        return functional.conv2d(x, each, stride=2, padding=pad, groups=channels)
    # twice the height and width: each input pixel makes four
    return functional.conv_transpose2d(x, 4 * each, stride=2, padding=pad, groups=channels)


def _waves(number: Tensor, frequencies: Tensor) -> Tensor:
    phase = torch.outer(number, frequencies)
    return torch.cat([phase.cos(), phase.sin()], dim=1)


def _labels(
    labels: Tensor | None, embedding: Tensor, classes: int, dropped: float
) -> Float[Tensor, "batch classes"]:
    """One-hot rows; zeros where there are none, and in place of the share to be dropped."""
    if labels is None:
        return embedding.new_zeros(len(embedding), classes)
    if dropped:
        labels = labels * (torch.rand(len(labels), 1, device=labels.device) >= dropped)
    return labels


def _one_per_image(sigma: Tensor | float, x: Tensor) -> Float[Tensor, " batch"]:
    sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).reshape(-1)
    if len(sigma) == 1:
        sigma = sigma.expand(len(x))
    check_sigma(x, sigma)
    if (sigma == 0).any():
        raise ValueError("sigma is 0 somewhere: a clean sample needs no denoiser (ln 0)")
    return sigma


def _one_hot(labels: Tensor | None, x: Tensor, classes: int) -> Tensor | None:
    """Class indices or one-hot rows as rows of numbers, (batch, classes)."""
    if labels is None:
        return None
    if labels.ndim == 1 and not labels.is_floating_point():
        check_label(x, labels, classes)
        return functional.one_hot(labels.long(), classes).to(x)
    if classes == 0 or labels.shape[-1] != classes or labels.numel() not in (
        classes, len(x) * classes
    ):  # fmt: skip
        wanted = f"({len(x)},) indices or ({len(x)}, {classes}) one-hot rows"
        raise ValueError(f"class_labels has shape {tuple(labels.shape)}, not {wanted}")
    return labels.to(x).reshape(-1, classes).expand(len(x), classes)


def _check_choice(name: str, value: str, choices: Sequence[str] | dict[str, Any]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is one of {', '.join(choices)}, not {value!r}")

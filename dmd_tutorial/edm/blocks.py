"""What the published networks are built of: blocks, embeddings of a number, resampling."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from dmd_tutorial.checks import PerSample
from dmd_tutorial.networks.unet import Recomputable

Direction = Literal["up", "down"]
Taps = Sequence[float]  # of a filter along one axis, even in number


class Style(NamedTuple):
    """What all blocks of a network share; the defaults are DDPM++'s."""

    embedding: int  # size of the embedding
    dropout: float  # share of activations dropped in training
    taps: tuple[float, ...] = (1, 1)  # of the resampling filter
    eps: float = 1e-6  # of the norms
    skip_scale: float = math.sqrt(0.5)  # factor on each sum with a short cut
    adaptive_scale: bool = False  # the embedding scales the second norm, too; else it only shifts
    project_short_cut: bool = True  # the short cut past a resampling has a 1x1 convolution
    channels_per_head: int | None = None  # width of an attention head; None for one head
    attend_in_every_block: bool = False  # of the decoder, at a level with attention; else the last


class UNetBlock(Recomputable):
    """Two convolutions with a short cut, told the noise level; then, in places, self-attention.

    With `resample` height and width are halved ("down") or doubled ("up") on the way.
    Source: Karras et al. 2022 (EDM), appendix F.
    """

    def __init__(
        self, in_channels: int, out_channels: int, style: Style,
        resample: Direction | None = None, attention: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.dropout, self.skip_scale = style.dropout, style.skip_scale
        self.adaptive_scale = style.adaptive_scale
        heads = out_channels // (style.channels_per_head or out_channels)
        self.num_heads = heads if attention else 0  # too few channels for one: no attention
        self.norm0 = norm(in_channels, style.eps)
        self.conv0 = conv(in_channels, out_channels, 3, resample, style.taps)
        self.affine = nn.Linear(style.embedding, out_channels * (2 if self.adaptive_scale else 1))
        self.norm1 = norm(out_channels, style.eps)
        self.conv1 = conv(out_channels, out_channels)
        self.skip: nn.Module
        if in_channels != out_channels or (resample and style.project_short_cut):
            self.skip = conv(in_channels, out_channels, 1, resample, style.taps)
        else:
            self.skip = Resample(resample, style.taps) if resample else nn.Identity()
        if self.num_heads:
            self.norm2 = norm(out_channels, style.eps)
            self.qkv = conv(out_channels, 3 * out_channels, kernel=1)
            self.proj = conv(out_channels, out_channels, kernel=1)

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
    """Waves of a number, at fixed frequencies from 1 down to 1e-4: cosines, then sines.

    They are evenly spaced in the logarithm; 1e-4 is the last one with `endpoint`, else it would be
    the next. Source: Vaswani et al. 2017, Section 3.5.
    """

    def __init__(self, channels: int, endpoint: bool) -> None:
        super().__init__()
        self.channels, self.endpoint = channels, endpoint

    def forward(self, number: PerSample) -> Float[Tensor, "batch channels"]:
        count = self.channels // 2
        steps = torch.arange(count, dtype=number.dtype, device=number.device)
        return _waves(number, 1e-4 ** (steps / (count - self.endpoint)))


class FourierEmbedding(nn.Module):
    """Waves of a number, at frequencies drawn once, in cycles: cosines, then sines.

    Source: Tancik et al. 2020; Song et al. 2021 (score SDE), appendix H.
    """

    freqs: Tensor

    def __init__(self, channels: int, scale: float = 16) -> None:
        super().__init__()
        self.register_buffer("freqs", scale * torch.randn(channels // 2))

    def forward(self, number: PerSample) -> Float[Tensor, "batch channels"]:
        return _waves(number, 2 * math.pi * self.freqs.to(number.dtype))


class Resample(nn.Module):
    """Halve or double height and width, with a separable filter that keeps a constant image."""

    resample_filter: Tensor

    def __init__(self, direction: Direction, taps: Taps) -> None:
        super().__init__()
        self.direction = direction
        self.register_buffer("resample_filter", _filter(taps))

    def forward(self, x: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch c new_h new_w"]:
        return _resample(x, self.resample_filter, self.direction)


class ResamplingConv(nn.Conv2d):
    """A convolution at the new resolution or, `early`, at the old one.

    They differ at the border only through the padding: an early convolution makes the pixels that
    the filter needs beyond the border.
    """

    resample_filter: Tensor

    def __init__(
        self, before: int, after: int, kernel: int, to: Direction, taps: Taps, early: bool = False
    ) -> None:
        beyond = (len(taps) - 1) // 2 if early else 0
        super().__init__(before, after, kernel, padding=kernel // 2 + beyond)
        self.direction, self.early = to, early
        self.register_buffer("resample_filter", _filter(taps))

    def forward(self, x: Float[Tensor, "b before h w"]) -> Float[Tensor, "b after new_h new_w"]:
        if self.early:
            return _resample(super().forward(x), self.resample_filter, self.direction, padded=True)
        return super().forward(_resample(x, self.resample_filter, self.direction))


def norm(width: int, eps: float) -> nn.GroupNorm:
    """A group norm over at most 32 groups, of at least 4 channels each."""
    groups = min(32, width // 4)
    if groups == 0 or width % groups:
        raise ValueError(f"{width} channels do not fall into {groups} equal groups")
    return nn.GroupNorm(groups, width, eps)


def conv(
    before: int, after: int, kernel: int = 3, resample: Direction | None = None, taps: Taps = ()
) -> nn.Conv2d:
    """A convolution that keeps height and width, or one at the new resolution."""
    if resample:
        return ResamplingConv(before, after, kernel, resample, taps)
    return nn.Conv2d(before, after, kernel, padding=kernel // 2)


def _filter(taps: Taps) -> Float[Tensor, "1 1 taps taps"]:
    if len(taps) % 2:
        raise ValueError(f"the resampling filter has {len(taps)} taps, their number must be even")
    line = torch.tensor(taps, dtype=torch.float32)
    return torch.outer(line, line)[None, None] / line.sum() ** 2


def _resample(x: Tensor, kernel: Tensor, direction: Direction, padded: bool = False) -> Tensor:
    each = kernel.to(x.dtype).expand(x.shape[1], -1, -1, -1)
    pad = 0 if padded else (kernel.shape[-1] - 1) // 2
    if direction == "down":
        return functional.conv2d(x, each, stride=2, padding=pad, groups=x.shape[1])
    # twice the height and width: each input pixel makes four
    return functional.conv_transpose2d(x, 4 * each, stride=2, padding=pad, groups=x.shape[1])


def _waves(number: Tensor, frequencies: Tensor) -> Tensor:
    phase = torch.outer(number, frequencies)
    return torch.cat([phase.cos(), phase.sin()], dim=1)

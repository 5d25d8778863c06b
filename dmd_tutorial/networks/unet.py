"""A small class-conditional U-Net, to be read in one sitting.

Shapes in comments: b batch, c channels, h height, w width, e embedding.
"""

import itertools
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dmd_tutorial.checks import Condition, PerSample, check_label
from dmd_tutorial.networks.mlp import noise_features


class UNet(nn.Module):
    """A U-Net F(x, c_noise, label) for small images, of a size that can be halved between levels.

    Down: `blocks` blocks at each resolution, of `width` times its multiplier channels, highest
    first. Middle: a block with attention, where every place sees every other. Up: the same again,
    each resolution fed with what was there on the way down. The vector of size `embedding` carries
    noise level and class; width must be a multiple of 8, classes is 0 for none.
    """

    def __init__(
        self, size: int = 8, channels: int = 1, classes: int = 10, width: int = 32,
        multipliers: Sequence[int] = (1, 2), blocks: int = 1, embedding: int = 128,
    ) -> None:  # fmt: skip
        super().__init__()
        if size % 2 ** (len(multipliers) - 1):
            raise ValueError(f"size {size} cannot be halved {len(multipliers) - 1} times")
        self.size, self.channels, self.classes = size, channels, classes
        self.config = {
            "size": size, "channels": channels, "classes": classes, "width": width,
            "multipliers": list(multipliers), "blocks": blocks, "embedding": embedding,
        }  # fmt: skip
        widths = [width * multiplier for multiplier in multipliers]

        self.noise_embedding = nn.Linear(32, embedding)
        self.class_embedding = nn.Embedding(classes, embedding) if classes else None
        self.embed = nn.Sequential(nn.SiLU(), nn.Linear(embedding, embedding), nn.SiLU())

        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for before, after in itertools.pairwise([width, *widths]):
            self.down.append(_level(before, after, blocks, embedding))
        self.middle = Block(widths[-1], widths[-1], embedding)
        self.attention = Attention(widths[-1])
        for before, after in itertools.pairwise([widths[-1], *reversed(widths)]):
            self.up.append(_level(before + after, after, blocks, embedding))
        self.last_norm = nn.GroupNorm(8, widths[0])
        self.last = nn.Conv2d(widths[0], channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)  # so that D starts as c_skip x
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(
        self, x: Float[Tensor, "batch channels size size"], c_noise: PerSample,
        label: Condition | None = None,
    ) -> Float[Tensor, "batch channels size size"]:  # fmt: skip
        """Map scaled noisy images to F; without a label (or `NO_CLASS`) its embedding is zero."""
        if x.shape[1:] != (self.channels, self.size, self.size):
            wanted = f"(batch, {self.channels}, {self.size}, {self.size})"
            raise ValueError(f"x has shape {tuple(x.shape)}, the network wants {wanted}")
        embedding = self.noise_embedding(noise_features(c_noise, 32))  # (b, e)
        check_label(x, label, self.classes)
        if label is not None and self.class_embedding is not None:
            known = (label >= 0)[:, None].to(embedding)
            embedding = embedding + known * self.class_embedding(label.clamp(0, self.classes - 1))
        embedding = self.embed(embedding)

        h = self.first(x)  # (b, c, h, w)
        skips: list[Tensor] = []
        for level in self.down:
            if skips:
                h = functional.avg_pool2d(h, 2)
            for block in level:  # type: ignore[attr-defined]
                h = block(h, embedding)
            skips.append(h)
        h = self.attention(self.middle(h, embedding))
        for level in self.up:
            skip = skips.pop()
            if h.shape[-1] != skip.shape[-1]:
                h = functional.interpolate(h, scale_factor=2, mode="nearest")
            h = torch.cat([h, skip], dim=1)
            for block in level:  # type: ignore[attr-defined]
                h = block(h, embedding)
        return self.last(functional.silu(self.last_norm(h)))

    def feature_layers(self) -> list[tuple[nn.Module, int]]:
        blocks = [(m, m.conv2.out_channels) for m in self.down.modules() if isinstance(m, Block)]
        return [*blocks, (self.attention, self.attention.out.out_channels)]


class Recomputable(nn.Module):
    """A block that may compute its inside again in the backward pass, instead of keeping it."""

    recompute = False
    _map: Callable[[Tensor, Tensor], Tensor]

    def forward(
        self, x: Float[Tensor, "b before h w"], embedding: Float[Tensor, "b e"]
    ) -> Float[Tensor, "b after new_h new_w"]:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._map, x, embedding, use_reentrant=False)
        return self._map(x, embedding)


class Block(Recomputable):
    """Two convolutions with a short cut; the embedding scales and shifts what is between them."""

    def __init__(self, before: int, after: int, embedding: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, before)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.scale_shift = nn.Linear(embedding, 2 * after)
        self.norm2 = nn.GroupNorm(8, after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.short_cut = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def _map(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(functional.silu(self.norm1(x)))
        scale, shift = self.scale_shift(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv2(functional.silu(self.norm2(h) * (1 + scale) + shift))
        return self.short_cut(x) + h


class Attention(nn.Module):
    """Self-attention over all places of a feature map, with four heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.query_key_value = nn.Conv2d(width, 3 * width, 1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.query_key_value(self.norm(x)).reshape(b, 3, 4, c // 4, h * w)
        query, key, value = qkv.mT.unbind(dim=1)  # (b, heads, h w, c / heads) each
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return x + self.out(mixed.mT.reshape(b, c, h, w))


def _level(before: int, after: int, blocks: int, embedding: int) -> nn.ModuleList:
    widths = [before, *[after] * blocks]
    return nn.ModuleList(Block(a, b, embedding) for a, b in itertools.pairwise(widths))

"""Captioned shapes: 32 x 32 pictures drawn by formula, and what can be read off them again.

One object, or two side by side: kind, colour, size. Place, turn, ground and exact tint vary within
a caption. The supply is endless, so nothing can be memorised; and since what a picture shows can be
read off it, "does it follow its prompt?" is a number.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Generator, Tensor, nn
from torch.nn import functional

from dmd_tutorial.noise import source

READER_FILE = Path(__file__).parent.parent / "weights" / "shapes-reader.safetensors"
SIZE = 32  # pixels
KINDS, COLOURS, SIZES = (
    ("circle", "square", "triangle", "star"), ("red", "green", "blue", "yellow"),
    ("small", "large"),
)  # fmt: skip
RELATIONS = {"above": (1, 0), "below": (1, 1), "left of": (2, 0), "right of": (2, 1)}
WORDS = ("a", *SIZES, *COLOURS, *KINDS, "above", "below", "left", "right", "of")

# tips, inner over outer radius, outer radius over the size's; a circle has no tips
_OUTLINE = {"circle": (1, 1.0, 1.0), "square": (4, math.cos(math.pi / 4), 1.25),
            "triangle": (3, math.cos(math.pi / 3), 1.35), "star": (5, 0.42, 1.4)}  # fmt: skip
_TINT = ((0.9, -0.7, -0.6), (-0.7, 0.6, -0.5), (-0.6, -0.4, 0.9), (0.9, 0.8, -0.7))
_RADIUS = ((4.4, 4.9), (6.2, 6.8))


class Scene(NamedTuple):
    """What a picture shows: its first object is the upper or the left one, or the only one."""

    arrangement: Int[Tensor, " count"]  # 0: one object; 1: first above second; 2: first left of it
    kind: Int[Tensor, "count 2"]
    colour: Int[Tensor, "count 2"]
    size: Int[Tensor, "count 2"]

    def agrees(self, other: "Scene") -> dict[str, Tensor]:
        """Attribute by attribute, and in `all`, whether two scenes show the same, (count,) each."""
        absent = torch.stack([torch.zeros_like(self.arrangement), self.arrangement == 0], 1).bool()
        same = {
            name: ((getattr(self, name) == getattr(other, name)) | absent).all(1)
            for name in ("kind", "colour", "size")
        }
        same["arrangement"] = self.arrangement == other.arrangement
        return same | {"all": torch.stack(list(same.values())).all(0)}


class Captioned(NamedTuple):
    """Pictures with what they show and a sentence that says it."""

    x: Float[Tensor, "count 3 32 32"]  # in [-1, 1]
    scene: Scene
    captions: list[str]


def shapes(count: int, rng: Generator | None = None, two: float = 0.3) -> Captioned:
    """Draw pictures of scenes at random, a fraction `two` of them with two objects."""
    scene = random_scenes(count, rng, two)
    return Captioned(draw(scene, rng), scene, captions_of(scene, rng))


def random_scenes(count: int, rng: Generator | None = None, two: float = 0.3) -> Scene:
    """Attributes drawn uniformly and independently."""
    several = torch.rand(count, **source(rng)) < two
    arrangement = torch.where(several, torch.randint(1, 3, (count,), **source(rng)), 0)
    kind, colour, size = (
        torch.randint(len(names), (count, 2), **source(rng)) for names in (KINDS, COLOURS, SIZES)
    )
    return Scene(arrangement, kind, colour, size)


def captions_of(scene: Scene, rng: Generator | None = None) -> list[str]:
    """A caption of each scene; of two objects either is named first."""
    turned = torch.randint(2, (len(scene.kind),), **source(rng)).tolist()
    names = {value: word for word, value in RELATIONS.items()}
    captions = []
    for row, how in enumerate(scene.arrangement.tolist()):
        objects = [
            f"a {SIZES[size]} {COLOURS[colour]} {KINDS[kind]}"
            for kind, colour, size in zip(*(part[row] for part in scene[1:]), strict=True)
        ]
        first, second = objects[::-1] if turned[row] else objects
        captions.append(f"{first} {names[how, turned[row]]} {second}" if how else objects[0])
    return captions


def scene_of(captions: Sequence[str]) -> Scene:
    """What captions ask for; a word or an order of words that none of them has is refused."""
    rows = [_parsed(caption) for caption in captions]
    arrangement = torch.tensor([how for how, _ in rows])
    objects = torch.tensor([both for _, both in rows]).view(-1, 2, 3)
    return Scene(arrangement, *objects.unbind(2))


def _parsed(caption: str) -> tuple[int, list[list[int]]]:
    words = caption.lower().split()
    if unknown := [word for word in words if word not in WORDS]:
        raise ValueError(f"no caption has the word {unknown[0]!r}; they know {', '.join(WORDS)}")
    first, relation, second = words[:4], " ".join(words[4:-4]), words[-4:]
    try:
        objects = [
            [KINDS.index(kind), COLOURS.index(colour), SIZES.index(size)]
            for _, size, colour, kind in (first, second)
        ]
        how, turned = RELATIONS[relation] if len(words) > 4 else (0, 0)
    except (ValueError, KeyError):
        example = "a small red star above a large blue circle"
        raise ValueError(f"{caption!r} is no caption: they read like {example!r}") from None
    return how, objects[::-1] if turned else objects


def draw(scene: Scene, rng: Generator | None = None) -> Float[Tensor, "count 3 32 32"]:
    """Draw each scene, place, turn, ground and tint at random; edges are antialiased."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, **source(rng))

    count = len(scene.kind)
    axis = (torch.arange(2 * SIZE) + 0.5) / 2  # at twice the size, averaged at the end
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij")[::-1])  # x, y in pixels
    bounds = torch.tensor(_RADIUS)[scene.size]
    radius = bounds[..., 0] + (bounds[..., 1] - bounds[..., 0]) * uniform(0, 1, 2)
    tips, inner, stretch = torch.tensor([_OUTLINE[k] for k in KINDS])[scene.kind].unbind(-1)
    outer = radius * stretch
    free = (SIZE / 2 - 1 - outer)[..., None]  # how far from the middle all of it is inside
    place = uniform(-1, 1, 2, 2) * free
    for how in (1, 2):  # x is the first coordinate
        apart = uniform(-0.5, 0.5, 2) + torch.tensor([-8.0, 8.0])
        along = place[..., 2 - how]
        place[..., 2 - how] = torch.where((scene.arrangement == how)[:, None], apart, along)
    turn = uniform(-0.35, 0.35, 2)
    tint = torch.tensor(_TINT)[scene.colour] + uniform(-0.1, 0.1, 2, 3)
    slope = uniform(-0.3, 0.3, 2) / SIZE
    centred = grid - SIZE / 2
    shade = uniform(-0.3, 0.4, 1, 1) + torch.einsum("na,ahw->nhw", slope, centred)
    x = shade[:, None].expand(-1, 3, -1, -1)
    for k in range(2):
        there = centred - place[:, k, :, None, None]
        distance = _distance(there, tips[:, k], inner[:, k], outer[:, k], turn[:, k])
        cover = torch.sigmoid(-4 * distance)  # an edge a quarter of a pixel wide
        if k:
            cover = cover * (scene.arrangement > 0)[:, None, None]
        x = x + cover[:, None] * (tint[:, k, :, None, None] - x)
    return functional.avg_pool2d(x, 2).clamp(-1, 1)


def _distance(
    p: Float[Tensor, "count 2 h w"], tips: Tensor, inner: Tensor, outer: Tensor, turn: Tensor
) -> Float[Tensor, "count h w"]:
    """Signed distance to the lines of a star's outline, below 0 inside (exact near its edges).

    Folded by its symmetry a star is one line, from a tip to the next inner corner; a regular
    polygon is a star whose inner corners lie on its sides.
    """
    tips, inner, outer, turn = (v[:, None, None] for v in (tips, inner * outer, outer, turn))
    length, half = p.norm(dim=1), math.pi / tips
    angle = torch.atan2(p[:, 0], -p[:, 1]) - turn  # 0 is up
    folded = (torch.remainder(angle + half, 2 * half) - half).abs()
    along, across = length * folded.cos(), length * folded.sin()
    corner = inner * half.cos(), inner * half.sin()
    edge = corner[0] - outer, corner[1]
    norm = (edge[0] ** 2 + edge[1] ** 2).sqrt()
    star = ((along - outer) * edge[1] - across * edge[0]) / norm.clamp_min(1e-6)
    return torch.where(tips == 1, length - outer, star)


class Reader(nn.Module):
    """Reads a scene off a picture: the measure of whether a prompt was followed.

    Its last layer but one are the features in which sets of pictures are compared.
    """

    feature_width = 128

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, size, stride in (
            (3, 24, 5, 2),
            (24, 48, 3, 1),
            (48, 64, 3, 2),
            (64, 64, 3, 2),
        ):
            layers += [nn.Conv2d(before, after, size, stride, padding=size // 2), nn.GELU()]
        layers += [nn.Flatten(), nn.Linear(1024, self.feature_width), nn.GELU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(self.feature_width, 3 + 2 * (len(KINDS) + len(COLOURS) + len(SIZES)))

    def forward(self, x: Float[Tensor, "count 3 32 32"]) -> list[Float[Tensor, "count objects n"]]:
        """Logits of arrangement, kinds, colours and sizes, in the order of `Scene`."""
        parts = self.head(self.features(x)).split([3, 2 * 4, 2 * 4, 2 * 2], dim=1)
        return [part.view(len(x), -1, n) for part, n in zip(parts, (3, 4, 4, 2), strict=True)]

    def loss(self, x: Tensor, scene: Scene) -> Float[Tensor, ""]:
        """Cross-entropy of all that is there to be read."""
        logits = self(x)
        there = torch.stack([torch.ones_like(scene.arrangement), scene.arrangement.clamp_max(1)], 1)
        total = functional.cross_entropy(logits[0][:, 0], scene.arrangement)
        for answer, wanted in zip(logits[1:], scene[1:], strict=True):
            each = functional.cross_entropy(answer.transpose(1, 2), wanted, reduction="none")
            total = total + (each * there).sum() / there.sum()
        return total

    @torch.no_grad()
    def read(self, x: Tensor, batch: int = 500) -> Scene:
        """The scene that each picture most likely shows."""
        parts = [[logits.argmax(-1) for logits in self(some)] for some in x.split(batch)]
        arrangement, *objects = (torch.cat(each) for each in zip(*parts, strict=True))
        return Scene(arrangement[:, 0], *objects)


def captions_of_one() -> list[str]:
    """All 32 captions of a single object."""
    return [f"a {s} {c} {k}" for s in SIZES for c in COLOURS for k in KINDS]


def load_reader() -> Reader:
    """The reader that comes with the package: in evaluation mode, frozen."""
    reader = Reader()
    reader.load_state_dict(load_file(READER_FILE))
    return reader.requires_grad_(False).eval()


def followed(x: Tensor, asked: Scene, reader: Reader | None = None) -> dict[str, float]:
    """Shares of pictures that show what was asked for, attribute by attribute, by the reader."""
    agrees = asked.agrees((reader or load_reader()).read(x.clamp(-1, 1)))
    return {name: right.double().mean().item() for name, right in agrees.items()}

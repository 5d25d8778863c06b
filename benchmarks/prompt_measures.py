"""What pictures of captioned shapes are measured by: prompts, distances, variety, colour."""

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from dmd_tutorial import metrics
from dmd_tutorial.data.captioned import Scene, draw, followed, scene_of
from dmd_tutorial.features import to_8_bit


class Drawn(NamedTuple):
    """Pictures or latents with the prompts that they were made under."""

    x: Float[Tensor, "count channels h w"]
    label: Int[Tensor, " count"]


def drawn(captions: Sequence[str], label: Tensor, rng: Generator) -> Drawn:
    """Pictures of prompts that no model made."""
    asked, parts = scene_of(captions), []
    for some in label.split(500):
        parts.append(draw(Scene(*(part[some] for part in asked)), rng))
    return Drawn(torch.cat(parts), label)


class Gauge:
    """What pictures of prompts are measured by; all of them are rounded to 8 bits first."""

    def __init__(self, reader: Any, captions: Sequence[str], drawn: Drawn, teachers: Drawn) -> None:
        self.reader, self.asked = reader.requires_grad_(False).eval(), scene_of(captions)
        self.references = {
            "to_drawn": self.features(self.rounded(drawn.x)),
            "to_teacher": self.features(self.rounded(teachers.x)),
        }
        self.variety = self.within(self.references["to_drawn"], drawn.label)
        self.saturation = self.chroma(self.rounded(drawn.x))

    @staticmethod
    def rounded(x: Tensor) -> Tensor:
        return to_8_bit(x).float() / 127.5 - 1

    @torch.no_grad()
    def features(self, x: Tensor) -> Float[Tensor, "count width"]:
        return torch.cat([self.reader.features(some) for some in x.split(500)])

    @staticmethod
    def within(features: Tensor, label: Tensor) -> float:
        """Mean distance of two pictures of one prompt."""
        each = [torch.pdist(features[label == k]).mean() for k in label.unique()]
        return torch.stack(each).mean().item()

    @staticmethod
    def chroma(x: Tensor) -> float:
        """Mean of largest minus least colour, 0 for grey, over what is coloured: the objects."""
        spread = x.amax(1) - x.amin(1)
        coloured = spread > 0.5
        return ((spread * coloured).sum() / coloured.sum().clamp_min(1)).item()

    def measure(self, pictures: Drawn) -> dict:
        x, label = self.rounded(pictures.x), pictures.label
        asked = Scene(*(part[label] for part in self.asked))
        found = self.features(x)
        row: dict = {"follows": followed(x, asked, self.reader)}
        for name, reference in self.references.items():
            precision, recall = metrics.precision_recall(found, reference)
            distance = metrics.frechet(found, reference)
            row[name] = {"frechet": distance, "precision": precision, "recall": recall}
        row["variety"] = self.within(found, label) / self.variety
        return row | {"saturation": self.chroma(x) / self.saturation}


def summary(rows: list[dict]) -> dict:
    """Of each row the mean of all numbers, and their spread: of trainings, and of the measure.

    A training counts by the mean of its measurements, so its spread holds that of the measure over
    the root of their number. None: there is one only.
    """
    groups: dict[str, list[list[dict]]] = {}
    for row in rows:
        groups.setdefault(row["row"], []).append([flat(each) for each in row["measured"]])
    return {
        name: {key: spread(group, key) for key in group[0][0]} for name, group in groups.items()
    }


def flat(numbers: dict, prefix: str = "") -> dict[str, float]:
    """Nested numbers under one name each."""
    found: dict[str, float] = {}
    for name, value in numbers.items():
        nested = isinstance(value, dict)
        found |= flat(value, f"{prefix}{name} ") if nested else {prefix + name: value}
    return found


def spread(group: list[list[dict]], key: str) -> dict:
    values = [[each[key] for each in training] for training in group]
    means = [statistics.mean(each) for each in values]
    within = [statistics.variance(each) for each in values if len(each) > 1]
    return {
        "mean": statistics.mean(means),
        "of_trainings": statistics.stdev(means) if len(means) > 1 else None,
        "of_measure": statistics.mean(within) ** 0.5 if within else None,
    }

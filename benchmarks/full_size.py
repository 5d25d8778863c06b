"""The paper's Table 2 at full size, on one GPU: teacher, pairs, students, ablations, evaluations.

    python -m benchmarks.full_size --data cifar10 --minutes 8.5     # again and again, until done
    make results                                                    # the same in a loop

Everything is cut into stages, and a stage that is out of time goes on with the next call. What is
finished is written at once: a row of numbers with settings, seeds, commit, device, versions, wall
time and peak memory into ``<out>/cifar10-small.json``, and a small grid of samples beside it.

All students of a seed start from the same regression on the pairs. Then each trains with one thing
changed, at an equal budget of network evaluations: a forward pass counts 1, with its backward pass
3, so a variant with cheaper iterations does more of them. Distances are Frechet distances in the
features of a classifier trained on the same data: they rank models, and are no FID.

--reduced does every stage at a size for a test: its numbers say nothing.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.classifier import accuracy, save_classifier, train_classifier
from dmd_tutorial import metrics, pretrained
from dmd_tutorial.anchor import load_pairs
from dmd_tutorial.data import Images, balanced_labels, normal
from dmd_tutorial.noise import stream
from dmd_tutorial.runs import pipeline
from dmd_tutorial.runs.checkpoints import replace_file
from dmd_tutorial.runs.compute import Compute
from dmd_tutorial.runs.images import load_images, save_grid
from dmd_tutorial.runs.presets import CIFAR10_SMALL, Preset
from dmd_tutorial.runs.provenance import provenance, runs_folder
from dmd_tutorial.training import DistillSettings

VARIANTS = {  # name -> what is changed, and how many seeds
    "full": ({}, 2),
    "without distribution matching": ({"matching": False}, 2),
    "without anchor": ({"lambda_reg": 0.0}, 2),
    "weighting sigma": ({"weighting": "sigma"}, 1),
    "weighting sigma^3": ({"weighting": "sigma3"}, 1),
    "five critic steps": ({"critic_steps": 5}, 1),
}


@dataclass(frozen=True)
class Plan:
    """Sizes of everything; the reduced ones are for a test."""

    preset: Preset = CIFAR10_SMALL
    classifier_steps: int = 4_000
    classifier_width: int = 64
    samples: int = 50_000
    batch: int = 1_000


REDUCED = Plan(
    preset=replace(
        CIFAR10_SMALL,
        network_options={**CIFAR10_SMALL.network_options, "model_channels": 16, "channel_mult": [1],
                 "num_blocks": 1, "attn_resolutions": []},
        teacher=replace(CIFAR10_SMALL.teacher, steps=4, batch=8),
        pairs=1_000,
        pair_steps=1,
        warm_start=replace(CIFAR10_SMALL.warm_start, steps=4, batch=4, batch_pairs=4),
        distill=replace(CIFAR10_SMALL.distill, steps=3, batch=4, batch_pairs=4),
        compute=Compute(),
    ),
    classifier_steps=4, classifier_width=4, samples=200, batch=200,
)  # fmt: skip


def evaluations(settings: DistillSettings) -> int:
    """Network evaluations of one iteration, over all samples: forward 1, with backward 3."""
    generated = settings.batch * settings.matching + settings.batch_pairs * (
        settings.lambda_reg > 0
    )
    if not settings.matching:
        return 3 * settings.batch_pairs
    steps = settings.critic_steps
    critic = settings.batch * (3 * steps + max(0, steps - 1))  # fresh samples from the second on
    return 3 * generated + 2 * settings.batch + critic


def at_equal_budget(settings: DistillSettings, full: DistillSettings) -> DistillSettings:
    """The same settings with as many iterations as the full objective's evaluations pay for."""
    steps = round(full.steps * evaluations(full) / evaluations(settings))
    return replace(settings, steps=max(1, steps))


class Results:
    """The stages, each done at most once, and the file of what they measured."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.plan = options, REDUCED if options.reduced else Plan()
        self.preset = self.plan.preset
        self.work, self.out = Path(options.work), Path(options.out)
        self.work.mkdir(parents=True, exist_ok=True)
        self.deadline = time.monotonic() + 60 * options.minutes
        self.file = self.out / "cifar10-small.json"
        self.report = json.loads(self.file.read_text()) if self.file.exists() else {"rows": []}
        self._images: Images | None = None

    @property
    def images(self) -> Images:
        """The training images, read when they are first needed."""
        if self._images is None:
            self._images = load_images(self.options.data, self.preset.shape[1], 3)
        return self._images

    def stages(self) -> Iterator[tuple[str, Callable[[], bool]]]:
        """Name and work of each stage, in order; work says whether it is done."""
        yield "classifier", self.classifier
        yield "teacher", self.teacher
        yield "pairs", self.pairs
        yield "evaluation of the teacher", self.measure_teacher
        seeds = max(count for _, count in VARIANTS.values())
        for seed in range(seeds):
            yield f"regression, seed {seed}", lambda seed=seed: self.regression(seed)
            for name, (changes, count) in VARIANTS.items():
                if seed < count:
                    yield (
                        f"{name}, seed {seed}",
                        lambda n=name, c=changes, s=seed: self.student(n, c, s),
                    )

    def run(self) -> list[str]:
        """Do stages until the time is up; returns the names of those that are left."""
        names = list(self.stages())
        for number, (name, work) in enumerate(names):
            started = time.monotonic()
            if not work():
                return [name for name, _ in names[number:]]
            print(f"{name}: done ({time.monotonic() - started:.0f} s in this call)", flush=True)
        return []

    # --- the stages ------------------------------------------------------------------------------

    def classifier(self) -> bool:
        """The features: a classifier, and what it makes of the training images."""
        path = self.work / "classifier.safetensors"
        if path.exists():
            return True
        held_out = max(1, len(self.images.x) // 10)
        train, test = self.images.split(held_out)
        started = time.monotonic()
        classifier = train_classifier(
            train, self.plan.classifier_steps, batch=min(512, len(train.x)), noise=0.0,
            augment=True, width=self.plan.classifier_width, deep=True, device=self.options.device,
        )  # fmt: skip
        correct = accuracy(classifier, test)
        save_classifier(path, classifier, held_out=held_out, correct=correct)
        self.note(classifier={"held_out": held_out, "correct": correct,
                              "seconds": round(time.monotonic() - started, 1)})  # fmt: skip
        return True

    def teacher(self) -> bool:
        """The teacher, trained from scratch."""
        network = self.preset.new_teacher().to(self.options.device)
        settings = self.preset.teacher
        return self.done("teacher", lambda **how: pipeline.make_teacher(
            network, self.images, settings, **how
        ))  # fmt: skip

    def pairs(self) -> bool:
        """The anchor's pairs, chunk by chunk."""
        return pipeline.make_pairs_in(
            self.work / "pairs", self.load("teacher"), self.preset.pairs, self.preset.pair_steps,
            batch=self.plan.batch, minutes=self.minutes_left(),
        )  # fmt: skip

    def measure_teacher(self) -> bool:
        """The teacher with 35 evaluations, and half the data against the other half."""
        if self.row("teacher", 0):
            return True
        path = self.work / "teacher-samples.pt"
        parts = list(torch.load(path, weights_only=True)) if path.exists() else []
        teacher, (z, label) = self.load("teacher"), self.noise()
        while len(parts) * self.plan.batch < len(z) and self.minutes_left() > 0:
            piece = slice(len(parts) * self.plan.batch, (len(parts) + 1) * self.plan.batch)
            steps = self.preset.pair_steps
            x = pipeline.draw(teacher, z[piece], label[piece], steps, self.plan.batch)
            parts.append(x.half())
        replace_file(path, lambda file: torch.save(parts, file))
        if len(parts) * self.plan.batch < len(z):
            return False
        x = torch.cat(parts).float()
        order = torch.randperm(len(self.images.x), generator=torch.Generator().manual_seed(0))
        data, half = self.data_features()[order], len(order) // 2
        floor = metrics.frechet(data[:half], data[half:])
        self.finish("teacher", 0, x, asdict(self.preset.teacher), self.preset.pair_steps * 2 - 1,
                    frechet_between_halves_of_the_data=floor)  # fmt: skip
        return True

    def regression(self, seed: int) -> bool:
        """What all students of a seed start from."""
        settings = replace(self.preset.warm_start, seed=seed)
        return self.distilled(f"regression-{seed}", "regression", seed, settings)

    def student(self, name: str, changes: dict, seed: int) -> bool:
        """One student, trained and measured."""
        full = replace(self.preset.distill, seed=seed)
        settings = at_equal_budget(replace(full, **changes), full)
        file = f"{name.replace(' ', '-').replace('^', '')}-{seed}"
        return self.distilled(file, name, seed, settings, start=f"regression-{seed}")

    # --- what they share -------------------------------------------------------------------------

    def distilled(
        self, file: str, name: str, seed: int, settings: DistillSettings, start: str = ""
    ) -> bool:
        def make(**how: Any) -> pipeline.Trained | None:
            teacher = self.load("teacher")
            pairs = load_pairs(self.work / "pairs", teacher)
            first = self.load(start) if start else None
            return pipeline.make_student(teacher, settings, pairs, first, **how)

        if not self.done(file, make):
            return False
        self.measure_student(name, seed, settings, file)
        return True

    def done(self, name: str, make: Callable[..., pipeline.Trained | None]) -> bool:
        """Train until done or out of time; saved either way."""
        path = self.work / name
        if path.with_suffix(".safetensors").exists():
            return True
        control = pipeline.Control(checkpoint_minutes=math.inf, minutes=self.minutes_left())
        made = make(compute=self.preset.compute, checkpoint=path.with_suffix(".ckpt"),
                    control=control)  # fmt: skip
        if made is None:
            return False
        # half the bytes, so that a file of 7 million weights stays below 16 MiB
        pipeline.keep(path, made, {"peak_memory": self.peak()}, half=True)
        return True

    def measure_student(self, name: str, seed: int, settings: DistillSettings, file: str) -> None:
        if self.row(name, seed):
            return
        x = pipeline.draw(self.load(file), *self.noise(), batch=self.plan.batch)
        made_by = pretrained.made_by(self.work / f"{file}.safetensors")
        self.finish(name, seed, x, asdict(settings), 1, seconds=made_by["seconds"],
                    peak_memory=made_by["peak_memory"],
                    evaluations_per_iteration=evaluations(settings))  # fmt: skip

    def finish(
        self,
        name: str,
        seed: int,
        x: torch.Tensor,
        settings: dict,
        per_sample: int,
        **notes: object,
    ) -> None:
        """Measure samples and write the row, whole or not at all."""
        _, label = self.noise()
        path = str(self.work / "classifier.safetensors")
        result = metrics.evaluate(
            x.to(self.options.device), self.data_features(), label=label, features=path, minimum=1
        )
        row = {
            "name": name, "seed": seed, "evaluations_per_sample": per_sample,
            "frechet": result.frechet, "precision": result.precision, "recall": result.recall,
            "samples": len(x), "settings": settings, **notes, **provenance(),
        }  # fmt: skip
        teacher = self.work / "teacher-samples.pt"
        if name != "teacher":
            theirs = torch.cat(torch.load(teacher, weights_only=True)).float()
            ours = metrics.extract_features(x.to(self.options.device), path)
            others = metrics.extract_features(theirs.to(self.options.device), path)
            row["frechet_to_teacher"] = metrics.frechet(ours, others)
        self.report["rows"].append(row)
        self.note()
        grid = self.out / f"cifar10-small-{name.replace(' ', '-').replace('^', '')}-{seed}.png"
        save_grid(x[:40], grid, columns=10, scale=1)

    def note(self, **values: object) -> None:
        """Write the file of results with some more values."""
        self.report |= {
            "what": "Frechet distances in the features of a classifier of the data; no FID",
            "data": str(self.options.data), "note": self.options.note,
            "reduced": self.options.reduced, **values,
        }  # fmt: skip
        text = pretrained.plain_json(self.report, indent=1) + "\n"
        replace_file(self.file, lambda file: file.write(text.encode()))

    def row(self, name: str, seed: int) -> dict | None:
        rows = (r for r in self.report["rows"] if (r["name"], r["seed"]) == (name, seed))
        return next(rows, None)

    def noise(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The same noise and balanced labels for every model."""
        z = normal(self.plan.samples, self.preset.shape, stream("evaluation"))
        return z, balanced_labels(len(z), self.preset.classes)

    def data_features(self) -> torch.Tensor:
        path, parts = str(self.work / "classifier.safetensors"), []
        for index in torch.arange(len(self.images.x)).split(5_000):
            images = self.images.x[index].to(self.options.device)
            parts.append(metrics.extract_features(images, path))
        return torch.cat(parts)

    def load(self, name: str):
        return pretrained.load(self.work / f"{name}.safetensors").to(self.options.device)

    def minutes_left(self) -> float:
        return max(0.0, self.deadline - time.monotonic()) / 60

    def peak(self) -> int | None:
        gpu = torch.device(self.options.device).type == "cuda"
        return torch.cuda.max_memory_allocated() if gpu else None


def main(arguments: list[str] | None = None) -> int:
    """Do what is left and fits into the time; 0 when all is done, 3 when stages are left."""
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="cifar10", help="name, folder or zip (%(default)s)")
    parser.add_argument("--work", default=str(runs_folder() / "results"),
                        help="weights, pairs (%(default)s)")  # fmt: skip
    parser.add_argument("--out", default="book/results", help="numbers, grids (%(default)s)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop then (never)")
    parser.add_argument("--device", default=gpu, help="where networks run (here: %(default)s)")
    parser.add_argument("--note", default="", help="said beside every number, such as "
                        '"JPEG re-encoded"')  # fmt: skip
    parser.add_argument("--reduced", action="store_true", help="tiny, for a test")
    options = parser.parse_args(arguments)
    if options.reduced and Path(options.out).resolve() == Path("book/results").resolve():
        parser.error("--reduced must not write to book/results: give another --out")
    if options.device == "cpu" and not options.reduced:
        parser.error("without a GPU this would take weeks; --reduced tries every stage in a minute")
    torch.set_flush_denormal(True)
    left = Results(options).run()
    if left:
        print(f"{len(left)} stages are left: {', '.join(left[:3])} ... Call again.")
    return 3 if left else 0


if __name__ == "__main__":
    sys.exit(main())

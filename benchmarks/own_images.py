"""The preset for your own images: measured on a few hundred, with rivals of its values.

    python -m benchmarks.own_images --data my_images --held-out others --labelled classes --size 16

Every stage is a command of ``dmd``, done once: a later call goes on, and measures what is there.
The students start from one regression. All samples are compared with images that no training has
seen, in the features of a classifier of the labelled ones, and with the images trained on: what is
much nearer to one of these than to the others is a copy.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.classifier import accuracy, save_classifier, train_classifier
from benchmarks.plan import at_equal_budget
from dmd_tutorial import metrics, pretrained, training
from dmd_tutorial.anchor import Pairs
from dmd_tutorial.data import Images
from dmd_tutorial.files import write_json
from dmd_tutorial.runs import cli, pipeline
from dmd_tutorial.runs.images import load_images, save_grid
from dmd_tutorial.runs.presets import OWN_IMAGES
from dmd_tutorial.runs.provenance import provenance, runs_folder

LONG = "three times as long"
RIVALS = {  # of one cost, but for the long one: name -> what is changed
    LONG: {"steps": 3 * OWN_IMAGES.distill.steps}, "grid up to 5": {"grid_max": 5.0},
    "five times the rate": {"learning_rate": 1e-4}, "five critic steps": {"critic_steps": 5},
}  # fmt: skip


def copies(x: Tensor, images: Tensor) -> tuple[float, float]:
    """Median distance to the nearest image (root mean square), and the share of copies.

    A copy is less than a third as far from its nearest image, mirrored or not, as from the next
    (Yoon et al. 2023).
    """
    apart = [torch.cdist(x.flatten(1), some.flatten(1)) for some in (images, images.flip(-1))]
    nearest, second = torch.stack(apart).amin(0).topk(2, largest=False).values.unbind(1)
    share = (nearest < second / 3).double().mean().item()
    return nearest.median().item() / x[0].numel() ** 0.5, share


def step_seconds(size: int, count: int = 3) -> dict[str, float]:
    """The processor's seconds of a step of each stage, and of a pair, at a size in pixels."""
    preset = replace(OWN_IMAGES, shape=(3, size, size))
    x = torch.rand(64, *preset.shape)
    teacher = preset.new_teacher()
    fit = training.FitRun(preset.new_teacher(), preset.teacher)
    loops: dict = {"teacher": training.train_teacher(fit, Images(x, torch.zeros(64).long(), 0))}
    for name, settings in (("regression", preset.warm_start), ("distillation", preset.distill)):
        run = training.DistillationRun(teacher, settings)
        loops[name] = training.distill(run, preset.shape, 0, Pairs(x, x))
    seconds = {}
    for name, loop in loops.items():
        next(loop)
        started = time.process_time()
        for _ in range(count):
            next(loop)
        seconds[name] = (time.process_time() - started) / count
    started = time.process_time()
    pipeline.draw(teacher, torch.randn_like(x), None, preset.pair_steps, len(x))
    return seconds | {"pair": (time.process_time() - started) / len(x)}


class Road:
    """The stages and what they made, in a folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.run = options, Path(options.run)
        self.run.mkdir(parents=True, exist_ok=True)
        self.ledger = self.run / "seconds.json"
        self.spent = json.loads(self.ledger.read_text()) if self.ledger.exists() else {}
        self.classifier = str(self.run / "classifier.safetensors")

    def do(self, result: str, *command: object) -> Path:
        """Run a command of ``dmd``, if that has not been done; note the processor's seconds."""
        if result not in self.spent:
            started = time.process_time()
            if cli.main([str(word) for word in command]):
                raise SystemExit(1)
            self.spent[result] = round(time.process_time() - started)
            self.ledger.write_text(json.dumps(self.spent))
        return self.run / result

    def networks(self) -> Iterator[tuple[str, Path]]:
        """Name and file of the teacher, the regression and the students."""
        options, run = self.options, self.run
        teacher = self.do("teacher.safetensors", "train-teacher", "--data", options.data,
                          "--size", options.size, "--out", run)  # fmt: skip
        yield "teacher", teacher
        pairs = self.do("pairs", "make-pairs", "--teacher", teacher, "--pairs", run / "pairs")
        distill = ["distill", "--teacher", teacher, "--pairs", pairs]
        # with one step, which is thrown away: all students start from this regression
        warm = self.do("warm-start.safetensors", *distill, "--out", run, "--steps", 1)
        yield "regression", warm
        distill += ["--start", warm]
        yield "student", self.do("student.safetensors", *distill, "--out", run, "--fresh")
        for name, changes in RIVALS.items():
            settings = replace(OWN_IMAGES.distill, **changes)
            if name != LONG:
                settings = at_equal_budget(settings, OWN_IMAGES.distill)
            words: list[object] = []
            for field in fields(settings):
                value = getattr(settings, field.name)
                if value != getattr(OWN_IMAGES.distill, field.name):
                    words += [f"--{field.name.replace('_', '-')}", value]
            folder = name.replace(" ", "-")
            student = f"{folder}/student.safetensors"
            yield name, self.do(student, *distill, "--out", run / folder, *words)

    def read_by(self) -> float:
        """Train the classifier in whose features images are compared; the share it reads right."""
        if not Path(self.classifier).exists():
            train, test = load_images(self.options.labelled, self.options.size, 3).split(2_000)
            network = train_classifier(train, 500, noise=0.0, augment=True, deep=True)
            save_classifier(self.classifier, network, correct=accuracy(network, test))
        with safe_open(self.classifier, "pt") as file:
            return float(file.metadata()["correct"])

    def measure(self) -> None:
        """Make and measure everything; the report is written after each network."""
        options, out = self.options, Path(self.options.out)
        seen, held_out = (
            load_images(folder, options.size, 3).take(slice(None))  # type: ignore[arg-type]
            for folder in (options.data, options.held_out)
        )
        nearest, copied = copies(held_out, seen)
        correct, real = self.read_by(), self.features(held_out)
        report: dict = {
            "what": "Frechet distances in the features of a classifier, to images held out; no FID",
            "note": options.note, "size": options.size, "settings": asdict(OWN_IMAGES),
            "classifier_correct": correct, **provenance(),
            "images": {"count": len(seen), **compared(self.features(seen), real)},
            "held_out": {"count": len(held_out), "nearest": nearest, "copies": copied},
            "rows": [],
        }  # fmt: skip
        for name, file in self.networks():
            x = self.drawn(file)
            found = self.features(x)
            if name == "teacher":
                teachers = found
            row = {"name": name, **compared(found, real)}
            row["frechet_to_teacher"] = metrics.frechet(found, teachers)
            row["nearest"], row["copies"] = copies(x, seen)
            if name != "teacher":  # one step is cheap: the spread over other noise
                more = (self.features(self.drawn(file, seed)) for seed in range(1, 4))
                row["other_noise"] = [metrics.frechet(some, real) for some in more]
            row["settings"] = pretrained.made_by(file)["settings"]
            report["rows"].append(row)
            self.write(report | {"samples": len(x), "processor_seconds": self.spent})
            if name in ("teacher", "student"):
                save_grid(x[:40], out.with_name(f"{out.stem}-{name}.png"), scale=2)
            print(row, flush=True)
        report |= {"samples": options.count, "processor_seconds": self.spent}
        self.write(report | {"step_seconds": {size: step_seconds(size) for size in (16, 32)}})

    def write(self, report: dict) -> None:
        """Write the report."""
        write_json(self.options.out, report)

    def drawn(self, file: Path, seed: int = 0) -> Tensor:
        """Samples of a network, for each seed the same noise for all."""
        name = f"{file.relative_to(self.run).with_suffix('')}-samples{seed or ''}.safetensors"
        out, count = self.run / name, self.options.count
        self.do(name, "sample", "--model", file, "--count", count, "--seed", seed, "--out", out)
        return load_file(out)["x"]

    def features(self, x: Tensor) -> Tensor:
        """Features of images."""
        return metrics.extract_features(x, self.classifier)


def compared(found: Tensor, real: Tensor) -> dict:
    """Distance, precision and recall of features against those of real images."""
    precision, recall = metrics.precision_recall(found, real)
    return {"frechet": metrics.frechet(found, real), "precision": precision, "recall": recall}


def main(arguments: list[str] | None = None) -> None:
    """Walk the road and measure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="folder of the images to train on")
    parser.add_argument("--held-out", required=True, help="folder of others of the same kind")
    parser.add_argument("--labelled", required=True, help="folders of classes, for the features")
    parser.add_argument("--size", type=int, default=16, help="pixels (%(default)s)")
    parser.add_argument("--count", type=int, default=1_000, help="samples (%(default)s)")
    parser.add_argument("--run", default=str(runs_folder() / "own-images"), help="(%(default)s)")
    parser.add_argument("--out", default="book/results/own-images.json", help="(%(default)s)")
    parser.add_argument("--note", default="", help="what the images are")
    torch.set_flush_denormal(True)
    Road(parser.parse_args(arguments)).measure()


if __name__ == "__main__":
    main()

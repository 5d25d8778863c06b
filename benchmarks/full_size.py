"""The paper's Table 2 at full size, on one GPU: teacher, pairs, students, ablations, evaluations.

    python -m benchmarks.full_size --dry-run                        # what it costs, counted
    python -m benchmarks.full_size --data cifar10 --minutes 8.5     # again and again, until done
    make results                                                    # the same in a loop

The plan is cut into two leases of a large GPU, and into stages; a stage that is out of time goes on
with the next call. What is finished is written at once: a row of numbers with settings, seeds,
commit, device, versions, wall time and peak memory in ``cifar10-small.json``, and a small grid of
samples. ``--work`` holds all that is needed to go on, ``--out`` gets the numbers and the grids.

On a borrowed machine, which forgets all but a few small files, pack the images here, then call
there with `--send`, and put what was sent into the work folder of the next call:

    python -m benchmarks.full_size --data images/train --pack images.tar.xz
    python -m benchmarks.full_size --data images.tar.xz --work carried --out $OUT/book
        --lease 1 --minutes 8.5 --send $OUT/files

All students of a seed start from the same regression on the seed's pairs. Then each trains with one
thing changed, at an equal budget of network evaluations: a forward pass counts 1, with its backward
pass 3, so a variant with cheaper iterations does more of them. Distances are Frechet distances in
the features of a classifier trained on the same data: they rank models, and are no FID.

--reduced does every stage at a size for a test: its numbers say nothing.
"""

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import travel
from benchmarks.classifier import accuracy, save_classifier, train_classifier
from benchmarks.plan import (
    REDUCED,
    STAGES,
    VARIANTS,
    Plan,
    Stage,
    counted,
    evaluations,
    settings_of,
    table,
)
from dmd_tutorial import metrics, pretrained
from dmd_tutorial.anchor import CHUNK, load_pairs
from dmd_tutorial.data import Images, balanced_labels, normal
from dmd_tutorial.features import extract_features, to_8_bit
from dmd_tutorial.files import replace_file, write_json, write_tensors
from dmd_tutorial.noise import stream
from dmd_tutorial.runs import pipeline
from dmd_tutorial.runs.compute import Compute, prepare
from dmd_tutorial.runs.images import load_images, save_grid
from dmd_tutorial.runs.presets import CIFAR10_SMALL_T4
from dmd_tutorial.runs.provenance import provenance, runs_folder


class Results:
    """The stages, each done at most once, and the file of what they measured."""

    def __init__(self, options: argparse.Namespace, plan: Plan) -> None:
        self.options, self.plan, self.preset = options, plan, plan.preset
        self.work, self.out = Path(options.work), Path(options.out)
        self.work.mkdir(parents=True, exist_ok=True)
        self.deadline = time.monotonic() + 60 * options.minutes
        self.file = self.work / "cifar10-small.json"
        self.report: dict[str, Any] = {"rows": [], "stages": {}}
        if self.file.exists():
            self.report = json.loads(self.file.read_text())
        if self.report.get("reduced", options.reduced) != options.reduced:
            raise ValueError(f"{self.file} is of a run at another size: give another --work")
        self.stages = [stage for stage in STAGES if options.lease in (None, stage.lease)]
        self.classifier = str(self.work / "classifier.safetensors")
        self._images: Images | None = None
        self._data_features: Tensor | None = None

    def run(self) -> str:
        """Do stages; returns what has ended this call, nothing if no stage is left."""
        begun = 0
        for stage in self.left():
            if begun and (self.minutes_left() == 0 or begun == self.options.stages):
                return f"stopped before {stage}"
            if full := self.no_room(stage):
                return f"stopped before {stage}: {full}"
            begun, started = begun + 1, time.monotonic()
            done = self.do(stage)
            seconds = time.monotonic() - started
            earlier = self.report["stages"].get(str(stage), {"seconds": 0.0})["seconds"]
            self.report["stages"][str(stage)] = {
                "seconds": round(earlier + seconds, 1), "device": provenance()["device"]
            }  # fmt: skip
            self.note()
            if not done:
                anew = "; on another machine it begins again" if self.options.send else ""
                return f"stopped in {stage}{anew}"
            if self.options.send:
                travel.send(Path(self.options.send), [self.file, *self.files(stage)])
            print(f"{stage}: done ({seconds:.0f} s in this call)", flush=True)
        return ""

    def left(self, stages: Iterable[Stage] = ()) -> list[Stage]:
        """Those of some stages, or of this lease, that are not done."""
        return [stage for stage in stages or self.stages if not self.is_done(stage)]

    def needed(self, left: list[Stage]) -> list[str]:
        """The files of the work folder that stages go on from, beside the images."""
        names = [self.file.name]
        for stage in left:
            if stage.name not in ("classifier", "teacher"):
                names += ["classifier.safetensors", "teacher.safetensors"]
            if stage.student:
                names.append("teacher-statistics.safetensors")
            if stage.name in VARIANTS:
                names.append(f"regression-{stage.seed}.safetensors")
        made = {path.name for stage in left for path in self.files(stage)}
        return [name for name in dict.fromkeys(names) if name not in made]

    def is_done(self, stage: Stage) -> bool:
        """Whether it has its row, or what it makes is there, or is not wanted."""
        if stage.name == "classifier":
            return "classifier" in self.report
        if stage.name == "teacher":
            return self.has_row("teacher", 0) or (self.work / "teacher.safetensors").exists()
        if stage.name == "pairs":
            there = len(list(self.pairs_folder(stage.seed).glob("*.safetensors")))
            return there * CHUNK >= self.preset.pairs or not self.wants_pairs(stage)
        return self.has_row(stage.row, stage.seed)

    def wants_pairs(self, pairs: Stage) -> bool:
        """Whether a stage that learns from pairs is left."""
        return any(
            stage[1:] == pairs[1:] and not self.is_done(stage)
            for stage in self.stages
            if stage.learns_from_pairs
        )

    def do(self, stage: Stage) -> bool:
        """Work on a stage; whether it is done."""
        by_name: dict[str, Callable[[Stage], bool]] = {
            "classifier": self.make_classifier, "teacher": self.make_teacher,
            "pairs": self.make_pairs, "evaluation of the teacher": self.measure_teacher,
        }  # fmt: skip
        return by_name.get(stage.name, self.make_student)(stage)

    # --- the stages ------------------------------------------------------------------------------

    def make_classifier(self, _: Stage) -> bool:
        """The features: a classifier, and what the images themselves get: the floors."""
        held_out = max(1, len(self.images.x) // 10)
        train, test = self.images.split(held_out)
        classifier = train_classifier(
            train, self.plan.classifier_steps, batch=min(self.plan.classifier_batch, len(train.x)),
            noise=0.0, augment=True, width=self.plan.classifier_width, deep=True,
            device=self.options.device,
        )  # fmt: skip
        correct = accuracy(classifier, test)
        save_classifier(self.classifier, classifier, held_out=held_out, correct=correct)
        floor = metrics.evaluation_floor(
            self.data_features(), self.plan.samples, repeats=3, label=self.images.label
        )
        self.report["floor"] = {name: of._asdict() for name, of in floor._asdict().items()}
        # the floor is of images that it has seen; what others get, beside such a floor
        parts = self.images._replace(x=self.data_features()).split(held_out)
        seen, unseen = (part.x for part in parts)
        seen_floor = metrics.frechet_floor(seen, len(unseen), None, parts[0].label, repeats=3).mean
        self.report["unseen"] = {"frechet": metrics.frechet(unseen, seen), "floor": seen_floor,
                                 "samples": len(unseen)}  # fmt: skip
        self.report["classifier"] = {"held_out": held_out, "correct": correct}
        return True

    def make_teacher(self, _: Stage) -> bool:
        """The teacher, trained from scratch."""
        network = self.preset.new_teacher().to(self.options.device)
        settings = self.preset.teacher
        return self.trained("teacher", lambda **how: pipeline.make_teacher(
            network, self.images, settings, compute=self.preset.compute, **how
        ))  # fmt: skip

    def make_pairs(self, stage: Stage) -> bool:
        """The anchor's pairs, chunk by chunk."""
        return pipeline.make_pairs_in(
            self.pairs_folder(stage.seed), self.load("teacher"), self.preset.pairs,
            self.preset.pair_steps, stage.seed, self.plan.batch, self.minutes_left(),
        )  # fmt: skip

    def measure_teacher(self, stage: Stage) -> bool:
        """The teacher's samples, batch by batch, and their statistics."""
        path, batch, steps = self.work / "samples.pt", self.plan.batch, self.preset.pair_steps
        parts = list(torch.load(path, weights_only=True)) if path.exists() else []
        # Noise of its own: samples of the same noise would lie nearer to some students than others.
        teacher, (z, label) = self.load("teacher"), self.noise(2_000)
        for piece in torch.arange(len(z)).split(batch)[len(parts) :]:
            parts.append(to_8_bit(pipeline.draw(teacher, z[piece], label[piece], steps, batch)))
            if self.minutes_left() == 0:
                break
        replace_file(path, lambda file: torch.save(parts, file))
        x = torch.cat(parts)
        if len(x) < len(z):
            return False
        features = extract_features(x.to(self.options.device), self.classifier).double()
        tensors = {"mean": features.mean(0), "cov": features.T.cov()}
        write_tensors(self.work / "teacher-statistics.safetensors", tensors)
        made_by = pretrained.made_by(self.work / "teacher.safetensors")
        self.finish(stage, [x], evaluations_per_sample=2 * steps - 1, pairs_seed=None,
                    evaluation_seeds=[2_000], settings=asdict(self.preset.teacher),
                    seconds=made_by["seconds"], peak_memory=made_by["peak_memory"])  # fmt: skip
        path.unlink()
        return True

    def make_student(self, stage: Stage) -> bool:
        """One student, trained and measured, on two sets of noise: how far the measure spreads."""
        settings, seed = settings_of(stage, self.preset), stage.seed
        compute = self.preset.compute
        if stage.name == "DMD2":  # which reads inside of the critic
            compute = replace(compute, compile=False)

        def make(**how: Any) -> pipeline.Trained | None:
            teacher, start, images, pairs = self.load("teacher"), None, None, None
            if stage.name != "regression":
                start = self.load(f"regression-{seed}")
            if stage.name == "DMD2":
                images = self.images
            if stage.learns_from_pairs:
                pairs = load_pairs(self.pairs_folder(seed), teacher)
            return pipeline.make_student(
                teacher, settings, pairs, start, compute, images=images, **how
            )

        if not self.trained(stage.file, make):
            return False
        student, seeds = self.load(stage.file), [seed, 1_000 + seed]
        samples = [pipeline.draw(student, *self.noise(s), batch=self.plan.batch) for s in seeds]
        made_by = pretrained.made_by(self.work / f"{stage.file}.safetensors")
        self.finish(stage, samples, compute, evaluations_per_sample=1, pairs_seed=seed,
                    evaluation_seeds=seeds, settings=asdict(settings),
                    seconds=made_by["seconds"], peak_memory=made_by["peak_memory"],
                    evaluations_per_iteration=evaluations(settings))  # fmt: skip
        return True

    # --- what they share -------------------------------------------------------------------------

    def trained(self, name: str, make: Callable[..., pipeline.Trained | None]) -> bool:
        """Train until done or out of time; saved either way."""
        path = self.work / name
        if path.with_suffix(".safetensors").exists():
            return True
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
        control = pipeline.Control(checkpoint_minutes=math.inf, minutes=self.minutes_left())
        made = make(checkpoint=path.with_suffix(".ckpt"), control=control)
        if made is None:
            return False
        peak = torch.cuda.max_memory_allocated() if self.gpu else None
        pipeline.keep(path, made, {"peak_memory": peak}, half=True)  # so that the file travels
        return True

    def finish(
        self, stage: Stage, samples: list[Tensor], compute: Compute | None = None, **notes: Any
    ) -> None:
        """Measure sets of samples and add the row."""
        compute, device = compute or self.preset.compute, self.options.device
        sets = [extract_features(x.to(device), self.classifier) for x in samples]
        frechet = [metrics.frechet(ours, self.data_features()) for ours in sets]
        near = [metrics.precision_recall(ours, self.data_features()) for ours in sets]
        row = {
            **stage._asdict(), "name": stage.row,
            "measure": "Frechet distance in the features of a classifier",
            "frechet": mean(frechet), "frechet_by_noise": frechet,
            "precision": mean(one for one, _ in near), "recall": mean(one for _, one in near),
            "floor": {name: of["mean"] for name, of in self.report["floor"].items()},
            "samples": len(samples[0]), "note": self.options.note,
            "computed_in": compute.mixed_precision, "drawn_in": compute.frozen,
            "compiled": compute.compile, "weights_stored": "float16", **notes, **provenance(),
        }  # fmt: skip
        if stage.row != "teacher":
            row["frechet_to_teacher"] = mean(self.to_teacher(ours.double()) for ours in sets)
        self.report["rows"].append(row)
        some = samples[0][:40]
        save_grid(some.float() / 127.5 - 1 if some.dtype == torch.uint8 else some,
                  self.grid(stage), columns=10, scale=1)  # fmt: skip

    def to_teacher(self, features: Tensor) -> float:
        theirs = load_file(self.work / "teacher-statistics.safetensors")
        ours = features.mean(0), features.T.cov()
        return metrics.frechet_distance(*ours, theirs["mean"], theirs["cov"])

    def note(self) -> None:
        """Write the file of results, for the next call and for people."""
        self.report |= {
            "what": "Frechet distances in the features of a classifier of the data; no FID",
            "data": Path(self.options.data).name, "note": self.options.note,
            "reduced": self.options.reduced,
        }  # fmt: skip
        write_json(self.file, self.report)
        self.out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.file, self.out / self.file.name)

    def files(self, stage: Stage) -> list[Path]:
        """What a later stage, or a reader, needs of a stage, beside the numbers."""
        if stage.name == "classifier":
            return [Path(self.classifier)]
        if stage.name == "teacher":
            return [self.work / "teacher.safetensors", self.work / "teacher.png"]
        if stage.name == "pairs":  # made again, from teacher and seed
            return []
        made = "teacher-statistics" if stage.row == "teacher" else stage.file
        return [self.work / f"{made}.safetensors", self.grid(stage)]

    def no_room(self, stage: Stage) -> str:
        """Why the files of a stage could not be sent; nothing if they can or need not."""
        if not self.options.send:
            return ""
        weights = travel.MIB + 2 * sum(p.numel() for p in self.preset.new_teacher().parameters())
        sizes = {".safetensors": weights, ".png": travel.MIB, ".json": travel.MIB}
        coming = {path.name: sizes[path.suffix] for path in [self.file, *self.files(stage)]}
        return travel.no_room(Path(self.options.send), coming)

    def grid(self, stage: Stage) -> Path:
        return self.out / f"cifar10-small-{stage.file}.png"

    def pairs_folder(self, seed: int) -> Path:
        return self.work / f"pairs-{seed}"

    def has_row(self, name: str, seed: int) -> bool:
        return any((row["name"], row["seed"]) == (name, seed) for row in self.report["rows"])

    def noise(self, seed: int) -> tuple[Tensor, Tensor]:
        """Noise of a seed, and balanced labels."""
        z = normal(self.plan.samples, self.preset.shape, stream("evaluation", seed))
        return z, balanced_labels(len(z), self.preset.classes)

    @property
    def images(self) -> Images:
        """The training images, read when they are first needed."""
        if self._images is None:
            data, size = self.options.data, self.preset.shape[1]
            packed = data.endswith(".tar.xz")
            self._images = (travel.unpack(Path(data), size, self.work) if packed
                            else load_images(data, size, 3))  # fmt: skip
        return self._images

    def data_features(self) -> Tensor:
        """The features of the training images."""
        if self._data_features is None:
            x = self.images.x.to(self.options.device)
            self._data_features = extract_features(x, self.classifier)
        return self._data_features

    def load(self, name: str) -> Any:
        """A network as stored, in 16 bits, that draws in the precision of frozen ones."""
        model = pretrained.load(self.work / f"{name}.safetensors").to(self.options.device)
        return prepare(model, Compute(mixed_precision=self.preset.compute.frozen))

    def minutes_left(self) -> float:
        return max(0.0, self.deadline - time.monotonic()) / 60

    @property
    def gpu(self) -> bool:
        return torch.device(self.options.device).type == "cuda"


def main(arguments: list[str] | None = None) -> int:
    """Do what is left and fits; 0 when all is done, 3 when stages are left."""
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", default="cifar10", help="name, folder, zip or packed file (%(default)s)")
    add("--work", help=f"to go on from ({runs_folder() / 'results'})")
    add("--out", default="book/results", help="numbers, grids (%(default)s)")
    add("--minutes", type=float, default=math.inf, help="stop then (never)")
    add("--stages", type=int, help="stop after so many")
    add("--lease", type=int, choices=(1, 2), help="only the stages of this one")
    add("--send", help="folder that travels: at most 8 files, 64 MiB")
    add("--device", default=gpu, help="where networks run (here: %(default)s)")
    add("--note", default="", help='said beside every number, such as "JPEG re-encoded"')
    add("--reduced", action="store_true", help="tiny, for a test")
    add("--pack", help="write the images of --data into this .tar.xz, and stop")
    add("--dry-run", action="store_true", help="say what each stage costs, and stop")
    add("--record", action="store_true", help="write that for the book, too")
    options = parser.parse_args(arguments)
    torch.set_flush_denormal(True)
    torch.backends.cudnn.benchmark = True  # a GPU tries convolutions: shapes stay as they are
    if options.dry_run:
        costs, file = counted(Plan()), Path(options.out) / "cifar10-small.json"
        report = json.loads(file.read_text()) if file.exists() else {}
        print(table(costs, report.get("stages", {})))
        if options.record:
            write_json(Path(options.out) / "cifar10-plan.json", costs)
        return 0
    if options.pack:
        try:
            travel.pack(options.data, options.pack)
        except ValueError as error:
            parser.error(str(error))
        return 0
    options.work = options.work or runs_folder() / ("reduced" if options.reduced else "results")
    if options.reduced and Path(options.out).resolve() == Path("book/results").resolve():
        parser.error("--reduced must not write to book/results: give another --out")
    if options.device == "cpu" and not options.reduced:
        parser.error("without a GPU this would take weeks; --reduced tries every stage in a minute")
    plan = REDUCED if options.reduced else Plan()
    if options.device != "cpu" and not torch.cuda.is_bf16_supported(including_emulation=False):
        preset = replace(plan.preset, compute=CIFAR10_SMALL_T4.compute)
        plan = replace(plan, preset=preset)
    try:
        results = Results(options, plan)
    except ValueError as error:
        parser.error(str(error))
    needed = results.needed(results.left())
    if results.left()[:1] == [STAGES[0]]:  # it begins anew
        needed.remove(results.file.name)
    lost = [name for name in needed if not (results.work / name).exists()]
    if lost:
        parser.error(f"{results.work} lacks {', '.join(lost)}: do the lease before, or bring them")
    said = results.run()
    left, of_plan = results.left(), results.left(STAGES)
    if left:
        print(f"{said[0].upper()}{said[1:]}. Call again: {len(left)} stages are left.")
    else:
        print(f"Done: {results.out / results.file.name}")
    if of_plan:
        print(f"{len(of_plan)} stages of the plan are left; in {results.work} they go on from "
              + ", ".join(results.needed(of_plan)))  # fmt: skip
    return 3 if left else 0


if __name__ == "__main__":
    sys.exit(main())

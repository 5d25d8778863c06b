"""The paper's Table 2 on digits: what each part of the objective is worth, and at what cost.

    python -m benchmarks.ablations --out book/results/digits-ablations.json

Three worlds. "chapter": the live run of chapter 6; "few pairs": the same with 300 pairs; "recipe":
the regression of the shipped student. In each world every training has pairs of its own and is
measured on noise of its own. The variants of one training share its pairs and its regression, from
which they start. Where the objective changes, iterations stay the same; regression that goes on is
there twice, at equal iterations and at equal cost, at its own learning rate.

Cost is counted in network forwards, a backward pass as two. Rows that are in the file are not made
again, so the program can be stopped and continued; several may run at once with other worlds or
seeds and files, which `--join` makes one of. About 15 minutes of one core for a training of
"chapter", an hour and a half for one of "recipe".
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.plan import at_equal_budget, evaluations
from dmd_tutorial import metrics, pretrained
from dmd_tutorial.anchor import Pairs, fingerprint, l2, load_pairs
from dmd_tutorial.data import digits
from dmd_tutorial.files import write_json
from dmd_tutorial.runs import pipeline
from dmd_tutorial.runs.presets import DIGITS, ON_DIGITS
from dmd_tutorial.runs.provenance import provenance
from dmd_tutorial.samplers import one_step
from dmd_tutorial.training import DistillationRun, DistillSettings, distill

SHAPE, CLASSES = (1, 8, 8), 10
TABLE_2: dict[str, dict] = {  # what is changed, at equal iterations
    "full": {},
    "without anchor": {"lambda_reg": 0.0},
    "weighting sigma": {"weighting": "sigma"},
    "weighting sigma^3": {"weighting": "sigma3"},
}
# Controls. Another weighting changes how levels stand to each other, and all of them to the anchor;
# here the anchor's weight is as much smaller as the matching gradient is (its root mean square over
# chapter 6's run, which shows these factors).
SHORT = {"steps": 240, "learning_rate": 5e-5, "critic_learning_rate": 4e-4, "warm_up": 20,
         "decay": 0.5, "ema": 0.98}  # fmt: skip
CONTROLS: dict[str, dict] = {
    "weighting sigma, balance kept": {"weighting": "sigma", "lambda_reg": 0.69},
    "weighting sigma^3, balance kept": {"weighting": "sigma3", "lambda_reg": 0.175},
    "anchor weight 0.25": {"lambda_reg": 0.25},  # the paper's, with its LPIPS
    "without matching": {"matching": False},  # at full's own rate
}
# Of the long start: is it the start, or the settings, that decides about the anchor?
AS_SHORT = {
    "full, settings of the short run": SHORT,
    "without anchor, settings of the short run": SHORT | {"lambda_reg": 0.0},
}
OBJECTIVES = TABLE_2 | CONTROLS | AS_SHORT
REGRESSION = "regression on, equal iterations", "regression on, equal cost"
LONGER = "full, longer", "regression on, cost of full, longer"


@dataclass(frozen=True)
class World:
    """Pairs, the regression on them that all variants start from, and the full objective."""

    pairs: int
    warm_start: DistillSettings
    distill: DistillSettings
    count: int  # samples of each measurement
    seeds: tuple[int, ...]
    variants: tuple[str, ...] = (*TABLE_2, *REGRESSION)
    every: int = 0  # iterations between two points of the curve; 0 for no curve
    long: DistillSettings | None = None  # a longer run of the full objective


CHAPTER = World(
    2_000,
    replace(
        ON_DIGITS, steps=350, learning_rate=2e-3, decay=0.9, ema=0.98, matching=False,
        batch_pairs=128, warm_up=30,
    ),
    replace(ON_DIGITS, **SHORT),
    count=10_000, seeds=(1, 2, 3, 4, 5), variants=(*TABLE_2, *CONTROLS, *REGRESSION),
)  # fmt: skip
WORLDS = {
    "chapter": CHAPTER,
    "few pairs": replace(
        CHAPTER, pairs=300, variants=("full", "without anchor", "regression on, equal cost")
    ),
    "recipe": World(
        DIGITS.pairs, DIGITS.warm_start, replace(DIGITS.distill, steps=600),
        count=50_000, seeds=(1, 2), variants=(*TABLE_2, *REGRESSION, *AS_SHORT), every=250,
        long=DIGITS.distill,
    ),
}  # fmt: skip


def every(world: World) -> tuple[str, ...]:
    """All variants of a world, in the record's order."""
    return "start", *(LONGER if world.long else ()), *world.variants


def forwards(settings: DistillSettings) -> int:
    """What a training costs, in forwards of one network for one image (exercise 6.4)."""
    return settings.steps * evaluations(settings)


def settings_of(variant: str, world: World, seed: int) -> DistillSettings:
    """The settings of a variant, regression's cost made that of the full objective."""
    if variant == "start":
        return replace(world.warm_start, seed=seed)
    if variant == LONGER[0]:
        return replace(world.long, seed=seed)
    if variant in OBJECTIVES:
        return replace(world.distill, seed=seed, **OBJECTIVES[variant])
    on = replace(world.warm_start, steps=world.distill.steps, seed=seed + 100)  # draws of its own
    to = {"regression on, equal cost": world.distill, LONGER[1]: world.long}.get(variant)
    return at_equal_budget(on, to) if to else on


class Judge:
    """What a training is measured against, and on which noise."""

    def __init__(self, folder: Path, teacher: nn.Module, world: World, seed: int) -> None:
        self.count = world.count
        self.reference = metrics.extract_features(digits().x)
        others = load_pairs(folder / f"pairs-{2 if seed == 1 else 1}", teacher)  # another seed's
        self.fresh = Pairs(*(column[-5_000:] for column in others))
        self.teachers = metrics.extract_features(others.y)
        self.noises = [10 * seed + k for k in range(3)]

    def features(self, student: nn.Module, noise: int, count: int) -> Tensor:
        """Those of a student's samples on one set of noise."""
        z, label = pipeline.noise(student, count, "evaluation", noise)
        return metrics.extract_features(one_step(student, z, label))

    def distance(self, student: nn.Module, noise: int) -> dict:
        """Distances to the data and to the teacher's samples, on one set of noise."""
        found = self.features(student, noise, self.count)
        to = {"frechet": self.reference, "frechet_to_teacher": self.teachers}
        return {"noise": noise} | {name: metrics.frechet(found, to[name]) for name in to}

    def quality(self, student: nn.Module) -> dict:
        """Precision, recall and the share read as its label, on the first noise."""
        z, label = pipeline.noise(student, self.count, "evaluation", self.noises[0])
        found = metrics.evaluate(one_step(student, z, label), self.reference, label)
        return {name: getattr(found, name) for name in ("precision", "recall", "as_label")}

    @torch.no_grad()
    def error(self, student: nn.Module, pairs: Pairs) -> float:
        """Mean square distance to the teacher's answers, on at most 5,000 pairs."""
        z, y, label = (column[:5_000] for column in pairs)
        return l2(one_step(student, z, label), y).item()


def training(
    teacher: nn.Module, start: nn.Module | None, settings: DistillSettings, pairs: Pairs,
    every: int, judge: Judge,
) -> tuple[nn.Module, dict]:  # fmt: skip
    """Train, measuring along the way where asked; the average, and what it took."""
    run, spent, curve = DistillationRun(teacher, settings, start), 0.0, []
    started = time.process_time()
    for metric in distill(run, SHAPE, CLASSES, pairs):
        if every and metric.step % every == 0:
            spent += time.process_time() - started
            point = {
                "iteration": metric.step,
                "forwards": forwards(settings) * metric.step // settings.steps,
            }
            for name, network in (("average", run.average), ("raw", run.generator)):
                found = judge.features(network, judge.noises[0], count=20_000)
                point[name] = metrics.frechet(found, judge.reference)
            curve.append(point)
            started = time.process_time()
    spent += time.process_time() - started
    took = {"iterations": settings.steps, "forwards": forwards(settings), "seconds": round(spent)}
    return run.average, took | ({"curve": curve} if curve else {})


def rows(
    world: World, seed: int, done: set[str], folder: Path, keep: Path
) -> Iterator[tuple[str, dict]]:
    """Train and measure what is not done yet of one seed; students are kept in a folder."""
    teacher = pretrained.load("digits-teacher")
    pipeline.make_pairs_in(
        folder / f"pairs-{seed}", teacher, -(-world.pairs // 1_000) * 1_000, steps=18, seed=seed
    )
    pairs = load_pairs(folder / f"pairs-{seed}", teacher, world.pairs)
    judge, start = Judge(folder, teacher, world, seed), keep / "start.safetensors"
    for variant in every(world):
        file = keep / f"{variant}.safetensors"
        if variant in done and (variant != "start" or file.exists()):
            continue
        settings = settings_of(variant, world, seed)
        between = {"start": 8 * world.every, LONGER[0]: world.every, LONGER[1]: 2 * world.every}
        begun = None if variant == "start" else pretrained.load(str(start))
        student, took = training(teacher, begun, settings, pairs, between.get(variant, 0), judge)
        pretrained.save_denoiser(file, student)
        measured = [judge.distance(student, noise) for noise in judge.noises]
        error = {"own": judge.error(student, pairs), "fresh": judge.error(student, judge.fresh)}
        yield variant, {**took, "fingerprint": fingerprint(student), "error": error,
                        **judge.quality(student), "measured": measured}  # fmt: skip


def floors(folder: Path, counts: set[int]) -> dict:
    """What perfect samples would get at these counts, against the data and against the teacher."""
    teacher, data = pretrained.load("digits-teacher"), digits()
    pairs = [load_pairs(folder / f"pairs-{seed}", teacher) for seed in (1, 2)]
    pool = metrics.extract_features(torch.cat([each.y for each in pairs]))
    labels = torch.cat([each.label for each in pairs])
    real = metrics.extract_features(data.x)
    return {
        str(count): {
            "to_data": metrics.frechet_floor(real, count, None, data.label)._asdict(),
            "to_teacher": metrics.frechet_floor(pool, count, len(pool) // 2, labels)._asdict(),
        } for count in sorted(counts)
    }  # fmt: skip


def place(row: dict) -> tuple[int, int, int]:
    """Where a row belongs in the record."""
    world = WORLDS[row["world"]]
    return [*WORLDS].index(row["world"]), row["seed"], every(world).index(row["variant"])


def main() -> None:
    """Run what is missing, write after every row."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=Path, default=Path("runs/digits"), help="folders of pairs")
    parser.add_argument("--worlds", nargs="+", default=list(WORLDS), choices=WORLDS)
    parser.add_argument("--seeds", nargs="+", type=int, help="of each world's (all)")
    parser.add_argument("--join", nargs="*", type=Path, default=[], help="files of other runs")
    parser.add_argument("--out", type=Path, required=True, help="JSON file, continued")
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    kept = options.join or [options.out] * options.out.exists()
    report: dict = {"rows": [row for file in kept for row in json.loads(file.read_text())["rows"]]}
    for name in options.worlds if not options.join else []:
        world = WORLDS[name]
        for seed in world.seeds:
            if options.seeds and seed not in options.seeds:
                continue
            mine = [r for r in report["rows"] if (r["world"], r["seed"]) == (name, seed)]
            done, keep = {r["variant"] for r in mine}, options.pairs / f"{name}-{seed}"
            for variant, row in rows(world, seed, done, options.pairs, keep):
                report["rows"].append({"world": name, "seed": seed, "variant": variant, **row})
                write_json(options.out, report | provenance())
                found = [round(each["frechet"], 4) for each in row["measured"]]
                print(name, seed, variant, row["seconds"], found, flush=True)
    report["rows"].sort(key=place)
    counts = {world.count for world in WORLDS.values()}
    write_json(options.out, report | {"floors": floors(options.pairs, counts)} | provenance())


if __name__ == "__main__":
    main()

"""The paper's Table 2 on digits: what each part of the objective is worth, over seeds.

    python benchmarks/ablations.py --out book/results/digits-ablations.json

Every run starts from the same short regression on its pairs and then trains for the same number
of iterations with one thing changed. Two sizes of the anchor: pairs are few (300) or many
(3,000; losses only, not the weightings). Runs that are in the file already are not repeated, so
it can be stopped and continued.
"""

import argparse
import copy
import json
import time
from dataclasses import replace
from pathlib import Path

import torch

from dmd_tutorial import metrics, pretrained
from dmd_tutorial.anchor import Pairs, load_pairs, make_pairs
from dmd_tutorial.data import balanced_labels, digits
from dmd_tutorial.runs.provenance import provenance
from dmd_tutorial.samplers import one_step
from dmd_tutorial.training import DistillationRun, DistillSettings, distill

SHAPE, CLASSES = (1, 8, 8), 10
WARM_START = DistillSettings(
    steps=800, learning_rate=1e-3, decay=0.9, ema=0.995, matching=False, batch_pairs=128
)
VARIANTS = {
    "full": {},
    "without distribution matching": {"matching": False},
    "without anchor": {"lambda_reg": 0.0},
    "weighting sigma": {"weighting": "sigma"},
    "weighting sigma^3": {"weighting": "sigma3"},
    "no weighting": {"weighting": "none"},
}
WORLDS = {300: list(VARIANTS), 3_000: list(VARIANTS)[:3]}  # pairs -> variants


def train(teacher, settings: DistillSettings, pairs: Pairs, start=None):
    """One run; returns its averaged student and its seconds."""
    run = DistillationRun(teacher, settings, start)
    started = time.perf_counter()
    for _ in distill(run, SHAPE, CLASSES, pairs):
        pass
    return run.average, time.perf_counter() - started


def measure(student, reference, teacher_features, count: int) -> dict:
    """Distance to the data and to the teacher, precision, recall."""
    label = balanced_labels(count, CLASSES)
    z = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(10_000))
    x = one_step(student, z, label)
    result = metrics.evaluate(x, reference, label)
    to_teacher = metrics.frechet(metrics.extract_features(x), teacher_features)
    return {"frechet": result.frechet, "frechet_to_teacher": to_teacher,
            "precision": result.precision, "recall": result.recall,
            "as_label": result.as_label}  # fmt: skip


def main() -> None:
    """Run what is missing, write after every run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", default="runs/digits/pairs", help="folder (%(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="iterations (%(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="seeds of each row (%(default)s)")
    parser.add_argument("--count", type=int, default=10_000, help="samples (%(default)s)")
    parser.add_argument("--out", required=True, help="JSON file to write and to continue")
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    teacher = pretrained.load("digits-teacher")
    for _ in make_pairs(teacher, options.pairs, 13_000, SHAPE, CLASSES):
        pass
    everything = load_pairs(options.pairs, teacher)
    reference = metrics.extract_features(digits().x)
    # the first 3,000 pairs are for training, the teacher's samples to compare with come after
    teacher_features = metrics.extract_features(everything.y[3_000:])
    distilled = replace(DistillSettings(), steps=options.steps, warm_up=50)
    out = Path(options.out)
    report = json.loads(out.read_text()) if out.exists() else {"rows": []}
    done = {(r["pairs"], r["seed"], r["variant"]) for r in report["rows"]}
    for seed in range(options.seeds):
        for count, variants in WORLDS.items():
            pairs = Pairs(*(column[:count] for column in everything))
            wanted = [v for v in ("start", *variants) if (count, seed, v) not in done]
            if not wanted:
                continue
            start, seconds = train(teacher, replace(WARM_START, seed=seed), pairs)
            for variant in wanted:
                student, settings = start, replace(WARM_START, seed=seed)
                if variant != "start":
                    settings = replace(distilled, seed=seed, **VARIANTS[variant])
                    before = copy.deepcopy(start.denoiser)
                    student, seconds = train(teacher, settings, pairs, before)
                row = {"variant": variant, "pairs": count, "seed": seed,
                       "seconds": round(seconds, 1),
                       **measure(student, reference, teacher_features, options.count)}  # fmt: skip
                report["rows"].append(row)
                report |= {"steps": options.steps, "samples": options.count, **provenance()}
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(report, indent=1) + "\n")
                print(count, seed, variant, round(row["frechet"], 3), round(row["recall"], 3),
                      flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

"""The paper's Table 2 on digits: what each part of the objective is worth, over seeds.

    python benchmarks/ablations.py --out book/results/digits-ablations.json

Every run starts from the same short regression on its pairs and then trains for the same number
of iterations with one thing changed. Two sizes of the anchor: pairs are few (300) or many
(3,000; losses only, not the weightings). Runs that are in the file already are not repeated, so
it can be stopped and continued.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from dmd_tutorial import metrics, pretrained
from dmd_tutorial.anchor import Pairs, load_pairs
from dmd_tutorial.data import digits
from dmd_tutorial.files import write_json
from dmd_tutorial.runs import pipeline
from dmd_tutorial.runs.presets import ON_DIGITS
from dmd_tutorial.runs.provenance import provenance

WARM_START = replace(
    ON_DIGITS,
    steps=800,
    learning_rate=1e-3,
    decay=0.9,
    ema=0.995,
    matching=False,
    batch_pairs=128,
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


def measure(student, reference, teacher_features, count: int) -> dict:
    """Distance to the data and to the teacher, precision, recall."""
    z, label = pipeline.noise(student, count, "evaluation")
    x = pipeline.draw(student, z, label)
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
    pipeline.make_pairs_in(options.pairs, teacher, 13_000, steps=18)
    everything = load_pairs(options.pairs, teacher)
    reference = metrics.extract_features(digits().x)
    # the first 3,000 pairs are for training, the teacher's samples to compare with come after
    teacher_features = metrics.extract_features(everything.y[3_000:])
    distilled = replace(ON_DIGITS, steps=options.steps, warm_up=50)
    out = Path(options.out)
    report = json.loads(out.read_text()) if out.exists() else {"rows": []}
    done = {(r["pairs"], r["seed"], r["variant"]) for r in report["rows"]}
    for seed in range(options.seeds):
        for count, variants in WORLDS.items():
            pairs = Pairs(*(column[:count] for column in everything))
            wanted = [v for v in ("start", *variants) if (count, seed, v) not in done]
            if not wanted:
                continue
            start = pipeline.make_student(teacher, replace(WARM_START, seed=seed), pairs)
            for variant in wanted:
                made = start
                if variant != "start":
                    settings = replace(distilled, seed=seed, **VARIANTS[variant])
                    made = pipeline.make_student(teacher, settings, pairs, start.network)
                measured = measure(made.network, reference, teacher_features, options.count)
                row = {"variant": variant, "pairs": count, "seed": seed,
                       "seconds": round(made.seconds, 1), **measured}  # fmt: skip
                report["rows"].append(row)
                report |= {"steps": options.steps, "samples": options.count, **provenance()}
                write_json(out, report)
                print(count, seed, variant, round(row["frechet"], 3), round(row["recall"], 3),
                      flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

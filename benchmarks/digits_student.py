"""Digits: the shipped student, other trainings of its recipe, and their teacher, measured.

    python -m benchmarks.digits_student --out book/results/digits-student.json

The trainings and their pairs are those that `benchmarks.ablations` leaves behind (`--pairs`). At
50,000 class-balanced samples: each student on three sets of noise that no training has seen; the
teacher at 35 evaluations on one, and on the noises of each folder of pairs, whose answers are its
samples; at fewer evaluations on 10,000. And the floors of all that. What the file has of the
teacher stays. About half an hour on one core, most of it the teacher's.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from dmd_tutorial import metrics, pretrained
from dmd_tutorial.anchor import fingerprint, load_pairs
from dmd_tutorial.data import digits
from dmd_tutorial.files import write_json
from dmd_tutorial.runs import pipeline
from dmd_tutorial.runs.provenance import provenance
from dmd_tutorial.samplers import euler, heun, one_step, sample

TEACHER_ROWS = {  # evaluations -> (sampler, steps)
    1: (euler, 1), 5: (heun, 3), 9: (heun, 5), 17: (heun, 9), 35: (heun, 18),
}  # fmt: skip
TRAININGS = "recipe-1/full, longer.safetensors", "recipe-2/full, longer.safetensors"


def measured(x: Tensor, label: Tensor, reference: Tensor, teachers: Tensor) -> dict:
    """An evaluation against the data, and the distance to a set of the teacher's samples."""
    found = metrics.evaluate(x, reference, label)
    to_teacher = metrics.frechet(metrics.extract_features(x), teachers)
    return {"frechet": found.frechet, "frechet_to_teacher": to_teacher, "count": found.count,
            "precision": found.precision, "recall": found.recall,
            "as_label": found.as_label}  # fmt: skip


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=Path, default=Path("runs/digits"), help="folder of both")
    parser.add_argument("--count", type=int, default=50_000, help="samples (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="sets of noise (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    teacher, reference = pretrained.load("digits-teacher"), metrics.extract_features(digits().x)
    folders = [options.pairs / f"pairs-{seed}" for seed in (1, 2)]
    others = [load_pairs(folder, teacher, options.count) for folder in folders]
    pool = [metrics.extract_features(pairs.y) for pairs in others]
    report: dict = json.loads(options.out.read_text()) if options.out.exists() else {"teacher": {}}

    for evaluations, (sampler, steps) in TEACHER_ROWS.items():
        count = options.count if evaluations == 35 else min(options.count, 10_000)
        rows = report["teacher"].setdefault(str(evaluations), [])
        if not rows:
            z, label = pipeline.noise(teacher, count, "evaluation", seed=100)
            x = sample(teacher, z, label, sampler=sampler, steps=steps)
            rows.append({"set": "evaluation", **measured(x, label, reference, pool[0])})
        for folder, pairs in zip(folders, others, strict=True) if evaluations == 35 else ():
            if folder.name not in [row["set"] for row in rows]:
                row = measured(pairs.y, pairs.label, reference, pool[1])
                again = {} if folder is folders[0] else {"frechet_to_teacher": None}  # as before
                rows.append({"set": folder.name, **row, **again})
        print(evaluations, [row["frechet"] for row in rows], flush=True)

    report |= {"count": options.count, "students": [],
               "fingerprints": {"teacher": fingerprint(teacher)}}  # fmt: skip
    names = "digits-student", *(str(options.pairs / file) for file in TRAININGS)
    for place, name in enumerate(names):
        student, rows = pretrained.load(name), []
        for seed in range(options.seeds):
            z, label = pipeline.noise(student, options.count, "evaluation", 10 * place + seed)
            # not the pairs that the training saw
            teachers = pool[1] if "recipe-1" in name else pool[0]
            rows.append(measured(one_step(student, z, label), label, reference, teachers))
        report["students"].append({"fingerprint": fingerprint(student), "measured": rows})
        report["fingerprints"].setdefault("student", fingerprint(student))
        print(name, [row["frechet"] for row in rows], flush=True)

    floor = metrics.evaluation_floor(reference, options.count, label=digits().label)._asdict()
    labels = torch.cat([pairs.label for pairs in others])
    to_teacher = metrics.frechet_floor(torch.cat(pool), options.count, options.count, labels)
    report["floor"] = {name: value._asdict() for name, value in floor.items()}
    report["floor"]["frechet_to_teacher"] = to_teacher._asdict()
    write_json(options.out, report | provenance())


if __name__ == "__main__":
    main()

"""The shipped digits networks, measured: distance, precision, recall, coverage, speed.

    python benchmarks/digits_student.py --out book/results/digits-student.json

At 50,000 class-balanced samples: the teacher at several numbers of evaluations, the one-step
student, each against the data; student against the teacher's own samples; the floor of both
distances. About fifteen minutes on two cores.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from dmd_tutorial import metrics, pretrained
from dmd_tutorial.anchor import fingerprint
from dmd_tutorial.cli import provenance
from dmd_tutorial.data import balanced_labels, digits
from dmd_tutorial.samplers import euler, heun, sample

SHAPE, CLASSES = (1, 8, 8), 10
TEACHER_ROWS = {  # evaluations -> (sampler, steps)
    1: (euler, 1), 5: (heun, 3), 9: (heun, 5), 17: (heun, 9), 35: (heun, 18),
}  # fmt: skip


def noise(count: int, seed: int) -> torch.Tensor:
    """Draw z of one seed."""
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def row(x: torch.Tensor, seconds: float, label: torch.Tensor, reference: torch.Tensor) -> dict:
    """Measure samples against the data."""
    result = metrics.evaluate(x, reference, label)._asdict()
    return result | {"images_per_second": round(len(x) / seconds)}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--student", default="digits-student", help="name or file (%(default)s)")
    parser.add_argument("--count", type=int, default=50_000, help="samples (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the student (%(default)s)")
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--teacher-cache", help="folder in which teacher samples are kept")
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    teacher, student = pretrained.load("digits-teacher"), pretrained.load(options.student)
    reference = metrics.extract_features(digits().x)
    label = balanced_labels(options.count, CLASSES)
    report = {"count": options.count, "teacher": {}, "student": [], **provenance(),
              "fingerprints": {"teacher": fingerprint(teacher),
                               "student": fingerprint(student)}}  # fmt: skip

    teacher_features = []
    for evaluations, (sampler, steps) in TEACHER_ROWS.items():
        seeds = (100, 101) if evaluations == 35 else (100,)  # two, for the floor
        for seed in seeds:
            x, seconds = teacher_samples(teacher, label, sampler, steps, seed, options)
            if evaluations == 35:
                teacher_features.append(metrics.extract_features(x))
            if seed == 100:
                report["teacher"][evaluations] = row(x, seconds, label, reference)
                print(evaluations, report["teacher"][evaluations]["frechet"], flush=True)

    for seed in range(options.seeds):
        started = time.perf_counter()
        with torch.no_grad():
            parts = zip(noise(options.count, seed).split(1000), label.split(1000), strict=True)
            x = torch.cat([student(*part) for part in parts])
        measured = row(x, time.perf_counter() - started, label, reference)
        features = metrics.extract_features(x)
        measured["frechet_to_teacher"] = metrics.frechet(features, teacher_features[0])
        report["student"].append(measured)
        print("student", measured["frechet"], measured["frechet_to_teacher"], flush=True)

    floor = metrics.evaluation_floor(reference, options.count)
    report["floor"] = {
        "to_data": floor.frechet._asdict(),
        "to_teacher": metrics.frechet(*teacher_features),
        "precision": floor.precision._asdict(), "recall": floor.recall._asdict(),
    }  # fmt: skip
    best = report["teacher"][35]
    mean = {name: sum(r[name] for r in report["student"]) / options.seeds
            for name in ("frechet", "frechet_to_teacher", "precision", "recall")}  # fmt: skip
    report["student_mean"] = mean
    report["ratio_frechet"] = mean["frechet"] / best["frechet"]
    report["ratio_recall"] = mean["recall"] / best["recall"]
    text = json.dumps(report, indent=1)
    if options.out:
        Path(options.out).write_text(text + "\n")
    print(json.dumps({k: report[k] for k in ("student_mean", "ratio_frechet", "ratio_recall",
                                             "floor")}, indent=1))  # fmt: skip


def teacher_samples(teacher, label, sampler, steps, seed, options):
    """Sample the teacher, or read samples of an earlier call; with the seconds it took."""
    path = None
    if options.teacher_cache:
        folder = Path(options.teacher_cache)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{fingerprint(teacher)}-{sampler.__name__}{steps}-{seed}-{len(label)}.pt"
        if path.exists():
            return torch.load(path, weights_only=True)
    started = time.perf_counter()
    x = sample(teacher, noise(len(label), seed), label, sampler=sampler, steps=steps)
    made = (x, time.perf_counter() - started)
    if path:
        torch.save(made, path)
    return made


if __name__ == "__main__":
    main()

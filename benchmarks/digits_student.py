"""The shipped digits networks, measured: distance, precision, recall, coverage, speed.

    python benchmarks/digits_student.py --out book/results/digits-student.json

At 50,000 class-balanced samples of noise that no training has seen: the teacher at 35 evaluations
and the one-step student, each against the data; the student against the teacher's own samples; the
floor of both distances. The teacher at fewer evaluations at 10,000. Speeds are measured last, on
2,000 images each. About twenty minutes on one core.
"""

import argparse
import json
import time

import torch

from dmd_tutorial import metrics, pretrained
from dmd_tutorial.anchor import fingerprint
from dmd_tutorial.data import digits
from dmd_tutorial.files import write_json
from dmd_tutorial.runs import pipeline
from dmd_tutorial.runs.provenance import provenance
from dmd_tutorial.samplers import euler, heun, one_step, sample

TEACHER_ROWS = {  # evaluations -> (sampler, steps)
    1: (euler, 1), 5: (heun, 3), 9: (heun, 5), 17: (heun, 9), 35: (heun, 18),
}  # fmt: skip


def speed(function, count: int = 2_000) -> int:
    """Images per second of a function of the number of images, best of three."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        function(count)
        seconds.append(time.perf_counter() - started)
    return round(count / min(seconds))


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--student", default="digits-student", help="name or file (%(default)s)")
    parser.add_argument("--count", type=int, default=50_000, help="samples (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the student (%(default)s)")
    parser.add_argument("--out", help="JSON file to write")
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    teacher, student = pretrained.load("digits-teacher"), pretrained.load(options.student)
    reference = metrics.extract_features(digits().x)
    report = {"count": options.count, "teacher": {}, "student": [], **provenance(),
              "fingerprints": {"teacher": fingerprint(teacher),
                               "student": fingerprint(student)}}  # fmt: skip

    for evaluations, (sampler, steps) in TEACHER_ROWS.items():
        count = options.count if evaluations == 35 else min(options.count, 10_000)
        z, label = pipeline.noise(teacher, count, "evaluation", seed=100)
        x = sample(teacher, z, label, sampler=sampler, steps=steps)
        report["teacher"][evaluations] = metrics.evaluate(x, reference, label)._asdict()
        print(evaluations, report["teacher"][evaluations]["frechet"], flush=True)
    teacher_features = metrics.extract_features(x)

    for seed in range(options.seeds):
        z, label = pipeline.noise(student, options.count, "evaluation", seed)
        x = one_step(student, z, label)
        measured = metrics.evaluate(x, reference, label)._asdict()
        features = metrics.extract_features(x)
        measured["frechet_to_teacher"] = metrics.frechet(features, teacher_features)
        report["student"].append(measured)
        print("student", measured["frechet"], measured["frechet_to_teacher"], flush=True)

    floor = metrics.evaluation_floor(reference, options.count)
    report["floor"] = {
        "to_data": floor.frechet._asdict(),
        # two halves of the teacher's samples: fewer than in the rows above, so a little too high
        "to_teacher": metrics.frechet(*teacher_features.chunk(2)),
        "precision": floor.precision._asdict(), "recall": floor.recall._asdict(),
    }  # fmt: skip
    best = report["teacher"][35]
    mean = {name: sum(r[name] for r in report["student"]) / options.seeds
            for name in ("frechet", "frechet_to_teacher", "precision", "recall")}  # fmt: skip
    report["student_mean"] = mean
    report["ratio_frechet"] = mean["frechet"] / best["frechet"]
    report["ratio_recall"] = mean["recall"] / best["recall"]
    for evaluations, (sampler, steps) in TEACHER_ROWS.items():
        report["teacher"][evaluations]["images_per_second"] = speed(
            lambda count, sampler=sampler, steps=steps: sample(
                teacher, *pipeline.noise(teacher, count, "evaluation"), sampler=sampler, steps=steps
            )
        )  # fmt: skip
    report["student_images_per_second"] = speed(
        lambda count: one_step(student, *pipeline.noise(student, count, "evaluation"))
    )
    if options.out:
        write_json(options.out, report)
    print(json.dumps({k: report[k] for k in ("student_mean", "ratio_frechet", "ratio_recall",
                                             "floor")}, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()

"""Train every method of Part II within one budget, and print the table.

It goes on where it was interrupted. To repeat the book's: ``OMP_NUM_THREADS=1 python -m
benchmarks.survey --out book/results/survey.json`` from the repository's root.
"""

import json
from pathlib import Path
from typing import Literal

import torch
import tyro

from benchmarks.survey import comparison


def main(
    tasks: tuple[Literal["ring", "digits"], ...] = ("ring", "digits"),
    methods: tuple[str, ...] | None = None,
    seeds: tuple[int, ...] = (0, 1, 2),
    passes: float | None = None,
    out: Path = Path("runs/survey.json"),
) -> None:
    """Train every method of Part II within one budget, and print the table.

    Args:
        tasks: The teachers.
        methods: Names, as in the table; all without it.
        seeds: Of the trainings.
        passes: Budget of a training; each task's own without it.
        out: The file that grows, JSON; it goes on where it was interrupted.
    """
    torch.set_flush_denormal(True)  # tiny numbers are slow on CPUs and change nothing
    for row in comparison.survey(out, tasks, seeds, methods, passes):
        print(
            f"{row.task}, {row.method}, {row.evaluations} evaluations, seed {row.seed}: "
            f"distance {row.distance:.3f}, recall {row.recall:.3f}, {row.seconds:.0f} s",
            flush=True,
        )
    recorded = json.loads(out.read_text())["rows"] if out.exists() else []
    for name in tasks:
        print(f"\n{name}\n{comparison.table(recorded, name)}")
    print(f"\n{out}")


if __name__ == "__main__":
    tyro.cli(main)

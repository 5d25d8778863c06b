"""The survey's table: every method on the same teachers, within the same budget of passes."""

import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.survey import (
    adversarial,
    classical,
    consistency,
    flow_matching,
    progressive,
    score_distillation,
    solvers,
    task,
)
from benchmarks.survey.task import Budget, Method, Task
from dmd_tutorial.data import balanced_labels
from dmd_tutorial.files import write_json
from dmd_tutorial.runs.provenance import provenance

METHODS: tuple[Method, ...] = (  # in the order of the book
    *solvers.METHODS,
    *classical.METHODS,
    *flow_matching.METHODS,
    *consistency.METHODS,
    *progressive.METHODS,
    *adversarial.METHODS,
    *score_distillation.METHODS,
)
TASKS: dict[str, Callable[[], Task]] = {"ring": task.ring, "digits": task.digits}
PASSES = {"ring": 4_000_000.0, "digits": 250_000.0}  # of one training; 20 to 90 s of one core
SAMPLES = 10_000
WHAT = (
    "Distance to the data, lower is better: sliced Wasserstein distance (ring) and Frechet "
    "distance in the digits classifier's features (digits; no FID), of 10,000 samples. Every "
    "training may spend the same number of passes through networks, pairs included: a sample's "
    "forward pass counts 1, with its backward pass 3."
)


@dataclass(frozen=True)
class Row:
    """One measurement: a method, a task, a number of evaluations, a seed."""

    method: str
    chapter: int  # where it is taught
    task: str
    evaluations: int  # of a network, for a sample
    seed: int  # of the training
    distance: float  # to the data; in units of x on the ring, of squared features for digits
    recall: float  # share of the data that lies among the samples
    seconds: float  # of the training, in processor time: other work does not count
    passes: float  # spent by the training
    needs_data: bool
    needs_pairs: bool
    extra_networks: int  # trained besides the student


def measure(method: Method, on: Task, seed: int, passes: float) -> list[Row]:
    """Train once and measure what comes out: a row for each number of evaluations.

    The seed is that of the training; the samples' noise is the same for all.
    """
    budget = Budget(passes, on.teacher)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        started = time.process_time()
        samplers = method.train(on, budget, seed)
        seconds, spent = time.process_time() - started, budget.spent
        budget.close()
        z = torch.randn(SAMPLES, *on.shape, generator=torch.Generator().manual_seed(10_000))
        label = balanced_labels(SAMPLES, on.classes) if on.classes else None
        rows = []
        for evaluations, sampler in samplers.items():
            with torch.no_grad():
                distance, recall = on.measure(sampler(z, label), label)
            row = Row(
                method.name, method.chapter, on.name, evaluations, seed,
                round(distance, 4), round(recall, 4), round(seconds, 1), round(spent),
                method.needs_data, method.needs_pairs, method.extra_networks,
            )  # fmt: skip
            rows.append(row)
    return rows


def survey(
    path: Path,
    tasks: Sequence[str],
    seeds: Sequence[int],
    only: Sequence[str] | None = None,
    passes: float | None = None,
) -> Iterator[Row]:
    """Measure what the file, JSON, does not hold yet, and write each row at once.

    `only` names methods; a method without training takes the first seed only.
    """
    chosen = _chosen(only)
    report = json.loads(path.read_text()) if path.exists() else {"rows": []}
    report = {"what": WHAT, "budget": {t: passes or PASSES[t] for t in tasks}, **report}
    done = {(row["method"], row["task"], row["seed"]) for row in report["rows"]}
    for name in tasks:
        for seed in seeds:
            for method in chosen:
                if (method.name, name, seed) in done or (not method.trained and seed != seeds[0]):
                    continue
                for row in measure(method, TASKS[name](), seed, passes or PASSES[name]):
                    report["rows"].append(asdict(row) | provenance())
                    yield row
                write_json(path, report)


def _chosen(only: Sequence[str] | None) -> list[Method]:
    names = [method.name for method in METHODS]
    unknown = [name for name in only or [] if name not in names]
    if unknown:
        raise ValueError(f"unknown methods {unknown}; there are {names}")
    return [method for method in METHODS if only is None or method.name in only]


def table(rows: Iterable[dict], on: str) -> str:
    """The rows of one task as a Markdown table: means over seeds, with their spread."""
    groups: dict[tuple[str, int], list[dict]] = {}
    for row in rows:
        if row["task"] == on:
            groups.setdefault((row["method"], row["evaluations"]), []).append(row)
    lines = [
        "| method | evaluations | distance | recall | data? | pairs? | extra networks | seconds "
        "| chapter |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (method, evaluations), group in groups.items():
        first = group[0]
        cells = (
            method, evaluations, _spread([row["distance"] for row in group]),
            _spread([row["recall"] for row in group]), _yes(first["needs_data"]),
            _yes(first["needs_pairs"]), first["extra_networks"],
            f"{statistics.mean(row['seconds'] for row in group):.0f}", first["chapter"],
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _spread(values: list[float]) -> str:
    """Mean and sample standard deviation, with as many digits as the mean deserves."""
    mean = statistics.mean(values)
    digits = 1 if mean >= 10 else 2 if mean >= 1 else 3
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {statistics.stdev(values):.{digits}f}"

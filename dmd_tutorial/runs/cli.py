"""The command line, ``dmd``: from train-teacher to survey; ``dmd --help`` names all commands.

Every command leaves its result on disk: networks as safetensors, settings, versions and figures
as JSON beside them, a grid of samples as PNG. A training that stopped continues with the same
command. `accelerate launch -m dmd_tutorial distill ...` shares the work among processes.
"""

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from dmd_tutorial.runs import checkpoints, memory, monitor
from dmd_tutorial import metrics, pretrained
from dmd_tutorial.notebook import plots
from dmd_tutorial.anchor import fingerprint, load_pairs, make_pairs
from dmd_tutorial.runs.colab import runs_folder
from dmd_tutorial.runs.compute import Compute, Processes
from dmd_tutorial.data import balanced_labels, seeded_noise
from dmd_tutorial.runs.images import load_images
from dmd_tutorial.denoisers import OneStepGenerator, image_shape
from dmd_tutorial.runs.options import build_parser, overridden, seeds_of
from dmd_tutorial.runs.presets import PRESETS, Preset
from dmd_tutorial.runs.provenance import provenance
from dmd_tutorial.samplers import one_step, sample
from dmd_tutorial.training import DistillSettings, TeacherSettings
from benchmarks.survey import comparison
from dmd_tutorial.training import (
    DistillationRun,
    Metrics,
    TeacherRun,
    distill,
    train_teacher,
)

Options = argparse.Namespace
LOG_STEPS = 10  # steps between two lines of the log


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What follows ``dmd``; the process's own without it.

    Returns:
        The exit status: 0, or 2 after an error that is the user's to mend.
    """
    options = build_parser(COMMANDS, __doc__.split("\n")[0]).parse_args(arguments)
    torch.set_flush_denormal(True)  # tiny numbers are slow on CPUs and change nothing
    try:
        options.run(options)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"dmd {options.command}: {error}", file=sys.stderr)
        return 2
    return 0


# --- the commands ---------------------------------------------------------------------------


def run_train_teacher(options: Options) -> None:
    """Train a teacher on the preset's data, or on your own images."""
    name, preset = _preset(options)
    images = _images(preset, options)
    settings = overridden(preset.teacher, options)
    preset = replace(preset, teacher=settings, shape=tuple(images.x.shape[1:]),
                     classes=images.classes)  # fmt: skip
    compute = overridden(preset.compute, options)
    processes = _processes(options)
    teacher = preset.new_teacher().to(options.device)
    _say_memory(
        partial(memory.teacher_memory, teacher, settings.batch), compute, options, processes.first
    )
    run = TeacherRun(teacher, settings, compute)
    out = Path(options.out or runs_folder() / name)
    seconds = _train(run, train_teacher(run, images), out / "teacher.ckpt", options)
    if processes.first and seconds is not None:
        notes = {"preset": name, "data": options.data or preset.data, "images": len(images.x)}
        _finish(out / "teacher", run.average, settings, seconds, options, **notes)


def run_make_pairs(options: Options) -> None:
    """Make pairs (z, y) with the teacher's ODE sampler."""
    processes = _processes(options)
    name, preset, teacher = _teacher(options)
    shape, classes = image_shape(teacher)
    count, started = options.count or preset.pairs, time.monotonic()
    folder = options.pairs or runs_folder() / name / "pairs"
    made = make_pairs(
        teacher, folder, count, shape, classes,
        steps=options.steps or preset.pair_steps, seed=options.seed,
        batch=options.batch or preset.pair_batch, share=(processes.rank, processes.count),
    )  # fmt: skip
    with tqdm(total=count // processes.count, unit="pair", disable=_quiet(processes)) as bar:
        for total in made:
            bar.update(total - bar.n)
    processes.wait()
    if processes.first:
        print(f"{count} pairs in {folder}, {time.monotonic() - started:.0f} s")


def run_distill(options: Options) -> None:
    """Distil a teacher into a one-step student: regression on the pairs, then DMD."""
    processes = _processes(options)
    name, preset, teacher = _teacher(options)
    shape, classes = image_shape(teacher)
    settings = overridden(preset.distill, options)
    compute = overridden(preset.compute, options)
    out, pairs = Path(options.out or runs_folder() / name), None
    if settings.lambda_reg or options.warm_start_steps:
        pairs = load_pairs(options.pairs or runs_folder() / name / "pairs", teacher, options.count)
    notes: dict[str, Any] = {"preset": name, "pairs": 0 if pairs is None else len(pairs.z)}
    needs = partial(
        memory.distillation_memory, teacher, settings.batch,
        settings.batch_pairs if settings.lambda_reg else 0, lpips=settings.distance == "lpips",
    )  # fmt: skip
    _say_memory(needs, compute, options, processes.first)
    start: Any = None
    warm = preset.warm_start
    if options.start:
        start = pretrained.load(options.start).denoiser.to(options.device)
    elif warm and options.warm_start_steps != 0:
        warm = replace(warm, steps=options.warm_start_steps or warm.steps, seed=settings.seed)
        run = DistillationRun(teacher, warm, compute=compute)
        loop = distill(run, shape, classes, pairs)
        seconds = _train(run, loop, out / "warm-start.ckpt", options)
        if seconds is None:
            return
        if processes.first:
            _finish(out / "warm-start", run.average, warm, seconds, options, **notes)
        notes["warm_start_seconds"] = round(seconds, 1)
        start = run.ema.module.denoiser
    run = DistillationRun(teacher, settings, start, compute=compute)
    loop = distill(run, shape, classes, pairs)
    seconds = _train(run, loop, out / "student.ckpt", options)
    if processes.first and seconds is not None:
        _finish(out / "student", run.average, settings, seconds, options, **notes)


def run_sample(options: Options) -> None:
    """Draw samples from a teacher or a student."""
    processes = _processes(options)
    model = pretrained.load(options.model).to(options.device)
    x, label, seconds = _samples(model, options, processes)
    if not processes.first:
        return
    path = Path(options.out or runs_folder() / _preset(options)[0] / "samples")
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"x": x} if label is None else {"x": x, "label": label}
    save_file(tensors, path.with_suffix(".safetensors"))
    plots.save_grid(x[:100], path.with_suffix(".png"), columns=10)
    print(f"{len(x)} samples in {seconds:.1f} s, {path.with_suffix('.png')}")


def run_evaluate(options: Options) -> None:
    """Measure a teacher or a student against the data."""
    processes, preset = _processes(options), _preset(options)[1]
    model = pretrained.load(options.model).to(options.device)
    x, label, seconds = _samples(model, options, processes)
    if not processes.first:
        return
    features = options.features or preset.features
    reference = _images(preset, options)
    result = metrics.evaluate(
        x, reference.take(torch.arange(len(reference.x))), label=label, features=features,
        minimum=min(10_000, len(x)),
    )  # fmt: skip
    report = {
        "model": str(options.model), "fingerprint": fingerprint(model), "samples": len(x),
        "evaluations": 1 if isinstance(model, OneStepGenerator) else 2 * options.steps - 1,
        "seed": options.seed, "images_per_second": round(len(x) / seconds, 1),
        "name": result.name,
        "result": {name: _plain(value) for name, value in result._asdict().items()},
        **provenance(),
    }  # fmt: skip
    text = json.dumps(report, indent=1)
    if options.out:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        Path(options.out).write_text(text + "\n")
    print(text)


def run_demo(options: Options) -> None:
    """Go the whole way in minutes: teacher, pairs, distillation, a one-step grid."""
    out, started = Path(options.out or runs_folder() / "demo"), time.monotonic()
    common = ["--preset", "demo", "--out", str(out)]
    teacher, pairs = str(out / "teacher.safetensors"), str(out / "pairs")
    fresh = ["--fresh"] if options.fresh else []
    steps = [
        ["train-teacher", *common, *fresh],
        ["make-pairs", "--preset", "demo", "--teacher", teacher, "--pairs", pairs],
        ["distill", *common, *fresh, "--teacher", teacher, "--pairs", pairs],
    ]
    for number, step in enumerate(steps, 1):
        print(f"[{number}/{len(steps)}] dmd {' '.join(step)}")
        parser = build_parser(COMMANDS, "")
        nested = parser.parse_args([*step, "--device", options.device])
        nested.run(nested)
    minutes = (time.monotonic() - started) / 60
    print(f"One-step samples: {out / 'student.png'} (the teacher's, in 35 evaluations: "
          f"{out / 'teacher.png'}), {minutes:.1f} minutes in all")  # fmt: skip


def run_verify(options: Options) -> None:
    """Run a chapter's tests and its notebook; needs a clone of the book."""
    root = Path(options.book)
    notebooks = sorted(root.glob(f"book/{options.chapter}-*.ipynb"))
    if not notebooks:
        raise FileNotFoundError(f"{root} holds no book/{options.chapter}-*.ipynb: give --book")
    tests = [str(p) for p in root.glob(f"tests/test_chapter{options.chapter}.py")]
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-current-env"]
    environment = os.environ | {"DMD_TUTORIAL_STATIC": "1"}
    finished = subprocess.run([*command, *tests, *map(str, notebooks)], env=environment)
    if finished.returncode:
        raise RuntimeError(f"chapter {options.chapter}: a claim does not hold, see above")


def run_survey(options: Options) -> None:
    """Train every method of Part II within one budget, and print the table."""
    path = Path(options.out or runs_folder() / "survey.json")
    rows = comparison.survey(
        path, options.tasks, seeds_of(options.seeds), options.methods, options.passes
    )
    for row in rows:
        print(f"{row.task}, {row.method}, {row.evaluations} evaluations, seed {row.seed}: "
              f"distance {row.distance:.3f}, recall {row.recall:.3f}, {row.seconds:.0f} s",
              flush=True)  # fmt: skip
    recorded = json.loads(path.read_text())["rows"] if path.exists() else []
    for name in options.tasks:
        print(f"\n{name}\n{comparison.table(recorded, name)}")
    print(f"\n{path}")


COMMANDS = {
    "train-teacher": run_train_teacher,
    "make-pairs": run_make_pairs,
    "distill": run_distill,
    "sample": run_sample,
    "evaluate": run_evaluate,
    "demo": run_demo,
    "verify": run_verify,
    "survey": run_survey,
}


# --- which preset, teacher, data -----------------------------------------------------------------


def _preset(options: Options) -> tuple[str, Preset]:
    """The preset that was named, or the one that the network belongs to."""
    if options.preset:
        return options.preset, PRESETS[options.preset]
    if options.command == "train-teacher" and options.data:
        return "own-images", PRESETS["own-images"]
    name = _made_with(getattr(options, "teacher", None) or getattr(options, "model", None))
    return name, PRESETS[name]


def _made_with(network: str | None) -> str:
    for name, preset in PRESETS.items():
        if network and network == preset.published:
            return name
    if network and Path(network).suffix == ".safetensors" and Path(network).exists():
        made_with = pretrained.made_by(network).get("preset")
        if made_with in PRESETS:
            return made_with
    return "digits"


def _teacher(options: Options) -> tuple[str, Preset, Any]:
    """Preset and teacher: the given one, the preset's published one, or the one trained with it."""
    name, preset = _preset(options)
    trained = "digits-teacher" if name == "digits" else runs_folder() / name / "teacher.safetensors"
    teacher = pretrained.load(options.teacher or preset.published or trained)
    return name, preset, teacher.to(options.device)


def _images(preset: Preset, options: Options) -> Any:
    if options.data is None:
        return preset.images()
    return load_images(options.data, options.size or preset.shape[1])


def _processes(options: Options) -> Processes:
    """Who shares the work; each process gets its own device."""
    processes = Processes()
    if processes.device is not None:
        options.device = str(processes.device)
    return processes


def _quiet(processes: Processes) -> bool | None:
    """For tqdm: no bar in the other processes, and where nobody watches."""
    return None if processes.first else True


# --- training -------------------------------------------------------------------------------------


def _train(
    run: TeacherRun | DistillationRun,
    loop: Iterator[Metrics],
    checkpoint: Path,
    options: Options,
) -> float | None:
    """Drive a loop, watched, with checkpoints; its seconds, None if it is not done."""
    settings, started, earlier = asdict(run.settings), time.monotonic(), 0.0
    processes = run.processes
    if checkpoints.newest(checkpoint) and not options.fresh:
        earlier = run.load(checkpoint, settings=settings)["seconds"]

    def seconds() -> float:
        return earlier + time.monotonic() - started

    def save() -> None:
        if processes.first:
            run.save(checkpoint, settings=settings, seconds=seconds())

    saved = time.monotonic()
    with Watch(run, checkpoint.with_suffix(""), options.picture_steps) as watch:
        for metric in loop:
            watch(metric, seconds())
            if time.monotonic() - saved > 60 * options.checkpoint_minutes:
                save()
                saved = time.monotonic()
            out_of_time = time.monotonic() - started > 60 * (options.minutes or math.inf)
            if options.minutes and processes.any(out_of_time):
                break
    save()
    if run.step < run.settings.steps:
        if processes.first:
            print(f"Stopped at step {run.step} of {run.settings.steps}; the same command goes on.")
        return None
    return seconds()


class Watch:
    """What the first process shows and notes of each step: bar, log, picture, warnings."""

    def __init__(self, run: TeacherRun | DistillationRun, path: Path, picture_steps: int) -> None:
        self.run, self.path, self.picture_steps = run, path, picture_steps
        self.first = run.processes.first
        settings = run.settings
        self.speed = monitor.Speed(settings.steps, settings.batch)
        self.signs = monitor.Signs(settings.clip)
        self.bar = tqdm(total=settings.steps, initial=run.step, unit="step",
                        disable=_quiet(run.processes))  # fmt: skip
        self.log = monitor.Log(path.with_suffix(".jsonl"), run.step) if self.first else None

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.log is not None:
            self.log.close()

    def __call__(self, metric: Metrics, seconds: float) -> None:
        """Show and note a step."""
        if self.log is None:
            return
        images, left = self.speed(metric.step)
        self.bar.update()
        self.bar.set_postfix(loss=f"{metric.loss:.4f}", images_per_second=f"{images:.0f}",
                             minutes_left=f"{left / 60:.0f}")  # fmt: skip
        warnings = self.signs(metric.record) if metric.record is not None else []
        for warning in warnings:
            tqdm.write(f"step {metric.step}: {warning}")
        if metric.step % LOG_STEPS == 0 or warnings:
            numbers = metric.record._asdict() if metric.record is not None else {}
            plain = {name: n for name, n in numbers.items() if isinstance(n, float)}
            self.log.write(
                metric.step, loss=metric.loss, learning_rate=metric.learning_rate,
                images_per_second=None if math.isnan(images) else round(images, 1),
                seconds=round(seconds, 1), warnings=warnings, **plain,
            )  # fmt: skip
        record = metric.record
        if metric.step % self.picture_steps == 0 and record and record.denoised_real is not None:
            monitor.picture(record, self.path.with_name(f"{self.path.name}-watch.png"))


def _say_memory(estimate_with: Any, compute: Compute, options: Options, first: bool) -> None:
    """Before a run: what it needs, and what to change if that is more than there is."""
    if not first:
        return
    free = memory.available(options.device)
    print(f"Memory, estimated:\n{estimate_with(compute)}")
    gpu = options.device.startswith("cuda")
    low = "bf16" if not gpu or torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    advice = memory.advice(estimate_with, compute, free, low)
    if advice:
        print(f"There are {free / memory.GIB:.2f} GiB. It may not fit; what helps:")
        print("\n".join(f"  {sentence}" for sentence in advice))


def _finish(
    path: Path,
    model: Any,
    settings: TeacherSettings | DistillSettings,
    seconds: float,
    options: Options,
    **notes: object,
) -> None:
    """Write network, provenance and a grid of samples; say where."""
    made_by = {
        "command": f"dmd {shlex.join(options.arguments)}", "settings": asdict(settings),
        "seconds": round(seconds, 1), **notes, **provenance(),
    }  # fmt: skip
    pretrained.save_denoiser(path.with_suffix(".safetensors"), model, **made_by)
    path.with_suffix(".json").write_text(json.dumps(made_by, indent=1) + "\n")
    shape, classes = image_shape(model)
    z = torch.randn(100, *shape, generator=torch.Generator().manual_seed(0))
    x = _draw(model, z, balanced_labels(100, classes) if classes else None, 18, 100)
    plots.save_grid(x, path.with_suffix(".png"), columns=10)
    print(f"{path.with_suffix('.safetensors')} ({seconds:.0f} s), {path.with_suffix('.png')}")


# --- sampling -------------------------------------------------------------------------------------


@torch.no_grad()
def _draw(model: nn.Module, z: Tensor, label: Tensor | None, steps: int, batch: int) -> Tensor:
    model.eval()
    device = next(model.parameters()).device
    z, label = z.to(device), None if label is None else label.to(device)
    if not isinstance(model, OneStepGenerator):
        return sample(model, z, label, steps=steps, batch=batch).cpu()
    return one_step(model, z, label, batch=batch).cpu()


def _samples(
    model: nn.Module, options: Options, processes: Processes
) -> tuple[Tensor, Tensor | None, float]:
    """Samples, their labels and the seconds they took; each process makes its share."""
    shape, classes = image_shape(model)
    if getattr(options, "seeds", None):
        z, label = seeded_noise(seeds_of(options.seeds), shape, classes, options.device)
    else:
        rng = torch.Generator().manual_seed(options.seed)
        z = torch.randn(options.count, *shape, generator=rng)
        label = balanced_labels(options.count, classes) if classes else None
    if label is not None and getattr(options, "label", None) is not None:
        label = torch.full_like(label, options.label)
    started, mine = time.monotonic(), processes.mine(len(z))
    some = None if label is None else label.cpu()[mine]
    x = processes.gather(_draw(model, z.cpu()[mine], some, options.steps, options.batch), len(z))
    return x, None if label is None else label.cpu(), time.monotonic() - started


def _plain(value: object) -> object:
    return value.tolist() if isinstance(value, torch.Tensor) else value


if __name__ == "__main__":
    sys.exit(main())

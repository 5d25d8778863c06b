"""The command line, ``dmd``: train-teacher, make-pairs, distill, sample, evaluate, demo, verify.

Every command leaves its result on disk: networks as safetensors, settings, versions and figures
as JSON beside them, a grid of samples as PNG. A training that stopped continues with the same
command.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from dmd_tutorial import __version__, metrics, plots, pretrained
from dmd_tutorial.anchor import fingerprint, load_pairs, make_pairs
from dmd_tutorial.data import balanced_labels
from dmd_tutorial.denoisers import OneStepGenerator
from dmd_tutorial.presets import PRESETS, Preset
from dmd_tutorial.samplers import one_step, sample
from dmd_tutorial.training import (
    DistillationRun,
    DistillSettings,
    Metrics,
    TeacherRun,
    TeacherSettings,
    distill,
    train_teacher,
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What follows ``dmd``; the process's own without it.

    Returns:
        The exit status: 0, or 2 after an error that is the user's to mend.
    """
    options = _parser().parse_args(arguments)
    torch.set_flush_denormal(True)  # tiny numbers are slow on CPUs and change nothing
    try:
        options.run(options)
    except (ValueError, FileNotFoundError, PermissionError, RuntimeError) as error:
        print(f"dmd {options.command}: {error}", file=sys.stderr)
        return 2
    return 0


# --- the commands ---------------------------------------------------------------------------


def run_train_teacher(options: argparse.Namespace) -> None:
    """Train a teacher on the preset's data."""
    preset = PRESETS[options.preset]
    settings = _settings(preset.teacher, options)
    preset = replace(preset, teacher=settings)
    run = TeacherRun(preset.new_teacher().to(options.device), settings)
    out = Path(options.out)
    seconds = _train(run, train_teacher(run, preset.images()), out / "teacher.ckpt", options)
    _finish(out / "teacher", run.average, preset, settings, seconds, options)


def run_make_pairs(options: argparse.Namespace) -> None:
    """Make pairs (z, y) with the teacher's ODE sampler."""
    preset = PRESETS[options.preset]
    teacher = pretrained.load(options.teacher).to(options.device)
    count = options.count or preset.pairs
    started = time.monotonic()
    made = make_pairs(
        teacher, options.pairs, count, preset.shape, preset.classes,
        steps=options.steps or preset.pair_steps, seed=options.seed,
    )  # fmt: skip
    with tqdm(total=count, unit="pair", disable=None) as bar:
        for total in made:
            bar.update(total - bar.n)
    print(f"{count} pairs in {options.pairs}, {time.monotonic() - started:.0f} s")


def run_distill(options: argparse.Namespace) -> None:
    """Distil a teacher into a one-step student: regression on the pairs, then DMD."""
    preset = PRESETS[options.preset]
    teacher = pretrained.load(options.teacher).to(options.device)
    settings = _settings(preset.distill, options)
    out, pairs = Path(options.out), None
    if settings.lambda_reg or options.warm_start_steps:
        pairs = load_pairs(options.pairs, teacher, options.count)
    notes: dict[str, Any] = {"pairs": 0 if pairs is None else len(pairs.z)}
    start: Any = None
    warm = preset.warm_start
    if options.start:
        start = pretrained.load(options.start).denoiser.to(options.device)
    elif warm and options.warm_start_steps != 0:
        warm = replace(warm, steps=options.warm_start_steps or warm.steps, seed=settings.seed)
        run = DistillationRun(teacher, warm)
        loop = distill(run, preset.shape, preset.classes, pairs)
        seconds = _train(run, loop, out / "warm-start.ckpt", options)
        _finish(out / "warm-start", run.average, preset, warm, seconds, options, **notes)
        notes["warm_start_seconds"] = round(seconds, 1)
        start = run.ema.module.denoiser
    run = DistillationRun(teacher, settings, start)
    loop = distill(run, preset.shape, preset.classes, pairs)
    seconds = _train(run, loop, out / "student.ckpt", options)
    _finish(out / "student", run.average, preset, settings, seconds, options, **notes)


def run_sample(options: argparse.Namespace) -> None:
    """Draw samples from a teacher or a student."""
    preset = PRESETS[options.preset]
    model = pretrained.load(options.model).to(options.device)
    x, label, seconds = _samples(model, preset, options)
    path = Path(options.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"x": x} if label is None else {"x": x, "label": label}
    save_file(tensors, path.with_suffix(".safetensors"))
    plots.save_grid(x[:100], path.with_suffix(".png"), columns=10)
    print(f"{len(x)} samples in {seconds:.1f} s, {path.with_suffix('.png')}")


def run_evaluate(options: argparse.Namespace) -> None:
    """Measure a teacher or a student against the data."""
    preset = PRESETS[options.preset]
    model = pretrained.load(options.model).to(options.device)
    x, label, seconds = _samples(model, preset, options)
    result = metrics.evaluate(x, preset.images().x, label=label, minimum=min(10_000, len(x)))
    report = {
        "model": str(options.model), "fingerprint": fingerprint(model), "samples": len(x),
        "evaluations": 1 if isinstance(model, OneStepGenerator) else 2 * options.steps - 1,
        "seed": options.seed, "images_per_second": round(len(x) / seconds, 1),
        "result": {name: _plain(value) for name, value in result._asdict().items()},
        **provenance(),
    }  # fmt: skip
    text = json.dumps(report, indent=1)
    if options.out:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        Path(options.out).write_text(text + "\n")
    print(text)


def run_demo(options: argparse.Namespace) -> None:
    """Go the whole way in minutes: teacher, pairs, distillation, a one-step grid."""
    out, started = Path(options.out), time.monotonic()
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
        nested = _parser().parse_args([*step, "--device", options.device])
        nested.run(nested)
    minutes = (time.monotonic() - started) / 60
    print(f"One-step samples: {out / 'student.png'} (the teacher's, in 35 evaluations: "
          f"{out / 'teacher.png'}), {minutes:.1f} minutes in all")  # fmt: skip


def run_verify(options: argparse.Namespace) -> None:
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


# --- what they share -------------------------------------------------------------------------


def _train(
    run: TeacherRun | DistillationRun,
    loop: Iterator[Metrics],
    checkpoint: Path,
    options: argparse.Namespace,
) -> float:
    """Drive a training loop with a progress bar and checkpoints; returns its seconds."""
    settings, started = asdict(run.settings), time.monotonic()
    if checkpoint.exists() and not options.fresh:
        run.load(checkpoint, settings=settings)
    saved = time.monotonic()
    with tqdm(total=run.settings.steps, initial=run.step, unit="step", disable=None) as bar:
        for metric in loop:
            bar.update()
            bar.set_postfix(loss=f"{metric.loss:.4f}", rate=f"{metric.learning_rate:.1e}")
            if time.monotonic() - saved > 60 * options.checkpoint_minutes:
                run.save(checkpoint, settings=settings)
                saved = time.monotonic()
    run.save(checkpoint, settings=settings)
    return time.monotonic() - started


def _finish(
    path: Path,
    model: Any,
    preset: Preset,
    settings: TeacherSettings | DistillSettings,
    seconds: float,
    options: argparse.Namespace,
    **notes: object,
) -> None:
    """Write network, provenance and a grid of samples; say where."""
    made_by = {
        "command": f"dmd {shlex.join(options.arguments)}", "settings": asdict(settings),
        "seconds": round(seconds, 1), **notes, **provenance(),
    }  # fmt: skip
    pretrained.save_denoiser(path.with_suffix(".safetensors"), model, **made_by)
    path.with_suffix(".json").write_text(json.dumps(made_by, indent=1) + "\n")
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(100, *preset.shape, generator=rng)
    label = balanced_labels(100, preset.classes) if preset.classes else None
    x = _draw(model, z, label, preset.pair_steps)
    plots.save_grid(x, path.with_suffix(".png"), columns=10)
    print(f"{path.with_suffix('.safetensors')} ({seconds:.0f} s), {path.with_suffix('.png')}")


@torch.no_grad()
def _draw(
    model: nn.Module, z: torch.Tensor, label: torch.Tensor | None, steps: int
) -> torch.Tensor:
    model.eval()
    device = next(model.parameters()).device
    z, label = z.to(device), None if label is None else label.to(device)
    if not isinstance(model, OneStepGenerator):
        return sample(model, z, label, steps=steps).cpu()
    return one_step(model, z, label).cpu()


def _samples(
    model: nn.Module, preset: Preset, options: argparse.Namespace
) -> tuple[torch.Tensor, torch.Tensor | None, float]:
    rng = torch.Generator().manual_seed(options.seed)
    z = torch.randn(options.count, *preset.shape, generator=rng)
    label = balanced_labels(options.count, preset.classes) if preset.classes else None
    started = time.monotonic()
    x = _draw(model, z, label, options.steps)
    return x, label, time.monotonic() - started


def provenance() -> dict:
    """Device, threads and versions, for a result that must say where it comes from."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or "cpu", "threads": torch.get_num_threads(),
        "versions": {
            "dmd_tutorial": __version__, "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }  # fmt: skip


def _plain(value: object) -> object:
    return value.tolist() if isinstance(value, torch.Tensor) else value


# --- options ---------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dmd", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    teacher: dict[str, Any] = {
        "default": "digits-teacher",
        "help": "a shipped name or a .safetensors file",
    }
    pairs: dict[str, Any] = {"default": "runs/digits/pairs", "help": "folder of the pairs"}

    c = _command(commands, run_train_teacher)
    _training_options(c, "runs/digits")
    _setting_options(c, TeacherSettings)

    c = _command(commands, run_make_pairs)
    c.add_argument("--teacher", **teacher)
    c.add_argument("--pairs", **pairs)
    c.add_argument("--count", type=int, help="number of pairs, a multiple of 1000 (preset's)")
    c.add_argument("--steps", type=int, help="Heun steps per pair; N cost 2N-1 evaluations (18)")
    c.add_argument("--seed", type=int, default=0, help="seed of the noise (%(default)s)")

    c = _command(commands, run_distill)
    c.add_argument("--teacher", **teacher)
    c.add_argument("--pairs", **pairs)
    c.add_argument("--count", type=int, help="use only so many pairs (all)")
    c.add_argument("--start", help="student (.safetensors) to start from, without warm start")
    c.add_argument("--warm-start-steps", type=int,
                   help="steps of regression on the pairs first; 0: none (preset's)")  # fmt: skip
    _training_options(c, "runs/digits")
    _setting_options(c, DistillSettings)

    for function, count in ((run_sample, 100), (run_evaluate, 10_000)):
        c = _command(commands, function)
        c.add_argument("--model", default="digits-student",
                       help="a shipped name or a .safetensors file (%(default)s)")  # fmt: skip
        c.add_argument("--count", type=int, default=count,
                       help="number of samples, classes balanced (%(default)s)")  # fmt: skip
        c.add_argument("--steps", type=int, default=18,
                       help="Heun steps; N cost 2N-1 evaluations (%(default)s)")  # fmt: skip
        c.add_argument("--seed", type=int, default=0, help="seed of the noise (%(default)s)")
        out = "runs/digits/samples" if function is run_sample else None
        c.add_argument("--out", default=out, help="file to write, its ending is chosen for you")

    c = _command(commands, run_demo, preset=False)
    c.add_argument("--out", default="runs/demo", help="folder of the results (%(default)s)")
    c.add_argument("--fresh", action="store_true", help="start over instead of continuing")

    c = _command(commands, run_verify, preset=False)
    c.add_argument("chapter", type=int, help="number of the chapter")
    c.add_argument("--book", default=".", help="folder of the clone (%(default)s)")
    return parser


def _command(
    commands: Any, function: Callable[[argparse.Namespace], None], preset: bool = True
) -> argparse.ArgumentParser:
    name = function.__name__.removeprefix("run_").replace("_", "-")
    c = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
    c.set_defaults(run=function, arguments=sys.argv[1:])
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    if function is not run_verify:
        c.add_argument("--device", default=gpu, help="where networks run (here: %(default)s)")
    if preset:
        c.add_argument("--preset", default="digits", choices=PRESETS,
                       help="table of settings to start from (%(default)s)")  # fmt: skip
    return c


def _training_options(command: argparse.ArgumentParser, out: str) -> None:
    command.add_argument("--out", default=out, help="folder of the results (%(default)s)")
    command.add_argument("--fresh", action="store_true", help="start over instead of continuing")
    command.add_argument("--checkpoint-minutes", type=float, default=2.0,
                         help="minutes between two checkpoints (%(default)s)")  # fmt: skip


def _setting_options(command: argparse.ArgumentParser, settings: type) -> None:
    """An option for each field of a settings class, explained by its docstring."""
    explained = _attribute_docs(settings)
    for f in fields(settings):
        kind: dict[str, Any] = {"type": type(f.default)}
        if isinstance(f.default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        command.add_argument(f"--{f.name.replace('_', '-')}", **kind, default=None,
                             help=f"{explained[f.name]} (preset's)")  # fmt: skip


def _attribute_docs(settings: type) -> dict[str, str]:
    text = (settings.__doc__ or "").split("Attributes:")[1]
    names = {f.name for f in fields(settings)}
    entries: dict[str, str] = {}
    name = ""
    for line in filter(None, map(str.strip, text.splitlines())):
        head, colon, rest = line.partition(": ")
        if colon and head in names:
            name, entries[head] = head, rest
        else:
            entries[name] += " " + line
    return {name: entry.rstrip(".").replace("%", "%%") for name, entry in entries.items()}


def _settings(defaults: Any, options: argparse.Namespace) -> Any:
    """The preset's settings with what the command line overrides."""
    given = {f.name: getattr(options, f.name) for f in fields(defaults)}
    return replace(defaults, **{name: v for name, v in given.items() if v is not None})


if __name__ == "__main__":
    sys.exit(main())

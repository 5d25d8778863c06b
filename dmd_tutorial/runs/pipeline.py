"""One pipeline for whoever makes a student: the command line, `dmd demo` and the benchmarks.

Train a teacher, make its pairs, regress on them (the warm start), distil, draw, measure. A training
can be stopped at any moment and goes on from its last checkpoint; a result is a network
(safetensors), what it was made with (JSON) and a grid of its samples (PNG), side by side.
"""

import copy
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dmd_tutorial import dmd, metrics, pretrained, training
from dmd_tutorial.adapters import Guided
from dmd_tutorial.anchor import Pairs, fingerprint, identity, make_pairs
from dmd_tutorial.checks import Checked, CountOrNone, NotFiniteError, NotNegative
from dmd_tutorial.data import Images, balanced_labels, normal
from dmd_tutorial.denoisers import device_of, feature_layers, image_shape, says
from dmd_tutorial.files import write_json
from dmd_tutorial.generators import OneStepGenerator
from dmd_tutorial.noise import Purpose, stream
from dmd_tutorial.runs import checkpoints, monitor
from dmd_tutorial.runs.compute import Compute, Processes, Updater, prepare, split
from dmd_tutorial.runs.images import save_grid
from dmd_tutorial.runs.provenance import provenance
from dmd_tutorial.samplers import evaluations, heun, one_step, sample
from dmd_tutorial.survey.score_distillation import Dmd2Settings, Judge
from dmd_tutorial.text_to_image.lora import LowRank, lora_run

PLAIN = Compute()


@dataclass(frozen=True)
class Control(Checked):
    """How a training is watched, kept and stopped."""

    fresh: bool = False  # Start over instead of continuing.
    checkpoint_minutes: NotNegative = 2.0  # Minutes between checkpoints; 0 for one at each step.
    minutes: NotNegative = math.inf  # Stop after so many minutes, saved; the same command goes on.
    picture_steps: CountOrNone = 500  # Steps between pictures of G, D_real and D_fake; 0 for none.


class Stop:
    """Handles signals: asked to stop, a training ends after its step; asked again, at once."""

    asked = 0.0  # when, in seconds; 0 for not yet

    def __call__(self, *_: Any) -> None:
        """Note a signal; one of a second later is another, and no launcher's echo of the first."""
        if 0 < self.asked < time.monotonic() - 1:
            raise KeyboardInterrupt
        self.asked = self.asked or time.monotonic()


@contextmanager
def signals(handler: Callable) -> Iterator[Any]:
    """Let a handler have what asks a program to stop: Ctrl-C (SIGINT) and SIGTERM."""
    main = threading.current_thread() is threading.main_thread()  # which alone gets signals
    kinds = (signal.SIGINT, signal.SIGTERM) if main else ()
    before = {kind: signal.signal(kind, handler) for kind in kinds}
    try:
        yield handler
    finally:
        for kind, old in before.items():
            signal.signal(kind, old)


class Trained(NamedTuple):
    """A network whose training is done."""

    network: Any  # the averaged one: what is kept
    settings: training.FitSettings | training.DistillSettings
    seconds: float  # of training, those before an interruption included


def make_teacher(
    network: nn.Module, images: Images, settings: training.TeacherSettings,
    compute: Compute = PLAIN, checkpoint: Path | None = None, control: Control = Control(),
) -> Trained | None:  # fmt: skip
    """Train a teacher; None where the time was up. Without a checkpoint nothing is written."""
    run = training.FitRun(network, settings)
    prepare(run.network, compute)
    updater = Updater(compute, run.optimizer)
    made_of = {"data": images, "classes": images.classes}
    (images,) = _settle(run, compute, images)
    loop = training.train_teacher(run, images, updater)
    return _drive("teacher", run, loop, updater, checkpoint, control, made_of)


def make_student(
    teacher: nn.Module, settings: training.DistillSettings, pairs: Pairs | None,
    start: nn.Module | None = None, compute: Compute = PLAIN,
    checkpoint: Path | None = None, control: Control = Control(), images: Images | None = None,
    lora: int = 0,
) -> Trained | None:  # fmt: skip
    """Distil a teacher, from `start` where that is given; None where the time was up.

    The settings are those of a method: DMD's, or DMD2's, which needs images. With a rank `lora`
    student and critic are adapters on a text teacher, which `keep` merges.
    """
    judge = None
    if isinstance(settings, Dmd2Settings):
        judge = Judge(copy.deepcopy(training.unguided(teacher))).to(device_of(teacher))
    if lora and start is not None and not isinstance(start.denoiser, LowRank):
        raise ValueError("adapters start from the teacher itself: no start with lora")
    if lora:
        run = lora_run(teacher, settings, lora, start=start)
    else:
        run = training.DistillationRun(teacher, settings, start, judge)
    made_of: dict[str, Any] = {"teacher": teacher, "start": start, "pairs": pairs, "images": images}
    if says(teacher, "prompts"):
        made_of |= {name: identity(teacher)[name] for name in ("guidance", "prompts")}
        made_of["lora"] = lora
    images, pairs = _settle(run, compute, images, pairs)
    step = _iteration(settings, teacher, images, compute)
    prepare(run.generator, compute)
    prepare(run.critic, compute)
    if compute.frozen != "fp32":  # the caller's teacher stays exact
        run.teacher = copy.deepcopy(run.teacher)
    prepare(run.teacher, compute, frozen=True)
    updater = Updater(compute, run.generator_optimizer, run.critic_optimizer)
    iteration = partial(step, updater=updater)
    loop = training.distill(run, *image_shape(teacher), pairs, iteration=iteration)
    stage = "distil" if settings.matching else "warm start"
    return _drive(stage, run, loop, updater, checkpoint, control, made_of)


def _settle(run: Any, compute: Compute, *sets: Images | Pairs | None) -> list[Any]:
    """Where the compute asks for it, a run draws, and keeps its sets, where its networks are."""
    if not compute.on_device:
        return list(sets)
    run.draw_on(run.device)
    return [training.moved(run.device, each) if each else each for each in sets]


def _iteration(
    settings: training.DistillSettings, teacher: nn.Module, images: Images | None, compute: Compute
) -> Callable:
    """A method's iteration; what it cannot work with is refused."""
    if not isinstance(settings, Dmd2Settings):
        return dmd.iteration
    if images is None:
        raise ValueError("dmd2 needs real images, none are given")
    if compute.compile:
        raise ValueError("compile must be off with dmd2: its head reads inside of the critic")
    feature_layers(teacher)  # which the head reads
    return settings.step(images, *image_shape(teacher))


def make_student_in(
    folder: Path, teacher: nn.Module, warm_start: training.DistillSettings | None,
    settings: training.DistillSettings, pairs: Pairs | None, start: nn.Module | None,
    compute: Compute, control: Control, notes: Mapping[str, Any], images: Images | None = None,
    lora: int = 0,
) -> Trained | None:  # fmt: skip
    """Regression on the pairs, where a warm start is given, then the distillation; both kept."""
    both = {"warm-start": warm_start, "student": settings}
    stages = {name: stage for name, stage in both.items() if stage is not None}
    for stage in stages.values():  # what either refuses, or must download
        batches = filter(None, (stage.batch, stage.beside))
        split(tuple(map(torch.empty, batches)), compute.accumulation, Processes())
        stage.objective()
        _iteration(stage, teacher, images, compute)
    for name, stage in stages.items():
        beside = images if stage is settings else None
        how = compute, folder / f"{name}.ckpt", control, beside
        made = make_student(teacher, stage, pairs, start, *how, lora)
        if made is None:
            break
        keep(folder / name, made, notes)
        start, notes = made.network, {**notes, "warm_start_seconds": round(made.seconds, 1)}
    return made


def _drive(
    stage: str, run: training.FitRun | training.DistillationRun, loop: Iterator[training.Metrics],
    updater: Updater, checkpoint: Path | None, control: Control,
    made_of: Mapping[str, Any],
) -> Trained | None:  # fmt: skip
    """Go through a loop, watched, with checkpoints, which know what the run is made of.

    Where a person stops it, the state after the last step is kept before KeyboardInterrupt goes on.
    """
    settings, processes, earlier = run.settings, updater.processes, 0.0
    run.rank = processes.rank
    made_with: dict[str, Any] = {"settings": asdict(settings)}
    if checkpoint:
        made_with |= {name: _identity(of) for name, of in made_of.items()}
    if checkpoint and checkpoints.newest(checkpoint) and not control.fresh:
        state, kept = checkpoints.load_checkpoint(checkpoint, made_with)
        updater.load_state_dict(state.pop("updater"))
        run.load_state_dict(state)
        earlier = kept["seconds"]
        if run.step >= settings.steps and processes.first:
            print(f"{checkpoint}: all {run.step} steps are done, nothing is left (--fresh: again).")
    started = saved = time.monotonic()

    def seconds() -> float:
        return earlier + time.monotonic() - started

    def save() -> None:
        state = run.state_dict() | {"updater": updater.state_dict()}
        if checkpoint and processes.first:
            checkpoints.save_checkpoint(state, made_with | {"seconds": seconds()}, checkpoint)

    path = checkpoint.with_suffix("") if checkpoint else None
    shown = control.picture_steps, processes.first, says(run.average, "around")
    watch = monitor.Watch(stage, settings, path, run.step, *shown)
    try:
        with closing(watch), signals(Stop()) as stop:
            for metric in loop:
                watch(metric, seconds())
                if time.monotonic() - saved > 60 * control.checkpoint_minutes:
                    save()
                    saved = time.monotonic()
                out_of_time = time.monotonic() - started > 60 * control.minutes
                if processes.any(stop.asked > 0 or out_of_time):
                    break
            save()
            stopped = processes.any(stop.asked > 0)
    except NotFiniteError as error:
        mine = checkpoint if saved > started or not control.fresh else None  # or of a run before
        raise NotFiniteError(f"{error} ({checkpoints.last_good(mine)})") from error
    said = f"stopped at step {run.step} of {settings.steps}; the same command goes on"
    if stopped:
        raise KeyboardInterrupt(said if checkpoint else "stopped")
    if run.step < settings.steps:
        if processes.first:
            print(f"{said.capitalize()}.")
        return None
    return Trained(run.average, settings, seconds())


def _identity(of: Any) -> Any:
    """What a checkpoint knows a network, images or pairs by: how many, of what shape, a hash."""
    if isinstance(of, Images | Pairs):
        tensors = {name: t for name, t in of._asdict().items() if isinstance(t, Tensor)}
        return f"{len(of[0])} of {tuple(of[0].shape[1:])}, {fingerprint(tensors)}"
    return fingerprint(of) if isinstance(of, nn.Module) else of


def make_pairs_in(
    folder: Path, teacher: nn.Module, count: int, steps: int, seed: int = 0,
    batch: int = 1_000, minutes: float = math.inf, sampler: Callable = heun,
) -> bool:  # fmt: skip
    """Make the pairs that are not there yet, shared by the processes; False if the time was up."""
    processes, started = Processes(), time.monotonic()
    made = make_pairs(
        teacher, folder, count, *image_shape(teacher), steps=steps, seed=seed, batch=batch,
        share=(processes.rank, processes.count), sampler=sampler,
    )  # fmt: skip
    mine = len(processes.mine(count // 1_000)) * 1_000
    with monitor.counting(teacher, evaluations(sampler, steps), "pairs", mine) as bar:
        total = 0
        try:
            for total in made:
                bar.update(total - bar.n)  # those that were there, too
                if total < mine and time.monotonic() - started > 60 * minutes:
                    return False
        except KeyboardInterrupt:
            said = f"stopped with {total} of {mine} pairs; the same command goes on"
            raise KeyboardInterrupt(said) from None
    processes.wait()
    if processes.first:
        print(f"{count} pairs in {folder}, {time.monotonic() - started:.0f} s")
    return True


@torch.no_grad()
def draw(
    model: nn.Module, z: Tensor, label: Tensor | None, steps: int = 18, batch: int = 1_000
) -> Tensor:
    """A teacher's samples in `steps` Heun steps, or a student's in its own, on the CPU.

    Latents are decoded: pictures come back. Each process makes its share, and all get the whole.
    """
    model.eval()
    processes, device = Processes(), device_of(model)
    mine = processes.mine(len(z))
    z_mine = z.cpu()[mine].to(device)
    label_mine = None if label is None else label.cpu()[mine].to(device)
    student = hasattr(model, "evaluations")
    sampler = one_step if student else partial(sample, steps=steps)
    with monitor.counting(model, 1 if student else 2 * steps - 1, "samples", len(mine)):
        x = sampler(model, z_mine, label_mine, batch=batch)
    if (around := says(model, "around")) is not None:
        x = torch.cat([around.pictures(some) for some in x.split(batch)])
    return processes.gather(x.cpu(), len(z))


def picture_shape(model: nn.Module) -> tuple[int, int, int]:
    """The shape of what `draw` gives."""
    (channels, size, _), _ = image_shape(model)
    around = says(model, "around")
    return around.shape(size) if around is not None else (channels, size, size)


def noise(
    model: nn.Module, count: int, purpose: Purpose, seed: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Noise of one stream for a network's images, and balanced labels where it has classes."""
    shape, classes = image_shape(model)
    z = normal(count, shape, stream(purpose, seed))
    return z, balanced_labels(count, classes) if classes else None


def measure(
    model: nn.Module, x: Tensor, label: Tensor | None, reference: Tensor, features: str, steps: int
) -> dict:
    """What a model's samples are worth beside images or their features; a teacher made `steps`."""
    minimum, guided = min(10_000, len(x)), isinstance(model, Guided)
    result = metrics.evaluate(x, reference, label=label, features=features, minimum=minimum)
    plain = {name: getattr(v, "tolist", lambda v=v: v)() for name, v in result._asdict().items()}
    return {
        "fingerprint": fingerprint(model), "samples": len(x), "shape": list(x.shape[1:]),
        "evaluations": getattr(model, "evaluations", (2 * steps - 1) * (1 + guided)),
        "name": result.name, "result": plain, **provenance(),
    }  # fmt: skip


def keep(path: Path, trained: Trained, notes: Mapping[str, Any], half: bool = False) -> None:
    """Write a network (`half`: in 16 bits), what it was made with, and a hundred samples."""
    model = trained.network
    if isinstance(model, OneStepGenerator) and isinstance(model.denoiser, LowRank):
        model = OneStepGenerator(model.denoiser.merged(), model.sigma_max)
    z, label = noise(model, 100, "pictures")
    x = draw(model, z, label, steps=18, batch=100)
    if not Processes().first:
        return
    how = {"settings": asdict(trained.settings), "seconds": round(trained.seconds, 1)}
    made_by = {**how, **notes, **provenance()}
    weights, grid = path.with_suffix(".safetensors"), path.with_suffix(".png")
    kept = copy.deepcopy(model).half() if half else model
    pretrained.save_denoiser(weights, kept, **made_by)
    write_json(path.with_suffix(".json"), made_by)
    save_grid(x, grid)
    print(f"{weights} ({trained.seconds:.0f} s), {grid}")

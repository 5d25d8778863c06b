"""The command line, ``dmd``: a command is a dataclass, whose fields are its options.

Defaults are those of the preset that is named, or that the given network was made with. Every
command leaves its result on disk, see `pipeline`. A training that stopped continues with the same
command. `accelerate launch -m dmd_tutorial distill ...` shares the work among processes.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor, nn
from tyro.conf import OmitArgPrefixes, Positional, arg

from dmd_tutorial import __version__, pretrained, samplers
from dmd_tutorial.adapters import Guided
from dmd_tutorial.anchor import Pairs, load_pairs
from dmd_tutorial.checks import NO_CLASS, Checked, Count, CountOrNone, Must
from dmd_tutorial.data import seeded_noise
from dmd_tutorial.data.captioned import Scene, followed, scene_of
from dmd_tutorial.denoisers import image_shape, says, sigma_range
from dmd_tutorial.features import extract_features
from dmd_tutorial.files import check_writable, plain_json, write_json, write_tensors
from dmd_tutorial.generators import OneStepGenerator
from dmd_tutorial.runs import memory, pipeline
from dmd_tutorial.runs.compute import Compute, Processes
from dmd_tutorial.runs.images import load_images, save_grid
from dmd_tutorial.runs.pipeline import Control
from dmd_tutorial.runs.presets import PRESETS
from dmd_tutorial.runs.provenance import runs_folder
from dmd_tutorial.survey.score_distillation import Dmd2Settings, dmd2
from dmd_tutorial.training import DistillSettings, TeacherSettings

Model = Annotated[str, arg(aliases=["--teacher", "--student"])]
Some = Annotated[int | None, Must("at least 1, or None", lambda n: n is None or n >= 1)]
PresetName = Annotated[str, arg(metavar=f"{{{','.join(PRESETS)}}}")]
# settings of a distillation that hold for its warm start, too, where they are not the preset's
SHARED = ("batch", "batch_pairs", "distance", "weight_decay", "clip", "seed")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line: 0; 2 after an error that is the user's to mend; 130 where stopped."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments == ["--version"]:
        print(f"dmd {__version__}")
        return 0
    torch.set_flush_denormal(True)  # tiny numbers are slow on CPUs and change nothing
    torch.backends.cudnn.benchmark = True  # a GPU tries convolutions: shapes stay as they are
    try:
        with pipeline.signals(signal.default_int_handler):
            parse(arguments).run(f"dmd {shlex.join(arguments)}")
    except KeyboardInterrupt as stopped:
        if os.environ.get("RANK", "0") == "0":  # the first of several processes
            print(f"dmd {arguments[0]}: {str(stopped) or 'stopped'}", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        print(f"dmd {arguments[0]}: {error}", file=sys.stderr)
        return 2
    return 0


def parse(arguments: list[str]) -> Any:
    """The command that is asked for, with the options given and the preset's."""
    given = _scan(arguments)
    made = commands_of(_preset_name(given, arguments), method=given.method)
    commands: Any = tyro.extras.subcommand_type_from_defaults(made)
    about = "Distribution matching distillation, from a teacher to a measured student (--version)."
    return tyro.cli(commands, prog="dmd", description=about, args=arguments)


def seeds_of(text: str) -> list[int]:
    """Seeds from ``0-63`` or ``1,2,10-12``: numbers and ranges, both ends included."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"seeds are written like 0-63 or 1,2,10-12, not {text!r}")
        some = range(int(first), int(last if dash else first) + 1)
        if not some:
            raise ValueError(f"the seeds {part} end before they begin")
        seeds += some
    return seeds


@dataclass(frozen=True, kw_only=True)
class Placed(Checked):
    """What most commands share."""

    # table of settings to start from: own-images where data is given, otherwise the one that the
    # given network was made with
    preset: PresetName
    device: str  # where networks run
    # code of your own that makes a denoiser, package.module:factory: the network of files that hold
    # its weights
    network: str | None = None

    @property
    def place(self) -> str:
        """The device; each of several processes has its own."""
        return str(Processes().device or self.device)

    def load(self, name: str, student: bool | None = None) -> Any:
        """A network on its device; where one of the two is wanted, the other is refused."""
        network = pretrained.load(self.network) if self.network else None
        loaded = pretrained.load(name, network).to(self.place)
        if student is not None and isinstance(loaded, OneStepGenerator) != student:
            kinds = "teacher", "student"
            raise ValueError(f"{name} is no {kinds[student]}, but a {kinds[not student]}")
        return loaded


@dataclass(frozen=True, kw_only=True)
class Prompting(Placed):
    """What commands share whose model may be one of text."""

    # a text model's prompts, one a line, which become its classes; without it those it knows
    prompts: Path | None = None
    # scale of a text teacher's guidance, which multiplies: 1 for none; None for the preset's
    guidance: float | None = None

    @property
    def told(self) -> Sequence[str] | None:
        """The prompts to tell a model."""
        if self.prompts is None:
            return None
        lines = self.prompts.read_text(encoding="utf-8").splitlines()
        if not (told := [line.strip() for line in lines if line.strip()]):
            raise ValueError(f"{self.prompts} holds no prompts, one a line is wanted")
        return told

    def load(self, name: str, student: bool | None = None) -> Any:
        """A text model is told its prompts, and a teacher guided."""
        model, told = super().load(name, student), self.told
        if (tell := says(model, "tell")) is None:
            if told is not None or self.guidance not in (None, 1):
                raise ValueError(f"{name} is no text model: it takes no prompts and no guidance")
            return model
        if told is not None:
            tell(told)
        if not says(model, "prompts"):
            raise ValueError(f"{name} knows no prompts yet: give them, --prompts FILE")
        if not isinstance(model, OneStepGenerator):
            scale = PRESETS[self.preset].guidance if self.guidance is None else self.guidance
            return model if scale == 1 else Guided(model, scale, NO_CLASS)
        if self.guidance is not None:
            raise ValueError(f"{name} is a student, which has its teacher's guidance within")
        return model


@dataclass(frozen=True, kw_only=True)
class TrainTeacher(Placed):
    """Train a teacher on the preset's data, or on your own images."""

    data: str  # images: a folder, a zip, or a data set's name
    size: Count  # their height and width in pixels
    out: Path  # folder of the results
    control: OmitArgPrefixes[Control]
    settings: OmitArgPrefixes[TeacherSettings]
    compute: OmitArgPrefixes[Compute]

    def run(self, command: str) -> None:
        check_writable(self.out)
        table = PRESETS[self.preset]
        colours = table.shape[0] if self.data == table.data else None  # or as they are
        images = load_images(self.data, self.size, colours)
        made_for: dict = {"shape": tuple(images.x.shape[1:]), "classes": images.classes}
        preset = replace(table, teacher=self.settings, **made_for)
        network = preset.new_teacher().to(self.place)
        needs = partial(memory.teacher_memory, network, self.settings.batch)
        memory.say(needs, self.compute, self.place)
        how = self.settings, self.compute, self.out / "teacher.ckpt", self.control
        made = pipeline.make_teacher(network, images, *how)
        if made is not None:
            notes = {"command": command, "preset": self.preset, "data": self.data,
                     "images": len(images.x), "class_names": images.class_names}  # fmt: skip
            pipeline.keep(self.out / "teacher", made, notes)


@dataclass(frozen=True, kw_only=True)
class MakePairs(Prompting):
    """Make pairs (z, y) with the teacher's ODE sampler."""

    teacher: str  # a shipped or published name, a file, or package.module:factory
    pairs: Path  # folder of the pairs
    count: Count  # number of pairs, a multiple of 1000
    steps: Count  # per pair; N of heun cost 2N-1 evaluations
    sampler: Literal["heun", "euler", "ddim", "pndm"]
    seed: int = 0  # seed of the noise
    batch: Count  # made at a time: a matter of memory

    def run(self, command: str) -> None:
        teacher = self.load(self.teacher, student=False)
        check_writable(self.pairs)
        how = self.count, self.steps, self.seed, self.batch
        sampler = getattr(samplers, self.sampler)
        pipeline.make_pairs_in(self.pairs, teacher, *how, sampler=sampler)


@dataclass(frozen=True, kw_only=True)
class Distill(Prompting):
    """Distil a teacher into a student: regression on the pairs, then DMD; or DMD2, on images."""

    # dmd: with an anchor on pairs; dmd2: without pairs, with a head on the critic that tells real
    # images from samples; a method brings settings of its own
    method: Literal["dmd", "dmd2"]
    data: str  # dmd2's images: a folder, a zip, or a data set's name; read at the teacher's size
    teacher: str  # a shipped or published name, a file, or package.module:factory
    pairs: Path  # folder of the pairs
    count: Some = None  # use only so many pairs; None for all
    start: str | None = None  # student (.safetensors) to start from, without warm start
    # steps of regression on the pairs first, 0 for none; where batch, batch-pairs, distance,
    # weight-decay, clip and seed are not the preset's, they hold for it, too
    warm_start_steps: CountOrNone
    lora: CountOrNone  # rank of adapters that student and critic are; 0: networks of their own
    out: Path  # folder of the results
    control: OmitArgPrefixes[Control]
    settings: OmitArgPrefixes[DistillSettings]
    compute: OmitArgPrefixes[Compute]

    def run(self, command: str) -> None:
        settings, teacher = self.settings, self.load(self.teacher, student=False)
        start = None if self.start is None else self.load(self.start, student=True)
        if start is not None and (prompts := says(teacher, "prompts")) and says(start, "tell"):
            says(start, "tell")(prompts)  # whatever it was told before
        if start is not None and image_shape(start) != image_shape(teacher):
            raise ValueError(f"{self.start} makes other images or classes than {self.teacher}")
        if start is not None and start.sigma_max != sigma_range(teacher)[1]:
            levels = f"{start.sigma_max:g}, the teacher's range ends at {sigma_range(teacher)[1]:g}"
            raise ValueError(f"{self.start} starts from level {levels}")
        warm = self.warm_start if start is None and self.warm_start_steps else None
        pairs = self.load_pairs(teacher) if settings.lambda_reg or warm is not None else None
        (colours, size, _), _ = image_shape(teacher)
        real = isinstance(settings, Dmd2Settings)
        if real and says(teacher, "around") is not None:
            raise ValueError("dmd2 reads images, a text teacher works in latents: --method dmd")
        images = load_images(self.data, size, colours) if real else None
        needs = partial(memory.largest, teacher, [warm, settings], lora=self.lora)
        memory.say(needs, self.compute, self.place)
        check_writable(self.out)
        notes = {
            "command": command, "preset": self.preset, "method": self.method,
            "pairs": len(pairs.z) if pairs else 0, "images": len(images.x) if images else 0,
            "class_names": _made_by(self.teacher).get("class_names", ()),
        }  # fmt: skip
        how = self.compute, self.control, notes, images, self.lora
        pipeline.make_student_in(self.out, teacher, warm, settings, pairs, start, *how)

    @property
    def warm_start(self) -> DistillSettings:
        """The preset's regression, with what was given here and is meant for both."""
        table = PRESETS[self.preset]
        if table.warm_start is None:
            raise ValueError(f"the preset {self.preset} has no warm start: --warm-start-steps 0")
        values = {name: getattr(self.settings, name) for name in SHARED}
        given = {
            name: value for name, value in values.items() if value != getattr(table.distill, name)
        }
        return replace(table.warm_start, steps=self.warm_start_steps, **given)

    def load_pairs(self, teacher: nn.Module) -> Pairs:
        """The pairs; where they are not there, or another teacher's, what makes them."""
        try:
            return load_pairs(self.pairs, teacher, self.count)
        except (OSError, ValueError) as error:
            folder = "another_folder" if "was made with" in str(error) else self.pairs
            values = {
                "preset": self.preset, "teacher": self.teacher, "network": self.network,
                "pairs": folder, "count": self.count and -(-self.count // 1000) * 1000,
                "prompts": self.prompts, "guidance": self.guidance,
            }  # fmt: skip
            given = shlex.join(f"--{name}={value}" for name, value in values.items() if value)
            makes = f"dmd make-pairs {given} makes pairs of this teacher"
            raise ValueError(f"{error}; {makes}") from error


@dataclass(frozen=True, kw_only=True)
class Drawing(Prompting):
    """What draws samples."""

    model: Model  # a shipped or published name, a file, or package.module:factory
    count: Count  # number of samples, classes balanced
    steps: Count = 18  # Heun steps of a teacher; N cost 2N-1 evaluations
    seed: int = 0  # seed of the noise, which is neither a training's nor that of pairs
    batch: Count = 500  # made at a time: a matter of memory

    def drawn(self, model: nn.Module, z: Tensor, label: Tensor | None) -> tuple[Tensor, float]:
        started = time.monotonic()
        return pipeline.draw(model, z, label, self.steps, self.batch), time.monotonic() - started


@dataclass(frozen=True, kw_only=True)
class Sample(Drawing):
    """Draw samples from a teacher or a student."""

    # one seed per sample, such as 0-63, instead of --count and --seed: noise and class of each come
    # from its own generator on the device, as in EDM
    seeds: str | None = None
    # class of every sample, its number or its name; None for balanced ones, or drawn
    label: int | str | None = None
    prompt: str | None = None  # of every sample of a text model
    out: Path  # file to write, its ending is chosen for you

    @property
    def told(self) -> Sequence[str] | None:
        return super().told if self.prompt is None else [self.prompt]

    def run(self, command: str) -> None:
        model = self.load(self.model)
        if self.seeds is not None:
            shape, classes = image_shape(model)
            z, label = seeded_noise(seeds_of(self.seeds), shape, classes, self.place)
        else:
            z, label = pipeline.noise(model, self.count, "pictures", self.seed)
        if self.label is not None:
            if label is None:
                raise ValueError(f"{self.model} has no classes, label is {self.label}")
            names = says(model, "prompts") or _made_by(self.model).get("class_names", [])
            label = torch.full_like(label, number_of(self.label, names))
        check_writable(self.out.parent)
        x, seconds = self.drawn(model, z, label)
        if not Processes().first:
            return
        grid = self.out.with_suffix(".png")
        save_grid(x[:100], grid)
        tensors = {"x": x} if label is None else {"x": x, "label": label}
        write_tensors(self.out.with_suffix(".safetensors"), tensors)
        print(f"{len(x)} samples in {seconds:.1f} s, {grid}")


@dataclass(frozen=True, kw_only=True)
class Evaluate(Drawing):
    """Measure a teacher or a student against the data."""

    data: str  # images: a folder, a zip, or a data set's name; read at the model's own size
    size: int | None = None  # height and width of the model's images, if that is to be checked
    features: str  # of what is compared: digits, inception, or a classifier's file
    out: Path | None = None  # JSON file to write; printed only, without one

    def run(self, command: str) -> None:
        model = self.load(self.model)
        shape = pipeline.picture_shape(model)
        prompts = says(model, "prompts") if self.features == "shapes" else None
        asked = scene_of(prompts) if prompts else None
        if self.size not in (None, shape[1]):
            raise ValueError(f"{self.model} makes images of {shape[1]} pixels, size is {self.size}")
        reference = self.reference(shape) if Processes().first else None  # before hours of drawing
        z, label = pipeline.noise(model, self.count, "evaluation", self.seed)
        x, seconds = self.drawn(model, z, label)
        if reference is None:
            return
        speed = round(len(x) / seconds, 1)
        drawn = {"seed": self.seed, "data": self.data, "images_per_second": speed}
        measured = pipeline.measure(model, x, label, reference, self.features, self.steps)
        report = {"model": self.model, **drawn, **measured}
        if asked is not None:
            report["followed"] = followed(x, Scene(*(each[label] for each in asked)))
        if self.out:
            write_json(self.out, report)
        print(plain_json(report, indent=1))

    def reference(self, shape: tuple[int, int, int]) -> Tensor:
        if self.out:
            check_writable(self.out.parent)
        with redirect_stdout(sys.stderr):  # what is printed is the report alone
            images = load_images(self.data, shape[1], shape[0]).x
        if images.shape[1:] != shape or len(images) < 4:
            found = f"{self.data} has {len(images)} images of shape {tuple(images.shape[1:])}"
            raise ValueError(f"{found}: at least 4 of shape {shape} are wanted")
        return extract_features(images, self.features)


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Go the whole way in minutes: teacher, pairs, distillation, a one-step grid."""

    device: str  # where networks run
    out: Path  # folder of the results
    fresh: bool = False  # start over instead of continuing

    def run(self, command: str) -> None:
        started = time.monotonic()
        stages = commands_of("demo", self.device, self.out, Control(fresh=self.fresh))
        for number, name in enumerate(("train-teacher", "make-pairs", "distill"), 1):
            print(f"[{number}/3] dmd {name}")
            stages[name].run(command)
        minutes = (time.monotonic() - started) / 60
        print(f"One-step samples: {self.out / 'student.png'} (the teacher's, in 35 evaluations: "
              f"{self.out / 'teacher.png'}), {minutes:.1f} minutes in all")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Presets:
    """Print what the presets hold."""

    def run(self, command: str) -> None:
        print("\n\n".join(f"{name}\n{preset}" for name, preset in PRESETS.items()))


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Run a chapter's tests and its notebook; needs a clone of the book."""

    chapter: Positional[int]  # number of the chapter
    book: Path = Path()  # folder of the clone

    def run(self, command: str) -> None:
        wanted = f"book/{self.chapter}-*.ipynb"
        notebooks = sorted(self.book.glob(wanted))
        if not notebooks:
            raise FileNotFoundError(f"{self.book} holds no {wanted}: give --book")
        tests = self.book.glob(f"tests/test_chapter{self.chapter}.py")
        pytest = [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-current-env"]
        environment = os.environ | {"DMD_TUTORIAL_STATIC": "1"}
        if subprocess.run([*pytest, *tests, *notebooks], env=environment).returncode:
            raise RuntimeError(f"chapter {self.chapter}: a claim does not hold, see above")


def commands_of(
    name: str, device: str = "", folder: Path | None = None, control: Control | None = None,
    method: str = "dmd",
) -> dict[str, Any]:  # fmt: skip
    """Every command with a preset's defaults, for results in a folder, ``runs/<preset>``."""
    preset, folder = PRESETS[name], folder or runs_folder() / name
    teacher, student = (
        f"digits-{kind}" if name == "digits" else str(folder / f"{kind}.safetensors")
        for kind in ("teacher", "student")
    )
    settings = dmd2(preset.distill) if method == "dmd2" else preset.distill
    warm_start = preset.warm_start if method == "dmd" else None
    options = {  # which mean the same to every command that has them
        "preset": name, "device": device or ("cuda" if torch.cuda.is_available() else "cpu"),
        "data": preset.data, "teacher": preset.published or teacher, "pairs": folder / "pairs",
        "out": folder, "control": control or Control(), "compute": preset.compute,
        "model": student,
    }  # fmt: skip

    def made(kind: type, **own: Any) -> Any:
        return kind(**{f.name: options[f.name] for f in fields(kind) if f.name in options} | own)

    return {
        "train-teacher": made(TrainTeacher, size=preset.shape[1], settings=preset.teacher),
        "make-pairs": made(
            MakePairs, count=preset.pairs, steps=preset.pair_steps, batch=preset.pair_batch,
            sampler=preset.pair_sampler,
        ),
        "distill": made(
            Distill, method=method, settings=settings, lora=preset.lora,
            warm_start_steps=warm_start.steps if warm_start else 0,
        ),
        "sample": made(Sample, count=100, out=folder / "samples"),
        "evaluate": made(Evaluate, count=10_000, features=preset.features, out=None),
        "demo": made(Demo, out=runs_folder() / "demo"),
        "presets": Presets(), "verify": Verify(chapter=tyro.MISSING),
    }  # fmt: skip


def _scan(arguments: list[str]) -> argparse.Namespace:
    """The options on which the defaults of others depend."""
    scan = argparse.ArgumentParser(prog="dmd", add_help=False, allow_abbrev=False)
    scan.add_argument("--preset")
    scan.add_argument("--data")
    scan.add_argument("--method", default="dmd")
    scan.add_argument("--model", "--teacher", "--student")
    return scan.parse_known_args(arguments)[0]


def _preset_name(given: argparse.Namespace, arguments: list[str]) -> str:
    """The preset that is named, or the one that the given network or data belong to."""
    if given.preset not in (None, *PRESETS):
        raise ValueError(f"there is no preset {given.preset!r}, but {', '.join(PRESETS)}")
    if given.preset is not None:
        return given.preset
    if given.data is not None and arguments[0] == "train-teacher":
        return "own-images"
    teachers = {preset.published: name for name, preset in reversed(PRESETS.items())}
    model = given.model or "digits-teacher"
    made_with = teachers.get(model) or _made_by(model).get("preset")
    return made_with if made_with in PRESETS else "digits"


def _made_by(network: str) -> dict:
    """How a network was made, where its file is one of ours."""
    ours = Path(network).suffix == ".safetensors" and Path(network).exists()
    return pretrained.made_by(network) if ours else {}


def number_of(label: int | str, names: list[str]) -> int:
    """The number of a class that is given by number or name."""
    if isinstance(label, int):
        return label
    if label not in names:
        known = ", ".join(names) or "without names: give a number"
        raise ValueError(f"there is no class {label!r}; the classes are {known}")
    return names.index(label)

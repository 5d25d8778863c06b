"""The options of the command line: what can be asked for, with the defaults and their reasons."""

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch

from dmd_tutorial.runs.compute import Compute
from dmd_tutorial.runs.presets import PRESETS
from dmd_tutorial.training import DistillSettings, TeacherSettings

Command = Callable[[argparse.Namespace], None]


def build_parser(commands: Mapping[str, Command], description: str) -> argparse.ArgumentParser:
    """The parser of ``dmd``.

    Args:
        commands: Name of each command and what runs it; its docstring becomes its help.
        description: One line about the program.

    Returns:
        A parser whose result holds `run`, the command's function.
    """
    parser = argparse.ArgumentParser(prog="dmd", description=description)
    chosen = parser.add_subparsers(dest="command", required=True)
    for name, function in commands.items():
        command = chosen.add_parser(name, help=function.__doc__, description=function.__doc__)
        command.set_defaults(run=function, arguments=sys.argv[1:])
        _OPTIONS[name](command)
    return parser


def overridden(defaults: Any, options: argparse.Namespace) -> Any:
    """A preset's settings with what the command line says otherwise.

    Args:
        defaults: Settings, a dataclass.
        options: Parsed options, None where one was not given.

    Returns:
        Settings of the same class.
    """
    given = {f.name: getattr(options, f.name, None) for f in fields(defaults)}
    return replace(defaults, **{name: v for name, v in given.items() if v is not None})


def seeds_of(text: str) -> list[int]:
    """Seeds from ``0-63`` or ``1,2,10-12``.

    Args:
        text: Numbers and ranges (both ends included), separated by commas.

    Returns:
        The seeds in that order.

    Raises:
        ValueError: If it is neither.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"seeds are written like 0-63 or 1,2,10-12, not {text!r}")
        seeds += range(int(first), int(last if dash else first) + 1)
    return seeds


# --- the commands' options -----------------------------------------------------------------------


def _train_teacher(c: argparse.ArgumentParser) -> None:
    _place(c)
    _data(c)
    _training(c)
    _settings(c, TeacherSettings)


def _make_pairs(c: argparse.ArgumentParser) -> None:
    _place(c)
    _teacher(c)
    _pairs(c)
    c.add_argument("--count", type=int, help="number of pairs, a multiple of 1000 (preset's)")
    c.add_argument("--steps", type=int, help="Heun steps per pair; N cost 2N-1 evaluations (18)")
    c.add_argument("--seed", type=int, default=0, help="seed of the noise (%(default)s)")
    c.add_argument("--batch", type=int, help="made at a time: a matter of memory (preset's)")


def _distill(c: argparse.ArgumentParser) -> None:
    _place(c)
    _teacher(c)
    _pairs(c)
    c.add_argument("--count", type=int, help="use only so many pairs (all)")
    c.add_argument("--start", help="student (.safetensors) to start from, without warm start")
    c.add_argument(
        "--warm-start-steps",
        type=int,
        help="steps of regression on the pairs first; 0: none (preset's)",
    )
    _training(c)
    _settings(c, DistillSettings)


def _sample(c: argparse.ArgumentParser) -> None:
    _drawing(c, count=100)
    c.add_argument(
        "--seeds",
        help="one seed per sample, such as 0-63, instead of --count: noise "
        "and class of each come from its own generator on the device, as in EDM",
    )
    c.add_argument("--label", type=int, help="the class of every sample (balanced, or drawn)")
    c.add_argument(
        "--out", help="file to write, its ending is chosen for you (runs/<preset>/samples)"
    )


def _evaluate(c: argparse.ArgumentParser) -> None:
    _drawing(c, count=10_000)
    _data(c)
    c.add_argument("--features", help="digits, inception, or a classifier's file (preset's)")
    c.add_argument("--out", help="file to write, its ending is chosen for you")


def _demo(c: argparse.ArgumentParser) -> None:
    _device(c)
    c.add_argument("--out", help="folder of the results (runs/demo)")
    c.add_argument("--fresh", action="store_true", help="start over instead of continuing")


def _verify(c: argparse.ArgumentParser) -> None:
    c.add_argument("chapter", type=int, help="number of the chapter")
    c.add_argument("--book", default=".", help="folder of the clone (%(default)s)")


def _survey(c: argparse.ArgumentParser) -> None:
    c.add_argument("--tasks", nargs="+", default=["ring", "digits"], help="of: %(default)s")
    c.add_argument("--methods", nargs="+", help="names, as in the table (all)")
    c.add_argument("--seeds", default="0-2", help="of the trainings (%(default)s)")
    c.add_argument("--passes", type=float, help="budget of a training (each task's own)")
    c.add_argument("--out", help="the file that grows, JSON (runs/survey.json)")


_OPTIONS = {
    "train-teacher": _train_teacher,
    "make-pairs": _make_pairs,
    "distill": _distill,
    "sample": _sample,
    "evaluate": _evaluate,
    "demo": _demo,
    "verify": _verify,
    "survey": _survey,
}


# --- what several of them share ------------------------------------------------------------------


def _device(c: argparse.ArgumentParser) -> None:
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    c.add_argument("--device", default=gpu, help="where networks run (here: %(default)s)")


def _place(c: argparse.ArgumentParser) -> None:
    _device(c)
    c.add_argument(
        "--preset",
        choices=PRESETS,
        help="table of settings to start from (digits; "
        "own-images with --data; otherwise the one the network was made with)",
    )


def _data(c: argparse.ArgumentParser) -> None:
    c.add_argument("--data", help="images: a folder, a zip, or a data set's name (preset's)")
    c.add_argument("--size", type=int, help="their height and width in pixels (preset's)")


def _teacher(c: argparse.ArgumentParser) -> None:
    c.add_argument("--teacher", help="a shipped or published name, or a file (the preset's)")


def _pairs(c: argparse.ArgumentParser) -> None:
    c.add_argument("--pairs", help="folder of the pairs (runs/<preset>/pairs)")


def _drawing(c: argparse.ArgumentParser, count: int) -> None:
    _place(c)
    c.add_argument(
        "--model",
        "--teacher",
        "--student",
        dest="model",
        default="digits-student",
        help="a shipped or published name, or a file (%(default)s)",
    )
    c.add_argument(
        "--count", type=int, default=count, help="number of samples, classes balanced (%(default)s)"
    )
    c.add_argument(
        "--steps",
        type=int,
        default=18,
        help="Heun steps of a teacher; N cost 2N-1 evaluations (%(default)s)",
    )
    c.add_argument("--seed", type=int, default=0, help="seed of the noise (%(default)s)")
    c.add_argument("--batch", type=int, default=500, help="made at a time (%(default)s)")


def _training(c: argparse.ArgumentParser) -> None:
    c.add_argument("--out", help="folder of the results (runs/<preset>)")
    c.add_argument("--fresh", action="store_true", help="start over instead of continuing")
    c.add_argument(
        "--checkpoint-minutes",
        type=float,
        default=2.0,
        help="minutes between two checkpoints (%(default)s)",
    )
    c.add_argument(
        "--minutes", type=float, help="stop after so many minutes, saved; the same command goes on"
    )
    c.add_argument(
        "--picture-steps",
        type=int,
        default=500,
        help="steps between two pictures of G, D_real and D_fake (%(default)s)",
    )
    _settings(c, Compute)


def _settings(command: argparse.ArgumentParser, settings: type) -> None:
    """An option for each field of a settings class, explained by its docstring."""
    explained = _attribute_docs(settings)
    for f in fields(settings):
        kind: dict[str, Any] = {"type": type(f.default)}
        if isinstance(f.default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        command.add_argument(
            f"--{f.name.replace('_', '-')}",
            **kind,
            default=None,
            help=f"{explained[f.name]} (preset's)",
        )


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

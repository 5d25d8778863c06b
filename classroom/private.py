"""Exercises that only the grader sees: a file with `EXERCISES` and, for the hand-out, `TASKS`.

`EXERCISES` is a list of the book's `Exercise`. A number of its own, such as "3.P1", adds to
chapter 3; a number of the book puts another check in the place of the book's. `TASKS` maps each new
number to its text and its stub: `{"3.P1": ("### Exercise 3.P1: ...", "def f(x): ...")}`.
"""

from pathlib import Path
from types import ModuleType

from dmd_tutorial.notebook.exercises import Exercise


def executed(source: str) -> ModuleType:
    """Return the module that the source makes; no import finds it."""
    module = ModuleType("private_exercises")
    exec(compile(source, "private_exercises", "exec"), vars(module))
    return module


def is_exercise(value: object) -> bool:
    """Return whether a value is one of the book's exercises."""
    return isinstance(value, Exercise)


def load(path: Path) -> tuple[dict[str, Exercise], dict[str, tuple[str, str]]]:
    """Return the exercises and the tasks of a file.

    Raises:
        ValueError: the file is not there, or is no such file.
    """
    try:
        module = executed(path.read_text(encoding="utf8"))
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    exercises, tasks = (getattr(module, name, None) for name in ("EXERCISES", "TASKS"))
    if not (isinstance(exercises, list) and exercises and all(map(is_exercise, exercises))):
        raise ValueError(f"{path} has no EXERCISES, a list of the book's Exercise")
    numbers = [each.number for each in exercises]
    for number in numbers:
        if not number.partition(".")[0].isdecimal() or numbers.count(number) > 1:
            raise ValueError(f"{path}: {number!r} is not a chapter, a point and a name, once")
    if stray := set(tasks or {}) - set(numbers):
        raise ValueError(f"{path} has tasks without an exercise: {sorted(stray)}")
    return {each.number: each for each in exercises}, dict(tasks or {})

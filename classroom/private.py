"""Exercises that only the grader sees: a file with `EXERCISES` and, for the hand-out, `TASKS`.

`EXERCISES` is a list of the book's `Exercise`. A number of its own, such as "3.P1", adds to
chapter 3; a number of the book puts another check in the place of the book's. `TASKS` maps each new
number to its text and its stub: `{"3.P1": ("### Exercise 3.P1: ...", "def f(x): ...")}`.
"""

import ast
from pathlib import Path
from types import ModuleType

from dmd_tutorial.notebook.exercises import Exercise


def executed(source: str) -> ModuleType:
    """Return the module that the source makes; no import finds it."""
    module = ModuleType("private_exercises")
    exec(compile(source, "private_exercises", "exec"), vars(module))
    return module


def without_answers(source: str) -> str:
    """Return the source without right and wrong answers, and without what only they need.

    The process that runs answers reads this: no search of its memory finds what is not there.
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Exercise"):
            node.args[2:4] = [ast.Constant(None) for _ in node.args[2:4]]
            for keyword in node.keywords:
                if keyword.arg in ("truth", "mistakes"):
                    keyword.value = ast.Constant(None)
    wanted, before = {"EXERCISES"}, set[str]()
    while wanted != before:
        before = wanted
        kept = [node for node in tree.body if bound(node) & wanted]
        wanted = wanted.union(*map(names_in, kept))
    return ast.unparse(ast.Module(kept, []))


def names_in(tree: ast.AST) -> set[str]:
    """Return all names of a piece of code."""
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def bound(node: ast.stmt) -> set[str]:
    """Return the names that a statement of a module binds, or may change."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    if isinstance(node, ast.Assign | ast.AnnAssign):
        stored = [n for n in ast.walk(node) if isinstance(getattr(n, "ctx", None), ast.Store)]
        return set().union(*map(names_in, stored))
    return names_in(node)


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

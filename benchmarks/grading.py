"""How long a class takes to grade: made submissions of chapters 1 to 6, graded, and extrapolated.

    python -m benchmarks.grading --students 8

Of the answers three in four are right, the others wrong, open, endless or greedy. What counts is
the processor's time: it says what two free cores take, also where the machine is not free.
"""

import argparse
import ast
import json
import random
import resource
import tempfile
import time
from pathlib import Path

import torch

from classroom import grade, hand_out, sandbox, submissions
from dmd_tutorial.notebook import exercises

# isort: split
import book_source

CLASS, CORES = 200, 2
ALONE = hand_out.Options(exercises_only=True)
KINDS = {  # how often, and the function that is handed in
    "wrong": (12, "def {0}(*given):\n    return given[0]\n"),
    "open": (8, "def {0}(*given):\n    return ...\n"),
    "raises": (3, "def {0}(*given):\n    return given[99]\n"),
    "endless": (1, "def {0}(*given):\n    while True:\n        pass\n"),
    "greedy": (1, "def {0}(*given):\n    return torch.ones(2**40)\n"),
    "right": (75, None),
}


def solved(path: Path) -> dict[str, str]:
    """Return code that answers each exercise of a chapter, from its solution cells."""
    notebook, found = book_source.read_notebook(path), {}
    stubs = [cell for cell in notebook["cells"] if "solution" not in book_source.tags(cell)]
    names = dict(answer for cell in stubs for answer in hand_out.answer_of(cell))
    for cell in notebook["cells"]:
        if "solution" not in book_source.tags(cell):
            continue
        tree = ast.parse(book_source.source(cell))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        number, answer = next(c.args for c in calls if ast.unparse(c.func) == "check")
        kept = [
            ast.unparse(node)
            for node in tree.body
            if isinstance(node, ast.FunctionDef)
            or (
                isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == ast.unparse(answer)
            )
        ]
        number = ast.literal_eval(number)
        name = names[number]
        ending = [f"{name} = {ast.unparse(answer)}", f'check("{number}", {name})']
        found[number] = "\n".join([*kept, *ending])
    return found


def filled(notebook: book_source.Notebook, answers: dict) -> book_source.Notebook:
    """Return a hand-out with code in the place of its stubs; None deletes a cell."""
    kept = []
    for cell in notebook["cells"]:
        text = book_source.source(cell)
        for number, _ in hand_out.answer_of(cell):
            text = answers.get(number, text)
        if text is not None:
            kept.append(cell | {"source": text})
    return notebook | {"cells": kept}


def make(folder: Path, students: int) -> None:
    """Write the submissions of a class."""
    draw = random.Random(0)
    weights = [often for often, _ in KINDS.values()]
    chapters = book_source.chapters()[:6]
    made = {path: (hand_out.hand_out(path, ALONE), solved(path)) for path in chapters}
    for student in range(students):
        (folder / f"student-{student}").mkdir(parents=True)
        for path, (notebook, right) in made.items():
            answers = {}
            for number, text in right.items():
                (kind,) = draw.choices([*KINDS], weights)
                name = notebook["metadata"]["dmd_tutorial"]["answers"][number]
                call = f'check("{number}", {name})'
                answers[number] = text if kind == "right" else KINDS[kind][1].format(name) + call
            text = json.dumps(filled(notebook, answers))
            (folder / f"student-{student}" / path.name).write_text(text)


def spent() -> float:
    """Return the processor's seconds so far, of this process and of those that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--students", type=int, default=CLASS)
    parser.add_argument("--workers", type=int, default=CORES)
    arguments = parser.parse_args()
    if arguments.students < 2:
        parser.error("two students at least: what one more takes is wanted")
    torch.set_num_threads(1)
    numbers = {e.number: e for chapter in exercises.chapters().values() for e in chapter}
    trusted = sandbox.missing() is not None
    grader = grade.Grader(numbers, submissions.book({}), workers=arguments.workers, trusted=trusted)
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder, "few"), 1)
        make(Path(folder, "many"), arguments.students)
        used, began = [spent()], time.monotonic()
        for name in ("few", "many"):
            grades = grader.grades(Path(folder, name))
            used.append(spent())
    print(f"{grade.summary(grades)}{'; without bubblewrap' if trusted else ''}")
    few, many = used[1] - used[0], used[2] - used[1]
    each = (many - few) / (arguments.students - 1)
    whole = few + (CLASS - 1) * each
    print(f"{time.monotonic() - began:.0f} s by the clock")
    print(f"one student: {few:.1f} s of processor time; {arguments.students}: {many:.1f} s")
    print(f"{CLASS} students: {whole:.0f} s of processor time (each more: {each:.2f} s),")
    print(f"that is {whole / CORES / 60:.1f} minutes on {CORES} free cores")


if __name__ == "__main__":
    main()

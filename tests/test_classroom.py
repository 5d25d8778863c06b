"""What instructors use: the hand-outs, and the grader against everything that is handed in.

The submissions are made here. Each says what the grader must answer for it, exercise by exercise.
"""

import ast
import builtins
import csv
import io
import json
import math
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import book_source
import cells
import nbformat
import numpy as np
import pytest
import torch

from benchmarks.grading import filled, solved
from classroom import (
    child,
    grade,
    hand_out,
    outcomes,
    private,
    private_example,
    sandbox,
    submissions,
)
from classroom.grade import Grader, Limits
from classroom.hand_out import Options
from dmd_tutorial.notebook import exercises as framework
from dmd_tutorial.notebook.exercises import Exercise

CHAPTERS = book_source.chapters()
EVERY_CHAPTER = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
EXERCISES = {e.number: e for chapter in framework.chapters().values() for e in chapter}
PRIVATE = private.Path(private_example.__file__)
ALONE = Options(exercises_only=True)
source, tags = book_source.source, book_source.tags


def code(notebook):
    return [source(cell) for cell in notebook["cells"] if cell["cell_type"] == "code"]


@cache
def alone(path, **changes):
    """The exercises of a chapter."""
    return hand_out.hand_out(path, ALONE._replace(**changes))


# Hand-outs


@EVERY_CHAPTER
@pytest.mark.parametrize("only", [False, True], ids=["whole", "exercises"])
def test_a_hand_out_has_the_stubs_and_no_solution(path, only):
    chapter = book_source.read_notebook(path)
    made = alone(path, exercises_only=only)
    nbformat.validate(made)
    text = "\n".join(map(source, made["cells"]))
    stubs = [cell for cell in chapter["cells"] if hand_out.answer_of(cell)]
    assert [source(c) for c in made["cells"] if hand_out.answer_of(c)] == [
        source(cell) for cell in stubs if "solution" not in tags(cell)
    ]
    for number in made["metadata"]["dmd_tutorial"]["answers"]:
        assert text.count(f'check("{number}"') == 1, "what else checks it gives the answer away"
    assert "olution_" not in text
    assert "_solution" not in text
    told = ("Solution", "olution says", "cells below", "Why it is so", "should find")
    for phrase in (*told, "open the solution"):
        assert phrase not in text.partition("## Exercises")[2], phrase
    assert made["metadata"]["dmd_tutorial"]["chapter"] == book_source.number(path)


def statements(text):
    """The statements of a cell, without those that answers and chapters have in common."""
    nodes = [n for n in ast.walk(ast.parse(cells.python(text))) if isinstance(n, ast.stmt)]
    return {line for line in map(ast.unparse, nodes) if len(line) > 40 and "def " not in line}


@EVERY_CHAPTER
def test_no_cell_of_a_hand_out_has_or_prints_code_that_an_exercise_asks_for(path):
    chapter = book_source.read_notebook(path)
    asked = set().union(*(statements(source(c)) for c in chapter["cells"] if "solution" in tags(c)))
    before = set().union(*map(statements, code(chapter)))
    made = code(alone(path, exercises_only=False))
    assert asked <= before
    assert not set().union(*map(statements, made)) & asked
    called = {ast.unparse(n.func) for text in made for n in ast.walk(ast.parse(cells.python(text)))
              if isinstance(n, ast.Call)}  # fmt: skip
    assert not called & {"show_code", "inspect.getsource", "help"}


@EVERY_CHAPTER
def test_the_exercises_alone_define_each_function_that_they_speak_of(path):
    made = alone(path)
    names = set().union(*map(cells.bound, map(cells.python, code(made))))
    tasks = book_source.markdown(made)
    spoken = re.findall(r"`([a-z_]+)\([^`]*\)`", tasks)
    stubs = [ast.parse(source(c)) for c in made["cells"] if hand_out.answer_of(c)]
    given = {node.arg for tree in stubs for node in ast.walk(tree) if isinstance(node, ast.arg)}
    known = given | {*dir(builtins), *dir(torch), *dir(torch.Tensor), *dir(torch.optim.SGD)}
    assert not [name for name in spoken if name not in names | known]


@EVERY_CHAPTER
def test_no_link_of_a_hand_out_is_relative_and_none_leads_to_the_solutions_in_colab(path):
    for only in (False, True):
        text = "\n".join(map(source, alone(path, exercises_only=only)["cells"]))
        assert not hand_out.LINK.search(text)
        assert "colab.research" not in text
        assert f"{book_source.site(book_source.repository())}/book/" in text
        assert not only or "](#" not in text


def test_colab_opens_the_copy_of_the_instructor():
    options = ALONE._replace(colab="https://github.com/me/course/blob/main/week-3")
    text = book_source.markdown(hand_out.hand_out(CHAPTERS[2], options))
    address = "https://colab.research.google.com/github/me/course/blob/main/week-3"
    assert f"[Open in Colab]({address}/3-kl-gradient-exercises.ipynb)" in text


def test_hints_go_and_the_tasks_stay():
    with_hints, without = (
        book_source.markdown(hand_out.hand_out(CHAPTERS[0], ALONE._replace(hints=hints)))
        for hints in (True, False)
    )
    assert "Hint 1" in with_hints
    assert "Hint" not in without
    assert "details>" not in without
    assert without.count("### Exercise") == with_hints.count("### Exercise") == 7


@EVERY_CHAPTER
def test_what_a_hand_out_reads_it_defines_or_carries(path):
    made = alone(path, exercises_only=False)
    assert not [line for line in cells.breaches(made) if "which no cell above it binds" in line]
    files = hand_out.files([path], Options())
    for name in hand_out.data_files(made):
        assert json.loads(files[name])


@EVERY_CHAPTER
def test_the_exercises_alone_run_from_top_to_bottom_with_right_answers(path, tmp_path, monkeypatch):
    files = hand_out.files([path], ALONE)
    hand_out.write(files, tmp_path, force=False)
    monkeypatch.chdir(tmp_path)
    (name,) = (name for name in files if name.suffix == ".ipynb")
    answers = solved(path)
    stub = book_source.read_notebook(tmp_path / name)
    names = {}
    for text in code(filled(stub, answers)):
        exec(cells.python(text), names)
    for number, answer in stub["metadata"]["dmd_tutorial"]["answers"].items():
        assert names["check"](number, names[answer]).passed is True
    assert set(answers) == set(stub["metadata"]["dmd_tutorial"]["answers"])


def test_nothing_is_overwritten_unless_asked(tmp_path):
    files = hand_out.files(CHAPTERS[1:3], ALONE)
    hand_out.write(files, tmp_path, force=False)
    assert hand_out.write(files, tmp_path, force=False) == []  # the same again is let be
    changed = tmp_path / "3-kl-gradient-exercises.ipynb"
    changed.write_text("mine")
    (tmp_path / "2-teacher-exercises.ipynb").unlink()
    with pytest.raises(ValueError, match=r"already there, and different: .*3-kl.*--force"):
        hand_out.write(files, tmp_path, force=False)
    assert changed.read_text() == "mine"
    assert not (tmp_path / "2-teacher-exercises.ipynb").exists(), "all files, or none"
    hand_out.write(files, tmp_path, force=True)
    assert json.loads(changed.read_text())


@pytest.mark.parametrize("folder", [".", "book", "book/new", "classroom", "tests/new", ".github"])
def test_no_folder_of_the_repository_becomes_a_hand_out(folder):
    with pytest.raises(ValueError, match="belongs to the repository"):
        hand_out.write({}, book_source.ROOT / folder, force=True)
    assert hand_out.write({}, book_source.ROOT / "week-2", force=False) == []


def test_chapters_are_chosen_by_number_range_and_file():
    names = ["2", "4-6", "book/1-score-functions.ipynb", "5"]
    assert hand_out.chosen(names) == [CHAPTERS[i] for i in (1, 3, 4, 5, 0)]


@pytest.mark.parametrize("name", ["0", "99", "3-1", "book/intro.md", "six", "-3"])
def test_an_unknown_chapter_is_named(name):
    with pytest.raises(ValueError, match=f"there is no chapter {name}: the book has 1 to"):
        hand_out.chosen([name])


def test_mistakes_at_the_command_line_are_sentences(tmp_path):
    for words, sentence in (
        ([sys.executable, "-m", "classroom.hand_out", "77", "-o", "x"], "there is no chapter 77"),
        (
            [sys.executable, "-m", "classroom.hand_out", "3", "-o", "x", "--colab", "y"],
            "--colab ta",
        ),
        (
            [sys.executable, "-m", "classroom.hand_out", "4", "-o", "x", "--exercises", PRIVATE],
            "private_example.py is for chapters ['3'], not these",
        ),
    ):
        done = subprocess.run(words, capture_output=True, text=True, cwd=book_source.ROOT)
        assert done.returncode == 1
        assert sentence in done.stderr
        assert "Traceback" not in done.stderr


@EVERY_CHAPTER
def test_nbgrader_gets_an_answer_and_a_locked_check_for_each_exercise(path):
    made = alone(path, nbgrader=True)
    nbformat.validate(made)
    marked = [c for c in made["cells"] if "nbgrader" in c["metadata"]]
    identities = [cell["metadata"]["nbgrader"]["grade_id"] for cell in marked]
    assert len(set(identities)) == len(identities) == 2 * len(solved(path))
    assert not any("." in each for each in identities)
    for answer, check in zip(marked[::2], marked[1::2], strict=True):
        assert answer["metadata"]["nbgrader"]["solution"]
        assert check["metadata"]["nbgrader"]["locked"]
        # what nbgrader makes of it: the body is cleared, the signature stays
        head, _, rest = source(answer).partition("### BEGIN SOLUTION")
        _, _, tail = rest.partition("### END SOLUTION")
        names = {"check": framework.check}
        cleared = f"{head}raise NotImplementedError{tail}"
        if head.endswith(" "):  # inside of a function, not an assignment
            exec(cleared, names)
            ((number, name),) = hand_out.answer_of(check)
            assert framework.check(number, names[name]).passed is None
            with pytest.raises(AssertionError):
                exec(source(check), names)
        else:  # what is to be given a value, and in which form, is still to be read
            assert all(f"# {line}" in head for line in rest.strip().splitlines()[:-1])


# What students hand in

RIGHT = solved(CHAPTERS[2])
STUBS = alone(CHAPTERS[2])
NAME = "3-kl-gradient-exercises.ipynb"
TITLES = [path.stem for path in CHAPTERS]
IMPORT = "from dmd_tutorial.notebook.exercises.chapter3 import EXERCISES"
ALL = tuple(number for number in EXERCISES if number.startswith("3."))
LIMITS = Limits(seconds=2.0, memory=1.0, wall=3000.0)


def body(text):
    """Exercise 3.1, answered by a function with these lines before the right answer."""
    lines = "\n".join(f"    {line}" for line in text.splitlines())
    return (
        f"def forward_fit(means, stds, weights):\n{lines}\n"
        "    mean = (weights * means).sum()\n"
        "    return mean, (weights * (stds**2 + (means - mean) ** 2)).sum().sqrt()\n"
        '\n\ncheck("3.1", forward_fit)'
    )


def without_check(text):
    return "\n".join(line for line in text.splitlines() if not line.startswith("check("))


WRONG = {
    "3.1": "def forward_fit(m, s, w):\n    mean = (w * m).sum()\n    return mean, (w * s).sum()\n",
    "3.2": 'mean_of_dropped_term = 1\ncheck("3.2", mean_of_dropped_term)',
}
TWO = dict.fromkeys(ALL) | {"3.1": RIGHT["3.1"], "3.2": RIGHT["3.2"]}  # the other cells deleted
# student: (answers in the place of stubs, a cell before the exercises, what is expected)
Trick = tuple[dict, str, dict]
TRICKS: dict[str, Trick] = {
    "right": (RIGHT, "", dict.fromkeys(ALL, "right")),
    "wrong": (RIGHT | WRONG, "", {"3.1": "wrong", "3.2": "wrong", "3.3": "right"}),
    "half": (dict([*RIGHT.items()][:2]), "", {"3.1": "right", "3.2": "right", "3.3": "open"}),
    "open": ({}, "", dict.fromkeys(ALL, "open")),
    "no-checks": ({n: without_check(a) for n, a in RIGHT.items()}, "", dict.fromkeys(ALL, "right")),
    "deleted": (RIGHT | {"3.4": None, "3.5": None}, "", {"3.3": "right", "3.4": "missing"}),
    "renamed": (
        {n: a.replace("forward_fit", "my_fit").replace("kl_gradient", "g")
         for n, a in RIGHT.items()}, "", {"3.1": "right", "3.3": "right"},
    ),
    "renamed-half": (RIGHT | {"3.1": 'def my(m, s, w):\n    return m\ncheck("3.1", forward_fit)'},
                     "", {"3.1": "missing", "3.2": "right"}),
    "helper": (TWO | {"3.1": f"HALF = 0.5\n{body('HALF + torch.ones(1)')}"}, "",
               {"3.1": "right"}),
    "table": (TWO | {"3.1": "a = {}\nfor i in (0, 1):\n    a[i] = i\n" + body("a[1] + 1")}, "",
              {"3.1": "right"}),
    "filled": (TWO | {"3.1": "a = []\nfor i in (0, 1):\n    a.append(i)\n"
                      "def more(b):\n    b.append(2)\nmore(a)\nprint(a[9])\n" + body("a[2] + 1")},
               "", {"3.1": "right"}),
    "loop": (TWO | {"3.1": f"{without_check(RIGHT['3.1'])}\nfor f in [forward_fit]:\n"
                           '    check("3.1", f)'}, "", {"3.1": "right"}),
    "below": ({"3.5": f"def stop_gradient_loss(x, gradient):\n    return ...\n{RIGHT['3.1']}"}, "",
              {"3.1": "right", "3.5": "open"}),
    "below-unchecked": ({"3.4": RIGHT["3.4"] + "\n" + without_check(RIGHT["3.1"])}, "",
                        {"3.1": "right", "3.4": "right", "3.5": "open"}),
    "syntax": (RIGHT | {"3.4": 'def pixel_gradient(x, a b):\n    pass\ncheck("3.4", pixel)'},
               "", {"3.3": "right", "3.4": "unreadable", "3.5": "right"}),
    "endless": (TWO | {"3.1": body("while True:\n    pass")}, "",
                {"3.1": "stopped", "3.2": "right"}),
    "endless-in-c": (TWO | {"3.1": body("sum(iter(int, 1))")}, "", {"3.1": "stopped"}),
    "stubborn": (TWO | {"3.1": body(
        "while True:\n    try:\n        means.sum()\n    except BaseException:\n        pass"
    )}, "", {"3.1": "stopped", "3.2": "right"}),
    "endless-import": (TWO | {"3.2": 'x = [0 for _ in iter(int, 1)]\ncheck("3.2", x)'}, "",
                       {"3.2": "stopped", "3.1": "right"}),
    "bomb": (TWO | {"3.1": body("torch.ones(2**29)")}, "", {"3.1": "stopped", "3.2": "right"}),
    "list-bomb": (TWO | {"3.1": body("[0] * 2**40")}, "", {"3.1": "stopped", "3.2": "right"}),
    "exit": (TWO | {"3.1": body("import sys\nsys.exit()")}, "", {"3.1": "wrong", "3.2": "right"}),
    "os-exit": (TWO | {"3.1": body("import os\nos._exit(0)")}, "",
                {"3.1": "stopped", "3.2": "right"}),
    "crash": (TWO | {"3.1": body("import os\nos.abort()")}, "", {"3.1": "stopped"}),
    "edited-check": (TWO | {"3.1": WRONG["3.1"] + "print('✓ right: 3.1, forward fit, agrees')"},
                     "", {"3.1": "wrong", "3.2": "right"}),
    "number-in-check": ({"3.2": 'check("3.2", -1)'}, "", {"3.2": "right", "3.1": "open"}),
    "own-check": (WRONG, "def check(number, answer):\n    return '✓ right'",
                  {"3.1": "wrong", "3.2": "wrong", "3.3": "open"}),
    "patched": (TWO | WRONG, "import dmd_tutorial.notebook.exercises as e\n"
                "e.difference = lambda *given: None", {"3.1": "flagged", "3.2": "flagged"}),
    "patched-torch": (TWO | {"3.1": body(
        "torch.isclose = torch.ones_like\nmeans = means + 1"
    )}, "", {"3.1": "wrong", "3.2": "right"}),
    "imported-truth": (
        TWO | {"3.1": f'{IMPORT}\nforward_fit = EXERCISES[0].truth\ncheck("3.1", forward_fit)'},
        "", {"3.1": "flagged", "3.2": "right"},
    ),
    "imported-inside": (TWO | {"3.1": body(f"{IMPORT}\nreturn EXERCISES[0].truth(means, stds)")},
                        "", {"3.1": "flagged", "3.2": "right"}),
    "found-by-name": (TWO | {"3.1": body("return __import__('dmd_' + 'tutorial').notebook")}, "",
                      {"3.1": "flagged"}),
    "inspect": (TWO | {"3.1": body("import inspect\ninspect.stack()")}, "",
                {"3.1": "flagged", "3.2": "right"}),
    "forger": (TWO | {"3.1": body("import os\nos.write(3, b'PK' * 50)\nos._exit(0)")}, "",
               {"3.1": "stopped", "3.2": "right"}),
    "killer": (TWO | {"3.1": body("import os\nos.kill(os.getppid(), 9)")}, "",
               {"3.1": "wrong", "3.2": "right"}),
    "fork": (TWO | {"3.1": body("import os\nos.fork()")}, "",
             {"3.1": "wrong", "3.2": "right"}),
    "writes": (TWO | {"3.1": body("with open('FOLDER/written', 'w') as f:\n    f.write('!')")}, "",
               {"3.1": "wrong", "3.2": "right"}),
    "network": (TWO | {"3.1": body("import socket\nsocket.create_connection(('1.1.1.1', 53))")},
                "", {"3.1": "wrong", "3.2": "right"}),
    "endless-answer": (TWO | {"3.1": body("a = []\na.append(a)\nreturn a")}, "",
                       {"3.1": "wrong", "3.2": "right"}),
    "expanded": (TWO | {"3.1": body("return torch.zeros(1).expand(2**40)")}, "",
                 {"3.1": "wrong", "3.2": "right"}),
    "wide": (TWO | {"3.1": body("return torch.zeros(2**24, dtype=torch.int8)")}, "",
             {"3.1": "wrong", "3.2": "right"}),
    "bomb-outside": (TWO | {"3.2": 'x = torch.ones(2**40)\ncheck("3.2", x)'}, "",
                     {"3.2": "stopped", "3.1": "right"}),
    "locked-folder": (TWO | {"3.1": body("import os\nos.path.exists('x') or os.mkdir('x', 0)")}, "",
                      {"3.1": "right", "3.2": "right"}),
    "limiter": (TWO | {"3.1": body(
        "import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))"
    )}, "", {"3.1": "wrong", "3.2": "right"}),
    "interrupter": (TWO | {"3.1": body(
        "import os, signal\nsignal.pidfd_send_signal(os.pidfd_open(os.getppid()), 2)"
    )}, "", {"3.1": "wrong", "3.2": "right"}),
    "own-limits": (TWO | {"3.1": body("import resource\nresource.getrlimit(resource.RLIMIT_AS)")},
                   "", {"3.1": "right"}),
    "unkind": (TWO | {"3.1": body("import os\nos.write(3, b'[[1], 2]')\nos._exit(0)")}, "",
               {"3.1": "stopped", "3.2": "right"}),
    "=1+1": (WRONG, "", {"3.1": "wrong"}),
}  # fmt: skip


def hand_in(folder, student, answers=RIGHT, before=""):
    made = filled(STUBS, answers)
    if before:
        cell = {"cell_type": "code", "metadata": {}, "source": before, "id": "before",
                "outputs": [], "execution_count": None}  # fmt: skip
        made = made | {"cells": [*made["cells"][:3], cell, *made["cells"][3:]]}
    text = json.dumps(made).replace("FOLDER", str(folder.parent))
    (folder / student).mkdir(parents=True, exist_ok=True)
    (folder / student / NAME).write_text(text)


TRUSTED = sandbox.missing() is not None


OWN, TASKS = private.load(PRIVATE)
BLIND = private.without_answers(PRIVATE.read_text("utf8"))
WITH_OWN = ALONE._replace(tasks=TASKS, handed_in=tuple(OWN))
SPY = f"""
def reverse_divergence(m, s, mr, sr):
    import sys, pathlib
    def all_truths():
        frame = sys._getframe()
        while frame:
            for values in (frame.f_globals, frame.f_locals):
                yield from values.get('EXERCISES', [])
                yield from [v for v in values.values() if 'def ' + 'reverse_kl' in str(v)]
                for e in values.get('known', {{}}).values():
                    yield e.truth or e.inputs.__globals__.get('reverse_kl')
            frame = frame.f_back
    assert not pathlib.Path({str(PRIVATE)!r}).exists(), 'the file is seen'
    return [*filter(None, all_truths())][0](m, s, mr, sr)
"""
KL = """
def reverse_divergence(m, s, mr, sr):
    return torch.log(sr / s) + (s**2 + (m - mr) ** 2) / (2 * sr**2) - 0.5
"""
ASKED = '\ncheck("3.P1", reverse_divergence)'
OWN_ANSWERS = {
    "own-right": {"3.P1": KL + ASKED, "3.P2": 'check("3.P2", 2)'},
    "own-wrong": {"3.P1": KL.replace("- 0.5", "") + ASKED, "3.P2": 'check("3.P2", 4)'},
    "own-spy": {"3.P1": SPY + ASKED},
}


def grader(**settings):
    """A grader of the book's exercises and the private ones."""
    usual = {"limits": LIMITS, "workers": 1, "trusted": TRUSTED, "private": BLIND}
    known = {"exercises": EXERCISES | OWN, "book": submissions.book(TASKS)}
    return Grader(**known | usual | settings)


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """A class with all tricks, graded: the folder, and the grades by student and exercise."""
    folder = tmp_path_factory.mktemp("class") / "submissions"
    for student, (answers, before, _) in TRICKS.items():
        hand_in(folder, student, answers, before)
    (folder / "not-json").mkdir()
    (folder / "not-json" / NAME).write_text("{ 'cells': ")
    (folder / "no-notebook").mkdir()
    (folder / "no-notebook" / "answers.txt").write_text("%PDF")
    (folder / "a-pdf").mkdir()
    (folder / "a-pdf" / f"{NAME}.pdf").write_text("%PDF")
    (folder / "nothing").mkdir()
    shutil.copy(CHAPTERS[2], folder / "flat_3-kl-gradient.ipynb")  # the book's own, untouched
    hand_in(folder, "two-copies", WRONG)
    shutil.copy(folder / "right" / NAME, folder / "two-copies" / f"again-{NAME}")
    hand_in(folder, "many-copies")
    for i in range(grade.COPIES):
        shutil.copy(folder / "right" / NAME, folder / "many-copies" / f"{i}-{NAME}")
    (folder / "link").mkdir()
    (folder / "link" / NAME).symlink_to(folder / "right" / NAME)
    for path in CHAPTERS:
        made = filled(alone(path), solved(path))
        (folder / "all").mkdir(exist_ok=True)
        (folder / "all" / path.name).write_text(json.dumps(made))
    for student, answers in OWN_ANSWERS.items():
        answers = dict.fromkeys(ALL) | answers
        made = filled(hand_out.hand_out(CHAPTERS[2], WITH_OWN), answers)
        (folder / student).mkdir()
        (folder / student / NAME).write_text(json.dumps(made))
    grades = grader().grades(folder)
    return folder, {(g.student, g.exercise): g for g in grades}


@pytest.mark.slow
@pytest.mark.parametrize("student", TRICKS)
def test_a_trick_gets_its_states(graded, student):
    _, grades = graded
    expected = TRICKS[student][2]
    assert {n: grades[student, n].state for n in expected} == expected, [
        grades[student, n].sentence for n in expected
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("student", "states"),
    [
        ("not-json", {"unreadable"}),
        ("no-notebook", {"missing"}),
        ("a-pdf", {"unreadable"}),
        ("nothing", {"missing"}),
        ("flat", {"open"}),
        ("two-copies", {"right"}),
        ("many-copies", {"flagged"}),
        ("link", {"unreadable"}),
    ],
)
def test_what_is_no_notebook_or_twice_there(graded, student, states):
    _, grades = graded
    assert {grades[student, n].state for n in ALL} == states


@pytest.mark.slow
@pytest.mark.parametrize(
    ("student", "number", "sentence"),
    [
        ("wrong", "3.1", "3.1, the Gaussian of the forward fit: "),
        ("wrong", "3.2", "3.2, "),
        ("half", "3.3", "3.3 is not attempted yet"),
        ("not-json", "3.1", f"{NAME} is not JSON: save it again from Jupyter"),
        ("a-pdf", "3.1", f"{NAME}.pdf is no notebook"),
        ("nothing", "3.1", "no notebook of this chapter"),
        ("many-copies", "3.1", "4 copies answer it, and more than 3 are not run"),
        ("deleted", "3.4", "`pixel_gradient` is defined nowhere and there is no check"),
        ("renamed-half", "3.1", "`forward_fit` is defined nowhere"),
        ("syntax", "3.4", "line 1 of its cell is no Python"),
        ("endless", "3.1", "it took more than 1 seconds of computing"),
        ("stubborn", "3.1", "seconds of computing"),
        ("bomb", "3.1", "it asked for more than 1 GB of memory"),
        ("list-bomb", "3.1", "it asked for more than 1 GB of memory"),
        ("bomb-outside", "3.2", "it asked for more than 1 GB of memory"),
        ("expanded", "3.1", "more than 65536 numbers"),
        ("exit", "3.1", "your code raised SystemExit:  at your line `sys.exit()`"),
        ("os-exit", "3.1", "its process ended before an answer came out"),
        ("inspect", "3.1", "look at `import inspect`; as it stands: right"),
        (
            "patched",
            "3.1",
            "look at `import dmd_tutorial.notebook.exercises as e`; as it",
        ),
        ("limiter", "3.1", "your code raised PermissionError"),
        ("interrupter", "3.1", "your code raised PermissionError"),
        ("killer", "3.1", "your code raised PermissionError"),
        ("fork", "3.1", "your code raised PermissionError"),
        ("network", "3.1", "your code raised"),
        ("writes", "3.1", "your code raised"),
        ("endless-answer", "3.1", "cannot be compared: RecursionError"),
    ],
)
def test_a_grade_says_why(graded, student, number, sentence):
    _, grades = graded
    assert plain_in(sentence, grades[student, number].sentence)


def plain_in(sentence, text):
    return grade.plain(sentence) in text


@pytest.mark.slow
def test_nothing_was_written(graded):
    folder, _ = graded
    written = folder.parent / "written"
    assert not written.exists() or (TRUSTED and written.read_text() == "")


@pytest.mark.slow
def test_the_grades_depend_neither_on_order_nor_on_the_number_of_workers(graded, tmp_path):
    folder, grades = graded
    others = ["syntax", "renamed-half", "os-exit", "killer", "half", "inspect"]
    for i, student in enumerate(others):  # in another order, among others
        shutil.copytree(folder / student, tmp_path / f"{i}-{student}")
    again = grader(workers=2).grades(tmp_path)
    assert len(again) == len(others) * (len(ALL) + len(OWN))
    for each in again:
        before = grades[each.student.partition("-")[2], each.exercise]
        assert (each.state, each.sentence) == (before.state, before.sentence)


@pytest.mark.slow
def test_the_table_and_the_pages(graded, tmp_path):
    _, grades = graded
    grade.write([*grades.values()], tmp_path)
    with (tmp_path / "grades.csv").open(newline="", encoding="utf8") as file:
        header, *rows = csv.reader(file)
    assert header == ["student", "chapter", "exercise", "state", "sentence"]
    assert len(rows) == len(grades)
    assert ["right", "3", "3.1", "right", grades["right", "3.1"].sentence] in rows
    assert not [cell for row in rows for cell in row if cell.startswith(("=", "+", "-", "@"))]
    page = (tmp_path / "feedback" / "half.md").read_text("utf8")
    assert f"2 of {len(EXERCISES | OWN)} exercises are right" in page
    assert "- … **3.3** open: 3.3 is not attempted yet" in page
    assert "import inspect" not in (tmp_path / "feedback" / "inspect.md").read_text("utf8")


def test_pages_of_an_earlier_run_are_named(tmp_path):
    ada, bob = (grade.Grade(name, "3", "3.1", "right", "") for name in ("ada", "bob"))
    assert grade.write([ada, bob], tmp_path) == []
    assert grade.write([ada], tmp_path) == [tmp_path / "feedback" / "bob.md"]


@pytest.mark.slow
def test_all_solutions_are_right(graded):
    _, grades = graded
    assert [n for n in EXERCISES if grades["all", n].state != "right"] == []


@pytest.mark.slow
def test_a_sleeper_is_stopped_and_its_seconds_count_tenfold(monkeypatch):
    looks = []
    select = child.select.select
    monkeypatch.setattr(child.select, "select", lambda *how: looks.append(1) or select(*how))
    sleeper = [[1, "import time\nx = time.sleep(1e6)", [0, 1]]]
    job = {"cells": sleeper, "answer": "x", **vars(replace(LIMITS, wall=40.0))}
    status, data = child.run(EXERCISES["3.2"], job)
    verdict = grade.judged(EXERCISES["3.2"], EXERCISES["3.2"], status, data, LIMITS)
    assert verdict == ("stopped", "it did not end within 3000 seconds, or slept")
    if sys.platform == "linux":
        assert len(looks) < 40  # of 80


@pytest.mark.slow
@pytest.mark.parametrize("inside", [True, False])
def test_what_took_time_and_memory_says_both(inside):
    much = "held = b'x' * (400 << 20)\n"  # of 500 MB
    late = "def x(*given):\n    while True:\n        pass" if inside else "x = sum(iter(int, 1))"
    limits = Limits(seconds=4.0, memory=0.5, wall=3000.0)
    job = {"cells": [[1, much + late, [0, 1]]], "answer": "x", **vars(limits)}
    state, said = grade.judged(
        EXERCISES["3.1"], EXERCISES["3.1"], *child.run(EXERCISES["3.1"], job), limits
    )
    assert state == "stopped"
    assert said.endswith("seconds of computing, and more than 0.25 GB of memory by then")


# Comparing

MISTAKES = [(e, said) for e in EXERCISES.values() for said in e.mistakes]


def verdict(exercise, compared, answer, found=None):
    found = exercise.outcome(answer) if found is None else found
    data = outcomes.dump(["outcome", callable(answer), found])
    return grade.judged(exercise, compared, "done", data, LIMITS)


@pytest.mark.parametrize("number", EXERCISES)
def test_every_known_mistake_is_wrong_with_its_own_sentence(number):
    exercise = EXERCISES[number]
    compared = grade.reference(exercise)
    assert verdict(exercise, compared, exercise.truth)[0] == "right"
    for said, mistake in exercise.mistakes.items():
        state, sentence = verdict(exercise, compared, mistake, compared.mistakes[said])
        assert (state, sentence) == ("wrong", f"{number}, {exercise.name}: {said}")


@pytest.mark.parametrize(
    "answer", [0.5, "text", ..., lambda *_: "high", lambda *_: [1, 2], lambda: 0, object, {}, [[]]]
)
@pytest.mark.parametrize("number", ["1.1", "3.1", "3.2", "6.5"])
def test_what_the_grader_says_is_what_the_notebook_says(number, answer):
    exercise = EXERCISES[number]
    inside = exercise.check(answer)
    if inside.passed is None:
        return
    state, sentence = verdict(exercise, grade.reference(exercise), answer)
    assert state == {True: "right", False: "wrong"}[inside.passed]
    if callable(answer) is callable(exercise.truth):
        assert sentence == inside.message


UNSAID = ["high", [1, [2]], [[1], 2], ["outcome"], ["outcome", 1, 2, 3], {"a": 1}, None]


@pytest.mark.parametrize("data", [b"", b"PK" * 9, b"[" * 10**5, *map(outcomes.dump, UNSAID)])
def test_what_no_answer_wrote_stops_nothing(data):
    compared = grade.reference(EXERCISES["3.2"])
    state, _ = grade.judged(EXERCISES["3.2"], compared, "done", data, LIMITS)
    assert state in ("stopped", "wrong")


def test_an_outcome_comes_back_as_it_was():
    numbers = torch.arange(6.0).reshape(2, 3)
    kinds = [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float64, torch.complex64]
    plain = [None, True, 10**30, -0.5, math.inf, "\udcff", 1 + 2j]
    tensors = [numbers.to(kind) for kind in kinds] + [torch.zeros(0, 3), torch.tensor(2.0)]
    tensors += [numbers.T, torch.zeros(1).expand(5), torch.nn.Parameter(numbers)]
    value = {"a": plain, ("b", 2): tuple(tensors), "c": [], "d": {}}
    found = outcomes.load(outcomes.dump(value))
    assert found["a"] == plain
    assert found["c"] == []
    assert found["d"] == {}
    for before, after in zip(tensors, found["b", 2], strict=True):
        assert (after.dtype, after.shape) == (before.dtype, before.shape)
        assert torch.equal(after, before)
    assert math.isnan(outcomes.load(outcomes.dump(math.nan)))
    assert outcomes.load(outcomes.dump(np.array([[1, 2]]))).tolist() == [[1, 2]]
    assert type(outcomes.load(outcomes.dump(object()))).__name__ == "object"


@pytest.mark.parametrize(
    "much",
    [
        torch.zeros(1).expand(2**40),
        torch.zeros(2**20, dtype=torch.int8),
        torch.sparse_coo_tensor(size=(2**40,), check_invariants=True),
        np.broadcast_to(np.zeros(1), 2**40),
        [[0] * 2**20],
    ],
    ids=["expanded", "bytes", "sparse", "broadcast", "list"],
)
def test_no_outcome_is_larger_than_any_answer_is(much):
    with pytest.raises(ValueError, match="more than 65536 numbers"):
        outcomes.dump(much)


def test_a_file_that_unpacks_to_much_more_is_not_unpacked():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as bomb:
        torch.save(["outcome", torch.zeros(2**20)], inner := io.BytesIO())
        with zipfile.ZipFile(inner) as plain:
            for name in plain.namelist():
                bomb.writestr(name, plain.read(name))
    with pytest.raises(ValueError, match=r"utf-8|JSON|Expecting"):
        outcomes.load(file.getvalue())
    forged = json.dumps(["tensor", "torch.float32", [2**40, 0, 2**40], ""])
    assert outcomes.load(forged.encode()).numel() == 0
    for shape in ([2**40], [-2], ["a"], 3):
        with pytest.raises((ValueError, RuntimeError, TypeError)):
            outcomes.load(json.dumps(["tensor", "torch.float32", shape, "AAAAAA=="]).encode())


# Private exercises


def test_a_private_exercise_is_handed_in_and_its_answer_stays_at_home():
    made = hand_out.hand_out(CHAPTERS[2], WITH_OWN)
    text = "\n".join(map(source, made["cells"]))
    assert "torch.log" not in text
    for exercise in OWN.values():
        assert not [said for said in exercise.mistakes if said in text]
    names = {}
    for cell in code(made):
        exec(cells.python(cell), names)
    assert names["check"]("3.P1", 5) == "3.P1: handed in"
    assert names["check"]("3.2", -1).passed is True
    assert made["metadata"]["dmd_tutorial"]["answers"]["3.P2"] == "nats"
    others = hand_out.hand_out(CHAPTERS[3], WITH_OWN)
    assert others["cells"] == alone(CHAPTERS[3])["cells"]


@pytest.mark.parametrize("exercise", private_example.EXERCISES, ids=lambda e: e.number)
def test_the_private_example_knows_its_wrong_answers(exercise):
    compared = grade.reference(exercise)
    assert verdict(exercise, compared, exercise.truth)[0] == "right"
    for said, mistake in exercise.mistakes.items():
        assert verdict(exercise, compared, mistake) == (
            "wrong", f"{exercise.number}, {exercise.name}: {said}"
        )  # fmt: skip


def test_what_the_child_gets_of_private_exercises_has_no_answer():
    for answer in ("reverse_kl", "std_real", "2.0", "halved", "forward div", "TASKS"):
        assert answer in PRIVATE.read_text("utf8")
        assert answer not in BLIND
    exercises = child.blind(private.executed(BLIND))
    assert exercises.keys() == OWN.keys()
    torch.manual_seed(0)
    assert [len(arguments) for arguments in exercises["3.P1"].inputs()] == [4, 4]
    other = (
        "import torch, math\nfrom dmd_tutorial.notebook import exercises as e\nSIZE = 3\n"
        "def secret(x):\n    return x * 41\ndef many():\n    return [(torch.ones(SIZE),)]\n"
        "EXERCISES = []\nEXERCISES.append(e.Exercise('3.P9', 'x', mistakes={'no': lambda x: 43},"
        " truth=secret, inputs=many))\nprint(math)\n"
    )
    blind = private.without_answers(other)
    assert not [each for each in ("41", "43", "secret", "math") if each in blind.partition("\n")[2]]
    assert private.executed(blind).EXERCISES[0].inputs()[0][0].tolist() == [1, 1, 1]


@pytest.mark.slow
def test_private_exercises_are_graded_and_their_answers_are_not_found(graded):
    _, grades = graded
    assert grades["own-right", "3.P1"].state == grades["own-right", "3.P2"].state == "right"
    assert "one half is missing" in grades["own-wrong", "3.P1"].sentence
    assert "the squared distance of the means is halved" in grades["own-wrong", "3.P2"].sentence
    assert grades["own-spy", "3.P1"].state == "flagged"
    wanted = "the file is seen" if TRUSTED else "raised IndexError: list index out of range"
    assert wanted in grades["own-spy", "3.P1"].sentence
    assert grades["own-spy", "3.P2"].state == "open"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("EXERCISES = []", "has no EXERCISES"),
        ("EXERCISES = 3", "cannot be read|has no EXERCISES"),
        ("1 / 0", "cannot be read: ZeroDivisionError"),
        ("from dmd_tutorial.notebook.exercises import Exercise\n"
         "EXERCISES = [Exercise('x', '', 1, {})]", "'x' is not a chapter, a point and a name"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_private_exercises_is_refused(tmp_path, text, sentence):
    (tmp_path / "private.py").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        private.load(tmp_path / "private.py")


def test_an_instructor_may_put_another_check_in_the_place_of_the_books():
    own = Exercise("3.2", "another number", 7, {})
    options = ALONE._replace(handed_in=("3.2",))
    names = {}
    for cell in code(hand_out.hand_out(CHAPTERS[2], options)):
        exec(cells.python(cell), names)
    assert names["check"]("3.2", 7) == "3.2: handed in"
    assert verdict(own, grade.reference(own), 7)[0] == "right"


# Reading


@pytest.mark.parametrize(
    ("name", "student"),
    [
        ("ada/3-kl-gradient.ipynb", "ada"),
        ("ada/deeper/3-kl-gradient-exercises.ipynb", "ada"),
        ("ada_3-kl-gradient-exercises.ipynb", "ada"),
        ("ada-lovelace 3-kl-gradient (1).ipynb", "ada-lovelace"),
        ("ada.ipynb", "ada"),
        ("ada_3-kl-gradient.pdf", "ada"),
        ("Jose\u0301 d'A. B_c 3-kl-gradient.ipynb", "Jos\u00e9 d'A. B_c"),
        ("\tada\n=/3-kl-gradient.ipynb", "ada ="),
        # Moodle's, both ways, of two releases; Canvas's
        ("Ada de_L. Byron_12345_assignsubmission_file_/3-kl-gradient.ipynb", "Ada de_L. Byron"),
        ("Ada Byron_12345_assignsubmission_file/3-kl-gradient.ipynb", "Ada Byron"),
        ("Ada Byron_12345_assignsubmission_file_3-kl-gradient.ipynb", "Ada Byron"),
        ("Ada Byron_12345_assignsubmission_file_my work.ipynb", "Ada Byron"),
        ("byronada_12345_67890_3-kl-gradient-exercises-1.ipynb", "byronada"),
        ("byronada_LATE_12345_67890_homework.ipynb", "byronada"),
    ],
)
def test_files_belong_to_students(tmp_path, name, student):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    for each in (name, ".DS_Store"):
        (tmp_path / each).write_text("")
    assert submissions.collected(tmp_path, TITLES) == ({student: [tmp_path / name]}, [])


def test_a_file_that_is_no_submission_is_named_and_no_student(tmp_path):
    stray = ["readme.txt", "ada.zip", ".bob/3-kl-gradient.ipynb", "ada/numbers.txt", "ada/.x/y"]
    work = [tmp_path / "ada/3-kl-gradient.ipynb", tmp_path / "ada/4-fake-critic.pdf"]
    for name in [*stray, *work]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    found, ignored = submissions.collected(tmp_path, TITLES)
    assert found == {"ada": work}
    said = [".bob", "ada/.x", "ada/numbers.txt", "ada.zip", "readme.txt"]
    assert sorted(ignored) == sorted(tmp_path / name for name in said)


def test_no_name_of_a_student_ends_the_run_and_each_gets_a_page(tmp_path):
    names = [
        "n" * 253,
        "n" * 252 + "m",
        "é" * 120,
        "...",
        "Ada",
        "ada",
        "ada~2",
        "\udcff",
        "\t",
        "-",
    ]
    for name in names:
        (tmp_path / "in" / name).mkdir(parents=True)
    found, ignored = submissions.collected(tmp_path / "in", TITLES)
    assert ignored == [tmp_path / "in" / "..."]
    grades = [grade.Grade(name, "3", "3.1", "missing", "") for name in found]
    grade.write(grades, tmp_path)
    pages = [path.read_text("utf8") for path in (tmp_path / "feedback").iterdir()]
    assert (
        len(found) == len(pages) == len({page.split("\n")[0] for page in pages}) == len(names) - 1
    )
    assert len({path.name.lower() for path in (tmp_path / "feedback").iterdir()}) == len(pages)
    assert (tmp_path / "feedback" / "Ada.md").exists()


@pytest.mark.parametrize("text", ["=1", "+1", "-1", "@a", "\t=1", "\r=1", "\n@a", "ada"])
def test_no_name_is_a_formula(text):
    assert grade.for_a_table(text)[0] in "'a"


def test_a_mark_at_the_beginning_of_a_notebook_is_no_fault(tmp_path):
    (tmp_path / "x.ipynb").write_text(json.dumps(STUBS), "utf-8-sig")
    assert submissions.read(tmp_path / "x.ipynb")["about"]["chapter"] == 3


def test_a_file_that_nobody_may_read_is_unreadable(tmp_path, monkeypatch):
    def forbidden(self):
        raise PermissionError

    (tmp_path / "x.ipynb").write_text("")
    monkeypatch.setattr(Path, "is_file", forbidden)
    with pytest.raises(submissions.Unreadable, match=r"x\.ipynb cannot be read"):
        submissions.read(tmp_path / "x.ipynb")


@pytest.mark.parametrize(
    "text",
    [
        "x = " + "(" * 500,
        "-" * 50_000 + "1",
        "x" + ".x" * 50_000,
        "\0",
        "def f(:",
        "x = " * 9999 + "1",
    ],
    ids=["brackets", "minus", "dots", "null", "colon", "equals"],
)
def test_no_code_upsets_the_reader(tmp_path, text):
    hand_in(tmp_path, "deep", RIGHT, text)
    read = submissions.Submission(tmp_path / "deep" / NAME, submissions.book({}))
    assert read.answer("3.1").trouble is None


@pytest.mark.parametrize("deep", ["f(" * 150 + "1" + ")" * 150, "1" + "+1" * 900, "x" + ".a" * 900])
def test_no_answer_is_too_deep_to_be_read(tmp_path, deep):
    for text in (f'check("3.1", {deep})', f"forward_fit = eval({deep}).exercises"):
        hand_in(tmp_path, "deep", RIGHT | {"3.1": text})
        read = submissions.Submission(tmp_path / "deep" / NAME, submissions.book({}))
        assert read.answer("3.1").trouble == ("unreadable", "its cell is nested too deeply")
        assert read.answer("3.2").looks is None


@pytest.mark.parametrize(
    "content", ["[]", '"x"', '{"cells": 3}', '{"cells": [3]}', "[" * 10**5, "{}", "\x00", "NaN"]
)
def test_what_is_no_notebook_is_unreadable(tmp_path, content):
    (tmp_path / "x.ipynb").write_text(content)
    with pytest.raises(submissions.Unreadable, match=r"x\.ipynb"):
        submissions.read(tmp_path / "x.ipynb")


def test_no_cell_of_the_book_is_suspicious():
    known = submissions.book({})
    for path in CHAPTERS:
        assert submissions.Submission(path, known).suspicious_cells == {}
    set_up = code(book_source.read_notebook(CHAPTERS[0]))[0]
    of_a_fork = cells.python(set_up.replace("dmd-tutorial/", "somebody/"))
    assert submissions.suspicious(ast.parse(of_a_fork)) is None


@pytest.mark.parametrize(
    "text",
    [
        "import dmd_tutorial.notebook.exercises",
        "from dmd_tutorial.notebook import exercises",
        "from dmd_tutorial.notebook.exercises import Exercise",
        "from dmd_tutorial.notebook.exercises import chapter3 as c",
        "from dmd_tutorial import notebook\nnotebook.exercises.check = print",
        "import importlib\nimportlib.import_module('dmd_tutorial.notebook' + s)",
        "from importlib import import_module",
        "import sys\nsys.modules['x']",
        "import sys\nx = sys.modules",
        "import inspect",
        "from inspect import getsource",
        "check.__globals__",
        "eval('1')",
        "getattr(notebook, name)",
        "().__class__.__base__.__subclasses__()",
        "open('dmd_tutorial/notebook/exercises/chapter3.py')",
    ],
)
def test_code_that_a_person_should_look_at(text):
    assert submissions.suspicious(ast.parse(text))


@pytest.mark.parametrize(
    "text",
    [
        "from dmd_tutorial.notebook import check, plots",
        "from dmd_tutorial.notebook.exercises import check",
        "from dmd_tutorial import dmd\ndmd.matching_loss(x, g)",
        "check('3.1', f)",
        "model = torch.compile(model)\nmodel.modules()",
        "getattr(x, 'shape')",
        "'google.colab' in sys.modules",
        "import importlib.util",
    ],
)
def test_code_that_nobody_need_look_at(text):
    assert submissions.suspicious(ast.parse(text)) is None

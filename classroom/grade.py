"""Grade what a class has handed in.

    python -m classroom.grade SUBMISSIONS -o OUT

writes OUT/grades.csv (student, chapter, exercise, state, sentence) and OUT/feedback/STUDENT.md.
SUBMISSIONS holds a folder for each student, or notebooks whose names begin with the student's.

The states: right, wrong; open (not attempted), missing (not found); stopped (too long, too much
memory, no answer came out); unreadable (no notebook, no Python); flagged (a person must look).

Nothing that was handed in is executed here: `classroom.child` does, in the sandbox, and says what
came out of an answer. Here it is compared with what comes out of the right one.
"""

import argparse
import csv
import html
import itertools
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from classroom import hand_out, outcomes, private, sandbox, submissions
from classroom.submissions import Answer, Book, Submission, Unreadable
from dmd_tutorial.notebook import exercises as framework
from dmd_tutorial.notebook.exercises import Exercise, Raised

# the best of several copies counts
COPIES = 3  # more would be guesses, and time
STATES = ("flagged", "right", "wrong", "stopped", "open", "unreadable", "missing")
SENTENCE = 400  # characters
MARKS = {"right": "✓", "wrong": "✗"}
COMPUTING = "seconds of computing"
NO_MEMORY = ("MemoryError", "can't allocate memory", "not enough memory", "bad_alloc")


class Grade(NamedTuple):
    """A line of grades.csv."""

    student: str
    chapter: str
    exercise: str
    state: str
    sentence: str


@dataclass(frozen=True)
class Limits:
    """What an answer may take."""

    seconds: float = 10.0  # of processor time
    memory: float = 2.0  # gigabytes, on top of PyTorch
    wall: float = 120.0  # seconds by the clock: for those that sleep


# Comparing


def reference(exercise: Exercise) -> Exercise:
    """Return an exercise that compares outcomes: its truth and its mistakes are such."""
    mistakes = {said: exercise.outcome(wrong) for said, wrong in exercise.mistakes.items()}
    return replace(exercise, truth=exercise.outcome(exercise.truth), mistakes=mistakes)


def judged(exercise: Exercise, compared: Exercise, status: str, data: bytes, limits: Limits) -> Any:
    """Return the state and the sentence for what the child process said."""
    try:
        kind, *rest = outcomes.load(data) if status == "done" else [status]
        if kind == "outcome":
            is_function, found = rest
            return compare(exercise, compared, bool(is_function), found, limits)
        said = str(rest[0]) if rest else ""
        kind, _, much = kind.partition(" with ")
        much = f", and more than {limits.memory / 2:g} GB of memory by then" if much else ""
        if kind == "memory" or lacks_memory(said):
            return "stopped", f"it asked for more than {limits.memory:g} GB of memory"
        return {
            "open": ("open", f"{exercise.number} is not attempted yet"),
            "raised": ("wrong", f"{exercise.number}, {exercise.name}: {said}"),
            "endless": ("stopped", f"it took more than {limits.seconds / 2:g} {COMPUTING}{much}"),
            "seconds": ("stopped", f"it took more than {limits.seconds:g} {COMPUTING}{much}"),
            "wall": ("stopped", f"it did not end within {limits.wall:g} seconds, or slept{much}"),
            "uncomparable": ("wrong", f"{exercise.number}: your answer cannot be compared: {said}"),
        }[kind]
    except Exception:  # whatever the process has written
        return "stopped", f"its process ended before an answer came out ({status})"


def lacks_memory(sentence: str) -> bool:
    """Return whether an error's sentence is one of Python, PyTorch or C++ that ask for memory."""
    return any(text in sentence for text in NO_MEMORY)


def compare(
    exercise: Exercise, compared: Exercise, is_function: bool, found: Any, limits: Limits
) -> tuple[str, str]:
    """Return the state and the sentence for an outcome."""
    if any(map(lacks_memory, raised(found))):
        return "stopped", f"it asked for more than {limits.memory:g} GB of memory"
    if callable(exercise.truth) != is_function:  # a sentence that knows the kind alone
        result = exercise.check((lambda: None) if is_function else found)
    else:
        result = compared.check(found)
    return {True: "right", False: "wrong", None: "open"}[result.passed], result.message


def raised(found: Any) -> Iterable[str]:
    """Return the sentences of the errors in an outcome."""
    several = found.values() if isinstance(found, dict) else [found]
    return [each.args[0] for each in several if isinstance(each, Raised)]


# Running


class Server:
    """The process that runs answers; made anew when one has ended it."""

    def __init__(self, source: str | None, trusted: bool):
        self.source, self.trusted = source, trusted
        self.folder = tempfile.mkdtemp()
        # bubblewrap ends with the thread that began it: not with one of `run`'s
        self.process: subprocess.Popen[bytes] | None = self.started()

    def ask(self, job: dict[str, Any]) -> tuple[str, bytes]:
        """Return how an answer's process ended, and what it wrote."""
        with suppress(OSError, ValueError):
            return self.told(job)
        # an answer before this one may have got at the server: a new one is asked, once
        self.stop()
        with suppress(OSError, ValueError):
            return self.told(job)
        self.stop()
        return "the server ended", b""

    def told(self, job: dict[str, Any]) -> tuple[str, bytes]:
        """Return what the server says; it is started if it does not run."""
        if not self.process:
            self.process = self.started()
            self.wait()
        process = self.process
        assert process.stdin
        assert process.stdout
        # the server keeps the limits; this is for one that an answer has got at
        alarm = threading.Timer(2 * job["wall"] + 300, process.kill)
        alarm.start()
        try:
            process.stdin.write(json.dumps(job).encode() + b"\n")
            process.stdin.flush()
            status, size = json.loads(process.stdout.readline())
            return status, process.stdout.read(size)
        finally:
            alarm.cancel()

    def started(self) -> subprocess.Popen[bytes]:
        """Start the process."""
        inner = [sys.executable, "-m", "classroom.child"]
        command = inner if self.trusted else sandbox.command(inner)
        environment = sandbox.environment(*[self.folder] * self.trusted)
        with Path(self.folder, "errors").open("wb") as errors:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                env=environment, cwd=self.folder,
            )  # fmt: skip
        assert process.stdin
        process.stdin.write(json.dumps(self.source).encode() + b"\n")
        process.stdin.flush()
        return process

    def wait(self) -> None:
        """Return when it has started.

        Raises:
            ValueError: it did not.
        """
        assert self.process
        assert self.process.stdout
        if self.process.stdout.readline() != b"ready\n":
            last = Path(self.folder, "errors").read_text(errors="replace").splitlines()[-1:]
            raise ValueError(f"the process that runs answers does not start: {plain(str(last))}")

    def stop(self) -> None:
        """End the process: by leaving it nothing to read, or else by force."""
        if self.process:
            with suppress(OSError):
                self.process.stdin.close()  # type: ignore[union-attr]
            try:
                self.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process.stdout.close()  # type: ignore[union-attr]
            self.process = None

    def close(self) -> None:
        """End the process, and remove its folder."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


def run(jobs: Sequence[dict[str, Any]], servers: Sequence[Server]) -> list[tuple[str, bytes]]:
    """Run all jobs, each once, on whichever server is free; results in the order of the jobs."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for i in range(len(jobs)):
        waiting.put(i)
    results: dict[int, tuple[str, bytes]] = {}
    progress = tqdm(total=len(jobs), unit="answer", disable=None)

    def work(server: Server) -> None:
        try:
            while True:
                i = waiting.get_nowait()
                results[i] = server.ask(jobs[i])
                progress.update()
        except queue.Empty:
            return

    threads = [threading.Thread(target=work, args=[server], daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    progress.close()
    return [results[i] for i in range(len(jobs))]


# Grading


@dataclass(frozen=True)
class Grader:
    """All that it takes to grade a class."""

    exercises: dict[str, Exercise]
    book: Book
    private: str | None = None  # the source of the private exercises, without their answers
    limits: Limits = Limits()
    workers: int = 2
    trusted: bool = False

    def grades(self, folder: Path, chapters: Sequence[str] | None = None) -> list[Grade]:
        """Return the grades of all students, sorted by student and exercise."""
        copies, notes = self.read(folder)
        set_work = chapters or {s.chapter for several in copies.values() for s in several}
        numbers = [n for n in self.exercises if n.partition(".")[0] in set_work]
        answers = [
            (student, submission.answer(number))
            for student, several in copies.items()
            for submission in several
            for number in numbers
            if number in submission.exercises()
        ]
        copies_of = Counter((student, answer.number) for student, answer in answers)
        for student, answer in answers:
            if (several := copies_of[student, answer.number]) > COPIES:
                said = f"{several} copies answer it, and more than {COPIES} are not run"
                answer.trouble = "flagged", f"{said}: take those away that do not count"
        verdicts = self.verdicts([answer for _, answer in answers])
        best: dict[tuple[str, str], tuple[str, str]] = {}
        for (student, answer), verdict in zip(answers, verdicts, strict=True):
            key = student, answer.number
            if key not in best or rank(verdict) < rank(best[key]):
                best[key] = verdict
        for student, number in ((s, n) for s in copies for n in numbers):
            note = notes[student].get(number.partition(".")[0]) or notes[student].get(None)
            absent = ("unreadable", note) if note else ("missing", "no notebook of this chapter")
            best.setdefault((student, number), absent)
        return [
            Grade(student, number.partition(".")[0], number, state, plain(sentence))
            for (student, number), (state, sentence) in sorted(best.items(), key=in_order)
        ]

    def read(self, folder: Path) -> tuple[dict[str, list[Submission]], dict[str, dict]]:
        """Return the notebooks of each student and, by chapter, why others cannot be read.

        Says which files are none.
        """
        copies: dict[str, list[Submission]] = {}
        notes: dict[str, dict[str | None, str]] = {}
        students, ignored = submissions.collected(folder, self.book.titles.values())
        for path in ignored:
            print(f"ignored: {plain(str(path))} is no notebook", file=sys.stderr)
        for student, paths in students.items():
            copies[student], notes[student] = [], {}
            for path in paths:
                try:
                    copies[student].append(Submission(path, self.book))
                except Unreadable as why:
                    notes[student][submissions.chapter_in(path.name, self.book)] = str(why)
        return copies, notes

    def verdicts(self, answers: Sequence[Answer]) -> list[tuple[str, str]]:
        """Return a state and a sentence for each answer."""
        runnable = [answer for answer in answers if not answer.trouble]
        compared = {n: reference(self.exercises[n]) for n in {a.number for a in runnable}}
        jobs = [
            {"number": a.number, "cells": a.cells, "answer": a.text, **vars(self.limits)}
            for a in runnable
        ]
        servers = [Server(self.private, self.trusted) for _ in range(min(self.workers, len(jobs)))]
        try:
            for server in servers:
                server.wait()
            outcome = dict(zip(map(id, runnable), run(jobs, servers), strict=True))
        finally:
            for server in servers:
                server.close()
        verdicts = []
        for answer in answers:
            verdict = answer.trouble
            if verdict is None:
                exercise = self.exercises[answer.number]
                verdict = judged(
                    exercise, compared[answer.number], *outcome[id(answer)], self.limits
                )
                if answer.looks and verdict[0] != "open":
                    said = f"look at {answer.looks}; as it stands: {verdict[0]}, {verdict[1]}"
                    verdict = ("flagged", said)
            verdicts.append(verdict)
        return verdicts


def rank(verdict: tuple[str, str]) -> tuple[int, str]:
    """Return a key that sorts the verdict that counts before others."""
    return STATES.index(verdict[0]), verdict[1]


def in_order(entry: tuple[tuple[str, str], Any]) -> tuple:
    """Return a key that sorts by student and exercise: 3.2, 3.10, 3.P1."""
    (student, number), _ = entry
    chapter, _, place = number.partition(".")
    of_the_book = place.isdecimal()
    return student, int(chapter), not of_the_book, int(place) if of_the_book else place


def plain(sentence: str) -> str:
    """Return a sentence on one line, of bearable length, without control characters."""
    text = submissions.on_one_line(sentence)
    return text if len(text) <= SENTENCE else f"{text[:SENTENCE]} ..."


# Writing


def for_a_table(text: str) -> str:
    """Return a cell that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else text


def write(grades: Sequence[Grade], folder: Path) -> list[Path]:
    """Write the table, and a page for each student; return the pages of an earlier run."""
    (folder / "feedback").mkdir(parents=True, exist_ok=True)
    with (folder / "grades.csv").open("w", newline="", encoding="utf8", errors="replace") as file:
        writer = csv.writer(file)
        writer.writerow(Grade._fields)
        writer.writerows([for_a_table(cell) for cell in grade] for grade in grades)
    written = pages(grade.student for grade in grades)
    for student, page in written.items():
        mine = [grade for grade in grades if grade.student == student]
        (folder / "feedback" / page).write_text(feedback(student, mine), "utf8", errors="replace")
    return [path for path in folder.glob("feedback/*.md") if path.name not in written.values()]


def pages(students: Iterable[str]) -> dict[str, str]:
    """Return the name of each student's file: none too long, no two alike on any disk."""
    found: dict[str, str] = {}
    for student in dict.fromkeys(students):
        stem = student.encode(errors="replace")[:240].decode(errors="ignore")
        names = itertools.chain([f"{stem}.md"], (f"{stem}~{i}.md" for i in itertools.count(2)))
        taken = {name.casefold() for name in found.values()}
        found[student] = next(name for name in names if name.casefold() not in taken)
    return found


def feedback(student: str, grades: Sequence[Grade]) -> str:
    """Return the page of one student."""
    right = sum(grade.state == "right" for grade in grades)
    lines = [
        f"# {html.escape(student, quote=False)}",
        "",
        f"{right} of {len(grades)} exercises are right.",
        "",
    ]
    for grade in grades:
        said = html.escape(grade.sentence, quote=False)
        if grade.state == "flagged":
            said = "your teacher will look at it"
        mark = MARKS.get(grade.state, "…")
        lines.append(f"- {mark} **{grade.exercise}** {grade.state}: {said}")
    return "\n".join(lines) + "\n"


def summary(grades: Sequence[Grade]) -> str:
    """Return how many there are of each state."""
    counts = Counter(grade.state for grade in grades)
    students = len({grade.student for grade in grades})
    return f"{students} students: " + ", ".join(f"{counts[s]} {s}" for s in STATES if counts[s])


def grader(arguments: Any) -> Grader:
    """Return the grader that a command line asks for.

    Raises:
        ValueError: there is no sandbox, or a file is not what it should be.
    """
    if not hasattr(os, "fork"):
        raise ValueError("grading needs Linux: use a container")
    if not arguments.trust and (why := sandbox.missing()):
        raise ValueError(
            f"{why}: submitted code would run with your rights. Install it or, in a container of "
            "your own without network, say --trust"
        )
    own: dict[str, Exercise] = {}
    tasks: dict[str, tuple[str, str]] = {}
    source = None
    if arguments.exercises:
        own, tasks = private.load(arguments.exercises)
        source = private.without_answers(arguments.exercises.read_text("utf8"))
    exercises = {e.number: e for chapter in framework.chapters().values() for e in chapter} | own
    known = submissions.book(tasks)
    if unknown := own.keys() - known.names.keys():
        raise ValueError(f"no task and no stub say how the answer to {sorted(unknown)} is called")
    limits = Limits(arguments.seconds, arguments.memory, arguments.wall)
    return Grader(exercises, known, source, limits, arguments.workers, arguments.trust)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m classroom.grade", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    limits = Limits()
    parser.add_argument("submissions", type=Path, help="a folder")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a folder")
    parser.add_argument("--chapters", nargs="+", help="those that were set (default: those found)")
    parser.add_argument("--exercises", type=Path, metavar="FILE", help="private exercises")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=limits.seconds, help="computing, for each")
    parser.add_argument("--memory", type=float, default=limits.memory, help="gigabytes, for each")
    parser.add_argument("--wall", type=float, default=limits.wall, help="by the clock, for each")
    parser.add_argument("--trust", action="store_true", help="run it without bubblewrap")
    parser.add_argument("--force", action="store_true", help="overwrite earlier grades")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        if not arguments.submissions.is_dir():
            raise ValueError(f"{arguments.submissions} is no folder")
        if (arguments.output / "grades.csv").exists() and not arguments.force:
            raise ValueError(f"{arguments.output} has grades already; --force overwrites")
        chapters = None
        if arguments.chapters:
            paths = hand_out.chosen(arguments.chapters)
            chapters = [path.name.partition("-")[0] for path in paths]
        grades = grader(arguments).grades(arguments.submissions, chapters)
        if not grades:
            raise ValueError(f"{arguments.submissions} has no notebook of the book")
        for path in write(grades, arguments.output):
            print(f"of an earlier run: {plain(str(path))}", file=sys.stderr)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{summary(grades)}\nwrote {arguments.output / 'grades.csv'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

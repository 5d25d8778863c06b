"""Carry the chapters' times to the README, and measured times to the chapters.

    python book/tools/timings.py              # chapters -> the README's table
    python book/tools/timings.py --measured   # cache of the last build -> chapters -> README
    python book/tools/timings.py --check      # fail if the README's table is out of date

For times that deserve their name, first empty _build/cache and run
`python book/tools/execute.py --one-at-a-time` on a machine with two cores and nothing else to do.
"""

import argparse
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

import book_site
import book_source
import format_notebooks
import nbformat
from book_source import ROOT
from jupyter_cache import get_cache

TIME = re.compile(
    r"\*\*Time:\*\* (?P<read>\d+) minutes to read and try, "
    r"(?P<exercises>\d+) more for the exercises; "
    r"the code runs in (?P<run>.+?) on two CPU cores\."
)
TABLE = re.compile(r"(?<=<!-- chapters -->\n).*?(?=<!-- end of chapters -->)", flags=re.DOTALL)
README = ROOT / "README.md"


class Times(NamedTuple):
    """What a chapter says of its time: minutes to read and try, minutes for all exercises."""

    read: int
    exercises: int
    run: str  # how long its code runs, in words


def times(path: Path) -> Times:
    """Return what a chapter says of its time.

    Raises:
        ValueError: the chapter has no line of the agreed form.
    """
    match = TIME.search(book_source.markdown(book_source.read_notebook(path)))
    if match is None:
        raise ValueError(f"{path.name} has no line of the form {TIME.pattern}")
    return Times(int(match["read"]), int(match["exercises"]), match["run"])


def seconds(run: str) -> float:
    """Return the seconds of a time in words, such as 45 s or 2.5 minutes."""
    number, unit = run.split()
    return float(number) * {"s": 1, "minutes": 60}[unit]


def spoken(duration: float) -> str:
    """Return a duration as a reader wants it: rounded up, in seconds or in minutes."""
    if duration <= 90:
        return f"{5 * math.ceil(duration / 5)} s"
    return f"{math.ceil(2 * duration / 60) / 2:g} minutes"


def measured(path: Path) -> float:
    """Return how many seconds a notebook took when it was last executed as it stands.

    Raises:
        KeyError: it was not.
    """
    cache = get_cache(book_site.cache_folder())
    record = cache.match_cache_notebook(nbformat.read(path, as_version=4))
    took: float = record.data["execution_seconds"]
    return took


def set_time(path: Path) -> None:
    """Write the measured time into a chapter."""
    notebook = book_source.read_notebook(path)
    run = spoken(measured(path))
    for cell in notebook["cells"]:
        text = book_source.source(cell)
        if match := TIME.search(text):
            cell["source"] = text[: match.start("run")] + run + text[match.end("run") :]
            print(f"{path.name}: {run}")
    path.write_text(format_notebooks.dump(format_notebooks.canonical(notebook)), encoding="utf8")


def table() -> str:
    """Return the README's table of chapters."""
    lines = ["| Chapter | To read and try | Exercises | To run |", "|---|---|---|---|"]
    for path in book_source.chapters():
        title = book_source.title(book_source.read_notebook(path))
        read, tasks, run = times(path)
        lines.append(f"| [{title}](book/{path.name}) | {read} min | {tasks} min | {run} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the command line; return 1 if --check finds the table out of date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measured", action="store_true", help="take times from the last build")
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    if arguments.measured:
        for path in book_source.chapters():
            set_time(path)
    text = README.read_text(encoding="utf8")
    wanted = TABLE.sub(lambda _: table(), text)
    if text == wanted:
        return 0
    if arguments.check:
        print("the table of chapters in README.md is out of date: run `make format`")
        return 1
    README.write_text(wanted, encoding="utf8")
    print("wrote the table of chapters in README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())

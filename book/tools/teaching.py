"""Carry to the pages for teachers what stands elsewhere: minutes, order, exercises, mistakes.

    python book/tools/teaching.py            # renew the blocks
    python book/tools/teaching.py --check    # fail if one of them is out of date

A block stands between `<!-- make NAME ... -->` and `<!-- made -->`; `BLOCKS` has the names. What it
says comes from the chapters (time, what they build on, exercises), from the mistakes that
`check` knows, and from the presets.
"""

import argparse
import html
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import book_source
import reference
import timings
import yaml
from book_source import anchor

from dmd_tutorial.notebook import exercises
from dmd_tutorial.runs.presets import PRESETS

FOLDER = book_source.BOOK / "teaching"
PICTURE = book_source.BOOK / "_static" / "chapters.svg"
BLOCK = re.compile(r"(<!-- make ([^>]+) -->\n).*?(?=<!-- made -->)", re.DOTALL)
BUILDS_ON = re.compile(r"\*\*Builds on:\*\* (.+?)(?=\n\n|\Z)", re.DOTALL)
EXERCISE = re.compile(
    r"^### (?P<heading>Exercise (?P<number>[\d.]+): (?P<title>.+))\n+"
    r"\*Difficulty: (?P<difficulty>\w+) · (?P<minutes>\d+) minutes · (?P<kind>[\w ]+)\*",
    re.MULTILINE,
)


class Task(NamedTuple):
    """An exercise, as a chapter's text has it."""

    number: str
    title: str
    difficulty: str
    minutes: int
    kind: str  # what is asked for first, such as derive
    anchor: str


class Chapter(NamedTuple):
    """What a chapter says of itself."""

    path: Path
    number: int
    title: str
    time: timings.Times
    builds_on: list[int]  # the chapters that it names itself
    tasks: list[Task]
    slides: int

    @property
    def link(self) -> str:
        """Its address, as the pages for teachers need it."""
        return f"../{self.path.name}"


@cache
def chapters() -> dict[int, Chapter]:
    """Return the chapters by their numbers."""
    return {chapter.number: chapter for chapter in map(read, book_source.chapters())}


def read(path: Path) -> Chapter:
    """Return what one chapter says of itself.

    Raises:
        ValueError: it does not say what it builds on.
    """
    notebook = book_source.read_notebook(path)
    text = book_source.markdown(notebook)
    number, line = book_source.number(path), BUILDS_ON.search(text)
    if number is None or line is None:
        raise ValueError(f"{path.name} has no line **Builds on:**")
    tasks = [
        Task(
            e["number"],
            e["title"],
            e["difficulty"],
            int(e["minutes"]),
            e["kind"],
            anchor(e["heading"]),
        )
        for e in EXERCISE.finditer(text)
    ]
    builds_on = sorted({int(n) for n in re.findall(r"\((\d+)-[^)]*\.ipynb", line[1])})
    title = book_source.title(notebook).partition(". ")[2]
    slides = sum(book_source.slide(cell) == "slide" for cell in notebook["cells"])
    return Chapter(path, number, title, timings.times(path), builds_on, tasks, slides)


def before(number: int) -> list[int]:
    """Return all chapters that one builds on, directly or not."""
    found = set(chapters()[number].builds_on)
    return sorted(found.union(*map(before, found)))


def parts() -> dict[str, list[Chapter]]:
    """Return the chapters of each part that has any, by the part's name, such as Part I."""
    contents = yaml.safe_load((book_source.ROOT / "_toc.yml").read_text(encoding="utf8"))
    found = {}
    for part in contents["parts"]:
        files = {entry["file"] for entry in part["chapters"]}
        some = [c for c in chapters().values() if f"book/{c.path.stem}" in files]
        if some:
            found[part["caption"].partition(":")[0]] = some
    return found


# The blocks


def times() -> Iterator[str]:
    """The landing page: how long a chapter takes, and a part."""
    all_times = [chapter.time for chapter in chapters().values()]
    read, tasks = ([t.read for t in all_times], [t.exercises for t in all_times])
    runs = sorted((t.run for t in all_times), key=timings.seconds)
    yield f"A chapter takes {min(read)} to {max(read)} minutes to read and try, and"
    yield f"{min(tasks)} to {max(tasks)} more with its exercises; its code runs in"
    yield f"{runs[0]} to {runs[-1]}. Each says so at its top."
    for name, some in parts().items():
        yield f"{name} takes {hours(total(some, 'read'))} to read,"
        yield f"and {hours(total(some, 'exercises'))} more with all exercises."


def hours(minutes: int) -> str:
    """Return minutes as hours, to the next half."""
    return f"{round(minutes / 30) / 2:g} hours"


def total(some: list[Chapter], what: str) -> int:
    """Return the minutes of several chapters: `read` or `exercises`."""
    return sum(getattr(chapter.time, what) for chapter in some)


def minutes() -> Iterator[str]:
    """A table: what each chapter takes, and what must come before it."""
    yield "| chapter | minutes to read and try | for exercises | after chapters | to read all |"
    yield "|---|---|---|---|---|"
    for name, some in parts().items():
        for each in some:
            needed = before(each.number)
            read = each.time.read + total([chapters()[n] for n in needed], "read")
            yield (
                f"| [{each.number}. {each.title}]({each.link}) | {each.time.read} "
                f"| {each.time.exercises} | {listed(needed)} | {read} |"
            )
        yield f"| **{name}** | **{total(some, 'read')}** | **{total(some, 'exercises')}** | | |"


def listed(numbers: list[int]) -> str:
    """Return numbers with commas, a dash for none."""
    return ", ".join(map(str, numbers)) or "-"


def graph() -> Iterator[str]:
    """The picture of what builds on what."""
    arrows = "; ".join(
        f"{number} leads to {' and '.join(map(str, after))}"
        for number in chapters()
        if (after := [n for n in chapters() if number in nearest(n)])
    )
    yield f"![A box for each chapter, and arrows downwards: {arrows}.](../_static/{PICTURE.name})"


def nearest(number: int) -> list[int]:
    """Return what a chapter builds on, without what those build on themselves."""
    direct = chapters()[number].builds_on
    return [n for n in direct if not any(n in before(other) for other in direct)]


def chapter(number: str) -> Iterator[str]:
    """The time of one chapter and its exercises."""
    each = chapters()[int(number)]
    yield f"[Chapter {number}]({each.link}): {each.time.read} minutes to read and try."
    deck = f"../../slides/{each.path.stem}.html"  # of the site: no page that Sphinx knows
    yield f'<a href="{deck}">Its {each.slides} slides</a>. Exercises:\n'
    yield "| exercise | minutes | difficulty | kind |"
    yield "|---|---|---|---|"
    for task in each.tasks:
        named = f"[{task.number} {task.title}]({each.link}#{task.anchor})"
        yield f"| {named} | {task.minutes} | {task.difficulty} | {task.kind} |"
    yield f"| together | {each.time.exercises} | | |"


def mistakes(number: str) -> Iterator[str]:
    """What `check` says of the wrong answers that it knows, exercise by exercise."""
    known = {exercise.number: exercise for exercise in exercises.chapters()[number]}
    count = sum(len(exercise.mistakes) for exercise in known.values())
    yield f"<details><summary>All {count} mistakes that <code>check</code> names</summary>\n"
    for task in chapters()[int(number)].tasks:
        yield f"**{task.number} {task.title}**\n"
        for sentence in known[task.number].mistakes:
            yield f"- {reference.escaped(sentence)}"
        yield ""
    yield "</details>"


def home(*words: str) -> Iterator[str]:
    """What is done outside of class, with minutes: `read 1 2 set 1.3 2.1`."""
    where = words.index("set") if "set" in words else len(words)
    read = [chapters()[int(n)] for n in words[1:where]]
    tasks = {task.number: (c, task) for c in chapters().values() for task in c.tasks}
    given = [tasks[number] for number in words[where + 1 :]]
    whole = total(read, "read") + sum(task.minutes for _, task in given)
    yield f"**At home, {whole} minutes:**"
    if read:
        links = " and ".join(f"[chapter {c.number}]({c.link})" for c in read)
        yield f"read {links} ({total(read, 'read')})" + ("," if given else ".")
    if given:
        links = ", ".join(f"[{t.number}]({c.link}#{t.anchor})" for c, t in given)
        yield f"exercises {links} ({sum(task.minutes for _, task in given)})."
    if read:
        yield "\n**In class:** " + ", ".join(
            f"[notes on chapter {c.number}]({notes(c)})" for c in read
        )


def notes(each: Chapter) -> str:
    """Return the address of the notes on a chapter.

    Raises:
        ValueError: there are none.
    """
    heading = f"Chapter {each.number}: "
    for path in sorted(FOLDER.glob("*.md")):
        if match := re.search(rf"^## ({heading}.+)$", path.read_text("utf8"), re.MULTILINE):
            return f"{path.name}#{anchor(match[1])}"
    raise ValueError(f"no page has notes under {heading!r}")


def budget(name: str) -> Iterator[str]:
    """What a preset costs, in its own words."""
    yield f"**Budget.** Preset `{name}`: {PRESETS[name].cost}."


BLOCKS = {make.__name__: make for make in (times, minutes, graph, chapter, mistakes, home, budget)}


def filled(text: str) -> str:
    """Return a page's text with every block made anew.

    Raises:
        ValueError: there is no such block.
    """

    def block(match: re.Match[str]) -> str:
        name, *words = match[2].split()
        if name not in BLOCKS:
            raise ValueError(f"no block is called {name!r}, only {[*BLOCKS]}")
        return match[1] + "\n".join(BLOCKS[name](*words)) + "\n"

    return BLOCK.sub(block, text)


# The picture

BOX, GAP = (84, 62), (8, 34)  # pixels: width and height of a box, and between two
STYLE = "font-family: Helvetica, Arial, sans-serif; font-size: 13px; text-anchor: middle"
TIP = '<marker id="tip" markerWidth="7" markerHeight="7" refX="6" refY="3.5" orient="auto">'


def places() -> dict[int, tuple[int, int]]:
    """Return the row and column of each chapter: below all that it builds on, no lines crossing."""
    row: dict[int, int] = {}
    for number in chapters():
        row[number] = 1 + max((row[n] for n in nearest(number)), default=-1)
    column: dict[int, int] = {}

    def wanted(number: int) -> tuple[float, int]:
        above = [column[n] for n in nearest(number)]
        return sum(above) / max(1, len(above)), number

    for level in range(1 + max(row.values())):
        here = sorted((n for n in row if row[n] == level), key=wanted)
        column |= {number: place for place, number in enumerate(here)}
    return {number: (row[number], column[number]) for number in row}


def picture() -> str:
    """Return the graph of the chapters as SVG, narrow enough for a phone."""
    at = {
        number: (2 + column * (BOX[0] + GAP[0]), 2 + row * (BOX[1] + GAP[1]))
        for number, (row, column) in places().items()
    }
    width = max(x for x, _ in at.values()) + BOX[0] + 2
    height = max(y for _, y in at.values()) + BOX[1] + 2
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" style="{STYLE}">',
        f'<defs>{TIP}<path d="M0 0 L7 3.5 L0 7 z" fill="#555"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    half = BOX[0] // 2
    for number, (x, y) in at.items():
        for n in nearest(number):
            start = f"M{at[n][0] + half} {at[n][1] + BOX[1]}"
            path = f'<path d="{start} L{x + half} {y - 1}" stroke="#555" marker-end="url(#tip)"/>'
            lines.append(path)
    colours = dict(zip(parts(), ("#dcebf7", "#fdebd3"), strict=True))
    for name, some in parts().items():
        for each in some:
            lines += box(each, *at[each.number], colours[name])
    return "\n".join([*lines, "</svg>"]) + "\n"


def box(each: Chapter, x: int, y: int, colour: str) -> Iterator[str]:
    """Yield the box of a chapter: its number, and the words of its file's name below."""
    width, height = BOX
    yield (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="5" fill="{colour}" '
        'stroke="#555"/>'
    )
    words = each.path.stem.partition("-")[2].replace("kl", "KL").split("-")
    for i, word in enumerate([str(each.number), *words]):
        weight = "" if i else ' font-weight="bold"'
        place = f'x="{x + width // 2}" y="{y + 18 + 17 * i}"'
        yield f'<text {place} fill="#111"{weight}>{html.escape(word)}</text>'


# The files


def made() -> dict[Path, str]:
    """Return every file with a block, and the picture, as they should be."""
    pages = [book_source.BOOK / "intro.md", *sorted(FOLDER.glob("*.md"))]
    texts = {path: filled(path.read_text(encoding="utf8")) for path in pages}
    return texts | {PICTURE: picture()}


def main() -> int:
    """Run the command line; return 1 if --check finds a file out of date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    stale = {
        path: text
        for path, text in made().items()
        if not path.exists() or path.read_text(encoding="utf8") != text
    }
    for path, text in stale.items():
        name = path.relative_to(book_source.ROOT)
        if arguments.check:
            print(f"{name} is out of date: run `make format`")
        else:
            path.write_text(text, encoding="utf8")
            print(f"wrote {name}")
    return 1 if stale and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())

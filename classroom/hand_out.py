"""Make the notebooks that students get: chapters of the book without their solutions.

    python -m classroom.hand_out 1-6 -o hand-out                    # six chapters
    python -m classroom.hand_out 3 4 -o hand-out --exercises-only   # what is handed in

Links lead to the site, and the files that a chapter reads are carried along.
"""

import argparse
import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from classroom import ROOT

# isort: split
import book_source
import cells
import format_notebooks
from book_source import Cell, Notebook

CHECKED = re.compile(r"^check\(\s*\"(\d+\.\w+)\",\s*(\w+)\s*\)", flags=re.MULTILINE)
HEADING = re.compile(r"^#{1,3} ", flags=re.MULTILINE)
COLAB = re.compile(r"^\[Open in Colab\]\([^)]*\)\n+", flags=re.MULTILINE)
COLAB_SITE = "https://colab.research.google.com/github"
HINTS = re.compile(r"\n*<details><summary>Hint \d</summary>.*?</details>", flags=re.DOTALL)
# sentences of a task that speak of what a hand-out does not have
FINDINGS = re.compile(r"\n*<details><summary>(?!Hint).*?</details>", flags=re.DOTALL)
USED = re.compile(r"`[^`\n]*?\b(\w+)\.\w+\(")
CALLED = re.compile(r"`(\w+)\(")
SOLUTION = re.compile(
    r" ?\(The solution says\.\)| Only then open the (?:cells below|solution)[^.]*\."
)
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([\w./-]+)\.(?:ipynb|md)(#[^)]*)?\)")
ANCHOR = re.compile(r"\]\((#[^)]*)\)")
GITHUB = re.compile(r"https://github\.com/[\w.-]+/[\w.-]+/blob/\S+")
SHADOW = """\
# @title Set-up: some answers are graded after they are handed in
from dmd_tutorial.notebook import check as check_of_the_book


def check(number, answer):
    if number in {numbers}:
        return f"{{number}}: handed in"
    return check_of_the_book(number, answer)
"""
NOT_SHOWN = "# the package's code is not shown here: exercises ask for it"
GRADED = 'result = check("{0}", {1})\nassert result.passed, result\nresult'


class Options(NamedTuple):
    """How a hand-out is made."""

    exercises_only: bool = False
    hints: bool = True
    nbgrader: bool = False
    colab: str | None = None  # the folder on GitHub, .../blob/main/hand-out, of Colab's links
    tasks: dict[str, tuple[str, str]] = {}  # noqa: RUF012 - of private exercises: text and stub
    handed_in: tuple[str, ...] = ()  # the numbers that only the grader checks


def hand_out(path: Path, options: Options) -> Notebook:
    """Return a chapter as students get it."""
    notebook = book_source.read_notebook(path)
    kept = without_solutions(notebook["cells"])
    if options.exercises_only:
        kept = [*exercises_alone(kept, book_source.title(notebook))]
    kept = with_tasks(kept, str(book_source.number(path)), options)
    kept = [cell | {"source": text_for_students(cell, path, options)} for cell in kept]
    if options.nbgrader:
        kept = [part for cell in kept for part in for_nbgrader(cell)]
    made = format_notebooks.canonical(notebook | {"cells": kept})
    if options.nbgrader:
        mark_for_nbgrader(made)
    answers = dict(found for cell in made["cells"] for found in answer_of(cell))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))["project"]
    about = {"chapter": book_source.number(path), "version": project["version"], "answers": answers}
    return made | {"metadata": made["metadata"] | {"dmd_tutorial": about}}


def answer_of(cell: Cell) -> list[tuple[str, str]]:
    """Return the number and the name that a stub checks, or nothing."""
    text = book_source.source(cell).replace("result = check(", "check(")
    return CHECKED.findall(text) if cell["cell_type"] == "code" else []


def without_solutions(book_cells: list[Cell]) -> list[Cell]:
    """Return the cells without solutions, and without all that follows a stub in an exercise."""
    kept, answered = [], False
    for cell in book_cells:
        if cell["cell_type"] == "markdown" and HEADING.search(book_source.source(cell)):
            answered = False
        if not answered and "solution" not in book_source.tags(cell):
            kept.append(without_shown(cell))
        answered = answered or bool(answer_of(cell))
    return kept


def without_shown(cell: Cell) -> Cell:
    """Return a cell without the lines that show code of the package, which exercises ask for."""
    text = book_source.source(cell)
    if cell["cell_type"] != "code" or "show_code(" not in text:
        return cell
    lines = text.splitlines()
    for node in reversed(ast.parse(cells.python(text)).body):
        if isinstance(node, ast.Expr) and ast.unparse(node).startswith("show_code("):
            lines[node.lineno - 1 : node.end_lineno] = [NOT_SHOWN]
    return cell | {"source": "\n".join(lines)}


def exercises_alone(kept: list[Cell], title: str) -> Iterator[Cell]:
    """Yield a title, the set-up, the imports and the exercises."""
    place = f"Numbers of equations and figures are those of [chapter {title.partition('.')[0]}]"
    head = f"# {title}: exercises\n\n[Open in Colab]()\n\n{place}(.md)."
    yield {"cell_type": "markdown", "metadata": {}, "source": head}
    inside, helpers = False, used_in_tasks(kept)
    for i, cell in enumerate(kept):
        text = book_source.source(cell)
        if cell["cell_type"] == "markdown":
            for part in re.split(r"^(?=## )", text, flags=re.MULTILINE):
                if part.startswith("## "):
                    inside = part.startswith("## Exercises")
                if inside:
                    yield cell | {"source": part}
        elif inside or i in helpers or text.startswith(("# @title Set-up", "# @title Imports")):
            yield cell


def used_in_tasks(kept: list[Cell]) -> set[int]:
    """Return the places of the cells that make what the exercises tell students to call."""
    notebook = {"cells": kept}
    tasks = book_source.markdown(notebook).partition("## Exercises")[2]
    names, functions = set(USED.findall(tasks)), set(CALLED.findall(tasks))
    makers = [
        cell.place
        for cell in cells.cells(notebook)
        if cell.binds & names or functions & defined(kept[cell.place])
    ]
    return {place for maker in makers for place in cells.needed(notebook, maker)}


def defined(cell: Cell) -> set[str]:
    """Return the functions that a code cell defines."""
    body = ast.parse(cells.python(book_source.source(cell))).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef)}


def with_tasks(kept: list[Cell], chapter: str, options: Options) -> list[Cell]:
    """Return the cells with the tasks of private exercises behind the others of the chapter."""
    mine = [number for number in options.handed_in if number.partition(".")[0] == chapter]
    if not mine:
        return kept
    code = {"cell_type": "code", "metadata": {}}
    first = next(i for i, cell in enumerate(kept) if "check" in imports(cell)) + 1
    last = max(i for i, cell in enumerate(kept) if answer_of(cell)) + 1
    new: list[Cell] = []
    for text, stub in (options.tasks[number] for number in mine if number in options.tasks):
        new += [{"cell_type": "markdown", "metadata": {}, "source": text}, code | {"source": stub}]
    shadow = code | {"source": SHADOW.format(numbers=repr(mine))}
    return [*kept[:first], shadow, *kept[first:last], *new, *kept[last:]]


def imports(cell: Cell) -> set[str]:
    """Return the names that a code cell imports."""
    if cell["cell_type"] != "code":
        return set()
    tree = ast.parse(cells.python(book_source.source(cell)))
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    return {alias.asname or alias.name for node in nodes for alias in node.names}


def text_for_students(cell: Cell, path: Path, options: Options) -> str:
    """Return a cell's source with links that lead somewhere from wherever the notebook lies."""
    text = book_source.source(cell)
    site = f"{book_source.site(book_source.repository())}/book"
    if cell["cell_type"] == "markdown":
        folder = (options.colab or "").removeprefix("https://github.com/").rstrip("/")
        address = f"{COLAB_SITE}/{folder}/{output_name(path, options)}"
        text = COLAB.sub(f"[Open in Colab]({address})\n\n" if options.colab else "", text)
        text = SOLUTION.sub("", text)
        text = FINDINGS.sub("", text) if "### Exercise" in text else text
        text = text if options.hints else HINTS.sub("", text)
        text = text.replace("](.md)", f"]({site}/{path.stem}.html)")
        if options.exercises_only:
            text = ANCHOR.sub(rf"]({site}/{path.stem}.html\1)", text)
    return LINK.sub(lambda m: f"]({site}/{m[1]}.html{m[2] or ''})", text)


def output_name(path: Path, options: Options) -> str:
    """Return the name of a hand-out's file."""
    return f"{path.stem}{'-exercises' if options.exercises_only else ''}.ipynb"


# nbgrader: https://nbgrader.readthedocs.io, for those who have it. Its release clears what stands
# between the two marks, and its autograder runs the locked cells.


def for_nbgrader(cell: Cell) -> list[Cell]:
    """Return a stub as two cells: the answer, and its check; another cell as it is."""
    found = answer_of(cell)
    if not found:
        return [cell]
    text = CHECKED.sub("", book_source.source(cell)).rstrip()
    statement = ast.parse(text).body[-1]
    body = statement.body if isinstance(statement, ast.FunctionDef) else [statement]
    first = body[1 if len(body) > 1 and isinstance(body[0], ast.Expr) else 0]
    lines, indent = text.splitlines(), " " * first.col_offset
    told = [f"# {line}" for line in lines[first.lineno - 1 :]] if first is statement else []
    lines[first.lineno - 1 : first.lineno - 1] = [*told, f"{indent}### BEGIN SOLUTION"]
    lines.append(f"{indent}### END SOLUTION")
    answer = cell | {"source": "\n".join(lines)}
    return [answer, cell | {"source": GRADED.format(*found[0])}]


def mark_for_nbgrader(notebook: Notebook) -> None:
    """Write the metadata of the cells that `for_nbgrader` made."""
    for answer, check in zip(notebook["cells"], notebook["cells"][1:], strict=False):
        for number, _ in answer_of(check):
            name = number.replace(".", "-")
            common = {"schema_version": 3, "task": False, "cell_type": "code"}
            answer["metadata"]["nbgrader"] = common | {
                "grade_id": f"answer-{name}", "solution": True, "grade": False, "locked": False
            }  # fmt: skip
            check["metadata"]["nbgrader"] = common | {
                "grade_id": f"check-{name}", "solution": False, "grade": True, "locked": True,
                "points": 1,
            }  # fmt: skip


# Files


def data_files(notebook: Notebook) -> Iterator[Path]:
    """Yield the book's files that a notebook reads.

    Raises:
        ValueError: the name of a recorded result comes out of a computation.
    """
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        for node in ast.walk(ast.parse(cells.python(book_source.source(cell)))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "recorded":
                name = getattr(node.args[0], "value", None)
                if not isinstance(name, str):
                    raise ValueError(f"which file does {ast.unparse(node)} read?")
                yield Path("results", f"{name}.json")


def files(paths: Iterable[Path], options: Options) -> dict[Path, bytes]:
    """Return what is to be written, by its name within the hand-out's folder."""
    made: dict[Path, bytes] = {}
    for path in paths:
        notebook = hand_out(path, options)
        made[Path(output_name(path, options))] = format_notebooks.dump(notebook).encode()
        made |= {name: (book_source.BOOK / name).read_bytes() for name in data_files(notebook)}
    return made


def is_of_the_repository(folder: Path) -> bool:
    """Return whether a folder, or that in the repository in which it lies, has tracked files."""
    if not folder.resolve().is_relative_to(ROOT):
        return False
    top = folder.resolve().relative_to(ROOT).parts[:1] or (".",)
    tracked = ""
    if shutil.which("git"):
        asked = ["git", "-C", str(ROOT), "ls-files", "--", *top]
        tracked = subprocess.run(asked, capture_output=True, text=True).stdout
    return bool(tracked) or top[0] in (".", "book")


def write(made: dict[Path, bytes], folder: Path, force: bool) -> list[Path]:
    """Write all files that are not there already, or none; return their names.

    Raises:
        ValueError: one of them is there already, with another content.
    """
    if is_of_the_repository(folder):
        raise ValueError(f"{folder} belongs to the repository: choose another folder, or a new one")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: -o takes a folder")
    there = {name for name in made if (folder / name).exists()}
    other = sorted(name for name in there if (folder / name).read_bytes() != made[name])
    if other and not force:
        said = ", ".join(str(folder / name) for name in other)
        raise ValueError(f"already there, and different: {said}; --force overwrites")
    new = [name for name in made if name not in there or name in other]
    for name in new:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(made[name])
    return new


def chosen(names: list[str]) -> list[Path]:
    """Return the chapters that are meant by numbers, ranges of numbers and files.

    Raises:
        ValueError: there is no such chapter.
    """
    known = {book_source.number(path): path for path in book_source.chapters()}
    by_name = {path.name: number for number, path in known.items()}
    paths: dict[Path, None] = {}
    for name in names:
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", name)
        numbers = [by_name.get(Path(name).name)]
        if match:
            numbers = [*range(int(match[1]), int(match[2] or match[1]) + 1)]
        if not numbers or not known.keys() >= set(numbers):
            raise ValueError(f"there is no chapter {name}: the book has 1 to {len(known)}")
        paths |= dict.fromkeys(known[number] for number in numbers)
    return list(paths)


def options_of(arguments: Any) -> Options:
    """Return the options that a command line asks for.

    Raises:
        ValueError: they do not go together, or the private exercises' file is no such file.
    """
    exercises: dict[str, Any] = {}
    tasks: dict[str, tuple[str, str]] = {}
    if arguments.exercises:
        from classroom import private  # needs PyTorch, which takes seconds

        exercises, tasks = private.load(arguments.exercises)
    if exercises and arguments.nbgrader:
        raise ValueError("nbgrader runs the checks of the notebook: it has none that is private")
    if arguments.colab and not GITHUB.fullmatch(arguments.colab):
        raise ValueError("--colab takes a folder: https://github.com/you/course/blob/main/hand-out")
    for number, (_, stub) in tasks.items():
        if [each for each, _ in CHECKED.findall(stub)] != [number]:
            raise ValueError(f'the stub of {number} must end in check("{number}", its name)')
    return Options(
        arguments.exercises_only, not arguments.no_hints, arguments.nbgrader, arguments.colab,
        tasks, tuple(exercises),
    )  # fmt: skip


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m classroom.hand_out")
    parser.add_argument("chapters", nargs="+", help="3, or 1-6, or book/3-kl-gradient.ipynb")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a folder")
    parser.add_argument("--exercises-only", action="store_true", help="set-up and exercises alone")
    parser.add_argument("--no-hints", action="store_true", help="leave the hints out")
    parser.add_argument("--nbgrader", action="store_true", help="with metadata for nbgrader")
    parser.add_argument("--colab", metavar="URL", help="where you will put the folder on GitHub")
    parser.add_argument("--exercises", type=Path, metavar="FILE", help="private exercises")
    parser.add_argument("--force", action="store_true", help="overwrite what is there")
    arguments = parser.parse_args()
    try:
        options, paths = options_of(arguments), chosen(arguments.chapters)
        numbers = {number.partition(".")[0] for number in options.handed_in}
        if numbers and not numbers & {str(book_source.number(path)) for path in paths}:
            raise ValueError(f"{arguments.exercises} is for chapters {sorted(numbers)}, not these")
        made = files(paths, options)
        new = write(made, arguments.output, arguments.force)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    said = ("unchanged:", "wrote")
    print("\n".join(f"{said[name in new]} {arguments.output / name}" for name in made))
    return 0


if __name__ == "__main__":
    sys.exit(main())

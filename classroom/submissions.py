"""Read what students hand in, without executing any of it.

A notebook is parsed, and for each exercise the statements are found that its answer needs: those
that import, define or assign the names in its check, and the names that these need in turn.
"""

import ast
import json
import os
import re
import symtable
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from classroom import hand_out

# isort: split
import book_source
import cells

LARGEST = 50 * 2**20  # bytes of a notebook
LONGEST = 200_000  # characters of a notebook's code
DEEPEST = 100  # pieces of code within one another, which recursion has to get to the end of
NOISE = {"__MACOSX", ".DS_Store", ".ipynb_checkpoints"}  # of which nobody need hear
MOODLE = re.compile(r"_\d+_assignsubmission_.*$", flags=re.DOTALL)  # NAME_ID_..., folders and files
CANVAS = re.compile(r"(_LATE)?_\d+_\d+_.*$", flags=re.DOTALL)  # NAME_ID_ID_FILE


class Unreadable(Exception):
    """A file that is no notebook; says why."""


# The book


@dataclass(frozen=True)
class Book:
    """What the grader knows of the hand-outs: names of answers, and cells that are its own."""

    names: dict[str, str]  # of the answer to each exercise
    cells: frozenset[str] = frozenset()
    solutions: frozenset[str] = frozenset()
    titles: dict[str, str] = field(default_factory=dict)  # of the files, by chapter


def book(tasks: dict[str, tuple[str, str]]) -> Book:
    """Read the chapters, and private exercises' stubs."""
    names: dict[str, str] = {}
    texts: dict[bool, set[str]] = {True: set(), False: set()}
    titles = {}
    for path in book_source.chapters():
        titles[str(book_source.number(path))] = path.stem
        for cell in book_source.read_notebook(path)["cells"]:
            if cell["cell_type"] != "code":
                continue
            solved = "solution" in book_source.tags(cell)
            texts[solved].add(book_source.source(cell).strip())
            names |= {} if solved else dict(hand_out.answer_of(cell))
    names |= {number: dict(hand_out.CHECKED.findall(stub))[number]
              for number, (_, stub) in tasks.items()}  # fmt: skip
    return Book(names, frozenset(texts[False]), frozenset(texts[True]), titles)


# Files


def collected(folder: Path, titles: Iterable[str]) -> tuple[dict[str, list[Path]], list[Path]]:
    """Return the files of each student, and those that are no submission.

    A student has a folder, or files that begin with the name: `ada/any/x.ipynb`, `ada.ipynb`,
    `ada_3-kl-gradient.ipynb`, and the ways of `MOODLE` and `CANVAS`.
    """
    found: dict[str, list[Path]] = {}
    ignored: list[Path] = []
    title = "|".join(map(re.escape, titles))
    for path in sorted(each for each in folder.iterdir() if each.name not in NOISE):
        own = path.is_dir() and not path.is_symlink() and not path.name.startswith(".")
        files = [*files_in(path)] if own else [path]
        handed_in = [f for f in files if f.suffix == ".ipynb" or re.search(title, f.name)]
        handed_in = [f for f in handed_in if not f.name.startswith(".")]
        ignored += [f for f in files if f not in handed_in]
        if own or handed_in:
            name = MOODLE.sub("", path.name if own else CANVAS.sub("", path.stem))
            name = name if own else re.sub(rf"[\s_.-]*({title}).*$", "", name) or path.stem
            found.setdefault(on_one_line(name) or ascii(name), []).extend(handed_in)
    return found, ignored


def on_one_line(text: str) -> str:
    """Return a text without control characters, an accent and its letter as one."""
    text = unicodedata.normalize("NFC", text)
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def files_in(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder and those below, and hidden folders; no link is followed."""
    for here, folders, names in os.walk(folder):
        hidden = [name for name in folders if name.startswith(".")]
        yield from (Path(here, name) for name in sorted({*hidden, *names} - NOISE))
        folders[:] = sorted({*folders} - {*hidden} - NOISE)


def read(path: Path) -> dict[str, Any]:
    """Return a submitted notebook, as much of it as is used.

    Raises:
        Unreadable: it is none.
    """
    if path.suffix != ".ipynb":
        raise Unreadable(f"{path.name} is no notebook (.ipynb)")
    try:
        if path.is_symlink() or not path.is_file():
            raise Unreadable(f"{path.name} is no file")
        if path.stat().st_size > LARGEST:
            raise Unreadable(f"{path.name} is larger than {LARGEST >> 20} MB: clear its outputs")
        notebook = json.loads(path.read_text(encoding="utf-8-sig"))
        code = [
            book_source.source(cell)
            for cell in notebook["cells"]
            if cell["cell_type"] == "code" and book_source.source(cell).strip()
        ]
        metadata = notebook.get("metadata")
        about = metadata.get("dmd_tutorial") if isinstance(metadata, dict) else None
    except json.JSONDecodeError:
        raise Unreadable(f"{path.name} is not JSON: save it again from Jupyter") from None
    except (OSError, ValueError, RecursionError):
        raise Unreadable(f"{path.name} cannot be read as text") from None
    except (KeyError, TypeError, AttributeError):
        raise Unreadable(f"{path.name} has no cells as a notebook has them") from None
    if sum(map(len, code)) > LONGEST:
        raise Unreadable(f"{path.name} has more than {LONGEST} characters of code")
    return {"code": code, "about": about if isinstance(about, dict) else {}}


def chapter_in(name: str, known: Book) -> str | None:
    """Return the chapter that a file's name speaks of."""
    for chapter, title in known.titles.items():
        if title in name:
            return chapter
    numbers = [n for n in re.findall(r"\d+", name) if n in known.titles]
    return numbers[0] if len(numbers) == 1 else None


# Code


@dataclass
class Statement:
    """A statement of a cell that gives a value to names."""

    cell: int
    place: int  # in its cell
    node: ast.stmt
    binds: set[str]
    reads: set[str]


@dataclass
class Checked:
    """A call of `check`: what it is given, and where it stands."""

    cell: int
    answer: ast.expr


class Submission:
    """One notebook of one student."""

    def __init__(self, path: Path, known: Book):
        content = read(path)
        self.path, self.known = path, known
        self.sources = {
            i: cells.python(text)
            for i, text in enumerate(content["code"], 1)
            if text.strip() not in known.solutions
        }
        self.originals = {
            i for i, text in enumerate(content["code"], 1) if text.strip() in known.cells
        }
        self.trees: dict[int, ast.Module] = {}
        self.broken: dict[int, str] = {}
        self.statements: list[Statement] = []
        self.functions: dict[str, ast.FunctionDef] = {}
        for i, source in self.sources.items():
            self.parse(i, source)
        self.binding: dict[str, list[Statement]] = {}
        imported = {n for each in self.statements if is_import(each.node) for n in each.binds}
        for each in self.statements:
            # torch.nn.init.zeros_(w) does not change torch
            for name in each.binds if is_import(each.node) else each.binds - imported:
                self.binding.setdefault(name, []).append(each)
        self.checks = self.checks_found()
        self.chapter = self.chapter_of(content["about"])

    def parse(self, i: int, source: str) -> None:
        """Add the statements of a cell, or what is wrong with it."""
        try:
            tree = ast.parse(source)
            if is_deep(tree):
                self.broken[i] = "its cell is nested too deeply"
                return
            defined = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
            self.functions |= defined
            found = [
                Statement(i, place, node, *names_of(node, self.functions))
                for place, node in enumerate(tree.body)
            ]
        except cells.BROKEN as error:
            line = f"line {error.lineno} of " if isinstance(error, SyntaxError) else ""
            self.broken[i] = f"{line}its cell is no Python: {getattr(error, 'msg', None) or error}"
        else:
            self.trees[i] = tree
            self.statements += found

    def chapter_of(self, about: dict[str, Any]) -> str | None:
        """Return the chapter by the metadata, the file's name, or what is checked most."""
        if str(about.get("chapter")) in self.known.titles:
            return str(about["chapter"])
        checked = [number.partition(".")[0] for number in self.checks]
        named = chapter_in(self.path.name, self.known)
        return named or max(sorted(set(checked)), key=checked.count, default=None)

    def exercises(self) -> set[str]:
        """Return the exercises that the notebook is for, answered or not."""
        of_chapter = {n for n in self.known.names if n.partition(".")[0] == self.chapter}
        return of_chapter | set(self.checks)

    def checks_found(self) -> dict[str, Checked]:
        """Return the last check of each exercise."""
        found = {}
        aliases = {"check"} | {
            alias.asname
            for each in self.statements
            if isinstance(each.node, ast.ImportFrom)
            for alias in each.node.names
            if alias.name == "check" and alias.asname
        }
        for i, tree in self.trees.items():
            for node in ast.walk(tree):
                if isinstance(node, ast.Call) and called(node) in aliases:
                    given = [*node.args, *(k.value for k in node.keywords)][:2]
                    number = getattr(given[0], "value", None) if len(given) == 2 else None
                    if isinstance(number, str) and number in self.known.names:
                        found[number] = Checked(i, given[1])
        return {n: c for n, c in found.items() if not is_ellipsis(c.answer)}

    def answer(self, number: str) -> "Answer":
        """Return what is known of the answer to an exercise."""
        name = self.known.names[number]
        check = self.checks.get(number)
        answer = check.answer if check else ast.Name(name, ast.Load())
        text = ast.unparse(answer)
        wanted = {n.id for n in ast.walk(answer) if isinstance(n, ast.Name)}
        limit = check.cell if check else len(self.sources) + len(self.broken) + 10**6
        used = self.needed(wanted, limit)
        bound = set().union(*(each.binds for each in used))
        trouble = None
        if isinstance(answer, ast.Name) and answer.id not in bound:
            pattern = rf"check\(\s*[\"']{re.escape(number)}[\"']|^(def|class) {text}\b|^{text} *="
            for i, sentence in self.broken.items():
                if re.search(pattern, self.sources[i], flags=re.MULTILINE):
                    trouble = ("unreadable", sentence)
            where = "" if check else f' and there is no check("{number}", ...)'
            trouble = trouble or ("missing", f"`{text}` is defined nowhere{where}")
        elif not check:
            # the cell of the check may be the one that is broken
            for i, sentence in self.broken.items():
                if re.search(rf"check\(\s*[\"']{re.escape(number)}[\"']", self.sources[i]):
                    trouble = ("unreadable", sentence)
        return Answer(number, text, self.cells_of(used), trouble, self.looks(number, used, check))

    def needed(self, wanted: set[str], limit: int) -> list[Statement]:
        """Return the statements that give values to names, as they are when a cell has run."""
        used: dict[int, Statement] = {}
        waiting, seen = set(wanted), set()
        while waiting:
            name = waiting.pop()
            seen.add(name)
            binding = self.binding.get(name, [])
            earlier = [each for each in binding if each.cell <= limit]
            new_below = [e for e in binding if e.cell > limit and e.cell not in self.originals]
            if earlier and new_below and all(each.cell in self.originals for each in earlier):
                earlier = new_below  # the stub was left, and the answer written below it
            for each in earlier or binding:
                used[id(each)] = each
                waiting |= each.reads - seen
        stars = [each for each in self.binding.get("*", []) if each.cell <= limit]
        used |= {id(each): each for each in stars}
        return sorted(used.values(), key=lambda each: (each.cell, each.place))

    def cells_of(self, used: list[Statement]) -> list[list[Any]]:
        """Return the statements as the child process takes them."""
        places: dict[int, list[int]] = {}
        for each in used:
            places.setdefault(each.cell, []).append(each.place)
        return [[i, self.sources[i], wanted] for i, wanted in places.items()]

    def looks(self, number: str, used: list[Statement], check: Checked | None) -> str | None:
        """Say what a person should look at in an answer's cells, or in cells of no exercise."""
        mine = {each.cell for each in used} | ({check.cell} if check else set())
        others = {c.cell for n, c in self.checks.items() if n != number} - mine
        return next((found for i, found in self.suspicious_cells.items() if i not in others), None)

    @cached_property
    def suspicious_cells(self) -> dict[int, str]:
        """What a person should look at, by cell; cells of the hand-out have nothing of the kind."""
        new = {i: tree for i, tree in self.trees.items() if i not in self.originals}
        return {i: found for i, tree in new.items() if (found := suspicious(tree))}


@dataclass
class Answer:
    """An answer: the code that it needs and, if it cannot be run, its state and a sentence."""

    number: str
    text: str  # the expression that is checked
    cells: list[list[Any]]  # place, source, and which of its statements
    trouble: tuple[str, str] | None
    looks: str | None  # what a person should look at


def is_deep(tree: ast.AST) -> bool:
    """Return whether pieces of code lie more than `DEEPEST` times within one another."""
    level = [tree]
    for _ in range(DEEPEST):
        level = [inner for node in level for inner in ast.iter_child_nodes(node)]
    return bool(level)


def called(node: ast.Call) -> str | None:
    """Return the last part of a called function's name."""
    return getattr(node.func, "id", getattr(node.func, "attr", None))


def is_import(node: ast.stmt) -> bool:
    """Return whether a statement imports."""
    return isinstance(node, ast.Import | ast.ImportFrom)


def is_ellipsis(node: ast.expr) -> bool:
    """Return whether an expression is three dots."""
    return isinstance(node, ast.Constant) and node.value is Ellipsis


def names_of(node: ast.stmt, functions: dict[str, ast.FunctionDef]) -> tuple[set[str], set[str]]:
    """Return the names that a statement gives a value, or changes, and those it reads."""
    if isinstance(node, ast.Pass | ast.Assert | ast.Return):
        return set(), set()
    if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
        return {"*"}, set()
    text = ast.unparse(node)
    binds = cells.bound(text)
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        binds |= set(cells.changed(ast.Module([node], []), functions))  # `a.append(1)`
    reads = cells.referenced(symtable.symtable(text, "cell", "exec")) if binds else ()
    return binds, set(reads)


# What a person should look at

MODULES = {"inspect", "gc", "ctypes", "pkgutil", "runpy", "builtins", "imp"}
PLACE = "dmd_tutorial.notebook.exercises"
CALLS = {"eval", "exec", "compile", "__import__", "globals", "vars", "locals", "attrgetter"}
PARTS = {
    *("exercises", "EXERCISES", "truth", "mistakes", "_trouble", "inspect", "_getframe"),
    *("tb_frame", "f_back", "f_globals", "f_locals", "gi_frame", "cr_frame", "ag_frame"),
    *("import_module", "reload", "spec_from_file_location", "module_from_spec"),
    *("settrace", "setprofile", "_current_frames", "addaudithook", "get_objects"),
    *("__globals__", "__builtins__", "__subclasses__", "__closure__", "__code__", "__dict__"),
    *("__file__", "__path__", "__loader__", "__spec__", "__mro__", "__bases__", "__base__"),
}


def suspicious(tree: ast.AST) -> str | None:
    """Return the first line that touches the exercises' package beyond `check`, or looks around."""
    # "google.colab" in sys.modules, say, is harmless
    compared = {id(each) for node in ast.walk(tree) if isinstance(node, ast.Compare)
                for each in node.comparators}  # fmt: skip
    for node in ast.walk(tree):
        if id(node) not in compared and touches(node):
            line = ast.unparse(node).split("\n")[0]
            return f"`{line[:100]}`"
    return None


def touches(node: ast.AST) -> bool:
    """Return whether a piece of code is of that kind."""
    if isinstance(node, ast.Import):
        return any(is_place(alias.name) for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        names = {alias.name for alias in node.names}
        inner = {f"{node.module}.{name}" for name in names} if node.module else set()
        if node.module == PLACE:
            return names != {"check"}
        seen = is_place(node.module or "") or any(map(is_place, inner))
        return seen or bool(names & PARTS) or (node.module == "sys" and "modules" in names)
    if isinstance(node, ast.Attribute):
        of_sys = getattr(node.value, "id", None) in ("sys", "_sys") and node.attr == "modules"
        return node.attr in PARTS or of_sys or getattr(node.value, "id", None) == "check"
    if isinstance(node, ast.Call) and called(node) in ("getattr", "setattr", "patch"):
        constants = [a.value for a in node.args[1:2] if isinstance(a, ast.Constant)]
        return called(node) != "patch" and (not constants or constants[0] in PARTS)
    if isinstance(node, ast.Name):
        return node.id in CALLS or node.id == "__builtins__"
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return PLACE in node.value or "notebook/exercises" in node.value
    return False


def is_place(module: str) -> bool:
    """Return whether a module belongs to the exercises, or is made for looking around."""
    return module.split(".")[0] in MODULES or f"{module}.".startswith(f"{PLACE}.")

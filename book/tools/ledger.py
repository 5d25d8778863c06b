"""Hold the book's numbered equations and the tests together: no equation without a test, and back.

    python book/tools/ledger.py           # check, and write book/equations.md
    python book/tools/ledger.py --check   # check, and fail if book/equations.md is out of date

An equation is a display with a tag of the form `3.2` in a chapter. A test of it is a function
under tests/ with the mark `@pytest.mark.equation("3.2")`, whose docstring says in its first line
what the equation says. The appendix "Equations and their tests" is written from these two.
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import book_source
from book_source import BOOK, ROOT

PAGE = BOOK / "equations.md"
DISPLAY = re.compile(r"\$\$(.+?)\$\$", flags=re.DOTALL)
TAG = re.compile(r"\\tag\{([^}]*)\}")

HEAD = """\
# Equations and their tests

Every numbered equation of the book has at least one test, and every such test an equation: the
build fails otherwise. This page is written from both, by `book/tools/ledger.py`. To run the tests
of one equation, say (3.2), in a copy of the repository:

```shell
.venv/bin/pytest tests --equation 3.2
```
"""


@dataclass(frozen=True)
class Equation:
    """A numbered display of a chapter."""

    tag: str
    latex: str
    chapter: Path


@dataclass(frozen=True)
class EquationTest:
    """A test that carries the mark of an equation."""

    tag: str
    name: str  # as pytest wants it: tests/test_x.py::test_y
    says: str  # the first line of its docstring


def equations() -> list[Equation]:
    """Return the numbered equations of all chapters, in reading order."""
    return [equation for path in book_source.chapters() for equation in equations_in(path)]


def equations_in(path: Path) -> Iterator[Equation]:
    """Yield the numbered equations of one chapter."""
    text = book_source.markdown(book_source.read_notebook(path))
    for display in DISPLAY.findall(text):
        for tag in TAG.findall(display):
            yield Equation(tag, display.strip(), path)


def equation_tests(folder: Path = ROOT / "tests") -> list[EquationTest]:
    """Return every test under `folder` that is marked with an equation, without importing any."""
    files = sorted(folder.rglob("test_*.py"))
    return [test for path in files for test in equation_tests_in(path, folder.parent)]


def equation_tests_in(path: Path, root: Path) -> Iterator[EquationTest]:
    """Yield the marked tests of one file; a method's name carries its class."""
    tree = ast.parse(path.read_text(encoding="utf8"))
    owners = {
        child: node.name
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        for child in node.body
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        says = (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ")
        owner = f"{owners[node]}::" if node in owners else ""
        name = f"{path.relative_to(root).as_posix()}::{owner}{node.name}"
        for decorator in node.decorator_list:
            if tag := marked_tag(decorator):
                yield EquationTest(tag, name, says)


def marked_tag(decorator: ast.expr) -> str | None:
    """Return the tag in `pytest.mark.equation("3.2")`, or None for another decorator."""
    match decorator:
        case ast.Call(func=ast.Attribute(attr="equation"), args=[ast.Constant(value=str(tag))]):
            return tag
    return None


def problems(found: list[Equation], tests: list[EquationTest]) -> list[str]:
    """Return one sentence for everything that breaks the ledger."""
    tags = [equation.tag for equation in found]
    tested = {test.tag for test in tests}
    sentences = [
        f"{equation.chapter.name}: equation ({equation.tag}) has no test marked with it"
        for equation in found
        if equation.tag not in tested
    ]
    sentences += [
        f"{equation.chapter.name}: equation ({equation.tag}) does not carry its chapter's number"
        for equation in found
        if not re.fullmatch(rf"{book_source.number(equation.chapter)}\.\d+", equation.tag)
    ]
    sentences += [
        f"equation ({tag}) is numbered {tags.count(tag)} times"
        for tag in sorted(set(tags))
        if tags.count(tag) > 1
    ]
    sentences += [
        f"{test.name}: no chapter has the equation ({test.tag})"
        for test in tests
        if test.tag not in tags
    ]
    sentences += [
        f"{test.name}: its docstring must say what equation ({test.tag}) says"
        for test in tests
        if not test.says
    ]
    return sentences


def page(found: list[Equation], tests: list[EquationTest]) -> str:
    """Return the text of the appendix."""
    parts = [HEAD]
    for path in book_source.chapters():
        own = [equation for equation in found if equation.chapter == path]
        if own:
            name = book_source.title(book_source.read_notebook(path))
            parts.append(f"## [{name}]({path.name})\n")
            parts += [entry(equation, tests) for equation in own]
    return "\n".join(parts)


def entry(equation: Equation, tests: list[EquationTest]) -> str:
    """Return one equation, and under it what each of its tests says and is called."""
    lines = [f"- {test.says}  \n  `{test.name}`" for test in tests if test.tag == equation.tag]
    return f"$$\n{equation.latex}\n$$\n\n" + "\n".join(lines) + "\n"


def main() -> int:
    """Run the command line; return 1 if the ledger does not balance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    found, tests = equations(), equation_tests()
    sentences = problems(found, tests)
    text = page(found, tests)
    stale = not PAGE.exists() or PAGE.read_text(encoding="utf8") != text
    if stale and arguments.check:
        sentences.append("book/equations.md is out of date: run `make format`")
    elif stale:
        PAGE.write_text(text, encoding="utf8")
        print("wrote book/equations.md")
    for sentence in sentences:
        print(sentence)
    return 1 if sentences else 0


if __name__ == "__main__":
    sys.exit(main())

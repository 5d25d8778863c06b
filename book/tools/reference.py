"""Write the package reference, book/package.md, from the signatures and docstrings of the package.

    python book/tools/reference.py           # write
    python book/tools/reference.py --check   # fail if the page is out of date

Plain Markdown, so that the page reads the same in the site and on GitHub; and read from the source
without importing it, so that the page needs nothing installed.
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from book_source import BOOK, ROOT

PAGE = BOOK / "package.md"
PACKAGE = ROOT / "dmd_tutorial"

HEAD = """\
# Package reference

What the chapters import. A room is a file, and each imports only from rooms below it; here they
stand from the ground to the top. Everything answers one interface,
`denoised = D(x, sigma, label=None)`, in which `x` has shape (batch, \\*shape), `sigma` has shape
(batch,) and the units of `x`, and `label`, if any, has shape (batch,). Shapes in the signatures
are [jaxtyping](https://docs.kidger.site/jaxtyping/)'s. This page is written from the source by
`book/tools/reference.py`.
"""

# From the ground to the top: a room imports only from rooms before it, which a test holds.
FLOORS = [
    "checks",
    "colab",
    "interrupts",
    "noise",
    "denoisers",
    "mixtures",
    "networks",
    "compute",
    "checkpoints",
    "provenance",
    "download",
    "unpickle",
    "samplers",
    "dmd",
    "anchor",
    "images",
    "data",
    "image_classifier",
    "features",
    "metrics",
    "pretrained",
    "settings",
    "training",
    "survey",
    "memory",
    "presets",
    "results",
    "plots",
    "monitor",
    "sliders",
    "exercises",
    "options",
    "cli",
]

SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises):$")
ENTRY = re.compile(r"^(\*{0,2}\w+)(?: \([^)]*\))?: (.*)$")

Documented = ast.FunctionDef | ast.ClassDef


def rooms() -> list[Path]:
    """Return the modules of the package in the order of the page."""
    modules = (path for path in PACKAGE.rglob("*.py") if not is_private(path))
    return sorted(modules, key=lambda path: (FLOORS.index(floor(path)), path.as_posix()))


def floor(path: Path) -> str:
    """Return the name under which a module of the package stands in `FLOORS`."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def is_private(path: Path) -> bool:
    """Return whether a module is not part of the reference: private, or the package's own door."""
    parts = path.relative_to(PACKAGE).parts
    per_chapter = parts[0] == "exercises" and path.name != "__init__.py"
    return per_chapter or parts == ("__init__.py",) or path.name.startswith(("_main", "__main"))


def page() -> str:
    """Return the text of the page."""
    return "\n".join([HEAD, *map(room, rooms())])


def room(path: Path) -> str:
    """Return the section of one module; an empty text if there is nothing public in it."""
    tree = ast.parse(path.read_text(encoding="utf8"))
    members = [node for node in tree.body if isinstance(node, Documented) and is_public(node)]
    name = path.relative_to(PACKAGE).as_posix().removesuffix("/__init__.py")
    texts = [f"## {name}\n", prose(ast.get_docstring(tree) or "")]
    for node in members:
        texts += entry(node)
    return "\n".join(texts) if members else ""


def is_public(node: Documented) -> bool:
    """Return whether a function or class is for users, and says what it does."""
    return not node.name.startswith("_") and ast.get_docstring(node) is not None


def entry(node: Documented, owner: str = "") -> Iterator[str]:
    """Yield the parts of one function's or class's description, its methods after it."""
    name = f"{owner}{node.name}"
    yield f"{'####' if owner else '###'} {name}\n"
    yield f"```python\n{signature(node)}\n```\n"
    yield "\n".join(described(ast.get_docstring(node) or "")) + "\n"
    if isinstance(node, ast.ClassDef):
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and is_public(method):
                yield from entry(method, owner=f"{node.name}.")


def signature(node: Documented) -> str:
    """Return what a caller writes; many arguments stand a line each."""
    if isinstance(node, ast.ClassDef):
        makers = [m for m in node.body if isinstance(m, ast.FunctionDef) and m.name == "__init__"]
        if not makers:
            return "\n".join([class_line(node), *fields(node)])
        arguments, result = makers[0].args, ""
    else:
        arguments = node.args
        result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    names = split_arguments(arguments)
    line = f"{node.name}({', '.join(names)}){result}"
    if len(line) <= 88:
        return line
    return "\n".join([f"{node.name}(", *(f"    {name}," for name in names), f"){result}"])


def class_line(node: ast.ClassDef) -> str:
    """Return the line that opens a class."""
    bases = ", ".join(map(ast.unparse, node.bases))
    return f"class {node.name}({bases})" if bases else f"class {node.name}"


def fields(node: ast.ClassDef) -> list[str]:
    """Return the fields of a class without __init__: a dataclass's, a named tuple's, an enum's."""
    kept = [item for item in node.body if isinstance(item, ast.AnnAssign | ast.Assign)]
    lines = [ast.unparse(item) for item in kept]
    return [f"    {line}" for line in lines if not line.startswith("_")]


def split_arguments(arguments: ast.arguments) -> list[str]:
    """Return the arguments of a signature one by one, without self and cls."""
    positional = arguments.posonlyargs + arguments.args
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    defaults += arguments.defaults
    names = [argument(*pair) for pair in zip(positional, defaults, strict=True)]
    names = [name for name in names if name not in ("self", "cls")]
    if arguments.vararg:
        names.append(f"*{argument(arguments.vararg)}")
    elif arguments.kwonlyargs:
        names.append("*")
    names += [argument(*p) for p in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    if arguments.kwarg:
        names.append(f"**{argument(arguments.kwarg)}")
    return names


def argument(arg: ast.arg, default: ast.expr | None = None) -> str:
    """Return one argument with its type and default."""
    text = f"{arg.arg}: {ast.unparse(arg.annotation)}" if arg.annotation else arg.arg
    if default is None:
        return text
    equals = " = " if arg.annotation else "="
    return f"{text}{equals}{ast.unparse(default)}"


def described(docstring: str) -> Iterator[str]:
    """Yield a Google-style docstring as lines of Markdown: its sections become lists."""
    in_section = False
    for line in docstring.splitlines():
        if match := SECTION.match(line):
            in_section = True
            yield f"*{'Arguments' if match.group(1) == 'Args' else match.group(1)}:*\n"
        elif in_section and line and not line.startswith(" "):
            in_section = False
            yield escaped(line)
        elif in_section and (match := ENTRY.match(line[4:])):
            yield f"- `{match.group(1)}`: {escaped(match.group(2))}"
        elif in_section:
            yield f"  {escaped(line.strip())}".rstrip()
        else:
            yield escaped(line)


def prose(docstring: str) -> str:
    """Return a module's docstring as Markdown."""
    return "\n".join(map(escaped, docstring.splitlines())) + "\n"


def escaped(line: str) -> str:
    """Return a line whose stars, dollars and the like mean themselves, code spans untouched."""
    pieces = re.split(r"(``.+?``|`[^`]+`)", line)
    pieces[::2] = [re.sub(r"([*_$<>\[\]|])", r"\\\1", piece) for piece in pieces[::2]]
    return "".join(pieces)


def main() -> int:
    """Run the command line; return 1 if --check finds the page out of date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    text = page()
    if PAGE.exists() and PAGE.read_text(encoding="utf8") == text:
        return 0
    if arguments.check:
        print("book/package.md is out of date: run `make format`")
        return 1
    PAGE.write_text(text, encoding="utf8")
    print("wrote book/package.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())

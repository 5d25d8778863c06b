"""Write the package reference, book/package.md, from the signatures and docstrings of the package.

Plain Markdown; and read from the source without importing it, so that nothing needs to be
installed. `make book` calls it before the site is built; the page is not committed.
"""

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

from book_source import BOOK, ROOT

PAGE = BOOK / "package.md"
PACKAGE = ROOT / "dmd_tutorial"
MAPPED = re.compile(r"^    (\w+/?) {2,}\S", flags=re.MULTILINE)  # a room in the package's docstring
SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises):$")
ENTRY = re.compile(r"^(\*{0,2}\w+)(?: \([^)]*\))?: (.*)$")

HEAD = """\
The page goes from the heart outwards: [dmd](#dmd), then what it stands on, down to the ground, then
what stands on it, and the wings last. In the signatures `Samples` are a batch of any shape, (batch,
\\*shape), and `PerSample` is one number for each of them, (batch,), such as a noise level in the
units of `x`; other shapes are written as [jaxtyping](https://docs.kidger.site/jaxtyping/) has them.
"""

Documented = ast.FunctionDef | ast.ClassDef


def page() -> str:
    """Return the text of the page: the map, then every room."""
    doc = ast.get_docstring(ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf8"))) or ""
    return "\n".join(["# Package reference\n", prose(doc), HEAD, *map(room, files(doc))])


def files(doc: str) -> list[Path]:
    """Return the files of the page in its order; which rooms there are, the map `doc` says."""
    rooms = MAPPED.findall(doc)
    flat = [name for name in rooms if not name.endswith("/")]
    heart = flat.index("dmd")
    outwards = [flat[heart], *reversed(flat[:heart]), *flat[heart + 1 :]]
    wings = [path for name in rooms if name.endswith("/") for path in wing(PACKAGE / name)]
    return [PACKAGE / f"{name}.py" for name in outwards] + wings


def wing(folder: Path) -> list[Path]:
    """Return the files of a wing, each folder's own first; answers to exercises stay out."""
    found = [path for path in folder.rglob("*.py") if not re.match(r"chapter\d", path.stem)]
    return sorted(found, key=name_of)


def name_of(path: Path) -> str:
    """Return what the page calls a file: `dmd`, `networks/unet`, a folder for its `__init__`."""
    return path.relative_to(PACKAGE).with_suffix("").as_posix().removesuffix("/__init__")


def room(path: Path) -> str:
    """Return the section of one file: its docstring, then its public things."""
    source = path.read_text(encoding="utf8")
    tree = ast.parse(source)
    parts = [f"## {name_of(path)}\n", prose(ast.get_docstring(tree) or "")]
    for node in tree.body:
        if isinstance(node, Documented) and is_public(node):
            parts += entry(node, source.splitlines())
    return "\n".join(parts)


def is_public(node: Documented) -> bool:
    """Return whether a function, class or method is for users."""
    return not node.name.startswith("_")


def entry(node: Documented, lines: list[str], owner: str = "") -> Iterator[str]:
    """Yield the description of one function or class, its methods after it."""
    yield f"{'####' if owner else '###'} {owner}{node.name}\n"
    yield f"```python\n{signature(node, lines)}\n```\n"
    yield prose(ast.get_docstring(node) or "")
    if isinstance(node, ast.ClassDef):
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and is_public(method):
                yield from entry(method, lines, owner=f"{node.name}.")


def signature(node: Documented, lines: list[str]) -> str:
    """Return the lines that a caller reads: a head, and a class's fields or its __init__."""
    kept = lines[start(node) : node.body[0].lineno - 1]
    if isinstance(node, ast.ClassDef):
        methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
        end = start(methods[0]) if methods else node.end_lineno
        kept += lines[node.body[0].end_lineno : end]
        for method in methods:
            if method.name == "__init__":
                kept += lines[start(method) : method.body[0].lineno - 1]
    text = "\n".join(line for line in kept if line.strip())
    return textwrap.dedent(text).removesuffix(":")


def start(node: Documented) -> int:
    """Return how many lines stand above a definition and its decorators."""
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1


def prose(docstring: str) -> str:
    """Return a docstring as Markdown: sections become lists, indented text becomes a block."""
    return "\n".join(fenced(described(docstring))) + "\n"


def described(docstring: str) -> Iterator[str]:
    """Yield the lines of a docstring, sections as lists; what is indented elsewhere stays so."""
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
            yield line if line.startswith("    ") else escaped(line)


def fenced(lines: Iterator[str]) -> Iterator[str]:
    """Yield lines with a fence around each block that is indented by four."""
    block = False
    for line in lines:
        if block != line.startswith("    ") and (block or line):
            block = not block
            yield "```text" if block else "```"
        yield line.removeprefix("    ")
    if block:
        yield "```"


def escaped(line: str) -> str:
    """Return a line whose stars, dollars and the like mean themselves, code spans untouched."""
    pieces = re.split(r"(``.+?``|`[^`]+`)", line)
    pieces[::2] = [re.sub(r"([*_$<>\[\]|])", r"\\\1", piece) for piece in pieces[::2]]
    return "".join(pieces)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf8")

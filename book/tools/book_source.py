"""What every tool of the book needs to know about its sources: where they are, how they read."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"

Cell = dict[str, Any]
Notebook = dict[str, Any]


def notebooks() -> list[Path]:
    """Return every notebook of the book, chapters in the order of their numbers first."""
    return sorted(
        BOOK.glob("[!.]*.ipynb"), key=lambda path: (number(path) is None, number(path) or 0)
    )


def pages() -> list[Path]:
    """Return the pages that are no notebooks, those for teachers included."""
    return sorted(BOOK.glob("*.md")) + sorted(BOOK.glob("teaching/*.md"))


def chapters() -> list[Path]:
    """Return the numbered notebooks, in order."""
    return [path for path in notebooks() if number(path) is not None]


def number(path: Path) -> int | None:
    """Return a chapter's number, which begins its file name, or None for an appendix."""
    match = re.match(r"(\d+)-", path.name)
    return int(match.group(1)) if match else None


def read_notebook(path: Path) -> Notebook:
    """Read a notebook as it is stored, without nbformat's repairs."""
    notebook: Notebook = json.loads(path.read_text(encoding="utf8"))
    return notebook


def source(cell: Cell) -> str:
    """Return a cell's source as one string; the file may hold it as a list of lines."""
    text = cell["source"]
    return text if isinstance(text, str) else "".join(text)


def tags(cell: Cell) -> list[str]:
    """Return a cell's tags."""
    return list(cell.get("metadata", {}).get("tags", []))


def slide(cell: Cell) -> str | None:
    """Return what a cell is among the slides: slide, - (goes on), notes or skip."""
    kind: str | None = cell.get("metadata", {}).get("slideshow", {}).get("slide_type")
    return kind


def markdown(notebook: Notebook) -> str:
    """Return the text of a notebook, without its code."""
    texts = [source(cell) for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
    return "\n\n".join(texts)


def title(notebook: Notebook) -> str:
    """Return a notebook's title: its first heading, without the mark."""
    match = re.search(r"^# (.+)$", markdown(notebook), flags=re.MULTILINE)
    if match is None:
        raise ValueError("the notebook has no heading of the first level")
    return match.group(1)


def repository() -> str:
    """Return the repository's address, which stands in pyproject.toml and nowhere else by hand."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))
    address: str = pyproject["project"]["urls"]["Repository"]
    return address


def site(repository: str) -> str:
    """Return where GitHub publishes the pages of a repository."""
    owner, name = repository.removeprefix("https://github.com/").split("/")
    return f"https://{owner.lower()}.github.io/{name}"


def anchor(heading: str) -> str:
    """Return how a link names a heading, on GitHub and on the site."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")

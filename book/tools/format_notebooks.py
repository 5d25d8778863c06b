"""Write the book's notebooks in one canonical form: a diff then shows what a person changed.

    python book/tools/format_notebooks.py            # all notebooks of the book
    python book/tools/format_notebooks.py book/3-*   # these
    python book/tools/format_notebooks.py --check    # write nothing, print the diff, fail on any

The form: code as ruff leaves it, no outputs, no execution counts, no empty cells; a cell's id is
made from what it says, so that it stays when cells move; of the metadata only tags, what folds a
cell in the site, in JupyterLab and in Colab, and its place on a slide; keys sorted, one space of
indent.
"""

import argparse
import difflib
import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import book_source
from book_source import ROOT, Cell, Notebook

METADATA = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}

# A cell whose first line is `# @title ...` is folded under that title, in the site, in JupyterLab
# (which shows three dots) and in Colab: the drawing of a figure, a solution.
TITLE = re.compile(r"# @title (.+)")
FOLDED = {"jupyter": {"source_hidden": True}, "cellView": "form"}

# A person sets the tag on the left; what it means in the site follows from it.
TAG_IN_THE_SITE = {
    "bootstrap": "remove-cell",
    "solution": "hide-cell",
}
FOLDING_TAGS = {"hide-cell", "hide-input", "remove-cell"}


def canonical(notebook: Notebook) -> Notebook:
    """Return the notebook in its canonical form, without touching the code itself."""
    cells = [cell for cell in notebook["cells"] if book_source.source(cell).strip()]
    seen: Counter[tuple[str, str]] = Counter()
    return {
        "cells": [canonical_cell(cell, seen) for cell in cells],
        "metadata": METADATA,
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def canonical_cell(cell: Cell, seen: Counter[tuple[str, str]]) -> Cell:
    """Return one cell in its canonical form; `seen` counts equal cells before it."""
    kind = cell["cell_type"]
    text = "\n".join(line.rstrip() for line in book_source.source(cell).strip("\n").split("\n"))
    ordinal = seen[kind, text]
    seen[kind, text] += 1
    result: Cell = {
        "cell_type": kind,
        "id": cell_id(kind, text, ordinal),
        "metadata": cell_metadata(cell),
        "source": text.splitlines(keepends=True),
    }
    if kind == "code":
        result |= {"execution_count": None, "outputs": []}
    return result


def cell_id(kind: str, text: str, ordinal: int) -> str:
    """Return eight hexadecimal digits that depend on nothing but what the cell says."""
    return hashlib.sha1(f"{kind}\n{ordinal}\n{text}".encode()).hexdigest()[:8]


def cell_metadata(cell: Cell) -> dict[str, Any]:
    """Return what may stay of a cell's metadata, and what its tags and its title add."""
    tags = set(book_source.tags(cell))
    metadata: dict[str, Any] = {}
    if cell["cell_type"] == "code":
        title = TITLE.match(book_source.source(cell))
        roles = tags & TAG_IN_THE_SITE.keys()
        tags |= {TAG_IN_THE_SITE[role] for role in roles}
        if title and not roles:
            tags.add("hide-input")
        if tags & FOLDING_TAGS:
            metadata |= FOLDED
        if title:
            metadata["mystnb"] = prompts(title.group(1))
    if tags:
        metadata["tags"] = sorted(tags)
    if slide := book_source.slide(cell):
        metadata["slideshow"] = {"slide_type": slide}
    return metadata


def prompts(title: str) -> dict[str, str]:
    """Return what the site shows in place of a folded cell, as the template it takes it for."""
    text = title.replace("{", "{{").replace("}", "}}")
    return {"code_prompt_show": text, "code_prompt_hide": text}


def dump(notebook: Notebook) -> str:
    """Return the text of a notebook's file."""
    return json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def difference(path: Path) -> str:
    """Return what the canonical form would change in the file, as a diff; empty if nothing."""
    stored = path.read_text(encoding="utf8")
    wanted = dump(canonical(json.loads(stored)))
    lines = difflib.unified_diff(
        stored.splitlines(keepends=True), wanted.splitlines(keepends=True), str(path), "canonical"
    )
    return "".join(lines)


def write(paths: list[Path]) -> None:
    """Let ruff format the code, then write the canonical form; untouched files keep their time."""
    ruff = [sys.executable, "-m", "ruff"]
    names = [str(path) for path in paths]
    for command in (["check", "--fix", "--exit-zero"], ["format"]):
        subprocess.run([*ruff, *command, "--quiet", *names], cwd=ROOT, check=True)
    for path in paths:
        if difference(path):
            path.write_text(dump(canonical(book_source.read_notebook(path))), encoding="utf8")
            print(f"formatted {path}")


def main() -> int:
    """Run the command line; return 1 if --check found something."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", type=Path, help="notebooks (default: all of the book)")
    parser.add_argument("--check", action="store_true", help="print the diff instead of writing")
    arguments = parser.parse_args()
    paths = [path.resolve() for path in arguments.paths] or book_source.notebooks()
    if not arguments.check:
        if paths:
            write(paths)
        return 0
    differences = [text for text in map(difference, paths) if text]
    print("".join(differences), end="")
    if differences:
        print(f"{len(differences)} notebook(s) not in canonical form: run `make format`")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())

"""Cut a notebook for students from a chapter: without solutions, without hidden checks.

    python book/tools/assignment.py book/3-kl-gradient.ipynb
    python book/tools/assignment.py book/3-kl-gradient.ipynb -o hand-out.ipynb --grader g.ipynb

The first writes 3-kl-gradient-student.ipynb. With --grader the hidden checks are written too,
into a notebook of their own: append its cells to a student's notebook and run it to grade.
"""

import argparse
import sys
from pathlib import Path

import book_source
import format_notebooks
from book_source import Notebook

NOT_FOR_STUDENTS = {"solution", "hidden-check"}


def for_students(notebook: Notebook) -> Notebook:
    """Return the notebook without the cells that students must not see."""
    cells = [c for c in notebook["cells"] if not NOT_FOR_STUDENTS & set(book_source.tags(c))]
    return format_notebooks.canonical(notebook | {"cells": cells})


def for_graders(notebook: Notebook) -> Notebook:
    """Return a notebook of the hidden checks alone.

    Raises:
        ValueError: the chapter has no hidden check.
    """
    cells = [c for c in notebook["cells"] if "hidden-check" in book_source.tags(c)]
    if not cells:
        raise ValueError("the notebook has no cell tagged hidden-check")
    return format_notebooks.canonical(notebook | {"cells": cells})


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("chapter", type=Path, help="a chapter of the book")
    parser.add_argument("-o", "--output", type=Path, help="default: <chapter>-student.ipynb, here")
    parser.add_argument("--grader", type=Path, help="where to write the hidden checks")
    arguments = parser.parse_args()
    notebook = book_source.read_notebook(arguments.chapter)
    output = arguments.output or Path(f"{arguments.chapter.stem}-student.ipynb")
    if output.resolve() == arguments.chapter.resolve():
        parser.error("the output would overwrite the chapter")
    output.write_text(format_notebooks.dump(for_students(notebook)), encoding="utf8")
    print(f"wrote {output}")
    if arguments.grader:
        arguments.grader.write_text(format_notebooks.dump(for_graders(notebook)), encoding="utf8")
        print(f"wrote {arguments.grader}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

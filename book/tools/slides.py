"""Make a deck of slides of every chapter: nbconvert's reveal.js, into the built site.

    python book/tools/slides.py

What is on a slide is said by the types of a chapter's cells (in JupyterLab: Property Inspector,
Slide Type): the paragraphs between the chosen ones are speaker's notes, exercises are left out.
Outputs come from the cache. reveal.js comes from a package of pip's, MathJax is the site's own: a
deck asks for no network.
"""

import re
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import book_site
import book_source
import nbformat
from book_source import ROOT
from jupyter_cache import get_cache
from nbconvert.exporters import SlidesExporter
from nbconvert.preprocessors import Preprocessor

SITE = ROOT / "_build" / "html"
TEMPLATE = Path(__file__).parent / "slides"
REVEAL = ("dist/reveal.js", "dist/reveal.css", "plugin/notes/notes.js")
HEADING = re.compile(r"^#{1,3} (.+)$", flags=re.MULTILINE)
LINK = re.compile(r"\]\((?:(?P<page>[\w./-]+)\.(?:ipynb|md))?(?P<place>#[\w-]+)?\)")
TITLE = re.compile(r"# @title (?:Figure|Table|Slider): (.+)")


class Deck(Preprocessor):
    """Gives slides the headings under which they stand, figures a title, links their pages."""

    def preprocess(self, nb: Any, resources: Any) -> Any:
        """Return the notebook as the slides need it."""
        chapter, under, cells = resources["metadata"]["name"], "", []
        for cell in nb.cells:
            headings = []
            if cell.cell_type == "markdown":
                headings = HEADING.findall(cell.source)
                cell.source = LINK.sub(lambda link: page(link, chapter), cell.source)
            headed = headings and cell.source.startswith("#")
            if book_source.slide(cell) == "slide" and not headed:
                cells.append(typed(nbformat.v4.new_markdown_cell(f"### {under}"), "slide"))
                typed(cell, "-")
            if book_source.slide(cell) == "-" and (title := TITLE.match(cell.source)):
                text = f"*{title[1][0].upper()}{title[1][1:]}*"
                cells.append(typed(nbformat.v4.new_markdown_cell(text), "-"))
            cells.append(cell)
            under = headings[-1] if headings else under
        nb.cells = cells
        return nb, resources


def typed(cell: Any, kind: str) -> Any:
    """Return a cell after saying what it is among the slides."""
    cell.metadata["slideshow"] = {"slide_type": kind}
    return cell


def page(link: re.Match[str], chapter: str) -> str:
    """Return a link of a chapter as one of a deck."""
    return f"](../book/{link['page'] or chapter}.html{link['place'] or ''})"


def exporter() -> SlidesExporter:
    """Return nbconvert's own exporter, with the book's template."""
    return SlidesExporter(
        template_name=TEMPLATE.name,
        extra_template_basedirs=[str(TEMPLATE.parent)],
        preprocessors=[Deck],
        exclude_input=True,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        exclude_anchor_links=True,
    )


def executed(path: Path) -> Any:
    """Return a chapter with its outputs.

    Raises:
        KeyError: It was not executed as it stands.
    """
    _, notebook = get_cache(book_site.cache_folder()).merge_match_into_notebook(
        nbformat.read(path, as_version=4)
    )
    return notebook


def main() -> None:
    """Write the decks and what they need."""
    folder = SITE / "slides"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "reveal").mkdir(parents=True)
    reveal = metadata.distribution("sphinx-revealjs")
    for name in REVEAL:
        origin = reveal.locate_file(f"sphinx_revealjs/_static/revealjs/{name}")
        shutil.copyfile(str(origin), folder / "reveal" / Path(name).name)
    shutil.copyfile(TEMPLATE / "deck.css", folder / "deck.css")
    decks = exporter()
    for path in book_source.chapters():
        notebook = executed(path)
        notebook.metadata["title"] = book_source.title(notebook)
        body, _ = decks.from_notebook_node(notebook, {"metadata": {"name": path.stem}})
        (folder / f"{path.stem}.html").write_text(body, encoding="utf8")
    print(f"{len(book_source.chapters())} decks of slides: {folder}")


if __name__ == "__main__":
    main()

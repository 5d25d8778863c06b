"""Print the built site as one PDF: the chapters in order, the solutions in an appendix.

    python book/tools/pdf.py _build/html _build/dmd-tutorial.pdf

A headless Chromium prints each page as a reader would, sliders in the state they open with, so
that no LaTeX is needed. Chromium must be on the path.
"""

import argparse
import html
import io
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from book_source import ROOT
from playwright.sync_api import Page, sync_playwright
from pypdf import PdfWriter

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 120_000  # milliseconds for one page
PAPER: dict[str, Any] = {
    "format": "A4",
    "scale": 0.85,
    "print_background": True,
    "display_header_footer": True,
    "header_template": "<span></span>",
    "margin": {"top": "18mm", "bottom": "20mm", "left": "18mm", "right": "18mm"},
    "tagged": True,
}
FOOTER = (
    '<div style="width:100%;font-size:8px;text-align:center;font-family:sans-serif">'
    'TITLE, page <span class="pageNumber"></span> of <span class="totalPages"></span></div>'
)
# Cuts the solutions out of a page and returns them; what was folded otherwise is opened. The
# answers of "Check yourself" go to the end of their chapter: its questions are to be asked first.
CUT = """() => {
  const solutions = [];
  const quiz = document.querySelector("#check-yourself");
  if (quiz) {
    const answers = quiz.cloneNode(true);
    answers.removeAttribute("id");
    answers.querySelector("h2").firstChild.textContent = "Check yourself: the answers";
    for (const option of quiz.querySelectorAll("details")) {
      const line = document.createElement("p");
      line.append(...option.querySelector("summary").childNodes);
      option.replaceWith(line);
    }
    document.querySelector(".bd-article").append(answers);
  }
  for (const details of document.querySelectorAll("details.hide")) {
    const title = details.querySelector("summary").textContent;
    const found = title.match(/Solution \\d+\\.\\d+/);
    const cell = details.closest(".cell") || details;
    if (!found) continue;
    const name = found[0];
    details.querySelector("summary").remove();
    details.replaceWith(...details.childNodes);
    solutions.push([name, cell.outerHTML]);
    const pointer = document.createElement("p");
    pointer.textContent = `${name} is at the end of the book.`;
    cell.replaceWith(pointer);
  }
  document.querySelectorAll("details:not(.hide)").forEach((each) => { each.open = true; });
  return solutions;
}"""
FILL = """([name, cells]) => {
  const article = document.querySelector(".bd-article");
  article.innerHTML = `<section><h1>Solutions</h1></section>`;
  for (const [title, cell] of cells) {
    const heading = document.createElement("h2");
    heading.textContent = title;
    article.append(heading);
    article.insertAdjacentHTML("beforeend", cell);
  }
}"""


class Printed(NamedTuple):
    """One page of the site on paper, and the solutions that stood in it."""

    title: str
    pdf: bytes
    solutions: list[list[str]]


def contents(root: Path = ROOT) -> list[str]:
    """Return the pages of the book in their order, as addresses within the site."""
    table = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf8"))
    chapters = [entry["file"] for part in table["parts"] for entry in part["chapters"]]
    return [f"{name}.html" for name in [table["root"], *chapters]]


def found_chromium() -> str | None:
    """Return where Chromium is, or None if it is not on the path."""
    return next(filter(None, map(shutil.which, CHROMIUM)), None)


def chromium() -> str:
    """Return where the browser is.

    Raises:
        FileNotFoundError: It is not on the path.
    """
    if path := found_chromium():
        return path
    raise FileNotFoundError(f"make pdf prints with Chromium: none of {CHROMIUM} is on the path")


def settle(page: Page, address: str) -> str:
    """Open a page, wait for its equations, and return its title."""
    page.goto(address, wait_until="load")
    page.evaluate("async () => { if (window.MathJax) await MathJax.startup.promise; }")
    title: str = page.evaluate("document.querySelector('.bd-article h1').firstChild.textContent")
    return title.strip()


def on_paper(page: Page, title: str) -> bytes:
    """Print the page as it stands."""
    page.emulate_media(media="print")
    return page.pdf(**PAPER, footer_template=FOOTER.replace("TITLE", html.escape(title)))


def print_page(page: Page, address: str) -> Printed:
    """Print one page of the site without its solutions."""
    title = settle(page, address)
    solutions = page.evaluate(CUT)
    return Printed(title, on_paper(page, title), solutions)


def print_solutions(page: Page, address: str, solutions: list[list[str]]) -> Printed:
    """Print the solutions of all chapters, in the dress of the page at `address`."""
    settle(page, address)
    page.evaluate(FILL, ["Solutions", solutions])
    page.evaluate("async () => { if (window.MathJax) await MathJax.typesetPromise(); }")
    return Printed("Solutions", on_paper(page, "Solutions"), [])


def printed(site: Path, names: Sequence[str]) -> list[Printed]:
    """Print pages of a site, and their solutions as the last part.

    Args:
        site: The folder of the built site.
        names: Its pages in their order, such as book/intro.html.

    Returns:
        The parts of the book.

    Raises:
        FileNotFoundError: A page was not built, or there is no browser.
    """
    missing = [name for name in names if not (site / name).exists()]
    if missing:
        raise FileNotFoundError(f"{site} lacks {', '.join(missing)}: run `make book`")
    addresses = [(site / name).resolve().as_uri() for name in names]
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = browser.new_context(color_scheme="light").new_page()
        page.set_default_timeout(PATIENCE)
        parts = [print_page(page, address) for address in addresses]
        solutions = [solution for part in parts for solution in part.solutions]
        if solutions:
            parts.append(print_solutions(page, addresses[0], solutions))
        browser.close()
    return parts


def bound(parts: Sequence[Printed]) -> bytes:
    """Join the parts into one file, each with a bookmark."""
    writer = PdfWriter()
    for part in parts:
        writer.append(io.BytesIO(part.pdf), outline_item=part.title)
    writer.add_metadata({"/Title": re.sub(r"^\d+\. ", "", parts[0].title)})
    target = io.BytesIO()
    writer.write(target)
    return target.getvalue()


def main() -> int:
    """Run the command line; return 1 if the book cannot be printed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("site", type=Path, help="the folder of the built site")
    parser.add_argument("target", type=Path, help="the PDF to write")
    parser.add_argument("pages", nargs="*", help="only these pages, such as book/intro.html")
    arguments = parser.parse_args()
    try:
        parts = printed(arguments.site, arguments.pages or contents())
    except FileNotFoundError as error:
        print(error)
        return 1
    arguments.target.write_bytes(bound(parts))
    print(f"The book on paper: {arguments.target.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

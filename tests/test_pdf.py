"""The book on paper: two pages of the built site, their solutions at the end.

Needs chromium and a built site, as test_site.py does.
"""

import io
import os
from pathlib import Path

import pdf
import pytest

pypdf = pytest.importorskip("pypdf")
SITE = Path(os.environ.get("DMD_TUTORIAL_SITE", Path(__file__).parents[1] / "_build" / "html"))
NAMES = ["book/intro.html", "book/4-fake-critic.html"]

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(pdf.found_chromium() is None, reason="no chromium"),
]
needs_site = pytest.mark.skipif(
    not all((SITE / name).exists() for name in NAMES), reason=f"no built site at {SITE}"
)


@pytest.fixture(scope="module")
def book():
    """The two pages, bound, and the page numbers (from 0) at which its parts begin."""
    reader = pypdf.PdfReader(io.BytesIO(pdf.bound(pdf.printed(SITE, NAMES))))
    starts = {part.title: reader.get_destination_page_number(part) for part in reader.outline}
    return reader, starts


def text(reader, first, last=None):
    """The words of some pages, whatever their line breaks."""
    return " ".join(" ".join(page.extract_text() for page in reader.pages[first:last]).split())


@needs_site
def test_every_part_has_a_bookmark_in_order(book):
    reader, starts = book
    assert list(starts)[1:] == ["4. The fake critic", "Solutions"]
    assert list(starts.values()) == sorted(set(starts.values()))
    assert 15 < len(reader.pages) < 60


@needs_site
def test_solutions_stand_at_the_end_and_nowhere_else(book):
    reader, starts = book
    chapter = text(reader, starts["4. The fake critic"], starts["Solutions"])
    appendix = text(reader, starts["Solutions"])
    for number in ("4.1", "4.2", "4.3", "4.4", "4.5"):
        assert f"Solution {number} is at the end of the book." in chapter
        assert f"# @title Solution {number}" not in chapter
        assert f"# @title Solution {number}" in appendix
    assert "Hint 1" in chapter  # hints stay, opened, with their exercise
    assert "Which of the two curves is ahead" in chapter


@needs_site
def test_a_quiz_is_asked_before_its_answers_are_told(book):
    reader, starts = book
    chapter = text(reader, starts["4. The fake critic"], starts["Solutions"])
    before, answers = chapter.split("Check yourself: the answers")
    asked = before.partition("Check yourself")[2]
    assert all(f"Question {k}." in part for k in range(1, 6) for part in (asked, answers))
    assert all(f"{letter}. " in asked for letter in "ABCD")
    assert "Right." not in asked
    assert answers.count("Right.") == 5
    assert answers.count("No. ") == 15


@needs_site
def test_equations_and_pictures_are_printed(book):
    reader, starts = book
    pages = reader.pages[starts["4. The fake critic"] : starts["Solutions"]]
    words = text(reader, starts["4. The fake critic"], starts["Solutions"])
    assert "(4.1)" in words  # set by MathJax, which drew it
    assert r"\tag" not in words
    assert sum(len(page.images) for page in pages) >= 5


@needs_site
def test_a_slider_is_printed_with_its_value_and_every_page_has_its_number(book):
    reader, starts = book
    words = text(reader, starts["4. The fake critic"], starts["Solutions"])
    assert "Critic steps per generator step:" in words
    first = reader.pages[starts["4. The fake critic"]].extract_text()
    assert "The fake critic, page 1 of" in " ".join(first.split())


def test_a_site_that_lacks_a_page_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"lacks book/none.html: run `make book`"):
        pdf.printed(tmp_path, ["book/none.html"])


def test_the_book_is_printed_in_the_order_of_its_contents():
    names = pdf.contents()
    assert names[0] == "book/intro.html"
    assert names.index("book/1-score-functions.html") < names.index("book/glossary.html")

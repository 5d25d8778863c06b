"""The decks of slides: what is on them, that it fits, and that they need nothing but themselves."""

import re
from pathlib import Path

import book_source
import pdf
import pytest
import slides
from playwright.sync_api import sync_playwright
from pypdf import PdfReader

CHAPTERS = book_source.chapters()
EVERY_CHAPTER = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
CHROMIUM = pdf.found_chromium()
FOLDER = slides.SITE / "slides"
BUILT = pytest.mark.skipif(not FOLDER.exists(), reason="the site is not built: make book")
WIDTH, HEIGHT = 1280, 720
SMALLEST = 220  # pixels of a picture's height

# What the slide that is shown holds; lengths in its own pixels.
SHOWN = """() => {
  const slide = Reveal.getCurrentSlide(), scale = Reveal.getScale();
  const start = slide.getBoundingClientRect();
  const seen = [...slide.querySelectorAll("*")].filter(
    (each) => !each.closest("aside, mjx-assistive-mml"));
  const boxes = seen.map((each) => each.getBoundingClientRect())
    .filter((box) => box.width && box.height);
  const words = slide.cloneNode(true);
  words.querySelectorAll("aside, code, script").forEach((each) => each.remove());
  return {
    heading: slide.querySelector("h1, h2, h3")?.textContent ?? "",
    words: words.textContent,
    right: Math.max(...boxes.map((box) => box.right - start.left)) / scale,
    bottom: Math.max(...boxes.map((box) => box.bottom - start.top)) / scale,
    wrong: slide.querySelectorAll("mjx-merror, [data-mjx-error]").length,
    pictures: [...slide.querySelectorAll("img")].map((img) => ({
      alt: img.alt, loaded: img.naturalWidth, height: img.getBoundingClientRect().height / scale,
    })),
  };
}"""


def in_browser(test):
    """Mark a test that looks at the built decks."""
    there = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
    return pytest.mark.browser(BUILT(there(test)))


def types(path):
    """The cells of a chapter with their types."""
    return [(book_source.slide(cell), cell) for cell in book_source.read_notebook(path)["cells"]]


@EVERY_CHAPTER
def test_every_cell_says_what_it_is_among_the_slides(path):
    assert {kind for kind, _ in types(path)} == {"slide", "-", "notes", "skip"}


@EVERY_CHAPTER
def test_a_deck_has_what_a_lecture_needs_and_no_answers(path):
    shown = [book_source.source(cell) for kind, cell in types(path) if kind in ("slide", "-")]
    begun = [book_source.source(cell) for kind, cell in types(path) if kind == "slide"]
    text = "\n\n".join(shown)
    assert 30 <= len(begun) <= 50
    assert begun[0].startswith("# ")
    assert any(each.startswith("## Objectives") for each in begun)
    assert begun[-1].startswith("## Summary")
    assert [q for q in begun if q.startswith("**Question")] == begun[-6:-1]
    assert len(re.findall(r"^# @title (?:Figure|Slider)", text, re.M)) >= 4
    assert not re.search(r"^# @title Solution|your code|^### Exercise", text, re.M)


@EVERY_CHAPTER
def test_paragraphs_between_slides_are_notes_and_code_is_left_out(path):
    before_exercises = True
    for kind, cell in types(path)[1:]:
        text = book_source.source(cell)
        before_exercises &= not text.startswith("## Exercises")
        if kind == "notes":
            assert cell["cell_type"] == "markdown", text
            assert before_exercises, text
        if kind in ("slide", "-") and cell["cell_type"] == "code":
            assert text.startswith("# @title") or "Markdown(" in text or "say(" in text, text


def test_a_slide_without_a_heading_gets_the_one_it_stands_under():
    cells = [
        slides.nbformat.v4.new_markdown_cell("## Paths\n\nSee [chapter 2](2-teacher.ipynb#euler)."),
        slides.nbformat.v4.new_code_cell("# @title Figure: a path"),
        slides.nbformat.v4.new_markdown_cell(
            "[above](#paths), [paper](https://arxiv.org), $[\\nabla p](x)$"
        ),
    ]
    for cell, kind in zip(cells, ("slide", "slide", "-"), strict=True):
        cell.metadata["slideshow"] = {"slide_type": kind}
    notebook = slides.nbformat.v4.new_notebook(cells=cells)
    made, _ = slides.Deck().preprocess(notebook, {"metadata": {"name": "1-score-functions"}})
    assert [book_source.slide(cell) for cell in made.cells] == ["slide", "slide", "-", "-", "-"]
    assert made.cells[0].source.endswith("[chapter 2](../book/2-teacher.html#euler).")
    assert made.cells[1].source == "### Paths"
    assert made.cells[2].source == "*A path*"
    assert made.cells[4].source == (
        "[above](../book/1-score-functions.html#paths), [paper](https://arxiv.org), "
        "$[\\nabla p](x)$"
    )


@BUILT
def test_links_of_the_decks_lead_to_pages_of_the_site():
    targets = {
        link
        for deck in FOLDER.glob("*.html")
        for link in re.findall(r'href="(\.\./[^"#]+)', deck.read_text(encoding="utf8"))
    }
    assert targets
    assert not [link for link in targets if not (FOLDER / link).exists()]


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser, path, query=""):
    """A deck in a page, and what it complained about or asked for from elsewhere."""
    page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
    trouble = []
    page.on("console", lambda said: trouble.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on(
        "request",
        lambda asked: (
            None if asked.url.startswith(("file:", "data:")) else trouble.append(asked.url)
        ),
    )
    page.goto((FOLDER / f"{path.stem}.html").as_uri() + query)
    page.wait_for_function("window.Reveal && Reveal.isReady()")
    return page, trouble


@in_browser
@EVERY_CHAPTER
def test_every_slide_fits_and_is_typeset(browser, path):
    page, trouble = opened(browser, path)
    count = page.evaluate("Reveal.getTotalSlides()")
    assert count == sum(kind == "slide" for kind, _ in types(path))
    for number in range(count):
        page.evaluate(f"Reveal.slide({number})")
        shown = page.evaluate(SHOWN)
        where = f"slide {number + 1}: {shown['heading']}"
        assert shown["heading"], where
        assert shown["bottom"] <= HEIGHT, where
        assert shown["right"] <= WIDTH, where
        assert not shown["wrong"], where
        assert not re.search(r"\$|\\[a-zA-Z(\[]", shown["words"]), (where, shown["words"])
        for picture in shown["pictures"]:
            assert picture["alt"].strip(), where
            assert picture["loaded"], where
            assert picture["height"] >= SMALLEST, where
    assert trouble == []
    page.close()


@in_browser
def test_a_slider_moves_on_its_slide_and_arrows_on_it_stay_there(browser):
    page, trouble = opened(browser, CHAPTERS[0])
    slide = page.locator("section.slider, section:has(> section .dmd-slider)").first
    number = slide.evaluate("(each) => [...each.parentElement.children].indexOf(each)")
    page.evaluate(f"Reveal.slide({number})")
    handle = page.locator("section.present .dmd-slider input").first
    before = page.locator("section.present .dmd-slider img").get_attribute("alt")
    handle.focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("section.present .dmd-slider img").get_attribute("alt") != before
    assert page.evaluate("Reveal.getIndices().h") == number
    page.locator("body").click(position={"x": 5, "y": 5})
    handle.evaluate("(each) => each.blur()")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("Reveal.getIndices().h") == number + 1
    assert trouble == []
    page.close()


@in_browser
def test_formulas_of_the_notes_are_mathml_which_the_speakers_window_shows(browser):
    page, trouble = opened(browser, CHAPTERS[0])
    assert page.locator("aside math").count() > 20
    assert page.locator("aside mjx-container").count() == 0
    notes = page.evaluate("[...document.querySelectorAll('aside p')].map((p) => p.textContent)")
    assert not [text for text in notes if "$" in text]
    assert trouble == []
    page.close()


@in_browser
@EVERY_CHAPTER
def test_an_option_of_a_question_unfolds_within_its_slide(browser, path):
    page, _trouble = opened(browser, path)
    count = page.evaluate("Reveal.getTotalSlides()")
    for number in range(count - 6, count - 1):
        page.evaluate(f"Reveal.slide({number})")
        for option in page.locator("section.present details").all():
            option.locator("summary").click()
            assert page.evaluate(SHOWN)["bottom"] <= HEIGHT
            option.locator("summary").click()
    page.close()


@in_browser
def test_a_deck_prints_one_slide_to_a_page(browser, tmp_path):
    page, _trouble = opened(browser, CHAPTERS[0], "?print-pdf")
    count = sum(kind == "slide" for kind, _ in types(CHAPTERS[0]))
    page.wait_for_function(f"document.querySelectorAll('.pdf-page').length == {count}")
    target = Path(tmp_path, "deck.pdf")
    page.pdf(path=target, prefer_css_page_size=True, print_background=True)
    pages = PdfReader(target).pages
    assert len(pages) == count
    assert "Score functions" in pages[0].extract_text()
    assert "Objectives" in "".join(each.extract_text() for each in pages[:6])
    page.close()

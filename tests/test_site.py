"""The built site in a browser: wide and narrow, light and dark, by mouse, finger and keyboard.

Needs chromium and a built site (`make book`); another site: DMD_TUTORIAL_SITE=/path/to/html.
"""

import base64
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import re
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import numpy as np
import pdf
import pytest
from PIL import Image

SITE = Path(os.environ.get("DMD_TUTORIAL_SITE", Path(__file__).parents[1] / "_build" / "html"))
PAGES = [path.relative_to(SITE).as_posix() for path in sorted(SITE.glob("book/**/*.html"))]
CHROMIUM = pdf.found_chromium()
VIEWS = {
    "wide and light": {"viewport": {"width": 1440, "height": 900}, "color_scheme": "light"},
    "narrow and dark": {
        "viewport": {"width": 360, "height": 740},
        "color_scheme": "dark",
        "has_touch": True,
    },
}
PATIENCE = 120_000  # milliseconds, for a machine that does other things too

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path"),
    pytest.mark.skipif(not PAGES, reason=f"no built site at {SITE}: run `make book`"),
]

# What is wider than the window without a box of its own in which it could scroll.
TOO_WIDE = """() => {
  const page = document.documentElement;
  if (page.scrollWidth <= page.clientWidth) return [];
  const wide = [...document.querySelectorAll("body *")].filter(
    (element) => element.getBoundingClientRect().right > page.clientWidth + 1);
  return wide.map((element) => `${element.tagName}.${element.className}`).slice(0, 5);
}"""
# Lines of code that are wider than the box they stand in.
CUT_OFF = """() => {
  const folded = [...document.querySelectorAll("details:not([open])")];
  for (const part of folded) part.open = true;
  const code = [...document.querySelectorAll(".bd-article div.highlight-ipython3 pre, "
    + ".bd-article div.highlight-python pre, .bd-article div.highlight-text pre")];
  const cut = code.filter((box) => box.scrollWidth > box.clientWidth + 1);
  const lines = cut.map((box) => box.textContent.trim().split("\\n").reduce(
    (long, line) => line.length > long.length ? line : long));
  for (const part of folded) part.open = false;
  return lines;
}"""
# Text and formulas that lie outside the part of the page in which they could be seen. What scrolls
# can be seen, but not on paper.
CLIPPED = """(paper) => {
  const seen = new Map();
  const bounds = (element) => {
    if (element === document.documentElement) return [0, innerWidth];
    if (seen.has(element)) return seen.get(element);
    const [left, right] = bounds(element.parentElement);
    const box = element.getBoundingClientRect(), overflow = getComputedStyle(element).overflowX;
    const own = overflow === "visible" ? [left, right]
      : !paper && ["auto", "scroll"].includes(overflow) ? [-Infinity, Infinity]
      : [Math.max(left, box.left), Math.min(right, box.right)];
    seen.set(element, own);
    return own;
  };
  const unseen = "mjx-container mjx-assistive-mml, script, style, [role=status]";
  const found = [];
  const check = (element, boxes) => {
    const [left, right] = bounds(element);
    if ([...boxes].some((box) => box.width && (box.right > right + 2 || box.left < left - 2))) {
      found.push(element.closest("td, th, p, li, pre, .math").textContent.trim().slice(0, 80));
    }
  };
  const folded = [...document.querySelectorAll("details:not([open])")];
  for (const part of folded) part.open = true;
  const article = document.querySelector(".bd-article");
  const texts = document.createTreeWalker(article, NodeFilter.SHOW_TEXT);
  const range = document.createRange();
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || element.closest(unseen)) continue;
    range.selectNodeContents(texts.currentNode);
    check(element, range.getClientRects());
  }
  for (const formula of article.querySelectorAll("mjx-math, mjx-itable, mjx-labels")) {
    check(formula.parentElement, formula.getClientRects());
  }
  for (const part of folded) part.open = false;
  return found;
}"""
PAPER = {"width": 718, "height": 1000}  # of A4 between the margins of a browser, in CSS pixels
UNTYPESET = """() => [...document.querySelectorAll("div.math, span.math")].filter(
  (element) => !element.querySelector("mjx-container") || element.querySelector("mjx-merror")
).map((element) => element.textContent.slice(0, 80))"""
LINKS = """() => [...document.querySelectorAll("a[href]")].map((link) => link.href)"""
BROKEN_PICTURES = """() => [...document.querySelectorAll("img")].filter(
  (image) => !image.alt.trim() || !image.complete || !image.naturalWidth
).map((image) => image.alt || image.src.slice(0, 60))"""


# Counts how far text jumps while a page loads, by the browser's own measure.
LISTEN_FOR_JUMPS = """
window.jumps = [];
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) {
    if (!entry.hadRecentInput) window.jumps.push(entry.value);
  }
}).observe({type: "layout-shift", buffered: true});
"""
PICTURES = ".bd-article img:visible"
CONTRAST = 4.5  # of text to its ground, as the WCAG ask for
SEVERE = """async () => (
  await axe.run(document, {resultTypes: ["violations"], preload: false})
).violations.filter(({impact}) => ["serious", "critical"].includes(impact)).map(
  ({id, help, nodes}) => `${id}: ${help}: ${nodes.map((node) => node.html).slice(0, 3)}`)"""

BUDGET = 1_500_000  # bytes of a page with everything in it, compressed as a server sends them
REQUESTS = 45


class Quiet(SimpleHTTPRequestHandler):
    """Serves files without a line for each."""

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address():
    """The address at which the site is served."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(SITE))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def chromium():
    """A browser."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = started.chromium.launch(
            executable_path=CHROMIUM, args=arguments, timeout=PATIENCE
        )
        yield browser
        browser.close()


class Visit:
    """A page of the site, open in a browser, and all that went wrong on the way."""

    def __init__(self, browser, address, name, view):
        self.context = browser.new_context(**VIEWS[view])
        self.context.set_default_timeout(PATIENCE)
        self.page = self.context.new_page()
        self.troubles = []
        self.asked = set()
        self.address = address
        self.page.on("pageerror", lambda error: self.troubles.append(f"script error: {error}"))
        self.page.on("console", self.hear)
        self.page.on("request", self.ask)
        self.page.on("response", self.answer)
        self.page.add_init_script(LISTEN_FOR_JUMPS)
        self.page.goto(address + name, wait_until="load")
        self.page.wait_for_function("!window.MathJax || MathJax.startup.promise !== undefined")
        self.page.evaluate("async () => { if (window.MathJax) await MathJax.startup.promise; }")

    def hear(self, message):
        if message.type == "error":
            self.troubles.append(f"console: {message.text}")

    def ask(self, request):
        self.asked.add(request.url)
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.troubles.append(f"asks another host: {request.url}")

    def answer(self, response):
        if response.status >= 400:
            self.troubles.append(f"missing: {response.url}")


@pytest.fixture(scope="module", params=[(name, view) for name in PAGES for view in VIEWS], ids=str)
def visit(request, chromium, address):
    """Every page in every view, each opened once for all tests."""
    visit = Visit(chromium, address, *request.param)
    yield visit
    visit.context.close()


def test_a_page_loads_without_trouble(visit):
    assert visit.troubles == []


def test_a_page_is_light(visit):
    weights = {url: weight(url, visit.address) for url in visit.asked}
    lines = [f"{weights[url]:9,d}  {url}" for url in sorted(weights, key=weights.get)[::-1]]
    table = "\n".join([*lines, f"{sum(weights.values()):9,d}  bytes, {len(lines)} requests"])
    assert sum(weights.values()) <= BUDGET, table
    assert len(weights) <= REQUESTS, table


def weight(url, address):
    """How many bytes of a file of the site travel; what is not on the wire has none."""
    if not url.startswith(address):
        return 0
    path = SITE / unquote(url.removeprefix(address).partition("?")[0])
    return len(gzip.compress(path.read_bytes())) if path.is_file() else 0


def test_little_jumps_while_a_page_loads(visit):
    assert sum(visit.page.evaluate("window.jumps")) < 0.1


def test_pictures_have_their_room_before_they_arrive(visit):
    without_size = "img:not([width][height]):not([src*='_static/images/'])"
    assert visit.page.locator(f".bd-article {without_size}").count() == 0


def test_text_comes_before_scripts(visit):
    page = visit.page.content()
    body = page.partition("<body")[2]
    assert "documentation_options.js" in body
    blocking = "script[src]:not([defer]):not([async])"
    assert visit.page.locator(f"head {blocking}").count() == 0


def test_no_barrier_that_axe_calls_serious(visit):
    package = pytest.importorskip("axe_playwright_python")
    visit.page.evaluate((Path(package.__file__).parent / "axe.min.js").read_text("utf8"))
    assert visit.page.evaluate(SEVERE) == []


def test_pictures_are_as_bright_and_as_legible_in_the_dark(visit):
    """What is drawn on white stays on white, undimmed, and its ink stands out from it."""
    for picture in visit.page.locator(PICTURES).all():
        ground, contrast = seen_on_screen(picture)
        assert ground >= 250, picture.get_attribute("alt")
        assert contrast >= CONTRAST, picture.get_attribute("alt")


def seen_on_screen(picture):
    """How light a picture's edge is on the screen (0 to 255), and its ink's contrast to that."""
    shown = np.asarray(Image.open(io.BytesIO(picture.screenshot())).convert("L"), dtype=float)
    within = shown[2:-2, 2:-2]
    edge = np.concatenate([within[0], within[-1], within[:, 0], within[:, -1]])
    ground, ink = np.quantile(edge, 0.9), np.quantile(within, 0.002)
    return ground, (luminance(ground) + 0.05) / (luminance(ink) + 0.05)


def luminance(grey):
    """Relative luminance of a grey from 0 to 255, by the WCAG."""
    share = grey / 255
    return share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4


def test_folded_parts_open_and_close(visit):
    for details in visit.page.locator(".bd-article details").all():
        summary, inside = details.locator("> summary"), details.locator("> :not(summary)").first
        if not summary.is_visible():
            continue  # within another that is still closed
        was_open = inside.is_visible()
        summary.press("Enter")
        assert inside.is_visible() != was_open
        summary.press("Enter")
        assert inside.is_visible() == was_open


def test_no_line_of_code_is_cut_off(visit):
    """Folded cells, too; on a phone code scrolls in its own box."""
    if visit.page.viewport_size["width"] > 1000:
        assert visit.page.evaluate(CUT_OFF) == []


def test_no_text_is_cut_off(visit):
    assert visit.page.evaluate(CLIPPED, False) == []


def test_a_page_does_not_scroll_sideways(visit):
    assert visit.page.evaluate(TOO_WIDE) == []


def test_equations_are_typeset(visit):
    assert visit.page.evaluate(UNTYPESET) == []


def test_every_picture_shows_and_says_something(visit):
    assert visit.page.evaluate(BROKEN_PICTURES) == []


def test_the_colour_scheme_is_followed(visit):
    dark = visit.page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    theme = visit.page.evaluate("document.documentElement.dataset.theme")
    assert theme == ("dark" if dark else "light")


def test_links_within_the_site_lead_somewhere(visit):
    for link in visit.page.evaluate(LINKS):
        if not link.startswith(visit.address):
            continue
        url, fragment = urldefrag(link)
        path = SITE / unquote(url.removeprefix(visit.address).partition("?")[0] or "index.html")
        assert path.exists(), link
        if fragment and path.suffix == ".html":
            assert f'id="{unquote(fragment)}"' in path.read_text("utf8"), link


def test_sliders_obey_the_keyboard_and_show_what_they_say(visit):
    for figure in visit.page.locator("figure.dmd-slider").all():
        for control in figure.locator("input[type=range]").all():
            control.focus()
            control.press("Home")
            low = state_of(figure, control)
            control.press("ArrowRight")
            next_one = state_of(figure, control)
            control.press("End")
            high = state_of(figure, control)
            assert low["value"] == "0"
            assert next_one["value"] == "1"
            assert high["value"] == control.get_attribute("max")
            for key in ("text", "alt", "said"):
                assert len({low[key], next_one[key]}) == 2
            for state in (low, next_one, high):
                assert state["picture"] == state["digest"]
                assert state["said"] == state["text"]


def test_sliders_obey_page_keys_and_the_mouse(visit):
    for figure in visit.page.locator("figure.dmd-slider").all():
        for control in figure.locator("input[type=range]").all():
            last = int(control.get_attribute("max"))
            for key, reached in [("PageDown", 0), ("PageUp", last)]:
                for _ in range(last + 1):
                    control.press(key)
                assert int(control.input_value()) == reached, key
            for share, reached in [(0.0, 0), (1.0, last)]:
                drag(visit.page, control, share)
                state = state_of(figure, control)
                assert int(state["value"]) == reached
                assert state["picture"] == state["digest"]
                assert state["said"] == state["text"]


def drag(page, control, share):
    """Press the mouse in the middle of a slider and let go where `share` of it is to the left."""
    control.scroll_into_view_if_needed()
    box = control.bounding_box()
    height = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 2, height)
    page.mouse.down()
    page.mouse.move(box["x"] + 1 + share * (box["width"] - 2), height, steps=4)
    page.mouse.up()


def state_of(figure, control):
    """What a slider shows and tells in its present state."""
    image = figure.locator("img")
    stored = base64.b64decode(image.get_attribute("src").partition("base64,")[2])
    name = control.get_attribute("id")
    return {
        "value": control.input_value(),
        "text": control.get_attribute("aria-valuetext"),
        "said": figure.locator(f'output[for="{name}"]').inner_text(),
        "alt": image.get_attribute("alt"),
        "picture": hashlib.sha256(stored).hexdigest(),
        "digest": figure.get_attribute("data-digest"),
    }


def test_on_paper_no_text_is_cut_off(visit):
    """Neither equations nor their numbers, cells of tables, lines of code.

    The last test of a visit: the page stays paper.
    """
    if visit.page.viewport_size["width"] > 1000:
        return  # all screens print alike
    visit.page.emulate_media(media="print")
    visit.page.set_viewport_size(PAPER)
    visit.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert visit.page.evaluate(CLIPPED, True) == []


# The second half of a chain whose first is in test_book_sliders.py: the browser shows, says and
# reads out for state k of a slider what the page stores for it.

SHOW_EVERY_STATE = """async () => {
  const shown = [];
  for (const figure of document.querySelectorAll("figure.dmd-slider")) {
    const inputs = [...figure.querySelectorAll("input")];
    const states = [];
    const go = async (axis) => {
      if (axis < inputs.length) {
        for (let k = 0; k <= Number(inputs[axis].max); k++) {
          inputs[axis].value = k;
          inputs[axis].dispatchEvent(new Event("input"));
          await go(axis + 1);
        }
        return;
      }
      const image = figure.querySelector("img");
      states.push({
        picture: image.src.split("base64,")[1],
        alt: image.alt,
        read: inputs.map((input) => input.getAttribute("aria-valuetext")),
        written: [...figure.querySelectorAll("output")].map((output) => output.textContent),
      });
    };
    await go(0);
    shown.push(states);
  }
  return shown;
}"""


def stored_sliders(name):
    """What the sliders of a page carry: the texts of their axes, and a frame for each state."""
    pattern = r'<script type="application/json">({"texts".*?)</script>'
    return [json.loads(data) for data in re.findall(pattern, (SITE / name).read_text("utf8"))]


@pytest.mark.parametrize("name", PAGES)
def test_every_state_of_every_slider_is_stored_as_it_was_drawn(name):
    """Bytes against the digest taken when drawing; and each step of a slider is to be seen."""
    for data in stored_sliders(name):
        states, texts = data["frames"], data["texts"]
        assert len(states) == math.prod(map(len, texts))
        assert all(len(set(axis)) == len(axis) for axis in texts)
        assert len({state["alt"] for state in states}) == len(states)
        for state, after in zip(states, states[len(states) // len(texts[0]) :], strict=False):
            assert state["digest"] != after["digest"]  # one step of the first slider apart
        for state in states:
            picture = base64.b64decode(state["png"])
            assert hashlib.sha256(picture).hexdigest() == state["digest"]


@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_cut_off_at_the_edge_of_a_picture(name):
    stored = re.findall(r"data:image/png;base64,([^\"]+)", (SITE / name).read_text("utf8"))
    frames = [frame["png"] for data in stored_sliders(name) for frame in data["frames"]]
    for picture in {*stored, *frames}:
        grey = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))).convert("L"))
        assert min(edge.min() for edge in (grey[0], grey[-1], grey[:, 0], grey[:, -1])) >= 250


@pytest.mark.parametrize("name", [name for name in PAGES if stored_sliders(name)])
def test_each_state_shows_and_says_what_is_stored_for_it(open_page, address, name):
    shown = open_page(address + name).evaluate(SHOW_EVERY_STATE)
    sliders_of_page = stored_sliders(name)
    assert len(shown) == len(sliders_of_page)
    for states, data in zip(shown, sliders_of_page, strict=True):
        values = itertools.product(*data["texts"])  # the last slider runs fastest
        for state, frame, texts in zip(states, data["frames"], values, strict=True):
            assert state["picture"] == frame["png"], texts
            assert state["alt"] == frame["alt"]
            assert state["read"] == state["written"] == list(texts)


def test_every_chapter_has_a_slider_in_the_page(address):
    chapters = [name for name in PAGES if Path(name).name[0].isdigit()]
    assert chapters
    for name in chapters:
        assert 'class="dmd-slider"' in (SITE / name).read_text("utf8"), name


def test_the_site_opens_at_its_first_page(chromium, address):
    page = chromium.new_page()
    page.goto(address, wait_until="load", timeout=PATIENCE)
    page.wait_for_url(urljoin(address, "book/intro.html"), timeout=PATIENCE)
    page.close()


# The landing page, and how a chapter begins


INTRO = "book/intro.html"


def test_the_first_screen_says_what_dmd_is_shows_it_and_leads_on(open_page, address):
    page = open_page(address + INTRO, viewport={"width": 1440, "height": 900})
    picture = page.locator(".bd-article img").first
    shows = picture.get_attribute("alt")  # many steps against one
    assert all(word in shows for word in ("teacher", "student", "steps", "digit"))
    idea = page.locator(".bd-article p", has_text="Distribution matching distillation").first
    start = page.locator('.bd-article a[href^="1-"]').first
    for element in (picture, idea, start):
        box = element.bounding_box()
        assert box["y"] >= 0
        assert box["y"] + box["height"] <= 900, element
    assert "one" in idea.inner_text()
    assert "step" in idea.inner_text()


def test_on_a_phone_the_landing_page_fits_and_says_what_its_picture_shows(open_page, address):
    page = open_page(address + INTRO, viewport={"width": 360, "height": 740}, has_touch=True)
    assert page.evaluate(TOO_WIDE) == []
    picture = page.locator(".bd-article img").first
    box = picture.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 360
    assert len(picture.get_attribute("alt")) > 50


@pytest.mark.parametrize("name", [name for name in PAGES if Path(name).name[0].isdigit()])
def test_a_chapter_opens_with_its_picture(open_page, address, name):
    """Half of it at least is on the first screen; only words, and no code, stand before it."""
    page = open_page(address + name, viewport={"width": 1440, "height": 900})
    assert page.evaluate(HEADINGS_BEFORE_THE_FIRST_PICTURE)[:-1] == []
    assert page.evaluate(CODE_BEFORE_THE_FIRST_PICTURE) == []  # all of it is folded
    box = page.locator(PICTURES).first.bounding_box()
    assert box["y"] + box["height"] / 2 <= 900


CODE_BEFORE_THE_FIRST_PICTURE = """() => {
  const parts = [...document.querySelectorAll(".bd-article div.cell_input pre, .bd-article img")];
  const first = parts.findIndex((part) => part.tagName === "IMG");
  return parts.slice(0, first).filter((part) => part.checkVisibility()).map(
    (part) => part.textContent.slice(0, 60));
}"""
HEADINGS_BEFORE_THE_FIRST_PICTURE = """() => {
  const parts = [...document.querySelectorAll(".bd-article h2, .bd-article h3, .bd-article img")];
  const first = parts.findIndex((part) => part.tagName === "IMG");
  return parts.slice(0, first).map((part) => part.firstChild.textContent);
}"""


# One page for all of its kind: what the theme does on every page alike.

CHAPTER = next((name for name in PAGES if Path(name).name.startswith("4-")), None)


@pytest.fixture
def open_page(chromium):
    """Open a page in a context of its own; its script errors must stay empty."""
    contexts, errors = [], []

    def open_one(url, **options):
        contexts.append(chromium.new_context(**options))
        contexts[-1].set_default_timeout(PATIENCE)
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url, wait_until="load")
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert errors == []


def test_a_copy_button_copies_its_cell(open_page, address):
    page = open_page(address + CHAPTER, permissions=["clipboard-read", "clipboard-write"])
    cell = page.locator("div.highlight:has(button.copybtn):visible").first
    cell.hover()
    cell.locator("button.copybtn").click()
    page.wait_for_selector("button.copybtn.success")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.strip() == cell.locator("pre").inner_text().strip()


def test_a_defined_word_is_explained_to_the_keyboard(open_page, address):
    page = open_page(address + CHAPTER)
    word = page.locator("a.defined").first
    definition = word.get_attribute("title")
    assert len(definition) > 20
    word.focus()
    page.keyboard.press("Tab")
    after = "getComputedStyle(document.querySelector('a.defined'), '::after').content"
    assert page.evaluate(after) == "none"
    page.keyboard.press("Shift+Tab")
    assert page.evaluate(after).strip('"') == definition


def search(open_page, address, words):
    """Open the search page, and wait for the excerpts of what it found."""
    page = open_page(f"{address}search.html?q={words}")
    page.wait_for_function(
        "document.querySelectorAll('ul.search li').length > 0 && "
        "[...document.querySelectorAll('ul.search li')].every((each) => each.children.length > 1)"
    )
    return page


def test_search_shows_readable_excerpts_and_marks_the_word_where_it_leads(open_page, address):
    page = search(open_page, address, "Tweedie")
    excerpts = page.locator("ul.search p.context").all_inner_texts()
    assert len(excerpts) > 5
    for excerpt in excerpts:
        assert "tweedie" in excerpt.lower()
        assert not re.search(r"\\|Contents|Ctrl|\.ipynb", excerpt), excerpt
    page.locator('ul.search a[href*="1-score-functions"]').first.click()
    page.wait_for_selector(".bd-article .highlighted")
    marked = page.locator(".bd-article .highlighted").all_text_contents()
    assert len(marked) > 10
    assert {word.lower() for word in marked} == {"tweedie"}


def test_search_reads_formulas_out(open_page, address):
    page = search(open_page, address, "known score")
    found = page.locator("ul.search").inner_text()
    assert "\\" not in found
    assert "σ_min = 0.002" in found


def test_the_magnifier_does_not_lie_on_what_is_typed(open_page, address):
    page = open_page(address + "search.html?q=Tweedie")
    icon = page.locator(".bd-article-container .bd-search .fa-magnifying-glass").bounding_box()
    field = page.locator(".bd-article-container .bd-search input")
    padding = field.evaluate("(field) => parseFloat(getComputedStyle(field).paddingLeft)")
    assert icon["x"] + icon["width"] <= field.bounding_box()["x"] + padding


def test_every_slider_works_where_a_word_is_marked(open_page, address):
    """Marking goes through the stored texts of a slider, too."""
    page = search(open_page, address, "critic")
    page.locator('ul.search a[href*="4-fake-critic.html"]').first.click()
    page.wait_for_selector(".bd-article .highlighted")
    control = page.locator("figure.dmd-slider input").first
    control.press("End")
    state = state_of(page.locator("figure.dmd-slider").first, control)
    assert state["picture"] == state["digest"]
    assert state["said"] == state["text"]


def test_the_button_changes_the_colours_and_they_stay(open_page, address):
    page = open_page(address + CHAPTER, color_scheme="light")
    seen = set()
    for _ in range(3):
        page.locator("button.theme-switch-button:visible").first.click()
        seen.add(page.evaluate("document.documentElement.dataset.theme"))
        assert seen_on_screen(page.locator(PICTURES).first)[0] >= 250
    assert seen == {"light", "dark"}
    while page.evaluate("document.documentElement.dataset.mode") != "dark":
        page.locator("button.theme-switch-button:visible").first.click()
    page.reload(wait_until="load")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_the_site_works_from_the_file_system(open_page):
    page = open_page((SITE / CHAPTER).resolve().as_uri())
    page.evaluate("MathJax.startup.promise")
    assert page.evaluate(UNTYPESET) == []
    figure = page.locator("figure.dmd-slider").first
    control = figure.locator("input[type=range]").first
    control.press("End")
    state = state_of(figure, control)
    assert state["value"] == control.get_attribute("max")
    assert state["picture"] == state["digest"]


def test_search_works_from_the_file_system(open_page):
    page = open_page(f"{(SITE / 'search.html').resolve().as_uri()}?q=Tweedie")
    page.wait_for_selector("ul.search li a")


@pytest.mark.parametrize("name", [name for name in PAGES if Path(name).name[0].isdigit()])
def test_a_chapter_is_readable_without_scripts(open_page, address, name):
    page = open_page(address + name, java_script_enabled=False)
    assert page.locator(".bd-article h1").is_visible()
    for figure in page.locator("figure.dmd-slider").all():
        assert figure.locator("img").is_visible()
        assert figure.locator("output").first.inner_text()
        assert not figure.locator("input").first.is_visible()
    hint = page.locator("details:has(summary:text('Hint 1'))").first
    hint.locator("summary").click()
    assert hint.locator("> :not(summary)").first.is_visible()


def test_on_paper_a_slider_is_a_picture_with_its_value(open_page, address):
    page = open_page(address + CHAPTER)
    page.emulate_media(media="print")
    figure = page.locator("figure.dmd-slider").first
    assert figure.locator("img").is_visible()
    assert figure.locator("output").first.is_visible()
    chrome = "input[type=range], button.copybtn, .bd-sidebar-primary, .bd-header-article"
    for element in page.locator(chrome).all():
        assert not element.is_visible()
    solution = page.locator("details.hide", has_text="Solution 4.1").first
    assert solution.locator("> summary").is_visible()
    solution.evaluate("(details) => { details.open = true; }")
    assert solution.locator("div.highlight").first.is_visible()


def test_the_answers_of_the_quiz_are_folded_on_the_screen_and_open_on_paper(open_page, address):
    page = open_page(address + CHAPTER)
    options = page.locator("#check-yourself details")
    answers = page.locator("#check-yourself details > :not(summary)")
    assert answers.count() == options.count() >= 20
    assert not any(answer.is_visible() for answer in answers.all())
    page.emulate_media(media="print")
    assert all(answer.is_visible() for answer in answers.all())
    assert all(option.locator("> summary").is_visible() for option in options.all())


@pytest.mark.parametrize("chapter", ["3-kl-gradient", "6-full-distillation"])
def test_a_print_from_the_dark_is_dark_on_white_and_whole(open_page, address, chapter):
    pypdf = pytest.importorskip("pypdf")
    page = open_page(f"{address}book/{chapter}.html", color_scheme="dark")
    page.evaluate("MathJax.startup.promise")
    reader = pypdf.PdfReader(io.BytesIO(page.pdf(format="A4", margin={"right": "10mm"})))
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"  # and again after it
    pen, colours, places = {}, set(), []

    def write(operator, values, to_paper, to_page):
        if operator == b"rg":
            pen["colour"] = tuple(map(float, values))
        elif operator in (b"Tj", b"TJ"):
            colours.add(pen["colour"])
            places.append(to_paper[0] * to_page[4] + to_paper[4])  # points from the left

    text = "".join(sheet.extract_text(visitor_operand_before=write) for sheet in reader.pages)
    for colour in colours:
        assert 1.05 / (brightness(colour) + 0.05) >= CONTRAST, colour
    assert max(places) <= float(reader.pages[0].mediabox.width) - 28  # 10 mm
    numbers = re.findall(r"\\tag\{([\d.]+)\}", (SITE / f"book/{chapter}.html").read_text("utf8"))
    assert len(numbers) > 3
    assert [number for number in numbers if f"({number})" not in text] == []


def brightness(colour):
    """Relative luminance of a colour, its parts from 0 to 1, by the WCAG."""
    return np.dot([0.2126, 0.7152, 0.0722], [luminance(255 * part) for part in colour])

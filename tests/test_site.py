"""The built site in a browser: wide and narrow, light and dark, by mouse, finger and keyboard.

Needs chromium and a built site (`make book`); another site: DMD_TUTORIAL_SITE=/path/to/html.
"""

import base64
import hashlib
import os
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import pytest

SITE = Path(os.environ.get("DMD_TUTORIAL_SITE", Path(__file__).parents[1] / "_build" / "html"))
PAGES = [path.relative_to(SITE).as_posix() for path in sorted(SITE.glob("book/*.html"))]
CHROMIUM = next(
    filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None
)
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
UNTYPESET = """() => [...document.querySelectorAll("div.math, span.math")].filter(
  (element) => !element.querySelector("mjx-container") || element.querySelector("mjx-merror")
).map((element) => element.textContent.slice(0, 80))"""
LINKS = """() => [...document.querySelectorAll("a[href]")].map((link) => link.href)"""
BROKEN_PICTURES = """() => [...document.querySelectorAll("img")].filter(
  (image) => !image.alt.trim() || !image.complete || !image.naturalWidth
).map((image) => image.alt || image.src.slice(0, 60))"""


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
        self.address = address
        self.page.on("pageerror", lambda error: self.troubles.append(f"script error: {error}"))
        self.page.on("console", self.hear)
        self.page.on("request", self.ask)
        self.page.on("response", self.answer)
        self.page.goto(address + name, wait_until="load")
        self.page.wait_for_function("!window.MathJax || MathJax.startup.promise !== undefined")
        self.page.evaluate("async () => { if (window.MathJax) await MathJax.startup.promise; }")

    def hear(self, message):
        if message.type == "error":
            self.troubles.append(f"console: {message.text}")

    def ask(self, request):
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

"""Sliders: what is stored, what a live one draws, and what a browser makes of the page."""

import base64
import functools
import hashlib
import io
import json
import re
import shutil

import ipywidgets
import numpy as np
import pytest
import torch
from PIL import Image

from dmd_tutorial.notebook import plots, sliders
from dmd_tutorial.notebook.sliders import Axis, frames, page, slider, widget

SIGMAS = [0.1, 0.5, 2.0, 8.0]


def draw(sigma):
    """A curve that becomes wider with sigma."""
    fig, ax = plots.figure(width=320, height=180)
    x = np.linspace(-4, 4, 50)
    ax.plot(x, np.exp(-((x / sigma) ** 2)))
    return fig


def draw_two(slope, name):
    """A line, named in the title."""
    fig, ax = plots.figure(width=320, height=180)
    ax.plot([0, 1], [0, slope])
    ax.set(ylim=(0, 4), title=name)
    return fig


def alt(sigma):
    return f'A bell of width {sigma:g} & a title that says "<b>"'


def alt_two(slope, name):
    return f"A line of slope {slope} with {name}"


ONE = [Axis(SIGMAS, "Noise level", "units of x")]
TWO = [Axis([1, 2, 3], "Slope"), Axis(["none", "Eq. 8"], "Weighting")]


@functools.cache
def expected():
    """The frames of `draw` by their value."""
    return {frame.values[0]: frame for frame in frames(draw, SIGMAS)}


def stored(source):
    """The data that a page's slider carries."""
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', source)[1])


@pytest.fixture
def shown(monkeypatch):
    """What `slider` displays, as in a notebook of the site."""
    objects = []
    monkeypatch.setattr(sliders, "display", objects.append)
    monkeypatch.setenv(sliders.STATIC, "1")
    return objects


def test_frames_show_what_is_drawn():
    for frame in expected().values():
        assert frame.size == (320, 180)
        small = np.asarray(Image.open(io.BytesIO(frame.picture)).convert("RGB"), dtype=float)
        full = Image.open(io.BytesIO(plots.png(draw(*frame.values)))).convert("RGB")
        assert np.abs(small - np.asarray(full, dtype=float)).mean() < 0.5
        assert len(set(map(tuple, small.reshape(-1, 3)))) <= sliders.PALETTE


def test_frames_of_two_sliders_run_through_the_second_first():
    drawn = frames(draw_two, [1, 2], ["a", "b"])
    assert [frame.values for frame in drawn] == [(1, "a"), (1, "b"), (2, "a"), (2, "b")]


def test_frames_are_the_same_each_time_and_differ_from_each_other():
    digests = [frame.digest for frame in frames(draw, SIGMAS)]
    assert digests == [frame.digest for frame in expected().values()]
    assert len(set(digests)) == len(SIGMAS)


def test_frames_of_different_sizes_are_refused():
    def grows(width):
        return plots.figure(width=width, height=100)[0]

    with pytest.raises(
        ValueError, match=re.escape("(300,) is (300, 100), the first is (200, 100)")
    ):
        frames(grows, [200, 300])


def test_a_page_stores_the_frames_of_its_drawing_function():
    data = stored(page(draw, ONE, alt, (2.0,)))
    assert data["texts"] == [["0.1 units of x", "0.5 units of x", "2 units of x", "8 units of x"]]
    for kept, frame in zip(data["frames"], expected().values(), strict=True):
        assert base64.b64decode(kept["png"]) == frame.picture
        assert kept["digest"] == frame.digest == hashlib.sha256(frame.picture).hexdigest()
        assert kept["alt"] == alt(*frame.values)


def test_a_drawing_that_depends_on_what_was_drawn_before_is_refused():
    drawn = []

    def draw_on(sigma):
        drawn.append(sigma)
        return draw(sigma + len(drawn))

    with pytest.raises(ValueError, match=re.escape("(2.0,) is another when it is drawn a second")):
        page(draw_on, ONE, alt, (2.0,))


def test_twelve_states_of_full_size_stay_under_250_kilobytes():
    def full_size(sigma):
        fig, ax = plots.figure()
        x = np.linspace(-4, 4, 200)
        widths = {"teacher": 0.5, "generator": 1, "critic": 2}
        ys = {name: np.exp(-((x / width) ** 2) / sigma) for name, width in widths.items()}
        plots.series(ax, x, ys, xlabel="x, the place", ylabel="density")
        return fig

    largest = max(len(frame.picture) for frame in frames(full_size, [1, 6, 12]))
    assert 13 * largest * 4 / 3 < 250_000  # the first state is there twice; base64 adds a third


def test_a_page_asks_nothing_of_other_hosts():
    assert "http" not in page(draw, ONE, alt, (2.0,))


def test_the_same_slider_twice_has_different_ids():
    pages = [page(draw, [Axis([1, 2], "Width")], alt, (2,)) for _ in range(2)]
    ids = [re.findall(r' id="([^"]+)"', each) for each in pages]
    assert len(set(ids[0]) | set(ids[1])) == 4


def test_without_kernel_the_page_is_displayed_with_the_middle_state(shown):
    slider(draw, np.array(SIGMAS), "Noise level", alt=alt)
    assert 'data-digest="' + expected()[2.0].digest in shown[0]._repr_html_()
    assert repr(shown[0]) == alt(2.0)


def test_tensors_of_whole_numbers_stay_whole_numbers(shown):
    slider(draw_two, torch.arange(1, 4), "Slope", alt=alt_two, second=(["a", "b"], "Name"))
    assert stored(shown[0].source)["texts"] == [["1", "2", "3"], ["a", "b"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": [1.0]}, "1 value(s), a slider needs two"),
        ({"values": [1.0, 1.0]}, "has a value twice"),
        ({"values": [1.0, "two"]}, "mixes names and numbers"),
        ({"values": [2.0, 1.0]}, "do not rise"),
        ({"default": 3.0}, "the default 3.0 of 'Noise level' is none of (1.0, 2.0)"),
        ({"default": (1.0, 2.0)}, "has 2 value(s), not 1"),
        ({"alt": lambda _: " "}, "the alt text is empty in one of 2 states"),
        ({"alt": lambda _: "The same"}, "2 states, but only 1 different alt texts"),
        ({"alt": lambda sigma: "" if sigma == 1 else "Wide"}, "alt text is empty"),
    ],
)
def test_wrong_arguments_are_refused_by_name(shown, arguments, message):
    arguments = {"values": [1.0, 2.0], "alt": alt} | arguments
    with pytest.raises(ValueError, match=re.escape(message)):
        slider(draw, label="Noise level", **arguments)


# With a live kernel


def controls_of(live):
    return live.children[:-1]


def picture_of(live):
    return base64.b64decode(re.search(r'base64,([^"]+)"', live.children[-1].value)[1])


def test_a_live_slider_draws_between_the_values():
    live = widget(draw, ONE, alt, (2.0,))
    before = picture_of(live)
    (control,) = controls_of(live)
    control.value = 1.2345
    assert picture_of(live) != before
    drawn = plots.png(draw(control.value), plots.SHARPNESS)
    assert picture_of(live) == plots.fewer_colours(drawn, plots.COLOURS_STORED)
    assert 'alt="A bell of width 1.2' in live.children[-1].value


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([0.1, 0.2, 0.4, 0.8], ipywidgets.FloatLogSlider),
        ([0.0, 0.5, 1.0], ipywidgets.FloatSlider),
        ([0.1, 0.2, 0.3], ipywidgets.FloatSlider),
        ([0.5, 1.5], ipywidgets.FloatSlider),
        ([1, 5, 18], ipywidgets.IntSlider),
        (["Eq. 8", "none"], ipywidgets.SelectionSlider),
    ],
)
def test_the_live_control_fits_the_values(values, kind):
    live = widget(lambda _: draw(1), [Axis(values, "Value", "m")], str, (values[1],))
    (control,) = controls_of(live)
    assert type(control) is kind
    assert control.value == pytest.approx(values[1])
    assert control.description == "Value (m)"
    if kind is ipywidgets.FloatLogSlider:
        assert [control.base**control.min, control.base**control.max] == pytest.approx([0.1, 0.8])
    elif kind is not ipywidgets.SelectionSlider:
        assert [control.min, control.max] == [values[0], values[-1]]


def test_snapping_keeps_a_live_slider_on_its_values():
    live = widget(draw, ONE, alt, (2.0,), snap=True)
    assert [value for _, value in controls_of(live)[0].options] == SIGMAS


def test_two_live_sliders_share_a_picture():
    live = widget(draw_two, TWO, alt_two, (2, "none"))
    controls_of(live)[0].value = 3
    controls_of(live)[1].value = "Eq. 8"
    drawn = plots.png(draw_two(3, "Eq. 8"), plots.SHARPNESS)
    assert picture_of(live) == plots.fewer_colours(drawn, plots.COLOURS_STORED)


@pytest.mark.parametrize(
    ("kernel", "static", "shows"),
    [
        (True, "", ipywidgets.VBox),
        (True, "0", ipywidgets.VBox),
        (True, "1", plots.Html),
        (False, "", plots.Html),
    ],
)
def test_a_kernel_shows_a_widget_unless_the_site_is_built(
    shown, monkeypatch, kernel, static, shows
):
    monkeypatch.setenv(sliders.STATIC, static)
    monkeypatch.setattr(sliders, "get_ipython", lambda: object() if kernel else None)
    slider(draw, [1.0, 2.0], "Noise level", alt=alt)
    assert [type(each) for each in shown] == [shows]


# In a browser

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield running
        running.close()


@functools.cache
def two_sliders():
    body = page(draw, ONE, alt, (2.0,)) + page(draw_two, TWO, alt_two, (1, "none"))
    # a page that takes the arrow keys for itself, as JupyterLab does
    greedy = "document.addEventListener('keydown', event => event.preventDefault(), true)"
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    return f"<!doctype html>{head}<script>{greedy}</script><body>{body}</body>"


@pytest.fixture
def opened(browser):
    """Open the page of two sliders, 360 CSS pixels wide, and fail on any script error."""
    contexts, errors = [], []

    def open_page(**options):
        contexts.append(
            browser.new_context(viewport={"width": 360, "height": 800}, has_touch=True, **options)
        )
        tab = contexts[-1].new_page()
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("request", lambda request: errors.append(request.url[:40]))
        tab.set_content(two_sliders())
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert [error for error in errors if not error.startswith(("about:", "data:"))] == []


def seen(figure):
    """The bytes of the picture that a slider shows, its alt text, and what is read out."""
    picture = figure.locator("img")
    source = picture.get_attribute("src").partition("base64,")[2]
    texts = [each.get_attribute("aria-valuetext") for each in figure.locator("input").all()]
    return base64.b64decode(source), picture.get_attribute("alt"), texts


@pytest.mark.browser
def test_keys_move_the_picture_the_alt_text_and_the_read_out_value(opened):
    figure = opened().locator("figure").first
    control = figure.get_by_role("slider", name="Noise level")
    moves = [("End", 8.0), ("Home", 0.1), ("ArrowRight", 0.5), ("ArrowUp", 2.0), ("ArrowLeft", 0.5)]
    for key, sigma in [*moves, ("PageUp", 2.0), ("PageDown", 0.5)]:
        control.press(key)
        picture, described, texts = seen(figure)
        assert picture == expected()[sigma].picture, key
        assert figure.get_attribute("data-digest") == expected()[sigma].digest
        assert described == alt(sigma) == figure.get_by_role("status").last.text_content()
        assert texts == [f"{sigma:g} units of x"] == [figure.locator("output").text_content()]


@pytest.mark.browser
def test_two_linked_sliders_reach_every_state_and_leave_the_other_figure_alone(opened):
    tab = opened()
    other, figure = tab.locator("figure").all()
    before = seen(other)
    for frame in frames(draw_two, TWO[0].values, TWO[1].values):
        for axis, value, control in zip(
            TWO, frame.values, figure.get_by_role("slider").all(), strict=True
        ):
            control.fill(str(axis.values.index(value)))
        assert seen(figure) == (frame.picture, alt_two(*frame.values), list(map(str, frame.values)))
    assert seen(other) == before


@pytest.mark.browser
def test_a_tap_moves_the_slider(opened):
    tab = opened()
    figure = tab.locator("figure").first
    box = figure.locator("input").bounding_box()
    assert box["height"] >= 44  # a finger's width
    tab.touchscreen.tap(box["x"] + 3, box["y"] + box["height"] / 2)
    assert seen(figure)[0] == expected()[0.1].picture


@pytest.mark.browser
def test_a_narrow_page_does_not_scroll_sideways(opened):
    tab = opened()
    tab.set_viewport_size({"width": 280, "height": 600})
    assert tab.evaluate("document.documentElement.scrollWidth") <= 280
    box = tab.locator("img").first.bounding_box()
    assert box["width"] / box["height"] == pytest.approx(320 / 180, rel=0.02)


@pytest.mark.browser
def test_without_scripts_the_first_state_is_a_picture_with_its_value(opened):
    figure = opened(java_script_enabled=False).locator("figure").first
    assert not figure.locator("input").is_visible()
    assert figure.locator("output").text_content() == "2 units of x"
    picture, described, _ = seen(figure)
    assert picture == expected()[2.0].picture
    assert described == alt(2.0)


@pytest.mark.browser
def test_running_a_script_twice_does_no_harm(opened):
    tab = opened()
    tab.evaluate(
        "document.querySelectorAll('figure script:not([type])').forEach(s => eval(s.textContent))"
    )
    figure = tab.locator("figure").first
    figure.locator("input").press("End")
    assert seen(figure)[2] == ["8 units of x"]

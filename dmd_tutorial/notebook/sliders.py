"""Sliders that work with and without a kernel, from one drawing function.

With a live kernel (JupyterLab, Colab) `slider` is a widget that draws again at any value. In the
site there is no kernel: there it is a plain ``<input type="range">`` over pictures drawn when the
site was built, which needs no library and obeys keyboard, touch and screen reader. Every picture
carries the SHA-256 of its bytes, so that a test can hold the page against the drawing function.
"""

import hashlib
import html
import io
import itertools
import json
import math
import os
import re
from base64 import b64encode
from collections.abc import Callable, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import ipywidgets
from IPython import get_ipython
from IPython.display import display
from matplotlib.figure import Figure
from PIL import Image

from dmd_tutorial.notebook.plots import Html, fewer_colours, figure_tag, image_tag, png

STATIC = "DMD_TUTORIAL_STATIC"  # set to 1 by the site build and by the notebook tests
PALETTE = 64  # colours of a stored picture

Value = Any  # a float, a whole number, or a name
State = tuple[Value, ...]  # one value of each slider
Draw = Callable[..., Figure]
Alt = Callable[..., str]


class Axis(NamedTuple):
    """One quantity that a slider moves: its values, its name and its unit."""

    values: Sequence[Value]
    label: str
    unit: str = ""

    def text(self, value: Value) -> str:
        number = f"{value:.3g}" if isinstance(value, float) else str(value)
        return f"{number} {self.unit}".strip()


class Frame(NamedTuple):
    """One state of a slider: the values it stands for, and the picture drawn for them."""

    values: State
    picture: bytes
    size: tuple[int, int]  # in pixels
    digest: str  # SHA-256 of the picture's bytes


def slider(
    draw: Draw, values: Sequence[Value], label: str, unit: str = "", *, alt: Alt,
    default: Value | tuple[Value, Value] | None = None, second: tuple | None = None,
    snap: bool = False,
) -> None:  # fmt: skip
    """Display a slider over the figures that a function draws.

    `draw(value)`, or `draw(a, b)` for two sliders, draws one state. It must depend on nothing else,
    and keep its axis limits. `alt`, called like it, says what is to be seen, in each state
    something else. The site shows the `values` (floats, whole numbers, or names), first the
    `default` (a pair for two sliders) or else the middle one. A live slider draws between numbers,
    too, on a logarithmic scale where they are spaced so; with `snap` it does not, for a `draw` that
    knows no others. `second` is `(values, label, unit)` of a second slider.
    """
    axes = [_axis(values, label, unit), *([_axis(*second)] if second else [])]
    start = _start(axes, default)
    if os.environ.get(STATIC) == "1" or get_ipython() is None:
        display(Html(page(draw, axes, alt, start), alt(*start)))
    else:
        display(widget(draw, axes, alt, start, snap))


def frames(draw: Draw, *values: Sequence[Value]) -> list[Frame]:
    """Draw every state of one slider or two, the second one's values fastest, all in one size."""
    drawn = [_frame(draw, state) for state in itertools.product(*values)]
    for frame in drawn:
        if frame.size != drawn[0].size:
            sizes = f"is {frame.size}, the first is {drawn[0].size}"
            raise ValueError(f"the picture for {frame.values} {sizes}")
    return drawn


def _frame(draw: Draw, state: State) -> Frame:
    picture = fewer_colours(png(draw(*state)), PALETTE)
    size = Image.open(io.BytesIO(picture)).size
    return Frame(state, picture, size, hashlib.sha256(picture).hexdigest())


def _axis(values: Any, label: str, unit: str = "") -> Axis:
    """An axis over plain Python values, after refusing those that no slider can move over."""
    axis = Axis(tuple(values.tolist() if hasattr(values, "tolist") else values), label, unit)
    if len(axis.values) < 2:
        raise ValueError(f"{axis.label!r} has {len(axis.values)} value(s), a slider needs two")
    if len(set(axis.values)) != len(axis.values):
        raise ValueError(f"{axis.label!r} has a value twice: {axis.values}")
    names = [isinstance(value, str) for value in axis.values]
    if any(names) and not all(names):
        raise ValueError(f"{axis.label!r} mixes names and numbers: {axis.values}")
    if not any(names) and list(axis.values) != sorted(axis.values):
        raise ValueError(f"{axis.label!r} has values that do not rise: {axis.values}")
    return axis


def _start(axes: list[Axis], default: Any) -> State:
    if default is None:
        return tuple(axis.values[len(axis.values) // 2] for axis in axes)
    start = default if isinstance(default, tuple) else (default,)
    if len(start) != len(axes):
        raise ValueError(f"the default {default!r} has {len(start)} value(s), not {len(axes)}")
    for value, axis in zip(start, axes, strict=True):
        if value not in axis.values:
            raise ValueError(f"the default {value!r} of {axis.label!r} is none of {axis.values}")
    return start


def widget(draw: Draw, axes: list[Axis], alt: Alt, start: State, snap: bool = False) -> Any:
    """Make the live slider: controls, and under them the picture, drawn again for their state."""
    controls = [_control(axis, value, snap) for axis, value in zip(axes, start, strict=True)]
    view = ipywidgets.HTML()

    def redraw(_: Any = None) -> None:
        state = tuple(control.value for control in controls)
        view.value = figure_tag(draw(*state), alt(*state))

    for control in controls:
        control.observe(redraw, names="value")
    redraw()
    return ipywidgets.VBox([*controls, view])


def _control(axis: Axis, start: Value, snap: bool) -> ipywidgets.Widget:
    """The widget that fits the values: names, whole numbers, decades or an interval."""
    look = {
        "description": f"{axis.label} ({axis.unit})" if axis.unit else axis.label,
        "style": {"description_width": "initial"}, "continuous_update": False,
        "layout": ipywidgets.Layout(width="min(40rem, 100%)"),
    }  # fmt: skip
    if snap or isinstance(axis.values[0], str):
        options = [(axis.text(value), value) for value in axis.values]
        return ipywidgets.SelectionSlider(options=options, value=start, **look)
    low, high = axis.values[0], axis.values[-1]
    if all(isinstance(value, Integral) for value in axis.values):
        return ipywidgets.IntSlider(value=start, min=low, max=high, **look)
    kind = ipywidgets.FloatSlider
    if _log_spaced(axis.values):
        low, high, kind = math.log10(low), math.log10(high), ipywidgets.FloatLogSlider
    span = {"min": low, "max": high, "step": (high - low) / 100}
    return kind(value=start, readout_format=".3g", **span, **look)


def _log_spaced(values: Sequence[Value]) -> bool:
    """Whether the steps of the logarithms differ less than those of the values themselves."""

    def unevenness(numbers: Sequence[float]) -> float:
        steps = [later - sooner for sooner, later in itertools.pairwise(numbers)]
        return max(steps) / min(steps)

    few = values[0] <= 0 or len(values) < 3
    return not few and unevenness([*map(math.log, values)]) < unevenness(values)


# Without a kernel: a page that carries its pictures.

_number = itertools.count(1)  # two sliders on a page never share an id
CONTROL = """\
<label for="{id}">{label}:</label> <output for="{id}" aria-live="off">{text}</output>
<input id="{id}" type="range" min="0" max="{last}" step="1" value="{start}" hidden
 aria-valuetext="{text}" style="width:100%;height:2.75rem;margin:0;accent-color:#0072B2">
"""
# A white card in dark mode, too, because the picture is one.
CARD = "margin:0;position:relative;text-align:left;background:#fff;color:#222;color-scheme:light"
UNSEEN = "position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)"

SCRIPT = re.sub(r"^//.*\n", "", Path(__file__).with_name("slider.js").read_text("utf8"), flags=re.M)


def page(draw: Draw, axes: list[Axis], alt: Alt, start: State) -> str:
    """Write the slider of a page without a kernel, as HTML that needs nothing else.

    Without JavaScript, and in print, it is the picture of the first state with its values. Refused
    are alt texts that are empty or the same, and a first state that looks different after all
    others were drawn.
    """
    drawn = frames(draw, *[axis.values for axis in axes])
    alts = [alt(*frame.values) for frame in drawn]
    if not all(text.strip() for text in alts):
        raise ValueError(f"the alt text is empty in one of {len(alts)} states")
    if len(set(alts)) < len(alts):
        raise ValueError(f"{len(alts)} states, but only {len(set(alts))} different alt texts")
    first = next(frame for frame in drawn if frame.values == start)
    if _frame(draw, start).digest != first.digest:
        raise ValueError(f"the picture for {start} is another when it is drawn a second time")
    name = f"dmd-slider-{next(_number)}-{first.digest[:8]}"
    controls = [
        CONTROL.format(
            id=f"{name}-{i}", label=html.escape(axis.label), last=len(axis.values) - 1,
            start=axis.values.index(value), text=html.escape(axis.text(value)),
        )
        for i, (axis, value) in enumerate(zip(axes, start, strict=True))
    ]  # fmt: skip
    texts = [[axis.text(value) for value in axis.values] for axis in axes]
    pictures = [
        {"png": b64encode(frame.picture).decode(), "alt": text, "digest": frame.digest}
        for frame, text in zip(drawn, alts, strict=True)
    ]
    # a "<" could end the script
    stored = json.dumps({"texts": texts, "frames": pictures}).replace("<", "\\u003c")
    return (
        f'<figure id="{name}" class="dmd-slider" data-digest="{first.digest}" '
        f'style="{CARD};max-width:{first.size[0]}px">\n'
        f"{image_tag(first.picture, alt(*start), *first.size)}\n"
        f'{"".join(controls)}<span role="status" style="{UNSEEN}"></span>\n'
        f'<script type="application/json">{stored}</script>\n'
        f"<script>\n{SCRIPT.replace('%s', name)}</script>\n</figure>"
    )

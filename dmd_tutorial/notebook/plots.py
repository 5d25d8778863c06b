"""Figures of the book: one style, one set of colours, and no picture without alt text.

A figure is shown as HTML with the picture inside (``<img src="data:...">``): so its alt text and
its size reach the site, JupyterLab and Colab alike, which an output's metadata does not achieve.
Figures stay white in dark mode, so that their colours keep their meaning.
"""

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import display
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from PIL import Image
from torch import Tensor

from dmd_tutorial.checks import check_finite

DPI = 100  # a CSS pixel is a hundredth of an inch of figure
SHARPNESS = 2  # shown pictures have twice as many pixels, for dense screens
COLOURS_STORED = 128  # of a shown picture; more cannot be told apart on the page
WIDTH, HEIGHT = 640, 360  # CSS pixels; they fit the site's column
CELL = 64  # CSS pixels that one image of a grid gets where there is room for it

# Okabe and Ito (2008): told apart with every common colour blindness.
COLOURS = {
    "blue": "#0072B2", "orange": "#E69F00", "green": "#009E73", "red": "#D55E00",
    "purple": "#CC79A7", "sky": "#56B4E9", "black": "#000000", "yellow": "#F0E442",
}  # fmt: skip
# The same thing has the same colour in every figure.
ROLES = {
    "data": COLOURS["black"], "teacher": COLOURS["blue"], "generator": COLOURS["orange"],
    "critic": COLOURS["green"],
}  # fmt: skip
# Lines differ in more than colour: they can be told apart in grey print, too.
CYCLE = list(COLOURS.values())[:7]  # yellow is too pale for a line on white
DASHES, MARKERS = ["-", "--", "-.", ":"], ["o", "s", "^", "D", "v"]

STYLE: Any = {
    "axes.axisbelow": True, "axes.facecolor": "white", "axes.grid": True,
    "axes.prop_cycle": plt.cycler(color=CYCLE),
    "axes.spines.right": False, "axes.spines.top": False,
    "figure.dpi": DPI, "figure.facecolor": "white",
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture on every machine
    "font.size": 11, "grid.alpha": 0.25, "legend.frameon": False, "lines.linewidth": 2,
    "image.cmap": "gray", "image.interpolation": "nearest",
}  # fmt: skip


class Html(NamedTuple):
    """A piece of HTML to display; where only text can be shown, its text is."""

    source: str
    text: str

    def _repr_html_(self) -> str:
        return self.source

    def __repr__(self) -> str:
        return self.text


class PlainLogFormatter(LogFormatter):
    """Labels of a logarithmic axis as they are said: 0.1, 1, 20."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def style() -> None:
    """Give every figure made from now on the book's look."""
    plt.rcParams.update(STYLE)


def figure(rows: int = 1, columns: int = 1, width: int = WIDTH, height: int = HEIGHT) -> tuple:
    """Make a figure of the given size in CSS pixels; returns what `plt.subplots` returns."""
    style()
    size = width / DPI, height / DPI
    return plt.subplots(rows, columns, layout="constrained", figsize=size, dpi=DPI)


def png(fig: Figure, sharpness: int = 1) -> bytes:
    """Draw a whole figure on solid white, `sharpness` pixels to a CSS pixel, and close it."""
    file = io.BytesIO()
    size: Any = {"dpi": DPI * sharpness, "bbox_inches": fig.bbox_inches}
    fig.savefig(file, format="png", facecolor="white", **size)
    plt.close(fig)
    return file.getvalue()


def fewer_colours(picture: bytes, colours: int) -> bytes:
    """Store a PNG in so many colours: a quarter of the bytes, and no difference to be seen."""
    full = Image.open(io.BytesIO(picture)).convert("RGB")
    file = io.BytesIO()
    # k-means after the median cut: a few orange points among many greys must stay orange
    few = full.quantize(colours, kmeans=3, dither=Image.Dither.NONE)
    few.save(file, format="PNG", optimize=True)
    return file.getvalue()


def image_tag(picture: bytes, alt: str, width: int, height: int) -> str:
    """Write an <img> with a PNG, its alt text (refused if empty) and its size in CSS pixels."""
    if not alt.strip():
        raise ValueError("the alt text is empty: say what is to be seen in the figure")
    # "dark-light" asks the site's theme not to dim the picture in dark mode
    return (
        f'<img class="dark-light" src="data:image/png;base64,{base64.b64encode(picture).decode()}" '
        f'alt="{html.escape(alt)}" width="{width}" height="{height}" '
        'style="display:block;max-width:100%;height:auto;padding:0;background:#fff">'
    )


def figure_tag(fig: Figure, alt: str) -> str:
    """Draw a figure, close it, and write it as a sharp <img>."""
    width, height = (round(inches * DPI) for inches in fig.get_size_inches())
    return image_tag(fewer_colours(png(fig, SHARPNESS), COLOURS_STORED), alt, width, height)


def show(fig: Figure, alt: str) -> None:
    """Display a figure, and close it; `alt` says what is to be seen to those who do not see it."""
    display(Html(figure_tag(fig, alt), alt))


def tile(
    images: Float[Tensor, "n channels height width"], columns: int | None = None
) -> UInt8[np.ndarray, "rows columns 3"]:
    """Lay finite images in [-1, 1], clamped, out row by row with one white pixel between them."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise ValueError(f"images have shape {tuple(images.shape)}, not (n, 1 or 3, height, width)")
    check_finite(images=images)
    count, _, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    levels = ((images.detach().cpu().float().clamp(-1, 1) + 1) * 127.5).round().byte()
    cells = np.full((rows, columns, height + 1, width + 1, 3), 255, np.uint8)
    cells.reshape(-1, *cells.shape[2:])[:count, :-1, :-1] = levels.permute(0, 2, 3, 1).numpy()
    return np.vstack([np.hstack(list(row)) for row in cells])[:-1, :-1]


def image_grid(
    images: Float[Tensor, "n channels height width"], columns: int | None = None, *,
    column_titles: Sequence[str] = (), row_titles: Sequence[str] = (), ax: Axes | None = None,
) -> Any:  # fmt: skip
    """Draw images in [-1, 1] as a grid, about square, on a figure that fits, and return that."""
    picture = tile(images, columns)
    height, width = (side + 1 for side in images.shape[-2:])
    rows, columns = (picture.shape[0] + 1) // height, (picture.shape[1] + 1) // width
    column_titles, row_titles = column_titles or [""] * columns, row_titles or [""] * rows
    if (len(row_titles), len(column_titles)) != (rows, columns):
        titles = f"{len(row_titles)} row and {len(column_titles)} column titles"
        raise ValueError(f"{titles} for {rows} rows and {columns} columns")
    if ax is None:
        left, top = 9 * max(map(len, row_titles)), 28 * any(column_titles)
        cell = min(CELL, (WIDTH - left - 12) / columns)
        fig_height = rows * cell * height / width + top + 12
        fig, ax = figure(width=round(columns * cell + left + 12), height=round(fig_height))
        fig.set_layout_engine("compressed")  # the other would cut titles beside square axes
    ax.imshow(picture, interpolation="nearest")
    ax.set_xticks([(i + 0.5) * width - 1 for i in range(columns)], column_titles)
    ax.set_yticks([(i + 0.5) * height - 1 for i in range(rows)], row_titles)
    ax.tick_params(length=0, labeltop=True, labelbottom=False)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    return ax.figure


def density_and_score(
    ax: Axes, mixture: Any, sigma: float, *, extent: float = 3.0, arrows: int = 15
) -> None:
    """Draw a density on the plane, noised to a level, and over it `arrows` of its score a side."""

    def grid(points: int, end: float) -> tuple[Tensor, Tensor]:
        ticks = torch.linspace(-end, end, points)
        x = torch.cartesian_prod(ticks, ticks)
        return x, torch.full((len(x),), float(sigma))

    spacing = 2 * extent / arrows
    with torch.no_grad():
        density = _numbers(mixture.log_prob(*grid(121, extent)).exp()).reshape(121, 121).T
        middle, levels = grid(arrows, extent - spacing / 2)
        score = mixture.score(middle, levels)
    length = score.norm(dim=1, keepdim=True).clamp(min=1e-12)  # over orders of magnitude
    arrow = _numbers(score / length * torch.tanh(length / length.median()))
    box = [-extent, extent, -extent, extent]
    ax.contourf(density, levels=12, cmap="Blues", extent=box, origin="lower")
    # the longest arrow spans one cell of its grid, in every figure
    scaling: Any = {"angles": "xy", "scale_units": "xy", "scale": 1 / spacing, "pivot": "mid"}
    ax.quiver(*_numbers(middle).T, *arrow.T, color=COLOURS["red"], width=0.004, **scaling)
    ax.set(aspect="equal", xlim=box[:2], ylim=box[2:])


def particles(
    ax: Axes, x: Float[Tensor, "n 2"], *, label: str | None = None, colour: str | None = None
) -> None:
    """Draw points of the plane, small and see-through so that crowds show."""
    ax.plot(*_numbers(x).T, "o", markersize=4, alpha=0.5, markeredgewidth=0, label=label, c=colour)
    ax.set_aspect("equal")


def trajectories(
    ax: Axes, paths: Float[Tensor, "steps n 2"], *, label: str = "", colour: str = COLOURS["blue"]
) -> None:
    """Draw a line for each moving point, with a dot at its start and a ring at its end."""
    points = _numbers(paths)
    ax.plot(points[..., 0], points[..., 1], color=colour, linewidth=1, alpha=0.6)
    ax.plot(*points[0].T, "o", color=colour, markersize=3)
    ax.plot(*points[-1].T, "o", color=colour, markersize=6, fillstyle="none", label=label)
    ax.set_aspect("equal")


def series(
    ax: Axes, x: Any, ys: Mapping[str, Any], *, xlabel: str, ylabel: str, logx: bool = False,
    logy: bool = False, spread: Mapping[str, tuple[Any, Any]] | None = None,
    colours: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Draw named curves, which differ in colour, dashes and marker.

    x serves all of them, or is one for each name. `spread` is (low, high) of a band by name.
    """
    looks = zip(cycle(CYCLE), cycle(DASHES), cycle(MARKERS), strict=True)
    for (name, y), (colour, dash, marker) in zip(ys.items(), looks, strict=False):
        at = _numbers(x[name] if isinstance(x, Mapping) else x)
        colour = (colours or {}).get(name, colour)
        few = marker if len(at) <= 24 else None  # markers on a long curve hide it
        ax.plot(at, _numbers(y), color=colour, linestyle=dash, marker=few, label=name)
        if spread and name in spread:
            low, high = map(_numbers, spread[name])
            ax.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    for axis, log, set_scale in [(ax.xaxis, logx, ax.set_xscale), (ax.yaxis, logy, ax.set_yscale)]:
        if log:
            set_scale("log")
            axis.set_major_formatter(PlainLogFormatter())
            axis.set_minor_formatter(PlainLogFormatter(minor_thresholds=(1, 0.4)))
    if len(ys) > 1:
        ax.legend()


def _numbers(values: Any) -> np.ndarray:
    """Numbers that matplotlib draws, from a tensor on any device or anything like a list."""
    return np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)

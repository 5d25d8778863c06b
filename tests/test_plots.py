"""Figures: sizes, alt text, and the pixels of grids."""

import io
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dmd_tutorial.mixtures import GaussianMixture
from dmd_tutorial.notebook import plots


@pytest.fixture
def shown(monkeypatch):
    """What `show` displays."""
    objects = []
    monkeypatch.setattr(plots, "display", objects.append)
    return objects


def test_shown_figures_carry_alt_text_and_size(shown):
    fig, ax = plots.figure(width=500, height=300)
    ax.plot([0, 1], [0, 1])
    plots.show(fig, 'A line that rises from 0 to 1 & is called "x"')
    html = shown[0]._repr_html_()
    assert 'alt="A line that rises from 0 to 1 &amp; is called &quot;x&quot;"' in html
    assert 'width="500" height="300"' in html
    assert repr(shown[0]) == 'A line that rises from 0 to 1 & is called "x"'


def test_showing_closes_the_figure(shown):
    fig, _ = plots.figure()
    plots.show(fig, "An empty pair of axes")
    assert not plt.fignum_exists(fig.number)


@pytest.mark.parametrize("alt", ["", " \n"])
def test_a_figure_without_alt_text_is_refused(shown, alt):
    fig, _ = plots.figure()
    with pytest.raises(ValueError, match="alt text is empty"):
        plots.show(fig, alt)
    assert not shown


@pytest.mark.parametrize("crop", [None, "tight"])
def test_pictures_are_white_whole_and_sharp(crop):
    fig, _ = plots.figure(width=320, height=200)
    with plt.rc_context({"savefig.bbox": crop}):  # what a notebook's own backend may set
        picture = Image.open(io.BytesIO(plots.png(fig, sharpness=2)))
    assert picture.size == (640, 400)
    assert picture.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)


def test_the_same_drawing_gives_the_same_bytes():
    def drawing():
        fig, ax = plots.figure()
        plots.particles(ax, torch.arange(10.0).reshape(5, 2))
        return plots.png(fig)

    assert drawing() == drawing()


def contrast(colour: str) -> float:
    """Contrast ratio against white (WCAG 2.2, 1.4.3)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 1.05 / (0.05 + 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])


def test_lines_are_seen_on_white_and_yellow_would_not_be():
    assert min(contrast(colour) for colour in plots.CYCLE) > 2
    assert contrast(plots.COLOURS["yellow"]) < 2


@pytest.mark.parametrize(
    ("columns", "title"), [(8, "T(z), an 8"), (6, "G (average)"), (8, "W" * 12)]
)
def test_no_title_of_a_row_is_cut_off(columns, title):
    images = torch.zeros(4 * columns, 1, 8, 8)
    fig = plots.image_grid(images, columns, row_titles=["z", "z", "z", title])
    picture = np.asarray(Image.open(io.BytesIO(plots.png(fig, sharpness=2))).convert("L"))
    assert picture[:, 0].min() == 255


def test_tile_places_every_image():
    images = torch.tensor([-1.0, 0.0, 1.0]).reshape(3, 1, 1, 1).expand(3, 1, 2, 2)
    canvas = plots.tile(images, columns=2)
    assert canvas.shape == (5, 5, 3)
    assert (canvas[:2, :2] == 0).all()
    assert (canvas[:2, 3:] == 128).all()
    assert (canvas[3:, :2] == 255).all()
    assert (canvas[2] == 255).all()
    assert (canvas[:, 2] == 255).all()


def test_tile_keeps_colours_and_clamps():
    red = torch.tensor([3.0, -1.0, -2.0]).reshape(1, 3, 1, 1)
    assert plots.tile(red).tolist() == [[[255, 0, 0]]]


@given(count=st.integers(1, 30), columns=st.integers(1, 12), side=st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_tile_shows_each_image_once_and_in_order(count, columns, side):
    level = torch.linspace(-1, 0.9, count)
    canvas = plots.tile(level.reshape(-1, 1, 1, 1).expand(-1, 1, side, side), columns)
    corners = canvas[:: side + 1, :: side + 1, 0].flatten()
    assert np.array_equal(corners[:count], ((level + 1) * 127.5).round().byte().numpy())
    assert (corners[count:] == 255).all()


@pytest.mark.parametrize("shape", [(8, 8), (2, 2, 8, 8), (0, 1, 8, 8)])
def test_tile_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=re.escape(str(shape))):
        plots.tile(torch.zeros(shape))


def test_tile_refuses_nan():
    with pytest.raises(ValueError, match="images is not finite: 1 of 4"):
        plots.tile(torch.tensor([0, 0, float("nan"), 0]).reshape(1, 1, 2, 2))


def test_image_grid_draws_titles_and_fits_the_page():
    fig = plots.image_grid(
        torch.zeros(30, 1, 8, 8), 15, column_titles=list("abcdefghijklmno"), row_titles=["G", "D"]
    )
    (ax,) = fig.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["G", "D"]
    assert fig.get_size_inches()[0] * plots.DPI <= plots.WIDTH
    plt.close(fig)


def test_image_grid_refuses_titles_that_do_not_fit():
    with pytest.raises(ValueError, match="3 row and 2 column titles for 2 rows and 2 columns"):
        plots.image_grid(torch.zeros(4, 1, 2, 2), 2, row_titles=["a", "b", "c"])


def test_arrows_point_along_the_score_and_fit_their_cells():
    mixture = GaussianMixture.isotropic([[-1.0, 0.0], [1.0, 0.5]], 0.3)
    fig, ax = plots.figure()
    plots.density_and_score(ax, mixture, 0.5, extent=2, arrows=6)
    (arrows,) = [artist for artist in ax.collections if hasattr(artist, "U")]
    at = torch.as_tensor(arrows.XY, dtype=torch.float64)
    score = mixture.score(at, torch.full((36,), 0.5, dtype=torch.float64)).numpy()
    drawn = np.stack([arrows.U, arrows.V], axis=1)
    length = np.linalg.norm(drawn, axis=1)
    cosine = (drawn * score).sum(1) / length / np.linalg.norm(score, axis=1)
    assert cosine.min() > 1 - 1e-6
    assert length.max() <= 1
    assert np.array_equal(np.argsort(length), np.argsort(np.linalg.norm(score, axis=1)))
    plt.close(fig)


def test_the_density_is_drawn_where_it_is():
    mixture = GaussianMixture.isotropic([[2.0, -1.0]], 0.3)
    fig, ax = plots.figure(width=400, height=400)
    plots.density_and_score(ax, mixture, 0.0, arrows=2)
    fig.canvas.draw()
    height = fig.bbox.height
    pixels = np.asarray(fig.canvas.buffer_rgba())
    column, row = ax.transData.transform([2.0, -1.0]).astype(int)
    opposite_column, opposite_row = ax.transData.transform([-1.0, 2.0]).astype(int)
    at_peak = pixels[int(height) - row, column, 0]
    away = pixels[int(height) - opposite_row, opposite_column, 0]
    assert at_peak < 30 < 200 < away
    plt.close(fig)


def test_trajectories_end_in_rings():
    fig, ax = plots.figure()
    paths = torch.stack([torch.zeros(3, 2), torch.ones(3, 2), 2 * torch.ones(3, 2)])
    plots.trajectories(ax, paths, label="Heun")
    *lines, start, end = ax.lines
    assert len(lines) == 3
    assert (start.get_xdata() == 0).all()
    assert (end.get_xdata() == 2).all()
    assert end.get_fillstyle() == "none"
    plt.close(fig)


def test_series_differ_in_more_than_colour():
    fig, ax = plots.figure()
    names = ["a", "b", "c", "d", "e", "f", "g"]
    plots.series(ax, [1, 2], {name: torch.ones(2) for name in names}, xlabel="x", ylabel="y")
    looks = {(line.get_linestyle(), line.get_marker()) for line in ax.lines}
    assert len(looks) == len(names)
    plt.close(fig)


def test_series_draws_bands_and_plain_logarithmic_labels():
    fig, ax = plots.figure()
    y = torch.tensor([1.0, 0.1, 0.01], requires_grad=True)
    plots.series(
        ax,
        {"Euler": [1, 10, 100]},
        {"Euler": y},
        xlabel="steps",
        ylabel="error",
        logx=True,
        logy=True,
        spread={"Euler": (y / 2, y * 2)},
    )
    fig.canvas.draw()
    labels = [label.get_text() for label in ax.get_xticklabels() if label.get_text()]
    assert {"1", "10", "100"} <= set(labels)
    assert len(ax.collections) == 1
    assert ax.get_legend() is None
    plt.close(fig)

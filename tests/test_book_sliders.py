"""Of every slider of the book: state k of the page is what the package's function gives at value k.

The chain has two halves. Here: the cells that a slider needs are run again, without a browser and
without the rest of their notebook, and its function, called at value k, draws to the byte the
picture that the built page stores for state k. In test_site.py: the browser shows, says and reads
out for state k what is stored for it. Both ask for all states.

Built and run with another number of threads (OMP_NUM_THREADS), a trained network may differ in its
last digits, and so may its picture: `make book` and `make test` on two cores agree.
"""

import itertools
import json
import os
import re
from pathlib import Path

import book_source
import cells
import matplotlib
import pytest

from dmd_tutorial.notebook import sliders

SITE = Path(os.environ.get("DMD_TUTORIAL_SITE", Path(__file__).parents[1] / "_build" / "html"))
STORED = re.compile(r'<script type="application/json">({"texts".*?)</script>')


@pytest.mark.slow
@pytest.mark.parametrize("path", book_source.chapters(), ids=lambda path: path.stem)
def test_each_state_is_what_the_notebook_draws_for_its_value(monkeypatch, path):
    """The cells that a slider needs, run here again, and its function called at every value."""
    page = SITE / "book" / f"{path.stem}.html"
    if not page.exists():
        pytest.skip(f"{page} is not built: run `make book`")
    drawn = redrawn(monkeypatch, book_source.read_notebook(path))
    stored = [json.loads(data) for data in STORED.findall(page.read_text("utf8"))]
    assert len(drawn) == len(stored) > 0
    for (frames, alts, texts), data in zip(drawn, stored, strict=True):
        assert data["texts"] == texts
        assert [frame["alt"] for frame in data["frames"]] == alts
        assert [frame["digest"] for frame in data["frames"]] == [each.digest for each in frames]


def redrawn(monkeypatch, notebook):
    """Each slider of a notebook: a frame for each state, its alt texts, the texts of its axes."""
    sources = [book_source.source(cell) for cell in notebook["cells"]]
    code = [cell.place for cell in cells.cells(notebook)]
    places = [place for place in code if re.search(r"^slider\(", sources[place], re.MULTILINE)]
    asked = []

    def page(draw, axes, alt, start):
        asked.append((draw, [axis.values for axis in axes], axes, alt))
        return ""

    monkeypatch.setenv(sliders.STATIC, "1")
    monkeypatch.setattr(sliders, "page", page)
    matplotlib.use("agg")
    names = {"__name__": "notebook"}
    wanted = set().union(*(cells.needed(notebook, place) for place in places))
    for place in sorted(wanted):
        exec(compile(cells.python(sources[place]), f"cell {place}", "exec"), names)
    assert len(asked) == len(places)
    return [
        (
            sliders.frames(draw, *values),
            [alt(*state) for state in itertools.product(*values)],
            [[axis.text(value) for value in axis.values] for axis in axes],
        )
        for draw, values, axes, alt in asked
    ]

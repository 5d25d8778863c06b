"""What all tests share."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

MARKS = ("browser", "slow")  # of files that take minutes, the longest first
sys.path.insert(0, str(Path(__file__).parents[1] / "book" / "tools"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Let each test draw the same numbers wherever and whenever it runs, the smallest included."""
    torch.manual_seed(0)
    torch.set_flush_denormal(False)  # the command line sets it, for its whole process


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a reader run the tests of one equation or of one chapter's equations."""
    parser.addoption(
        "--equation",
        metavar="TAG",
        help="run only the tests of the equation TAG, such as 3.2; 3 means all of chapter 3",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest files first: no process is left alone with one. Only what --equation asks for."""
    marked = {
        mark: {item.path for item in items if item.get_closest_marker(mark)} for mark in MARKS
    }
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (*(item.path not in marked[m] for m in MARKS), -tests[item.path]))
    wanted = config.getoption("--equation")
    if wanted is None:
        return
    kept = [item for item in items if any(wanted in names(tag) for tag in equation_tags(item))]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def equation_tags(item: pytest.Item) -> list[str]:
    """Return the numbers of the equations that a test is marked with."""
    return [mark.args[0] for mark in item.iter_markers("equation")]


def names(tag: str) -> tuple[str, str]:
    """Return what a reader may call an equation by: its number, or its chapter's."""
    return tag, tag.partition(".")[0]

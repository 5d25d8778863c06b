"""Code of the package that a chapter shows."""

import inspect

import pytest

from dmd_tutorial import dmd
from dmd_tutorial.notebook import show_code, source, table
from dmd_tutorial.training import FitRun


@pytest.fixture
def shown(monkeypatch):
    objects = []
    monkeypatch.setattr(source, "display", objects.append)
    return objects


def test_code_is_shown_whole_as_python(shown):
    show_code(dmd.matching_gradient, dmd.matching_loss)
    (markdown,) = shown
    first, second = map(inspect.getsource, (dmd.matching_gradient, dmd.matching_loss))
    assert markdown.data == f"```python\n{first}\n\n{second}```"
    assert "def matching_gradient(\n" in first
    assert '    """What Eq. 7 multiplies' in first
    assert "    return " in first


def test_a_method_is_shown_at_the_left_and_a_class_with_its_decorator(shown):
    show_code(FitRun.state_dict)
    show_code(dmd.Objective)
    method, structure = (markdown.data.splitlines() for markdown in shown)
    assert method[1].startswith("def state_dict(")
    assert structure[1:3] == ["@dataclass(frozen=True)", "class Objective:"]


def test_a_table_has_a_header_a_rule_and_a_line_for_each_row(shown):
    table(["steps", "distance"], [[1, "**0.5**"], (2, 0.25)])
    (markdown,) = shown
    lines = markdown.data.split("\n")
    assert lines[:2] == ["| steps | distance |", "| --- | --- |"]
    assert lines[2:] == ["| 1 | **0.5** |", "| 2 | 0.25 |"]

"""Recorded results are found beside the notebook or in the repository."""

import io
import json
from urllib.error import URLError

import pytest

from dmd_tutorial.notebook import results


def test_a_file_beside_the_notebook_is_read(tmp_path):
    (tmp_path / "x.json").write_text('{"a": 1}')
    assert results.recorded("x", tmp_path) == {"a": 1}


def test_without_a_clone_the_repository_is_asked(tmp_path, monkeypatch):
    asked = []

    def urlopen(address, timeout):
        asked.append(address)
        return io.BytesIO(b'{"a": 2}')

    monkeypatch.setattr(results, "urlopen", urlopen)
    assert results.recorded("x", tmp_path) == {"a": 2}
    (address,) = asked
    assert address.startswith("https://raw.githubusercontent.com/")
    assert address.endswith("/main/book/results/x.json")


def test_nowhere_is_one_clear_error(tmp_path, monkeypatch):
    def urlopen(address, timeout):
        raise URLError("no network")

    monkeypatch.setattr(results, "urlopen", urlopen)
    with pytest.raises(FileNotFoundError, match=r"x\.json is not there, and https://.*no network"):
        results.recorded("x", tmp_path)


def test_the_books_results_are_json_with_provenance():
    from pathlib import Path

    files = sorted((Path(__file__).parents[1] / "book" / "results").glob("*.json"))
    assert files
    for path in files:
        content = json.loads(path.read_text())
        # provenance stands at the top, or in every row where rows were measured at various times
        at_the_top = {"device", "versions"} <= set(content)
        for row in [] if at_the_top else content.get("rows", []):
            assert {"device", "versions"} <= set(row), path.name

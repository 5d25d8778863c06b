"""Recorded results: what long runs measured, as JSON with its provenance."""

import json
from importlib.metadata import metadata
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen


def recorded(name: str, folder: str | Path = "results") -> dict:
    """Read ``book/results/<name>.json``, seen from the notebook."""
    path = Path(folder) / f"{name}.json"
    if path.exists():
        return json.loads(path.read_text())
    # the notebook was opened alone, in Colab say: the file is in the book's repository
    entries = metadata("dmd-tutorial").get_all("Project-URL") or []
    repository = dict(entry.split(", ", 1) for entry in entries)["Repository"]
    raw = repository.replace("//github.com", "//raw.githubusercontent.com")
    address = f"{raw}/main/book/results/{name}.json"
    try:
        with urlopen(address, timeout=20) as answer:
            return json.load(answer)
    except URLError as error:
        raise FileNotFoundError(f"{path} is not there, and {address} gave: {error}") from error

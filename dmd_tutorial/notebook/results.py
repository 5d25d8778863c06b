"""Recorded results: what long runs measured, as JSON with its provenance."""

import json
from importlib.metadata import metadata
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen


def recorded(name: str, folder: str | Path = "results") -> dict:
    """Read a recorded result of the book, ``book/results/<name>.json``, seen from the notebook.

    Where that folder is missing (a notebook that was opened alone, in Colab say) the file comes
    from the book's repository; FileNotFoundError if it is not to be had there either.
    """
    path = Path(folder) / f"{name}.json"
    if path.exists():
        return json.loads(path.read_text())
    address = f"{_raw_address()}/book/results/{name}.json"
    try:
        with urlopen(address, timeout=20) as answer:
            return json.load(answer)
    except URLError as error:
        raise FileNotFoundError(f"{path} is not there, and {address} gave: {error}") from error


def _raw_address() -> str:
    """Where the repository's files can be read, from the one place that holds its address."""
    entries = metadata("dmd-tutorial").get_all("Project-URL") or []
    addresses = dict(entry.split(", ", 1) for entry in entries)
    return addresses["Repository"].replace("//github.com", "//raw.githubusercontent.com") + "/main"

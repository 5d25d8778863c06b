"""Fail if a picture of the built site says nothing to a reader who does not see it.

python book/tools/alt_text.py _build/html
"""

import sys
from html.parser import HTMLParser
from pathlib import Path


class Pictures(HTMLParser):
    """Collects the <img> elements of a page that have no alternative text."""

    def __init__(self) -> None:
        super().__init__()
        self.silent: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "img" and not (values.get("alt") or "").strip():
            address = (values.get("src") or "")[:60]
            self.silent.append(f"line {self.getpos()[0]}: {address}")


def silent_pictures(site: Path) -> list[str]:
    """Return one line for every picture under `site` without an alternative text."""
    lines = []
    for path in sorted(site.rglob("*.html")):
        pictures = Pictures()
        pictures.feed(path.read_text(encoding="utf8"))
        lines += [f"{path.relative_to(site)}, {picture}" for picture in pictures.silent]
    return lines


def main() -> int:
    """Run the command line; return 1 if there is a silent picture."""
    lines = silent_pictures(Path(sys.argv[1]))
    for line in lines:
        print(f"picture without alternative text: {line}")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())

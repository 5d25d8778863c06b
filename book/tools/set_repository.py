"""Carry the repository's address from pyproject.toml to every badge, link and first cell.

python book/tools/set_repository.py https://github.com/me/my-fork   # set, then carry
python book/tools/set_repository.py                                 # carry
python book/tools/set_repository.py --check                         # name what disagrees
"""

import argparse
import re
import sys
from pathlib import Path

import book_source
from book_source import ROOT

# What stands in front of "owner/name" wherever the address is meant to be ours. Links to other
# people's repositories have none of these around them and stay as they are.
OWNER_AND_NAME = r"[\w.-]+/[\w.-]+?"
PLACES = [
    re.compile(rf"(colab\.research\.google\.com/github/)({OWNER_AND_NAME})(?=/blob/)"),
    re.compile(rf"(git\+https://github\.com/)({OWNER_AND_NAME})(?=[\"'@\s\\])"),
    re.compile(rf"(git clone https://github\.com/)({OWNER_AND_NAME})(?=\s)"),
    re.compile(rf"(https://github\.com/)({OWNER_AND_NAME})(?=/(?:actions|issues|discussions)\b)"),
    re.compile(rf"((?:repository-code|url): https://github\.com/)({OWNER_AND_NAME})(?=\s)"),
]
PAGES = re.compile(r"https://([\w-]+)\.github\.io/([\w.-]+?)(?=[/\s)>\"])")
IN_PYPROJECT = re.compile(r'(?<=Repository = ")[^"]+')
ADDRESS = re.compile(r"https://github\.com/([\w.-]+)/([\w.-]+)")


def files() -> list[Path]:
    """Return the files in which the address may stand."""
    tops = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CITATION.cff", "_config.yml")]
    pages = book_source.pages() + book_source.notebooks()
    return [path for path in tops + pages if path.exists()]


def carried(text: str, address: str) -> str:
    """Return a file's text with every one of our addresses replaced by `address`.

    Raises:
        ValueError: the address is not of the form https://github.com/owner/name.
    """
    match = ADDRESS.fullmatch(address)
    if match is None:
        raise ValueError(f"not of the form https://github.com/owner/name: {address!r}")
    owner, name = match.groups()
    for place in PLACES:
        text = place.sub(rf"\g<1>{owner}/{name}", text)
    return PAGES.sub(book_source.site(address), text)


def disagreeing(address: str) -> list[Path]:
    """Return the files that carry another address."""
    texts = {path: path.read_text("utf8") for path in files()}
    return [path for path, text in texts.items() if text != carried(text, address)]


def main() -> int:
    """Run the command line; return 1 if --check found something."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address", nargs="?", help="the new https://github.com/owner/name")
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    if arguments.address and not arguments.check:
        carried("", arguments.address)  # refuse a malformed address before anything is written
        pyproject = ROOT / "pyproject.toml"
        text = pyproject.read_text("utf8")
        pyproject.write_text(IN_PYPROJECT.sub(arguments.address, text), "utf8")
    address = arguments.address or book_source.repository()
    paths = disagreeing(address)
    for path in paths:
        print(f"{path.relative_to(ROOT)}: {'other address' if arguments.check else 'rewritten'}")
        if not arguments.check:
            path.write_text(carried(path.read_text("utf8"), address), "utf8")
    if paths and not arguments.check:
        print("cell ids depend on the text: now run `make format`")
    return 1 if paths and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())

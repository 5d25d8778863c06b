"""Make the pages of the built site light: text first, nothing that no page shows, no jumps.

The theme loads two fonts and a script with two thousand icons, 0.8 MB compressed, for a dozen
icons. Here those dozen become a small style sheet, drawn from the theme's own script. The search
and its index stay on the search page; where Sphinx finds them on another, it does not mark there
what was searched. Scripts move behind the text, so that a reader on a slow line reads while they
load. Pictures and formulas have their room before they are there.

python book/tools/lighten.py _build/html
"""

import html
import re
import sys
from functools import cache
from pathlib import Path
from urllib.parse import quote
from xml.etree import ElementTree

from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import MathTextParser
from PIL import Image

SCRIPT = Path("_static/scripts/fontawesome.js")
SHEET = Path("_static/icons.css")
TAG = re.compile(r'<script defer src="([^"]*)_static/scripts/fontawesome\.js[^"]*"></script>')
SEARCH = re.compile(
    r'\s*<script src="[^"]*\b(?:searchtools|language_data|searchindex)\.js[^"]*"></script>'
)
ICON = re.compile(
    r'<(?:i|span) class="([^"]*\b(?:fa-solid|fa-brands|fa-regular|fas|fab|far)\b[^"]*)"'
)
STYLES = {"fab": 0, "fa-brands": 0, "far": 0, "fa-regular": 0, "fas": -1, "fa-solid": -1}
SIZES = {"fa-lg", "fa-fw", "fa-sm", "fa-xs"}

PICTURE_TAG = re.compile(r'<img(?P<rest>[^>]* src="(?P<address>[^":?#]+)"[^>]*>)')
HEAD = re.compile(r"(?<=<head>).*?(?=</head>)", flags=re.DOTALL)
# Everything from Sphinx's first script to its last: the theme's own first lines, which choose the
# colours, must stay before the text, or the page would flash.
LATE = re.compile(r"\s*<script(?![^>]*\bdefer\b)(?![^>]*data-cfasync)[^>]*>.*?</script>", re.DOTALL)

FORMULA = re.compile(
    r'(?P<tag><span class="math notranslate nohighlight")>\\\((?P<tex>.*?)\\\)</span>'
)
# What matplotlib's reader of formulas does not know, in words that it does.
READABLE = [
    (re.compile(r"\\(mathcal|mathbb) (\w)"), r"\\\1{\2}"),
    (re.compile(r"\\[lr]vert(?![a-z])"), "|"),
    (re.compile(r"\{\\(min|max)\}"), r"{\\mathrm{\1}}"),
]
SCALE = 1.254  # of MathJax's formulas to the text around them, measured in the book's pages

# A box in the icons' font would fetch the font, even if nothing is written in it.
NO_FONT = """\
html :is(.fas, .fa-solid, .fab, .fa-brands, .far, .fa-regular),
html :is(.fas, .fa-solid, .fab, .fa-brands, .far, .fa-regular)::before {
  font-family: inherit;
}
"""
RULE = """\
.{style}.{name}::before {{
  content: "";
  display: inline-block;
  width: {width:.3g}em;
  height: 1em;
  background: currentcolor;
  mask: url("data:image/svg+xml,{picture}") center / contain no-repeat;
  vertical-align: -0.125em;
}}
"""
PICTURE = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}"><path d="{}"/></svg>'


def icons_used(pages: list[str]) -> set[tuple[str, str]]:
    """Return the style and the name of every icon on the pages, such as fas and fa-download."""
    used = set()
    for page in pages:
        for classes in ICON.findall(page):
            words = classes.split()
            (style,) = [word for word in words if word in STYLES]
            names = [w for w in words if w.startswith("fa-") and w not in {*STYLES, *SIZES}]
            used |= {(style, name) for name in names}
    return used


def rule(style: str, name: str, script: str) -> str:
    """Return the style rule that draws an icon.

    Args:
        style: The class of its family: outline and brand icons come first in the script.
        name: Its class, such as fa-download.
        script: The theme's script, which holds the outlines.

    Returns:
        The rule.

    Raises:
        ValueError: The script has no such icon.
    """
    bare = re.escape(name.removeprefix("fa-"))
    outlines = re.findall(
        rf'[,{{]"?{bare}"?:\[(\d+),(\d+),\[[^\]]*\],"[0-9a-f]+","([^"]+)"\]', script
    )
    if not outlines:
        raise ValueError(f"the theme's script has no icon {name!r}")
    width, height, path = outlines[STYLES[style]]
    picture = quote(PICTURE.format(width, height, path), safe=" =/:")
    return RULE.format(style=style, name=name, width=int(width) / int(height), picture=picture)


SIZED = (".png", ".jpg", ".webp", ".svg")


def size(path: Path) -> tuple[str | int | None, str | int | None]:
    """Return the width and height of a picture in pixels."""
    if path.suffix == ".svg":
        drawing = ElementTree.parse(path).getroot()
        return drawing.get("width"), drawing.get("height")
    with Image.open(path) as picture:
        return picture.size


def sized(page: str, folder: Path) -> str:
    """Return a page whose pictures have their room before they arrive, so that no text jumps.

    Args:
        page: The page.
        folder: Where it lies; pictures are found from there.
    """

    def with_size(tag: re.Match[str]) -> str:
        path = folder / tag["address"]
        theme_s = "_static/images/" in tag["address"]  # its style sheet gives their size
        if theme_s or "width=" in tag[0] or path.suffix not in SIZED:
            return tag[0]
        width, height = size(path)
        return f'<img width="{width}" height="{height}"{tag["rest"]}'

    return PICTURE_TAG.sub(with_size, page)


def roomy(page: str) -> str:
    """Return a page that holds room for the formulas in its lines before these are set.

    Else a line would be as long as the source of its formulas, and a column of a table as wide,
    and all would jump when MathJax sets them.
    """

    def with_room(formula: re.Match[str]) -> str:
        room = width(html.unescape(formula["tex"]))
        style = f' style="--room: {room:.2f}em"' if room else ""
        return rf"{formula['tag']}{style}>\({formula['tex']}\)</span>"

    return FORMULA.sub(with_room, page)


@cache
def width(tex: str) -> float | None:
    """Return how wide a formula will be, in em, or None if matplotlib cannot read it.

    Both matplotlib and MathJax set formulas in Knuth's letters, by Knuth's rules.
    """
    for known_to_mathjax, known_to_matplotlib in READABLE:
        tex = known_to_mathjax.sub(known_to_matplotlib, tex)
    letters = FontProperties(size=100, math_fontfamily="cm")
    try:
        return SCALE * float(MathTextParser("path").parse(f"${tex}$", 72, letters).width) / 100
    except ValueError:
        return None


def light(page: str) -> str:
    """Return a page that asks for the small sheet, and for scripts behind its text."""
    if 'id="search-results"' not in page:
        page = SEARCH.sub("", page)
    page = TAG.sub(rf'<link rel="stylesheet" href="\1{SHEET.as_posix()}" />', page)
    head = HEAD.search(page)
    if head is None:
        return page  # the door of the site, which only leads on
    late = "".join(LATE.findall(head[0]))
    page = page.replace(head[0], LATE.sub("", head[0]), 1)
    return page.replace("</body>", f"{late}\n</body>") if late else page


def lighten(site: Path) -> None:
    """Rewrite every page of a built site; doing so twice changes nothing more."""
    paths = sorted(site.rglob("*.html"))
    pages = {path: path.read_text(encoding="utf8") for path in paths}
    script = (site / SCRIPT).read_text(encoding="utf8")
    used = sorted(icons_used(list(pages.values())))
    rules = [NO_FONT, *(rule(*icon, script) for icon in used)]
    (site / SHEET).write_text("".join(rules), encoding="utf8")
    for path, page in pages.items():
        path.write_text(light(roomy(sized(page, path.parent))), encoding="utf8")


if __name__ == "__main__":
    lighten(Path(sys.argv[1]))

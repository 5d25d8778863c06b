"""The book's own Sphinx extension: what the site needs that no published extension gives.

- The build stops when the ledger of equations and tests does not balance, or when a picture has
  no alternative text.
- Outputs come from a cache that is keyed on the package's sources, not on the notebook alone.
- Pages load what they show and no more.
- Words of the glossary show their definition where a chapter first uses them.
- Equations are typeset by a MathJax that lies in the site, with the numbers the text gives them.
"""

import hashlib
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import alt_text
import hover
import ledger
import lighten
from book_source import ROOT
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.errors import SphinxError
from sphinx.transforms import SphinxTransform

CACHES = ROOT / "_build" / "cache"
CACHES_KEPT = 3
# Scripts of MathJax that a page may ask for; the rest of the 20 MB are other bundles of the same.
MATHJAX = [
    "tex-chtml.js",
    "output/chtml/fonts/woff-v2",
    "input/tex/extensions",
    "a11y",
    "sre/mathmaps/base.json",
    "sre/mathmaps/en.json",
    "sre/mathmaps/nemeth.json",
]


class BookError(SphinxError):
    """The book broke one of its own rules."""

    category = "The book"


def sources_digest() -> str:
    """Return a digest of all that a notebook's output depends on besides the notebook."""
    patterns = ["dmd_tutorial/**/*", "book/results/**/*", "constraints.txt"]
    files = sorted(
        path
        for pattern in patterns
        for path in ROOT.glob(pattern)
        if path.is_file() and "__pycache__" not in path.parts
    )
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """Return where outputs made with the present sources are kept."""
    return CACHES / sources_digest()


def drop_old_caches() -> None:
    """Remove all but the caches that were used last."""
    folders = sorted(CACHES.iterdir(), key=lambda folder: folder.stat().st_mtime, reverse=True)
    for folder in folders[CACHES_KEPT:]:
        shutil.rmtree(folder)


def use_cache(app: Sphinx, config: Config) -> None:
    """Point myst-nb to the cache of the present sources."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    folder.touch()
    drop_old_caches()
    config.nb_execution_cache_path = str(folder)


def check_ledger(app: Sphinx) -> None:
    """Stop before anything is executed if an equation lacks a test or a test its equation."""
    if sentences := ledger.problems(ledger.equations(), ledger.equation_tests()):
        raise BookError("equations and tests do not agree:\n  " + "\n  ".join(sentences))


def check_pictures(app: Sphinx, exception: Exception | None) -> None:
    """Stop if a picture of the built site has no alternative text."""
    if exception is None and (lines := alt_text.silent_pictures(Path(app.outdir))):
        raise BookError("pictures without alternative text:\n  " + "\n  ".join(lines))


class KeepTags(SphinxTransform):
    r"""Hands displays that bring their own `\tag` to MathJax as they are.

    Sphinx would wrap a display of several lines in an environment of its own, in which a tag is
    an error.
    """

    default_priority = 900

    def apply(self, **kwargs: Any) -> None:
        """Mark the displays of one document."""
        for node in self.document.findall(nodes.math_block):
            text = node.astext()
            if r"\tag" in text and not node["nowrap"]:
                node["nowrap"] = True
                node.children = [nodes.Text(rf"\[{text.strip()}\]")]


def copy_mathjax(app: Sphinx, exception: Exception | None) -> None:
    """Copy the needed part of MathJax out of the package that brings it through pip."""
    if exception is not None or app.builder.format != "html":
        return
    package = metadata.distribution("sphinx-mathjax-offline")
    origin = Path(str(package.locate_file("sphinx-mathjax-offline/static/mathjax")))
    target = Path(app.outdir) / "_static" / "mathjax"
    for name in MATHJAX:
        path = origin / name
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, target / name, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, target / name)


def lighten_pages(app: Sphinx, exception: Exception | None) -> None:
    """Spare readers what the theme loads and no page shows."""
    if exception is None and app.builder.format == "html":
        lighten.lighten(Path(app.outdir))


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect the parts; called by Sphinx."""
    app.connect("config-inited", use_cache, priority=100)
    app.connect("builder-inited", check_ledger)
    app.connect("build-finished", copy_mathjax)
    app.connect("build-finished", lighten_pages)
    app.connect("build-finished", check_pictures)
    app.add_js_file("book.js", priority=900, defer="defer")  # after MathJax, and the search's own
    app.add_transform(KeepTags)
    app.add_transform(hover.Definitions)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}

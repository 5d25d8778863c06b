"""Words of the glossary show their definition where a chapter first uses them.

A link to the glossary carries the definition as its title: the pointer shows it, a screen reader
reads it, and the style sheet shows it at the foot of the window while the link has the keyboard's
focus. One link for each word and page, in running text only.
"""

import re
from functools import cache
from typing import Any, NamedTuple

import book_source
from docutils import nodes
from sphinx.transforms import SphinxTransform

GLOSSARY = book_source.BOOK / "glossary.md"
PAGE = "book/glossary"
CHAPTER = re.compile(r"book/\d+-")
ENTRY = re.compile(r"^\*\*(?P<names>[^*]+)\*\*: (?P<text>.+?)(?=\n\n|\Z)", re.DOTALL | re.MULTILINE)
MARKS = re.compile(r"\[([^\]]*)\]\([^)]*\)|[*`]")
FIRST_SENTENCE = re.compile(r".+?\.(?=\s+[A-Z]|$)")  # no end after "et al."
# What is no running text: names of other things, links, and what code printed.
NOT_PROSE = (nodes.reference, nodes.title, nodes.caption, nodes.container, nodes.table)
AMBIGUOUS = {"Eta", "Pairs", "Weighting"}  # these also mean other things, or a letter
TOO_EARLY = {"objectives"}  # a list of what comes, read before anything is explained


class Word(NamedTuple):
    """An entry of the glossary."""

    anchor: str
    names: tuple[str, ...]
    definition: str  # its first sentence, as plain text


def words(markdown: str) -> list[Word]:
    """Return the entries of a glossary.

    Args:
        markdown: Its text. An entry is a paragraph `**Name, other name (short)**: Definition.`

    Returns:
        The entries, each with all its names.
    """
    found = []
    for entry in ENTRY.finditer(markdown):
        names = tuple(name for name in re.split(r", | \(|\)", entry["names"]) if name)
        text = " ".join(MARKS.sub(r"\1", entry["text"]).split())
        sentence = FIRST_SENTENCE.match(text)
        definition = sentence[0] if sentence else text
        found.append(Word(anchor(names[0]), names, definition[0].upper() + definition[1:]))
    return found


def anchor(name: str) -> str:
    """Return the address of an entry within the page of the glossary."""
    return "term-" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@cache
def glossary() -> dict[str, Word]:
    """Return the book's own glossary: every name, and what it means."""
    return by_name(words(GLOSSARY.read_text(encoding="utf8")))


def by_name(entries: list[Word]) -> dict[str, Word]:
    """Return the words under each of their names."""
    return {name: word for word in entries for name in word.names}


def pattern(names: list[str]) -> re.Pattern[str]:
    """Return what finds a name in a text: alone or in the plural, of two names the longer.

    Args:
        names: As the glossary has them. In a sentence a first letter may be small, that of an
            abbreviation (a capital follows it) may not.
    """

    def spelt(name: str) -> str:
        first, rest = name[0], re.escape(name[1:]).replace(r"\ ", r"\s+")
        return (first if name[1].isupper() else f"[{first.upper()}{first.lower()}]") + rest

    either = "|".join(spelt(name) for name in sorted(names, key=len, reverse=True))
    return re.compile(rf"(?<![\w-])({either})(?:s|es)?(?![\w-])")


def linked(text: str, names: dict[str, Word], seen: set[str]) -> list[nodes.Node]:
    """Return a text with a link at the first mention of each word.

    Args:
        text: Running text.
        names: Every name, as the glossary has it, and its word.
        seen: Anchors of the words that the page has linked already; this text's are added.

    Returns:
        Texts and links, which say together what `text` says; nothing if there is no link in it.
    """
    anchors = {name.lower(): word for name, word in names.items()}
    parts: list[nodes.Node] = []
    end = 0
    for match in pattern(sorted(names.keys() - AMBIGUOUS)).finditer(text):
        word = anchors[" ".join(match[1].lower().split())]
        if word.anchor in seen:
            continue
        seen.add(word.anchor)
        parts.append(nodes.Text(text[end : match.start()]))
        address = f"glossary.html#{word.anchor}"
        parts.append(
            nodes.reference(
                "",
                match[0],
                internal=True,
                refuri=address,
                reftitle=word.definition,
                classes=["defined"],
            )
        )
        end = match.end()
    return [*parts, nodes.Text(text[end:])] if parts else []


def is_prose(node: nodes.Node) -> bool:
    """Return whether a text stands in a paragraph of a section, and in nothing that is no prose."""
    parent = node.parent
    if not isinstance(parent, nodes.paragraph | nodes.emphasis):
        return False  # strong names are headings within a line; code and formulas are no text
    sections = 0
    while parent is not None:
        if isinstance(parent, NOT_PROSE):
            return False
        if isinstance(parent, nodes.section):
            if TOO_EARLY & set(parent["ids"]):
                return False
            sections += 1
        parent = parent.parent
    return sections > 1  # the first section is the page: its head says time and requirements


def link_words(document: nodes.document, names: dict[str, Word]) -> None:
    """Link the first mention of each word in a chapter to the glossary."""
    seen: set[str] = set()
    for text in list(document.findall(nodes.Text)):
        if is_prose(text) and (parts := linked(text.astext(), names, seen)):
            text.parent.replace(text, parts)


def name_entries(document: nodes.document, names: dict[str, Word]) -> None:
    """Give each entry of the glossary the address that chapters link to."""
    for paragraph in document.findall(nodes.paragraph):
        first = next((child for child in paragraph.children if child.astext()), None)
        if isinstance(first, nodes.strong):
            name = re.split(r", | \(", first.astext())[0]
            if name in names:
                paragraph["ids"].append(anchor(name))


class Definitions(SphinxTransform):
    """Connects the words of the chapters with the glossary."""

    default_priority = 910

    def apply(self, **kwargs: Any) -> None:
        """Do so for one document."""
        if self.env.docname == PAGE:
            name_entries(self.document, glossary())
        elif CHAPTER.match(self.env.docname):
            self.env.note_dependency(str(GLOSSARY))
            link_words(self.document, glossary())

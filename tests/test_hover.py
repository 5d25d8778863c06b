"""Words of the glossary in the chapters: found, linked once, and only in running text."""

import book_source
import hover
import pytest
from docutils import nodes
from docutils.core import publish_doctree

GLOSSARY = """# Glossary

The words.

**Critic**: The *denoiser* of [chapter 4](4.ipynb), after
Karras et al. 2022. It trains.

**Score**: A "gradient" & more.

**Score matching**: Learning it.

**Frechet distance (FID)**: How far.

**Score identity distillation (SiD)**: Fisher's.
"""
NAMES = hover.by_name(hover.words(GLOSSARY))
CHAPTER = """\
=====
Title
=====

A score in the head.

Objectives
==========

A critic comes.

The Critic
==========

``critic`` and `critic <https://x.y>`_ and **Critic** and :math:`critic`. Two critics, one critic.

.. math:: score

Learn by *score matching* the scores; the score-based FID.
"""


def parts(text, seen=()):
    """A text with its links, as (said, anchor or None)."""
    found = hover.linked(text, NAMES, set(seen))
    address = [
        node.get("refuri", "") if isinstance(node, nodes.reference) else "" for node in found
    ]
    return [
        (node.astext(), uri.partition("#")[2] or None)
        for node, uri in zip(found, address, strict=True)
        if node.astext()
    ]


def test_entries_are_read_with_all_their_names_and_their_first_sentence():
    critic, score, _, distance, _ = hover.words(GLOSSARY)
    assert critic.anchor == "term-critic"
    assert critic.definition == "The denoiser of chapter 4, after Karras et al. 2022."
    assert score.definition == 'A "gradient" & more.'
    assert distance.names == ("Frechet distance", "FID")


def test_a_word_is_linked_at_its_first_mention_alone_or_in_the_plural():
    assert parts("Critics, a critic") == [("Critics", "term-critic"), (", a critic", None)]
    assert parts("FIDs")[0] == ("FIDs", "term-frechet-distance")
    assert parts("a critic", seen=["term-critic"]) == []


def test_of_two_words_the_longer_is_meant():
    assert parts("score\nmatching, score") == [
        ("score\nmatching", "term-score-matching"),
        (", ", None),
        ("score", "term-score"),
    ]


def test_another_name_of_a_word_counts_as_the_word():
    assert parts("FID, or Frechet distance")[0] == ("FID", "term-frechet-distance")
    assert len(parts("FID, or Frechet distance")) == 2


@pytest.mark.parametrize(
    "text", ["critical", "score-based", "re-score", "underscore", "a_critic", "sides", "fid"]
)
def test_parts_of_other_words_are_left_alone(text):
    assert parts(text) == []


def test_only_running_text_of_a_section_is_linked():
    document = publish_doctree(CHAPTER, settings_overrides={"doctitle_xform": False})
    before = document.astext()
    hover.link_words(document, NAMES)
    made = [node for node in document.findall(nodes.reference) if "defined" in node["classes"]]
    assert [node.astext() for node in made] == ["critics", "score matching", "scores", "FID"]
    assert made[0]["reftitle"] == NAMES["Critic"].definition
    assert all(node["refuri"].startswith("glossary.html#term-") for node in made)
    assert document.astext() == before


def test_entries_of_the_glossary_get_the_address_that_links_have():
    document = publish_doctree("**Critic**: It trains.\n\nText.\n\n**Other**: No.")
    document[0].insert(0, nodes.Text(""))  # the book's own parser puts one there
    hover.name_entries(document, NAMES)
    assert [paragraph["ids"] for paragraph in document.findall(nodes.paragraph)] == [
        ["term-critic"],
        [],
        [],
    ]


def test_every_definition_of_the_book_reads_as_plain_text():
    entries = hover.words((book_source.BOOK / "glossary.md").read_text("utf8"))
    assert len({word.anchor for word in entries}) == len(entries) > 40
    names = [name.lower() for word in entries for name in word.names]
    assert len(set(names)) == len(names)
    for word in entries:
        assert word.definition.endswith("."), word
        assert 20 < len(word.definition) < 200, word
        assert not set(word.definition) & set("$*`[]\\"), word


def test_the_glossary_is_in_the_order_of_the_alphabet():
    entries = hover.words((book_source.BOOK / "glossary.md").read_text("utf8"))
    assert entries == sorted(entries, key=lambda word: word.names[0].lower())

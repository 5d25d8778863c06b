"""The quiz of each chapter: one form, one right answer, and nothing that gives it away."""

import math
import re
from collections import Counter
from typing import NamedTuple

import book_source
import pytest
import torch

from dmd_tutorial import denoisers, dmd
from dmd_tutorial.mixtures import GaussianMixture
from dmd_tutorial.survey import flow_matching, progressive
from dmd_tutorial.survey.score_distillation import noise_prediction

CHAPTERS = {book_source.number(path): path for path in book_source.chapters()}
EVERY_CHAPTER = pytest.mark.parametrize("number", CHAPTERS)
QUESTION = re.compile(r"^\*\*Question (\d)\.\*\* (.+?)(?=^\*\*Question|\Z)", re.M | re.S)
OPTION = re.compile(
    r"<details><summary>([A-E])\. (.+)</summary>\n\n"
    r"\*\*(Right|No)\.\*\* (\S.*)\n\n</details>\n\n"
)
AGAIN = re.compile(r"Read again: \[[^]]+\]\(#[^)]+\)(?:, \[[^]]+\]\(#[^)]+\))*\.\n*")


class Question(NamedTuple):
    """A question, its options by letter, and which of them is right."""

    asked: str
    options: dict[str, str]
    explanations: list[str]
    right: str


def quiz(path):
    """The text of a chapter's quiz."""
    text = book_source.markdown(book_source.read_notebook(path))
    (found,) = re.findall(r"^## Check yourself\n.+?(?=^## )", text, re.M | re.S)
    return found


def questions(text):
    """The questions of a quiz.

    Raises:
        ValueError: One is not of the agreed form.
    """
    found = QUESTION.findall(text)
    if [number for number, _ in found] != [*"12345"]:
        raise ValueError("a quiz has questions 1 to 5")
    return [question(body) for _, body in found]


def question(body):
    """One question, of what stands between its number and the next."""
    asked, mark, rest = body.partition("<details>")
    options = OPTION.findall(mark + rest)
    if not AGAIN.fullmatch(OPTION.sub("", mark + rest)):
        raise ValueError(f"options, explanations, then links to read again: {asked}")
    letters = "".join(letter for letter, *_ in options)
    right = [letter for letter, _, verdict, _ in options if verdict == "Right"]
    if letters not in ("ABCD", "ABCDE") or len(right) != 1:
        raise ValueError(f"four or five options, one of them right: {asked}")
    texts = {letter: text for letter, text, *_ in options}
    return Question(asked.strip(), texts, [why for *_, why in options], right[0])


def all_questions():
    """The questions of all chapters."""
    return [each for path in CHAPTERS.values() for each in questions(quiz(path))]


def lengths(options):
    """How long each option looks; what is shorter than a few words looks alike."""
    return {letter: max(len(text), 20) for letter, text in options.items()}


@EVERY_CHAPTER
def test_a_chapter_has_its_quiz_before_its_summary(number):
    text = book_source.markdown(book_source.read_notebook(CHAPTERS[number]))
    headings = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    assert headings[headings.index("Summary") - 1] == "Check yourself"
    assert headings[headings.index("Summary") - 2] == "Exercises"


@EVERY_CHAPTER
def test_every_question_has_one_right_answer_and_every_option_its_reason(number):
    for each in questions(quiz(CHAPTERS[number])):
        assert each.asked.endswith("?")
        assert len(set(each.options.values())) == len(each.options)
        for text in each.options.values():  # it stands in HTML, where Markdown is not read
            assert not re.search(r"[$*`\[\]]", text), text
        for why in each.explanations:
            assert len(why.split()) >= 5, why
            assert len(re.findall(r"[.?!](?= |$)", why)) <= 2, why


@EVERY_CHAPTER
def test_a_quiz_reads_a_figure_and_asks_for_a_prediction(number):
    asked = [each.asked for each in questions(quiz(CHAPTERS[number]))]
    assert any(re.search(r"\b[Ff]igure\b", text) for text in asked)
    assert any(text.startswith("Predict") for text in asked)


def answer(number):
    """Which question of a chapter asks for a number, and what it is, by the package if it can."""
    x, level = torch.ones(1, 1), torch.ones(1)
    gaussians = [GaussianMixture.isotropic([[m]], s) for m, s in ((0.0, 1.0), (2.0, 2.0))]
    real, fake = (each.score(3 * x, 0.0) for each in gaussians)
    return {
        1: (1, denoisers.denoised_from_score(3 * x, -0.5 * x, 2 * level)),
        2: (1, progressive.ddim_step(4 * x, x, 2 * level, level)),
        3: (2, real - fake),
        4: (3, math.ceil(math.log(1 - 4 * 0.01) / math.log(1 - 0.01))),
        5: (1, math.log(1 / 0.9)),
        6: (1, 240 * 15 * 64 / (3 * 128)),
        7: (1, (1 / 0.1 - 1) / 2 * 0.2),
        8: (1, flow_matching.velocity(lambda *_: -0.3 * x, 0.6 * x, 0.75 * level)),
        9: (3, math.cos(math.pi / 4) ** 2),
        10: (1, progressive.target(5 * x, 3 * x, 4 * level, 2 * level)),
        11: (2, dmd.matching_gradient(x, 2 * level, 0.4 * x, x, noise_prediction)),
    }[number]


@EVERY_CHAPTER
def test_the_right_number_is_right_and_no_other(number):
    place, value = answer(number)
    asked = questions(quiz(CHAPTERS[number]))[place - 1]
    near = set()
    for letter, text in asked.options.items():
        for said in re.findall(r"-?\d+(?:\.\d+)?", text.replace("\N{MINUS SIGN}", "-"))[:1]:
            digits = len(said.partition(".")[2])
            if abs(float(said) - float(value)) <= 0.5 * 10**-digits:
                near.add(letter)
    assert near == {asked.right}


@EVERY_CHAPTER
def test_figures_that_a_quiz_names_are_there(number):
    path = CHAPTERS[number]
    cells = book_source.read_notebook(path)["cells"]
    titles = {
        match[1]
        for cell in cells
        if (match := re.match(r"# @title Figure: (.+)\n", book_source.source(cell)))
    }
    captions = set(
        re.findall(r"\*\*(Figure \d+\.\d+)\.\*\*", book_source.markdown({"cells": cells}))
    )
    asked = " ".join(each.asked for each in questions(quiz(path)))
    named = set(re.findall(r'[Ff]igure "([^"]+)"', asked))
    assert named <= titles
    assert set(re.findall(r"Figure \d+\.\d+", asked)) <= captions


@EVERY_CHAPTER
def test_no_option_is_longer_than_twice_another(number):
    for each in questions(quiz(CHAPTERS[number])):
        long = lengths(each.options).values()
        assert max(long) <= 2 * min(long), each.asked


@EVERY_CHAPTER
def test_the_right_option_stands_in_different_places(number):
    places = Counter(each.right for each in questions(quiz(CHAPTERS[number])))
    assert len(places) >= 3
    assert max(places.values()) <= 2


def test_neither_place_nor_length_gives_the_right_option_away():
    """Whoever always takes one letter, or the longest option, or the shortest, must fail."""
    every = all_questions()
    guesses = Counter(each.right for each in every)
    for name, choose in (("longest", max), ("shortest", min)):
        for each in every:
            long = lengths(each.options)
            extreme = [letter for letter in long if long[letter] == choose(long.values())]
            guesses[name] += (each.right in extreme) / len(extreme)
    assert max(guesses.values()) <= 0.4 * len(every), guesses


GOOD = "".join(
    f"**Question {k}.** Why?\n\n"
    + "".join(
        f"<details><summary>{letter}. Since {letter}</summary>\n\n**{verdict}.** It is so.\n\n"
        "</details>\n\n"
        for letter, verdict in zip("ABCD", ("No", "Right", "No", "No"), strict=True)
    )
    + "Read again: [there](#there).\n\n"
    for k in range(1, 6)
)


def test_the_form_is_read():
    first, *_ = questions(GOOD)
    assert first == Question(
        "Why?", {x: f"Since {x}" for x in "ABCD"}, ["It is so."] * 4, right="B"
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("**Question 5.**", "**Question 6.**"),
        ("**Right.**", "**No.**"),
        ("<summary>A. Since A</summary>\n\n**No.**", "<summary>A. Since A</summary>\n\n**Right.**"),
        ("**No.** It is so.", "It is so."),
        ("**No.** It is so.", "**No.** "),
        ("Read again: [there](#there).", ""),
        ("<summary>D. ", "<summary>C. "),
        ("</details>\n\nRead", "</details>\n\nMore text.\n\nRead"),
    ],
)
def test_another_form_is_refused(old, new):
    assert old in GOOD
    with pytest.raises(ValueError, match=r"questions 1 to 5|one of them right|read again"):
        questions(GOOD.replace(old, new))

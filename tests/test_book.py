"""The book's sources: every chapter has its anatomy, and the tools that hold it do their work."""

import ast
import copy
import json
import re
from pathlib import Path

import alt_text
import book_site
import book_source
import format_notebooks
import ledger
import nbformat
import pytest
import reference
import set_repository
import timings
import torch
import yaml
from pygments.lexers import get_lexer_by_name
from pygments.token import Error

CHAPTERS = book_source.chapters()
EVERY_CHAPTER = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
EVERY_NOTEBOOK = pytest.mark.parametrize(
    "path", book_source.notebooks(), ids=lambda path: path.stem
)

BOOTSTRAP = """\
# @title Set-up: in Colab this installs the package, anywhere else it does nothing
import importlib.util
import sys

if (
    "google.colab" in sys.modules
    and importlib.util.find_spec("dmd_tutorial") is None
):
    %pip install --quiet "dmd-tutorial @ git+{repository}"
"""
EXERCISE = re.compile(r"^### Exercise (\d+\.\d+): \S", flags=re.MULTILINE)
DIFFICULTY = re.compile(
    r"^\*Difficulty: (?:easy|medium|hard) · (\d+) minutes · [a-z ]+\*$", flags=re.MULTILINE
)
HINT = re.compile(r"<details><summary>Hint \d</summary>\n\n.+?\n\n</details>", flags=re.DOTALL)
# What other readers than the site would show as rubbish: directives, roles, targets.
RAW = re.compile(r"^(`{3,}|:{3,})\{|\{[a-z:-]+\}`|^\([\w-]+\)=$", flags=re.MULTILINE)


def code_cells(path, tag=None):
    """The sources of a chapter's code cells, of all or of those with a tag."""
    cells = book_source.read_notebook(path)["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    return [book_source.source(cell) for cell in code if tag in (None, *book_source.tags(cell))]


def text_of(path):
    return book_source.markdown(book_source.read_notebook(path))


def calls(path, name):
    """The calls of a function of that name, with or without a module before it, in a chapter."""
    for source in code_cells(path):
        code = re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.MULTILINE)
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == name:
                yield node


def exercises(path):
    """Each exercise of a chapter: its number, its text, and the code cells up to the next one."""
    found = []
    for cell in book_source.read_notebook(path)["cells"]:
        text = book_source.source(cell)
        if cell["cell_type"] == "code":
            if found:
                found[-1][2].append(cell)
        elif match := EXERCISE.search(text):
            found.append((match.group(1), text, []))
        elif re.match("## ", text) and found:
            break
        elif found:
            found[-1] = (found[-1][0], f"{found[-1][1]}\n\n{text}", found[-1][2])
    return found


# Every chapter


def test_the_table_of_contents_and_the_folder_agree():
    contents = yaml.safe_load((book_source.ROOT / "_toc.yml").read_text("utf8"))
    listed = [entry["file"] for part in contents["parts"] for entry in part["chapters"]]
    listed.append(contents["root"])
    pages = {*book_source.pages(), *book_source.notebooks(), reference.PAGE}  # made by `make book`
    names = [path.relative_to(book_source.ROOT).with_suffix("").as_posix() for path in pages]
    assert sorted(listed) == sorted(names)


def test_chapters_are_numbered_without_a_gap():
    assert [book_source.number(path) for path in CHAPTERS] == list(range(1, len(CHAPTERS) + 1))
    assert len(CHAPTERS) >= 6


@EVERY_CHAPTER
def test_a_chapter_opens_with_what_a_reader_must_know(path):
    first = book_source.source(book_source.read_notebook(path)["cells"][0])
    assert first.startswith(f"# {book_source.number(path)}. ")
    assert "**Builds on:** " in first
    assert timings.times(path)


@EVERY_NOTEBOOK
def test_a_notebook_has_its_badge_under_its_title(path):
    title, badge, *_ = book_source.source(book_source.read_notebook(path)["cells"][0]).split("\n\n")
    name = book_source.repository().removeprefix("https://github.com/")
    colab = f"https://colab.research.google.com/github/{name}/blob/main/book/{path.name}"
    assert title.startswith("# ")
    assert badge == f"[Open in Colab]({colab})"


@EVERY_NOTEBOOK
def test_a_notebook_sets_colab_up_in_its_first_code_cell(path):
    wanted = BOOTSTRAP.format(repository=book_source.repository()).rstrip()
    assert code_cells(path)[0] == wanted
    assert code_cells(path, "bootstrap") == [wanted]


@EVERY_CHAPTER
@pytest.mark.parametrize(
    "heading", ["Objectives", "What goes wrong", "Exercises", "Summary", "Where to read more"]
)
def test_a_chapter_has_every_part(path, heading):
    assert re.search(rf"^## {heading}", text_of(path), flags=re.MULTILINE)


@EVERY_CHAPTER
def test_a_chapter_has_one_title(path):
    assert len(re.findall(r"^# ", text_of(path), flags=re.MULTILINE)) == 1


@EVERY_CHAPTER
def test_a_chapter_has_a_slider_and_says_what_every_picture_shows(path):
    sliders = list(calls(path, "slider"))
    assert sliders
    for call in sliders:
        assert "alt" in [keyword.arg for keyword in call.keywords], ast.unparse(call)
    for call in calls(path, "show"):
        named = "alt" in [keyword.arg for keyword in call.keywords]
        assert named or len(call.args) >= 2, ast.unparse(call)


@pytest.mark.parametrize("number", [5, 6])
def test_figures_have_numbers_in_order_and_a_caption_below(number):
    (path,) = [path for path in CHAPTERS if book_source.number(path) == number]
    cells = book_source.read_notebook(path)["cells"]
    below = [
        book_source.source(cells[i + 1])
        for i, cell in enumerate(cells)
        if cell["cell_type"] == "code"
        and re.search(r"^(plots\.show|slider)\(", book_source.source(cell), flags=re.MULTILINE)
    ]
    captions = [re.match(r"\*\*Figure (\d+)\.(\d+)\.\*\* \S", text) for text in below]
    assert [caption and (int(caption[1]), int(caption[2])) for caption in captions] == [
        (number, k + 1) for k in range(len(below))
    ]


@EVERY_CHAPTER
def test_a_chapter_has_exercises_with_difficulty_time_hints_and_solution(path):
    found = exercises(path)
    assert len(found) >= 3
    number = book_source.number(path)
    assert [name for name, _, _ in found] == [f"{number}.{k + 1}" for k in range(len(found))]
    for name, text, cells in found:
        assert DIFFICULTY.search(text), f"exercise {name} lacks its difficulty and minutes"
        assert len(HINT.findall(text)) >= 2, f"exercise {name} has fewer than two hints"
        kinds = ["solution" in book_source.tags(cell) for cell in cells]
        assert kinds[:2] == [False, True], f"exercise {name}: its stub, then its solution"
        stub, solution = (book_source.source(cell) for cell in cells[:2])
        assert f'check("{name}"' in stub
        assert solution.startswith(f"# @title Solution {name}")
        assert f'check("{name}"' in solution
        assert "assert " in solution, f"the solution of exercise {name} is not held to be right"
    minutes = sum(int(DIFFICULTY.search(text)[1]) for _, text, _ in found)
    assert f"{minutes} more for the exercises" in book_source.markdown(
        book_source.read_notebook(path)
    )


@EVERY_CHAPTER
def test_a_chapter_shows_its_picture_before_it_derives_anything(path):
    """Words and the picture first: no section begins before it but its own."""
    headings = []
    for cell in book_source.read_notebook(path)["cells"]:
        source = book_source.source(cell)
        if cell["cell_type"] == "markdown":
            headings += re.findall(r"^##+ (.+)$", source, flags=re.MULTILINE)
        elif re.search(r"^(plots\.show|slider)\(", source, flags=re.MULTILINE):
            break
    assert headings[:-1] == []


# The three forms of a notebook beside the site: JupyterLab, GitHub and Colab show its text cells
# as they are, as Markdown with formulas and no more.


def outside_the_site(text):
    """What would read as rubbish, or not at all, in a reader that knows plain Markdown only."""
    prose = CODE_OR_FORMULA.sub("x", text)
    return [match[0] for match in RAW.finditer(text)] + [
        match[0] for pattern in ONLY_IN_THE_SITE for match in pattern.finditer(prose)
    ]


CODE_OR_FORMULA = re.compile(
    r"^```.*?^```|`[^`\n]+`|\$\$.*?\$\$|\$[^$]+\$", re.DOTALL | re.MULTILINE
)
ONLY_IN_THE_SITE = [
    re.compile(r"^%.*|^\+\+\+.*", re.MULTILINE),  # comments and breaks of MyST
    re.compile(
        r"(?<!!)\[\]\([^)]*\)|<project:[^>]*>|\[\^[^\]]+\]"
    ),  # links without text; footnotes
    re.compile(r"\\begin\{\w+\*?\}|\\[()]"),  # formulas without dollars, which GitHub ignores
    re.compile(r"\{[#.][\w-]+[^}\n]*\}"),  # attributes
]
# What code may show as Markdown: a fence or a role of MyST in a string.
SHOWN_RAW = re.compile(
    r"(?:`{3,}|:{3,})\{\w|\{(?:ref|eq|numref|doc|term|cite\w*|math|download)\}`|<img (?!class)"
)
FENCED = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)")
PAGES = sorted({*book_source.pages()} - {reference.PAGE})
EVERY_PAGE = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)


def text_of_page(path):
    return reference.page() if path == reference.PAGE else path.read_text("utf8")


def anchors(path):
    """The places in a page that a link can name, as GitHub and the site name them."""
    text = text_of(path) if path.suffix == ".ipynb" else text_of_page(path)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {*map(book_source.anchor, headings), *re.findall(r'<\w+ id="([^"]+)"', text)}


def dead_links(path, text):
    """The links of a text to other pages of the book that lead nowhere."""
    for link in LINK.findall(CODE_OR_FORMULA.sub("x", text)):
        if re.match(r"[a-z]+:", link):
            continue  # another site's
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        there = target.is_file() or target == reference.PAGE
        if not there or (anchor and anchor not in anchors(target)):
            yield link


@EVERY_NOTEBOOK
def test_a_notebook_reads_well_outside_the_site(path):
    assert outside_the_site(text_of(path)) == []
    assert not [source for source in code_cells(path) if SHOWN_RAW.search(source)]


@EVERY_NOTEBOOK
def test_a_notebook_finds_its_pictures_everywhere(path):
    """A copy in Colab has no files beside it: the pictures come out of the cells."""
    assert PICTURE.findall(text_of(path)) == []
    assert "<img" not in text_of(path)
    for source in code_cells(path):
        assert not re.search(r"\bImage\((filename|url)|imread\(|Image\.open\(", source)


@EVERY_NOTEBOOK
def test_the_links_of_a_notebook_lead_somewhere(path):
    assert list(dead_links(path, text_of(path))) == []


@pytest.mark.parametrize(
    "path", [*book_source.notebooks(), *PAGES, reference.PAGE], ids=lambda path: path.name
)
def test_code_within_the_text_is_of_the_language_that_it_says(path):
    """The site colours it and would warn, which stops the build."""
    text = text_of(path) if path.suffix == ".ipynb" else text_of_page(path)
    for language, code in FENCED.findall(text):
        kinds = [kind for kind, _ in get_lexer_by_name(language).get_tokens(code)]
        assert Error not in kinds, code


@EVERY_NOTEBOOK
def test_a_notebook_is_one_that_other_readers_accept(path):
    nbformat.validate(book_source.read_notebook(path))


@EVERY_PAGE
def test_a_page_reads_well_outside_the_site(path):
    assert outside_the_site(path.read_text("utf8")) == []


@EVERY_PAGE
def test_the_links_and_pictures_of_a_page_lead_somewhere(path):
    text = path.read_text("utf8")
    assert list(dead_links(path, text)) == []
    for alternative, address in PICTURE.findall(text):
        assert alternative.strip()
        assert (path.parent / address).is_file()


@pytest.mark.parametrize(
    "text",
    [
        "```{note}\nx\n```",
        ":::{tip}\nx\n:::",
        "see {ref}`there`",
        "(target)=\n# Title",
        "% a comment",
        "+++",
        "see [](other.md)",
        "a word[^1]",
        "\\begin{align}\na\n\\end{align}",
        r"the sum \(a + b\)",
        "![A](b.png){.wide}",
    ],
)
def test_what_only_the_site_understands_is_found(text):
    assert outside_the_site(f"Before.\n\n{text}\n\nAfter.")


@pytest.mark.parametrize(
    "text",
    [
        "```python\nx = {y}\n```",
        "$\\{a\\}$ and $$\n\\begin{aligned}\na\n\\end{aligned}\n$$",
        "30 % of [it](b.md) is `%d`",
        "<details><summary>Hint</summary>\n\nx\n\n</details>",
    ],
)
def test_plain_markdown_is_let_be(text):
    assert outside_the_site(text) == []


def test_a_dead_link_is_found(tmp_path):
    (tmp_path / "b.md").write_text("# A *great* title, indeed")
    links = "[1](b.md) [2](b.md#a-great-title-indeed) [3](b.md#b) [4](c.md) [5](https://x.y/z)"
    assert list(dead_links(tmp_path / "a.md", links)) == ["b.md#b", "c.md"]


@EVERY_NOTEBOOK
def test_notebooks_are_in_canonical_form(path):
    assert format_notebooks.difference(path) == ""


# The ledger of equations and tests


def test_every_equation_has_a_test_and_every_test_its_equation():
    assert ledger.problems(ledger.equations(), ledger.equation_tests()) == []


def test_the_page_of_equations_is_up_to_date():
    wanted = ledger.page(ledger.equations(), ledger.equation_tests())
    assert ledger.PAGE.read_text("utf8") == wanted


EQUATION = ledger.Equation("3.2", r"a = b \tag{3.2}", Path("3-kl-gradient.ipynb"))
ITS_TEST = ledger.EquationTest("3.2", "tests/test_x.py::test_y", "a is b.")


@pytest.mark.parametrize(
    ("equations", "tests", "sentence"),
    [
        ([EQUATION], [], "equation (3.2) has no test"),
        ([], [ITS_TEST], "no chapter has the equation (3.2)"),
        ([EQUATION, EQUATION], [ITS_TEST], "equation (3.2) is numbered 2 times"),
        ([EQUATION], [ledger.EquationTest("3.2", "test_y", "")], "must say what equation (3.2)"),
        (
            [ledger.Equation("2.9", "", EQUATION.chapter)],
            [ledger.EquationTest("2.9", "test_y", "Says it.")],
            "does not carry its chapter's number",
        ),
    ],
)
def test_an_unbalanced_ledger_is_named(equations, tests, sentence):
    (problem,) = ledger.problems(equations, tests)
    assert sentence in problem


def test_a_balanced_ledger_has_no_problems():
    assert ledger.problems([EQUATION], [ITS_TEST]) == []


def test_the_ledger_finds_marked_functions_and_methods(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_some.py").write_text(
        "import pytest\n\n"
        '@pytest.mark.equation("1.1")\n@pytest.mark.equation("1.2")\n'
        'def test_two():\n    """Both\n    hold.\n\n    More."""\n\n'
        "class TestGroup:\n"
        '    @pytest.mark.equation("1.3")\n    def test_one(self):\n        """It holds."""\n\n'
        'def test_other():\n    """No equation."""\n'
    )
    assert ledger.equation_tests(tmp_path / "tests") == [
        ledger.EquationTest("1.1", "tests/test_some.py::test_two", "Both hold."),
        ledger.EquationTest("1.2", "tests/test_some.py::test_two", "Both hold."),
        ledger.EquationTest("1.3", "tests/test_some.py::TestGroup::test_one", "It holds."),
    ]


def test_the_ledger_finds_the_tagged_displays_of_a_chapter(tmp_path):
    text = "$$\na = b \\tag{3.1}\n$$\n\nand $$c = d$$ and\n\n$$\ne \\\\ f \\tag{3.2}\n$$"
    path = tmp_path / "3-some.ipynb"
    path.write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": text}]}))
    found = list(ledger.equations_in(path))
    assert [(equation.tag, equation.latex) for equation in found] == [
        ("3.1", r"a = b \tag{3.1}"),
        ("3.2", r"e \\ f \tag{3.2}"),
    ]


# The form of the notebooks


def notebook(*cells):
    """A notebook of (kind, source, tags), with the dirt that editors leave."""
    dirt = {"collapsed": False, "scrolled": True}
    made = []
    for kind, source, tags in cells:
        cell = {"cell_type": kind, "source": source, "metadata": {**dirt, "tags": list(tags)}}
        if kind == "code":
            cell |= {"outputs": [{"output_type": "stream"}], "execution_count": 7}
        made.append(cell)
    return {"cells": made, "metadata": {"kernelspec": {"name": "mine"}}, "nbformat_minor": 2}


def test_the_canonical_form_is_reached_in_one_step():
    once = format_notebooks.canonical(
        notebook(("code", "a = 1  \n\n", ["solution"]), ("markdown", "", []), ("code", "b", []))
    )
    assert format_notebooks.canonical(copy.deepcopy(once)) == once
    solution, other = once["cells"]
    assert solution["source"] == ["a = 1"]
    assert solution["outputs"] == []
    assert solution["execution_count"] is None
    assert solution["metadata"]["tags"] == ["hide-cell", "solution"]
    assert solution["metadata"]["jupyter"] == {"source_hidden": True}
    assert other["metadata"] == {}
    assert once["metadata"]["kernelspec"]["name"] == "python3"


def test_a_titled_cell_is_folded_under_its_title():
    made = notebook(("code", "# @title Figure: {all}\ndraw()", []), ("code", "draw()", []))
    titled, plain = (cell["metadata"] for cell in format_notebooks.canonical(made)["cells"])
    assert titled["tags"] == ["hide-input"]
    assert titled["mystnb"]["code_prompt_show"].format(type="source") == "Figure: {all}"
    assert titled["cellView"] == "form"
    assert plain == {}


def test_a_cell_keeps_its_id_when_it_moves_and_equal_cells_differ():
    cells = [("code", "a", []), ("code", "b", []), ("code", "a", [])]

    def ids(some):
        return [cell["id"] for cell in format_notebooks.canonical(notebook(*some))["cells"]]

    first, second, third = ids(cells)
    assert ids(cells[::-1]) == [first, second, third]
    assert len({first, second, third}) == 3
    assert ids([("markdown", "a", [])]) != [first]


def test_a_notebook_out_of_form_is_shown_as_a_diff(tmp_path):
    path = tmp_path / "some.ipynb"
    path.write_text(json.dumps(notebook(("code", "a = 1", []))))
    assert '+ "nbformat_minor": 5' in format_notebooks.difference(path)


# The repository's address


def test_every_file_carries_the_repository_address_of_pyproject():
    assert set_repository.disagreeing(book_source.repository()) == []


def test_a_fork_changes_our_addresses_and_no_others():
    ours = (
        "https://colab.research.google.com/github/a/b/blob/main/book/1.ipynb "
        '"dmd-tutorial @ git+https://github.com/a/b" https://github.com/a/b/actions/workflows/x '
        "git clone https://github.com/a/b\nurl: https://github.com/a/b\nhttps://a.github.io/b/ "
    )
    theirs = "https://github.com/NVlabs/edm and https://github.com/tianweiy/DMD2."
    carried = set_repository.carried(ours + theirs, "https://github.com/Some-One/my.fork")
    assert carried == (
        ours.replace("a.github.io/b", "some-one.github.io/my.fork").replace(
            "a/b", "Some-One/my.fork"
        )
        + theirs
    )


def test_a_fork_leaves_no_file_with_the_old_address():
    old = book_source.repository().removeprefix("https://github.com/")
    for path in set_repository.files():
        text = set_repository.carried(path.read_text("utf8"), "https://github.com/me/fork")
        assert old not in text, path.name


@pytest.mark.parametrize(
    "address", ["", "github.com/a/b", "https://github.com/a", "https://x.y/a/b"]
)
def test_a_malformed_address_is_refused(address):
    with pytest.raises(ValueError, match="not of the form"):
        set_repository.carried("", address)


# Pictures, pages, times


def test_the_code_in_the_readme_gives_the_gradient_of_the_paper():
    text = timings.README.read_text("utf8")
    (code,) = re.findall(r"```python\n(.+?)```", text, flags=re.DOTALL)
    theta = torch.zeros(3, 1, 2, 2, requires_grad=True)
    given = {
        "z": torch.randn(3, 1, 2, 2),
        "sigma": torch.tensor([0.1, 1.0, 10.0]),
        "generator": lambda z: z + theta,
        "teacher": lambda x, sigma: x / 2,
        "critic": lambda x, sigma: x / 3,
    }
    exec(code, given)
    torch.testing.assert_close(theta.grad, given["gradient"] / theta.numel())
    assert theta.grad.abs().min() > 0


def test_a_picture_without_alternative_text_is_found(tmp_path):
    (tmp_path / "page.html").write_text(
        '<img src="a.png" alt="A curve.">\n<img src="b.png" alt=" ">\n<img src="c.png">'
    )
    assert alt_text.silent_pictures(tmp_path) == [
        "page.html, line 2: b.png",
        "page.html, line 3: c.png",
    ]


def test_the_package_reference_reads_well():
    text = reference.page()
    assert outside_the_site(text) == []
    assert list(dead_links(reference.PAGE, text)) == []
    assert "exercises/chapter" not in text


def test_the_package_reference_goes_from_the_heart_outwards_and_forgets_no_room():
    rooms = re.findall("^## (.+)$", reference.page(), flags=re.MULTILINE)
    assert rooms[:2] == ["dmd", "anchor"]
    order = [rooms.index(name) for name in ("checks", "training", "networks", "survey", "notebook")]
    assert order == sorted(order)
    assert rooms.index("survey") < rooms.index("survey/adversarial")
    package = reference.PACKAGE
    files = {path for path in package.rglob("*.py") if path.parent.name != "exercises"}
    files -= {package / "__init__.py", package / "__main__.py"}
    assert {reference.name_of(path) for path in files} | {"notebook/exercises"} == set(rooms)


def test_a_docstring_becomes_lists():
    docstring = "Do it to *all*.\n\nArgs:\n    x: A sample,\n        of size $1.\n\nThe end."
    assert list(reference.described(docstring)) == [
        r"Do it to \*all\*.",
        "",
        "*Arguments:*\n",
        "- `x`: A sample,",
        r"  of size \$1.",
        "",
        "The end.",
    ]


def test_what_is_indented_in_a_docstring_becomes_a_block():
    assert reference.prose("As in:\n\n    a  *b*\n    c\n\nThe end.") == (
        "As in:\n\n```text\na  *b*\nc\n```\n\nThe end.\n"
    )


CLASS = '''
@dataclass
class Box(Base):
    """A box."""

    # Of the outside.
    size: int = 3  # cm

    def __init__(self, size: int) -> None:
        self.size = size

    @property
    def volume(self) -> int:
        """Its volume."""
        return self.size**3

    def open(self) -> None:
        ...

    def _hidden(self) -> None:
        """Not shown."""
'''


def test_a_class_is_shown_with_its_fields_and_its_public_methods():
    (node,) = ast.parse(CLASS).body
    assert "\n".join(reference.entry(node, CLASS.splitlines())).splitlines() == [
        "### Box", "", "```python", "@dataclass", "class Box(Base):", "    # Of the outside.",
        "    size: int = 3  # cm", "    def __init__(self, size: int) -> None", "```", "",
        "A box.", "", "#### Box.volume", "", "```python", "@property",
        "def volume(self) -> int", "```", "", "Its volume.", "",
        "#### Box.open", "", "```python", "def open(self) -> None", "```", "", "",
    ]  # fmt: skip


def test_the_readme_carries_the_times_of_the_chapters():
    table = timings.TABLE.search(timings.README.read_text("utf8"))
    assert table is not None
    assert table.group() == timings.table()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "5 s"), (41, "45 s"), (90, "90 s"), (91, "2 minutes"), (125, "2.5 minutes")],
)
def test_times_are_rounded_up_and_read_back(seconds, words):
    assert timings.spoken(seconds) == words
    line = (
        "**Time:** 60 minutes to read and try, 45 more for the exercises; "
        f"the code runs in {words} on two CPU cores."
    )
    found = timings.TIME.search(line)
    assert found is not None
    assert (found["read"], found["exercises"], found["run"]) == ("60", "45", words)
    assert seconds <= timings.seconds(words)


def test_the_cache_depends_on_the_sources_of_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(book_site, "ROOT", tmp_path)
    (tmp_path / "dmd_tutorial" / "__pycache__").mkdir(parents=True)
    source = tmp_path / "dmd_tutorial" / "dmd.py"
    source.write_text("a = 1")
    before = book_site.sources_digest()
    (tmp_path / "dmd_tutorial" / "__pycache__" / "dmd.pyc").write_text("compiled")
    assert book_site.sources_digest() == before
    source.write_text("a = 2")
    assert book_site.sources_digest() != before

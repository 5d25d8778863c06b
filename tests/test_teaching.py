"""The pages for teachers: plans add up, what they name is there, what they command can be run."""

import re
import shlex
from xml.etree import ElementTree

import book_source
import ledger
import pytest
import teaching

from benchmarks.plan import evaluations
from dmd_tutorial.notebook import exercises
from dmd_tutorial.runs import cli
from dmd_tutorial.runs.presets import PRESETS

PAGES = {path.stem: path.read_text("utf8") for path in sorted(teaching.FOLDER.glob("*.md"))}
CHAPTERS = teaching.chapters()
EVERY_CHAPTER = pytest.mark.parametrize("number", CHAPTERS)
TIMED = re.compile(r"^### ([^\n]+) \((\d+) minutes\)$(.+?)(?=^##|\Z)", re.MULTILINE | re.DOTALL)
PLANS = {title: (int(whole), text) for title, whole, text in TIMED.findall(PAGES["course-plans"])}
PROJECTS = re.split(r"^## \d+\. ", PAGES["projects"], flags=re.MULTILINE)[1:]
EVERY_PROJECT = pytest.mark.parametrize("text", PROJECTS, ids=lambda text: text.split("\n")[0])
EVERY_PAGE = pytest.mark.parametrize("name", PAGES)
TASKS = {task.number: task for chapter in CHAPTERS.values() for task in chapter.tasks}
KINDS = {"derive", "implement", "break on purpose", "predict before you run", "read a plot"}


def notes(number):
    """The notes on one chapter."""
    part = "chapters-1-to-6" if number <= 6 else "chapters-7-to-11"
    (text,) = re.findall(rf"^## Chapter {number}: .+?(?=^## |\Z)", PAGES[part], re.M | re.S)
    return text


def without_blocks(text):
    """What was typed."""
    return teaching.BLOCK.sub("", text)


def test_every_block_says_what_its_source_says():
    for path, text in teaching.made().items():
        assert path.read_text("utf8") == text, f"{path.name}: run `make format`"


def test_a_block_that_nobody_knows_is_refused():
    with pytest.raises(ValueError, match="no block is called 'minuets'"):
        teaching.filled("<!-- make minuets -->\n<!-- made -->")


# Minutes


def test_minutes_come_from_the_chapters(monkeypatch):
    before = {name: "\n".join(teaching.BLOCKS[name]()) for name in ("times", "minutes")}
    first = teaching.chapters()[1]
    longer = first._replace(time=first.time._replace(read=first.time.read + 240))
    monkeypatch.setattr(teaching, "chapters", lambda: {**CHAPTERS, 1: longer})
    assert f"| {first.time.read + 240} |" in "\n".join(teaching.minutes())
    assert all("\n".join(teaching.BLOCKS[name]()) != text for name, text in before.items())


def test_what_is_done_at_home_adds_up():
    text = "\n".join(teaching.home("read", "1", "2", "set", "1.3"))
    read = CHAPTERS[1].time.read + CHAPTERS[2].time.read
    task = next(task for task in CHAPTERS[1].tasks if task.number == "1.3")
    assert f"{read + task.minutes} minutes" in text
    assert f"({read})" in text
    assert f"({task.minutes})" in text


@EVERY_CHAPTER
def test_the_exercises_of_a_chapter_take_what_it_says(number):
    chapter = CHAPTERS[number]
    assert [task.number for task in chapter.tasks] == [
        exercise.number for exercise in exercises.chapters()[str(number)]
    ]
    assert sum(task.minutes for task in chapter.tasks) == chapter.time.exercises


def test_there_are_six_sessions_a_unit_and_a_day():
    names = [(re.sub(r"[ :].*", "", title), whole) for title, (whole, _) in PLANS.items()]
    assert names.count(("Session", 90)) == 6
    assert names.count(("Meeting", 90)) == 4
    assert names.count(("The", 480)) == 1
    assert len(names) == 11


@pytest.mark.parametrize("title", PLANS)
def test_a_plan_adds_up_and_leaves_time_for_its_exercises(title):
    whole, text = PLANS[title]
    rows = re.findall(r"^\| (\d+) \| (.+?) \|", text, flags=re.MULTILINE)
    assert sum(int(minutes) for minutes, _ in rows) == whole
    for minutes, what in rows:
        match = re.match(r"exercises? [\d. and]+", what)
        named = re.findall(r"\d+\.\d+", match[0]) if match else []
        needed = sum(TASKS[number].minutes for number in named) + 5  # to compare answers
        assert not named or needed <= int(minutes), what


COURSES = ["Six sessions of 90 minutes", "Two weeks inside a course on diffusion", "One day"]


@pytest.mark.parametrize("course", COURSES)
def test_a_course_has_exercises_of_every_kind(course):
    (text,) = re.findall(rf"^## {course}\n.+?(?=^## )", PAGES["course-plans"], re.M | re.S)
    said = re.findall(r"^<!-- make home (.+) -->|^\| \d+ \| (exercises? .+?) \|", text, re.M)
    numbers = re.findall(r"\d+\.\d+", " ".join(map(" ".join, said)))
    assert {TASKS[number].kind for number in numbers} == KINDS


def test_a_problem_set_takes_an_hour_to_an_hour_and_a_half():
    sets = re.findall(
        r"^Problem set \d.+?due.+?At home, (\d+) min", PAGES["course-plans"], re.M | re.S
    )
    assert len(sets) == 2
    assert all(60 <= int(minutes) <= 90 for minutes in sets)


def headings(name):
    """The anchors of a chapter, in their order."""
    text = book_source.markdown(book_source.read_notebook(teaching.FOLDER.parent / name))
    return [book_source.anchor(heading) for heading in re.findall(r"^##+ (.+)$", text, re.M)]


@pytest.mark.parametrize("title", PLANS)
def test_what_is_predicted_was_not_read_and_has_its_answer_in_the_notes(title):
    text = PLANS[title][1]
    asked = re.findall(
        r"\| [^|]*(?:predict |vote:|exercise \d\.\d, each)[^|]*\| .*?\.\./([^)#]+)#([^)]+)\)", text
    )
    stop = re.search(r"\*\*read to\*\* \[.+?\]\(\.\./([^)#]+)#([^)]+)\)", text)
    assert stop or title == "The day" or not asked
    for name, anchor in asked:
        if stop and stop[1] == name:
            order = headings(name)
            assert order.index(stop[2]) <= order.index(anchor)
        fold = notes(int(name.partition("-")[0])).partition("predictions</summary>")[2]
        assert f"{name}#{anchor}" in fold.partition("</details>")[0], anchor


# What builds on what


def test_the_order_is_that_of_the_chapters_own_lines():
    assert CHAPTERS[1].builds_on == []
    assert CHAPTERS[11].builds_on == [3, 4, 5, 6]
    assert teaching.before(10) == [1, 2, 3, 7]
    assert teaching.nearest(10) == [3, 7]
    for number in CHAPTERS:  # what the picture leaves out follows from what it shows
        shown = set(teaching.nearest(number))
        assert shown.union(*map(teaching.before, shown)) == set(teaching.before(number))


def test_the_picture_has_a_box_for_each_chapter_and_fits_a_phone():
    root = ElementTree.fromstring(teaching.picture())
    boxes = [each for each in root.findall(".//{*}rect") if each.get("x")]
    assert len({(box.get("x"), box.get("y")) for box in boxes}) == len(CHAPTERS)
    assert int(root.get("width")) <= 390
    for box in boxes:
        assert int(box.get("x")) + int(box.get("width")) <= int(root.get("width"))
        assert int(box.get("y")) + int(box.get("height")) <= int(root.get("height"))
    lines = [path for path in root.findall(".//{*}path") if path.get("stroke")]
    assert len(lines) == sum(len(teaching.nearest(number)) for number in CHAPTERS)
    rows = {number: row for number, (row, _) in teaching.places().items()}
    for number in CHAPTERS:  # no line passes behind a box
        assert {rows[number] - rows[n] for n in teaching.nearest(number)} <= {1}


# Notes on chapters


@EVERY_CHAPTER
def test_a_chapter_has_its_notes(number):
    text = notes(number)
    heading = f"## Chapter {number}: {CHAPTERS[number].title}"
    assert text.partition("\n")[0].lower() == heading.lower()
    questions = re.findall(r"<summary>[^<]+\?</summary>\n\n\S", text)
    assert 3 <= len(questions) <= 5
    for part in ("**Show** [", "**Ask**", "**Set** ", "**What goes wrong.** "):
        assert part in text, part
    for block in (f"<!-- make chapter {number} -->", f"<!-- make mistakes {number} -->"):
        assert block in text


@EVERY_CHAPTER
def test_every_known_mistake_is_in_the_notes(number):
    said = re.sub(r"\\(.)", r"\1", notes(number))
    for exercise in exercises.chapters()[str(number)]:
        assert exercise.mistakes
        for sentence in exercise.mistakes:
            assert f"- {sentence}\n" in said


@EVERY_CHAPTER
def test_the_exercises_that_notes_name_are_the_chapters_own(number):
    parts = re.findall(r"^\*\*(?:Set|What goes wrong).+?(?=^<!--)", notes(number), re.M | re.S)
    own = {task.number for task in CHAPTERS[number].tasks}
    for part in parts:
        typed = re.sub(r"\[[^]]*\]\([^)]*\)|\(\d+\.\d+\)", "", part)
        assert set(re.findall(r"\b\d+\.\d+\b", typed)) <= own


@EVERY_CHAPTER
def test_a_chapter_has_exercises_of_several_kinds(number):
    tasks = CHAPTERS[number].tasks
    kinds = {task.kind for task in tasks}
    assert kinds <= KINDS
    if number <= 6:
        assert len(tasks) >= 5
        assert kinds == KINDS
    else:
        assert len(kinds) >= 3
        assert kinds & {"break on purpose", "predict before you run", "read a plot"}


def test_part_two_has_exercises_of_every_kind():
    tasks = [task for number in range(7, 12) for task in CHAPTERS[number].tasks]
    assert {task.kind for task in tasks} == KINDS


def test_the_kind_is_read_from_the_chapter():
    text = "### Exercise 1.1: A title\n\n*Difficulty: hard · 20 minutes · read a plot*\n"
    assert teaching.EXERCISE.search(text)["kind"] == "read a plot"
    assert not teaching.EXERCISE.search(text.replace(" · read a plot", ""))


def section_of(path, title):
    """The anchors of the headings in force where the cell of that title stands."""
    headings = {}
    for cell in book_source.read_notebook(path)["cells"]:
        source = book_source.source(cell)
        if cell["cell_type"] == "code":
            if re.match(rf"# @title (?:Figure|Table|Slider): {re.escape(title)}\n", source):
                return {book_source.anchor(heading) for heading in headings.values()}
            continue
        for marks, heading in re.findall(r"^(##+) (.+)$", source, flags=re.MULTILINE):
            headings = {level: h for level, h in headings.items() if level < len(marks)}
            headings[len(marks)] = heading
    return None


@EVERY_CHAPTER
def test_what_is_to_be_shown_is_there(number):
    shown = re.findall(r"\*\*Show\*\* \[([^]]+)\]\(\.\./([^)#]+)#([^)]+)\)", notes(number))
    assert shown
    for title, name, anchor in shown:
        assert name == CHAPTERS[number].path.name
        assert anchor in (section_of(teaching.FOLDER.parent / name, title) or ()), title


@EVERY_PAGE
def test_equations_that_are_named_exist(name):
    tags = {equation.tag for equation in ledger.equations()}
    assert set(re.findall(r"\((\d+\.\d+)\)", without_blocks(PAGES[name]))) <= tags


# Projects


def commands(text):
    """The commands of a project, in their words without the first, `dmd`."""
    (code,) = re.findall(r"```shell\n(.+?)```", text, flags=re.DOTALL)
    lines = [shlex.split(line) for line in code.replace("\\\n", "").splitlines()]
    assert {line[0] for line in lines} == {"dmd"}
    return [line[1:] for line in lines]


def test_there_are_six_projects():
    assert len(PROJECTS) == 6


@EVERY_PROJECT
def test_a_project_has_all_its_parts_and_commands_that_can_be_run(text):
    for part in ("**Question.** ", "**Budget.** ", "**Criterion.** ", "**Trap.** "):
        assert part in text, part
    made = [cli.parse(words) for words in commands(text)]
    assert any(hasattr(each, "settings") or isinstance(each, cli.Evaluate) for each in made)
    presets = {getattr(each, "preset", "demo") for each in made}
    named = set(re.findall(r"<!-- make budget (\S+) -->", text))
    assert named <= set(PRESETS)
    assert not named or presets & named
    measured = {word for words in commands(text) if words[0] == "evaluate" for word in words}
    for each, words in zip(made, commands(text), strict=True):
        if words[0] == "distill":  # every row that is trained is measured
            assert f"{each.out}/student.safetensors" in measured
    for each in made:
        start = getattr(each, "start", None)
        if start:  # a row of its own: from another row's regression, and not over its files
            assert str(each.out) != start.rpartition("/")[0]


@pytest.mark.parametrize("number", [2, 3])
def test_rows_that_are_said_to_cost_the_same_do(number):
    rows = [cli.parse(words) for words in commands(PROJECTS[number - 1]) if words[0] == "distill"]
    costs = {row.settings.steps * evaluations(row.settings) for row in rows}
    full = PRESETS["demo"].distill
    assert costs == {full.steps * evaluations(full)} if number == 2 else len(costs) == 1


def test_a_student_of_several_steps_costs_less_than_half_of_the_presets_distillation():
    full = PRESETS["digits"].distill
    for words in commands(PROJECTS[3])[:3]:
        settings = cli.parse(words).settings
        assert settings.steps * evaluations(settings) < full.steps * evaluations(full) / 2

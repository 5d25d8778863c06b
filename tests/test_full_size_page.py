"""The page "At full size" and its kin show no table without numbers, and take nothing for FID."""

import argparse
import json
import re

import book_source
import pytest
from PIL import Image

from benchmarks import full_size, plan, travel
from dmd_tutorial import notebook
from dmd_tutorial.runs import cli
from dmd_tutorial.runs.presets import PRESETS

PAGE = book_source.BOOK / "full-size.ipynb"
NOTEBOOK = book_source.read_notebook(PAGE)
NOTE = "JPEG re-encoded"
RESULTS = {
    "full-size": "# @title Table: what was measured at full size",
    "results": "# @title Table: CIFAR-10, small teacher",
}
BUDGET = "# @title Table: what an equal budget means"
PLAN = "# @title Code: the plan"
EMPTY = {"reduced": False, "rows": []}


def row(name, seed, frechet, note=NOTE, **others):
    """A made row, of the form that the benchmark writes."""
    return {
        "name": name, "seed": seed, "lease": 1, "frechet": frechet,
        "frechet_by_noise": [frechet - 0.01, frechet + 0.01], "recall": 0.5, "precision": 0.6,
        "floor": {"frechet": 0.125, "precision": 0.9, "recall": 0.9}, "samples": 50_000,
        "seconds": 360.0, "device": "a card", "note": note, **others,
    }  # fmt: skip


MADE = {
    "reduced": False,
    "stages": {},
    "rows": [
        row("teacher", 0, 1.5, frechet_by_noise=[1.5]),
        row("full", 0, 2.0),
        row("full", 1, 2.4),
        row("without anchor", 0, 3.0),
    ],
}


def cell(stem, first_line):
    """The source of the code cell that begins so."""
    cells = book_source.read_notebook(book_source.BOOK / f"{stem}.ipynb")["cells"]
    (found,) = (s for s in map(book_source.source, cells) if s.startswith(first_line))
    return found


def shown(monkeypatch, stem, report, *first_lines):
    """What cells show, those of the results or others, if this were recorded: tables, the rest."""
    tables, rest = [], []

    def recorded(name):
        there = json.loads((book_source.BOOK / "results" / f"{name}.json").read_text())
        return report if name == "cifar10-small" else there

    with monkeypatch.context() as patched:
        patched.setattr(notebook, "setup", lambda: None)
        names: dict = {}
        exec(cell(stem, "# @title Imports"), names)
    names |= {
        "recorded": recorded, "display": lambda thing: rest.append(getattr(thing, "data", thing)),
        "table": lambda head, rows: tables.append([list(head), *map(list, rows)]),
    }  # fmt: skip
    before = [PLAN] if stem == "full-size" else []
    for first_line in [*before, *(first_lines or [RESULTS[stem]])]:
        exec(cell(stem, first_line), names)
    return tables, rest


@pytest.mark.parametrize("stem", RESULTS)
def test_without_rows_a_few_sentences_stand_in_place_of_a_table(monkeypatch, stem):
    tables, (said,) = shown(monkeypatch, stem, EMPTY)
    assert not tables
    sentences = re.split(r"(?<=[.!?]) (?=[A-Z])", said)
    assert re.search("^No.* has been run on a GPU yet", sentences[0])
    assert len(sentences) <= 3
    assert said.endswith(".")


def test_the_page_says_first_that_nothing_was_run_and_minutes_are_counted():
    _, _, first, *_ = book_source.source(NOTEBOOK["cells"][0]).split("\n\n")
    report = json.loads((book_source.BOOK / "results" / "cifar10-small.json").read_text())
    assert bool(re.search("None .* has been run on a GPU yet", first)) == (not report["rows"])
    assert re.search("every minute .* is counted from operations, not measured", first)


def test_the_sentence_gives_the_small_measurement_with_its_note(monkeypatch):
    _, (sentence,) = shown(monkeypatch, "full-size", EMPTY)
    own_images = json.loads((book_source.BOOK / "results" / "own-images.json").read_text())
    draws = {
        r["name"]: [r["frechet"], *r.get("other_noise", [])] for r in own_images["rows"]
    }  # fmt: skip
    for name in ("regression", "student"):
        assert f"{sum(draws[name]) / len(draws[name]):.2f}" in sentence
    assert own_images["note"] in sentence
    assert "not FID" in sentence


@pytest.mark.parametrize("stem", RESULTS)
def test_with_rows_the_note_stands_beside_every_number(monkeypatch, stem):
    ((head, *rows),), sentences = shown(monkeypatch, stem, MADE)
    assert not sentences
    assert [re.sub(r"\W+", " ", r[0]).strip() for r in rows] == [
        "teacher",
        "full",
        "without anchor",
    ]
    assert any("not FID" in name for name in head)
    for line in rows:
        assert len(line) == len(head)
        assert NOTE in line[-1]
        assert any("a card" in str(value) for value in line)
        assert any("0.125" in str(value) for value in line)  # the floor


@pytest.mark.parametrize("stem", RESULTS)
def test_numbers_of_two_kinds_of_data_say_both(monkeypatch, stem):
    rows = [row("full", 0, 2.0), row("full", 1, 2.4, note="another crop")]
    ((_, line),), _ = shown(monkeypatch, stem, {**EMPTY, "rows": rows})
    assert NOTE in line[-1]
    assert "another crop" in line[-1]


def test_the_spread_of_trainings_and_that_of_measuring_stand_apart(monkeypatch):
    ((head, teacher, full, anchorless),), _ = shown(monkeypatch, "full-size", MADE)
    trainings, noise = (head.index(f"± over {of}") for of in ("seeds", "noise"))
    assert full[1] == "2.200"
    assert full[trainings] == "0.283 of 2"  # of 2.0 and 2.4
    assert full[noise] == "0.014"  # of x - 0.01 and x + 0.01
    assert anchorless[trainings] == "- of 1"
    assert (teacher[trainings], teacher[noise]) == ("- of 1", "-")


@pytest.mark.parametrize("stem", RESULTS)
def test_numbers_of_a_rehearsal_are_refused(monkeypatch, stem):
    with pytest.raises(AssertionError):
        shown(monkeypatch, stem, {**MADE, "reduced": True})


def test_no_page_shows_what_was_not_measured_as_a_row():
    for path in book_source.notebooks():
        text = path.read_text("utf8")
        assert "not yet measured" not in text, path.name


def test_the_page_says_that_its_distances_are_not_fid():
    assert "**They are not FID.**" in book_source.markdown(NOTEBOOK)


def test_the_page_names_presets_that_there_are():
    text = book_source.markdown(NOTEBOOK)
    named = set(
        re.findall(r"(?<![\w-])(cifar10-[a-z0-9-]*[a-z0-9])\b(?!-|\.(?:json|tar|png))", text)
    )
    assert {"cifar10-small", "cifar10-small-t4", "cifar10-t4"} <= named
    assert named <= {*PRESETS}


def test_the_page_calls_the_benchmark_with_options_that_it_has(capsys):
    text = re.sub(r"\\\n", " ", book_source.markdown(NOTEBOOK))
    calls = re.findall(r"-m benchmarks\.full_size (.*?)(?:;|$)", text, re.MULTILINE)
    assert len(calls) == 4
    with pytest.raises(SystemExit, match="0"):
        full_size.main(["--help"])
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    for call in calls:
        assert set(re.findall(r"--[\w-]+", call)) <= known, call


@pytest.mark.parametrize("lease", [1, 2])
def test_a_sitting_takes_as_many_calls_as_files_and_minutes_ask_for(tmp_path, lease):
    """Each call of 8.5 minutes, on an H100 as fast as hoped, on a bare machine: pairs anew."""
    options = argparse.Namespace(
        work=tmp_path, out=tmp_path, minutes=1.0, lease=lease, reduced=False
    )
    results, costs = full_size.Results(options, plan.Plan()), plan.counted(plan.Plan())["stages"]
    times = {(s["name"], s["seed"]): s["minutes"]["H100"] for s in costs}
    calls, spent, there, pairs = 1, 0.0, set(), set()
    for stage in results.stages:
        made = {path.name for path in [results.file, *results.files(stage)]}
        learns = stage.learns_from_pairs
        again = times["pairs", stage.seed] if learns and stage.seed not in pairs else 0.0
        time = times[stage.name, stage.seed] + again
        if len(there | made) > travel.FILES or spent + time > 8.5:
            time += times["pairs", stage.seed] if learns and not again else 0.0
            calls, spent, there, pairs = calls + 1, 0.0, set(), set()
        spent, there = spent + time, there | made
        pairs |= {stage.seed} if learns or stage.name == "pairs" else set()
    assert calls == 3
    assert "either sitting takes three calls or more" in book_source.markdown(NOTEBOOK)


def test_measured_minutes_stand_beside_the_counted_ones_once_there_are_some(monkeypatch):
    lines = BUDGET, "# @title Table: the stages"
    (_, (head, *rows)), _ = shown(monkeypatch, "full-size", EMPTY, *lines)
    assert not [name for name in head if "measured" in name]
    spent = {"teacher, seed 0, lease 1": {"seconds": 390.0, "device": "a card"}}
    (_, (longer, *more)), _ = shown(monkeypatch, "full-size", {**MADE, "stages": spent}, *lines)
    assert longer == [*head, "measured, min"]
    assert [line[:-1] for line in more] == rows
    assert {line[0]: line[-1] for line in more if line[-1]} == {"teacher": "6.5, a card"}
    for line in (head, *rows):
        assert len(line) == len(head)


def test_rows_are_compared_within_a_seed(monkeypatch):
    rows = [*MADE["rows"], row("without anchor", 1, 2.1), row("DMD2", 2, 1.0)]
    ((head, *lines),), _ = shown(monkeypatch, "full-size", {**MADE, "rows": rows})
    above = head.index("above full, by seed")
    said = {re.sub(r"\W+", " ", line[0]).strip(): line[above] for line in lines}
    assert said == {
        "teacher": "-",
        "full": "-",
        "without anchor": "+1.000, -0.300",
        "DMD2": "-",
    }


def test_the_distance_to_the_teacher_and_of_unseen_photographs_are_shown(monkeypatch):
    report = {
        **MADE, "unseen": {"frechet": 0.75, "floor": 0.25},
        "rows": [row("teacher", 0, 1.5), row("full", 0, 2.0, frechet_to_teacher=0.875)],
    }  # fmt: skip
    ((head, teacher, full),), (unseen,) = shown(monkeypatch, "full-size", report)
    to_teacher = head.index("to the teacher")
    assert (teacher[to_teacher], full[to_teacher]) == ("-", "0.875")
    assert "0.750" in unseen
    assert "0.250" in unseen


def test_budgets_are_those_of_the_plan(monkeypatch):
    ((_, *rows),), _ = shown(monkeypatch, "full-size", EMPTY, BUDGET)
    for name, line in zip(plan.VARIANTS, rows, strict=True):
        settings = plan.settings_of(plan.Stage(name, 0, 1), PRESETS["cifar10-small"])
        assert int(line[2].replace(",", "")) == settings.steps, name
        per_image = float(line[1].split("=")[-1])
        assert per_image * settings.batch == plan.evaluations(settings), name


def test_the_options_of_a_row_are_the_settings_of_the_plan(monkeypatch):
    ((_, *rows),), _ = shown(monkeypatch, "full-size", EMPTY, BUDGET)
    for name, line in zip(plan.VARIANTS, rows, strict=True):
        options = line[3].replace("`", "").split()
        options += ["--steps", line[2].replace(",", "")]
        made = cli.parse(["distill", "--preset", "cifar10-small", *options])
        assert made.settings == plan.settings_of(
            plan.Stage(name, 0, 1), PRESETS["cifar10-small"]
        ), name
        assert name != "DMD2" or not made.compute.compile


def test_samples_are_shown_with_their_row_and_note_where_they_lie(monkeypatch, tmp_path):
    (tmp_path / "results").mkdir()
    grid = tmp_path / "results" / "cifar10-small-without-anchor-0.png"
    Image.new("RGB", (330, 131)).save(grid)
    monkeypatch.chdir(tmp_path)
    _, (said, picture) = shown(monkeypatch, "full-size", MADE)
    assert said == f"*without anchor* {NOTE}"
    assert 'width="495" height="196"' in picture.source
    assert "without anchor" in picture.text

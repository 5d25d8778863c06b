"""Right answers with one thing changed: `check` refuses each, or the tool says which not."""

import ast
import sys
from dataclasses import replace

import mutants
import pytest
from answers import EXERCISES


@pytest.mark.parametrize("number", EXERCISES)
def test_no_changed_answer_is_let_through(number):
    found = mutants.score(EXERCISES[number])
    assert found.survivors == []
    assert found.tried > len(EXERCISES[number].mistakes)


def test_an_exercise_that_looks_away_lets_mutants_through():
    weak = replace(EXERCISES["1.6"], tolerance=0.46, mistakes={"too long": (1.5, 13.5)})
    assert mutants.score(weak).survivors == [
        "too long",
        "place 1: 1.0 -> 0.5",
        "place 2: 9.0 -> 4.5",
    ]
    blind = replace(EXERCISES["1.1"], probe=lambda answer, *given: answer(*given) is None)
    assert len(mutants.score(blind).survivors) > len(blind.mistakes)


def test_a_solution_that_is_refused_is_an_error():
    with pytest.raises(ValueError, match=r"the solution of 1.1 is refused"):
        mutants.score(replace(EXERCISES["1.1"], truth=lambda *given: 0.0))


def test_the_score_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mutants.py", "1.6", "2.1"])
    assert mutants.main() == 0
    total = sum(mutants.score(EXERCISES[number]).tried for number in ("1.6", "2.1"))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"mutation score: {total} of {total}, 100.00%"
    monkeypatch.setattr(mutants, "values", lambda exercise: [mutants.Mutant((1, 9), "", "")] * 2)
    assert mutants.main() == 1
    assert "let through:  -> " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("x + y", {"x - y"}),
        ("x - 1", {"x + 1", "1 - x", "x - 2"}),
        ("(x - y) ** 2", {"(x - y) * 2", "2 ** (x - y)", "(x + y) ** 2", "(x - y) ** 3"}),
        ("f(x, y)", {"f(y, x)"}),
        ("max(x, y)", set()),
        ("x.detach().mean()", {"x.clone().mean()", "x.detach().sum()"}),
        ("x >= -y", {"x > -y", "x >= +y"}),
    ],
)
def test_what_is_changed(before, after):
    (statement,) = ast.parse(before).body
    assert {ast.unparse(changed) for changed, _, _ in mutants.changed(statement)} == after

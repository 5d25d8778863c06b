"""What `check` says of the answers that students give, and what holds for every exercise."""

import answers_part1
import answers_part2
import pytest
import torch
from answers import EXERCISES, NO_GRADIENT, truth
from torch import Tensor

from dmd_tutorial.notebook.exercises import check

WRONG = answers_part1.WRONG + answers_part2.WRONG
RIGHT = answers_part1.RIGHT + answers_part2.RIGHT
FUNCTIONS = [number for number, exercise in EXERCISES.items() if callable(exercise.truth)]
TRAINED = [
    *("1.4", "3.5", "4.2", "5.3", "6.1"),
    *("8.1", "8.4", "9.4", "10.2", "10.3", "10.4", "11.3"),
]
NESTED = {"6.1"}  # whose result, as a list, is a list of lists: refused as such
NO_BATCH = {"1.2", "2.1", "3.1", "3.3"}  # a grid is no batch


def called_with(number):
    """What an answer is called with: one tuple for each input."""
    seen = []

    def answer(*given):
        seen.append(given)
        return truth(number)(*given)

    EXERCISES[number].outcome(answer)
    return seen


ARGUMENTS = {number: called_with(number) for number in FUNCTIONS}
CONSTANTS = [  # each number among the arguments, as it is in the first input
    (number, place, value)
    for number in FUNCTIONS
    for place, value in enumerate(ARGUMENTS[number][0])
    if isinstance(value, int | float | tuple | list)
]


@pytest.mark.parametrize(("number", "place", "value"), CONSTANTS)
def test_a_constant_cannot_stand_for_an_argument(number, place, value):
    def answer(*given):
        return truth(number)(*given[:place], value, *given[place + 1 :])

    assert check(number, answer).passed is False


@pytest.mark.parametrize("number", FUNCTIONS)
def test_inputs_differ_in_batch_and_shape(number):
    shapes = [[a.shape for a in given if isinstance(a, Tensor)] for given in ARGUMENTS[number]]
    for several in zip(*shapes, strict=True):
        assert len(set(several)) > 1
    if shapes[0] and number not in NO_BATCH:
        assert {1} < {several[0][0] for several in shapes}


@pytest.mark.parametrize("number", FUNCTIONS)
def test_what_was_right_once_is_not_right(number):
    kept = {}

    def answer(*given):
        return kept.setdefault("first", truth(number)(*given))

    assert check(number, answer).passed is False


def change(result, how):
    return tuple(map(how, result)) if isinstance(result, tuple) else how(result)


@pytest.mark.parametrize("number", FUNCTIONS)
@pytest.mark.parametrize(
    "how",
    [lambda r: r + 0j, lambda r: torch.as_tensor(r).double().mul(0.7).round(), lambda r: [r], str],
    ids=["complex", "rounded", "list", "text"],
)
def test_other_kinds_of_results_are_refused(number, how):
    assert check(number, lambda *a: change(truth(number)(*a), how)).passed is False


def fixed(given):
    """The tensors that no answer may change."""
    return [a for a in given if isinstance(a, Tensor) and not a.requires_grad]


@pytest.mark.parametrize("number", [n for n in FUNCTIONS if fixed(ARGUMENTS[n][0])])
def test_arguments_are_left_alone(number):
    def answer(*given):
        result = truth(number)(*given)
        with torch.no_grad():
            fixed(given)[-1].mul_(2).add_(1)
        return result

    assert "changes its argument" in check(number, answer).message


@pytest.mark.parametrize("number", TRAINED)
@pytest.mark.parametrize(
    "how", [Tensor.detach, lambda r: r.detach().numpy(), Tensor.tolist], ids=["held", "numpy", "to"]
)
def test_what_is_trained_gets_its_gradient(number, how):
    answer = check(number, lambda *a: change(truth(number)(*a), how))
    nested = how is Tensor.tolist and number in NESTED
    assert ("is asked for, not a list" if nested else NO_GRADIENT) in answer.message
    assert NO_GRADIENT in check(number, torch.no_grad()(truth(number))).message


@pytest.mark.parametrize(
    ("number", "answer", "sentence"),
    [pytest.param(n, answer, said, id=f"{n} {what}") for n, what, answer, said in WRONG],
)
def test_wrong_answers_are_refused_with_a_sentence_that_helps(number, answer, sentence):
    result = check(number, answer)
    assert result.passed is False
    assert sentence in result.message
    assert "factor -0" not in result.message
    assert "no use" not in result.message


def test_every_exercise_has_a_second_right_answer_and_more_wrong_ones():
    assert {number for number, _ in RIGHT} == set(EXERCISES)
    assert {number for number, *_ in WRONG} == set(EXERCISES)


@pytest.mark.parametrize(
    ("number", "answer"),
    [pytest.param(*each, id=f"{each[0]} #{i}") for i, each in enumerate(RIGHT)],
)
def test_right_answers_pass_in_whatever_form(number, answer):
    result = check(number, answer)
    assert result.passed is True, result

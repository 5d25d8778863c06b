"""The exercises' framework, and every exercise of every chapter against its wrong answers."""

import itertools
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmd_tutorial.notebook import exercises
from dmd_tutorial.notebook.exercises import (
    Exercise,
    Network,
    chapters,
    check,
    difference,
    gradients_by,
)

# Every exercise of the book

ALL = [exercise for chapter in chapters().values() for exercise in chapter]
MISTAKES = [(exercise, sentence) for exercise in ALL for sentence in exercise.mistakes]


def title(value):
    return value.number if isinstance(value, Exercise) else value[:40]


def test_numbers_are_unique_and_name_their_chapter():
    numbers = [exercise.number for exercise in ALL]
    assert len(set(numbers)) == len(numbers)
    for chapter, its_exercises in chapters().items():
        expected = [f"{chapter}.{i}" for i in range(1, len(its_exercises) + 1)]
        assert [exercise.number for exercise in its_exercises] == expected


@pytest.mark.parametrize("exercise", ALL, ids=title)
def test_the_truth_passes_and_agrees_with_itself(exercise):
    result = check(exercise.number, exercise.truth)
    assert result.passed is True, result


@pytest.mark.parametrize("exercise", ALL, ids=title)
def test_an_exercise_knows_wrong_answers(exercise):
    assert len(exercise.mistakes) >= 2


@pytest.mark.parametrize(("exercise", "sentence"), MISTAKES, ids=title)
def test_each_mistake_is_refused_with_its_own_message(exercise, sentence):
    result = exercise.check(exercise.mistakes[sentence])
    assert result.passed is False
    assert result.message == f"{exercise.number}, {exercise.name}: {sentence}"


@pytest.mark.parametrize("exercise", ALL, ids=title)
def test_no_two_answers_agree_on_the_inputs(exercise):
    answers = {"the truth": exercise.truth} | dict(exercise.mistakes)
    outcomes = {name: exercise.outcome(answer) for name, answer in answers.items()}
    for (one, found), (other, expected) in itertools.permutations(outcomes.items(), 2):
        assert difference(found, expected, exercise.tolerance) is not None, (one, other)


@pytest.mark.parametrize("exercise", ALL, ids=title)
def test_open_and_raising_answers_stop_nothing(exercise):
    def raises(*_, **__):
        raise RuntimeError("a slip of the learner")

    assert exercise.check(...).passed is None
    assert exercise.check(None).passed is None
    if callable(exercise.truth):
        assert exercise.check(lambda *_, **__: ...).passed is None
        assert exercise.check(raises).passed is False
        assert exercise.check(0.5).passed is False


@pytest.mark.parametrize("exercise", [e for e in ALL if callable(e.truth)], ids=title)
def test_a_forgotten_return_is_named_in_every_exercise(exercise):
    def forgotten(*given):
        exercise.truth(*given)

    result = exercise.check(forgotten)
    assert result.passed is False
    assert "is the `return` missing?" in result.message


# The framework


def variance(x):
    """Variance along the last axis."""
    return x.var(-1)


BIASED = "divide by n - 1: n makes the variance too small"
SPREAD = "the variance is asked for, not the standard deviation"
VARIANCE = Exercise(
    "0.1",
    "variance",
    truth=variance,
    mistakes={
        BIASED: lambda x: x.var(-1, correction=0),
        SPREAD: lambda x: x.std(-1),
        "keep the other axes": lambda x: x.var(),
        "the last axis has no name": lambda x: x.var(x.shape[-1]),
    },
    inputs=lambda: [(torch.tensor([[1.0, 2.0, 4.0], [0.0, 1.0, 5.0]]),), (torch.randn(4, 7),)],
)


@pytest.mark.parametrize(
    "answer",
    [
        variance,
        lambda x: x.numpy().var(-1, ddof=1),
        lambda x: x.numpy()[::-1].var(-1, ddof=1)[::-1],  # negative strides
        lambda x: x.var(-1).to_sparse(),
        lambda x: x.requires_grad_().var(-1),
        lambda x: x.double().var(-1),
        lambda x: x.var(-1).tolist(),
        torch.no_grad()(variance),
    ],
)
def test_right_answers_pass_in_whatever_form(answer):
    result = VARIANCE.check(answer)
    assert result.passed is True
    assert repr(result) == "✓ right: 0.1, variance, agrees with the reference"


def test_a_known_mistake_is_named():
    result = VARIANCE.check(lambda x: ((x - x.mean(-1, keepdim=True)) ** 2).mean(-1))
    assert repr(result) == f"✗ not yet: 0.1, variance: {BIASED}"


def test_a_mistake_that_raises_is_known_by_its_error():
    result = VARIANCE.check(lambda x: torch.var(x, dim=x.shape[-1]))
    assert result.message.endswith("the last axis has no name")


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (lambda x: x.var(-1, keepdim=True), "the shape is (2, 1), it should be (2,)"),
        (
            lambda x: 3 * x.var(-1),
            "yours is 21 at [1], too high; all numbers are off by the factor 3",
        ),
        (lambda x: x.var(-1) - x[:, 0], "yours is 1.3333 at [0], too low; 1 of 2 numbers differ"),
        (lambda x: 0 * x.var(-1), "yours is 0 everywhere"),
        (lambda x: x.var(-1) / 0, "2 of 2 numbers are infinite or not a number"),
        (lambda x: (x, x), "a tensor of shape (2,) is asked for, not a list of 2"),
        (lambda x: "high", "a tensor of shape (2,) is asked for, not 'high'"),
        (lambda x: list(x.var(-1)), "a tensor of shape (2,) is asked for, not a list of 2"),
        (lambda x: x.var(-1) + 0j, "(2,) is asked for, not a tensor of the type torch.complex64"),
        (lambda x: (v for v in x.var(-1)), "is asked for, not a generator"),
        (lambda x: np.array([None, 1]), "(2,) is asked for, not a tensor of the type object"),
        (lambda x: np.array(["a", "b"]), "(2,) is asked for, not a tensor of the type <U1"),
        (lambda x: torch.zeros(()).expand(10**9, 10**9), "it should be (2,)"),
        (lambda x: x.double().mul_(10).var(-1, keepdim=True).expand(2, 10**9), "it should be (2,)"),
    ],
)
def test_an_unknown_mistake_is_described(answer, sentence):
    message = VARIANCE.check(answer).message
    assert message.startswith("0.1, variance: input 1 of 2: ")
    assert sentence in message


@pytest.mark.parametrize(
    "answer", [lambda x: x.var(-1).to("meta"), lambda x: [1, 10**400], lambda x: 10**400]
)
def test_what_cannot_be_compared_is_no_error(answer):
    assert "your answer cannot be compared: " in VARIANCE.check(answer).message


def slip(x):
    """An answer with a slip in its second line."""
    y = x.mean(-1)
    return y / unknown_name


def test_an_error_is_shown_with_the_line_it_came_from():
    result = VARIANCE.check(slip)
    assert result.passed is False
    assert "NameError: name 'unknown_name' is not defined" in result.message
    assert "at your line `return y / unknown_name" in result.message


def test_wrong_numbers_of_parameters_are_shown():
    assert "takes 0 positional arguments but 1 was given" in VARIANCE.check(lambda: 1).message


def not_written(x):
    raise NotImplementedError


def not_written_yet(x):
    raise NotImplementedError("your code here")


def passed_over(x):
    """Nothing is done here."""


@pytest.mark.parametrize(
    "answer",
    [
        ...,
        None,
        lambda x: ...,
        lambda x: None,
        lambda x: NotImplemented,
        lambda x: (x, ...),
        lambda x: [..., x],
        not_written,
        not_written_yet,
        passed_over,
    ],
)
def test_unattempted_answers_are_open(answer):
    result = VARIANCE.check(answer)
    assert result.passed is None
    assert repr(result) == "… open: 0.1 is not attempted yet"


def test_a_value_is_no_function_and_the_other_way_round():
    assert "a function is asked for, not a tensor" in VARIANCE.check(torch.ones(2)).message
    assert "a value is asked for, not a function" in COUNT.check(lambda: 35).message


COUNT = Exercise(
    "0.2",
    "number of evaluations",
    truth=35,
    mistakes={"the last step is an Euler step": 36, "Heun evaluates twice": 18},
)


@pytest.mark.parametrize(
    ("answer", "passed", "message"),
    [
        (35, True, "agrees"),
        (35.0, True, "agrees"),
        (np.int64(35), True, "agrees"),
        (36, False, "the last step is an Euler step"),
        (18, False, "Heun evaluates twice"),
        (17, False, "evaluations: yours is 17, which is not right"),
        (35 + 1j, False, "a number is asked for, not a complex"),
        (np.complex128(35), False, "a number is asked for, not a complex128"),
        (torch.tensor(35 + 1j), False, "not a tensor of the type torch.complex64"),
        (torch.tensor([1, 2]), False, "a number is asked for, not a tensor of shape (2,)"),
        ("many", False, "a number is asked for, not 'many'"),
        (..., None, "not attempted"),
    ],
)
def test_values_are_checked_like_functions(answer, passed, message):
    result = COUNT.check(answer)
    assert result.passed is passed
    assert message in result.message


THREE = Exercise(
    "0.9",
    "three numbers",
    truth=(0.5, 20.0, 1.0),
    mistakes={"that is what is missing": (0.7, 20.0, 1.0), "per cent": (0.5, 0.2, 1.0)},
    tolerance=(0.05, 4.0, 0.0),
)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([0.55, 16, 1], "agrees with the reference"),
        (np.array([0.45, 24, 1]), "agrees with the reference"),
        ((0.56, 20, 1), "result 1: yours is 0.56"),
        ((0.5, 20, 1.01), "result 3: yours is 1.01"),
        ((0.7, 20, 1), "that is what is missing"),
        ((0.7, 100, 9), "that is what is missing"),  # of several slips the first is named
        (torch.tensor([0.5, 0.2, 9]), "per cent"),
        ((0.1, 0.2, 1), "result 1: yours is 0.1"),
        ((0.7, 20), "a list of 3 is asked for, not a list of 2"),
        (torch.tensor(0.7), "a list of 3 is asked for, not a tensor of shape ()"),
    ],
)
def test_each_of_several_values_has_its_own_tolerance_and_sentence(answer, message):
    assert message in THREE.check(answer).message


def test_words_are_compared_without_their_case_in_singular_or_plural():
    choice = Exercise("0.3", "direction", truth="reverse", mistakes={"that covers": "forward"})
    assert choice.check(" Reverse ").passed is True
    assert choice.check("reverses").passed is True
    assert choice.check("FORWARD").message.endswith("that covers")
    assert choice.check("both").message.endswith("'both' is not the answer")
    assert choice.check(1).message.endswith("a word is asked for, not a number")


def loss_and_gradient(answer, x, target):
    x = x.clone().requires_grad_()
    loss = answer(x, target * x)
    (gradient,) = torch.autograd.grad(loss, x)
    return {"loss": loss, "gradient": gradient}


def test_a_result_is_true_if_the_answer_is_right():
    assert COUNT.check(35)
    assert not COUNT.check(36)
    assert not COUNT.check(...)


@pytest.mark.parametrize("wrong", [34, 34.5, -35, float("nan"), float("inf"), 0])
def test_the_right_number_is_not_told(wrong):
    assert "35" not in COUNT.check(wrong).message.replace(str(wrong), "")


def forgotten(x):
    x.var(-1)


def printed(x):
    print(x.var(-1))


@pytest.mark.parametrize("answer", [forgotten, printed])
def test_a_forgotten_return_is_an_answer(answer):
    assert VARIANCE.check(answer).message.endswith("None is no answer: is the `return` missing?")


def unready(x):
    return torch.ones(2, dtype=torch.int).log_softmax(0)


def test_what_torch_has_not_implemented_was_attempted():
    assert "NotImplementedError" in VARIANCE.check(unready).message


def leaves(x):
    sys.exit()


def breaks(x):
    raise GeneratorExit


@pytest.mark.parametrize("answer", [leaves, breaks])
def test_answers_that_leave_python_are_answers(answer):
    assert f"your code raised {'SystemExit' if answer is leaves else 'GeneratorExit'}" in (
        VARIANCE.check(answer).message
    )


def interrupted(x):
    raise KeyboardInterrupt


def test_the_keyboard_still_interrupts():
    with pytest.raises(KeyboardInterrupt):
        VARIANCE.check(interrupted)


def endless(x):
    while True:
        pass


def stubborn(x):
    while True:
        try:
            x.var(-1)
        except:  # noqa: E722 - what is under test
            x = 1 * x


@pytest.mark.parametrize("answer", [endless, stubborn])
def test_an_endless_answer_is_stopped(answer, monkeypatch):
    monkeypatch.setattr(exercises, "SECONDS", 0.1)
    before = signal.getsignal(signal.SIGPROF)
    result = VARIANCE.check(answer)
    assert result.message.endswith("did not come to an end within 0.1 seconds of computing")
    assert signal.getsignal(signal.SIGPROF) is before
    assert signal.getitimer(signal.ITIMER_PROF) == (0, 0)


def test_answers_are_checked_outside_of_the_main_thread():
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(VARIANCE.check, variance).result().passed is True


def unsettled(x):
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.manual_seed(1)
    return x.var(-1)


def test_what_an_answer_changes_in_torch_is_put_back():
    before = torch.get_rng_state()
    assert VARIANCE.check(unsettled).passed is True
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)


def test_an_answer_that_changes_its_argument_is_refused():
    result = VARIANCE.check(
        lambda x: x.sub_(x.mean(-1, keepdim=True)).square().sum(-1) / (x.shape[-1] - 1)
    )
    assert result.message.endswith("it changes its argument 1: make a new tensor instead")


STOPPED = Exercise(
    "0.4",
    "loss with a fixed target",
    truth=lambda x, target: ((x - target.detach()) ** 2).mean(),
    mistakes={"stop the gradient": lambda x, target: ((x - target) ** 2).mean()},
    inputs=lambda: [(torch.randn(5), 0.5)],
    probe=loss_and_gradient,
)


def test_a_probe_sees_a_missing_stop_gradient():
    assert STOPPED.check(lambda x, y: (x - y.detach()).square().mean()).passed is True
    assert STOPPED.check(lambda x, y: (x - y).square().mean()).message.endswith("stop the gradient")
    other = STOPPED.check(lambda x, y: (x.detach() - y).square().mean())
    assert "gradient: yours is" in other.message
    assert "loss: yours is" in STOPPED.check(lambda x, y: (x - y.detach()).abs().mean()).message


def test_a_leaf_that_no_loss_depends_on_has_a_gradient_of_zero():
    probe = gradients_by({"by x": 0, "by y": 1})
    found = probe(lambda x, y: (3 * x).sum(), torch.ones(2), torch.ones(3))
    assert {name: value.tolist() for name, value in found.items()} == {
        "loss": 6, "by x": [3, 3], "by y": [0, 0, 0]
    }  # fmt: skip
    assert probe(lambda x, y: "high", torch.ones(2), torch.ones(3))["by x"].tolist() == [0, 0]


TRAINED = Exercise(
    "0.8",
    "loss of a network",
    truth=lambda net, x, sigma: (sigma * net(x, sigma).square().sum(1)).mean(),
    mistakes={},
    inputs=lambda: [(Network(lambda p, x, sigma: p * x + sigma), torch.randn(3, 2), torch.rand(3))],
    probe=gradients_by({"gradient that reaches the network": 0, "gradient at x": 1}),
)


def right_loss(net, x, sigma):
    return TRAINED.truth(net, x, sigma)


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (
            lambda *a: right_loss(*a).detach(),
            "no gradient arrives anywhere: a .detach()",
        ),
        (lambda *a: right_loss(*a).item(), "no gradient arrives anywhere: a .detach()"),
        (torch.no_grad()(right_loss), "no gradient arrives anywhere: a .detach()"),
        (torch.inference_mode()(right_loss), "no gradient arrives anywhere"),
        (lambda net, x, s: right_loss(net, x.detach(), s), "gradient at x: yours is 0 everywhere"),
        (
            lambda net, x, s: right_loss(net, x, 0.5),
            "asks for one level for each sample, (3,), not a number",
        ),
        (lambda net, x, s: right_loss(net, x, s[:, None]), "not a tensor of shape (3, 1)"),
        (lambda *a: "high", "a tensor of shape () is asked for, not 'high'"),
        (lambda *a: [right_loss(*a)], "a tensor of shape () is asked for, not a list of 1"),
        (
            lambda *a: right_loss(*a) + 0j,
            "() is asked for, not a tensor of the type torch.complex64",
        ),
        (
            lambda net, x, s: right_loss(net, x, s) * torch.ones(2),
            "a tensor of shape () is asked for, not a tensor of shape (2,)",
        ),
        (lambda net, x, s: 2 * right_loss(net, x, s), "loss: "),
    ],
)
def test_what_is_trained_must_get_its_gradient(answer, sentence):
    assert sentence in TRAINED.check(answer).message


def test_right_losses_of_a_network_pass():
    assert TRAINED.check(right_loss).passed is True
    flat = TRAINED.check(lambda n, x, s: torch.einsum("b,bd,bd->", s, n(x, s), n(x, s)) / 3)
    assert flat.passed is True


def test_an_error_after_the_return_is_not_called_the_learners():
    after = Exercise("0.9", "a pair", lambda x: (x, x), {}, lambda: [(1.0,)],
                     probe=lambda answer, x: answer(x)[0] + 1)  # fmt: skip
    message = after.check(lambda x: {"first": x}).message
    assert message.endswith("what your function returns is no use: KeyError(0)")


def moved(answer, average, new):
    answer(average, new)
    return average


IN_PLACE = Exercise(
    "0.5",
    "moving average",
    truth=lambda average, new: average.lerp_(new, 0.1) and None,
    mistakes={"nothing has moved": lambda average, new: None},
    inputs=lambda: [(torch.tensor([1.0]), torch.tensor([2.0]))],
    probe=moved,
    in_place=True,
)


def test_answers_in_place_return_nothing_and_start_afresh():
    def answer(average, new):
        average += 0.1 * (new - average)

    assert [IN_PLACE.check(answer).passed for _ in range(2)] == [True, True]
    assert IN_PLACE.check(lambda average, new: None).message.endswith("nothing has moved")
    assert IN_PLACE.check(lambda average, new: ...).passed is None
    spoilt = IN_PLACE.check(lambda average, new: average.lerp_(new.mul_(1.0).add_(1), 0.1))
    assert "changes its argument 2" in spoilt.message


def test_random_answers_see_the_same_noise_and_leave_the_state_alone():
    noisy = Exercise(
        "0.6",
        "noising",
        truth=lambda x, sigma: x + sigma * torch.randn_like(x),
        mistakes={"sigma is a standard deviation": lambda x, s: x + s**0.5 * torch.randn_like(x)},
        inputs=lambda: [(torch.randn(4), 2.0)],
    )
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert noisy.check(lambda x, sigma: x + torch.randn_like(x) * sigma).passed is True
    assert torch.equal(torch.get_rng_state(), before)


def test_answers_may_take_gradients_inside_no_grad():
    with torch.no_grad():
        assert STOPPED.check(STOPPED.truth).passed is True


class TwoResults(torch.nn.Module):
    def forward(self, x):
        return {"mean": x.mean(-1), "variance": x.var(-1)}


def test_parts_of_a_result_are_named_and_modules_are_functions():
    both = Exercise(
        "0.7", "moments", truth=TwoResults(), mistakes={}, inputs=lambda: [(torch.arange(4.0),)]
    )
    assert both.check(TwoResults()).passed is True
    biased = both.check(lambda x: {"mean": x.mean(-1), "variance": x.var(-1, correction=0)})
    assert "variance: yours is 1.25, which is not right" in biased.message
    assert "not a dict with ['mean']" in both.check(lambda x: {"mean": x}).message


@given(
    values=st.lists(st.floats(-80, 80).filter(lambda v: v == 0 or abs(v) > 1e-4), min_size=1),
    where=st.integers(0, 7),
    relative=st.sampled_from([1e-7, 1e-2]),
)
@settings(deadline=None)
def test_the_tolerance_is_relative_to_the_largest_number(values, where, relative):
    expected = torch.tensor(values, dtype=torch.float64)
    found = expected.clone()
    place = where % len(values)
    found[place] += relative * max(abs(expected[place].item()), min(expected.abs().max().item(), 1))
    no_change = relative == 1e-7 or torch.equal(found, expected)
    assert (difference(found, expected, 1e-4) is None) is no_change


def test_small_results_are_held_to_a_small_tolerance():
    expected = torch.tensor([2e-6, 4e-6])
    assert difference(expected * 1.5, expected, 1e-4) is not None
    assert difference(expected * (1 + 1e-5), expected, 1e-4) is None


def test_rounding_in_the_place_of_a_zero_is_no_difference():
    assert difference(torch.tensor([3e-17]), torch.tensor([-1e-16]), 1e-4) is None
    assert difference(torch.tensor([3e-17]), torch.tensor([0.0]), 1e-4) is None


def test_lists_arrays_and_tensors_of_the_same_numbers_agree():
    for found, expected in itertools.product(
        [[1, 2], np.array([1, 2]), torch.tensor([1, 2])], repeat=2
    ):
        assert difference(found, expected, 1e-4) is None
    assert difference([1, 2, 3], [1, 2], 1e-4) is not None


def test_nothing_is_compared_with_nothing():
    assert difference({"gradient": None}, {"gradient": None}, 1e-4) is None
    assert "gradient: " in difference({"gradient": torch.ones(1)}, {"gradient": None}, 1e-4)


def test_an_unknown_exercise_is_refused(monkeypatch):
    monkeypatch.setattr(exercises, "chapters", lambda: {"0": [VARIANCE, COUNT]})
    assert check("0.2", 35).passed is True
    with pytest.raises(ValueError, match=r"no exercise '0.9'; chapter 0 has \['0.1', '0.2'\]"):
        check("0.9", 35)


def test_a_result_is_escaped_for_the_page():
    html = COUNT.check("<b>")._repr_html_()
    assert "&lt;b&gt;" in html
    assert "<b>" not in html


def test_check_chooses_no_display_and_loads_no_command_line():
    command = """if True:
        import sys
        import matplotlib
        from dmd_tutorial.notebook import check
        assert check("1.1", ...).passed is None
        assert not isinstance(dict.get(matplotlib.rcParams, "backend"), str), "a backend is chosen"
        assert not [name for name in sys.modules if name.startswith("dmd_tutorial.runs")]
        assert "tyro" not in sys.modules"""
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "MPLBACKEND")}
    done = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr

"""Exercises that say *what* is wrong.

An exercise knows its right answer and the plausible wrong ones, each with the sentence that helps
the learner who gave it. `check` runs the learner's answer on the exercise's inputs and compares
what comes out: with the truth, then with each mistake. It never raises on an answer, so that a
notebook runs through whether its exercises are solved, wrong, or not attempted.

The exercises stand in `chapter1.py`, `chapter2.py`, ..., each with a list `EXERCISES`.
"""

import html
import importlib
import pkgutil
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

SIGNS = {True: "✓ right", False: "✗ not yet", None: "… open"}


@dataclass(frozen=True)
class Result:
    """What a check found; a notebook shows it as one sentence that starts with a sign.

    Attributes:
        passed: True or False; None if the exercise was not attempted.
        message: The sentence.
    """

    passed: bool | None
    message: str

    def __repr__(self) -> str:
        return f"{SIGNS[self.passed]}: {self.message}"

    def _repr_html_(self) -> str:
        return (
            f"<p style='margin:0'>{html.escape(repr(self))}</p>"  # wraps, as plain output does not
        )


class NotAttemptedError(Exception):
    """The learner has left the answer open."""


@dataclass(frozen=True)
class Raised:
    """The outcome of an answer that raised: the error, and the learner's line it came from."""

    error: str
    line: str


def call(answer: Callable[..., Any], *arguments: Any) -> Any:
    """The usual probe: what an answer returns is what is compared."""
    return answer(*arguments)


@dataclass(frozen=True)
class Exercise:
    """An exercise: its right answer, and the wrong ones that it can name.

    Attributes:
        number: Chapter and place in it, such as "3.2".
        name: What is asked for, as a noun.
        truth: The right answer: a function, or a value.
        mistakes: For each wrong answer (a function or a value, like the truth) the sentence that
            helps the learner who gave it: {sentence: wrong answer}.
        inputs: Makes the argument tuples on which functions are compared; called afresh for each
            answer, because an answer may change its arguments.
        tolerance: Largest relative difference that counts as none; see `difference`.
        probe: `probe(answer, *arguments)` says what is compared, where that is more than what the
            answer returns: gradients, or a module after the call. A dict names the parts.
        in_place: The answer changes an argument and returns nothing, so that None is no sign of
            an open answer.
    """

    number: str
    name: str
    truth: Any
    mistakes: Mapping[str, Any]
    inputs: Callable[[], Sequence[tuple]] = lambda: [()]
    tolerance: float = 1e-4
    probe: Callable[..., Any] = call
    in_place: bool = False

    def check(self, answer: Any) -> Result:
        """Say whether an answer is right and, if not, what is wrong with it.

        Args:
            answer: The learner's function or value; Ellipsis or None if there is none yet.

        Returns:
            The result; nothing is raised, whatever the answer does.
        """
        if callable(self.truth) != callable(answer) and not _is_open(answer):
            asked = "a function" if callable(self.truth) else "a value"
            return self._wrong(f"{asked} is asked for, not {_describe(answer)}")
        try:
            found = self.outcome(answer)
        except NotAttemptedError:
            return Result(None, f"{self.number} is not attempted yet")
        trouble = difference(found, self.outcome(self.truth), self.tolerance)
        if trouble is None:
            return Result(True, f"{self.number}, {self.name}, agrees with the reference")
        for sentence, mistake in self.mistakes.items():
            if difference(found, self.outcome(mistake), self.tolerance) is None:
                return self._wrong(sentence)
        return self._wrong(trouble)

    def _wrong(self, sentence: str) -> Result:
        return Result(False, f"{self.number}, {self.name}: {sentence}")

    def outcome(self, answer: Any) -> Any:
        """Run an answer on the inputs, each answer with the same random numbers.

        Args:
            answer: A function, or a value.

        Returns:
            The value; for a function {"input 1 of n": what the probe saw, ...}, or `Raised`.

        Raises:
            NotAttemptedError: If the answer is open, or returns or raises what stands for that.
        """
        if _is_open(answer):
            raise NotAttemptedError
        if not callable(answer):
            return answer

        def watched(*arguments: Any, **named: Any) -> Any:
            returned = answer(*arguments, **named)
            if _is_open(returned) and not (self.in_place and returned is None):
                raise NotAttemptedError
            return returned

        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(0)
            inputs = self.inputs()
            names = [f"input {i} of {len(inputs)}" for i in range(1, len(inputs) + 1)]
            if len(inputs) == 1:
                names = [""]
            try:
                return {
                    name: self.probe(watched, *arguments)
                    for name, arguments in zip(names, inputs, strict=True)
                }
            except (NotAttemptedError, NotImplementedError) as error:
                raise NotAttemptedError from error
            except Exception as error:
                return Raised(f"{type(error).__name__}: {error}", _line_of(answer, error))


def check(number: str, answer: Any) -> Result:
    """Check an answer to an exercise of the book.

    Args:
        number: The exercise, such as "1.2".
        answer: The learner's function or value.

    Returns:
        The result, which a notebook shows as one sentence.

    Raises:
        ValueError: If the book has no such exercise.
    """
    chapter = number.partition(".")[0]
    numbers = [exercise.number for exercise in chapters().get(chapter, [])]
    if number not in numbers:
        raise ValueError(f"there is no exercise {number!r}; chapter {chapter} has {numbers}")
    return chapters()[chapter][numbers.index(number)].check(answer)


def chapters() -> dict[str, list[Exercise]]:
    """The exercises of each chapter, by the chapter's number as text."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    return {
        name.removeprefix("chapter"): importlib.import_module(f"{__name__}.{name}").EXERCISES
        for name in names
        if name.startswith("chapter")
    }


def difference(found: Any, expected: Any, tolerance: float) -> str | None:
    """Say where and by how much an outcome is not what was expected.

    Args:
        found: Numbers, arrays, tensors, strings, None, or sequences and dicts of these.
        expected: The outcome of the right answer.
        tolerance: Largest relative difference that counts as none. The largest absolute one is
            the same where results reach one, and down to a thousandth of it where all of them are
            smaller.

    Returns:
        A sentence, or None if there is no difference.
    """
    if isinstance(found, Raised):
        same = isinstance(expected, Raised) and found.error == expected.error
        return None if same else f"your code raised {found.error}{found.line}"
    if isinstance(expected, Raised):
        return "your code should have raised an error"
    if isinstance(expected, Mapping):
        if not isinstance(found, Mapping) or set(found) != set(expected):
            return f"{_describe(expected)} is asked for, not {_describe(found)}"
        return _first_difference([(k, found[k], expected[k]) for k in expected], tolerance)
    if isinstance(expected, list | tuple):
        found = list(found) if isinstance(found, Tensor | np.ndarray) and found.ndim else found
        if not isinstance(found, list | tuple) or len(found) != len(expected):
            return f"{_describe(expected)} is asked for, not {_describe(found)}"
        names = [f"result {i}" for i in range(1, len(expected) + 1)]
        return _first_difference(list(zip(names, found, expected, strict=True)), tolerance)
    if isinstance(expected, str) and isinstance(found, str):
        same = found.strip().lower() == expected.strip().lower()
        return None if same else f"{found!r} is not the answer"
    wanted, got = _numbers(expected), _numbers(found)
    if wanted is not None and got is not None:
        return _numeric_difference(got, wanted, tolerance)
    if wanted is None and got is None and type(found) is type(expected) and found == expected:
        return None
    return f"{_describe(expected)} is asked for, not {_describe(found)}"


def _first_difference(parts: list[tuple[str, Any, Any]], tolerance: float) -> str | None:
    """The first difference among named parts, with the name of the part."""
    for name, found, expected in parts:
        trouble = difference(found, expected, tolerance)
        if trouble is not None:
            return f"{name}: {trouble}" if name else trouble
    return None


def _numeric_difference(found: Tensor, expected: Tensor, tolerance: float) -> str | None:
    """The difference between two float64 tensors."""
    if found.shape != expected.shape:
        return f"the shape is {tuple(found.shape)}, it should be {tuple(expected.shape)}"
    size = expected[expected.isfinite()].abs().flatten().tolist()
    # never below a thousandth: there only rounding would be compared
    absolute = tolerance * min(1.0, max(size, default=1.0) + 1e-3)
    close = torch.isclose(found, expected, rtol=tolerance, atol=absolute, equal_nan=True)
    if close.all():
        return None
    bad = ~found.isfinite() & expected.isfinite()
    if bad.any():
        return f"{int(bad.sum())} of {bad.numel()} numbers are infinite or not a number"
    error = (found - expected).abs().masked_fill(close, -1)
    worst = int(error.argmax())
    yours, right = found.flatten()[worst].item(), expected.flatten()[worst].item()
    where = [int(index) for index in np.unravel_index(worst, tuple(found.shape))]
    place = f" at {where}" if where else ""
    sentence = f"yours is {yours:.5g}{place}, it should be {right:.5g}"
    if (
        expected.numel() > 1
        and right
        and torch.allclose(found, expected * (yours / right), rtol=tolerance, atol=absolute)
    ):
        return f"{sentence}; all numbers are off by the factor {yours / right:.5g}"
    return f"{sentence}; {int((~close).sum())} of {close.numel()} numbers differ"


def _numbers(value: Any) -> Tensor | None:
    """A number, an array or a flat list of numbers as a float64 tensor, or None."""
    flat = value if isinstance(value, list | tuple) else [value]
    if isinstance(value, Tensor | np.ndarray) or all(
        isinstance(each, int | float | np.number | np.bool_) for each in flat
    ):
        return torch.as_tensor(value).detach().cpu().to(torch.float64)
    return None


def _is_open(value: Any) -> bool:
    """Whether a value stands for an answer that was not given."""
    if isinstance(value, tuple):
        return any(each is Ellipsis for each in value)
    return value is Ellipsis or value is None or value is NotImplemented


def _describe(value: Any) -> str:
    """A value in words for a learner."""
    if isinstance(value, Tensor | np.ndarray):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a dict with {sorted(map(str, value))}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    if callable(value):
        return "a function"
    return "a number" if _numbers(value) is not None else repr(value)


def _line_of(answer: Callable[..., Any], error: Exception) -> str:
    """The learner's own line that an error came from, or nothing if it came from elsewhere."""
    code = getattr(answer, "__code__", None) or getattr(
        getattr(answer, "forward", None), "__code__", None
    )
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if code is not None and frame.filename == code.co_filename and frame.line:
            return f" at your line `{frame.line}`"
    return ""

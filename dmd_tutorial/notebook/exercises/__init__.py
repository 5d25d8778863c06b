"""Exercises that say *what* is wrong.

`check` runs the learner's answer on an exercise's inputs and compares what comes out: with the
truth, then with each mistake that the exercise knows. It never raises on an answer: a notebook runs
through. The exercises stand in `chapter1.py`, `chapter2.py`, ..., each with a list `EXERCISES`.
"""

import html
import importlib
import pkgutil
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

SIGNS = {True: "✓ right", False: "✗ not yet", None: "… open"}


@dataclass(frozen=True)
class Result:
    """What a check found; a notebook shows it as one sentence that starts with a sign."""

    passed: bool | None  # None if the exercise was not attempted
    message: str

    def __repr__(self) -> str:
        return f"{SIGNS[self.passed]}: {self.message}"

    def _repr_html_(self) -> str:  # wraps, as plain output does not
        return f"<p style='margin:0'>{html.escape(repr(self))}</p>"


class Raised(NamedTuple):
    """The outcome of an answer that raised."""

    error: str
    line: str  # of the learner, that it came from


def loss_and_gradients(loss: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """For a probe: a loss and its gradients by name, zeros where none arrives."""
    found = tuple(map(torch.zeros_like, leaves.values()))
    if loss.requires_grad:
        found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return {"loss": loss.detach(), **dict(zip(leaves, found, strict=True))}


def gradients_by(places: Mapping[str, int]) -> Callable[..., dict[str, Tensor]]:
    """A probe for a loss: its value, and its gradients by the arguments at these places."""

    def probe(answer: Callable[..., Tensor], *arguments: Any) -> dict[str, Tensor]:
        given = list(arguments)
        for place in places.values():
            given[place] = given[place].clone().requires_grad_()
        return loss_and_gradients(answer(*given), {name: given[i] for name, i in places.items()})

    return probe


@dataclass(frozen=True)
class Exercise:
    """An exercise: its right answer, and the wrong ones that it can name."""

    number: str  # chapter and place in it, such as "3.2"
    name: str  # what is asked for, as a noun
    truth: Any  # the right answer: a function, or a value
    mistakes: Mapping[str, Any]  # {sentence that helps the learner who gave it: wrong answer}
    # the tuples of arguments that functions are compared on; each answer may change its own
    inputs: Callable[[], Sequence[tuple]] = lambda: [()]
    tolerance: float = 1e-4  # largest relative difference that counts as none; see `difference`
    # what is compared, if more than what is returned: gradients, a module after the call; by name
    probe: Callable[..., Any] = lambda answer, *arguments: answer(*arguments)
    in_place: bool = False  # the answer changes an argument: None is no sign of an open answer

    def check(self, answer: Any) -> Result:
        """Say whether an answer (open: Ellipsis or None) is right and, if not, what is wrong."""
        if callable(self.truth) != callable(answer) and not _is_open(answer):
            asked = "a function" if callable(self.truth) else "a value"
            return self._wrong(f"{asked} is asked for, not {_describe(answer)}")
        try:
            found = self.outcome(answer)
        except NotImplementedError:
            return Result(None, f"{self.number} is not attempted yet")
        if not (trouble := difference(found, self.outcome(self.truth), self.tolerance)):
            return Result(True, f"{self.number}, {self.name}, agrees with the reference")
        for sentence, mistake in self.mistakes.items():
            if difference(found, self.outcome(mistake), self.tolerance) is None:
                return self._wrong(sentence)
        return self._wrong(trouble)

    def _wrong(self, sentence: str) -> Result:
        return Result(False, f"{self.number}, {self.name}: {sentence}")

    def outcome(self, answer: Any) -> Any:
        """A value as it is; of a function {"input 1 of n": what the probe saw}, or `Raised`.

        All answers see the same random numbers. An open one raises `NotImplementedError`.
        """
        if _is_open(answer):
            raise NotImplementedError
        if not callable(answer):
            return answer

        def watched(*arguments: Any, **named: Any) -> Any:
            returned = answer(*arguments, **named)
            if _is_open(returned) and not (self.in_place and returned is None):
                raise NotImplementedError
            return returned

        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(0)
            inputs = self.inputs()
            name = "input {} of {}" if len(inputs) > 1 else ""
            try:
                return {
                    name.format(i, len(inputs)): self.probe(watched, *arguments)
                    for i, arguments in enumerate(inputs, 1)
                }
            except NotImplementedError:
                raise
            except Exception as error:
                return Raised(f"{type(error).__name__}: {error}", _line_of(answer, error))


def check(number: str, answer: Any) -> Result:
    """Check a function or value given as the answer to an exercise of the book, such as "1.2"."""
    chapter = number.partition(".")[0]
    exercises = {exercise.number: exercise for exercise in chapters().get(chapter, [])}
    if number not in exercises:
        raise ValueError(f"there is no exercise {number!r}; chapter {chapter} has {[*exercises]}")
    return exercises[number].check(answer)


def chapters() -> dict[str, list[Exercise]]:
    """The exercises of each chapter, by the chapter's number as text."""
    numbers = [module.name.removeprefix("chapter") for module in pkgutil.iter_modules(__path__)]
    return {n: importlib.import_module(f"{__name__}.chapter{n}").EXERCISES for n in numbers}


def difference(found: Any, expected: Any, tolerance: float) -> str | None:
    """Say where and by how much an outcome is not what was expected; None if it is.

    The tolerance is relative. It is the absolute one, too, where results reach 1; where all are
    smaller that shrinks with them, down to a thousandth.
    """
    if isinstance(found, Raised):
        same = isinstance(expected, Raised) and found.error == expected.error
        return None if same else f"your code raised {found.error}{found.line}"
    if isinstance(expected, Raised):
        return "your code should have raised an error"
    other = f"{_describe(expected)} is asked for, not {_describe(found)}"
    if isinstance(expected, list | tuple):
        found = list(found) if isinstance(found, Tensor | np.ndarray) and found.ndim else found
        found, expected = _by_place(found), _by_place(expected)
    if isinstance(expected, Mapping):
        if not isinstance(found, Mapping) or set(found) != set(expected):
            return other
        for name, part in expected.items():
            if trouble := difference(found[name], part, tolerance):
                return f"{name}: {trouble}" if name else trouble
        return None
    if isinstance(expected, str) and isinstance(found, str):
        same = found.strip().lower() == expected.strip().lower()
        return None if same else f"{found!r} is not the answer"
    wanted, got = _numbers(expected), _numbers(found)
    if wanted is not None and got is not None:
        return _numeric_difference(got, wanted, tolerance)
    return None if type(found) is type(expected) and found == expected else other


def _by_place(values: Any) -> Any:
    """Several results by name; what is no list is left."""
    several = isinstance(values, list | tuple)
    return {f"result {i}": each for i, each in enumerate(values, 1)} if several else values


def _numeric_difference(found: Tensor, expected: Tensor, tolerance: float) -> str | None:
    if found.shape != expected.shape:
        return f"the shape is {tuple(found.shape)}, it should be {tuple(expected.shape)}"
    size = expected[expected.isfinite()].abs().flatten().tolist()
    # never below a thousandth: there only rounding would be compared
    limits: Any = {"rtol": tolerance, "atol": tolerance * min(1.0, max(size, default=1.0) + 1e-3)}
    close = torch.isclose(found, expected, **limits, equal_nan=True)
    if close.all():
        return None
    bad = ~found.isfinite() & expected.isfinite()
    if bad.any():
        return f"{int(bad.sum())} of {bad.numel()} numbers are infinite or not a number"
    worst = int((found - expected).abs().masked_fill(close, -1).argmax())
    yours, right = found.flatten()[worst].item(), expected.flatten()[worst].item()
    where = [*map(int, np.unravel_index(worst, tuple(found.shape)))]
    sentence = f"yours is {yours:.5g}{f' at {where}' if where else ''}, it should be {right:.5g}"
    many = expected.numel() > 1
    if many and right and torch.allclose(found, expected * (yours / right), **limits):
        return f"{sentence}; all numbers are off by the factor {yours / right:.5g}"
    return f"{sentence}; {int((~close).sum())} of {close.numel()} numbers differ"


def _numbers(value: Any) -> Tensor | None:
    """A number, an array or a flat list of numbers as a float64 tensor, or None."""
    flat = value if isinstance(value, list | tuple) else [value]
    numbers = all(isinstance(each, int | float | np.number | np.bool_) for each in flat)
    if isinstance(value, Tensor | np.ndarray) or numbers:
        return torch.as_tensor(value).detach().cpu().to(torch.float64)
    return None


def _is_open(value: Any) -> bool:
    if isinstance(value, tuple):
        return any(each is Ellipsis for each in value)
    return value is Ellipsis or value is None or value is NotImplemented


def _describe(value: Any) -> str:
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
    code = getattr(getattr(answer, "forward", answer), "__code__", None)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if code is not None and frame.filename == code.co_filename and frame.line:
            return f" at your line `{frame.line}`"
    return ""

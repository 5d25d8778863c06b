"""Exercises that say *what* is wrong.

`check` runs the learner's answer on an exercise's inputs and compares what comes out: with the
truth, then with each mistake that the exercise knows. It never raises on an answer, ends where the
answer does not, and tells no right number: a notebook runs through. The exercises stand in
`chapter1.py`, ...: the right answers, then a list `EXERCISES` that says what each is and what not.
"""

import html
import importlib
import inspect
import pkgutil
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dmd_tutorial.checks import expand

SECONDS = 5.0  # of the processor's time that one call of an answer may take
NOTHING = "None is no answer: is the `return` missing?"
SIGNS = {True: "✓ right", False: "✗ not yet", None: "… open"}


@dataclass(frozen=True)
class Result:
    """What a check found: true if all is right; a notebook shows it as one sentence with a sign."""

    passed: bool | None  # None if the exercise was not attempted
    message: str

    def __bool__(self) -> bool:
        return self.passed is True

    def __repr__(self) -> str:
        return f"{SIGNS[self.passed]}: {self.message}"

    def _repr_html_(self) -> str:  # wraps, as plain output does not
        return f"<p style='margin:0'>{html.escape(repr(self))}</p>"


class Raised(Exception):
    """The outcome of an answer that raised or is no use: a sentence, perhaps the learner's line."""


class _Open(NotImplementedError):
    """Raised for an answer that is not attempted."""


class _Endless(BaseException):
    """Raised inside an answer that takes too long; no `except Exception` there keeps it."""


class Network(nn.Module):
    """For the inputs: `function(parameter, x, *levels)`, the levels expanded to the axes of x."""

    def __init__(self, function: Callable[..., Tensor], start: float | Sequence[float] = 1.0):
        super().__init__()
        self.function, self.parameter = function, nn.Parameter(torch.tensor(start))

    def forward(self, x: Tensor, *levels: Tensor) -> Tensor:
        """Refuse levels that are not one a sample."""
        for level in levels:
            if not isinstance(level, Tensor) or level.shape != x.shape[:1]:
                asked = f"the network asks for one level for each sample, ({len(x)},)"
                raise ValueError(f"{asked}, not {_describe(level)}")
        return self.function(self.parameter, x, *(expand(level, x) for level in levels))


def gradients_by(places: Mapping[str, int], name: str = "loss") -> Callable[..., dict[str, Any]]:
    """A probe for what is trained: its value, and its gradients by the arguments at these places.

    Of a `Network` it is the gradient by its parameter. An empty name is for what is no loss.
    """

    def probe(answer: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
        given = [
            a.clone().requires_grad_() if i in places.values() and isinstance(a, Tensor) else a
            for i, a in enumerate(arguments)
        ]
        leaves = {key: getattr(given[i], "parameter", given[i]) for key, i in places.items()}
        result = answer(*given)
        found = tuple(map(torch.zeros_like, leaves.values()))
        if isinstance(result, Tensor) and result.requires_grad:
            # of several numbers: the gradient of a sum that weighs each differently
            weights = torch.linspace(1, 2, result.numel()).reshape(result.shape).to(result)
            found = torch.autograd.grad(result, [*leaves.values()], weights, materialize_grads=True)
        elif _is_real(result):
            raise Raised("no gradient arrives anywhere: a .detach(), .item() or no_grad stops it")
        return {name: result, **dict(zip(leaves, found, strict=True))}

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
    # largest relative difference that counts as none, see `difference`; of several values: the
    # largest difference at each place, such as what an eye reads off a figure
    tolerance: float | tuple[float, ...] = 1e-4
    # what is compared, if more than what is returned: gradients, a module after the call; by name
    probe: Callable[..., Any] = lambda answer, *arguments: answer(*arguments)
    in_place: bool = False  # the answer may change its first argument, and return nothing

    def check(self, answer: Any) -> Result:
        """Say whether an answer (open: Ellipsis or None) is right and, if not, what is wrong."""
        try:
            trouble = self._trouble(... if answer is None else answer)
        except _Open:
            return Result(None, f"{self.number} is not attempted yet")
        except _Endless:
            trouble = f"it did not come to an end within {SECONDS:g} seconds of computing"
        except Exception as error:  # no storage, a whole number beyond all floats, ...
            trouble = f"your answer cannot be compared: {type(error).__name__}: {error}"
        if trouble:
            return Result(False, f"{self.number}, {self.name}: {trouble}")
        return Result(True, f"{self.number}, {self.name}, agrees with the reference")

    def _trouble(self, answer: Any) -> str | None:
        if callable(self.truth) != callable(answer) and not _is_open(answer):
            asked = "a function" if callable(self.truth) else "a value"
            return f"{asked} is asked for, not {_describe(answer)}"
        found, right = self.outcome(answer), self.outcome(self.truth)
        trouble = difference(found, right, self.tolerance)
        # all is as in a mistake, or else the first wrong one of several values is
        stops = {0: None, _first_wrong(found, right, self.tolerance): None} if trouble else {}
        for stop in stops:
            for sentence, mistake in self.mistakes.items():
                a, b = found, self.outcome(mistake)
                a, b = (a[:stop], b[:stop]) if stop else (a, b)
                if difference(a, b, self.tolerance) is None:
                    return sentence
        return trouble

    def outcome(self, answer: Any) -> Any:
        """A value as it is; of a function {"input 1 of n": what the probe saw, or `Raised`}.

        All answers see the same random numbers. An open one raises `NotImplementedError`.
        """
        if _is_open(answer):
            raise _Open
        if not callable(answer):
            return answer
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), ExitStack() as put_back:
            put_back.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.default_generator.manual_seed(0)  # a GPU's numbers stay the learner's
            inputs, seen = self.inputs(), {}
            for i, arguments in enumerate(inputs, 1):
                name = f"input {i} of {len(inputs)}" if len(inputs) > 1 else ""
                try:
                    seen[name] = self.probe(partial(self._called, answer), *arguments)
                except _Open:
                    raise
                except Raised as raised:
                    seen[name] = raised
                except Exception as error:  # in the probe, not in the answer
                    seen[name] = Raised(f"what your function returns is no use: {error!r}")
            return seen

    def _called(self, answer: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """What an answer returns; it raises `_Open`, `_Endless` or, for all else, `Raised`."""
        fixed = list(enumerate(given))[self.in_place :]
        before = {i: a.detach().clone() for i, a in fixed if isinstance(a, Tensor)}
        try:
            with _limited():
                returned = answer(*given, **named)
        except (KeyboardInterrupt, _Endless):
            raise
        except BaseException as error:
            line = _line_of(answer, error)
            # torch raises this error, too, for a type that an operation lacks
            if isinstance(error, NotImplementedError) and (not error.args or "`raise " in line):
                raise _Open from error
            raise Raised(f"your code raised {type(error).__name__}: {error}", line) from error
        code = getattr(answer, "__code__", None)
        idle = code and len(code.co_code) == len((lambda: None).__code__.co_code)  # no statement
        nothing = returned is None and not self.in_place
        if _is_open(returned) or (nothing and idle):
            raise _Open
        if nothing:
            raise Raised(NOTHING)
        for i, kept in before.items():
            if not torch.equal(kept, given[i]):
                raise Raised(f"it changes its argument {i + 1}: make a new tensor instead")
        return returned


@contextmanager
def _limited() -> Iterator[None]:
    """Raise `_Endless` in what takes more than `SECONDS`, in the one thread that gets signals."""

    def stop(*_: Any) -> None:
        raise _Endless

    try:
        handler = signal.signal(signal.SIGPROF, stop)
    except (AttributeError, ValueError):  # Windows, another thread
        yield
        return
    # again and again: a bare `except` in the answer swallows some
    timer = signal.setitimer(signal.ITIMER_PROF, SECONDS, 0.01)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, *timer)
        signal.signal(signal.SIGPROF, handler or signal.SIG_DFL)


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


def difference(found: Any, expected: Any, tolerance: float | tuple[float, ...]) -> str | None:
    """Say where an outcome is not what was expected, never what was; None if it is.

    The tolerance is relative. It is the absolute one, too, where results reach 1; where all are
    smaller that shrinks with them, down to a thousandth. A tuple has an absolute one a place.
    """
    if isinstance(found, Raised):
        same = isinstance(expected, Raised) and found.args[0] == expected.args[0]
        return None if same else "".join(found.args)
    if isinstance(expected, Raised):
        return "your code should have raised an error"
    if found is None and expected is not None:
        return NOTHING
    asked = "a word" if isinstance(expected, str) else _describe(expected)
    other = f"{asked} is asked for, not {_describe(found)}"
    if isinstance(expected, list | tuple):
        found = list(found) if isinstance(found, Tensor | np.ndarray) and found.ndim else found
        found, expected = _by_place(found), _by_place(expected)
    if isinstance(expected, Mapping):
        if not isinstance(found, Mapping) or set(found) != set(expected):
            return other
        for i, (name, part) in enumerate(expected.items()):
            limit = tolerance[i : i + 1] if isinstance(tolerance, tuple) else tolerance
            if trouble := difference(found[name], part, limit):
                return f"{name}: {trouble}" if name else trouble
        return None
    if isinstance(expected, str) and isinstance(found, str):
        plain, wanted = (word.strip().lower().rstrip("s") for word in (found, expected))
        return None if plain == wanted else f"{_describe(found)} is not the answer"
    if not _is_real(expected):
        return None if type(found) is type(expected) and found == expected else other
    if not _is_real(found):
        return other
    shape, its_shape = (tuple(np.shape(each)) for each in (expected, found))
    if its_shape != shape:
        one = () in (shape, its_shape)
        return other if one else f"the shape is {its_shape}, it should be {shape}"
    return _numeric_difference(_numbers(found), _numbers(expected), tolerance)


def _first_wrong(found: Any, expected: Any, tolerance: float | tuple[float, ...]) -> int:
    """Which of several values is the first wrong one, counted from 1; 0 if that cannot be said."""
    if not isinstance(expected, tuple) or not isinstance(found, list | tuple | Tensor | np.ndarray):
        return 0
    length = len(found) if isinstance(found, list | tuple) or found.ndim else 0
    places = range(1, 1 + length) if length == len(expected) else ()
    return next((i for i in places if difference(found[:i], expected[:i], tolerance)), 0)


def _by_place(values: Any) -> Any:
    """Several results by name; what is no list is left."""
    several = isinstance(values, list | tuple)
    return {f"result {i}": each for i, each in enumerate(values, 1)} if several else values


def _numeric_difference(
    found: Tensor, expected: Tensor, tolerance: float | tuple[float, ...]
) -> str | None:
    size = expected[expected.isfinite()].abs().flatten().tolist()
    limits: Any
    if isinstance(tolerance, tuple):  # the limit itself is within, whatever its rounding
        limits = {"rtol": 0.0, "atol": tolerance[0] * (1 + 1e-6)}
    else:  # never below a thousandth: there only rounding would be compared
        limits = {"rtol": tolerance, "atol": tolerance * min(1.0, max(size, default=1.0) + 1e-3)}
    close = torch.isclose(found, expected, **limits, equal_nan=True)
    if close.all():
        return None
    bad = ~found.isfinite() & expected.isfinite()
    if bad.any():
        return f"{int(bad.sum())} of {bad.numel()} numbers are infinite or not a number"
    worst = int((found - expected).abs().masked_fill(close, -1).argmax())
    yours, right = found.flatten()[worst].item(), expected.flatten()[worst].item()
    if expected.numel() == 1:
        return f"yours is {yours:.5g}, which is not right"
    if not found.any():
        return "yours is 0 everywhere"
    where = [*map(int, np.unravel_index(worst, tuple(found.shape)))]
    sentence = f"yours is {yours:.5g} at {where}, too {'high' if yours > right else 'low'}"
    if right and torch.allclose(found, expected * (yours / right), **limits):
        return f"{sentence}; all numbers are off by the factor {yours / right:.5g}"
    return f"{sentence}; {int((~close).sum())} of {close.numel()} numbers differ"


def _is_real(value: Any) -> bool:
    """Whether it is a real number, an array or a flat list of such."""
    if isinstance(value, Tensor):
        return not value.is_complex()
    if isinstance(value, np.ndarray | np.generic):
        return value.dtype.kind in "biuf"
    if isinstance(value, list | tuple):
        return all(isinstance(each, int | float | np.integer | np.floating) for each in value)
    return isinstance(value, int | float)


def _numbers(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().cpu().to_dense().to(torch.float64)
    return torch.from_numpy(np.array(value, dtype=np.float64, order="C"))


def _is_open(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(each is Ellipsis for each in value)
    return value is Ellipsis or value is NotImplemented


def _describe(value: Any) -> str:
    if isinstance(value, Tensor | np.ndarray):
        what = f"shape {tuple(value.shape)}" if _is_real(value) else f"the type {value.dtype}"
        return f"a tensor of {what}"
    if isinstance(value, Mapping):
        return f"a dict with {sorted(map(str, value))}"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"  # or a tuple: nobody has to care which
    if isinstance(value, str):
        return repr(value[:40])
    return "a number" if _is_real(value) else f"a {type(value).__name__}"


def _line_of(answer: Callable[..., Any], error: BaseException) -> str:
    """The learner's own line that an error came from, or nothing if it came from elsewhere."""
    answer = inspect.unwrap(answer)
    code = getattr(getattr(answer, "forward", answer), "__code__", None)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if code is not None and frame.filename == code.co_filename and frame.line:
            return f" at your line `{frame.line}`"
    return ""

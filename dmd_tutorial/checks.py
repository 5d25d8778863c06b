"""What every room asks of its input, so that a mistake is named where it is made."""

from collections.abc import Callable
from contextvars import ContextVar
from functools import partial, reduce, wraps
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.optim import Optimizer

# One batch of samples, of any shape, and one number beside each: a noise level, a time, a weight.
Samples = Float[Tensor, "batch *shape"]
PerSample = Float[Tensor, " batch"]
# What a sample is made under: a class each, (batch,), or numbers such as a text's embedding,
# (batch, ...). The network that reads it checks it; loops only cut, join and move it.
Condition = Shaped[Tensor, "batch *condition"]
Step = TypeVar("Step", bound=Callable[..., Any])
Number = Any  # a float; inside of `asked_once` a single value that nobody has waited for
NO_CLASS = -1  # the null label: a sample whose class the network is not told


class NotFiniteError(ValueError):
    """Something holds NaN or infinity."""


def read(*values: Shaped[Tensor, ""]) -> list[float]:
    """What single values are; a GPU is waited for once, and hands them over together."""
    if not values:
        return []
    home = next((value.device for value in values if _waits(value)), None)
    dtype = reduce(torch.promote_types, (value.dtype for value in values), torch.float32)
    return torch.stack([value.detach().to(home, dtype) for value in values]).tolist()


def _waits(value: Tensor) -> bool:
    """Whether to read a value is to wait until a device has done all it was told before."""
    return value.device.type != "cpu"


class _Question(NamedTuple):
    wrong: Tensor
    error: Callable[[], ValueError | None]
    sure: bool  # whether the error is certain where something is wrong


_open: ContextVar[list[_Question] | None] = ContextVar("questions of a step", default=None)


def refuse(
    wrong: Bool[Tensor, ""], error: Callable[[], ValueError | None], sure: bool = True
) -> None:
    """Raise the error where something is wrong: at once or, in `asked_once` on a GPU, at its end.

    An error that is not `sure` may turn out to be None. A compiled network asks nothing.
    """
    if torch.compiler.is_compiling():
        return
    questions = _open.get()
    if questions is not None and _waits(wrong):
        questions.append(_Question(wrong, error, sure))
    elif wrong and (found := error()) is not None:
        raise found


def asked_once(step: Step) -> Step:
    """A training step that reads values once, at its end: on a GPU each reading is a wait.

    What was asked of values on the way is answered then, and what the step returns, a named tuple,
    has numbers in place of single values. An optimiser's step looks at what is `refused` by then:
    what comes so late has not changed the weights of the network that it is about.
    """

    @wraps(step)
    def once(*given: Any, **options: Any) -> Any:
        if _open.get() is not None:  # a step within a step
            return step(*given, **options)
        questions: list[_Question] = []
        token = _open.set(questions)
        try:
            done = step(*given, **options)
        except Exception:
            _answer(questions, read(*(q.wrong for q in questions)))  # the cause may lie there
            raise
        finally:
            _open.reset(token)
        single = {n: v for n, v in done._asdict().items() if isinstance(v, Tensor) and v.ndim == 0}
        numbers = read(*(q.wrong for q in questions), *single.values())
        _answer(questions, numbers)
        return done._replace(**dict(zip(single, numbers[len(questions) :], strict=True)))

    return cast(Step, once)


def _answer(questions: list[_Question], answers: list[float]) -> None:
    for question, wrong in zip(questions, answers, strict=False):
        if wrong and (found := question.error()) is not None:
            raise found


def refused() -> Bool[Tensor, ""] | None:
    """Whether an open question will be refused, where it was asked; None if there is none."""
    wrong = [question.wrong for question in _open.get() or () if question.sure]
    return torch.stack(wrong).any() if wrong else None


def step_unless_refused(optimizer: Optimizer) -> None:
    """An optimiser's step, unless an open question will be refused: a GPU decides that itself."""
    wrong = refused()
    if wrong is None:
        optimizer.step()
    elif getattr(optimizer, "_step_supports_amp_scaling", False):  # fused: it looks by itself
        optimizer.found_inf = wrong.float()  # type: ignore[attr-defined]  # as GradScaler does it
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf  # type: ignore[attr-defined]
    elif not wrong:  # a wait
        optimizer.step()


def check_finite(unless: Callable[[], bool] | None = None, /, **values: Tensor | float) -> None:
    """Refuse what holds NaN or infinity, unless told otherwise; keywords are names to say."""

    def error(name: str, value: Tensor, lost: Tensor) -> NotFiniteError | None:
        said = f"{lost} of {value.numel()} values" if value.ndim else f"it is {value.item()}"
        expected = unless is not None and unless()
        return None if expected else NotFiniteError(f"{name} is not finite: {said}")

    for name, given in values.items():
        value = torch.as_tensor(given).detach()
        lost = (~value.isfinite()).sum()
        refuse(lost > 0, partial(error, name, value, lost), sure=unless is None)


def check_sigma(
    x: Samples, sigma: PerSample, above_zero: bool = False, **others: Shaped[Tensor, "..."]
) -> None:
    """Refuse noise levels that are not one a sample, not finite, negative or, if asked, 0.

    The others, by their names, are what has the shape of x.
    """
    check_same_shape(x=x, **others)
    if not isinstance(sigma, Tensor):
        raise ValueError(f"sigma must be a tensor of shape ({len(x)},), not {sigma!r}")
    if sigma.shape != x.shape[:1]:
        raise ValueError(f"sigma has shape {tuple(sigma.shape)}, x has batch {len(x)}")
    check_finite(sigma=sigma)

    def error() -> ValueError:
        if (least := sigma.min().item()) < 0:
            return ValueError(f"sigma must not be negative, the smallest is {least:g}")
        return ValueError("sigma is 0 somewhere: it must be above 0 here")

    refuse((sigma <= 0 if above_zero else sigma < 0).any(), error)


def check_label(x: Samples, label: Condition | None, classes: int) -> None:
    """Refuse labels that are not one class a sample, from 0 to classes - 1, or `NO_CLASS`."""
    if label is None:
        return
    if classes == 0:
        raise ValueError("this model is unconditional (0 classes), but a label was given")
    if label.shape != x.shape[:1]:
        raise ValueError(f"label has shape {tuple(label.shape)}, x has batch {len(x)}")
    if label.is_floating_point():
        raise ValueError(f"label must hold whole numbers, its type is {label.dtype}")
    low, high = label.aminmax()

    def error() -> ValueError:
        return ValueError(f"label goes from {low} to {high}, classes are 0 to {classes - 1}")

    refuse((low < NO_CLASS) | (high >= classes), error)


def check_same_shape(**tensors: Shaped[Tensor, "..."]) -> None:
    """Refuse tensors whose shapes differ; the message shows both shapes."""
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor.shape != first.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, {first_name} has {tuple(first.shape)}"
            )


def expand(value: PerSample, x: Samples) -> Float[Tensor, "batch *ones"]:
    """Give one number per sample the trailing axes that it needs beside x."""
    return value.reshape(-1, *[1] * (x.ndim - 1))


class Must(NamedTuple):
    """What the value of a `Checked` field must be, written beside its type."""

    words: str
    holds: Callable[[float], bool]


Count = Annotated[int, Must("at least 1", lambda n: n >= 1)]
CountOrNone = Annotated[int, Must("at least 0", lambda n: n >= 0)]
Positive = Annotated[float, Must("above 0", lambda v: v > 0)]
NotNegative = Annotated[float, Must("at least 0", lambda v: v >= 0)]
Share = Annotated[float, Must("from 0 to 1", lambda v: 0 <= v <= 1)]


class Checked:
    """A dataclass that refuses, by its name, a value that is not what the field's type says."""

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            if get_origin(kind) is Literal and value not in get_args(kind):
                raise ValueError(f"{name} must be one of {list(get_args(kind))}, not {value!r}")
            for must in getattr(kind, "__metadata__", ()):
                if isinstance(must, Must) and not must.holds(value):
                    raise ValueError(f"{name} must be {must.words}, not {value!r}")

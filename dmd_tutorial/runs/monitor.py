"""What a person watches during hours of work: progress, speed, a log, pictures, warning signs.

The losses of DMD say little: they go up and down and need not fall. What tells is the picture of
G, D_real and D_fake side by side, and a few numbers that go wrong before the picture does.
"""

import json
import math
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from dmd_tutorial.checks import read
from dmd_tutorial.dmd import Record
from dmd_tutorial.files import plain_json, replace_file
from dmd_tutorial.runs.compute import Processes
from dmd_tutorial.runs.images import save_grid
from dmd_tutorial.training import DistillSettings, FitSettings, Metrics

WINDOW = 100  # steps that a running number looks back on
FIRST = 5  # steps after which a generator is known that starts from too high a level
KEPT = ("loss_critic", "norm_generator", "norm_critic")  # of a record, for the signs
LOG_STEPS = 10  # steps between two lines of the log
BAR = "{l_bar}{bar}| {n:.0f}/{total} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
LINE = "{desc}: {unit} {n:.0f} of {total}{postfix}, {remaining} left"


class Progress(tqdm):
    """How far a stage is: a bar in a terminal; elsewhere a line a minute, none if it is shorter."""

    def __init__(self, stage: str, total: int, unit: str, initial: int = 0) -> None:
        self.terminal = sys.stderr.isatty()
        seldom = {"mininterval": 60, "delay": 60, "miniters": 0, "leave": False}
        super().__init__(
            desc=stage, total=total, unit=unit, initial=initial, disable=not Processes().first,
            bar_format=BAR if self.terminal else LINE, **({} if self.terminal else seldom),
        )  # fmt: skip

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if self.terminal:
            return super().display(msg, pos)
        print(self, file=sys.stderr, flush=True)
        return False

    def say(self, text: str) -> None:
        self.write(text) if self.terminal else print(text, flush=True)


@contextmanager
def counting(model: nn.Module, calls: int, stage: str, count: int) -> Iterator[Progress]:
    """Progress of `count` samples that a network makes, each in so many calls of it."""
    with Progress(stage, count, "sample") as bar:

        def called(_: nn.Module, inputs: tuple, __: Any) -> None:
            bar.update(min(len(inputs[0]) / calls, bar.total - bar.n))  # rounded parts are more

        with model.register_forward_hook(called):
            yield bar


class Watch:
    """What the first process shows and notes of each step: bar, log, picture, warnings.

    Log and pictures lie beside `path`; without it there are none. The speed is that of the last
    steps, and begins anew where a run resumes.
    """

    def __init__(
        self, stage: str, settings: FitSettings | DistillSettings, path: Path | None, step: int,
        picture_steps: int, first: bool, around: Any = None,
    ) -> None:  # fmt: skip
        self.path, self.picture_steps, self.first, self.around = path, picture_steps, first, around
        self.signs, self.batch = Signs(settings.clip, math.inf if around else 1.0), settings.batch
        self.times: deque[float] = deque(maxlen=WINDOW)
        self.log = Log(path.with_suffix(".jsonl"), step) if first and path else None
        if self.log is not None and step < settings.steps:
            print(f"{stage}: {settings.steps - step} steps, log in {self.log.path}", flush=True)
        self.bar = Progress(stage, settings.steps, "step", step)

    def close(self) -> None:
        self.bar.close()
        if self.log is not None:
            self.log.close()

    def __call__(self, metric: Metrics, seconds: float) -> None:
        if not self.first:
            return
        self.times.append(seconds)
        took = seconds - self.times[0]
        images = (len(self.times) - 1) * self.batch / took if took else math.nan
        shown = {"loss": f"{metric.loss:.4f}", "images_per_second": f"{images:.0f}"}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
        record = metric.record
        warnings = [] if record is None else self.signs(record)
        for warning in warnings:
            self.bar.say(f"step {metric.step}: {warning}")
        if self.log is not None and (metric.step % LOG_STEPS == 0 or warnings):
            numbers = {} if record is None else record._asdict()
            plain = {name: n for name, n in numbers.items() if isinstance(n, float)}
            self.log.write(
                metric.step, loss=metric.loss, learning_rate=metric.learning_rate,
                images_per_second=round(images, 1),
                seconds=round(seconds, 1), warnings=warnings, **plain,
            )  # fmt: skip
        due = self.picture_steps and metric.step % self.picture_steps == 0
        if self.path and due and record is not None and record.denoised_real is not None:
            beside = self.path.with_name(f"{self.path.name}-watch.png")
            picture(record, beside, around=self.around)


class Log:
    """Numbers of a run, one JSON object a line; in TensorBoard too, if it is installed.

    Where a run resumes, lines behind its step are cut off, and so is one that a killed process left
    half-written. TensorBoard's files go into a folder beside.
    """

    def __init__(self, path: str | Path, step: int = 0) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_log(self.path) if line["step"] <= step]
        whole = "".join(plain_json(line) + "\n" for line in kept)
        replace_file(self.path, lambda file: file.write(whole.encode()))
        self.file = open(self.path, "a")  # noqa: SIM115  (open as long as the run)
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board: Any = SummaryWriter(str(self.path.with_suffix("")))
        except ImportError:
            self.board = None

    def write(self, step: int, **numbers: Any) -> None:
        self.file.write(plain_json({"step": step, **numbers}) + "\n")
        self.file.flush()
        for name, value in numbers.items() if self.board is not None else ():
            if isinstance(value, int | float):
                self.board.add_scalar(name, value, step)

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()


def read_log(path: str | Path) -> list[dict]:
    """One dictionary a line of what `Log` wrote, without a last one that is half-written."""
    lines: list[dict] = []
    for text in Path(path).read_text().splitlines() if Path(path).exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


class Signs:
    """Looks at each iteration and says in a sentence when something goes wrong.

    Numbers are compared with the run's own first `WINDOW` iterations, since what is normal differs
    between data sets; the level that a generator starts from shows in the first `FIRST`. A sentence
    is said once, and again only after its sign has gone away. Wide thresholds: healthy runs on
    digits reach a third of them, half of the level's.
    """

    def __init__(self, clip: float, most: float = 1.0) -> None:
        self.clip, self.most, self.seen = clip, most, 0  # latents may differ by more than images
        self.start: dict[str, float] = {}
        self.recent: dict[str, deque[float]] = {}
        self.said: set[str] = set()

    def __call__(self, record: Record) -> list[str]:
        self.seen += 1
        x = record.x.float()
        spread = x.std(dim=0, correction=min(1, len(x) - 1)).mean()
        about = read(x.mean(), spread, (x.abs() > 1.2).float().mean())
        vital = dict(zip(("mean", "spread", "beyond"), about, strict=True))
        vital |= {name: getattr(record, name) for name in KEPT}
        for name, value in vital.items():
            self.recent.setdefault(name, deque(maxlen=WINDOW)).append(value)
        now = {name: sum(values) / len(values) for name, values in self.recent.items()}
        if self.seen == WINDOW:
            self.start = now
        wrong = self._judge(now) if self.seen >= 2 * WINDOW else self._judge_start(now)
        fresh = [text for name, text in wrong.items() if name not in self.said]
        self.said = set(wrong)
        return fresh

    def _judge_start(self, now: dict[str, float]) -> dict[str, str]:
        if self.seen != FIRST or now["spread"] <= self.most:  # no values in [-1, 1] have more
            return {}
        return {"level":
            f"The first samples differ by {now['spread']:.1f}, images in [-1, 1] by 1 at most: "
            "the teacher's error is multiplied by the level that the generator is held at. "
            "Narrow the teacher's sigma_range, to 20 times the data's standard deviation, say."
        }  # fmt: skip

    def _judge(self, now: dict[str, float]) -> dict[str, str]:
        start, spread, before = self.start, now["spread"], self.start["spread"]
        drift = abs(now["mean"] - start["mean"])
        clipped = sum(norm > self.clip for norm in self.recent["norm_generator"])
        endless = sum(not math.isfinite(norm) for norm in self.recent["norm_critic"])
        signs = {
            "drift": (drift > 0.25 * max(before, 1e-3) and drift > 0.05,
                f"The samples' mean went from {start['mean']:.3f} to {now['mean']:.3f}: the critic "
                "does not follow. Lower the generator's learning rate or take more critic steps."),
            "saturation": (now["beyond"] > start["beyond"] + 0.1,
                f"{now['beyond']:.0%} of all values are beyond 1.2 (at first "
                f"{start['beyond']:.0%}): the samples saturate. Go back to a checkpoint before, "
                "with a lower learning rate."),
            "collapse": (spread < 0.6 * before,
                f"Samples differ by {spread:.3f}, at first by {before:.3f}: the generator "
                "collapses. Raise lambda_reg or add pairs; look at the picture of G."),
            "critic": (now["loss_critic"] > 3 * start["loss_critic"] > 0,
                f"The critic's loss grew from {start['loss_critic']:.3f} to "
                f"{now['loss_critic']:.3f}: it loses the generator. More critic steps, or a higher "
                "critic rate, or a lower one for the generator."),
            "norm": (clipped > WINDOW // 2 and now["norm_generator"] > 5 * start["norm_generator"],
                f"The generator's gradient was clipped in {clipped} of {WINDOW} iterations (norm "
                f"{now['norm_generator']:.2g}, clip {self.clip:g}): lower its learning rate."),
            "overflow": (endless > WINDOW // 2,
                "Gradients are not finite in half of the iterations: in fp16 the loss's scale is "
                "at its floor. Use bf16, or fp32."),
        }  # fmt: skip
        return {name: text for name, (there, text) in signs.items() if there}


def picture(record: Record, path: str | Path, columns: int = 8, around: Any = None) -> None:
    """Draw G, D_real and D_fake of an iteration, one below the other, sorted by noise level.

    `around` is what decodes latents.
    """
    if record.sigma is None or record.denoised_real is None or record.denoised_fake is None:
        raise ValueError("the iteration compared no scores: there is nothing beside G to draw")
    order = record.sigma[:columns].argsort()
    rows = [t[:columns][order] for t in (record.x, record.denoised_real, record.denoised_fake)]
    x = torch.cat(rows)
    save_grid(around.pictures(x) if around else x, path, columns=len(order))

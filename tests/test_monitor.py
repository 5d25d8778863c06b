"""What a person watches: speed, log, warning signs, the picture."""

import io
import itertools
import json
import math
import re
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from dmd_tutorial.dmd import Record
from dmd_tutorial.notebook.results import recorded
from dmd_tutorial.pretrained import load
from dmd_tutorial.runs.monitor import (
    WINDOW,
    Log,
    Progress,
    Signs,
    Watch,
    counting,
    picture,
    read_log,
)
from dmd_tutorial.runs.presets import PRESETS
from dmd_tutorial.training import DistillationRun, FitSettings, Metrics, distill

RESULTS = Path(__file__).parents[1] / "book" / "results"


def test_speed_is_that_of_the_last_steps_and_begins_anew_after_a_resumption(tmp_path):
    watch = Watch(
        "teacher", FitSettings(steps=1000, batch=64), tmp_path / "run", 499, 0, first=True
    )
    with closing(watch):
        for step in range(500, 701):  # the first ones are slow
            watch(Metrics(step, 0.0, 0.0), step * 0.5 if step > 550 else step * 2.0 - 825)
    noted = {line["step"]: line["images_per_second"] for line in read_log(tmp_path / "run.jsonl")}
    assert noted[500] is None  # resumed there: nothing is known yet
    assert noted[550] == pytest.approx(32)
    assert noted[700] == pytest.approx(128)


def test_without_a_terminal_there_is_a_line_a_minute_and_first_where_the_log_lies(
    tmp_path, monkeypatch, capsys
):
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    watch = Watch("warm start", FitSettings(steps=200), tmp_path / "run", 0, 0, first=True)
    with closing(watch):
        for step in range(1, 151):
            now[0] = float(step)
            watch(Metrics(step, 0.25, 0.0), now[0])
    printed = capsys.readouterr()
    assert printed.out == f"warm start: 200 steps, log in {tmp_path / 'run.jsonl'}\n"
    assert printed.err.splitlines() == [
        f"warm start: step {step} of 200, loss=0.2500, images_per_second=128, {left} left"
        for step, left in ((60, "02:20"), (120, "01:20"), (150, "00:50"))
    ]
    with Progress("samples", 200, "sample") as short:  # no line for what takes seconds
        short.update(199)
    assert capsys.readouterr().err == ""


def test_a_bar_is_never_more_than_full():
    """Rounded parts of samples add up to more than there are, at which tqdm would complain."""
    model = nn.Identity()
    with counting(model, 35, "samples", 100) as bar:
        for _ in range(35):
            model(torch.zeros(100))
    assert bar.n == 100
    assert not model._forward_hooks


def test_in_a_terminal_there_is_a_bar_with_the_stage_s_title(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stderr", Terminal())
    watch = Watch("distil", FitSettings(steps=4, batch=2), None, 1, 0, first=True)
    with closing(watch):
        watch(Metrics(2, 0.25, 0.0), 1.0)
        watch.bar.say("a warning")
    shown = re.split(r"[\r\n]+", sys.stderr.getvalue())
    assert any(re.match(r"distil: +50%.*\| 2/4 \[.*loss=0.2500", line) for line in shown)


def test_the_log_is_cut_where_a_run_goes_on_and_mends_a_broken_line(tmp_path):
    path = tmp_path / "student.jsonl"
    log = Log(path)
    for step in (10, 20, 30):
        log.write(step, loss=step / 10, warnings=[])
    log.close()
    with open(path, "a") as file:
        file.write('{"step": 40, "lo')  # killed in the middle of a line
    assert [line["step"] for line in read_log(path)] == [10, 20, 30]
    log = Log(path, step=20)
    log.write(30, loss=9.0)
    log.close()
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [1.0, 2.0, 9.0]
    assert read_log(tmp_path / "none.jsonl") == []


def test_a_number_that_is_not_finite_is_null_in_the_log(tmp_path):
    """Python writes NaN and Infinity, which are no JSON and which other readers refuse."""
    log = Log(tmp_path / "log.jsonl")
    log.write(10, loss=math.nan, norm=math.inf, list=[-math.inf, 1.0], warnings=["NaN"])
    log.close()
    text = (tmp_path / "log.jsonl").read_text()
    assert (
        text
        == '{"step": 10, "loss": null, "norm": null, "list": [null, 1.0], "warnings": ["NaN"]}\n'
    )


def record(spread=0.5, mean=0.0, loss_critic=0.5, norm=0.2, norm_critic=1.0, step=0) -> Record:
    x = mean + spread * torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(step))
    return Record(x, loss_critic=loss_critic, norm_generator=norm, norm_critic=norm_critic)


FAILURES = {
    "went from": {"mean": 0.4},
    "saturate": {"spread": 1.5},
    "collapses": {"spread": 0.1},
    "loses the generator": {"loss_critic": 5.0},
    "was clipped in": {"norm": 50.0},
    "not finite": {"norm_critic": math.inf},
}


@pytest.mark.parametrize("sign", FAILURES)
def test_a_failure_gives_its_own_warning_once(sign):
    signs = Signs(clip=10.0)
    said = [text for step in range(WINDOW) for text in signs(record(step=step))]
    for step in range(WINDOW, 4 * WINDOW):
        said += signs(record(step=step, **FAILURES[sign]))
    assert [text for text in said if sign in text] == said
    assert len(said) == 1
    for step in range(2 * WINDOW):  # it goes away, and comes back
        assert signs(record(step=step)) == []
    again = [
        text for step in range(2 * WINDOW) for text in signs(record(step=step, **FAILURES[sign]))
    ]
    assert len(again) == 1


def test_a_healthy_run_gives_none():
    signs = Signs(clip=10.0)
    rng = torch.Generator().manual_seed(0)
    for step in range(5 * WINDOW):
        a, b, c = (0.8 + 0.4 * torch.rand(3, generator=rng)).tolist()
        healthy = record(0.5 * a, 0.02 * b, loss_critic=0.5 * c, norm=0.3 * a * b, step=step)
        assert signs(healthy) == []


def first_signs(spread) -> list[str]:
    signs = Signs(clip=10.0)
    return [text for step in range(WINDOW) for text in signs(record(spread, step=step))]


def test_too_high_a_level_is_told_within_the_first_iterations():
    """A noise predictor's error is multiplied by the level: recorded of one at its own, 157."""
    rows = [row for row in recorded("own-teachers", RESULTS)["rows"] if row["level"] is not None]
    measured = {(row["teacher"], row["level"]): row["first"] for row in rows if row["seed"] == 0}
    for stage in ("warm_start", "distillation"):
        high, low = (measured["noise", level][stage]["spread"] for level in (157.0, 10.0))
        (warning,) = first_signs(high)
        assert "Narrow the teacher's sigma_range" in warning
        assert first_signs(low) == []
        assert first_signs(measured["flow", 80.0][stage]["spread"]) == []  # an error stays as it is


def test_no_preconditioned_teacher_is_held_at_too_high_a_level():
    signs, settings = Signs(clip=10.0), PRESETS["digits"].distill
    run = DistillationRun(load("digits-teacher"), replace(settings, batch=8, lambda_reg=0.0))
    for metric in itertools.islice(distill(run, (1, 8, 8), 10), 6):
        assert signs(metric.record) == []


def test_the_picture_shows_three_rows_sorted_by_level(tmp_path):
    x = torch.linspace(-1, 1, 12)[:, None, None, None].expand(12, 1, 8, 8)
    sigma = torch.arange(12, 0, -1).float()
    path = tmp_path / "watch.png"
    picture(Record(x, sigma, -x, x * math.nan), path, columns=4)
    with Image.open(path) as image:
        levels = image.convert("L")
        for row, falls in ((0, True), (1, False)):  # x grows with the number, as sigma falls
            shown = [levels.getpixel(((2 * i + 1) * image.width // 8, (2 * row + 1) *
                                      image.height // 6)) for i in range(4)]  # fmt: skip
            assert shown == sorted(shown, reverse=falls)
            assert len(set(shown)) == 4
        assert image.width / image.height == pytest.approx(4 / 3, rel=0.1)
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="compared no scores"):
        picture(Record(x), path)

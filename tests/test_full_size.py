"""Every stage of the measurements at full size, at a size for a CPU: interrupted, resumed, done."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from dmd_tutorial.runs.presets import CIFAR10_SMALL

RUNNER = Path(__file__).parents[1] / "benchmarks" / "full_size.py"


@pytest.fixture(scope="module")
def runner():
    specification = importlib.util.spec_from_file_location("full_size", RUNNER)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_budgets_are_equal_and_counted(runner):
    """By hand, for 256 samples and 256 pairs; one evaluation is one image through one network."""
    full = CIFAR10_SMALL.distill
    counts = {
        "full": 3 * 512 + 2 * 256 + 3 * 256,
        "without distribution matching": 3 * 256,
        "without anchor": 3 * 256 + 2 * 256 + 3 * 256,
        "five critic steps": 3 * 512 + 2 * 256 + 5 * 3 * 256 + 4 * 256,
    }
    for name, count in counts.items():
        settings = replace(full, **runner.VARIANTS[name][0])
        assert runner.evaluations(settings) == count, name
        steps = runner.at_equal_budget(settings, full).steps
        assert steps * count == pytest.approx(full.steps * counts["full"], rel=1e-3)


@pytest.mark.slow
def test_the_whole_road_at_reduced_size(runner, tmp_path, capsys):
    data, work, out = tmp_path / "data", tmp_path / "work", tmp_path / "results"
    for number in range(40):
        path = data / str(number % 10) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (6 * number, 255 - 6 * number, 80)).save(path)
    command = ["--reduced", "--data", str(data), "--work", str(work), "--out", str(out),
               "--note", "coloured squares", "--device", "cpu"]  # fmt: skip
    assert runner.main([*command, "--minutes", "0"]) == 3  # every training stops at its first step
    assert "stages are left: teacher" in capsys.readouterr().out
    calls = 1
    while runner.main([*command, "--minutes", "0.15"]) == 3:
        calls += 1
        assert calls < 20
    report = json.loads((out / "cifar10-small.json").read_text())
    done = {(row["name"], row["seed"]) for row in report["rows"]}
    expected = {(name, seed) for name, (_, n) in runner.VARIANTS.items() for seed in range(n)}
    assert done == expected | {("teacher", 0), ("regression", 0), ("regression", 1)}
    assert len(report["rows"]) == len(done)
    assert (report["note"], report["reduced"]) == ("coloured squares", True)
    for row in report["rows"]:
        assert row["frechet"] > 0
        assert row["samples"] == 200
        assert {"device", "driver", "commit", "versions", "settings"} <= set(row)
        assert row["evaluations_per_sample"] == 1 or row["name"] == "teacher"
    again = (out / "cifar10-small.json").read_bytes()
    assert runner.main(command) == 0  # nothing is done twice
    assert (out / "cifar10-small.json").read_bytes() == again
    weights = list(work.glob("*.safetensors"))
    assert len(weights) == 2 + len(done) - 1  # classifier, teacher, one of each student
    for picture in out.glob("*.png"):
        assert picture.stat().st_size < 60_000


def test_reduced_numbers_do_not_reach_the_book_and_a_cpu_is_not_kept_for_weeks(runner, capsys):
    for arguments in (["--reduced"], ["--device", "cpu"]):
        with pytest.raises(SystemExit, match="2"):
            runner.main(arguments)
    said = capsys.readouterr().err
    assert "must not write to book/results" in said
    assert "without a GPU" in said

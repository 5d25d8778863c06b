"""The command line, from nothing to an evaluated student, very short."""

import json
import re
from dataclasses import fields

import pytest
from PIL import Image

from dmd_tutorial import pretrained
from dmd_tutorial.cli import main
from dmd_tutorial.denoisers import EDMDenoiser, OneStepGenerator
from dmd_tutorial.training import DistillSettings, TeacherSettings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which teacher, pairs and student have been made by the commands."""
    folder = tmp_path_factory.mktemp("runs")
    teacher, pairs = str(folder / "teacher.safetensors"), str(folder / "pairs")
    commands = [
        ["train-teacher", "--out", str(folder), "--steps", "30", "--batch", "16"],
        ["make-pairs", "--teacher", teacher, "--pairs", pairs, "--count", "1000", "--steps", "2"],
        ["distill", "--teacher", teacher, "--pairs", pairs, "--out", str(folder),
         "--warm-start-steps", "5", "--steps", "5", "--batch", "8", "--batch-pairs", "8"],
    ]  # fmt: skip
    for command in commands:
        assert main(command) == 0
    return folder


def test_every_result_is_on_disk(folder):
    assert isinstance(pretrained.load(folder / "teacher.safetensors"), EDMDenoiser)
    assert isinstance(pretrained.load(folder / "student.safetensors"), OneStepGenerator)
    for name in ("teacher", "warm-start", "student"):
        notes = json.loads((folder / f"{name}.json").read_text())
        assert notes["settings"]["seed"] == 0
        assert {"torch", "python", "dmd_tutorial"} <= set(notes["versions"])
        assert notes == pretrained.made_by(folder / f"{name}.safetensors")
        with Image.open(folder / f"{name}.png") as grid:
            assert min(grid.size) >= 80
    assert json.loads((folder / "student.json").read_text())["settings"]["batch"] == 8
    assert json.loads((folder / "warm-start.json").read_text())["settings"]["matching"] is False


def test_sample_and_evaluate(folder, capsys):
    student, out = str(folder / "student.safetensors"), folder / "samples"
    assert main(["sample", "--model", student, "--count", "20", "--out", str(out)]) == 0
    assert out.with_suffix(".png").exists()
    capsys.readouterr()
    report = folder / "report.json"
    command = ["evaluate", "--model", student, "--count", "1000", "--out", str(report)]
    assert main(command) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(report.read_text())
    assert printed["evaluations"] == 1
    assert printed["result"]["frechet"] > 0
    assert main(["evaluate", "--model", str(folder / "teacher.safetensors"),
                 "--count", "1000", "--steps", "3"]) == 0  # fmt: skip
    assert json.loads(capsys.readouterr().out)["evaluations"] == 5


def test_pairs_of_another_teacher_are_refused(folder, capsys):
    command = ["distill", "--pairs", str(folder / "pairs"), "--out", str(folder / "other")]
    assert main(command) == 2
    assert "was made with teacher" in capsys.readouterr().err


def test_missing_files_and_pairs_are_one_sentence(tmp_path, capsys):
    assert main(["sample", "--model", "digits-techer"]) == 2
    assert "no shipped network (digits-teacher" in capsys.readouterr().err
    assert main(["distill", "--pairs", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "holds no pairs" in capsys.readouterr().err


def test_another_setting_does_not_continue_an_old_run(folder, capsys):
    command = ["train-teacher", "--out", str(folder), "--steps", "31", "--batch", "16"]
    assert main(command) == 2
    assert "was made with settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "settings"), [("train-teacher", TeacherSettings), ("distill", DistillSettings)]
)
def test_help_explains_every_setting(command, settings, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    for field in fields(settings):
        option = f"--{field.name.replace('_', '-')}"
        explained = text.split(f"{option} {field.name.upper()}")[-1].split(" --")[0]
        assert option in text
        assert len(explained) > 10, option


@pytest.mark.parametrize("command", ["make-pairs", "sample", "evaluate", "demo", "verify"])
def test_help_of_the_other_commands(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    options = re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, re.MULTILINE)
    assert options or command == "verify"


def test_verify_wants_a_clone(tmp_path, capsys):
    assert main(["verify", "1", "--book", str(tmp_path)]) == 2
    assert "give --book" in capsys.readouterr().err

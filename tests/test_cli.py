"""The command line, from nothing to an evaluated student, very short."""

import itertools
import json
import math
import os
import re
import signal
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dmd_tutorial import __version__, anchor, features, pretrained
from dmd_tutorial.data import Images
from dmd_tutorial.denoisers import EDMDenoiser
from dmd_tutorial.generators import OneStepGenerator
from dmd_tutorial.networks import UNet
from dmd_tutorial.runs import memory, monitor, pipeline, provenance
from dmd_tutorial.runs.cli import Evaluate, commands_of, main, parse
from dmd_tutorial.runs.compute import Compute
from dmd_tutorial.runs.pipeline import Control
from dmd_tutorial.runs.presets import PRESETS
from dmd_tutorial.training import DistillSettings, TeacherSettings, _Run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which teacher, pairs and student have been made by the commands."""
    folder, usual = tmp_path_factory.mktemp("runs"), os.umask(0o022)
    teacher, pairs = str(folder / "teacher.safetensors"), str(folder / "pairs")
    commands = [
        ["train-teacher", "--out", str(folder), "--steps", "30", "--batch", "16"],
        ["make-pairs", "--teacher", teacher, "--pairs", pairs, "--count", "1000", "--steps", "2"],
        ["distill", "--teacher", teacher, "--pairs", pairs, "--out", str(folder),
         "--warm-start-steps", "5", "--steps", "5", "--batch", "8", "--batch-pairs", "8"],
    ]  # fmt: skip
    for command in commands:
        assert main(command) == 0
    yield folder
    os.umask(usual)


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
    warm = json.loads((folder / "warm-start.json").read_text())["settings"]
    assert (warm["matching"], warm["batch_pairs"], warm["steps"]) == (False, 8, 5)


def test_sample_and_evaluate(folder, capsys):
    student, out = str(folder / "student.safetensors"), folder / "samples"
    assert main(["sample", "--model", student, "--count", "20", "--out", str(out)]) == 0
    assert out.with_suffix(".png").exists()
    modes = {path: path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}
    assert len(modes) > 15
    assert set(modes.values()) == {0o644}  # the group reads them, too
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


def test_a_sample_of_a_seed_is_the_same_in_any_company(tmp_path, capsys):
    """As in EDM: noise, then class, from a generator of its own, then Heun in float64."""
    found = {}
    for seeds, batch in (("0-5", "6"), ("3,5", "1")):
        out = tmp_path / seeds
        command = ["sample", "--teacher", "digits-teacher", "--seeds", seeds]
        assert main([*command, "--batch", batch, "--out", str(out)]) == 0
        found[seeds] = load_file(out.with_suffix(".safetensors"))
    for name in ("x", "label"):
        assert torch.allclose(found["3,5"][name], found["0-5"][name][[3, 5]], atol=1e-3)
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(1, 8, 8, generator=generator)
    label = torch.randint(10, [1], generator=generator)
    assert found["3,5"]["label"][0] == label
    teacher = pretrained.load("digits-teacher")
    assert torch.allclose(found["3,5"]["x"][:1], _heun(teacher, z[None], label, 18), atol=1e-3)
    assert main(["sample", "--seeds", "a-b"]) == 2
    assert "seeds are written like 0-63" in capsys.readouterr().err


def _heun(denoiser, z, label, steps):
    """EDM's Algorithm 1 without churn, written down once more."""
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    levels = [(high + i / (steps - 1) * (low - high)) ** 7 for i in range(steps)] + [0.0]
    x = z.double() * 80
    for now, then in itertools.pairwise(levels):
        slope = (x - _denoised(denoiser, x, now, label)) / now
        euler = x + (then - now) * slope
        if then > 0:
            other = (euler - _denoised(denoiser, euler, then, label)) / then
            euler = x + (then - now) * (slope + other) / 2
        x = euler
    return x.float()


def _denoised(denoiser, x, sigma, label):
    return denoiser(x.float(), torch.full((len(x),), sigma), label).double()


def test_a_run_that_is_out_of_time_goes_on_with_the_same_command(tmp_path, capsys):
    command = ["train-teacher", "--steps", "25", "--batch", "4", "--out", str(tmp_path)]
    assert main([*command, "--minutes", "0.0001"]) == 0
    assert re.search(
        r"Stopped at step \d+ of 25; the same command goes on", capsys.readouterr().out
    )
    assert not (tmp_path / "teacher.safetensors").exists()
    assert main(command) == 0
    assert (tmp_path / "teacher.safetensors").exists()


@pytest.fixture
def photos(tmp_path):
    """A folder of coloured images."""
    for number in range(20):
        Image.new("RGB", (40, 30), (10 * number, 100, 200)).save(tmp_path / f"{number}.png")
    return tmp_path


def test_a_model_is_measured_against_images_of_its_own_size_and_channels(
    photos, capsys, monkeypatch
):
    """Whatever the preset's are; and the images stay 8-bit, which are four times smaller."""
    monkeypatch.delattr(Images, "take")
    command = ["evaluate", "--preset", "cifar10-small", "--model", "digits-student", "--features",
               "digits", "--data", str(photos), "--count", "20",
               "--out", str(photos / "report.json")]  # fmt: skip
    assert main(command) == 0
    report = json.loads((photos / "report.json").read_text())
    printed = capsys.readouterr()
    assert json.loads(printed.out) == report
    assert "20 images, no classes" in printed.err
    assert (report["data"], report["shape"]) == (str(photos), [1, 8, 8])
    assert report["result"]["reference_count"] == 20
    assert main([*command, "--size", "8"]) == 0
    assert main([*command, "--size", "32"]) == 2
    assert "digits-student makes images of 8 pixels, size is 32" in capsys.readouterr().err


def test_zero_pictures_and_zero_steps_of_warm_start_are_none(folder, tmp_path):
    teacher, pairs = str(folder / "teacher.safetensors"), str(folder / "pairs")
    assert main(["distill", "--teacher", teacher, "--pairs", pairs, "--out", str(tmp_path),
                 "--warm-start-steps", "0", "--steps", "2", "--batch", "2", "--batch-pairs", "2",
                 "--picture-steps", "0", "--clip", "inf"]) == 0  # fmt: skip
    assert not list(tmp_path.glob("warm-start*"))
    assert not list(tmp_path.glob("*watch*"))

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    notes = json.loads((tmp_path / "student.json").read_text(), parse_constant=refuse)
    assert notes["settings"]["clip"] is None


def test_pairs_of_another_teacher_are_refused(folder, capsys):
    command = ["distill", "--pairs", str(folder / "pairs"), "--out", str(folder / "other")]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "was made with teacher" in error
    assert "--teacher=digits-teacher --pairs=another_folder makes pairs of this teacher" in error


def test_missing_files_and_pairs_are_one_sentence(tmp_path, capsys):
    assert main(["sample", "--model", "digits-techer"]) == 2
    assert "no network's name (digits-teacher" in capsys.readouterr().err
    assert main(["distill", "--pairs", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "holds no pairs" in capsys.readouterr().err


def test_a_run_on_other_images_is_refused_and_a_finished_one_says_so(tmp_path, capsys):
    for name, colour in (("cats", 40), ("dogs", 200)):
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.new("RGB", (8, 8), (colour, number, 0)).save(tmp_path / name / f"{number}.png")
    command = ["train-teacher", "--preset", "digits", "--size", "8", "--steps", "2", "--batch", "2",
               "--out", str(tmp_path / "run"), "--data"]  # fmt: skip
    cats, dogs = ([*command, str(tmp_path / name)] for name in ("cats", "dogs"))
    assert main(cats) == 0
    kept = (tmp_path / "run" / "teacher.json").read_text()
    capsys.readouterr()
    assert main(dogs) == 2
    error = capsys.readouterr().err
    for said in ("teacher.ckpt is of another run (data: 3 of (3, 8, 8), ", "--fresh", "--out"):
        assert said in error
    assert len(error.splitlines()) == 1
    assert (tmp_path / "run" / "teacher.json").read_text() == kept
    (tmp_path / "cats").rename(tmp_path / "pets")  # the same images are the same, wherever they lie
    assert main([*command, str(tmp_path / "pets")]) == 0
    assert "all 2 steps are done, nothing is left" in capsys.readouterr().out


def test_another_setting_does_not_continue_an_old_run(folder, capsys):
    command = ["train-teacher", "--out", str(folder), "--steps", "31", "--batch", "16"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "teacher.ckpt is of another run (steps: 30 -> 31): --fresh starts over" in error


@pytest.mark.parametrize(
    ("command", "settings"), [("train-teacher", TeacherSettings), ("distill", DistillSettings)]
)
def test_help_explains_every_setting_with_the_presets_value(command, settings, capsys):
    text = help_of([command, "--preset", "cifar10-small"], capsys)
    preset = PRESETS["cifar10-small"]
    made = preset.teacher if command == "train-teacher" else preset.distill
    for values in (made, Control(), preset.compute):
        for field in fields(values):
            option = f"--{field.name.replace('_', '-')}"
            explained = re.search(rf" {option}[ ,](.*?)\(default: (.*?)\)", text)
            assert explained, option
            assert len(explained[1]) > 12, option
            assert explained[2] == str(getattr(values, field.name)), option


@pytest.mark.parametrize("command", ["make-pairs", "sample", "evaluate", "demo", "verify"])
def test_help_of_the_other_commands(command, capsys):
    """With the values of the preset that is named."""
    preset = [] if command in ("demo", "verify") else ["--preset", "cifar10-small"]
    text, values = help_of([command, *preset], capsys), commands_of("cifar10-small")[command]
    for field in fields(values):
        option = "INT" if field.name == "chapter" else f"--{field.name.replace('_', '-')}"
        explained = re.search(rf" {option}[ ,](.*?)\((default: (.*?)|required)\)", text)
        assert explained, option
        assert len(explained[1]) > 15, option
        assert explained[3] in (None, str(getattr(values, field.name))), option


def help_of(command: list[str], capsys) -> str:
    """What --help prints, without its frames and line breaks."""
    with pytest.raises(SystemExit, match="0"):
        main([*command, "--help"])
    return re.sub(r"[\s│]+", " ", capsys.readouterr().out)


def test_what_is_given_overrides_the_preset_and_nothing_else():
    command = parse(["distill", "--preset", "cifar10-t4", "--steps", "100", "--lambda-reg", ".5",
                     "--no-matching", "--minutes", "3", "--accumulation", "2"])  # fmt: skip
    preset = PRESETS["cifar10-t4"]
    assert command.settings == replace(preset.distill, steps=100, lambda_reg=0.5, matching=False)
    assert command.compute == replace(preset.compute, accumulation=2)
    assert command.control == Control(minutes=3)
    assert (command.teacher, command.warm_start_steps) == (preset.published, 2_000)
    assert command.out == Path("runs/cifar10-t4")
    own = parse(["train-teacher", "--data", "my_images/", "--size", "64"])
    assert (own.preset, own.size, own.settings) == ("own-images", 64, PRESETS["own-images"].teacher)
    for name in ("--model", "--teacher", "--student"):
        assert parse(["evaluate", name, "x", "--seed", "1"]).model == "x"


ALLOWED = {  # of each option: values that mean something; and the rest of those tried is refused
    TeacherSettings: {
        "warm_up": (0,), "learning_rate": (0,), "ema": (0,), "log_mean": (0, -1), "log_std": (0,),
        "no_label": (0,),
    },
    DistillSettings: {
        "warm_up": (0,), "learning_rate": (0,), "critic_learning_rate": (0,), "decay": (0,),
        "weight_decay": (0,), "ema": (0,), "lambda_reg": (0,), "critic_steps": (0,),
        "last_step": (0,),
    },
    Control: {"checkpoint_minutes": (0,), "minutes": (0,), "picture_steps": (0,)},
    Compute: {},
}  # fmt: skip


@pytest.mark.parametrize("settings", ALLOWED)
def test_zero_negative_and_endless_numbers_mean_something_or_are_refused_by_name(settings):
    numbers = [f.name for f in fields(settings) if type(f.default) in (int, float)]
    assert set(ALLOWED[settings]) <= set(numbers)
    for name in numbers:
        for value in (0, -1, math.nan):
            if value in ALLOWED[settings].get(name, ()):
                assert getattr(settings(**{name: value}), name) == value
            elif name not in ("seed", "log_mean"):
                with pytest.raises(ValueError, match=f"^{name} must be .*, not {value}"):
                    settings(**{name: value})


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["train-teacher", "--size", "0"], "size must be at least 1, not 0"),
        (["train-teacher", "--picture-steps", "-1"], "picture_steps must be at least 0, not -1"),
        (["distill", "--count", "0"], "count must be at least 1, or None, not 0"),
        (["distill", "--warm-start-steps", "-1"], "warm_start_steps must be at least 0, not -1"),
        (["distill", "--clip", "0"], "clip must be above 0, not 0.0"),
        (["distill", "--weighting", "eq9"], "eq9"),
        (["distill", "--no-matching", "--lambda-reg", "0"], "nothing else is learnt"),
        (["distill", "--grid-max", "0"], "grid_max must be above 0, not 0.0"),
        (["distill", "--stepps", "3"], "Unrecognized options: --stepps"),
        (["distill", "--steps", "many"], "invalid literal"),
        (["distill", "--mixed-precision", "fp8"], "fp8"),
        (["distill", "--accumulation", "0"], "1 part or more, not 0"),
        (["distill", "--preset", "cifar"], "there is no preset 'cifar', but digits, demo"),
        (["train-teacher", "--preset", "own-images", "--data", ""], "which images?"),
        (["train-teacher", "--preset", "own-images"], "which images?"),
        (["survey"], "survey"),
        ([], "Expected one of"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(command, said, capsys):
    try:
        status = main(command)
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    error = re.sub(r"[\s│]+", " ", capsys.readouterr().err)
    assert said in error
    assert "Traceback" not in error


def test_what_a_later_stage_cannot_do_is_told_before_the_first(
    folder, tmp_path, monkeypatch, capsys
):
    """No network is trained and no sample is drawn before options and files have been looked at."""

    def worked(*_, **__):
        raise AssertionError("work has begun")

    def missing(*_, **__):
        raise OSError("no network")

    for name in ("_drive", "draw", "make_pairs"):
        monkeypatch.setattr(pipeline, name, worked)
    monkeypatch.setattr("lpips.LPIPS", missing)
    monkeypatch.setattr(features, "create_feature_extractor", missing)
    (tmp_path / "file").write_text("")
    few, none = tmp_path / "few", str(tmp_path / "no such pairs")
    few.mkdir()
    for number in range(3):
        Image.new("L", (8, 8)).save(few / f"{number}.png")
    pairs, inside = ["--pairs", str(folder / "pairs")], str(tmp_path / "file" / "out")
    distill = ["distill", "--teacher", str(folder / "teacher.safetensors"), *pairs]
    made = f"dmd make-pairs --preset=digits --teacher=digits-teacher '--pairs={none}' makes pairs"
    few_pairs = f"--preset=digits {distill[1]}={distill[2]} --pairs={pairs[1]}"
    unlike = tmp_path / "unlike.safetensors"
    student = OneStepGenerator(EDMDenoiser(UNet(size=16, width=8, embedding=16)))
    pretrained.save_denoiser(unlike, student)
    low = tmp_path / "low.safetensors"
    same = pretrained.load(folder / "teacher.safetensors")
    pretrained.save_denoiser(low, OneStepGenerator(same, sigma_max=10.0))
    for command, said in {
        (*distill, "--distance", "lpips"): "LPIPS needs torchvision's ImageNet weights",
        (*distill, "--batch", "30", "--accumulation", "4"): "cannot be cut into 4 equal parts",
        (*distill, "--out", inside): f"{inside} cannot be written: Not a directory",
        (*distill, "--start", "digits-teacher"): "digits-teacher is no student, but a teacher",
        (*distill, "--start", str(unlike)): "unlike.safetensors makes other images or classes than",
        (*distill, "--start", str(low)): "starts from level 10, the teacher's range ends at 80",
        ("distill", "--teacher", "digits-student"): "digits-student is no teacher, but a student",
        ("distill", "--pairs", none): made,
        (*distill, "--count", "1001"): f"1001 are wanted; dmd make-pairs {few_pairs} --count=2000",
        ("make-pairs", "--teacher", "digits-student"): "digits-student is no teacher, but a stu",
        ("make-pairs", "--pairs", inside): f"{inside} cannot be written",
        ("train-teacher", "--out", inside): f"{inside} cannot be written",
        ("sample", "--out", f"{inside}/x"): f"{inside} cannot be written",
        ("evaluate", "--out", f"{inside}/x"): f"{inside} cannot be written",
        ("evaluate", "--features", "inceptoin"): "features must be one of",
        ("evaluate", "--features", "inception"): "Inception weights are neither in",
        ("evaluate", "--features", "no.safetensors"): "no.safetensors",
        ("evaluate", "--data", "no_such_folder"): "no_such_folder is neither a path nor",
        ("evaluate", "--preset", "own-images", "--model", "digits-student"): "which images?",
        ("evaluate", "--data", few): "has 3 images of shape (1, 8, 8): at least 4 of shape",
        ("evaluate", "--model", str(unlike)): "digits has 1797 images of shape (1, 8, 8): at least",
    }.items():
        assert main([*map(str, command)]) == 2, command
        *others, error = capsys.readouterr().err.splitlines()
        assert said in error, command
        assert len(others) == (few in command), command  # what images they are


def test_what_is_meant_for_both_stages_reaches_the_warm_start_and_the_memory(folder, monkeypatch):
    both = {"batch": 8, "batch_pairs": 12, "clip": 3.0, "weight_decay": 0.5, "distance": "l2",
            "seed": 4}  # fmt: skip
    others = {"learning_rate": 1, "grid_max": 9, "warm_start_steps": 7}
    given = [f"--{name.replace('_', '-')}={value}" for name, value in (both | others).items()]
    preset = PRESETS["cifar10-t4"]
    command = parse(["distill", "--preset", "cifar10-t4", *given])
    assert command.warm_start == replace(preset.warm_start, steps=7, **both)
    assert parse(["distill", "--preset", "cifar10-t4"]).warm_start == preset.warm_start
    told, run = [], ["distill", "--pairs", str(folder / "pairs"), "--out", str(folder / "memory"),
                     "--teacher", str(folder / "teacher.safetensors")]  # fmt: skip
    monkeypatch.setattr(memory, "say", lambda needs, *_: told.append(needs(Compute())))
    monkeypatch.setattr(pipeline, "make_student_in", lambda *_: None)
    for options in (["--batch", "4"], ["--warm-start-steps", "0", "--batch", "4"]):
        assert main([*run, *options]) == 0
    warm, distil = (estimate["activations"] for estimate in told)
    assert warm * (4 + 64) == distil * 128  # the digits' warm start takes 128 pairs


def test_a_training_that_is_stopped_goes_on_to_the_same_weights(tmp_path, monkeypatch, capsys):
    small = replace(PRESETS["digits"], network_options={"width": 8})
    monkeypatch.setitem(PRESETS, "digits", small)
    command = ["train-teacher", "--steps", "5", "--batch", "4", "--out"]
    assert main([*command, str(tmp_path / "straight")]) == 0
    kinds, watched = {2: signal.SIGINT, 4: signal.SIGTERM}, monitor.Watch.__call__
    handlers = [signal.getsignal(kind) for kind in kinds.values()]

    def stopped(watch, metric, seconds):
        watched(watch, metric, seconds)
        if metric.step in kinds:
            signal.raise_signal(kinds[metric.step])

    monkeypatch.setattr(monitor.Watch, "__call__", stopped)
    capsys.readouterr()
    for step in kinds:
        assert main([*command, str(tmp_path / "stopped")]) == 130
        said = f"stopped at step {step} of 5; the same command goes on"
        assert capsys.readouterr().err == f"dmd train-teacher: {said}\n"
        assert [signal.getsignal(kind) for kind in kinds.values()] == handlers
    assert main([*command, str(tmp_path / "stopped")]) == 0
    one, other = (
        load_file(tmp_path / name / "teacher.safetensors") for name in ("straight", "stopped")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    twice = pipeline.Stop()
    twice()
    twice()  # as a launcher passes on what its process group has got, too
    twice.asked -= 2
    with pytest.raises(KeyboardInterrupt):  # who asks again does not wait for the step's end
        twice()


def test_pairs_and_samples_move_their_bars_by_the_network_s_calls_and_can_be_stopped(
    tmp_path, monkeypatch, capsys
):
    moved, update = {}, monitor.Progress.update

    def moving(bar, n=1):
        update(bar, n)
        moved.setdefault(bar.desc, []).append(bar.n)
        if len(moved[bar.desc]) == stop_at:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(monitor.Progress, "update", moving)
    pairs = ["make-pairs", "--count", "1000", "--steps", "2", "--batch", "500",
             "--pairs", str(tmp_path / "pairs")]  # fmt: skip
    sample = ["sample", "--teacher", "digits-teacher", "--count", "6", "--steps", "2",
              "--batch", "3", "--out", str(tmp_path / "samples")]  # fmt: skip
    stopped = {"make-pairs": "stopped with 0 of 1000 pairs; the same", "sample": "stopped"}
    for command in (pairs, sample):
        stop_at = 2
        assert main(command) == 130
        assert capsys.readouterr().err.startswith(f"dmd {command[0]}: {stopped[command[0]]}")
        stop_at = 0
        assert main(command) == 0
    assert moved["pairs"][2:] == pytest.approx([1000 / 6 * call for call in (1, 2, 3, 4, 5, 6, 6)])
    assert moved["samples"][2:] == pytest.approx([1, 2, 3, 4, 5, 6])
    assert main(["sample", "--count", "6", "--batch", "3", "--out", str(tmp_path / "samples")]) == 0
    assert moved["samples"][8:] == [3, 6]  # the shipped student, in one call each


def test_a_class_may_be_named(tmp_path, capsys):
    for name, colour in (("cats", 40), ("dogs", 200)):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("L", (8, 8), colour).save(tmp_path / "pets" / name / f"{number}.png")
    out, pairs = tmp_path / "run", str(tmp_path / "run" / "pairs")
    size = ["--preset", "digits", "--out", str(out)]
    assert main(["train-teacher", "--data", str(tmp_path / "pets"), "--size", "8", *size,
                 "--steps", "1", "--batch", "2"]) == 0  # fmt: skip
    assert "6 images, 2 classes (0 cats: 3, 1 dogs: 3)" in capsys.readouterr().out
    teacher = str(out / "teacher.safetensors")
    assert main(["make-pairs", "--teacher", teacher, "--count", "1000", "--steps", "1",
                 "--pairs", pairs]) == 0  # fmt: skip
    assert main(["distill", *size, "--teacher", teacher, "--pairs", pairs, "--warm-start-steps",
                 "0", "--steps", "1", "--batch", "2", "--batch-pairs", "2"]) == 0  # fmt: skip
    command = ["sample", "--count", "2", "--steps", "1", "--out", str(tmp_path / "x"), "--label"]
    for model in (teacher, str(out / "student.safetensors")):
        for label in ("dogs", "1"):
            assert main([*command, label, "--model", model]) == 0
            assert load_file(tmp_path / "x.safetensors")["label"].tolist() == [1, 1]
        assert main([*command, "birds", "--model", model]) == 2
        assert "there is no class 'birds'; the classes are cats, dogs" in capsys.readouterr().err
    assert main([*command, "nine"]) == 2
    assert "there is no class 'nine'; the classes are without names" in capsys.readouterr().err


def test_version_and_presets(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dmd {__version__}\n"
    assert main(["presets"]) == 0
    tables = capsys.readouterr().out.split("\n\n")
    assert [table.partition("\n")[0] for table in tables] == list(PRESETS)
    table = tables[list(PRESETS).index("cifar10-t4")]
    for said in ("cifar10, (3, 32, 32), 10", "edm-cifar10-32x32-cond-vp", "10,000, 18 Heun steps",
                 "2,000 steps of 64 pairs, rate 0.0001", "4,000 steps of 64", "2e-05 and 5e-05",
                 "6 hours on a T4"):  # fmt: skip
        assert said in table


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("make-pairs", ("count", "steps", "batch", "seed")),
        ("sample", ("count", "steps", "batch", "seed", "label")),
        ("evaluate", ("count", "steps", "batch", "seed", "size")),
        ("train-teacher", ("size",)),
    ],
)
def test_a_number_that_means_nothing_is_refused_by_the_option_s_name(
    command, options, tmp_path, capsys
):
    teacher = ["--teacher", "digits-teacher"] if command != "train-teacher" else []
    for option in options:
        for value in ["-2"] if option in ("seed", "label") else ["0", "-2"]:
            try:
                status = main([command, *teacher, f"--{option}", value, "--pairs", str(tmp_path)]
                              if command == "make-pairs" else
                              [command, *teacher, f"--{option}", value])  # fmt: skip
            except SystemExit as stopped:
                status = stopped.code
            error = re.sub(r"[\s│]+", " ", capsys.readouterr().err)
            assert status == 2, (option, value)
            assert option in error
            assert value in error


def test_an_option_that_the_model_cannot_use_is_refused(tmp_path, capsys):
    path = tmp_path / "unconditional.safetensors"
    pretrained.save_denoiser(path, EDMDenoiser(UNet(width=8, embedding=16, classes=0)))
    command = ["sample", "--model", str(path), "--steps", "1", "--count", "2"]
    assert main([*command, "--out", str(tmp_path / "samples")]) == 0
    assert main([*command, "--label", "3"]) == 2
    assert "has no classes, label is 3" in capsys.readouterr().err
    assert main([*command, "--seeds", "5-3"]) == 2
    assert "5-3 end before they begin" in capsys.readouterr().err


def test_the_demo_goes_the_whole_way_and_continues_where_it_stopped(tmp_path, monkeypatch, capsys):
    demo = PRESETS["demo"]
    short = replace(
        demo,
        teacher=replace(demo.teacher, steps=3, batch=4),
        pairs=1000,
        pair_steps=1,
        warm_start=replace(demo.warm_start, steps=3, batch_pairs=4),
        distill=replace(demo.distill, steps=2, batch=4, batch_pairs=4),
    )
    monkeypatch.setitem(PRESETS, "demo", short)
    for fresh in ([], ["--fresh"]):
        assert main(["demo", "--out", str(tmp_path), *fresh]) == 0
        assert "One-step samples" in capsys.readouterr().out
    for name in ("teacher", "warm-start", "student"):
        notes = json.loads((tmp_path / f"{name}.json").read_text())
        assert notes["preset"] == "demo"
        assert notes["command"] == f"dmd demo --out {tmp_path} --fresh"
    assert (tmp_path / "student.png").exists()


def test_a_result_names_the_commit_of_the_clone():
    root = Path(provenance.__file__).parents[2]
    if not (root / ".git").exists():
        pytest.skip("not a clone")
    assert re.fullmatch(r"[0-9a-f]{12}\+?", provenance.provenance()["commit"])


def test_verify_wants_a_clone(tmp_path, capsys):
    assert main(["verify", "1", "--book", str(tmp_path)]) == 2
    assert "give --book" in capsys.readouterr().err


@pytest.mark.slow
def test_your_own_images_go_the_whole_way(tmp_path, capsys):
    folder, out = tmp_path / "my_images", tmp_path / "run"
    folder.mkdir()
    for number in range(20):
        colour = (10 * number, 100, 200)
        Image.new("RGB", (40, 30), colour).save(folder / f"{number}.jpg")
    teacher, pairs = str(out / "teacher.safetensors"), str(out / "pairs")
    commands = [
        ["train-teacher", "--data", str(folder), "--size", "16", "--steps", "2", "--batch", "4"],
        ["make-pairs", "--teacher", teacher, "--pairs", pairs, "--count", "1000", "--steps", "1"],
        ["distill", "--teacher", teacher, "--pairs", pairs, "--warm-start-steps", "1",
         "--steps", "1", "--batch", "2", "--batch-pairs", "2"],
        ["sample", "--model", str(out / "student.safetensors"), "--count", "4",
         "--out", str(out / "samples")],
    ]  # fmt: skip
    for command in commands:
        extra = ["--out", str(out)] if command[0] in ("train-teacher", "distill") else []
        assert main([*command, *extra]) == 0, capsys.readouterr().err
    notes = pretrained.made_by(out / "student.safetensors")
    assert notes["preset"] == "own-images"  # found in the teacher's file
    assert load_file(out / "samples.safetensors")["x"].shape == (4, 3, 16, 16)
    (folder / "broken.jpg").write_text("")
    assert main(commands[0]) == 2
    assert "broken.jpg cannot be read" in capsys.readouterr().err


def test_runs_go_to_drive_where_it_is_mounted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert provenance.runs_folder() == Path("runs")
    monkeypatch.setattr(provenance, "DRIVE", tmp_path / "MyDrive")
    (tmp_path / "MyDrive").mkdir()
    assert main(["train-teacher", "--steps", "1", "--batch", "2"]) == 0
    kept = tmp_path / "MyDrive" / "dmd-tutorial" / "digits"
    assert (kept / "teacher.ckpt").exists()
    assert (kept / "teacher.safetensors").exists()
    assert not (tmp_path / "runs").exists()


def test_no_noise_is_drawn_for_two_purposes(tmp_path, monkeypatch):
    """Training, pairs, evaluation, samples, the grid beside a network; seeds 0 to 99 of each."""
    drawn: dict[str, list[torch.Tensor]] = {}
    monkeypatch.setattr(anchor, "CHUNK", 20)
    monkeypatch.setattr(anchor, "sample", lambda _, z, *__, **___: z + 0)
    commands, network = commands_of("digits"), pretrained.load("digits-teacher")
    monkeypatch.setattr(pretrained, "load", lambda *_: network)
    monkeypatch.setattr(Evaluate, "reference", lambda *_: None)
    monkeypatch.chdir(tmp_path)  # where folders of results are made

    class Drawn(Exception): ...

    def draw(purpose: str):
        def caught(_, z, *__, **___):
            drawn.setdefault(purpose, []).append(z)
            raise Drawn

        return caught

    trained = pipeline.Trained(network, TeacherSettings(), 0.0)
    monkeypatch.setattr(pipeline, "draw", draw("pictures"))
    with pytest.raises(Drawn):
        pipeline.keep(tmp_path / "teacher", trained, {})
    for seed in range(100):
        drawn.setdefault("training", []).append(torch.randn(20, 1, 8, 8, generator=_Run(seed).rng))
        for name in ("sample", "evaluate"):
            monkeypatch.setattr(pipeline, "draw", draw("pictures" if name == "sample" else name))
            with pytest.raises(Drawn):
                replace(commands[name], seed=seed, count=20).run("")
        folder = tmp_path / f"{seed}"
        list(anchor.make_pairs(network, folder, 60, (1, 8, 8), steps=1, seed=seed))
        drawn.setdefault("pairs", []).append(anchor.load_pairs(folder).z)
    met = {name: set(map(tuple, torch.cat(zs)[:, 0, 0, :4].tolist())) for name, zs in drawn.items()}
    for one, other in itertools.combinations(met, 2):
        assert not met[one] & met[other], (one, other)
    assert len(met["pairs"]) == 6000

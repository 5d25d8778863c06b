"""The measurements at full size: what they cost, counted; every stage at a size for a CPU."""

import copy
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import full_size, travel
from benchmarks.cards import CARDS, forward_flop
from benchmarks.plan import (
    REDUCED,
    STAGES,
    VARIANTS,
    Plan,
    Stage,
    counted,
    evaluations,
    settings_of,
    table,
)
from dmd_tutorial import dmd, training
from dmd_tutorial.anchor import Pairs
from dmd_tutorial.data import Images
from dmd_tutorial.runs.images import load_images
from dmd_tutorial.runs.presets import CIFAR10_SMALL
from dmd_tutorial.runs.provenance import provenance
from dmd_tutorial.survey.score_distillation import Dmd2Settings, Judge

PLAN = Path(__file__).parents[1] / "book" / "results" / "cifar10-plan.json"
FULL = CIFAR10_SMALL.distill


@pytest.fixture(scope="module")
def costs():
    return counted(Plan())


def settings(name):
    return settings_of(Stage(name, 0, 1), CIFAR10_SMALL)


# --- counts ---------------------------------------------------------------------------------------


def test_budgets_are_equal_and_counted():
    """By hand, for 128 samples and 128 pairs; one evaluation is one image through one network."""
    counts = {
        "full": 3 * 256 + 2 * 128 + 3 * 128,
        "without distribution matching": 3 * 128,
        "without anchor": 3 * 128 + 2 * 128 + 3 * 128,
        "five critic steps": 3 * 256 + 2 * 128 + 5 * 3 * 128 + 4 * 128,
        "DMD2": 3 * 128 + 2 * 128 + 1.5 * 128 + 5 * 4.5 * 128 + 4 * 128,
    }
    for name, count in counts.items():
        assert evaluations(settings(name)) == count, name
        assert settings(name).steps * count == pytest.approx(FULL.steps * counts["full"], rel=1e-3)
    assert isinstance(settings("DMD2"), Dmd2Settings)
    for name, changes in VARIANTS.items():
        assert changes.items() <= vars(settings(name)).items()


@pytest.mark.parametrize("name", ["full", "without anchor", "five critic steps", "DMD2"])
def test_evaluations_are_what_an_iteration_computes(name):
    of = replace(settings(name), batch=1, batch_pairs=1)
    teacher, images = CIFAR10_SMALL.new_teacher().eval(), torch.zeros(4, 3, 32, 32)
    judge = Judge(copy.deepcopy(teacher)) if name == "DMD2" else None
    run = training.DistillationRun(teacher, of, None, judge)
    label, step = torch.arange(4), dmd.iteration
    if name == "DMD2":
        step = of.step(Images(images, label, 10), (3, 32, 32), 10)
    loop = training.distill(run, (3, 32, 32), 10, Pairs(images, images, label), iteration=step)
    with FlopCounterMode(display=False) as counter:
        next(loop)
    one = forward_flop(CIFAR10_SMALL.new_teacher())
    assert counter.get_total_flops() == pytest.approx(evaluations(of) * one, rel=0.01)


def test_a_large_card_does_the_plan_in_two_leases_and_a_small_one_a_lease_in_an_evening(costs):
    for lease in (1, 2):
        rows = [row for row in costs["stages"] if row["lease"] == lease]
        assert rows
        assert all(row["minutes"]["H100"] < 9 for row in rows)
        assert sum(row["minutes"]["H100"] for row in rows) < 20
        assert sum(row["minutes"]["T4"] for row in rows) < 5.5 * 60


def test_the_recorded_plan_is_what_is_counted_today(costs):
    """`python -m benchmarks.full_size --dry-run --record` writes it."""
    assert json.loads(PLAN.read_text()) == json.loads(json.dumps(costs))
    assert costs["cards"].keys() == CARDS.keys()
    assert [Stage(row["name"], row["seed"], row["lease"]) for row in costs["stages"]] == [*STAGES]


def test_measured_minutes_stand_beside_counted_ones(costs):
    measured = {"teacher, seed 0, lease 1": {"seconds": 402.0, "device": "some card"}}
    said = table(costs, measured).splitlines()
    assert "nobody has measured them" in said[0]
    assert [line for line in said if "measured, some card" in line] == [
        line for line in said if line.startswith("teacher") and "6.7 measured" in line
    ]
    sums = [line.split() for line in said if "together" in line]
    for lease, words in enumerate(sums, 1):
        rows = [row["pflop"] for row in costs["stages"] if row["lease"] == lease]
        assert float(words[3]) == pytest.approx(sum(rows), abs=0.01)


# --- what travels ---------------------------------------------------------------------------------


@pytest.fixture
def squares(tmp_path):
    """A folder of 40 small JPEGs in ten classes, with one file that is no image."""
    folder = tmp_path / "squares"
    for number in range(40):
        path = folder / f"class {number % 10}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", (32, 32), (6 * number, 255 - 6 * number, 80))
        image.paste((255, 0, 6 * number), (4, 4, 20, 9))
        image.save(path)
    (folder / "notes.txt").write_text("no image")
    return folder


def same(images, others):
    assert images[2:] == others[2:]
    assert torch.equal(images.x, others.x)
    assert torch.equal(images.label, others.label)


def test_packed_images_are_the_same_to_the_bit(squares, tmp_path, monkeypatch):
    file, work = tmp_path / "images.tar.xz", tmp_path / "work"
    work.mkdir()
    arguments = ["--data", str(squares), "--pack", str(file)]
    assert full_size.main(arguments) == 0
    first = file.read_bytes()
    assert full_size.main(arguments) == 0
    assert file.read_bytes() == first
    with tarfile.open(file) as archive:
        assert len(archive.getnames()) == 40
    wanted = load_images(squares, 32, 3)
    same(travel.unpack(file, 32, work), wanted)
    assert [path.name for path in work.iterdir()] == ["images.safetensors"]
    with monkeypatch.context() as patched:  # the second time nothing is unpacked
        patched.setattr(travel, "load_images", None)
        same(travel.unpack(file, 32, work), wanted)
    (squares / "class 3" / "3.jpg").unlink()  # other images: what was kept is not used
    travel.pack(str(squares), file)
    assert len(travel.unpack(file, 32, work).x) == 39


def test_what_cannot_be_packed_or_unpacked_is_refused(squares, tmp_path, capsys):
    for data, why in (("cifar10", "163 MB"), (str(squares / "notes.txt"), "no folder")):
        with pytest.raises(SystemExit, match="2"):
            full_size.main(["--data", data, "--pack", str(tmp_path / "a.tar.xz")])
        assert why in capsys.readouterr().err
    with tarfile.open(tmp_path / "bad.tar.xz", "w:xz") as archive:
        archive.add(squares / "notes.txt", "../outside.jpg")
    with pytest.raises(tarfile.OutsideDestinationError):
        travel.unpack(tmp_path / "bad.tar.xz", 32, tmp_path)
    assert not (tmp_path.parent / "outside.jpg").exists()


def test_what_travels_is_few_files_and_small(tmp_path):
    folder, large = tmp_path / "sent", tmp_path / "large.safetensors"
    large.write_bytes(bytes(travel.EACH))
    with pytest.raises(ValueError, match=r"large.safetensors has 16.0 MiB"):
        travel.send(folder, [large])
    large.write_bytes(bytes(travel.EACH - 1))
    travel.send(folder, [large])
    assert not travel.no_room(folder, dict.fromkeys("abcdefg", 1))
    assert "9 files" in travel.no_room(folder, dict.fromkeys("abcdefgh", 1))
    assert "MiB" in travel.no_room(folder, dict.fromkeys("abcd", travel.EACH - travel.MIB))
    parameters = sum(p.numel() for p in CIFAR10_SMALL.new_teacher().parameters())
    assert 2 * parameters + travel.MIB < travel.EACH


def test_a_call_stops_before_a_stage_whose_files_have_no_room(squares, tmp_path, capsys):
    sent = tmp_path / "sent"
    sent.mkdir()
    for number in range(7):
        (sent / f"{number}").touch()
    command = ["--reduced", "--data", str(squares), "--work", str(tmp_path / "work"),
               "--out", str(tmp_path / "out"), "--device", "cpu", "--send", str(sent)]  # fmt: skip
    assert full_size.main(command) == 3
    said = capsys.readouterr().out
    assert "Stopped before classifier, seed 0, lease 1" in said
    assert "9 files, 8 may travel" in said


# --- the whole plan -------------------------------------------------------------------------------


class Machines:
    """Machines that know only what was sent, one after the other."""

    def __init__(self, data, home):
        self.data, self.home, self.carried, self.number = data, home, {}, 0
        self.replace()

    def replace(self):
        self.number += 1
        self.work = self.home / f"machine-{self.number}"
        self.work.mkdir(parents=True)
        for name in self.needed() if self.number > 1 else ():
            (self.work / name).write_bytes(self.carried[name])

    def needed(self):
        """What the program says that its next call needs, from the numbers alone."""
        (self.work / "cifar10-small.json").write_bytes(self.carried["cifar10-small.json"])
        options = SimpleNamespace(
            work=self.work, out=self.work, minutes=1, lease=None, reduced=True
        )
        results = full_size.Results(options, REDUCED)
        return results.needed(results.left())

    def call(self, *options):
        sent, out = self.home / "sent", self.home / "out"
        shutil.rmtree(sent, ignore_errors=True)
        command = ["--reduced", "--data", str(self.data), "--work", str(self.work), "--out",
                   str(out), "--device", "cpu", "--note", "squares", *options]  # fmt: skip
        status = full_size.main([*command, "--send", str(sent)])
        files = list(sent.glob("*"))
        assert len(files) <= 8
        assert sum(path.stat().st_size for path in files) <= 64 * 2**20
        assert all(path.stat().st_size < 16 * 2**20 for path in files)
        self.carried |= {path.name: path.read_bytes() for path in files}
        return status

    @property
    def report(self):
        return json.loads((self.work / "cifar10-small.json").read_text())

    def begun(self, stage):
        """Whether a stage has left something to go on from."""
        if stage.name == "pairs":
            return len(list((self.work / f"pairs-{stage.seed}").glob("*.safetensors"))) == 1
        if stage.name == "evaluation of the teacher":
            return (self.work / "samples.pt").exists()
        file = "teacher" if stage.name == "teacher" else stage.file
        return (self.work / f"{file}.ckpt").exists()


def finish(machines, stage, capsys):
    """Each stage that is left, up to this one: interrupted inside, then done by a second call."""
    done = []
    while done[-1:] != [stage]:
        at_once = machines.call("--minutes", "0") == 3, capsys.readouterr().out
        (doing,) = [s for s in STAGES if f"Stopped in {s};" in at_once[1]] or [STAGES[0]]
        if doing.name != "classifier":  # a minute's work, in one piece
            assert at_once[0]
            assert machines.begun(doing), doing
            assert machines.call("--stages", "1") == (0 if doing == STAGES[-1] else 3)
        assert f"{doing}: done" in at_once[1] + capsys.readouterr().out
        done.append(doing)
    return done


def numbers(report):
    """What does not depend on when and how often a run was interrupted."""
    others = {"seconds", *provenance()}
    return [{k: v for k, v in row.items() if k not in others} for row in report["rows"]]


@pytest.mark.slow
def test_the_whole_plan_on_machines_that_are_interrupted_and_replaced(squares, tmp_path, capsys):
    data, whole = tmp_path / "images.tar.xz", tmp_path / "whole"
    travel.pack(str(squares), data)
    command = ["--reduced", "--data", str(data), "--work", str(whole), "--out",
               str(tmp_path / "out"), "--device", "cpu", "--note", "squares"]  # fmt: skip
    assert full_size.main(command) == 0
    said = capsys.readouterr().out
    made = [s for s in STAGES if s != Stage("pairs", 0, 2)]  # those of lease 1 are still there
    assert sorted(made, key=lambda stage: said.index(f"{stage}: done")) == made
    undisturbed = json.loads((whole / "cifar10-small.json").read_text())

    machines, order = Machines(data, tmp_path / "borrowed"), []
    for stage in STAGES:
        order += finish(machines, stage, capsys)
        if stage.lease == 2 and stage.name == "DMD2":  # seed 0 is done
            assert machines.needed() == [
                "cifar10-small.json", "classifier.safetensors", "teacher.safetensors",
                "teacher-statistics.safetensors",
            ]  # fmt: skip
        machines.replace()
    assert list(dict.fromkeys(order)) == [*STAGES]
    assert numbers(machines.report) == numbers(undisturbed)
    assert machines.call() == 0  # nothing is done twice
    assert machines.report["stages"].keys() == {str(stage) for stage in STAGES}

    report = machines.report
    assert report["unseen"]["samples"] == 4
    rows = {(row["name"], row["seed"]): row for row in report["rows"]}
    wanted = {(s.row, s.seed): s for s in STAGES if s.name not in ("classifier", "pairs")}
    del wanted["teacher", 0]
    wanted["teacher", 0] = Stage("evaluation of the teacher", 0, 1)
    assert rows.keys() == wanted.keys()
    assert len(report["rows"]) == len(rows)
    assert (report["note"], report["reduced"]) == ("squares", True)
    for (name, seed), row in rows.items():
        assert row["lease"] == wanted[name, seed].lease
        assert row["frechet"] == pytest.approx(sum(noise := row["frechet_by_noise"]) / len(noise))
        assert row["frechet"] > 0
        assert row["floor"]["frechet"] > 0
        assert (row["samples"], row["note"], row["drawn_in"]) == (100, "squares", "bf16")
        assert {"device", "driver", "commit", "versions", "settings"} <= set(row)
        if name != "teacher":
            assert noise[0] != noise[1]
            assert (row["pairs_seed"], row["evaluation_seeds"]) == (seed, [seed, 1000 + seed])
            assert row["frechet_to_teacher"] > 0
    for name in ("full", "regression"):  # every seed has its own pairs and noise
        assert rows[name, 0]["frechet_by_noise"] != rows[name, 1]["frechet_by_noise"]
    for picture in (tmp_path / "borrowed" / "out").glob("*.png"):
        assert picture.stat().st_size < 60_000


def test_a_lease_without_what_it_goes_on_from_is_refused(squares, tmp_path, capsys):
    command = ["--reduced", "--data", str(squares), "--work", str(tmp_path / "work"), "--device",
               "cpu", "--out", str(tmp_path / "out"), "--lease", "2"]  # fmt: skip
    with pytest.raises(SystemExit, match="2"):
        full_size.main(command)
    said = capsys.readouterr().err
    assert "work lacks cifar10-small.json, classifier.safetensors, teacher.safetensors, " in said
    assert "regression-0.safetensors: do the lease before" in said


def test_a_run_does_not_go_on_from_one_of_another_size(tmp_path, capsys):
    work, arguments = tmp_path / "work", ["--device", "cpu", "--out", str(tmp_path / "out")]
    work.mkdir()
    (work / "cifar10-small.json").write_text(json.dumps({"rows": [], "reduced": False}))
    with pytest.raises(SystemExit, match="2"):
        full_size.main(["--reduced", "--work", str(work), *arguments])
    assert "is of a run at another size" in capsys.readouterr().err


def test_reduced_numbers_do_not_reach_the_book_and_a_cpu_is_not_kept_for_weeks(capsys):
    for arguments in (["--reduced"], ["--device", "cpu"]):
        with pytest.raises(SystemExit, match="2"):
            full_size.main(arguments)
    said = capsys.readouterr().err
    assert "must not write to book/results" in said
    assert "without a GPU" in said

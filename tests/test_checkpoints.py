"""Interruption is normal: killed processes, full disks, damaged files."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch

from dmd_tutorial import files
from dmd_tutorial.anchor import Pairs
from dmd_tutorial.checks import NotFiniteError
from dmd_tutorial.data import digits
from dmd_tutorial.denoisers import EDMDenoiser
from dmd_tutorial.generators import OneStepGenerator
from dmd_tutorial.networks import UNet
from dmd_tutorial.runs import pipeline
from dmd_tutorial.runs.checkpoints import before, load_checkpoint, newest, save_checkpoint
from dmd_tutorial.runs.pipeline import Control
from dmd_tutorial.training import DistillSettings, TeacherSettings

STEPS = 150
TRAIN = ["train-teacher", "--steps", str(STEPS), "--batch", "4", "--checkpoint-minutes", "0"]

# One process imports the package, then forks the command again and again and kills it at a random
# moment after its first step: at the next steps, or in the middle of writing a checkpoint.
KILLER = """
import os, random, signal, sys, time
from pathlib import Path
from dmd_tutorial.runs.cli import main
command, out, kills = sys.argv[3:], Path(sys.argv[1]), int(sys.argv[2])
moments, killed, written = random.Random(0), 0, set()
def times():
    try:
        return {path.stat().st_mtime_ns for path in out.glob("*.ckpt")}
    except FileNotFoundError:  # just being renamed
        return set()
while True:
    child = os.fork()
    if child == 0:
        sys.stderr = sys.stdout = open(os.devnull, "w")
        os._exit(main([*command, "--out", str(out)]))
    if killed < kills:
        at_start = times()
        while times() == at_start:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.06))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        killed += 1
        written |= times()
    else:
        break
print(killed, os.waitstatus_to_exitcode(status), len(written))
"""


def state_of(folder) -> dict:
    return torch.load(folder / "teacher.ckpt", weights_only=True)["state"]


@pytest.mark.slow
def test_killed_twenty_times_a_run_ends_with_the_weights_of_an_undisturbed_one(tmp_path):
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    killed.mkdir()
    straight.mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    results = []
    for folder, kills in ((straight, 0), (killed, 20)):
        done = subprocess.run(
            [sys.executable, "-c", KILLER, str(folder), str(kills), *TRAIN],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        results.append(done.stdout.split())
    assert [result[:2] for result in results] == [["0", "0"], ["20", "0"]]
    assert int(results[1][2]) >= 15  # different checkpoints that kills left behind
    one, other = state_of(straight), state_of(killed)
    assert one["step"] == other["step"] == STEPS
    for name in ("network", "ema"):
        for key, value in one[name].items():
            assert torch.equal(value, other[name][key]), (name, key)
    notes = json.loads((killed / "teacher.json").read_text())
    assert notes["settings"]["steps"] == STEPS
    left = {path.name for path in killed.iterdir()}
    wanted = {"ckpt", "ckpt.before", "safetensors", "json", "png"}
    assert left >= {f"teacher.{ending}" for ending in wanted}
    assert not [name for name in left if name.endswith((".part", ".new"))]


def test_the_last_two_are_kept_and_a_damaged_one_is_stepped_over(tmp_path, capsys):
    path = tmp_path / "run.ckpt"
    assert newest(path) is None
    for step in range(3):
        save_checkpoint({"step": step}, {"seed": 1}, path)
    assert sorted(tmp_path.iterdir()) == [path, before(path)]
    assert load_checkpoint(path, {"seed": 1}) == ({"step": 2}, {"seed": 1})
    path.write_bytes(path.read_bytes()[:-100])
    assert load_checkpoint(path, {})[0] == {"step": 1}
    assert "Continuing from" in capsys.readouterr().out
    path.unlink()  # as after a kill between the two renamings
    assert newest(path) == before(path)
    assert load_checkpoint(path, {})[0] == {"step": 1}
    before(path).write_bytes(b"")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_checkpoint(path, {})


def small(seed: int) -> EDMDenoiser:
    torch.manual_seed(seed)
    return EDMDenoiser(UNet(width=8, embedding=16))


def pairs(seed: int) -> Pairs:
    z, y = torch.randn(2, 8, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return Pairs(z, y, torch.arange(8))


SHORT = DistillSettings(steps=2, batch=2, batch_pairs=2, grid_max=5.0)
WARM = replace(SHORT, matching=False)


def distilled(folder, warm=WARM, **other) -> pipeline.Trained:
    parts = {"teacher": small(0), "pairs": pairs(0), "start": OneStepGenerator(small(1)), **other}
    return pipeline.make_student_in(
        folder, warm_start=warm, settings=SHORT, compute=pipeline.PLAIN, control=Control(),
        notes={}, **parts,
    )  # fmt: skip


def test_a_checkpoint_is_of_its_teacher_start_and_pairs(tmp_path, capsys):
    """The warm start's too, whose end is the start of what follows."""
    with_and_without = {name: tmp_path / name for name in ("student", "warm-start")}
    distilled(with_and_without["student"], warm=None)
    made = distilled(with_and_without["warm-start"])
    capsys.readouterr()
    again = distilled(with_and_without["warm-start"])
    assert capsys.readouterr().out.count("nothing is left") == 2
    for key, value in made.network.state_dict().items():
        assert torch.equal(value, again.network.state_dict()[key])
    others = {"teacher": small(5), "pairs": pairs(5), "start": OneStepGenerator(small(5))}
    for stage, folder in with_and_without.items():
        for name, other in others.items():
            before = {path: path.read_bytes() for path in folder.iterdir()}
            said = (
                rf"{stage}.ckpt is of another run \({name}: \S.* -> \S.*--fresh starts over, --out"
            )
            with pytest.raises(ValueError, match=said):
                distilled(folder, WARM if stage == "warm-start" else None, **{name: other})
            assert {path: path.read_bytes() for path in folder.iterdir()} == before
    (with_and_without["warm-start"] / "warm-start.ckpt").unlink()
    (with_and_without["warm-start"] / "warm-start.ckpt.before").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"student.ckpt is of another run \(start: \w+ -> "):
        distilled(with_and_without["warm-start"], replace(WARM, seed=1))


def test_a_checkpoint_of_before_says_that_it_does_not_know_its_data(tmp_path):
    settings, path = TeacherSettings(steps=2, batch=2), tmp_path / "teacher.ckpt"
    save_checkpoint({}, {"settings": asdict(settings), "seconds": 1.0}, path)
    with pytest.raises(
        ValueError, match=r"another run \(data: not said -> 1797 of .*, classes: not .*--fresh"
    ):
        pipeline.make_teacher(small(0), digits(), settings, checkpoint=path)
    pipeline.make_teacher(
        small(0), digits(), settings, checkpoint=path, control=Control(fresh=True)
    )
    with pytest.raises(ValueError, match=r"\(data: 1797 of \(1, 8, 8\), \w+ -> 1787 of"):
        pipeline.make_teacher(small(0), digits().split(10)[0], settings, checkpoint=path)


def test_a_loss_that_is_not_finite_leaves_the_last_good_checkpoint(tmp_path):
    images, path = digits(), tmp_path / "teacher.ckpt"
    settings = TeacherSettings(steps=40, batch=4, warm_up=1)
    every = Control(checkpoint_minutes=0)
    images.x[:200] = torch.nan  # some step meets one of these
    with pytest.raises(NotFiniteError) as refused:
        pipeline.make_teacher(small(0), images, settings, checkpoint=path, control=every)
    step = int(re.match(r"step (\d+): x is not finite", str(refused.value))[1])
    assert str(refused.value).endswith(f"(the last good checkpoint is {path})")
    state = load_checkpoint(path, {})[0]
    assert state["step"] == step - 1 > 0
    assert all(value.isfinite().all() for value in state["network"].values())
    with pytest.raises(NotFiniteError, match="after step 1 is not finite"):  # what was reached
        pipeline.make_teacher(
            small(0), digits(), replace(settings, steps=1, learning_rate=1e39),
            checkpoint=path, control=Control(fresh=True),
        )  # fmt: skip
    assert load_checkpoint(path, {})[0]["step"] == step - 1


def test_a_full_disk_is_one_sentence_and_leaves_the_last_good_checkpoint(tmp_path):
    """A limit on the size of files fails a write half-way, as a full disk does."""
    program = f"""
import resource, signal, sys, torch
from dmd_tutorial.runs.checkpoints import save_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = {str(tmp_path / "run.ckpt")!r}
save_checkpoint({{"x": torch.zeros(10)}}, {{}}, path)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_checkpoint({{"x": torch.zeros(1_000_000)}}, {{}}, path)
except OSError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "could not be written" in done.stdout
    assert f"the last good checkpoint is {tmp_path / 'run.ckpt'}" in done.stdout
    assert len(done.stdout.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run.ckpt"]
    assert load_checkpoint(tmp_path / "run.ckpt", {})[0]["x"].shape == (10,)


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch, capsys):
    from dmd_tutorial.runs.cli import main

    def read_only(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(files, "open", read_only, raising=False)
    with pytest.raises(OSError, match=r"Read-only file system \(there is no checkpoint yet\)"):
        save_checkpoint({}, {}, tmp_path / "run.ckpt")
    command = ["train-teacher", "--steps", "2", "--batch", "2", "--out", str(tmp_path / "run")]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("dmd train-teacher:")
    assert "Read-only file system" in error
    assert len(error.splitlines()) == 1
    (tmp_path / "file").write_text("")
    assert main([*command[:-1], str(tmp_path / "file" / "run")]) == 2
    assert "Not a directory" in capsys.readouterr().err

"""Several processes on the CPU, as `accelerate launch` starts them, against one."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from dmd_tutorial import pretrained
from dmd_tutorial.runs import pipeline

pytestmark = pytest.mark.slow
# `--cpu` would start one process only; without a GPU, --multi_gpu starts them with gloo
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes",
          "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
          "--main_process_port", "0"]  # fmt: skip
ONE = [sys.executable]


def dmd(start: list[str], *arguments: str) -> str:
    """Run a command to its end; returns what it printed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*start, "-m", "dmd_tutorial", *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same short run by one process and by two."""
    folder = tmp_path_factory.mktemp("processes")
    for name, start in (("one", ONE), ("two", LAUNCH)):
        out = folder / name
        dmd(start, "make-pairs", "--pairs", str(out / "pairs"), "--count", "3000", "--steps", "2")
        dmd(start, "distill", "--pairs", str(out / "pairs"), "--out", str(out),
            "--warm-start-steps", "2", "--steps", "3", "--batch", "8", "--batch-pairs", "8",
            "--learning-rate", "1e-5", "--critic-learning-rate", "1e-5")  # fmt: skip
    return folder


def test_two_processes_make_every_pair_once_and_the_same_ones(folder):
    for chunk in ("00000", "00001", "00002"):
        one, two = (
            load_file(folder / name / "pairs" / f"{chunk}.safetensors") for name in ("one", "two")
        )
        assert torch.equal(one["z"], two["z"])
        assert torch.allclose(one["y"], two["y"], atol=1e-4)
    assert len(list((folder / "two" / "pairs").iterdir())) == 3


def test_two_processes_learn_what_one_learns_with_the_whole_batch(folder):
    """Adam turns a gradient of almost 0 into a step of either sign, so means are compared."""
    states = [
        torch.load(folder / name / "student.ckpt", weights_only=True)["state"]
        for name in ("one", "two")
    ]
    assert states[0]["step"] == states[1]["step"] == 3
    assert torch.equal(states[0]["rng"], states[1]["rng"])  # so a run may go on with any number
    for network in ("generator", "critic"):
        one, two = (torch.cat([t.flatten() for t in state[network].values()]) for state in states)
        assert (one - two).abs().mean() < 1e-7
    for optimizer in ("generator_optimizer", "critic_optimizer"):
        one, two = (  # Adam's running mean of the gradient
            torch.cat([s["exp_avg"].flatten() for s in state[optimizer]["state"].values()])
            for state in states
        )
        assert one.norm() > 0
        assert (one - two).norm() < 1e-3 * one.norm()


def test_only_one_process_speaks_and_writes(folder):
    notes = json.loads((folder / "two" / "student.json").read_text())
    assert notes["settings"]["batch"] == 8
    printed = dmd(LAUNCH, "make-pairs", "--pairs", str(folder / "two" / "pairs"), "--count", "3000",
                  "--steps", "2")  # fmt: skip
    assert printed.count("3000 pairs in") == 1


def test_two_processes_evaluate_every_sample_once(tmp_path):
    """With a number of samples that two cannot share equally."""
    reports = []
    for name, start in (("one", ONE), ("two", LAUNCH)):
        out = tmp_path / f"{name}.json"
        dmd(start, "evaluate", "--count", "1001", "--out", str(out))
        reports.append(json.loads(out.read_text()))
    one, two = (report["result"] for report in reports)
    assert two["count"] == one["count"] == 1001
    for name in ("frechet", "precision", "recall"):
        assert two[name] == pytest.approx(one[name], rel=1e-3), name


def test_a_process_without_a_share_does_not_stop_the_others(tmp_path):
    """One sample for two processes."""
    out, teacher = tmp_path / "samples", pretrained.load("digits-teacher")
    dmd(LAUNCH, "sample", "--teacher", "digits-teacher", "--count", "1", "--steps", "2",
        "--out", str(out))  # fmt: skip
    alone = pipeline.draw(teacher, *pipeline.noise(teacher, 1, "pictures"), steps=2)
    torch.testing.assert_close(load_file(out.with_suffix(".safetensors"))["x"], alone)

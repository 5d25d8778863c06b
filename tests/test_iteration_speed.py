"""The speed benchmark runs and compares like with like; its siblings can be asked for help."""

import copy
import importlib
import json
import runpy
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import iteration_speed as speed
from benchmarks.full_size import evaluations
from dmd_tutorial import pretrained
from dmd_tutorial.runs.compute import Compute
from dmd_tutorial.runs.presets import CIFAR10_SMALL, ON_DIGITS
from dmd_tutorial.training import DistillSettings

ROOT = Path(__file__).parents[1]
PROGRAMS = [*sorted((ROOT / "benchmarks").glob("*.py")), ROOT / "benchmarks/survey/__main__.py"]
SMALL = replace(ON_DIGITS, batch=6, batch_pairs=6, critic_steps=1, warm_up=0, steps=10)


@pytest.fixture(scope="module")
def teacher():
    return pretrained.load("digits-teacher")


def weights(network):
    return torch.cat([weight.detach().flatten() for weight in network.parameters()])


@pytest.mark.parametrize("lambda_reg", [1.0, 0.01])  # with little of it, matching decides
def test_naive_and_ours_learn_the_same(teacher, lambda_reg):
    """In float64: in float32 Adam makes of a gradient's rounding a step of its full size.

    The critic is a copy of the teacher at first, so only the second iteration matches anything.
    """
    teacher = copy.deepcopy(teacher).double()
    settings = replace(SMALL, lambda_reg=lambda_reg)
    pairs = speed.random_pairs(teacher, 50)
    naive = speed.Naive(teacher, settings, pairs)
    run, loop = speed.pipelines_loop(teacher, settings, pairs, Compute())
    for _ in range(3):
        naive()
        record = next(loop).record
    networks = {
        "generator": (naive.generator, run.generator),
        "critic": (naive.critic, run.critic),
        "average": (naive.average, run.average),
    }
    for name, (theirs, ours) in networks.items():
        moved = (weights(ours) - weights(teacher)).norm()
        assert moved > 0, name
        assert (weights(theirs) - weights(ours)).norm() / moved < 1e-6, name
    loss = record.loss_matching + lambda_reg * record.loss_anchor
    assert naive.losses == pytest.approx([loss, record.loss_critic], rel=1e-5)


def test_runs_as_a_program():
    options = ["--rounds", "1", "--batch", "2", "--threads", "1"]
    command = [sys.executable, "-m", "benchmarks.iteration_speed", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["preset"] == "digits"
    assert result["naive"] == "fp32, TF32 off"
    for name in ("milliseconds", "waits"):
        assert all(result[name][loop] > 0 for loop in ("naive", "ours")), name
    low, high = result["naive over ours"]["quartiles"]
    assert 0 < low <= result["naive over ours"]["median"] <= high
    assert result["TFLOP"] > 0
    assert (result["must hold"], result["held"]) == (0, True)  # another batch: nothing is recorded


def test_leaves_with_status_1_where_the_ratio_does_not_hold(monkeypatch, capsys):
    ratio = {"median": speed.HOLD - 0.01}
    monkeypatch.setattr(speed, "measure", lambda _: {"naive over ours": ratio})
    assert speed.main([]) == 1
    assert json.loads(capsys.readouterr().out)["held"] is False
    assert speed.main(["--batch", "2"]) == 0
    assert speed.main(["--preset", "cifar10-small"]) == 0
    assert speed.main(["--check", "1.1"]) == 0
    assert speed.main(["--batch", "2", "--check", "1.5"]) == 1
    ratio["median"] = speed.HOLD + 0.01
    assert speed.main([]) == 0


def test_operations_are_those_of_the_evaluations(teacher):
    """A backward pass costs twice a forward pass, but for what no gradient is needed of."""
    settings = DistillSettings(batch=4, batch_pairs=2, critic_steps=1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        teacher(torch.zeros(1, 1, 8, 8), torch.ones(1), torch.tensor([3]))
    expected = counter.get_total_flops() * evaluations(settings)
    assert speed.flop(teacher, settings) == pytest.approx(expected, rel=0.03)


def test_waits_are_reads_of_values():
    """An optimiser's own number of steps, which is on the CPU, is none."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], foreach=False, fused=False)

    def step():
        (weight**2).sum().backward()
        optimizer.step()
        if weight.isfinite().all():  # 1
            values = weight.detach()
            float(values[0]), values[1].item(), values.tolist()  # 3
        torch.where(weight > 0, weight, 0)

    assert speed.waits(step, torch.device("cpu")) == 4
    assert speed.waits(lambda: None, torch.device("cpu")) == 0


def test_waits_of_a_gpu_are_its_warnings(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def step():
        assert modes == ["warn"]
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("does not yet detect all synchronizing operations", stacklevel=1)

    assert speed.waits(step, torch.device("cuda")) == 3
    assert modes == ["warn", 0]


def test_share_of_a_cards_peak(monkeypatch):
    """By hand: 9.89 TFLOP take an H100 10 ms at its 989 TFLOP/s; 40 ms are a quarter of that."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    on_card = speed.on_card(9.89, 40.0, torch.device("cuda"))
    assert on_card["milliseconds at the peak"] == pytest.approx(10)
    assert on_card["share of the peak"] == pytest.approx(0.25)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "another")
    assert list(speed.on_card(9.89, 40.0, torch.device("cuda"))) == ["card"]
    assert speed.on_card(9.89, 40.0, torch.device("cpu")) == {}


def test_naive_is_without_tf32():
    with speed.without_tf32():
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_every_program_can_be_asked_what_it_does(path, monkeypatch, capsys):
    """Those with options answer --help; the others can be imported."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    if not any(parser in path.read_text() for parser in ("argparse", "tyro")):
        importlib.import_module(name)
        return
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    monkeypatch.delitem(sys.modules, name, raising=False)  # as a program, which runs it anew
    with pytest.raises(SystemExit) as left:
        runpy.run_module(name, run_name="__main__")
    assert not left.value.code
    assert "usage" in capsys.readouterr().out


def test_cifar10_on_a_gpu_needs_no_data():
    """Its operations, by its architecture: 3.5 GFLOP for each image's way through the network."""
    assert not CIFAR10_SMALL.published
    settings = replace(CIFAR10_SMALL.distill, batch=2, batch_pairs=2)
    count = speed.flop(CIFAR10_SMALL.new_teacher(), settings)
    assert count == pytest.approx(3.503e9 * evaluations(settings), rel=0.03)

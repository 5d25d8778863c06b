"""A network of one's own, from its code through every command, to a student on disk and back."""

import sys

import pytest
import torch
from torch import nn

from dmd_tutorial import pretrained
from dmd_tutorial.denoisers import EDMDenoiser, image_shape, sigma_range
from dmd_tutorial.generators import OneStepGenerator
from dmd_tutorial.runs import cli, memory
from dmd_tutorial.runs.compute import Compute

CODE = '''
import torch
from torch import nn

from dmd_tutorial.adapters import Adapted, flow


class Own(nn.Module):
    """Predicts the velocity of a flow, of 8 x 8 pictures of 10 classes."""

    size, channels, classes = 8, 1, 10

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.out = nn.Conv2d(8, 1, 3, padding=1)
        self.named = nn.Embedding(10, 8)

    def forward(self, x, time, label=None):
        h = self.conv(x) + time[:, None, None, None]
        h = h if label is None else h + self.named(label)[:, :, None, None]
        return self.out(torch.relu(h))


def teacher():
    torch.manual_seed(0)
    return Adapted(Own(), flow(sigma_range=(0.01, 20.0)), "velocity")


def mixture():
    from dmd_tutorial.data import ring

    return ring()


def nothing():
    return None
'''
NAME = "own_code_of_a_test:teacher"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The user's folder, with the code in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own_code_of_a_test.py").write_text(CODE)
    yield tmp_path
    sys.modules.pop("own_code_of_a_test", None)


def test_a_teacher_from_code_goes_through_every_command(folder, capsys):
    run = ["--teacher", NAME, "--preset", "digits"]
    few = ["--pairs", "pairs", "--count", "1000"]
    assert cli.main(["make-pairs", *run, *few, "--steps", "3"]) == 0
    short = ["--steps", "2", "--warm-start-steps", "2", "--batch", "8", "--batch-pairs", "8"]
    assert cli.main(["distill", *run, *few, "--out", "out", *short]) == 0
    assert "generator: optimiser" in capsys.readouterr().out  # the estimate of memory
    student = ["--student", "out/student.safetensors", "--count", "30"]
    assert cli.main(["sample", *student, "--out", "x"]) == 2
    said = capsys.readouterr().err
    assert f"holds weights for {NAME}, which is code and not in the file" in said
    student += ["--network", NAME]
    assert cli.main(["sample", *student, "--out", "x"]) == 0
    assert cli.main(["evaluate", *student, "--out", "e.json"]) == 0
    loaded = pretrained.load("out/student.safetensors", pretrained.load(NAME))
    assert isinstance(loaded, OneStepGenerator)
    assert loaded.sigma_max == 20.0
    assert image_shape(loaded) == ((1, 8, 8), 10)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("own_code_of_a_test:teach", "own_code_of_a_test:teach cannot be imported: module"),
        ("no_such_code:teacher", "no_such_code:teacher cannot be imported: No module named"),
        ("own_code_of_a_test:nothing", "makes a NoneType, not a denoiser"),
        ("no-name", "no-name is no file and no network's name"),
    ],
)
def test_what_cannot_be_loaded_is_named(folder, name, sentence):
    with pytest.raises((ValueError, OSError), match=sentence):
        pretrained.load(name)


def test_a_function_from_code_is_a_teacher(folder):
    teacher = pretrained.load("own_code_of_a_test:mixture")
    assert isinstance(teacher, nn.Module)
    assert teacher.classes == 8


class Raw(nn.Module):
    """A raw network of one's own inside of EDM's preconditioning."""

    size, channels, classes = 4, 1, 0

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, c_noise, label=None):
        return self.conv(x)


def test_an_own_network_is_kept_and_read_back(tmp_path):
    student = OneStepGenerator(EDMDenoiser(Raw()), sigma_max=40.0)
    pretrained.save_denoiser(tmp_path / "own.safetensors", student, seed=3)
    with pytest.raises(ValueError, match="holds weights for EDMDenoiser, which is code"):
        pretrained.load(tmp_path / "own.safetensors")
    again = pretrained.load(tmp_path / "own.safetensors", EDMDenoiser(Raw()))
    z = torch.randn(3, 1, 4, 4)
    assert torch.equal(again(z), student(z))
    with pytest.raises(ValueError, match="does not fit"):
        pretrained.load(tmp_path / "own.safetensors", nn.Conv2d(1, 2, 3))
    assert pretrained.made_by(tmp_path / "own.safetensors") == {"seed": 3}


def test_the_range_is_kept(tmp_path):
    teacher = pretrained.load("digits-teacher")
    assert sigma_range(teacher) == (0.002, 80.0)
    teacher.sigma_range = (0.01, 10.0)
    pretrained.save_denoiser(tmp_path / "short.safetensors", teacher)
    assert sigma_range(pretrained.load(tmp_path / "short.safetensors")) == (0.01, 10.0)


def test_memory_of_any_network_is_what_a_pass_keeps(folder):
    """The kept activations of the small network can be counted by hand."""
    teacher = pretrained.load(NAME)
    estimate = memory.distillation_memory(teacher, batch=3, batch_pairs=1, compute=Compute())
    # of each of 4 images, in 4 bytes: what goes into the two convolutions (the rectifier keeps the
    # same), and some single numbers
    images = 4 * 4 * (64 + 8 * 64)
    assert images <= estimate["activations"] <= 1.05 * images

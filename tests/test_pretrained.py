"""Networks on disk: round trips, damaged files, the shipped ones."""

import json

import pytest
import torch
from safetensors.torch import save_file

from dmd_tutorial import pretrained
from dmd_tutorial.data import balanced_labels, normal
from dmd_tutorial.denoisers import EDMDenoiser, image_shape
from dmd_tutorial.edm.networks import SongUNet
from dmd_tutorial.generators import OneStepGenerator
from dmd_tutorial.networks import UNet
from dmd_tutorial.noise import stream
from dmd_tutorial.pretrained import load, load_denoiser, made_by, save_denoiser


def network() -> EDMDenoiser:
    torch.manual_seed(0)
    unet = UNet(width=8, embedding=16)
    torch.nn.init.normal_(unet.last.weight, std=0.1)
    return EDMDenoiser(unet, sigma_data=0.7)


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: OneStepGenerator(d, 40.0)])
def test_what_is_saved_is_loaded(wrap, tmp_path):
    model, path = wrap(network()).eval(), tmp_path / "net.safetensors"
    save_denoiser(path, model, seed=3, command="x")
    again = load_denoiser(path)
    assert type(again) is type(model)
    assert made_by(path) == {"seed": 3, "command": "x"}
    assert not any(p.requires_grad for p in again.parameters())
    x, label = torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
    inputs = (x, label) if isinstance(model, OneStepGenerator) else (x, torch.ones(2), label)
    assert torch.allclose(model(*inputs), again(*inputs), atol=1e-5)


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "net.safetensors"
    save_denoiser(path, network())
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:20], b"", b"\x80\x04not safetensors" * 50):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="not a readable network file"):
            load_denoiser(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not a readable network file"):
        load_denoiser(path)
    with pytest.raises(FileNotFoundError):
        load_denoiser(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no network's name \(digits-teacher"):
        load("digits-techer")


def test_weights_that_do_not_fit_or_are_not_finite_are_refused(tmp_path):
    path, model = tmp_path / "net.safetensors", network()
    header = {"network": model.network.config | {"width": 16}, "sigma_data": 0.5}
    metadata = {"model": json.dumps(header), "made_by": "{}"}
    save_file(dict(model.state_dict()), path, metadata=metadata)
    with pytest.raises(ValueError, match="does not fit the network in its header"):
        load_denoiser(path)
    model.network.first.weight.data[0, 0, 0, 0] = torch.nan
    save_denoiser(path, model)
    with pytest.raises(ValueError, match=r"network\.first\.weight is not finite: 1 of"):
        load_denoiser(path)


def test_a_shipped_file_that_was_changed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "WEIGHTS", tmp_path)
    save_denoiser(tmp_path / "digits-teacher.safetensors", network())
    with pytest.raises(ValueError, match="the shipped one has"):
        load("digits-teacher")


@pytest.mark.parametrize("name", pretrained.SHIPPED)
def test_shipped_networks_load_and_say_how_they_were_made(name):
    assert load(name) is not None
    notes = made_by(name)
    assert notes["command"].startswith("dmd ")
    assert {"settings", "versions", "seconds"} <= set(notes)
    assert "seed" in notes["settings"]


def test_shipped_networks_are_together_at_most_4_mb():
    files = [pretrained.WEIGHTS / f"{name}.safetensors" for name in pretrained.SHIPPED]
    assert sum(f.stat().st_size for f in files) <= 4_000_000


def test_the_shipped_student_makes_the_digits_it_is_asked_for():
    from dmd_tutorial.metrics import class_coverage

    label = balanced_labels(500, 10)
    z = normal(500, (1, 8, 8), stream("evaluation"))
    _, as_label = class_coverage(load("digits-student")(z, label), label)
    assert as_label > 0.95


def small_teacher() -> EDMDenoiser:
    torch.manual_seed(0)
    shape = {"model_channels": 16, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
    return EDMDenoiser(SongUNet(8, 1, 1, label_dim=3, **shape))


def test_a_network_of_the_published_architecture_is_kept_like_any_other(tmp_path):
    denoiser, path = small_teacher(), tmp_path / "student.safetensors"
    pretrained.save_denoiser(path, OneStepGenerator(denoiser, 80.0), preset="cifar10-cond")
    student = pretrained.load(path)
    assert isinstance(student, OneStepGenerator)
    assert isinstance(student.denoiser.network, SongUNet)
    assert student.denoiser.network.config == denoiser.network.config
    z, label = torch.randn(2, 1, 8, 8), torch.tensor([0, 2])
    expected = OneStepGenerator(denoiser.eval(), 80.0)(z, label)
    assert torch.allclose(student(z, label), expected, atol=1e-6)
    assert image_shape(student) == ((1, 8, 8), 3)
    assert pretrained.made_by(path)["preset"] == "cifar10-cond"


def test_files_written_before_all_networks_shared_one_form_still_load(tmp_path):
    """Their names began with `model.`, and their header held the published arguments."""
    denoiser, path = small_teacher(), tmp_path / "old.safetensors"
    arguments = {"img_resolution": 8, "img_channels": 1, "label_dim": 3, "use_fp16": False,
                 "sigma_min": 0, "sigma_data": 0.5, "model_type": "SongUNet",
                 "model_channels": 16, "channel_mult": [1], "num_blocks": 1,
                 "attn_resolutions": []}  # fmt: skip
    header = {"edm": arguments, "sigma_max": 80.0}
    tensors = {f"model.{n}": t for n, t in denoiser.network.state_dict().items()}
    save_file(tensors, path, metadata={"model": json.dumps(header), "made_by": "{}"})
    student, z = load_denoiser(path), torch.randn(2, 1, 8, 8)
    assert torch.allclose(student(z), OneStepGenerator(denoiser.eval())(z), atol=1e-6)

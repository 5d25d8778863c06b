"""Pairs on disk, and the anchor's distances."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dmd_tutorial import anchor
from dmd_tutorial.anchor import LPIPS, Pairs, fingerprint, l2, load_pairs, make_pairs
from dmd_tutorial.denoisers import EDMDenoiser
from dmd_tutorial.networks import UNet
from dmd_tutorial.runs.compute import Compute, prepare
from dmd_tutorial.samplers import sample

SHAPE = (1, 8, 8)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(anchor, "CHUNK", 20)


def teacher(seed: int = 0) -> EDMDenoiser:
    torch.manual_seed(seed)
    network = UNet(width=8, embedding=16)
    torch.nn.init.normal_(network.last.weight, std=0.1)
    return EDMDenoiser(network).eval()


def make(folder, count=60, who=None, **options):
    *_, total = make_pairs(who or teacher(), folder, count, SHAPE, 10, steps=3, **options)
    return total


def test_pairs_are_what_the_teacher_s_ode_makes_of_z(tmp_path):
    assert make(tmp_path) == 60
    pairs = load_pairs(tmp_path, teacher())
    assert pairs.z.shape == pairs.y.shape == (60, *SHAPE)
    assert torch.bincount(pairs.label).tolist() == [6] * 10
    again = sample(teacher(), pairs.z, pairs.label, steps=3)
    assert torch.allclose(pairs.y, again, atol=1e-5)
    assert abs(pairs.z.std().item() - 1) < 0.05
    assert len(torch.unique(pairs.z[:, 0, 0, 0])) == 60  # no noise is used twice


def test_pairs_are_not_clamped(tmp_path):
    make(tmp_path)
    assert load_pairs(tmp_path).y.abs().max() > 1


def test_a_file_says_how_it_was_made(tmp_path):
    make(tmp_path, seed=5)
    with safe_open(tmp_path / "00002.safetensors", "pt") as file:
        made_by = json.loads(file.metadata()["made_by"])
    assert made_by == {"teacher": fingerprint(teacher()), "sampler": "heun", "steps": 3,
                       "evaluations": 5, "seed": 5, "noise": "stream of pairs",
                       "sigma_range": [0.002, 80.0], "precision": "its own", "guidance": 1.0,
                       "prompts": None, "chunk": 2}  # fmt: skip


def test_pairs_of_before_they_said_their_precision_go_on(tmp_path):
    """They were made in the precision of the weights."""
    make(tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            made_by = json.loads(file.metadata()["made_by"])
        del made_by["precision"]
        save_file(load_file(path), path, {"made_by": json.dumps(made_by)})
    assert make(tmp_path) == 60


def test_pairs_in_another_precision_are_other_pairs(tmp_path):
    make(tmp_path)
    low = prepare(teacher(), Compute(mixed_precision="bf16"))
    with pytest.raises(ValueError, match=r"precision its own, not torch\.bfloat16"):
        next(make_pairs(low, tmp_path, 60, SHAPE, 10, steps=3))
    assert next(make_pairs(low, tmp_path / "low", 20, SHAPE, 10, steps=3)) == 20
    one, other = load_pairs(tmp_path, low, 20), load_pairs(tmp_path / "low", teacher())
    assert torch.equal(one.z, other.z)  # the same weights, so both are its pairs
    assert 0 < (one.y - other.y).std() / one.y.std() < 0.05


def test_a_run_that_stopped_continues_and_makes_the_same_pairs(tmp_path):
    make(tmp_path / "straight")
    loop = make_pairs(teacher(), tmp_path / "stopped", 60, SHAPE, 10, steps=3)
    next(loop)
    loop.close()
    first = (tmp_path / "stopped" / "00000.safetensors").stat().st_mtime_ns
    make(tmp_path / "stopped")
    assert (tmp_path / "stopped" / "00000.safetensors").stat().st_mtime_ns == first
    one, other = load_pairs(tmp_path / "straight"), load_pairs(tmp_path / "stopped")
    assert torch.equal(one.z, other.z)
    assert torch.equal(one.y, other.y)


@pytest.mark.parametrize(
    "label",
    [None, torch.arange(5), torch.arange(30.0).reshape(5, 3, 2)],
)
def test_pairs_are_drawn_with_their_conditions_whatever_these_are(label):
    z = torch.arange(5.0)[:, None]
    drawn = Pairs(z, 2 * z, label).draw(20, torch.Generator().manual_seed(0))
    index = drawn.z[:, 0].long()
    assert torch.equal(drawn.y, 2 * drawn.z)
    assert len(index.unique()) > 3
    if label is None:
        assert drawn.label is None
    else:
        assert torch.equal(drawn.label, label[index])


def test_pairs_of_another_teacher_sampler_or_seed_are_refused(tmp_path):
    make(tmp_path)
    with pytest.raises(ValueError, match=f"teacher {fingerprint(teacher())}, not"):
        load_pairs(tmp_path, teacher(1))
    with pytest.raises(ValueError, match=r"was made with teacher .*, not"):
        make(tmp_path, who=teacher(1))
    with pytest.raises(ValueError, match="was made with seed 0, not 1"):
        make(tmp_path, seed=1)


def test_pairs_of_before_the_streams_are_read_but_not_mixed(tmp_path):
    """Their headers do not say which stream their noise is from."""
    make(tmp_path)
    old = tmp_path / "00001.safetensors"
    with safe_open(old, "pt") as file:
        made_by = json.loads(file.metadata()["made_by"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del made_by["noise"]
    save_file(tensors, old, {"made_by": json.dumps(made_by)})
    with pytest.raises(ValueError, match=r"00001.* was made with noise None, not stream of pairs"):
        load_pairs(tmp_path)
    (tmp_path / "00000.safetensors").unlink()
    with pytest.raises(ValueError, match=r"00001.* was made with noise None, not stream of pairs"):
        make(tmp_path)
    (tmp_path / "00000.safetensors").unlink()
    with pytest.raises(ValueError, match=r"00002.* was made with noise stream of pairs, not None"):
        load_pairs(tmp_path)
    assert len(load_pairs(tmp_path, count=20).z) == 20


def test_damaged_missing_and_too_few_pairs_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no pairs"):
        load_pairs(tmp_path)
    make(tmp_path)
    with pytest.raises(ValueError, match="holds 60 pairs, 61 are wanted"):
        load_pairs(tmp_path, count=61)
    with pytest.raises(ValueError, match="0 pairs are wanted, at least 1"):
        load_pairs(tmp_path, count=0)
    with pytest.raises(ValueError, match="multiple of 20, not 30"):
        make(tmp_path, count=30)
    file = tmp_path / "00001.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"00001.safetensors is damaged"):
        load_pairs(tmp_path)


def test_fingerprint_sees_every_value_and_name():
    one, other = teacher(), teacher()
    assert fingerprint(one) == fingerprint(other)
    next(other.parameters()).data.view(-1)[0] += 1e-6
    assert fingerprint(one) != fingerprint(other)


def test_l2_is_the_mean_square():
    x, y = torch.zeros(2, 3), torch.tensor([[1.0, 2, 3], [0, 0, 0]])
    assert l2(x, y).item() == pytest.approx(14 / 6)
    with pytest.raises(ValueError, match=r"y has shape \(2, 2\), x has \(2, 3\)"):
        l2(x, y[:, :2])


@pytest.fixture(scope="module")
def lpips():
    return LPIPS(size=64, random_backbone=True)


def test_lpips_is_a_distance_with_a_gradient(lpips):
    x = torch.rand(2, 1, 8, 8).requires_grad_()
    y = x.detach() + 0.3 * torch.randn(2, 1, 8, 8)
    assert lpips(x, x.detach()).item() == pytest.approx(0, abs=1e-6)
    loss = lpips(x, y)
    assert loss.item() > 0
    loss.backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in lpips.parameters())


def test_lpips_is_the_package_s_own_on_resized_images(lpips):
    x, y = torch.rand(2, 3, 3, 16, 16)
    resized = [torch.nn.functional.interpolate(i, size=(64, 64), mode="bilinear") for i in (x, y)]
    assert torch.allclose(lpips(x, y), lpips.network(*resized).mean())


def test_lpips_refuses_what_it_cannot_compare(lpips):
    with pytest.raises(ValueError, match="at least 64 pixels, size is 32"):
        LPIPS(size=32)
    with pytest.raises(ValueError, match="1 or 3 channels"):
        lpips(torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 8, 8))


def test_lpips_without_weights_names_them_and_does_not_switch(monkeypatch, tmp_path):
    import urllib.error

    def no_network(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    with pytest.raises(RuntimeError, match=r"ImageNet weights of 'vgg'.*choose the L2 anchor"):
        LPIPS()

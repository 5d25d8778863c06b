"""Data: digits, 2-D targets, labels."""

import pytest
import torch

from dmd_tutorial.data import balanced_labels, digits, normal, ring, two_modes


def test_digits_are_what_scikit_learn_carries():
    x, label, classes, _ = digits()
    assert x.shape == (1797, 1, 8, 8)
    assert x.dtype == torch.float32
    assert (x.min().item(), x.max().item()) == (-1, 1)
    assert classes == 10
    assert torch.bincount(label).min() > 170
    levels = ((x + 1) * 8).unique()
    assert torch.equal(levels, torch.arange(17.0))


def test_images_held_out_are_not_trained_on():
    images = digits()
    numbered = images._replace(label=torch.arange(len(images.x)))
    train, held_out = numbered.split(30)
    assert len(held_out.x) == len(held_out.label) == 30
    assert sorted([*train.label.tolist(), *held_out.label.tolist()]) == list(range(1797))
    assert torch.equal(train.x, images.x[train.label])
    with pytest.raises(ValueError, match="hold out 1797 of 1797"):
        images.split(1797)


def test_two_modes_stand_where_figure_3_wants_them():
    mixture = two_modes()
    assert mixture.means.tolist() == [[-2, 0], [2, 0]]
    assert torch.allclose(mixture.variances.sqrt(), torch.full((2, 2), 0.4).double())


def test_ring_is_a_ring():
    mixture = ring(5, radius=3.0)
    assert torch.allclose(mixture.means.norm(dim=1), torch.full((5,), 3.0).double())
    assert torch.allclose(mixture.means.sum(0), torch.zeros(2).double(), atol=1e-12)


def test_labels_are_balanced_to_one():
    assert torch.bincount(balanced_labels(1003, 10)).tolist() == [101] * 3 + [100] * 7


def test_noise_is_normal_and_seeded():
    z = normal(20_000, (2,), torch.Generator().manual_seed(0))
    assert abs(z.std().item() - 1) < 0.02
    assert torch.equal(z, normal(20_000, (2,), torch.Generator().manual_seed(0)))

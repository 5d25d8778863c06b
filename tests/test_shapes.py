import math

import pytest
import torch
from matplotlib.path import Path as Outline

from dmd_tutorial.text_to_image import shapes as s


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def alone(kind, count=64, size=1, colour=0):
    """Scenes of one object each."""
    both = torch.ones(count, 2, dtype=torch.int64)
    return s.Scene(both[:, 0] * 0, both * s.KINDS.index(kind), both * colour, both * size)


def reds(x):
    """How much of each pixel is red, by the channels that a grey ground has alike."""
    difference = (x[:, 0] - x[:, 1]).clamp_min(0)
    return difference / difference.amax((1, 2), keepdim=True)  # its tint varies


def test_every_caption_says_what_its_picture_shows():
    drawn = s.shapes(500, rng(), two=0.5)
    assert drawn.x.shape == (500, 3, 32, 32)
    assert drawn.x.abs().max() <= 1
    assert all(same.all() for same in s.scene_of(drawn.captions).agrees(drawn.scene).values())
    longest = max(drawn.captions, key=len).split()
    assert len(longest) == 10
    assert set(" ".join(drawn.captions).split()) == set(s.WORDS)


def test_the_same_seed_draws_the_same_and_another_does_not():
    first, again, other = (s.shapes(8, rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.x, again.x)
    assert first.captions == again.captions
    assert not torch.equal(first.x, other.x)


def test_attributes_are_uniform_and_independent():
    scene = s.random_scenes(20_000, rng(), two=0.3)
    assert (scene.arrangement > 0).double().mean() == pytest.approx(0.3, abs=0.015)
    joint = torch.stack([scene.kind[:, 0], scene.colour[:, 0], scene.size[:, 0]], 1)
    counts = torch.unique(joint, dim=0, return_counts=True)[1].double()
    chi_squared = ((counts - 625) ** 2 / 625).sum()
    assert len(counts) == 32  # 31 degrees of freedom: one in a thousand
    assert chi_squared < 61.1


@pytest.mark.parametrize("kind", s.KINDS)
def test_an_outline_is_the_polygon_that_its_corners_span(kind):
    """The folded line against matplotlib's point-in-polygon."""
    tips, inner, outer = (torch.tensor([float(v)]) for v in (*s._OUTLINE[kind][:2], 9.0))
    turn = torch.tensor([0.3])
    axis = torch.arange(64) / 2 - 15.75
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij")[::-1])[None]
    inside = s._distance(grid, tips, inner, outer, turn)[0] < 0
    count = int(tips) if tips > 1 else 720
    angles = [0.3 + math.pi * k / count for k in range(2 * count)]
    radii = [9.0 if k % 2 == 0 else 9.0 * float(inner) for k in range(2 * count)]
    corners = [(r * math.sin(a), -r * math.cos(a)) for r, a in zip(radii, angles, strict=True)]
    truth = Outline(corners).contains_points(grid[0].flatten(1).T).reshape(64, 64)
    assert (inside.numpy() != truth).mean() < 0.002  # on the line itself either may be right


def test_a_picture_holds_the_area_of_its_object():
    """A circle's, between those of its smallest and its largest radius."""
    for size, (low, high) in enumerate(s._RADIUS):
        area = reds(s.draw(alone("circle", size=size), rng())).sum((1, 2))
        assert (area > 0.93 * math.pi * low**2).all()
        assert (area < 1.07 * math.pi * high**2).all()


@pytest.mark.parametrize("kind", s.KINDS)
def test_an_object_alone_is_inside_of_its_picture_wherever_it_is(kind):
    cover = reds(s.draw(alone(kind, 200), rng()))
    edge = torch.cat([cover[:, [0, -1]].flatten(1), cover[:, :, [0, -1]].flatten(1)], 1)
    assert edge.max() < 0.2  # a tip ends a pixel before the edge
    where = cover.sum(1).argmax(1)
    assert where.min() < 12  # any place
    assert where.max() > 19


@pytest.mark.parametrize(("how", "axis"), [(1, 1), (2, 2)])
def test_the_first_object_is_above_or_left_of_the_second(how, axis):
    """Read off by the middles of what is red and what is blue."""
    scene = s.random_scenes(100, rng(), two=1.0)
    colour = torch.tensor([0, 2]).expand(100, 2)  # red first, blue second
    x = s.draw(scene._replace(arrangement=torch.full((100,), how), colour=colour), rng())
    blue = ((x[:, 2] - x[:, 1]) / 1.3).clamp(0, 1) * (x[:, 0] < x[:, 2])
    places = torch.arange(32.0).view(-1, 1) if axis == 1 else torch.arange(32.0).view(1, -1)
    middle = [(part * places).sum((1, 2)) / part.sum((1, 2)) for part in (reds(x), blue)]
    assert (middle[1] - middle[0] > 8).all()


@pytest.mark.parametrize(
    ("caption", "said"),
    [
        ("a small purple star", "'purple'"),
        ("a red small star", "is no caption"),
        ("a small red star above", "is no caption"),
        ("a small red star of a large red star", "is no caption"),
    ],
)
def test_what_no_caption_says_is_refused(caption, said):
    with pytest.raises(ValueError, match=said):
        s.scene_of([caption])


def test_scenes_disagree_where_they_differ_and_only_there():
    scene = s.scene_of(["a small red star above a large blue circle", "a small red star"])
    other = s.scene_of(["a small red star above a large blue square", "a large red star"])
    same = scene.agrees(other)
    assert same["kind"].tolist() == [False, True]
    assert same["size"].tolist() == [True, False]
    assert same["colour"].all()
    assert not same["all"].any()
    absent = scene._replace(kind=torch.tensor([[3, 0], [3, 2]]))  # of an object that is not there
    assert scene.agrees(absent)["kind"].all()

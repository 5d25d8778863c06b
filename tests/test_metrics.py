"""Metrics against closed forms, torch-fidelity, plain loops, and mistakes that they must notice."""

import functools
import itertools
import json
import urllib.error

import numpy as np
import pytest
import scipy.linalg
import torch
import torch_fidelity
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks import classifier as maker
from benchmarks.classifier import accuracy, save_classifier, train_classifier
from dmd_tutorial import features as feature_room
from dmd_tutorial import metrics
from dmd_tutorial.data import Images, balanced_labels, digits, ring, two_modes
from dmd_tutorial.features import (
    CLASSIFIER_FILE,
    Classifier,
    extract_features,
    load_classifier,
    to_8_bit,
)
from dmd_tutorial.metrics import (
    class_coverage,
    evaluate,
    evaluation_floor,
    frechet,
    frechet_distance,
    frechet_floor,
    mode_coverage,
    precision_recall,
    sampling_floor,
    sliced_wasserstein,
)

IMAGES = digits()
TRAIN, HELD_OUT = IMAGES.split(maker.HELD_OUT)


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def reference():
    return extract_features(IMAGES.x)


# --- the classifier and its features ------------------------------------------------------------


def test_shipped_classifier_has_the_accuracy_of_its_header():
    with safe_open(CLASSIFIER_FILE, "pt") as file:
        header = file.metadata()
    assert int(header["held_out"]) == len(HELD_OUT.x) == 360
    share = accuracy(load_classifier(), HELD_OUT)
    assert share == pytest.approx(int(header["held_out_correct"]) / 360)
    assert share >= 0.98
    assert CLASSIFIER_FILE.stat().st_size < 300_000


def test_the_command_writes_a_classifier_and_its_accuracy(tmp_path, monkeypatch):
    path = tmp_path / "classifier.safetensors"
    monkeypatch.setattr(maker, "CLASSIFIER_FILE", path)
    few = functools.partial(train_classifier, steps=40)
    monkeypatch.setattr(maker, "train_classifier", few)
    maker.remake_classifier()
    made = load_classifier(path)
    assert made.state_dict().keys() == load_classifier().state_dict().keys()
    with safe_open(path, "pt") as file:
        header = file.metadata()
    assert header["held_out"] == "360"
    assert int(header["held_out_correct"]) == round(360 * accuracy(made, HELD_OUT))


def test_training_is_repeatable_learns_and_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    first, second = (train_classifier(TRAIN, steps=60, seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    assert accuracy(first, HELD_OUT) > 0.9  # chance: 0.1


def test_features_are_standardised_over_the_digits(reference):
    assert reference.mean(0).abs().max() < 0.2
    assert reference.var(0).mean() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rounding_to_8_bits_is_exact_in_every_type(dtype):
    x = torch.linspace(-1.1, 1.1, 40_001).to(dtype).reshape(1, 1, 1, -1)
    exact = ((x.double().clamp(-1, 1) + 1) * 127.5).round()
    difference = (to_8_bit(x).double() - exact).abs()
    assert difference.mean() < 1e-4  # a half may round either way
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(to_8_bit(levels), levels)  # which are 8-bit already
    assert torch.equal(to_8_bit((levels / 127.5 - 1).to(torch.float64)), levels)


def test_rounding_to_8_bits():
    x = torch.linspace(-1.5, 1.5, 3001).reshape(1, 1, 1, -1)
    levels = to_8_bit(x)
    assert levels.dtype == torch.uint8
    moved = (levels / 127.5 - 1 - x.clamp(-1, 1)).abs().max()
    assert 0.9 / 255 < moved <= 1.001 / 255
    assert levels.min() == 0
    assert levels.max() == 255
    assert len(to_8_bit(IMAGES.x).unique()) == len(IMAGES.x.unique()) == 17


def test_features_see_the_8_bit_image_only():
    x = IMAGES.x[:50]
    rounded = to_8_bit(x) / 127.5 - 1
    assert torch.equal(extract_features(x), extract_features(rounded))
    assert torch.equal(extract_features(3 * x), extract_features((3 * x).clamp(-1, 1)))


def test_features_do_not_depend_on_the_batch():
    torch.testing.assert_close(
        extract_features(IMAGES.x[:70]), extract_features(IMAGES.x[:70], batch=1)
    )


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.zeros(0, 1, 8, 8), {}, "0 images"),
        (torch.zeros(5, 8, 8), {}, r"not \(5, 8, 8\)"),
        (torch.zeros(5, 1, 9, 8), {}, r"\(5, 1, 9, 8\), the classifier wants \(batch, 1, 8, 8\)"),
        (torch.full((5, 1, 8, 8), float("nan")), {}, "not finite: 320 of 320"),
        (torch.zeros(5, 1, 8, 8), {"features": "dinosaur"}, "'dinosaur'"),
    ],
)
def test_unfit_images_are_refused(x, options, message):
    with pytest.raises(ValueError, match=message):
        extract_features(x, **options)


# --- Inception, without its weights -------------------------------------------------------------

INCEPTION = "torch_fidelity.feature_extractor_inceptionv3"


@pytest.fixture
def no_cached_extractor():
    feature_room._extractor.cache_clear()
    yield
    feature_room._extractor.cache_clear()


@pytest.mark.usefixtures("no_cached_extractor")
def test_missing_inception_weights_are_named_in_one_sentence(monkeypatch):
    def unreachable(*args, **options):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(f"{INCEPTION}.load_state_dict_from_url", unreachable)
    with pytest.raises(
        RuntimeError, match=r"Inception weights are neither in .*no network"
    ) as info:
        extract_features(torch.zeros(2, 3, 32, 32), "inception")
    assert len(str(info.value).split(". ")) == 1


@pytest.mark.usefixtures("no_cached_extractor")
def test_inception_takes_grey_and_colour(monkeypatch):
    monkeypatch.setattr(f"{INCEPTION}.load_state_dict_from_url", lambda *args, **options: {})
    monkeypatch.setattr(
        f"{INCEPTION}.FeatureExtractorInceptionV3.load_state_dict", lambda self, state: None
    )
    grey = torch.rand(1, 1, 16, 16) * 2 - 1
    colour = grey.repeat(1, 3, 1, 1)
    found = extract_features(grey, "inception")
    assert found.shape == (1, 2048)
    assert torch.equal(found, extract_features(colour, "inception"))


# --- Frechet distance ---------------------------------------------------------------------------


@given(*[st.floats(-5, 5)] * 2, *[st.floats(0.01, 5)] * 2)
def test_frechet_distance_on_a_line(mean1, mean2, std1, std2):
    found = frechet_distance(
        torch.tensor([mean1], dtype=torch.float64), torch.tensor([[std1**2]], dtype=torch.float64),
        torch.tensor([mean2], dtype=torch.float64), torch.tensor([[std2**2]], dtype=torch.float64),
    )  # fmt: skip
    expected = (mean1 - mean2) ** 2 + (std1 - std2) ** 2
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_frechet_distance_of_matrices_that_do_not_commute(rng):
    factors = torch.randn(2, 5, 5, generator=rng, dtype=torch.float64)
    cov1, cov2 = factors @ factors.mT + torch.eye(5)
    mean1, mean2 = torch.randn(2, 5, generator=rng, dtype=torch.float64)
    root = scipy.linalg.sqrtm((cov1 @ cov2).numpy()).real
    expected = ((mean1 - mean2) ** 2).sum() + (cov1 + cov2).trace() - 2 * np.trace(root)
    assert frechet_distance(mean1, cov1, mean2, cov2) == pytest.approx(expected.item(), rel=1e-8)


def test_frechet_distance_refuses_what_does_not_fit():
    mean, cov = torch.zeros(3), torch.eye(3)
    with pytest.raises(ValueError, match=r"do not fit.*\(3,\), \(3, 3\), \(2,\), \(3, 3\)"):
        frechet_distance(mean, cov, torch.zeros(2), cov)
    with pytest.raises(ValueError, match="cov2 is not finite: 9 of 9"):
        frechet_distance(mean, cov, mean, cov * float("inf"))


def test_frechet_of_sets_takes_their_mean_and_covariance(rng):
    points = torch.randn(500, 4, generator=rng)
    shift = torch.tensor([1.0, -2.0, 0.0, 0.5])
    assert frechet(points, points) == pytest.approx(0, abs=1e-6)
    assert frechet(points, points + shift) == pytest.approx(5.25, rel=1e-5)
    centred = points - points.mean(0)
    assert frechet(centred, 3 * centred) == pytest.approx(4 * centred.var(0).sum().item(), rel=1e-5)


class Levels(torch.utils.data.Dataset):
    """8-bit images as torch-fidelity reads them."""

    def __init__(self, x):
        self.images = to_8_bit(x)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


class Digits(torch_fidelity.FeatureExtractorBase):
    """The features of digits as torch-fidelity wants them."""

    def __init__(self, name, features_list, **options):
        super().__init__(name, features_list)

    @staticmethod
    def get_provided_features_list():
        return ("64",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "64"

    def forward(self, images):
        return (feature_room._extractor("digits", images.device)(images),)


def test_evaluate_agrees_with_torch_fidelity_itself(rng):
    torch_fidelity.register_feature_extractor("digits", Digits)
    x = IMAGES.x[:600]
    samples = IMAGES.x[600:1300] + 0.3 * torch.randn(700, 1, 8, 8, generator=rng)
    theirs = torch_fidelity.calculate_metrics(
        input1=Levels(samples), input2=Levels(x), feature_extractor="digits", fid=True,
        prc=True, cuda=False, verbose=False, cache=False, save_cpu_ram=True,
    )  # fmt: skip
    ours = evaluate(samples, x, minimum=700)
    assert ours.frechet == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert ours.precision == pytest.approx(theirs["precision"], abs=1e-6)
    assert ours.recall == pytest.approx(theirs["recall"], abs=1e-6)


# --- precision and recall -----------------------------------------------------------------------


def test_precision_and_recall_of_equal_and_of_distant_sets(rng):
    points = torch.randn(300, 3, generator=rng)
    assert precision_recall(points, points.flip(0)) == (1, 1)
    assert precision_recall(points, points + 100) == (0, 0)


def test_a_missing_cluster_costs_recall_an_extra_one_precision(rng):
    left, right = torch.randn(2, 200, 3, generator=rng) + torch.tensor([-50.0, 50])[:, None, None]
    both = torch.cat([left, right])
    assert precision_recall(left, both) == (1, 0.5)
    assert precision_recall(both, left) == (0.5, 1)


def test_precision_and_recall_by_their_definition(rng):
    samples = torch.randn(40, 2, generator=rng)
    reference = torch.randn(30, 2, generator=rng) + 0.7

    def share_inside(points, members):
        radius = [sorted((m - other).norm() for other in members)[3] for m in members]
        inside = [
            any((p - m).norm() <= r for m, r in zip(members, radius, strict=True)) for p in points
        ]
        return np.mean(inside)

    precision, recall = precision_recall(samples, reference)
    assert precision == pytest.approx(share_inside(samples, reference))
    assert recall == pytest.approx(share_inside(reference, samples))
    assert 0.1 < precision < 0.95  # neither is trivial here


def test_at_most_nearest_members_count_the_same_each_time(rng):
    few = torch.zeros(50, 2)
    many = torch.cat([few, torch.full((50, 2), 9.0)])
    first, second = (precision_recall(many, few, nearest=20) for _ in range(2))
    assert first == second
    assert first[0] * 20 == pytest.approx(round(first[0] * 20))
    assert precision_recall(many, few)[0] == 0.5


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (torch.zeros(9, 3), torch.zeros(9, 2), r"\(9, 3\) and \(9, 2\)"),
        (torch.zeros(9, 3), torch.zeros(3, 3), "sets of 9 and 3, at least 4"),
        (torch.zeros(9, 3), torch.full((9, 3), float("nan")), "features2 is not finite"),
    ],
)
def test_unfit_sets_are_refused(first, second, message):
    with pytest.raises(ValueError, match=message):
        precision_recall(first, second)


# --- evaluate -----------------------------------------------------------------------------------


def some_of_each_class(classes, per_class=100):
    """Copies of digits, the same number of each of these classes, and their labels."""
    rows = [(IMAGES.label == c).nonzero()[:per_class, 0] for c in classes]
    rows = torch.cat(rows)
    return IMAGES.x[rows], IMAGES.label[rows]


def test_images_of_another_size_are_refused():
    """They would be compared without a word, in features that see any size."""
    with pytest.raises(ValueError, match=r"are \(1, 16, 16\), samples \(1, 8, 8\)"):
        evaluate(IMAGES.x[:20], torch.zeros(30, 1, 16, 16), minimum=20)


def test_dropping_classes_raises_the_distance_and_lowers_recall(reference):
    found = []
    for dropped in range(4):
        samples, label = some_of_each_class(range(10 - dropped))
        result = evaluate(samples, reference, label, minimum=100, balanced=False)
        found.append(result)
        assert all(share < 0.01 for share in result.class_share[10 - dropped :])
        assert result.precision > 0.99
    for more, fewer in itertools.pairwise(found):
        assert fewer.frechet > 1.5 * more.frechet
        assert fewer.recall < more.recall - 0.05


def test_noise_raises_the_distance_and_lowers_precision(rng, reference):
    noise = torch.randn(IMAGES.x.shape, generator=rng)
    found = [evaluate(IMAGES.x + s * noise, reference, minimum=1) for s in (0, 0.2, 0.4, 0.8)]
    for cleaner, noisier in itertools.pairwise(found):
        assert noisier.frechet > cleaner.frechet + 0.1
        assert noisier.precision < cleaner.precision


def test_an_evaluation_goes_into_json_and_into_a_sentence(reference):
    samples, label = some_of_each_class(range(10))
    result = evaluate(samples, reference, label, minimum=1000)
    again = json.loads(json.dumps(result._asdict()))
    assert again["count"] == 1000
    assert again["reference_count"] == 1797
    assert sum(again["class_share"]) == pytest.approx(1)
    assert result.as_label > 0.98
    assert "(digits features)" in str(result)
    assert "FID" not in str(result)
    assert "1,000 samples" in str(result)


def test_images_and_their_features_serve_alike_as_reference(reference):
    samples, _ = some_of_each_class(range(10), per_class=20)
    assert evaluate(samples, IMAGES.x, minimum=1) == evaluate(samples, reference, minimum=1)


def test_evaluation_prints_nothing(capfd, reference):
    evaluate(some_of_each_class(range(10), 10)[0], reference, minimum=1)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("count", "label", "options", "message"),
    [
        (100, None, {}, "100 samples are too few, 10000 are wanted"),
        (100, torch.arange(100) % 7, {"minimum": 1}, "class 0 has 15, class 7 has 0"),
        (100, torch.arange(100) % 11, {"minimum": 1}, "0 to 10, classes are 0 to 9"),
        (100, torch.arange(99) % 10, {"minimum": 1}, r"\(99,\), x has batch 100"),
    ],
)
def test_unfit_evaluations_are_refused(count, label, options, message, reference):
    with pytest.raises(ValueError, match=message):
        evaluate(IMAGES.x[:count], reference, label, **options)


def test_balanced_labels_pass_and_unbalanced_ones_may(reference):
    evaluate(IMAGES.x[:105], reference, balanced_labels(105, 10), minimum=1)
    evaluate(IMAGES.x[:100], reference, torch.zeros(100).long(), minimum=1, balanced=False)


# --- coverage -----------------------------------------------------------------------------------


def test_class_coverage_of_the_digits():
    share, as_label = class_coverage(IMAGES.x, IMAGES.label)
    true_share = torch.bincount(IMAGES.label) / 1797
    assert share == pytest.approx(true_share.tolist(), abs=0.003)
    assert as_label > 0.99
    assert class_coverage(IMAGES.x, (IMAGES.label + 1) % 10)[1] < 0.01
    assert class_coverage(IMAGES.x)[1] is None


def test_mode_coverage_of_perfect_samples(rng):
    target = ring()
    share, outside, covered = mode_coverage(target.sample(20_000, rng=rng), target, mass=0.99)
    assert share == pytest.approx([0.99 / 8] * 8, abs=0.01)
    assert outside == pytest.approx(0.01, abs=0.003)
    assert covered == 8


def test_mode_coverage_with_dropped_modes(rng):
    target = ring()
    label = torch.randint(5, (4_000,), generator=rng)
    share, _, covered = mode_coverage(target.sample(4_000, label, rng=rng), target)
    assert covered == 5
    assert max(share[5:]) < 1e-3


def test_points_between_modes_cover_nothing():
    share, outside, covered = mode_coverage(torch.zeros(100, 2), two_modes())
    assert share == (0, 0)
    assert (outside, covered) == (1, 0)


def test_a_mode_counts_as_covered_from_a_fraction_of_its_weight():
    target = two_modes()
    label = torch.zeros(1_000).long()
    label[:60] = 1
    points = target.means[label].float()
    assert mode_coverage(points, target, least=0.1).covered == 2
    assert mode_coverage(points, target, least=0.2).covered == 1
    with pytest.raises(ValueError, match="between 0 and 1, it is 1"):
        mode_coverage(points, target, mass=1)


# --- sliced Wasserstein -------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_coupling_on_a_line_is_exact_for_any_counts(count1, count2, seed):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(count1, 1, generator=rng)
    y = torch.randn(count2, 1, generator=rng)
    # repeated until both have the same count, the best coupling joins equal ranks
    same = (x.repeat_interleave(count2, 0).sort(0), y.repeat_interleave(count1, 0).sort(0))
    expected = (same[0].values - same[1].values).square().mean().sqrt().item()
    assert sliced_wasserstein(x, y) == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("dim", [1, 2, 64])
def test_sliced_wasserstein_of_shifted_gaussians(dim, rng):
    x = torch.randn(200, dim, generator=rng)
    shift = torch.randn(dim, generator=rng)
    expected = shift.norm().item() / dim**0.5
    assert sliced_wasserstein(x, x + shift, 4_000) == pytest.approx(expected, rel=0.05)
    assert sliced_wasserstein(x, x) == 0


def test_sliced_wasserstein_scales_is_symmetric_and_takes_images(rng):
    x, y = torch.randn(2, 30, 1, 4, 4, generator=rng)
    distance = sliced_wasserstein(x, y)
    assert distance == sliced_wasserstein(x.flatten(1), y.flatten(1))
    assert sliced_wasserstein(y, x) == pytest.approx(distance, rel=1e-9)
    assert sliced_wasserstein(10 * x, 10 * y) == pytest.approx(10 * distance, rel=1e-6)


def test_directions_are_the_callers_or_always_the_same(rng):
    x, y = torch.randn(2, 50, 3, generator=rng)
    assert sliced_wasserstein(x, y) == sliced_wasserstein(x, y)
    assert sliced_wasserstein(x, y, rng=rng) != sliced_wasserstein(x, y, rng=rng)


def test_sliced_wasserstein_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"\(5, 2\) and \(5, 3\)"):
        sliced_wasserstein(torch.zeros(5, 2), torch.zeros(5, 3))
    with pytest.raises(ValueError, match="sets of 5 and 0"):
        sliced_wasserstein(torch.zeros(5, 2), torch.zeros(0, 2))


# --- floors -------------------------------------------------------------------------------------


def squared_distance_of_means(x, y):
    return (x.mean(0) - y.mean(0)).square().sum().item()


def test_floor_of_a_metric_with_a_closed_form(rng):
    pool = torch.randn(40_000, 6, generator=rng)
    floor = sampling_floor(squared_distance_of_means, pool, 100, 25, repeats=400)
    # 6 independent squares of normal numbers of variance 1/100 + 1/25
    assert floor.mean == pytest.approx(6 * 0.05, rel=0.15)
    assert floor.std == pytest.approx(12**0.5 * 0.05, rel=0.2)
    assert (floor.count, floor.reference_count) == (100, 25)


def test_the_two_sets_of_a_floor_are_disjoint_and_repeatable():
    seen = []
    pool = torch.arange(10.0)[:, None]

    def metric(x, y):
        seen.append((x.flatten().tolist(), y.flatten().tolist()))
        return 0.0

    sampling_floor(metric, pool, 6, 4, repeats=3)
    assert all(sorted(x + y) == list(range(10)) for x, y in seen)
    assert seen[0] != seen[1]
    sampling_floor(metric, pool, 6, 4, repeats=3)
    assert seen[:3] == seen[3:]


def test_evaluation_floor_is_scaled_to_the_counts(rng):
    dim, count, reference_count = 8, 10_000, 1_000
    gaussian = torch.randn(reference_count, dim, generator=rng)
    floor = evaluation_floor(gaussian, count, repeats=20)
    # of standard normal samples: dim/n from the mean, dim (dim + 1) / 4n from the covariance
    expected = (dim + dim * (dim + 1) / 4) * (1 / count + 1 / reference_count)
    assert floor.frechet.mean == pytest.approx(expected, rel=0.15)
    pool = torch.randn(44_000, dim, generator=rng)
    direct = sampling_floor(frechet, pool, count, reference_count, repeats=20)
    assert floor.frechet.mean == pytest.approx(direct.mean, rel=0.25)
    assert floor.frechet[2:] == (count, reference_count)
    of_others = frechet_floor(gaussian, count, 500, repeats=20)  # at other counts than the pool's
    expected = (dim + dim * (dim + 1) / 4) * (1 / count + 1 / 500)
    assert of_others.mean == pytest.approx(expected, rel=0.15)
    assert of_others[2:] == (count, 500)
    assert floor.recall[2:] == (500, 500)


def test_a_floor_of_balanced_sets_counts_no_difference_of_their_classes(rng):
    """Two far classes: only with labels is it what two sets with as many of each get."""
    dim, count = 4, 2_000
    far = torch.tensor([[20.0, 0.0, 0.0, 0.0]])

    def balanced():
        x = torch.randn(count, dim, generator=rng)
        return torch.cat([x[: count // 2] + far, x[count // 2 :]])

    direct = torch.tensor([frechet(balanced(), balanced()) for _ in range(20)]).mean().item()
    label = torch.arange(2).repeat_interleave(count // 2)
    blind = frechet_floor(balanced(), count, count)
    aware = frechet_floor(balanced(), count, count, label)
    assert aware.mean == pytest.approx(direct, rel=0.25)
    assert blind.mean > 3 * direct
    unequal = torch.arange(2).repeat_interleave(torch.tensor([count // 4, 3 * count // 4]))
    assert frechet_floor(balanced(), count, count, unequal).count == count


def test_floor_of_the_digits_is_far_below_a_dropped_class(reference):
    samples, _ = some_of_each_class(range(9))
    floor = evaluation_floor(reference, 900, repeats=5)
    dropped = evaluate(samples, reference, minimum=1)
    assert dropped.frechet > floor.frechet.mean + 10 * floor.frechet.std
    assert 0.8 < floor.precision.mean < 0.97
    assert 0.8 < floor.recall.mean < 0.97


def test_small_pools_and_single_repeats_are_refused():
    with pytest.raises(ValueError, match="pool of 10 cannot give 6 and 5"):
        sampling_floor(frechet, torch.zeros(10, 2), 6, 5)
    with pytest.raises(ValueError, match="at least 2 repeats, not 1"):
        sampling_floor(frechet, torch.zeros(10, 2), 5, 5, repeats=1)


# --- FID, and what is not FID -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "count", "reference", "name"),
    [
        ("inception", 50_000, 50_000, "FID"),
        ("inception", 10_000, 50_000, "Frechet distance (inception features)"),
        ("inception", 50_000, 10_000, "Frechet distance (inception features)"),
        ("runs/classifier.safetensors", 50_000, 50_000, "Frechet distance (runs/classifier"),
        ("digits", 50_000, 50_000, "Frechet distance (digits features)"),
    ],
)
def test_only_what_is_measured_like_fid_is_called_fid(features, count, reference, name):
    result = metrics.Evaluation(1.0, 1.0, 1.0, None, None, count, reference, 10_000, features)
    assert result.name.startswith(name)
    assert str(result).startswith(name)


def stripes() -> Images:
    """Two classes of coloured stripes, 16 x 16."""
    rng = torch.Generator().manual_seed(0)
    x = 0.3 * torch.randn(200, 3, 16, 16, generator=rng)
    label = torch.arange(200) % 2
    x[label == 0, :, ::2] += 0.7
    x[label == 1, :, :, ::2] += 0.7
    return Images(to_8_bit(x), label, 2)


def test_a_trained_classifier_gives_features_that_tell_classes_apart(tmp_path):
    """Blurred stripes are farther from one class than fresh ones of the other are."""
    images = stripes()
    options = {"width": 8, "deep": True, "augment": True, "noise": 0.0}
    classifier = train_classifier(images, 30, 32, **options)
    assert accuracy(classifier, images) > 0.95
    path = str(tmp_path / "classifier.safetensors")
    save_classifier(path, classifier, data="stripes")
    features = extract_features(images.take(torch.arange(200)), path)
    assert features.shape == (200, 32)
    half = frechet(features[:100], features[100:])
    blurred = torch.nn.functional.avg_pool2d(images.take(torch.arange(100)), 3, 1, 1)
    assert frechet(extract_features(blurred, path), features[100:]) > 3 * half
    with safe_open(path, "pt") as file:
        assert file.metadata()["data"] == "stripes"


@pytest.mark.parametrize(("size", "channels"), [(16, 1), (32, 3), (48, 3), (64, 4)])
def test_a_deep_classifier_reads_images_of_its_size_only(size, channels):
    classifier = Classifier(size, channels, classes=7, width=4, deep=True).eval()
    assert classifier(torch.zeros(2, channels, size, size)).shape == (2, 7)
    assert classifier.features(torch.zeros(2, channels, size, size)).shape == (2, 16)
    with pytest.raises(ValueError, match=rf"wants \(batch, {channels}, {size}, {size}\)"):
        classifier(torch.zeros(2, channels, size, size + 1))


def test_what_is_no_classifier_is_refused(tmp_path):
    (tmp_path / "other.safetensors").write_bytes(b"hello")
    save_file({"weight": torch.zeros(3)}, tmp_path / "network.safetensors")
    for name in ("other", "network"):
        with pytest.raises(ValueError, match="no file of a classifier"):
            load_classifier(tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="images have none"):
        train_classifier(TRAIN._replace(classes=0), steps=1)

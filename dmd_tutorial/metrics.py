"""How good samples are: Frechet distance, precision and recall, coverage, sliced Wasserstein.

None of these is ideal even for perfect samples, which are finite: floors measure what these get.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from scipy.stats import chi2
from torch import Generator, Tensor
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from dmd_tutorial.checks import check_finite, check_label
from dmd_tutorial.features import extract_features, load_classifier
from dmd_tutorial.mixtures import GaussianMixture

FID_SAMPLES = 50_000
FID_PROTOCOL = """\
FID, as the tables of the papers give it for CIFAR-10: 50,000 samples against the 50,000 images of
the train set (not the test set), both rounded to 8 bits; features of torch-fidelity's
inception-v3-compat, which are those of the original Inception with its own resizing; one sample
from each of the seeds 0 to 49999, labels drawn with the noise. EDM quotes the best of three
evaluations with other seeds; they differ by 0.02 to 0.05. With fewer samples, another train set
(images stored again as JPEG, say), or another network's features it is a Frechet distance, but not
FID, and must not be compared with the tables."""


class Evaluation(NamedTuple):
    """What `evaluate` measures."""

    frechet: float  # in squared units of the features
    precision: float  # share of the samples that lie among the reference images
    recall: float  # share of the reference images that lie among the samples
    class_share: tuple[float, ...] | None  # how often each class is read; for digits only
    as_label: float | None  # share of the samples that are read as their label
    count: int  # type: ignore[assignment]  # samples; tuple.count is not missed
    reference_count: int
    nearest: int  # largest number of either that went into precision and recall
    features: str  # "digits", "inception", or a classifier's file

    @property
    def name(self) -> str:
        """What the distance may be called: FID only if measured as FID is (`FID_PROTOCOL`)."""
        if self.features == "inception" and self.count == self.reference_count == FID_SAMPLES:
            return "FID"
        return f"Frechet distance ({self.features} features)"

    def __str__(self) -> str:
        near = f"precision {self.precision:.3f}, recall {self.recall:.3f}"
        return f"{self.name} {self.frechet:.3f}, {near}, {self.count:,} samples"


def evaluate(
    samples: Float[Tensor, "count channels h w"],
    reference: Float[Tensor, "reference_count *image_or_features"],
    label: Int[Tensor, " count"] | None = None,
    features: str = "digits", minimum: int = 10_000, balanced: bool = True, nearest: int = 10_000,
) -> Evaluation:  # fmt: skip
    """Compare samples with reference images, or with their features; images are rounded to 8 bits.

    Those that are 8-bit already take a quarter of the memory. Fewer samples than `minimum` are
    refused, and unless `balanced` is off labels whose classes are not equally frequent (up to
    one): the distance would mostly measure these. Precision and recall take `nearest` of each set,
    since their cost grows with the square; `features` are those of `extract_features`.
    Source: Heusel et al. 2017 (Frechet distance); Kynkäänniemi et al. 2019.
    """
    if len(samples) < minimum:
        worth = "a smaller `minimum` allows them, `sampling_floor` says what they are worth"
        raise ValueError(f"{len(samples)} samples are too few, {minimum} are wanted; {worth}")
    if label is not None:
        classes = 10 if features == "digits" else int(label.max()) + 1
        check_label(samples, label, classes)
        counts = torch.bincount(label, minlength=classes)
        if balanced and counts.max() - counts.min() > 1:
            most, least = int(counts.argmax()), int(counts.argmin())
            found = f"class {most} has {counts[most]}, class {least} has {counts[least]}"
            raise ValueError(f"labels are unbalanced: {found}; draw them with data.balanced_labels")
    if reference.ndim != 2 and reference.shape[1:] != samples.shape[1:]:
        shapes = f"{tuple(reference.shape[1:])}, samples {tuple(samples.shape[1:])}"
        raise ValueError(f"images must have one size: those of the reference are {shapes}")
    ours, theirs = extract_features(samples, features), _features_of(reference, features)
    share, as_label = class_coverage(ours, label) if features == "digits" else (None, None)
    return Evaluation(
        frechet(ours, theirs), *precision_recall(ours, theirs, nearest), share, as_label,
        len(ours), len(theirs), nearest, features,
    )  # fmt: skip


def _features_of(images_or_features: Tensor, features: str) -> Tensor:
    given = images_or_features.ndim == 2
    return images_or_features.cpu() if given else extract_features(images_or_features, features)


def frechet(
    features1: Float[Tensor, "count1 width"], features2: Float[Tensor, "count2 width"]
) -> float:
    """Frechet distance between two sets, each taken for a Gaussian, in squared units."""
    _check_sets(features1, features2, least=2)
    first, second = features1.double(), features2.double()
    return frechet_distance(first.mean(0), first.T.cov(), second.mean(0), second.T.cov())


def frechet_distance(
    mean1: Float[Tensor, " dim"], cov1: Float[Tensor, "dim dim"],
    mean2: Float[Tensor, " dim"], cov2: Float[Tensor, "dim dim"],
) -> float:  # fmt: skip
    """Frechet distance between two Gaussians, their squared Wasserstein distance of order 2.

    ``|mean1 - mean2|^2 + trace(cov1 + cov2 - 2 (cov1 cov2)^(1/2))``, by torch-fidelity.
    """
    check_finite(mean1=mean1, cov1=cov1, mean2=mean2, cov2=cov2)
    dim = len(mean1)
    shapes = [tuple(t.shape) for t in (mean1, cov1, mean2, cov2)]
    if shapes != [(dim,), (dim, dim)] * 2:
        raise ValueError(f"means and covariances do not fit: {shapes}")
    first = {"mu": mean1.double().cpu().numpy(), "sigma": cov1.double().cpu().numpy()}
    second = {"mu": mean2.double().cpu().numpy(), "sigma": cov2.double().cpu().numpy()}
    return fid_statistics_to_metric(first, second, verbose=False)["frechet_inception_distance"]


def precision_recall(
    samples: Float[Tensor, "count width"], reference: Float[Tensor, "reference_count width"],
    nearest: int = 10_000,
) -> tuple[float, float]:  # fmt: skip
    """Share of the samples in the manifold of the reference, and the reverse.

    The manifold of a set is the union of balls around its members, each of which reaches to the
    third nearest other member; at most `nearest` of each set count, in every call the same. Both
    numbers depend on both counts. Source: Kynkäänniemi et al. 2019, computed by torch-fidelity.
    """
    _check_sets(samples, reference, least=4)
    chosen = []
    for every in (samples.cpu(), reference.cpu()):
        order = torch.randperm(len(every), generator=Generator().manual_seed(0))
        chosen.append(every if len(every) <= nearest else every[order[:nearest]])
    options = {"prc_neighborhood": 3, "prc_batch_size": 1_000, "save_cpu_ram": True}
    answer = prc_features_to_metric(*chosen, **options, verbose=False)
    return answer["precision"], answer["recall"]


def _check_sets(features1: Tensor, features2: Tensor, least: int) -> None:
    shape1, shape2 = tuple(features1.shape), tuple(features2.shape)
    if len(shape1) != 2 or len(shape2) != 2 or shape1[1] != shape2[1]:
        raise ValueError(f"two sets must be (count, width) each, they are {shape1} and {shape2}")
    if min(shape1[0], shape2[0]) < least:
        raise ValueError(f"sets of {shape1[0]} and {shape2[0]}, at least {least} each are needed")
    check_finite(features1=features1, features2=features2)


def class_coverage(
    samples: Float[Tensor, "count *image_or_features"], label: Int[Tensor, " count"] | None = None
) -> tuple[tuple[float, ...], float | None]:
    """How often the classifier reads each digit in samples, and how often a sample's label."""
    check_label(samples, label, 10)
    read = load_classifier().head(_features_of(samples, "digits")).argmax(1)
    share = torch.bincount(read, minlength=10).double() / len(read)
    as_label = None if label is None else (read == label.cpu()).double().mean().item()
    return tuple(share.tolist()), as_label


class ModeCoverage(NamedTuple):
    """Share of points in each mode, share outside of all modes, number of modes covered."""

    share: tuple[float, ...]
    outside: float
    covered: int


def mode_coverage(
    points: Float[Tensor, "count dim"], mixture: GaussianMixture,
    mass: float = 0.999, least: float = 0.1,
) -> ModeCoverage:  # fmt: skip
    """How points spread over the modes of a mixture.

    A point counts for each mode by the mode's responsibility for it, and only inside the ellipsoid
    with the share `mass` of the mode's own samples: a point half way between two modes belongs to
    neither. A mode is covered if its share is at least the fraction `least` of its weight.
    """
    if not 0 < mass < 1:
        raise ValueError(f"mass must be between 0 and 1, it is {mass}")
    responsibilities = mixture.responsibilities(points)  # (count, modes)
    offset = points[:, None] - mixture.means.to(points)
    precisions = torch.linalg.inv(mixture.covariances).to(points)
    squared_distance = torch.einsum("nki,kij,nkj->nk", offset, precisions, offset)
    inside = squared_distance <= chi2.ppf(mass, mixture.dim)
    share = (responsibilities * inside).double().mean(0).cpu()
    covered = int((share >= least * mixture.weights).sum())
    return ModeCoverage(tuple(share.tolist()), 1 - share.sum().item(), covered)


def sliced_wasserstein(
    x: Float[Tensor, "count1 *shape"], y: Float[Tensor, "count2 *shape"],
    projections: int = 128, rng: Generator | None = None,
) -> float:  # fmt: skip
    """Sliced Wasserstein distance of order 2, in the units of x; without rng always the same.

    Both sets are projected on random directions. On a line the best coupling joins equal quantiles,
    which is exact for any two counts. The distance is the root of the mean, over directions, of the
    squares; a shift by v gives about ``|v| / sqrt(dim)``. Source: Bonneel et al. 2015.
    """
    x, y = (t.flatten(1).cpu().double() for t in (x, y))
    _check_sets(x, y, least=1)
    rng = rng or Generator().manual_seed(0)
    directions = torch.randn(x.shape[1], projections, generator=rng, dtype=torch.float64)
    directions = directions / directions.norm(dim=0)
    # Quantile functions are stairs. Counted in units of 1 / (count1 * count2), the places of all
    # their steps are whole numbers, and between two of them both stairs are level.
    steps = torch.cat([torch.arange(len(x)) * len(y), torch.arange(len(y)) * len(x)]).unique()
    end = len(x) * len(y)
    width = steps.diff(append=torch.tensor([end])).double() / end
    squared = 0.0
    for some in directions.split(16, dim=1):
        quantile_x = (x @ some).sort(dim=0).values[steps // len(y)]  # (steps, directions)
        quantile_y = (y @ some).sort(dim=0).values[steps // len(x)]
        squared += (width @ (quantile_x - quantile_y) ** 2).sum().item()
    return (squared / projections) ** 0.5


class Floor(NamedTuple):
    """What a metric gives for two sets of one distribution: mean, spread, and the counts."""

    mean: float
    std: float
    count: int  # type: ignore[assignment]
    reference_count: int


class EvaluationFloor(NamedTuple):
    """The floors of the three numbers of an evaluation."""

    frechet: Floor
    precision: Floor
    recall: Floor


def sampling_floor(
    metric: Callable[[Tensor, Tensor], float], pool: Float[Tensor, "pool *shape"],
    count: int, reference_count: int, repeats: int = 10, rng: Generator | None = None,
) -> Floor:  # fmt: skip
    """What a metric gives for two independent sets of samples of the same distribution.

    Each repeat draws two disjoint sets from the pool, without rng always the same. A value within a
    few standard deviations of the mean is no evidence of a difference. Repeats overlap, and their
    spread comes out too small, unless the pool is many times larger than both sets together.
    """
    sets = _disjoint_sets(pool, count, reference_count, repeats, rng)
    return _floor([metric(first, second) for first, second in sets], count, reference_count)


def evaluation_floor(
    reference: Float[Tensor, "reference_count *image_or_features"], count: int,
    features: str = "digits", repeats: int = 10, rng: Generator | None = None,
    label: Int[Tensor, " reference_count"] | None = None,
) -> EvaluationFloor:  # fmt: skip
    """What `evaluate` would give for `count` more images like the reference.

    Random halves of the reference are compared, balanced in class by its labels as the samples of
    an evaluation are; the Frechet distance is scaled to the evaluation's counts (`frechet_floor`),
    precision and recall are not. A generator that was trained on the reference, and remembers it,
    can go below this floor.
    """
    values = _features_of(reference, features)
    half = len(values) // 2
    sets = list(_disjoint_sets(values, half, half, repeats, rng, label))
    near = zip(*(precision_recall(*two) for two in sets), strict=True)
    distance = frechet_floor(values, count, None, label, repeats, rng)
    return EvaluationFloor(distance, *(_floor(numbers, half, half) for numbers in near))


def frechet_floor(
    pool: Float[Tensor, "pool width"], count: int, reference_count: int | None = None,
    label: Int[Tensor, " pool"] | None = None, repeats: int = 10, rng: Generator | None = None,
) -> Floor:  # fmt: skip
    """The Frechet distance of two sets of one distribution, of these counts or `count` and pool's.

    Random halves of the pool are compared, with labels as many of each class in both: unequal ones
    would count as a difference, which balanced samples do not have. The distance is proportional to
    ``1/count1 + 1/count2``, so it is scaled to the counts.
    """
    half, reference_count = len(pool) // 2, reference_count or len(pool)
    scale = (1 / count + 1 / reference_count) / (2 / half)
    sets = _disjoint_sets(pool, half, half, repeats, rng, label)
    return _floor([scale * frechet(*two) for two in sets], count, reference_count)


def _disjoint_sets(
    pool: Tensor, count1: int, count2: int, repeats: int, rng: Generator | None,
    label: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    if count1 + count2 > len(pool):
        raise ValueError(f"a pool of {len(pool)} cannot give {count1} and {count2} samples")
    if repeats < 2:
        raise ValueError(f"a spread needs at least 2 repeats, not {repeats}")
    rng = rng or Generator().manual_seed(0)
    for _ in range(repeats):
        order = torch.randperm(len(pool), generator=rng)
        if label is not None:  # members of each class lie evenly over the whole
            place = torch.empty(len(pool))
            for one in label.unique():
                members = order[label[order] == one]
                place[members] = torch.linspace(0, 1, len(members))
            order = place.argsort()
        yield pool[order[:count1]], pool[order[count1 : count1 + count2]]


def _floor(values: Sequence[float], count: int, reference_count: int) -> Floor:
    each = torch.tensor(values, dtype=torch.float64)
    return Floor(each.mean().item(), each.std().item(), count, reference_count)

"""Gaussian mixtures: density, score and denoiser are exact at every noise level.

Noise of level sigma adds ``sigma^2`` to every covariance, so a noisy mixture is a mixture again.
"""

import math

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from dmd_tutorial.checks import NO_CLASS, Condition, check_finite, check_label, check_sigma
from dmd_tutorial.noise import source

Points = Float[Tensor, "batch dim"]
Levels = Float[Tensor, " batch"] | float  # one number is the level of all points


class GaussianMixture:
    """A mixture of Gaussians in any number of dimensions, and its exact denoiser.

    The classes of ``mixture(x, sigma, label)`` are the components: a label leaves one, `NO_CLASS`
    the whole mixture. Components without weights weigh the same.
    """

    def __init__(
        self, means: Float[Tensor, "components dim"],
        covariances: Float[Tensor, "components dim dim"],
        weights: Float[Tensor, " components"] | None = None,
    ) -> None:  # fmt: skip
        means = torch.as_tensor(means, dtype=torch.float64)
        covariances = torch.as_tensor(covariances, dtype=torch.float64)
        if means.ndim != 2:
            raise ValueError(f"means must be (components, dim), not {tuple(means.shape)}")
        components, dim = self.classes, self.dim = means.shape
        equal = torch.full((components,), 1 / components)
        weights = torch.as_tensor(equal if weights is None else weights, dtype=torch.float64)
        check_finite(means=means, covariances=covariances, weights=weights)
        if (shape := tuple(covariances.shape)) != (wanted := (components, dim, dim)):
            raise ValueError(f"covariances have shape {shape}, means want {wanted}")
        if weights.shape != (components,):
            raise ValueError(f"weights have shape {tuple(weights.shape)}, not ({components},)")
        if (weights <= 0).any() or abs(weights.sum() - 1) > 1e-5:
            raise ValueError(f"weights must be above 0 and sum to 1, they are {weights.tolist()}")
        if not torch.allclose(covariances, covariances.mT):
            raise ValueError("a covariance is not symmetric")
        self.means, self.covariances = means, covariances
        self.weights = weights / weights.sum()
        # the axes and variances of each component: noise adds sigma^2 to each variance
        self.variances, self.axes = torch.linalg.eigh(covariances)
        if self.variances.min() <= 0:
            raise ValueError(f"a covariance has eigenvalue {self.variances.min().item():g}")

    @classmethod
    def isotropic(
        cls, means: Float[Tensor, "components dim"], std: float,
        weights: Float[Tensor, " components"] | None = None,
    ) -> "GaussianMixture":  # fmt: skip
        means = torch.as_tensor(means, dtype=torch.float64)
        identity = torch.eye(means.shape[-1], dtype=torch.float64)
        return cls(means, std**2 * identity.expand(len(means), -1, -1), weights)

    def log_prob(
        self, x: Points, sigma: Levels = 0.0, label: Condition | None = None
    ) -> Float[Tensor, " batch"]:
        """Log-density of the noisy mixture, or of the component of the label, exactly."""
        return self._parts(x, sigma, label)[0].logsumexp(dim=1)

    def responsibilities(
        self, x: Points, sigma: Levels = 0.0, label: Condition | None = None
    ) -> Float[Tensor, "batch components"]:
        """Probability of each component behind each noisy point."""
        return self._parts(x, sigma, label)[0].softmax(dim=1)

    def score(self, x: Points, sigma: Levels = 0.0, label: Condition | None = None) -> Points:
        """Score of the noisy mixture, the gradient of its log-density, exactly."""
        joint, along_axes, variances = self._parts(x, sigma, label)
        return -self._mean(joint, 1 / variances * along_axes)

    def __call__(self, x: Points, sigma: Levels, label: Condition | None = None) -> Points:
        """Denoise: the mean of the clean points behind each noisy one, exactly."""
        joint, along_axes, variances = self._parts(x, sigma, label)
        return self._mean(joint, self.variances.to(x) / variances * along_axes, self.means.to(x))

    def sample(
        self, count: int, label: Condition | None = None, rng: Generator | None = None
    ) -> Float[Tensor, "count dim"]:
        """Draw points, float32; their components are drawn by weight where no label says them."""
        check_label(torch.empty(count), label, self.classes)
        component, where = torch.full((count,), NO_CLASS) if label is None else label, source(rng)
        if (component == NO_CLASS).any():
            weights = self.weights.to(where["device"])
            drawn = torch.multinomial(weights, count, replacement=True, generator=rng)
            component = torch.where(component == NO_CLASS, drawn.to(component), component)
        noise = torch.randn(count, self.dim, dtype=torch.float64, **where).to(self.means)
        along_axes = self.variances[component].sqrt() * noise
        offset = torch.einsum("nde,ne->nd", self.axes[component], along_axes)
        return (self.means[component] + offset).float()

    def _parts(
        self, x: Tensor, sigma: Tensor | float, label: Condition | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of each component: log of weight times density, offsets along its axes, variances there.

        Shapes are (batch, components) and twice (batch, components, dim); the noise counts.
        """
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"x has shape {tuple(x.shape)}, the mixture wants (batch, {self.dim})")
        if not isinstance(sigma, Tensor):
            sigma = torch.full((len(x),), float(sigma), dtype=x.dtype, device=x.device)
        check_sigma(x, sigma)
        check_finite(x=x)
        check_label(x, label, self.classes)
        offsets = x[:, None] - self.means.to(x)
        along_axes = _einsum("bkd,kde->bke", offsets, self.axes.to(x))
        variances = self.variances.to(x) + sigma.to(x.dtype)[:, None, None] ** 2
        constant = self.dim * math.log(2 * math.pi)
        squares = (along_axes**2 / variances).sum(-1)
        log_density = -0.5 * (squares + variances.log().sum(-1) + constant)
        joint = log_density + self.weights.to(x).log()
        if label is not None:
            other = torch.arange(self.classes, device=x.device) != label[:, None]
            alone = log_density.masked_fill(other, -math.inf)
            joint = torch.where(label[:, None] == NO_CLASS, joint, alone)
        return joint, along_axes, variances

    def _mean(self, joint: Tensor, along_axes: Tensor, centre: Tensor | float = 0.0) -> Tensor:
        """Average over components of a centre and an offset along the axes."""
        each = _einsum("bke,kde->bkd", along_axes, self.axes.to(along_axes)) + centre
        return _einsum("bk,bkd->bd", joint.softmax(dim=1), each)


def _einsum(equation: str, *tensors: Tensor) -> Tensor:
    with torch.autocast(tensors[0].device.type, enabled=False):  # exact under an outer one, too
        return torch.einsum(equation, *tensors)

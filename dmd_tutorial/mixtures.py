"""Gaussian mixtures: density, score and denoiser are exact at every noise level.

Noise of level sigma adds ``sigma^2`` to every covariance, so a noisy mixture is a mixture again.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from dmd_tutorial.checks import check_finite, check_label, check_sigma


class GaussianMixture:
    """A mixture of Gaussians in any number of dimensions.

    It is a denoiser like any other: ``mixture(x, sigma, label)``. Its classes are its components.

    Args:
        means: Centres of the components, (components, dim).
        covariances: Covariance matrices, (components, dim, dim), symmetric, positive definite.
        weights: Probabilities of the components, (components,), above 0; equal without them.

    Raises:
        ValueError: If shapes do not fit, weights are not probabilities, or a covariance is not
            symmetric and positive definite.
    """

    def __init__(
        self,
        means: Float[Tensor, "components dim"],
        covariances: Float[Tensor, "components dim dim"],
        weights: Float[Tensor, " components"] | None = None,
    ) -> None:
        means = torch.as_tensor(means, dtype=torch.float64)
        covariances = torch.as_tensor(covariances, dtype=torch.float64)
        if means.ndim != 2:
            raise ValueError(f"means must be (components, dim), not {tuple(means.shape)}")
        components, dim = means.shape
        if weights is None:
            weights = torch.full((components,), 1 / components)
        weights = torch.as_tensor(weights, dtype=torch.float64)
        check_finite(means=means, covariances=covariances, weights=weights)
        if covariances.shape != (components, dim, dim):
            raise ValueError(
                f"covariances have shape {tuple(covariances.shape)}, "
                f"means want {(components, dim, dim)}"
            )
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
        cls,
        means: Float[Tensor, "components dim"],
        std: float,
        weights: Float[Tensor, " components"] | None = None,
    ) -> "GaussianMixture":
        """A mixture of round Gaussians of one width.

        Args:
            means: Centres, (components, dim).
            std: Standard deviation along every axis, in the units of the means.
            weights: Probabilities of the components; equal without them.

        Returns:
            The mixture.
        """
        means = torch.as_tensor(means, dtype=torch.float64)
        identity = torch.eye(means.shape[-1], dtype=torch.float64)
        return cls(means, std**2 * identity.expand(len(means), -1, -1), weights)

    @property
    def dim(self) -> int:
        """Number of dimensions."""
        return self.means.shape[1]

    @property
    def classes(self) -> int:
        """Number of components, which are the classes of this denoiser."""
        return self.means.shape[0]

    def log_prob(
        self,
        x: Float[Tensor, "batch dim"],
        sigma: Float[Tensor, " batch"] | float = 0.0,
        label: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, " batch"]:
        """Log-density of the noisy mixture, exactly.

        Args:
            x: Points, (batch, dim).
            sigma: Noise level of each point, (batch,), or one for all, in the units of x.
            label: The only component that counts, for each point; all of them without it.

        Returns:
            Natural logarithms of the density, (batch,).

        Raises:
            ValueError: If shapes do not fit or an input is not finite.
        """
        return self._joint(x, self._levels(x, sigma), label).logsumexp(dim=1)

    def responsibilities(
        self,
        x: Float[Tensor, "batch dim"],
        sigma: Float[Tensor, " batch"] | float = 0.0,
        label: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch components"]:
        """Probability of each component behind each noisy point.

        Args:
            x: Points, (batch, dim).
            sigma: Noise level of each point, (batch,), or one for all.
            label: The only component that counts, for each point.

        Returns:
            Probabilities, (batch, components); each row sums to 1.
        """
        return self._joint(x, self._levels(x, sigma), label).softmax(dim=1)

    def score(
        self,
        x: Float[Tensor, "batch dim"],
        sigma: Float[Tensor, " batch"] | float = 0.0,
        label: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch dim"]:
        """Score of the noisy mixture, the gradient of its log-density, exactly.

        Args:
            x: Points, (batch, dim).
            sigma: Noise level of each point, (batch,), or one for all.
            label: The only component that counts, for each point.

        Returns:
            Scores, (batch, dim), in one over the units of x.
        """
        sigma = self._levels(x, sigma)
        return -self._mean_of_components(x, sigma, label, lambda v, s2: 1 / (v + s2), centre=False)

    def __call__(
        self,
        x: Float[Tensor, "batch dim"],
        sigma: Float[Tensor, " batch"] | float,
        label: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch dim"]:
        """Denoise: the mean of the clean points behind each noisy one, exactly.

        Args:
            x: Noisy points, (batch, dim).
            sigma: Noise level of each point, (batch,), or one for all.
            label: The component that each point comes from, if it is known.

        Returns:
            Denoised points, (batch, dim).
        """
        sigma = self._levels(x, sigma)
        return self._mean_of_components(x, sigma, label, lambda v, s2: v / (v + s2), centre=True)

    def sample(
        self,
        count: int,
        label: Int[Tensor, " count"] | None = None,
        rng: Generator | None = None,
    ) -> Float[Tensor, "count dim"]:
        """Draw points.

        Args:
            count: How many.
            label: The component of each, (count,); drawn by weight without it.
            rng: Source of randomness; torch's own without one.

        Returns:
            Points, (count, dim), float32.
        """
        if label is None:
            label = torch.multinomial(self.weights, count, replacement=True, generator=rng)
        noise = torch.randn(count, self.dim, generator=rng, dtype=torch.float64)
        along_axes = self.variances[label].sqrt() * noise
        points = self.means[label] + torch.einsum("nde,ne->nd", self.axes[label], along_axes)
        return points.float()

    def _levels(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"x has shape {tuple(x.shape)}, the mixture wants (batch, {self.dim})")
        if not isinstance(sigma, Tensor):
            sigma = torch.full((len(x),), float(sigma), dtype=x.dtype, device=x.device)
        check_sigma(x, sigma)
        check_finite(x=x)
        return sigma.to(x.dtype)

    def _joint(self, x: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
        """Log of weight times density, (batch, components)."""
        check_label(x, label, self.classes)
        variances = self.variances.to(x) + sigma[:, None, None] ** 2  # (batch, components, dim)
        offset = self._along_axes(x)
        log_density = -0.5 * (
            (offset**2 / variances).sum(-1)
            + variances.log().sum(-1)
            + self.dim * math.log(2 * math.pi)
        )
        if label is None:
            return log_density + self.weights.to(x).log()
        other = torch.arange(self.classes, device=x.device) != label[:, None]
        return log_density.masked_fill(other, -math.inf)

    def _along_axes(self, x: Tensor) -> Tensor:
        """Offsets from each centre along the axes of its component, (batch, components, dim)."""
        return torch.einsum("bkd,kde->bke", x[:, None] - self.means.to(x), self.axes.to(x))

    def _mean_of_components(
        self,
        x: Tensor,
        sigma: Tensor,
        label: Tensor | None,
        factor: Callable[[Tensor, Tensor], Tensor],
        centre: bool,
    ) -> Tensor:
        """Average over components of (centre +) offset, scaled along each axis by a factor."""
        scale = factor(self.variances.to(x), sigma[:, None, None] ** 2)
        answer = torch.einsum("bke,kde->bkd", scale * self._along_axes(x), self.axes.to(x))
        if centre:
            answer = answer + self.means.to(x)
        share = self._joint(x, sigma, label).softmax(dim=1)
        return torch.einsum("bk,bkd->bd", share, answer)

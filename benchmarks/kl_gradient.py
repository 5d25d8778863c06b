"""The KL gradient between Gaussians, estimated from scores, against autograd of the closed form.

    python benchmarks/kl_gradient.py          # under ten seconds on one core

Figures to reach, with N = 100,000 samples of the generator mean + factor z:
relative error of the score-difference estimate below 1.5e-2, and the mean of the term that the
estimate drops within 3 standard errors of zero. Leaves with status 1 if one is missed.
"""

import sys
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

SAMPLES = 100_000
LARGEST_ERROR = 1.5e-2
LARGEST_MEAN = 3.0  # in standard errors


class Problem(NamedTuple):
    """A Gaussian generator mean + factor z, and Gaussian data."""

    mean: Tensor
    factor: Tensor
    real: MultivariateNormal


class Outcome(NamedTuple):
    """What one problem gave: both errors relative, the means in standard errors."""

    error: float
    error_kept: float
    mean: float
    largest_component: float


def draw_problem(dim: int, seed: int) -> Problem:
    """Draw a generator and data that overlap: standard deviations around 1, means around 0."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    factor, root = (torch.eye(dim) + 0.4 * normal(dim, dim) for _ in range(2))
    covariance = root @ root.T + 0.1 * torch.eye(dim)
    return Problem(normal(dim), factor, MultivariateNormal(normal(dim), covariance))


def exact_gradient(problem: Problem) -> Tensor:
    """Autograd through the closed form, derivatives by mean and factor in one row."""
    leaves = [problem.mean.clone().requires_grad_(), problem.factor.clone().requires_grad_()]
    mean, factor = leaves
    divergence = kl_divergence(MultivariateNormal(mean, factor @ factor.T), problem.real)
    return _row(*torch.autograd.grad(divergence, leaves))


def sample_gradients(problem: Problem, seed: int) -> tuple[Tensor, Tensor]:
    """For each sample, the estimate's integrand and the term that it drops, (N, parameters)."""
    mean, factor, real = problem
    rng = torch.Generator().manual_seed(seed)
    z = torch.randn(SAMPLES, len(mean), generator=rng, dtype=torch.float64)
    x = mean + z @ factor.T
    fake = MultivariateNormal(mean, factor @ factor.T)
    difference = _score(fake, x) - _score(real, x)
    # d/dmean log p = S^-1 (x - mean), d/dfactor log p = S^-1 (x - mean) z^T - factor^-T
    slope_mean = -_score(fake, x)
    slope_factor = slope_mean[:, :, None] * z[:, None, :] - torch.linalg.inv(factor).T
    kept = _row(difference, difference[:, :, None] * z[:, None, :])
    return kept, _row(slope_mean, slope_factor)


def measure(problem: Problem, seed: int) -> Outcome:
    """Compare the estimates with the exact gradient, and the dropped mean with zero."""
    exact = exact_gradient(problem)
    kept, dropped = sample_gradients(problem, seed)
    mean, standard_error = dropped.mean(0), dropped.std(0) / SAMPLES**0.5
    return Outcome(
        _relative(kept.mean(0), exact),
        _relative((kept + dropped).mean(0), exact),
        (mean.norm() / standard_error.norm()).item(),
        (mean / standard_error).abs().max().item(),
    )


def _row(by_mean: Tensor, by_factor: Tensor) -> Tensor:
    return torch.cat([by_mean, by_factor.flatten(-2)], dim=-1)


def _score(gaussian: MultivariateNormal, x: Tensor) -> Tensor:
    return -torch.linalg.solve(gaussian.covariance_matrix, (x - gaussian.mean).T).T


def _relative(estimate: Tensor, exact: Tensor) -> float:
    return ((estimate - exact).norm() / exact.norm()).item()


def main() -> int:
    """Print the table; say whether the figures are reached."""
    print(f"N = {SAMPLES:,}; worst of 5 problems")
    print("dim   error of score difference   with dropped term   dropped mean (largest component)")
    worst = Outcome(0, 0, 0, 0)
    for dim in (1, 2, 4):
        outcomes = [measure(draw_problem(dim, seed), 100 + seed) for seed in range(5)]
        row = Outcome(*map(max, zip(*outcomes, strict=True)))
        worst = Outcome(*map(max, zip(worst, row, strict=True)))
        print(
            f"{dim:3}   {row.error:25.2e}   {row.error_kept:17.2e}   "
            f"{row.mean:.2f} ({row.largest_component:.2f}) standard errors"
        )
    reached = worst.error < LARGEST_ERROR and worst.mean < LARGEST_MEAN
    print(
        f"relative error {worst.error:.2e} (to reach: below {LARGEST_ERROR:g}), dropped mean "
        f"{worst.mean:.2f} standard errors (below {LARGEST_MEAN:g}): "
        f"{'reached' if reached else 'MISSED'}"
    )
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())

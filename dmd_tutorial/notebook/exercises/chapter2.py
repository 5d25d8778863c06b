"""Exercises of chapter 2: the teacher and its many steps."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dmd_tutorial.denoisers import Denoiser, edm_preconditioning
from dmd_tutorial.notebook.exercises import Exercise, Network, gradients_by


def factors(sigma: Tensor, sigma_data: float, **wrong: Callable) -> tuple[Tensor, ...]:
    changed = {name: factor(sigma, sigma_data) for name, factor in wrong.items()}
    return edm_preconditioning(sigma, sigma_data)._replace(**changed)[:3]


def denoise(
    network, x, sigma, sigma_data, axes=(1, 1, 1), told=lambda s: s.log() / 4, scaled=1, skipped=1
) -> Tensor:
    c_skip, c_out, c_in = (c.reshape(-1, *axes) for c in factors(sigma, sigma_data))
    raw = network(c_in * x if scaled else x, told(sigma))
    return (c_skip * x if skipped else x) + c_out * raw


def _images() -> list[tuple]:
    """Eight images of 8 x 8 pixels: here a sigma with too few axes raises no error. Then one."""
    sigma = torch.tensor([0.002, 0.01, 0.1, 0.3, 1.0, 3.0, 20.0, 80.0])
    x = torch.randn(8, 1, 8, 8) * (1 + sigma[:, None, None, None])
    network = Network(lambda parameter, x, c_noise: torch.tanh(parameter * x) + c_noise)
    return [(network, x, sigma, 0.5), (network, x[4:5], sigma[4:5], 1.4)]


def heun_step(
    denoiser, x, sigma, sigma_next, a=0.5, b=0.5, moved=True, guarded=True, old=False, ahead=1
) -> Tensor:
    # wrong ones have other shares, a and b, of the slopes, or take another second slope
    step = ahead * (sigma_next - sigma)
    first = _slope(denoiser, x, sigma)
    predicted = x + step * first
    if guarded and sigma_next == 0:
        return predicted
    second = _slope(denoiser, predicted if moved else x, sigma_next, over=sigma if old else None)
    return x + step * (a * first + b * second)


def _slope(denoiser: Denoiser, x: Tensor, sigma: float, over: float | None = None) -> Tensor:
    return (x - denoiser(x, torch.full((len(x),), sigma, dtype=x.dtype))) / (over or sigma)


def _fitted_slope(x: Tensor, y: Tensor) -> Tensor:
    """Slope of the straight line nearest to the points in the mean square."""
    x = x - x.mean()
    return (x * (y - y.mean())).sum() / (x**2).sum()


EXERCISES = [
    Exercise("2.1", "factors of the preconditioning", factors, {
        "c_skip is the wrong way round: with no noise (sigma = 0) the input is the answer, so "
        "c_skip must be 1 there": partial(factors, c_skip=lambda s, sd: s**2 / (s**2 + sd**2)),
        "c_skip is a ratio of variances: square both sigma_data and sigma":
            partial(factors, c_skip=lambda s, sd: sd / (s + sd)),
        "c_out is a standard deviation: a square root is missing in its denominator":
            partial(factors, c_out=lambda s, sd: s * sd / (s**2 + sd**2)),
        "c_out and c_in are standard deviations: the square roots are missing": partial(
            factors, c_out=lambda s, d: s * d / (s**2 + d**2), c_in=lambda s, d: 1 / (s**2 + d**2)),
        "c_out is squared: what you return is the variance of the target before scaling":
            partial(factors, c_out=lambda s, sd: (s * sd) ** 2 / (s**2 + sd**2)),
        "c_out must shrink with sigma at low noise; sqrt(sigma^2 + sigma_data^2) is the standard "
        "deviation of the noisy input": partial(factors, c_out=lambda s, sd: (s**2 + sd**2).sqrt()),
        "c_in is a scale, so it is one over a standard deviation, not over a variance":
            partial(factors, c_in=lambda s, sd: 1 / (s**2 + sd**2)),
        "variances add, not their square roots": partial(factors, c_in=lambda s, sd: 1 / (s + sd)),
        "c_in leaves out the spread of the data: at low noise the input is not small":
            partial(factors, c_in=lambda s, sd: 1 / s),
    }, inputs=lambda: [(torch.tensor([0.0, 0.002, 0.1, 0.5, 2.0, 80.0]), 0.5),
                       (torch.tensor([3.0]), 1.4)]),
    Exercise("2.2", "denoiser for images", denoise, {
        "the network is told ln(sigma) / 4, not sigma": partial(denoise, told=lambda s: s),
        "the network is told a quarter of ln(sigma)": partial(denoise, told=torch.log),
        "a factor of shape (batch, 1) meets images at their last two axes: here each row of pixels "
        "got the factor of another image. Use c[:, None, None, None]": partial(denoise, axes=(1,)),
        "a factor of shape (batch,) meets images at their last axis: here each column of pixels "
        "got the factor of another image. Use c[:, None, None, None]": partial(denoise, axes=()),
        "the network's input is not scaled by c_in": partial(denoise, scaled=False),
        "the direct path is c_skip * x, not x": partial(denoise, skipped=False),
    }, inputs=_images, probe=gradients_by({"gradient that reaches the network": 0}, name="")),
    Exercise("2.3", "Heun's step", heun_step, {
        "this is Euler's step: use the second slope": partial(heun_step, a=1, b=0),
        "that is the second slope; take the mean": partial(heun_step, a=0, b=1),
        "the slopes are added; take their mean": partial(heun_step, a=1, b=1),
        "the second slope is taken at the old x: take it where Euler's step arrives":
            partial(heun_step, moved=False),
        "the second slope is divided by the old noise level; everything in it belongs to "
        "sigma_next": partial(heun_step, old=True),
        "the step goes uphill: from sigma to sigma_next the change is sigma_next - sigma":
            partial(heun_step, ahead=-1),
        "the real step starts at x, not where Euler's step arrives": partial(heun_step, a=1.5),
        "at sigma_next = 0 the second slope is 0/0: there, stop at Euler's step":
            partial(heun_step, guarded=False),
    }, inputs=lambda: [(Network(lambda p, x, s: p * x.tanh() / (1 + s**2)), x, *levels)
                       for x in (2 * torch.randn(5, 2).double(), torch.randn(1, 2, 3))
                       for levels in ((2.0, 1.0), (0.4, 0.0), (0.02, 0.002), (0.3, 0.9))]),
    Exercise("2.4", "path of a Gaussian",
             lambda x, start, end, std: x * math.sqrt((std**2 + end**2) / (std**2 + start**2)), {
        "the variances have this ratio; x scales like a standard deviation, its root":
            lambda x, start, end, std: x * (std**2 + end**2) / (std**2 + start**2),
        "upside down: towards less noise the points move together":
            lambda x, start, end, std: x * math.sqrt((std**2 + start**2) / (std**2 + end**2)),
        "this is the path of a single data point at 0; the data have a spread of their own":
            lambda x, start, end, std: x * end / start,
        "variances add, standard deviations do not: std**2 + sigma**2 under the root":
            lambda x, start, end, std: x * (std + end) / (std + start),
        "this is the denoised point at sigma_start, one Euler step to 0; follow the path":
            lambda x, start, end, std: x * std**2 / (std**2 + start**2),
    }, inputs=lambda: [(torch.randn(shape).double(), *levels)
                       for shape in ((6,), (1, 2, 3))
                       for levels in ((5.0, 0.4, 1.5), (0.1, 2.0, 0.5), (3.0, 0.0, 0.7))]),
    Exercise("2.5", "order of convergence",
             lambda steps, errors: -_fitted_slope(steps.log(), errors.log()), {
        "the sign: errors fall as the steps grow, and the order is a positive number":
            lambda steps, errors: _fitted_slope(steps.log(), errors.log()),
        "log2 of the ratio of two errors is the order only where the steps double":
            lambda steps, errors: (errors[:-1] / errors[1:]).log2().mean(),
        "the errors' logarithms, but not those of the steps: a power law is straight only where "
        "both axes are logarithmic": lambda steps, errors: -_fitted_slope(steps, errors.log()),
        "a straight line through the errors themselves says nothing about a power law; take "
        "logarithms of both": lambda steps, errors: -_fitted_slope(steps, errors),
        "steps over errors: the roles of the axes are swapped":
            lambda steps, errors: -_fitted_slope(errors.log(), steps.log()),
        # errors about a power law, at numbers of steps that do not double
    }, inputs=lambda: [(n, n**-order * (1 + n.cos() / 9)) for order, numbers in (
                           (1.0, [10.0, 30.0, 90.0]), (2.4, [8.0, 12.0, 50.0, 70.0]))
                       for n in [torch.tensor(numbers).double()]]),
]  # fmt: skip

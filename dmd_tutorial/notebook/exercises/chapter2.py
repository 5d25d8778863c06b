"""Exercises of chapter 2: the teacher and its many steps."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dmd_tutorial.data import two_modes
from dmd_tutorial.denoisers import Denoiser, edm_preconditioning
from dmd_tutorial.notebook.exercises import Exercise

Network = Callable[[Tensor, Tensor], Tensor]
Factors = tuple[Tensor, Tensor, Tensor]


def factors(sigma: Tensor, sigma_data: float) -> Factors:
    """c_skip, c_out and c_in of EDM: the answer to 2.1."""
    total = sigma**2 + sigma_data**2
    return sigma_data**2 / total, sigma * sigma_data / total.sqrt(), 1 / total.sqrt()


def _other_factors(
    c_skip: Callable[..., Tensor] | None = None,
    c_out: Callable[..., Tensor] | None = None,
    c_in: Callable[..., Tensor] | None = None,
) -> Callable[[Tensor, float], Factors]:
    """A wrong answer to 2.1: EDM's factors, except those given."""

    def answer(sigma: Tensor, sigma_data: float) -> Factors:
        right = factors(sigma, sigma_data)
        skip, out, scale = (
            own(sigma, sigma_data) if own else fallback
            for own, fallback in zip((c_skip, c_out, c_in), right, strict=True)
        )
        return skip, out, scale

    return answer


def denoise(network: Network, x: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """A denoiser made of a raw network, for images: the answer to 2.2."""
    return _denoise(network, x, sigma, sigma_data, lambda c: c[:, None, None, None])


def _denoise(
    network: Network,
    x: Tensor,
    sigma: Tensor,
    sigma_data: float,
    axes: Callable[[Tensor], Tensor],
    noise_input: Callable[[Tensor], Tensor] = lambda sigma: sigma.log() / 4,
    scaled: bool = True,
    skipped: bool = True,
) -> Tensor:
    """The denoiser with everything that can go wrong as an argument.

    Args:
        network: F, called as ``network(x, c_noise)``.
        x: Noisy images, (batch, channels, height, width).
        sigma: Noise levels, (batch,).
        sigma_data: Standard deviation of the data.
        axes: Gives one number per image its trailing axes.
        noise_input: What the network is told about the noise.
        scaled: Whether the network's input is multiplied by c_in.
        skipped: Whether the direct path is multiplied by c_skip.

    Returns:
        Denoised images, (batch, channels, height, width).
    """
    c_skip, c_out, c_in, _ = edm_preconditioning(sigma, sigma_data)
    raw = network(axes(c_in) * x if scaled else x, noise_input(sigma))
    return (axes(c_skip) * x if skipped else x) + axes(c_out) * raw


def _images() -> Sequence[tuple]:
    """Eight images of 8 x 8 pixels: here a sigma with too few axes raises no error."""

    def network(x: Tensor, c_noise: Tensor) -> Tensor:
        return torch.tanh(x) + c_noise.reshape(-1, 1, 1, 1)

    sigma = torch.tensor([0.002, 0.01, 0.1, 0.3, 1.0, 3.0, 20.0, 80.0])
    x = torch.randn(8, 1, 8, 8) * (1 + sigma[:, None, None, None])
    return [(network, x, sigma, 0.5)]


def heun_step(denoiser: Denoiser, x: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """One of Heun's steps, Euler's where it ends at noise level 0: the answer to 2.3."""
    first = _slope(denoiser, x, sigma)
    predicted = x + (sigma_next - sigma) * first
    if sigma_next == 0:
        return predicted
    second = _slope(denoiser, predicted, sigma_next)
    return x + (sigma_next - sigma) * (first + second) / 2


def _slope(denoiser: Denoiser, x: Tensor, sigma: float, divide_by: float | None = None) -> Tensor:
    denoised = denoiser(x, torch.full((len(x),), sigma, dtype=x.dtype))
    return (x - denoised) / (sigma if divide_by is None else divide_by)


def _two_slopes(
    combine: Callable[[Tensor, Tensor], Tensor],
    moved: float = 1.0,
    old_level: bool = False,
    guarded: bool = True,
) -> Callable[..., Tensor]:
    """A wrong answer to 2.3: Heun's step with another combination or another second slope."""

    def answer(denoiser: Denoiser, x: Tensor, sigma: float, sigma_next: float) -> Tensor:
        first = _slope(denoiser, x, sigma)
        predicted = x + (sigma_next - sigma) * first
        if guarded and sigma_next == 0:
            return predicted
        at = x + moved * (predicted - x)
        second = _slope(denoiser, at, sigma_next, sigma if old_level else None)
        return x + (sigma_next - sigma) * combine(first, second)

    return answer


def _uphill(denoiser: Denoiser, x: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """A wrong answer to 2.3: the change of the noise level with the wrong sign, throughout."""
    first = _slope(denoiser, x, sigma)
    predicted = x + (sigma - sigma_next) * first
    if sigma_next == 0:
        return predicted
    return x + (sigma - sigma_next) * (first + _slope(denoiser, predicted, sigma_next)) / 2


def _mean(first: Tensor, second: Tensor) -> Tensor:
    return (first + second) / 2


def _steps() -> Sequence[tuple]:
    """A step between two levels, and one that ends at 0."""
    x = 2 * torch.randn(5, 2, dtype=torch.float64)
    return [(two_modes(), x, 2.0, 1.0), (two_modes(), x, 0.4, 0.0)]


def gaussian_path(x: Tensor, sigma_start: float, sigma_end: float, std: float) -> Tensor:
    """Where the probability-flow ODE of a centred Gaussian takes x: the answer to 2.4."""
    return x * math.sqrt((std**2 + sigma_end**2) / (std**2 + sigma_start**2))


def measured_order(steps: Tensor, errors: Tensor) -> Tensor:
    """Order of convergence, from errors at several numbers of steps: the answer to 2.5."""
    return -_fitted_slope(steps.log(), errors.log())


def _fitted_slope(x: Tensor, y: Tensor) -> Tensor:
    """Slope of the straight line nearest to the points in the mean square."""
    x = x - x.mean()
    return (x * (y - y.mean())).sum() / (x**2).sum()


def _errors() -> Sequence[tuple]:
    """Errors of orders 1 and 2 at numbers of steps that do not double."""
    steps = torch.tensor([10.0, 30.0, 90.0], dtype=torch.float64)
    return [(steps, 3 / steps), (steps, 0.5 / steps**2)]


EXERCISES = [
    Exercise(
        "2.1",
        "factors of the preconditioning",
        truth=factors,
        mistakes={
            "c_skip is the wrong way round: with no noise (sigma = 0) the input is the answer, "
            "so c_skip must be 1 there": _other_factors(
                c_skip=lambda s, sd: s**2 / (s**2 + sd**2),
            ),
            "c_skip is a ratio of variances: square both sigma_data and sigma": _other_factors(
                c_skip=lambda s, sd: sd / (s + sd),
            ),
            "c_out is a standard deviation: a square root is missing in its denominator": (
                _other_factors(c_out=lambda s, sd: s * sd / (s**2 + sd**2))
            ),
            "c_out and c_in are standard deviations: the square roots are missing": _other_factors(
                c_out=lambda s, sd: s * sd / (s**2 + sd**2), c_in=lambda s, sd: 1 / (s**2 + sd**2)
            ),
            "c_out is squared: what you return is the variance of the target before scaling": (
                _other_factors(c_out=lambda s, sd: (s * sd) ** 2 / (s**2 + sd**2))
            ),
            "c_out must shrink with sigma at low noise; sqrt(sigma^2 + sigma_data^2) is the "
            "standard deviation of the noisy input": _other_factors(
                c_out=lambda s, sd: (s**2 + sd**2).sqrt(),
            ),
            "c_in is a scale, so it is one over a standard deviation, not over a variance": (
                _other_factors(c_in=lambda s, sd: 1 / (s**2 + sd**2))
            ),
            "variances of independent terms add, standard deviations do not: "
            "c_in is 1 / sqrt(sigma^2 + sigma_data^2)": _other_factors(
                c_in=lambda s, sd: 1 / (s + sd),
            ),
            "c_in leaves out the spread of the data: at low noise the input is not small": (
                _other_factors(c_in=lambda s, sd: 1 / s)
            ),
        },
        inputs=lambda: [
            (torch.tensor([0.002, 0.1, 0.5, 2.0, 80.0]), 0.5),
            (torch.tensor([0.3, 3.0]), 1.4),
        ],
    ),
    Exercise(
        "2.2",
        "denoiser for images",
        truth=denoise,
        mistakes={
            "the network is told c_noise = ln(sigma) / 4, not sigma itself": (
                lambda F, x, s, sd: _denoise(
                    F, x, s, sd, lambda c: c[:, None, None, None], noise_input=lambda s: s
                )
            ),
            "the network is told ln(sigma) / 4: the quarter is missing": (
                lambda F, x, s, sd: _denoise(
                    F, x, s, sd, lambda c: c[:, None, None, None], noise_input=torch.log
                )
            ),
            "a factor of shape (batch, 1) meets images at their last two axes: here each row of "
            "pixels got the factor of another image. Use c[:, None, None, None]": (
                lambda F, x, s, sd: _denoise(F, x, s, sd, lambda c: c[:, None])
            ),
            "a factor of shape (batch,) meets images at their last axis: here each column of "
            "pixels got the factor of another image. Use c[:, None, None, None]": (
                lambda F, x, s, sd: _denoise(F, x, s, sd, lambda c: c)
            ),
            "the network's input is not scaled by c_in": (
                lambda F, x, s, sd: _denoise(
                    F, x, s, sd, lambda c: c[:, None, None, None], scaled=False
                )
            ),
            "the direct path is c_skip * x, not x": (
                lambda F, x, s, sd: _denoise(
                    F, x, s, sd, lambda c: c[:, None, None, None], skipped=False
                )
            ),
        },
        inputs=_images,
    ),
    Exercise(
        "2.3",
        "Heun's step",
        truth=heun_step,
        mistakes={
            "this is Euler's step: the slope at its end is not used": _two_slopes(
                lambda first, second: first
            ),
            "only the slope at the end is used; take the mean of both": _two_slopes(
                lambda first, second: second
            ),
            "the slopes are added; take their mean": _two_slopes(
                lambda first, second: first + second
            ),
            "the second slope is taken at the old x: take it where Euler's step arrives": (
                _two_slopes(_mean, moved=0.0)
            ),
            "the second slope is divided by the old noise level; everything in it belongs to "
            "sigma_next": _two_slopes(_mean, old_level=True),
            "the step goes uphill: from sigma to sigma_next the change is sigma_next - sigma": (
                _uphill
            ),
            "the real step starts at x, not where Euler's step arrives": _two_slopes(
                lambda first, second: first + (first + second) / 2
            ),
            "at sigma_next = 0 the second slope is 0/0: there, stop at Euler's step": _two_slopes(
                _mean, guarded=False
            ),
        },
        inputs=_steps,
    ),
    Exercise(
        "2.4",
        "path of a Gaussian",
        truth=gaussian_path,
        mistakes={
            "the variances have this ratio; x scales like a standard deviation, its root": (
                lambda x, start, end, std: x * (std**2 + end**2) / (std**2 + start**2)
            ),
            "upside down: towards less noise the points move together": (
                lambda x, start, end, std: x * math.sqrt((std**2 + start**2) / (std**2 + end**2))
            ),
            "this is the path of a single data point at 0; the data have a spread of their own": (
                lambda x, start, end, std: x * end / start
            ),
            "variances add, standard deviations do not: std**2 + sigma**2 under the root": (
                lambda x, start, end, std: x * (std + end) / (std + start)
            ),
            "this is the denoised point at sigma_start, one Euler step to 0; follow the path": (
                lambda x, start, end, std: x * std**2 / (std**2 + start**2)
            ),
        },
        inputs=lambda: [
            (torch.linspace(-3, 3, 6, dtype=torch.float64), 5.0, 0.4, 1.5),
            (torch.linspace(-3, 3, 6, dtype=torch.float64), 0.1, 2.0, 0.5),
        ],
    ),
    Exercise(
        "2.5",
        "order of convergence",
        truth=measured_order,
        mistakes={
            "the sign: errors fall as the steps grow, and the order is a positive number": (
                lambda steps, errors: -measured_order(steps, errors)
            ),
            "log2 of the ratio of two errors is the order only where the steps double": (
                lambda steps, errors: (errors[:-1] / errors[1:]).log2().mean()
            ),
            "the errors' logarithms, but not those of the steps: a power law is straight only "
            "where both axes are logarithmic": (
                lambda steps, errors: -_fitted_slope(steps, errors.log())
            ),
            "a straight line through the errors themselves says nothing about a power law; "
            "take logarithms of both": lambda steps, errors: -_fitted_slope(steps, errors),
            "steps over errors: the roles of the axes are swapped": (
                lambda steps, errors: -_fitted_slope(errors.log(), steps.log())
            ),
        },
        inputs=_errors,
    ),
]

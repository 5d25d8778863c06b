"""Denoisers: EDM preconditioning, one quantity into another, and the denoising loss.

A denoiser answers ``denoised = D(x, sigma, label=None)``: its best guess, in the mean square,
of the clean sample behind a noisy one. Everything else in the book is built on that answer.
"""

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dmd_tutorial.checks import Condition, PerSample, Samples, check_finite, check_sigma, expand
from dmd_tutorial.noise import SIGMA_MAX, SIGMA_MIN, add_noise

SIGMA_DATA = 0.5  # standard deviation of images in [-1, 1]; EDM's


class Denoiser(Protocol):
    """Anything that answers ``D(x, sigma, label)``: a mixture, an MLP, a U-Net, a checkpoint.

    What it, or a network inside, may say of itself by attributes, see `says`:

        size, channels   of its images, in pixels; needed by the command line
        classes          how many it knows, 0 for none
        sigma_range      the levels it was trained on, lowest and highest; EDM's without it
        sigma_data       the standard deviation of its data, 0.5 without it
        precision        the type its inside computes in, where that can be chosen
        feature_layers() layers that a discriminator can read, first to last, with their channels
    """

    def __call__(self, x: Samples, sigma: PerSample, label: Condition | None = None) -> Samples:
        """Estimate the clean samples behind noisy ones."""
        ...


class Preconditioning(NamedTuple):
    """The four factors of ``D = c_skip x + c_out F(c_in x, c_noise)``."""

    c_skip: PerSample
    c_out: PerSample
    c_in: PerSample
    c_noise: PerSample


def exact(*tensors: Tensor) -> list[Tensor]:
    """In float32 at least: float16 does not hold the squares of low and high noise levels."""
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def edm_preconditioning(sigma: PerSample, sigma_data: float = SIGMA_DATA) -> Preconditioning:
    """The factors that keep a network's input and target at unit variance at every noise level.

    sigma_data is the standard deviation of the data. Source: Karras et al. 2022 (EDM), Table 1.
    """
    total = sigma**2 + sigma_data**2
    return Preconditioning(
        c_skip=sigma_data**2 / total,
        c_out=sigma * sigma_data / total.sqrt(),
        c_in=1 / total.sqrt(),
        c_noise=sigma.log() / 4,
    )


def inside(x: Tensor, precision: torch.dtype | None) -> torch.autocast:
    """Where a network computes on x: in a precision, None for that of an autocast around it.

    Cast weights are not kept: torch would keep them, as they were, over an optimiser's step.
    """
    device = x.device.type
    enabled = precision is not None or torch.is_autocast_enabled(device)
    dtype = precision or torch.get_autocast_dtype(device)
    return torch.autocast(device, dtype, enabled, cache_enabled=False)


def arithmetic(network: nn.Module, x: Tensor) -> torch.dtype:
    """The type of what is computed around a network: its weights', float32 or float64."""
    weights = next(network.parameters(), x)
    return torch.float64 if weights.dtype == torch.float64 else torch.float32


class EDMDenoiser(nn.Module):
    """A raw network F as a denoiser, ``D = c_skip x + c_out F(c_in x, c_noise)`` (EDM, Eq. 7).

    F is called as ``network(c_in * x, c_noise, label)``; it checks x and label, and its attribute
    `classes` says how many classes it knows, 0 or none for an unconditional one.
    """

    precision: torch.dtype | None = None  # of the network's inside: see `inside`

    def __init__(self, network: nn.Module, sigma_data: float = SIGMA_DATA) -> None:
        super().__init__()
        self.network = network
        self.sigma_data = sigma_data
        self.classes = int(getattr(network, "classes", 0))

    def forward(self, x: Samples, sigma: PerSample, label: Condition | None = None) -> Samples:
        """Denoise, for levels above 0; the type of x comes back.

        The arithmetic is that of the weights, float32 or float64, whatever the type of x. With
        `precision`, or an autocast around it, the network inside computes in that, and only it.
        """
        check_sigma(x, sigma, above_zero=True)
        check_finite(x=x)
        own = x.to(arithmetic(self.network, x))
        c_skip, c_out, c_in, c_noise = edm_preconditioning(sigma.to(own), self.sigma_data)
        with inside(x, self.precision):
            raw = self.network(expand(c_in, x) * own, c_noise, label)
        return (expand(c_skip, x) * own + expand(c_out, x) * raw.to(own)).to(x.dtype)


def zero_score(x: Samples, sigma: PerSample, label: Condition | None = None) -> Samples:
    """The denoiser of a flat density: it answers x itself, so its score is 0 everywhere."""
    return x


def score_from_denoised(x: Samples, denoised: Samples, sigma: PerSample) -> Samples:
    """Tweedie's formula read backwards, for levels above 0 (Efron 2011; DMD, Eq. 4: alpha = 1)."""
    check_sigma(x, sigma, above_zero=True, denoised=denoised)
    return (denoised - x) / expand(sigma, x) ** 2  # in one over the units of x


def denoised_from_score(x: Samples, score: Samples, sigma: PerSample) -> Samples:
    """Tweedie's formula: ``denoised = x + sigma^2 score`` (Efron 2011)."""
    check_sigma(x, sigma, score=score)
    return x + expand(sigma, x) ** 2 * score


def noise_from_denoised(x: Samples, denoised: Samples, sigma: PerSample) -> Samples:
    """``(x - denoised) / sigma``, for levels above 0; dx/dsigma on the probability-flow ODE."""
    check_sigma(x, sigma, above_zero=True, denoised=denoised)
    return (x - denoised) / expand(sigma, x)


def denoised_from_noise(x: Samples, noise: Samples, sigma: PerSample) -> Samples:
    """The denoised estimate that a noise estimate implies: ``x - sigma noise``."""
    check_sigma(x, sigma, noise=noise)
    return x - expand(sigma, x) * noise


def v_from_denoised(x: Samples, denoised: Samples, sigma: PerSample) -> Samples:
    """``v = alpha noise - s clean`` (Salimans and Ho 2022, appendix D), for levels above 0.

    With ``alpha = 1 / sqrt(1 + sigma^2)``, ``s = alpha sigma``, alpha x is variance-preserving.
    """
    noise = noise_from_denoised(x, denoised, sigma)
    level = expand(sigma, x)
    return (noise - level * denoised) / (1 + level**2).sqrt()


def denoised_from_v(
    x: Samples, v: Samples, sigma: PerSample, alpha: PerSample | None = None
) -> Samples:
    """The inverse of `v_from_denoised`: ``(x - sigma / alpha v) / (1 + sigma^2)``.

    Without alpha the schedule is variance-preserving, 1 / alpha is ``sqrt(1 + sigma^2)``.
    """
    check_sigma(x, sigma, v=v)
    level = expand(sigma, x)
    factor = level * (1 + level**2).sqrt() if alpha is None else level / expand(alpha, x)
    return (x - factor * v) / (1 + level**2)


def denoising_weight(sigma: PerSample, sigma_data: float = SIGMA_DATA) -> PerSample:
    """EDM's ``1 / c_out^2`` (Table 1): an untrained network's loss is about 1 at every level."""
    return 1 / sigma**2 + 1 / sigma_data**2


def denoising_loss(
    denoiser: Denoiser, x: Samples, sigma: PerSample, noise: Samples,
    label: Condition | None = None, weight: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, ""]:  # fmt: skip
    """Denoising score matching: a denoiser's mean square error, weighted by level, above 0.

    Without a weight it is `denoising_weight` for the denoiser's own `sigma_data`, 0.5 if it has
    none. Source: Vincent 2011; Karras et al. 2022 (EDM), Eq. 2 and 108.
    """
    check_sigma(x, sigma, above_zero=True, noise=noise)
    check_finite(x=x)
    if weight is None:
        weight = partial(denoising_weight, sigma_data=says(denoiser, "sigma_data", SIGMA_DATA))
    denoised = denoiser(add_noise(x, sigma, noise), sigma, label)
    answer, clean, level = exact(denoised, x, sigma)
    return (expand(weight(level), x) * (answer - clean) ** 2).mean()


def says(model: Any, name: str, default: Any = None) -> Any:
    """What a model, or else what it wraps (a generator's denoiser, its network), says of itself."""
    inner = model
    while inner is not None:
        if hasattr(inner, name):
            return getattr(inner, name)
        inner = getattr(inner, "denoiser", getattr(inner, "network", None))
    return default


def sigma_range(model: Any) -> tuple[float, float]:
    """The lowest and the highest level that a denoiser was trained on, in the units of x."""
    low, high = says(model, "sigma_range", (SIGMA_MIN, SIGMA_MAX))
    return float(low), float(high)


def image_shape(model: Any) -> tuple[tuple[int, int, int], int]:
    """The shape of a model's images, and its number of classes, 0 for none."""
    size, channels = says(model, "size"), says(model, "channels")
    if size is None or channels is None:
        name = type(model).__name__
        raise ValueError(f"{name} does not say what images it makes: it needs size and channels")
    return (channels, size, size), says(model, "classes", 0)


def feature_layers(model: Any) -> list[tuple[nn.Module, int]]:
    """Layers that a discriminator can read, first to last, and how many channels each answers."""
    layers = says(model, "feature_layers")
    if layers is None:
        name = type(getattr(model, "network", model)).__name__
        raise ValueError(f"{name} has no method feature_layers: see Denoiser")
    return layers()


def device_of(model: nn.Module) -> torch.device:
    """Where a model is; one without numbers of its own is on the CPU."""
    return next(chain(model.parameters(), model.buffers()), torch.empty(0)).device

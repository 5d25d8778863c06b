"""Denoisers: EDM preconditioning, one quantity into another, and the denoising loss.

A denoiser answers ``denoised = D(x, sigma, label=None)``: its best guess, in the mean square,
of the clean sample behind a noisy one. Everything else in the book is built on that answer.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dmd_tutorial.checks import check_finite, check_label, check_same_shape, check_sigma, expand
from dmd_tutorial.noise import SIGMA_MAX, add_noise

SIGMA_DATA = 0.5


class Denoiser(Protocol):
    """Anything that answers ``D(x, sigma, label)``: a mixture, an MLP, a U-Net, a checkpoint."""

    def __call__(
        self,
        x: Float[Tensor, "batch *shape"],
        sigma: Float[Tensor, " batch"],
        label: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch *shape"]:
        """Estimate the clean samples behind noisy ones."""
        ...


class Preconditioning(NamedTuple):
    """The four factors of ``D = c_skip x + c_out F(c_in x, c_noise)``, (batch,) each."""

    c_skip: Float[Tensor, " batch"]
    c_out: Float[Tensor, " batch"]
    c_in: Float[Tensor, " batch"]
    c_noise: Float[Tensor, " batch"]


def edm_preconditioning(
    sigma: Float[Tensor, " batch"], sigma_data: float = SIGMA_DATA
) -> Preconditioning:
    """The factors that keep a network's input and target at unit variance at every noise level.

    Args:
        sigma: Noise levels, (batch,), in the units of x, above 0.
        sigma_data: Standard deviation of the data, in the same units.

    Returns:
        c_skip, c_out, c_in and ``c_noise = ln(sigma) / 4``, (batch,) each.

    Source: Karras et al. 2022 (EDM), Eq. 7 and Table 1.
    """
    total = sigma**2 + sigma_data**2
    return Preconditioning(
        c_skip=sigma_data**2 / total,
        c_out=sigma * sigma_data / total.sqrt(),
        c_in=1 / total.sqrt(),
        c_noise=sigma.log() / 4,
    )


class EDMDenoiser(nn.Module):
    """A raw network F under EDM preconditioning: ``D = c_skip x + c_out F(c_in x, c_noise)``.

    Args:
        network: F, called as ``network(c_in * x, c_noise, label)``. Its attribute `classes`
            says how many classes it knows, 0 for none.
        sigma_data: Standard deviation of the data, in the units of x.

    Source: Karras et al. 2022 (EDM), Eq. 7.
    """

    precision: torch.dtype | None = None  # of the network's inside: float16, bfloat16; None: x's

    def __init__(self, network: nn.Module, sigma_data: float = SIGMA_DATA) -> None:
        super().__init__()
        self.network = network
        self.sigma_data = sigma_data
        self.classes = int(getattr(network, "classes", 0))

    def forward(
        self,
        x: Float[Tensor, "batch *shape"],
        sigma: Float[Tensor, " batch"],
        label: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch *shape"]:
        """Denoise.

        Args:
            x: Noisy samples, (batch, *shape).
            sigma: Noise level of each, (batch,), in the units of x, above 0.
            label: Class of each, (batch,), or None.

        Returns:
            Denoised samples, (batch, *shape), in the type of x.

        Raises:
            ValueError: If shapes do not fit, sigma is 0, or an input is not finite.
        """
        check_sigma(x, sigma)
        check_label(x, label, self.classes)
        check_finite(x=x)
        if (sigma == 0).any():
            raise ValueError("sigma is 0 somewhere: a clean sample needs no denoiser (ln 0)")
        c_skip, c_out, c_in, c_noise = edm_preconditioning(sigma.to(x.dtype), self.sigma_data)
        with torch.autocast(x.device.type, self.precision, enabled=self.precision is not None):
            raw = self.network(expand(c_in, x) * x, c_noise, label)
        # low precision inside the network, full precision outside it
        return expand(c_skip, x) * x + expand(c_out, x) * raw.to(x.dtype)


class OneStepGenerator(nn.Module):
    """A denoiser used once: ``G(z) = D(sigma_max z, sigma_max)``. The student of the book.

    At sigma_max a noisy sample holds almost nothing of the clean one, so a denoiser's single
    answer there is close to the mean of the data. Distillation makes it a sample instead.

    Args:
        denoiser: The network, usually a copy of the teacher.
        sigma_max: The noise level at which it is held, in the units of x. It must be the level
            from which the teacher's pairs start.

    Source: Yin et al. 2024 (DMD), Section 3.1.
    """

    def __init__(self, denoiser: nn.Module, sigma_max: float = SIGMA_MAX) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.sigma_max = sigma_max

    def forward(
        self, z: Float[Tensor, "batch *shape"], label: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch *shape"]:
        """Generate samples.

        Args:
            z: Standard normal noise, (batch, *shape).
            label: Class of each sample, (batch,), or None.

        Returns:
            Samples, (batch, *shape), not clamped.
        """
        sigma = torch.full((len(z),), self.sigma_max, dtype=z.dtype, device=z.device)
        return self.denoiser(self.sigma_max * z, sigma, label)


def zero_score(
    x: Float[Tensor, "batch *shape"],
    sigma: Float[Tensor, " batch"],
    label: Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, "batch *shape"]:
    """The denoiser of a flat density: it answers x itself, so its score is 0 everywhere.

    Args:
        x: Noisy samples, (batch, *shape).
        sigma: Noise levels, (batch,), not used.
        label: Classes, (batch,), not used.

    Returns:
        x.
    """
    return x


def score_from_denoised(
    x: Float[Tensor, "batch *shape"],
    denoised: Float[Tensor, "batch *shape"],
    sigma: Float[Tensor, " batch"],
) -> Float[Tensor, "batch *shape"]:
    """Tweedie's formula read backwards: ``score = (denoised - x) / sigma^2``.

    Args:
        x: Noisy samples, (batch, *shape).
        denoised: Their denoised estimates, (batch, *shape).
        sigma: Noise levels, (batch,), above 0.

    Returns:
        Scores of the noisy density, (batch, *shape), in one over the units of x.

    Raises:
        ValueError: If shapes do not fit.

    Source: Efron 2011; Yin et al. 2024 (DMD), Eq. 4 with alpha = 1.
    """
    check_same_shape(x=x, denoised=denoised)
    check_sigma(x, sigma)
    return (denoised - x) / expand(sigma, x) ** 2


def denoised_from_score(
    x: Float[Tensor, "batch *shape"],
    score: Float[Tensor, "batch *shape"],
    sigma: Float[Tensor, " batch"],
) -> Float[Tensor, "batch *shape"]:
    """Tweedie's formula: ``denoised = x + sigma^2 score``.

    Args:
        x: Noisy samples, (batch, *shape).
        score: Scores of the noisy density there, (batch, *shape).
        sigma: Noise levels, (batch,).

    Returns:
        Denoised estimates, (batch, *shape).

    Raises:
        ValueError: If shapes do not fit.

    Source: Efron 2011.
    """
    check_same_shape(x=x, score=score)
    check_sigma(x, sigma)
    return x + expand(sigma, x) ** 2 * score


def noise_from_denoised(
    x: Float[Tensor, "batch *shape"],
    denoised: Float[Tensor, "batch *shape"],
    sigma: Float[Tensor, " batch"],
) -> Float[Tensor, "batch *shape"]:
    """The noise that a denoised estimate implies: ``(x - denoised) / sigma``.

    Args:
        x: Noisy samples, (batch, *shape).
        denoised: Their denoised estimates, (batch, *shape).
        sigma: Noise levels, (batch,), above 0.

    Returns:
        Estimated standard normal noise, (batch, *shape). It is also dx/dsigma along the
        probability-flow ODE.

    Raises:
        ValueError: If shapes do not fit.
    """
    check_same_shape(x=x, denoised=denoised)
    check_sigma(x, sigma)
    return (x - denoised) / expand(sigma, x)


def denoised_from_noise(
    x: Float[Tensor, "batch *shape"],
    noise: Float[Tensor, "batch *shape"],
    sigma: Float[Tensor, " batch"],
) -> Float[Tensor, "batch *shape"]:
    """The denoised estimate that a noise estimate implies: ``x - sigma noise``.

    Args:
        x: Noisy samples, (batch, *shape).
        noise: Estimated standard normal noise, (batch, *shape).
        sigma: Noise levels, (batch,).

    Returns:
        Denoised estimates, (batch, *shape).

    Raises:
        ValueError: If shapes do not fit.
    """
    check_same_shape(x=x, noise=noise)
    check_sigma(x, sigma)
    return x - expand(sigma, x) * noise


def v_from_denoised(
    x: Float[Tensor, "batch *shape"],
    denoised: Float[Tensor, "batch *shape"],
    sigma: Float[Tensor, " batch"],
) -> Float[Tensor, "batch *shape"]:
    """The v of Salimans and Ho for a variance-exploding sample.

    With ``alpha = 1 / sqrt(1 + sigma^2)`` the sample ``alpha x`` is variance-preserving with noise
    level ``s = alpha sigma``, and ``v = alpha noise - s clean``.

    Args:
        x: Noisy samples, (batch, *shape), variance-exploding.
        denoised: Their denoised estimates, (batch, *shape).
        sigma: Noise levels, (batch,), above 0.

    Returns:
        v, (batch, *shape).

    Raises:
        ValueError: If shapes do not fit.

    Source: Salimans and Ho 2022, Section 4 and appendix D.
    """
    noise = noise_from_denoised(x, denoised, sigma)
    level = expand(sigma, x)
    return (noise - level * denoised) / (1 + level**2).sqrt()


def denoised_from_v(
    x: Float[Tensor, "batch *shape"],
    v: Float[Tensor, "batch *shape"],
    sigma: Float[Tensor, " batch"],
) -> Float[Tensor, "batch *shape"]:
    """The inverse of `v_from_denoised`: ``(x - sigma sqrt(1 + sigma^2) v) / (1 + sigma^2)``.

    Args:
        x: Noisy samples, (batch, *shape), variance-exploding.
        v: v of Salimans and Ho, (batch, *shape).
        sigma: Noise levels, (batch,).

    Returns:
        Denoised estimates, (batch, *shape).

    Raises:
        ValueError: If shapes do not fit.

    Source: Salimans and Ho 2022, Section 4 and appendix D.
    """
    check_same_shape(x=x, v=v)
    check_sigma(x, sigma)
    level = expand(sigma, x)
    return (x - level * (1 + level**2).sqrt() * v) / (1 + level**2)


def denoising_weight(
    sigma: Float[Tensor, " batch"], sigma_data: float = SIGMA_DATA
) -> Float[Tensor, " batch"]:
    """EDM's weight of the denoising loss, ``1 / c_out^2 = 1 / sigma^2 + 1 / sigma_data^2``.

    It makes the loss of an untrained network about 1 at every noise level.

    Args:
        sigma: Noise levels, (batch,), above 0.
        sigma_data: Standard deviation of the data.

    Returns:
        Weights, (batch,), in one over the units of x squared.

    Source: Karras et al. 2022 (EDM), Table 1 (lambda).
    """
    return 1 / sigma**2 + 1 / sigma_data**2


def denoising_loss(
    denoiser: Denoiser,
    x: Float[Tensor, "batch *shape"],
    sigma: Float[Tensor, " batch"],
    noise: Float[Tensor, "batch *shape"],
    label: Int[Tensor, " batch"] | None = None,
    weight: Callable[[Tensor], Tensor] = denoising_weight,
) -> Float[Tensor, ""]:
    """Denoising score matching: the weighted mean square error of a denoiser.

    Args:
        denoiser: The network in training.
        x: Clean samples, (batch, *shape).
        sigma: Noise level of each, (batch,), above 0.
        noise: Standard normal noise, (batch, *shape).
        label: Class of each sample, (batch,), or None.
        weight: Weight of each noise level, (batch,) to (batch,).

    Returns:
        The mean over samples and values, a scalar.

    Raises:
        ValueError: If shapes do not fit or x is not finite.

    Source: Vincent 2011; Karras et al. 2022 (EDM), Eq. 2 and 108.
    """
    check_same_shape(x=x, noise=noise)
    check_finite(x=x)
    denoised = denoiser(add_noise(x, sigma, noise), sigma, label)
    return (expand(weight(sigma), x) * (denoised - x) ** 2).mean()


def image_shape(model: nn.Module) -> tuple[tuple[int, int, int], int]:
    """What a network makes: read from how it was constructed.

    Args:
        model: A `OneStepGenerator`, an `EDMDenoiser` or a published network.

    Returns:
        The shape of an image, (channels, height, width), and the number of classes, 0 for none.

    Raises:
        ValueError: If it is no network of images.
    """
    network = model.denoiser if isinstance(model, OneStepGenerator) else model
    network = network.network if isinstance(network, EDMDenoiser) else network
    config = getattr(network, "config", {})
    if "img_resolution" in config:
        size, channels = config["img_resolution"], config["img_channels"]
        return (channels, size, size), config.get("label_dim", 0)
    if "size" in config:
        return (config["channels"], config["size"], config["size"]), config["classes"]
    raise ValueError(f"{type(network).__name__} does not say what images it makes")

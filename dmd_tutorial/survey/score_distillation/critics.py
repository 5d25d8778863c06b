"""Critics: that of SDS, who is told the noise, and that of DMD2, who also tells data apart."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from dmd_tutorial.checks import expand
from dmd_tutorial.denoisers import Denoiser, EDMDenoiser
from dmd_tutorial.networks.mlp import MLP
from dmd_tutorial.networks.unet import UNet


def known_noise(noise: Float[Tensor, "batch *shape"]) -> Denoiser:
    """The critic of SDS: told the noise, it answers with the clean sample itself.

    It is the exact denoiser of a generator that makes one point only, for each sample anew.

    Args:
        noise: The noise that will be in the samples, (batch, *shape).

    Returns:
        A denoiser for those samples.
    """

    def denoiser(x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        return x - expand(sigma, x) * noise

    return denoiser


class Judge(nn.Module):
    """A critic with a second answer: a logit that says whether a noisy sample began as data.

    The head reads what the critic's network computes half-way, so both answers cost one pass.

    Args:
        critic: The critic, an EDM denoiser around this book's `UNet` or `MLP`.

    Raises:
        ValueError: If its network is of another kind.

    Source: Yin et al. 2024 (DMD2), Section 4.3.
    """

    def __init__(self, critic: EDMDenoiser) -> None:
        super().__init__()
        self.critic = critic
        network = critic.network
        if isinstance(network, MLP):  # its last hidden layer
            inner, width, copies = network.hidden[-1], network.out.weight.shape[1], network.copies
        elif isinstance(network, UNet):  # its lowest resolution
            inner, width, copies = network.attention, network.attention.out.out_channels, 1
        else:
            raise ValueError(f"a judge reads an MLP or a UNet, not {type(network).__name__}")
        inner.register_forward_hook(self._see)
        self._seen: Tensor | None = None
        self.weight = nn.Parameter(torch.zeros(copies, width, 1))  # undecided at first
        self.bias = nn.Parameter(torch.zeros(copies, 1, 1))

    def _see(self, module: nn.Module, inputs: tuple, answer: Tensor) -> None:
        self._seen = answer

    def forward(
        self,
        x: Float[Tensor, "batch *shape"],
        sigma: Float[Tensor, " batch"],
        label: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch *shape"]:
        """Denoise, as any critic does."""
        return self.critic(x, sigma, label)

    def logit(self) -> Float[Tensor, " batch"]:
        """Log-odds that the samples of the last call began as data, (batch,)."""
        if self._seen is None:
            raise ValueError("the logit belongs to samples: call the critic on them first")
        features = functional.silu(self._seen)
        if features.ndim == 4:  # (batch, channels, height, width)
            features = features.mean(dim=(2, 3))
        blocks = features.reshape(len(self.weight), -1, features.shape[-1])
        return torch.baddbmm(self.bias, blocks, self.weight).flatten()


def discrimination_loss(
    real: Float[Tensor, " batch"], fake: Float[Tensor, " batch"]
) -> Float[Tensor, ""]:
    """The head's loss: cross-entropy of telling noised data from noised samples.

    Args:
        real: Logits of data, (batch,).
        fake: Logits of generated samples, (batch,).

    Returns:
        A scalar; 2 log 2 for a head that cannot tell them apart.

    Source: Goodfellow et al. 2014; Yin et al. 2024 (DMD2), Eq. 4.
    """
    return functional.softplus(-real).mean() + functional.softplus(fake).mean()


def fooling_loss(fake: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
    """The generator's side, non-saturating: minus the log-probability of passing for data.

    Args:
        fake: Logits of generated samples, (batch,), with gradient history.

    Returns:
        A scalar.

    Source: Goodfellow et al. 2014, Section 3; Yin et al. 2024 (DMD2), Eq. 4.
    """
    return functional.softplus(-fake).mean()

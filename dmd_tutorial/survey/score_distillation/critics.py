"""Critics: that of SDS, who is told the noise, and that of DMD2, who also tells data apart."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from dmd_tutorial.checks import Condition
from dmd_tutorial.denoisers import Denoiser, EDMDenoiser, denoised_from_noise
from dmd_tutorial.networks import MLP, UNet


def known_noise(noise: Float[Tensor, "batch *shape"]) -> Denoiser:
    """The critic of SDS: told the noise in the samples, it answers with the clean samples."""

    def denoiser(x: Tensor, sigma: Tensor, label: Condition | None = None) -> Tensor:
        return denoised_from_noise(x, noise, sigma)

    return denoiser


class Judge(nn.Module):
    """A critic with a second answer: a logit that says whether a noisy sample began as data.

    The head reads what the critic's network, `UNet` or `MLP`, computes half-way (DMD2, 4.3).
    """

    def __init__(self, critic: EDMDenoiser) -> None:
        super().__init__()
        self.critic, self.sigma_data = critic, critic.sigma_data
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

    def forward(self, x: Tensor, sigma: Tensor, label: Condition | None = None) -> Tensor:
        """Denoise, as any critic does."""
        return self.critic(x, sigma, label)

    def logit(self) -> Float[Tensor, " batch"]:
        """Log-odds that the samples of the last call began as data."""
        if self._seen is None:
            raise ValueError("the logit belongs to samples: call the critic on them first")
        features = functional.silu(self._seen)
        if features.ndim == 4:  # (batch, channels, height, width)
            features = features.mean(dim=(2, 3))
        blocks = features.reshape(len(self.weight), -1, features.shape[-1])
        return torch.baddbmm(self.bias, blocks, self.weight).flatten()

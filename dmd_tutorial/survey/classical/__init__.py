"""Generators from before diffusion: VAE, normalising flow, GAN, energy-based model.

All four are multilayer perceptrons on flat points (`perceptron`): images are flattened before and
folded again after. Each is a loss, a pure function, and what it needs of a network.
"""

from dmd_tutorial.survey.classical.energy import contrastive_loss, energy_denoiser, walk
from dmd_tutorial.survey.classical.gan import discriminator_loss, gan_step, generator_loss
from dmd_tutorial.survey.classical.perceptron import Perceptron
from dmd_tutorial.survey.classical.realnvp import RealNVP, flow_log_prob
from dmd_tutorial.survey.classical.vae import VAE, Coded, elbo

__all__ = [
    "VAE", "Coded", "Perceptron", "RealNVP", "contrastive_loss", "discriminator_loss", "elbo",
    "energy_denoiser", "flow_log_prob", "gan_step", "generator_loss", "walk",
]  # fmt: skip

"""Generators from before diffusion, on flat points: VAE, normalising flow, GAN, energy model."""

from .energy import contrastive_loss, energy_denoiser, walk
from .gan import discriminator_loss, gan_step, generator_loss
from .perceptron import Perceptron
from .realnvp import RealNVP, flow_log_prob
from .vae import VAE, Coded, elbo

__all__ = [
    "VAE", "Coded", "Perceptron", "RealNVP", "contrastive_loss", "discriminator_loss", "elbo",
    "energy_denoiser", "flow_log_prob", "gan_step", "generator_loss", "walk",
]  # fmt: skip

"""Raw networks F(x, c_noise, label); `denoisers.EDMDenoiser` makes denoisers of them."""

from dmd_tutorial.networks.mlp import MLP
from dmd_tutorial.networks.unet import UNet

"""What trainings cost: operations are counted, minutes on a card are hoped for until measured."""

from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dmd_tutorial.denoisers import EDMDenoiser, image_shape


class Card(NamedTuple):
    """A graphics card: what its data sheet promises, and what may come of it."""

    peak: float  # TFLOP/s of dense matrix products in 16 bits, by the data sheet
    hoped: float  # the share of it that these small networks may reach; nobody has measured it


# Narrow networks spend much of their time on moving activations, the more so the faster the card.
CARDS = {"T4": Card(65, 0.11), "A100": Card(312, 0.20), "H100": Card(989, 0.12)}


def forward_flop(denoiser: EDMDenoiser) -> float:
    """Operations of one image's way through a denoiser; a backward pass costs twice as many."""
    shape, classes = image_shape(denoiser)
    label = torch.zeros(1, classes, device="meta") if classes else None
    x = torch.zeros(1, *shape, device="meta")
    return flop(denoiser.network, x, torch.zeros(1, device="meta"), label)


def flop(network: nn.Module, *inputs: torch.Tensor | None) -> float:
    """Operations of a call with inputs on "meta", which has shapes and no numbers."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.to("meta")(*inputs)
    return float(counter.get_total_flops())


def minutes(pflop: float, card: Card) -> float:
    """How long so many PFLOP (10^15 operations) take if the hoped share is reached."""
    return pflop * 1e3 / (card.peak * card.hoped) / 60

"""The network of all four: linear layers on flat points, images flattened before."""

import itertools

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from dmd_tutorial.checks import Condition, check_label
from dmd_tutorial.networks.mlp import Linears


class Perceptron(nn.Module):
    """Linear layers and SiLU; the class is a one-hot row, or zeros; `copies` are those of `MLP`."""

    def __init__(
        self, inputs: int, outputs: int, hidden: int = 128, layers: int = 3, classes: int = 0,
        copies: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.classes, self.copies = classes, copies
        widths = [inputs + classes, *[hidden] * layers, outputs]
        self.layers = nn.ModuleList(
            Linears(copies, before, after) for before, after in itertools.pairwise(widths)
        )
        for parameter in self.layers[-1].parameters():
            parameter.data *= 0.1  # answers start small

    def forward(
        self, x: Float[Tensor, "batch *shape"], label: Condition | None = None
    ) -> Float[Tensor, "batch outputs"]:
        """Map points, or images that are then flattened."""
        check_label(x, label, self.classes)
        x = x.flatten(1)
        if self.classes:
            one_hot = x.new_zeros(len(x), self.classes)
            if label is not None:
                one_hot[torch.arange(len(x)), label] = 1
            x = torch.cat([x, one_hot], dim=1)
        h = x.reshape(self.copies, -1, x.shape[1])
        for layer in self.layers[:-1]:
            h = functional.silu(layer(h))
        return self.layers[-1](h).reshape(len(x), -1)

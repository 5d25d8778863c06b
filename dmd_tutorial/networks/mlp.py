"""A multilayer perceptron for points in a few dimensions, and several of them side by side."""

import itertools
import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from dmd_tutorial.checks import Condition, PerSample, Samples, check_label


def noise_features(c_noise: PerSample, count: int) -> Float[Tensor, "batch count"]:
    """Waves from which a network tells levels apart: cosines, sines at wave numbers 1/4 to 8."""
    exponents = torch.linspace(-2, 3, count // 2, device=c_noise.device, dtype=c_noise.dtype)
    phase = c_noise[:, None] * (2 * math.pi * 2**exponents)
    return torch.cat([phase.cos(), phase.sin()], dim=1)


def one_hot(x: Samples, label: Condition | None, classes: int) -> Float[Tensor, "batch classes"]:
    """A row a sample: 1 at its class, zeros without one (or with `NO_CLASS`); the type of x."""
    check_label(x, label, classes)
    if label is None:
        return x.new_zeros(len(x), classes)
    return (label[:, None] == torch.arange(classes, device=label.device)).to(x)


class MLP(nn.Module):
    """A multilayer perceptron F(x, c_noise, label) for points; classes is 0 for none.

    With `copies` above 1 it is that many independent networks, trained side by side: the batch is
    cut into so many equal blocks, one for each. Ten seeds then cost little more than one.
    """

    def __init__(
        self, dim: int = 2, hidden: int = 128, layers: int = 3, classes: int = 0, copies: int = 1
    ) -> None:
        super().__init__()
        self.dim, self.classes, self.copies = dim, classes, copies
        self.features = 16
        widths = [dim + self.features + classes, *[hidden] * layers]
        self.hidden = nn.ModuleList(
            Linears(copies, before, after) for before, after in itertools.pairwise(widths)
        )
        self.out = Linears(copies, hidden, dim, zero=True)  # so that D starts as c_skip x

    def forward(
        self, x: Float[Tensor, "batch dim"], c_noise: PerSample, label: Condition | None = None
    ) -> Float[Tensor, "batch dim"]:
        """Map scaled noisy points to F; without a label (or `NO_CLASS`) the class input is zero."""
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"x has shape {tuple(x.shape)}, the network wants (batch, {self.dim})")
        if len(x) % self.copies:
            raise ValueError(f"x has batch {len(x)}, not a multiple of {self.copies} copies")
        told = one_hot(x, label, self.classes)
        inputs = torch.cat([x, noise_features(c_noise, self.features), told], dim=1)
        h = inputs.reshape(self.copies, -1, inputs.shape[1])  # (copies, block, features)
        for layer in self.hidden:
            h = functional.silu(layer(h))
        return self.out(h).reshape(x.shape)

    def feature_layers(self) -> list[tuple[nn.Module, int]]:
        return [(layer, layer.bias.shape[-1]) for layer in self.hidden]  # type: ignore[misc,index]


class Linears(nn.Module):
    """One linear layer for each copy: (copies, block, before) -> (copies, block, after)."""

    def __init__(self, copies: int, before: int, after: int, zero: bool = False) -> None:
        super().__init__()
        bound = 0.0 if zero else math.sqrt(6 / before)  # He's: signals keep their size
        self.weight = nn.Parameter(torch.empty(copies, before, after).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(copies, 1, after))

    def forward(self, h: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, h, self.weight)

"""Generators, the students: noise in, samples out, in one step or in a few."""

import itertools
from collections.abc import Iterator

import torch
from jaxtyping import Int
from torch import Generator, Tensor, nn

from dmd_tutorial.checks import Condition, Samples
from dmd_tutorial.denoisers import SIGMA_DATA, sigma_range
from dmd_tutorial.noise import noise_like


class OneStepGenerator(nn.Module):
    """A denoiser used once, ``G(z) = D(sigma_max z, sigma_max)``: the student (DMD, Section 3.1).

    At sigma_max a noisy sample holds almost nothing of the clean one, so a denoiser's single
    answer there is close to the mean of the data. Distillation makes it a sample instead.
    Without sigma_max it is the top of the denoiser's range, from which its pairs start, too.
    """

    def __init__(self, denoiser: nn.Module, sigma_max: float | None = None) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.sigma_max = sigma_range(denoiser)[1] if sigma_max is None else sigma_max

    def forward(self, z: Samples, label: Condition | None = None) -> Samples:
        """Make samples, not clamped, of standard normal noise."""
        sigma = torch.full((len(z),), self.sigma_max, dtype=z.dtype, device=z.device)
        return self.denoiser(self.sigma_max * z, sigma, label)


def few_step_levels(
    evaluations: int, sigma_max: float, sigma_data: float = SIGMA_DATA
) -> tuple[float, ...]:
    """Where a generator of 1, 2 or 4 steps works: sigma_max, then around the data's own width."""
    between: dict[int, tuple[float, ...]] = {1: (), 2: (1.6,), 4: (4.0, 1.6, 0.6)}
    return (sigma_max, *(sigma_data * ratio for ratio in between[evaluations]))


class FewStepGenerator(nn.Module):
    """A denoiser used several times, at falling levels, with fresh noise between (DMD2, 4.4, 4.5).

    In evaluation it runs to its end. In training it answers after one of its steps, drawn for each
    sample, and only that step is differentiated, from what the steps before it have made (backward
    simulation). One critic judges the answers of all steps, so it is their mixture that is matched:
    nearly that of the last one only where `last`, its probability, is high. Without `last` all are
    equally likely, as in the paper. `seed` is that of the fresh noise and the drawn steps.
    """

    def __init__(
        self, denoiser: nn.Module, levels: tuple[float, ...], seed: int = 0,
        last: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if any(low >= high for high, low in itertools.pairwise(levels)):
            raise ValueError(f"levels must fall from first to last, they are {levels}")
        self.denoiser, self.levels, self.last = denoiser, levels, last
        self.rng = Generator().manual_seed(seed)

    def get_extra_state(self) -> Tensor:
        """Where the random numbers are, so that a training's state is whole."""
        return self.rng.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Go on from there."""
        self.rng.set_state(state)

    def forward(self, z: Samples, label: Condition | None = None) -> Samples:
        """Make samples of standard normal noise, in training after a drawn step."""
        with torch.no_grad():
            inputs = torch.stack(list(self.inputs(z, label)))
        last = torch.full((len(z),), len(self.levels) - 1)
        step = self._draw_steps(len(z)) if self.training else last
        chosen = inputs[step, torch.arange(len(z))]
        return self.denoiser(chosen, torch.tensor(self.levels)[step].to(z), label)

    def _draw_steps(self, count: int) -> Int[Tensor, " count"]:
        steps = len(self.levels)
        if self.last is None or steps == 1:
            return torch.randint(steps, (count,), generator=self.rng)
        earlier = torch.randint(steps - 1, (count,), generator=self.rng)
        is_last = torch.rand(count, generator=self.rng) < self.last
        return torch.where(is_last, steps - 1, earlier)

    def inputs(self, z: Samples, label: Condition | None = None) -> Iterator[Samples]:
        """What each step starts from: noise, then the noised answer of the step before."""
        x_noisy = self.levels[0] * z
        yield x_noisy
        for level, level_next in itertools.pairwise(self.levels):
            x = self.denoiser(x_noisy, torch.full((len(z),), level).to(z), label)
            x_noisy = x + level_next * noise_like(z, self.rng)
            yield x_noisy

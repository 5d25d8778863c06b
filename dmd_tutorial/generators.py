"""Generators, the students: noise in, samples out, in one step or in a few."""

import itertools
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dmd_tutorial.checks import Condition, Samples
from dmd_tutorial.denoisers import SIGMA_DATA, says, sigma_range
from dmd_tutorial.noise import noise_of


class OneStepGenerator(nn.Module):
    """A denoiser used once, ``G(z) = D(sigma_max z, sigma_max)``: the student (DMD, Section 3.1).

    At sigma_max a noisy sample holds almost nothing of the clean one, so a denoiser's single
    answer there is close to the mean of the data. Distillation makes it a sample instead.
    Without sigma_max it is the top of the denoiser's range, from which its pairs start, too.
    """

    evaluations = 1  # how often the denoiser is used for a sample

    def __init__(self, denoiser: nn.Module, sigma_max: float | None = None) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.sigma_max = sigma_range(denoiser)[1] if sigma_max is None else sigma_max

    def forward(self, z: Samples, label: Condition | None = None) -> Samples:
        """Make samples, not clamped, of standard normal noise."""
        sigma = torch.full((len(z),), self.sigma_max, dtype=z.dtype, device=z.device)
        return self.denoiser(self.sigma_max * z, sigma, label)


class FewStepGenerator(OneStepGenerator):
    """A denoiser used several times, at falling levels, with fresh noise between (DMD2, 4.4, 4.5).

    In evaluation it runs to its end. In training it answers after one of its steps, another for
    each z, and only that step is differentiated, from what the steps before it have made (backward
    simulation). One critic judges the answers of all steps, so it is their mixture that is matched:
    nearly that of the last one only where `last`, its probability, is high. Without `last` all are
    equally likely, as in the paper. Step and fresh noise are z's own, see `noise_of`: nothing is
    drawn, a sample does not depend on its batch.
    """

    def __init__(
        self, denoiser: nn.Module, levels: tuple[float, ...], last: float | None = None
    ) -> None:
        super().__init__(denoiser, levels[0])
        if any(low >= high for high, low in itertools.pairwise(levels)):
            raise ValueError(f"levels must fall from first to last, they are {levels}")
        self.levels, self.evaluations = tuple(levels), len(levels)
        self.last = 1 / len(levels) if last is None else last

    def forward(self, z: Samples, label: Condition | None = None) -> Samples:
        """Make samples of standard normal noise, in training after one step of each."""
        with torch.no_grad():
            inputs = torch.stack(list(self.inputs(z, label)))
        step = self.steps(z) if self.training else torch.full((len(z),), self.evaluations - 1)
        chosen = inputs[step.to(z.device), torch.arange(len(z), device=z.device)]
        return self.denoiser(chosen, torch.tensor(self.levels)[step].to(z), label)

    def inputs(self, z: Samples, label: Condition | None = None) -> Iterator[Samples]:
        """What each step starts from: noise, then the noised answer of the step before."""
        x_noisy = self.levels[0] * z
        yield x_noisy
        levels = itertools.pairwise(self.levels)
        for (level, level_next), noise in zip(levels, self.fresh(z), strict=True):
            x = self.denoiser(x_noisy, torch.full((len(z),), level).to(z), label)
            x_noisy = x + level_next * noise
            yield x_noisy

    def steps(self, z: Samples) -> Int[Tensor, " batch"]:
        """After which step each sample is answered in training."""
        earlier = (1 - self.last) / max(1, self.evaluations - 1)
        border = earlier * torch.arange(1, self.evaluations)
        return torch.bucketize(noise_of(z, 0)[0], border, right=True)

    def fresh(self, z: Samples) -> Float[Tensor, "later batch *shape"]:
        """The noise before each step after the first."""
        return noise_of(z, self.evaluations - 1)[1]


def few_step_levels(
    evaluations: int, sigma_max: float, sigma_data: float = SIGMA_DATA
) -> tuple[float, ...]:
    """Where a generator of so many steps works: sigma_max, then around the data's own width.

    Ours: even in the logarithm from 4 widths through 1.6 to 0.6; for two steps 1.6 alone. DMD2
    (4.4) takes SDXL's times 999, 749, 499 and 249, whose levels are 14.6, 4.1, 1.6 and 0.7.
    """
    if evaluations < 1:
        raise ValueError(f"a generator takes at least 1 step, not {evaluations}")
    ratios, later = (4.0, 1.6, 0.6), evaluations - 1
    levels = [sigma_max]
    for number in range(later):
        place = 2 * number / (later - 1) if later > 1 else 1.0  # 0 to 2, among the ratios
        k = min(int(place), 1)
        levels.append(sigma_data * (ratios[k] ** (k + 1 - place) * ratios[k + 1] ** (place - k)))
    if later and levels[1] >= sigma_max:
        raise ValueError(
            f"the second step's level {levels[1]:g} is not below sigma_max, {sigma_max:g}"
        )
    return tuple(levels)


def with_steps(start: OneStepGenerator, evaluations: int, last: float) -> OneStepGenerator:
    """A student of so many steps around the denoiser of another; that one, if it takes as many."""
    if start.evaluations == evaluations:
        return start
    if evaluations == 1:
        return OneStepGenerator(start.denoiser, start.sigma_max)
    width = says(start.denoiser, "sigma_data", SIGMA_DATA)
    levels = few_step_levels(evaluations, start.sigma_max, width)
    return FewStepGenerator(start.denoiser, levels, last)

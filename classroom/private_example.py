"""Two exercises for chapter 3 that only the grader can check: a pattern for your own.

    python -m classroom.hand_out 3 -o hand-out --exercises-only --exercises FILE
    python -m classroom.grade submissions -o grades --exercises FILE

Keep your own file where no student can read it: the hand-out gets the text and the stub, and no
more.
"""

import math
from functools import partial

import torch
from torch import Tensor

from dmd_tutorial.notebook.exercises import Exercise


def reverse_kl(
    mean: Tensor, std: Tensor, mean_real: Tensor, std_real: Tensor, distance: int = 2,
    variance: int = 2, rest: float = 0.5,
) -> Tensor:  # fmt: skip
    """Return the right answer; the wrong ones differ from it in one place each."""
    spread = (std**variance + (mean - mean_real) ** distance) / (2 * std_real**variance)
    return torch.log(std_real / std) + spread - rest


EXERCISES = [
    Exercise("3.P1", "reverse divergence of two Gaussians", reverse_kl, {
        "this is the forward divergence: the generator's distribution comes first":
            lambda m, s, mean_real, std_real: reverse_kl(mean_real, std_real, m, s),
        "the distance of the means counts squared": partial(reverse_kl, distance=1),
        "variances stand in the fraction, not standard deviations": partial(reverse_kl, variance=1),
        "of two equal Gaussians the divergence is 0: one half is missing":
            partial(reverse_kl, rest=0),
    }, inputs=lambda: [(torch.randn(n), 0.1 + torch.rand(n), torch.randn(n), 0.1 + torch.rand(n))
                       for n in (7, 1)]),
    Exercise("3.P2", "divergence of N(0, 1) from N(2, 1), in nats", 2.0, {
        "the squared distance of the means is halved": 4.0,
        "the distance counts squared": 1.0,
        "this is in bits: a nat is a natural logarithm": 2 / math.log(2),
    }),
]  # fmt: skip

TASKS = {
    "3.P1": (
        "### Exercise 3.P1: The reverse divergence of two Gaussians\n\n"
        "*10 minutes, graded after it is handed in*\n\n"
        r"Write $D_{\mathrm{KL}}(\mathcal N(\text{mean}, \text{std}^2) \,\Vert\, "
        r"\mathcal N(\text{mean}_{\text{real}}, \text{std}_{\text{real}}^2))$ for tensors of means "
        "and standard deviations, element by element.",
        "def reverse_divergence(mean, std, mean_real, std_real):\n"
        "    return ...  # your code\n\n\n"
        'check("3.P1", reverse_divergence)',
    ),
    "3.P2": (
        "### Exercise 3.P2: A number\n\n*2 minutes, graded after it is handed in*\n\n"
        r"How large is it, in nats, for $\mathcal N(0, 1)$ and $\mathcal N(2, 1)$?",
        'nats = ...  # your number\n\ncheck("3.P2", nats)',
    ),
}

"""Why the digits teacher trains for 2,000 steps: its loss on digits that it has not seen.

    python benchmarks/teacher_overfitting.py

Trains on 1,437 of the 1,797 digits and watches the denoising loss of the averaged weights on the
other 360. Longer training lowers the loss on the digits it has seen and raises that on the
others: the teacher begins to remember digits instead of learning what digits are. About four
minutes on one core.
"""

from dataclasses import replace

import torch

from dmd_tutorial.data import Images, digits
from dmd_tutorial.denoisers import denoising_loss
from dmd_tutorial.noise import lognormal_sigma, noise_like
from dmd_tutorial.runs.presets import DIGITS
from dmd_tutorial.training import FitRun, train_teacher

SEEN = 1437


@torch.no_grad()
def loss(teacher: torch.nn.Module, images: Images) -> float:
    """Denoising loss, four noises per image, the same ones at every call."""
    x, label = images.x.repeat(4, 1, 1, 1), images.label.repeat(4)
    rng = torch.Generator().manual_seed(2)
    sigma = lognormal_sigma(len(x), rng=rng)
    return denoising_loss(teacher, x, sigma, noise_like(x, rng), label).item()


def main() -> None:
    """Train and print both losses."""
    torch.set_flush_denormal(True)
    everything = digits()
    order = torch.randperm(len(everything.x), generator=torch.Generator().manual_seed(0))
    seen, unseen = (
        Images(everything.x[part], everything.label[part], everything.classes)
        for part in (order[:SEEN], order[SEEN:])
    )
    sample_of_seen = Images(seen.x[: len(unseen.x)], seen.label[: len(unseen.x)], seen.classes)
    run = FitRun(DIGITS.new_teacher(), replace(DIGITS.teacher, steps=4_000))
    print("steps  loss on digits seen  on digits not seen")
    for metric in train_teacher(run, seen):
        if metric.step % 250 == 0:
            losses = loss(run.average, sample_of_seen), loss(run.average, unseen)
            print(f"{metric.step:5d}  {losses[0]:19.4f}  {losses[1]:18.4f}", flush=True)


if __name__ == "__main__":
    main()

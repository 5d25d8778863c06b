"""How long a teacher should train: its loss on images that it has not seen.

    python benchmarks/teacher_overfitting.py
    python benchmarks/teacher_overfitting.py --data my_images --size 32 --steps 3000

Trains on four fifths of the digits, or of your own images, and watches the denoising loss of the
averaged weights on the others. Longer training lowers the loss on the images it has seen and raises
that on the others: the teacher begins to remember images instead of learning what they are like.
About four minutes on one core for digits.
"""

import argparse
import math
from dataclasses import replace

import torch

from dmd_tutorial.data import Images
from dmd_tutorial.denoisers import denoising_loss
from dmd_tutorial.noise import lognormal_sigma, noise_like
from dmd_tutorial.runs.images import load_images
from dmd_tutorial.runs.presets import DIGITS, OWN_IMAGES
from dmd_tutorial.training import FitRun, train_teacher


@torch.no_grad()
def loss(teacher: torch.nn.Module, images: Images) -> float:
    """Denoising loss, four noises per image, the same ones at every call."""
    every = torch.arange(len(images.x)).repeat(4)
    x, label = images.take(every), images.label[every] if images.classes else None
    rng = torch.Generator().manual_seed(2)
    sigma = lognormal_sigma(len(x), rng=rng)
    return denoising_loss(teacher, x, sigma, noise_like(x, rng), label).item()


def main() -> None:
    """Train and print both losses."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="digits", help="images (%(default)s)")
    parser.add_argument("--size", type=int, default=32, help="of your own (%(default)s)")
    parser.add_argument("--steps", type=int, default=4_000, help="of training (%(default)s)")
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    size = None if options.data == "digits" else options.size
    everything = load_images(options.data, size)
    order = torch.randperm(len(everything.x), generator=torch.Generator().manual_seed(0))
    held_out = math.ceil(len(order) / 5)
    seen, unseen, sample_of_seen = (
        Images(everything.x[part], everything.label[part], everything.classes)
        for part in (order[:-held_out], order[-held_out:], order[:held_out])
    )
    preset = DIGITS if options.data == "digits" else OWN_IMAGES
    preset = replace(preset, shape=tuple(everything.x.shape[1:]), classes=everything.classes)
    run = FitRun(preset.new_teacher(), replace(preset.teacher, steps=options.steps))
    print("steps  loss on images seen  on images not seen")
    for metric in train_teacher(run, seen):
        if metric.step % 250 == 0:
            losses = loss(run.average, sample_of_seen), loss(run.average, unseen)
            print(f"{metric.step:5d}  {losses[0]:19.4f}  {losses[1]:18.4f}", flush=True)


if __name__ == "__main__":
    main()

"""The picture of the first page: many steps against one, with the book's own digits.

python benchmarks/landing_picture.py        # writes book/_static/landing.png
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch

from dmd_tutorial import pretrained
from dmd_tutorial.data import normal
from dmd_tutorial.noise import sampling_levels, stream
from dmd_tutorial.notebook import plots
from dmd_tutorial.samplers import heun

OUT = Path(__file__).parents[1] / "book" / "_static" / "landing.png"
SHOWN = (3, 6, 9, 11, 13, 15, 18)  # after which of the 18 steps
DIGIT, SEED = 5, 3


def main() -> None:
    """Draw both roads from the same noise."""
    plots.style()
    teacher, student = pretrained.load("digits-teacher"), pretrained.load("digits-student")
    z = normal(1, (1, 8, 8), stream("pictures", SEED))
    label = torch.tensor([DIGIT])
    states = {0: z}
    for step in heun(teacher, z, sampling_levels(18), label):
        # shown at the size of the data: a state of noise level sigma is about that much larger
        states[step.index + 1] = (step.x / max(1.0, step.sigma)).float()
    with torch.no_grad():
        once = student(z, label)

    columns = 1 + len(SHOWN)
    fig, axes = plt.subplots(2, columns, figsize=(8.4, 2.7))
    rows = ([states[0], *(states[k] for k in SHOWN)], [z, *[None] * (columns - 2), once])
    for row, images in zip(axes, rows, strict=True):
        for ax, image in zip(row, images, strict=True):
            ax.set_axis_off()
            if image is not None:
                ax.imshow(image[0, 0], cmap="gray", vmin=-1, vmax=1)
    axes[0, 0].set_title("noise", fontsize=10)
    for ax, k in zip(axes[0, 1:], SHOWN, strict=True):
        ax.set_title(f"step {k}", fontsize=10)
    fig.subplots_adjust(left=0.17, right=0.99, top=0.9, bottom=0.02, wspace=0.12, hspace=0.12)
    for row, text in enumerate(("teacher:\n35 evaluations", "student:\n1 evaluation")):
        fig.text(0.01, 0.68 - 0.45 * row, text, fontsize=11, va="center")
    first, last = axes[1, 0].get_position(), axes[1, -1].get_position()
    middle = (first.y0 + first.y1) / 2
    arrow = {"arrowstyle": "-|>", "lw": 2.5, "color": plots.ROLES["generator"]}
    plt.annotate(
        "", (last.x0 - 0.01, middle), (first.x1 + 0.01, middle),
        xycoords="figure fraction", textcoords="figure fraction", arrowprops=arrow,
    )  # fmt: skip
    fig.text(0.58, middle + 0.05, "one step", ha="center", fontsize=11)
    fig.savefig(OUT, dpi=160, facecolor="white")
    print(OUT)


if __name__ == "__main__":
    main()

"""Teachers trained in other terms, in one step: how much the level of the generator decides.

    python benchmarks/own_teachers.py --teacher noise --out book/results/own-teachers.json

A U-Net of `diffusers` that predicts DDPM's noise, and this book's U-Net on straight paths, both
trained here on digits. Each is distilled at several levels, at equal cost: `sigma_range` is all
that differs. What is in the file already is not repeated.
"""

import argparse
import copy
import itertools
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from dmd_tutorial import adapters, metrics, pretrained
from dmd_tutorial.anchor import Pairs, load_pairs
from dmd_tutorial.checks import expand
from dmd_tutorial.data import Images, digits
from dmd_tutorial.denoisers import image_shape
from dmd_tutorial.files import write_json
from dmd_tutorial.networks import UNet
from dmd_tutorial.runs import pipeline
from dmd_tutorial.runs.monitor import FIRST
from dmd_tutorial.runs.presets import ON_DIGITS
from dmd_tutorial.runs.provenance import provenance
from dmd_tutorial.training import (
    DistillationRun,
    DistillSettings,
    FitRun,
    FitSettings,
    distill,
    fit,
)

LEVELS = {"noise": (157.0, 10.0, 80.0, 20.0), "flow": (80.0, 10.0)}  # the first: a teacher's own
WARM_START = replace(
    ON_DIGITS, matching=False, steps=400, learning_rate=1e-3, warm_up=50, decay=0.9, ema=0.99
)
DISTILL = replace(
    ON_DIGITS, steps=60, learning_rate=2e-5, critic_learning_rate=3e-4, warm_up=20, ema=0.98
)
PAIRS, PAIR_STEPS = 1_000, 12


def noise_teacher() -> adapters.Adapted:
    """A small U-Net of diffusers, told one of the thousand steps of DDPM's schedule."""
    import diffusers

    network = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, num_class_embeds=10,
        block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return adapters.FromDiffusers(network, diffusers.DDPMScheduler())


def flow_teacher() -> adapters.Adapted:
    """This book's U-Net, told the time of a straight path from the data to noise."""
    return adapters.Adapted(UNet(width=16), adapters.flow(), "velocity")


TEACHERS = {"noise": noise_teacher, "flow": flow_teacher}


def draw(images: Images, batch: int, rng: Generator) -> tuple[Tensor, ...]:
    """Images with noise, a time from 0 to 1, and their classes."""
    index = torch.randint(len(images.x), (batch,), generator=rng)
    x = images.take(index)
    noise = torch.randn(x.shape, generator=rng)
    return x, torch.rand(batch, generator=rng), noise, images.label[index]


def noise_loss(teacher: nn.Module, x: Tensor, t: Tensor, noise: Tensor, label: Tensor) -> Tensor:
    """What DDPM trains on: the noise of a step, all steps and levels alike."""
    step = (1_000 * t).long()
    kept = SCHEDULE[step]
    x_t = expand(kept.sqrt(), x) * x + expand((1 - kept).sqrt(), x) * noise
    return functional.mse_loss(teacher.ask(x_t, step, label), noise)


def flow_loss(teacher: nn.Module, x: Tensor, t: Tensor, noise: Tensor, label: Tensor) -> Tensor:
    """What a flow is trained on: the velocity at a time of a straight path."""
    x_t = torch.lerp(x, noise, expand(t, x))
    return functional.mse_loss(teacher.ask(x_t, t, label), noise - x)


BETAS = torch.linspace(1e-4, 0.02, 1_000, dtype=torch.float64)
SCHEDULE = (1 - BETAS).cumprod(0).float()  # DDPM's alphas_cumprod
LOSSES = {"noise": noise_loss, "flow": flow_loss}


def trained(name: str, images: Images, folder: Path, steps: int) -> adapters.Adapted:
    """The teacher, from its file where there is one."""
    torch.manual_seed(0)
    teacher, path = TEACHERS[name](), folder / f"{name}.safetensors"
    if path.exists():
        return pretrained.load(path, teacher)
    run = FitRun(teacher, FitSettings(steps=steps, batch=64))
    started = time.monotonic()
    for metric in fit(run, lambda rng: draw(images, 64, rng), LOSSES[name]):
        if metric.step % 500 == 0:
            print(name, metric.step, round(metric.loss, 4), flush=True)
    seconds = round(time.monotonic() - started)
    pretrained.save_denoiser(path, run.average, steps=steps, seconds=seconds)
    return run.average.requires_grad_(False).eval()


def first_steps(teacher: nn.Module, pairs: Pairs, settings: DistillSettings) -> dict:
    """What the first iterations of a training that starts from the teacher look like, averaged."""
    run, seen = DistillationRun(teacher, settings), []
    for metric in itertools.islice(distill(run, *image_shape(teacher), pairs), FIRST):
        r = metric.record
        judged = None if r.denoised_real is None else (r.x - r.denoised_real).abs().mean().item()
        seen.append({
            "norm_generator": r.norm_generator, "spread": r.x.std(dim=0).mean().item(),
            "beyond": (r.x.abs() > 1.2).float().mean().item(), "off_teacher": judged,
            "loss_anchor": r.loss_anchor, "loss_critic": r.loss_critic,
        })  # fmt: skip
    return {"at_once": seen[0]} | {
        name: None if values[0] is None else sum(values) / FIRST
        for name in seen[0] for values in [[one[name] for one in seen]]
    }  # fmt: skip


def measure(model: nn.Module, images: Images, seed: int, count: int) -> dict:
    """Distance to the data, precision and recall, and how many are read as their label."""
    z, label = pipeline.noise(model, count, "evaluation", seed)
    x = pipeline.draw(model, z, label)
    result = metrics.evaluate(x, images.x, label, minimum=count)
    return {name: getattr(result, name) for name in ("frechet", "precision", "recall", "as_label")}


def distilled(
    teacher: adapters.Adapted, name: str, level: float, seed: int, images: Images, options
) -> dict:
    """A row: pairs from this level, regression, distillation, each of them measured."""
    teacher = copy.copy(teacher)  # whose range is its own: the rows to come keep theirs
    teacher.sigma_range = (teacher.sigma_range[0], min(level, teacher.terms.sigma_range[1]))
    started = time.monotonic()
    folder = options.folder / f"{name}-{level:g}-{seed}"
    pipeline.make_pairs_in(folder, teacher, PAIRS, PAIR_STEPS, seed)
    pairs = load_pairs(folder, teacher)
    warm, settings = (replace(s, seed=seed) for s in (WARM_START, DISTILL))
    start = pipeline.make_student(teacher, warm, pairs).network
    made = pipeline.make_student(teacher, settings, pairs, start).network
    return {
        "pairs": metrics.evaluate(pairs.y, images.x, pairs.label, minimum=PAIRS).frechet,
        "warm_start": measure(start, images, seed, options.count),
        "student": measure(made, images, seed, options.count),
        "seconds": round(time.monotonic() - started),
        "first": {"warm_start": first_steps(teacher, pairs, warm),
                  "distillation": first_steps(teacher, pairs, settings)},
    }  # fmt: skip


def main() -> None:
    """Run what is missing, write after every run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--teacher", choices=TEACHERS, required=True)
    parser.add_argument("--steps", type=int, default=3_000, help="a teacher's (%(default)s)")
    parser.add_argument("--levels", type=float, nargs="*", help="some of them, without the teacher")
    parser.add_argument("--seeds", type=int, default=2, help="of each row (%(default)s)")
    parser.add_argument("--count", type=int, default=1_000, help="samples (%(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("runs/own-teachers"))
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write and continue")
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    images, name = digits(), options.teacher
    teacher = trained(name, images, options.folder, options.steps)
    report = json.loads(options.out.read_text()) if options.out.exists() else {"rows": []}
    done = {(r["teacher"], r["level"], r["seed"]) for r in report["rows"]}
    levels = options.levels or (None, *LEVELS[name])
    perfect = metrics.evaluation_floor(images.x, options.count, label=images.label).frechet
    floor = {"frechet": perfect.mean, "std": perfect.std}
    for seed, level in itertools.product(range(options.seeds), levels):
        if (name, level, seed) in done:
            continue
        if level is None:
            made_by = pretrained.made_by(options.folder / f"{name}.safetensors")
            row = {**measure(teacher, images, seed, options.count), **made_by}
        else:
            row = distilled(teacher, name, level, seed, images, options)
        report["rows"].append({"teacher": name, "level": level, "seed": seed, **row})
        made_with = {"pairs": PAIRS, "warm_start_steps": WARM_START.steps, "steps": DISTILL.steps}
        report |= {"samples": options.count, "floor": floor, **made_with, **provenance()}
        write_json(options.out, report)
        print({"level": level, "seed": seed, **row}, flush=True)


if __name__ == "__main__":
    main()

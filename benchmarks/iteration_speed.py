"""Speed of one DMD iteration: as the pipeline runs a preset, against a naive loop in plain fp32.

    python -m benchmarks.iteration_speed                           # digits, on the CPU
    python -m benchmarks.iteration_speed --preset cifar10-small    # on a GPU; no data needed

Both are timed in turn in the same process, so that a machine whose speed drifts treats them
alike; networks are untrained and pairs are noise, which does not change the time. Both learn the
same (a test compares their weights). The naive loop is what a first draft of DMD looks like: each
network called for each need, scores computed with gradient history and detached afterwards, the
critic's samples made again, losses read for a log at once, default memory layout, unfused
optimisers, an average weight by weight, no TF32.

On the CPU, digits at their own batch on two threads must be nearly as much faster as they were:
the program leaves with status 1 if they are not. Waits are reads of values: a GPU stops for each.
What bounds an iteration on a card is counted from operations alone, not from memory traffic.
"""

import argparse
import copy
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cards import CARDS
from dmd_tutorial import checks, dmd
from dmd_tutorial.anchor import Pairs
from dmd_tutorial.denoisers import image_shape, says
from dmd_tutorial.generators import OneStepGenerator
from dmd_tutorial.noise import grid_sigma, stream
from dmd_tutorial.runs import pipeline
from dmd_tutorial.runs.compute import Compute
from dmd_tutorial.runs.presets import PRESETS
from dmd_tutorial.training import DistillSettings, draw_batch, rate_factor

WARM_UP = 5  # rounds that fill caches and compile
# digits, batch 64, two threads, three runs of 25 rounds: 1.38 to 1.44 before values were read once
# a step, 1.40 to 1.47 after
HOLD = 1.30


class Naive:
    """A first draft of Algorithm 1 with the weight of Eq. 8, correct and slow."""

    def __init__(self, teacher: nn.Module, settings: DistillSettings, pairs: Pairs) -> None:
        self.settings, self.pairs, self.step = settings, pairs, 0
        self.rng = stream("training", settings.seed)
        self.grid = settings.objective(teacher=teacher).grid
        generator = OneStepGenerator(teacher)
        self.teacher, self.generator, self.critic, self.average = (
            copy.deepcopy(network).to(memory_format=torch.contiguous_format).eval()  # no dropout
            for network in (teacher, generator, teacher, generator)
        )
        self.teacher.requires_grad_(False)
        for network in (self.generator, self.critic):
            network.requires_grad_(True)
        options = {"fused": False, "foreach": False, "weight_decay": settings.weight_decay}
        self.optimizers = {
            torch.optim.AdamW(self.generator.parameters(), **options): settings.learning_rate,
            torch.optim.AdamW(self.critic.parameters(), **options): settings.critic_learning_rate,
        }

    def __call__(self) -> None:
        """One iteration."""
        drawn = dmd.judged(
            draw_batch(self, *image_shape(self.teacher), self.pairs), self.grid, self.rng
        )
        sigma = grid_sigma(len(drawn.z), self.grid, rng=self.rng)
        noise = torch.randn(drawn.z.shape, generator=self.rng)
        device = next(self.teacher.parameters()).device
        batch = dmd.Batch(*(None if t is None else t.to(device) for t in drawn))
        losses = [self.generator_loss(batch), self.critic_loss(batch, sigma.to(device), noise)]
        self.losses = [loss.item() for loss in losses]
        for loss in losses:
            loss.backward()
        for optimizer, rate in self.optimizers.items():
            self.update(optimizer, rate)
        self.follow()

    def generator_loss(self, batch: dmd.Batch) -> torch.Tensor:
        """Distribution matching (Eq. 7, 8) and the anchor (Eq. 9)."""
        x = self.generator(batch.z, batch.label)
        x_noisy = x + batch.sigma[:, None, None, None] * batch.noise
        real = self.teacher(x_noisy, batch.sigma, batch.label).detach()
        fake = self.critic(x_noisy, batch.sigma, batch.label).detach()
        error = (x - real).abs().mean(dim=(1, 2, 3), keepdim=True)
        gradient = (fake - real) / error.clamp_min(1e-6)
        x_ref = self.generator(batch.z_ref, batch.label_ref)
        anchor = functional.mse_loss(x_ref, batch.y_ref)
        return (
            0.5 * functional.mse_loss(x, (x - gradient).detach())
            + self.settings.lambda_reg * anchor
        )

    def critic_loss(self, batch: dmd.Batch, sigma: Any, noise: Any) -> torch.Tensor:
        """Denoising (Eq. 6) with EDM's weight."""
        x = self.generator(batch.z, batch.label).detach()
        level = sigma[:, None, None, None]
        answer = self.critic(x + level * noise.to(x), sigma, batch.label)
        weight = 1 / level**2 + 1 / says(self.critic, "sigma_data") ** 2
        return (weight * (answer - x) ** 2).mean()

    def update(self, optimizer: torch.optim.Optimizer, rate: float) -> None:
        """A step down the gradient, clipped, at the rate of this iteration."""
        settings, (group,) = self.settings, optimizer.param_groups
        group["lr"] = rate * rate_factor(
            self.step, settings.steps, settings.warm_up, settings.decay
        )
        nn.utils.clip_grad_norm_(group["params"], settings.clip, foreach=False)
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def follow(self) -> None:
        """Move the average of the generator's weights."""
        keep = min(self.settings.ema, (1 + self.step) / (10 + self.step))
        both = zip(self.average.parameters(), self.generator.parameters(), strict=True)
        for mean, weight in both:
            mean.copy_(keep * mean + (1 - keep) * weight)
        self.step += 1


def pipelines_loop(
    teacher: nn.Module, settings: DistillSettings, pairs: Pairs, compute: Compute
) -> tuple[Any, Iterator]:
    """The run and the loop of `pipeline.make_student`, all prepared: it would only drive them."""
    with mock.patch.object(pipeline, "_drive", lambda stage, run, loop, *_: (run, loop)):
        return pipeline.make_student(teacher, settings, pairs, compute=compute)


def random_pairs(teacher: nn.Module, count: int) -> Pairs:
    """Pairs of the right shape."""
    shape, classes = image_shape(teacher)
    label = torch.arange(count) % classes if classes else None
    return Pairs(torch.randn(count, *shape), torch.randn(count, *shape), label)


def flop(teacher: nn.Module, settings: DistillSettings) -> int:
    """Operations of an iteration, counted on the CPU at the smallest batch of the same shares."""
    parts = math.gcd(settings.batch, settings.batch_pairs)
    settings = replace(
        settings, batch=settings.batch // parts, batch_pairs=settings.batch_pairs // parts
    )
    _, loop = pipelines_loop(teacher, settings, random_pairs(teacher, 2), Compute())
    with FlopCounterMode(display=False) as counter:
        next(loop)
    return parts * counter.get_total_flops()


class _Reads(TorchDispatchMode):
    """Counts the reads of values that go through an operator: item, int, float, bool.

    Those of an optimiser do not count: it keeps its number of steps on the CPU, or reads nothing.
    """

    count, stepping = 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default and not self.stepping
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Any:
        self.hooks = [
            register_optimizer_step_pre_hook(lambda *_: setattr(self, "stepping", True)),
            register_optimizer_step_post_hook(lambda *_: setattr(self, "stepping", False)),
        ]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for hook in self.hooks:
            hook.remove()
        super().__exit__(*error)


class _Lists(TorchFunctionMode):
    """Counts the reads that go through none on a CPU."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.Tensor.tolist, torch.Tensor.numpy)
        return func(*args, **(kwargs or {}))


def waits(step: Callable[[], Any], device: torch.device) -> int:
    """How often a step waits on a GPU, copies from the CPU included; elsewhere its reads of values.

    The CPU is asked as a GPU would be: what waits for nothing is otherwise read at once. The
    average is left out, which counts its steps on the CPU: a GPU gets a copy of that number.
    """
    if device.type != "cuda":
        as_on_gpu = mock.patch.object(checks, "_waits", return_value=True)
        follow = mock.patch.object(AveragedModel, "update_parameters")
        with as_on_gpu, follow, _Reads() as reads, _Lists() as lists:
            step()
        return reads.count + lists.count
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


@contextmanager
def without_tf32() -> Iterator[None]:
    """Plain fp32 on a GPU: its convolutions would round to TF32 by default."""
    flags = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [flag.allow_tf32 for flag in flags]
    try:
        for flag in flags:
            flag.allow_tf32 = False
        yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value


def milliseconds(step: Callable[[], Any], device: torch.device) -> float:
    """How long a step takes, until the device is done with it."""
    done = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    done()
    started = time.perf_counter()
    step()
    done()
    return 1000 * (time.perf_counter() - started)


def on_card(tflop: float, milliseconds: float, device: torch.device) -> dict:
    """What was reached of a card's peak, and the time at the peak; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    name = torch.cuda.get_device_name(device)
    peak = next((card.peak for key, card in CARDS.items() if key in name), None)
    if peak is None:
        return {"card": f"{name}, whose peak is not in benchmarks/cards.py"}
    return {
        "card": name, "peak TFLOP/s, 16 bits": peak,
        "milliseconds at the peak": round(1000 * tflop / peak, 2),
        "share of the peak": round(1000 * tflop / peak / milliseconds, 4),
    }  # fmt: skip


def measure(options: argparse.Namespace) -> dict:
    """Time both loops in turn; medians, quartiles of their ratio, operations, waits."""
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    preset, device = PRESETS[options.preset], torch.device(options.device)
    batch = options.batch or preset.distill.batch
    settings = replace(
        preset.distill, batch=batch, batch_pairs=batch, critic_steps=1, steps=10**6
    )  # one step of the critic is Algorithm 1's
    tflop = flop(preset.new_teacher(), settings) / 1e12
    teacher = preset.new_teacher().to(device)
    pairs = random_pairs(teacher, 1_000)
    naive = without_tf32()(Naive(teacher, settings, pairs).__call__)
    _, loop = pipelines_loop(teacher, settings, pairs, preset.compute)
    steps = {"naive": naive, "ours": lambda: next(loop)}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(WARM_UP + options.rounds):
        for name, step in steps.items():
            times[name].append(milliseconds(step, device))
    times = {name: values[WARM_UP:] for name, values in times.items()}
    median = {name: statistics.median(values) for name, values in times.items()}
    ratios = torch.tensor(times["naive"]) / torch.tensor(times["ours"])
    low, middle, high = ratios.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return {
        "preset": options.preset, "batch": batch, "rounds": options.rounds,
        "device": str(device), "threads": options.threads, "torch": torch.__version__,
        "naive": "fp32, TF32 off", "ours": asdict(preset.compute),
        "milliseconds": {name: round(value, 2) for name, value in median.items()},
        "naive over ours": {
            "median": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]
        },
        "waits": {name: waits(step, device) for name, step in steps.items()},
        "TFLOP": round(tflop, 5), "TFLOP/s": round(1000 * tflop / median["ours"], 4),
        **on_card(tflop, median["ours"], device),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Print what was measured; 1 where the ratio does not hold."""
    trained_here = [name for name, preset in PRESETS.items() if not preset.published]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="digits", choices=trained_here, help="(%(default)s)")
    parser.add_argument("--device", help="cpu for digits, else cuda")
    parser.add_argument("--batch", type=int, help="samples, and pairs (the preset's)")
    parser.add_argument("--rounds", type=int, default=25, help="timed rounds (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    held_to = f"the ratio that must hold ({HOLD} for digits on the CPU at their batch, else none)"
    parser.add_argument("--check", type=float, metavar="FACTOR", help=held_to)
    options = parser.parse_args(arguments)
    options.device = options.device or ("cpu" if options.preset == "digits" else "cuda")
    result = measure(options)
    asked = options.preset, options.device, options.batch, options.threads
    recorded = asked == ("digits", "cpu", None, 2)
    hold = options.check if options.check is not None else HOLD if recorded else 0.0
    held = result["naive over ours"]["median"] >= hold
    print(json.dumps(result | {"must hold": hold, "held": held}, indent=1))
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())

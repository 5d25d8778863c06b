"""Speed of one DMD iteration on the digits U-Net, batch 64: the package's against a naive loop.

    python benchmarks/iteration_speed.py

Both are timed in turn in the same process, so that a machine whose speed drifts treats them
alike. The naive loop is what a first draft of DMD looks like: each network called for each need,
scores computed with gradient history and detached afterwards, fresh fakes for the critic, the
anchor in a call of its own, default memory layout, unfused optimisers.
"""

import argparse
import copy
import json
import statistics
import time
from dataclasses import replace

import torch
from torch.nn import functional

from dmd_tutorial import dmd, pretrained
from dmd_tutorial.anchor import Pairs
from dmd_tutorial.noise import grid_sigma, karras_grid
from dmd_tutorial.runs.presets import ON_DIGITS
from dmd_tutorial.training import DistillationRun, draw_batch

BATCH, SHAPE, CLASSES = 64, (1, 8, 8), 10


def random_pairs(count: int = 1000) -> Pairs:
    """Pairs of the right shape: what is in them does not change the time."""
    label = torch.arange(count) % CLASSES
    return Pairs(torch.randn(count, *SHAPE), torch.randn(count, *SHAPE), label)


class Naive:
    """A first draft of the loop, correct and slow."""

    def __init__(self, run: DistillationRun, pairs: Pairs) -> None:
        self.run, self.pairs = run, pairs
        layout = torch.contiguous_format
        self.teacher = copy.deepcopy(run.teacher).to(memory_format=layout)
        self.generator = copy.deepcopy(run.generator).to(memory_format=layout)
        self.critic = copy.deepcopy(run.critic).to(memory_format=layout)
        options = {"lr": 5e-5, "fused": False, "foreach": False}
        self.generator_optimizer = torch.optim.AdamW(self.generator.parameters(), **options)
        self.critic_optimizer = torch.optim.AdamW(self.critic.parameters(), **options)
        self.grid = karras_grid(sigma_max=ON_DIGITS.grid_max)

    def __call__(self) -> None:
        """One iteration."""
        batch = draw_batch(self.run, SHAPE, CLASSES, self.pairs)
        x = self.generator(batch.z, batch.label)
        sigma = grid_sigma(BATCH, self.grid, 0.02, 0.98)
        x_noisy = x + sigma[:, None, None, None] * torch.randn_like(x)
        real = self.teacher(x_noisy, sigma, batch.label)
        fake = self.critic(x_noisy, sigma, batch.label)
        gradient = dmd.matching_gradient(x, sigma, real.detach(), fake.detach())
        loss = dmd.matching_loss(x, gradient)
        x_ref = self.generator(batch.z_ref, batch.label_ref)
        loss = loss + functional.mse_loss(x_ref, batch.y_ref)
        self.generator_optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.generator.parameters(), 10.0, foreach=False)
        self.generator_optimizer.step()

        x = self.generator(torch.randn_like(x), batch.label)
        sigma = grid_sigma(BATCH, self.grid)
        loss = dmd.critic_loss(self.critic, x, sigma, torch.randn_like(x), batch.label)
        self.critic_optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.critic.parameters(), 10.0, foreach=False)
        self.critic_optimizer.step()


class Ours:
    """The package's iteration."""

    def __init__(self, run: DistillationRun, pairs: Pairs) -> None:
        self.run, self.pairs, self.objective = run, pairs, run.settings.objective()

    def __call__(self) -> None:
        """One iteration."""
        run = self.run
        batch = draw_batch(run, SHAPE, CLASSES, self.pairs)
        dmd.iteration(
            run.generator, run.critic, run.teacher, run.generator_optimizer,
            run.critic_optimizer, batch, self.objective, run.rng,
        )  # fmt: skip


def main() -> None:
    """Time both in turn and print medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=40, help="timed rounds (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    settings = replace(ON_DIGITS, critic_steps=1, batch=BATCH, batch_pairs=BATCH)
    run = DistillationRun(pretrained.load("digits-teacher"), settings)
    pairs = random_pairs()
    loops = {"naive": Naive(run, pairs), "ours": Ours(run, pairs)}
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for round_ in range(options.rounds + 5):
        for name, loop in loops.items():
            started = time.perf_counter()
            loop()
            if round_ >= 5:  # the first rounds warm caches up
                seconds[name].append(time.perf_counter() - started)
    median = {name: 1000 * statistics.median(values) for name, values in seconds.items()}
    ratios = [n / o for n, o in zip(seconds["naive"], seconds["ours"], strict=True)]
    print(json.dumps({
        "milliseconds": {name: round(value, 1) for name, value in median.items()},
        "naive over ours": round(statistics.median(ratios), 2),
        "threads": options.threads, "torch": torch.__version__,
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()

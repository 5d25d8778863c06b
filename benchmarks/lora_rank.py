"""What a critic's rank costs: the bias that it puts on the generator's gradient (Eq. 4.6).

    python -m benchmarks.lora_rank --pipeline FOLDER --out book/results/lora-rank.json

As in chapter 4 the generator is known, x = b_j + 0.3 z around `PIECES` latents of shapes, so the
exact critic is, too. The critic starts as the pipeline's U-Net, without prompt, and learns the
generator's samples: as adapters of several ranks, or whole. Its bias is that of the gradient by
the b_j, over the norm of the exact gradient; the norms come from two halves of the samples, whose
product has no share of their noise. Each method is trained at each rate, and its best at the end,
by the mean over seeds, is what counts. About an hour on one core; --updates, --seeds and --samples
make it shorter.
"""

import argparse
import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dmd_tutorial import dmd
from dmd_tutorial.data.captioned import shapes
from dmd_tutorial.denoisers import Denoiser, sigma_range
from dmd_tutorial.files import write_json
from dmd_tutorial.mixtures import GaussianMixture
from dmd_tutorial.noise import add_noise, dmd_sigma, grid_sigma, karras_grid, stream
from dmd_tutorial.runs.provenance import provenance
from dmd_tutorial.text_to_image.lora import ATTENTION, BLOCKS, LowRank
from dmd_tutorial.text_to_image.prompted import Prompted, load_pipeline

PIECES, STD, BATCH = 4, 0.3, 32
RATES = 4e-4, 2e-3
Start = Callable[[nn.Module, int], nn.Module]
METHODS: dict[str, Start] = {
    "whole": lambda teacher, seed: copy.deepcopy(teacher).requires_grad_(True),
    **{
        f"{name}, rank {rank}": lambda teacher, seed, r=rank, n=names: LowRank(teacher, r, n, seed)
        for name, names in {"attention": ATTENTION, "blocks": BLOCKS}.items()
        for rank in (4, 16, 64)
    },
}


@dataclass
class World:
    """A teacher, and a generator that is known: its pieces' means, and its exact denoiser."""

    teacher: nn.Module
    means: Tensor

    def __post_init__(self) -> None:
        low, high = sigma_range(self.teacher)
        self.grid = karras_grid(sigma_min=low, sigma_max=high)
        self.mixture = GaussianMixture.isotropic(self.means.flatten(1), STD)

    def exact(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.mixture(x.flatten(1), sigma).view_as(x)

    def sample(self, count: int, rng: torch.Generator) -> Tensor:
        """As many of each piece, in turn."""
        means = self.means[torch.arange(count) % len(self.means)]
        return means + STD * torch.randn(means.shape, generator=rng)


@torch.no_grad()
def judge(world: World, critic: Denoiser, count: int) -> tuple[float, float, float]:
    """Bias, exact gradient, and the root mean square of the error that bounds the bias (4.7).

    A sample moves with its piece's mean, so the Jacobian stretches nothing.
    """
    rng, pieces = torch.Generator().manual_seed(99), len(world.means)
    count -= count % (2 * pieces)
    x, sigma = world.sample(count, rng), dmd_sigma(count, world.grid, rng)
    x_noisy = add_noise(x, sigma, torch.randn(x.shape, generator=rng))

    def denoised(by: Denoiser) -> Tensor:
        parts = zip(x_noisy.split(128), sigma.split(128), strict=True)
        return torch.cat([by(*part) for part in parts])

    real = denoised(world.teacher)
    learnt, exact = (
        dmd.matching_gradient(x, sigma, real, denoised(by)) for by in (critic, world.exact)
    )

    def norm(pixel: Tensor) -> float:
        first, second = pixel.double().view(2, -1, pieces, x[0].numel()).mean(1) / pieces
        return (first * second).sum().clamp_min(0).sqrt().item()

    error = (learnt - exact).flatten(1).square().sum(1).mean().sqrt().item()
    return norm(learnt - exact), norm(exact), error


def curve(
    world: World, critic: nn.Module, rate: float, updates: list[int], count: int, seed: int
) -> list[float]:
    """The bias's share of the exact gradient after so many updates of the critic."""
    rng = stream("training", seed)
    trained = [p for p in critic.parameters() if p.requires_grad]
    optimizer, shares = torch.optim.AdamW(trained, rate, weight_decay=0.01), []
    for update in range(updates[-1] + 1):
        if update in updates:
            bias, gradient, error = judge(world, critic, count)
            if bias > error:
                raise ValueError(f"a bias of {bias:g} is above its bound, {error:g}")
            shares.append(bias / gradient)
        x, sigma = world.sample(BATCH, rng), grid_sigma(BATCH, world.grid, rng=rng)
        loss = dmd.critic_loss(critic, x, sigma, torch.randn(x.shape, generator=rng))
        dmd.update(optimizer, loss, clip=10.0)
    return shares


def measure(world: World, methods: dict[str, Start], options: argparse.Namespace) -> list[dict]:
    rows = []
    for name, start in methods.items():
        tried = {
            rate: [
                curve(world, start(world.teacher, seed), rate, options.updates, options.samples,
                      seed) for seed in range(options.seeds)
            ]
            for rate in RATES
        }  # fmt: skip
        best = min(RATES, key=lambda rate: statistics.mean(c[-1] for c in tried[rate]))
        trained = start(world.teacher, 0).parameters()
        rows.append({
            "method": name, "parameters": sum(p.numel() for p in trained if p.requires_grad),
            "rate": best, "bias over gradient, by seed": tried[best],
            "last, by rate": {str(rate): [c[-1] for c in tried[rate]] for rate in RATES},
        })  # fmt: skip
        last = torch.tensor([c[-1] for c in tried[best]])
        spread = last.std().item() if len(last) > 1 else 0.0
        print(f"{name}, rate {best:g}: {last.mean():.3f} +- {spread:.3f}", flush=True)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pipeline", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=1024, help="of a judgement (%(default)s)")
    parser.add_argument("--updates", type=int, nargs="+", default=[0, 25, 100, 400])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    options = parser.parse_args(arguments)
    torch.set_flush_denormal(True)
    told = Prompted(load_pipeline(options.pipeline)).requires_grad_(False).eval()
    with torch.no_grad():
        means = told.around.latents(shapes(PIECES, torch.Generator().manual_seed(7)).x)
    rows = measure(World(told, means), {n: METHODS[n] for n in options.methods}, options)
    kept = {n: getattr(options, n) for n in ("seeds", "samples", "updates")}
    write_json(options.out, {"rows": rows, **kept, **provenance()})


if __name__ == "__main__":
    main()

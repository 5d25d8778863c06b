"""Exercises of chapter 6."""

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parameters_to_vector

from dmd_tutorial import dmd
from dmd_tutorial.denoisers import Denoiser, EDMDenoiser, denoising_loss
from dmd_tutorial.generators import OneStepGenerator
from dmd_tutorial.networks import MLP
from dmd_tutorial.noise import add_noise, karras_grid
from dmd_tutorial.notebook.exercises import Exercise, Network, gradients_by


def _ask(denoiser: Denoiser, x: Tensor, level: float) -> Tensor:
    return denoiser(x, torch.full((len(x),), level, dtype=x.dtype))


def iteration(*given) -> Tensor:
    *networks_and_optimizers, batch, sigma, noise, lam = given

    def updater(optimizer, loss, part, clip):
        part = part._replace(sigma=sigma, noise=noise) if optimizer is given[4] else part
        return dmd.update_whole(optimizer, loss, part, clip)

    objective = dmd.Objective(lambda_reg=lam, clip=math.inf)
    return dmd.iteration(*networks_and_optimizers, batch, objective, updater=updater).x


def slip(
    generator, critic, teacher, *given, order="g c", zeroed="gc", sign=1.0, stop=torch.detach,
    swap=False, images=lambda x, generator, batch: x.detach(),
) -> Tensor:  # fmt: skip
    *optimizers, batch, sigma, noise, lam = given
    x = generator(batch.z)

    def pull() -> Tensor:
        noisy = add_noise(x, batch.sigma, batch.noise)
        real, fake = (D(noisy, batch.sigma) for D in (teacher, critic)[:: -1 if swap else 1])
        gradient = (fake - real) / (x - real).abs().mean(dim=1, keepdim=True)
        anchor = functional.mse_loss(generator(batch.z_ref), batch.y_ref)
        return 0.5 * functional.mse_loss(x, stop(x - sign * gradient)) + lam * anchor

    def follow() -> Tensor:
        return denoising_loss(critic, images(x, generator, batch), sigma, noise)

    parts = dict(zip("gc", zip(optimizers, (pull, follow), strict=True), strict=True))
    for names in order.split():
        for name in set(names) & set(zeroed):
            parts[name][0].zero_grad()
        torch.stack([parts[name][1]() for name in names]).sum().backward()
        for name in names:
            parts[name][0].step()
    return x


def _points(dim: int, count: int, lam: float, steps: int) -> tuple:
    """Three small networks, unlike each other, two optimisers, and what the iterations see."""
    networks = [EDMDenoiser(MLP(dim, hidden=4, layers=1)).double() for _ in range(3)]
    for parameter in [p for network in networks for p in network.parameters()]:
        nn.init.normal_(parameter, std=0.4)
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.03) for network in networks[:2]]
    z, z_ref, y_ref, *noises = torch.randn(5, steps, count, dim).double()
    sigma = 0.3 + 2 * torch.rand(2, steps, count).double()
    drawn = list(zip(z, z_ref, y_ref, *sigma, *noises, strict=True))
    return OneStepGenerator(networks[0], 5.0), *networks[1:], *optimizers, drawn, lam


def _trained(answer, generator, critic, *given) -> dict:
    *others, drawn, lam = given
    found = {}
    for i, (z, z_ref, y_ref, sigma, sigma_critic, noise, noise_critic) in enumerate(drawn, 1):
        batch = dmd.Batch(z, None, z_ref, y_ref, sigma=sigma, noise=noise)
        x = answer(generator, critic, *others, batch, sigma_critic, noise_critic, lam)
        found[f"images of iteration {i}"] = x
    for name, network in {"generator": generator, "critic": critic}.items():
        weights = parameters_to_vector(network.parameters())
        found[f"weights of the {name} after {len(drawn)} iterations"] = weights
    return found


def forward_equivalents(critic_steps: int, generator: int = 2 * (1 + 2), scores: int = 2) -> int:
    # the generator runs on z and z_ref, both ways; steps after the first need new images
    return generator + scores + critic_steps * (1 + 2) + critic_steps - 1


EXERCISES = [
    Exercise("6.1", "a denoiser as one-step generator",
             lambda D, z, sigma_max: _ask(D, sigma_max * z, sigma_max), {
        "the noise must be scaled: the denoiser expects an input of size sigma_max": _ask,
        "the noise level is not sigma_max itself but the second-highest level of a grid":
            lambda D, z, top: _ask(D, top * z, karras_grid(100, sigma_max=top)[-2].item()),
        "the denoiser must be told the level sigma_max, not 1":
            lambda D, z, sigma_max: _ask(D, sigma_max * z, 1.0),
        "the answer is an image already: do not divide it by sigma_max":
            lambda D, z, sigma_max: _ask(D, sigma_max * z, sigma_max) / sigma_max,
    }, inputs=lambda: [(Network(lambda p, x, s: (p * x / s).tanh() + s.cos()), z, sigma_max)
                       for z in (torch.randn(6, 2).double(), torch.randn(1, 3, 2, 2))
                       for sigma_max in (5.0, 80.0)],
       probe=gradients_by({"gradient that reaches the network": 0}, name="")),
    Exercise("6.2", "three averages after a hundred steps", (0.8674, 1.0, 43.37), {
        "with the factors exchanged the average is the newest weights": (0.8674, 0.8674, 43.37),
        "the old ones fade, too: sum the powers of 0.98": (0.8674, 1.0, 100.0),
        "the decay is 0.98 in every step; that of (6.4) forgets its start": (1.0, 1.0, 11.0),
        "that is what is left of the start": (0.1326, 0.0, 43.37),
        "that is their rest: after 100 steps some of the start is left": (1.0, 1.0, 50.0),
    }, tolerance=0.01),
    Exercise("6.3", "one iteration from its parts", iteration, {
        "the sign is wrong: this climbs the KL divergence": partial(slip, sign=-1.0),
        "teacher and critic are exchanged where they judge the images": partial(slip, swap=True),
        "no pull comes from the matching loss: missing, or x cancels": partial(slip, sign=0.0),
        "the pull is a number for each pixel, not something to differentiate: the scores' history "
        "reaches the generator, which now only makes the two denoisers agree":
            partial(slip, stop=torch.clone),
        "the anchor is missing": lambda *a: iteration(*a[:-1], 0.0),
        "the anchor has no factor one half": lambda *a: iteration(*a[:-1], a[-1] / 2),
        "lambda_reg is missing before the anchor": lambda *a: iteration(*a[:-1], 1.0),
        "lambda_reg multiplies the matching loss; it belongs to the anchor":
            lambda *a: slip(*a[:-1], 1.0, sign=a[-1]),
        "lambda_reg multiplies both terms: the anchor alone has it":
            lambda *a: slip(*a, sign=a[-1]),
        "the generator was judged by the critic's levels and noise, not by the batch's":
            lambda *a: iteration(*a[:5], a[5]._replace(sigma=a[6], noise=a[7]), *a[6:]),
        "the critic has levels and noise of its own, not those at which x was judged":
            lambda *a: iteration(*a[:6], a[5].sigma, a[5].noise, a[-1]),
        "the critic was updated before it judged the images": partial(slip, order="c g"),
        "the critic learns from images made after the generator's update: x is there already":
            partial(slip, images=lambda x, generator, batch: generator(batch.z).detach()),
        "the critic learns from y_ref, the teacher's images: it must know the generator's":
            partial(slip, images=lambda x, generator, batch: batch.y_ref),
        "the critic's loss has x with its history, which the generator's backward pass has used "
        "up: detach x": partial(slip, images=lambda x, *_: x),
        "the critic's loss reaches the generator, too: detach x there":
            partial(slip, images=lambda x, *_: x, order="gc"),
        "the generator's gradients are not set to zero": partial(slip, zeroed="c"),
        "the critic's gradients are not set to zero": partial(slip, zeroed="g"),
        "no gradients are set to zero: each step repeats all before it": partial(slip, zeroed=""),
        "the critic is never updated": partial(slip, order="g"),
        "the generator is never updated": partial(slip, order="c"),
        "return the images that were judged, not new ones made after the update":
            lambda G, *a: (iteration(G, *a), G(a[4].z))[1],
    }, inputs=lambda: [_points(2, 6, 0.5, steps=20), _points(3, 1, 1.5, steps=3)], probe=_trained),
    Exercise("6.4", "what an iteration costs", forward_equivalents, {
        "the anchor is missing: the generator also runs, forward and backward, on z_ref":
            partial(forward_equivalents, generator=3),
        "the two scores are made without gradient: they cost a forward each, not three":
            partial(forward_equivalents, scores=6),
        "further critic steps need fresh images: a generator forward each":
            lambda critic_steps: 6 + 2 + 3 * critic_steps,
        "the first critic step reuses the images that are there: no forward for it":
            lambda critic_steps: 6 + 2 + 4 * critic_steps,
    }, inputs=lambda: [(1,), (2,), (5,)]),
    Exercise("6.5", "first iteration whose matching loss is not 0", (2, 2, 0), {
        "in the first iteration the critic still is the teacher: no pull": (1, 1, 0),
        "the critic learns in an iteration, and judges in the very next": (3, 3, 0),
        "a generator that stands still makes images as well: the critic learns them": (2, 0, 0),
        "the loss compares critic and teacher, whatever the generator does": (2, 2, 2),
        "what must move is the critic, not the generator": (2, 0, 2),
        "write 0, not None, if there is no such iteration": (2, 2, None),
        "write 0, not infinity, if there is no such iteration": (2, 2, math.inf),
    }),
    Exercise("6.6", "what DMD and more regression gain, read off the figure", (1.64, 1.02), {
        "upside down: divide the distance at the fork by the distance at the end": (0.61, 0.98),
        "begin at the fork, not at the first point of the regression": (3.45, 2.15),
        "the curves have changed places: the one that falls at once is DMD's": (1.02, 1.64),
        "that is the share that has gone; divide the two distances": (0.39, 0.02),
        "divide: on a logarithmic axis equal ways are equal factors": (0.023, 0.001),
    }, tolerance=(0.2, 0.08)),
]  # fmt: skip

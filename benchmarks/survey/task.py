"""What all methods of the survey share: the same teacher, start, data, measure and budget."""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from dmd_tutorial import data, metrics, pretrained
from dmd_tutorial.anchor import Pairs
from dmd_tutorial.denoisers import EDMDenoiser, denoising_loss
from dmd_tutorial.features import extract_features
from dmd_tutorial.networks.mlp import MLP
from dmd_tutorial.noise import SIGMA_MAX, lognormal_sigma, noise_like
from dmd_tutorial.samplers import Step, sample
from dmd_tutorial.training import FitRun, FitSettings, fit

Draw = Callable[[int, Generator], tuple[Tensor, Tensor | None]]  # (count, rng) -> x, label
Sampler = Callable[[Tensor, Tensor | None], Tensor]  # (z, label) -> x


class Budget:
    """Passes through networks that a training may spend.

    One sample's forward pass through a network like the teacher counts 1; with a backward pass
    behind it, 3. Passes of the teacher, and those that make pairs, count like all others. Networks
    of another kind count by their operations, compared with the teacher's.
    """

    def __init__(self, passes: float, teacher: nn.Module | None = None) -> None:
        self.passes, self.spent, self.teacher = passes, 0.0, teacher
        self.handles: list[RemovableHandle] = []
        if teacher is not None:
            self.watch(teacher)

    @property
    def left(self) -> float:
        """What has not been spent."""
        return self.passes - self.spent

    def watch(
        self, network: nn.Module, *example: Tensor, samples: Tensor | None = None
    ) -> nn.Module:
        """Count a network's passes, and those of its copies, from now on; returns the network.

        A network of another kind than the teacher needs one call's arguments for an example, and
        as many `samples` as the example holds where its first argument is none.
        """
        cost = 1.0
        if example:
            x, before = example[0] if samples is None else samples, self.spent
            as_teacher = (x, x.new_ones(len(x)))
            cost = _operations(network, *example) / _operations(self.teacher, *as_teacher)
            self.spent = before  # weighing is free

        def count(module: nn.Module, arguments: tuple, answer: Tensor) -> None:
            answers = answer if isinstance(answer, tuple) else (answer,)
            differentiated = any(a.requires_grad for a in answers if isinstance(a, Tensor))
            self.spent += cost * len(arguments[0]) * (3 if differentiated else 1)

        self.handles.append(network.register_forward_hook(count))
        return network

    def close(self) -> None:
        """Stop counting; copies of watched networks go on."""
        for handle in self.handles:
            handle.remove()

    def affordable(self, step: Callable[[], object]) -> int:
        """How often a training step can still be done, at least once.

        `step` does it once, with networks that are thrown away and watched like the real ones:
        this trial is not charged.
        """
        before = self.spent
        step()
        cost, self.spent = self.spent - before, before
        if cost <= 0:
            raise ValueError("the step passed through no watched network")
        return max(1, int(self.left / cost))


def _operations(network: nn.Module | None, *example: Tensor) -> int:
    if network is None:
        raise ValueError("a budget without a teacher cannot weigh networks of another kind")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*example)
    return counter.get_total_flops()


@dataclass(frozen=True)
class Task:
    """A distillation problem."""

    name: str
    teacher: nn.Module  # a trained denoiser, frozen
    shape: tuple[int, ...]  # of a sample
    classes: int  # 0 for none
    draw: Draw  # data
    measure: Callable[[Tensor, Tensor | None], tuple[float, float]]  # -> distance, recall
    sigma_max: float = SIGMA_MAX  # from which the teacher samples

    def student(self) -> nn.Module:
        """A copy of the teacher to train: where every distilled student starts."""
        return copy.deepcopy(_without_hooks(self.teacher)).requires_grad_(True).train()

    def noise(self, count: int, rng: Generator) -> tuple[Tensor, Tensor | None]:
        """Standard normal noise, (count, *shape), and classes drawn uniformly, if there are any."""
        z = torch.randn(count, *self.shape, generator=rng)
        label = torch.randint(self.classes, (count,), generator=rng) if self.classes else None
        return z, label

    def pairs(self, count: int, rng: Generator, steps: int = 18) -> Pairs:
        """Noise and the teacher's samples of it (Heun, ``2 steps - 1`` evaluations each)."""
        z, label = self.noise(count, rng)
        return Pairs(z, sample(self.teacher, z, label, steps=steps), label)


@dataclass(frozen=True)
class Method:
    """A row, or several, of the survey's table.

    ``train(task, budget, seed)`` spends the budget, on networks that ``budget.watch`` counts, and
    returns a sampler for each number of network evaluations that the table shows.
    """

    name: str
    chapter: int  # where it is taught
    train: Callable[[Task, Budget, int], dict[int, Sampler]]
    needs_data: bool = False
    needs_pairs: bool = False  # noise, and the teacher's sample of it
    extra_networks: int = 0  # trained besides the student
    trained: bool = True  # False for a sampler that trains nothing and has no seed


@cache
def ring() -> Task:
    """Eight Gaussians on a ring, and a small network trained on them for a teacher.

    Distances are sliced Wasserstein distances, in the units of x.
    """
    mixture = data.ring()

    def draw(count: int, rng: Generator) -> tuple[Tensor, Tensor | None]:
        return mixture.sample(count, rng=rng), None

    def measure(samples: Tensor, label: Tensor | None) -> tuple[float, float]:
        reference, _ = draw(len(samples), torch.Generator().manual_seed(1))
        rng = torch.Generator().manual_seed(2)
        _, recall = metrics.precision_recall(samples, reference)
        return metrics.sliced_wasserstein(samples, reference, rng=rng), recall

    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        network = EDMDenoiser(MLP(), sigma_data=1.4)
    settings = FitSettings(steps=4_000, batch=512)
    run = FitRun(network, settings)

    def batch(rng: Generator) -> tuple[Tensor, ...]:
        x, _ = draw(settings.batch, rng)
        sigma = lognormal_sigma(len(x), -0.5, 1.6, rng).to(x)
        return x, sigma, noise_like(x, rng)

    exhaust(fit(run, batch, denoising_loss))
    return Task("ring", run.average, (2,), 0, draw, measure)


@cache
def digits() -> Task:
    """Handwritten digits and the teacher that comes with the package.

    Distances are Frechet distances in the digits classifier's features.
    """
    images = data.digits()
    reference = extract_features(images.x, "digits")

    def draw(count: int, rng: Generator) -> tuple[Tensor, Tensor | None]:
        index = torch.randint(len(images.x), (count,), generator=rng)
        return images.x[index], images.label[index]

    def measure(samples: Tensor, label: Tensor | None) -> tuple[float, float]:
        result = metrics.evaluate(samples, reference, label)
        return result.frechet, result.recall

    teacher = pretrained.load("digits-teacher").requires_grad_(False).eval()
    return Task("digits", teacher, tuple(images.x.shape[1:]), images.classes, draw, measure)


def sampling(
    network: nn.Module,
    sampler: Callable[..., Iterator[Step]],
    levels: Float[Tensor, " levels"],
    seed: int | None = None,
) -> Sampler:
    """A trained network with one of the package's samplers, as the table wants it.

    The seed is that of the sampler's new noise, the same at each call; None if it draws none.
    """

    def run(z: Tensor, label: Tensor | None) -> Tensor:
        fresh = {} if seed is None else {"rng": Generator().manual_seed(seed)}
        return sample(network, z, label, sampler=partial(sampler, **fresh), levels=levels)

    return run


def fit_within(
    budget: Budget,
    make: Callable[[], nn.Module],
    draw: Callable[[Generator], tuple],
    loss: Callable[..., Tensor],
    settings: FitSettings,
    share: float = 1.0,
) -> nn.Module:
    """Fit a network in as many steps as a share of a budget allows; returns its average.

    `make` makes the network, watched by the budget, with torch's own random numbers; the settings'
    steps are the largest number of them; draw and loss are those of `fit`.
    """

    def run(steps: int) -> FitRun:
        with torch.random.fork_rng([]):
            torch.manual_seed(settings.seed)
            network = make()
        return FitRun(network, replace(settings, steps=steps))

    steps = budget.affordable(lambda: next(fit(run(1), draw, loss)))
    final = run(max(1, min(int(share * steps), settings.steps)))
    exhaust(fit(final, draw, loss))
    return final.average


def exhaust(steps: Iterable[object]) -> None:
    """Run a training loop to its end."""
    for _ in steps:
        pass


def _without_hooks(network: nn.Module) -> nn.Module:
    """The same network, as a shallow copy that no budget watches."""
    plain = copy.copy(network)
    plain._forward_hooks = type(network._forward_hooks)()
    return plain

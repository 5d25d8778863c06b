"""The students of a small text-to-image model: how each is trained, and what it is made of.

Whatever is sampled or trained is kept in a folder and made once; a training that was stopped goes
on, to the same bits. Every seed has pairs, data and draws of its own.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from benchmarks import plan
from benchmarks.prompt_measures import Drawn, drawn
from dmd_tutorial import dmd, pretrained, samplers
from dmd_tutorial.adapters import Guided
from dmd_tutorial.anchor import Pairs, fingerprint
from dmd_tutorial.checks import expand
from dmd_tutorial.data import Images, balanced_labels, normal
from dmd_tutorial.denoisers import image_shape, sigma_range
from dmd_tutorial.files import replace_file, write_json
from dmd_tutorial.generators import OneStepGenerator
from dmd_tutorial.noise import karras_grid, noise_like, stream
from dmd_tutorial.survey.consistency import (
    consistency_loss,
    distillation_pair,
    neighbour_levels,
    pseudo_huber,
)
from dmd_tutorial.survey.score_distillation import Dmd2Settings, Judge
from dmd_tutorial.text_to_image.lora import LowRank
from dmd_tutorial.text_to_image.prompted import Prompted
from dmd_tutorial.training import (
    DistillationRun,
    DistillSettings,
    FitRun,
    FitSettings,
    distill,
    fit,
)

# The pipeline's own, but for one thing: with a prediction of v `diffusers` averages v, the paper
# and we the noise.
SAMPLER = samplers.pndm
SCALE = 3.0  # of guidance, in the pairs and in the teacher's score; the critic has none
CHUNK = 320  # pictures sampled at a time, ten of each prompt

# As digits are regressed on, in fewer iterations, for there are fewer pairs.
REGRESSION = DistillSettings(
    steps=3_000, matching=False, lambda_reg=1.0, learning_rate=1e-3, warm_up=200, decay=0.95,
    ema=0.995,
)  # fmt: skip
# Scores are compared up to ten widths of the data, as for digits. The critic is faster than the
# generator, by its rate and by two updates, so that it follows; the anchor weighs as on digits.
MATCHING = DistillSettings(
    steps=1_000, lambda_reg=1.0, grid_max=10.0, learning_rate=5e-5, critic_learning_rate=4e-4,
    warm_up=50,
)  # fmt: skip
# Chapter 11's. It starts as the teacher, so its rates are higher than those of what was regressed.
ADVERSARIAL = Dmd2Settings(
    steps=1_500, critic_steps=3, fooling=0.03, discrimination=0.1, grid_max=10.0,
    learning_rate=1e-4, critic_learning_rate=1e-3, warm_up=20,
)  # fmt: skip
# Adapters are moved further for the same change: of their two factors one starts at 0.
RANK, REGRESSION_RATE = 16, {"learning_rate": 2e-3}
MATCHING_RATES = {"learning_rate": 2e-4, "critic_learning_rate": 1e-3}
# Chapter 9's: levels 59 of 1,000 apart (17 in all), and an average that follows fast.
CONSISTENCY, SKIP = FitSettings(4_300, batch=64, learning_rate=5e-4, warm_up=100, ema=0.95), 59


def evaluations(settings: DistillSettings | FitSettings) -> int:
    """Network evaluations of one iteration: a forward 1, with a backward pass 3, guidance 2."""
    if isinstance(settings, DistillSettings):
        return plan.evaluations(settings) + settings.matching * settings.batch
    return settings.batch * (3 + 1 + 2 * 2)  # the student, its average, Heun's step with guidance


class Method(NamedTuple):
    """How a student is trained."""

    settings: DistillSettings | FitSettings
    start: str = ""  # the student it starts from; none: the teacher's weights
    rank: int = 0  # of LoRA's adapters; 0: whole networks


def on(steps: float) -> Method:
    """The control of what starts from the regression: it goes on, at its own rate."""
    return Method(replace(REGRESSION, steps=round(steps)), "regression")


METHODS: dict[str, Method] = {
    "regression": Method(REGRESSION),
    "DMD": Method(MATCHING, "regression"),
    "regression on, equal iterations": on(MATCHING.steps),
    "regression on, equal cost": on(
        MATCHING.steps * evaluations(MATCHING) / evaluations(REGRESSION)
    ),
    "regression, LoRA": Method(replace(REGRESSION, **REGRESSION_RATE), rank=RANK),  # type: ignore[arg-type]
    "DMD, LoRA": Method(replace(MATCHING, **MATCHING_RATES), "regression, LoRA", RANK),  # type: ignore[arg-type]
    # Without pairs: as many evaluations as pairs, regression and DMD take together (`costs`).
    "DMD2": Method(ADVERSARIAL),
    "latent consistency": Method(CONSISTENCY),
}


@dataclass(frozen=True)
class Sizes:
    """How much of everything; `QUICK` is for a test."""

    pairs: int = 6_000
    steps: int = 50  # of the teacher
    latents: int = 10_000  # of drawn pictures, where a method learns from data
    pictures: int = 3_200  # of each measurement
    training: Mapping[str, int] = field(default_factory=dict)  # what all methods' settings say else
    speed_batch: int = 64


QUICK = Sizes(
    32, steps=2, latents=64, pictures=64, training={"steps": 2, "batch": 4}, speed_batch=2
)


def settings_of(name: str, sizes: Sizes, seed: int = 0) -> Any:
    """A method's settings, with draws of its own in every seed."""
    number = 100 * seed + [*METHODS].index(name)
    return replace(METHODS[name].settings, **sizes.training, seed=number)  # type: ignore[arg-type]


def per_picture(sizes: Sizes, scale: float = SCALE) -> int:
    """Network evaluations for one of the teacher's pictures."""
    return samplers.evaluations(SAMPLER, sizes.steps) * (1 if scale == 1 else 2)


def costs(sizes: Sizes) -> dict[str, int]:
    """Network evaluations of the pairs, and of each training without its pairs and its start."""
    each = {name: settings_of(name, sizes) for name in METHODS}
    trainings = {name: some.steps * evaluations(some) for name, some in each.items()}
    return {"pairs": sizes.pairs * per_picture(sizes), **trainings}


def consistency(
    teacher: Guided, student: OneStepGenerator, settings: FitSettings, images: Images
) -> tuple[FitRun, Iterator]:
    """Latent consistency distillation (Luo et al. 2023), here for one scale of guidance.

    At the lowest level the target is what is there. Predicting v, a network answers nearly that
    by itself, so the model has no other boundary.
    """
    run, (low, high) = FitRun(student, settings), sigma_range(teacher)
    grid = karras_grid(sigma_min=low, sigma_max=high)

    def draw(rng: Generator) -> tuple:
        index = torch.randint(len(images.x), (settings.batch,), generator=rng)
        levels = neighbour_levels(settings.batch, grid, rng, skip=SKIP)
        return images.x[index], noise_like(images.x[index], rng), *levels, images.label[index]

    def target(x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        answer = run.average.denoiser(x, sigma, label)  # type: ignore[operator]
        return torch.where(expand(sigma, x) > low * (1 + 1e-5), answer, x)

    def loss(network: Any, *batch: Tensor) -> Tensor:
        pair = distillation_pair(teacher, *batch)
        return consistency_loss(network.denoiser, target, pair, batch[-1], pseudo_huber)

    return run, fit(run, draw, loss)


def keep(path: Path, value: Any) -> None:
    replace_file(path, lambda file: torch.save(value, file))


class Workshop:
    """Where all is made. `over` says, between two steps, that time is up: then it ends, status 3.

    A folder that belongs to another pipeline or other sizes is refused.
    """

    def __init__(self, model: Prompted, work: Path, sizes: Sizes, over: Callable[[], bool]) -> None:
        self.model = model.requires_grad_(False).eval().to(memory_format=torch.channels_last)
        self.work, self.sizes, self.over = work, sizes, over
        self.shape, self.classes = image_shape(model)
        self.teacher, self.levels = Guided(model, SCALE), model.ladder(sizes.steps)
        self.made_by = {
            "pipeline": fingerprint(model), "sampler": SAMPLER.__name__, "scale": SCALE,
            "sizes": asdict(replace(sizes, pictures=0)),  # their number may be raised later
        }  # fmt: skip
        path = work / "made-by.json"
        found = json.loads(path.read_text()) if path.exists() else self.made_by
        if found != self.made_by:
            raise ValueError(f"{work} was made by {found}, not {self.made_by}")
        write_json(path, self.made_by)

    def pause(self) -> None:
        """End here if time is up; all that is done is kept."""
        if self.over():
            raise SystemExit(3)

    def label(self, count: int) -> Tensor:
        return balanced_labels(count, self.classes)

    def noise(self, number: int) -> Tensor:
        return normal(self.sizes.pictures, self.shape, stream("evaluation", number))

    def walk(self, teacher: nn.Module, z: Tensor, label: Tensor) -> Tensor:
        return samplers.sample(teacher, z, label, sampler=SAMPLER, levels=self.levels)

    def sampled(self, folder: Path, scale: float, z: Tensor) -> Drawn:
        """Latents that the teacher makes of noise, under all prompts in turn; in chunks."""
        label, parts = self.label(len(z)), []
        teacher = self.model if scale == 1 else Guided(self.model, scale)
        for k, (some, under) in enumerate(zip(z.split(CHUNK), label.split(CHUNK), strict=True)):
            path = folder / f"{k:03d}.pt"
            if not path.exists():
                keep(path, self.walk(teacher, some, under))
                self.pause()
            parts.append(torch.load(path))
        return Drawn(torch.cat(parts), label)

    def pairs(self, seed: int) -> Pairs:
        z = normal(self.sizes.pairs, self.shape, stream("pairs", seed))
        return Pairs(z, *self.sampled(self.work / f"seed-{seed}/pairs", SCALE, z))

    def data(self, seed: int) -> Images:
        """Latents of drawn pictures with their prompts."""
        path = self.work / f"seed-{seed}/data.pt"
        if not path.exists():
            keep(path, self.encoded(self.drawn(100 + seed, self.sizes.latents)).x)
        latents = torch.load(path)
        return Images(latents, self.label(len(latents)), self.classes)

    def drawn(self, number: int, count: int | None = None) -> Drawn:
        """Pictures that no model made."""
        label = self.label(count or self.sizes.pictures)
        return drawn(self.model.prompts, label, stream("pictures", number))

    def of_teacher(self, scale: float, number: int) -> Drawn:
        """The teacher's pictures of one set of noise."""
        folder = self.work / "teacher" / f"scale-{scale:g}-noise-{number}"
        return self.decoded(self.sampled(folder, scale, self.noise(number)))

    def of_student(self, student: nn.Module, number: int) -> Drawn:
        """A student's pictures of one set of noise."""
        z, label = self.noise(number), self.label(self.sizes.pictures)
        return self.decoded(Drawn(samplers.one_step(student, z, label, batch=CHUNK), label))

    @torch.no_grad()
    def decoded(self, latents: Drawn) -> Drawn:
        parts = [self.model.around.pictures(some) for some in latents.x.split(CHUNK)]
        return latents._replace(x=torch.cat(parts))

    @torch.no_grad()
    def encoded(self, pictures: Drawn) -> Drawn:
        parts = [self.model.around.latents(some) for some in pictures.x.split(CHUNK)]
        return pictures._replace(x=torch.cat(parts))

    def file(self, name: str, seed: int) -> Path:
        name = name.replace(",", "").replace(" ", "-")
        return self.work / f"seed-{seed}" / f"{name}.safetensors"

    def student(self, name: str, seed: int, trained: bool = True) -> Any:
        """A student at its end, or before it is trained: the teacher's weights."""
        rank = METHODS[name].rank
        start = OneStepGenerator(LowRank(self.model, rank, seed=seed) if rank else self.model)
        return pretrained.load_denoiser(self.file(name, seed), start) if trained else start

    def begin(self, name: str, seed: int) -> tuple[Any, Iterator]:
        """A training at its first step: all that changes, and the loop."""
        method, settings = METHODS[name], settings_of(name, self.sizes, seed)
        start = self.student(method.start or name, seed, trained=bool(method.start))
        if not isinstance(settings, DistillSettings):
            student = deepcopy(start).requires_grad_(True)
            return consistency(self.teacher, student, settings, self.data(seed))
        critic, iteration = None, dmd.iteration
        if method.rank:
            critic = LowRank(self.model, method.rank, seed=seed)
        if isinstance(settings, Dmd2Settings):
            critic = Judge(deepcopy(self.model))
            iteration = settings.step(self.data(seed), self.shape, self.classes)
        pairs = self.pairs(seed) if settings.lambda_reg else None
        run = DistillationRun(self.teacher, settings, start, critic)
        return run, distill(run, self.shape, self.classes, pairs, iteration=iteration)

    def train(self, name: str, seed: int) -> dict:
        """Train a student to its end, from where it was stopped; returns what it took."""
        path = self.file(name, seed)
        kept = path.with_suffix(".ckpt")
        if path.exists():
            return pretrained.made_by(path)
        run, loop = self.begin(name, seed)
        before = 0.0
        if kept.exists():
            state = torch.load(kept)
            run.load_state_dict(state["run"])
            before = state["seconds"]
        started = time.process_time()
        for metric in loop:
            late, seconds = self.over(), before + time.process_time() - started
            if late or metric.step % 250 == 0 or metric.step == run.settings.steps:
                keep(kept, {"run": run.state_dict(), "seconds": seconds})
            if late:
                raise SystemExit(3)
        took = {"iterations": run.step, "evaluations": costs(self.sizes)[name],
                "seconds": round(torch.load(kept)["seconds"], 1),
                "fingerprint": fingerprint(run.average)}  # fmt: skip
        pretrained.save_denoiser(path, run.average, **took)
        kept.unlink()
        return took

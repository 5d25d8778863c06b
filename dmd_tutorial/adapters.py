"""Adapters: models that were trained in other terms, as denoisers D(x, sigma, label).

A diffusion model is told a time and ``x_t = alpha x + s noise``, and answers with one of four
quantities. Over alpha that is the book's ``x_noisy = x + sigma noise`` with sigma = s / alpha, and
each of the four gives away the clean sample. So an adapter is `Terms` (which alpha, which time a
level has) and the name of what is predicted.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dmd_tutorial import denoisers
from dmd_tutorial.checks import NO_CLASS, Condition, PerSample, Samples, check_sigma, expand, refuse
from dmd_tutorial.denoisers import Denoiser, arithmetic, inside
from dmd_tutorial.noise import SIGMA_MAX, SIGMA_MIN, Schedule

Prediction = Literal["noise", "x0", "v", "velocity"]


class Terms(NamedTuple):
    """In what a model was trained: functions of the noise level, and the levels it knows."""

    alpha: Callable[[PerSample], PerSample]  # what is left of x in x_t
    time: Callable[[PerSample], PerSample]  # what the network is told
    sigma_range: tuple[float, float]  # lowest and highest level


def discrete(alphas_cumprod: Float[Tensor, " steps"]) -> Terms:
    """Variance-preserving, in steps: those of DDPM, whose ``alpha_t^2`` is `alphas_cumprod[t]`.

    Between two steps time is interpolated in the logarithm of sigma, as `diffusers` does. Steps
    without any signal, whose level is infinite, are left out.
    """
    squared = alphas_cumprod.detach().double().cpu()
    levels = ((1 - squared) / squared)[squared > 0].sqrt()
    if len(levels) < 2 or levels[0] <= 0 or (levels.diff() <= 0).any():
        raise ValueError("alphas_cumprod must be below 1 and fall from step to step")

    def time(sigma: PerSample) -> PerSample:
        logs, level = levels.log().to(sigma.device, sigma.dtype), sigma.log()
        after = torch.searchsorted(logs, level).clamp(1, len(logs) - 1)
        low, high = logs[after - 1], logs[after]
        return after - 1 + ((level - low) / (high - low)).clamp(0, 1)

    return preserving((levels[0].item(), levels[-1].item()))._replace(time=time)


def continuous(
    schedule: Callable[[PerSample], Schedule], first: float = 1e-3, last: float = 1.0
) -> Terms:
    """A schedule, as `noise.linear_schedule`, whose sigma / alpha rises from `first` to `last`."""

    def level_at(t: Tensor) -> Tensor:
        alpha, sigma = schedule(t)
        return sigma / alpha

    def time(sigma: PerSample) -> PerSample:
        target = sigma.double()
        low, high = torch.full_like(target, first), torch.full_like(target, last)
        for _ in range(50):  # to the last bit of a float64
            middle = (low + high) / 2
            beyond = level_at(middle) > target
            low, high = torch.where(beyond, low, middle), torch.where(beyond, middle, high)
        return ((low + high) / 2).to(sigma)

    low, high = level_at(torch.tensor([first, last], dtype=torch.float64)).tolist()
    return Terms(lambda sigma: schedule(time(sigma))[0], time, (low, high))


def flow(scale: float = 1.0, sigma_range: tuple[float, float] = (SIGMA_MIN, SIGMA_MAX)) -> Terms:
    """Straight paths ``x_t = (1 - t) x + t noise``; the network is told ``scale * t``."""
    # time 1 is of no finite level: the range ends before, for level 80 at t = 0.988
    alpha, time = lambda sigma: 1 / (1 + sigma), lambda sigma: scale * sigma / (1 + sigma)
    return Terms(alpha, time, sigma_range)


def preserving(sigma_range: tuple[float, float] = (SIGMA_MIN, SIGMA_MAX)) -> Terms:
    """Variance-preserving at any level; the network is told ``ln(sigma) / 4``, as EDM's."""
    return Terms(lambda sigma: (1 + sigma**2).rsqrt(), lambda sigma: sigma.log() / 4, sigma_range)


def exploding(sigma_range: tuple[float, float] = (SIGMA_MIN, SIGMA_MAX)) -> Terms:
    """The book's own form, ``x + sigma noise``; the network is told sigma."""
    return Terms(torch.ones_like, lambda sigma: sigma, sigma_range)


def denoised_from(
    prediction: str, answer: Samples, x: Samples, sigma: PerSample, alpha: PerSample | None = None
) -> Samples:
    """The clean sample behind ``x = x_t / alpha`` that a network's answer implies.

    It says the noise, the clean sample x0, ``v = alpha noise - s x0`` (Salimans and Ho 2022; alpha
    is variance-preserving), or the velocity ``noise - x0`` (Lipman et al. 2023).
    """
    match prediction:
        case "noise":
            return denoisers.denoised_from_noise(x, answer, sigma)
        case "x0":
            return answer
        case "v":
            return denoisers.denoised_from_v(x, answer, sigma, alpha)
    level = expand(sigma, x)  # the answer is a velocity
    return (x - level * answer) / (1 + level)


class Adapted(nn.Module):
    """A network that was trained in other terms, as a denoiser.

    It is called as ``network(x_t, time, label)``, x_t in the type of its weights. Levels outside of
    the range of its terms are refused: nobody knows what it would answer there.
    """

    precision: torch.dtype | None = None  # of the network's inside; None: x's, or autocast's

    def __init__(self, network: nn.Module, terms: Terms, prediction: Prediction) -> None:
        super().__init__()
        if prediction not in get_args(Prediction):
            raise ValueError(f"prediction is one of {get_args(Prediction)}, not {prediction!r}")
        self.network, self.terms, self.prediction = network, terms, prediction
        self.sigma_range = terms.sigma_range

    def ask(self, x_t: Samples, time: PerSample, label: Condition | None) -> Samples:
        return self.network(x_t, time, label)

    def forward(self, x: Samples, sigma: PerSample, label: Condition | None = None) -> Samples:
        """Denoise, for levels of the range; the type of x comes back."""
        check_sigma(x, sigma, above_zero=True)
        low, high = self.terms.sigma_range
        least, most = sigma.aminmax()

        def error() -> ValueError:
            asked = f"{least.item():g} to {most.item():g}"
            return ValueError(f"levels {asked} are asked for, the model knows {low:g} to {high:g}")

        refuse((least < low * (1 - 1e-5)) | (most > high * (1 + 1e-5)), error)  # but for rounding
        own = x.to(arithmetic(self.network, x))
        level = sigma.to(own).clamp(low, high)
        alpha, time = self.terms.alpha(level), self.terms.time(level)
        x_t = (expand(alpha, x) * own).to(next(self.network.parameters(), x).dtype)
        with inside(x, self.precision):
            answer = self.ask(x_t, time, label)
        return denoised_from(self.prediction, answer.to(own), own, level, alpha).to(x.dtype)


class FromDiffusers(Adapted):
    """A model of `diffusers`, with the scheduler that it was trained with.

    A label goes where the model takes one: ``encoder_hidden_states`` (batch, tokens, width) where
    it has cross-attention, else ``class_labels``. `null` stands for no label, and for `NO_CLASS`:
    the last class, or a text's embedding (tokens, width).
    """

    def __init__(self, model: Any, scheduler: Any, null: int | Tensor | None = None) -> None:
        config, trained = model.config, scheduler.config
        if "UNet2D" not in type(model).__name__:
            raise ValueError(f"{type(model).__name__} is no U-Net of images: use Adapted")
        steps = trained.get("timestep_type", "discrete") == "discrete"
        if hasattr(scheduler, "alphas_cumprod") and steps and not trained.get("use_flow_sigmas"):
            terms, prediction = discrete(scheduler.alphas_cumprod), trained.prediction_type
        elif "FlowMatch" in type(scheduler).__name__:
            terms, prediction = flow(trained.num_train_timesteps), "flow_prediction"
        else:
            name = type(scheduler).__name__
            raise ValueError(f"{name} has no steps of DDPM and no straight paths: use Adapted")
        super().__init__(model, terms, PREDICTIONS[prediction])
        self.size, self.channels, self.null = config.sample_size, config.in_channels, null
        self.takes_text = "CrossAttn" in str(config.get("down_block_types"))
        self.classes = 0 if self.takes_text else config.get("num_class_embeds") or 0
        if isinstance(null, int):
            if null != self.classes - 1:
                raise ValueError(f"null is {null}, it must be the last of {self.classes} classes")
            self.classes = null

    def ask(self, x_t: Samples, time: PerSample, label: Condition | None) -> Samples:
        """The model's answer, without the variance that some have learnt beside it."""
        label = self._told(len(x_t), label, x_t.device)
        name = "encoder_hidden_states" if self.takes_text else "class_labels"
        given = {} if label is None else {name: label.to(x_t) if self.takes_text else label}
        return self.network(x_t, time, **given).sample[:, : self.channels]

    def _told(self, count: int, label: Condition | None, device: torch.device) -> Condition | None:
        if self.null is None:
            if label is not None and not self.takes_text and (label == NO_CLASS).any():
                raise ValueError("the model has no class that stands for none: give null")
            return label
        null = torch.as_tensor(self.null, device=device)
        if label is None:
            return null.expand(count, *null.shape)
        return label if self.takes_text else torch.where(label == NO_CLASS, null, label)

    def feature_layers(self) -> list[tuple[nn.Module, int]]:
        model: Any = self.network
        return [(model.mid_block, model.config.block_out_channels[-1])]


PREDICTIONS: dict[str, Prediction] = {
    "epsilon": "noise", "sample": "x0", "v_prediction": "v", "flow_prediction": "velocity",
}  # fmt: skip


class FromFunction(nn.Module):
    """A function as a teacher, known by its name and the tensors that it holds or is given."""

    def __init__(
        self, function: Denoiser, sigma_range: tuple[float, float] = (SIGMA_MIN, SIGMA_MAX),
        **tensors: Tensor,
    ) -> None:  # fmt: skip
        super().__init__()
        self.function, self.sigma_range = function, sigma_range
        self.classes = getattr(function, "classes", 0)
        name = getattr(function, "__qualname__", type(function).__qualname__)
        held = {n: value for n, value in vars(function).items() if isinstance(value, Tensor)}
        identity = held | tensors | {"name": torch.tensor(list(name.encode()))}
        for known_as, tensor in identity.items():
            self.register_buffer(f"of_{known_as}", tensor)

    def forward(self, x: Samples, sigma: PerSample, label: Condition | None = None) -> Samples:
        return self.function(x, sigma, label)


class Guided(nn.Module):
    """Classifier-free guidance: ``D(null) + scale (D(label) - D(null))``, scale 1 being none.

    `null` is what stands for no label: `NO_CLASS`, a class, or a text's embedding. Both answers
    come from one call, of twice the batch. A student and its critic start from what is inside,
    unguided. Source: Ho and Salimans 2022, Eq. 6 (w = scale - 1).
    """

    def __init__(self, denoiser: Denoiser, scale: float, null: int | Tensor = NO_CLASS) -> None:
        super().__init__()
        self.denoiser, self.scale, self.null = denoiser, scale, null

    def forward(self, x: Samples, sigma: PerSample, label: Condition) -> Samples:
        if label.is_floating_point() and not isinstance(self.null, Tensor):
            raise ValueError("a text is guided away from another: null must be its embedding")
        null = torch.as_tensor(self.null).to(label).expand_as(label)
        both = self.denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), torch.cat([null, label]))
        without, under = both.chunk(2)
        return without + self.scale * (under - without)

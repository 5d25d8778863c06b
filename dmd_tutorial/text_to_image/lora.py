"""LoRA: teacher, critic and generator in one set of frozen weights (Hu et al. 2022).

The teacher is the bare denoiser; critic, generator and its average are adapters of low rank on it.
Two more U-Nets with gradients and optimisers become a few per cent of one: the way around the
paper's limit, the memory of three networks.
"""

import copy
from collections.abc import Callable, Collection, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

from dmd_tutorial.checks import Condition, PerSample, Samples
from dmd_tutorial.denoisers import inside, says
from dmd_tutorial.generators import OneStepGenerator
from dmd_tutorial.training import DistillationRun, DistillSettings, unguided

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # as usual where a style is learnt
BLOCKS = (  # every matrix and convolution of a block: a critic's whole answer must move
    *ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv",
)  # fmt: skip


class LowRank(nn.Module):
    """A denoiser's own weights, frozen and shared, with an adapter that is trained.

    It starts as that denoiser exactly: of the two factors one is 0. Parameters and state are the
    adapter's alone, and a deep copy is one more adapter on the same weights. It is a view of the
    U-Net with modules of its own, so nothing is switched: whichever is called answers, in any
    order. `peft`'s own switch, `set_adapter`, freezes the adapter that it leaves, and a backward
    pass that comes later then skips it in silence.
    """

    precision: torch.dtype | None = None  # of the inside: see `denoisers.inside`
    network: Any  # the view; no registered part, for the weights in it are the denoiser's

    def __init__(
        self, denoiser: nn.Module, rank: int, layers: Sequence[str] = BLOCKS, seed: int = 0
    ) -> None:
        super().__init__()
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise RuntimeError("LoRA needs peft: pip install 'dmd-tutorial[text]'") from error
        _unet(denoiser)
        view = copy.deepcopy(denoiser.requires_grad_(False), _kept(denoiser)).eval()
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(layers))  # scale 1
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(seed)
            _unet(view).add_adapter(config)
        adapter = {name: p for name, p in view.named_parameters() if p.requires_grad}
        for parameter in adapter.values():  # on 16-bit weights, too, small steps must not be lost
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        self.adapter = nn.ParameterDict({n.replace(".", "/"): p for n, p in adapter.items()})
        self.__dict__["network"] = view

    def forward(self, x: Samples, sigma: PerSample, label: Condition | None = None) -> Samples:
        with inside(x, self.precision):
            return self.network(x, sigma, label)

    def merged(self) -> Any:
        """The same as a denoiser of its own: its U-Net is a plain one again, to save or to run."""
        whole = copy.deepcopy(self.network)
        unet = _unet(whole)
        unet.fuse_lora()
        unet.unload_lora()
        return whole

    def _apply(self, fn: Callable, recurse: bool = True) -> "LowRank":
        """Move or cast: the shared weights go along."""
        self.network._apply(fn)
        return super()._apply(fn, recurse)

    def __deepcopy__(self, memo: dict) -> "LowRank":
        memo |= _kept(self.network, {id(p) for p in self.parameters()})
        memo[id(self)] = twin = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin


def _kept(model: nn.Module, but: Collection[int] = ()) -> dict:
    """A memo with which a deep copy keeps a model's own numbers, but for those of these ids."""
    return {id(t): t for t in chain(model.parameters(), model.buffers()) if id(t) not in but}


def _unet(denoiser: nn.Module) -> Any:
    """The model of diffusers inside of a denoiser."""
    if (add := says(denoiser, "add_adapter")) is None:
        raise ValueError(f"{type(denoiser).__name__} has no model of diffusers inside for LoRA")
    return add.__self__


def lora_run(
    teacher: nn.Module, settings: DistillSettings, rank: int, layers: Sequence[str] = BLOCKS,
    start: nn.Module | None = None,
) -> DistillationRun:  # fmt: skip
    """A distillation whose student, average and critic are adapters on the teacher's weights.

    `start` is an earlier run's student, such as the regression's. To hold the weights in 16 bits,
    cast the teacher before.
    """
    fresh = LowRank(unguided(teacher), rank, layers, settings.seed)
    return DistillationRun(teacher, settings, start or OneStepGenerator(fresh), fresh)

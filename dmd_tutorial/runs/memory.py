"""How much memory a training needs, before it starts, and what to change when it does not fit."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from dmd_tutorial.denoisers import EDMDenoiser, device_of, image_shape, sigma_range
from dmd_tutorial.runs.compute import Compute, Precision, Processes, prepare
from dmd_tutorial.text_to_image.lora import LowRank
from dmd_tutorial.training import DistillSettings, unguided

GIB = 2**30
# VGG-16 to its last of five layers, at 224 x 224: 13.6 million values of convolutions and as many
# behind the rectifiers, kept for the generated image alone, in fp32.
LPIPS_PER_IMAGE = 2 * 13_600_000 * 4


class Estimate(dict[str, int]):
    """Memory of a training, in bytes: what it consists of, by name."""

    @property
    def total(self) -> int:
        return sum(self.values())

    def __str__(self) -> str:
        rows = {**self, "together": self.total}
        return "\n".join(f"{name:<34}{count / GIB:8.2f} GiB" for name, count in rows.items())


def distillation_memory(
    teacher: nn.Module, batch: int, batch_pairs: int, compute: Compute, *, lpips: bool = False,
    lora: int = 0,
) -> Estimate:  # fmt: skip
    """What a distillation needs; with `lpips` the anchor's distance is VGG's, at 224 pixels.

    Weights, gradients and AdamW's two averages are counted. Activations are measured: the networks
    run on torch's "meta" device, which computes shapes and no numbers, while what they keep for the
    backward pass is added up. A GPU's allocator and libraries need some more, a tenth or so.
    """
    frozen = copy.deepcopy(teacher).to("meta")
    prepare(frozen, replace(compute, compile=False), frozen=True)
    weights = sum(p.numel() * p.element_size() for p in frozen.parameters())
    student = LowRank(unguided(teacher), lora) if lora else teacher
    trained = [*_trained("generator", student), *_trained("critic", student)[:2]]
    # the critic's part, of fewer images, comes after the generator's is freed
    items = [("teacher: weights", weights), *trained,
             _activations(teacher, batch + batch_pairs, compute)]  # fmt: skip
    if lpips:
        pairs = max(1, batch_pairs // compute.accumulation)
        items.append(("LPIPS: weights and activations", 4 * 14_700_000 + LPIPS_PER_IMAGE * pairs))
    return Estimate(items)


def largest(
    teacher: nn.Module, stages: list[DistillSettings | None], compute: Compute, lora: int = 0
) -> Estimate:
    """What that stage of a distillation needs which needs most."""
    estimates = []
    for stage in filter(None, stages):
        batches = stage.batch * stage.matching, stage.beside
        lpips = stage.distance == "lpips" and stage.lambda_reg > 0
        estimates.append(distillation_memory(teacher, *batches, compute, lpips=lpips, lora=lora))
    return max(estimates, key=lambda estimate: estimate.total)


def teacher_memory(teacher: nn.Module, batch: int, compute: Compute) -> Estimate:
    """What training a teacher needs, by the same count."""
    return Estimate([*_trained("teacher", teacher), _activations(teacher, batch, compute)])


def _trained(name: str, network: nn.Module) -> list[tuple[str, int]]:
    count = sum(p.numel() for p in network.parameters())
    parts = {"weights, gradients": 8, "optimiser": 8, "average": 4}  # bytes, in fp32
    return [(f"{name}: {part}", size * count) for part, size in parts.items()]


def _activations(model: nn.Module, images: int, compute: Compute) -> tuple[str, int]:
    """What a forward pass of one part of a batch keeps for the backward pass."""
    denoiser: Any = copy.deepcopy(getattr(model, "denoiser", model))
    prepare(denoiser.requires_grad_(True).train(), replace(compute, compile=False))
    shape, classes = image_shape(denoiser)
    ours = isinstance(denoiser, EDMDenoiser)
    if ours:  # without autocast on "meta", all is in its precision
        denoiser.network.to("meta", denoiser.precision or torch.float32)

    def kept(count: int) -> int:
        if ours:
            x = torch.empty(count, *shape, device="meta", dtype=denoiser.precision)
            return _kept(denoiser.network, (x, x.new_empty(count), None))
        # a denoiser that may look at its numbers is run with some, where it is
        x = torch.zeros(count, *shape, device=device_of(denoiser))
        label = torch.zeros(count, dtype=torch.int64, device=x.device) if classes else None
        return _kept(denoiser, (x, x.new_full((count,), sigma_range(denoiser)[1]), label))

    per_image = kept(2) - kept(1)  # what does not grow, such as cast weights, falls out
    return "activations", per_image * max(1, images // compute.accumulation)


def _kept(network: nn.Module, inputs: tuple) -> int:
    """Bytes kept of a call, without the weights; a storage that is shared counts once."""
    own = {id(parameter) for parameter in network.parameters()}
    kept: dict[int, Tensor] = {}  # alive, so that ids are unique

    def pack(tensor: Tensor) -> Tensor:
        base = tensor._base if tensor._base is not None else tensor
        if id(base) not in own:
            kept[id(base)] = base
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(*inputs)
    return sum(base.numel() * base.element_size() for base in kept.values())


def available(device: torch.device | str) -> int:
    """Free memory where networks will run, in bytes."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def advice(
    estimate_with: Callable[[Compute], Estimate], compute: Compute, free: int,
    low: Precision = "bf16",
) -> list[str]:  # fmt: skip
    """What makes a training fit into `free` bytes, and what each change saves, cheapest first."""
    now = estimate_with(compute).total
    if now <= free:
        return []
    parts = compute.accumulation
    changes: list[tuple[str, Any]] = [
        ("frozen", low), ("accumulation", 2 * parts), ("accumulation", 8 * parts),
        ("mixed_precision", low), ("activation_checkpointing", True),
    ]  # fmt: skip
    sentences = []
    for name, value in changes:
        option = f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
        try:
            total = estimate_with(replace(compute, **{name: value})).total
        except ValueError:
            continue  # this network cannot
        if total < 0.99 * now:
            saved, fits = (now - total) / GIB, "fits" if total <= free else "does not fit yet"
            sentences.append(f"{option} saves {saved:.2f} GiB: {total / GIB:.2f} GiB, {fits}.")
    return sentences


def say(estimate_with: Callable[[Compute], Estimate], compute: Compute, device: str) -> None:
    """Before a run: what it needs, and what to change if that is more than there is."""
    if not Processes().first:
        return
    free = available(device)
    print(f"Memory, estimated:\n{estimate_with(compute)}")
    old = device.startswith("cuda") and not torch.cuda.is_bf16_supported(including_emulation=False)
    if sentences := advice(estimate_with, compute, free, "fp16" if old else "bf16"):
        print(f"There are {free / GIB:.2f} GiB. It may not fit; what helps:")
        print("\n".join(f"  {sentence}" for sentence in sentences))

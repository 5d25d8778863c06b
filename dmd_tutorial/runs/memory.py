"""How much memory a training needs, before it starts, and what to change when it does not fit."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmd_tutorial.denoisers import image_shape
from dmd_tutorial.runs.compute import PRECISIONS, Compute, Precision, prepare

GIB = 2**30
# VGG-16 to its last of five layers, at 224 x 224: 13.6 million values of convolutions and as many
# behind the rectifiers, kept for the generated image alone, in fp32.
LPIPS_PER_IMAGE = 2 * 13_600_000 * 4


@dataclass(frozen=True)
class Estimate:
    """Memory of a training, in bytes: what it consists of, by name."""

    items: tuple[tuple[str, int], ...]

    @property
    def total(self) -> int:
        """All of it, in bytes."""
        return sum(count for _, count in self.items)

    def __str__(self) -> str:
        rows = [*self.items, ("together", self.total)]
        return "\n".join(f"{name:<34}{count / GIB:8.2f} GiB" for name, count in rows)


def distillation_memory(
    teacher: nn.Module, batch: int, batch_pairs: int, compute: Compute, *, lpips: bool = False
) -> Estimate:
    """What a distillation needs; with `lpips` the anchor's distance is VGG's, at 224 pixels.

    Weights, gradients and AdamW's two averages are counted. Activations are measured: the networks
    run once on torch's "meta" device, which computes shapes and no numbers, while what they keep
    for the backward pass is added up. The allocator and the libraries of a GPU need some more, a
    tenth or so.
    """
    parameters = sum(p.numel() for p in teacher.parameters())
    frozen = 4 if PRECISIONS[compute.frozen] is None else 2
    # the critic's part, of fewer images, comes after the generator's is freed
    images = max(1, (batch + batch_pairs) // compute.accumulation)
    items = [
        ("teacher: weights", frozen * parameters),
        ("generator: weights, gradients", 8 * parameters),
        ("generator: optimiser", 8 * parameters),
        ("generator: average", 4 * parameters),
        ("critic: weights, gradients", 8 * parameters),
        ("critic: optimiser", 8 * parameters),
        ("activations", _saved_per_image(teacher, compute) * images),
    ]
    if lpips:
        pairs = max(1, batch_pairs // compute.accumulation)
        items.append(("LPIPS: weights and activations", 4 * 14_700_000 + LPIPS_PER_IMAGE * pairs))
    return Estimate(tuple(items))


def teacher_memory(teacher: nn.Module, batch: int, compute: Compute) -> Estimate:
    """What training a teacher needs, by the same count."""
    parameters = sum(p.numel() for p in teacher.parameters())
    images = max(1, batch // compute.accumulation)
    return Estimate((
        ("teacher: weights, gradients", 8 * parameters),
        ("teacher: optimiser", 8 * parameters),
        ("teacher: average", 4 * parameters),
        ("activations", _saved_per_image(teacher, compute) * images),
    ))  # fmt: skip


def _saved_per_image(model: nn.Module, compute: Compute) -> int:
    """Bytes that one forward pass of one image keeps for the backward pass."""
    shape, _ = image_shape(model)
    denoiser: Any = copy.deepcopy(getattr(model, "denoiser", model)).to("meta")
    prepare(denoiser.requires_grad_(True).train(), replace(compute, compile=False))
    # on "meta" there is no autocast: the whole is run in the lower precision instead
    dtype = denoiser.precision or torch.float32
    network = denoiser.network.to(dtype)

    def run(count: int) -> int:
        x = torch.empty(count, *shape, device="meta", dtype=dtype)
        return saved_bytes(lambda: network(x, x.new_empty(count), None), network)

    return run(2) - run(1)  # what does not grow with the batch, such as cast weights, falls out


def saved_bytes(forward: Callable[[], Tensor], network: nn.Module) -> int:
    """Bytes that a computation keeps for its backward pass, without the network's own weights.

    A storage that several tensors share counts once.
    """
    own = {id(parameter) for parameter in network.parameters()}
    kept: dict[int, Tensor] = {}  # alive, so that ids are unique

    def pack(tensor: Tensor) -> Tensor:
        base = tensor._base if tensor._base is not None else tensor
        if id(base) not in own:
            kept[id(base)] = base
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(base.numel() * base.element_size() for base in kept.values())


def available(device: torch.device | str) -> int:
    """Free memory where networks will run, in bytes."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    table = Path("/proc/meminfo")
    for line in table.read_text().splitlines() if table.exists() else []:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 2**63 - 1  # unknown: nothing is said


def advice(
    estimate_with: Callable[[Compute], Estimate],
    compute: Compute,
    free: int,
    low: Precision = "bf16",
) -> list[str]:
    """What to change when a training does not fit into `free` bytes, with what each change saves.

    The cheapest change comes first; none if it fits. `low` is the low precision that the device
    has: fp16 where it is too old for bf16.
    """
    now = estimate_with(compute).total
    if now <= free:
        return []
    two, eight = 2 * compute.accumulation, 8 * compute.accumulation
    changes = {
        f"--frozen {low}": replace(compute, frozen=low),
        f"--accumulation {two}": replace(compute, accumulation=two),
        f"--accumulation {eight}": replace(compute, accumulation=eight),
        f"--mixed-precision {low}": replace(compute, mixed_precision=low),
        "--activation-checkpointing": replace(compute, activation_checkpointing=True),
    }
    sentences = []
    for option, changed in changes.items():
        total = estimate_with(changed).total
        if total < 0.99 * now:
            saved, fits = (now - total) / GIB, "fits" if total <= free else "does not fit yet"
            sentences.append(f"{option} saves {saved:.2f} GiB: {total / GIB:.2f} GiB, {fits}.")
    return sentences


def say(estimate_with: Callable[[Compute], Estimate], compute: Compute, device: str) -> None:
    """Before a run: what it needs, and what to change if that is more than there is."""
    free = available(device)
    print(f"Memory, estimated:\n{estimate_with(compute)}")
    low: Precision = "bf16"
    if device.startswith("cuda") and not torch.cuda.is_bf16_supported(including_emulation=False):
        low = "fp16"
    sentences = advice(estimate_with, compute, free, low)
    if sentences:
        print(f"There are {free / GIB:.2f} GiB. It may not fit; what helps:")
        print("\n".join(f"  {sentence}" for sentence in sentences))

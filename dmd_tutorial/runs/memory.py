"""How much memory a training needs, before it starts, and what to change when it does not fit."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmd_tutorial.runs.compute import PRECISIONS, Compute, prepare
from dmd_tutorial.denoisers import OneStepGenerator, image_shape

GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """Memory of a training, in bytes.

    Attributes:
        items: What it consists of, (name, bytes): weights, gradients and optimiser of each network,
            and activations.
    """

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
    """What a distillation needs.

    Weights, gradients and AdamW's two averages are counted. Activations are measured: the networks
    run once on torch's "meta" device, which computes shapes and no numbers, while what they keep
    for the backward pass is added up.

    Args:
        teacher: The teacher; generator and critic have its shape.
        batch: Samples per iteration for the matching loss.
        batch_pairs: Pairs per iteration.
        compute: Precision, parts and the like.
        lpips: Whether the anchor's distance is LPIPS (VGG at 224 pixels).

    Returns:
        The estimate. The allocator and the libraries of a GPU need some more, a tenth or so.
    """
    parameters = sum(p.numel() for p in teacher.parameters())
    frozen = 4 if PRECISIONS[compute.frozen] is None else 2
    images = (batch + batch_pairs) // compute.parts
    judged = max(1, batch // compute.parts)
    per_image = _saved_per_image(teacher, compute)
    items = [
        ("teacher: weights", frozen * parameters),
        ("generator: weights, gradients", 8 * parameters),
        ("generator: optimiser", 8 * parameters),
        ("generator: average", 4 * parameters),
        ("critic: weights, gradients", 8 * parameters),
        ("critic: optimiser", 8 * parameters),
        # the critic's part comes after the generator's is freed: the larger one counts
        ("activations", per_image * max(images, judged)),
    ]
    if lpips:
        pairs = max(1, batch_pairs // compute.parts)
        items.append(("LPIPS: weights and activations", 4 * 14_700_000 + LPIPS_PER_IMAGE * pairs))
    return Estimate(tuple(items))


def teacher_memory(teacher: nn.Module, batch: int, compute: Compute) -> Estimate:
    """What training a teacher needs.

    Args:
        teacher: The network.
        batch: Images per step.
        compute: Precision, parts and the like.

    Returns:
        The estimate.
    """
    parameters = sum(p.numel() for p in teacher.parameters())
    images = max(1, batch // compute.parts)
    return Estimate((
        ("teacher: weights, gradients", 8 * parameters),
        ("teacher: optimiser", 8 * parameters),
        ("teacher: average", 4 * parameters),
        ("activations", _saved_per_image(teacher, compute) * images),
    ))  # fmt: skip


# VGG-16 to its last of five layers, at 224 x 224: 13.6 million values of convolutions and as many
# behind the rectifiers, kept for the generated image alone, in fp32.
LPIPS_PER_IMAGE = 2 * 13_600_000 * 4


def _saved_per_image(teacher: nn.Module, compute: Compute) -> int:
    """Bytes that one forward pass of one image keeps for the backward pass."""
    shape, _ = image_shape(teacher)
    network = _on_meta(teacher)
    prepare(network.requires_grad_(True).train(), compute)

    def run(count: int) -> int:
        x = torch.empty(count, *shape, device="meta")
        return saved_bytes(lambda: _undecided(network, x), network)

    return run(2) - run(1)  # what does not grow with the batch, such as cast weights, falls out


def _on_meta(teacher: nn.Module) -> Any:
    denoiser = teacher.denoiser if isinstance(teacher, OneStepGenerator) else teacher
    return copy.deepcopy(denoiser).to("meta")


def _undecided(network: Any, x: Tensor) -> Tensor:
    """The raw network inside a denoiser, without the checks, which need numbers."""
    inner = network.model if hasattr(network, "model") else network.network
    label = torch.zeros(len(x), dtype=torch.int64, device="meta") if network.classes else None
    if hasattr(network, "model") and label is not None:
        label = torch.empty(len(x), network.classes, device="meta")
    c_noise = torch.empty(len(x), device="meta")
    dtype = network.precision
    # on "meta" there is no autocast: the whole is run in the lower precision instead
    if dtype is not None:
        inner, x, c_noise = inner.to(dtype), x.to(dtype), c_noise.to(dtype)
        label = label.to(dtype) if label is not None and label.is_floating_point() else label
    return inner(x, c_noise, label)


def saved_bytes(forward: Callable[[], Tensor], network: nn.Module) -> int:
    """Bytes that a computation keeps for its backward pass, without the network's own weights.

    Args:
        forward: The computation.
        network: Its parameters are not counted.

    Returns:
        Bytes; a storage that several tensors share counts once.
    """
    own = {id(parameter) for parameter in network.parameters()}
    kept: dict[int, tuple[Tensor, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        base = tensor._base if tensor._base is not None else tensor
        if id(base) not in own:
            kept[id(base)] = (
                base,
                base.numel() * base.element_size(),
            )  # kept alive: ids are unique
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(count for _, count in kept.values())


def available(device: torch.device | str) -> int:
    """Free memory where networks will run.

    Args:
        device: A GPU, or the CPU.

    Returns:
        Bytes.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text().splitlines() if _linux() else []:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 2**63 - 1  # unknown: nothing is said


def _linux() -> bool:
    return Path("/proc/meminfo").exists()


def advice(
    estimate_with: Callable[[Compute], Estimate], compute: Compute, free: int, low: str = "bf16"
) -> list[str]:
    """What to change when a training does not fit, with what each change saves.

    Args:
        estimate_with: Gives the estimate for other settings of `Compute`.
        compute: The settings as they are.
        free: Memory that there is, in bytes.
        low: The low precision that the device has: fp16 where it is too old for bf16.

    Returns:
        One sentence for each change that helps, the cheapest first; none if it fits.
    """
    now = estimate_with(compute).total
    if now <= free:
        return []
    changes = {
        f"--frozen {low}": replace(compute, frozen=low),
        f"--parts {2 * compute.parts}": replace(compute, parts=2 * compute.parts),
        f"--parts {8 * compute.parts}": replace(compute, parts=8 * compute.parts),
        f"--precision {low}": replace(compute, precision=low),
        "--recompute": replace(compute, recompute=True),
    }
    sentences = []
    for option, changed in changes.items():
        total = estimate_with(changed).total
        if total < 0.99 * now:
            fits = "fits" if total <= free else "does not fit yet"
            sentences.append(
                f"{option} saves {(now - total) / GIB:.2f} GiB: {total / GIB:.2f} GiB, {fits}."
            )
    return sentences

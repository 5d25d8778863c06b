"""How a training step is computed on the hardware at hand: precision, memory, several processes.

Nothing here changes what is optimised. A step cut into parts, spread over processes, or with its
activations computed twice has the gradients of the plain step up to rounding; low precision adds
rounding inside the networks, and only there.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from dmd_tutorial import dmd
from dmd_tutorial.checks import Checked, Must, check_finite, refused, step_unless_refused
from dmd_tutorial.training import rebuilt

Precision = Literal["fp32", "bf16", "fp16"]
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
Tensors = TypeVar("Tensors", bound=tuple)
Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Compute(Checked):
    """What the hardware asks for. The defaults suit a CPU and small networks."""

    # Inside of the networks in training: fp32, bf16 (Ampere and newer), or fp16 (older cards such
    # as the T4; the loss is scaled so that gradients do not vanish). Weights, optimisers, averages
    # and preconditioning stay in fp32.
    mixed_precision: Precision = "fp32"
    frozen: Precision = "fp32"  # The same for the teacher, whose matrices are stored in it, too.
    # Gradient accumulation: equal parts (micro-batches) of a step's batch, one after the other;
    # the gradients are the same, the memory of activations is divided.
    accumulation: Annotated[int, Must("1 part or more", lambda n: n >= 1)] = 1
    # Compute the activations inside each block again in the backward pass instead of keeping them:
    # about a third more time, several times less memory.
    activation_checkpointing: bool = False
    channels_last: bool = True  # Keep a pixel's channels together in memory: faster convolutions.
    # Compile the networks with torch.compile: minutes at the start, faster steps on a GPU; it does
    # not pay on a CPU.
    compile: bool = False
    # Keep images and pairs, and draw all noise, where the networks are: nothing is copied to a GPU
    # in a step. Its random numbers are others than a CPU's, which are the same everywhere.
    on_device: bool = False


def prepare(denoiser: Network, compute: Compute, frozen: bool = False) -> Network:
    """Make a denoiser compute as asked, in place, or refuse what it cannot do.

    A part with the attribute `precision`, such as an `EDMDenoiser`, computes its inside in that
    type; a block with `recompute` computes its activations again. A frozen part's matrices take the
    type, too. Vectors and buffers (norms, frequencies of the noise embedding) are few: they do not.
    """
    option = "frozen" if frozen else "mixed_precision"
    dtype = PRECISIONS[low := getattr(compute, option)]
    again = compute.activation_checkpointing and not frozen
    parts = _parts(denoiser, "precision", dtype and f"{option} {low!r}")
    blocks = _parts(denoiser, "recompute", again and "activation_checkpointing True")
    for part in parts:
        part.precision = dtype
        for parameter in part.parameters() if frozen and dtype else ():
            if parameter.ndim > 1:
                parameter.data = parameter.data.to(dtype)
    for block in blocks:
        block.recompute = again
    layout = torch.channels_last if compute.channels_last else torch.contiguous_format
    denoiser.to(memory_format=layout)
    if compute.compile:
        denoiser.compile()
    return denoiser


def _parts(denoiser: nn.Module, attribute: str, asked: Any) -> list[Any]:
    """The parts of a denoiser with an attribute; for what is asked there must be one."""
    parts = [part for part in denoiser.modules() if hasattr(part, attribute)]
    if asked and not parts:
        name = type(getattr(denoiser, "denoiser", denoiser)).__name__
        lacks = f"no part of {name} has the attribute `{attribute}`"
        raise ValueError(f"{lacks}: {asked} cannot be applied to it")
    return parts


class Processes:
    """The processes that share a run: one, or those that `accelerate launch` has started.

    `rank` counts from 0, and the `first` process writes files and speaks; `device` is where this
    process's networks go, None where there is one process and it is free.
    """

    def __init__(self) -> None:
        self.rank, self.count = 0, 1
        self.device: torch.device | None = None
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started > 1:
            from accelerate import PartialState

            asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes")
            long = timedelta(hours=6)  # the others wait while the first reads images
            state = PartialState(cpu=asked or not torch.cuda.is_available(), timeout=long)
            self.rank, self.count = state.process_index, state.num_processes
            self.device = state.device
        if self.count != started:  # each would do the whole work and write the same files
            raise RuntimeError(f"{started} processes were started, {self.count} found each other")
        self.first = self.rank == 0

    def wait(self) -> None:
        """Go on when every process has come here."""
        if self.count > 1:
            distributed.barrier()

    def any(self, here: bool) -> bool:
        """Whether something holds in at least one process; every process must ask."""
        flag = torch.tensor(float(here), device=self.device)
        if self.count > 1:
            distributed.all_reduce(flag)
        return bool(flag > 0)

    def mine(self, count: int) -> Tensor:
        """Which of `count` things this process does: every `self.count`-th, from its rank on."""
        return torch.arange(self.rank, count, self.count)

    def gather(self, x: Tensor, count: int) -> Tensor:
        """Put together, in every process and on the CPU, what each made of what is `mine`."""
        if self.count == 1:
            return x.cpu()
        whole = torch.zeros(count, *x.shape[1:], dtype=x.dtype, device=self.device)
        whole[self.rank :: self.count] = x.to(whole)
        distributed.all_reduce(whole)
        return whole.cpu()

    def mean_(self, tensors: list[Tensor]) -> None:
        """Replace tensors by their mean over all processes, in one message per type."""
        for dtype in {tensor.dtype for tensor in tensors} if self.count > 1 else ():
            some = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.reshape(-1) for tensor in some])
            distributed.all_reduce(flat)
            pieces = (flat / self.count).split([tensor.numel() for tensor in some])
            for tensor, piece in zip(some, pieces, strict=True):
                tensor.copy_(piece.view_as(tensor))


def split(batch: Tensors, parts: int, processes: Processes) -> list[Tensors]:
    """This process's share of a batch, named tuple or plain, in equal parts.

    Every process draws the whole batch from the same random numbers and takes its share, so that
    their number changes neither what is learnt from nor how a run is resumed. Samples that were
    made before, the x of a `dmd.Batch`, are this process's already.
    """
    made = batch.x if isinstance(batch, dmd.Batch) else None
    columns: list[Any] = []
    for tensor in batch:
        shares = 1 if tensor is made else processes.count
        if tensor is not None and len(tensor) % (parts * shares):
            wanted = f"{parts} equal parts for each of {shares} processes"
            raise ValueError(f"a batch of {len(tensor)} cannot be cut into {wanted}")
        first = processes.rank * parts if shares > 1 else 0
        pieces = [None] * parts * shares if tensor is None else tensor.chunk(parts * shares)
        columns.append(pieces[first : first + parts])
    return [rebuilt(batch, row) for row in zip(*columns, strict=True)]


def joined(records: list[Tensors]) -> Tensors:
    """What the parts of a batch did, as one: tensors side by side, numbers averaged."""

    def together(values: tuple) -> Any:
        if isinstance(values[0], Tensor) and values[0].ndim:
            return torch.cat(values)
        return None if values[0] is None else sum(values) / len(values)

    return rebuilt(records[0], map(together, zip(*records, strict=True)))


class Updater:
    """A `dmd.Updater`: sums parts, averages over processes, scales the losses for fp16.

    One object serves a run and the optimisers that it was made with, each with a scale of its own.
    The record it returns is of this process's share, the norm of the whole batch.
    """

    def __init__(self, compute: Compute, *optimizers: Optimizer) -> None:
        self.compute, self.processes = compute, Processes()
        scaler = partial(torch.amp.GradScaler, enabled=compute.mixed_precision == "fp16")
        self.scalers = {of: scaler(_parameters(of)[0].device.type) for of in optimizers}

    def __call__(
        self, optimizer: Optimizer, loss: Callable, batch: Any, clip: float
    ) -> tuple[Any, Tensor]:
        """One step down the mean of the parts' losses.

        Where a gradient overflows in fp16 the scale is halved and the step skipped; its norm is
        not finite. What overflows without a scale is refused, as in `dmd.update`.
        """
        scaler, parameters = self.scalers[optimizer], _parameters(optimizer)
        parts, records = self.compute.accumulation, []
        mean: Any = 0.0
        optimizer.zero_grad()
        for part in split(batch, parts, self.processes):
            value, record = loss(part)
            scaler.scale(value / parts).backward()
            mean = mean + value.detach() / parts
            records.append(record)
        gradients = [p.grad for p in parameters if p.grad is not None]
        # with the loss, so that every process refuses what one cannot go on with
        self.processes.mean_([mean, *gradients])
        if scaler.is_enabled() and (wrong := refused()) is not None:
            gradients[0].masked_fill_(wrong, math.inf)  # then the scaler takes no step
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, clip)
        numbers = {"the loss": mean, "the gradient's norm": norm}
        if scaler.is_enabled():
            scaler.step(optimizer)
            scaler.update()
            check_finite(lambda: scaler.get_scale() >= 0.5, **numbers)
        else:
            check_finite(**numbers)
            step_unless_refused(optimizer)
        torch.clear_autocast_cache()  # as in `dmd.update`
        return joined(records), norm

    def state_dict(self) -> dict:
        """The scale of each optimiser's loss, if there is one."""
        return {i: scaler.state_dict() for i, scaler in enumerate(self.scalers.values())}

    def load_state_dict(self, state: dict) -> None:
        """Continue with saved scales; without one, as on a run that was in fp32, from the start."""
        for number, scaler in enumerate(self.scalers.values()):
            if state[number]:
                scaler.load_state_dict(state[number])


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]

"""How a training step is computed on the hardware at hand: precision, memory, several processes.

Nothing here changes what is optimised. A step cut into parts, spread over processes, or with its
activations computed twice has the gradients of the plain step up to rounding; low precision adds
rounding inside the networks, and only there.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
Tensors = TypeVar("Tensors", bound=tuple)
Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Compute:
    """What the hardware asks for. The defaults suit a CPU and small networks.

    Attributes:
        precision: Of the inside of the networks in training: fp32, bf16 (Ampere and newer), or
            fp16 (older cards such as the T4; the loss is scaled so that gradients do not vanish).
            Weights, optimisers, averages and preconditioning stay in fp32.
        frozen: The same for the teacher, whose matrices are also stored in that type.
        parts: Equal parts (micro-batches) that a step's batch is cut into, one after the other:
            the gradients are the same, the memory of activations is divided.
        recompute: Compute the activations inside each block again in the backward pass instead of
            keeping them: about a third more time, several times less memory.
        channels_last: Keep the colour channels of a pixel together in memory; faster convolutions.
        compile: Compile the networks with torch.compile: minutes at the start, faster steps on
            a GPU; it does not pay on a CPU.
    """

    precision: str = "fp32"
    frozen: str = "fp32"
    parts: int = 1
    recompute: bool = False
    channels_last: bool = True
    compile: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            ValueError: If a precision is unknown or there is no part.
        """
        for name in (self.precision, self.frozen):
            if name not in PRECISIONS:
                raise ValueError(f"a precision is one of {list(PRECISIONS)}, not {name!r}")
        if self.parts < 1:
            raise ValueError(f"a batch is cut into 1 part or more, not {self.parts}")


def prepare(denoiser: Network, compute: Compute, frozen: bool = False) -> Network:
    """Make a denoiser compute as asked, in place.

    Args:
        denoiser: A network with a denoiser's `precision`; its blocks may know `recompute`.
        compute: How.
        frozen: It is not trained: its matrices take the type of `compute.frozen`. Vectors and
            buffers (norms, the frequencies of the noise embedding) are few and stay exact.

    Returns:
        The same network.
    """
    dtype = PRECISIONS[compute.frozen if frozen else compute.precision]
    for module in denoiser.modules():
        if hasattr(module, "precision"):
            setattr(module, "precision", dtype)  # noqa: B010
        if hasattr(module, "recompute"):
            setattr(module, "recompute", compute.recompute and not frozen)  # noqa: B010
    if frozen and dtype is not None:
        for parameter in denoiser.parameters():
            if parameter.ndim > 1:
                parameter.data = parameter.data.to(dtype)
    if compute.channels_last:
        denoiser.to(memory_format=torch.channels_last)
    if compute.compile:
        denoiser.compile()
    return denoiser


class Processes:
    """The processes that share a run: one, or those that `accelerate launch` has started.

    Attributes:
        rank: Number of this process, from 0. Process 0 writes files and speaks.
        count: How many there are.
        device: Where this process's networks go; None where there is one process and it is free.

    Raises:
        RuntimeError: If several were started and they do not find each other.
    """

    def __init__(self) -> None:
        self.rank, self.count, self.device = 0, 1, None
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started > 1:
            from accelerate import PartialState

            asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes")
            self._state = PartialState(cpu=asked or not torch.cuda.is_available())
            self.rank, self.count = self._state.process_index, self._state.num_processes
            self.device = self._state.device
        if self.count != started:  # each would do the whole work and write the same files
            raise RuntimeError(f"{started} processes were started, {self.count} found each other")

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def wait(self) -> None:
        """Go on when every process has come here."""
        if self.count > 1:
            self._state.wait_for_everyone()

    def any(self, here: bool) -> bool:
        """Whether something holds in at least one process; every process must ask.

        Args:
            here: Whether it holds in this one.

        Returns:
            The same answer in all of them.
        """
        if self.count == 1:
            return here
        from accelerate.utils import reduce

        flag = torch.tensor([float(here)], device=self.device)
        return bool(reduce(flag, "sum").item() > 0)

    def mine(self, count: int) -> Tensor:
        """Which of a number of things this process does.

        Args:
            count: How many there are.

        Returns:
            Their numbers: every `self.count`-th, from `self.rank` on.
        """
        return torch.arange(self.rank, count, self.count)

    def gather(self, x: Tensor, count: int) -> Tensor:
        """Put together what the processes made of their shares.

        Args:
            x: What this process made, (share, ...), in the order of `mine`.
            count: How many there are in all.

        Returns:
            All of them in order, (count, ...), each once, on the CPU; in every process.
        """
        if self.count == 1:
            return x.cpu()
        from accelerate.utils import gather

        padded = x.new_zeros(-(-count // self.count), *x.shape[1:])
        padded[: len(x)] = x
        together: Any = gather(padded.to(self.device))
        rows = together.cpu().reshape(self.count, *padded.shape).transpose(0, 1)
        return rows.reshape(-1, *x.shape[1:])[:count]

    def mean_(self, tensors: list[Tensor]) -> None:
        """Replace tensors by their mean over all processes, in one message per type.

        Args:
            tensors: The same shapes in every process.
        """
        if self.count == 1:
            return
        from accelerate.utils import reduce

        for dtype in {tensor.dtype for tensor in tensors}:
            some = [tensor for tensor in tensors if tensor.dtype == dtype]
            mean = reduce(torch.cat([tensor.reshape(-1) for tensor in some]), "mean")
            pieces = mean.split([tensor.numel() for tensor in some])
            for tensor, piece in zip(some, pieces, strict=True):
                tensor.copy_(piece.view_as(tensor))


def split(batch: Tensors, parts: int, processes: Processes) -> list[Tensors]:
    """This process's share of a batch, in equal parts.

    Every process draws the whole batch from the same random numbers and takes its share. So the
    number of processes changes neither what is learnt from nor how a run is resumed.

    Args:
        batch: A tuple of tensors, named or not, (batch, ...) each, or None.
        parts: How many parts each process cuts its share into.
        processes: Who shares.

    Returns:
        As many batches as there are parts.

    Raises:
        ValueError: If a tensor cannot be cut equally.
    """
    pieces = parts * processes.count
    columns: list[Any] = []
    for tensor in batch:
        if tensor is not None and len(tensor) % pieces:
            raise ValueError(
                f"a batch of {len(tensor)} cannot be cut into {parts} equal parts for each of "
                f"{processes.count} processes"
            )
        columns.append([None] * pieces if tensor is None else tensor.chunk(pieces))
    rows = list(zip(*columns, strict=True))
    mine = rows[processes.rank * parts : (processes.rank + 1) * parts]
    return [rebuilt(batch, row) for row in mine]


def rebuilt(batch: Tensors, values: Iterable[Any]) -> Tensors:
    """A batch of the same kind, named tuple or plain, with other values."""
    make = getattr(type(batch), "_make", type(batch))
    return make(values)


class Stepper:
    """Takes an optimiser's steps: sums parts, averages over processes, scales the loss for fp16.

    Args:
        optimizer: Holds the parameters, in fp32.
        compute: How.
        processes: Who shares the work.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, compute: Compute, processes: Processes
    ) -> None:
        self.optimizer, self.parts, self.processes = optimizer, compute.parts, processes
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.parameters = parameters
        self.scaler = torch.amp.GradScaler(
            parameters[0].device.type, enabled=compute.precision == "fp16"
        )

    def __call__(self, losses: Iterable[Tensor], clip: float) -> float:
        """One step down the mean of the parts' losses.

        A gradient that overflows in fp16 is not used: the scale is halved and the step skipped.

        Args:
            losses: One scalar for each part, made when it is asked for.
            clip: Largest L2 norm of the gradient.

        Returns:
            The norm of the gradient before clipping, over the whole batch; not finite if skipped.
        """
        self.optimizer.zero_grad()
        for loss in losses:
            self.scaler.scale(loss / self.parts).backward()
        self.processes.mean_([p.grad for p in self.parameters if p.grad is not None])
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return norm.item()

    def state_dict(self) -> dict:
        """The scale of the loss, if there is one."""
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Continue with a saved scale.

        Args:
            state: From `state_dict`.
        """
        if state:
            self.scaler.load_state_dict(state)

"""The regression anchor: pairs (z, y) of noise and what the teacher's ODE makes of it.

Pairs lie in a folder of safetensors files, one per chunk, whose header says how it was made: by
which teacher, sampler, steps and noise. A run that stopped continues at the first missing one.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Generator, Tensor, nn
from torch.nn import functional

from dmd_tutorial.adapters import Guided
from dmd_tutorial.checks import Condition, check_finite, check_same_shape
from dmd_tutorial.denoisers import device_of, says, sigma_range
from dmd_tutorial.files import header_of, write_tensors
from dmd_tutorial.noise import SIGMA_MAX, SIGMA_MIN, source, stream
from dmd_tutorial.samplers import evaluations, heun, sample
from dmd_tutorial.samplers.step import Steps

CHUNK = 1000
# what files say that are older than the saying
EARLIER = {
    "sigma_range": [SIGMA_MIN, SIGMA_MAX], "precision": "its own", "guidance": 1.0, "prompts": None
}  # fmt: skip


class Pairs(NamedTuple):
    """Noise, and the sample that the teacher's ODE makes of it."""

    z: Float[Tensor, "count *shape"]
    y: Float[Tensor, "count *shape"]  # not clamped
    label: Condition | None = None

    def draw(self, count: int, rng: Generator) -> "Pairs":
        """Some of them, each equally likely, with replacement."""
        index = torch.randint(len(self.z), (count,), **source(rng)).to(self.z.device)
        label = None if self.label is None else self.label[index]
        return Pairs(self.z[index], self.y[index], label)


def fingerprint(of: nn.Module | Mapping[str, Tensor]) -> str:
    """A short name for exact weights, or tensors: of names, types, shapes and values."""
    digest = hashlib.sha256()
    tensors = of.state_dict() if isinstance(of, nn.Module) else of
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def identity(teacher: nn.Module) -> dict[str, Any]:
    """What a teacher's pairs, and a distillation, know it by: of its prompts a hash."""
    guided, prompts = isinstance(teacher, Guided), "\n".join(says(teacher, "prompts", ()))
    return {
        "guidance": float(teacher.scale) if guided else 1.0,  # type: ignore[arg-type]
        "prompts": hashlib.sha256(prompts.encode()).hexdigest()[:16] if prompts else None,
        "teacher": fingerprint(teacher), "sigma_range": list(sigma_range(teacher)),
    }  # fmt: skip


def make_pairs(
    teacher: nn.Module, folder: str | Path, count: int, shape: tuple[int, ...], classes: int = 0, *,
    steps: int = 18, seed: int = 0, batch: int = CHUNK, share: tuple[int, int] = (0, 1),
    sampler: Callable[..., Steps] = heun,
) -> Iterator[int]:  # fmt: skip
    """Make pairs with a sampler, chunk by chunk, skipping the chunks that are there.

    Chunk k depends on the seed and k alone, so a run that stopped, or several at once, make what
    one undisturbed run makes; `share` is (rank, count) of this process among several. Classes are
    balanced; `batch` is a matter of memory. Levels are those that the teacher's own scheduler walks
    where it `says` them (`ladder`), otherwise EDM's. Yields how many pairs this process has made or
    found. A folder of pairs made otherwise is refused, as are those of before pairs had a stream of
    noise to themselves. Source: DMD, 3.3.
    """
    if count <= 0 or count % CHUNK:
        raise ValueError(f"the number of pairs must be a multiple of {CHUNK}, not {count}")
    ladder = says(teacher, "ladder")
    made_by = {
        **identity(teacher), "sampler": getattr(sampler, "__name__", str(sampler)), "steps": steps,
        "seed": seed, "noise": "stream of pairs",
        "evaluations": evaluations(sampler, steps) * (1 + isinstance(teacher, Guided)),
        "precision": str(says(teacher, "precision") or "its own"),  # of its inside
    }  # fmt: skip
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for number, chunk in enumerate(range(share[0], count // CHUNK, share[1]), 1):
        path = folder / f"{chunk:05d}.safetensors"
        made_by["chunk"] = chunk
        if path.exists():
            _check_made_by(path, made_by)
        else:
            device = device_of(teacher)
            z = torch.randn(CHUNK, *shape, generator=stream("pairs", seed, chunk))
            label = torch.arange(CHUNK, device=device) % classes if classes else None
            how: dict = {"sampler": sampler, "levels": ladder and ladder(steps), "batch": batch}
            y = sample(teacher, z.to(device), label, steps=steps, **how)
            tensors = {"z": z, "y": y} | ({} if label is None else {"label": label})
            mine = f"part{os.getpid()}"  # several runs may make the same chunk
            write_tensors(path, tensors, mine, made_by=json.dumps(made_by, sort_keys=True))
        yield number * CHUNK


def load_pairs(
    folder: str | Path, teacher: nn.Module | None = None, count: int | None = None
) -> Pairs:
    """Read `count` pairs or all, made alike, and by the teacher where one is given."""
    if count is not None and count < 1:
        raise ValueError(f"{count} pairs are wanted, at least 1 must be")
    files = sorted(Path(folder).glob("*.safetensors"))[: count and -(-count // CHUNK)]
    if not files:
        raise FileNotFoundError(f"{folder} holds no pairs (*.safetensors)")
    wanted: dict[str, Any] = {} if teacher is None else identity(teacher)
    parts: dict[str, list[Tensor]] = {}
    for path in files:
        wanted = {"noise": None} | _check_made_by(path, wanted)
        for name, tensor in load_file(path).items():
            parts.setdefault(name, []).append(tensor)
    pairs = Pairs(**{name: torch.cat(tensors)[:count] for name, tensors in parts.items()})
    if count is not None and len(pairs.z) < count:
        raise ValueError(f"{folder} holds {len(pairs.z)} pairs, {count} are wanted")
    check_same_shape(z=pairs.z, y=pairs.y)
    check_finite(z=pairs.z, y=pairs.y)
    return pairs


def _check_made_by(path: Path, wanted: dict) -> dict:
    """Refuse a file that was not made as wanted; returns what all files of a folder share."""
    made_by = EARLIER | header_of(path, "pairs", "made_by")[0]
    for name, value in wanted.items():
        if made_by.get(name) != value:
            raise ValueError(f"{path} was made with {name} {made_by.get(name)}, not {value}")
    return {name: value for name, value in made_by.items() if name != "chunk"}


def l2(x: Float[Tensor, "batch *shape"], y: Float[Tensor, "batch *shape"]) -> Float[Tensor, ""]:
    """Mean square difference, in the units of x squared."""
    check_same_shape(x=x, y=y)
    return functional.mse_loss(x, y)


class LPIPS(nn.Module):
    """The learned perceptual distance of the paper's anchor (Zhang et al. 2018; DMD, Eq. 9).

    The backbone is ``"vgg"`` (the paper's), ``"alex"`` or ``"squeeze"``, for tests at random
    weights. Images, in [-1, 1], are resized to `size`. Missing weights are a RuntimeError.
    """

    def __init__(
        self, backbone: str = "vgg", size: int = 224, random_backbone: bool = False
    ) -> None:
        super().__init__()
        if size < 64:
            raise ValueError(f"LPIPS needs images of at least 64 pixels, size is {size}")
        import lpips

        self.size = size
        with warnings.catch_warnings():  # lpips still uses torchvision's old argument names
            warnings.simplefilter("ignore")
            try:
                network = lpips.LPIPS(net=backbone, pnet_rand=random_backbone, verbose=False)
            except OSError as error:  # URLError is one
                raise RuntimeError(
                    f"LPIPS needs torchvision's ImageNet weights of '{backbone}', neither in "
                    f"{torch.hub.get_dir()}/checkpoints nor to be downloaded ({error}): get them "
                    "on a machine with a network, or choose the L2 anchor"
                ) from error
        self.network = network.requires_grad_(False).eval()

    def forward(
        self, x: Float[Tensor, "batch channels h w"], y: Float[Tensor, "batch channels h w"]
    ) -> Float[Tensor, ""]:
        """Mean distance of two batches of images with 1 or 3 channels, without unit."""
        check_same_shape(x=x, y=y)
        return self.network(self._prepare(x), self._prepare(y)).mean()

    def _prepare(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise ValueError(f"LPIPS wants images with 1 or 3 channels, not {tuple(x.shape)}")
        x = x.expand(-1, 3, -1, -1)  # grey images count as three equal channels
        return functional.interpolate(x, size=(self.size, self.size), mode="bilinear")

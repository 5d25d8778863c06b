"""Images from a folder or a zip: every file is used, converted as said here, or refused by name.

What counts as an image is decided by the file's ending. Labels come from folders (each folder at
the top is a class, in alphabetical order) or from a ``dataset.json`` of the form
``{"labels": [["folder/image.png", 3], ...]}`` beside them; without either there are none.

Conversions: a picture is turned upright as its camera noted; transparent parts are laid on white;
palettes and CMYK become colours; grey among colours becomes three equal colours; the middle square
is cut out and resized with Lanczos' filter, which averages where it shrinks. Refused, by name: what
cannot be read, 16 bits per channel, and animations. Hidden files, ``__MACOSX`` and files with other
endings (a README, say) are no images and are left alone; `read_images` says how many.
"""

import io
import json
import zipfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.utils import save_image
from tqdm import tqdm

from dmd_tutorial.data import Images, digits
from dmd_tutorial.runs.checkpoints import replace_file

ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
LABELS = "dataset.json"


class Read(NamedTuple):
    """Images that were read."""

    x: UInt8[Tensor, "count channels size size"]  # levels 0 to 255
    label: Int[Tensor, " count"]  # zeros without classes
    classes: int  # 0 for none
    names: list[str]  # the file of each
    left_alone: int  # how many files were no images


def read_images(path: str | Path, size: int, channels: int | None = None) -> Read:
    """Read all images of a folder or zip, `size` pixels high and wide, ordered by name.

    `channels` is 1 for grey, 3 for colours; without it grey only if all of them are. What is
    refused, an image or a label, is named.
    """
    if size < 1 or channels not in (None, 1, 3):
        raise ValueError(f"size {size}, channels {channels}: want a size above 0, 1 or 3 channels")
    names, read = _files(Path(path))
    images = sorted(name for name in names if PurePosixPath(name).suffix.lower() in ENDINGS)
    if not images:
        endings = " ".join(sorted(ENDINGS))
        raise ValueError(f"{path} holds no images ({endings}), but {len(names)} other files")
    label, classes = _labels(images, names, read, path)
    bar = tqdm(images, unit="image", desc=f"{path}", disable=None, leave=False)
    squares = [_square(_opened(read, name, path), size) for name in bar]
    grey = channels == 1 or (channels is None and all(s.mode == "L" for s in squares))
    levels = np.stack([np.asarray(s.convert("L" if grey else "RGB")) for s in squares])
    x = torch.from_numpy(levels)[:, None] if grey else torch.from_numpy(levels).permute(0, 3, 1, 2)
    left_alone = len(set(names) - {*images, LABELS})
    return Read(x.contiguous(), torch.tensor(label), classes, images, left_alone)


def _files(path: Path) -> tuple[list[str], Callable[[str], bytes]]:
    """Names of the visible files, with slashes, and what reads one."""
    if path.is_dir():
        found = (p for p in path.rglob("*") if p.is_file())
        names = [p.relative_to(path).as_posix() for p in found]
        return _visible(names), lambda name: (path / name).read_bytes()
    if not path.exists():
        raise FileNotFoundError(f"there is no folder or file {path}")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is neither a folder nor a zip")
    archive = zipfile.ZipFile(path)
    names = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
    return _visible(names), lambda name: _unpacked(archive, name)


def _visible(names: Iterable[str]) -> list[str]:
    hidden = {
        n for n in names if any(p[0] == "." or p == "__MACOSX" for p in PurePosixPath(n).parts)
    }
    return [name for name in names if name not in hidden]


def _unpacked(archive: zipfile.ZipFile, name: str) -> bytes:
    if archive.getinfo(name).file_size > 500_000_000:
        raise ValueError(f"{archive.filename}: {name} would unpack to more than 500 MB")
    return archive.read(name)


# --- labels ---------------------------------------------------------------------------------------


def _labels(
    images: list[str], names: list[str], read: Callable[[str], bytes], path: str | Path
) -> tuple[list[int], int]:
    if LABELS in names:
        return _listed_labels(images, read(LABELS), f"{path}/{LABELS}")
    tops = [PurePosixPath(name).parts[0] if "/" in name else "" for name in images]
    folders = sorted(set(tops) - {""})
    if len(folders) < 2:  # one folder around all of them is no class
        return [0] * len(images), 0
    if "" in tops:
        loose = images[tops.index("")]
        raise ValueError(f"{path}: {loose} lies beside the folders {folders[:3]} that are classes")
    return [folders.index(top) for top in tops], len(folders)


def _listed_labels(images: list[str], content: bytes, where: str) -> tuple[list[int], int]:
    try:
        labels = json.loads(content)["labels"]
        listed: dict[str, Any] = dict(labels or [])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{where} is not of the form {{"labels": [[name, class]]}}') from error
    if not listed:
        return [0] * len(images), 0
    if missing := [name for name in images if name not in listed]:
        raise ValueError(f"{where} has no label for {missing[0]}")
    known = set(images)
    if extra := [name for name in listed if name not in known]:
        raise ValueError(f"{where} has a label for {extra[0]}, which is not there")
    if len(listed) != len(labels):
        raise ValueError(f"{where} has {len(labels)} labels for {len(listed)} images")
    for name, label in listed.items():
        if not isinstance(label, int) or isinstance(label, bool) or label < 0:
            raise ValueError(f"{where} says {label!r} for {name}: a class is a number from 0")
    classes = max(listed.values()) + 1
    if unused := sorted(set(range(classes)) - set(listed.values())):
        raise ValueError(f"{where} has no image of class {unused[0]}, the highest is {classes - 1}")
    return [listed[name] for name in images], classes


# --- one image ------------------------------------------------------------------------------------


def _opened(read: Callable[[str], bytes], name: str, path: str | Path) -> Image.Image:
    """One image, upright, in grey or colours, or an error that names it."""
    where = f"{path}/{name}"
    content = read(name)
    try:
        file = Image.open(io.BytesIO(content))
        frames = 1 if file.format == "MPO" else getattr(file, "n_frames", 1)  # MPO: a camera's
        image = ImageOps.exif_transpose(file)
        image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{where} cannot be read: {error}") from error
    if frames > 1:
        raise ValueError(f"{where} is animated, it has {frames} frames: which one is meant?")
    deep_png = content[:4] == b"\x89PNG" and content[24:25] == b"\x10"  # Pillow would cut it to 8
    if deep_png or image.mode.startswith(("I", "F")):
        raise ValueError(f"{where} has more than 8 bits per channel: convert it first")
    if image.mode in ("1", "L") and "transparency" not in image.info:
        return image.convert("L")
    if image.mode in ("LA", "RGBA", "PA", "La", "RGBa") or "transparency" in image.info:
        grey = image.mode in ("L", "LA", "La")
        clear = image.convert("RGBA")
        white = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
        return white.convert("L" if grey else "RGB")
    return image.convert("RGB")


def _square(image: Image.Image, size: int) -> Image.Image:
    """The middle square, resized."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square if side == size else square.resize((size, size), Image.Resampling.LANCZOS)


# --- data sets and grids --------------------------------------------------------------------------

TORCHVISION = {
    "cifar10": "CIFAR10", "cifar100": "CIFAR100", "mnist": "MNIST", "fashion-mnist": "FashionMNIST"
}  # fmt: skip


def load_images(
    name_or_path: str | Path, size: int | None = None, channels: int | None = None, *,
    train: bool = True, folder: str | Path = "runs/data",
) -> Images:  # fmt: skip
    """Images by the name of a data set, or from a folder or zip (see `read_images`).

    A name is "digits" or a key of `TORCHVISION`, which is downloaded into `folder` once. ImageNet
    at 64 pixels is a path: a folder of class folders, or EDM's zip with its ``dataset.json``.
    `size` and `channels` are the set's own without them, 32 pixels for a path. Digits are numbers
    in [-1, 1], all others levels 0 to 255: a quarter of the memory (ImageNet 15.7 GB).
    """
    if name_or_path == "digits":
        return digits()
    if str(name_or_path) in TORCHVISION:
        return _torchvision(str(name_or_path), size, channels, train, Path(folder))
    if not Path(name_or_path).exists():
        names = ", ".join(["digits", *TORCHVISION])
        raise FileNotFoundError(f"{name_or_path} is neither a path nor a data set ({names})")
    read = read_images(name_or_path, size or 32, channels)
    if read.left_alone:
        print(f"{name_or_path}: {len(read.names)} images, {read.left_alone} other files left alone")
    return Images(read.x, read.label, read.classes)


def _torchvision(
    name: str, size: int | None, channels: int | None, train: bool, folder: Path
) -> Images:
    kind = getattr(torchvision.datasets, TORCHVISION[name])
    try:
        dataset = kind(str(folder), train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise RuntimeError(
            f"{name} is neither in {folder} nor could it be downloaded ({error}). Fetch it on a "
            "machine with a network, or give a folder of images."
        ) from error
    x = torch.as_tensor(dataset.data)
    x = x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2)
    if channels == 3:
        x = x.expand(-1, 3, -1, -1)
    if (size or x.shape[-1]) != x.shape[-1] or (channels or x.shape[1]) != x.shape[1]:
        found = tuple(x.shape[1:])
        raise ValueError(f"{name} has images of shape {found}, not {channels} x {size} x {size}")
    return Images(x.contiguous(), torch.as_tensor(dataset.targets), len(dataset.classes))


def save_grid(
    x: Float[Tensor, "count channels height width"], path: str | Path, columns: int = 10,
    scale: int | None = None,
) -> None:  # fmt: skip
    """Write images in [-1, 1] as one PNG, enlarged `scale` times (small ones to 64 pixels).

    The file is written whole or not at all; values that are not finite are grey.
    """
    scale = scale or max(1, 64 // x.shape[-2])
    x = x.detach().float().cpu().nan_to_num(0.0)
    x = x.repeat_interleave(scale, -2).repeat_interleave(scale, -1)
    save = partial(save_image, x, format="png", nrow=columns, normalize=True, value_range=(-1, 1))
    replace_file(path, save)

"""Images from a folder or a zip: every file is used, converted as said here, or refused by name.

What counts as an image is decided by the file's ending. Labels come from a ``dataset.json`` of the
form ``{"labels": [["folder/image.png", 3], ...]}`` or from folders, each a class, in alphabetical
order; a folder around everything does not count. Links are followed, but not in circles.

Conversions: a picture is turned upright as its camera noted; transparent parts are laid on white;
palettes and CMYK become colours; grey among colours becomes three equal colours; the middle square
is cut out and resized with Lanczos' filter, which averages where it shrinks. Refused, by name: what
cannot be read, more than 8 bits per channel, animations, and folders that cannot be classes. Hidden
files, ``__MACOSX`` and other endings are no images and left alone; `load_images` says how many.
"""

import io
import json
import posixpath
import re
import sys
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision
from jaxtyping import Float, Int, UInt8
from PIL import ExifTags, Image, ImageFile, ImageOps
from torch import Tensor
from torchvision.utils import save_image
from tqdm import tqdm

from dmd_tutorial.data import Images, digits, shapes
from dmd_tutorial.data.captioned import captions_of_one
from dmd_tutorial.features import to_8_bit
from dmd_tutorial.files import replace_file
from dmd_tutorial.runs.compute import Processes

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # whose depth `_deep` knows
ENDINGS = tuple(end for end, kind in Image.registered_extensions().items() if kind in FORMATS)
LABELS = "dataset.json"
HIDDEN = re.compile(r"(^|/)(\.|__MACOSX(/|$)).*", re.DOTALL)
PARTS = re.compile(r"(?<![A-Za-z])(?i:train(ing)?|val(id(ation)?)?|dev|test(ing)?)(?![a-z])")
Files = dict[str, Callable[[], bytes]]  # the visible ones; the name of a folder ends in a slash


class Read(NamedTuple):
    """Images that were read."""

    x: UInt8[Tensor, "count channels size size"]  # levels 0 to 255
    label: Int[Tensor, " count"]  # zeros without classes
    classes: int  # 0 for none
    class_names: list[str]
    names: list[str]  # the file of each
    left_alone: int  # how many files were no images

    def __str__(self) -> str:
        counts = torch.bincount(self.label).tolist()
        numbered = enumerate(zip(self.class_names, counts, strict=False))
        each = [f"{number} {name}: {count}" for number, (name, count) in numbered]
        listed = ", ".join(each[:10] + ["..."] * (len(each) > 10))
        classes = f"{self.classes:,} classes ({listed})" if each else "no classes"
        others = f", {self.left_alone:,} other files left alone" if self.left_alone else ""
        return f"{len(self.names):,} images, {classes}{others}"


def read_images(path: str | Path, size: int, channels: int | None = None) -> Read:
    """Read all images of a folder or zip, `size` pixels high and wide, ordered by name.

    `channels` is 1 for grey, 3 for colours; without it grey only if all of them are. What is
    refused is named: a label, a class, or up to ten images.
    """
    if size < 1 or channels not in (None, 1, 3):
        raise ValueError(f"size {size}, channels {channels}: want a size above 0, 1 or 3 channels")
    found = _files(Path(path))
    others = [name for name in found if not _is_image(name) and not name.endswith("/")]
    if not any(map(_is_image, found)):
        holds = f"{len(others)} other files {sorted(others)[:3]}"
        raise ValueError(f"{path} holds no images ({' '.join(ENDINGS)}), but {holds}")
    files, where = _unwrapped(found, f"{path}")
    images = {name: files[name] for name in sorted(filter(_is_image, files))}
    of_each = _classes(images, files, where)
    names = sorted(set(of_each))
    number = {name: index for index, name in enumerate(names)}
    label = torch.tensor([number[name] for name in of_each] or [0] * len(images))
    x = torch.from_numpy(_levels(images, where, size, channels))
    left_alone = len(others) - (LABELS in files)
    return Read(x, label, len(names), [*map(str, names)], list(images), left_alone)


def _files(path: Path) -> Files:
    files: Files = {}
    for raw, read in _on_disk(path.resolve()) if path.is_dir() else _in_zip(path):
        name = HIDDEN.sub(r"\1", _plain(raw))  # of what is hidden, the folder that it lies in
        if name in files and not name.endswith("/"):
            raise ValueError(f"{path} holds {name} twice")
        if name.strip("/"):
            files[name] = read
    return files


def _on_disk(folder: Path, around: str = "") -> Iterator[tuple[str, Callable[[], bytes]]]:
    for path in folder.iterdir():
        inner = path.is_dir()
        circle = inner and path.is_symlink() and path.resolve() in map(Path.resolve, path.parents)
        if not circle and not HIDDEN.match(path.name):
            yield around + path.name + "/" * inner, path.read_bytes
            yield from _on_disk(path, f"{around}{path.name}/") if inner else ()


def _in_zip(path: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:
        raise ValueError(f"{path} is neither a folder nor a zip: {_why(error)}") from error
    for entry in archive.infolist():
        yield entry.filename, partial(_unpacked, archive, entry)


def _unpacked(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    if entry.file_size > 500_000_000:
        raise ValueError("it would unpack to more than 500 MB")
    return archive.read(entry)


def _plain(name: str) -> str:
    """The one form of a name that Windows, macOS and others write in their ways."""
    name = unicodedata.normalize("NFC", name).replace("\\", "/")
    return posixpath.normpath("/" + name.lstrip("/"))[1:] + "/" * name.endswith("/")


def _is_image(name: str) -> bool:
    return name.lower().endswith(ENDINGS)


def _why(error: Exception) -> str:
    """A library's words, in one line and without the address of an object."""
    said = re.sub(r"<\S+ object at \w+>", "", str(error)).split()
    return " ".join(said) if len(said) > 1 else repr(error)


def _unwrapped(files: Files, where: str) -> tuple[Files, str]:
    """Without the folders around all images and labels."""
    while LABELS not in files:
        tops = {name.partition("/")[:2] for name in files if "/" in name or _is_image(name)}
        top, slash = tops.pop()
        if tops or not slash:
            break
        top, where = f"{top}/", f"{where}/{top}"
        files = {name.removeprefix(top): files[name] for name in files if name.startswith(top)}
    return files, where


def _classes(images: Files, files: Files, where: str) -> list[Any]:
    """The name of each image's class; nothing without classes."""
    if LABELS in files:
        return _listed(images, files[LABELS], f"{where}/{LABELS}")
    tops = [name.partition("/")[0] if "/" in name else "" for name in images]
    if "" in tops and len(set(tops)) < 3:
        return []
    folders = sorted({name.partition("/")[0] for name in files if "/" in name})
    if "" in tops:
        loose = min(name for name in images if "/" not in name)
        raise ValueError(f"{where}: {loose} lies beside the folders {folders[:3]} that are classes")
    parts = {match[0][:2].lower(): name for name in folders if (match := PARTS.search(name))}
    if len(parts) > 1:
        raise ValueError(f"{where}: {[*parts.values()]} are parts of a data set, give one of them")
    if empty := set(folders) - set(tops):
        raise ValueError(f"{where}: {min(empty)} would be a class, but holds no images")
    if twice := set(folders) - set({name.casefold(): name for name in folders}.values()):
        raise ValueError(f"{where}: another class differs from {min(twice)} in its case only")
    return tops


def _listed(images: Files, read: Callable[[], bytes], where: str) -> list[int]:
    try:
        labels = json.loads(read())["labels"] or []
        listed: dict[str, Any] = {_plain(name): label for name, label in labels}
    except Exception as error:
        form = '{"labels": [[name, class]]}'
        raise ValueError(f"{where} cannot be read as {form}: {_why(error)}") from error
    if not listed:
        return []
    if odd := listed.keys() ^ images.keys():
        has, beside = ("a", "no") if min(odd) in listed else ("no", "an")
        raise ValueError(f"{where} has {has} label for {min(odd)}, but there is {beside} image")
    if len(listed) != len(labels):
        raise ValueError(f"{where} has {len(labels)} labels for {len(listed)} images")
    for name, label in listed.items():
        if not isinstance(label, int) or isinstance(label, bool) or label < 0:
            raise ValueError(f"{where} says {label!r} for {name}: a class is a number from 0")
    used = set(listed.values())
    if unused := set(range(len(used))) - used:
        raise ValueError(f"{where} has no image of class {min(unused)}, the highest is {max(used)}")
    return [listed[name] for name in images]


def _levels(images: Files, where: str, size: int, channels: int | None) -> np.ndarray:
    """The images in one array: nothing else is kept of them."""
    x, bad = np.zeros((0, 1, size, size), np.uint8), []
    bar = tqdm(images, unit="image", desc=where, disable=None, leave=False)
    for row, name in enumerate(bar):
        try:
            square = _square(_opened(images[name]()), size)
        except Exception as error:  # a decoder that meets damage may raise anything
            bad.append(f"{name} cannot be read: {_why(error)}")
            continue
        depth = channels or max(x.shape[1], len(square.getbands()))
        if x.shape[:2] != (len(images), depth):  # at the first image, and the first in colours
            x, before = np.zeros((len(images), depth, size, size), np.uint8), x[:row]
            x[: len(before)] = before
        levels = np.asarray(square.convert("L" if depth == 1 else "RGB"))
        x[row] = levels.reshape(size, size, depth).transpose(2, 0, 1)
    if bad:
        gap = "\n  " if len(bad) > 1 else " "
        listed = gap.join(["", *bad[:10], *["..."] * (len(bad) > 10)])
        raise ValueError(f"{where}: {len(bad)} of {len(images)} images cannot be used:{listed}")
    return x


def _opened(content: bytes) -> Image.Image:
    """One image, upright, in grey or colours."""
    file = Image.open(io.BytesIO(content), formats=FORMATS)
    frames = 1 if file.format == "MPO" else getattr(file, "n_frames", 1)  # MPO: a camera's
    if frames > 1:
        raise ValueError(f"it has {frames} frames or pages, which one is meant?")
    if _deep(file):
        raise ValueError("it has more than 8 bits per channel, convert it first")
    if file.format == "PNG" and file.mode == "L" and "transparency" in file.info:
        most = 2 ** content[24] - 1  # Pillow stretches fewer bits to 255, but not the one to hide
        if file.info["transparency"] <= most:
            file.info["transparency"] *= 255 // most
    file.load()
    with suppress(Exception):  # of damaged notes: it turns, and then writes all of them anew
        ImageOps.exif_transpose(file, in_place=True)
    target = "L" if file.mode in ("1", "L", "LA") else "RGB"
    if file.mode not in ("LA", "RGBA", "PA", "RGBa") and "transparency" not in file.info:
        return file.convert(target)
    clear = file.convert("RGBA")
    white = Image.new("RGBA", clear.size, "white")
    return Image.alpha_composite(white, clear).convert(target)


def _deep(file: ImageFile.ImageFile) -> bool:
    """Whether channels have more than 8 bits, which Pillow may cut without a word."""
    bits = getattr(file, "tag_v2", {}).get(ExifTags.Base.BitsPerSample, (8,))  # a TIFF's
    how = str([tile[3] for tile in file.tile])  # 'RGB;16B' of a PNG, ('RGB', 65535) of a PPM
    levels = map(int, re.findall(r"\d+", how)) if file.format == "PPM" else ()
    return file.mode in ("I", "F") or max(bits) > 8 or ";16B" in how or max(levels, default=0) > 255


def _square(image: Image.Image, size: int) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square if side == size else square.resize((size, size), Image.Resampling.LANCZOS)


TORCHVISION = {
    "cifar10": "CIFAR10", "cifar100": "CIFAR100", "mnist": "MNIST", "fashion-mnist": "FashionMNIST"
}  # fmt: skip
SHAPES = 10_000  # pictures of the data set of shapes


def load_images(
    name_or_path: str | Path, size: int | None = None, channels: int | None = None, *,
    train: bool = True, folder: str | Path = "runs/data",
) -> Images:  # fmt: skip
    """Images by the name of a data set, or from a folder or zip (see `read_images`).

    A name is "digits", "shapes" (of one object each, its class the caption) or a key of
    `TORCHVISION`, which is downloaded into `folder` once. ImageNet at 64 pixels is a path: a folder
    of class folders, or EDM's zip with its ``dataset.json``. `size` and `channels` are the set's
    own without them, 32 pixels for a path. Digits are numbers in [-1, 1], all others levels 0 to
    255: a quarter of the memory (ImageNet 15.7 GB).
    """
    if not str(name_or_path):  # not the current folder, whose path it is, too
        raise ValueError("which images? Give a folder, a zip or a name: --data my_images/")
    if name_or_path == "digits":
        return digits()
    if name_or_path == "shapes":
        return _shapes()
    if str(name_or_path) in TORCHVISION:
        return _torchvision(str(name_or_path), size, channels, train, Path(folder))
    if not Path(name_or_path).exists():
        names = ", ".join(["digits", "shapes", *TORCHVISION])
        raise FileNotFoundError(f"{name_or_path} is neither a path nor a data set ({names})")
    read = read_images(name_or_path, size or 32, channels)
    if Processes().first:
        known = sys.stdout.encoding or "utf-8"  # which may lack a class's letters
        print(f"{name_or_path}: {read}".encode(known, "backslashreplace").decode(known))
    return Images(read.x, read.label, read.classes, tuple(read.class_names))


def _shapes() -> Images:
    rng, names = torch.Generator().manual_seed(3), captions_of_one()  # 1 and 2: training's
    drawn = shapes(SHAPES, rng, two=0)
    label = torch.tensor([names.index(caption) for caption in drawn.captions])
    return Images(to_8_bit(drawn.x), label, len(names), tuple(names))


def _torchvision(
    name: str, size: int | None, channels: int | None, train: bool, folder: Path
) -> Images:
    kind = getattr(torchvision.datasets, TORCHVISION[name])
    try:
        dataset = kind(str(folder), train=train, download=True)
    except (OSError, RuntimeError) as error:
        failed = f"{name} is neither in {folder} nor could it be downloaded ({error})"
        way = "fetch it on a machine with a network, or give a folder of images"
        raise RuntimeError(f"{failed}: {way}") from error
    x = torch.as_tensor(dataset.data)
    x = x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2)
    if channels == 3:
        x = x.expand(-1, 3, -1, -1)
    wanted = (channels or x.shape[1], size or x.shape[2], size or x.shape[3])
    if x.shape[1:] != wanted:
        raise ValueError(f"{name} has images of shape {tuple(x.shape[1:])}, not {wanted}")
    label, names = torch.as_tensor(dataset.targets), tuple(dataset.classes)
    return Images(x.contiguous(), label, len(names), names)


def save_grid(
    x: Float[Tensor, "count channels height width"], path: str | Path, columns: int = 10,
    scale: int | None = None,
) -> None:  # fmt: skip
    """Write images in [-1, 1] as one PNG, enlarged `scale` times (small ones to 64 pixels)."""
    scale = scale or max(1, 64 // x.shape[-2])
    x = x.detach().float().cpu().nan_to_num(0.0)  # grey
    x = x.repeat_interleave(scale, -2).repeat_interleave(scale, -1)
    save = partial(save_image, x, format="png", nrow=columns, normalize=True, value_range=(-1, 1))
    replace_file(path, save)

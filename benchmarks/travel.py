"""What goes to a borrowed machine and back: the images as one small file, results in a few."""

import hashlib
import json
import shutil
import tarfile
import tempfile
from functools import partial
from pathlib import Path
from typing import IO

from safetensors.torch import load_file

from dmd_tutorial.data import Images
from dmd_tutorial.files import header_of, replace_file, write_tensors
from dmd_tutorial.runs.images import ENDINGS, LABELS, TORCHVISION, load_images

MIB = 2**20
FILES, EACH, TOGETHER = 8, 16 * MIB, 64 * MIB  # what a machine may leave: number, bytes


def pack(data: str, file: str | Path) -> None:
    """Write the image files of a folder, as they are, into one .tar.xz: JPEGs stay as small."""
    if data in TORCHVISION:
        raise ValueError(
            f"{data} is no folder of image files: torchvision downloads it, 163 MB for cifar10; "
            f"load it where it is wanted, with --data {data}"
        )
    folder = Path(data)
    if not folder.is_dir():
        raise ValueError(f"{data} is no folder of images; a zip is one file already")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and _wanted(path)]
    if not files:
        raise ValueError(f"{data} holds no images")
    replace_file(file, partial(_write_archive, folder, files))


def _wanted(path: Path) -> bool:
    return path.name == LABELS or path.name.lower().endswith(ENDINGS)


def _write_archive(folder: Path, files: list[Path], file: IO[bytes]) -> None:
    with tarfile.open(fileobj=file, mode="w:xz", dereference=True) as archive:
        for path in files:
            archive.add(path, str(path.relative_to(folder)), filter=_plain)


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without owner and date, so that the same images are the same file."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


def unpack(file: Path, size: int, work: Path) -> Images:
    """The images of a packed file; their 8-bit levels stay in the work folder, read in no time."""
    levels, archive = work / "images.safetensors", hashlib.sha256(file.read_bytes()).hexdigest()
    if levels.exists():
        made_of, names = header_of(levels, "images", "archive", "names")
        if made_of == [archive, size]:
            return Images(**load_file(levels), classes=len(names), class_names=tuple(names))
    with tempfile.TemporaryDirectory(dir=work) as folder:
        with tarfile.open(file, "r:xz") as packed:
            packed.extractall(folder, filter="data")  # refuses what would lie elsewhere
        images = load_images(folder, size, 3)
    header = {"archive": [archive, size], "names": images.class_names}
    texts = {name: json.dumps(value) for name, value in header.items()}
    write_tensors(levels, {"x": images.x, "label": images.label}, **texts)
    return images


def no_room(folder: Path, coming: dict[str, int]) -> str:
    """Why files of such names and sizes may not join a folder; nothing where they may."""
    there = {path.name: path.stat().st_size for path in folder.glob("*")} | coming
    if len(there) > FILES:
        return f"{folder} would hold {len(there)} files, {FILES} may travel"
    if (total := sum(there.values())) > TOGETHER:
        return f"{folder} would hold {total / MIB:.1f} MiB, {TOGETHER // MIB} may travel"
    return ""


def send(folder: Path, files: list[Path]) -> None:
    """Copy files to the folder that travels, all or none."""
    for path in files:
        if path.stat().st_size >= EACH:
            size = f"{path.stat().st_size / MIB:.1f} MiB"
            raise ValueError(f"{path} has {size}: a file that travels must be below {EACH // MIB}")
    if said := no_room(folder, {path.name: path.stat().st_size for path in files}):
        raise ValueError(said)
    folder.mkdir(parents=True, exist_ok=True)
    for path in files:
        shutil.copyfile(path, folder / path.name)

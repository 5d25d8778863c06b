"""Downloads: resumed where they stopped, checked, kept in a folder.

Not by pooch: it does not resume, lock, or compare with the size that the server names.
"""

import errno
import hashlib
import http.client
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import torch
from filelock import FileLock
from tqdm import tqdm

PIECE = 1 << 20  # bytes read at a time
TRIES = 3
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}  # full, or not to be written to


def cache_folder() -> Path:
    """Where downloads are kept: `$DMD_TUTORIAL_CACHE`, or beside torch's own."""
    chosen = os.environ.get("DMD_TUTORIAL_CACHE")
    return Path(chosen) if chosen else Path(torch.hub.get_dir()) / "checkpoints"


def download(url: str, folder: str | Path | None = None, sha256: str | None = None) -> Path:
    """Fetch a file once, into `cache_folder` or another.

    A download that stopped goes on where it was, if the server allows and the file is still the
    same one. What arrives is compared with the size that the server names and with a hash: the
    given one, or else the one noted when the file was first fetched (``<file>.sha256``), so that a
    cached file that changes is noticed (ValueError). Of several processes that want the same file,
    one fetches it, the others wait. RuntimeError: it cannot be reached.
    """
    name = Path(urllib.parse.urlsplit(url).path).name
    if not name:
        raise ValueError(f"{url!r} is no address of a file")
    path = Path(folder or cache_folder()) / name
    noted = path.with_name(path.name + ".sha256")
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):
                if not path.exists():  # or another process was faster
                    _fetch(url, path)
                    noted.write_text(_check(path, sha256, f"the file at {url}") + "\n")
        except OSError as error:
            raise RuntimeError(f"{path} cannot be written: {error}") from error
    wanted = sha256 or (noted.read_text().strip() if noted.exists() else None)
    _check(path, wanted, str(path))
    return path


def _check(path: Path, wanted: str | None, what: str) -> str:
    """The hash of a file, refused where another is wanted."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if wanted not in (None, found):
        ought = f"it should have {wanted}; delete {path} to fetch it again"
        raise ValueError(f"{what} has SHA-256 {found}, {ought}")
    return found


def _fetch(url: str, path: Path) -> None:
    """Fetch into ``<file>.part``, then give it its name."""
    partial, problem = path.with_name(path.name + ".part"), Exception()
    for attempt in range(TRIES):
        try:
            _continue(url, partial)
            os.replace(partial, path)
            return
        except urllib.error.HTTPError as error:
            if error.code == 416:  # more is here than there is: begin again
                partial.unlink(missing_ok=True)
            elif error.code < 500:
                raise RuntimeError(f"{url} answers {error.code} {error.reason}") from error
            problem = error
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            if getattr(error, "errno", None) in DISK:
                raise
            problem = error
        if attempt + 1 < TRIES:
            time.sleep(0.5 * 2**attempt)
    raise RuntimeError(
        f"{url} cannot be reached ({problem}). Fetch it on a machine with a network, and give the "
        f"file's path or put it at {path}."
    ) from problem


def _continue(url: str, partial: Path) -> None:
    tag_file = partial.with_name(partial.name + ".tag")
    there = partial.stat().st_size if partial.exists() and tag_file.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "dmd-tutorial"})
    if there:  # the server sends the whole file if it is no longer the one of the tag
        request.add_header("Range", f"bytes={there}-")
        request.add_header("If-Range", tag_file.read_text())
    with urllib.request.urlopen(request, timeout=30) as answer:
        resumed = answer.status == 206
        start = there if resumed else 0
        sent = answer.headers.get("Content-Range", "")
        if resumed and not sent.startswith(f"bytes {start}-"):
            partial.unlink()
            raise OSError(f"bytes from {start} on were asked for, the answer has {sent!r}")
        length = answer.headers.get("Content-Length")
        tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
        if tag and not resumed:
            tag_file.write_text(tag)
        total = start + int(length) if length else None
        with (
            open(partial, "ab" if resumed else "wb") as file,
            tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=partial.stem,
                 disable=None) as bar,
        ):  # fmt: skip
            while piece := answer.read(PIECE):
                file.write(piece)
                bar.update(len(piece))
    if total is not None and partial.stat().st_size != total:
        raise OSError(f"{partial.stat().st_size} of {total} bytes arrived")
    tag_file.unlink(missing_ok=True)

"""Files that are whole or as they were, and can be read elsewhere: bytes, JSON, tensors."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor


def replace_file(path: str | Path, write: Callable[[IO[bytes]], Any], ending: str = "part") -> None:
    """Write a file that is complete or as it was, also when the power fails; make its folder.

    Until then it has another ending, always the same, so that what a killed process leaves is
    written over by the next. What cannot be written is an OSError of one sentence.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{ending}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        if partial.exists():
            partial.unlink()
        if not isinstance(error, OSError | RuntimeError):
            raise
        cause: BaseException = error  # torch.save hides the system's error behind its own
        while cause.__context__ is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        raise OSError(f"{path} could not be written: {cause}") from error


def check_writable(folder: Path) -> None:
    """Make a folder, or refuse one that cannot be written, before work is done for it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{folder} cannot be written: {error.strerror}") from error


def plain_json(value: Any, **how: Any) -> str:
    """Plain values as JSON, which has no NaN and no infinity: null stands for both."""
    known = json.loads(json.dumps(value), parse_constant=lambda _: None)
    return json.dumps(known, **how)


def write_json(path: str | Path, value: Any) -> None:
    """Write plain values, for people to read, too."""
    text = plain_json(value, indent=1) + "\n"
    replace_file(path, lambda file: file.write(text.encode()))


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], ending: str = "part", **header: str
) -> None:
    """Write a .safetensors file with a header of texts."""
    kept = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    content = save(kept, header or None)  # open() heeds the umask, save_file does not
    replace_file(path, lambda file: file.write(content), ending)


def header_of(path: str | Path, of: str, *names: str) -> list[Any]:
    """What the header of a .safetensors file holds, as JSON; a file without it is not one `of`."""
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
        return [json.loads(header[name]) for name in names]
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged or not a readable {of} file: {error}") from error

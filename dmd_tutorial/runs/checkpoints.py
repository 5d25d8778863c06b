"""Checkpoints: written whole or not at all, the last two kept, checked when they are read.

Where a process is killed, a disk is full or a folder turns read-only, the last good checkpoint
stays as it is.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch


def save_atomically(content: object, path: str | Path) -> None:
    """`torch.save` into a file that is complete or does not exist, also when the power fails.

    Args:
        content: What `torch.save` takes.
        path: Where to; the folder is made.

    Raises:
        OSError: If it cannot be written, a full disk say; what was there before is untouched.
    """
    replace_file(path, lambda file: torch.save(content, file))


def replace_file(path: str | Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file that is complete or as it was before.

    Args:
        path: Where to; the folder is made.
        write: Writes the content into an open file.

    Raises:
        OSError: If it cannot be written; what was there before is untouched.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".part")  # one name: what a killed process leaves is
    try:  # written over by the next
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        if partial.exists():
            partial.unlink()
        if isinstance(error, OSError | RuntimeError):  # torch.save turns the first into the second
            raise OSError(f"{path} could not be written: {_cause(error)}") from error
        raise


def save_checkpoint(state: dict, notes: dict, path: str | Path) -> None:
    """Write a checkpoint and keep the one before it, as ``<path>.before``.

    Args:
        state: What a run must get back, tensors and plain values.
        notes: Plain values that say which run it belongs to.
        path: Where to.

    Raises:
        OSError: If it cannot be written; the message names the last good checkpoint.
    """
    path = Path(path)
    fresh = path.with_name(path.name + ".new")
    try:
        save_atomically({"state": state, "notes": notes}, fresh)
        if path.exists():
            os.replace(path, before(path))
        os.replace(fresh, path)  # killed just before this line, a run continues from `before`
    except OSError as error:
        good = newest(path)
        rest = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
        raise OSError(f"{_cause(error)} ({rest})") from error


def load_checkpoint(path: str | Path, notes: dict) -> tuple[dict, dict]:
    """Read a checkpoint; where it is damaged, the one before it.

    Args:
        path: What `save_checkpoint` was given.
        notes: Values that must be what they were when it was saved.

    Returns:
        The state and all notes that were saved.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If neither can be read, or the run was another one.
    """
    candidates = [p for p in (Path(path), before(path)) if p.exists()]
    if not candidates:
        raise FileNotFoundError(f"there is no checkpoint {path}")
    problems = []
    for candidate in candidates:
        try:
            checkpoint: dict[str, Any] = torch.load(
                candidate, map_location="cpu", weights_only=True
            )
            state, found = checkpoint["state"], checkpoint["notes"]
        except Exception as error:
            problems.append(f"{candidate} is not a readable checkpoint: {error}")
            continue
        if problems:
            print(f"{problems[0].splitlines()[0]} Continuing from {candidate}.")
        _check_notes(candidate, found, notes)
        return state, found
    raise ValueError("; ".join(problems))


def newest(path: str | Path) -> Path | None:
    """The newest checkpoint of a run.

    Args:
        path: What `save_checkpoint` was given.

    Returns:
        The file, or None where there is none.
    """
    return next((p for p in (Path(path), before(path)) if p.exists()), None)


def before(path: str | Path) -> Path:
    """Where the last but one checkpoint is kept.

    Args:
        path: What `save_checkpoint` was given.

    Returns:
        Its path with ``.before`` at the end.
    """
    path = Path(path)
    return path.with_name(path.name + ".before")


def _check_notes(path: Path, found: dict, wanted: dict) -> None:
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ValueError(f"{path} was made with {name} = {found.get(name)!r}, not {value!r}")


def _cause(error: BaseException) -> str:
    """The system's own words, from behind torch's."""
    while error.__context__ is not None and not isinstance(error, OSError):
        error = error.__context__
    return str(error)

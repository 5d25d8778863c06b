"""Checkpoints: written whole or not at all, the last two kept, checked when they are read.

Where a process is killed, a disk is full or a folder turns read-only, the last good checkpoint
stays as it is; what could not be written is an `OSError` of one sentence.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import torch

UNSAID = "not said"


def replace_file(path: str | Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file that is complete or as it was, also when the power fails; make its folder."""
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


def check_writable(folder: Path) -> None:
    """Make a folder, or refuse one that cannot be written, before work is done for it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{folder} cannot be written: {error.strerror}") from error


def save_checkpoint(state: dict, notes: dict, path: str | Path) -> None:
    """Write a run's state with plain notes, such as settings; keep the one `before` it."""
    path = Path(path)
    fresh = path.with_name(path.name + ".new")
    try:
        replace_file(fresh, partial(torch.save, {"state": state, "notes": notes}))
        if path.exists():
            os.replace(path, before(path))
        os.replace(fresh, path)  # killed just before this line, a run continues from `before`
    except OSError as error:
        raise OSError(f"{_cause(error)} ({last_good(path)})") from error


def load_checkpoint(path: str | Path, notes: dict) -> tuple[dict, dict]:
    """Read the state and all notes of a checkpoint; where it is damaged, of the one before it.

    A checkpoint whose notes are not the `notes` given belongs to another run, and is refused.
    """
    problems = []
    for candidate in [p for p in (Path(path), before(path)) if p.exists()]:
        try:
            checkpoint = torch.load(candidate, map_location="cpu", weights_only=True)
            state, found = checkpoint["state"], checkpoint["notes"]
        except Exception as error:
            problems.append(f"{candidate} is not a readable checkpoint: {error}")
            continue
        if problems:
            print(f"{problems[0].splitlines()[0]} Continuing from {candidate}.")
        if differ := _differences({name: found.get(name, UNSAID) for name in notes}, notes):
            said = f"{candidate} is of another run ({', '.join(differ)})"
            raise ValueError(f"{said}: --fresh starts over, --out is another folder")
        return state, found
    if not problems:
        raise FileNotFoundError(f"there is no checkpoint {path}")
    raise ValueError("; ".join(problems))


def newest(path: str | Path) -> Path | None:
    """The newest checkpoint of a run, None where there is none."""
    return next((p for p in (Path(path), before(path)) if p.exists()), None)


def last_good(path: Path | None) -> str:
    """Which checkpoint is there to go back to, in words."""
    good = newest(path) if path else None
    return f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"


def before(path: str | Path) -> Path:
    """Where the last but one checkpoint is kept."""
    return Path(path).with_name(Path(path).name + ".before")


def _differences(was: dict, now: dict) -> list[str]:
    """``name: was -> now`` of the values that differ, also inside of settings."""
    differ = []
    for name in now | was:
        before, after = was.get(name, UNSAID), now.get(name, UNSAID)
        if isinstance(before, dict) and isinstance(after, dict):
            differ += _differences(before, after)
        elif before != after:
            differ.append(f"{name}: {before} -> {after}")
    return differ


def _cause(error: BaseException) -> str:
    """The system's own words, from behind torch's."""
    while error.__context__ is not None and not isinstance(error, OSError):
        error = error.__context__
    return str(error)

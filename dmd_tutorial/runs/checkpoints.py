"""Checkpoints: whole or not there, the last two kept, checked when they are read.

Where a process is killed or a disk is full, the last good one stays as it is.
"""

import os
from functools import partial
from pathlib import Path

import torch

from dmd_tutorial.files import replace_file

UNSAID = "not said"


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
        raise OSError(f"{error} ({last_good(path)})") from error


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

"""Where a result comes from, and where it goes."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from dmd_tutorial import __version__

DRIVE = Path("/content/drive/MyDrive")  # Colab's, once it is mounted
PACKAGE = Path(__file__).parents[2]  # its clone, where it is one
DESCRIBE = ("describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+")  # +: changed since
DRIVER = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def runs_folder() -> Path:
    """Where runs are kept: in Colab on a mounted Drive, which outlives the machine."""
    return DRIVE / "dmd-tutorial" if DRIVE.is_dir() else Path("runs")


def provenance() -> dict:
    """What a result must say about how it was made: device, driver, threads, versions, commit."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    git = ("git", "-C", str(PACKAGE), *DESCRIBE) if (PACKAGE / ".git").exists() else None
    return {
        "device": gpu or "cpu", "driver": _said(*DRIVER) if gpu else None,
        "threads": torch.get_num_threads(), "commit": _said(*git) if git else None,
        "versions": {
            "dmd_tutorial": __version__, "torch": torch.__version__,
            "torch-fidelity": version("torch-fidelity"), "cuda": torch.version.cuda,
            "python": platform.python_version(),
        },
    }  # fmt: skip


def _said(*command: str) -> str | None:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip().split("\n")[0] or None

"""What differs in Google Colab: a machine that goes away, and a Drive that stays."""

from pathlib import Path

DRIVE = Path("/content/drive/MyDrive")


def runs_folder() -> Path:
    """Where runs are kept: in Google Drive if it is mounted, else in ``runs`` here.

    In Colab a run on Drive survives its machine: after `drive.mount("/content/drive")` on the
    next one, the same command goes on from the last checkpoint.

    Returns:
        The folder; it need not exist yet.
    """
    return DRIVE / "dmd-tutorial" if DRIVE.is_dir() else Path("runs")

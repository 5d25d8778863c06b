"""Execute the book's notebooks with nbval, as many at once as there are cores.

A cell that raises is a failed test. Outputs go into the cache of the site; a notebook whose code
and package sources did not change since it passed is not executed again. With --one-at-a-time each
notebook has the whole machine to itself: slower, and the way to measure how long a chapter takes.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import book_site
import book_source
import nbformat
from book_source import ROOT
from jupyter_cache import get_cache
from jupyter_cache.base import JupyterCacheAbstract

SECONDS_PER_CELL = 900  # far above any budget: a cell that hangs must end some time


def cores() -> int:
    """Return how many cores this process may use, which a container may have limited."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def seconds(cache: JupyterCacheAbstract, path: Path) -> float | None:
    """Return how long the notebook took as it stands, None if its outputs are not there."""
    try:
        record = cache.match_cache_notebook(nbformat.read(path, as_version=4))
    except KeyError:
        return None
    return record.data["execution_seconds"]


def quiet_kernels() -> Path:
    """Make settings for the kernels: no advice in the log, nobody's start-up files."""
    profile = ROOT / "_build" / "ipython" / "profile_default"
    profile.mkdir(parents=True, exist_ok=True)
    (profile / "ipython_kernel_config.py").write_text("get_config().IPKernelApp.log_level = 40\n")
    return profile.parent


def main() -> int:
    """Execute what is not in the cache; the status is pytest's."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--one-at-a-time", action="store_true", help="to measure how long each takes"
    )
    alone = parser.parse_args().one_at_a_time
    cache = get_cache(book_site.cache_folder())
    # The last chapter is the longest: begin with it.
    missing = [path for path in reversed(book_source.notebooks()) if seconds(cache, path) is None]
    if not missing:
        print("every notebook is in the cache")
        return 0
    workers = 1 if alone else min(cores(), len(missing))
    print(f"executing {len(missing)} notebook(s), {workers} at a time", flush=True)
    pytest = [
        sys.executable, "-m", "pytest", *map(str, missing), "-q", "-p", "keep_outputs",
        "--nbval-lax", "--nbval-current-env", f"--nbval-cell-timeout={SECONDS_PER_CELL}",
        "-n", str(workers), "--dist", "loadfile", "--no-loadscope-reorder",
    ]  # fmt: skip
    settings = {
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        ),
        "IPYTHONDIR": str(quiet_kernels()),
        "DMD_TUTORIAL_STATIC": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores() // workers))),
    }
    status = subprocess.run(pytest, cwd=ROOT, env=os.environ | settings).returncode
    for path in missing:
        if (took := seconds(cache, path)) is not None:
            print(f"{path.name}: {took:.0f} s")
    return status


if __name__ == "__main__":
    sys.exit(main())

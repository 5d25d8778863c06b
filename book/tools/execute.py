"""Execute the book's notebooks, as many at once as there are cores, into the cache of the site.

The site build would execute them too, one after the other. Notebooks whose code and package
sources did not change are served from the cache. With --one-at-a-time each notebook has the whole
machine to itself: slower, and the way to measure how long a chapter takes.
"""

import argparse
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import book_site
import book_source
import nbformat
from book_source import ROOT
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn, JupyterCacheAbstract
from jupyter_cache.executors.utils import single_nb_execution

COLOURS = re.compile(r"\x1b\[[\d;]*m")  # of a traceback, for terminals
SECONDS_PER_CELL = 900  # far above any budget: a cell that hangs must end some time


def cores() -> int:
    """Return how many cores this process may use, which a container may have limited."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_cached(cache: JupyterCacheAbstract, path: Path) -> bool:
    """Return whether the cache holds the outputs of the notebook as it stands."""
    try:
        cache.match_cache_notebook(nbformat.read(path, as_version=4))
    except KeyError:
        return False
    return True


def execute(path: Path) -> str:
    """Execute one notebook and store its outputs; return the traceback, empty if all went well."""
    start = time.monotonic()
    notebook = nbformat.read(path, as_version=4)
    result = single_nb_execution(
        notebook, cwd=str(path.parent), timeout=SECONDS_PER_CELL, allow_errors=False
    )
    print(f"{path.name}: {time.monotonic() - start:.0f} s", flush=True)
    if result.err is not None:
        return f"{path.name} failed:\n{COLOURS.sub('', result.exc_string)}"
    bundle = CacheBundleIn(notebook, str(path), data={"execution_seconds": result.time})
    cache = get_cache(book_site.cache_folder())
    cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)
    return ""


def quiet_kernels() -> None:
    """Give the kernels settings of their own: no advice in the log, nobody's start-up files."""
    profile = ROOT / "_build" / "ipython" / "profile_default"
    profile.mkdir(parents=True, exist_ok=True)
    (profile / "ipython_kernel_config.py").write_text("get_config().IPKernelApp.log_level = 40\n")
    os.environ["IPYTHONDIR"] = str(profile.parent)


def main() -> int:
    """Execute what is not cached; return 1 if a notebook failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--one-at-a-time", action="store_true", help="to measure how long each takes"
    )
    alone = parser.parse_args().one_at_a_time
    cache = get_cache(book_site.cache_folder())
    # The last chapter is the longest: begin with it.
    missing = [path for path in reversed(book_source.notebooks()) if not is_cached(cache, path)]
    if not missing:
        print("every notebook is in the cache")
        return 0
    workers = 1 if alone else min(cores(), len(missing))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // workers)))
    os.environ["DMD_TUTORIAL_STATIC"] = "1"
    quiet_kernels()
    print(f"executing {len(missing)} notebook(s), {workers} at a time", flush=True)
    with ProcessPoolExecutor(workers) as pool:
        failures = [text for text in pool.map(execute, missing) if text]
    print("\n".join(failures), end="")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

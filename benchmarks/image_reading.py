"""Time and memory of reading a zip of images: both must grow with their number and no faster.

    python benchmarks/image_reading.py

Each number of images is read in a process of its own, so that its highest memory is its own. The
images are small, so that what grows is the work on names, labels and the array.
"""

import argparse
import io
import json
import resource
import tempfile
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from dmd_tutorial.runs.images import read_images

CLASSES = 100


def make_zip(path: Path, count: int, size: int) -> None:
    """Noise in colours, a few different images under many names, in class folders, labelled."""
    rng, files = np.random.default_rng(0), []
    for _ in range(16):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).save(file, "PNG")
        files.append(file.getvalue())
    names = [f"{number % CLASSES:03}/{number:07}.png" for number in range(count)]
    with zipfile.ZipFile(path, "w") as archive:
        for number, name in enumerate(names):
            archive.writestr(f"set/{name}", files[number % len(files)])
        labels = [[name, number % CLASSES] for number, name in enumerate(names)]
        archive.writestr("set/dataset.json", json.dumps({"labels": labels}))


def measure(path: Path, size: int) -> dict[str, float]:
    """Read one zip: seconds of the processor, and memory above what there was before."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    read = read_images(path, size)
    seconds = time.process_time() - started
    used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    count = len(read.names)
    return {
        "images": count, "seconds": round(seconds, 2),
        "microseconds an image": round(1e6 * seconds / count),
        "memory over the images": round(used / read.x.nbytes, 2),
    }  # fmt: skip


def main() -> None:
    """Print one line of JSON for each number of images."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    counts = [1_000, 3_000, 10_000, 30_000, 100_000]
    parser.add_argument("--counts", type=int, nargs="+", default=counts, help="(%(default)s)")
    parser.add_argument("--size", type=int, default=32, help="of the images (%(default)s)")
    options = parser.parse_args()
    fresh = ProcessPoolExecutor(1, max_tasks_per_child=1)
    with fresh, tempfile.TemporaryDirectory() as folder:
        for count in options.counts:
            path = Path(folder, f"{count}.zip")
            make_zip(path, count, options.size)
            print(json.dumps(fresh.submit(measure, path, options.size).result()), flush=True)
            path.unlink()


if __name__ == "__main__":
    main()

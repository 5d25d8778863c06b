"""The table of the small text-to-image model: its teacher, and students in one evaluation.

    python -m benchmarks.text_to_image --pipeline DIR --reader FILE --work DIR

Every seed has pairs, draws and evaluation noise of its own; two sets of evaluation noise for each
student tell the spread of the measure from that of training. Rows that are in the file are not
made again; with --minutes the program stops between two steps, and ends with status 3 where there
is more to do. `benchmarks/text_students.py` says how students are trained, and
`benchmarks/prompt_measures.py` what is measured.

An evaluation takes about 1.2 ms of a core: three hours for all students of a seed, 50 minutes for
the teacher's rows of 3,200 pictures each. Several may run at once, with other seeds and files, once
the teacher's rows are there; a last run then measures, for one file, all that is kept in --work.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.prompt_measures import Drawn, Gauge, summary
from benchmarks.text_students import (
    METHODS,
    QUICK,
    SCALE,
    Sizes,
    Workshop,
    costs,
    per_picture,
    settings_of,
)
from dmd_tutorial import samplers
from dmd_tutorial.anchor import fingerprint
from dmd_tutorial.data.captioned import Reader, captions_of_one
from dmd_tutorial.files import write_json
from dmd_tutorial.generators import OneStepGenerator
from dmd_tutorial.runs.provenance import provenance
from dmd_tutorial.text_to_image.prompted import Prompted, load_pipeline

SCALES = (1.0, 1.5, 2.0, 3.0, 5.0, 8.0)  # of the teacher
NOISES, REFERENCE = (0, 1), 2  # numbers of the teacher's evaluation noise, and of drawn pictures
WHAT = {
    "follows": "Share of pictures in which the reader finds what their prompt says.",
    "to_drawn": "From drawn pictures of the same prompts, in the reader's features (no FID).",
    "to_teacher": f"From other samples of the teacher at scale {SCALE:g}.",
    "variety": "Mean distance of two pictures of one prompt, in the reader's features, over that "
    "of drawn pictures. A picture of something else counts as variety, too.",
    "saturation": "Largest minus least colour, mean over what is coloured, over that of drawn "
    "pictures: above 1 is burnt. In 8 bits 2 is the largest difference there can be.",
    "floors": "The row of drawn pictures is what perfect ones would get; that of the teacher at "
    f"scale {SCALE:g} is the floor of the distance to its own samples.",
    "evaluations": "Of networks, for one training: a forward 1, with a backward pass 3, guidance "
    "2; without those of the pairs and of the student that it starts from.",
    "per_picture": "Evaluations for one picture.",
}


def student_noises(seed: int) -> tuple[int, int]:
    return 10 * (seed + 1), 10 * (seed + 1) + 1


def baselines(shop: Workshop) -> Iterator[tuple[dict, tuple[int, ...], Callable[[int], Drawn]]]:
    """Rows without training: what is said of them, their noises, pictures of each noise."""
    yield {"row": "drawn"}, NOISES, shop.drawn
    coded = {"row": "drawn, through the autoencoder"}
    yield coded, NOISES, lambda number: shop.decoded(shop.encoded(shop.drawn(number)))
    start = {"row": "teacher, one evaluation", "per_picture": 1}
    yield start, NOISES, partial(shop.of_student, OneStepGenerator(shop.model))
    for scale in SCALES:
        said = {"row": f"teacher, scale {scale:g}", "scale": scale}
        said["per_picture"] = per_picture(shop.sizes, scale)
        yield said, NOISES if scale == SCALE else NOISES[:1], partial(shop.of_teacher, scale)


def rows(
    shop: Workshop, reader: Reader, seeds: Iterable[int], methods: Iterable[str], done: set
) -> Iterator[dict]:
    """What is not done yet, row by row."""
    prompts, drawn = shop.model.prompts, shop.drawn(REFERENCE)
    gauge = Gauge(reader, prompts, drawn, shop.of_teacher(SCALE, REFERENCE))
    for said, noises, pictures in baselines(shop):
        if (said["row"], None) not in done:
            yield {**said, "seed": None, "measured": [gauge.measure(pictures(n)) for n in noises]}
            shop.pause()
    for seed in seeds:
        for name in methods:
            if (name, seed) not in done:
                took, student = shop.train(name, seed), shop.student(name, seed)
                made = (shop.of_student(student, number) for number in student_noises(seed))
                said = {"row": name, "seed": seed, "per_picture": 1, **took}
                yield said | {"measured": [gauge.measure(pictures) for pictures in made]}
                shop.pause()


def speed(shop: Workshop, repeats: int = 3) -> dict:
    """Pictures a second of one core, decoding included: one step beside the guided teacher."""
    z = shop.noise(NOISES[0])[: shop.sizes.speed_batch]
    label, student = shop.label(len(z)), OneStepGenerator(shop.model)
    ways: dict[str, Callable[[], Tensor]] = {
        "teacher": lambda: shop.walk(shop.teacher, z, label),
        "student": lambda: samplers.one_step(student, z, label),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for name in [*ways] * repeats:
        started = time.process_time()
        shop.decoded(Drawn(ways[name](), label))
        seconds[name].append(time.process_time() - started)
    rate = {name: len(z) / statistics.median(each) for name, each in seconds.items()}
    return {"batch": len(z), **rate, "ratio": rate["student"] / rate["teacher"]}


def load_reader(path: Path) -> Reader:
    reader = Reader()
    reader.load_state_dict(load_file(path) if path.suffix == ".safetensors" else torch.load(path))
    return reader


def with_starts(names: Iterable[str]) -> list[str]:
    """Methods, and the ones that their students start from, in the table's order."""
    wanted = {start for name in names for start in (name, METHODS[name].start)}
    return [name for name in METHODS if name in wanted]


def settings(sizes: Sizes) -> dict:
    """Of all methods, as plain values."""
    return {
        name: {"start": method.start, "rank": method.rank, **asdict(settings_of(name, sizes))}
        for name, method in METHODS.items()
    }


def main(arguments: list[str] | None = None, over: Callable[[], bool] | None = None) -> None:
    """Make what is missing, write after every row; `over` says that time is up."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pipeline", type=Path, required=True, help="its folder, of diffusers")
    parser.add_argument("--reader", type=Path, required=True, help="the reader's weights")
    parser.add_argument("--work", type=Path, required=True, help="folder of all that is made")
    parser.add_argument("--out", type=Path, default=Path("book/results/text-to-image.json"))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--pictures", type=int, help="of each measurement: 9,600 for the record")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--quick", action="store_true", help="tiny, for a test")
    options = parser.parse_args(arguments)
    torch.set_flush_denormal(True)
    end = time.monotonic() + 60 * options.minutes
    sizes = QUICK if options.quick else Sizes()
    sizes = replace(sizes, pictures=options.pictures or sizes.pictures)
    model = Prompted(load_pipeline(options.pipeline), captions_of_one())
    reader = load_reader(options.reader)
    shop = Workshop(model, options.work, sizes, over or (lambda: time.monotonic() > end))
    made = {**shop.made_by, "pictures": sizes.pictures, "reader": fingerprint(reader)}
    report = json.loads(options.out.read_text()) if options.out.exists() else {"made_by": made}
    if report["made_by"] != made:
        raise ValueError(f"{options.out} was made by {report['made_by']}, not {made}")
    report |= {"what": WHAT, "settings": settings(sizes), "costs": costs(sizes)}
    report.setdefault("rows", [])
    done = {(row["row"], row["seed"]) for row in report["rows"]}
    for row in rows(shop, reader, options.seeds, with_starts(options.methods), done):
        report["rows"].append(row | provenance())
        report["summary"] = summary(report["rows"])
        write_json(options.out, report)
        print(row["row"], row["seed"], row["measured"][0]["follows"]["all"], flush=True)
    write_json(options.out, report | {"speed": speed(shop)} | provenance())


if __name__ == "__main__":
    main()

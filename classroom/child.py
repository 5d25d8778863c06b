"""Run submitted answers: a server that has PyTorch loaded and makes a process for each answer.

`classroom.grade` starts it, inside the sandbox if there is one, and asks it line by line. It alone
executes what students wrote: the statements that an answer needs, then `Exercise.outcome`. It
compares nothing, and knows no right answer: those are thrown away before the first process is made.
"""

import ast
import json
import linecache
import os
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import torch
import torch._dynamo  # an optimiser imports it: once, not in each process

from classroom import outcomes, private, sandbox
from dmd_tutorial import notebook
from dmd_tutorial.notebook import exercises as framework
from dmd_tutorial.notebook.exercises import Exercise

CELL = "<cell"
STEP = 0.5  # seconds between two looks at the clock
ASLEEP = 10  # times as much a second counts in which an answer does not even ask for the processor


def blind(module: Any) -> dict[str, Exercise]:
    """Return a module's exercises without their answers, and leave none in the module either."""
    blinded = {e.number: replace(e, truth=None, mistakes={}) for e in module.EXERCISES}
    needed = {f"__{name}__" for name in ("name", "builtins", "package", "spec", "loader", "file")}
    waiting = [f for e in blinded.values() for f in (e.inputs, e.probe)]
    while waiting:
        for function in reached(waiting.pop()):
            names = {n for n in names_in(function.__code__) if n in vars(module)} - needed
            needed |= names
            waiting += [vars(module)[name] for name in names]
    for name in set(vars(module)) - needed:
        delattr(module, name)
    return blinded


def reached(value: Any) -> Iterable[FunctionType]:
    """Yield the functions in a function's closure, a class or a partial, and itself."""
    if isinstance(value, FunctionType):
        yield value
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        inner = [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    elif isinstance(value, type):
        inner = [*vars(value).values()]
    else:
        inner = [each for each in [getattr(value, "func", None)] if each]
        inner += [*getattr(value, "args", ())]
    for each in inner:
        if isinstance(each, FunctionType) and each is not value:
            yield from reached(each)


def names_in(code: CodeType) -> set[str]:
    """Return the names that a function and the functions in it refer to."""
    inner = [names_in(each) for each in code.co_consts if isinstance(each, CodeType)]
    return set(code.co_names).union(*inner)


def answer_of(job: dict[str, Any]) -> Any:
    """Execute the statements that an answer needs, and return the answer."""
    names: dict[str, Any] = {"__name__": "submission"}
    for place, source, wanted in job["cells"]:
        file = f"{CELL} {place}>"
        # for the learner's line in a sentence
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        tree = ast.parse(source)
        tree.body = [tree.body[i] for i in wanted]
        exec(compile(tree, file, "exec"), names)
    return eval(compile(job["answer"], "<check>", "eval"), names)


def outcome(exercise: Exercise, job: dict[str, Any]) -> list[Any]:
    """Return how it went and, if an answer came out, whether it is a function, and its outcome."""
    before = sandbox.used()[1]
    try:
        answer = answer_of(job)
    except NotImplementedError:
        return ["open"]
    except MemoryError:
        return ["memory"]
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.line for frame in frames if frame.filename.startswith(CELL)]
        where = f" at your line `{lines[-1]}`" if lines else ""
        return ["raised", f"your code raised {type(error).__name__}: {error}{where}"]
    try:
        found = exercise.outcome(... if answer is None else answer)
        return ["outcome", callable(answer), found]
    except framework._Open:
        return ["open"]
    except framework._Endless:
        return ["endless" + held_much(resource.getrusage(resource.RUSAGE_SELF), before, job)]
    except MemoryError:
        return ["memory"]
    except BaseException as error:
        return ["uncomparable", f"{type(error).__name__}: {error}"]


def held_much(usage: Any, before: int, job: dict[str, Any]) -> str:
    """Return what to add to a word for what took too long, if it took much memory as well."""
    more = usage.ru_maxrss * 2**10 - before
    return " with much memory" if more > job["memory"] / 2 * 2**30 else ""


def in_a_process(exercise: Exercise, job: dict[str, Any], pipe: int) -> None:
    """Write the outcome into a pipe; there is no way back from here."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nothing, standard)
    os.dup2(pipe, 3)
    os.closerange(4, 1024)
    framework.SECONDS = job["seconds"] / 2
    sandbox.limit(job["seconds"], job["memory"])
    sandbox.forbid()
    try:
        data = outcomes.dump(outcome(exercise, job))
    except BaseException as error:  # it refers to itself, is too large, ...
        data = outcomes.dump(["uncomparable", f"{type(error).__name__}: {error}"])
    while data:
        data = data[os.write(3, data) :]


def run(exercise: Exercise, job: dict[str, Any]) -> tuple[str, bytes]:
    """Run an answer in a process of its own: how that ended, and what it wrote."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            in_a_process(exercise, job, writing)
        finally:
            os._exit(0)
    before = sandbox.used(process)[1]
    os.close(writing)
    data, end = b"", time.monotonic() + job["wall"]
    while (left := end - time.monotonic()) > 0 and len(data) <= outcomes.LARGEST:
        if select.select([reading], [], [], min(left, STEP))[0]:
            part = os.read(reading, 2**20)
            data += part
            if not part:
                break
        elif sandbox.sleeps(process):
            end -= (ASLEEP - 1) * STEP
    os.close(reading)
    # who closed the pipe without an end of the process has nothing more to say
    os.kill(process, signal.SIGKILL)
    _, status, usage = os.wait4(process, 0)
    sandbox.kill_all_others()
    if left <= 0:
        return "wall" + held_much(usage, before, job), b""
    if not data and usage.ru_utime + usage.ru_stime >= job["seconds"]:
        return "seconds" + held_much(usage, before, job), b""
    return ("done" if data else f"ended {os.waitstatus_to_exitcode(status)}"), data


def sweep() -> None:
    """Let no answer find what another one has left."""
    for path in Path(sandbox.SCRATCH).iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def blinded() -> dict[str, Exercise]:
    """Return all exercises without their answers; the first line has the private ones' source."""
    known: dict[str, Exercise] = {}
    framework.chapters()
    for name in [n for n in sys.modules if n.startswith(f"{framework.__name__}.chapter")]:
        known |= blind(sys.modules[name])
    if source := json.loads(sys.stdin.readline()):
        known |= blind(private.executed(source))
    return known


def main() -> None:
    """Answer questions: a line of JSON each, then a line of JSON and bytes for each."""
    sandbox.hide()
    torch.set_num_threads(1)
    known = blinded()
    # a check in a loop, say, is let be
    framework.check = notebook.check = lambda *_, **__: None  # type: ignore[assignment]
    print("ready", flush=True)
    while line := sys.stdin.readline():
        job = json.loads(line)
        if os.getpid() == 1:
            sweep()
        status, data = run(known[job["number"]], job)
        sys.stdout.write(json.dumps([status, len(data)]) + "\n")
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()

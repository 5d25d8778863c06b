"""A chapter in JupyterLab: run from another folder, interrupted, its cells run again."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
import threading

import book_source
import cells
import format_notebooks
import nbformat
import pdf
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from dmd_tutorial.notebook import kernel

PATIENCE = 1.0  # seconds that a cell may run before it is interrupted, the first time
CHAPTER = next(path for path in book_source.chapters() if path.stem.startswith("3-"))


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A chapter's code cells and a kernel with live sliders, started in an empty folder."""
    monkeypatch.delenv("DMD_TUTORIAL_STATIC", raising=False)
    notebook = nbformat.read(CHAPTER, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    where = {"metadata": {"path": str(tmp_path)}}
    client = NotebookClient(notebook, timeout=300, resources=where)
    with client.setup_kernel():
        yield client


def run(client, index):
    """Run one cell; its failure is raised."""
    return client.execute_cell(client.nb.cells[index], index)


def interrupted(client, index):
    """Run one cell, interrupt it if it takes its time, and return whether that was needed.

    What the reader sees then is a KeyboardInterrupt, or what PyTorch's C++ made of it on the way:
    either will do, as the cell runs again.
    """
    alarm = threading.Timer(PATIENCE, os.kill, (client.km.provisioner.pid, signal.SIGINT))
    alarm.start()
    try:
        run(client, index)
    except CellExecutionError:
        if not alarm.finished.is_set():  # an error of the cell's own
            raise
        return True
    finally:
        alarm.cancel()
        alarm.join()
    return False


def errors(cell):
    return [output for output in cell.outputs if output.output_type == "error"]


@pytest.mark.slow
def test_a_chapter_survives_another_folder_interruptions_and_a_second_run_of_each_cell(lab):
    """Each assertion of the chapter holds although every cell ran twice, some cut short."""
    chapter = lab.nb.cells
    for index in range(2):  # the set-up: Python does not recover PyTorch's own import
        run(lab, index)
    times_interrupted = 0
    for index in range(2, len(chapter)):
        times_interrupted += interrupted(lab, index)
        run(lab, index)
        assert errors(chapter[index]) == []
    assert times_interrupted >= 1
    widgets = "application/vnd.jupyter.widget-view+json"
    shown = [output.get("data", {}) for cell in chapter for output in cell.outputs]
    assert any(widgets in data for data in shown)  # it was the live form that ran


def test_an_interrupted_cell_leaves_what_stood_before(lab):
    """After an interruption the kernel knows its variables and draws on."""
    loop = copy.deepcopy(lab.nb.cells[0])
    loop.source = "kept = 41\nwhile True:\n    kept = kept"
    lab.nb.cells = [loop]
    assert interrupted(lab, 0)
    loop.source = "assert kept == 41\nkept += 1\nkept"
    assert run(lab, 0).outputs[0]["data"]["text/plain"] == "42"


# What an interruption must not cut in half

SET_UP_KERNEL = "from dmd_tutorial.notebook import setup\nsetup()"
INTERRUPTED_SET_UP = """\
import os, signal, sys, threading
assert "torch._dynamo" not in sys.modules
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
setup()
threading.Event().wait()
"""
TAKES_A_STEP = """\
weight = torch.nn.Parameter(torch.ones(()))
optimizer = torch.optim.SGD([weight], lr=0.5)
(weight**2).backward()
optimizer.step()
assert weight.item() == 0.0
"""


@pytest.mark.slow
def test_the_set_up_may_be_interrupted(lab):
    """It imports what an optimiser needs; cut in half, none could be made in this kernel."""
    cell = copy.deepcopy(lab.nb.cells[0])
    lab.nb.cells = [cell]
    cell.source = "import torch\nfrom dmd_tutorial.notebook import setup"
    run(lab, 0)
    cell.source = INTERRUPTED_SET_UP
    with pytest.raises(CellExecutionError, match="KeyboardInterrupt"):
        run(lab, 0)
    cell.source = TAKES_A_STEP
    run(lab, 0)


@pytest.mark.slow
def test_an_interrupted_cell_does_not_leave_gradients_off(lab):
    """As an interrupt does that falls between the switch of `no_grad` and its block."""
    cell = copy.deepcopy(lab.nb.cells[0])
    lab.nb.cells = [cell]

    def outcome(source):
        cell.source = source
        return run(lab, 0)

    outcome(f"import torch\n{SET_UP_KERNEL}\nsetup()")  # a cell that runs twice changes nothing
    outcome("callbacks = get_ipython().events.callbacks['post_run_cell']")
    outcome("assert sum('keep_gradients' in str(each) for each in callbacks) == 1")
    with pytest.raises(CellExecutionError, match="KeyboardInterrupt"):
        outcome("torch.no_grad().__enter__()\nraise KeyboardInterrupt")
    outcome("assert torch.is_grad_enabled()\ntorch.set_grad_enabled(False)")
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        outcome("assert not torch.is_grad_enabled()\n1 / 0")  # who wants them off keeps them off
    outcome("assert not torch.is_grad_enabled()")


IMPORTS_ALL = """\
import importlib, pkgutil, signal, sys
import matplotlib.pyplot
import torch.utils.data  # other packages' own hooks come with them
from ipykernel.zmqshell import ZMQInteractiveShell

shell = ZMQInteractiveShell.instance()

def state():
    hooks = [repr(each) for each in sys.meta_path + sys.path_hooks]
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    events = {name: list(calls) for name, calls in shell.events.callbacks.items()}
    looks = dict(dict.items(matplotlib.rcParams))  # as they stand: no backend is chosen
    return hooks, handlers, events, looks, sys.excepthook, sys.displayhook, torch.is_grad_enabled()

import dmd_tutorial
before = state()
names = [module.name for module in pkgutil.walk_packages(dmd_tutorial.__path__, "dmd_tutorial.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
assert len(names) > 60
for old, new in zip(before, state(), strict=True):
    assert old == new, (old, new)
"""


def test_importing_the_package_changes_nothing_in_a_kernel():
    done = subprocess.run([sys.executable, "-c", IMPORTS_ALL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_outside_of_a_kernel_only_the_look_is_set():
    command = """if True:
        import sys
        import matplotlib
        from dmd_tutorial.notebook import setup
        colour = matplotlib.rcParams["lines.linewidth"]
        setup()
        assert "torch._dynamo" not in sys.modules
        assert matplotlib.rcParams["lines.linewidth"] != colour"""
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def slow_module(tmp_path, monkeypatch):
    """A module whose import takes half a second and gets an interrupt on the way."""
    name = "imported_once"
    (tmp_path / f"{name}.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(0.5)\ndone = 1"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


@pytest.mark.parametrize("whole", [True, False])
def test_an_interrupt_waits_for_an_import_that_must_be_whole(slow_module, whole):
    # a shell that starts the tests in the background lets them ignore interrupts
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            (kernel.import_whole if whole else __import__)(slow_module)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert (slow_module in sys.modules) == whole


def test_in_another_thread_an_import_is_as_it_was(monkeypatch, tmp_path):
    (tmp_path / "imported_elsewhere.py").write_text("done = 1")
    monkeypatch.syspath_prepend(tmp_path)
    thread = threading.Thread(target=kernel.import_whole, args=("imported_elsewhere",))
    thread.start()
    thread.join()
    assert sys.modules.pop("imported_elsewhere").done == 1


# A slider in the real thing

CHROMIUM = pdf.found_chromium()
SLIDERS = """\
import os
from dmd_tutorial.notebook import plots
from dmd_tutorial.notebook.sliders import slider

def draw(slope):
    fig, ax = plots.figure(width=320, height=180)
    ax.plot([0, 1], [0, slope])
    return fig

slider(draw, [1, 2, 3, 4], "Slope", alt=lambda slope: f"A live line of slope {slope}")
os.environ["DMD_TUTORIAL_STATIC"] = "1"
slider(draw, [1, 2, 3, 4], "Slope", alt=lambda slope: f"A still line of slope {slope}")
"""
SETTINGS = ["CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR"]
OPTIONS = ["--no-browser", "--port=0", "--ip=127.0.0.1", "--allow-root"]
OPTIONS += ["--IdentityProvider.token=", "--ServerApp.allow_remote_access=False"]
SECONDS = 120  # for each thing that is waited for, on a machine that does other things too


@pytest.fixture
def jupyterlab(tmp_path):
    """The address of a JupyterLab of its own, with a notebook of two sliders."""
    pytest.importorskip("jupyterlab")
    cell = {"cell_type": "code", "source": SLIDERS, "metadata": {}}
    notebook = format_notebooks.canonical({"cells": [cell]})
    (tmp_path / "sliders.ipynb").write_text(json.dumps(notebook))
    own = {f"JUPYTER_{name}": str(tmp_path / name) for name in SETTINGS}
    own |= {f"JUPYTERLAB_{name}_DIR": str(tmp_path / name) for name in ("SETTINGS", "WORKSPACES")}
    own |= {"IPYTHONDIR": str(tmp_path / "ipython"), "DMD_TUTORIAL_STATIC": ""}
    command = [sys.executable, "-m", "jupyterlab", *OPTIONS, f"--ServerApp.root_dir={tmp_path}"]
    with subprocess.Popen(
        command, env=os.environ | own, cwd=tmp_path, stderr=subprocess.PIPE, text=True
    ) as server:
        found = (re.search(r"http://127\.0\.0\.1:\d+/lab", line) for line in server.stderr)
        address = next(filter(None, found))[0]
        threading.Thread(target=server.stderr.read, daemon=True).start()  # or the pipe fills
        yield f"{address}/tree/sliders.ipynb?reset"
        server.terminate()


def answer_dialogs(page):
    """Answers what JupyterLab asks with its default, and returns the list of what it asked.

    On a busy machine it may say that it lost the server for a moment, or that the kernel starts
    again: a dialog lies over the notebook until it is answered.
    """
    asked = []

    def answer(dialog):
        asked.append(dialog.inner_text())
        dialog.locator(".jp-mod-accept").click()

    page.add_locator_handler(page.locator("dialog.jp-Dialog"), answer)
    return asked


def run_the_cell(page, shown, asked, late):
    """Runs the notebook's cell as a reader does, who presses again where a key was lost.

    `late` is the error of a wait that took too long. On a busy machine JupyterLab may say that the
    kernel is idle before all of the page listens.
    """
    prompt = page.locator(".jp-CodeCell .jp-InputPrompt").first
    for wait in (15, 30, 60, SECONDS):
        try:
            page.locator(".jp-CodeCell .cm-content").first.click(timeout=1000 * wait)
            page.keyboard.press("Control+Enter")  # runs the cell and stays in it
            prompt.filter(has_text=re.compile(r"[*\d]")).wait_for(timeout=1000 * wait)
            prompt.filter(has_text=re.compile(r"\d")).wait_for()
            return shown.first.wait_for(timeout=1000 * wait)
        except late:
            continue
    raise AssertionError(f"no slider; the prompt: {prompt.inner_text()!r}; asked: {asked}")


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path")
def test_arrow_keys_move_live_and_still_sliders_in_jupyterlab(jupyterlab):
    """JupyterLab takes the arrow keys for its cells, but not from a slider that has the focus."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(1000 * SECONDS)
        asked = answer_dialogs(page)
        page.goto(jupyterlab)
        page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]')
        live, still = page.locator(".noUi-handle"), page.locator("figure.dmd-slider input")
        run_the_cell(page, live, asked, playwright.TimeoutError)
        for kind, control in [("live", live), ("still", still)]:
            for key, slope in [("ArrowRight", 4), ("ArrowLeft", 3), ("ArrowLeft", 2)]:
                control.press(key)
                page.wait_for_selector(f'img[alt="A {kind} line of slope {slope}"]')
        browser.close()


# Cells that run again, and not in order


@pytest.mark.parametrize("path", book_source.notebooks(), ids=lambda path: path.stem)
def test_cells_may_run_again_and_in_another_order(path):
    assert cells.breaches(book_source.read_notebook(path)) == []


SET_UP = "import torch\nfrom elsewhere import Adam, distill, dmd, draw, made"


def notebook(*sources):
    """A notebook of code cells, numbered from 1: the set-up before them is cell 0."""
    return {"cells": [{"cell_type": "code", "source": source} for source in (SET_UP, *sources)]}


@pytest.mark.parametrize(
    ("sources", "sentence"),
    [
        (["y = x"], "cell 1 reads x, which no cell above it binds"),
        (["def f():\n    return x", "x = 1"], "cell 1 reads x, which no cell above it binds"),
        (["x = 1", "y = x", "x = 2"], "cell 2 reads x, which the cells [1, 3] bind"),
        (["x = 1", "x = x + 1"], "cell 2 reads x, which the cells [1, 2] bind"),
        (["x = 1", "x += 1"], "cell 2 reads x, which the cells [1, 2] bind"),
        (["x = 1", "y = [x for _ in 'a']", "x = 2"], "cell 2 reads x, which the cells [1, 3] bind"),
        (["xs = []", "xs.append(1)"], "cell 2 changes xs of another cell: xs.append(1)"),
        (["xs = {}", "xs[0] = 1"], "cell 2 changes xs of another cell: xs[0] = 1"),
        (["xs = made()", "xs['a'] = 2 * xs['a']"], "cell 2 changes xs of another cell: xs['a'] ="),
        (["xs = made()", "del xs['a']"], "cell 2 changes xs of another cell: del xs['a']"),
        (["x = made()", "x.data[0] += 1"], "cell 2 changes x of another cell: x.data[0] += 1"),
        (["x = made()", "y = x.add_(1)"], "cell 2 changes x of another cell: x.add_(1)"),
        (["o = made()", "o.step()"], "cell 2 changes o of another cell: o.step()"),
        (["rng = made()", "draw(generator=rng)"], "cell 2 changes rng of another cell: draw(gen"),
        (["rng = made()", "draw(2, rng)"], "cell 2 changes rng of another cell: draw(2, rng)"),
        (["it = iter('ab')", "y = next(it)"], "cell 2 changes it of another cell: next(it)"),
        (
            ["net = made()", "optimizer = torch.optim.Adam(net.parameters(), lr=1)"],
            "cell 2 changes net of another cell: torch.optim.Adam(net.parameters(), lr=1)",
        ),
        (
            ["o = made()", "dmd.iteration(made(), made(), made(), o, None)"],
            "cell 2 changes o of another cell: dmd.iteration(made(), made(), made(), o, None)",
        ),
        (
            ["run = made()", "for _ in distill(run):\n    pass"],
            "cell 2 changes run of another cell: distill(run)",
        ),
        (
            ["def fit(net):\n    Adam(net.parameters())", "net = made()", "fit(net)"],
            "cell 3 changes net of another cell: fit(net)",
        ),
        (
            ["def fit(net):\n    f(net)\ndef f(n):\n    n.add_(1)", "w = made()", "fit(net=w)"],
            "cell 3 changes w of another cell: fit(net=w)",
        ),
        (["xs = []\ndef f():\n    xs.append(1)", "f()"], "cell 2 changes xs of another cell: f()"),
    ],
)  # fmt: skip
def test_cells_that_may_not_run_again_are_named(sources, sentence):
    (line,) = cells.breaches(notebook(*sources))
    assert line.startswith(sentence)


@pytest.mark.parametrize(
    "sources",
    [
        ["x = 1", "y = x"],
        ["x = 1", "x = 2\ny = x"],
        ["xs = []\nxs.append(1)", "n = len(xs)"],
        ["net = made()", "copied = made(net)\nAdam(copied.parameters())"],
        ["def fit(net):\n    net = made(net)\n    net.add_(1)", "net = made()", "fit(net)"],
        ["table = {}\ndef keep(k):\n    table[k] = made(k)", "keep('a')", "made(table)"],
        ["xs = {}", "xs['a', 1] = made()"],
        ["method = made()", "y = method.step(1)"],
        ["x = 1\ndef f(x):\n    return x", "y = f(x)"],
        ["%pip install x\nx = [row for row in 'ab' if row.strip()]"],
    ],
)
def test_cells_that_may_run_again_are_let_be(sources):
    assert cells.breaches(notebook(*sources)) == []


@pytest.mark.parametrize(
    ("source", "python"),
    [
        ("%pip install x\nif a:\n    !ls\n", "pass\nif a:\n    pass\n"),
        ("%%time\nx = 1", "pass\nx = 1"),
        ("x = (a\n    % b)", None),
        ("x = (a\n    %b)", None),
        ('text = """\n%s of\n!\n"""', None),
        ("%time f()\nx = (a\n    % b)", "pass\nx = (a\n    % b)"),
    ],
)
def test_only_what_is_no_python_is_a_command_of_ipython(source, python):
    assert cells.python(source) == (python or source)


def test_the_cells_that_a_cell_needs():
    sources = ["x = 1", "def f():\n    return x", "y = 2", "z = f()", "z + y"]
    assert cells.needed(notebook(*sources), 4) == [1, 2, 4]

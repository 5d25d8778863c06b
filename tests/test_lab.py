"""A chapter in JupyterLab: run from another folder, interrupted, its cells run twice."""

import copy
import os
import signal
import threading

import book_source
import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

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
    """Run one cell, interrupt it if it takes its time, and return whether that was needed."""
    alarm = threading.Timer(PATIENCE, os.kill, (client.km.provisioner.pid, signal.SIGINT))
    alarm.start()
    try:
        run(client, index)
    except CellExecutionError as error:
        if error.ename != "KeyboardInterrupt":
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
    cells = lab.nb.cells
    run(lab, 0)
    # Python does not recover an import that was cut in half; torch's first optimiser has one.
    cells[1].source += "\nimport torch._dynamo"
    run(lab, 1)
    times_interrupted = 0
    for index in range(2, len(cells)):
        times_interrupted += interrupted(lab, index)
        run(lab, index)
        assert errors(cells[index]) == []
    assert times_interrupted >= 1
    widgets = "application/vnd.jupyter.widget-view+json"
    shown = [output.get("data", {}) for cell in cells for output in cell.outputs]
    assert any(widgets in data for data in shown)  # it was the live form that ran


def test_an_interrupted_cell_leaves_what_stood_before(lab):
    """After an interruption the kernel knows its variables and draws on."""
    loop = copy.deepcopy(lab.nb.cells[0])
    loop.source = "kept = 41\nwhile True:\n    kept = kept"
    lab.nb.cells = [loop]
    assert interrupted(lab, 0)
    loop.source = "assert kept == 41\nkept += 1\nkept"
    assert run(lab, 0).outputs[0]["data"]["text/plain"] == "42"

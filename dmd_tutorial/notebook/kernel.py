"""A chapter's kernel: the figures' look, and an interrupted cell that leaves the next one working.

Python cannot repeat an import that was cut in half if the module has registered something on the
way. PyTorch imports such a module, ``torch._dynamo``, with the first optimiser: just when a reader
presses Stop. Here it is imported at once, and an interrupt waits until that is complete.

And ``with torch.no_grad()`` switches gradients off and on for the whole process. An interrupt just
beside the switch leaves them off. Here they are switched back after a cell that failed.
"""

import importlib
import signal
import sys
import threading
from typing import Any

import torch
from IPython import get_ipython

from dmd_tutorial.notebook import plots


def import_whole(name: str) -> None:
    """Import a module; an interrupt on the way is raised when that is done."""
    asked: list[int] = []
    if reached := threading.current_thread() is threading.main_thread():  # by interrupts
        before = signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    try:
        importlib.import_module(name)
    finally:
        if reached:
            signal.signal(signal.SIGINT, before)
    if asked:
        raise KeyboardInterrupt


def keep_gradients(shell: Any) -> None:
    """Let no failed cell leave gradients switched off in an IPython shell, from now on."""
    before = [True]  # whether they were recorded before the cell

    def remember(_: object = None) -> None:
        before[0] = torch.is_grad_enabled()

    def restore(result: Any) -> None:  # None of a cancelled cell
        if not (result and result.success):
            torch.set_grad_enabled(before[0])

    shell.events.register("pre_run_cell", remember)
    shell.events.register("post_run_cell", restore)


def setup() -> None:
    """Make a kernel ready for a chapter: the figures' look, and cells that can be interrupted.

    Outside of a notebook only the look is set. Importing the package alone changes nothing.
    """
    plots.style()
    if "ipykernel" in sys.modules and (shell := get_ipython()):
        import_whole("torch._dynamo")
        if not hasattr(shell, "_dmd_keeps_gradients"):  # once a kernel
            shell._dmd_keeps_gradients = True
            keep_gradients(shell)

"""A chapter's kernel: the figures' look, and an interrupted cell that leaves the next one working.

Python cannot repeat an import that was cut in half if the module has registered something on the
way. PyTorch imports such a module, ``torch._dynamo``, with the first optimiser: just when a reader
presses Stop. Here an interrupt waits until that import is complete.

And ``with torch.no_grad()`` switches gradients off and on for the whole process. An interrupt just
beside the switch leaves them off. Here they are switched back after a cell that failed.
"""

import _thread
import importlib.abc
import importlib.machinery
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

from IPython import get_ipython

from dmd_tutorial.notebook import plots

UNREPEATABLE = {"torch._dynamo"}
DELAY = 0.05  # seconds from the end of such an import to the interrupt that waited for it


class WholeImports(importlib.abc.MetaPathFinder):
    """Finds the modules whose import must not be cut in half, and nothing else."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        """Return the module's own specification, with a loader that is not interrupted."""
        if fullname not in UNREPEATABLE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec and spec.loader:
            whole = partial(_uninterrupted, spec.loader.exec_module)
            spec.loader.exec_module = whole  # type: ignore[method-assign]
        return spec


def _uninterrupted(execute: Callable[[ModuleType], None], module: ModuleType) -> None:
    """Execute a module, holding interrupts back if this thread is the one they reach."""
    if threading.current_thread() is not threading.main_thread():
        return execute(module)
    asked: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    try:
        return execute(module)
    finally:
        signal.signal(signal.SIGINT, before)
        if asked:  # not at once: the import statement itself must come to its end
            threading.Timer(DELAY, _interrupt).start()


def _interrupt() -> None:
    """Interrupt the main thread, also where it sleeps."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:  # Windows
        _thread.interrupt_main()


def keep_imports_whole() -> None:
    """Let no interrupt cut PyTorch's late imports in half, in this process from now on."""
    if not any(isinstance(finder, WholeImports) for finder in sys.meta_path):
        sys.meta_path.insert(0, WholeImports())


def keep_gradients(shell: Any) -> None:
    """Let no failed cell leave gradients switched off in an IPython shell, from now on."""
    before = [True]  # whether they were recorded before the cell

    def remember(_: object = None) -> None:
        if torch := sys.modules.get("torch"):
            before[0] = torch.is_grad_enabled()

    def restore(result: Any) -> None:  # None of a cancelled cell
        torch = sys.modules.get("torch")
        if torch and not (result and result.success):
            torch.set_grad_enabled(before[0])

    shell.events.register("pre_run_cell", remember)
    shell.events.register("post_run_cell", restore)


def setup() -> None:
    """Make a kernel ready for a chapter: the figures' look, and cells that can be interrupted.

    Outside of a notebook only the look is set. Importing the package alone changes nothing.
    """
    plots.style()
    if "ipykernel" in sys.modules and (shell := get_ipython()):
        keep_imports_whole()
        if not hasattr(shell, "_dmd_keeps_gradients"):  # once a kernel
            shell._dmd_keeps_gradients = True
            keep_gradients(shell)

"""Distribution matching distillation, piece by piece: the package behind the book.

Every room is a file, and each imports only from rooms below it. One interface runs through
all of them: ``denoised = D(x, sigma, label=None)``.
"""

import sys

__version__ = "0.1.0"

if "ipykernel" in sys.modules:  # in a notebook, where a reader may press Stop at any moment
    from IPython import get_ipython

    from dmd_tutorial import interrupts

    interrupts.keep_imports_whole()
    if shell := get_ipython():
        interrupts.keep_gradients(shell)

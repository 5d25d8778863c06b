"""What a notebook needs of a book: one look, code that can be read, sliders, exercises."""

from dmd_tutorial.notebook import plots
from dmd_tutorial.notebook.exercises import check
from dmd_tutorial.notebook.kernel import setup
from dmd_tutorial.notebook.results import recorded
from dmd_tutorial.notebook.sliders import slider
from dmd_tutorial.notebook.source import show_code, table

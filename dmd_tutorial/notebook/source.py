"""Show the package's code in a chapter, and tables."""

import inspect
import textwrap
from collections.abc import Callable, Iterable, Sequence

from IPython.display import Markdown, display


def show_code(*things: Callable) -> None:
    """Show functions, methods or classes of the package whole, as they stand there."""
    pieces = [textwrap.dedent(inspect.getsource(thing)).strip() for thing in things]
    display(Markdown("```python\n" + "\n\n\n".join(pieces) + "\n```"))


def table(header: Sequence, rows: Iterable[Sequence]) -> None:
    """Show a table; its cells may hold Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    display(Markdown("\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)))

"""Show the package's code in a chapter."""

import inspect
import textwrap
from collections.abc import Callable

from IPython.display import Markdown, display


def show_code(*things: Callable) -> None:
    """Show functions, methods or classes of the package whole, as they stand there."""
    pieces = [textwrap.dedent(inspect.getsource(thing)).strip() for thing in things]
    display(Markdown("```python\n" + "\n\n\n".join(pieces) + "\n```"))

"""The house: which room may import which, what an import loads, how long a docstring may be."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dmd_tutorial

PACKAGE = Path(dmd_tutorial.__file__).parent
# The map in the package's docstring, from the ground up.
FLOORS = re.findall(r"^    ([a-z_]+)/? {2,}", dmd_tutorial.__doc__, flags=re.MULTILINE)
FILES = sorted(
    path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem[0] != "_"
)


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The package's rooms that a file imports, anywhere in it."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "dmd_tutorial":
            rooms |= {alias.name for alias in node.names} - {"__version__"}
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        assert not any(name.startswith("benchmarks") for name in names), path
        rooms |= {name.split(".")[1] for name in names if name.startswith("dmd_tutorial.")}
    return rooms


def test_the_map_names_every_room():
    assert sorted(FLOORS) == sorted({room(path) for path in FILES})


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_from_rooms_below_it(path):
    mine = FLOORS.index(room(path))
    above = [name for name in imported(path) if FLOORS.index(name) > mine]
    assert not above, f"{path.name} is on floor {mine} and imports {above}"


def test_no_module_needs_itself_in_a_circle():
    """Within a wing, too; what a wing's `__init__` collects does not count for its own rooms."""
    modules = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in FILES
    }
    needs = {}
    for name, path in modules.items():
        found = {node.module for node in ast.walk(ast.parse(path.read_text()))
                 if isinstance(node, ast.ImportFrom)}  # fmt: skip
        needs[name] = {module for module in found if module in modules}
    graphlib.TopologicalSorter(needs).prepare()  # CycleError names the circle


LOADS_NOT = {
    "dmd": {"matplotlib", "torch_fidelity", "accelerate", "ipywidgets", "lpips", "tyro"},
    "training": {"matplotlib", "torch_fidelity", "accelerate", "ipywidgets", "tyro"},
    "survey.consistency": {"torch_fidelity", "matplotlib"},
    "survey.score_distillation": {"torch_fidelity", "matplotlib"},
    "runs.cli": {"matplotlib", "ipywidgets"},
}


@pytest.mark.parametrize("module", LOADS_NOT)
def test_an_import_does_not_load_what_it_does_not_need(module):
    command = f"import sys, dmd_tutorial.{module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
    assert not LOADS_NOT[module] & set(loaded.stdout.split())


def functions() -> list[tuple[str, ast.FunctionDef]]:
    """The functions and methods of the package that have a docstring."""
    return [
        (f"{path.relative_to(PACKAGE)}:{node.name}", node)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node)
    ]


def test_no_docstring_is_longer_than_its_function():
    """Its lines against those of signature and body; one line is always allowed."""
    longer = []
    for name, node in functions():
        text = node.body[0]
        lines = text.end_lineno - text.lineno + 1
        code = (node.end_lineno or 0) - node.lineno + 1 - lines
        if lines > max(1, code):
            longer.append(f"{name}: {lines} lines over {code}")
    assert not longer, "\n".join(longer)

"""What the code cells of a notebook take from one another, and what they do to it.

A reader in JupyterLab runs cells again, and not in order. That is harmless if three rules hold:

- a cell reads only names that a cell above it binds;
- a name that another cell reads is bound in one cell only, or it would mean whatever ran last;
- no cell changes an object that another cell made, or it would change it once more.

`breaches` reads the source of a notebook and names what breaks them. It knows Python's own ways
to change an object, an optimiser's, and those of the book's package; it follows calls into the
functions of the notebook. A table in which something is stored under a name is free, and so is any
table in which a function stores: storing the same again changes nothing.
"""

import ast
import builtins
import dis
import re
import symtable
from collections.abc import Iterator
from types import CodeType
from typing import NamedTuple

import book_source
from book_source import Notebook

# `% b`, with a space, goes on with a line of Python
BROKEN = (SyntaxError, ValueError, RecursionError, MemoryError)  # by what is no Python, or too deep
MAGIC = re.compile(r"^(\s*)[%!]\S.*$", flags=re.MULTILINE)
# Methods after which their object is another one than before. So are those of PyTorch's that end
# in an underscore.
CHANGE = {
    *("append", "extend", "insert", "pop", "popitem", "remove", "clear", "sort", "reverse"),
    *("add", "discard", "update", "setdefault", "load_state_dict"),
    *("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"),
}
# Functions that change some of their arguments, here by place: those that train, and `next`.
CHANGE_ARGUMENTS = {"next": [0], "update": [0], "distill": [0], "iteration": [3, 4]}
OPTIMISERS = {"SGD", "Adam", "AdamW"}  # the owners of the parameters will be changed
RANDOM_NUMBERS = {"generator", "rng"}  # arguments from which random numbers are drawn


class Cell(NamedTuple):
    """A code cell: its place in the notebook, and what it has to do with other cells.

    Attributes:
        place: Index among all cells, those of text counted.
        binds: The names that it gives a value.
        reads: The names that it takes from elsewhere.
        changes: Names from elsewhere whose objects it changes, and the code that does so.
    """

    place: int
    binds: set[str]
    reads: set[str]
    changes: dict[str, str]


def breaches(notebook: Notebook) -> list[str]:
    """Return one sentence for each place where running cells again may do harm."""
    found = cells(notebook)
    lines = []
    for cell in found:
        for name in sorted(cell.reads):
            places = [other.place for other in found if name in other.binds]
            if not any(place < cell.place for place in places):
                lines.append(f"cell {cell.place} reads {name}, which no cell above it binds")
            elif len(places) > 1:
                lines.append(f"cell {cell.place} reads {name}, which the cells {places} bind")
        for name, code in cell.changes.items():
            lines.append(f"cell {cell.place} changes {name} of another cell: {code}")
    return lines


def needed(notebook: Notebook, place: int) -> list[int]:
    """Return the places of the cells that a cell needs to run, in order, its own the last."""
    found = {cell.place: cell for cell in cells(notebook)}
    wanted, waiting = {place}, [place]
    while waiting:
        here = found[waiting.pop()]
        new = {p for p in found.keys() - wanted if p < here.place and found[p].binds & here.reads}
        wanted |= new
        waiting += new
    return sorted(wanted)


def cells(notebook: Notebook) -> list[Cell]:
    """Return the code cells of a notebook."""
    sources = {
        place: python(book_source.source(cell))
        for place, cell in enumerate(notebook["cells"])
        if cell["cell_type"] == "code"
    }
    trees = {place: ast.parse(source) for place, source in sources.items()}
    nodes = [node for tree in trees.values() for node in tree.body]
    functions = {node.name: node for node in nodes if isinstance(node, ast.FunctionDef)}
    free = set(vars(builtins)) | {
        (alias.asname or alias.name).partition(".")[0]
        for node in nodes
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    made = []
    for place, source in sources.items():
        binds = bound(source)
        changes = changed(trees[place], functions)
        own = binds | free | loop_variables(trees[place])
        foreign = {name: code for name, code in changes.items() if name not in own}
        made.append(Cell(place, binds, read(source) - vars(builtins).keys(), foreign))
    return made


def python(source: str) -> str:
    """Return a cell's source with nothing in the place of IPython's own commands."""
    try:
        ast.parse(source)
    except BROKEN:
        return MAGIC.sub(r"\1pass", source)
    return source


# Names


def bound(source: str) -> set[str]:
    """Return the names to which a cell gives a value."""
    symbols = symtable.symtable(source, "cell", "exec").get_symbols()
    return {each.get_name() for each in symbols if each.is_assigned() or each.is_imported()}


def read(source: str) -> set[str]:
    """Return the names that a cell takes from elsewhere, also when its functions are called."""
    own = bound(source)
    names = set(referenced(symtable.symtable(source, "cell", "exec")))
    seen: set[str] = set()
    for instruction in instructions(compile(source, "cell", "exec")):
        name = instruction.argval
        if instruction.opname in ("LOAD_NAME", "LOAD_GLOBAL") and name not in seen:
            own.discard(name)  # read before it is bound here
            names.add(name)
        elif instruction.opname == "STORE_NAME":
            seen.add(name)
    return names - own


def loop_variables(tree: ast.AST) -> set[str]:
    """Return the names that the comprehensions of a cell bind for themselves."""
    loops = [node.target for node in ast.walk(tree) if isinstance(node, ast.comprehension)]
    return {node.id for loop in loops for node in ast.walk(loop) if isinstance(node, ast.Name)}


def referenced(table: symtable.SymbolTable) -> Iterator[str]:
    """Yield the names of the notebook that a piece of code and the functions in it refer to."""
    is_cell = table.get_type() == "module"
    for symbol in table.get_symbols():
        if symbol.is_referenced() and (is_cell or symbol.is_global()):
            yield symbol.get_name()
    for inner in table.get_children():
        yield from referenced(inner)


def instructions(code: CodeType) -> Iterator[dis.Instruction]:
    """Yield what a cell does when it runs, comprehensions included, functions not."""
    for instruction in dis.get_instructions(code):
        yield instruction
        inner = instruction.argval
        if isinstance(inner, CodeType) and inner.co_name in (
            *("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"),
        ):
            yield from instructions(inner)


# Changes


def changed(
    tree: ast.AST, functions: dict[str, ast.FunctionDef], above: tuple[str, ...] = ()
) -> dict[str, str]:
    """Return the names whose objects a piece of code changes, and the code that does so.

    Args:
        tree: A cell, or a function whose call is followed.
        functions: The functions of the notebook.
        above: Those that are being followed already.
    """
    found: dict[str, str] = {}
    for node in running(tree):
        code = ast.unparse(node).split("\n")[0]
        for name in targets(node, in_function=bool(above)):
            found.setdefault(name, code)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            function = functions.get(node.func.id)
            if function and function.name not in above:
                for name in effects(node, function, functions, above):
                    found.setdefault(name, code)
    return found


def running(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a piece of code that run when it runs, not those of functions in it."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node
            yield from running(node)


def effects(
    call: ast.Call,
    function: ast.FunctionDef,
    functions: dict[str, ast.FunctionDef],
    above: tuple[str, ...],
) -> Iterator[str]:
    """Yield the names that a call changes: arguments, and what the function knows without them."""
    names = [argument.arg for argument in function.args.posonlyargs + function.args.args]
    given = dict(zip(names, call.args, strict=False))
    given |= {each.arg: each.value for each in call.keywords if each.arg}
    rebound = {
        node.id
        for node in ast.walk(function)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    for name in changed(function, functions, (*above, function.name)):
        if name in rebound:
            continue  # a variable of the function, or a copy of its argument
        if name in given:
            yield from root(given[name])
        elif name not in names:
            yield name


def targets(node: ast.AST, in_function: bool) -> Iterator[str]:
    """Yield the names whose objects one statement or call changes."""
    if isinstance(node, ast.AugAssign):
        yield from inside(node.target)
    elif isinstance(node, ast.Assign | ast.Delete):
        for target in node.targets:
            yield from inside(target, may_store=in_function or named_anew(target, node))
    elif isinstance(node, ast.Call):
        yield from called(node)


def named_anew(target: ast.expr, statement: ast.stmt) -> bool:
    """Return whether a statement stores under a name, and not what it makes of the old entry."""
    if not (isinstance(target, ast.Subscript) and isinstance(statement, ast.Assign)):
        return False
    names = [node for node in ast.walk(target.slice) if isinstance(node, ast.Constant)]
    used = ast.unparse(target) in ast.unparse(statement.value)
    return any(isinstance(node.value, str) for node in names) and not used


def inside(target: ast.expr, may_store: bool = False) -> Iterator[str]:
    """Yield the names of the objects of which a part is assigned; a bare name has none.

    Args:
        target: What stands left of the equals sign.
        may_store: Whether to store under a key is free.
    """
    if isinstance(target, ast.Tuple | ast.List):
        for part in target.elts:
            yield from inside(part, may_store)
    elif isinstance(target, ast.Attribute) or (isinstance(target, ast.Subscript) and not may_store):
        yield from root(target)


def called(call: ast.Call) -> Iterator[str]:
    """Yield the names of what a call changes by what it is: its object, some arguments, or all."""
    if isinstance(call.func, ast.Attribute):
        name = call.func.attr
        steps = name == "step" and not call.args  # an optimiser's, or a schedule's
        if steps or name in CHANGE or (name.endswith("_") and not name.startswith("_")):
            yield from root(call.func.value)
    elif isinstance(call.func, ast.Name):
        name = call.func.id
    else:
        return
    for place in CHANGE_ARGUMENTS.get(name, []):
        if place < len(call.args):
            yield from root(call.args[place])
    for argument in call.args:
        if isinstance(argument, ast.Name) and argument.id in RANDOM_NUMBERS - {"generator"}:
            yield argument.id
    for keyword in call.keywords:
        if keyword.arg in RANDOM_NUMBERS:
            yield from root(keyword.value)
    if name in OPTIMISERS:
        for node in ast.walk(call):
            if isinstance(node, ast.Attribute) and node.attr == "parameters":
                yield from root(node)


def root(node: ast.expr) -> Iterator[str]:
    """Yield the name at which an expression begins: x of x.a[0].b, nothing of f(x).a."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Starred):
        node = node.value
    if isinstance(node, ast.Name):
        yield node.id

"""Change each right answer a little, in every way: `check` must refuse what comes out.

    python book/tools/mutants.py            # every exercise, and the score of all
    python book/tools/mutants.py 1.2 6.3    # these, and what was let through

A mutant of a function is the chapter's own solution with one thing changed: an operator, a sign, a
number, two arguments or operands exchanged, a mean for a sum, a gradient that is not stopped. A
mutant of a value has one of its places changed. The mistakes that an exercise knows count as well,
and must be refused with their own sentence.
"""

import argparse
import ast
import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import book_source

from dmd_tutorial.notebook import exercises
from dmd_tutorial.notebook.exercises import Exercise

SECONDS = 1.0  # for one call of a mutant: some never end
OPERATORS: dict[type, Any] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
    ast.USub: ast.UAdd, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
}  # fmt: skip
CALLS = {
    "detach": "clone", "no_grad": "enable_grad", "mean": "sum", "sum": "mean", "sqrt": "abs",
    "square": "abs", "sigmoid": "tanh", "softmax": "log_softmax", "cos": "sin", "atan": "tanh",
    "relu": "tanh", "log": "exp", "exp": "log", "max": "min",
}  # fmt: skip
ORDERED = (ast.Sub, ast.Div, ast.Pow, ast.MatMult)
# Changed and yet right: the matching loss stops the gradient itself; the images are compared by
# their values.
SAME = {("6.3", "torch.enable_grad"), ("6.3", "x.clone")}


class Mutant(NamedTuple):
    """A changed answer, and the change."""

    answer: Any
    before: str
    after: str


class Score(NamedTuple):
    """How many wrong answers to an exercise there were, and which were let through."""

    tried: int
    survivors: list[str]


def operator(node: Any) -> bool:
    """Exchange an operator for its rival."""
    found = node.ops[0] if isinstance(node, ast.Compare) else getattr(node, "op", None)
    rival = OPERATORS.get(type(found))
    if rival is None:
        return False
    if isinstance(node, ast.Compare):
        node.ops[0] = rival()
    else:
        node.op = rival()
    return True


def number(node: Any) -> bool:
    """Add one to a number."""
    is_number = isinstance(node, ast.Constant) and type(node.value) in (int, float)
    if is_number:
        node.value += 1
    return is_number


def operands(node: Any) -> bool:
    """Exchange two operands or two arguments, where their order matters."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ORDERED):
        node.left, node.right = node.right, node.left
        return True
    ordered = getattr(getattr(node, "func", None), "id", None) not in ("max", "min")
    if isinstance(node, ast.Call) and len(node.args) > 1 and ordered:
        node.args[:2] = reversed(node.args[:2])
        return True
    return False


def call(node: Any) -> bool:
    """Call something else."""
    name = getattr(node, "attr", None)
    if name in CALLS:
        node.attr = CALLS[name]
    return name in CALLS


CHANGES: tuple[Callable[[Any], bool], ...] = (operator, number, operands, call)


def even(node: Any) -> Any:
    """Return what stands inside a square or a size, where a sign does not count, or nothing."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        is_square = isinstance(node.right, ast.Constant) and node.right.value == 2
        return node.left if is_square else None
    return node.value if getattr(node, "attr", None) in ("square", "abs") else None


def changed(tree: ast.stmt) -> Iterator[tuple[ast.stmt, str, str]]:
    """Yield a statement with each of its parts changed, that part before, and after."""
    signless = {even(node) for node in ast.walk(tree)}
    signless = {node for node in signless if isinstance(getattr(node, "op", None), ast.Sub)}
    for i, node in enumerate(ast.walk(tree)):
        for change in CHANGES:
            other = copy.deepcopy(tree)
            its_own = [*ast.walk(other)][i]
            if not (change is operands and node in signless) and change(its_own):
                yield other, ast.unparse(node), ast.unparse(its_own)


def solution(exercise: Exercise) -> tuple[list[ast.stmt], str]:
    """Return what a chapter's solution needs and defines, and the name of its function."""
    chapter = exercise.number.partition(".")[0]
    (path,) = book_source.BOOK.glob(f"{chapter}-*.ipynb")
    cells = [c for c in book_source.read_notebook(path)["cells"] if c["cell_type"] == "code"]
    own = f"# @title Solution {exercise.number}\n"
    (code,) = (s for c in cells if (s := book_source.source(c)).startswith(own))
    tree = ast.parse(code)
    (name,) = {
        each.args[1].id
        for each in ast.walk(tree)
        if isinstance(each, ast.Call)
        and getattr(each.func, "id", None) == "check"
        and isinstance(each.args[1], ast.Name)
    }
    used = {each.id for each in ast.walk(tree) if isinstance(each, ast.Name)}
    needed: list[ast.stmt] = []
    for cell in cells:
        source = book_source.source(cell)
        if "%pip" in source:
            continue
        for node in ast.parse(source).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                node.names = [n for n in node.names if (n.asname or n.name) in used]
                needed += [node] if node.names else []
    return needed + [n for n in tree.body if isinstance(n, ast.FunctionDef)], name


def functions(exercise: Exercise) -> Iterator[Mutant]:
    """Yield the mutants of a function, the solution first, with nothing changed."""
    body, name = solution(exercise)
    (index,) = (i for i, n in enumerate(body) if getattr(n, "name", None) == name)

    def made(node: ast.stmt) -> Any:
        module = ast.Module([*body[:index], node, *body[index + 1 :]], [])
        space: dict[str, Any] = {}
        exec(compile(ast.fix_missing_locations(module), "<solution>", "exec"), space)
        return space[name]

    yield Mutant(made(body[index]), "", "")
    for tree, before, after in changed(body[index]):
        yield Mutant(made(tree), before, after)


def values(exercise: Exercise) -> Iterator[Mutant]:
    """Yield the mutants of a value, the value itself first."""
    truth = exercise.truth
    several = list(truth) if isinstance(truth, tuple) else [truth]
    yield Mutant(truth, "", "")
    for i, value in enumerate(several):
        wrong = several if isinstance(value, str) else (-value, value / 2, 1 + 2 * abs(value), 0)
        for other in set(wrong) - {value}:
            changed = [*several[:i], other, *several[i + 1 :]]
            answer = changed if isinstance(truth, tuple) else other
            yield Mutant(answer, f"place {i + 1}: {value}", str(other))


def score(exercise: Exercise) -> Score:
    """Return what becomes of all wrong answers to an exercise.

    Raises:
        ValueError: the right one is refused.
    """
    known, survivors = exercise.mistakes, []
    for sentence, mistake in known.items():
        if not exercise.check(mistake).message.endswith(f": {sentence}"):
            survivors.append(sentence)
    bare = replace(exercise, mistakes={})  # whether it is refused, not with which sentence
    first, *mutants = (functions if callable(exercise.truth) else values)(exercise)
    if not bare.check(first.answer):
        raise ValueError(f"the solution of {exercise.number} is refused")
    patience, exercises.SECONDS = exercises.SECONDS, SECONDS
    try:
        wrong = [m for m in mutants if (exercise.number, m.after) not in SAME]
        survivors += [f"{m.before} -> {m.after}" for m in wrong if bare.check(m.answer)]
    finally:
        exercises.SECONDS = patience
    return Score(len(known) + len(wrong), survivors)


def main() -> int:
    """Run the command line; return 1 if any wrong answer is let through."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("numbers", nargs="*", help="exercises such as 3.2; default: all")
    wanted = parser.parse_args().numbers
    every = [each for chapter in exercises.chapters().values() for each in chapter]
    total = refused = 0
    for exercise in every:
        if wanted and exercise.number not in wanted:
            continue
        tried, survivors = score(exercise)
        total, refused = total + tried, refused + tried - len(survivors)
        print(f"{exercise.number}: {tried - len(survivors)} of {tried} wrong answers are refused")
        for each in survivors:
            print(f"    let through: {each}")
    print(f"mutation score: {refused} of {total}, {refused / max(total, 1):.2%}")
    return int(refused < total)


if __name__ == "__main__":
    sys.exit(main())

"""Small Python functions from a description; an answer is checked by running it."""

import ast
import random

from training.tasks.family import Family, Params
from training.tasks.words import NOUNS, VERBS

_OPS = ("add", "subtract", "multiply", "minimum", "maximum", "square")
_INPUTS = (*range(-120, 121), 1000)
"""Dense enough that a wrong step shows behind a cap."""
_SAFE_NODES = (
    ast.Module, ast.FunctionDef, ast.arguments, ast.arg, ast.Assign, ast.Name, ast.Load, ast.Store, ast.BinOp,
    ast.Add, ast.Sub, ast.Mult, ast.Constant, ast.Return, ast.Call,
)  # fmt: skip


def _sample(rng: random.Random) -> Params:
    steps = [[op, rng.randint(2, 99)] for op in rng.sample(_OPS, rng.choice((2, 3, 4)))]
    return {"name": f"{rng.choice(VERBS)}_{rng.choice(NOUNS)}", "steps": steps}


def _describe(op: str, number: int) -> str:
    return {
        "add": f"adds {number}",
        "subtract": f"subtracts {number}",
        "multiply": f"multiplies by {number}",
        "minimum": f"caps at {number}",
        "maximum": f"raises to at least {number}",
        "square": "squares",
    }[op]


def _line(op: str, number: int) -> str:
    return {
        "add": f"x = x + {number}",
        "subtract": f"x = x - {number}",
        "multiply": f"x = x * {number}",
        "minimum": f"x = min(x, {number})",
        "maximum": f"x = max(x, {number})",
        "square": "x = x * x",
    }[op]


def _phrase(params: Params, rng: random.Random) -> str:
    steps = ", then ".join(_describe(op, number) for op, number in params["steps"])
    opening = rng.choice(("Write a Python function", "Python function", "Define a Python function"))
    return f"{opening} {params['name']} that {steps}."


def _answer(params: Params) -> str:
    lines = [f"    {_line(op, number)}" for op, number in params["steps"]]
    return "\n".join([f"def {params['name']}(x):", *lines, "    return x"])


def _reference(params: Params, x: int) -> int:
    for op, number in params["steps"]:
        if op == "square":
            x = x * x
        elif op in ("minimum", "maximum"):
            x = min(x, number) if op == "minimum" else max(x, number)
        else:
            x = x + number if op == "add" else x - number if op == "subtract" else x * number
    return x


def _check(params: Params, answer: str) -> bool:
    """Runs the function on several inputs; anything but plain arithmetic on whole numbers is refused."""
    try:
        tree = ast.parse(answer)
    except (SyntaxError, ValueError):
        return False
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef):
        return False
    for node in ast.walk(tree):
        if not isinstance(node, _SAFE_NODES):
            return False
        if isinstance(node, ast.Call) and not (
            isinstance(node.func, ast.Name) and node.func.id in ("min", "max")
        ):
            return False
    scope: dict[str, object] = {"__builtins__": {}, "min": min, "max": max}
    try:
        exec(compile(tree, "<answer>", "exec"), scope)
        function = scope[params["name"]]
        return all(function(x) == _reference(params, x) for x in _INPUTS)  # type: ignore[operator]
    except Exception:
        return False


FAMILIES = (Family("python", _sample, _phrase, _answer, _check),)

"""Bound what the types of values in TorchScript source unfold to: torch's reader writes them out, shared parts and all."""

from __future__ import annotations

import ast

from se_inject.errors import LoadError

_MOST_PARTS = 10_000
"""Values within a tuple, list or dict that a function makes, written out."""
_HANDING_ON = frozenset(
    ("annotate", "unchecked_cast", "list", "dict", "tuple", "sorted", "copy", "values", "items", "keys", "pop", "get")
)
"""Calls that give what they are given; an operator's result counts as one."""


def check_values(function: ast.FunctionDef) -> None:
    """Check that no tuple, list or dict of a function, of which each may hold the one before twice, unfolds without end.

    Args:
        function: of a TorchScript archive, parsed.

    Raises:
        LoadError: one does.
    """
    sizes: dict[str, int] = {}
    todo: list[ast.stmt] = list(reversed(function.body))
    while todo:
        statement = todo.pop()
        for part in ("orelse", "finalbody", "body"):
            todo += reversed(getattr(statement, part, []))
        value = getattr(statement, "value", None)
        if not isinstance(value, ast.expr):
            continue
        size = _size(value, sizes)
        if size > _MOST_PARTS:
            raise LoadError(
                "a TorchScript archive of values within values without end", seen=f"in `{function.name[:80]}`"
            )
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", statement)]
        if len(targets) == 1 and isinstance(targets[0], ast.Tuple) and isinstance(value, ast.Tuple):
            pairs = list(zip(targets[0].elts, value.elts, strict=False))  # `a, b = x, y`: each its own
            sizes |= {
                name.id: size for name, size in [(n, _size(v, sizes)) for n, v in pairs] if isinstance(name, ast.Name)
            }
            if len(targets[0].elts) == len(value.elts) and all(isinstance(name, ast.Name) for name, _ in pairs):
                continue
        if not isinstance(statement, ast.Expr | ast.Return):
            sizes |= {name.id: size for each in targets for name in ast.walk(each) if isinstance(name, ast.Name)}


def _size(value: ast.expr, sizes: dict[str, int]) -> int:
    """Count the values in a value, written out."""
    total, todo = 0, [value]
    while todo:
        part = todo.pop()
        if isinstance(part, ast.Tuple | ast.List):
            todo += part.elts
        elif isinstance(part, ast.Dict):
            todo += [*filter(None, part.keys), *part.values]
        elif isinstance(part, ast.IfExp):
            todo += [part.body, part.orelse]
        elif isinstance(part, ast.Call):
            is_method = isinstance(part.func, ast.Attribute)
            word = part.func.attr if isinstance(part.func, ast.Attribute) else getattr(part.func, "id", "")
            if word in _HANDING_ON:
                todo += [*part.args, *([part.func.value] if is_method else [])]  # type: ignore[attr-defined]
        total += sizes.get(part.id, 1) if isinstance(part, ast.Name) else 1
    return total

"""Check the text of a forward that was written from data, and make a function of it.

A generated forward lives in ordinary frames: C code that imports or warns looks into their builtins, so all of Python's
are there. What keeps data from becoming code is this check of the text before it is compiled: statements and
expressions of a few kinds, and no name but the forward's own, those it was given, and eight of Python's.
"""

from __future__ import annotations

import ast
import linecache
import re
from collections.abc import Callable
from typing import Any

from se_inject.errors import LoadError

BUILTINS = frozenset({"Ellipsis", "RuntimeError", "float", "getattr", "len", "range", "slice", "tuple"})
"""The names of Python's that a generated forward may use."""

MOST_TOKENS = 200_000
"""Words and signs in the text of a forward: to Python's parser, each may take half a kilobyte."""

_TOKEN = re.compile(r"\w+|[^\w\s]")
_KINDS = (
    ast.Module, ast.FunctionDef, ast.arguments, ast.arg, ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.Return,
    ast.If, ast.For, ast.Break, ast.Pass, ast.Raise, ast.Call, ast.keyword, ast.Starred, ast.Name, ast.Load, ast.Store,
    ast.Attribute, ast.Subscript, ast.Slice, ast.Tuple, ast.List, ast.Dict, ast.Constant, ast.BinOp, ast.UnaryOp,
    ast.Compare, ast.operator, ast.unaryop, ast.cmpop,
)  # fmt: skip


def compiled(source: str, filename: str, scope: dict[str, Any]) -> Callable[..., Any]:
    """Compile the text of one function and make it visible to tracebacks and ``inspect``.

    Args:
        source: the text; it is checked first.
        filename: under which its lines are found.
        scope: the globals of the function, which are all the names it may use besides its own and ``BUILTINS``.

    Raises:
        LoadError: the text uses another name, or a kind of statement that no forward needs.
    """
    if sum(1 for _ in _TOKEN.finditer(source)) > MOST_TOKENS:
        raise LoadError(
            "a forward in this file is longer than any network's", seen=f"over {MOST_TOKENS:,} words and signs"
        )
    tree = ast.parse(source, filename)
    check_text(tree, scope)
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    exec(compile(tree, filename, "exec"), scope)
    scope.pop("__name__", None)  # the function has it; torch 2.9 takes a scope with a name for that module's
    return scope[tree.body[0].name]  # type: ignore[no-any-return,attr-defined]


def check_text(tree: ast.Module, scope: dict[str, Any]) -> None:
    """Check that a module is one function which names only what is its own or in its scope.

    Raises:
        LoadError: it is something else.
    """
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef) or tree.body[0].decorator_list:
        raise LoadError("a forward in this file is not a single function")
    parameters: set[str] = set()
    loaded: set[str] = set()
    stored: set[str] = set()
    for node in ast.walk(tree):
        if not isinstance(node, _KINDS) or (isinstance(node, ast.FunctionDef) and node is not tree.body[0]):
            raise LoadError(f"a forward in this file has a statement that no forward needs: {type(node).__name__}")
        if isinstance(node, ast.Attribute) and node.attr.startswith("__"):
            raise LoadError(f"a forward in this file refers to `{node.attr}`, which it must not")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id == "getattr" or scope.get(node.func.id) is getattr:
                _check_getattr(node)
        elif isinstance(node, ast.arg):
            parameters.add(node.arg)
        elif isinstance(node, ast.Name):
            (loaded if isinstance(node.ctx, ast.Load) else stored).add(node.id)
    arguments = tree.body[0].args
    given = [*arguments.defaults, *filter(None, arguments.kw_defaults)]
    outer = {part.id for each in given for part in ast.walk(each) if isinstance(part, ast.Name)}
    if unknown := outer - BUILTINS - scope.keys():  # they are evaluated outside of the function
        raise LoadError(f"a default in this file uses the name `{min(unknown)}`, which nothing sets")
    free = loaded - parameters - stored - BUILTINS - (scope.keys() - {"__builtins__"})
    reserved = {name for name in parameters | stored if name.startswith("__")}
    if free | reserved:
        raise LoadError(f"a forward in this file uses the name `{min(free | reserved)}`, which nothing sets")


def _check_getattr(node: ast.Call) -> None:
    """Check that an attribute is asked for by a name that stands in the text."""
    name = node.args[1].value if len(node.args) == 2 and isinstance(node.args[1], ast.Constant) else None
    if node.keywords or not isinstance(name, str) or name.startswith("__"):
        raise LoadError("a forward in this file reads an attribute without saying which")

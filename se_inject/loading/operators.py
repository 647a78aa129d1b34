"""Check operators, functions and methods that a stranger's file names against the allow-list in ``operators.json``.

``tests/census/operators.py`` makes it. A forward that is written in this process may say more (``se_inject.forwards``):
there the user's own code chose the operators.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from importlib import resources
from typing import Any

from torch import nn

from se_inject.errors import LoadError, either
from se_inject.forwards import bodies_in, body_of, stored_lines
from se_inject.loading.arguments import check_arguments

_PYTHON = ("getattr", "round", "assert")
_CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "_assert_async")
"""What exported programs look at their inputs with; a network doesn't take them over."""


@functools.cache
def _table() -> dict[str, frozenset[str]]:
    text = resources.files("se_inject.loading").joinpath("operators.json").read_text()
    return {space: frozenset(names) for space, names in json.loads(text).items()}


def is_allowed_operator(space: str, name: str, overload: str = "") -> bool:
    """Return whether a file may call this operator of torch's dispatcher: ``aten``, ``conv2d``, ``padding``."""
    return name in _table().get(space, ()) and "out" not in overload.split("_")


def is_allowed_function(name: str) -> bool:
    """Return whether a file may call the function that ``se_inject.forwards`` stores under this name."""
    space, _, short = name.partition(":")
    if space == "ops":
        parts = short.split(".")
        return 2 <= len(parts) <= 3 and is_allowed_operator(*parts)
    if not short:
        return name in _PYTHON
    return space == "python" or short in _table().get(space, ())


def is_allowed_check(operator: str) -> bool:
    """Return whether this operator, ``aten._assert_scalar.default``, only checks a program's inputs."""
    space, _, rest = operator.partition(".")
    return space == "aten" and rest.partition(".")[0] in _CHECKS


def trust_hint(space: str) -> str | None:
    """Say how a file may call the operators of a namespace that is not on the list; None for a namespace that has no name."""
    if not space.isidentifier():
        return None
    return f"if you trust the file: `{either(f'--trust {space}', f'trust=[{space!r}]')}` lets it call every operator `{space}::…`"


def is_allowed_method(name: Any) -> bool:
    """Return whether a file may call this method of tensors, sizes, lists and dicts."""
    return isinstance(name, str) and name in _table()["methods"]


def is_allowed_attribute(name: Any) -> bool:
    """Return whether a file may read this attribute of tensors."""
    return isinstance(name, str) and name in _table()["attributes"]


def is_allowed_instruction(kind: str) -> bool:
    """Return whether a TorchScript archive may hold this node: ``prim::If``, ``aten::relu_``."""
    space, _, name = kind.partition("::")
    return name in _table().get(space, ()) or name in _table()["script"] & {name if space == "aten" else ""}


def check_vocabulary(module: nn.Module) -> None:
    """Look at every operator, method and attribute that a module's stored forward names.

    Args:
        module: one whose forward is data, out of a file; another one has nothing to look at.

    Raises:
        LoadError: it names one that files may not use.
    """
    try:
        lines = [*stored_lines(module), *_unfused_lines(body_of(module))]
        names = list(_in_lines(lines))
        check_arguments(lines)
    except (AttributeError, TypeError, ValueError, LookupError) as error:
        raise LoadError("a damaged file: a forward of an unknown form", seen=f"{error}") from error
    for kind, name in names:
        allowed = {"function": is_allowed_function, "method": is_allowed_method, "attribute": is_allowed_attribute}[
            kind
        ]
        if not allowed(name):
            where = type(module).__name__
            raise LoadError(
                f"a forward in this file uses the {kind} `{str(name)[:80]}`", seen=f"in its {where}", hint=_hint(name)
            )


def _hint(name: Any) -> str | None:
    space = str(name).removeprefix("ops:").partition(".")[0]
    if not str(name).startswith("ops:") or space in _table():
        return None
    return (
        "a file may call operators of torch and torchvision alone; `trust` of the package that its code is in lets it "
        "call any operator that is registered in this process"
    )


def named_in_text(text: str) -> Iterator[tuple[str, Any]]:
    """List the operators, methods and attributes in the JSON text of a stored forward, each as its kind and name."""
    try:
        data = json.loads(text)
        lines = [line for each in bodies_in(data).values() for line in each]
        yield from list(_in_lines([*lines, *_unfused_lines(data)]))
    except (AttributeError, ValueError, TypeError, LookupError, RecursionError):
        return  # it is none


def blocks_in_text(text: str) -> Iterator[str]:
    """List the blocks in the JSON text of a stored forward."""
    try:
        data = json.loads(text)
        while data:
            yield from [str(step["block"]) for step in data.get("steps", [])]
            data = data.get("fused", {}).get("before")
    except (AttributeError, ValueError, TypeError, LookupError, RecursionError):
        return  # it is none


def _unfused_lines(body: dict[str, Any] | None) -> Iterator[Any]:
    """Yield the lines of what a fused forward was before, which ``si.unfuse_`` would make of it again."""
    while body and body.get("fused"):
        body = body["fused"]["before"]
        for lines in bodies_in(body).values() if body else ():
            yield from lines


def _in_lines(lines: Any) -> Iterator[tuple[str, Any]]:
    for kind, *parts in lines:
        if kind == "set":
            yield "function", parts[1]
        elif kind == "method":
            yield "method", parts[1]
        elif kind == "attribute":
            yield "attribute", parts[2]
        elif kind == "if":
            yield from _in_lines(parts[1])
            yield from _in_lines(parts[2])
        elif kind == "loop":
            yield from _in_lines(parts[3])

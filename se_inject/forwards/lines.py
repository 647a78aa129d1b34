"""Define the lines of which stored forwards consist, and answer questions about them.

A forward is a list of lines. Each is a list that begins with its kind; values are written as ``constants.encoded``
gives them, ``{"node": name}`` for what an earlier line set, ``{"training": true}`` for the module's mode:

* ``["set", names, function, args, kwargs]``: call a tensor operation, or an operator or builtin of Python;
* ``["method", names, method, args, kwargs]``: call a method of the first argument, a tensor or list;
* ``["call", names, path, args, kwargs]``: call a submodule;
* ``["own", names, method, args, kwargs]``: call a method of the module itself that is stored beside the forward, or of a submodule: ``backbone.encode``;
* ``["original", names]``: call the forward that the author wrote, with the arguments as they came;
* ``["read", names, path]``: a parameter, a buffer, or the mode;
* ``["attribute", names, value, name]``: of a tensor;
* ``["let", names, value]``, ``["raise", text]``, ``["return", value]``;
* ``["if", condition, lines, lines]``, ``["loop", index, count, condition, lines]``;
* ``["expect", "argument" or "setting", name, value]``: raise unless an argument or a plain attribute has this value.

``writer`` is the one place that checks the names in them; ``check_module`` compares them with a module's state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from se_inject.errors import LoadError
from se_inject.forwards.marks import body_of
from se_inject.forwards.own_methods import is_method_name
from se_inject.forwards.vocabulary import value_at

_WITHOUT_EFFECT = ("read", "attribute", "let", "method")  # and calls without arguments: traced identities


def all_lines(lines: list[Any]) -> Iterator[list[Any]]:
    """Yield every line, those within others too."""
    todo = list(lines)
    while todo:
        line = todo.pop()
        yield line
        if line[0] == "if":
            todo += line[2] + line[3]
        elif line[0] == "loop":
            todo += line[4]


def is_at_output(lines: list[Any]) -> bool:
    """Return whether an edited forward calls the author's and has its blocks on what that returns."""
    return any(line[0] == "original" for line in all_lines(lines))


def in_modes(lines: list[Any]) -> tuple[list[Any], list[Any] | None, list[Any]]:
    """Return an edited forward's expectations, what it does in training if that differs, and what it does in eval mode."""
    expected = [line for line in lines if line[0] == "expect"]
    rest = lines[len(expected) :]
    if len(rest) == 1 and rest[0][:2] == ["if", {"training": True}]:
        return expected, rest[0][2], rest[0][3]
    return expected, None, rest


def check_module(module: nn.Module, lines: list[Any], trusted: bool = False) -> None:
    """Check that a forward calls submodules of this module and reads its tensors and mode, and nothing else of it.

    Args:
        module: with its state; nothing of it is called.
        lines: its forward, checked by the writer already.
        trusted: whether methods of submodules that aren't lines themselves may be called.

    Raises:
        LoadError: it calls or reads something else.
    """
    for kind, *parts in all_lines(lines):
        if kind == "call" and not isinstance(value_at(module, parts[1]), nn.Module):
            raise LoadError(f"a forward in this file calls `{parts[1]}`, which is not a submodule")
        if kind == "own" and "." in parts[1] and not _may_call(module, parts[1], trusted):
            raise LoadError(f"a forward in this file calls `{parts[1]}`, which is not a method that it may call")
        if kind == "read" and not isinstance(value_at(module, parts[1]), torch.Tensor | bool | None):
            raise LoadError(f"a forward in this file reads `{parts[1]}`, which is not a tensor")


def _may_call(module: nn.Module, path: str, trusted: bool) -> bool:
    """Return whether a path leads to a method of a submodule that is lines too, or that an author wrote."""
    place, _, name = path.rpartition(".")
    child = value_at(module, place)
    if not isinstance(child, nn.Module):
        return False
    is_data = name in (body_of(child) or {}).get("methods", {})
    return is_data or (trusted and is_method_name(type(child), name))


def without_unused(lines: list[Any]) -> list[Any]:
    """Return the lines without reads, sizes and copies that nobody uses."""
    return _kept(lines, set())


def _kept(lines: list[Any], used: set[str]) -> list[Any]:
    """Return those lines that are needed where these names are used afterwards; add to the names what they use."""
    result = []
    for kind, *parts in reversed(lines):
        if kind == "if":
            parts = [parts[0], _kept(parts[1], used), _kept(parts[2], used)]
            if not parts[1] and not parts[2]:
                continue
            used.update(names_in(parts[0]))
        elif kind == "loop":
            used.update(names_in([kind, *parts]))  # what a turn sets, the next one may use
            parts = [*parts[:3], _kept(parts[3], used)]
        elif kind in ("raise", "return"):
            used.update(names_in(parts))
        elif not used.intersection(parts[0]) and (kind in _WITHOUT_EFFECT or (kind == "call" and not parts[2])):
            continue
        else:
            used.update(names_in(parts[1:]))
        result.append([kind, *parts])
    return result[::-1]


def names_in(value: Any) -> Iterator[str]:
    """Yield every name that a value or line reads."""
    if isinstance(value, dict):
        if "node" in value:
            yield value["node"]
        for item in value.values():
            yield from names_in(item)
    elif isinstance(value, list):
        if value[:1] == ["loop"]:
            yield value[3]
        elif value[:2] == ["expect", "argument"]:
            yield value[2]
        for item in value:
            yield from names_in(item)


def last_uses(lines: list[Any]) -> dict[str, int]:
    """Return for every name the last of these lines that reads or sets it."""
    last: dict[str, int] = {}
    for index, line in enumerate(lines):
        for name in (*names_in(line), *names_set([line])):
            last[name] = index
    return last


def names_set(lines: list[Any]) -> Iterable[str]:
    """Yield every name that these lines set, those within others too."""
    for kind, *parts in lines:
        if kind == "if":
            yield from names_set([*parts[1], *parts[2]])
        elif kind == "loop":
            yield parts[0]
            yield from names_set(parts[3])
        elif kind not in ("return", "raise", "expect"):
            yield from parts[0]

"""Find the plain values that a forward reads besides its arguments: attributes of its module, its children and its configuration."""

from __future__ import annotations

import contextlib
import copy
import dis
import functools
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import Tensor, nn

_PLAIN = (bool, int, float, str, type(None))
_OWN = frozenset(vars(nn.Module())) | {"_compiled_call_impl", "_version"}
_LARGEST = 200
"""So many values a list or dict may hold to be compared at each call."""


def settings_of(module: nn.Module) -> dict[str, Any]:
    """Find the attributes of a module that are plain values, or lists, tuples and dicts of some."""
    return {name: value for name, value in vars(module).items() if name not in _OWN and is_plain(value)}


def is_plain(value: Any) -> bool:
    """Return whether a value is a number (not NaN), text, None, or a small list, tuple or dict of such."""
    return _size(value) <= _LARGEST


def recorded(value: Any) -> Any:
    """Return a value as it is now, whatever is put into it later."""
    return value if type(value) in _PLAIN else copy.deepcopy(value)


def nested_settings(module: nn.Module, method: str = "forward") -> Iterator[tuple[str, Any]]:
    """Find the plain attributes of children and of plain objects that a module's method names: ``self.config.scale``."""
    kind: Any = type(module)
    for name, fields in pairs_in(kind, method).items():
        inner = module._modules.get(name, vars(module).get(name))
        if not isinstance(inner, nn.Module) and (isinstance(inner, (Tensor, type)) or callable(inner)):
            continue
        for field, value in (getattr(inner, "__dict__", None) or {}).items():
            if field in fields and field not in _OWN and is_plain(value):
                yield f"{name}.{field}", recorded(value)


def _size(value: Any, depth: int = 0) -> int:
    if type(value) in _PLAIN and value == value:  # NaN differs from itself: it can't be compared later
        return 1
    if type(value) in (list, tuple) and depth < 4:
        return 1 + sum(_size(item, depth + 1) for item in value[: _LARGEST + 1])
    if type(value) is dict and depth < 4 and len(value) <= _LARGEST and all(type(key) is str for key in value):
        return 1 + sum(_size(item, depth + 1) for item in value.values())
    return _LARGEST + 1


@functools.lru_cache(maxsize=2_000)
def codes_of(kind: type, method: str) -> tuple[CodeType, ...]:
    """Return the code of a class's method, and of the methods and functions of its author's that it names."""
    found: dict[CodeType, None] = {}
    pending: list[Any] = [getattr(kind, method, None)]
    while pending:
        item = pending.pop()
        function = item.fget if isinstance(item, property) else item
        if not isinstance(function, FunctionType) or (function.__module__ or "").partition(".")[0] == "torch":
            continue
        codes = _with_inner(function.__code__)
        if codes[0] in found:
            continue
        found |= dict.fromkeys(codes)
        names = {name for code in codes for name in code.co_names}
        pending += [function.__globals__.get(name) for name in names]
        pending += [next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None) for name in names]
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # it is empty
                pending.append(cell.cell_contents)
    return tuple(found)


def _with_inner(code: CodeType) -> list[CodeType]:
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return [code, *(each for one in inner for each in _with_inner(one))]


@functools.lru_cache(maxsize=2_000)
def names_in(kind: type, method: str) -> frozenset[str]:
    """Return the names in the code of a class's method, and of the methods and functions that it names."""
    return frozenset(name for code in codes_of(kind, method) for name in code.co_names)


@functools.lru_cache(maxsize=2_000)
def pairs_in(kind: type, method: str) -> dict[str, set[str]]:
    """Return, by attribute, the attributes that a class's method reads right after it, as in ``self.config.scale``."""
    found: dict[str, set[str]] = {}
    for code in codes_of(kind, method):
        before = None
        for instruction in dis.get_instructions(code):
            if instruction.opname in ("CACHE", "EXTENDED_ARG"):
                continue
            name = instruction.argval if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") else None
            if before is not None and name is not None:
                found.setdefault(before, set()).add(name)
            before = name
    return found

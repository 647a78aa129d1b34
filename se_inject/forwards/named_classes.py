"""Find the author's classes that a forward names: containers that it makes, and autograd functions that it applies.

A stored forward names a class by the module it was defined in and its name there. Nothing is imported to find it: whoever
read the author's network has imported its module, or else the class isn't found.
"""

from __future__ import annotations

import dataclasses
import sys
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from se_inject.errors import LoadError

MAKE, APPLY = "make", "apply"
"""In front of the name of a class: what a forward does with it."""

_LOCAL: weakref.WeakValueDictionary[str, type] = weakref.WeakValueDictionary()
"""Classes that were defined within a function: only this process knows them."""


class Unlike:
    """Stands in a graph for the construction of a container that isn't like its contents: no forward can be written of it."""

    def __init__(self, kind: type) -> None:
        self.__name__ = kind.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # pragma: no cover - a graph with it is refused
        raise NotImplementedError


def class_name(what: str, kind: type) -> str:
    """Return the name under which ``class_named`` finds a class."""
    name = f"{kind.__module__}:{kind.__qualname__}"
    if _found(name) is not kind:
        name = f"{name}@{id(kind):x}"
        _LOCAL[name] = kind
    return f"{what}:{name}"


def class_named(name: str) -> Callable[..., Any] | None:
    """Return the class that a forward makes a container of, or the function of one that it applies; None: it is neither.

    Raises:
        LoadError: there is no such class in this process.
    """
    what, _, address = name.partition(":")
    if what not in (MAKE, APPLY):
        return None
    kind: Any = _LOCAL.get(address) or _found(address)
    if kind is None:
        module, _, short = address.partition(":")
        raise LoadError(
            f"a forward refers to the class `{short.partition('@')[0]}` of `{module}`, which is not there in this process",
            hint=f"import `{module}` first",
        )
    if what == APPLY:
        return kind.apply if issubclass(kind, torch.autograd.Function) else None
    return kind if is_container(kind) else None


def is_container(kind: Any) -> bool:
    """Return whether instances of a class only hold values: of a class of dicts, lists or tuples, a dataclass, or plain attributes."""
    if not isinstance(kind, type) or issubclass(kind, (Tensor, nn.Module, type)):
        return False
    return issubclass(kind, (dict, list, tuple)) or dataclasses.is_dataclass(kind) or _has_attributes(kind)


def field(value: Any, name: str) -> Any:
    """Return an attribute of a container, as the author's forward reads it.

    Raises:
        LoadError: the value is not a container, or the name begins with an underscore.
    """
    if name.startswith("_") or not is_container(type(value)):
        raise LoadError(f"a forward in this file reads `{name}` of a {type(value).__name__}")
    return getattr(value, name)


def _has_attributes(kind: type) -> bool:
    """Return whether instances of a class keep attributes and aren't to be called; Python's and torch's own classes are left out."""
    home = kind.__module__.partition(".")[0]
    if kind is SimpleNamespace:
        return True
    is_called = any("__call__" in vars(each) for each in kind.__mro__)
    known = home in sys.stdlib_module_names - {"__main__"} or home == "torch"
    return not (is_called or known or issubclass(kind, _CLOSED)) and "__dict__" in dir(kind)


_CLOSED = (
    str,
    bytes,
    int,
    float,
    complex,
    BaseException,
    type(sys),
    torch.device,
    torch.dtype,
    torch.autograd.Function,
)


def _found(name: str) -> Any:
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = None if found is None or part.startswith("__") else vars(found).get(part)
    return found if isinstance(found, type) else None

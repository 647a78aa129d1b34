"""Make containers of an author's classes from their contents, so that a graph can make them too.

``ModelOutput``, named tuples, dataclasses, classes of dicts, lists and tuples, objects with plain attributes. A way of
making one is taken only if what it makes is like the author's: the same class, contents and attributes.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator
from types import GetSetDescriptorType, MemberDescriptorType
from typing import Any

from torch import Size, Tensor, nn

from se_inject.forwards import is_container

Form = Callable[[dict[Any, Any]], tuple[tuple[Any, ...], dict[str, Any]]]
"""From the contents by key, position or name to the arguments of the class."""
_PLAIN = (tuple, list, dict, Size)
_NOT_SPECIAL = frozenset([*_PLAIN, Tensor, nn.Parameter, bool, int, float, str, type(None)])


def is_special(value: Any) -> bool:
    """Return whether a value is a container of another class than Python's own."""
    kind = type(value)
    return kind not in _NOT_SPECIAL and not isinstance(value, (Tensor, nn.Module, type)) and is_container(kind)


def contents(container: Any) -> dict[Any, Any]:
    """Return what a container holds: by key, by position, or by the name of the attribute."""
    if isinstance(container, dict):
        return {key: dict.__getitem__(container, key) for key in dict.keys(container)}
    if isinstance(container, list):
        return dict(enumerate(list.__iter__(container)))
    if isinstance(container, tuple):
        return dict(enumerate(tuple.__iter__(container)))
    if dataclasses.is_dataclass(container):
        return {each.name: getattr(container, each.name) for each in dataclasses.fields(container)}
    return {**vars(container), **{name: getattr(container, name) for name in _slots(type(container))}}


def form_of(container: Any) -> Form | None:
    """Return how a container of this class is made from its contents; None if no plain way makes one like it."""
    held = contents(container)
    for form in _forms(container):
        try:
            args, kwargs = form(held)
            other = type(container)(*args, **kwargs)
            alike = _alike(container, other)
        except Exception:  # the author's own constructor: another way may suit it
            continue
        if alike:
            return form
    return None


def made(kind: type, form: Form, held: dict[Any, Any]) -> Any:
    """Make a container of these contents."""
    args, kwargs = form(held)
    return kind(*args, **kwargs)


def _forms(container: Any) -> Iterable[Form]:
    if isinstance(container, dict):
        by_name = all(isinstance(key, str) and key.isidentifier() for key in container)
        names: list[Form] = [lambda held: ((), dict(held))] if by_name else []
        mapping: Form = lambda held: ((dict(held),), {})  # noqa: E731
        return [*names, mapping] if dataclasses.is_dataclass(container) else [mapping, *names]
    if isinstance(container, list | tuple):
        positions: Form = lambda held: (tuple(held.values()), {})  # noqa: E731
        one: Form = lambda held: ((list(held.values()),), {})  # noqa: E731
        return [positions] if hasattr(container, "_fields") else [one, positions]
    if dataclasses.is_dataclass(container):
        wanted = {each.name for each in dataclasses.fields(container) if each.init}
        return [lambda held: ((), {name: item for name, item in held.items() if name in wanted})]
    everything: Form = lambda held: ((), dict(held))  # noqa: E731
    try:
        parameters = inspect.signature(type(container)).parameters
    except (TypeError, ValueError):
        return [everything]
    return [lambda held: ((), {name: item for name, item in held.items() if name in parameters}), everything]


def _alike(one: Any, other: Any) -> bool:
    """Return whether two values are of the same classes and hold the very same things."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, bool | int | float | str | None):
        return bool(one == other)
    if type(one) in _PLAIN or is_special(one):
        parts, others = contents(one), contents(other)
        if list(parts) != list(others) or not all(_alike(parts[key], others[key]) for key in parts):
            return False
        own, its = getattr(one, "__dict__", {}), getattr(other, "__dict__", {})
        same = own.keys() == its.keys() and all(_alike(own[key], its[key]) for key in own)
        return same and all(_alike(getattr(one, name, None), getattr(other, name, None)) for name in _slots(type(one)))
    return False


def _slots(kind: type) -> Iterator[str]:
    """Yield the attributes that are not in ``__dict__``: those of ``__slots__`` and of classes written in C."""
    for each in kind.__mro__:
        for name, found in vars(each).items():
            if isinstance(found, MemberDescriptorType | GetSetDescriptorType) and not name.startswith("__"):
                yield name


def holds(value: Any, wanted: Callable[[Any], bool], depth: int = 4) -> bool:
    """Return whether a value is one that is wanted, or a container, of an author's class too, that holds one."""
    if wanted(value):
        return True
    if depth and (isinstance(value, dict | list | tuple) or is_special(value)):
        return any(holds(item, wanted, depth - 1) for item in contents(value).values())
    return False

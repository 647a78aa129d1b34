"""Check the values that a module out of a file holds: data, and functions only where the library's own constructor puts them.

Data is tensors, numbers, text, None, containers of these, and modules. The forward of an allowed class calls what it finds in
its attributes, so a function of the file's choosing would be called, with the network's values. ``values.json`` says which
constructor puts which function, class or partial where; ``tests/census/values.py`` makes it from all networks of the zoos.
"""

from __future__ import annotations

import enum
import functools
import inspect
import json
import types
import weakref
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any

import torch
from torch import nn

from se_inject.errors import LoadError
from se_inject.loading.pickles.allowlist import is_data, within

_PLAIN = (
    type(None), bool, int, float, complex, str, bytes, bytearray, range, slice, torch.Tensor, torch.dtype, torch.device,
    torch.layout, torch.memory_format, nn.Module, enum.Enum,
)  # fmt: skip
_LARGEST = 2**53
_LONGEST_TEXT = 1_000


@functools.cache
def _tables() -> tuple[dict[str, dict[str, list[str]]], frozenset[str]]:
    found = json.loads(resources.files("se_inject.loading.pickles").joinpath("values.json").read_text())
    return found["callables"], frozenset(found["lookups"])


class ValueChecks:
    """Looks at the attributes of all modules of one file.

    Args:
        trust: packages whose functions and classes may stand anywhere.
    """

    def __init__(self, trust: Sequence[str]) -> None:
        self._trust = trust
        self._data: set[int] = set()
        """The addresses of containers that hold nothing but data, wherever they stand."""

    def check(self, module: nn.Module, state: dict[str, Any]) -> None:
        """Look at the attributes of a module.

        Args:
            module: of a class that was not trusted.
            state: its attributes, without the tables of its parameters, buffers and children.

        Raises:
            LoadError: it holds what is not data, or text that its class would take for the name of a method.
        """
        kind = type(module)
        names = {f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__}
        looks_up = not names.isdisjoint(_tables()[1])
        for name, value in state.items():
            if isinstance(value, _PLAIN) and not (looks_up and isinstance(value, str)):
                self._check_number(kind, name, value)
                continue
            for part in self._parts(value, looks_up):
                if isinstance(part, str):
                    if hasattr(kind, part):
                        raise LoadError(
                            f"a {kind.__name__} in this file has the name of a method, `{part[:80]}`, among its data",
                            seen=f"its `{name[:100]}` is a list of submodules",
                        )
                elif not self._may_stand(module, names, name, part):
                    raise LoadError(
                        f"a {kind.__name__} in this file holds {_described(part)} as its `{name[:100]}`",
                        seen="no network of torch, torchvision or timm has that there; data is what a file may hold",
                    )

    def _check_number(self, kind: type, name: str, value: Any) -> None:
        if type(value) is int and abs(value) > _LARGEST:
            raise LoadError(f"a {kind.__name__} in this file has a `{name[:100]}` of {value.bit_length()} bits")

    def _parts(self, value: Any, with_text: bool) -> Iterator[Any]:
        """Iterate over the parts of a value that are not plain data; text too, if its class looks things up by text."""
        todo, inside, before = [value], [], len(self._data)
        found = False
        while todo:
            part = todo.pop()
            if isinstance(part, str):
                if with_text and len(part) < _LONGEST_TEXT:
                    yield part
            elif isinstance(part, _PLAIN):
                continue
            elif isinstance(part, dict | list | tuple | set | frozenset) or is_data(type(part)):
                if id(part) in self._data and not with_text:
                    continue
                if id(part) not in self._data:
                    inside.append(id(part))
                    self._data.add(id(part))
                    todo += _inside(part)
            else:
                found = True
                yield part
        if found or with_text:  # elsewhere it would have to be looked at anew
            self._data.difference_update(inside)
        assert len(self._data) >= before

    def _may_stand(self, module: nn.Module, names: set[str], name: str, value: Any) -> bool:
        if self._trust and within(str(getattr(value, "__module__", None) or ""), self._trust):
            return True
        if isinstance(value, weakref.ref) and name == "_flat_weight_refs" and isinstance(module, nn.RNNBase):
            return True  # its own __setstate__ made it, of its own weights
        if isinstance(value, types.MethodType) and value.__self__ is not module:
            return False
        text = described(value)
        return text is not None and any(text in _tables()[0].get(kind, {}).get(name, ()) for kind in names)


def _inside(container: Any) -> list[Any]:
    if isinstance(container, dict):
        return [*container.keys(), *container.values()]
    if isinstance(container, list | tuple | set | frozenset):
        return list(container)
    return list(vars(container).values())


def described(value: Any) -> str | None:
    """Describe a function, class, partial or bound method as ``values.json`` names it; None for anything else."""
    if isinstance(value, functools.partial):
        inner = described(value.func)
        plain = all(_is_short(part) for part in (*value.args, *value.keywords.values())) and not vars(value)
        return (
            f"partial {inner} {len(value.args)} {' '.join(sorted(value.keywords))}".strip() if inner and plain else None
        )
    if isinstance(value, types.MethodType):
        return f"method {value.__func__.__name__}"
    if inspect.isbuiltin(value):
        return f"{value.__module__ or getattr(value.__self__, '__name__', '')}.{value.__name__}"
    if isinstance(value, type) or inspect.isfunction(value):
        return f"{value.__module__}.{value.__qualname__}"
    return None


def _is_short(value: Any) -> bool:
    is_text = type(value) is str and len(value) < 100
    return is_text or value is None or (type(value) in (bool, int, float) and abs(value) < 2**31)


def _described(value: Any) -> str:
    kind = "the class" if isinstance(value, type) else "the function"
    if isinstance(value, functools.partial):
        return f"a functools.partial of `{described(value.func)}`"
    name = described(value)
    return f"{kind} `{name}`" if name else f"a {type(value).__name__}"

"""Write the arguments of a call in a forward as JSON and read them again, with a word for each kind that JSON lacks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from se_inject.errors import LoadError, SurgeryError

_CONSTANTS = {
    "dtype": torch.dtype,
    "memory_format": torch.memory_format,
    "layout": torch.layout,
}


class Form:
    """Return the length of ``*args``, or the names in ``**kwargs``."""

    def __init__(self, form: int | tuple[str, ...]) -> None:
        self.form = form


def encoded(value: Any) -> Any:
    """Encode a graph's argument as plain data; nodes by name.

    Raises:
        SurgeryError: it can't be written down.
    """
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, Form):
        return {"form": encoded(value.form)}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if value is ...:
        return {"ellipsis": True}
    if isinstance(value, slice):
        return {"slice": [encoded(part) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, dict):
        return {"dict": [[encoded(key), encoded(item)] for key, item in value.items()]}
    if type(value) is tuple or isinstance(value, torch.Size):
        return {"tuple": [encoded(item) for item in value]}
    if isinstance(value, list):
        return [encoded(item) for item in value]
    for name, kind in _CONSTANTS.items():
        if isinstance(value, kind):
            return {name: str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    raise SurgeryError(f"its forward holds a {type(value).__name__} as a constant, which can't be written down")


def decoded(value: Any, nodes: dict[str, fx.Node]) -> Any:
    """Decode a graph's argument out of plain data.

    Args:
        value: what ``encoded`` gave.
        nodes: the graph's nodes by name.

    Raises:
        LoadError: it is not a constant that a forward may hold.
    """
    if isinstance(value, list):
        return [decoded(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind == "tuple":
        return tuple(decoded(item, nodes) for item in content)
    if kind == "dict":
        return {checked_key(key): decoded(item, nodes) for key, item in content}
    if kind == "slice":
        return slice(*(decoded(item, nodes) for item in content))
    if kind == "ellipsis":
        return ...
    if kind == "float":
        return float(content)
    if kind == "device":
        return torch.device(content)
    constant = getattr(torch, content)
    if not isinstance(constant, _CONSTANTS[kind]):
        raise LoadError(f"a forward in this file holds `{content}` as a {kind}")
    return constant


def checked_key(key: Any) -> Any:
    """Check a key of a dict in a forward.

    Raises:
        LoadError: it is neither text nor a small number, and many of them could have one hash.
    """
    if key is not None and type(key) not in (str, bool) and not (type(key) is int and abs(key) < 2**31):
        raise LoadError("a forward in this file holds a dict whose keys are not names")
    return key
